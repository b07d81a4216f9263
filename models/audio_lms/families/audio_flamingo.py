"""Audio Flamingo 3: Whisper's encoder in windows of 30 s, an MLP, Qwen2. One clip a turn, behind the words, as in its chats.

Negative path: zeroed log-mel features. The model raises an error for placeholders without features.
"""

from __future__ import annotations

from models.audio_lms.family import Family

FAMILY = Family(
    name="Audio Flamingo 3",
    model_types=("audioflamingo3",),
    model_class="AudioFlamingo3ForConditionalGeneration",
    window_seconds=30.0,
    hears_seconds=600.0,
    max_clips=1,
    audio_first=False,
)
