"""From examples to padded token batches, with the positions that predict the target and those that spell the answer.

A row is   prompt text | <audio> x num_queries | rest of the prompt | target | end of text,   padded on the right. Each text
part is tokenised by itself, and special tokens in it are plain text. So no transcript can bring in an audio position or an
end of text.

Legend: B rows, L columns, N target tokens of all rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.backbones.causal_lm import check_token_ids
from models.data.example import AnsweredExample
from models.data.manifest import AUDIO_PLACEHOLDER
from models.data.prompts import render_prompt
from models.data.spelled import spelling_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from models.data.manifest import Example

_RESERVED_TOKENS = ("<|audio|>", "<|AUDIO|>", "<|reserved_special_token_0|>", "<unused0>", "<unused1>", "<extra_id_0>",
                    "<empty_output>", "<|object_ref_start|>")  # fmt: skip


@dataclass
class SpeechBatch:
    """A batch of examples as tokens, for training and evaluation.

    Attributes:
        ids: the examples' ids, B of them.
        input_ids, attention_mask: (B, L) int64.
        audio_features: (B, K, T, D) or None.
        audio_present: (B,) bool; False where the example has no audio.
        target_index: (N,) int64, row * L + column of the position whose hidden state PREDICTS the token.
        target: (N,) int64, the token ids.
        target_row: (N,) int64, the row of each target token.
        choice_mask: (N,) bool, the tokens that spell the answer.
    """

    ids: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    audio_features: Tensor | None
    audio_present: Tensor
    target_index: Tensor
    target: Tensor
    target_row: Tensor
    choice_mask: Tensor

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments for `SpeechLM.forward` and `SpeechLM.hidden_states_at`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "audio_features": self.audio_features,
            "audio_present": self.audio_present,
        }

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SpeechBatch:
        """A copy whose tensors lie on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return len(self.ids)


class Collator:
    """Callable from examples to a `SpeechBatch`.

    Args:
        tokenizer: of the language model; with append_eos it needs an end-of-text token.
        num_queries: audio tokens a clip, as in the connector.
        placeholder_token_id: the id that marks audio positions; None = `find_placeholder_id(tokenizer)`.
        append_eos: end every target with the end-of-text token, so that the model learns to stop.
        max_tokens: longest row allowed, in tokens; None = no limit.
        pad_to_multiple_of: round L up to a multiple of this, so that fewer different shapes occur.
        lm: the language model that reads the batches; None = its embeddings are not compared with the tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_queries: int,
        *,
        placeholder_token_id: int | None = None,
        append_eos: bool = True,
        max_tokens: int | None = None,
        pad_to_multiple_of: int = 1,
        lm: nn.Module | None = None,
    ) -> None:
        if num_queries < 1:
            raise ValueError(f"num_queries: expected >= 1, got {num_queries}")
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an end-of-text token (or append_eos=False), got one without")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: expected >= 1, got {pad_to_multiple_of}")
        self.tokenizer = tokenizer
        self.num_queries = num_queries
        self.placeholder_token_id = (
            find_placeholder_id(tokenizer) if placeholder_token_id is None else placeholder_token_id
        )
        self.append_eos = append_eos
        self.max_tokens = max_tokens
        self.pad_to_multiple_of = pad_to_multiple_of
        # Few tokenizers are longer than the embeddings; most texts never use their last tokens.
        rows = None if lm is None else lm.get_input_embeddings().weight.shape[0]
        self._checked_lm = lm if rows is not None and max(tokenizer.get_vocab().values(), default=0) >= rows else None
        pad = tokenizer.pad_token_id
        usable = pad is not None and (rows is None or pad < rows)
        self._pad_id = pad if usable else (tokenizer.eos_token_id or 0)
        self._start_ids = list(tokenizer("").input_ids) if tokenizer.bos_token_id is not None else []
        self._start_ids = [token for token in self._start_ids if token == tokenizer.bos_token_id][:1]

    def __call__(
        self, examples: Sequence[Example], features: Tensor | None = None, *, with_target: bool = True
    ) -> SpeechBatch:
        """Make a batch.

        Args:
            examples: B of them.
            features: (B, K, T, D), the encoder's features in the same order, or None for text alone.
            with_target: False leaves rows that end with the prompt, for `SpeechLM.generate`.

        Raises:
            ValueError: no examples, another number of features, an example without target, or a row longer than
                `max_tokens`; the message names the example's id.
        """
        if not examples:
            raise ValueError("examples: expected at least one, got none")
        check_one_clip(examples)
        if features is not None and len(features) != len(examples):
            raise ValueError(f"features: expected {len(examples)} rows, one an example, got {len(features)}")
        prompts = [self.prompt_ids(example) for example in examples]
        targets = [self.target_ids(example) if with_target else [] for example in examples]
        masks = [
            spelling_mask(example, ids, self._tokenize_target, ends=self.append_eos) if with_target else []
            for example, ids in zip(examples, targets, strict=True)
        ]
        for example, *ids in zip(examples, prompts, targets, strict=True):
            self._check_ids(example, *ids)
        lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
        if self.max_tokens is not None and max(lengths) > self.max_tokens:
            worst = max(range(len(lengths)), key=lengths.__getitem__)
            raise ValueError(
                f"example {examples[worst].id!r}: {lengths[worst]} tokens, expected at most {self.max_tokens}"
            )
        columns = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(examples), columns), self._pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(len(examples), columns, dtype=torch.int64)
        index: list[int] = []
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            input_ids[row, : lengths[row]] = torch.tensor(prompt + target)
            attention_mask[row, : lengths[row]] = 1
            first = row * columns + len(prompt) - 1  # the prompt's last token predicts the target's first
            index += range(first, first + len(target))
        return SpeechBatch(
            ids=[example.id for example in examples],
            input_ids=input_ids,
            attention_mask=attention_mask,
            audio_features=features,
            audio_present=torch.tensor([features is not None and example.audio is not None for example in examples]),
            target_index=torch.tensor(index, dtype=torch.int64),
            target=torch.tensor([token for target in targets for token in target], dtype=torch.int64),
            target_row=torch.tensor([row for row, target in enumerate(targets) for _ in target], dtype=torch.int64),
            choice_mask=torch.tensor([flag for mask in masks for flag in mask], dtype=torch.bool),
        )

    def check_examples(self, examples: Sequence[Example]) -> None:
        """ValueError where a text has a token without a row in the language model's embeddings."""
        if self._checked_lm is not None:
            for example in examples:
                self._check_ids(example, self.prompt_ids(example), self.target_ids(example) if example.target else [])

    def _check_ids(self, example: Example, *ids: list[int]) -> None:
        if self._checked_lm is not None:
            check_token_ids(itertools.chain(*ids), self._checked_lm, self.tokenizer, what=f"example {example.id!r}: ")

    def prefix_ids(self, example: Example) -> list[int]:
        """Tokens before the first audio token: what a `PrefixCache` is filled with."""
        return self._start_ids + self._tokenize(self._split_prompt(example)[0])

    def prompt_ids(self, example: Example) -> list[int]:
        """Tokens of the prompt, audio positions included."""
        audio = [self.placeholder_token_id] * self.num_queries
        return self.prefix_ids(example) + audio + self._tokenize(self._split_prompt(example)[1])

    def target_ids(self, example: Example) -> list[int]:
        """Tokens of the target with the space before it, and the end of text if it is appended; or the student's own answer."""
        if isinstance(example, AnsweredExample):
            return list(example.answer_tokens)
        if not example.target:
            raise ValueError(f"example {example.id!r}: expected a target, got {example.target!r}")
        return self._tokenize_target(example.target) + ([self.tokenizer.eos_token_id] if self.append_eos else [])

    def _tokenize_target(self, text: str) -> list[int]:
        return self._tokenize(" " + text)

    def _split_prompt(self, example: Example) -> tuple[str, str]:
        before, after = render_prompt(example).split(AUDIO_PLACEHOLDER)  # exactly one, by render_prompt's contract
        return before, after

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []


def check_one_clip(examples: Sequence[Example]) -> None:
    """ValueError for an example with several clips, with its id: the prompt of a manifest's row has one place for audio."""
    for example in examples:
        if example.more_audio:
            raise ValueError(f"example {example.id!r}: clips: expected one with a SpeechLM, got {len(example.clips)}")


def find_placeholder_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a token of the vocabulary that no text uses: it marks audio positions, and the embeddings keep their size.

    Known reserved names come first, then any special token without a role in the tokenizer or in a chat.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    vocabulary = tokenizer.get_vocab()
    for token in _RESERVED_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    for token in reversed(tokenizer.all_special_tokens):
        if token not in roles and not re.search(
            r"im_start|im_end|endoftext|header|eot|turn|inst", token, re.IGNORECASE
        ):
            return vocabulary[token]
    raise ValueError("tokenizer: expected an unused special token for the audio positions, found none; set placeholder_token")


def crop_to_targets(batch: Any) -> Any:
    """A `SpeechBatch` without the tokens after each row's last predicting position; call it on the CPU, before the batch moves.

    A causal model's states do not depend on what follows. So nobody reads the last token of a target; and if only the answer
    has a weight, nobody reads what stands behind the answer. Rows without a target stay whole.
    """
    rows, columns = batch.input_ids.shape
    row, column = batch.target_index // columns, batch.target_index % columns
    last = torch.full((rows,), -1).scatter_reduce(0, row, column, "amax")
    last = torch.where(last < 0, columns - 1, last)
    width = int(last.max()) + 1
    mask = batch.attention_mask * (torch.arange(columns) <= last[:, None])
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:, :width].contiguous(),
        attention_mask=mask[:, :width].contiguous(),
        target_index=row * width + column,
    )
