"""Recipes from files and from words of the command line: every key is checked, and an error names the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.training.commands import RECIPES_DIR
from models.training.recipe import Recipe, entry_of, section_of
from models.training.recipe_checks import ConfigError, check, did_you_mean


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        recipe: a path, or the name of a file in models/training/recipes ("caad").
        overrides: words such as "loss.alpha=1"; values are YAML (`null`, `[a,b]`, `1e-3`). Of two for one key the last counts;
            two lists for one key are an error.

    Returns:
        the checked, frozen `Recipe`.

    Raises:
        ConfigError: no such file, unreadable YAML, an unknown key (with the nearest known one), a value of the wrong type
            or out of range; the message names the key and the file.
    """
    path = find_recipe(recipe)
    try:
        written = OmegaConf.load(path)
    except Exception as error:  # PyYAML raises several unrelated types
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(written, DictConfig):
        raise ConfigError(f"{path}: expected sections such as 'optim:', got a {type(written).__name__}")
    _check_keys(OmegaConf.to_container(written), Recipe, source=str(path))
    merged = _merge(OmegaConf.structured(_plain(Recipe)), written, source=str(path))
    lists: set[str] = set()
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {word!r}: expected key=value, such as loss.alpha=1")
        try:
            one = OmegaConf.from_dotlist([word])
        except Exception as error:  # PyYAML raises several unrelated types
            raise ConfigError(f"command line ({word}): not readable as YAML: {' '.join(str(error).split())}") from None
        given: Any = OmegaConf.to_container(one)
        _check_keys(given, Recipe, source="command line")
        merged = _merge(merged, one, source=f"command line ({word})")
        while isinstance(given, dict) and given:
            given = next(iter(given.values()))
        if isinstance(given, list):
            if key in lists:
                raise ConfigError(f"command line ({word}): expected {key} once, with all its values in one list, got it twice")
            lists.add(key)
    try:
        return _build(Recipe, OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or '?'}: {str(error).splitlines()[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}{' + command line' if overrides else ''}: {error}") from None


def find_recipe(recipe: str) -> Path:
    """The file of a recipe: of a shipped one by its name, of any other by its path."""
    shipped = sorted(p.stem for p in RECIPES_DIR.glob("*.yaml"))
    if recipe in shipped:
        return RECIPES_DIR / f"{recipe}.yaml"
    if Path(recipe).is_file():
        return Path(recipe)
    raise ConfigError(f"recipe {recipe!r}: no such file, and not one of the shipped {shipped}{did_you_mean(recipe, shipped)}")


def _plain(cls: type) -> Any:
    """A twin of a config class for OmegaConf: the same fields and types, without the checks.

    OmegaConf makes an object of the defaults while it builds its schema. The real `Recipe` raises there: it has no teacher.
    """
    fields = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        default = f.default_factory if f.default_factory is not dataclasses.MISSING else None
        if (section := section_of(cls, f.name)) is not None:
            twin = _plain(section)
            fields.append((f.name, twin, field(default_factory=twin)))
        elif (entry := entry_of(cls, f.name)) is not None:
            fields.append((f.name, dict[str, _plain(entry)], field(default_factory=dict)))
        else:
            value = field(default_factory=default) if default is not None else field(default=f.default)
            fields.append((f.name, hints[f.name], value))
    return dataclasses.make_dataclass(cls.__name__, fields)


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for f in dataclasses.fields(cls):
        value = values[f.name]
        if (section := section_of(cls, f.name)) is not None:
            value = _build(section, value, f"{prefix}{f.name}.")
        elif (entry := entry_of(cls, f.name)) is not None:
            value = {name: _build_entry(entry, v, f"{prefix}{f.name}.{name}.") for name, v in value.items()}
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, float):
            check(math.isfinite(value), prefix + f.name, "a finite number", value)
        arguments[f.name] = value
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:  # of a class of another room, which knows nothing of recipes
        raise ConfigError(f"{prefix}{error}") from None


def _build_entry(cls: type, values: dict[str, Any], prefix: str) -> Any:
    try:
        return _build(cls, values, "")
    except ConfigError as error:  # which names the key as the section does
        raise ConfigError(f"{prefix}{error}") from None


def _merge(base: DictConfig, other: DictConfig, *, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(base, other)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"{source}: {key}: {str(error).splitlines()[0]}") from None


def _check_keys(values: Any, cls: type, *, source: str, prefix: str = "") -> None:
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: {prefix.rstrip('.')}: expected keys {sorted(known)}, got {values!r}")
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown key {prefix + str(key)!r}{_nearest_key(str(key), known, prefix)}")
        if (section := section_of(cls, key)) is not None:
            _check_keys(value, section, source=source, prefix=f"{prefix}{key}.")
        elif (entry := entry_of(cls, key)) is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{key}: expected names, each with its keys, got {value!r}")
            for name, inner in value.items():
                _check_keys(inner, entry, source=source, prefix=f"{prefix}{key}.{name}.")


def _nearest_key(word: str, known: Any, prefix: str = "") -> str:
    """The end of an error message: the nearest of the `known` keys, or a key of another section (`alpha`: `loss.alpha`)."""
    if near := did_you_mean(word, known, prefix):
        return near
    everywhere = {
        f.name: f"{section.name}.{f.name}"
        for section in reversed(dataclasses.fields(Recipe))  # for a name in two sections the first section wins
        if dataclasses.is_dataclass(section.default_factory)
        for f in dataclasses.fields(section.default_factory)
    }
    near = difflib.get_close_matches(word, everywhere, n=1, cutoff=0.75)
    return f"; did you mean {everywhere[near[0]]!r}?" if near else f"; known: {', '.join(map(str, known))}"
