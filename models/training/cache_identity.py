"""What the states of a cache come from: the teacher, and what each sample asks and holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from models.data.prompts import render_prompt
from models.io_utils import fingerprint, sha256_file


class CacheError(RuntimeError):
    """The cache cannot be made or used; the message says why."""


def teacher_fingerprint(folder: str | Path) -> dict[str, str]:
    """What a cache's states come from: settings, backbones and connector of a saved SpeechLM."""
    folder = Path(folder)
    parts = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
    if not (folder / "speech_lm.json").is_file():
        raise CacheError(f"teacher: expected a folder with speech_lm.json, got {folder}")
    return {str(p.relative_to(folder)): sha256_file(p) for p in parts}


def sample_content(example: Any, features: torch.Tensor | None) -> str:
    """"PROMPT-AUDIO": fingerprints of what a sample's states depend on beside the teacher.

    Args:
        example: its prompt and target.
        features: (K, T, D) of its clip; None leaves AUDIO out, for a student whose encoder is another.
    """
    text = fingerprint([render_prompt(example), example.target])[:16]
    if features is None:
        return text
    audio = features.to(torch.float16).contiguous()
    return f"{text}-{hashlib.sha256(audio.numpy().tobytes()).hexdigest()[:16]}"
