"""The errors of a recipe, and the checks that its sections share."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class ConfigError(ValueError):
    """A recipe, or an override of it, is wrong; the message names the key and where it was written."""


def check_ramp(name: str, start: float | None, steps: int) -> None:
    """`NAME_start` and `NAME_ramp_steps` do something only together."""
    if start is not None and steps == 0:
        raise ConfigError(f"{name}_ramp_steps: expected >= 1 with {name}_start={start:g}, got 0")
    if start is None and steps > 0:
        raise ConfigError(f"{name}_ramp_steps: expected 0 without {name}_start, got {steps}")


def check_has_effect(section: Any, prefix: str, name: str, given: bool, other: str) -> None:
    """ConfigError where a setting differs from its default and has no effect, because the `other` it needs is not `given`."""
    default = next(f.default for f in dataclasses.fields(section) if f.name == name)
    value = getattr(section, name)
    if value != default and not given:
        where = f"{prefix}.{name}" if prefix else name
        raise ConfigError(f"{where}: expected {default!r}, the default, without {other}, got {value!r}: it would have no effect")


def check(ok: bool, name: str, expected: str, got: Any) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


def check_one_of(value: str, name: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message: the nearest of the `known` words with `prefix` before it; "" where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""
