"""How much of a label does a recording tell without hearing? Linear probes of the clips of a fold of the study.

A label that the recording gives away needs no ear: a zero level, a click at the end, the length. Each probe is a ridge regression
to +1 and -1 on one description of the clips, standardized by the training clips:

    w = argmin_w sum_i (x_i . w + b - y_i)^2 + lambda |w|^2

lambda is chosen on dev and the test is asked once. What counts is balanced accuracy: the mean of the two shares of right answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.data.audio import SAMPLE_RATE_HZ

_PENALTIES = tuple(10.0**power for power in range(-1, 6))
_FRAME = 400  # samples, 25 ms
_END = 800  # samples, 50 ms
_TINY = 1e-10
DESCRIPTIONS = ("statistics", "length", "mel", "first_convolution", "encoder")


def probe_tasks(
    parts: Mapping[str, Sequence[Any]], tasks: Sequence[str], store: Any, encoder: Any, extractor: Any, audio_root: Path
) -> list[dict[str, Any]]:
    """Balanced accuracy on test by task and description.

    Args:
        parts: teacher, distill, dev and test -> examples. The first two are trained on.
        tasks: those that are probed; each has two answers.
        store: the encoder's features of the clips (n, K, T, D).
        encoder, extractor: the Whisper encoder and its feature extractor.
        audio_root: folder of the clips.

    Returns:
        a row for each task and description: task, description, size (numbers a clip), train, dev and test (clips), and
        balanced_accuracy.

    Raises:
        ValueError: a part of a task does not have exactly two answers.
    """
    rows = []
    for task in tasks:
        own = {
            part: _one_each(e for name in names for e in parts[name] if e.task == task)
            for part, names in {"train": ("teacher", "distill"), "dev": ("dev",), "test": ("test",)}.items()
        }
        answers = sorted({e.answer for part in own.values() for e in part})
        for part, examples in own.items():
            if len(answers) != 2 or {e.answer for e in examples} != set(answers):
                raise ValueError(f"{task}: expected the same two answers in each part, got {answers} and a {part} without one")
        labels = {part: np.array([1.0 if e.answer == answers[1] else -1.0 for e in own[part]]) for part in own}
        described = {part: describe(own[part], store, encoder, extractor, audio_root) for part in own}
        clips = {part: len(own[part]) for part in own}
        for name in DESCRIPTIONS:
            values = {part: described[part][name] for part in own}
            size, accuracy = values["train"].shape[1], f"{probe(values, labels):.4f}"
            rows.append({"task": task, "description": name, "size": size, **clips, "balanced_accuracy": accuracy})
    return rows


def _one_each(examples: Iterator[Any]) -> list[Any]:
    """One example of each clip: the contexts of a question share it."""
    return list({e.audio: e for e in examples}.values())


def describe(examples: Sequence[Any], store: Any, encoder: Any, extractor: Any, audio_root: Path) -> dict[str, np.ndarray]:
    """Description -> (clips, numbers) float64.

        statistics         the twelve numbers of `signal_statistics`
        length             seconds
        mel                mean and standard deviation of each band of Whisper's log-mel spectrogram over the clip
        first_convolution  mean and standard deviation of each channel after the encoder's first convolution
        encoder            mean of each chosen layer of the encoder over the clip
    """
    import torch
    import torch.nn.functional as F

    from models.data.audio import load_audio

    found: dict[str, list[np.ndarray]] = {name: [] for name in DESCRIPTIONS if name != "encoder"}
    for e in examples:
        wave = load_audio(audio_root / e.audio, start_seconds=e.start_seconds, end_seconds=e.end_seconds)
        mel = extractor(wave, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", padding="do_not_pad", truncation=False)
        bands = mel.input_features[0]  # (bands, frames)
        with torch.no_grad():
            channels = F.gelu(encoder.conv1(bands[None].to(encoder.conv1.weight))).float()[0].cpu()
        found["statistics"].append(signal_statistics(wave))
        found["length"].append(np.array([len(wave) / SAMPLE_RATE_HZ]))
        for name, frames in {"mel": bands, "first_convolution": channels}.items():
            found[name].append(torch.cat([frames.mean(1), frames.std(1)]).numpy())
    made = {name: np.stack(values).astype(np.float64) for name, values in found.items()}
    return made | {"encoder": store.rows(examples).float().mean(2).flatten(1).numpy().astype(np.float64)}


def signal_statistics(wave: np.ndarray) -> np.ndarray:
    """Twelve numbers of a waveform (16 kHz, mono): mean, level in dB, crest, noise floor and loudness in dB (the 10th and 90th
    percentile of frames of 25 ms), seconds, spectral tilt in dB an octave, centroid in Hz, share of the energy below 100 Hz, zero
    crossings a sample, and mean and level in dB of the last 50 ms."""
    wave = np.asarray(wave, np.float64)
    frames = wave[: len(wave) // _FRAME * _FRAME].reshape(-1, _FRAME)
    levels = _decibels(frames) if len(frames) else np.array([_decibels(wave)])
    power = np.abs(np.fft.rfft(wave)) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE_HZ)
    heard = (hertz >= 100) & (hertz <= 7000)
    tilt = np.polyfit(np.log2(hertz[heard]), 10 * np.log10(power[heard] + _TINY), 1)[0] if heard.sum() > 1 else 0.0
    total, end = power.sum() + _TINY, wave[-_END:]
    return np.array([
        wave.mean(), _decibels(wave), np.abs(wave).max() / (np.sqrt(np.mean(wave**2)) + _TINY),
        np.percentile(levels, 10), np.percentile(levels, 90), len(wave) / SAMPLE_RATE_HZ,
        tilt, (hertz * power).sum() / total, power[hertz < 100].sum() / total,
        np.count_nonzero(np.signbit(wave[1:]) != np.signbit(wave[:-1])) / len(wave), end.mean(), _decibels(end),
    ])  # fmt: skip


def _decibels(wave: np.ndarray) -> Any:
    return 10 * np.log10(np.mean(np.square(wave), axis=-1) + _TINY)


def probe(values: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> float:
    """Balanced accuracy on test of the ridge probe whose penalty is the best on dev; of equal ones the highest.

    Args:
        values: train, dev and test -> (clips, numbers).
        labels: train, dev and test -> (clips,), +1 or -1.
    """
    mean, deviation = values["train"].mean(0), values["train"].std(0)
    x = {part: (v - mean) / np.where(deviation > 0, deviation, 1.0) for part, v in values.items()}
    offset = labels["train"].mean()
    u, singular, vt = np.linalg.svd(x["train"], full_matrices=False)
    turned = u.T @ (labels["train"] - offset)
    chosen, best = np.zeros(len(mean)), -1.0
    for penalty in reversed(_PENALTIES):
        weights = vt.T @ (singular / (singular**2 + penalty) * turned)
        if (accuracy := balanced_accuracy(x["dev"] @ weights + offset, labels["dev"])) > best:
            chosen, best = weights, accuracy
    return balanced_accuracy(x["test"] @ chosen + offset, labels["test"])


def balanced_accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over both labels of the share of clips whose score has the label's sign; a score of 0 is half right."""
    right = np.where(scores == 0, 0.5, (np.sign(scores) == labels).astype(float))
    return float(np.mean([right[labels == side].mean() for side in (-1.0, 1.0)]))
