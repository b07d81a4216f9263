"""Turns waveforms into features: chosen hidden states of a frozen Whisper encoder, pooled to a fixed number of frames.

Legend: B clips, K chosen layers, T frames, D encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.speech_lm.config import SAMPLE_RATE, SAMPLES_PER_POSITION, SpeechLMConfig
from models.speech_lm.log_mel import log_mel

_MEL_FRAMES_PER_POSITION = 2


def checked_clips(waveforms: Sequence[np.ndarray], config: SpeechLMConfig) -> list[np.ndarray]:
    """The waveforms in float32, cut to the encoder's window; errors as in `SpeechLM.encode_audio`."""
    if not len(waveforms):
        raise ValueError("waveforms: expected at least one, got none")
    limit = config.max_positions * SAMPLES_PER_POSITION
    return [_checked_waveform(wave, number)[:limit] for number, wave in enumerate(waveforms)]


@torch.no_grad()
def encode_clips(
    encoder: nn.Module,
    feature_extractor: Any,
    config: SpeechLMConfig,
    clips: Sequence[np.ndarray],
    *,
    batch_clips: int,
    backend: str = "processor",
) -> Tensor:
    """(B, K, T, D) float32 on the encoder's device, of the `clips` that `checked_clips` gives; `backend`: see log_mel.py."""
    limit = config.max_positions * SAMPLES_PER_POSITION
    device, dtype = encoder.conv1.weight.device, encoder.conv1.weight.dtype
    pooled = []
    for start in range(0, len(clips), batch_clips):
        batch = clips[start : start + batch_clips]
        windows = [np.pad(clip, (0, limit - len(clip))) for clip in batch]
        if backend == "processor":
            mel = feature_extractor(
                windows, sampling_rate=SAMPLE_RATE, return_tensors="pt", padding="do_not_pad", truncation=False
            ).input_features
        else:
            mel = log_mel(torch.from_numpy(np.stack(windows)).to(device), feature_extractor, backend=backend)
        mel = mel[..., : config.max_positions * _MEL_FRAMES_PER_POSITION]
        states = _encoder_states(encoder, mel.to(device, dtype), config.encoder_layers).float()  # (B, K, positions, D)
        for clip, state in zip(batch, states, strict=True):
            # At least T positions, so that a very short clip pools real positions and not copies of one.
            valid = max(config.audio_frames, min(config.max_positions, len(clip) // SAMPLES_PER_POSITION))
            frames = F.adaptive_avg_pool1d(state[:, :valid].transpose(1, 2), config.audio_frames)
            pooled.append(frames.transpose(1, 2))  # (K, T, D)
    return torch.stack(pooled)


def check_encoder(encoder: nn.Module, config: SpeechLMConfig) -> None:
    """ValueError where the encoder has another width than `config` says, or lacks a layer of it."""
    if encoder.config.d_model != config.encoder_dim:
        raise ValueError(f"encoder: expected width {config.encoder_dim}, got {encoder.config.d_model}")
    highest = max(config.encoder_layers)
    if highest > len(encoder.layers):
        raise ValueError(f"encoder_layers: expected at most {len(encoder.layers)}, the encoder's depth, got {highest}")


def _encoder_states(encoder: nn.Module, mel: Tensor, chosen: Sequence[int]) -> Tensor:
    """Hidden states `chosen` (B, K, positions, D) of a window shorter than Whisper's 30 s.

    The position table is cut to the window; layers above the highest chosen one do not run.
    """
    x = F.gelu(encoder.conv1(mel))
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    states = {0: x}
    for number, layer in enumerate(encoder.layers[: max(chosen)], start=1):
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        states[number] = x
    if len(encoder.layers) in states:
        states[len(encoder.layers)] = encoder.layer_norm(x)
    return torch.stack([states[number] for number in chosen], dim=1)


def _checked_waveform(waveform: np.ndarray, number: int) -> np.ndarray:
    wave = np.asarray(waveform)
    if wave.ndim != 1 or wave.size == 0:
        raise ValueError(f"waveforms[{number}]: expected a non-empty 1-D array, got shape {wave.shape}")
    if not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(f"waveforms[{number}]: expected floats in [-1, 1], got {wave.dtype}")
    if not np.isfinite(wave).all():
        raise ValueError(f"waveforms[{number}]: expected finite samples, got infinities or NaN")
    return wave.astype(np.float32, copy=False)
