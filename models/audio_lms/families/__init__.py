"""One file a family; `family_of` finds that of a checkpoint."""

from __future__ import annotations

from typing import Any

from models.audio_lms.families import (
    audio_flamingo,
    generic,
    granite_speech,
    phi4_multimodal,
    qwen2_5_omni,
    qwen2_audio,
    qwen3_omni,
    ultravox,
    voxtral,
)
from models.audio_lms.family import Family

FAMILIES: tuple[Family, ...] = (
    qwen2_audio.FAMILY,
    qwen2_5_omni.FAMILY,
    qwen3_omni.FAMILY,
    voxtral.FAMILY,
    granite_speech.FAMILY,
    audio_flamingo.FAMILY,
    phi4_multimodal.FAMILY,
    ultravox.FAMILY,
)


def family_of(config: Any) -> Family:
    """The family of a model's config; the generic one where none is listed.

    Raises:
        AudioLMError: transformers has no class that answers questions about audio for this config.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    return generic.family_of(config)
