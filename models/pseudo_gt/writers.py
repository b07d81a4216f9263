"""Who writes the answers of Stage 1: a causal language model, or the task's sentence filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from models.data.manifest import Example
from models.data.prompts import target_template
from models.pseudo_gt.wording import prompt_end, worked_examples

if TYPE_CHECKING:
    import torch


class Writer(Protocol):
    """Writes an answer to each prompt."""

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        """One answer for each example, in the same order."""
        ...


def write_by_template(examples: Sequence[Example]) -> list[str]:
    """The task's sentence with the answer in it; empty for an example without an answer."""
    return [target_template(example, example.answer) if example.answer else "" for example in examples]


class BackboneWriter:
    """Answers by a causal language model that continues a few worked examples.

    The worked examples of a task are the same for all its clips. Their keys and values are computed once and shared by
    the batch, so the model reads only some forty tokens for each clip.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int = 24):
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._prefixes = WorkedPrefixes(model, tokenizer)
        newline = tokenizer.encode("\n", add_special_tokens=False)
        # An answer ends with its line. A tokenizer without a token for the line end is served in `_continue`, which cuts.
        self._stop = [
            token for token in [tokenizer.eos_token_id, *(newline if len(newline) == 1 else [])] if token is not None
        ]

    @classmethod
    def load(cls, backbone: str, **options: Any) -> BackboneWriter:
        """From an id or folder, in the precision that is fast on this machine.

        Raises:
            BackboneError: the model cannot be found or fetched.
        """
        from models.backbones.device import inference_dtype
        from models.backbones.resolve import load_causal_lm

        return cls(*load_causal_lm(backbone, dtype=inference_dtype()), **options)

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        answers: dict[int, str] = {}
        by_prefix: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            by_prefix.setdefault(worked_examples(example), []).append(index)
        for prefix, indices in by_prefix.items():
            texts = self._continue(prefix, [prompt_end(examples[index]) for index in indices])
            answers.update(zip(indices, texts, strict=True))
        return [answers[index] for index in range(len(examples))]

    def _continue(self, prefix: str, questions: list[str]) -> list[str]:
        import torch

        from models.backbones.causal_lm import cache_keyword

        rows = [self._tokenizer.encode(question, add_special_tokens=False) for question in questions]
        prefix_ids, cache = self._prefixes.expanded(prefix, len(rows))
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
                **{cache_keyword(self._model): cache},
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._stop,
                pad_token_id=pad,
            )
        texts = self._tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip().split("\n")[0].strip() for text in texts]


class WorkedPrefixes:
    """Keys and values of the worked examples. A frozen causal LM computes them once for each text; a batch shares them."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model = model
        self._tokenizer = tokenizer
        self._states: dict[str, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def expanded(self, prefix: str, rows: int) -> tuple[torch.Tensor, Any]:
        """The token ids (1, P) of `prefix`, and a new KV cache of `rows` rows that holds it."""
        import torch
        from transformers import DynamicCache

        from models.backbones.causal_lm import cache_keyword

        if prefix not in self._states:
            ids = torch.tensor([self._tokenizer.encode(prefix)], device=self._model.device)
            read = DynamicCache()
            with torch.no_grad():
                self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(self._model): read})
            self._states[prefix] = ids, [(layer.keys, layer.values) for layer in read.layers]
        ids, states = self._states[prefix]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return ids, cache
