"""The examples of a training run: read, checked, and made into batches with what the model hears of each clip."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models.audio_lms.model import AudioLM
from models.corpora.hearing import PLAIN, Hearing
from models.speech_lm.collation import check_one_clip, crop_to_targets
from models.speech_lm.listeners import open_clips, unheard_batch
from models.speech_lm.row_layout import why_not_packed_with_prefixes
from models.training.recipe import Recipe
from models.training.recipe_sections import DataConfig
from models.training.teacher_states import SourceError

_PADDED = DataConfig()
# Evenly spaced examples whose features give mean and deviation: the error of a mean is then a hundredth of a deviation.
_STATISTICS_EXAMPLES = 16_384
_STATISTICS_PART = 64


@dataclass
class TrainingData:
    """Examples, how a batch is made of them, and the order in which they are drawn.

    Args:
        examples: manifest examples that have a target.
        make_batch: examples -> a batch with `ids`, `target_index`, `target`, `target_row`, `choice_mask`,
            `model_inputs()` and `to(device)` (models/speech_lm/collation.py).
        extra_inputs: added to every batch's model inputs, such as the prefix cache.
        store: the clips' features, for a live teacher that makes its own batches. One with `prefetch(examples)` is told which
            clips the next step needs.
        crop: cuts off what no target of a batch depends on; None = batches stay as they are.
        make_prompts: examples -> a batch whose rows end with their prompt, for a student that answers itself.
        audio_root: folder of the clips, for a live teacher that hears them in its own way.
        make_unheard: examples -> the path without the audio as a batch, where its tokens are others; None = they are the same.
    """

    examples: Sequence[Any]
    make_batch: Callable[[Sequence[Any]], Any]
    extra_inputs: Mapping[str, Any] = field(default_factory=dict)
    store: Any = None
    crop: Callable[[Any], Any] | None = None
    make_prompts: Callable[[Sequence[Any]], Any] | None = None
    audio_root: Path | None = None
    make_unheard: Callable[[Sequence[Any]], Any] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, cursor: int, count: int, *, seed: int) -> list[int]:
        """Rows `cursor` to `cursor + count` of the endless shuffled stream, in which every epoch has a permutation of its own.

        The result depends on the arguments only, so the position in the data is one number.
        """
        n = len(self.examples)
        rows: list[int] = []
        while len(rows) < count:
            epoch, start = divmod(cursor + len(rows), n)
            order = _permutation(n, seed, epoch)
            rows += order[start : start + count - len(rows)].tolist()
        return rows

    def model_inputs(self, batch: Any) -> dict[str, Any]:
        """The keyword arguments of the model for `batch`."""
        return {**batch.model_inputs(), **self.extra_inputs}


@functools.lru_cache(maxsize=4)  # a step draws from one epoch or two, and looks ahead
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)
    return order


def read_examples(recipe: Recipe) -> tuple[list[Any], Path]:
    """The examples of `recipe.data` that have a target, and the root of their audio; it prints what it leaves out.

    Raises:
        SourceError: no manifest, too many bad rows in it, or no such example.
    """
    from models.data.manifest import ManifestError
    from models.data.problems import print_skipped
    from models.data.readers import read_data

    settings = recipe.data
    if not settings.manifest:
        raise SourceError("data.manifest: expected a file, got none")
    try:
        manifest = read_data(
            settings.manifest,
            form=settings.form,
            audio_root=settings.audio_root,
            max_bad_fraction=settings.max_bad_fraction,
            check_audio=settings.features is None,
            max_seconds=settings.max_clip_seconds,
            allow_links=settings.allow_links,
        )
    except ManifestError as error:
        raise SourceError(f"data.manifest: {error}") from error
    print_skipped(manifest.problems)
    asked = [e for e in manifest.examples if e.split in settings.splits and (not settings.tasks or e.task in settings.tasks)]
    examples = [e for e in asked if (e.target or "").strip()]
    if len(examples) < len(asked):
        print(
            f"{settings.manifest}: {len(asked) - len(examples)} of {len(asked)} examples have no target and are left out; "
            "python -m models pseudo-gt writes targets"
        )
    if not examples:
        raise SourceError(
            f"data: no example with a target in {settings.manifest} (splits {list(settings.splits)}, tasks "
            f"{list(settings.tasks) or 'all'}); python -m models pseudo-gt writes targets"
        )
    return examples, manifest.audio_root


def build_data(
    recipe: Recipe,
    model: torch.nn.Module,
    examples: Sequence[Any],
    audio_root: Path,
    *,
    store: Any = None,
    ranks: Any = None,
) -> TrainingData:
    """`examples` batched for `model`, with their features (`store`, or those of the recipe) and prefix cache.

    Features that are made now are written by all `ranks` together (None = this process alone), each on its own device.

    A new model (no `model.folder`, no `model.feature_statistics`) gets the standardisation of these features.
    """
    from models.speech_lm.features import FeatureError

    if isinstance(model, AudioLM):
        return audio_data(model, examples, audio_root, recipe.data, recipe.student.hears)
    settings, hears = recipe.data, recipe.student.hears
    with_features = list(examples)
    check_one_clip(with_features)
    if store is None:
        try:
            store, with_features = recipe_features(
                recipe, model, examples, audio_root, features=settings.features, hears=hears, ranks=ranks,
                device=None if ranks is None else ranks.device, max_bad_fraction=settings.max_bad_fraction,
            )  # fmt: skip
        except FeatureError as error:
            raise SourceError(f"data: {error}") from error
    if recipe.model.folder is None and recipe.model.feature_statistics is None:
        heard = [e for e in with_features if e.audio is not None]
        heard = heard[:: -(-len(heard) // _STATISTICS_EXAMPLES)] if heard else []
        parts = range(0, len(heard), _STATISTICS_PART)
        model.fit_feature_statistics(store.rows(heard[start : start + _STATISTICS_PART]) for start in parts)
    # Activation checkpointing drops the KV cache, so it cannot run with a prefix cache.
    cached = not recipe.run.gradient_checkpointing and not model.config.train_lm
    cache_mib = recipe.model.prefix_cache_mib if cached else 0
    data = make_training_data(model, with_features, store, prefix_cache_mib=cache_mib, layout=settings, hears=hears)
    return dataclasses.replace(data, audio_root=Path(audio_root))


def recipe_features(
    recipe: Recipe,
    model: Any,
    examples: Sequence[Any],
    audio_root: Path,
    *,
    features: str | None,
    hears: Hearing,
    ranks: Any,
    device: torch.device | None,
    max_bad_fraction: float,
    name: str = "",
) -> Any:
    """`clip_features` as `recipe.features` and `recipe.data` say.

    Args:
        device: where the encoder runs; None = where it is.
        name: folder of the shards inside that of the student's.
    """
    from models.speech_lm.features import clip_features

    made = recipe.features
    model.use_log_mel(made.backend)
    model.use_resampler(made.resampler)
    if device is not None:
        model.encoder.to(device)
    return clip_features(
        model,
        examples,
        audio_root=audio_root,
        features=features,
        folder=(Path(recipe.run.out_dir) / "features" if made.folder is None else Path(made.folder)) / name,
        ranks=ranks if ranks is not None and ranks.size > 1 else None,
        batch_clips=made.batch_clips,
        shard_mib=made.shard_mib,
        max_seconds=recipe.data.max_clip_seconds,
        max_bad_fraction=max_bad_fraction,
        max_cut_fraction=recipe.data.max_cut_fraction,
        progress_bar=recipe.run.progress_bar,
        hears=hears,
    )


def audio_data(
    model: AudioLM, examples: Sequence[Any], audio_root: Path, settings: DataConfig, hears: Hearing, *, reader: Any = None
) -> TrainingData:
    """`examples` batched for an audio LM; their clips are decoded when a batch needs them, or a step before.

    `reader`: of another model; it is shared where both hear the same at the same rate, so no clip is decoded twice.
    """
    store, usable = open_clips(
        model, examples, audio_root=audio_root, max_seconds=settings.max_clip_seconds, hears=hears,
        max_cut_fraction=settings.max_cut_fraction,
    )  # fmt: skip
    if reader is not None and reader.gives_the_same_as(store):
        store = reader
    collator = model.make_collator()

    def make_batch(chosen: Sequence[Any]) -> Any:
        return collator([hears.shown(example) for example in chosen], store.rows(chosen))

    def make_prompts(chosen: Sequence[Any]) -> Any:
        return collator([hears.shown(example) for example in chosen], store.rows(chosen), with_target=False)

    def make_unheard(chosen: Sequence[Any]) -> Any:
        return unheard_batch(model, [hears.shown(example) for example in chosen])

    unheard = make_unheard if model.is_absent else None
    return TrainingData(usable, make_batch, {}, store, crop_to_targets, make_prompts, Path(audio_root), unheard)


def make_training_data(
    model: torch.nn.Module,
    examples: Sequence[Any],
    store: Any,
    *,
    prefix_cache_mib: int = 4096,
    layout: DataConfig = _PADDED,
    hears: Hearing = PLAIN,
) -> TrainingData:
    """Batches of `examples` for `model` (a SpeechLM), with their features from `store` (a FeatureStore).

    `layout`: its `packing` and `pack_tokens` say how the model lays out a batch. `hears`: what its prompts show.

    Raises:
        SourceError: packing "varlen" without flash-attention 2, or with a language model in float32; a text with a token that the
            language model's embeddings lack.
    """
    if layout.packing == "varlen":
        prefix_cache_mib = 0
        try:
            model.lm.set_attn_implementation("flash_attention_2")
        except (ImportError, ValueError) as error:
            raise SourceError(f"data.packing: varlen needs flash-attention 2: {error}") from error
        if model.lm.dtype not in (torch.bfloat16, torch.float16):
            raise SourceError(f"data.packing: varlen needs an LM in bfloat16 or float16 (lm_dtype), got {model.lm.dtype}")
    collator = model.make_collator()
    try:
        collator.check_examples([hears.shown(example) for example in examples])
    except ValueError as error:
        raise SourceError(str(error)) from error

    def make_batch(chosen: Sequence[Any]) -> Any:
        return collator([hears.shown(example) for example in chosen], store.rows(chosen))

    def make_prompts(chosen: Sequence[Any]) -> Any:
        return collator([hears.shown(example) for example in chosen], store.rows(chosen), with_target=False)

    extra: dict[str, Any] = {}
    if prefix_cache_mib and layout.packing == "pack" and (why := why_not_packed_with_prefixes(model.lm.config)):
        tqdm.write(f"model.prefix_cache_mib: {type(model.lm).__name__} runs without it under data.packing=pack: it has {why}")
        prefix_cache_mib = 0
    if prefix_cache_mib:
        extra |= model.prefix_inputs(max_bytes=prefix_cache_mib << 20)
    if layout.packing != "none":
        extra["pack_tokens"] = layout.pack_tokens
    return TrainingData(examples, make_batch, extra, store, crop_to_targets, make_prompts)
