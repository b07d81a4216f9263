"""The recipes of large vocabularies run end to end at few ids; methods that disagree are never printed."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from benchmarks import large_vocab

SMALL = {"rows": 3, "columns": 12, "predicted": 6, "student_width": 16, "teacher_width": 32, "layers": 1}


def request(name, **changes):
    values = {"name": name, "vocab": 97, "sizes": SMALL, "steps": 3, "dtype": "float32", "train_head": False, "device": "cpu"}
    return {**values, **changes}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("name", large_vocab.RECIPES)
def test_fused_and_naive_take_the_same_steps(name, train_head):
    found = {m: large_vocab.run_one(method=m, **request(name, train_head=train_head)) for m in large_vocab.METHODS}
    for what in ("losses", "gradient_norms"):
        assert found["fused"][what] == pytest.approx(found["naive"][what], rel=2e-4)
        assert len(set(found["fused"][what])) == 3
    rows = large_vocab.rows_of(request(name, train_head=train_head), found)
    assert [row["method"] for row in rows] == ["fused", "naive"] and rows[0]["tokens"] == 18


def test_vocabularies_that_are_padded_differently(monkeypatch):
    """The naive method cuts the teacher's logits; the fused one takes the shared ids."""
    padded = large_vocab.VocabularyRecipe("test", "qwen2", 61, 70)
    monkeypatch.setitem(large_vocab.RECIPES, "padded", padded)
    found = [large_vocab.run_one(method=m, **request("padded", vocab=None))["losses"] for m in large_vocab.METHODS]
    assert found[0] == pytest.approx(found[1], rel=2e-4)


def test_full_length_is_the_families_own():
    assert [recipe.student_vocab for recipe in large_vocab.RECIPES.values()] == [128_256, 151_936, 262_144]
    model = large_vocab.make_model("llama", 128_256, 16, large_vocab.Sizes(layers=1), seed=0)
    assert model.get_output_embeddings().weight.shape == (128_256, 16)


def test_disagreement_is_refused():
    good = {"losses": [1.0, 2.0], "gradient_norms": [3.0, 4.0], "step_ms": 1.0, "peak_extra_mib": 1.0}
    large_vocab.rows_of(request("128k"), {"fused": good, "naive": good})
    for bad in ({"losses": [1.0, 2.1]}, {"gradient_norms": [math.nan, 4.0]}):
        with pytest.raises(SystemExit, match=r"128k: .* of step .: expected a difference of at most 0\.001, got fused"):
            large_vocab.rows_of(request("128k"), {"fused": {**good, **bad}, "naive": good})


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(large_vocab, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(SystemExit, match=r"did not fit: expected room for up to .* MiB, got 1 MiB"):
        large_vocab.run_one(method="naive", **request("262k", vocab=None))
    good = {"losses": [1.0], "gradient_norms": [3.0], "step_ms": 1.0, "peak_extra_mib": 1.0}
    rows = large_vocab.rows_of(request("262k"), {"fused": good, "naive": {"note": "did not fit"}})
    assert rows[1]["note"] == "did not fit" and math.isnan(rows[1]["peak_extra_mib"])


@pytest.mark.slow
def test_command(tmp_path):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    large_vocab.main(["128k", "--device", "cpu", "--vocab", "97", *words, "--out", str(tmp_path)])
    with (tmp_path / "large_vocab_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["fused", "naive"]
    assert all(float(row["step_ms"]) > 0 and float(row["peak_extra_mib"]) >= 0 and row["commit"] for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["64k"], "expected some of 128k, 152k, 262k, got 64k"), (["--predicted", "48"], "--predicted: expected 1 to 47")],
)
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit):
        large_vocab.main(words)
    assert message in capsys.readouterr().err
