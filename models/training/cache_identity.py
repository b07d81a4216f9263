"""What the states of a cache depend on: the teacher, and the prompt, clip and target of each sample."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from models.data.prompts import render_prompt
from models.io_utils import fingerprint, sha256_file


class CacheError(RuntimeError):
    """A cache cannot be made or used; the message says why."""


def teacher_fingerprint(folder: str | Path) -> dict[str, str]:
    """The teacher of a cache: SHA-256 of the settings, backbones and connector in the folder of a saved SpeechLM."""
    folder = Path(folder)
    parts = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
    if not (folder / "speech_lm.json").is_file():
        raise CacheError(f"teacher: expected a folder with speech_lm.json, got {folder}")
    return {str(p.relative_to(folder)): sha256_file(p) for p in parts}


def sample_content(example: Any, features: torch.Tensor | None) -> str:
    """What a sample's states depend on beside the teacher, as "PROMPT-AUDIO", two fingerprints.

    Args:
        example: its prompt and target make PROMPT.
        features: (K, T, D) of its clip, which make AUDIO; None leaves AUDIO out, for a student with another encoder.
    """
    text = fingerprint([render_prompt(example), example.target])[:16]
    if features is None:
        return text
    audio = features.to(torch.float16).contiguous()
    return f"{text}-{hashlib.sha256(audio.numpy().tobytes()).hexdigest()[:16]}"
