"""On-policy distillation in CAADTrainer: the student makes answers itself, and the teacher scores these.

Legend: B rows of a batch, L columns.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..checks import is_number, is_whole, plain_numbers
from ..decoding import eos_ids_of, transformers_model
from ..paths import SEQUENCE_PADDING
from ..sampling import Sampling, own_answers, uniform_draws, unspoken_ids

__all__ = ["OnPolicy"]

IGNORE_INDEX = -100


@dataclass(frozen=True)
class OnPolicy:
    """Which answers the student makes itself, and how: `CAADTrainer(on_policy=)`.

    In a chosen row the student answers what stands before the first label. Its answer takes the place of the labels and of all
    that follows them, on both paths of the teacher too. It ends with an end token if the student has made one; otherwise it was
    cut off, and no end is taught. It is no label, so it has no CE term.

    A row is chosen, and its tokens are sampled, by numbers that depend on args.seed, the optimiser step, the rank and the row's
    number in the step. So a run that is resumed is the undisturbed run, and 4 x 2 rows are 1 x 8. The student hears all audio.
    All rows of a micro-batch with a chosen row are generated at once, with a KV cache.

    A value out of range raises ValueError or TypeError with its name.
    """

    fraction: float = 1.0  # probability of each row, as in GKD (arXiv 2306.13649)
    every_steps: int = 1  # in every N-th optimiser step; the steps between have the dataset's labels
    sampling: Sampling = field(default_factory=Sampling)
    end_token_ids: tuple[int, ...] = ()  # an answer ends with any of these; empty = those of the model's generation config
    # Ids that no answer has. With `processing_class` all special and added tokens but the ends are among them already. Without
    # one, the ids that the model's config names are (audio_token_id and the like).
    suppressed_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not is_number(self.fraction):
            raise TypeError(f"fraction: expected a number, got {type(self.fraction).__name__}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction: expected a number in [0, 1], got {self.fraction}")
        if not is_whole(self.every_steps):
            raise TypeError(f"every_steps: expected an int, got {type(self.every_steps).__name__}")
        if self.every_steps < 1:
            raise ValueError(f"every_steps: expected >= 1, got {self.every_steps}")
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling: expected a kdkernels.Sampling, got {type(self.sampling).__name__}")
        for name in ("end_token_ids", "suppressed_token_ids"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        plain_numbers(self)

    def as_json(self) -> dict[str, Any]:
        """The values, for the file that is saved beside a model."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class OwnAnswers:
    """Puts the student's answers into the micro-batches of a step.

    Args:
        settings: what the user has asked for.
        model: the student, without a wrapper.
        tokenizer: its tokenizer, or None.
        vocab_size: ids from here on have no meaning for student or teacher.
        seed, rank: see `OnPolicy`.

    Raises:
        ValueError: nothing says how an answer ends.
        TypeError: the model cannot generate.
    """

    def __init__(
        self, settings: OnPolicy, model: nn.Module, *, tokenizer: Any, vocab_size: int, seed: int, rank: int
    ) -> None:
        base = transformers_model(model)
        self._settings, self._model, self._seed, self._rank = settings, model, seed, rank
        self.counts = (0, 0, 0)  # of the last step: answers, their tokens, and how many of them have ended
        self._ends = list(settings.end_token_ids) or eos_ids_of(base, None)
        if not self._ends:
            raise ValueError("on_policy.end_token_ids: expected ids that end an answer, as the model's configs name none, got ()")
        rows = max(base.get_output_embeddings().weight.shape[0], vocab_size)
        unspoken = _named_ids(base) if tokenizer is None else unspoken_ids(tokenizer, self._ends, rows)
        self._suppressed = {*unspoken, *settings.suppressed_token_ids, *range(vocab_size, rows)} - set(self._ends)

    def answers_in(self, step: int) -> bool:
        """Whether optimiser step `step` (the first is 1) is one of those with the student's answers: the same on all ranks."""
        return step % self._settings.every_steps == 0

    def put_into(self, step: int, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of optimiser step `step` (the first is 1) with the student's answers in the chosen rows."""
        made = [dict(batch) for batch in batches]
        self.counts = (0, 0, 0)
        if not self.answers_in(step):
            return made
        first = 0
        for number, batch in enumerate(made):
            made[number] = self._answered(step, first, batch)
            first += len(batch["labels"])
        return made

    def _answered(self, step: int, first: int, batch: dict[str, Any]) -> dict[str, Any]:
        _check_columns(batch)
        starts = _first_labels(batch["labels"])
        chosen = self._draws(step, first, len(starts), 1, "row")[:, 0] < self._settings.fraction
        wanted = [start is not None and bool(yes) for start, yes in zip(starts, chosen, strict=True)]
        if not any(wanted):
            return batch
        student = {name: x for name, x in batch.items() if not name.startswith(("teacher_", "negative_"))}
        prompts = _laid_out(student, starts, [() if start is not None else None for start in starts])
        for name in ("labels", "sample_id"):
            prompts.pop(name, None)
        draws = self._draws(step, first, len(starts), self._settings.sampling.max_new_tokens, "token")
        answers = own_answers(
            self._model, prompts, draws, sampling=self._settings.sampling, end_ids=self._ends, suppressed=self._suppressed
        )
        taken = [tuple(answer) if yes else None for answer, yes in zip(answers, wanted, strict=True)]
        own = [answer for answer in taken if answer is not None]
        count, tokens, ended = self.counts
        self.counts = (
            count + len(own),
            tokens + sum(map(len, own)),
            ended + sum(answer[-1] in self._ends for answer in own),
        )
        made = _laid_out(student, starts, taken)
        labelled = torch.tensor([answer is None for answer in taken], device=made["labels"].device)
        made["ce_token_weight"] = labelled[:, None].expand(made["labels"].shape).float()
        for prefix in ("teacher_", "negative_"):
            path = {name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(prefix)}
            if "labels" in path:
                path = _laid_out(path, _first_labels(path["labels"]), taken)
            made |= {prefix + name: x for name, x in path.items()}
        return made

    def _draws(self, step: int, first: int, rows: int, count: int, what: str) -> Tensor:
        names = [f"{self._seed} {step} {what} {self._rank} {first + row}" for row in range(rows)]
        return uniform_draws([random.Random(name).getrandbits(63) for name in names], count)


def _first_labels(labels: Tensor) -> list[int | None]:
    """The column of each row's first label; None where it has none."""
    has = labels != IGNORE_INDEX
    columns = has.int().argmax(1).tolist()
    return [column if some else None for column, some in zip(columns, has.any(1).tolist(), strict=True)]


def _laid_out(
    inputs: Mapping[str, Any], starts: Sequence[int | None], answers: Sequence[Sequence[int] | None]
) -> dict[str, Any]:
    """`inputs` with answers in the place of what stands from `starts` on, padded on the right; None: the row stays as it is."""
    ids, labels = inputs.get("input_ids"), inputs["labels"]
    if ids is None:
        raise ValueError(f"inputs: expected a column 'input_ids' beside its labels with on_policy, got {sorted(inputs)}")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    by_token = {name: x for name in SEQUENCE_PADDING if isinstance(x := inputs.get(name), Tensor)}
    by_token |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    rows: dict[str, list[Tensor]] = {name: [] for name in by_token}
    for row, (start, answer) in enumerate(zip(starts, answers, strict=True)):
        there = mask[row] != 0
        if answer is not None:
            there = there & (torch.arange(len(there), device=there.device) < (start or 0))
            if not bool(there.any()):
                raise ValueError(f"labels: expected a label behind a prompt in row {row}, to answer it, got none")
        tokens = torch.tensor(answer or (), dtype=ids.dtype, device=ids.device)
        behind = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
        for name, x in by_token.items():
            kept = x[row][there]
            if answer is not None and name == "labels":
                kept = torch.full_like(kept, IGNORE_INDEX)
            more = behind.get(name, torch.full_like(tokens, int(SEQUENCE_PADDING.get(name, 0)))).to(x.dtype)
            rows[name].append(torch.cat([kept, more]))
    padding = {**SEQUENCE_PADDING, "labels": IGNORE_INDEX}
    padded = {name: pad_sequence(x, batch_first=True, padding_value=float(padding[name])) for name, x in rows.items()}
    return {**inputs, **padded}


def _check_columns(batch: Mapping[str, Any]) -> None:
    """Columns with one value a token of the dataset's answer have none for the student's."""
    for name in ("alpha", "kd_token_weight", "ce_token_weight"):
        if batch.get(name) is not None:
            raise ValueError(f"inputs[{name!r}]: expected none with on_policy, whose answers have other tokens, got a tensor")
    for name in batch:
        if name.endswith(("position_ids", "inputs_embeds")):
            raise ValueError(f"inputs[{name!r}]: expected none with on_policy, whose answers have other lengths, got some")


def _named_ids(model: Any) -> set[int]:
    """Ids that the configs of a model name: placeholders of audio and the like."""
    return {token for config in _configs(model.config) for token in _token_ids(config)}


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from _configs(value)


def _token_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")) and is_whole(value) and value >= 0:
            yield value
