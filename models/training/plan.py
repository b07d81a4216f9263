"""What a training run will need: memory and time of a recipe, before a weight is loaded.

    python -m models plan RECIPE [key=value ...] [--gpu H100] [--gpus 8]
    python -m models plan caad_desta2 --teacher sft_desta2              # the teacher of that recipe, before it is trained

The models' sizes come from their configs (models/training/model_sizes.py). Clips and words are counted in data.manifest, if
there is one. Time is work divided by a rate: 2 FLOP for each weight and token forward, as many for the gradient of the input, as
many for that of a weight that trains, and one more forward with gradient checkpointing. The bodies reach --utilisation of the
GEMM rate in kdkernels' table of GPUs. The loss is predicted by kdkernels itself. Attention's quadratic part, reading clips and
waiting are left out. So these are estimates from below. No recipe has been measured on a GPU here.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.contrast_cache import ContrastCache
from kdkernels.ops.chunking import DeviceModel, known_device, plan_chunks, predict
from models.audio_lms.family import AudioLMError
from models.audio_lms.settings import Lora
from models.corpora.hearing import clip_key
from models.training.commands import plan_parser
from models.training.model_sizes import (
    Sizes,
    UnknownSizeError,
    audio_lm_on_meta,
    encoder_weights,
    sizes_of,
    text_lm_on_meta,
    trained_weights,
)
from models.training.recipe import Recipe, to_dict
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import LayersConfig, SourceConfig
from models.training.teacher_states import SourceError

TOKENS_PER_WORD = 1.4
_CHAT_TOKENS = 20  # of a chat template around a question
_DESCRIPTION_TOKENS = 80  # what a text teacher reads beside its worked examples, which are read once
_PROBED_CLIPS = 200
_ENCODER_POSITIONS_PER_SECOND = 50
_CUDA_BYTES = 1 << 30  # of CUDA's own, and of what its allocator cannot use
_GPUS_A_NODE = 8
_NODE_BYTES_PER_SECOND = 450e9  # NVLink of an H100, in one direction
_NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gbit/s for each GPU
TEACHER_WEIGHTS = "teacher's weights"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Clips:
    """The data of a run, as far as its cost depends on it.

    Attributes:
        examples, clips: rows, and distinct clips among them; 0 = not known.
        seconds: mean length of a clip.
        prompt_tokens: mean of the text's tokens before the answer, without the audio's.
        answer_tokens: mean, with the end of the answer.
        source: of these numbers, in words.
    """

    examples: int = 0
    clips: int = 0
    seconds: float = 10.0
    prompt_tokens: float = 40.0
    answer_tokens: float = 32.0
    source: str = "assumed: there is no manifest"


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        models: a line for each model.
        memory: bytes on each GPU, by what needs them.
        host: bytes of each rank's main memory, by what needs them.
        disk: bytes on disk, of all ranks together, by what needs them.
        seconds: of a step, by what takes them.
        once: seconds before the first step, by what takes them.
        row_tokens: of an example, for the student.
        cache_bytes, cache_seconds: what `python -m models cache` would take; 0 where there is no teacher to store.
    """

    recipe: Recipe
    device_name: str
    device: DeviceModel
    gpus: int
    data: Clips
    models: list[str]
    memory: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]
    seconds: dict[str, float]
    once: dict[str, float]
    row_tokens: float
    cache_bytes: float
    cache_seconds: float

    @property
    def memory_bytes(self) -> float:
        """On each GPU, at the highest point."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.once.values()) + self.recipe.optim.steps * self.step_seconds

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.device.memory_bytes


@dataclass
class _Model:
    """One model of the run: its sizes, and what a clip is for it."""

    sizes: Sizes
    weight_bytes: int
    tokens_per_second: float = 0.0
    window_seconds: float = 0.0
    hears_seconds: float = math.inf
    fixed_audio_tokens: float | None = None  # of a SpeechLM
    encoder_in_step: bool = True
    lm: Any = None
    family: Any = None
    connector: int = 0  # weights of a SpeechLM's

    def audio_tokens(self, seconds: float) -> float:
        if self.fixed_audio_tokens is not None:
            return self.fixed_audio_tokens
        return self.tokens_per_second * min(seconds, self.hears_seconds)

    def encoder_flop(self, seconds: float) -> float:
        """Of a clip, forward."""
        if not self.encoder_in_step:
            return 2.0 * self.connector * (self.fixed_audio_tokens or 0)
        seconds = min(seconds, self.hears_seconds)
        window = math.ceil(seconds / self.window_seconds) * self.window_seconds if self.window_seconds else seconds
        return 2.0 * self.sizes.encoder * _ENCODER_POSITIONS_PER_SECOND * window


def make_plan(
    recipe: Recipe,
    data: Clips,
    *,
    device_name: str = "H100",
    gpus: int = 1,
    utilisation: float = 0.45,
    teacher_recipe: Recipe | None = None,
) -> Plan:
    """Memory and time of `recipe` on `gpus` GPUs.

    `teacher_recipe`: what a SpeechLM teacher will be trained by, where teacher.folder is not there yet.

    Raises:
        ConfigError: settings that this number of GPUs does not allow.
        UnknownSizeError, AudioLMError, SourceError: a model's size is not known; the message names the key.
        ValueError: the GPU is not in the table.
    """
    device = known_device(device_name)
    optim = recipe.optim
    if gpus > 1 and recipe.run.parallel == "none":
        raise ConfigError(f"--gpus: expected 1 with run.parallel=none, got {gpus}; pass run.parallel=ddp or fsdp2")
    if optim.batch_examples % gpus:
        raise ConfigError(f"--gpus: expected a divisor of optim.batch_examples ({optim.batch_examples}), got {gpus}")
    student = _student(recipe)
    estimate = _Estimate(recipe, data, device_name, device, gpus, device.flop_per_second * utilisation, student)
    estimate.add_student()
    if recipe.needs_teacher:
        estimate.add_teacher(_teacher(recipe, teacher_recipe))
    for name, source in recipe.sources.items():
        estimate.add_source(name, source)
    estimate.add_loss()
    estimate.add_exchange()
    return estimate.plan()


class _Estimate:
    """A plan in the making: each `add_*` puts its bytes and seconds beside those of the calls before it.

    Args:
        rate: FLOP a second that the models' bodies reach.
        student: its sizes.
    """

    def __init__(
        self, recipe: Recipe, data: Clips, device_name: str, device: DeviceModel, gpus: int, rate: float, student: _Model
    ) -> None:
        self.recipe, self.data, self.device_name, self.device, self.gpus = recipe, data, device_name, device, gpus
        self.rate, self.student = rate, student
        self.trained = _trained(recipe, student)
        self.sharded = recipe.run.parallel == "fsdp2"
        self.share = gpus if self.sharded else 1
        self.own = recipe.optim.batch_examples // gpus  # examples of a step on one GPU
        self.part = min(self.own, recipe.optim.micro_batch_examples or self.own)
        self.row = data.prompt_tokens + student.audio_tokens(data.seconds) + data.answer_tokens
        self.weights_train = bool(recipe.student.model) and recipe.student.trains == "full"
        self.teacher: _Model | None = None
        self.compared: list[tuple[LayersConfig, Sizes]] = []
        self.projections = 0  # weights between the layers that are compared
        self.transient = 0.0  # bytes of the teacher's forward, before the student's
        self.cache_bytes = self.cache_seconds = 0.0
        self.lines: list[str] = []
        self.memory: dict[str, float] = {}
        self.host: dict[str, float] = {}
        self.disk: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.once: dict[str, float] = {}

    @property
    def run_tokens(self) -> float:
        """Of an example, those that run: with a prefix cache the text before the audio does not."""
        if not self._prefix_bytes:
            return self.row
        return self.student.audio_tokens(self.data.seconds) + self.data.answer_tokens + 2

    @property
    def _prefix_bytes(self) -> float:
        cached = self.student.fixed_audio_tokens is not None and not self.recipe.run.gradient_checkpointing
        return float(self.recipe.model.prefix_cache_mib << 20) if cached else 0.0

    def add_student(self) -> None:
        """Its weights, its forward and backward passes, and the features that it hears."""
        recipe, student, data, trained = self.recipe, self.student, self.data, self.trained
        sizes, is_audio_lm = student.sizes, bool(recipe.student.model)
        self.memory["student's weights"] = student.weight_bytes * sizes.total / self.share + 4.0 * student.connector
        self.memory["gradients and AdamW's moments"] = 12.0 * trained / self.share
        if is_audio_lm and recipe.student.trains == "lora":
            self.memory["student's LoRA"] = 4.0 * trained / self.share
        if student.weight_bytes == 4 and recipe.run.bf16:
            self.memory["student's weights in bfloat16, by autocast"] = 2.0 * sizes.stored_body
        if self._prefix_bytes:
            self.memory["prefix cache, at most"] = self._prefix_bytes
        passes = 2 + self.weights_train + recipe.run.gradient_checkpointing
        flop = passes * 2.0 * sizes.body * self.run_tokens + student.encoder_flop(data.seconds)
        seconds = self.own * flop / self.rate
        tokens = self.run_tokens if is_audio_lm else student.audio_tokens(data.seconds)
        seconds += self.own * 6.0 * (0 if self.weights_train else trained) * tokens / self.rate
        self.seconds["student"] = seconds
        self.lines.append(_describe("student", sizes, f"{quantity(trained)} train"))
        _count_features(recipe, student, data, self.host, self.disk)
        if not is_audio_lm and recipe.data.features is None:
            positions = _ENCODER_POSITIONS_PER_SECOND * student.family.max_audio_seconds
            encoding = 2.0 * sizes.encoder * positions * data.clips / self.rate / self.gpus
            self.once["every clip through the encoder, by all ranks"] = encoding

    def add_teacher(self, teacher: _Model) -> None:
        """The objective's own: live, kept or cached."""
        recipe, data, sizes = self.recipe, self.data, teacher.sizes
        text, answer = data.prompt_tokens, data.answer_tokens
        self.teacher = teacher
        flop = 2 * _reading_flop(teacher, text, answer, data.seconds)  # both paths
        tokens = round(data.examples * answer)
        self.cache_bytes = ContrastCache.estimate_bytes(tokens=tokens, hidden_size=sizes.width)
        self.cache_seconds = data.examples * flop / self.rate
        self.lines.append(_describe("teacher", sizes, "frozen"))
        state_bytes = data.examples * answer * 2 * sizes.width * teacher.weight_bytes
        kept = data.examples > 0 and 0 < state_bytes <= recipe.teacher.keep_mib << 20
        if recipe.teacher.cache is not None:
            self.memory["teacher's LM head"] = 2.0 * sizes.vocabulary * sizes.width
        else:
            self.memory[TEACHER_WEIGHTS] = float(teacher.weight_bytes * sizes.total)
            if kept or recipe.teacher.projection:
                self.once["the teacher's states"] = data.examples * flop / self.rate / self.gpus
            else:
                self.seconds["teacher, both paths"] = self.own * flop / self.rate
            row = text + teacher.audio_tokens(data.seconds) + answer
            self.transient = _forward_bytes(teacher, 2 * self.part * row)
        if kept:
            self.host["teacher's states (teacher.keep_mib)"] = state_bytes
        if recipe.teacher.projection:
            a_token = 8.0 * recipe.teacher.projection + 4 * self.student.sizes.width + 24
            self.disk["teacher's projections, in run.out_dir"] = data.examples * answer * a_token
        self.compared.append((recipe.layers, sizes))

    def add_source(self, name: str, source: SourceConfig) -> None:
        """One of `sources`."""
        flop, needed, described, sizes = _source(self.recipe, name, source, self.student, self.trained, self.data)
        self.lines.append(described)
        self.memory[f"sources.{name}"] = needed
        self.seconds[f"sources.{name}"] = self.own * flop / self.rate
        self.compared.append((source.layers, sizes))

    def add_loss(self) -> None:
        """The loss of the teachers so far, that of their layers, and the highest point of a step's memory."""
        recipe, student, sizes = self.recipe, self.student, self.student.sizes
        theirs = self.teacher.sizes if self.teacher else sizes
        vocabulary = min(sizes.vocabulary, theirs.vocabulary)
        answer, tokens = self.data.answer_tokens, max(1, round(self.own * self.data.answer_tokens))
        heads = len(recipe.sources) + recipe.needs_teacher
        self.seconds["loss"] = predict(
            self.device, n_tokens=tokens, vocab=vocabulary, student_width=sizes.width, teacher_width=theirs.width,
            teacher_gemms=0 if recipe.teacher.projection else heads, teacher_tensors=heads, head_trains=self.weights_train,
        ).seconds  # fmt: skip
        scratch = plan_chunks(
            n_tokens=max(1, round(self.part * answer)), bytes_per_token=4 * (1 + heads) * vocabulary,
            student_width=sizes.width, device_name=self.device_name, chunk_tokens=recipe.loss.chunk_tokens,
        ).scratch_bytes  # fmt: skip
        self.projections = sum(_projection_weights(layers, sizes, other) for layers, other in self.compared)
        if self.projections:
            self.memory["layer projections, float32 with AdamW's moments"] = 16.0 * self.projections / self.share
            self.seconds["layers"] = 6.0 * self.projections * tokens / self.rate
        checkpointing = recipe.run.gradient_checkpointing
        activations = _activation_bytes(student, self.part * self.run_tokens, checkpointing=checkpointing) + scratch
        peak = max(activations, self.transient)
        self.memory["activations and logits of a part"] = peak
        if recipe.data.on_policy_fraction:
            seconds, answering = _answering(recipe, student, self.data, self.own, self.device, self.rate)
            self.seconds["student's answers"] = seconds
            answering += student.weight_bytes * sizes.total * (1 - 1 / self.share)  # whole weights; freed before the loss
            if answering > peak:
                self.memory["student's answers, above that"] = answering - peak
        self.memory["CUDA itself"] = float(_CUDA_BYTES)

    def add_exchange(self) -> None:
        """What the GPUs send each other in a step."""
        if self.gpus == 1:
            return
        stored = self.student.weight_bytes * self.student.sizes.total
        exchange = 3.0 * stored if self.sharded else 2 * 4.0 * (self.trained + self.projections)
        if self.sharded and self.recipe.data.on_policy_fraction:
            exchange += stored / self.recipe.data.on_policy_every_steps
        network = _NODE_BYTES_PER_SECOND if self.gpus <= _GPUS_A_NODE else _NETWORK_BYTES_PER_SECOND
        self.seconds["exchange between GPUs"] = exchange * (self.gpus - 1) / self.gpus / network

    def plan(self) -> Plan:
        """All that was added."""
        return Plan(
            self.recipe, self.device_name, self.device, self.gpus, self.data, self.lines, self.memory, self.host, self.disk,
            self.seconds, self.once, self.row, self.cache_bytes, self.cache_seconds,
        )  # fmt: skip


def _student(recipe: Recipe) -> _Model:
    if recipe.student.model:
        return _audio_model("student.model", recipe.student.model, _weight_bytes(recipe.student.dtype, recipe.student.trains))
    settings, key = _speech_settings(recipe.model.folder, recipe.model.settings)
    return _speech_model(f"model.{key}", settings)


def _teacher(recipe: Recipe, made_by: Recipe | None) -> _Model:
    spec = str(recipe.teacher_spec)
    if recipe.student.model:
        return _audio_model("teacher.model", spec, _weight_bytes(recipe.teacher.dtype, None))
    if made_by is not None:
        settings = _speech_settings(made_by.model.folder, made_by.model.settings)[0]
    elif (Path(spec) / "speech_lm.json").is_file():
        settings = _speech_settings(spec, {})[0]
    else:
        raise SourceError(
            f"teacher.folder: expected a folder with speech_lm.json, got {spec}; where the teacher is not trained yet, --teacher "
            "names the recipe that will make it"
        )
    teacher = _speech_model("teacher.folder", settings)
    teacher.encoder_in_step = False
    return teacher


def _weight_bytes(dtype: str, trains: str | None) -> int:
    if dtype == "auto":
        return 2 if trains in (None, "lora") else 4
    return _BYTES[dtype]


def _audio_model(key: str, spec: str, weight_bytes: int) -> _Model:
    try:
        lm, family, known_from = audio_lm_on_meta(spec)
    except (UnknownSizeError, AudioLMError) as error:
        raise SourceError(f"{key}: {error}") from None
    return _Model(
        sizes_of(spec, lm, family, known_from), weight_bytes, family.tokens_per_second, family.window_seconds,
        family.hears_seconds or math.inf, lm=lm, family=family,
    )  # fmt: skip


def _speech_settings(folder: str | None, settings: dict[str, Any]) -> tuple[Any, str]:
    from models.speech_lm.config import SpeechLMConfig
    from models.speech_lm.saving import SpeechLMError, read_record

    if folder is None:
        try:
            return SpeechLMConfig.from_dict(settings), "settings"
        except (TypeError, ValueError) as error:
            raise SourceError(f"model.settings: {error}") from None
    try:
        return read_record(Path(folder))[0], "folder"
    except SpeechLMError as error:
        raise SourceError(f"{error}") from None


def _speech_model(key: str, config: Any) -> _Model:
    import torch

    from models.speech_lm.connector import Connector

    try:
        lm, known_from = text_lm_on_meta(config.lm)
        weights, width, _ = encoder_weights(config.encoder)
    except (UnknownSizeError, AudioLMError) as error:
        raise SourceError(f"{key}: {error}") from None
    sizes = sizes_of(config.lm, lm, None, known_from)
    shape = dataclasses.replace(config, encoder_dim=width).connector_config(sizes.width)
    with torch.device("meta"):
        connector = sum(p.numel() for p in Connector(shape).parameters())
    sizes = dataclasses.replace(sizes, encoder=weights, total=sizes.total + weights)
    model = _Model(sizes, _BYTES[config.lm_dtype], fixed_audio_tokens=config.num_queries, encoder_in_step=False)
    model.connector = connector
    model.family = config
    return model


def _trained(recipe: Recipe, student: _Model) -> int:
    if recipe.student.model:
        lora = Lora(**to_dict(recipe.student.lora))
        return trained_weights(student.lm, student.family, recipe.student.trains, lora)
    return student.connector + (student.sizes.total - student.sizes.encoder if student.family.train_lm else 0)


def _count_features(
    recipe: Recipe, student: _Model, data: Clips, host: dict[str, float], disk: dict[str, float]
) -> None:
    """What a SpeechLM's loader holds: features of every distinct clip, float16, on disk; a rank has a shard in memory while it
    encodes. So are a live teacher's own. An audio LM's clips are decoded batch by batch.
    """
    if recipe.student.model:
        return
    config = student.family
    _, width, _ = encoder_weights(config.encoder)
    one = len(config.encoder_layers) * config.audio_frames * width * 2
    if recipe.data.features is None:
        disk[f"features of {data.clips:,} clips"] = float(one * data.clips)
    teacher_encodes = recipe.teacher_encodes and recipe.teacher.features in (None, "encode")
    if teacher_encodes and recipe.needs_teacher and recipe.teacher.cache is None:
        disk["features of the teacher's own"] = float(one * data.clips)
    if disk:
        host["a shard of features, while they are made"] = min(recipe.features.shard_mib * (1 << 20), float(one * data.clips))


def _reading_flop(model: _Model, text: float, answer: float, seconds: float) -> float:
    """Of one path of one example, forward."""
    return 2.0 * model.sizes.body * (text + model.audio_tokens(seconds) + answer) + model.encoder_flop(seconds)


def _source(
    recipe: Recipe, name: str, source: SourceConfig, student: _Model, trained: int, data: Clips
) -> tuple[float, float, str, Sizes]:
    """(FLOP an example, bytes on the GPU, description, sizes) of one of `sources`."""
    if source.folder is None:
        copied = student.weight_bytes * student.sizes.total if recipe.run.parallel == "fsdp2" else 4.0 * trained
        flop = _reading_flop(student, data.prompt_tokens, data.answer_tokens, data.seconds)
        return flop, copied, f"sources.{name}: the student as it is at the start", student.sizes
    key = f"sources.{name}.folder"
    if source.role == "text":
        try:
            lm, known_from = text_lm_on_meta(source.folder)
        except (UnknownSizeError, AudioLMError) as error:
            raise SourceError(f"{key}: {error}") from None
        sizes = sizes_of(source.folder, lm, None, known_from)
        flop = 2.0 * sizes.body * (_DESCRIPTION_TOKENS + data.answer_tokens)
        return flop, 2.0 * sizes.total, _describe(f"sources.{name}", sizes, "reads text"), sizes
    if recipe.student.model:
        model = _audio_model(key, source.folder, 2)
    else:
        model = _speech_model(key, _speech_settings(source.folder, {})[0])
    both = 2 if source.role == "audio" and (source.alpha > 0 or source.layers.alpha > 0) else 1
    flop = both * _reading_flop(model, data.prompt_tokens, data.answer_tokens, data.seconds)
    needed = float(model.weight_bytes * model.sizes.total)
    return flop, needed, _describe(f"sources.{name}", model.sizes, "frozen"), model.sizes


def _answering(
    recipe: Recipe, student: _Model, data: Clips, own: int, device: DeviceModel, rate: float
) -> tuple[float, float]:
    """Seconds of a step, on average, in which the student makes answers, and bytes of its KV cache, at most.

    A batch goes on until its longest answer ends, and each of its tokens reads the language model's weights.
    """
    settings = recipe.data
    sizes, tokens = student.sizes, settings.on_policy_max_new_tokens
    answers = own * settings.on_policy_fraction
    batches = math.ceil(answers / settings.on_policy_batch_examples)
    read = student.weight_bytes * (sizes.stored_body + sizes.vocabulary * sizes.width)
    prompt = data.prompt_tokens + student.audio_tokens(data.seconds)
    flop = answers * (2.0 * sizes.body * (prompt + tokens) + student.encoder_flop(data.seconds))
    rows = min(math.ceil(answers), settings.on_policy_batch_examples)
    cache = 4.0 * sizes.layers * sizes.width * rows * (prompt + tokens)  # with fewer heads of keys it is smaller
    return (batches * tokens * read / device.bytes_per_second + flop / rate) / settings.on_policy_every_steps, cache


def _projection_weights(layers: Any, student: Sizes, teacher: Sizes) -> int:
    if not layers.weight:
        return 0
    pairs = len(layers.layer_pairs(student.layers, teacher.layers))
    if layers.form == "attention":
        return pairs * student.width * (student.width + 2 * teacher.width)
    return 0 if student.width == teacher.width else pairs * student.width * teacher.width  # equal widths need no projection


def _activation_bytes(model: _Model, tokens: float, *, checkpointing: bool) -> float:
    """What the backward pass needs of the forward one, in bfloat16.

    A layer keeps its norms' inputs in float32 and as many halves (12 widths), attention's parts (4) and the MLP's (4 times its
    width, 2 bytes each). With checkpointing each layer keeps its input, and one layer at a time keeps the rest.
    """
    sizes = model.sizes
    layer = tokens * (20.0 * sizes.width + 8.0 * sizes.mlp_width)
    if checkpointing:
        return 2.0 * tokens * sizes.width * sizes.layers + layer
    return layer * sizes.layers


def _forward_bytes(model: _Model, tokens: float) -> float:
    """Of a forward pass without gradient: one layer at a time."""
    return tokens * (8.0 * model.sizes.width + 6.0 * model.sizes.mlp_width)


def count_clips(recipe: Recipe, *, assumed: Clips) -> Clips:
    """The data of the recipe's manifest; `assumed` where it names none, and for what cannot be counted in it."""
    if not recipe.data.manifest:
        return assumed
    from models.data.audio import AudioError, check_span, probe_audio
    from models.data.manifest import ManifestError
    from models.data.prompts import chat_text
    from models.data.readers import read_data

    settings = recipe.data
    try:
        manifest = read_data(
            settings.manifest, form=settings.form, audio_root=settings.audio_root, check_audio=False,
            max_bad_fraction=settings.max_bad_fraction, allow_links=settings.allow_links,
        )  # fmt: skip
    except ManifestError as error:
        raise SourceError(f"data.manifest: {error}") from error
    chosen = [e for e in manifest.examples if e.split in settings.splits and (e.target or "").strip()]
    chosen = [e for e in chosen if not settings.tasks or e.task in settings.tasks]
    if not chosen:
        raise SourceError(f"data: no example with a target in {settings.manifest} (splits {list(settings.splits)})")
    clips = {clip_key(e): e for e in chosen if e.audio is not None}  # several clips of a row count as one
    some = list(clips.values())[:: max(1, len(clips) // _PROBED_CLIPS)]
    seconds = []
    for example in some:
        try:
            heard = 0.0
            for audio, start, end in example.clips:
                info = probe_audio(manifest.audio_root / audio)
                span = check_span(info, start_seconds=start, end_seconds=end, max_seconds=settings.max_clip_seconds)
                heard += span[1] - span[0]
            seconds.append(heard)
        except AudioError:
            continue
    read = [recipe.student.hears.shown(e) for e in chosen[:: max(1, len(chosen) // 10_000)]]
    return Clips(
        len(chosen),
        len(clips),
        sum(seconds) / len(seconds) if seconds else assumed.seconds,
        _CHAT_TOKENS + TOKENS_PER_WORD * sum(len(f"{e.system} {chat_text(e)}".split()) for e in read) / len(read),
        1 + TOKENS_PER_WORD * sum(len((e.target or "").split()) for e in read) / len(read),
        f"counted in {settings.manifest}: {TOKENS_PER_WORD:g} tokens a word",
    )


# --- in words ---------------------------------------------------------------------------------------------------------------


def quantity(count: float) -> str:
    """1_234_567 -> "1.23 million"."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,.0f}"


def size(count: float) -> str:
    """Bytes as "3.4 GiB" or "120 MiB"."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):,.1f} GiB"
    return f"{count / (1 << 20):,.0f} MiB" if count >= 1 << 20 else f"{count / 1024:,.0f} KiB"


def duration(seconds: float) -> str:
    """Seconds as "0.42 s", "12 min", "3 h 5 min" or "2 days 4 h"."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"


def _describe(role: str, sizes: Sizes, what: str) -> str:
    where = "" if sizes.known_from == "config" else ", sizes from the table"
    experts = f" (a token uses {quantity(sizes.body)} of its layers')" if sizes.body < sizes.stored_body else ""
    return f"{role}: {sizes.name}, {quantity(sizes.total)} weights{experts}, {sizes.layers} layers, {what}{where}"


def as_text(name: str, plan: Plan) -> str:
    """The plan as lines for the terminal."""
    optim, data = plan.recipe.optim, plan.data
    gpus = "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs"
    lines = [f"{name}: objective {plan.recipe.objective} on {gpus} {plan.device_name} ({size(plan.device.memory_bytes)} each)"]
    lines += [f"  {line}" for line in plan.models]
    drawn = optim.steps * optim.batch_examples
    lines.append(f"data: {optim.steps:,} steps of {optim.batch_examples} examples")
    if data.examples:
        lines[-1] += f", {drawn / data.examples:.3g} passes over {data.examples:,} examples of {data.clips:,} clips"
    row = f"{plan.row_tokens:.0f} tokens a row, {data.answer_tokens:.0f} of them answer"
    lines.append(f"  {data.seconds:.3g} s a clip, {row} ({data.source})")
    lines.append(f"memory of each GPU: {size(plan.memory_bytes)}" + ("" if plan.fits else ", MORE THAN IT HAS"))
    lines += [f"  {size(value):>10}  {label}" for label, value in plan.memory.items()]
    if plan.host:
        lines.append("main memory of each rank, beside the weights while they load:")
        lines += [f"  {size(value):>10}  {label}" for label, value in plan.host.items()]
    lines += [f"on disk: {size(value)}, {label}" for label, value in plan.disk.items()]
    lines.append(f"time: {duration(plan.step_seconds)} a step, {duration(plan.total_seconds)} in all")
    lines += [f"  {duration(value):>10}  {label}" for label, value in plan.seconds.items()]
    lines += [f"  {duration(value):>10}  once, before the first step: {label}" for label, value in plan.once.items() if value]
    per_step = plan.seconds.get("teacher, both paths", 0.0)
    if per_step and data.examples:
        saved = f"{duration(per_step * optim.steps)} of each GPU and {size(plan.memory[TEACHER_WEIGHTS])} of its memory"
        lines.append(
            f"a cache of the teacher: {size(plan.cache_bytes)}, {duration(plan.cache_seconds)} of one GPU once; it saves {saved}"
        )
    if not plan.fits:
        lines.append(f"it does not fit. What helps: {'; '.join(_what_helps(plan))}")
    lines.append("estimates from sizes and rates, not measured; docs/training.md says what they leave out")
    return "\n".join(lines)


def _what_helps(plan: Plan) -> list[str]:
    recipe = plan.recipe
    part = recipe.optim.micro_batch_examples or recipe.optim.batch_examples
    found = []
    layers = any(layers.weight > 0 for _, layers in recipe.compared_layers())
    if not recipe.run.gradient_checkpointing and not layers:
        found.append("run.gradient_checkpointing=true")
    if part > 1:
        found.append(f"optim.micro_batch_examples={part // 2}")
    if recipe.run.parallel != "fsdp2":
        found.append("run.parallel=fsdp2 on several GPUs")
    if recipe.needs_teacher and recipe.teacher.cache is None:
        found.append("teacher.cache")
    return found or ["a GPU with more memory"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    arguments = plan_parser().parse_args(argv)
    try:
        for name in ("gpus", "clips", "clip_seconds", "prompt_tokens", "answer_tokens"):
            value = getattr(arguments, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: expected a number above 0, got {value:g}")
        if not 0 < arguments.utilisation <= 1:
            raise ValueError(f"--utilisation: expected a number in (0, 1], got {arguments.utilisation:g}")
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        data = count_clips(recipe, assumed=Clips())
        given = {
            "examples": arguments.clips, "clips": arguments.clips, "seconds": arguments.clip_seconds,
            "prompt_tokens": arguments.prompt_tokens, "answer_tokens": arguments.answer_tokens,
        }  # fmt: skip
        data = dataclasses.replace(data, **{name: value for name, value in given.items() if value is not None})
        plan = make_plan(
            recipe, data, device_name=arguments.gpu, gpus=arguments.gpus, utilisation=arguments.utilisation,
            teacher_recipe=load_recipe(arguments.teacher) if arguments.teacher else None,
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError) as error:  # ConfigError, SourceError and their like
        message = str(error).replace("device_name", "--gpu")
        print(f"error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(as_text(arguments.recipe, plan))
    return 0
