"""Ultravox's layout: Whisper-like encoder, stacked frames, an MLP, Llama. In transformers it is GLM-ASR; one clip a turn.

Ultravox's own checkpoints need code of their repository, which this project does not run.

Negative path: zeroed log-mel features; the model raises an error for placeholders without features.
"""

from __future__ import annotations

from models.audio_lms.family import Family

FAMILY = Family(
    name="GLM-ASR",
    model_types=("glmasr",),
    model_class="GlmAsrForConditionalGeneration",
    tokens_per_second=12.5,
    window_seconds=30.0,
    hears_seconds=630.0,
    max_clips=1,
)
