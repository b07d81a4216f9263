"""Draws benchmarks/results/plots/*.svg from the committed CSVs, and from nothing else. `python -m benchmarks.plots`

If a CSV is missing, its plot is left out. The same CSV gives the same bytes with the same matplotlib, since there are no dates
and the ids are fixed.

    rows_<device>.svg, linear_<device>.svg     time of each contender beside the floor, and its gradient error
    layers_<device>.svg                        layer distillation beside its floor
    peers_<device>.svg                         the linear loss at the shapes of model pairs
    memory_<device>.svg                        peak extra memory over N and over V
    sweep_<device>.svg                         ns per token and vocabulary id of the linear loss over N, V, H, chunk and threads
    breakdown_<device>.svg                     where its time goes
    accuracy_<device>.svg                      gradient error at random states and near convergence
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, FLOOR, OTHER = "#c1440e", "#2f2f2f", "#8da0b5"
# A contender has one colour in all line plots; those that are not named here share the last.
LINE_COLOURS = {
    "eager": "#6b8fb5", "torch.compile": "#2f5d8a", "CAAD authors' form": "#7f5539",
    "Liger chunked JSD, compiled, chunk 256": "#8fb573", "Liger chunked JSD, compiled, chunk 1024": "#4a7c3f",
}  # fmt: skip
# Lines of this library have one colour and differ in their dashes and markers: a part of the name, dashes, marker.
OUR_LINES = (
    ("rounded contrast", ":", "D"), ("fp32 logits", "--", "^"), ("from projections", "-.", "o"), ("bf16 logits", "-", "s"),
)  # fmt: skip
WIDTH = 8.0  # inches: about the width of a page, so that the text keeps its size
SMALL = 7.5  # points
Rows = list[dict[str, str]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--out", type=Path, help="folder of the plots (default: <results>/plots)")
    args = parser.parse_args(argv)
    out = args.out or args.results / "plots"
    drawn = [path for device in ("cpu", "cuda") for path in draw_all(args.results, device, out)]
    for path in drawn:
        print(path)
    if not drawn:
        raise SystemExit(f"--results: expected a folder with CSV files to draw, got {args.results}")


def set_style() -> None:
    """matplotlib's settings of all plots."""
    import matplotlib

    matplotlib.use("Agg")
    # Ids in an SVG come from this salt instead of a random one.
    # Text stays text, because outlines would take ten times the size.
    matplotlib.rcParams.update({"svg.hashsalt": "kdkernels", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})


def draw_all(results: Path, device: str, out: Path) -> list[Path]:
    set_style()
    drawn = []
    for name, (source, draw) in plots().items():
        path = results / f"{source}_{device}.csv"
        if path.exists():
            out.mkdir(parents=True, exist_ok=True)
            drawn.append(out / f"{name}_{device}.svg")
            draw_file(path, draw).savefig(drawn[-1], metadata={"Date": None, "Creator": None})
    return drawn


def plots() -> dict[str, tuple[str, Callable[[Rows], Figure]]]:
    """Name of a plot -> (name of its CSV, function that draws it)."""
    return {
        "rows": ("rows", draw_rows),
        "linear": ("linear", draw_linear),
        "tradeoff": ("linear", draw_tradeoff),
        "layers": ("layers", draw_layers),
        "peers": ("peers", draw_peers),
        "memory": ("memory", draw_memory),
        "sweep": ("linear_sweep", draw_sweep),
        "breakdown": ("linear_sweep", draw_breakdown),
        "accuracy": ("accuracy", draw_accuracy),
    }


def draw_file(path: Path, draw: Callable[[Rows], Figure]) -> Figure:
    """The plot of a CSV, with the origin of its rows at the bottom."""
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    figure = draw(rows)
    origins = dict.fromkeys(f"{r['device']}; torch {r['torch']}, commit {r['commit']}, {r['date']}" for r in rows)
    figure.supxlabel("\n".join(origins), size=7, color="#777777")
    return figure


def number(text: str) -> float:
    """NaN for an empty cell."""
    return float(text) if text else math.nan


def colour(contender: str) -> str:
    if contender.startswith("kdkernels"):
        return OURS
    return FLOOR if contender.startswith(("bare", "copy", "floor")) else OTHER


def milliseconds(value: float) -> str:
    """Three digits or more, and never a power of ten: 0.71, 9.51, 27.4, 594, 3,575."""
    return f"{value:,.0f} ms" if value >= 99.95 else f"{value:.1f} ms" if value >= 9.995 else f"{value:.2f} ms"


def thousands(value: float) -> str:
    """1,024 and 49,152, but 64k from 65,536 on: a tick has little room."""
    return f"{value / 1024:g}k" if value >= 65536 and value % 1024 == 0 else f"{value:,.10g}"


def _figure(heights: Sequence[float], columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the width of a page, with a row of panels for each height in inches."""
    from matplotlib import pyplot

    pyplot.close("all")
    figure, axes = pyplot.subplots(
        len(heights), columns, figsize=(WIDTH, sum(heights)), squeeze=False, height_ratios=list(heights)
    )
    return figure, list(axes.flat)


def _bars_height(rows: Rows) -> float:
    """Inches of a panel of `_time_bars`: a line for each contender, the title and the axis."""
    return 0.75 + 0.2 * sum(bool(r["median_ms"]) for r in rows)


def _legend(figure: Figure, axis: Axes, columns: int) -> None:
    """One legend for all panels, above them: there it covers no line, no bar and no tick."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=SMALL, frameon=False)


def _time_bars(axis: Axes, rows: Rows, title: str) -> None:
    """Milliseconds with quartiles, and the gradient error beside each bar. The fastest is on top."""
    rows = sorted((r for r in rows if r["median_ms"]), key=lambda r: -number(r["median_ms"]))
    medians = [number(r["median_ms"]) for r in rows]
    spread = [
        [m - number(r["low_ms"]) for m, r in zip(medians, rows, strict=True)],
        [number(r["high_ms"]) - m for m, r in zip(medians, rows, strict=True)],
    ]
    names = [r["contender"] for r in rows]
    # The caps and the gap before the text keep a whisker from looking like the minus sign of a number.
    whisker = {"lw": 0.9, "ecolor": "#000000", "capsize": 2.5}
    axis.barh(names, medians, xerr=spread, color=[colour(x) for x in names], error_kw=whisker)
    for i, row in enumerate(rows):
        error = number(row["gradient_error"])
        text = milliseconds(medians[i]) + ("" if math.isnan(error) else f", error {error:.1e}")
        place = (number(row["high_ms"]), i)
        axis.annotate(text, place, xytext=(7, 0), textcoords="offset points", va="center", size=SMALL)
    axis.set_xlim(0, max(number(r["high_ms"]) for r in rows) * 1.5)
    axis.set_title(title, size=9, loc="left")
    axis.set_xlabel("ms (median; whiskers: quartiles)", size=8)
    axis.tick_params(labelsize=SMALL)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def draw_rows(rows: Rows) -> Figure:
    panels = [[r for r in rows if r["dtype"] == dtype] for dtype in dict.fromkeys(r["dtype"] for r in rows)]
    figure, axes = _figure([_bars_height(p) for p in panels])
    for axis, chosen in zip(axes, panels, strict=True):
        first = chosen[0]
        _time_bars(axis, chosen, f"row kernel, {int(first['rows']):,} tokens, {int(first['vocab']):,} ids, {first['dtype']}")
    return figure


def draw_linear(rows: Rows) -> Figure:
    figure, axes = _figure([_bars_height(rows)])
    first = rows[0]
    sizes = f"{int(first['tokens']):,} tokens, {int(first['vocab']):,} ids, widths {first['student_width']} and "
    title = f"linear loss and dL/dh, {sizes}{first['teacher_width']}, {first['dtype']}"
    _time_bars(axes[0], rows, title)
    return figure


def draw_tradeoff(rows: Rows) -> Figure:
    """Time against gradient error: far from convergence (hollow) and near it (filled). Down and left is better."""
    rows = [r for r in rows if number(r["gradient_error"]) > 0 and number(r.get("gradient_error_near", "")) > 0]
    rows = sorted(rows, key=lambda r: number(r["median_ms"]))
    figure, axes = _figure([3.6])
    axis = axes[0]
    for mark, row in zip("osD^vP*X<>", rows, strict=False):
        x, tint = number(row["median_ms"]), colour(row["contender"])
        far, near = number(row["gradient_error"]), number(row["gradient_error_near"])
        axis.plot([x, x], [far, near], color=tint, lw=0.8, alpha=0.5)
        axis.scatter([x], [far], marker=mark, s=34, c="#ffffff", edgecolors=tint, linewidths=1.2, zorder=3)
        axis.scatter([x], [near], marker=mark, s=34, c=tint, edgecolors=tint, zorder=3, label=row["contender"])
    axis.set_yscale("log")
    axis.set_xlim(left=0)
    axis.set_xlabel("ms (median)", size=8)
    axis.set_ylabel("relative gradient error", size=8)
    axis.set_title("hollow: random states; filled: near convergence", size=9, loc="left")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.grid(visible=True, lw=0.4)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=SMALL)
    _legend(figure, axis, columns=2)
    return figure


def draw_layers(rows: Rows) -> Figure:
    kinds = dict.fromkeys((r["pair"], r["dtype"], r["normalize"]) for r in rows)
    panels = [[r for r in rows if (r["pair"], r["dtype"], r["normalize"]) == kind] for kind in kinds]
    columns = min(2, len(panels))
    heights = [max(map(_bars_height, panels[i : i + columns])) for i in range(0, len(panels), columns)]
    figure, axes = _figure(heights, columns)
    for axis, chosen in zip(axes, panels, strict=False):
        first = chosen[0]
        directions = ", directions" if first["normalize"] == "True" else ""
        _time_bars(axis, chosen, f"{first['pair']}\n{int(first['tokens']):,} tokens, {first['dtype']}{directions}")
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def draw_peers(rows: Rows) -> Figure:
    timed = [r for r in rows if r.get("median_ms")]
    kinds = dict.fromkeys((r["pair"], r["dtype"], r["objective"]) for r in timed)
    panels = [[r for r in timed if (r["pair"], r["dtype"], r["objective"]) == kind] for kind in kinds]
    figure, axes = _figure([_bars_height(p) for p in panels])
    for axis, chosen in zip(axes, panels, strict=True):
        first = chosen[0]
        sizes = f"{int(first['tokens']):,} tokens, {int(first['vocab']):,} ids, {first['dtype']}"
        _time_bars(axis, chosen, f"{first['pair']}, {first['objective']}: {sizes}")
    return figure


def _lines(axis: Axes, rows: Rows, x: str, y: str, names: Sequence[str]) -> None:
    for name in names:
        chosen = sorted((r for r in rows if r["contender"] == name and r[y]), key=lambda r: number(r[x]))
        tint = LINE_COLOURS.get(name) or colour(name)
        dashes, marker = next(((dashes, marker) for part, dashes, marker in OUR_LINES if part in name), ("-", "o"))
        values = [number(r[x]) for r in chosen], [number(r[y]) for r in chosen]
        axis.plot(*values, dashes, marker=marker, ms=3, color=tint, label=name)
    # Ticks stand at the measured values only.
    ticks = sorted({number(r[x]) for r in rows if r[y]})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [thousands(t) for t in ticks], size=SMALL)
    axis.minorticks_off()
    axis.tick_params(labelsize=SMALL)


def draw_memory(rows: Rows) -> Figure:
    from matplotlib.ticker import LogLocator

    over = [x for x in ("tokens", "vocab") if sum(r["over"] == x for r in rows)]
    figure, axes = _figure([3.9], len(over))
    names = list(dict.fromkeys(r["contender"] for r in rows if number(r["peak_extra_mib"]) > 0))
    for axis, x in zip(axes, over, strict=True):
        axis.set_yscale("log")
        _lines(axis, [r for r in rows if r["over"] == x], x, "peak_extra_mib", names)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.grid(visible=True, axis="y", lw=0.4)
        axis.set_xlabel({"tokens": "tokens", "vocab": "vocabulary ids"}[x])
        axis.set_ylabel("peak extra memory, MiB")
    _legend(figure, axes[0], columns=2)
    return figure


SWEEP_AXES = {
    "tokens": "tokens", "width": "student's width", "chunk": "chunk, tokens", "threads": "threads", "vocab": "vocabulary ids",
}  # fmt: skip


def draw_sweep(rows: Rows) -> Figure:
    sweeps = list(dict.fromkeys(r["sweep"] for r in rows))
    columns = min(2, len(sweeps))
    figure, axes = _figure([2.3] * math.ceil(len(sweeps) / columns), columns)
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for axis, sweep in zip(axes, sweeps, strict=False):
        _lines(axis, [r for r in rows if r["sweep"] == sweep], "value", "ns_per_position", names)
        axis.set(ylim=(0, None), xlabel=SWEEP_AXES.get(sweep, sweep))
        axis.set_ylabel("ns per token and id", size=8)
    for axis in axes[len(sweeps) :]:
        axis.remove()
    _legend(figure, axes[0], columns=3)
    return figure


def draw_breakdown(rows: Rows) -> Figure:
    """The largest point of each sweep: shares of ours with float32 and with bf16 logits."""
    sweeps = list(dict.fromkeys(r["sweep"] for r in rows))
    names = [x for x in dict.fromkeys(r["contender"] for r in rows) if x.startswith("kdkernels")]
    figure, axes = _figure([1.2 + 0.3 * len(sweeps)], len(names))
    parts = {"gemm_share": ("bare GEMMs", FLOOR), "rows_share": ("row kernel", OURS), "rest_share": ("rest", OTHER)}
    for axis, name in zip(axes, names, strict=True):
        places = []
        for y, sweep in enumerate(sweeps):
            row = max(
                (r for r in rows if (r["sweep"], r["contender"]) == (sweep, name)), key=lambda r: number(r["value"])
            )
            places.append(f"{SWEEP_AXES.get(sweep, sweep).partition(',')[0]}: {thousands(number(row['value']))}")
            left = 0.0
            for part, (label, tint) in parts.items():
                width = 100 * max(0.0, number(row[part]))
                axis.barh(y, width, left=left, color=tint, label="" if y else label)
                left += width
        axis.set_yticks(range(len(sweeps)), places if axis is axes[0] else [], size=SMALL)
        axis.set(ylim=(len(sweeps) - 0.5, -0.5), xlim=(0, 100))
        axis.set_title(name, size=9, loc="left")
        axis.set_xlabel("share of the time, %", size=8)
        axis.tick_params(labelsize=SMALL)
    _legend(figure, axes[0], columns=3)
    return figure


def draw_accuracy(rows: Rows) -> Figure:
    """Distillation alone, linear loss. Each dtype has a panel; each contender has a line in all of them, and a mark a place."""
    from matplotlib.ticker import LogLocator

    rows = [r for r in rows if r["kind"] == "linear" and r["objective"] == "KD" and number(r["gradient_error"]) > 0]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    names = list(dict.fromkeys(r["contender"] for r in rows))
    places = list(dict.fromkeys(r["place"] for r in rows))
    figure, axes = _figure([1.4 + 0.3 * len(names)], len(dtypes))
    for axis, dtype in zip(axes, dtypes, strict=True):
        for k, place in enumerate(places):
            chosen = {r["contender"]: number(r["gradient_error"]) for r in rows if (r["dtype"], r["place"]) == (dtype, place)}
            at = [i for i, name in enumerate(names) if name in chosen]
            tints = [colour(names[i]) for i in at]
            faces = tints if k else ["#ffffff"] * len(at)
            axis.scatter([chosen[names[i]] for i in at], at, s=34, c=faces, edgecolors=tints, linewidths=1.4)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_title(dtype, size=9, loc="left")
        axis.set_xlabel("relative gradient error", size=8)
        axis.set_ylim(len(names) - 0.5, -0.5)  # the same lines in all panels, though not all contenders have all dtypes
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        axis.margins(x=0.12)
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 40 * low else (1, 3), numticks=9))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axis.grid(visible=True, lw=0.4)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=SMALL)
    marks = [
        axes[0].scatter([], [], s=34, c=[OTHER if k else "#ffffff"], edgecolors=OTHER, linewidths=1.4, label=label)
        for k, label in enumerate({"random": "random states"}.get(place, place) for place in places)
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), fontsize=SMALL, frameon=False)
    return figure


if __name__ == "__main__":
    main()
