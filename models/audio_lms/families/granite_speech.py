"""Granite Speech: a conformer, a Q-Former over windows, Granite; needs torchaudio for its features.

Its checkpoints come with a LoRA that `generate` turns on with audio and off without. A forward pass does not touch that switch,
and the teacher's two paths both run with it on. So the contrast is that of the sound, not that of two language models.

Its encoder reads the padding of a shorter clip, so the states of a row depend a little on its neighbours. With
teacher.batch_examples=1 those of the teacher do not.

Negative path: zeroed features. Without features `generate` would turn the LoRA off.
"""

from __future__ import annotations

from models.audio_lms.family import Family

FAMILY = Family(
    name="Granite Speech",
    model_types=("granite_speech",),
    model_class="GraniteSpeechForConditionalGeneration",
    tokens_per_second=10.0,
    connector=r"model\.projector\b",
)
