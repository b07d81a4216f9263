"""One table of the systems: the name that a reader sees, and the colour, wherever a system is shown.

The CSV files, the report and the docs take the names from here, so this module needs nothing but Python. A system that the table
does not know keeps its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Key in the CSV files -> name. The order is that of the tables.
SYSTEMS = {
    "teacher": "teacher, greedy",
    "teacher_cd1": "teacher, contrastive decoding alpha 1",
    "teacher_cd2": "teacher, contrastive decoding alpha 2",
    "teacher_half": "teacher trained half as long (control), greedy",
    "teacher_long": "longer teacher (control), greedy",
    "teacher_stripped": "teacher, asked without the hint",
    "before": "student by true labels",
    "before_cd1": "student by true labels, contrastive decoding alpha 1",
    "ce_true": "CE on true labels",
    "ce_only": "CE only (control)",
    "sharpened2": "sharpened KD alpha 2 (control)",
    "hint_stripped": "hint-stripped KD",
    "kd_shuffled": "KD with shuffled hints",
    "kd": "standard KD",
    "kd_tuned": "standard KD, tuned on dev",
    "kd_steps": "standard KD, steps chosen on dev",
    "kd_metadata": "standard KD, answers from the metadata",
    "caad05": "CAAD alpha 0.5",
    "caad1": "CAAD alpha 1",
    "caad2": "CAAD alpha 2",
    "caad_tuned": "CAAD, tuned on dev",
    "caad2_steps": "CAAD alpha 2, steps chosen on dev",
    "caad2_metadata": "CAAD alpha 2, answers from the metadata",
    "caad2_swapped": "CAAD alpha 2 against another clip",
    "caad2_reversed": "CAAD alpha 2 against the clip reversed",
    "caad2_narrow": "CAAD alpha 2 against a narrow band",
    "caad2_flat": "CAAD alpha 2 against the words spoken flat",
    "caad2_clean_teacher": "CAAD alpha 2, the teacher hears no noise",
    "kd_clean_teacher": "standard KD, the teacher hears no noise",
    "caad2_uniform": "CAAD alpha 2, all tokens alike",
    "caad2_on50": "CAAD alpha 2, half on-policy",
    "caad2_on100": "CAAD alpha 2, on-policy",
    "caad2_on100_reverse": "CAAD alpha 2, on-policy, reverse KL",
    "caad2_on100_jsd": "CAAD alpha 2, on-policy, JSD",
    "caad2_adaptive": "CAAD alpha 2, alpha by token",
    "caad2_ramp": "CAAD alpha 2, alpha ramped over steps",
    "caad2_weighted": "CAAD alpha 2, KD weighted by divergence",
    "caad2_centered": "CAAD alpha 2, text path centred",
    "caad2_plausible": "CAAD alpha 2, plausibility mask 0.1",
    "caad2_layers": "CAAD alpha 2, layers",
    "caad_plus": "CAAD+ (alpha 4, text path centred)",
    "kd_of_long": "standard KD, longer teacher",
    "caad2_of_long": "CAAD alpha 2, longer teacher",
    # Of the ablation, where the students can already hear:
    "baseline": "student before distillation",
    "sft": "SFT only",
    "text_kd_top": "top-layer text KD + SFT",
    "text_kd_skip": "skip-layer text KD + SFT",
    "text_kd_all": "all-layer text KD + SFT",
    "text_acoustic_kd": "all-layer text KD + acoustic KD + SFT",
    "caad": "CAAD",
    "caad_layers": "CAAD + layers",
    "everything": "CAAD + layers + text KD + acoustic KD",
    "text_teacher": "text teacher itself, reading the metadata",
}
# The systems with a colour of their own.
MAIN = ("kd", "caad1", "caad2", "hint_stripped", "ce_true", "before", "teacher", "teacher_cd1")
# The systems that a headline shows, the most wanted first; it takes the first five that are there.
_WANTED = ("kd", "caad2", "hint_stripped", "ce_true", "kd_tuned", "caad1", "before", "teacher", "teacher_cd1")
# Names that older files have.
_OLD_NAMES = {"KD": "kd", "student, KD": "kd", "teacher, contrastive 1": "teacher_cd1", "teacher, contrastive 2": "teacher_cd2",
              "student, CE only": "ce_only", "student, sharpened KD 2": "sharpened2",
              "student, CAAD alpha 1": "caad1", "student, CAAD alpha 2": "caad2"}  # fmt: skip
_KEYS = {name: key for key, name in SYSTEMS.items()} | _OLD_NAMES

# Added to the name of a run whose curve is stored, where the same report shows another run of that name.
STORED_MARK = " (stored)"
# What the text of a question claims -> how tables and figures call it.
CONTEXTS = {"neutral": "no hint", "aligned": "true hint", "conflict": "false hint", "irrelevant": "irrelevant text"}
# The words of MCR-BENCH for the same, as a study's CSV has them.
_CONTEXT_KEYS = {"none": "neutral", "faithful": "aligned", "adversarial": "conflict"} | {kind: kind for kind in CONTEXTS}
# Value of the sweep "anchor" -> who writes the answers that the students learn.
ANCHORS = {
    "teacher": "the teacher's own answers",
    "metadata": "Stage 1's words from the metadata",
    "template": "the true label in a sentence",
}

# Readers with the common colour vision deficiencies can tell these apart, on white and (as DARK in figures.py) on dark.
PALETTE = ("#0072b2", "#d55e00", "#12a189", "#9933ff", "#1f2937", "#572901", "#491768", "#a7915b")
REST = "#5b6068"
_COLOURS = {
    "caad2": "#0072b2", "kd": "#d55e00", "ce_true": "#12a189", "caad1": "#9933ff", "teacher": "#1f2937", "before": "#572901",
    "teacher_cd1": "#491768", "hint_stripped": "#a7915b",
}  # fmt: skip
_COLOURS["caad"] = _COLOURS["caad2"]  # CAAD with one setting changed; no file has both
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_GREY_MARKERS = {"kd_tuned": "*"}  # a headline may show it, and the palette has no ninth colour


def system_key(name: str) -> str:
    """The key of a system by its key or by any name that it has had; an unknown name is its own key."""
    name = name.removesuffix(STORED_MARK)
    return name if name in SYSTEMS else _KEYS.get(name, name)


def system_name(name: str) -> str:
    """What a reader sees; an unknown name stays as it is."""
    return SYSTEMS.get(system_key(name), name)


def context_key(name: str) -> str:
    """A key of CONTEXTS, by its own name or by that of MCR-BENCH (none, faithful, adversarial).

    Raises:
        ValueError: no such context.
    """
    if name not in _CONTEXT_KEYS:
        raise ValueError(f"context: expected one of {', '.join(_CONTEXT_KEYS)}, got {name!r}")
    return _CONTEXT_KEYS[name]


def in_order(names: Iterable[str]) -> list[str]:
    """Systems once each, in the order of SYSTEMS; unknown ones follow as they came."""
    given = list(dict.fromkeys(names))
    place = {key: number for number, key in enumerate(SYSTEMS)}
    return sorted(given, key=lambda name: place.get(system_key(name), len(place)))


def main_systems(names: Iterable[str], count: int = 5) -> list[str]:
    """The systems of a headline, in order: those that it wants, then unknown ones, then the others."""
    given = list(dict.fromkeys(names))
    wanted = {key: number for number, key in enumerate(_WANTED)}

    def rank(name: str) -> int:
        key = system_key(name)
        return wanted.get(key, len(_WANTED) + (key in SYSTEMS))

    return in_order(sorted(given, key=rank)[:count])


class Style(NamedTuple):
    """How a system is drawn."""

    colour: str
    marker: str


class Palette:
    """The style of every system of one report. It is the same in each of its figures.

    The systems of MAIN have colours of their own. Systems that the table does not know take those that are left, in order. All
    others are grey.

    Args:
        names: the systems of the whole report, in order.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        keys = list(dict.fromkeys(map(system_key, names)))
        self._styles: dict[str, Style] = {
            key: Style(colour, _MARKERS[PALETTE.index(colour)]) for key, colour in _COLOURS.items()
        } | {key: Style(REST, marker) for key, marker in _GREY_MARKERS.items()}
        taken = {self._styles[key].colour for key in keys if key in self._styles}
        free = (colour for colour in PALETTE if colour not in taken)
        for key in keys:
            if key not in SYSTEMS and (colour := next(free, None)):
                self._styles[key] = Style(colour, _MARKERS[PALETTE.index(colour)])

    def __call__(self, name: str) -> Style:
        """The style of a system, by its key or its name."""
        return self._styles.get(system_key(name), Style(REST, "o"))

    def is_main(self, name: str) -> bool:
        """Whether a system has a colour of its own."""
        return self(name).colour != REST


def names_of(systems: Mapping[str, str]) -> dict[str, str]:
    """System -> name, for systems with the labels of a file. Where several share a name, the system is added to it."""
    names = {system: system_name(system) if system_key(system) in SYSTEMS else label for system, label in systems.items()}
    shared = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {system: f"{name} ({system})" if name in shared else name for system, name in names.items()}
