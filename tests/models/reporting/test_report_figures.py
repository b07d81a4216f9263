import base64
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from models.reporting.figures import (
    DARK,
    DARK_GROUND,
    LIGHT_GROUND,
    Value,
    draw_curves,
    draw_intervals,
    draw_lines,
    draw_trade_off,
)
from models.reporting.systems import MAIN, PALETTE, REST, SYSTEMS, Palette

COLOURS = (*PALETTE, REST)

# Machado, Oliveira, Fernandes (2009), severity 1, for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """WCAG contrast ratio."""
    light, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def cielab(rgb):
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = matrix @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    ("colours", "ground"), [(COLOURS, LIGHT_GROUND), ([DARK[c] for c in COLOURS], DARK_GROUND)], ids=["light", "dark"]
)
def test_colours_are_told_apart_by_everyone(colours, ground):
    assert min(contrast(c, ground) for c in colours) >= 3  # WCAG 1.4.11, graphical objects
    for name, matrix in VISIONS.items():
        seen = [cielab(np.asarray(matrix) @ linear(c)) for c in colours]
        # 2.3 is a just noticeable difference; six times that is safe for small marks.
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 14, name


def test_the_grounds_are_those_of_the_page():
    from models.reporting.report import TEMPLATES

    style = (TEMPLATES / "report.css").read_text()
    assert f"--ground: {LIGHT_GROUND}" in style and f"--ground: {DARK_GROUND}" in style


def test_curves_that_no_run_has_are_not_drawn():
    figure = draw_curves({"a": [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}], "b": []})
    assert figure.name == "training" and figure.alt == "Loss over optimiser step. a: 2 at 1, 1 at 3."
    assert draw_curves({}) is None


def strokes(svg):
    """How often each colour of a system is drawn."""
    return {colour: svg.count(colour) for colour in COLOURS if colour in svg}


def test_a_system_has_one_colour_in_every_figure():
    palette = Palette(["my own", *SYSTEMS, "another"])
    look = {system: palette(system).colour for system in SYSTEMS}
    assert all(look[key] == palette(name).colour for key, name in SYSTEMS.items())  # by the key as by the name
    assert len({look[system] for system in MAIN}) == len(MAIN) and REST not in {look[system] for system in MAIN}
    value = Value(50.0, 40.0, 60.0)
    for system in ("kd", "caad2"):
        name, colour = SYSTEMS[system], look[system]
        drawn = (
            draw_intervals("x", {name: {"no hint": value, "false hint": value}}, xlabel="%", caption="c", palette=palette),
            draw_lines("x", {"loss": {name: {1: value, 2: value}}}, xlabel="x", caption="c", palette=palette),
            draw_trade_off("x", {"": {name: (value, value)}}, xlabel="x", ylabel="y", caption="c", palette=palette),
        )
        assert all(set(strokes(figure.svg)) == {colour} for figure in drawn), system


def test_systems_that_the_table_does_not_know_take_the_colours_that_are_left():
    palette = Palette(["kd", "mine", "standard KD (stored)", "yours"])
    colours = [palette(name).colour for name in ("kd", "mine", "yours")]
    assert len({*colours, REST}) == 4
    assert palette("standard KD (stored)").colour == colours[0] and palette("sharpened2").colour == REST


def test_many_lines_are_grey_but_for_the_main_systems():
    curves = {SYSTEMS[system]: {1: Value(n), 2: Value(n + 1)} for n, system in enumerate(SYSTEMS)}
    figure = draw_lines("x", {"loss": curves}, xlabel="x", caption="c", markers=False)
    shown = texts(figure.svg)
    coloured = {SYSTEMS[system] for system in (*MAIN, "caad")}
    assert coloured < set(shown) and f"{len(SYSTEMS) - len(coloured)} others" in shown
    assert SYSTEMS["caad_plus"] not in shown and SYSTEMS["caad_plus"] in figure.alt


def texts(svg):
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_names_and_numbers_are_in_the_drawing():
    rows = {"first": {"neutral": Value(0.5, 0.4, 0.6)}, "_second": {"neutral": Value(0.9), "_odd": Value(0.2, 0.3, 0.4)}}
    figure = draw_intervals("x", rows, xlabel="accuracy", caption="c")
    assert {"first", "_second", "neutral", "_odd", "accuracy"} <= set(texts(figure.svg))
    assert figure.alt == "Accuracy. first: neutral 0.5 (0.4 to 0.6); _second: neutral 0.9, _odd 0.2 (0.3 to 0.4)."
    figure = draw_lines("x", {"accuracy": {"_a": {2: Value(1), 0.5: Value(0, 0, 1)}}}, xlabel="alpha", caption="c")
    assert {"_a", "alpha", "accuracy"} <= set(texts(figure.svg)) and figure.alt.endswith("_a: 0 (0 to 1) at 0.5, 1 at 2.")


def test_same_numbers_same_bytes():
    drawn = [draw_lines("x", {"y": {"a": {1: Value(0.5, 0, 1)}}}, xlabel="x", caption="c").svg for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_in_a_page_colours_follow_the_scheme_and_in_a_file_the_ground_is_white():
    figure = draw_lines("x", {"y": {"#0072b2": {1: Value(0.5)}}}, xlabel="x", caption="c")
    page = base64.b64decode(figure.data_uri.partition(",")[2]).decode()
    ElementTree.fromstring(page)
    assert "stroke: var(--c0072b2)" in page and ": #0072b2" not in page and "--c0072b2:#56b4e9" in page
    assert "#0072b2" in texts(page)  # a label stays what it is
    told, ground, *_ = ElementTree.fromstring(figure.file_text)
    assert told.tag.endswith("desc") and told.text == figure.alt
    assert ground.tag.endswith("rect") and ground.get("fill") == LIGHT_GROUND and "var(" not in figure.file_text
