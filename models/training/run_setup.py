"""Build what a training run needs, as its recipe says: the student, its examples as batches, and its teachers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from kdkernels.layer_states import decoder_layers
from models.audio_lms.family import AudioLMError
from models.audio_lms.model import AudioLM, find_checkpoint_folder
from models.audio_lms.settings import Lora
from models.backbones.causal_lm import read_head
from models.backbones.device import inference_dtype, pick_device
from models.corpora.hearing import PLAIN, Hearing
from models.io_utils import fingerprint
from models.speech_lm.collation import check_one_clip, crop_to_targets
from models.speech_lm.frozen_linear import use_bf16_products
from models.speech_lm.listeners import is_speech_lm, open_clips, torch_dtype, unheard_batch
from models.speech_lm.row_layout import why_not_packed_with_prefixes
from models.training.layer_distillation import LayerDistillation
from models.training.projected_teacher import ProjectedTeacher, find_projections
from models.training.recipe import Recipe, to_dict
from models.training.recipe_sections import DataConfig, SourceConfig
from models.training.teacher_states import SourceError
from models.training.teachers import (
    CachedTeacher,
    CenteredTeacher,
    KeptTeacher,
    ListeningTeacher,
    LiveTeacher,
    Source,
    check_same_tokenizer,
    kept_bytes,
    snapshot,
)
from models.training.text_teacher import TextTeacher

if TYPE_CHECKING:
    from models.speech_lm.config import SpeechLMConfig

_PADDED = DataConfig()
# Evenly spaced examples whose features give mean and deviation: the error of a mean is then a hundredth of a deviation.
_STATISTICS_EXAMPLES = 16_384
_STATISTICS_PART = 64
OWN_TEACHER = "teacher"  # name of the objective's own teacher among the sources


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


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The student: the audio LM of `recipe.student`, or the SpeechLM of `recipe.model`. What trains requires grad.

    Of a SpeechLM that is the connector, and its language model if its settings say so.
    """
    if recipe.student.model is not None:
        return _build_audio_student(recipe)
    from models.backbones.resolve import BackboneError
    from models.speech_lm.model import SpeechLM, SpeechLMConfig, SpeechLMError

    settings = recipe.model
    try:
        if settings.folder is None:
            model = SpeechLM.from_config(SpeechLMConfig.from_dict(settings.settings))
        else:
            model = SpeechLM.from_pretrained(settings.folder)
    except BackboneError as error:
        raise SourceError(str(error)) from error
    except SpeechLMError as error:
        raise SourceError(f"model.folder: {error}") from error
    except (TypeError, ValueError) as error:
        raise SourceError(f"{'model.settings' if settings.folder is None else 'model.folder'}: {error}") from error
    if settings.fresh_connector:
        model.connector.reset_parameters()
    if settings.feature_statistics is not None:
        copy_feature_statistics(settings.feature_statistics, model)
    if settings.bf16_products:
        use_bf16_products(model.lm.get_decoder())
    return model


def _build_audio_student(recipe: Recipe) -> AudioLM:
    settings = recipe.student
    trains_weights = settings.trains != "lora"  # those of the checkpoint; a LoRA's own are float32 in any case
    dtype = torch_dtype(settings.dtype, pick_device(recipe.run.device, name="run.device"), trains=trains_weights)
    try:
        return AudioLM.from_pretrained(
            settings.model, dtype=dtype, attention=settings.attention, device_map=settings.device_map, trains=settings.trains,
            lora=Lora(**to_dict(settings.lora)), merge=settings.merge,
        )  # fmt: skip
    except AudioLMError as error:
        raise SourceError(f"student.model: {error}") from error


def copy_feature_statistics(folder: str, model: torch.nn.Module) -> None:
    """Give `model` the standardisation of features of the SpeechLM in `folder`, and nothing else of it."""
    try:
        saved = load_file(Path(folder) / "connector.safetensors")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"model.feature_statistics: {folder}: {error}") from error
    for name, buffer in model.connector.named_buffers():
        if name not in saved or saved[name].shape != buffer.shape:
            raise SourceError(f"model.feature_statistics: {folder} has no {name} of shape {tuple(buffer.shape)}")
        buffer.copy_(saved[name])


def check_folders(recipe: Recipe) -> None:
    """Check the files and folders that `recipe` names, and their settings, before a backbone is loaded or fetched.

    Raises:
        SourceError: one is missing, or does not fit the others or the recipe; the message names the keys.
    """
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
        _check_same_clips(key, student, _saved_settings(key, folder))
    if recipe.needs_teacher and recipe.teacher.cache is not None:
        _check_cached_layers(recipe, student)


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


def _saved_settings(key: str, folder: str) -> SpeechLMConfig:
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
            student = _saved_settings(key, recipe.model.folder)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{key}: {error}") from error
    if recipe.model.bf16_products and student.train_lm:
        raise SourceError(f"model.bf16_products: expected a frozen language model, got train_lm true in {key}")
    if recipe.data.packing == "varlen" and student.lm_dtype == "float32":
        raise SourceError(f"data.packing: varlen needs an LM in bfloat16 or float16, got lm_dtype float32 in {key}")
    return student


def _check_same_clips(key: str, student: SpeechLMConfig, teacher: SpeechLMConfig) -> None:
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
        teacher = _saved_settings("teacher.folder", recipe.teacher.folder)
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


def read_examples(recipe: Recipe) -> tuple[list[Any], Path]:
    """The examples of `recipe.data` that have a target, and the root of their audio; it prints the rows that it skips.

    Raises:
        SourceError: no manifest, too many bad rows in it, or no such example.
    """
    from models.data.manifest import ManifestError
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
    for problem in manifest.problems:
        tqdm.write(f"skipped {problem}")
    examples = [e for e in manifest.examples if e.split in settings.splits and (e.target or "").strip()]
    examples = [e for e in examples if not settings.tasks or e.task in settings.tasks]
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
        return _audio_data(model, examples, audio_root, recipe.data, recipe.student.hears)
    settings, hears = recipe.data, recipe.student.hears
    with_features = list(examples)
    check_one_clip(with_features)
    if store is None:
        try:
            store, with_features = _recipe_features(
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


def _recipe_features(
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


def _audio_data(
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


def build_sources(
    recipe: Recipe,
    data: TrainingData,
    model: torch.nn.Module,
    *,
    device: torch.device,
    kept: MutableMapping[str, Source] | None = None,
    ranks: Any = None,
) -> list[Source]:
    """Every teacher of `recipe` for the student `model`, the objective's own first, under the name OWN_TEACHER.

    Call it before training or a checkpoint changes the student: an acoustic teacher is a snapshot of it. If a teacher's
    states of all examples fit into its keep_mib, they are computed once, else in every step.

    Args:
        kept: sources of earlier runs in this process, by a fingerprint of what they depend on. A source that fits is taken from
            there (its layers as they were before any training); a new one is put there.
        ranks: the processes that make a teacher's own features together, as in `build_data`.

    Raises:
        SourceError: a model is not found, or has another tokenizer.
    """

    def one(name: str, settings: SourceConfig) -> Source:
        if kept is None:
            return _build_source(recipe, name, settings, data, model, device, ranks)
        key = _source_fingerprint(recipe, name, settings, depth=len(decoder_layers(model.lm)))
        if key not in kept:
            kept[key] = _build_source(recipe, name, settings, data, model, device, ranks)
        return dataclasses.replace(kept[key], settings=settings, layers=copy.deepcopy(kept[key].layers))

    sources = []
    if recipe.needs_teacher:
        own = SourceConfig(
            role="audio",
            folder=recipe.teacher_spec,
            alpha=recipe.loss.alpha,
            divergence=recipe.loss.divergence,
            jsd_beta=recipe.loss.jsd_beta,
            layers=recipe.layers,
            keep_mib=recipe.teacher.keep_mib,
            hears=recipe.teacher.hears,
        )
        sources.append(one(OWN_TEACHER, own))
    return sources + [one(name, each) for name, each in recipe.sources.items()]


def _source_fingerprint(recipe: Recipe, name: str, settings: SourceConfig, *, depth: int) -> str:
    """Fingerprint of all that a `Source` depends on, except weight and divergence. `depth`: number of the student's layers.

    Which answers the student makes itself is not among it: a source scores them as it scores the others.
    """
    data = {key: value for key, value in to_dict(recipe.data).items() if not key.startswith("on_policy_")}
    depends = {
        "source": [name, settings.role, settings.folder, settings.reasoning, settings.keep_mib, _hears_both(name, settings)],
        "heard": [to_dict(settings.hears), to_dict(recipe.student.hears), recipe.teacher.features, recipe.teacher.negative],
        "layers": to_dict(settings.layers),
        "own": [recipe.teacher.cache, recipe.teacher.batch_examples, recipe.loss.center_text] if name == OWN_TEACHER else [],
        # Projections of a cache are of one objective and head; others are made by each run itself.
        "projected": [recipe.objective, to_dict(recipe.loss), to_dict(recipe.model), to_dict(recipe.student)]
        if name == OWN_TEACHER and recipe.teacher.cache is not None and recipe.teacher.projection
        else [],
        "data": data,
        "student": [depth, recipe.model.bf16_products, recipe.model.prefix_cache_mib],
    }
    if settings.folder is None:  # a snapshot of the student
        depends["student"] += [to_dict(recipe.model), to_dict(recipe.student), recipe.run.seed]
    return fingerprint(depends)


def _build_source(
    recipe: Recipe,
    name: str,
    settings: SourceConfig,
    data: TrainingData,
    model: torch.nn.Module,
    device: torch.device,
    ranks: Any,
) -> Source:
    key = name if name == OWN_TEACHER else f"sources.{name}"
    if name == OWN_TEACHER and (projected := _projected_teacher(recipe, data, model, device)) is not None:
        return Source(name, settings, projected)
    # FSDP2 shards the student's weights: a snapshot that shared them would have only this rank's shard.
    lm, tokenizer = _load_source(key, settings, recipe, model, device, share=recipe.run.parallel != "fsdp2")
    _check_tokenizer(key, settings, model, lm, tokenizer)
    layers = None
    if settings.layers.weight > 0:
        depths = [len(decoder_layers(m)) for m in (model.lm, getattr(lm, "lm", lm))]
        widths = [m.get_output_embeddings().weight.shape[1] for m in (model, lm)]
        layers = LayerDistillation.build(settings.layers, depths=depths, widths=widths)
    if name == OWN_TEACHER and recipe.teacher.cache is not None:
        teacher: Any = _cached_teacher(recipe, data, model, lm, device, layers.teacher_layers if layers else ())
        return Source(name, settings, CenteredTeacher(teacher, data) if recipe.loss.center_text else teacher, layers)
    options = {"device": device, "layers": layers.teacher_layers if layers else ()}
    store = None
    if settings.role == "text":
        teacher = TextTeacher(
            lm, tokenizer, target_ids=model.make_collator().target_ids, end_ids=model.end_ids,
            own_line=isinstance(model, AudioLM), reasoning=settings.reasoning, **options,
        )  # fmt: skip
    else:
        hears = recipe.student.hears if settings.role == "acoustic" else settings.hears
        if isinstance(lm, AudioLM):
            own = _audio_data(lm, data.examples, data.store.audio_root, recipe.data, hears, reader=data.store)
        else:
            own = make_training_data(
                lm,
                data.examples,
                _features_of_source(recipe, name, data, model, lm, hears, device, ranks),
                prefix_cache_mib=recipe.model.prefix_cache_mib,
                layout=recipe.data,
                hears=hears,
            )
        store = own.store
        if _hears_both(name, settings):
            at_once = recipe.teacher.batch_examples if name == OWN_TEACHER else 0
            teacher = LiveTeacher(lm, own, batch_examples=at_once, **options)
        else:
            teacher = ListeningTeacher(lm, own, **options)
    if settings.keep_mib:
        needed_mib = kept_bytes(teacher, data) / (1 << 20)
        if needed_mib <= settings.keep_mib:
            teacher = KeptTeacher(teacher, data, title=f"states of {name}", progress_bar=recipe.run.progress_bar)
            store = None
        else:
            tqdm.write(
                f"{key}.keep_mib: the states of {len(data)} examples need {needed_mib:.0f} MiB, {settings.keep_mib} MiB are "
                "allowed; this teacher runs in every step"
            )
    if name == OWN_TEACHER and recipe.loss.center_text:
        teacher = CenteredTeacher(teacher, data)
    return Source(name, settings, teacher, layers, store)


def _features_of_source(
    recipe: Recipe,
    name: str,
    data: TrainingData,
    model: torch.nn.Module,
    lm: Any,
    hears: Hearing,
    device: torch.device,
    ranks: Any,
) -> Any:
    """What a speech LM hears that teaches: the student's features, where both hear the same, or features of its own."""
    from models.speech_lm.features import FeatureError

    key = name if name == OWN_TEACHER else f"sources.{name}"
    given = recipe.teacher.features if name == OWN_TEACHER else None
    if given is None and hears.of_the_sound() == recipe.student.hears.of_the_sound():
        _check_same_features(f"{key}.folder", model, lm)
        return data.store
    try:
        store, _ = _recipe_features(
            recipe, lm, data.examples, data.audio_root, features=None if given == "encode" else given, hears=hears, ranks=ranks,
            device=device, max_bad_fraction=0.0, name=name,
        )  # fmt: skip
    except FeatureError as error:
        raise SourceError(f"{key}.features: {error}") from error
    return store


def _check_same_features(key: str, model: torch.nn.Module, lm: torch.nn.Module) -> None:
    """SourceError unless a live teacher can use the features that the student's encoder has made."""
    _check_same_clips(key, model.config, lm.config)
    theirs, ours = lm.encoder.state_dict(), model.encoder.state_dict()
    if theirs.keys() != ours.keys() or not all(torch.equal(x.to(ours[name]), ours[name]) for name, x in theirs.items()):
        raise SourceError(f"{key}: expected the student's encoder {model.config.encoder}, got another ({lm.config.encoder})")


def _cached_teacher(
    recipe: Recipe, data: TrainingData, model: torch.nn.Module, lm: Any, device: torch.device, layers: Sequence[int]
) -> CachedTeacher:
    from kdkernels.contrast_cache import ContrastCache
    from models.training.cache_identity import sample_content, teacher_fingerprint

    hears = recipe.teacher.hears
    if isinstance(lm, AudioLM):
        store, _ = open_clips(
            lm, data.examples, audio_root=data.audio_root, max_seconds=recipe.data.max_clip_seconds, hears=hears
        )
        if data.store.gives_the_same_as(store):
            store = data.store
    else:
        store = _comparable(model.config, lm.config, recipe, data)

    def content(example: Any) -> str:
        return sample_content(hears.shown(example), None if store is None else store.rows([example])[0])

    try:
        made_from = teacher_fingerprint(recipe.teacher_spec, hears=hears, negative=recipe.teacher.negative)
        cache = ContrastCache(recipe.teacher.cache, fingerprint=made_from)
        return CachedTeacher(cache, read_head(lm).to(device), device=device, content=content, layers=layers)
    except ValueError as error:
        raise SourceError(f"teacher.cache: {error}") from error


def _projected_teacher(
    recipe: Recipe, data: TrainingData, model: torch.nn.Module, device: torch.device
) -> ProjectedTeacher | None:
    """The teacher from the projections in `teacher.cache`, where some fit: nothing of the teacher is loaded then."""
    from models.training.cache_identity import sample_content, teacher_fingerprint

    hears = recipe.teacher.hears

    def made_from() -> dict[str, Any]:
        return teacher_fingerprint(recipe.teacher_spec, hears=hears, negative=recipe.teacher.negative)

    cache = find_projections(recipe, model, tqdm.write, made_from)
    if cache is None:
        return None
    heard = None
    if not isinstance(model, AudioLM):
        heard = _comparable(model.config, _saved_settings("teacher.folder", recipe.teacher.folder), recipe, data)

    def content(example: Any) -> str:
        return sample_content(hears.shown(example), None if heard is None else heard.rows([example])[0])

    return ProjectedTeacher(cache.get, device=device, content=content, held=cache.content)


def _comparable(student: SpeechLMConfig, teacher: SpeechLMConfig, recipe: Recipe, data: TrainingData) -> Any:
    """The student's features, where the teacher of a cache heard the same ones; None where they cannot be compared."""
    same = all(getattr(student, x) == getattr(teacher, x) for x in ("encoder", "encoder_layers", "audio_frames"))
    return data.store if same and recipe.teacher.hears.of_the_sound() == recipe.student.hears.of_the_sound() else None


def _hears_both(name: str, settings: SourceConfig) -> bool:
    """Whether a source runs on both paths, with the audio and without."""
    return settings.role == "audio" and (name == OWN_TEACHER or settings.alpha > 0 or settings.layers.alpha > 0)


def _check_tokenizer(key: str, settings: SourceConfig, model: torch.nn.Module, lm: Any, tokenizer: Any) -> None:
    """SourceError unless a source's tokens are those of the student, as far as its answers use them."""
    name = f"{key}.folder"
    if not isinstance(model, AudioLM):
        check_same_tokenizer(name, model.tokenizer, tokenizer)
        return
    # An audio LM adds tokens for its audio, which no answer has; but how an answer ends has to be the same.
    name = "teacher.model" if key == OWN_TEACHER else name
    check_same_tokenizer(name, model.tokenizer, tokenizer, added=False)
    if settings.role != "text" and (ours := model.make_collator().end_id) != (theirs := lm.make_collator().end_id):
        raise SourceError(f"{name}: expected answers that end with token {ours}, as the student's do, got {theirs}")


def _load_source(
    key: str, settings: SourceConfig, recipe: Recipe, model: torch.nn.Module, device: torch.device, *, share: bool
) -> tuple[Any, Any]:
    """A source's model, frozen, and its tokenizer; `share`: see `snapshot`."""
    from models.backbones.resolve import BackboneError, load_causal_lm
    from models.speech_lm.model import SpeechLM, SpeechLMError

    if settings.folder is None:
        return snapshot(model, share=share), model.tokenizer
    try:
        if settings.role == "text":
            lm, tokenizer = load_causal_lm(settings.folder, dtype=inference_dtype(device))
        elif isinstance(model, AudioLM):
            own = key == OWN_TEACHER
            dtype = torch_dtype(recipe.teacher.dtype if own else "auto", device)
            lm = AudioLM.from_pretrained(
                settings.folder,
                dtype=dtype,
                attention=recipe.teacher.attention if own else None,
                device_map=recipe.teacher.device_map if own else None,
                negative=recipe.teacher.negative if own else "zeros",
            )
            tokenizer = lm.tokenizer
        else:
            lm = SpeechLM.from_pretrained(settings.folder)
            tokenizer = lm.tokenizer
    except AudioLMError as error:
        raise SourceError(f"{'teacher.model' if key == OWN_TEACHER else f'{key}.folder'}: {error}") from error
    except (BackboneError, SpeechLMError) as error:
        raise SourceError(f"{key}.folder: {error}") from error
    return lm.requires_grad_(False), tokenizer
