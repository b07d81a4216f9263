"""Qwen2-Audio: Whisper's encoder, one linear layer, Qwen2; the model of most contrastive-decoding papers.

Negative path: zeroed log-mel features, as CAAD's authors do. The model reads its placeholders either way.
"""

from __future__ import annotations

from models.audio_lms.family import Family

FAMILY = Family(
    name="Qwen2-Audio",
    model_types=("qwen2_audio",),
    model_class="Qwen2AudioForConditionalGeneration",
    window_seconds=30.0,
    hears_seconds=30.0,
)
