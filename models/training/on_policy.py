"""On-policy distillation: the student answers some of a step's examples itself, and the teachers score these answers.

The answers are made before the step's divisors are summed, so their lengths are known there. They depend on the student's
weights, the recipe's seed, the step, and the example's number in it: not on micro-batches or ranks, and not on a generator that a
checkpoint would have to keep. Under FSDP2 the student's weights are whole on every rank while it answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kdkernels.model_modes import evaluating
from kdkernels.sampling import Sampling, uniform_draws, unspoken_ids
from kdkernels.whole_weights import whole_weights
from models.data.example import AnsweredExample
from models.training.recipe import Recipe
from models.training.seeds import seed_of
from models.training.training_data import TrainingData


class OnPolicy:
    """Makes the student's answers of a run.

    Args:
        model: the student, with `own_answers` and `end_ids` (SpeechLM, AudioLM).
        data: with `make_prompts`.
        root: the objective, with the model in it, as `parallelize` returns it; None = the model's weights are whole.
    """

    def __init__(
        self, recipe: Recipe, model: Any, data: TrainingData, device: torch.device, root: torch.nn.Module | None = None
    ) -> None:
        settings = recipe.data
        self._settings, self._seed = settings, recipe.run.seed
        self._model, self._data, self._device = model, data, device
        self._root = model if root is None else root
        self._sampling = Sampling(
            settings.on_policy_temperature, settings.on_policy_top_k, settings.on_policy_top_p, settings.on_policy_max_new_tokens
        )
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._end_ids = model.end_ids
        self._suppressed = unspoken_ids(model.tokenizer, self._end_ids, vocab_size)

    def chosen(self, step: int, numbers: Sequence[int]) -> list[int]:
        """Those of the examples' `numbers` in step `step` (the first is 1) to which the student makes an answer."""
        if step % self._settings.on_policy_every_steps:
            return []
        draws = uniform_draws([seed_of(self._seed, step, "on-policy", n) for n in numbers], 1)[:, 0].tolist()
        return [n for n, draw in zip(numbers, draws, strict=True) if draw < self._settings.on_policy_fraction]

    @torch.no_grad()
    def answered(self, step: int, examples: Mapping[int, Any]) -> dict[int, Any]:
        """`examples` by their numbers in the step, those of `chosen` with the student's answers. The student hears all clips.

        Every rank has to make the call, also one of whose examples none is chosen.
        """
        made = dict(examples)
        numbers = self.chosen(step, list(examples))
        at_once = self._settings.on_policy_batch_examples
        answers = step % self._settings.on_policy_every_steps == 0
        with whole_weights(self._root) if answers else contextlib.nullcontext(), evaluating(self._model):
            for start in range(0, len(numbers), at_once):
                group = numbers[start : start + at_once]
                draws = uniform_draws(
                    [seed_of(self._seed, step, "answer", n) for n in group], self._settings.on_policy_max_new_tokens
                )
                for number, tokens in zip(group, self._answers([examples[n] for n in group], draws), strict=True):
                    made[number] = AnsweredExample.of(examples[number], tokens)
        return made

    def _answers(self, examples: Sequence[Any], draws: torch.Tensor) -> list[list[int]]:
        prompts = self._data.make_prompts(examples).to(self._device)
        inputs = {name: value for name, value in self._data.model_inputs(prompts).items() if name != "pack_tokens"}
        return self._model.own_answers(inputs, draws, sampling=self._sampling, suppressed=self._suppressed)

    def curves(self, examples: Sequence[Any]) -> list[tuple[str, float, float]]:
        """(name, mean, weight) of the answers among `examples`: their tokens, and how many of them have ended."""
        answers = [example.answer_tokens for example in examples if isinstance(example, AnsweredExample)]
        count = max(len(answers), 1)
        return [
            ("answer_tokens", sum(map(len, answers)) / count, len(answers)),
            ("answer_ends", sum(answer[-1] in self._end_ids for answer in answers) / count, len(answers)),
        ]
