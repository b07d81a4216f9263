"""Ask a model one question about a clip.

    python -m models ask MODEL clip.wav "Is the speaker a man or a woman?" [--alpha 1]

MODEL is the folder of a SpeechLM; or hub id, folder or adapter of an audio LM of transformers. --alpha decodes with the contrast
of the paths with and without the audio.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdkernels.checks import check_not_negative
from models.audio_lms.family import Turn
from models.audio_lms.model import AudioLM
from models.backbones.device import pick_device
from models.data.audio import SAMPLE_RATE_HZ, load_audio
from models.data.example import Example
from models.evaluation.ask import generate_answers, written_answers
from models.evaluation.commands import ask_parser
from models.speech_lm.features import check_window
from models.speech_lm.listeners import load_listener


def answer(
    model: Any, clips: Sequence[str | Path], question: str, *, alpha: float | None = None, max_new_tokens: int = 64
) -> str:
    """What a SpeechLM or an `AudioLM` says about the clips; with `alpha` by contrastive decoding.

    A line on stderr says if a clip is longer than what the model hears.

    Raises:
        AudioError: a clip cannot be read.
        ValueError: more clips than the model can hear in a turn, or its logits are NaN.
    """
    rate = model.sampling_rate if isinstance(model, AudioLM) else SAMPLE_RATE_HZ
    waves = [load_audio(clip, sample_rate=rate) for clip in clips]
    hears = model.family.heard_seconds(model.processor) if isinstance(model, AudioLM) else model.config.max_audio_seconds
    if hears is not None:
        check_window([len(wave) / rate for wave in waves], hears, say=lambda line: print(line, file=sys.stderr))
    if isinstance(model, AudioLM):
        batch = dataclasses.replace(model.make_collator().ask([Turn(question, tuple(waves))]).to(model.device), ids=["question"])
        return written_answers(model, batch, max_new_tokens=max_new_tokens, alpha=alpha)[0]
    if len(waves) != 1:
        raise ValueError(f"clips: expected one for a SpeechLM, got {len(waves)}")
    example = Example(id="question", audio=Path(clips[0]).name, question=question)
    return generate_answers(
        model, [example], model.encode_audio(waves), collate=model.make_collator(), alpha=alpha, max_new_tokens=max_new_tokens
    )[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    arguments = ask_parser().parse_args(argv)
    try:
        if arguments.alpha is not None:
            check_not_negative("--alpha", arguments.alpha)
        if arguments.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens: expected at least 1, got {arguments.max_new_tokens}")
        missing = [clip for clip in arguments.clips if not Path(clip).is_file()]
        if missing:
            raise ValueError(f"clip: no file {missing[0]!r}")
        device = pick_device(arguments.device)
        model = load_listener(arguments.model, device, dtype=arguments.dtype, attention=arguments.attention)
        print(
            answer(
                model, arguments.clips, arguments.question, alpha=arguments.alpha, max_new_tokens=arguments.max_new_tokens
            )
        )
    except (RuntimeError, ValueError, OSError) as error:  # BackboneError, SpeechLMError and AudioLMError are RuntimeErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
