"""Draws benchmarks/results/plots/*.svg from the committed CSVs, and from nothing else. `python -m benchmarks.plots`

If a CSV is missing, its plot is left out. The same CSV gives the same bytes with the same matplotlib, since there are no dates
and the ids are fixed.

    rows_<device>.svg, linear_<device>.svg     time of each contender beside the floor, and its gradient error
    layers_<device>.svg                        layer distillation beside its floor
    peers_<device>.svg                         the linear loss at the shapes of model pairs
    memory_<device>.svg                        peak extra memory over N and over V
    sweep_<device>.svg                         the linear loss over N, V, H, chunk and threads, in multiples of its floor
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
PALETTE = ("#8da0b5", "#5b7f95", "#3d5a6c", "#a3b18a", "#588157", "#b08968", "#7f5539", "#6d597a")
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


def draw_all(results: Path, device: str, out: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    # Ids in an SVG come from this salt instead of a random one.
    # Text stays text, because outlines would take ten times the size.
    matplotlib.rcParams.update({"svg.hashsalt": "kdkernels", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})
    plots: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
        "rows": ("rows", draw_rows),
        "linear": ("linear", draw_linear),
        "layers": ("layers", draw_layers),
        "peers": ("peers", draw_peers),
        "memory": ("memory", draw_memory),
        "sweep": ("linear_sweep", draw_sweep),
        "breakdown": ("linear_sweep", draw_breakdown),
        "accuracy": ("accuracy", draw_accuracy),
    }
    drawn = []
    for name, (source, draw) in plots.items():
        path = results / f"{source}_{device}.csv"
        if not path.exists():
            continue
        with path.open(newline="") as f:
            rows = list(csv.DictReader(f))
        figure = draw(rows)
        origins = dict.fromkeys(f"{r['device']}; torch {r['torch']}, commit {r['commit']}, {r['date']}" for r in rows)
        figure.supxlabel("\n".join(origins), size=7, color="#777777")
        out.mkdir(parents=True, exist_ok=True)
        drawn.append(out / f"{name}_{device}.svg")
        figure.savefig(drawn[-1], metadata={"Date": None, "Creator": None})
    return drawn


def number(text: str) -> float:
    """NaN for an empty cell."""
    return float(text) if text else math.nan


def colour(contender: str) -> str:
    if contender.startswith("kdkernels"):
        return OURS
    return FLOOR if contender.startswith(("bare", "copy", "floor")) else OTHER


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    pyplot.close("all")
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)
    return figure, list(axes.flat)


def _time_bars(axis: Axes, rows: Rows, title: str) -> None:
    """Milliseconds with quartiles, and the gradient error beside each bar. The fastest is at the bottom."""
    rows = sorted((r for r in rows if r["median_ms"]), key=lambda r: -number(r["median_ms"]))
    medians = [number(r["median_ms"]) for r in rows]
    spread = [
        [m - number(r["low_ms"]) for m, r in zip(medians, rows, strict=True)],
        [number(r["high_ms"]) - m for m, r in zip(medians, rows, strict=True)],
    ]
    names = [r["contender"] for r in rows]
    axis.barh(names, medians, xerr=spread, color=[colour(x) for x in names], error_kw={"lw": 0.8, "ecolor": "#555555"})
    for i, row in enumerate(rows):
        error = number(row["gradient_error"])
        text = f"  {medians[i]:.3g} ms" + ("" if math.isnan(error) else f", error {error:.1e}")
        axis.text(number(row["high_ms"]), i, text, va="center", size=7)
    axis.set_xlim(0, max(number(r["high_ms"]) for r in rows) * 1.45)
    axis.set_title(title, size=9)
    axis.set_xlabel("ms (median, quartiles)")


def draw_rows(rows: Rows) -> Figure:
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    figure, axes = _figure(1, len(dtypes), 5.5 * len(dtypes), 2.6)
    for axis, dtype in zip(axes, dtypes, strict=True):
        chosen = [r for r in rows if r["dtype"] == dtype]
        _time_bars(axis, chosen, f"row kernel, {chosen[0]['rows']} x {int(chosen[0]['vocab']):,}, {dtype}")
    return figure


def draw_linear(rows: Rows) -> Figure:
    figure, axes = _figure(1, 1, 8, 0.6 + 0.3 * len(rows))
    first = rows[0]
    sizes = f"N {first['tokens']}, V {int(first['vocab']):,}, H {first['student_width']}/{first['teacher_width']}"
    _time_bars(axes[0], rows, f"linear loss and dL/dh, {sizes}, {first['dtype']}")
    return figure


def draw_layers(rows: Rows) -> Figure:
    pairs = list(dict.fromkeys(r["pair"] for r in rows))
    kinds = list(dict.fromkeys((r["dtype"], r["normalize"]) for r in rows))
    figure, axes = _figure(len(pairs), len(kinds), 4.6 * len(kinds), 1.6 * len(pairs))
    for axis, (pair, kind) in zip(axes, [(p, k) for p in pairs for k in kinds], strict=True):
        chosen = [r for r in rows if r["pair"] == pair and (r["dtype"], r["normalize"]) == kind]
        directions = ", directions" if kind[1] == "True" else ""
        _time_bars(axis, chosen, f"{pair}, N {chosen[0]['tokens']}, {kind[0]}{directions}")
    return figure


def draw_peers(rows: Rows) -> Figure:
    timed = [r for r in rows if r.get("median_ms")]
    objectives = list(dict.fromkeys(r["objective"] for r in timed))
    cases = list(dict.fromkeys((r["pair"], r["dtype"]) for r in timed))
    figure, axes = _figure(len(cases), len(objectives), 6 * len(objectives), 2.9 * len(cases))
    for axis, (case, objective) in zip(axes, [(c, o) for c in cases for o in objectives], strict=True):
        chosen = [r for r in timed if (r["pair"], r["dtype"]) == case and r["objective"] == objective]
        if chosen:
            title = f"{case[0]}: {objective}, {case[1]}, N {chosen[0]['tokens']}, V {int(chosen[0]['vocab']):,}"
            _time_bars(axis, chosen, title)
        else:
            axis.set_axis_off()
    return figure


def _lines(axis: Axes, rows: Rows, x: str, y: str, names: Sequence[str]) -> None:
    others = [name for name in names if colour(name) == OTHER]
    for name in names:
        chosen = sorted((r for r in rows if r["contender"] == name and r[y]), key=lambda r: number(r[x]))
        tint = PALETTE[others.index(name) % len(PALETTE)] if name in others else colour(name)
        style = "--" if "fp32 logits" in name else "-"
        values = [number(r[x]) for r in chosen], [number(r[y]) for r in chosen]
        axis.plot(*values, style, marker="o", ms=3, color=tint, label=name)


def draw_memory(rows: Rows) -> Figure:
    over = [x for x in ("tokens", "vocab") if sum(r["over"] == x for r in rows)]
    figure, axes = _figure(1, len(over), 5 * len(over), 3.2)
    names = list(dict.fromkeys(r["contender"] for r in rows if number(r["peak_extra_mib"]) > 0))
    for axis, x in zip(axes, over, strict=True):
        _lines(axis, [r for r in rows if r["over"] == x], x, "peak_extra_mib", names)
        axis.set(xscale="log", yscale="log", xlabel=x, ylabel="peak extra memory, MiB")
    axes[0].legend(fontsize=6, frameon=False)
    return figure


def draw_sweep(rows: Rows) -> Figure:
    sweeps = list(dict.fromkeys(r["sweep"] for r in rows))
    figure, axes = _figure(1, len(sweeps), 3.4 * len(sweeps), 2.8)
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for axis, sweep in zip(axes, sweeps, strict=True):
        _lines(axis, [r for r in rows if r["sweep"] == sweep], "value", "ns_per_position", names)
        axis.set(xscale="log", xlabel=sweep, ylabel="ns per logit pair", ylim=(0, None))
        ticks = sorted({int(r["value"]) for r in rows if r["sweep"] == sweep})
        axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 8192 else str(t) for t in ticks], size=7)
        axis.minorticks_off()
    axes[0].legend(fontsize=6, frameon=False)
    return figure


def draw_breakdown(rows: Rows) -> Figure:
    """The largest point of each sweep: shares of ours with float32 and with bf16 logits."""
    sweeps = list(dict.fromkeys(r["sweep"] for r in rows))
    names = [x for x in dict.fromkeys(r["contender"] for r in rows) if x.startswith("kdkernels")]
    figure, axes = _figure(1, len(names), 5 * len(names), 0.9 + 0.35 * len(sweeps))
    parts = {"gemm_share": ("bare GEMMs", FLOOR), "rows_share": ("row kernel", OURS), "rest_share": ("rest", OTHER)}
    for axis, name in zip(axes, names, strict=True):
        for y, sweep in enumerate(sweeps):
            row = max(
                (r for r in rows if (r["sweep"], r["contender"]) == (sweep, name)), key=lambda r: number(r["value"])
            )
            left = 0.0
            for part, (label, tint) in parts.items():
                axis.barh(f"{sweep} {row['value']}", number(row[part]), left=left, color=tint, label="" if y else label)
                left += max(0.0, number(row[part]))
        axis.set(title=name, xlabel="share of the time", xlim=(0, 1))
    axes[0].legend(fontsize=6, frameon=False, loc="lower right")
    return figure


def draw_accuracy(rows: Rows) -> Figure:
    """Distillation alone, linear loss. Each dtype has a panel, and each contender a pair of bars."""
    rows = [r for r in rows if r["kind"] == "linear" and r["objective"] == "KD" and number(r["gradient_error"]) > 0]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    names = list(dict.fromkeys(r["contender"] for r in rows))
    places = list(dict.fromkeys(r["place"] for r in rows))
    figure, axes = _figure(1, len(dtypes), 4.2 * len(dtypes), 0.9 + 0.5 * len(names))
    height = 0.8 / len(places)
    for axis, dtype in zip(axes, dtypes, strict=True):
        for k, place in enumerate(places):
            chosen = {r["contender"]: number(r["gradient_error"]) for r in rows if (r["dtype"], r["place"]) == (dtype, place)}
            at = [i + k * height for i, name in enumerate(names) if name in chosen]
            tints = [colour(name) for name in names if name in chosen]
            values = [chosen[name] for name in names if name in chosen]
            axis.barh(at, values, height, color=tints, alpha=1 if k else 0.5, label=place)
            for y, value in zip(at, values, strict=True):
                axis.text(value, y, f" {value:.1e}", va="center", size=6)
        axis.set(xscale="log", title=dtype, xlabel="relative gradient error (faint: random states)")
        axis.set_yticks([i + height / 2 for i in range(len(names))], names if axis is axes[0] else [])
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 4)
    return figure


if __name__ == "__main__":
    main()
