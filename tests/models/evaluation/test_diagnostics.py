"""Calibration, agreement with the text prior and paired differences, against numbers worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from models.evaluation.diagnostics import calibration, compare, control_priors, hint_priors, prior_confusion
from models.evaluation.predictions import Prediction
from models.evaluation.score_tables import print_comparison
from models.evaluation.scoring import judged
from models.evaluation.summary import summarize


def scored(i, answer, probabilities, task="t"):
    said = max(probabilities, key=probabilities.get)
    return Prediction(
        id=str(i), task=task, kind="neutral", answer=answer, choices=tuple(probabilities), prediction=f"It is {said}.",
        scores={c: math.log(v) - 7 if v else -math.inf for c, v in probabilities.items()},
    )  # fmt: skip


def said(i, answer, prediction, *, kind="neutral", task="t", choices=("red", "green", "blue"), **more):
    return Prediction(
        id=f"{i}/{kind}", task=task, kind=kind, answer=answer, choices=choices, prediction=prediction, pair_id=str(i), **more
    )


FOUR = [
    scored(1, "a", {"a": 0.95, "b": 0.05}),
    scored(2, "b", {"a": 0.65, "b": 0.35}),
    scored(3, "a", {"a": 0.65, "b": 0.35}),
    scored(4, "b", {"a": 0.55, "b": 0.25, "c": 0.2}),
]


def test_calibration_by_hand():
    c = calibration(judged(FOUR, bootstrap_samples=100))
    # Gaps: 1 item of 0.05; 2 of |0.5 - 0.65|; 1 of |0 - 0.55|.
    assert c["ece"].value == pytest.approx((1 * 0.05 + 2 * 0.15 + 1 * 0.55) / 4)
    squares = [2 * 0.05**2, 2 * 0.65**2, 2 * 0.35**2, 0.55**2 + 0.75**2 + 0.2**2]
    assert c["brier"].value == pytest.approx(sum(squares) / 4)
    assert (c["count"], c["accuracy"]) == (4, 0.5) and c["confidence"] == pytest.approx((0.95 + 2 * 0.65 + 0.55) / 4)
    filled = {round(b["low"], 1): (b["count"], b["accuracy"], b["confidence"]) for b in c["bins"] if b["count"]}
    assert filled == {0.5: (1, 0.0, pytest.approx(0.55)), 0.6: (2, 0.5, pytest.approx(0.65)), 0.9: (1, 1.0, pytest.approx(0.95))}
    assert [b["accuracy"] for b in c["bins"][:5]] == [None] * 5


def test_calibration_of_edges_and_of_what_has_no_scores():
    even = calibration(judged([scored(1, "a", {"a": 0.5, "b": 0.5})], bootstrap_samples=5))
    assert [b["count"] for b in even["bins"]] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]  # 0.5 belongs to (0.4, 0.5]
    sure = calibration(judged([scored(1, "a", {"a": 1.0, "b": 0.0})], bootstrap_samples=5))
    assert (sure["ece"].value, sure["brier"].value) == (0, 0)
    without = [said(1, "red", "red"), dataclasses.replace(FOUR[0], id="other", answer="z", choices=())]
    assert calibration(judged(without, bootstrap_samples=5)) is None
    assert calibration(judged([*without, *FOUR], bootstrap_samples=5))["count"] == 4
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        calibration(judged(FOUR, bootstrap_samples=5), bins=0)


def test_interval_of_the_calibration_error():
    # Always 0.9 sure and right in 60%: the gap is 0.3, and its interval that of the share of right answers.
    predictions = [scored(i, "a" if i % 5 < 3 else "b", {"a": 0.9, "b": 0.1}) for i in range(400)]
    ece = calibration(judged(predictions, bootstrap_samples=4000))["ece"]
    assert ece.value == pytest.approx(0.3)
    assert (ece.high - ece.low) / 2 == pytest.approx(1.96 * np.sqrt(0.6 * 0.4 / 400), rel=0.1)


PRIOR_CASES = [  # answer, prediction, prior
    ("red", "It is red.", "red"),
    ("red", "It is blue.", "red"),
    ("red", "It is red.", "blue"),
    ("red", "It is blue.", "blue"),
    ("green", "It is blue.", "blue"),
    ("green", "It is red.", "blue"),
    ("green", "red or blue", "blue"),  # wrong, and not one choice
]


def test_confusion_with_the_prior_by_hand():
    predictions = [said(i, a, q) for i, (a, q, _) in enumerate(PRIOR_CASES)]
    priors = {f"{i}/neutral": prior for i, (_, _, prior) in enumerate(PRIOR_CASES)}
    predictions.append(said(99, "red", "It is blue.", task="other"))  # no prior is known of it
    confusion = prior_confusion(judged(predictions, bootstrap_samples=50), priors)
    table = confusion["all"]
    assert table["prior_right"] == {"right": 1, "wrong": 1}
    assert table["prior_wrong"] == {"right": 1, "as_prior": 2, "other": 2}
    assert table["wrong_as_prior"].value == pytest.approx(2 / 5) and table["wrong_as_prior"].count == 5
    assert list(confusion["by_task"]) == ["t"] and confusion["by_task"]["t"] == table
    assert prior_confusion(judged(predictions, bootstrap_samples=5), {"elsewhere": "red"}) is None


def test_priors_of_free_answers_match_by_words():
    free = [said(1, "a red car", "I hear a blue car!", choices=()), said(2, "rain", "the rain", choices=())]
    table = prior_confusion(judged(free, bootstrap_samples=5), {"1/neutral": "blue car", "2/neutral": "Wind"})["all"]
    assert table["prior_wrong"] == {"right": 1, "as_prior": 1, "other": 0}


def test_summary_takes_priors_from_the_control_and_the_hint():
    predictions = [
        said(1, "red", "It is blue.", kind="neutral"),
        said(1, "red", "It is green.", kind="conflict", claim="green"),
        said(1, "red", "It is red.", kind="aligned", claim="red"),
        dataclasses.replace(said(1, "red", "It is blue."), id="1/neutral#no_audio", control="no_audio"),
        dataclasses.replace(said(1, "red", "blue, red"), id="1/aligned#no_audio", control="no_audio", kind="aligned"),
    ]
    assert control_priors(predictions) == {"1/neutral": "blue"}  # under the other, two choices were named
    assert hint_priors(predictions) == {"1/conflict": "green", "1/aligned": "red"}
    summary = summarize(predictions, priors={"1/aligned": "green"})
    confusion = summary["plain"]["confusion"]
    assert confusion["no_audio"]["all"]["prior_wrong"] == {"right": 0, "as_prior": 1, "other": 0}
    assert confusion["hint"]["all"]["prior_right"] == {"right": 1, "wrong": 0}
    assert confusion["hint"]["all"]["prior_wrong"] == {"right": 0, "as_prior": 1, "other": 0}
    assert confusion["priors"]["all"]["prior_wrong"] == {"right": 1, "as_prior": 0, "other": 0}
    assert "confusion" not in summary["no_audio"]


def system(table):
    """pair -> (task, neutral right, conflict right)"""
    return [
        said(i, "red", "red" if right else "blue", kind=kind, task=task)
        for i, (task, *verdicts) in table.items()
        for kind, right in zip(("neutral", "conflict"), verdicts, strict=True)
    ]


def test_comparison_by_hand(capsys):
    first = system({1: ("a", 1, 1), 2: ("a", 1, 1), 3: ("a", 1, 0), 4: ("b", 1, 1), 5: ("b", 0, 0)})
    second = system({1: ("a", 1, 0), 2: ("a", 1, 0), 3: ("a", 0, 0), 4: ("b", 1, 0), 6: ("b", 1, 1)})
    c = compare(first, second, bootstrap_samples=200)
    assert (c["count"], c["only_first"], c["only_second"]) == (8, 2, 2)
    assert c["accuracy"].value == pytest.approx(7 / 8 - 3 / 8)
    assert c["by_kind"]["neutral"].value == pytest.approx(4 / 4 - 3 / 4)
    assert c["by_kind"]["conflict"].value == pytest.approx(3 / 4 - 0 / 4)
    assert c["by_task"]["b"].value == pytest.approx(2 / 2 - 1 / 2)
    assert c["mean_of_tasks"].value == pytest.approx((5 / 6 + 2 / 2) / 2 - (2 / 6 + 1 / 2) / 2)
    assert c["tir_adv"].value == pytest.approx(1 / 4 - 3 / 3)
    same = compare(first, first, bootstrap_samples=50)
    for name in ("accuracy", "mean_of_tasks", "tir_adv"):
        assert (same[name].value, same[name].low, same[name].high) == (0, None, None)
    print_comparison(same, "a", "b")
    assert "+0.000 (no interval)" in capsys.readouterr().out


def test_comparison_is_paired():
    # The second fails in one more of 20 than the first, which fails in half: apart, the intervals would overlap by far.
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.5
    first = system({i: ("a", r, r) for i, r in enumerate(right)})
    second = system({i: ("a", r and i % 10 > 0, r and i % 10 > 0) for i, r in enumerate(right)})
    c = compare(first, second, bootstrap_samples=4000)["accuracy"]
    lost = np.mean([r and i % 10 == 0 for i, r in enumerate(right)])
    assert c.value == pytest.approx(lost)
    assert (c.high - c.low) / 2 == pytest.approx(1.96 * np.sqrt(lost * (1 - lost) / 400), rel=0.12)


def test_controls_are_not_compared_and_other_manifests_are_refused():
    first = [said(1, "red", "red")]
    control = dataclasses.replace(said(2, "red", "red"), control="no_audio")
    assert compare([*first, control], [*first, control], bootstrap_samples=5)["count"] == 1
    with pytest.raises(ValueError, match="no question in common: 1 in the first file, 0 in the second"):
        compare(first, [control])
    with pytest.raises(ValueError, match="'1/neutral': expected the same answer in both files, got 'red' and 'blue'"):
        compare(first, [said(1, "blue", "red")])
