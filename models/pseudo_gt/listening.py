"""Answers of Stage 1 by a model that hears: it is asked each question with its clip, and answers freely.

The model is an audio LM of transformers or a SpeechLM of this project. It reads what a student would read: the system turn, the
transcript, the context and the question.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.corpora.hearing import PLAIN, Hearing
from models.data.manifest import Example
from models.pseudo_gt.writers import Answer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Listening:
    """Who listens, and how its answers are decoded.

    Attributes:
        model: hub id or folder of an audio LM of transformers, or folder of a SpeechLM.
        alpha: strength of the contrast of the paths with and without the audio; None = greedy decoding.
        formula, plausibility: of the contrast, see `kdkernels.contrast_logits`; only with alpha.
        hears: what the model hears of a clip, and what its prompt shows.
        dtype, attention: of an audio LM, see `models.speech_lm.listeners.load_listener`.
        device: auto, cpu, cuda or cuda:N.
        max_cut_fraction: of a SpeechLM's clips; if more are longer than its window, nothing is asked.

    Raises:
        ValueError: a value outside its range; the message starts with its name.
    """

    model: str
    alpha: float | None = None
    formula: str = "extrapolate"
    plausibility: float | None = None
    hears: Hearing = PLAIN
    dtype: str = "auto"
    attention: str | None = None
    device: str = "auto"
    max_cut_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha: expected a finite number >= 0, got {self.alpha}")
        if self.plausibility is not None and not 0 < self.plausibility <= 1:
            raise ValueError(f"plausibility: expected a number in (0, 1], got {self.plausibility}")
        if not 0 <= self.max_cut_fraction <= 1:
            raise ValueError(f"max_cut_fraction: expected a number in [0, 1], got {self.max_cut_fraction}")
        for name in ("formula", "plausibility"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.alpha is None and value != default:
                raise ValueError(f"{name}: expected {default!r} without alpha, got {value!r}")

    def settings(self) -> dict[str, Any]:
        """What decides the answers beside the model's files, as JSON, without defaults."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        for name in ("attention", "device", "max_cut_fraction"):  # which decide rounding alone, and whether anything is asked
            found.pop(name, None)
        return found | ({"hears": self.hears.settings()} if "hears" in found else {})

    def fingerprint(self) -> dict[str, Any]:
        """`settings`, with the hashes of the model's files in the place of its name.

        Raises:
            AudioLMError: the model is not found.
        """
        from models.speech_lm.listeners import listener_hashes

        return {**self.settings(), "model": listener_hashes(self.model)}


class ListeningWriter:
    """Free answers by a model that hears the clips; a `Writer`.

    Args:
        model: a SpeechLM or an `AudioLM`.
        audio_root: folder that the examples' paths are relative to.
        max_new_tokens: longest answer. One that does not end within it comes back as an `Answer` that has not ended.
        listening: decoding, and what the model hears.
    """

    def __init__(self, model: Any, audio_root: str | Path, *, listening: Listening, max_new_tokens: int) -> None:
        from models.audio_lms.clips import ClipReader
        from models.audio_lms.model import AudioLM
        from models.data.audio import SAMPLE_RATE_HZ

        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        self._model = model
        self._listening = listening
        self._max_new_tokens = max_new_tokens
        self._is_audio_lm = isinstance(model, AudioLM)
        self._collator = model.make_collator()
        rate = model.sampling_rate if self._is_audio_lm else SAMPLE_RATE_HZ
        self._clips = ClipReader(audio_root, sampling_rate=rate, hears=listening.hears)

    @classmethod
    def load(cls, listening: Listening, audio_root: str | Path, *, max_new_tokens: int) -> ListeningWriter:
        """Loads the model on the device of `listening`.

        Raises:
            AudioLMError, SpeechLMError, BackboneError: it is not found or cannot be used; all are RuntimeErrors.
        """
        from models.backbones.device import pick_device
        from models.speech_lm.listeners import load_listener

        model = load_listener(
            listening.model, pick_device(listening.device), dtype=listening.dtype, attention=listening.attention
        )
        return cls(model, audio_root, listening=listening, max_new_tokens=max_new_tokens)

    def check(self, examples: Sequence[Example]) -> None:
        """Look at the clips before the first answer. A line on stderr says how many are longer than what the model hears.

        Raises:
            ValueError: an example has more clips than the model hears in a turn.
            FeatureError: more clips than `max_cut_fraction` are longer than the model's window.
        """
        from models.speech_lm.collation import check_one_clip
        from models.speech_lm.features import check_window
        from models.speech_lm.listeners import clip_lengths

        if self._is_audio_lm:
            window = self._model.family.heard_seconds(self._model.processor)
            for example in examples:
                self._model.family.check_clips(len(example.clips), f"example {example.id!r}: ")
        else:
            window = self._model.config.max_audio_seconds
            check_one_clip(examples)
        if window is not None:
            check_window(
                clip_lengths(examples, self._clips.audio_root),
                window,
                max_cut_fraction=self._listening.max_cut_fraction,
                say=lambda line: print(line, file=sys.stderr),
            )

    def __call__(self, examples: Sequence[Example]) -> list[Answer]:
        from models.speech_lm.listeners import answer_ids

        shown = [self._listening.hears.shown(example) for example in examples]
        batch = self._collator(shown, self._heard(examples), with_target=False).to(self._model.device)
        contrast: dict[str, Any] = {}
        if self._listening.alpha is not None:
            contrast = {"formula": self._listening.formula, "plausibility": self._listening.plausibility}
        rows, ends = answer_ids(
            self._model, batch, max_new_tokens=self._max_new_tokens, alpha=self._listening.alpha, **contrast
        )
        texts = [self._model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        return [Answer(text, ended=row[-1] in ends) for text, row in zip(texts, rows, strict=True)]

    def _heard(self, examples: Sequence[Example]) -> Any:
        """What the collator takes of the clips: waveforms of an audio LM, features (B, K, T, D) of a SpeechLM."""
        waves = self._clips.rows(examples)
        return waves if self._is_audio_lm else self._features(examples, waves)

    def _features(self, examples: Sequence[Example], waves: Sequence[Any]) -> torch.Tensor | None:
        """Each clip goes through the encoder once, whatever number of questions the batch has about it."""
        import torch

        clips = {example.clips: wave for example, wave in zip(examples, waves, strict=True) if wave is not None}
        if not clips:
            return None
        made = self._model.encode_audio(list(clips.values()))  # (clips, K, T, D)
        places = {clip: place for place, clip in enumerate(clips)}
        silent = len(made)  # a row of zeros behind them, for examples without a clip
        rows = [places.get(example.clips, silent) for example in examples]
        return torch.cat([made, torch.zeros_like(made[:1])])[rows]
