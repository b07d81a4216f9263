"""The teacher that reads in words what is known about a clip, in the place of hearing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdkernels.layer_states import LayerStates
from models.backbones.causal_lm import CurrentHead, cache_keyword, check_token_ids, named_ends, pad_rows
from models.training.teacher_states import SourceError, TeacherStates

if TYPE_CHECKING:
    from models.data.manifest import Example


class TextTeacher:
    """A language model that reads a description of the clip in words, and then the tokens of the student's answer.

    It reads Stage 1's prompt (models/pseudo_gt/wording.py): worked examples, then "[00:00-00:03] words (Gender: man, ...)", then
    with `reasoning` an example's metadata["reasoning"]; the answer's tokens follow. The worked examples of a task are read once.
    It says nothing about the tokens that end a text: in its prompt an answer ends with its line.

    Args:
        lm: a causal LM of transformers, frozen.
        tokenizer: its own.
        target_ids: an example -> the token ids of its target, as the student's collator makes them.
        end_ids: the ids that end an answer of the student. Those that the checkpoint of `lm` names count too.
        own_line: for targets that do not begin with a space, as in a chat: the answer then stands on a line of its own.
        device: where it runs.
        layers: layers whose states are returned as well.
        reasoning: see above.
    """

    def __init__(
        self,
        lm: torch.nn.Module,
        tokenizer: Any,
        *,
        target_ids: Callable[[Example], list[int]],
        end_ids: Iterable[int],
        device: torch.device,
        own_line: bool = False,
        layers: Sequence[int] = (),
        reasoning: bool = False,
    ) -> None:
        from models.pseudo_gt.writers import WorkedPrefixes
        from models.speech_lm.prefix_cache import why_not_cached

        self._lm = lm.to(device).eval()
        self._tokenizer = tokenizer
        self._target_ids = target_ids
        self._end_ids = torch.tensor(sorted({*end_ids, *named_ends(lm, tokenizer)}), device=device)
        self._own_line = own_line
        self._device = device
        self._layers = tuple(layers)
        self._reasoning = reasoning
        # None: its state after the worked examples cannot be kept, so it reads them in every row.
        self._prefixes = None if why_not_cached(self._lm) else WorkedPrefixes(self._lm, tokenizer)
        self._head = CurrentHead(self._lm)

    @torch.no_grad()
    def __call__(self, batch: Any, examples: Sequence[Example]) -> TeacherStates:
        from models.pseudo_gt.wording import worked_examples

        targets = [self._target_ids(example) for example in examples]
        if [token for target in targets for token in target] != batch.target.tolist():
            raise SourceError(f"text teacher: the batch of {batch.ids[0]} ... has other target tokens than its examples")
        by_prefix: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            by_prefix.setdefault(worked_examples(example, own_line=self._own_line), []).append(row)
        states: list[torch.Tensor | None] = [None] * len(examples)
        for prefix, rows in by_prefix.items():
            read = self._read(prefix, [self._prompt(examples[row]) for row in rows], [targets[row] for row in rows])
            for row, one in zip(rows, read, strict=True):
                states[row] = one
        speaks = torch.isin(batch.target.to(self._device), self._end_ids, invert=True)
        return dataclasses.replace(TeacherStates.of_one_path(torch.cat(states), self._head()), speaks=speaks)

    def _prompt(self, example: Example) -> list[int]:
        from models.pseudo_gt.wording import prompt_end

        reasoning = example.metadata.get("reasoning") if self._reasoning else None
        return self._tokenizer.encode(prompt_end(example, reasoning, own_line=self._own_line), add_special_tokens=False)

    def _read(self, prefix: str, prompts: list[list[int]], targets: list[list[int]]) -> list[torch.Tensor]:
        """(n, H) or (n, 1 + K, H) of each row's target tokens."""
        if self._prefixes is None:
            worked = self._tokenizer.encode(prefix)
            prompts = [worked + prompt for prompt in prompts]
        read = (token for row in (*prompts, *targets) for token in row)
        check_token_ids(read, self._lm, self._tokenizer, what="text teacher: ")
        # The last target token is left out, because its prediction is not needed.
        ids, mask = pad_rows([p + t[:-1] for p, t in zip(prompts, targets, strict=True)])
        columns = ids.shape[1]
        index = [
            row * columns + len(prompt) - 1 + n
            for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
            for n in range(len(target))
        ]
        ids, mask, at = (x.to(self._device) for x in (ids, mask, torch.tensor(index)))
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        decoder = self._lm.get_decoder()
        if self._prefixes is not None:
            prefix_ids, cache = self._prefixes.expanded(prefix, len(prompts))
            length = prefix_ids.shape[1]
            inputs |= {
                "attention_mask": torch.cat([mask.new_ones(len(prompts), length), mask], 1),
                "position_ids": length + torch.arange(columns, device=self._device).expand_as(ids),
                "use_cache": True,
                cache_keyword(decoder): cache,
            }
        if self._layers:
            with LayerStates(self._lm, self._layers, at) as layers:
                hidden = decoder(**inputs).last_hidden_state
            states = torch.cat([hidden.flatten(0, 1)[at][:, None], layers.stacked()], 1)
        else:
            states = decoder(**inputs).last_hidden_state.flatten(0, 1)[at]
        return list(states.split([len(target) for target in targets]))
