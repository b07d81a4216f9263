"""The columns of a CAADTrainer's batch: taken apart, aligned with the labels, and checked; see `kdkernels.integrations.trainer`.

Legend: B rows of a batch, L columns, N positions that predict a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dispatch import checks_enabled
from .vocabulary import embedding_rows

TEACHER, NEGATIVE, SAMPLE_ID = "teacher_", "negative_", "sample_id"
BY_TOKEN = ("alpha", "kd_token_weight", "ce_token_weight")
IGNORE_INDEX = -100
_SHOWN = 5  # samples in an error


class WithPrefixed(list[str]):
    """Columns, and all whose prefix says that they are the teacher's: its model takes inputs that its signature does not name."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith((TEACHER, NEGATIVE))


def split_columns(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The inputs of student, teacher and its negative path, without labels."""
    student: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {TEACHER: {}, NEGATIVE: {}}
    for name, value in inputs.items():
        prefix = next((p for p in others if name.startswith(p)), None)
        if prefix is not None:
            others[prefix][name.removeprefix(prefix)] = value
        elif name not in (SAMPLE_ID, "labels", *BY_TOKEN):
            student[name] = value
    for columns in others.values():
        columns.pop("labels", None)
    return student, others[TEACHER], others[NEGATIVE]


def sample_names(inputs: Mapping[str, Any]) -> list[str]:
    """What each row of a micro-batch is called in an error message: a packed row by its number, with all names behind it."""
    rows, given = len(labels_of(inputs, "")), inputs.get(SAMPLE_ID)
    names = [] if given is None else [str(name) for name in given]
    if len(names) == rows:
        return names
    behind = f" ({_listed(names)})" if names else ""
    return [f"row {row} of {rows}{behind}" for row in range(rows)]


def labels_of(inputs: Mapping[str, Any], prefix: str) -> Tensor:
    name = f"{prefix}labels"
    if not isinstance(inputs.get(name), Tensor):
        raise ValueError(
            f"inputs: expected a column {name!r} (B, L), aligned with {prefix}input_ids, got {sorted(inputs)}; "
            "args.remove_unused_columns and the collator may have dropped it"
        )
    return inputs[name]


def token_values(inputs: Mapping[str, Any], name: str, labels: Tensor) -> Tensor:
    """(N,) of a column (B, L) that is aligned with `labels`: shifted and picked as they are."""
    values = inputs[name]
    if not isinstance(values, Tensor) or values.shape != labels.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"inputs[{name!r}]: expected a tensor {tuple(labels.shape)} as labels have, got {got}")
    return values[:, 1:][labels[:, 1:] != IGNORE_INDEX]


def term_weights(inputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the two terms, (N,) float64 each."""
    ones = torch.ones_like(labels, dtype=torch.float64)
    filled = {name: inputs.get(name) if inputs.get(name) is not None else ones for name in BY_TOKEN[1:]}
    kd, ce = (token_values(filled, name, labels).double() for name in BY_TOKEN[1:])
    return kd, ce


def sums_of_weights(inputs: Mapping[str, Any]) -> Tensor:
    return torch.stack([x.sum() for x in term_weights(inputs, labels_of(inputs, ""))])


def check_targets(
    target: Tensor, rows: Tensor, own: Tensor, own_rows: Tensor | None, whose: str, names: list[str]
) -> None:
    """The teacher's targets are the student's; on CUDA only their number is looked at (see KDKERNELS_CHECK).

    rows, own_rows: the row of each target, among `names`; None = not known, because the rows are packed.
    """
    same = target.shape == own.shape
    if same and checks_enabled(target.device):
        same = torch.equal(target, own.to(target.device))
        same = same and (own_rows is None or torch.equal(rows, own_rows.to(rows.device)))
    if not same:
        differing = names
        if own_rows is not None:
            one, other = ((ids.cpu(), of.cpu()) for ids, of in ((target, rows), (own, own_rows)))
            differing = [n for row, n in enumerate(names) if not torch.equal(one[0][one[1] == row], other[0][other[1] == row])]
        raise ValueError(
            f"labels: expected the target tokens of {whose}, got others in {listed_samples(differing)}; distillation by token "
            "needs one tokenizer and the same answers"
        )


def check_labels(target: Tensor, rows: Tensor, vocab: int, names: list[str]) -> None:
    """The targets are ids below `vocab`, where looking costs no wait."""
    if not checks_enabled(target.device) or not len(target):
        return
    wrong = (target < 0) | (target >= vocab)
    if bool(wrong.any()):
        found = listed_samples([names[row] for row in rows[wrong].unique().tolist()])
        raise ValueError(f"labels: expected ids in [0, {vocab}) or {IGNORE_INDEX}, got {int(target[wrong][0])} in {found}")


@contextlib.contextmanager
def ids_named(model: nn.Module, names: list[str], columns: Mapping[str, Any]) -> Iterator[None]:
    """Inside, an id that the model has no embedding for raises ValueError with the samples, not torch's IndexError.

    columns: input ids (B, L) by the names of their columns. They are not looked at before: some models have placeholders beyond
    the embeddings.
    """
    try:
        yield
    except IndexError as error:
        count = embedding_rows(model)
        for column, ids in columns.items():
            wrong = None if count is None or not isinstance(ids, Tensor) else (ids < 0) | (ids >= count)
            if wrong is not None and bool(wrong.any()):
                found = listed_samples([name for name, bad in zip(names, wrong.any(1).tolist(), strict=False) if bad])
                raise ValueError(
                    f"inputs[{column!r}]: expected ids in [0, {count}), which {type(model).__name__} has embeddings for, got "
                    f"{int(ids[wrong][0])} in {found}"
                ) from error
        raise


def listed_samples(names: list[str]) -> str:
    return f"sample {_listed(names)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
