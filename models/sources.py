"""What a training step is fed with: examples as batches, and the teacher's hidden states, live or from a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from kdkernels.layer_mse import LayerProjections
from kdkernels.layer_states import decoder_layers
from kdkernels.teacher import DualPathTeacher, LMHead, MarkAbsent
from models.config import LayersConfig, Recipe
from models.frozen_linear import use_bf16_products


class SourceError(RuntimeError):
    """Data or a model of the recipe is missing or unusable; the message says which and what was expected."""


@dataclass(frozen=True)
class TeacherStates:
    """What the frozen teacher says about the N target tokens of a batch, before its LM head.

    audio_hidden: (N, H_t); text_hidden: (N, H_t) or None; head: weight, bias, softcap, logit_scale of the LM head;
    audio_layers, text_layers: (N, K, H_t), the layers the recipe compares, or None.
    """

    audio_hidden: torch.Tensor
    text_hidden: torch.Tensor | None
    head: Any
    audio_layers: torch.Tensor | None = None
    text_layers: torch.Tensor | None = None

    def at(self, positions: torch.Tensor) -> TeacherStates:
        """Those of the target tokens `positions`, (n,) int64."""
        positions = positions.to(self.audio_hidden.device, non_blocking=True)
        names = ("audio_hidden", "text_hidden", "audio_layers", "text_layers")
        chosen = {name: getattr(self, name)[positions] for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self, **chosen)


@dataclass
class TrainingData:
    """Examples, the recipe of a batch, and the order in which they are drawn.

    Args:
        examples: manifest examples that have a target.
        make_batch: examples -> a batch with `ids`, `target_index`, `target`, `target_row`, `choice_mask`,
            `model_inputs()` and `to(device)` (models/batching.py).
        extra_inputs: added to every batch's model inputs, such as the prefix cache.
        store: the clips' features, for a live teacher that makes its own batches.
        crop: takes out of a batch what none of its targets depends on; None leaves it as it is.
    """

    examples: Sequence[Any]
    make_batch: Callable[[Sequence[Any]], Any]
    extra_inputs: Mapping[str, Any] = field(default_factory=dict)
    store: Any = None
    crop: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, cursor: int, count: int, *, seed: int) -> list[int]:
        """Rows `cursor` to `cursor + count` of the endless shuffled stream: every epoch is its own permutation.

        A function of its arguments alone, so the position in the data is one number.
        """
        n = len(self.examples)
        rows: list[int] = []
        while len(rows) < count:
            epoch, start = divmod(cursor + len(rows), n)
            order = np.random.default_rng([seed, epoch]).permutation(n)
            rows += order[start : start + count - len(rows)].tolist()
        return rows

    def model_inputs(self, batch: Any) -> dict[str, Any]:
        """The keyword arguments of the model for `batch`."""
        return {**batch.model_inputs(), **self.extra_inputs}


class LiveTeacher:
    """Runs the frozen teacher on each batch: both paths in one pass (kdkernels.DualPathTeacher).

    Args:
        lm: the teacher's SpeechLM.
        data: how its batches are made; its prompt may use another number of audio tokens than the student's.
        device: where it runs.
        layers: whose states are handed out as well.
    """

    def __init__(
        self, lm: torch.nn.Module, data: TrainingData, *, device: torch.device, layers: Sequence[int] = ()
    ) -> None:
        self._teacher = DualPathTeacher(lm.to(device).eval(), negative=MarkAbsent("audio_present"), layers=layers)
        self._data = data
        self._device = device

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        own = self._data.make_batch(examples)
        _same_targets(own, batch)
        own = (self._data.crop(own) if self._data.crop else own).to(self._device)
        states = self._teacher(self._data.model_inputs(own), own.target_index)
        return TeacherStates(
            states.audio_hidden, states.text_hidden, self._teacher.head, states.audio_layers, states.text_layers
        )


class CachedTeacher:
    """Reads the teacher's hidden states from a ContrastCache; the teacher's body is never run.

    Args:
        cache: an open kdkernels.ContrastCache.
        head: the teacher's LM head, on the device of the loss.
    """

    def __init__(self, cache: Any, head: Any, *, device: torch.device) -> None:
        self._cache = cache
        self._head = head
        self._device = device

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        try:
            states = self._cache.get(batch.ids)
        except KeyError as error:
            raise SourceError(f"teacher.cache: {error.args[0] if error.args else error}") from error
        if not torch.equal(states.target, batch.target.cpu()):
            raise SourceError(f"teacher.cache: made for other targets than those of the batch {batch.ids[0]} ...")
        dtype = self._head.weight.dtype
        audio, text = (h.to(self._device, dtype) for h in (states.audio_hidden, states.text_hidden))
        return TeacherStates(audio, text, self._head)


@torch.no_grad()
def path_divergence(states: TeacherStates, *, chunk_tokens: int = 256) -> torch.Tensor:
    """KL(softmax z_audio || softmax z_text) of each token, (N,) float32, in chunks of `chunk_tokens` rows of logits."""
    if states.text_hidden is None:
        raise ValueError("states: expected both paths, got no text_hidden")
    out = []
    for start in range(0, len(states.audio_hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        audio, text = (
            F.log_softmax(states.head.logits(hidden[rows]).float(), dim=-1)
            for hidden in (states.audio_hidden, states.text_hidden)
        )
        out.append((audio.exp() * (audio - text)).sum(-1).clamp(min=0))
    return torch.cat(out) if out else states.audio_hidden.new_zeros(0)


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The SpeechLM of `recipe.model`, its connector the only part that requires grad."""
    from models.backbones import BackboneError
    from models.speech_lm import SpeechLM, SpeechLMConfig, SpeechLMError

    settings = recipe.model
    try:
        if settings.folder is None:
            return SpeechLM.from_config(SpeechLMConfig.from_dict(settings.settings))
        model = SpeechLM.from_pretrained(settings.folder)
    except BackboneError as error:
        raise SourceError(str(error)) from error
    except SpeechLMError as error:
        raise SourceError(f"model.folder: {error}") from error
    except (TypeError, ValueError) as error:
        raise SourceError(f"model.settings: {error}") from error
    if settings.fresh_connector:
        model.connector.reset_parameters()
    if settings.feature_statistics is not None:
        copy_feature_statistics(settings.feature_statistics, model)
    if settings.bf16_products:
        if model.config.train_lm:
            raise SourceError("model.bf16_products: expected a frozen language model, got train_lm true")
        use_bf16_products(model.lm.get_decoder())
    return model


def copy_feature_statistics(folder: str, model: torch.nn.Module) -> None:
    """Give `model` the standardisation of another SpeechLM's features, read from its folder; nothing else of it is loaded."""
    try:
        saved = load_file(Path(folder) / "connector.safetensors")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"model.feature_statistics: {folder}: {error}") from error
    for name, buffer in model.connector.named_buffers():
        if name not in saved or saved[name].shape != buffer.shape:
            raise SourceError(f"model.feature_statistics: {folder} has no {name} of shape {tuple(buffer.shape)}")
        buffer.copy_(saved[name])


def check_folders(recipe: Recipe) -> None:
    """Whether the files and folders that `recipe` names are there: asked before a backbone is loaded or fetched.

    Raises:
        SourceError: one is missing; the message names the key.
    """
    wanted = [("data.features", recipe.data.features, "")]
    wanted += [(f"model.{name}", getattr(recipe.model, name), "speech_lm.json") for name in ("folder", "feature_statistics")]
    if recipe.needs_teacher:
        wanted += [("teacher.folder", recipe.teacher.folder, "speech_lm.json")]
        wanted += [("teacher.cache", recipe.teacher.cache, "cache.json")]
    for key, given, inside in wanted:
        if given is not None and not (Path(given) / inside).is_file():
            raise SourceError(f"{key}: expected {'a folder with ' + inside if inside else 'a file'}, got {given}")


def read_examples(recipe: Recipe) -> tuple[list[Any], Path]:
    """The examples of `recipe.data` that have a target, and the root of their audio; skipped rows are listed.

    Raises:
        SourceError: no manifest, too many bad rows in it, or no such example.
    """
    from models.data.manifest import ManifestError, read_manifest

    settings = recipe.data
    if not settings.manifest:
        raise SourceError("data.manifest: expected a file, got none")
    try:
        manifest = read_manifest(
            settings.manifest,
            audio_root=settings.audio_root,
            max_bad_fraction=settings.max_bad_fraction,
            check_audio=settings.features is None,
            max_seconds=settings.max_clip_seconds,
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
            f"{list(settings.tasks) or 'all'}); targets are written by python -m models.pseudo_gt"
        )
    return examples, manifest.audio_root


def build_data(recipe: Recipe, model: torch.nn.Module, examples: Sequence[Any], audio_root: Path) -> TrainingData:
    """`examples` batched for `model`, with their features and prefix cache.

    A model without a history (no `model.folder`, no `model.feature_statistics`) gets the standardisation of these features.
    """
    from models.features import FeatureError, FeatureStore, extract_features

    settings = recipe.data
    try:
        if settings.features is not None:
            store = FeatureStore.load(settings.features)
        else:
            store, problems = extract_features(
                examples,
                model.encode_audio,
                audio_root=audio_root,
                max_seconds=settings.max_clip_seconds,
                max_bad_fraction=settings.max_bad_fraction,
                progress_bar=recipe.run.progress_bar,
            )
            for example_id, reason in problems:
                tqdm.write(f"skipped {example_id}: {reason}")
    except FeatureError as error:
        raise SourceError(f"data: {error}") from error
    with_features = [e for e in examples if e.audio is None or e in store]
    if len(examples) - len(with_features) > settings.max_bad_fraction * len(examples):
        raise SourceError(f"data.features: {settings.features} lacks {len(examples) - len(with_features)} of the clips")
    if settings.features is not None:
        for example in examples:
            if example.audio is not None and example not in store:
                tqdm.write(f"skipped {example.id}: {settings.features} lacks its clip")
    if recipe.model.folder is None and recipe.model.feature_statistics is None:
        model.fit_feature_statistics(store.rows([e for e in with_features if e.audio is not None]))
    # Activation checkpointing drops the KV cache, so the two exclude each other.
    cached = not recipe.run.gradient_checkpointing and not model.config.train_lm
    return make_training_data(model, with_features, store, prefix_cache_mib=recipe.model.prefix_cache_mib if cached else 0)


def make_training_data(
    model: torch.nn.Module, examples: Sequence[Any], store: Any, *, prefix_cache_mib: int = 4096
) -> TrainingData:
    """Batches of `examples` for `model` (a SpeechLM), their features taken from `store` (a FeatureStore)."""
    collator = model.make_collator()

    def make_batch(chosen: Sequence[Any]) -> Any:
        return collator(chosen, store.rows(chosen))

    extra = {"prefix_cache": model.make_prefix_cache(max_bytes=prefix_cache_mib << 20)} if prefix_cache_mib else {}
    return TrainingData(examples, make_batch, extra, store, crop_to_targets)


def crop_to_targets(batch: Any) -> Any:
    """A `SpeechBatch` without the tokens that stand after each row's last predicting position.

    A causal model's states do not depend on what follows: the last token of Y is never read, and with weights on the answer
    alone nothing behind the answer is. Rows without a target are left whole. On the CPU, before the batch moves.
    """
    rows, columns = batch.input_ids.shape
    row, column = batch.target_index // columns, batch.target_index % columns
    last = torch.full((rows,), -1).scatter_reduce(0, row, column, "amax")
    last = torch.where(last < 0, columns - 1, last)
    width = int(last.max()) + 1
    mask = batch.attention_mask * (torch.arange(columns) <= last[:, None])
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:, :width].contiguous(),
        attention_mask=mask[:, :width].contiguous(),
        target_index=row * width + column,
    )


def build_teacher(
    recipe: Recipe, data: TrainingData, model: torch.nn.Module, *, device: torch.device
) -> tuple[Callable[[Any, Sequence[Any]], TeacherStates] | None, LayerDistillation | None]:
    """The teacher's side of `recipe` for the student `model`: its states (from its cache, or a live model that reads the same
    clips as the student), and the layers that are compared; None where there is none."""
    if not recipe.needs_teacher:
        return None, None
    from models.speech_lm import SpeechLM

    settings = recipe.teacher
    try:
        lm = SpeechLM.from_pretrained(settings.folder)
    except RuntimeError as error:  # BackboneError and SpeechLMError both are
        raise SourceError(f"teacher.folder: {error}") from error
    if settings.cache is not None:
        from kdkernels.contrast_cache import ContrastCache

        head = LMHead.from_model(lm.to(device))
        try:
            cache = ContrastCache(settings.cache)
        except ValueError as error:
            raise SourceError(f"teacher.cache: {error}") from error
        return CachedTeacher(cache, head, device=device), None
    cache_mib = 0 if lm.config.train_lm else recipe.model.prefix_cache_mib
    own = make_training_data(lm.requires_grad_(False), data.examples, data.store, prefix_cache_mib=cache_mib)
    layers = None
    if recipe.layers.weight > 0:
        depths = [len(decoder_layers(m.lm)) for m in (model, lm)]
        widths = [m.get_output_embeddings().weight.shape[1] for m in (model, lm)]
        layers = LayerDistillation.build(recipe.layers, depths=depths, widths=widths)
    return LiveTeacher(lm, own, device=device, layers=layers.teacher_layers if layers else ()), layers


class LayerDistillation(torch.nn.Module):
    """Which layers of student and teacher are compared, and the projections between their widths, which train.

    Args:
        settings: the recipe's `layers`.
        pairs: (student, teacher) layers; one layer may stand in several pairs.
        projections: of those pairs.
    """

    def __init__(self, settings: LayersConfig, pairs: Sequence[tuple[int, int]], projections: LayerProjections) -> None:
        super().__init__()
        self.settings = settings
        self.pairs = list(pairs)
        self.projections = projections
        self.student_layers, self.teacher_layers = (sorted(set(side)) for side in zip(*pairs, strict=True))

    @classmethod
    def build(cls, settings: LayersConfig, *, depths: Sequence[int], widths: Sequence[int]) -> LayerDistillation:
        """For a student and a teacher of these depths and widths."""
        pairs = settings.layer_pairs(*depths)
        projections = LayerProjections(*widths, pairs, direction=settings.direction, identity_where_equal=True)
        return cls(settings, pairs, projections)

    def loss(self, student: torch.Tensor, states: TeacherStates, counts: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        """Mean over pairs of the squared errors of the tokens that count, divided by `normalizer`.

        Args:
            student: (N, K, H_s), its layers in the order of `student_layers`.
            counts: (N,) bool.
        """
        def take(stacked: torch.Tensor, layers: list[int], side: int) -> list[torch.Tensor]:
            return [stacked[:, layers.index(pair[side])] for pair in self.pairs]

        text = self.settings.alpha > 0 and states.text_layers is not None
        total = self.projections(
            take(student, self.student_layers, 0),
            take(states.audio_layers, self.teacher_layers, 1),
            teacher_text_hidden=take(states.text_layers, self.teacher_layers, 1) if text else None,
            alpha=self.settings.alpha if text else 0.0,
            normalize=self.settings.normalize,
            mask=counts,
            layer_weight=[1.0 / len(self.pairs)] * len(self.pairs),
            reduction="sum",
        )
        return total / normalizer.clamp_min(1)


def _same_targets(own: Any, batch: Any) -> None:
    if own.target.shape != batch.target.shape:
        raise SourceError(
            f"teacher and student: the batch of {batch.ids[0]} ... has {len(own.target)} and {len(batch.target)} target "
            "tokens; distillation by token needs one tokenizer"
        )
