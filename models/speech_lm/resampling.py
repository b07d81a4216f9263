"""Resampling of a batch of clips on the device, by torchaudio's filters; soxr on the CPU is the default (models/data/audio.py).

A Kaiser window of 128 zero crossings. From 8, 22.05, 24, 32, 44.1 and 48 kHz to 16 kHz it gives soxr's samples to 5e-4 of the
clip's peak, up to 90% of the lower rate's half. Above that soxr begins to fade, and the two differ. The first and last 50 ms
may differ too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.speech_lm.commands import RESAMPLERS
from models.speech_lm.log_mel import import_torchaudio

_FILTER: dict[str, Any] = {
    "lowpass_filter_width": 128,
    "rolloff": 0.97,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}


def check_resampler(name: str) -> None:
    """ValueError for an unknown resampler; LogMelError if torchaudio is asked for and cannot be imported."""
    if name not in RESAMPLERS:
        raise ValueError(f"resampler: expected one of {', '.join(RESAMPLERS)}, got {name!r}")
    if name == "torchaudio":
        import_torchaudio("features.resampler")


def resample_batch(
    waves: Sequence[np.ndarray], rates_hz: Sequence[int], *, to_hz: int, device: torch.device | str
) -> list[np.ndarray]:
    """float32 (samples,) of each clip at `to_hz`; clips of one rate are filtered together on `device`.

    Args:
        waves: float32 (samples,), each at its rate.

    Raises:
        LogMelError: torchaudio cannot be imported.

    Memory: the clips of one rate, padded to the longest, before and after.
    """
    made = [np.ascontiguousarray(wave, np.float32) for wave in waves]
    for rate in dict.fromkeys(rates_hz):
        if rate == to_hz:
            continue
        numbers = [number for number, other in enumerate(rates_hz) if other == rate]
        longest = max(len(made[number]) for number in numbers)
        # The filter takes zeros behind a clip's end in any case.
        stacked = np.stack([np.pad(made[number], (0, longest - len(made[number]))) for number in numbers])
        torchaudio = import_torchaudio("features.resampler")
        heard = torchaudio.functional.resample(torch.from_numpy(stacked).to(device), rate, to_hz, **_FILTER).cpu().numpy()
        for number, wave in zip(numbers, heard, strict=True):
            made[number] = wave[: max(1, round(len(made[number]) * to_hz / rate))]
    return made
