"""Whether a text names an answer. Stage 1 and scoring share these rules.

Words are compared after Whisper's basic normalisation, Dynamic-SUPERB's rule: lower case, without symbols, punctuation and the
content of brackets. Two things are added to it:

- Combining marks stay. In Hindi or Thai they are vowels: without them the words for boy and girl are one.
- Scripts that are written without spaces, or that join endings to words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Korean),
  are compared character by character.

Choices that this rule makes equal or empty ("C major" and "C# major", "(laughter)") are compared with their symbols, and with
their case where nothing else tells them apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

# A script is known by the first word of a character's Unicode name.
_JOINED_SCRIPTS = frozenset(
    ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
)
_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\(([^)]+?)\)")
_EDGES = ".,;:!?…\"'“”‘’«»。，、！？；：「」"  # punctuation around a word, which is no part of a label


def normalize(text: str) -> str:
    """The words of `text`, each separated by a space; see the module's docstring."""
    return " ".join(plain_words(text))


def plain_words(text: str, *, skip_brackets: bool = True) -> list[str]:
    """The words of `text` in lower case, without symbols and punctuation.

    Args:
        skip_brackets: leave out what stands in brackets, as Whisper's normaliser does.
    """
    text = text.lower()
    if skip_brackets:
        text = _BRACKETS.sub("", text)
    text = unicodedata.normalize("NFKC", text)
    kept = "".join(" " if unicodedata.category(c)[0] in "SP" or _is_loose_mark(c) else c for c in text)
    return _split(kept.lower())


def lenient_match(prediction: str, label: str, choices: Sequence[str] = ()) -> bool:
    """The label's words stand consecutively in the prediction ("a woman." matches "woman"; "woman" does not match "man").

    Args:
        choices: the other possible answers, which decide what has to be compared; see the module's docstring.
    """
    if not label.strip():
        return False
    words = _telling_words(_with_label(label, choices), True)
    return _find(words(prediction), words(label)) >= 0


def strict_match(prediction: str, label: str, choices: Sequence[str] = ()) -> bool:
    """`lenient_match`, and no other choice is named (`named_choices`). Without choices the prediction has to be the label."""
    if not label.strip():
        return False
    if not choices:
        words = _telling_words((label,), True)
        return words(prediction) == words(label)
    return named_choices(prediction, _with_label(label, choices)) == [label]


def named_choices(text: str, choices: Sequence[str], *, skip_brackets: bool = True) -> list[str]:
    """The choices whose words stand in `text`, in the order of `choices`.

    Where one choice's words are part of another's ("fast" in "very fast") the longer one counts: its words are taken out
    before the shorter one is looked for.
    """
    words = _telling_words(tuple(choices), skip_brackets)
    left = words(text)
    parts = {choice: words(choice) for choice in choices}
    found = set()
    for choice in sorted(parts, key=lambda choice: -len(parts[choice])):
        if _find(left, parts[choice]) >= 0:
            found.add(choice)
            left = _without(left, parts[choice])
    return [choice for choice in parts if choice in found]


def same_choice(first: str, second: str, choices: Sequence[str]) -> bool:
    """Whether two texts are one and the same choice."""
    words = _telling_words(tuple(choices), True)
    return words(first) == words(second)


def check_choices(choices: Sequence[str]) -> None:
    """Raises ValueError, naming two choices that no text can tell apart."""
    _telling_words(tuple(choices), True)


def _with_label(label: str, choices: Sequence[str]) -> tuple[str, ...]:
    """The choices, the label among them: a label in another case or punctuation than its choice stands for it."""
    if label in choices:
        return tuple(choices)
    return (label, *(choice for choice in choices if plain_words(choice) != plain_words(label)))


@lru_cache(maxsize=4096)
def _telling_words(choices: tuple[str, ...], skip_brackets: bool) -> Callable[[str], list[str]]:
    """The mildest way to take words that leaves every choice its own, not empty.

    Raises:
        ValueError: there is none.
    """
    choices = tuple(dict.fromkeys(choices))
    ways: tuple[Callable[[str], list[str]], ...] = (
        lambda text: plain_words(text, skip_brackets=skip_brackets),
        lambda text: _exact_words(text.casefold()),
        _exact_words,
    )
    for way in ways:
        forms = {tuple(way(choice)) for choice in choices}
        if len(forms) == len(choices) and () not in forms:
            return way
    by_form: dict[tuple[str, ...], str] = {}
    for choice in choices:
        form = tuple(_exact_words(choice))
        if not form:
            raise ValueError(f"choices: {choice!r} has no word that an answer could name")
        if form in by_form:
            raise ValueError(f"choices: {by_form[form]!r} and {choice!r} cannot be told apart in an answer")
        by_form[form] = choice
    raise AssertionError("unreachable: the last way told them apart")


def _exact_words(text: str) -> list[str]:
    """The words with their symbols and brackets; only punctuation around a word is taken off."""
    return [word.strip(_EDGES) or word for word in _split(unicodedata.normalize("NFKC", text))]


def _split(text: str) -> list[str]:
    """Words by spaces; in a joined script every character, with its marks, is a word."""
    spaced: list[str] = []
    for c in text:
        if _is_joined(c) and unicodedata.category(c)[0] != "M":
            spaced += [" ", c, "\0"]  # NUL: a space follows unless a mark does
        elif unicodedata.category(c)[0] == "M" and spaced and spaced[-1] == "\0":
            spaced[-1:] = [c, "\0"]
        else:
            spaced.append(c)
    return "".join(spaced).replace("\0", " ").split()


def _is_joined(c: str) -> bool:
    return c > "\u0e00" and unicodedata.name(c, "").split(" ")[0] in _JOINED_SCRIPTS


def _is_loose_mark(c: str) -> bool:
    """A mark that NFKC joins to no letter and that belongs to no script of its own, such as the enclosing circle."""
    return unicodedata.category(c)[0] == "M" and unicodedata.name(c, "").startswith(("COMBINING", "VARIATION"))


def _find(words: Sequence[str], part: Sequence[str]) -> int:
    if not part:
        return -1
    return next((i for i in range(len(words) - len(part) + 1) if list(words[i : i + len(part)]) == list(part)), -1)


def _without(words: Sequence[str], part: Sequence[str]) -> list[str]:
    # A separator stays where words were taken out: the neighbours must not become a phrase that nobody wrote.
    rest = list(words)
    while (at := _find(rest, part)) >= 0:
        rest[at : at + len(part)] = ["\0"]
    return rest
