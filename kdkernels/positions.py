"""Rotary positions whose frequencies follow the longest text of a batch ("longrope", "dynamic").

With them the answer to a text can depend on what else is in its batch, or was in batches before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def check_lengths(model: nn.Module, shortest: int, longest: int) -> None:
    """ValueError where a row's positions would depend on other rows.

    Models of the rope type "longrope" take other frequencies for the whole batch as soon as one row is longer than their original
    length. Those of the type "dynamic" scale them by the longest row so far. Up to that length all rows are as if alone.

    Args:
        model: a model with a transformers config; any other passes.
        shortest, longest: tokens of the batch's shortest and longest row; what is generated counts in the longest alone.
    """
    for kind, limit in _length_limits(getattr(model, "config", None)):
        if longest > limit and ("dynamic" in kind or shortest <= limit):
            raise ValueError(
                f"model: expected texts of at most {limit} tokens, new ones included, got {longest}: its positions (rope_type "
                f"{kind!r}) change beyond that for all texts of a batch"
            )


def _length_limits(config: Any) -> Iterator[tuple[str, int]]:
    """Rope type and original length, of each kind of layer whose positions follow the batch."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    given = getattr(config, "rope_parameters", None)
    if not isinstance(given, Mapping):
        return
    for rope in [given, *(x for x in given.values() if isinstance(x, Mapping))]:  # some configs have one a kind of layer
        kind = rope.get("rope_type")
        length = config.max_position_embeddings
        if kind == "longrope":
            length = rope.get("original_max_position_embeddings") or length
        elif not (isinstance(kind, str) and "dynamic" in kind):
            continue
        yield kind, length
