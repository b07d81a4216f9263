"""The endpoints of the study: by hand, and that neither one teacher nor one actor can carry a claim."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from models.evaluation.predictions import Prediction, pack_predictions
from models.experiments import study_endpoints
from models.experiments.study_endpoints import (
    all_endpoints,
    as_row,
    difference,
    endpoints,
    followed_tasks,
    holm,
    sentence,
)

KINDS = ("neutral", "aligned", "conflict")


def answers(rights, *, actors=("a", "b"), kinds=KINDS, snr_db=0.0):
    """For each actor and kind ten questions, `rights(actor, kind)` of them right."""
    return [
        Prediction(
            id=f"{actor}{n}/{kind}", task="gender", kind=kind, answer="man", choices=("man", "woman"), pair_id=f"{actor}{n}",
            prediction=f"The speaker is a {'man' if n < rights(actor, kind) else 'woman'}.", actor=actor, snr_db=snr_db,
        )
        for actor in actors
        for kind in kinds
        for n in range(10)
    ]  # fmt: skip


def one(pairs, **options):
    told = {"name": "P1", "kind": "neutral", "min_snr_db": float("-inf"), "bound": 0.0, "systems": ("caad2", "kd")}
    return difference(pairs, **{**told, **options})


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_a_difference_by_hand():
    """Gains of 0.2, 0.1 and 0.3 of three teachers: mean 0.2, SD 0.1, t interval 0.2 +- 4.303 * 0.1 / sqrt(3)."""
    gains = {"f0s0": 2, "f1s0": 1, "f2s0": 3}
    pairs = {t: (answers(lambda a, k, g=g: 5 + g), answers(lambda a, k: 5)) for t, g in gains.items()}
    found = one(pairs)
    assert found.difference == pytest.approx(0.2) and (found.teachers, found.actors) == (3, 2)
    assert (found.t_low, found.t_high) == pytest.approx((0.2 - 0.2484, 0.2 + 0.2484), abs=1e-3)
    assert found.p == pytest.approx(0.0742, abs=1e-3)
    assert 0.09 < found.actors_low < 0.2 < found.actors_high < 0.31
    assert as_row(found)["verdict"] == "too few teachers"


def test_folds_are_units_too():
    """Gains of 0.3 and 0.1 in fold 0, of 0.4 and 0.4 in fold 1: the folds' means are 0.2 and 0.4, with one degree of freedom."""
    gains = {"E3-f0s0": 3, "E3-f0s1": 1, "E3-f1s0": 4, "E3-f1s1": 4}
    found = one({t: (answers(lambda a, k, g=g: 5 + g), answers(lambda a, k: 5)) for t, g in gains.items()})
    assert found.folds == 2 and found.difference == pytest.approx(0.3)
    assert (found.folds_low, found.folds_high) == pytest.approx((0.3 - 1.2706, 0.3 + 1.2706), abs=1e-3)
    assert found.folds_p == pytest.approx(0.2048, abs=1e-3) and found.t_low > found.folds_low


def test_the_bootstrap_is_of_the_difference_beside_it():
    """One teacher has both tasks, the other "gender" alone, where it gains 0.8. Teachers weigh the same, so the mean is 0.4. The
    actors are equal, so the ends are those of one teacher alone. Pooled, the mean of the tasks would be 0.2."""
    other = [[dataclasses.replace(p, task="noise", id=f"n{p.id}") for p in answers(lambda a, k: 5)] for _ in range(2)]
    both = (answers(lambda a, k: 5) + other[0], answers(lambda a, k: 5) + other[1])
    pairs = {"f0s0": both, "f1s0": (answers(lambda a, k: 9), answers(lambda a, k: 1))}
    found = one(pairs)
    assert found.difference == pytest.approx(0.4)
    assert (found.actors_low, found.actors_high) == pytest.approx((0.0, 0.8))
    middle = np.mean(study_endpoints._two_way_means(*cells(pairs), np.random.default_rng(0)))
    assert middle == pytest.approx(0.4, abs=0.005)


def cells(pairs):
    """Sums and counts (tasks, teachers, actors) of the gains in `pairs`, without a text."""
    tasks, actors = ("gender", "noise"), ("a", "b")
    sums, counts = (np.zeros((2, len(pairs), 2)) for _ in range(2))
    for t, (first, second) in enumerate(pairs.values()):
        for p, q in zip(first, second, strict=True):
            if p.kind == "neutral":
                at = tasks.index(p.task), t, actors.index(p.actor)
                sums[at] += ("woman" in q.prediction) - ("woman" in p.prediction)
                counts[at] += 1
    return sums, counts


def test_the_ends_of_the_bootstrap_are_not_the_seeds_of_it():
    pairs = {f"f{n}s0": (answers(lambda a, k, n=n: 4 + n + (a == "a")), answers(lambda a, k: 4)) for n in range(5)}
    ends = [(e.actors_low, e.actors_high) for e in (one(pairs, seed=seed) for seed in range(3))]
    assert max(np.ptp(ends, axis=0)) < 0.002


def test_systems_that_were_asked_different_questions_are_not_compared():
    whole, part = answers(lambda a, k: 5), answers(lambda a, k: 5, actors=("a",))
    with pytest.raises(ValueError, match="f0s0: expected the same questions of kind 'neutral' from caad2 and kd, got 10 of"):
        one({"f0s0": (whole, part)})


def test_tasks_in_which_a_teacher_gives_one_answer_can_be_left_out(tmp_path):
    gate = [
        {"teacher": "E3-f0s0", "task": "gender", "in_study": "yes", "text_effect": "0.4000"},
        {"teacher": "E3-f0s0", "task": "noise", "in_study": "yes", "text_effect": "0.0000"},
        {"teacher": "E3-f1s0", "task": "noise", "in_study": "yes", "text_effect": "0.0900"},
        {"teacher": "E3-f1s0", "task": "gender", "in_study": "no", "text_effect": "0.9000"},
        {"teacher": "f0s0", "task": "gender", "in_study": "yes", "text_effect": ""},
    ]
    kept = followed_tasks(gate, "E3-")
    assert kept == {"E3-f0s0": {"gender"}}
    noise = [dataclasses.replace(p, task="noise", id=f"n{p.id}") for p in answers(lambda a, k: 9)]
    for teacher in ("E3-f0s0", "E3-f1s0"):
        pack_predictions(tmp_path / f"{teacher}-caad2.jsonl.gz", {}, answers(lambda a, k: 7) + noise)
        pack_predictions(tmp_path / f"{teacher}-kd.jsonl.gz", {}, answers(lambda a, k: 5) + noise)
    found = endpoints(tmp_path, prefix="E3-", kept=kept)
    assert [(e.teachers, round(e.difference, 3)) for e in found] == [(1, 0.2)] * 3
    assert [(e.teachers, round(e.difference, 3)) for e in endpoints(tmp_path, prefix="E3-")] == [(2, 0.1)] * 3


def test_equal_teachers_have_no_t_interval():
    """Two teachers that gain the same by chance would have an interval of no width, and a p of 0."""
    pairs = {f"f{n}s0": (answers(lambda a, k: 6), answers(lambda a, k: 5)) for n in range(2)}
    found = dataclasses.replace(one(pairs), p_holm=1.0)
    assert found.difference == pytest.approx(0.1) and found.p == 1.0 and not found.holds
    assert as_row(found)["t_low"] == as_row(found)["t_high"] == "" and "+10.0 points (no t;" in sentence(found)


def test_one_actor_cannot_carry_a_claim():
    """Eight equal teachers exclude 0 by t. The gain is one actor's, and the other loses: the bootstrap does not exclude it."""
    gains = {"a": 8, "b": -5}
    pairs = {
        f"f{n}s0": (answers(lambda a, k, n=n: 5 + gains[a] // 2 + (a == "a" and n != 0)), answers(lambda a, k: 5))
        for n in range(8)
    }
    found = dataclasses.replace(one(pairs), p_holm=0.0)
    assert found.t_low > 0 > found.actors_low and not found.holds
    better = {t: (answers(lambda a, k, t=t: 9 - (t == "f0s0")), second) for t, (_, second) in pairs.items()}
    assert dataclasses.replace(one(better), p_holm=0.0).holds


def test_the_opposite_holds_where_both_units_exclude_the_bound_on_the_other_side():
    """Eight teachers lose 0.2 to 0.4. That the first is not a point behind has the opposite too; 0.3 behind is not excluded."""
    pairs = {f"f{n}s0": (answers(lambda a, k, n=n: 6 - n % 3), answers(lambda a, k: 8)) for n in range(8)}
    for bound, verdict in ((0.0, "the opposite holds"), (-0.01, "the opposite holds"), (-0.3, "failed"), (-0.5, "holds")):
        found = dataclasses.replace(one(pairs, bound=bound), p_holm=0.01)
        assert (found.verdict, found.holds) == (verdict, verdict == "holds")
        assert dataclasses.replace(found, p_holm=0.06).verdict == "failed"
    assert as_row(dataclasses.replace(found, teachers=7))["verdict"] == "too few teachers"


def test_a_tuned_system_is_tested_on_actors_that_did_not_tune_it(tmp_path):
    """E5 chooses on a05 and a06. The tuned student is right on them alone, which must not count."""
    chose = ("queen-a05", "queen-a06")
    for system in ("caad2", "kd", "kd_tuned"):
        rights = (lambda a, k: 5) if system == "caad2" else (lambda a, k: 10 if a in chose else 3)
        pack_predictions(tmp_path / f"f2s0-{system}.jsonl.gz", {}, answers(rights, actors=(*chose, "queen-a09")))
    tuned, plain = (endpoints(tmp_path, second=second)[0] for second in ("kd_tuned", "kd"))
    assert (tuned.actors, plain.actors) == (1, 3)
    assert tuned.difference == pytest.approx(0.2) and plain.difference == pytest.approx((0.2 - 0.5 - 0.5) / 3)


def test_chosen_steps_are_tested_on_actors_that_did_not_choose_them(tmp_path):
    """Dev of all folds chooses the steps: a06 of Drascula and Pirate of Hedgewars are dev in one fold and test in another."""
    chose = ("drascula-a06", "hedgewars-Pirate")
    for system in ("caad2_steps", "kd_steps"):
        rights = (lambda a, k: 5) if system == "caad2_steps" else (lambda a, k: 10 if a in chose else 3)
        pack_predictions(tmp_path / f"f0s0-{system}.jsonl.gz", {}, answers(rights, actors=(*chose, "drascula-a05")))
    found = endpoints(tmp_path, first="caad2_steps", second="kd_steps")[0]
    assert found.actors == 1 and found.difference == pytest.approx(0.2)


def test_one_teacher_decides_nothing_and_the_third_endpoint_leaves_out_loud_noise(tmp_path):
    quiet = answers(lambda a, k: 4), answers(lambda a, k: 5)
    loud = [
        [dataclasses.replace(p, id=f"loud-{p.id}", snr_db=-15.0) for p in answers(lambda a, k, r=r: r)] for r in (0, 10)
    ]
    for system, more, less in zip(("caad2", "kd"), quiet, loud, strict=True):
        pack_predictions(tmp_path / f"f0s0-{system}.jsonl.gz", {}, [*more, *less])
    found = all_endpoints(tmp_path)
    assert [e.name for e in found] == ["P1", "P2", "P3"]
    assert [e.difference for e in found] == pytest.approx([-0.55, -0.55, -0.1])
    assert all(e.p == 1.0 and not e.holds for e in found)
    assert as_row(found[0])["t_low"] == "" and "1 teacher(s), 2 actor(s): too few teachers" in sentence(found[2])
    assert endpoints(tmp_path, second="kd_tuned") == []
