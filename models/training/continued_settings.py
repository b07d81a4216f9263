"""Which settings a run and its continuation have in common."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from models.training.recipe import Recipe, entry_of, section_of, to_dict


def settings_to_continue(recipe: Recipe) -> dict[str, Any]:
    """The settings that a run and its continuation must have in common, as JSON gives them back."""
    return _to_continue(to_dict(recipe))


def saved_settings_to_continue(saved: dict[str, Any]) -> dict[str, Any]:
    """The same of a checkpoint. Keys that it does not have yet are at their defaults: a new key's default changes nothing."""
    return _to_continue(_with_later_keys(saved, Recipe))


def _to_continue(settings: dict[str, Any]) -> dict[str, Any]:
    settings = json.loads(json.dumps(settings))
    free = ("resume", "out_dir", "progress_bar", "tensorboard", "save_every_steps", "keep_last_checkpoints", "parallel")
    free += ("push_to_hub", "hub_private")
    for name in free:
        del settings["run"][name]
    for name in ("folder", "batch_clips", "shard_mib"):
        del settings["features"][name]
    return settings


def _with_later_keys(saved: dict[str, Any], cls: type) -> dict[str, Any]:
    filled = dict(saved)
    for f in dataclasses.fields(cls):
        if f.name not in saved:
            if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING:
                default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
                filled[f.name] = to_dict(default) if dataclasses.is_dataclass(default) else default
        elif (section := section_of(cls, f.name)) is not None:
            filled[f.name] = _with_later_keys(saved[f.name], section)
        elif (entry := entry_of(cls, f.name)) is not None:
            filled[f.name] = {name: _with_later_keys(values, entry) for name, values in saved[f.name].items()}
    return filled
