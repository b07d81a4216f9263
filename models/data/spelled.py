"""Which tokens of a target spell the answer, and which are the sentence around it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from models.data.example import AnsweredExample, Example


def spelling_mask(
    example: Example, target_ids: Sequence[int], tokenize: Callable[[str], list[int]], *, ends: bool
) -> list[bool]:
    """Marks the tokens in which the target differs from itself with another choice in the answer's place.

    Without choices it marks the tokens of the answer. If the target mentions neither a choice nor the answer, any token may
    carry the answer: then it marks all tokens but the end of text. Of an answer that a student has made itself it marks all
    tokens, the end too: nobody knows which of them spell it.

    Args:
        target_ids: of the example's target.
        tokenize: a text in the target's place -> its ids, without an end.
        ends: the last of `target_ids` is an end of text.
    """
    if isinstance(example, AnsweredExample):
        return [True] * len(target_ids)
    target, body = example.target, len(target_ids) - ends
    span = _find_choice(target, example.choices or ((example.answer,) if example.answer else ()))
    if span is None:
        return [True] * body + [False] * ends
    begin, end = span
    mask = [False] * len(target_ids)
    mentioned = target[begin:end]
    # Where no other choice is known, "#" stands for any other text.
    others = [choice for choice in example.choices if choice.casefold() != mentioned.casefold()] or ["#"]
    for other in others:
        ids = tokenize(target[:begin] + other + target[end:])
        same_start = _common_prefix(target_ids[:body], ids)
        limit = min(body, len(ids)) - same_start
        same_end = min(_common_prefix(target_ids[:body][::-1], ids[::-1]), limit)
        mask[same_start : body - same_end] = [True] * (body - same_end - same_start)
    return mask


def _find_choice(target: str, choices: Sequence[str]) -> tuple[int, int] | None:
    """Begin and end of a choice that the target mentions as whole words: the longest such choice, where it stands last."""
    for choice in sorted(filter(None, choices), key=len, reverse=True):
        matches = list(re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", target, re.IGNORECASE))
        if matches:
            return matches[-1].span()
    return None


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
