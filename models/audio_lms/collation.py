"""From examples and their clips to padded token batches of an audio LM, with the positions that predict the target.

A row is   chat template with the clip's placeholders and the words | target | end of the answer,   padded on the right. Only the
target's tokens are predicted. A row is never cut: one that is too long raises an error, so no placeholder loses its sound.

Legend: B rows, L columns, N target tokens of all rows, E entries of the features (one a clip, or a window of a long clip).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.audio_lms.family import Encoded, Family, Turn, answer_end, sampling_rate, tokenizer_of
from models.data.example import AnsweredExample, Example
from models.data.prompts import chat_text
from models.data.spelled import spelling_mask


@dataclass
class AudioBatch:
    """A batch for an `AudioLM`; its attributes are those of a speech LM's batch.

    Attributes:
        ids: the examples' ids, B of them.
        input_ids, attention_mask: (B, L) int64.
        features: the model's audio inputs by name, E entries each.
        entries: (B,) int64, how many of the E entries belong to each row.
        audio_present: (B,) bool; False where the row hears nothing.
        target_index: (N,) int64, row * L + column of the position whose hidden state PREDICTS the token.
        target: (N,) int64, the token ids.
        target_row: (N,) int64, the row of each target token.
        choice_mask: (N,) bool, the tokens that spell the answer.
    """

    ids: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    features: dict[str, Tensor]
    entries: Tensor
    audio_present: Tensor
    target_index: Tensor
    target: Tensor
    target_row: Tensor
    choice_mask: Tensor

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for `AudioLM.hidden_states_at`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            **self.features,
            "entries": self.entries,
            "audio_present": self.audio_present,
        }

    def to(self, device: torch.device | str) -> AudioBatch:
        """A copy whose tensors lie on `device`."""
        moved = {f.name: x.to(device) for f in dataclasses.fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return dataclasses.replace(self, **moved, features={name: x.to(device) for name, x in self.features.items()})

    def __len__(self) -> int:
        return len(self.ids)


class AudioCollator:
    """Callable from examples and their clips to an `AudioBatch`.

    Args:
        family, processor: of the model that reads the batches.
        max_tokens: longest row allowed, in tokens; None = no limit.
    """

    def __init__(self, family: Family, processor: Any, *, max_tokens: int | None = None) -> None:
        self.family = family
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.sampling_rate = sampling_rate(processor)
        self.max_tokens = max_tokens
        self.end_id = answer_end(processor)
        self._pad_id = self.end_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def __call__(
        self,
        examples: Sequence[Example],
        clips: Sequence[np.ndarray | tuple[np.ndarray, ...] | None],
        *,
        with_target: bool = True,
    ) -> AudioBatch:
        """Make a batch.

        Args:
            examples: B of them.
            clips: of each example, as `ClipReader.rows` gives them: one, a tuple of several, or None.
            with_target: False leaves rows that end with the prompt, for `AudioLM.generate`.

        Raises:
            ValueError: no examples, another number of clips, an example without target or with more clips than the family can
                hear, or a row longer than `max_tokens`; the message names the example's id.
        """
        if not len(examples):
            raise ValueError("examples: expected at least one, got none")
        if len(clips) != len(examples):
            raise ValueError(f"clips: expected {len(examples)}, one an example, got {len(clips)}")
        targets = [self.target_ids(example) if with_target else [] for example in examples]
        masks = [
            spelling_mask(example, ids, self._tokenize, ends=True) if with_target else []
            for example, ids in zip(examples, targets, strict=True)
        ]
        heard = [() if clip is None else clip if isinstance(clip, tuple) else (clip,) for clip in clips]
        for example, several in zip(examples, heard, strict=True):
            self.family.check_clips(len(several), f"example {example.id!r}: ")
        turns = [Turn(chat_text(e), several, e.system) for e, several in zip(examples, heard, strict=True)]
        encoded = self.family.encoded(self.processor, turns)
        return self._batch([example.id for example in examples], encoded, targets, masks)

    def ask(self, turns: Sequence[Turn]) -> AudioBatch:
        """Rows that end with the prompt, from any turns; for `AudioLM.generate`."""
        nothing: list[list[Any]] = [[] for _ in turns]
        return self._batch([str(n) for n in range(len(turns))], self.family.encoded(self.processor, turns), nothing, nothing)

    def target_ids(self, example: Example) -> list[int]:
        """Tokens of the target and the end of the answer, or those of the student's own answer."""
        if isinstance(example, AnsweredExample):
            return list(example.answer_tokens)
        if not example.target:
            raise ValueError(f"example {example.id!r}: expected a target, got {example.target!r}")
        return [*self._tokenize(example.target), self.end_id]

    def _tokenize(self, text: str) -> list[int]:
        # Special tokens in a text are plain text: no target can end its row early or bring in a placeholder.
        options = {} if self.family.plain_tokenizer else {"split_special_tokens": True}
        return list(self.tokenizer(text, add_special_tokens=False, **options).input_ids)

    def _batch(
        self, ids: list[str], encoded: Encoded, targets: Sequence[list[int]], masks: Sequence[list[bool]]
    ) -> AudioBatch:
        rows = [prompt + target for prompt, target in zip(encoded.rows, targets, strict=True)]
        columns = max(map(len, rows))
        if self.max_tokens is not None and columns > self.max_tokens:
            worst = max(range(len(rows)), key=lambda row: len(rows[row]))
            raise ValueError(f"example {ids[worst]!r}: {columns} tokens, expected at most {self.max_tokens}")
        input_ids = torch.full((len(rows), columns), self._pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        index: list[int] = []
        for row, (tokens, prompt) in enumerate(zip(rows, encoded.rows, strict=True)):
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            attention_mask[row, : len(tokens)] = 1
            first = row * columns + len(prompt) - 1  # the prompt's last token predicts the target's first
            index += range(first, first + len(tokens) - len(prompt))
        entries = torch.tensor(encoded.entries)
        return AudioBatch(
            ids=ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            features=encoded.features,
            entries=entries,
            audio_present=entries > 0,
            target_index=torch.tensor(index, dtype=torch.int64),
            target=torch.tensor([token for target in targets for token in target], dtype=torch.int64),
            target_row=torch.tensor([row for row, target in enumerate(targets) for _ in target], dtype=torch.int64),
            choice_mask=torch.tensor([flag for mask in masks for flag in mask], dtype=torch.bool),
        )
