"""The figures of a report, as SVG, on a light or a dark ground.

A system has one colour and one mark in all figures of a report (models/reporting/systems.py). What is measured tells the panels
of a figure apart: contexts and scores stand side by side, and never share a panel.

Readers with the common colour vision deficiencies can tell the colours apart. The contrast with the ground is 3:1 or more in both
schemes, and markers and dashes differ as well. A text alternative holds the numbers. The same numbers give the same bytes (with
the same matplotlib): there are no dates, and the ids are fixed.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from models.reporting.systems import REST, Palette, Style, main_systems

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK, GRID = "#1f2328", "#c9ced4"
# Each colour, and its replacement on a dark ground.
DARK = {
    INK: "#e6e8eb", GRID: "#454c55",
    "#0072b2": "#56b4e9", "#d55e00": "#e8853b", "#12a189": "#22966c", "#9933ff": "#a15cf5", "#1f2937": "#f5f0d0",
    "#572901": "#d50341", "#491768": "#9e4990", "#a7915b": "#a3ff40", REST: "#8b949e",
}  # fmt: skip
LIGHT_GROUND, DARK_GROUND = "#ffffff", "#14181d"
CURVES = (
    ("loss", "loss"),
    ("kd", "KD term (nats x tau²)"),
    ("ce", "CE term (nats)"),
    ("top1_agreement", "top-1 agreement with the target distribution (%)"),
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
    """A number as it is shown (a share in %), and its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def percent(value: float, low: float | None = None, high: float | None = None) -> Value:
    """A share and its interval in %."""
    return Value(*(None if x is None else 100 * x for x in (value, low, high)))


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
        """For a file: on white, since the program that shows it may not know colour schemes. It has the numbers in words too."""
        told = f"<desc>{html.escape(self.alt, quote=False)}</desc>"
        ground = f'<rect width="100%" height="100%" fill="{LIGHT_GROUND}"/>'
        return re.sub(r"<svg[^>]*>", lambda tag: f"{tag[0]}{told}{ground}", self.svg, count=1)


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], palette: Palette | None = None) -> Figure | None:
    """A panel for each of CURVES that at least one run has; None where no run has one.

    Args:
        curves: label -> lines of a metrics file.
        palette: of the report; None = made for these runs.
    """
    panels = {}
    for name, title in CURVES:
        scale = 100 if title.endswith("(%)") else 1
        drawn = {
            label: {line["step"]: Value(scale * line[name]) for line in lines if isinstance(line.get(name), (int, float))}
            for label, lines in curves.items()
        }
        if drawn := {label: points for label, points in drawn.items() if points}:
            panels[title] = drawn
    if not panels:
        return None
    caption = "Training curves. Runs without a colour of their own are grey."
    return draw_lines("training", panels, xlabel="optimiser step", caption=caption, palette=palette, markers=False)


def draw_lines(
    name: str,
    panels: Mapping[str, Mapping[str, Mapping[float, Value]]],
    *,
    xlabel: str,
    caption: str,
    palette: Palette | None = None,
    markers: bool = True,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Panels with a line for each system.

    Args:
        panels: what is drawn -> system -> {x: value}.
        palette: of the report; None = made for these systems.
        markers: draw a mark and an interval at each value. A training curve has too many values for that.
        limits: of the y axes. None = each panel fits its own values.
    """
    palette = palette or Palette(system for series in panels.values() for system in series)
    columns = min(2 if len(panels) in (1, 2, 4) or not markers else 3, len(panels))
    figure, grid = _figure(8.2 if columns > 1 else 5.0, 0.7 + 2.3 * math.ceil(len(panels) / columns), len(panels), columns)
    handles: dict[str, Any] = {}
    told = []
    for axes, (title, series) in zip(grid, panels.items(), strict=True):
        said = []
        for system, points in sorted(series.items(), key=lambda item: palette.is_main(item[0])):  # grey lines lie below
            points = dict(sorted(points.items()))
            values = [p.value for p in points.values()]
            look = palette(system)
            style = {"color": look.colour, "linewidth": 1.4 if palette.is_main(system) else 0.8}
            if markers:
                style |= {"marker": look.marker, "markersize": 5, "elinewidth": 0.9, "capsize": 2}
                handle = axes.errorbar(list(points), values, yerr=_reach(points.values()), **style)
            else:
                (handle,) = axes.plot(list(points), values, **style)
            handles.setdefault(system, handle)
            shown = points if markers else {x: points[x] for x in (min(points), max(points))}
            said.append(f"{system}: " + ", ".join(f"{_say(v)} at {x:g}" for x, v in shown.items()))
        if limits is not None:
            axes.set_ylim(*_widened(limits))
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel(xlabel, fontsize=8)
        told.append(f"{_capital(title)} over {xlabel}. {'; '.join(said)}.")
    _legend(figure, handles, palette)
    return Figure(name, caption, " ".join(told), _svg(figure), columns > 1)


def draw_intervals(
    name: str,
    rows: Mapping[str, Mapping[str, Value]],
    *,
    xlabel: str,
    caption: str,
    palette: Palette | None = None,
    systems: Mapping[str, str] | None = None,
    limits: tuple[float, float] | None = (0, 100),
) -> Figure:
    """A line for each label, a panel for each score: marks with their intervals.

    Args:
        rows: label -> {panel: value}. A row may lack a panel.
        palette: of the report; None = made for these rows.
        systems: label -> the system whose colour it has; None = the labels are systems.
        limits: of the x axes. None = the values are differences: the axes fit them, and a line is drawn at 0.
    """
    systems = systems or {label: label for label in rows}
    palette = palette or Palette(systems.values())
    panels = list(dict.fromkeys(panel for values in rows.values() for panel in values))
    columns = len(panels) if len(panels) <= 4 else math.ceil(len(panels) / 2)
    lines = math.ceil(len(panels) / columns)
    labels = ["\n".join(textwrap.wrap(label, 40)) for label in rows]
    taken = 0.12 + 0.11 * max(label.count("\n") + 1 for label in labels)  # inches for a row
    figure, grid = _figure(8.8, lines * (0.8 + len(rows) * taken), len(panels), columns)
    ends = [0.0, *(x for row in rows.values() for v in row.values() for x in v if x is not None)]
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        of_look: dict[Style, dict[int, Value]] = {}
        for place, (label, row) in enumerate(rows.items()):
            if panel in row:
                of_look.setdefault(palette(systems[label]), {})[place] = row[panel]
        for look, shown in of_look.items():
            axes.errorbar(
                [v.value for v in shown.values()], list(shown), xerr=_reach(shown.values()), color=look.colour,
                marker=look.marker, markersize=5, linestyle="none", elinewidth=1.2, capsize=2.5,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), labels if number % columns == 0 else [], fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if limits is None:
            axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_xlim(*_widened((min(ends), max(ends)) if limits is None else limits))
        axes.set_title(panel, fontsize=9, loc="left")
        axes.set_xlabel(xlabel, fontsize=8)
    told = "; ".join(f"{label}: " + ", ".join(f"{s} {_say(v)}" for s, v in row.items()) for label, row in rows.items())
    return Figure(name, caption, f"{_capital(xlabel)}. {told}.", _svg(figure))


def draw_trade_off(
    name: str,
    panels: Mapping[str, Mapping[str, tuple[Value, Value]]],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    palette: Palette | None = None,
) -> Figure:
    """A point for each system: (x, y) with both intervals. The legend names five systems at most; the others are grey.

    Args:
        panels: title -> system -> (x, y). Several panels stand side by side and have the same axes.
    """
    systems = list(dict.fromkeys(system for points in panels.values() for system in points))
    palette = palette or Palette(systems)
    named = main_systems(systems)
    several = len(panels) > 1
    figure, every = _figure(3.3 * len(panels) if several else 4.8, 3.9 if several else 4.4, len(panels), len(panels))
    handles: dict[str, Any] = {}
    for axes in every[1:]:  # before anything is drawn: then the limits have room for all
        axes.sharex(every[0])
        axes.sharey(every[0])
    every[0].set_ylabel(ylabel)
    for axes, (title, points) in zip(every, panels.items(), strict=True):
        for system, (x, y) in sorted(points.items(), key=lambda item: item[0] in named):
            if system in named:
                look = palette(system)
                handles[system] = axes.errorbar(
                    [x.value], [y.value], xerr=_reach([x]), yerr=_reach([y]), color=look.colour, marker=look.marker,
                    markersize=7, linestyle="none", elinewidth=1.1, capsize=2.5,
                )  # fmt: skip
            else:
                small = {"color": REST, "marker": "o", "markersize": 3.5, "linestyle": "none"}
                (handles["other systems"],) = axes.plot([x.value], [y.value], **small)
        axes.margins(0.08)
        axes.set_xlabel(xlabel)
        if several:
            axes.set_title(title, fontsize=9)
    order = [*named, *(["other systems"] if "other systems" in handles else [])]
    _place_legend(figure, {system: handles[system] for system in order}, columns=3 if several else 2)
    told = [
        (f"{title}: " if several else "") + "; ".join(f"{system}: {_say(x)}, {_say(y)}" for system, (x, y) in points.items())
        for title, points in panels.items()
    ]
    alt = f"{_capital(xlabel)}, then {ylabel}. {'. '.join(told)}."
    return Figure(name, caption, alt, _svg(figure), wide=several)


# Where a number stands beside its mark: the first place that is free, in points from the middle of the mark.
_PLACES = tuple((reach * x, reach * y) for reach in (7, 13, 19) for x, y in (
    (1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)
))  # fmt: skip


def draw_frontier(
    name: str,
    points: Mapping[str, tuple[float, float]],
    *,
    xlabel: str,
    ylabel: str,
    caption: str,
    palette: Palette | None = None,
) -> Figure:
    """A point for each of many systems: (x, y) without intervals, and a line along those that no other one beats in both.

    The systems with a colour of their own stand in a legend. The others have numbers beside their marks, and below the drawing
    stands which number is which.

    Args:
        points: system -> (x, y). They have their numbers in this order.
    """
    from matplotlib.transforms import Bbox

    palette = palette or Palette(points)
    others = [system for system in points if not palette.is_main(system)]
    figure, (axes,) = _figure(4.8, 5.0 + 0.17 * len(others), 1, 1)
    best = frontier(points)
    corners = [points[best[0]]]
    for system in best[1:]:
        x, y = points[system]
        corners += [(corners[-1][0], y), (x, y)]
    axes.plot(*zip(*corners, strict=True), color=REST, linewidth=0.9, linestyle=(0, (4, 3)))
    handles: dict[str, Any] = {}
    for system, (x, y) in points.items():
        look = palette(system)
        marker, size = ("o", 3.5) if system in others else (look.marker, 7)
        (handles[system],) = axes.plot([x], [y], color=look.colour, marker=marker, markersize=size, linestyle="none")
    axes.margins(0.1)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    key = "\n".join(f"{number}  {system}" for number, system in enumerate(others, start=1))
    _place_legend(figure, {s: handles[s] for s in points if s not in others}, columns=2)
    if others:
        axes.set_xlabel(f"{xlabel}\n\n{key}", fontsize=8, loc="left", linespacing=1.35)
    figure.draw_without_rendering()  # from here on the places of the marks are known
    pixels = figure.dpi / 72
    at = {system: axes.transData.transform(xy) for system, xy in points.items()}
    taken = [Bbox.from_bounds(x - 4 * pixels, y - 4 * pixels, 8 * pixels, 8 * pixels) for x, y in at.values()]
    line = axes.transData.transform(corners)
    taken += [Bbox([(min(a), min(b)), (max(a) + 1, max(b) + 1)]) for a, b in zip(*map(_pairs, line.T), strict=True)]
    for number, system in enumerate(others, start=1):
        for x, y in _PLACES:
            middle = (at[system][0] + x * pixels, at[system][1] + y * pixels)
            width, height = (4.6 * len(str(number)) + 1) * pixels, 8 * pixels
            box = Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        text = axes.annotate(
            str(number), points[system], xytext=(x, y), textcoords="offset points", ha="center", va="center", fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": REST, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1} if math.hypot(x, y) > 10
            else None,
        )  # fmt: skip
        text.set_in_layout(False)
    told = "; ".join(f"{system}: {x:.3g}, {y:.3g}" for system, (x, y) in points.items())
    alt = f"{_capital(xlabel)}, then {ylabel}. {told}. No other system is ahead in both of {', '.join(best)}."
    return Figure(name, caption, alt, _svg(figure), wide=False)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The systems that no other one beats in x and y, from the highest x on. Of equal ones the first."""
    best: list[str] = []
    for system in sorted(points, key=lambda s: (-points[s][0], -points[s][1])):
        if not best or points[system][1] > points[best[-1]][1]:
            best.append(system)
    return best


def _pairs(values: Any) -> list[tuple[float, float]]:
    return list(itertools.pairwise(values))


def _figure(width_inches: float, height_inches: float, panels: int, columns: int) -> tuple[Canvas, list[Axes]]:
    # pyplot is not used: it would keep every figure and look for a display.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE):
        figure = Canvas(figsize=(width_inches, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        lines = math.ceil(panels / columns)
        grid = [figure.add_subplot(lines, columns, number) for number in range(1, panels + 1)]
        for axes in grid:
            axes.set_axisbelow(True)
            axes.grid(visible=True, linewidth=0.6)
            axes.tick_params(labelsize=8)
    return figure, grid


def _legend(figure: Canvas, handles: Mapping[str, Any], palette: Palette) -> None:
    """The systems with a colour of their own, and one entry for all others."""
    shown = {system: handle for system, handle in handles.items() if palette.is_main(system)}
    rest = [system for system in handles if system not in shown]
    if len(rest) == 1:
        shown[rest[0]] = handles[rest[0]]
    elif rest:
        shown[f"{len(rest)} {'others' if shown else 'systems'}"] = handles[rest[0]]
    _place_legend(figure, shown, columns=3)


def _place_legend(figure: Canvas, handles: Mapping[str, Any], *, columns: int) -> None:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        # With handles: a legend that looks for the names itself leaves out names that start with an underscore. Of an interval
        # the mark alone is shown: its bars would cover it.
        marks = [getattr(handle, "lines", [handle])[0] for handle in handles.values()]
        figure.legend(
            marks, list(handles), loc="outside lower center", ncols=min(columns, len(handles)), fontsize=8
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
