"""The plots of the committed CSVs can be read: no text covers another, and all of it is inside the picture."""

import itertools
import re

import pytest
from matplotlib.text import Text

from benchmarks import plots
from benchmarks.common import RESULTS


def overlap(one, other):
    """Whether two boxes share more than the half point that rounding may add."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width > 0.5 and height > 0.5


def shown(figure):
    """(text, its box) of every text that is drawn."""
    unseen = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False)
        unseen |= {label for place, label in labels if not low <= place <= high}  # beyond the end of its axis
        unseen |= set(axis.get_minorticklabels())
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in unseen]
    return [(t.get_text(), t.get_window_extent()) for t in texts]


def within(outer, inner):
    return outer.x0 - 1 <= inner.x0 and inner.x1 <= outer.x1 + 1 and outer.y0 - 1 <= inner.y0 and inner.y1 <= outer.y1 + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", list(plots.plots()))
def test_every_text_can_be_read(name):
    source, draw = plots.plots()[name]
    plots.set_style()
    figure = plots.draw_file(RESULTS / f"{source}_cpu.csv", draw)
    figure.draw_without_rendering()
    texts = shown(figure)
    covered = [(a, b) for (a, x), (b, y) in itertools.combinations(texts, 2) if overlap(x, y)]
    assert covered == []
    assert [text for text, box in texts if not within(figure.bbox, box)] == []
    assert figure.get_figwidth() == plots.WIDTH
    for axes in figure.axes:
        assert axes.has_data(), "an empty panel"
    assert not any(re.search(r"\de\+\d", text) for text, _ in texts)
    # No legend lies on a panel.
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert not any(overlap(legend.get_window_extent(), box) for legend in figure.legends for box in boxes)
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_a_row_has_one_place_in_every_panel():
    rows = [
        {"kind": "linear", "objective": "KD", "place": place, "contender": name, "dtype": dtype, "gradient_error": error}
        for name in ("eager", "bf16 only", "kdkernels")
        for dtype in ("float32", "bfloat16")
        if (name, dtype) != ("bf16 only", "float32")
        for place, error in (("random", "1e-3"), ("near convergence", "3e-2"))
    ]  # fmt: skip
    figure = plots.draw_accuracy(rows)
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["eager", "bf16 only", "kdkernels"]
    assert first.get_ylim() == second.get_ylim()
    for axes, lines in ((first, [0, 2]), (second, [0, 1, 2])):
        drawn = [list(marks.get_offsets()[:, 1]) for marks in axes.collections if len(marks.get_offsets())]
        assert drawn == [lines, lines]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.7149, "0.71 ms"), (9.51, "9.51 ms"), (9.996, "10.0 ms"), (99.96, "100 ms"), (1000.6, "1,001 ms"), (10206, "10,206 ms")],
)
def test_times_have_no_power_of_ten(value, text):
    assert plots.milliseconds(value) == text
