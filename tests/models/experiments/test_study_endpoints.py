"""The endpoints of the study: by hand, and that neither one teacher nor one actor can carry a claim."""

from __future__ import annotations

import dataclasses

import pytest

from models.evaluation.predictions import Prediction, pack_predictions
from models.experiments.study_endpoints import all_endpoints, as_row, difference, endpoints, holm, sentence

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
