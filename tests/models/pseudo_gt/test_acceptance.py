"""Stage 1: which answers become targets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.data.answers import named_choices
from models.pseudo_gt.acceptance import check_answer, set_targets
from models.pseudo_gt.writers import Answer
from tests.models.pseudo_gt.test_stage1 import gender


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The speaker is a man.", None),
        ("THE SPEAKER IS A *MAN*!", None),
        ("", "empty"),
        (" \n", "empty"),
        ("man " * 50, "too long"),
        (Answer("The speaker is a man", ended=False), "cut off"),
        (Answer("The speaker is a man"), None),
        ("The speaker is a man \ufffd", "cut off"),
        ("The \ufffd speaker is a man.", None),
        ("The speaker is tall.", "no choice named"),
        ("The speaker is a mankind.", "no choice named"),
        ("A man or a woman.", "several choices named"),
        ("The speaker is a woman.", "wrong choice named"),
    ],
)
def test_answers_are_checked(text, reason):
    assert check_answer(text, gender(1)) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Someone speaks, perhaps a woman, about two men. " * 2, None),
        ("The speaker is a woman.", None),  # no choice is looked for
        ("no no no no", None),
        ("A. " * 12, "repeats itself"),
        ("I hear rain. There is a dog and a cat, there is a dog and a cat, there is a dog and a cat.", "repeats itself"),
        ("...", None),
        (" ", "empty"),
        ("word " * 1000, "too long"),
        (Answer("A woman speaks", ended=False), "cut off"),
    ],
)
def test_free_answers_are_checked_for_their_form(text, reason):
    assert check_answer(text, gender(1), max_characters=2000, accept="free") == reason


def test_answers_to_free_and_to_unlabelled_questions():
    assert check_answer("Anything.", gender(1, choices=(), answer=None)) is None
    assert check_answer("The speaker is a woman.", gender(1, answer=None)) is None
    assert check_answer("A man or a woman.", gender(1, answer=None)) == "several choices named"


def test_the_longer_of_two_choices_counts_where_one_contains_the_other():
    assert named_choices("It is very fast.", ("fast", "very fast")) == ["very fast"]
    assert named_choices("It is fast.", ("fast", "very fast")) == ["fast"]
    assert named_choices("fast, not very fast", ("fast", "very fast")) == ["fast", "very fast"]


@given(st.text(max_size=60))
def test_checking_never_fails(text):
    assert check_answer(text, gender(1)) is None or isinstance(check_answer(text, gender(1)), str)


def test_set_targets_by_id():
    examples = [gender(1), gender(2, target="kept", target_source="human")]
    done = set_targets(examples, {"clip-1": "The speaker\nis a man."})
    assert (done[0].target, done[0].target_source) == ("The speaker is a man.", "teacher")
    assert done[1] == examples[1]
    with pytest.raises(ValueError, match="targets: expected ids of the examples, got 1 others, such as 'x'"):
        set_targets(examples, {"x": "a"})
    with pytest.raises(ValueError, match="targets: expected text, got an empty one for 'clip-1'"):
        set_targets(examples, {"clip-1": " "})
    with pytest.raises(ValueError, match="target_source: expected one of"):
        set_targets(examples, {}, target_source="oracle")
