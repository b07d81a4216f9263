"""Who writes the answers of Stage 1: a causal language model, or the task's sentence filled in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from models.data.manifest import Example
from models.data.prompts import target_template
from models.pseudo_gt.commands import DEFAULT_MAX_NEW_TOKENS
from models.pseudo_gt.wording import prompt_end, worked_examples

if TYPE_CHECKING:
    import torch

_HALF_CHARACTER = "\ufffd"  # what a decoder writes for the first bytes of a character whose other bytes are missing
# transformers' configurations say by one of these names how many tokens back a layer looks.
_WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "window_size")
# These families count distances by the place in the batch's row. So padding within a row changes them.
_PLACES_COUNT = ("mpt",)


class Answer(str):
    """An answer, and whether its writer came to the end of it. A plain string counts as one that ended."""

    ended: bool

    def __new__(cls, text: str, *, ended: bool = True) -> Answer:
        answer = super().__new__(cls, text)
        answer.ended = ended
        return answer


def has_ended(text: str) -> bool:
    """False for an answer that its writer's limit of tokens cut off, or whose last character is only half there."""
    return getattr(text, "ended", True) and not text.rstrip().endswith(_HALF_CHARACTER)


class Writer(Protocol):
    """Writes an answer to each prompt."""

    def __call__(self, examples: Sequence[Example]) -> Sequence[str]:
        """One answer for each example, in the same order; an `Answer` where a limit may have cut it off."""
        ...


def write_by_template(examples: Sequence[Example]) -> list[str]:
    """The task's sentence with the answer in it, one of the choices; empty for an example without an answer."""
    return [target_template(example, example.answer) if example.answer else "" for example in examples]


class BackboneWriter:
    """Answers by a causal language model that continues a few worked examples.

    The worked examples of a task are the same for all its clips. Their keys and values are computed once and shared by
    the batch, so the model reads only some forty tokens for each clip. A model with other states than keys and values (Mamba,
    linear attention) reads them in every row, in batches of rows of one length.

    Args:
        max_new_tokens: longest answer. One that does not end within it comes back as an `Answer` that has not ended.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._window = _window(model.config)
        self._stop = _stop_tokens(model, tokenizer)

    @classmethod
    def load(cls, backbone: str, **options: Any) -> BackboneWriter:
        """Loads the model from an id or folder, in the precision that is fast on this machine.

        Raises:
            BackboneError: the model cannot be found or fetched.
        """
        from models.backbones.device import inference_dtype
        from models.backbones.resolve import load_causal_lm

        return cls(*load_causal_lm(backbone, dtype=inference_dtype()), **options)

    def __call__(self, examples: Sequence[Example]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        by_prefix: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            by_prefix.setdefault(worked_examples(example), []).append(index)
        for prefix, indices in by_prefix.items():
            questions = [
                self._tokenizer.encode(prompt_end(examples[index]), add_special_tokens=False) for index in indices
            ]
            for group in self._groups(prefix, questions):
                texts = self._continue(prefix, [questions[at] for at in group])
                answers.update(zip((indices[at] for at in group), texts, strict=True))
        return [answers[index] for index in range(len(examples))]

    @cached_property
    def _prefixes(self) -> WorkedPrefixes | None:
        """None: the model's state after the worked examples cannot be kept."""
        from models.speech_lm.prefix_cache import why_not_cached

        return None if why_not_cached(self._model) else WorkedPrefixes(self._model, self._tokenizer)

    def _groups(self, prefix: str, questions: list[list[int]]) -> list[list[int]]:
        """Which questions are read together: all, or those of one length where padding would change an answer.

        A window counts places in a row, and padding takes some of them: the beginning of the prompt would leave the window
        too early. Other states than keys and values take the padding in.
        """
        from kdkernels.positions import check_lengths

        everything = list(range(len(questions)))
        kept = self._prefixes is not None
        prefix_length = self._prefixes.length(prefix) if kept else len(self._tokenizer.encode(prefix))
        longest = prefix_length + max(map(len, questions)) + self._max_new_tokens
        check_lengths(self._model, prefix_length, longest - 1)
        if kept and longest <= self._window:
            return [everything]
        by_length: dict[int, list[int]] = {}
        for at in everything:
            by_length.setdefault(len(questions[at]), []).append(at)
        return list(by_length.values())

    def _continue(self, prefix: str, rows: list[list[int]]) -> list[Answer]:
        import torch

        from models.backbones.causal_lm import cache_keyword

        if self._prefixes is None:
            prefix_ids, past = torch.tensor([self._tokenizer.encode(prefix)], device=self._model.device), {}
        else:
            prefix_ids, cache = self._prefixes.expanded(prefix, len(rows))
            past = {cache_keyword(self._model): cache}
        device = prefix_ids.device
        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        # Padding stands between the shared prefix and each question. The mask keeps it out of attention and positions.
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        input_ids = torch.cat([prefix_ids.expand(len(rows), -1), tokens], 1)  # (B, P + width)
        attention_mask = torch.cat([torch.ones_like(prefix_ids).expand(len(rows), -1), mask], 1)
        with torch.no_grad():
            output = self._model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **past,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(self._stop),
                pad_token_id=pad,
            )
        written = output[:, input_ids.shape[1] :]
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [self._answer(text, ids) for text, ids in zip(texts, written.tolist(), strict=True)]

    def _answer(self, text: str, ids: list[int]) -> Answer:
        """The first line. It has ended if a token that ends a line or text was written, or a line end within another token."""
        text = text.lstrip()
        line, line_end, _ = text.partition("\n")
        return Answer(line.strip(), ended=bool(line_end) or not self._stop.isdisjoint(ids))


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the line end, and every end of text that the tokenizer or the model names.

    A tokenizer without a token for the line end is served in `BackboneWriter._answer`, which cuts.
    """
    from models.backbones.causal_lm import named_ends

    newline = tokenizer.encode("\n", add_special_tokens=False)
    return named_ends(model, tokenizer) | set(newline if len(newline) == 1 else [])


def _window(config: Any) -> float:
    """The length of the longest row in which padding changes nothing. It is infinite if all layers look back without limit."""
    text = config.get_text_config()
    if text.model_type in _PLACES_COUNT:
        return 0
    known = [getattr(text, name, None) for name in _WINDOW_NAMES]
    return min((size for size in known if isinstance(size, int) and size > 0), default=math.inf)


class WorkedPrefixes:
    """Keys and values of the worked examples. A frozen causal LM computes them once for each text; a batch shares them."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model = model
        self._tokenizer = tokenizer
        self._states: dict[str, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def length(self, prefix: str) -> int:
        """How many tokens `prefix` has."""
        return self._state(prefix)[0].shape[1]

    def expanded(self, prefix: str, rows: int) -> tuple[torch.Tensor, Any]:
        """The token ids (1, P) of `prefix`, and a new KV cache of `rows` rows that holds it."""
        from transformers import DynamicCache

        ids, states = self._state(prefix)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return ids, cache

    def _state(self, prefix: str) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        import torch
        from transformers import DynamicCache

        from models.backbones.causal_lm import cache_keyword

        if prefix not in self._states:
            ids = torch.tensor([self._tokenizer.encode(prefix)], device=self._model.device)
            read = DynamicCache()
            with torch.no_grad():
                self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(self._model): read})
            self._states[prefix] = ids, [(layer.keys, layer.values) for layer in read.layers]
        return self._states[prefix]
