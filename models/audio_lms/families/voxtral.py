"""Voxtral: Whisper's encoder in windows of 30 s, an MLP over four frames, Mistral.

Its tokenizer is mistral-common's. It writes the chat itself, from clips in base64, and never reads a special token out of text.
It takes no system turn beside audio, so the words of one stand before the user's.

Negative path: zeroed log-mel features; without features the model would read its placeholders as a token that it never saw so.
"""

from __future__ import annotations

import base64
from typing import Any

from torch import Tensor

from models.audio_lms.family import Family, Turn, sampling_rate
from models.data.audio import encode_audio


def _encode(family: Family, processor: Any, turn: Turn) -> tuple[list[int], dict[str, Tensor]]:
    rate = sampling_rate(processor)
    clips = [base64.b64encode(encode_audio(clip, sample_rate=rate, format="WAV")).decode() for clip in turn.clips]
    content = [*({"type": "audio", "base64": clip} for clip in clips), {"type": "text", "text": turn.whole_text}]
    made = processor.apply_chat_template([{"role": "user", "content": content}])
    return made["input_ids"][0].tolist(), {"input_features": made["input_features"]} if clips else {}


FAMILY = Family(
    name="Voxtral",
    model_types=("voxtral",),
    model_class="VoxtralForConditionalGeneration",
    tokens_per_second=12.5,
    window_seconds=30.0,
    plain_tokenizer=True,
    encode=_encode,
)
