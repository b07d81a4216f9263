"""Whisper's log-mel spectrogram of a batch of clips, computed on the device that holds them.

    S = |STFT(x)|^2 (Hann window),  M = filters^T S,  L = log10(max(M, 1e-10)),  out = (max(L, max(L) - 8) + 4) / 4

Filters, window length and hop are those of the model's own `WhisperFeatureExtractor`, which is the backend "processor". The
backends "torch" and "torchaudio" differ in what makes S: torch.stft, or torchaudio's spectrogram. Both run in float32, batched,
on any device. On a CPU they give the processor's numbers, up to rounding (1e-4, where values span 2).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from models.speech_lm.commands import LOG_MELS

_FLOOR = 1e-10
_RANGE = 8.0  # decades below a clip's loudest value


class LogMelError(ValueError):
    """The backend cannot run here."""


def check_backend(backend: str) -> None:
    """ValueError for an unknown backend; LogMelError if torchaudio is asked for and cannot be imported."""
    if backend not in LOG_MELS:
        raise ValueError(f"backend: expected one of {', '.join(LOG_MELS)}, got {backend!r}")
    if backend == "torchaudio":
        import_torchaudio()


def log_mel(waves: Tensor, extractor: Any, *, backend: str = "torch") -> Tensor:
    """(B, mels, frames) float32 of `waves` (B, samples) float32, on their device.

    Args:
        extractor: the WhisperFeatureExtractor whose settings are used.
        backend: "torch" or "torchaudio".

    Raises:
        ValueError: another backend, or an extractor that adds noise (dither).
        LogMelError: torchaudio cannot be imported.

    Memory beside the result: the power spectrum, (B, n_fft / 2 + 1, frames) float32.
    """
    if getattr(extractor, "dither", 0.0):
        raise ValueError(f"extractor: expected dither 0, got {extractor.dither}; the backend processor adds it")
    window = torch.hann_window(extractor.n_fft, device=waves.device)
    if backend == "torchaudio":
        power = import_torchaudio().functional.spectrogram(
            waves, pad=0, window=window, n_fft=extractor.n_fft, hop_length=extractor.hop_length,
            win_length=extractor.n_fft, power=2.0, normalized=False,
        )  # fmt: skip
    elif backend == "torch":
        power = torch.stft(waves, extractor.n_fft, extractor.hop_length, window=window, return_complex=True).abs() ** 2
    else:
        raise ValueError(f"backend: expected torch or torchaudio, got {backend!r}")
    filters = torch.as_tensor(extractor.mel_filters, dtype=torch.float32, device=waves.device)  # (n_fft / 2 + 1, mels)
    loud = (filters.T @ power[..., :-1]).clamp(min=_FLOOR).log10()
    loud = torch.maximum(loud, loud.amax((1, 2), keepdim=True) - _RANGE)
    return (loud + 4.0) / 4.0


def import_torchaudio(key: str = "features.backend") -> Any:
    """The package; LogMelError where it cannot be imported. `key`: of the recipe, for the message."""
    try:
        return importlib.import_module("torchaudio")
    except Exception as error:  # built for another torch, its import raises OSError or RuntimeError
        release, why = ".".join(torch.__version__.split(".")[:2]), " ".join(str(error).split())[:200]
        raise LogMelError(
            f"{key}: torchaudio cannot be imported ({why}); install the release of torch {torch.__version__}, from its index: "
            f"pip install 'torchaudio=={release}.*'. The other choices do without it"
        ) from None
