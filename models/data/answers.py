"""Whether a text names an answer: compares words after Whisper's basic normalisation. Stage 1 and scoring use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache


def normalize(text: str) -> str:
    """Whisper's basic normalisation: lower case, no brackets' content, no symbols or punctuation, single spaces."""
    return _normalizer()(text).strip()


def lenient_match(prediction: str, label: str) -> bool:
    """The label's words stand side by side in the prediction ("a woman." matches "woman"; "woman" does not match "man")."""
    return _contains(normalize(prediction).split(), normalize(label).split())


def strict_match(prediction: str, label: str, choices: Sequence[str] = ()) -> bool:
    """`lenient_match`, and the prediction names no other choice (`named_choices`). Without choices it has to equal the label."""
    if not choices:
        return normalize(prediction) == normalize(label)
    return {normalize(c) for c in named_choices(prediction, (label, *choices))} == {normalize(label)}


def named_choices(text: str, choices: Sequence[str], *, normalizer: Callable[[str], str] = normalize) -> list[str]:
    """The choices whose words stand in `text`, in the order of `choices`.

    If one choice's words are part of another's ("fast" in "very fast"), the longer one counts: its words are removed before
    the shorter one is looked for.
    """
    words = normalizer(text).split()
    parts = {choice: normalizer(choice).split() for choice in choices}
    found = set()
    for choice in sorted(parts, key=lambda choice: -len(parts[choice])):
        if _contains(words, parts[choice]):
            found.add(choice)
            words = _without(words, parts[choice])
    return [choice for choice in parts if choice in found]


@lru_cache(maxsize=1)
def _normalizer() -> Callable[[str], str]:
    # Imported at first use: importing transformers takes seconds, and many commands do not need it.
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


def _find(words: Sequence[str], part: Sequence[str]) -> int:
    if not part:
        return -1
    return next((i for i in range(len(words) - len(part) + 1) if list(words[i : i + len(part)]) == list(part)), -1)


def _contains(words: Sequence[str], part: Sequence[str]) -> bool:
    return _find(words, part) >= 0


def _without(words: Sequence[str], part: Sequence[str]) -> list[str]:
    # A separator takes the place of the removed words, so that their neighbours do not form a phrase that nobody wrote.
    rest = list(words)
    while (at := _find(rest, part)) >= 0:
        rest[at : at + len(part)] = ["\0"]
    return rest
