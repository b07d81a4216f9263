"""Every key of a recipe with its default and its meaning: the comment beside it in the class of its section."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from models.training.recipe import Recipe, entry_of, section_of


class Key(NamedTuple):
    """One key. That of a section inside another ends in ".*" and has no default."""

    name: str  # such as loss.alpha
    default: str  # as the user types it
    meaning: str


class Section(NamedTuple):
    """The keys of one class, which may have several places in a recipe; they are named by the first."""

    places: tuple[str, ...]  # such as "loss"; "" = the keys that are in no section
    summary: str
    keys: tuple[Key, ...]


def sections() -> list[Section]:
    """All sections, in the order of `Recipe`."""
    places: dict[type, list[str]] = {}
    for cls, place in _places(Recipe, ""):
        places.setdefault(cls, []).append(place)
    return [
        Section(tuple(found), inspect.getdoc(cls).split("\n\n")[0], tuple(_keys(cls, found[0])))
        for cls, found in places.items()
    ]


def describe_keys() -> str:
    """Every key of a recipe, for a terminal."""
    lines = ["keys, their defaults and what they mean:"]
    for places, summary, keys in sections():
        head = f"{', '.join(f'{place}.*' for place in places)}: {summary}" if places[0] else ""
        lines += ["", *textwrap.wrap(head, 110)]
        for name, default, meaning in keys:
            lines.append(f"  {name}={default}" if default else f"  {name}")
            lines += textwrap.wrap(meaning, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _places(cls: type, place: str) -> Iterator[tuple[type, str]]:
    """A class and those of the sections inside it, each with the place where its keys stand."""
    yield cls, place
    for f in dataclasses.fields(cls):
        if (section := section_of(cls, f.name)) is not None:
            yield from _places(section, _join(place, f.name))
        elif (entry := entry_of(cls, f.name)) is not None:
            yield from _places(entry, _join(place, f"{f.name}.NAME"))


def _keys(cls: type, place: str) -> Iterator[Key]:
    meanings = _comments(cls)
    for f in dataclasses.fields(cls):
        name = _join(place, f.name)
        if section_of(cls, f.name) is None and entry_of(cls, f.name) is None:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            yield Key(name, _typed(default), meanings[f.name])
        elif place:
            yield Key(f"{name}.*", "", meanings[f.name])


def _comments(cls: type) -> dict[str, str]:
    """The comments above and behind each field of a dataclass, those it inherits included."""
    found = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        (tree,) = ast.parse(source).body
        for node in tree.body:
            if isinstance(node, ast.AnnAssign):
                first = node.lineno
                while first - 1 in comments and comments[first - 1].line.lstrip().startswith("#"):
                    first -= 1
                words = [comments[n].string.lstrip("# ") for n in range(first, node.end_lineno + 1) if n in comments]
                found[node.target.id] = " ".join(words)
    return found


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _typed(value: Any) -> str:
    """A value as the user types it on the command line."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_typed, value))}]"
    return value if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) else json.dumps(value)
