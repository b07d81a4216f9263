import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.data.answers import lenient_match, normalize, strict_match
from models.data.manifest import Example
from models.data.readers import read_foreign
from models.evaluation.bootstrap import Bootstrap, Statistic, mean_of
from models.evaluation.predictions import Prediction, claimed_choice, context_kind
from models.evaluation.scoring import judge, paired_difference, score


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


def of_task(task, category, verdicts, **more):
    """One prediction a verdict, asked without a hint."""
    return [
        dataclasses.replace(p(f"{task}{i}", "neutral", bool(v), task=task), category=category, **more)
        for i, v in enumerate(verdicts)
    ]


def test_both_averages_and_the_categories_by_hand():
    predictions = [
        *of_task("words", "content", [1, 1, 1, 0]),
        *of_task("terms", "content", [1, 0]),
        *of_task("count", "speaker", [0]),
        *of_task("birds", "audio", [1, 1, 1, 1, 1]),
    ]
    s = score(predictions, bootstrap_samples=50)
    assert s["mean_of_tasks"].value == pytest.approx((3 / 4 + 1 / 2 + 0) / 3) and s["mean_of_tasks"].count == 3
    assert s["mean_of_items"].value == pytest.approx(4 / 7) and s["mean_of_items"].count == 7
    assert s["accuracy"].value == pytest.approx(9 / 12)  # the category audio is part of the items, not of ALL
    content = s["by_category"]["content"]
    assert content["tasks"] == 2
    assert content["mean_of_tasks"].value == pytest.approx(5 / 8) and content["mean_of_items"].value == pytest.approx(4 / 6)
    assert s["by_category"]["audio"]["mean_of_tasks"].value == 1 and s["by_category"]["speaker"]["mean_of_tasks"].value == 0
    assert s["by_task"]["words"]["category"] == "content" and s["by_task"]["words"]["all"].value == 0.75
    assert s["mean_of_tasks_by_kind"]["neutral"] == s["mean_of_tasks"]
    only_audio = score(of_task("birds", "audio", [1, 0]), bootstrap_samples=10)
    assert only_audio["mean_of_tasks"].value is None and only_audio["mean_of_items"].value is None


def test_strict_mean_of_tasks():
    both = [dataclasses.replace(q, prediction="man or woman") for q in of_task("a", "", [1, 1])] + of_task("b", "", [1])
    s = score(both, bootstrap_samples=10)
    assert s["mean_of_tasks"].value == 1 and s["strict_mean_of_tasks"].value == pytest.approx((0 + 1) / 2)
    assert s["by_task"]["a"]["strict"].value == 0 and s["lenient_accuracy"].value == 1


def test_mean_of_tasks_by_kind_and_shift_by_task():
    table = {"a": {1: (1, 0), 2: (1, 1)}, "b": {3: (0, 0), 4: (1, 0)}}  # task: pair: neutral, conflict
    s = score(
        [
            p(i, kind, bool(v), task=task)
            for task, pairs in table.items()
            for i, values in pairs.items()
            for kind, v in zip(("neutral", "conflict"), values, strict=True)
        ],
        bootstrap_samples=20,
    )
    assert s["mean_of_tasks_by_kind"]["neutral"].value == pytest.approx((2 / 2 + 1 / 2) / 2)
    assert s["mean_of_tasks_by_kind"]["conflict"].value == pytest.approx((1 / 2 + 0 / 2) / 2)
    assert s["by_category"][""]["by_kind"]["conflict"].value == pytest.approx(1 / 4)
    assert s["tir_adv"].value == pytest.approx(2 / 3)
    assert s["by_task"]["a"]["shift"]["tir_adv"].value == pytest.approx(1 / 2)
    assert s["by_task"]["b"]["shift"]["tir_adv"].value == 1 and s["by_task"]["b"]["shift"]["tir_adversarial_all"].value == 0.5


def test_interval_of_the_mean_of_tasks_has_the_textbook_width():
    predictions = of_task("a", "", [i % 5 > 0 for i in range(400)]) + of_task("b", "", [i % 2 for i in range(100)])
    s = score(predictions, bootstrap_samples=4000)["mean_of_tasks"]
    assert s.value == pytest.approx(0.65)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 400 + 0.5 * 0.5 / 100) / 2
    assert (s.high - s.low) / 2 == pytest.approx(half, rel=0.1)


def test_a_clip_asked_about_by_several_tasks_is_resampled_whole():
    # Right in both tasks or in neither: 50 clips are 50 items, for the mean of tasks too.
    verdicts = [i % 2 for i in range(50)]
    apart = of_task("a", "", verdicts) + of_task("b", "", verdicts)
    together = [dataclasses.replace(q, clip=f"{q.id.split('/')[0][1:]}.wav") for q in apart]
    half = 1.96 * np.sqrt(0.25 / 50)
    for name in ("accuracy", "mean_of_tasks"):
        wide, narrow = (score(q, bootstrap_samples=4000)[name] for q in (together, apart))
        assert (wide.high - wide.low) / 2 == pytest.approx(half, rel=0.12)
        assert (narrow.high - narrow.low) / 2 == pytest.approx(half / np.sqrt(2), rel=0.12)


def test_means_leave_out_what_has_no_item():
    nan = np.nan
    a = Statistic(1.0, np.array([1.0, 0.5, nan, nan]), 4)
    b = Statistic(0.0, np.array([0.0, nan, 0.25, nan]), 2)
    mean = mean_of([a, b, Statistic(nan, np.full(4, nan), 0)])
    assert (mean.value, mean.count) == (0.5, 2)
    np.testing.assert_array_equal(mean.draws, [0.5, 0.5, 0.25, nan])
    assert mean_of([]).estimate().value is None
    np.testing.assert_array_equal((a - b).draws, [1.0, nan, nan, nan])


def test_draws_are_counts_of_groups():
    boot = Bootstrap(["x", "y", "x", "z"], 500, seed=3)
    x, all_items = boot.sums(np.array([1, 0, 1, 0])), boot.sums(np.ones(4))
    assert set(x) <= {0, 2, 4, 6}  # both items of x come together
    groups = [boot.sums(np.array(v)) for v in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1])]
    np.testing.assert_array_equal(sum(groups), 3)  # as many groups as there are
    np.testing.assert_array_equal(all_items, 2 * groups[0] + groups[1] + groups[2])


@pytest.mark.parametrize(
    ("fields", "claim"),
    [
        ({"kind": "conflict", "context": "Note: the speaker is a woman."}, "woman"),
        ({"kind": "conflict", "context": "Note: the speaker is a woman, no man."}, None),
        ({"kind": "aligned", "transcription": "I am a man."}, "man"),  # the words themselves are the hint
        ({"kind": "conflict", "context": "Note: she is old.", "transcription": "I am a man."}, None),
        ({"kind": "neutral", "context": "Does the text match: the woman sang?"}, None),
        ({"kind": "neutral", "metadata": {"claimed_by_words": "woman"}}, "woman"),
    ],
)
def test_what_the_text_claims(fields, claim):
    assert claimed_choice(Example(id="1", audio=None, choices=("man", "woman"), answer="man", **fields)) == claim


def test_what_was_said():
    q = p(1, "neutral", True)
    assert q.said() == "man"
    assert dataclasses.replace(q, prediction="man or woman").said() is None
    assert dataclasses.replace(q, scores={"man": -3.0, "woman": -2.0}).said() == "woman"
    assert dataclasses.replace(q, choices=(), prediction="a tall man").said() == "a tall man"
    assert dataclasses.replace(q, choices=(), prediction=" ?").said() is None


def test_tasks_of_free_answers_have_no_table_by_label():
    free = [Prediction(id=str(i), task="ask", kind="neutral", answer=f"{i}", prediction=f"{i}") for i in range(21)]
    assert score(free, bootstrap_samples=5)["by_class"] == {}
    assert len(score(free[:20], bootstrap_samples=5)["by_class"]["ask"]) == 20


def test_strict_and_lenient_are_both_reported():
    both = Prediction(
        id="1", task="gender", kind="neutral", answer="man", choices=("man", "woman"), prediction="man or woman"
    )
    s = score([both], bootstrap_samples=10)
    assert (s["accuracy"].value, s["strict_accuracy"].value) == (1.0, 0.0)
    assert score([both], bootstrap_samples=10, scorer="strict")["accuracy"].value == 0.0
    with pytest.raises(ValueError, match="scorer: expected 'lenient', 'strict'"):
        judge([both], scorer="exact")
    for scorer in ("lenient", "strict"):
        with pytest.raises(ValueError, match="prediction '1': choices: 'man' and ' man ' cannot be told apart"):
            judge([dataclasses.replace(both, choices=("man", " man "))], scorer=scorer)


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
    same = paired_difference(first, first)
    assert (same.value, same.low, same.high) == (0, None, None)
    with pytest.raises(ValueError, match="no id in common"):
        paired_difference(first, second, kind="neutral")


@pytest.mark.parametrize("rights", [[1], [1, 1, 1], [0] * 40], ids=["one clip", "three that agree", "forty that agree"])
def test_clips_that_do_not_differ_give_no_interval(rights):
    """Nothing says how much others would differ: three right answers of three are no proof of 100%."""
    accuracy = score([p(i, "neutral", right) for i, right in enumerate(rights)])["accuracy"]
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.count) == (rights[0], None, None, len(rights))
    assert str(accuracy) == f"{rights[0]:.3f} (no interval)"
    mixed = score([p(i, "neutral", i % 2) for i in range(40)])["accuracy"]
    assert mixed.low < 0.5 < mixed.high


def test_two_questions_on_one_clip_give_no_interval():
    both = [dataclasses.replace(p(i, "neutral", i % 2), clip="one.wav") for i in range(2)]
    accuracy = score(both)["accuracy"]
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.count) == (0.5, None, None, 2)
    others = [dataclasses.replace(p(i, "neutral", 1), clip=f"{i}.wav", task="other") for i in range(2, 30)]
    by_task = score([*both, *others])["by_task"]
    assert all(task["all"].low is None for task in by_task.values())  # also beside the clips of other tasks


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="predictions: expected at least one"):
        score([])
    with pytest.raises(ValueError, match="id '1/neutral' twice"):
        score([p(1, "neutral", True)] * 2)


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [(("C major", "C# major"), "The chord is {}."), (("(laughter)", "(cough)"), "I hear {}."), (("男", "女"), "说话人是{}。")],
)
@pytest.mark.parametrize("scorer", ["lenient", "strict"])
def test_where_choices_are_ranked_the_likeliest_decides(choices, sentence, scorer):
    """A model at chance is right half of the time, whatever the choices look like."""
    rows = [
        Prediction(
            id=f"{i}", task="t", kind="neutral", choices=choices, answer=choices[i % 2], prediction=sentence.format(said),
            scores={c: 0.0 if c == said else -1.0 for c in choices},
        )
        for i, said in enumerate([choices[0], choices[0], choices[1], choices[1]])
    ]  # fmt: skip
    assert judge(rows, scorer=scorer).tolist() == [True, False, False, True]
    free = [dataclasses.replace(row, scores={}) for row in rows]
    assert judge(free, scorer=scorer).tolist() == [True, False, False, True]
