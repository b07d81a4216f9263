"""Do the ids that teacher and student share mean the same tokens? The loss compares their logits id by id."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..head_layers import computing_layer, head_module

__all__ = ["check_same_tokens", "check_vocabularies", "embedding_rows", "head_rows", "tokenizer_of"]

logger = logging.getLogger(__name__)

# Heads of one family are padded to multiples of 64 to 1,024 rows (Qwen2.5: 151,936 and 152,064 for one tokenizer). Between
# families the difference is larger (Llama 3 has 128,256).
MOST_PADDING = 1024


def check_same_tokens(
    student: nn.Module,
    teacher_rows: int | None,
    *,
    processing_class: Any,
    teacher_processing_class: Any,
    teacher_model: nn.Module | None,
    vocab_size: int | None,
) -> None:
    """`check_vocabularies` with the tokenizers that were passed, or that lie beside the weights of the two models.

    Args:
        teacher_rows: None = as many as the student's head has.
        teacher_model: the live teacher; None = there is none.

    A student without an LM head is not compared.
    """
    if (rows := head_rows(student)) is None:
        return
    theirs = tokenizer_of(teacher_processing_class, teacher_model)
    own = None if theirs is None else tokenizer_of(processing_class, student)
    check_vocabularies(rows, rows if teacher_rows is None else teacher_rows, own, theirs, vocab_size=vocab_size)


def check_vocabularies(
    student_rows: int, teacher_rows: int, student: Any = None, teacher: Any = None, *, vocab_size: int | None = None
) -> None:
    """Compares tokenizers where both are given, else the sizes of the heads.

    Args:
        student_rows, teacher_rows: V_s and V_t, rows of the LM heads.
        student, teacher: tokenizers with `get_vocab()`, or None. Ids that both have, below both sizes, must be the same tokens.
        vocab_size: only ids below it count.

    Raises:
        ValueError: the tokenizers differ. Or one is missing, and the sizes differ by more than 1,024 rows. It names both sizes.
    """
    sizes = f"the student's head has {student_rows:,} rows and the teacher's {teacher_rows:,}"
    if student is not None and teacher is not None:
        limit = min(student_rows, teacher_rows, vocab_size or student_rows)
        mine, theirs = ({i: token for token, i in t.get_vocab().items() if i < limit} for t in (student, teacher))
        differing = sorted(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
        if differing:
            first = differing[0]
            raise ValueError(
                f"teacher: expected a tokenizer whose ids mean the same tokens as the student's, got {len(differing):,} that "
                f"differ: id {first} is {theirs[first]!r} for the teacher and {mine[first]!r} for the student; {sizes}. Take a "
                "teacher of the student's family, or limit the ids with CAADOptions(vocab_size=)"
            )
    elif abs(student_rows - teacher_rows) > MOST_PADDING:
        raise ValueError(
            f"teacher: expected a vocabulary of the student's size, up to {MOST_PADDING:,} rows of padding, but {sizes}. Pass "
            "both tokenizers, processing_class= and teacher_processing_class=, and they are compared. If you know that the "
            "common ids mean the same tokens, pass assume_same_tokens=True"
        )


def tokenizer_of(processing_class: Any, model: nn.Module | None = None) -> Any:
    """The tokenizer of a processor, or the tokenizer itself; else the one beside the weights of `model`; None without one."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if callable(getattr(tokenizer, "get_vocab", None)):
        return tokenizer
    return None if model is None else _beside(model)


def _beside(model: nn.Module) -> Any:
    """The tokenizer beside the weights that the model was loaded from, without a download; None where there is none."""
    where = getattr(getattr(model, "config", None), "name_or_path", "")
    if not where:
        return None
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a folder without a tokenizer raises: the sizes are compared then
        logger.info("no tokenizer could be loaded from %s (%s); the sizes of the heads are compared", where, error)
        return None
    # Of a folder without a tokenizer's files, transformers makes one of special tokens alone for some families (Qwen2-Audio).
    return found if found.get_vocab().keys() - set(found.all_special_tokens) else None


def head_rows(model: nn.Module) -> int | None:
    """V of the model's LM head, also where ZeRO-3 has partitioned it; None where it has no weight."""
    return _rows(computing_layer(head_module(model)))


def embedding_rows(model: nn.Module) -> int | None:
    """The number of tokens that the model has embeddings for; None where that is not known."""
    getter = getattr(model, "get_input_embeddings", None)
    return _rows(getter()) if callable(getter) else None


def _rows(layer: Any) -> int | None:
    weight: Any = getattr(layer, "weight", None)
    return None if weight is None else int(getattr(weight, "ds_shape", weight.shape)[0])
