"""Check what a recipe names, files and folders, before a backbone is loaded or fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.audio_lms.family import AudioLMError
from models.audio_lms.model import adapter_base, find_checkpoint_folder
from models.speech_lm.listeners import is_speech_lm
from models.training.checkpoint import RESULT_NAME
from models.training.recipe import Recipe, to_dict
from models.training.teacher_states import SourceError

if TYPE_CHECKING:
    from models.speech_lm.config import SpeechLMConfig


def check_folders(recipe: Recipe) -> None:
    """Check the files and folders that `recipe` names, and their settings, before a backbone is loaded or fetched.

    Raises:
        SourceError: one is missing, or does not fit the others or the recipe; the message names the keys.
    """
    _check_not_replaced(recipe)
    if recipe.student.model is not None:
        _check_audio_lms(recipe)
        return
    wanted: list[tuple[str, str | None, str]] = []
    if recipe.data.features is not None and not Path(recipe.data.features).exists():
        raise SourceError(f"data.features: expected a file or a folder, got {recipe.data.features}")
    own = recipe.teacher.features
    if own not in (None, "encode") and not Path(own).exists():
        raise SourceError(f"teacher.features: expected encode, a file or a folder, got {own}")
    wanted += [(f"model.{name}", getattr(recipe.model, name), "speech_lm.json") for name in ("folder", "feature_statistics")]
    if recipe.needs_teacher:
        wanted += [("teacher.folder", recipe.teacher.folder, "speech_lm.json")]
        wanted += [("teacher.cache", recipe.teacher.cache, "cache.json")]
    wanted += [(f"sources.{name}.folder", s.folder, "speech_lm.json") for name, s in recipe.sources.items() if s.role != "text"]
    for key, given, inside in wanted:
        if given is not None and not (Path(given) / inside).is_file():
            raise SourceError(f"{key}: expected {'a folder with ' + inside if inside else 'a file'}, got {given}")
    student = _check_student(recipe)
    listening = {f"sources.{name}.folder": s.folder for name, s in recipe.sources.items() if s.role != "text" and s.folder}
    if recipe.needs_teacher and recipe.teacher.cache is None:
        listening["teacher.folder"] = recipe.teacher.folder
    if recipe.teacher_encodes:
        listening.pop("teacher.folder", None)
    for key, folder in listening.items():
        check_same_clips(key, student, saved_settings(key, folder))
    if recipe.needs_teacher and recipe.teacher.cache is not None:
        _check_cached_layers(recipe, student)


def _check_not_replaced(recipe: Recipe) -> None:
    """SourceError where the run would read what it replaces with its result, such as the second stage of a training."""
    final = Path(recipe.run.out_dir, RESULT_NAME)
    if not final.exists():
        return
    replaced = os.path.realpath(final)
    for key, given in _texts(to_dict(recipe)):
        for path in [given, *_parts_of(given)] if os.path.exists(given) else ():
            if Path(os.path.realpath(path)).is_relative_to(replaced):
                own = f"got {given}" if path == given else f"got {given}, which needs {path}"
                raise SourceError(
                    f"{key}: expected nothing of {final}, which this run replaces with its result, {own}; name another "
                    "run.out_dir"
                )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The key and the value of each text in a recipe."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, inner in items:
        yield from _texts(inner, f"{key}.{name}" if key else str(name))


def _parts_of(folder: str) -> list[str]:
    """What the model in a folder needs from elsewhere: the base of an adapter, the backbones of a SpeechLM."""
    with suppress(AudioLMError, SourceError):  # reported where the model is looked for
        if is_speech_lm(folder):
            settings = saved_settings("model", folder)
            return [settings.lm, settings.encoder]
        base = adapter_base(Path(folder))
        return [] if base is None else [base]
    return []


def _check_audio_lms(recipe: Recipe) -> None:
    """Find the audio LMs and the cache that `recipe` names; one of the hub is fetched."""
    named = {"student.model": recipe.student.model}
    if recipe.needs_teacher:
        named["teacher.model"] = recipe.teacher.model
    named |= {f"sources.{name}.folder": s.folder for name, s in recipe.sources.items() if s.role != "text"}
    for key, spec in named.items():
        if spec is not None and is_speech_lm(spec):
            raise SourceError(f"{key}: expected an audio LM of transformers, as the student is one, got a SpeechLM in {spec}")
        try:
            if spec is not None:
                find_checkpoint_folder(spec)
        except AudioLMError as error:
            raise SourceError(f"{key}: {error}") from error
    if recipe.needs_teacher and recipe.teacher.cache is not None:
        _check_cached_layers(recipe, None)


def saved_settings(key: str, folder: str) -> SpeechLMConfig:
    """The settings of the SpeechLM in `folder`, which `key` names."""
    from models.speech_lm.saving import SpeechLMError, read_record

    try:
        return read_record(Path(folder))[0]
    except SpeechLMError as error:
        raise SourceError(f"{key}: {error}") from error


def _check_student(recipe: Recipe) -> SpeechLMConfig:
    """The student's settings; SourceError where the recipe asks for what they do not allow."""
    from models.speech_lm.config import SpeechLMConfig

    key = "model.settings" if recipe.model.folder is None else "model.folder"
    try:
        if recipe.model.folder is None:
            student = SpeechLMConfig.from_dict(recipe.model.settings)
        else:
            student = saved_settings(key, recipe.model.folder)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{key}: {error}") from error
    if recipe.model.bf16_products and student.train_lm:
        raise SourceError(f"model.bf16_products: expected a frozen language model, got train_lm true in {key}")
    if recipe.data.packing == "varlen" and student.lm_dtype == "float32":
        raise SourceError(f"data.packing: varlen needs an LM in bfloat16 or float16, got lm_dtype float32 in {key}")
    return student


def check_same_clips(key: str, student: SpeechLMConfig, teacher: SpeechLMConfig) -> None:
    """SourceError unless a live teacher hears as much of each clip as the student, in features of one shape."""
    for name in ("encoder_layers", "audio_frames", "max_audio_seconds"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise SourceError(
                f"{key}: expected {name} {ours}, as the student has, got {theirs}. A live teacher gets the student's features: "
                "make both alike, pass teacher.features=encode, or write the teacher's cache (python -m models cache) and pass "
                "teacher.cache"
            )


def _check_cached_layers(recipe: Recipe, student: SpeechLMConfig | None) -> None:
    """SourceError where teacher.cache lacks layers that are compared.

    A map needs the depths of both language models. For them a backbone that is not here yet is fetched, as training would. Where
    the student is an audio LM (None), a map's layers are checked when both models are there.
    """
    from kdkernels import ContrastCache, ProjectionCache

    folder = Path(str(recipe.teacher.cache))
    if folder in ProjectionCache.beside(folder):  # and no states
        if not recipe.teacher.projection:
            raise SourceError(f"teacher.projection: expected a number such as 64 with the projections of {folder}, got 0")
        return
    try:
        held = ContrastCache(folder, verify_checksums=False).layers
    except ValueError as error:
        raise SourceError(f"teacher.cache: {error}") from error
    if recipe.layers.weight == 0:
        return
    wanted = {int(pair.split("-")[1]) for pair in recipe.layers.pairs}
    if held and not wanted and student is not None:
        teacher = saved_settings("teacher.folder", recipe.teacher.folder)
        depths = [_depth(student, recipe.model.folder), _depth(teacher, recipe.teacher.folder)]
        wanted = set() if None in depths else {layer for _, layer in recipe.layers.layer_pairs(*depths)}
    missing = sorted(wanted - set(held))
    if missing or not held:
        key, which = ("layers.pairs" if recipe.layers.pairs else "layers.map"), f"those of {missing}"
        if not missing:
            key, which = "layers.weight", "any"
        raise SourceError(
            f"teacher.cache: expected the states of layers that {key} compares, got a cache without {which}; write it with "
            "python -m models cache --layers"
        )


def _depth(config: SpeechLMConfig, folder: str | None) -> int | None:
    """Layers of a speech LM's language model, by its config; None where it is not found, which `build_model` reports."""
    from transformers import AutoConfig

    from models.backbones.resolve import BackboneError, resolve_backbone

    stored = None if folder is None else Path(folder) / "lm"
    try:
        found = resolve_backbone(config.lm if stored is None or not stored.is_dir() else stored, kind="causal_lm")
        return AutoConfig.from_pretrained(found.path, trust_remote_code=False).get_text_config().num_hidden_layers
    except (BackboneError, OSError, ValueError, AttributeError):
        return None
