"""Build the teachers of a training run, as its recipe says: loaded, compared with the student, kept or read from a cache."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from kdkernels.layer_states import decoder_layers
from models.audio_lms.family import AudioLMError
from models.audio_lms.model import AudioLM
from models.backbones.causal_lm import read_head
from models.backbones.device import inference_dtype
from models.corpora.hearing import Hearing
from models.io_utils import fingerprint
from models.speech_lm.listeners import open_clips, torch_dtype
from models.training.check_folders import check_same_clips, saved_settings
from models.training.layer_distillation import LayerDistillation
from models.training.projected_teacher import ProjectedTeacher, find_projections
from models.training.recipe import Recipe, to_dict
from models.training.recipe_sections import SourceConfig
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
from models.training.training_data import TrainingData, audio_data, make_training_data, recipe_features

if TYPE_CHECKING:
    from models.speech_lm.config import SpeechLMConfig
OWN_TEACHER = "teacher"  # name of the objective's own teacher among the sources


@dataclass(frozen=True)
class _Run:
    """What all teachers of a run are built for."""

    recipe: Recipe
    data: TrainingData
    model: Any
    device: torch.device
    ranks: Any


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
    run = _Run(recipe, data, model, device, ranks)

    def one(name: str, settings: SourceConfig) -> Source:
        if kept is None:
            return _build_source(run, name, settings)
        key = _source_fingerprint(recipe, name, settings, depth=len(decoder_layers(model.lm)))
        if key not in kept:
            kept[key] = _build_source(run, name, settings)
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


def _build_source(run: _Run, name: str, settings: SourceConfig) -> Source:
    recipe, data, model = run.recipe, run.data, run.model
    own = name == OWN_TEACHER
    if own and (projected := _projected_teacher(recipe, data, model, run.device)) is not None:
        return Source(name, settings, projected)
    key = _key(name)
    # FSDP2 shards the student's weights: a snapshot that shared them would have only this rank's shard.
    lm, tokenizer = _load_source(key, settings, recipe, model, run.device, share=recipe.run.parallel != "fsdp2")
    _check_tokenizer(key, settings, model, lm, tokenizer)
    layers = None
    if settings.layers.weight > 0:
        depths = [len(decoder_layers(m)) for m in (model.lm, getattr(lm, "lm", lm))]
        widths = [m.get_output_embeddings().weight.shape[1] for m in (model, lm)]
        layers = LayerDistillation.build(settings.layers, depths=depths, widths=widths)
    taken = layers.teacher_layers if layers else ()
    teacher: Any
    store = None
    if own and recipe.teacher.cache is not None:
        teacher = _cached_teacher(recipe, data, model, lm, run.device, taken)
    elif settings.role == "text":
        teacher = TextTeacher(
            lm, tokenizer, target_ids=model.make_collator().target_ids, end_ids=model.end_ids, device=run.device, layers=taken,
            own_line=isinstance(model, AudioLM), reasoning=settings.reasoning,
        )  # fmt: skip
        teacher, store = _kept_if_it_fits(run, name, settings, teacher, store)
    else:
        teacher, store = _listening_teacher(run, name, settings, lm, taken)
        teacher, store = _kept_if_it_fits(run, name, settings, teacher, store)
    if own and recipe.loss.center_text:
        teacher = CenteredTeacher(teacher, data)
    return Source(name, settings, teacher, layers, store)


def _listening_teacher(
    run: _Run, name: str, settings: SourceConfig, lm: Any, layers: Sequence[int]
) -> tuple[Any, Any]:
    """A live teacher that hears the clips, on one path or both; and what it hears of them."""
    recipe, data = run.recipe, run.data
    hears = recipe.student.hears if settings.role == "acoustic" else settings.hears
    if isinstance(lm, AudioLM):
        own = audio_data(lm, data.examples, data.store.audio_root, recipe.data, hears, reader=data.store)
    else:
        store = _features_of_source(run, name, lm, hears)
        options = {"prefix_cache_mib": recipe.model.prefix_cache_mib, "layout": recipe.data, "hears": hears}
        own = make_training_data(lm, data.examples, store, **options)
    if not _hears_both(name, settings):
        return ListeningTeacher(lm, own, device=run.device, layers=layers), own.store
    at_once = recipe.teacher.batch_examples if name == OWN_TEACHER else 0
    return LiveTeacher(lm, own, device=run.device, layers=layers, batch_examples=at_once), own.store


def _kept_if_it_fits(run: _Run, name: str, settings: SourceConfig, teacher: Any, store: Any) -> tuple[Any, Any]:
    """The teacher's states of all examples and no store, if they fit into `settings.keep_mib`; else what is given."""
    if not settings.keep_mib:
        return teacher, store
    needed_mib = kept_bytes(teacher, run.data) / (1 << 20)
    if needed_mib <= settings.keep_mib:
        return KeptTeacher(teacher, run.data, title=f"states of {name}", progress_bar=run.recipe.run.progress_bar), None
    tqdm.write(
        f"{_key(name)}.keep_mib: the states of {len(run.data)} examples need {needed_mib:.0f} MiB, {settings.keep_mib} MiB are "
        "allowed; this teacher runs in every step"
    )
    return teacher, store


def _key(name: str) -> str:
    """The recipe's key of a source."""
    return name if name == OWN_TEACHER else f"sources.{name}"


def _features_of_source(run: _Run, name: str, lm: Any, hears: Hearing) -> Any:
    """What a speech LM hears that teaches: the student's features, where both hear the same, or features of its own."""
    from models.speech_lm.features import FeatureError

    recipe, data = run.recipe, run.data
    given = recipe.teacher.features if name == OWN_TEACHER else None
    if given is None and hears.of_the_sound() == recipe.student.hears.of_the_sound():
        _check_same_features(f"{_key(name)}.folder", run.model, lm)
        return data.store
    try:
        store, _ = recipe_features(
            recipe, lm, data.examples, data.audio_root, features=None if given == "encode" else given, hears=hears,
            ranks=run.ranks, device=run.device, max_bad_fraction=0.0, name=name,
        )  # fmt: skip
    except FeatureError as error:
        raise SourceError(f"{_key(name)}.features: {error}") from error
    return store


def _check_same_features(key: str, model: torch.nn.Module, lm: torch.nn.Module) -> None:
    """SourceError unless a live teacher can use the features that the student's encoder has made."""
    check_same_clips(key, model.config, lm.config)
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
        cache.check_samples(example.id for example in data.examples)
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
    try:
        cache.check_samples(example.id for example in data.examples)
    except ValueError as error:
        raise SourceError(f"teacher.cache: {error}") from error
    heard = None
    if not isinstance(model, AudioLM):
        heard = _comparable(model.config, saved_settings("teacher.folder", recipe.teacher.folder), recipe, data)

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
