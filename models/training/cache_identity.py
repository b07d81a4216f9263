"""What the states of a cache depend on: the teacher, and the prompt, clip and target of each sample."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from models.audio_lms.family import AudioLMError
from models.corpora.hearing import PLAIN, Hearing
from models.data.prompts import render_prompt
from models.io_utils import fingerprint
from models.speech_lm.listeners import listener_hashes


class CacheError(RuntimeError):
    """A cache cannot be made or used; the message says why."""


def teacher_fingerprint(spec: str | Path, *, hears: Hearing = PLAIN, negative: str = "zeros") -> dict[str, Any]:
    """The teacher of a cache: SHA-256 of the settings, weights, tokenizer and chat template in its folder.

    What it hears and reads is in it where it differs from the clip and the prompt as they are; so is the path without the audio.

    Args:
        spec: folder of a SpeechLM; or hub id, folder or adapter of an audio LM. Of an adapter its base counts too.
        hears, negative: see the recipe's keys of `teacher`.
    """
    found: dict[str, Any] = {"hears": hears.settings()} if hears.settings() else {}
    found |= {"negative": negative} if negative != "zeros" else {}
    try:
        return found | listener_hashes(spec)
    except AudioLMError as error:
        raise CacheError(f"teacher: {error}") from error


def sample_content(example: Any, sound: Any) -> str:
    """What a sample's states depend on beside the teacher, as "PROMPT-AUDIO", two fingerprints.

    Args:
        example: its prompt and target make PROMPT.
        sound: its clip's features (K, T, D), or its waveform (samples,) as an array, or a tuple of several; they make AUDIO. None
            leaves AUDIO out, for a student with another encoder, or an example without a clip.
    """
    system = [example.system] if example.system else []  # an audio LM reads it in another place than the context
    text = fingerprint([render_prompt(example), example.target, *system])[:16]
    if sound is None:
        return text
    if isinstance(sound, torch.Tensor):
        sound = sound.to(torch.float16).contiguous().numpy()
    several = sound if isinstance(sound, tuple) else (sound,)
    return f"{text}-{hashlib.sha256(b''.join(one.tobytes() for one in several)).hexdigest()[:16]}"
