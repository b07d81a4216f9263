"""The figures of a report, as SVG, on a light or a dark ground.

Readers with the common colour vision deficiencies can tell the colours apart. The contrast with the ground is 3:1 or more in both
schemes, and markers and dashes differ as well. A text alternative holds the numbers. The same numbers give the same bytes (with
the same matplotlib): there are no dates, and the ids are fixed.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK, GRID = "#1f2328", "#c9ced4"
PALETTE = ("#0072b2", "#d55e00", "#12a189", "#9933ff", "#1f2937")
# Each colour, and its replacement on a dark ground.
DARK = {
    INK: "#e6e8eb", GRID: "#454c55",
    "#0072b2": "#56b4e9", "#d55e00": "#e8853b", "#12a189": "#22966c", "#9933ff": "#a15cf5", "#1f2937": "#f5f0d0",
}  # fmt: skip
LIGHT_GROUND, DARK_GROUND = "#ffffff", "#14181d"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
CURVES = (
    ("loss", "loss"),
    ("kd", "KD term (nats x tau²)"),
    ("ce", "CE term (nats)"),
    ("top1_agreement", "top-1 agreement with the target distribution"),
    ("path_divergence", "divergence of the teacher's two paths (nats)"),
    ("student_entropy", "student's entropy (nats)"),
    ("grad_norm", "gradient norm before clipping"),
    ("learning_rate", "learning rate"),
)
_STYLE = {
    "svg.hashsalt": "kdkernels", "svg.fonttype": "none", "font.family": ["DejaVu Sans", "sans-serif"], "font.size": 9,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


class Value(NamedTuple):
    """A number, and its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """One drawing.

    Args:
        name: stem of its file.
        caption: what is drawn, with units.
        alt: the same in words and numbers, for readers who cannot see it.
        svg: the drawing as text, without a ground.
        wide: the drawing takes the whole width of the page.
    """

    name: str
    caption: str
    alt: str
    svg: str
    wide: bool = True

    @property
    def data_uri(self) -> str:
        """For a page: the colours follow the colour scheme of the reader, inside an <img> as well."""
        light = "".join(f"--c{c[1:]}:{c};" for c in DARK)
        dark = "".join(f"--c{c[1:]}:{d};" for c, d in DARK.items())
        rules = f"<style>:root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
        themed = re.sub(rf"(fill|stroke): ({'|'.join(DARK)})", lambda m: f"{m[1]}: var(--c{m[2][1:]})", self.svg)
        head, tag, rest = themed.partition(" <defs>")  # before the first one stands only what matplotlib always writes
        return f"data:image/svg+xml;base64,{base64.b64encode((head + rules + tag + rest).encode()).decode('ascii')}"

    @property
    def file_text(self) -> str:
        """For a file: on white, since the program that shows it may not know colour schemes."""
        return re.sub(r"(<svg[^>]*>)", rf'\1<rect width="100%" height="100%" fill="{LIGHT_GROUND}"/>', self.svg, count=1)


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """A figure for each of CURVES that at least one run has.

    Args:
        curves: label -> lines of a metrics file.
    """
    figures = []
    for name, title in CURVES:
        drawn = {
            label: {line["step"]: Value(line[name]) for line in lines if isinstance(line.get(name), (int, float))}
            for label, lines in curves.items()
        }
        drawn = {label: points for label, points in drawn.items() if points}
        if drawn:
            figures.append(
                draw_lines(
                    f"training-{name.replace('_', '-')}", drawn, xlabel="optimiser step", ylabel=title,
                    caption=f"Training: {title}.", wide=False, markers=False,
                )
            )  # fmt: skip
    return figures


def draw_lines(
    name: str,
    series: Mapping[str, Mapping[float, Value]],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    wide: bool = True,
    markers: bool = True,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A line for each label.

    Args:
        series: label -> {x: value}.
        markers: draw a mark and an interval at each value. A training curve has too many values for that.
        limits: of the y axis.
    """
    figure, axes = _figure(*((8.2, 3.6) if wide else (5.0, 3.2)))
    handles: dict[str, Any] = {}
    told = []
    for i, (label, points) in enumerate(series.items()):
        points = dict(sorted(points.items()))
        style = {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i // len(PALETTE) % len(DASHES)], "linewidth": 1.3}
        values = [p.value for p in points.values()]
        if markers:
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "elinewidth": 0.9, "capsize": 2}
            handles[label] = axes.errorbar(list(points), values, yerr=_reach(points.values()), **style)
        else:
            (handles[label],) = axes.plot(list(points), values, **style)
        said = points if markers else {x: points[x] for x in (min(points), max(points))}
        told.append(f"{label}: " + ", ".join(f"{_say(v)} at {x:g}" for x, v in said.items()))
    if limits is not None:
        axes.set_ylim(*_widened(limits))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _legend(figure, handles, columns=3 if wide else 2)
    return Figure(name, caption, f"{_capital(ylabel)} over {xlabel}. {'; '.join(told)}.", _svg(figure), wide)


def draw_intervals(
    name: str, rows: Mapping[str, Mapping[str, Value]], *, xlabel: str, caption: str, limits: tuple[float, float] | None = (0, 1)
) -> Figure:
    """A row of marks with their intervals for each label.

    Args:
        rows: label -> {series: value}. A row may lack a series.
        limits: of the x axis. None = the values are differences: the axis fits them, and a line is drawn at 0.
    """
    series = list(dict.fromkeys(s for values in rows.values() for s in values))
    lane = 0.17 if len(series) > 1 else 0.26  # inches for a mark
    figure, axes = _figure(8.2, 1.1 + len(rows) * (lane * len(series) + 0.08))
    handles: dict[str, Any] = {}
    for i, kind in enumerate(series):
        places = [n + 0.72 * ((i + 0.5) / len(series) - 0.5) for n, values in enumerate(rows.values()) if kind in values]
        shown = [values[kind] for values in rows.values() if kind in values]
        handles[kind] = axes.errorbar(
            [v.value for v in shown], places, xerr=_reach(shown), color=PALETTE[i % len(PALETTE)],
            marker=MARKERS[i % len(MARKERS)], markersize=5, linestyle="none", elinewidth=1.1, capsize=2,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for n in range(1, len(rows)):
        axes.axhline(n - 0.5, color=GRID, linewidth=0.6)
    if limits is None:
        axes.axvline(0, color=INK, linewidth=0.9)
    else:
        axes.set_xlim(*_widened(limits))
    axes.set_xlabel(xlabel)
    if len(series) > 1:
        _legend(figure, handles, columns=5)
    told = "; ".join(f"{label}: " + ", ".join(f"{s} {_say(v)}" for s, v in values.items()) for label, values in rows.items())
    return Figure(name, caption, f"{_capital(xlabel)}. {told}.", _svg(figure))


def _figure(width_inches: float, height_inches: float) -> tuple[Canvas, Axes]:
    # pyplot is not used: it would keep every figure and look for a display.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE):
        figure = Canvas(figsize=(width_inches, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid(visible=True, linewidth=0.6)
    return figure, axes


def _legend(figure: Canvas, handles: Mapping[str, Any], *, columns: int) -> None:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        # With handles: a legend that looks for the names itself leaves out names that start with an underscore.
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(columns, len(handles)), fontsize=8
        )  # fmt: skip


def _reach(values: Any) -> list[list[float]]:
    # When nearly all items agree, a percentile interval may not contain the estimate.
    below = [0.0 if v.low is None else max(0.0, v.value - v.low) for v in values]
    above = [0.0 if v.high is None else max(0.0, v.high - v.value) for v in values]
    return [below, above]


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    # A little more: then a mark on the edge is drawn whole.
    margin = 0.02 * (limits[1] - limits[0])
    return limits[0] - margin, limits[1] + margin


def _say(value: Value) -> str:
    interval = "" if value.low is None or value.high is None else f" ({value.low:.3g} to {value.high:.3g})"
    return f"{value.value:.3g}{interval}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _svg(figure: Canvas) -> str:
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a label with dollar signs is not a formula
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode("utf-8")
    return text[text.index("<svg") :]
