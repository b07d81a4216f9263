"""Stage 1: what the text backbone reads."""

from __future__ import annotations

from models.data.manifest import Example
from models.data.prompts import TASKS
from models.pseudo_gt.wording import describe, worked_examples
from tests.models.pseudo_gt.test_stage1 import gender


def test_wording_tells_the_facts_and_neither_the_hint_nor_the_speaker():
    assert describe(gender(1)) == "[00:00-00:02] Line 1. (Gender: man, SNR: -3 dB)"
    timed = gender(1, start_seconds=61.0, end_seconds=65.5, metadata={"text": "All of it.", "language": "Danish"})
    assert describe(timed) == "[01:01-01:05] All of it. (Language: Danish)"
    assert describe(Example(id="a", audio=None, transcription="Hm")) == "Hm"


def test_wording_has_a_place_for_every_task_that_is_not_about_the_meaning():
    for task in TASKS.values():
        if task.name not in ("place", "mood"):  # which the words tell
            label = (task.choices or ("German",))[0]
            example = Example(id="a", audio="a.flac", task=task.name, metadata={task.name: label, "text": "Go home."})
            assert label in describe(example), task.name


def test_worked_examples_are_shared_by_a_task_and_end_with_the_first_label():
    shared = worked_examples(gender(1))
    assert shared == worked_examples(gender(2, "woman"))
    assert shared.startswith("Question: Is the speaker a man or a woman?\n\n")
    answers = [block.rpartition(" -> ")[2] for block in shared.strip().split("\n\n")[1:]]
    assert answers == [f"The speaker is a {label}." for label in ("man", "woman", "woman", "man")]
    own = worked_examples(gender(1, task="content", question="Which word is spoken, cat or dog?", choices=()))
    assert own.startswith("Question: Which word") and own == worked_examples(gender(1, task="new", choices=()))
