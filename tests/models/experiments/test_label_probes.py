"""Linear probes: right values on constructed clips, and the whole experiment in small."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from models.experiments import study_tables
from models.experiments.label_probes import DESCRIPTIONS, balanced_accuracy, probe, signal_statistics
from models.experiments.study import main
from models.experiments.study_settings import chosen_teachers

RATE = 16_000


def test_balanced_accuracy_is_the_mean_of_both_sides():
    labels = np.array([1.0, 1, 1, 1, -1])
    assert balanced_accuracy(np.array([1.0, 1, 1, -1, -1]), labels) == pytest.approx((0.75 + 1) / 2)
    assert balanced_accuracy(np.zeros(5), labels) == 0.5


def test_a_label_that_one_number_tells_is_found_and_one_that_none_tells_is_not():
    draw = np.random.default_rng(0)
    labels = {part: np.where(draw.random(n) < 0.5, 1.0, -1.0) for part, n in {"train": 300, "dev": 100, "test": 400}.items()}
    noise = {part: draw.normal(size=(len(y), 20)) for part, y in labels.items()}
    told = {part: np.column_stack([noise[part], 50 + 0.001 * y]) for part, y in labels.items()}
    assert probe(told, labels) > 0.99
    assert abs(probe(noise, labels) - 0.5) < 0.1
    constant = {part: np.ones((len(y), 1)) for part, y in labels.items()}
    assert probe(constant, labels) == 0.5


def test_the_statistics_of_a_sine():
    time = np.arange(RATE) / RATE
    values = signal_statistics(0.5 * np.sin(2 * np.pi * 1000 * time) + 0.1)
    mean, level, crest, floor, loud, seconds, _, centroid, low, crossings, end, end_level = values
    assert mean == pytest.approx(0.1, abs=1e-4) and end == pytest.approx(0.1, abs=1e-4) and seconds == 1
    power = 0.5**2 / 2 + 0.1**2
    assert level == pytest.approx(10 * np.log10(power), abs=0.01) and end_level == pytest.approx(level, abs=0.01)
    assert crest == pytest.approx(0.6 / power**0.5, rel=1e-3) and floor == pytest.approx(loud, abs=0.01)
    # The rfft has the mean once and the sine with half its amplitude: power 0.1^2 against 0.25^2.
    assert low == pytest.approx(0.1**2 / (0.1**2 + 0.25**2), rel=1e-3)
    assert centroid == pytest.approx(1000 * (1 - low), rel=1e-3)
    assert crossings == pytest.approx(2000 / RATE, rel=0.01)


@pytest.mark.parametrize("wave", [np.zeros(10), np.ones(1), np.zeros(RATE)])
def test_the_statistics_of_silence_and_of_a_very_short_clip_are_finite(wave):
    assert np.isfinite(signal_statistics(wave)).all()


def test_the_probes_have_one_run_of_each_fold():
    assert [(s.fold, s.seed) for s in chosen_teachers("probes", [0, 2], 2, smoke=False, device="cpu")] == [(0, 0), (2, 0)]


@pytest.mark.slow
def test_the_probes_in_small(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    words = ["probes", "--smoke", "--folds", "0", "--out", str(tmp_path / "out")]
    for again in ([], ["--collect"]):
        assert main([*words, *again]) == 0
    with open(tmp_path / "out" / "study_probes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == study_tables.PROBE_COLUMNS
    assert [(r["task"], r["description"]) for r in rows] == [(t, d) for t in ("gender", "noise") for d in DESCRIPTIONS]
    assert all(0 <= float(r["balanced_accuracy"]) <= 1 and int(r["test"]) > 0 for r in rows)
    assert not (tmp_path / "out" / "study.csv").exists()
