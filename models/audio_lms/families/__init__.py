"""One file a family; `family_of` finds that of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
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
from models.audio_lms.family import AudioLMError, Family

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


# Audio LMs whose checkpoints need code of their own repositories: config.model_type -> name, and what to do instead.
OTHER_CODE = {
    "ultravox": ("Ultravox", "GLM-ASR is built alike and is in transformers"),
    "DestaModel": ("DeSTA2", "the recipes sft_desta2 and caad_desta2 train a SpeechLM in its form"),
    "desta25": ("DeSTA2.5-Audio", "the recipes sft_desta2 and caad_desta2 train a SpeechLM in the form of DeSTA2"),
}


def check_own_code(folder: Path) -> None:
    """AudioLMError for a checkpoint that only code of its repository can load."""
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # whoever loads it says what is wrong
    if kind in OTHER_CODE:
        name, instead = OTHER_CODE[kind]
        raise AudioLMError(
            f"{folder}: expected a model of transformers, got {name}, which needs code of its own repository; no such code is "
            f"run here. Instead: {instead}"
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
