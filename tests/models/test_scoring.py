import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.data.readers import read_foreign
from models.scoring import (
    Prediction,
    context_kind,
    judge,
    lenient_match,
    normalize,
    paired_difference,
    score,
    strict_match,
)


def p(i, kind, right, pair=None, answer="man", task="gender"):
    other = {"man": "woman", "woman": "man"}[answer]
    return Prediction(
        id=f"{i}/{kind}", task=task, kind=kind, answer=answer, choices=("man", "woman"), pair_id=pair or str(i),
        prediction=f"The speaker is a {answer if right else other}.",
    )


@pytest.mark.parametrize(
    ("prediction", "label", "right"),
    [
        ("The speaker is a woman.", "woman", True),
        ("The speaker is a woman.", "man", False),  # not inside a word
        ("MAN!", "man", True),
        ("an old man", "old man", True),
        ("a man, old", "old man", False),  # consecutively
        ("man [woman]", "woman", False),  # bracketed remarks are dropped, as Whisper's normaliser does
        ("It is slow", "slowly", False),
        ("", "man", False),
        ("anything", "", False),
        ("Très bien: Français", "français", True),
    ],
)
def test_lenient_match(prediction, label, right):
    assert lenient_match(prediction, label) is right


@pytest.mark.parametrize(
    ("prediction", "label", "choices", "right"),
    [
        ("a woman", "woman", ("man", "woman"), True),
        ("a man or a woman", "woman", ("man", "woman"), False),  # names every option
        ("an old man", "old man", ("man", "old man"), True),  # "man" stands inside the label only
        ("an old man, a man", "old man", ("man", "old man"), False),
        ("an old man", "man", ("man", "old man"), False),  # the other one, which has the label's word in it
        ("a man", "man", ("man", "old man"), True),
        ("C", "c#", ("c#", "d"), True),  # symbols do not count, for labels either
        ("very clean noisy", "clean", ("clean", "noisy"), False),
        ("a b c", "b", ("a c", "b"), True),  # taking b out must not make "a c"
        ("Paris.", "paris", (), True),
        ("in Paris", "paris", (), False),
    ],
)
def test_strict_match(prediction, label, choices, right):
    assert strict_match(prediction, label, choices) is right


@given(st.text(max_size=40))
def test_normalize_is_idempotent_and_strict_implies_lenient(text):
    assert normalize(normalize(text)) == normalize(text)
    if strict_match(text, "woman", ("man", "woman")):
        assert lenient_match(text, "woman")


def test_accuracy_and_both_shifts_by_hand():
    # pair: neutral, aligned, conflict
    table = {1: (1, 1, 0), 2: (1, 1, 1), 3: (0, 1, 0), 4: (1, 0, 0), 5: (0, 0, 1)}
    predictions = [
        p(i, kind, bool(v), answer="man" if i % 2 else "woman")
        for i, values in table.items()
        for kind, v in zip(("neutral", "aligned", "conflict"), values, strict=True)
    ]
    s = score(predictions, bootstrap_samples=200)
    assert s["accuracy"].value == pytest.approx(8 / 15) and s["accuracy"].count == 15
    assert s["by_kind"]["neutral"].value == pytest.approx(3 / 5)
    assert s["by_kind"]["conflict"].value == pytest.approx(2 / 5)
    assert s["by_class"]["gender"]["woman"]["neutral"].value == 1.0
    assert s["by_class"]["gender"]["woman"]["conflict"].value == 0.5
    assert s["tir_adv"].value == pytest.approx(2 / 3) and s["tir_adv"].count == 3
    assert s["tir_adversarial_all"].value == pytest.approx(2 / 5)
    assert s["tir_faithful_all"].value == pytest.approx(1 / 5)
    assert s["accuracy"].low <= s["accuracy"].value <= s["accuracy"].high


def test_pairs_without_a_conflict_do_not_enter_the_shift():
    s = score([p(1, "neutral", True), p(2, "neutral", True), p(2, "conflict", False)], bootstrap_samples=50)
    assert (s["tir_adv"].value, s["tir_adv"].count) == (1.0, 1)
    assert s["tir_faithful_all"].value is None and str(s["tir_faithful_all"]) == "-"


def test_irrelevant_contexts_are_not_the_neutral_ones():
    # The irrelevant row comes first in each pair, as it may in a file; it must not stand for the neutral one.
    table = {1: (1, 1, 0), 2: (0, 1, 1), 3: (1, 0, 1), 4: (0, 0, 0)}  # irrelevant, neutral, conflict
    s = score(
        [
            p(i, kind, bool(v))
            for i, values in table.items()
            for kind, v in zip(("irrelevant", "neutral", "conflict"), values, strict=True)
        ],
        bootstrap_samples=50,
    )
    assert s["tir_irrelevant_all"].value == pytest.approx(2 / 4)
    assert s["tir_adv"].value == pytest.approx(1 / 2) and s["tir_adversarial_all"].value == pytest.approx(1 / 4)
    assert list(s["by_kind"]) == ["neutral", "conflict", "irrelevant"]


def test_context_kind_follows_the_readers(tmp_path):
    row = {
        "id": "q1", "audio": "a.wav", "question": "Happy or sad?", "choices": ["happy", "sad"], "answer": "sad",
        "contexts": {"irrelevant": "It rains.", "neutral": "", "faithful": "She cried.", "adversarial": "She laughed."},
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    examples = read_foreign(tmp_path / "rows.jsonl", form="mcr_bench", check_audio=False).examples
    assert [context_kind(e) for e in examples] == ["irrelevant", "neutral", "aligned", "conflict"]


def test_mean_of_tasks_is_over_tasks_not_items():
    predictions = [p(i, "neutral", True) for i in range(9)] + [p(99, "neutral", False, task="rate")]
    s = score(predictions, bootstrap_samples=10)
    assert s["accuracy"].value == 0.9 and s["mean_of_tasks"].value == 0.5


def test_strict_and_lenient_are_both_reported():
    both = Prediction(
        id="1", task="gender", kind="neutral", answer="man", choices=("man", "woman"), prediction="man or woman"
    )
    s = score([both], bootstrap_samples=10)
    assert (s["accuracy"].value, s["strict_accuracy"].value) == (1.0, 0.0)
    assert score([both], bootstrap_samples=10, scorer="strict")["accuracy"].value == 0.0
    with pytest.raises(ValueError, match="scorer: expected 'lenient', 'strict'"):
        judge([both], scorer="exact")


def test_interval_has_the_textbook_width():
    rng = np.random.default_rng(0)
    predictions = [p(i, "neutral", bool(rng.random() < 0.8)) for i in range(400)]
    s = score(predictions, bootstrap_samples=4000)["accuracy"]
    half = 1.96 * np.sqrt(s.value * (1 - s.value) / 400)
    assert (s.high - s.low) / 2 == pytest.approx(half, rel=0.1)


def test_clips_are_resampled_whole():
    # 50 clips, each right in all of its 3 contexts or in none: the interval is that of 50 items, not of 150.
    predictions = [p(i, k, i % 2 == 0) for i in range(50) for k in ("neutral", "aligned", "conflict")]
    s = score(predictions, bootstrap_samples=4000)["accuracy"]
    assert (s.high - s.low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 / 50), rel=0.12)


def test_paired_difference():
    first = [p(i, "conflict", i < 80) for i in range(100)]
    second = [p(i, "conflict", i < 60) for i in range(100)]
    d = paired_difference(first, second, kind="conflict")
    assert d.value == pytest.approx(0.2) and d.low > 0.1
    assert paired_difference(first, first).value == 0 == paired_difference(first, first).high
    with pytest.raises(ValueError, match="no id in common"):
        paired_difference(first, second, kind="neutral")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="predictions: expected at least one"):
        score([])
    with pytest.raises(ValueError, match="id '1/neutral' twice"):
        score([p(1, "neutral", True)] * 2)
