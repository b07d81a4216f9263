"""Prompts: one placeholder whatever the fields hold, text before sound, templates by task."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.data.manifest import AUDIO_PLACEHOLDER, Example
from models.data.prompts import (
    CATEGORIES,
    TASKS,
    chat_text,
    hint_for,
    render_prompt,
    shorten_transcript,
    target_template,
)


def _example(**fields) -> Example:
    return Example(**{"id": "a", "audio": None, "transcription": "Good luck.", "question": "Who?", **fields})


def test_prompt_with_context_is_exactly_the_documented_form():
    example = _example(context="Note: the speaker is a man.", question="Is the speaker a man or a woman?")
    assert render_prompt(example) == (
        "Transcript: Good luck.\nNote: the speaker is a man.\n"
        "Question: Is the speaker a man or a woman?\n<|audio|>\nAnswer:"
    )


def test_a_system_turn_stands_before_the_context_and_is_no_part_of_a_chats_question():
    example = _example(system="Be brief.\nListen.", context="Note: no.")
    assert render_prompt(example).splitlines()[1] == "Be brief. Listen. Note: no."
    assert render_prompt(_example(system="Be brief.")).splitlines()[1] == "Be brief."
    assert chat_text(example) == "Transcript: Good luck.\nNote: no.\nWho?"
    with pytest.raises(ValueError, match="system: expected plain text, got the audio placeholder"):
        _example(system=f"Hear {AUDIO_PLACEHOLDER}.")


def test_prompt_leaves_an_empty_context_out():
    assert render_prompt(_example(context=" \n ")) == "Transcript: Good luck.\nQuestion: Who?\n<|audio|>\nAnswer:"


@given(st.text(), st.text(), st.text())
def test_prompt_has_one_placeholder_and_no_field_can_pose_as_another(transcription, context, question):
    fields = {"transcription": transcription, "context": context, "question": question}
    if any(AUDIO_PLACEHOLDER in value for value in fields.values()):
        return
    try:
        example = _example(**fields)
    except ValueError:  # half a surrogate pair
        return
    prompt = render_prompt(example)
    assert prompt.count(AUDIO_PLACEHOLDER) == 1
    assert prompt.count("\n") == (4 if context.split() else 3)
    assert prompt.endswith(f"\n{AUDIO_PLACEHOLDER}\nAnswer:")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_puts_its_labels_into_statement_and_hint(name):
    task = TASKS[name]
    assert task.name == name and task.category in CATEGORIES
    for label in task.choices or ("Danish",):
        assert f" {label}" in target_template(_example(task=name), label)
        assert f" {label}" in hint_for(name, label)


def test_target_template_of_gender_and_of_a_foreign_task():
    assert target_template(_example(task="gender"), "woman") == "The speaker is a woman."
    assert target_template(_example(task="bird song"), "a crow") == "The answer is a crow."
    assert target_template(_example(task="bird song"), "A crow.") == "The answer is A crow."
    assert target_template(_example(task="bird song"), "Who?") == "The answer is Who?"


def test_target_template_refuses_what_is_no_choice():
    with pytest.raises(ValueError, match=r"answer: expected one of \['man', 'woman'\], got 'child'"):
        target_template(_example(task="gender", choices=("man", "woman")), "child")
    with pytest.raises(ValueError, match="answer: expected a label"):
        target_template(_example(), " ")


def test_a_choice_with_blanks_around_it_is_told_without_them():
    choices = ("man ", "a  woman")
    told = [target_template(_example(choices=choices, answer=choice), choice) for choice in choices]
    assert told == ["The answer is man.", "The answer is a woman."]


def test_hint_for_an_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match=r"task: expected one of .*'gender'.*, got 'humour'"):
        hint_for("humour", "happy")


@given(st.text(), st.integers(1, 20), st.integers(1, 80))
def test_shortened_transcripts_keep_their_limits_and_their_beginning(text, max_words, max_characters):
    short = shorten_transcript(text, max_words=max_words, max_characters=max_characters)
    assert len(short) <= max_characters and len(short.split()) <= max_words
    assert " ".join(text.split()).startswith(short)
    assert bool(short) == bool(text.split())
