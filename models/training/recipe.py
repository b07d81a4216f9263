"""Recipes: all settings of a training run, in one checked file.

A recipe is a YAML file with the sections of `Recipe`; `key=value` words on the command line override its values:

    python -m models train caad loss.alpha=1 optim.steps=300 run.out_dir=runs/caad1

The first word is a name from models/training/recipes or the path of a file. Every key is checked. For an unknown key the error
names the nearest known one, and the file (or the command line) that the key came from. Keys have their units in their names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdkernels.layer_mse import DIRECTIONS, LAYER_MAPS, layer_map
from kdkernels.ops.dispatch import IMPLEMENTATIONS
from kdkernels.ops.rows import DIVERGENCES
from models.audio_lms.settings import DTYPES, NEGATIVES, TRAINS, Lora
from models.corpora.hearing import Hearing
from models.data.commands import FORMS
from models.data.manifest import SPLITS
from models.speech_lm.commands import LOG_MELS, RESAMPLERS
from models.training.commands import RECIPES_DIR

OBJECTIVES = ("sft", "ce_only", "kd", "sharpened", "caad", "caad+", "sources")
TEACHER_OBJECTIVES = ("kd", "sharpened", "caad", "caad+")
PARALLEL = ("none", "ddp", "fsdp2")
# Objective caad+ adds these settings to caad: the best of those tried on the dev split of models/experiments/six_systems.py.
CAAD_PLUS = {"alpha": 4.0, "center_text": True}
ROLES = ("audio", "text", "acoustic")
PACKINGS = ("none", "pack", "varlen")
TOKEN_WEIGHTS = ("uniform", "choice", "divergence")
AVERAGES = ("tokens", "samples")
LAYER_FORMS = ("projection", "attention")


class ConfigError(ValueError):
    """A recipe, or an override of it, is wrong; the message names the key and where it was written."""


@dataclass(frozen=True)
class DataConfig:
    """Which examples are trained on."""

    manifest: str = ""  # JSONL manifest (models/data/manifest.py), or rows of another form (models/data/readers.py)
    # Form of the rows. auto = found by the rows; manifest | desta | messages | columns | nemo | lhotse | kaldi | dynamic_superb |
    # mcr_bench.
    form: str = "auto"
    audio_root: str | None = None  # folder where the manifest's audio paths start; null = as the manifest says
    allow_links: bool = False  # clips may be links that leave the audio root (a hub's cache, git-annex, DVC)
    # File or folder of encoder features (python -m models features), which is only read. null = encode now, see `features`.
    features: str | None = None
    splits: tuple[str, ...] = ("train",)  # only examples of these splits
    tasks: tuple[str, ...] = ()  # only examples of these tasks; empty = all
    max_bad_fraction: float = 0.05  # share of bad rows above which the run stops and lists them
    max_clip_seconds: float = 30.0  # a longer clip is a bad row
    max_cut_fraction: float = 0.1  # share of clips over the model's max_audio_seconds above which the run stops
    # How student and speech teachers lay out a batch. none = one example a row, padded. pack = side by side in rows of at most
    # pack_tokens tokens; SDPA's masks keep the examples apart. varlen = all in one row, by flash-attention 2 (needs CUDA and an
    # LM in bfloat16 or float16; without prefix cache; not tested).
    packing: str = "none"
    pack_tokens: int = 512  # tokens of a packed row
    # On-policy distillation: share of the examples to which the student makes its own answer, which the teachers then score, as
    # in GKD (arXiv 2306.13649). Each example is drawn by itself. Such an answer has no label, so it has no CE term (but see
    # loss.ce_target). 0 = all examples have the data's targets.
    on_policy_fraction: float = 0.0
    on_policy_every_steps: int = 1  # the student makes answers in every N-th step; the steps between have the data's targets
    on_policy_batch_examples: int = 32  # answers that a rank makes at a time
    on_policy_max_new_tokens: int = 64  # a longer answer is cut off, and its end is not taught
    on_policy_temperature: float = 1.0  # temperature of the sampling; 0 = always the likeliest token
    on_policy_top_k: int = 0  # sample among the K likeliest tokens; 0 = all
    on_policy_top_p: float = 1.0  # sample among the fewest tokens that hold this probability, in (0, 1]; 1 = all

    def __post_init__(self) -> None:
        _one_of(self.packing, "data.packing", PACKINGS)
        _one_of(self.form, "data.form", ("auto", "manifest", *FORMS))
        _check(self.pack_tokens >= 1, "data.pack_tokens", ">= 1", self.pack_tokens)
        _check(0.0 <= self.max_bad_fraction <= 1.0, "data.max_bad_fraction", "a fraction in [0, 1]", self.max_bad_fraction)
        _check(0.0 <= self.max_cut_fraction <= 1.0, "data.max_cut_fraction", "a fraction in [0, 1]", self.max_cut_fraction)
        _check(self.max_clip_seconds > 0, "data.max_clip_seconds", "> 0", self.max_clip_seconds)
        for split in self.splits:
            _one_of(split, "data.splits", SPLITS)
        fraction = self.on_policy_fraction
        _check(0.0 <= fraction <= 1.0, "data.on_policy_fraction", "a fraction in [0, 1]", fraction)
        for name in ("every_steps", "batch_examples", "max_new_tokens"):
            value = getattr(self, f"on_policy_{name}")
            _check(value >= 1, f"data.on_policy_{name}", ">= 1", value)
        _check(self.on_policy_temperature >= 0, "data.on_policy_temperature", ">= 0", self.on_policy_temperature)
        _check(self.on_policy_top_k >= 0, "data.on_policy_top_k", ">= 0", self.on_policy_top_k)
        _check(0 < self.on_policy_top_p <= 1, "data.on_policy_top_p", "in (0, 1]", self.on_policy_top_p)
        for f in dataclasses.fields(self):
            if f.name.startswith("on_policy_") and f.name != "on_policy_fraction":
                _needs(self, "data", f.name, fraction > 0, "data.on_policy_fraction")


@dataclass(frozen=True)
class FeaturesConfig:
    """How a SpeechLM's clips are encoded where data.features is null: once, into shards on disk, by all ranks together."""

    folder: str | None = None  # folder of the shards; what is there already is not encoded again. null = run.out_dir/features
    batch_clips: int = 8  # clips that a rank reads and encodes together
    shard_mib: float = 64.0  # MiB of a shard; each rank has one in memory while it encodes
    # What makes log-mel spectrograms. processor = WhisperFeatureExtractor, on the CPU; torch | torchaudio = a batch at a time on
    # the rank's device, within 1e-4 of it.
    backend: str = "processor"
    # What resamples clips at other rates: soxr, on the CPU; torchaudio = a batch at a time on the rank's device, within 5e-4 of
    # soxr.
    resampler: str = "soxr"

    def __post_init__(self) -> None:
        _check(self.batch_clips >= 1, "features.batch_clips", ">= 1", self.batch_clips)
        _check(self.shard_mib > 0, "features.shard_mib", "> 0", self.shard_mib)
        _one_of(self.backend, "features.backend", LOG_MELS)
        _one_of(self.resampler, "features.resampler", RESAMPLERS)


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained: a saved SpeechLM, or the settings of a new one. Only its connector trains."""

    folder: str | None = None  # SpeechLM.save_pretrained() folder to start from
    settings: dict[str, Any] = field(default_factory=dict)  # SpeechLMConfig of a new model, where there is no folder
    feature_statistics: str | None = None  # SpeechLM folder; its standardisation of the features is used
    fresh_connector: bool = False  # start the folder's connector from new random weights
    bf16_products: bool = False  # frozen LM's linear layers multiply in bfloat16 (models/speech_lm/frozen_linear.py); CPU only
    prefix_cache_mib: int = 4096  # MiB in which the text prefixes' keys and values are kept between epochs; 0 = off

    def __post_init__(self) -> None:
        _check(self.prefix_cache_mib >= 0, "model.prefix_cache_mib", ">= 0", self.prefix_cache_mib)
        if self.folder is not None and self.settings:
            raise ConfigError(f"model.settings: expected none where model.folder is given, got {self.settings!r}")
        _needs(self, "model", "fresh_connector", self.folder is not None, "model.folder")


@dataclass(frozen=True)
class LoraConfig(Lora):
    """The LoRA of `student`."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"student.{error}") from None


@dataclass(frozen=True)
class StudentConfig:
    """An audio LM of transformers that is trained, in the place of `model`; the teacher is then `teacher.model`."""

    model: str | None = None  # hub id or folder of an audio LM (models/audio_lms); null = the student is the SpeechLM of `model`
    trains: str = "lora"  # lora | full (language model and connector) | connector; the audio encoder never trains
    # Dtype of the weights: auto | float32 | bfloat16 | float16. auto = float32 for weights that train. With a LoRA, whose own
    # weights are float32, it is bfloat16 where that is fast.
    dtype: str = "auto"
    attention: str | None = None  # transformers' attn_implementation, such as sdpa or flash_attention_2; null = its default
    device_map: str | None = None  # transformers' device_map, such as auto: the layers over several devices; null = one device
    merge: bool = False  # write the LoRA into the weights of the result; false = the result is an adapter
    lora: LoraConfig = field(default_factory=LoraConfig)  # the LoRA, with trains=lora
    # What the student hears and reads, a SpeechLM too: noise, band, codec, other words. `evaluate` asks it likewise.
    hears: Hearing = field(default_factory=Hearing)

    def __post_init__(self) -> None:
        _one_of(self.trains, "student.trains", TRAINS)
        _one_of(self.dtype, "student.dtype", DTYPES)
        _check(self.trains == "lora" or not self.merge, "student.merge", f"false with student.trains={self.trains}", self.merge)


@dataclass(frozen=True)
class TeacherConfig:
    """Where the teacher's hidden states come from: a live model, or a ContrastCache that was written before."""

    folder: str | None = None  # SpeechLM folder; kd, sharpened and caad always need it, for its LM head
    model: str | None = None  # hub id or folder of an audio LM; with student.model it takes the place of folder
    dtype: str = "auto"  # dtype of `model`: auto (bfloat16 where that is fast) | float32 | bfloat16 | float16
    attention: str | None = None  # as student.attention, for `model`
    device_map: str | None = None  # as student.device_map, for `model`
    cache: str | None = None  # ContrastCache folder (python -m models cache); the teacher's body then never runs
    # MiB for a live teacher's states of all examples: if they fit, they are computed once, before the first step. 0 = off.
    keep_mib: int = 0
    # K likeliest ids of the teacher's projection for the student's frozen LM head (kdkernels.project_teacher): a step costs what
    # cross-entropy costs. Projections that fit are read from `cache` (python -m models cache --project). Others are made once for
    # all examples and kept in run.out_dir/projections. 0 = no projection: each step multiplies by the teacher's head.
    projection: int = 0
    projection_on_the_way: bool = False  # an example's projection is made in the step that first draws it, not before the run
    # Examples that a live teacher reads at a time; 0 = the whole batch. A small number needs less memory. With 1 its
    # states do not depend on the batch: they are bit for bit those of a float32 cache made with --batch-examples 1 (on a CPU with
    # as many threads).
    batch_examples: int = 0
    # What the teacher hears and reads; the default is the clip as it is, whatever the student hears. With `cache`: what the cache
    # was made of.
    hears: Hearing = field(default_factory=Hearing)
    # A SpeechLM's features: null = the student's, if both hear the same; encode = its own, made now, in the folder "teacher" in
    # that of `features`; or a file or folder of python -m models features.
    features: str | None = None
    # Path without the audio, of `model`. zeros = features of zeros; silence = those of a silent clip; absent = a prompt without
    # the clip.
    negative: str = "zeros"

    def __post_init__(self) -> None:
        _one_of(self.dtype, "teacher.dtype", DTYPES)
        _one_of(self.negative, "teacher.negative", NEGATIVES)
        _check(self.keep_mib >= 0, "teacher.keep_mib", ">= 0", self.keep_mib)
        _check(self.projection >= 0, "teacher.projection", ">= 0", self.projection)
        if self.projection and self.keep_mib:
            raise ConfigError(f"teacher.keep_mib: expected 0 with teacher.projection, which keeps no states, got {self.keep_mib}")
        _needs(self, "teacher", "projection_on_the_way", self.projection > 0, "teacher.projection")
        _check(self.batch_examples >= 0, "teacher.batch_examples", ">= 0", self.batch_examples)


@dataclass(frozen=True)
class LossConfig:
    """kd_weight * tau^2 * D(p || q) + (1 - kd_weight) * CE; see kdkernels.fused_linear_caad_loss."""

    alpha: float = 2.0  # contrast strength (caad) or sharpening (sharpened)
    alpha_start: float | None = None  # alpha at the first step, from where it goes linearly to alpha; null = constant
    alpha_ramp_steps: int = 0  # steps from alpha_start to alpha
    # Divergence of the teacher's paths, in nats, at which a token gets half of alpha (kdkernels.adaptive_alpha). null = all
    # tokens get alpha.
    alpha_half_divergence: float | None = None
    center_text: bool = False  # move the text path by its mean distance from the audio path (models/training/teachers.py)
    temperature: float = 2.0  # tau; softens the distributions of teacher and student in D
    kd_weight: float = 0.7  # in [0, 1]: share of the KD term; the CE term has the rest
    divergence: str = "forward_kl"  # D: forward_kl | reverse_kl | jsd
    jsd_beta: float = 0.5  # with divergence=jsd: weight of p in the mixture, in [0, 1]
    plausibility: float | None = None  # in (0, 1]: keep tokens with z_audio >= max + log(this); null = all tokens
    # Weight of each target token in the KD term. uniform = 1; choice = 1 on the tokens that spell the answer; divergence = the
    # divergence of the teacher's two paths at the token, in nats.
    kd_token_weight: str = "choice"
    kd_background_weight: float = 0.0  # with choice: weight of the tokens that do not spell the answer, in the KD term
    ce_token_weight: str = "choice"  # weight of each target token in the CE term: uniform | choice
    ce_background_weight: float = 0.05  # with choice: weight of the tokens that do not spell the answer, in the CE term
    # Fraction of each step's examples, drawn at random, in which the tokens around the answer count in the CE term. They weigh
    # ce_background_weight / fraction: the same objective on average, with that fraction of the rows of logits.
    ce_background_fraction: float = 1.0
    # What the KD term is averaged over: tokens = all tokens of a step by their weights; samples = over the tokens of each
    # example, then over examples, so that a long answer counts no more than a short one.
    kd_average: str = "tokens"
    ce_average: str = "tokens"  # what the CE term is averaged over: tokens | samples, as in kd_average
    # Labels of the CE term: answer = the target's tokens; teacher = the likeliest token of the teacher's contrasted distribution
    # at each position (hard labels). With teacher the student's own answers (data.on_policy_fraction) have a CE term too.
    ce_target: str = "answer"
    chunk_tokens: int | None = None  # tokens whose logits exist at the same time; null = the loss chooses
    # true = the contrast of the two paths is rounded once to the bf16 of the teacher's head: faster, coarser near convergence.
    round_contrast: bool = False
    impl: str = "auto"  # implementation of the loss: auto | reference | cpu | triton | cuda

    def __post_init__(self) -> None:
        _check(self.alpha >= 0, "loss.alpha", ">= 0", self.alpha)
        _check(self.alpha_start is None or self.alpha_start >= 0, "loss.alpha_start", ">= 0", self.alpha_start)
        _check(self.alpha_ramp_steps >= 0, "loss.alpha_ramp_steps", ">= 0", self.alpha_ramp_steps)
        _check_ramp("loss.alpha", self.alpha_start, self.alpha_ramp_steps)
        half = self.alpha_half_divergence
        _check(half is None or half > 0, "loss.alpha_half_divergence", "> 0", half)
        _check(self.temperature > 0, "loss.temperature", "> 0", self.temperature)
        _check(0 <= self.kd_weight <= 1, "loss.kd_weight", "in [0, 1]", self.kd_weight)
        _check(0 <= self.jsd_beta <= 1, "loss.jsd_beta", "in [0, 1]", self.jsd_beta)
        _one_of(self.divergence, "loss.divergence", DIVERGENCES)
        _one_of(self.kd_token_weight, "loss.kd_token_weight", TOKEN_WEIGHTS)
        _one_of(self.ce_token_weight, "loss.ce_token_weight", ("uniform", "choice"))
        _check(self.kd_background_weight >= 0, "loss.kd_background_weight", ">= 0", self.kd_background_weight)
        _check(self.ce_background_weight >= 0, "loss.ce_background_weight", ">= 0", self.ce_background_weight)
        fraction = self.ce_background_fraction
        _check(0 < fraction <= 1, "loss.ce_background_fraction", "in (0, 1]", fraction)
        _one_of(self.kd_average, "loss.kd_average", AVERAGES)
        _one_of(self.ce_average, "loss.ce_average", AVERAGES)
        _one_of(self.ce_target, "loss.ce_target", ("answer", "teacher"))
        if self.ce_average == "samples" and fraction < 1:
            raise ConfigError(f"loss.ce_background_fraction: expected 1 with loss.ce_average=samples, got {fraction}")
        ok = self.plausibility is None or 0 < self.plausibility <= 1
        _check(ok, "loss.plausibility", "in (0, 1]", self.plausibility)
        if self.plausibility is not None and self.divergence == "reverse_kl":
            raise ConfigError("loss.plausibility: expected null with divergence reverse_kl, which would be infinite")
        _needs(self, "loss", "jsd_beta", self.divergence == "jsd", "loss.divergence=jsd")
        _check(self.chunk_tokens is None or self.chunk_tokens >= 1, "loss.chunk_tokens", ">= 1", self.chunk_tokens)
        _one_of(self.impl, "loss.impl", IMPLEMENTATIONS)

    @property
    def needs_divergence(self) -> bool:
        """Whether the divergence of the teacher's two paths is needed for a weight or an alpha."""
        return self.kd_token_weight == "divergence" or self.alpha_half_divergence is not None

    def alpha_at(self, step: int) -> float:
        """Contrast strength at optimiser step `step` (the first is 1): linear from alpha_start to alpha."""
        return ramp(self.alpha, self.alpha_start, self.alpha_ramp_steps, step)


@dataclass(frozen=True)
class LayersConfig:
    """Layer distillation beside the objective: weight * mean squared error; see kdkernels.fused_layer_mse_loss, layer_map."""

    weight: float = 0.0  # weight of this term, which is added to the objective; 0 = no layer is compared
    # projection = each token with the teacher's state at the same token; attention = with what it finds in the teacher's states
    # at all answer tokens of its example (kdkernels.LayerAttention).
    form: str = "projection"
    heads: int = 1  # with form=attention: number of heads, a divisor of the student's width
    map: str = "all"  # which layers are compared: top | skip | all
    every: int = 7  # with map=skip: compare every N-th layer, counted down from the top
    embeddings: bool = False  # compare the first layer's input as well
    pairs: tuple[str, ...] = ()  # "student-teacher" layers instead of a map, such as [7-9,14-18]
    alpha: float = 0.0  # contrast of the layer target: (1 + alpha) h_audio - alpha h_text
    direction: str = "student_to_teacher"  # where widths differ, this side is projected: student_to_teacher | teacher_to_student
    bias: bool = False  # projections, or the values of attention, also add a vector, which trains
    normalize: bool = False  # compare directions only: the error of a pair is then 2 - 2 cos

    def __post_init__(self) -> None:
        _check(self.weight >= 0, "layers.weight", ">= 0", self.weight)
        _one_of(self.map, "layers.map", LAYER_MAPS)
        _check(self.every >= 1, "layers.every", ">= 1", self.every)
        _check(self.alpha >= 0, "layers.alpha", ">= 0", self.alpha)
        _one_of(self.direction, "layers.direction", DIRECTIONS)
        _one_of(self.form, "layers.form", LAYER_FORMS)
        _check(self.heads >= 1, "layers.heads", ">= 1", self.heads)
        _needs(self, "layers", "heads", self.form == "attention", "layers.form=attention")
        _needs(self, "layers", "direction", self.form == "projection", "layers.form=projection")
        for pair in self.pairs:
            _check(re.fullmatch(r"\d+-\d+", pair) is not None, "layers.pairs", "student-teacher, such as 7-9", pair)
        _check(not (self.pairs and self.embeddings), "layers.embeddings", "false with layers.pairs (0 is a layer there)", True)
        _needs(self, "layers", "every", self.map == "skip" and not self.pairs, "layers.map=skip")
        _needs(self, "layers", "map", not self.pairs, "an empty layers.pairs")

    def layer_pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
        """(student, teacher) layers that are compared, given the depths of both.

        Raises:
            ConfigError: a pair out of range, or one layer in two pairs.
        """
        kind = [tuple(map(int, p.split("-"))) for p in self.pairs] or self.map
        try:
            pairs = layer_map(
                student_layers, teacher_layers, kind, every=self.every, embeddings=self.embeddings and not self.pairs
            )
        except ValueError as error:
            raise ConfigError(f"layers.pairs: {error}") from None
        return pairs


@dataclass(frozen=True)
class SourceConfig:
    """One more teacher of the same answer tokens; its term is weight * D(p_source || q), in the place of the objective's D."""

    # text = a language model reads what is known about the clip in words (Stage 1's wording) instead of the audio. acoustic = a
    # frozen speech LM that hears what the student hears: by default the student itself before its first step, which keeps what it
    # can hear already. audio = a speech LM that runs with and without the audio, like the objective's own teacher.
    role: str = "text"
    # With role=text: hub id or folder of a causal LM. With audio and acoustic: SpeechLM folder, or with student.model hub id or
    # folder of an audio LM. null = the student's start (acoustic only).
    folder: str | None = None
    weight: float = 1.0  # weight of this source's divergence; the objective's own teacher has 1
    weight_start: float | None = None  # weight at the first step, from where it goes linearly to weight; null = constant
    weight_ramp_steps: int = 0  # steps from weight_start to weight
    alpha: float = 0.0  # with role=audio: contrast strength
    divergence: str = "forward_kl"  # forward_kl | reverse_kl | jsd
    jsd_beta: float = 0.5  # with divergence=jsd: weight of p in the mixture, in [0, 1]
    reasoning: bool = False  # with role=text: put an example's metadata["reasoning"], if it has one, before the answer
    layers: LayersConfig = field(default_factory=LayersConfig)  # layers that are compared with this source's
    hears: Hearing = field(default_factory=Hearing)  # with role=audio: as teacher.hears; an acoustic source hears as the student
    # MiB for its states of all examples: if they fit, they are computed once, before the first step. 0 = in every step.
    keep_mib: int = 1024

    def __post_init__(self) -> None:
        _one_of(self.role, "role", ROLES)
        _check(self.weight >= 0, "weight", ">= 0", self.weight)
        _check(self.weight_start is None or self.weight_start >= 0, "weight_start", ">= 0", self.weight_start)
        _check(self.weight_ramp_steps >= 0, "weight_ramp_steps", ">= 0", self.weight_ramp_steps)
        _check_ramp("weight", self.weight_start, self.weight_ramp_steps)
        _check(self.alpha >= 0, "alpha", ">= 0", self.alpha)
        _one_of(self.divergence, "divergence", DIVERGENCES)
        _check(0 <= self.jsd_beta <= 1, "jsd_beta", "in [0, 1]", self.jsd_beta)
        _check(self.keep_mib >= 0, "keep_mib", ">= 0", self.keep_mib)
        if self.folder is None and self.role != "acoustic":
            raise ConfigError(f"folder: role {self.role!r} needs one, got none")
        if self.role != "audio" and (self.alpha > 0 or self.layers.alpha > 0):
            raise ConfigError(f"alpha: expected 0 with role {self.role!r}, which has no path without the audio")
        _needs(self, "", "jsd_beta", self.divergence == "jsd", "divergence=jsd")
        if self.role != "audio" and self.hears.settings():
            other = "reads words" if self.role == "text" else "hears what the student hears"
            raise ConfigError(f"hears: expected its defaults with role {self.role!r}, which {other}")
        if self.role != "text" and self.reasoning:
            raise ConfigError(f"reasoning: expected false with role {self.role!r}, which reads no metadata")

    def weight_at(self, step: int) -> float:
        """Weight at optimiser step `step` (the first is 1): linear from weight_start to weight."""
        return ramp(self.weight, self.weight_start, self.weight_ramp_steps, step)


def _check_ramp(name: str, start: float | None, steps: int) -> None:
    """`NAME_start` and `NAME_ramp_steps` do something only together."""
    if start is not None and steps == 0:
        raise ConfigError(f"{name}_ramp_steps: expected >= 1 with {name}_start={start:g}, got 0")
    if start is None and steps > 0:
        raise ConfigError(f"{name}_ramp_steps: expected 0 without {name}_start, got {steps}")


def ramp(value: float, start: float | None, steps: int, step: int) -> float:
    """Goes linearly from `start` at step 1 to `value` after `steps`; start None = always `value`."""
    if start is None or step > steps:
        return value
    return start + (value - start) * (step - 1) / steps


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; its learning rate rises linearly to the highest value, then falls along half a cosine."""

    steps: int = 300  # optimiser steps
    batch_examples: int = 16  # examples in an optimiser step, over all ranks
    micro_batch_examples: int | None = None  # examples in a forward pass; null = batch_examples (no accumulation)
    learning_rate: float = 2e-3  # highest learning rate, reached after warmup_steps
    min_learning_rate_fraction: float = 0.03  # learning rate at the last step, as a share of learning_rate
    warmup_steps: int = 15  # steps in which the learning rate rises
    beta1: float = 0.9  # AdamW: decay of the mean of gradients
    beta2: float = 0.98  # AdamW: decay of the mean of squared gradients
    weight_decay: float = 0.01  # AdamW: decay of the weights, times the learning rate
    max_grad_norm: float = 1.0  # a gradient of a larger norm is scaled down to it
    audio_dropout: float = 0.0  # probability that an example's audio is masked in training
    # Strength of the noise on the embeddings of an answer's tokens, as in NEFTune: uniform in +-strength / sqrt(tokens * width).
    # The student alone has it; 0 = none.
    answer_noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "optim.steps", ">= 1", self.steps)
        _check(self.batch_examples >= 1, "optim.batch_examples", ">= 1", self.batch_examples)
        micro = self.micro_batch_examples
        ok = micro is None or (micro >= 1 and self.batch_examples % micro == 0)
        _check(ok, "optim.micro_batch_examples", f"a divisor of batch_examples ({self.batch_examples})", micro)
        _check(self.learning_rate > 0, "optim.learning_rate", "> 0", self.learning_rate)
        fraction = self.min_learning_rate_fraction
        _check(0 <= fraction <= 1, "optim.min_learning_rate_fraction", "in [0, 1]", fraction)
        _check(self.warmup_steps >= 0, "optim.warmup_steps", ">= 0", self.warmup_steps)
        _check(0 <= self.beta1 < 1, "optim.beta1", "in [0, 1)", self.beta1)
        _check(0 <= self.beta2 < 1, "optim.beta2", "in [0, 1)", self.beta2)
        _check(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        _check(self.max_grad_norm > 0, "optim.max_grad_norm", "> 0", self.max_grad_norm)
        _check(0 <= self.audio_dropout < 1, "optim.audio_dropout", "in [0, 1)", self.audio_dropout)
        _check(self.answer_noise >= 0, "optim.answer_noise", ">= 0", self.answer_noise)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate at optimiser step `step` (the first is 1): linear warm-up, then half a cosine to the minimum."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.min_learning_rate_fraction
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes, on what it runs, and what it shows."""

    out_dir: str = "runs/default"  # folder of checkpoints, curves and the result
    seed: int = 0  # seed of the order of the examples and of every random generator
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    bf16: bool = True  # autocast to bfloat16; on CUDA only (on CPUs it was measured slower than float32)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    parallel: str = "none"  # none | ddp | fsdp2; the last two under torchrun, with checkpoints of their own format
    log_every_steps: int = 10  # optimiser steps between two lines of the curves
    save_every_steps: int = 100  # optimiser steps between two checkpoints
    keep_last_checkpoints: int = 2  # older checkpoints are deleted
    resume: str = "never"  # never | auto (newest) | fallback (newest that is intact) | a checkpoint's folder
    tensorboard: bool = True  # also write the curves for TensorBoard
    progress_bar: bool = True  # show a progress bar
    push_to_hub: str | None = None  # owner/name: push the result there at the end (models/training/publish.py)
    hub_private: bool = True  # the repository is made private, and a public one is refused

    def __post_init__(self) -> None:
        _check(bool(self.out_dir), "run.out_dir", "a folder", self.out_dir)
        _check(self.seed >= 0, "run.seed", ">= 0", self.seed)
        _one_of(self.parallel, "run.parallel", PARALLEL)
        _check(self.log_every_steps >= 1, "run.log_every_steps", ">= 1", self.log_every_steps)
        _check(self.save_every_steps >= 1, "run.save_every_steps", ">= 1", self.save_every_steps)
        _check(self.keep_last_checkpoints >= 1, "run.keep_last_checkpoints", ">= 1", self.keep_last_checkpoints)
        _needs(self, "run", "hub_private", self.push_to_hub is not None, "run.push_to_hub")


@dataclass(frozen=True)
class Recipe:
    """A whole training run. `sources` has further teachers by name, beside the objective's own if it has one."""

    # sft = cross-entropy on the target's tokens (makes the teacher from the true answers). ce_only = the same for a student on
    # pseudo ground truth: the control without distillation. kd = plain distillation from the teacher's audio path, plus CE.
    # sharpened = the control for caad: (1 + alpha) * z_audio, nothing subtracted, plus CE. caad = the contrast of the teacher's
    # two paths, plus CE. caad+ = caad with loss.alpha=4 and loss.center_text=true where `loss` has its defaults. sources = no
    # teacher of its own: only those named in `sources`, plus CE.
    objective: str = "caad"
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _one_of(self.objective, "objective", OBJECTIVES)
        if self.objective == "caad+":
            unset = {f.name: CAAD_PLUS[f.name] for f in dataclasses.fields(LossConfig)
                     if f.name in CAAD_PLUS and getattr(self.loss, f.name) == f.default}  # fmt: skip
            object.__setattr__(self, "loss", dataclasses.replace(self.loss, **unset))
        self._check_kind()
        self._check_paths()
        self._check_layers()
        self._check_sources()
        self._check_projection()
        self._check_on_policy()
        self._check_run()

    def _check_kind(self) -> None:
        """Student and teacher are SpeechLMs, or both are audio LMs of transformers; each kind has keys of its own."""
        if self.needs_teacher and not self.teacher_spec:
            key, hint = ("model", " beside student.model") if self.student.model else ("folder", "")
            raise ConfigError(f"teacher.{key}: objective {self.objective!r} needs a teacher{hint}, got none")
        if self.teacher.model and not self.student.model:
            raise ConfigError(f"teacher.model: expected none without student.model, got {self.teacher.model!r}")
        given = {"hears": self.teacher.hears != Hearing(), "features": self.teacher.features is not None}
        for key in (key for key, is_given in given.items() if is_given and not self.needs_teacher):
            raise ConfigError(f"teacher.{key}: expected its default with objective {self.objective!r}, which has no teacher")
        for key, device_map in (("student", self.student.device_map), ("teacher", self.teacher.device_map)):
            if device_map is not None and self.student.model is None:
                raise ConfigError(f"{key}.device_map: expected null without student.model, got {device_map!r}")
            if device_map is not None and self.run.parallel != "none":
                raise ConfigError(f"{key}.device_map: expected null with run.parallel={self.run.parallel}, got {device_map!r}")
        if self.student.model is None:
            if self.teacher.negative != "zeros":
                raise ConfigError(f"teacher.negative: expected zeros without student.model, got {self.teacher.negative!r}")
            return
        if self.teacher.features is not None:
            raise ConfigError(f"teacher.features: expected null with student.model, got {self.teacher.features!r}")
        if self.data.features is not None:
            raise ConfigError(f"data.features: expected null with student.model, which hears clips, got {self.data.features!r}")
        if self.features != FeaturesConfig():
            raise ConfigError("features: expected the defaults with student.model, whose processor makes its inputs, got others")
        if self.data.packing != "none":
            raise ConfigError(f"data.packing: expected none with student.model, got {self.data.packing!r}")
        plain = ModelConfig(prefix_cache_mib=self.model.prefix_cache_mib)
        for f in dataclasses.fields(ModelConfig):
            value = getattr(self.model, f.name)
            if value != getattr(plain, f.name):
                raise ConfigError(f"model.{f.name}: expected its default with student.model, got {value!r}")

    def _check_paths(self) -> None:
        """Some settings of the loss need a teacher of the objective's own that has two paths."""
        lacks = {"sharpened": "which has no text path", "sources": "which has no teacher of its own"}.get(self.objective)
        if lacks and self.loss.kd_token_weight == "divergence":
            raise ConfigError(f"loss.kd_token_weight: expected uniform or choice with objective {self.objective!r}, {lacks}")
        if self.objective in ("kd", "sft", "ce_only"):
            lacks = "which has no contrast"
        if lacks and self.loss.alpha_half_divergence is not None:
            raise ConfigError(f"loss.alpha_half_divergence: expected null with objective {self.objective!r}, {lacks}")
        if lacks and self.loss.center_text:
            raise ConfigError(f"loss.center_text: expected false with objective {self.objective!r}, {lacks}")
        if self.loss.ce_target == "teacher" and (not self.needs_teacher or self.teacher.projection):
            why = "with teacher.projection" if self.needs_teacher else f"with objective {self.objective!r}"
            raise ConfigError(f"loss.ce_target: expected answer {why}, got 'teacher': no teacher's logits are at hand")

    def _check_layers(self) -> None:
        if self.layers.weight > 0 and not self.needs_teacher:
            raise ConfigError(f"layers.weight: expected 0 with objective {self.objective!r}, which has no teacher of its own")
        for key, layers in self.compared_layers():
            if layers.weight > 0 and self.run.gradient_checkpointing:
                raise ConfigError(f"{key}.weight: expected 0 with run.gradient_checkpointing, which hides the layers' states")

    def _check_projection(self) -> None:
        """A projection is one distribution of one teacher, for a forward KL."""
        if not self.teacher.projection:
            return
        expected = {
            "objective": (self.needs_teacher, f"one of {', '.join(TEACHER_OBJECTIVES)}", self.objective),
            "loss.divergence": (self.loss.divergence == "forward_kl", "forward_kl", self.loss.divergence),
            "loss.alpha_ramp_steps": (self.loss.alpha_ramp_steps == 0, "0, a constant alpha,", self.loss.alpha_ramp_steps),
            "loss.round_contrast": (not self.loss.round_contrast, "false", self.loss.round_contrast),
            "layers.weight": (self.layers.weight == 0, "0", self.layers.weight),
            "sources": (not self.sources, "none", ", ".join(self.sources)),
        }
        for key, (fits, wanted, got) in expected.items():
            if not fits:
                raise ConfigError(f"{key}: expected {wanted} with teacher.projection, got {got}")
        if self.teacher.projection_on_the_way and self.run.parallel != "none":
            raise ConfigError(
                f"teacher.projection_on_the_way: expected false with run.parallel={self.run.parallel}, got true: a rank would "
                "not find what another has made"
            )

    def _check_on_policy(self) -> None:
        """The student's own answers are new in every step: a teacher has to read them when they are there."""
        if not self.data.on_policy_fraction:
            return
        changes = "as the student's answers change"
        expected = {
            "objective": (self.distils, "one with a teacher, which scores the student's answers,", self.objective),
            "teacher.cache": (self.teacher.cache is None, f"null, {changes},", self.teacher.cache),
            "teacher.keep_mib": (not self.teacher.keep_mib, f"0, {changes},", self.teacher.keep_mib),
            "teacher.projection": (not self.teacher.projection, f"0, {changes},", self.teacher.projection),
            **{f"sources.{name}.keep_mib": (not source.keep_mib, f"0, {changes},", source.keep_mib)
               for name, source in self.sources.items()},
            "loss.center_text": (not self.loss.center_text, "false, as no token of a free answer has a place of its own,", True),
        }  # fmt: skip
        for key, (fits, wanted, got) in expected.items():
            if not fits:
                raise ConfigError(f"{key}: expected {wanted} with data.on_policy_fraction, got {got}")

    def _check_sources(self) -> None:
        if self.objective == "sources" and not self.sources:
            raise ConfigError("sources: objective 'sources' needs at least one, got none")
        if self.sources and self.objective in ("sft", "ce_only"):
            raise ConfigError(f"sources: expected none with objective {self.objective!r}, which has no divergence; use 'sources'")
        if "teacher" in self.sources:
            raise ConfigError("sources.teacher: this name stands for the objective's own teacher; choose another")

    def _check_run(self) -> None:
        """Settings of different sections that no run can have together, whatever the model is."""
        model, varlen = self.model, self.data.packing == "varlen"
        if self.run.parallel == "fsdp2" and model.prefix_cache_mib and not self.student.model:
            # A rank that has a prefix runs fewer layers than one that has not: the other would wait for its shards forever.
            raise ConfigError(f"model.prefix_cache_mib: expected 0 with run.parallel=fsdp2, got {model.prefix_cache_mib}")
        if model.bf16_products and varlen:
            raise ConfigError("model.bf16_products: expected false with data.packing=varlen, which needs CUDA")
        cuda = self.run.device.startswith("cuda")
        if model.bf16_products and cuda:
            raise ConfigError(f"model.bf16_products: expected false with run.device={self.run.device}; it is for CPUs")
        if varlen and self.run.device == "cpu":
            raise ConfigError("data.packing: expected none or pack with run.device=cpu, got 'varlen', which needs CUDA")

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective has a teacher of its own, that of `teacher`."""
        return self.objective in TEACHER_OBJECTIVES

    @property
    def teacher_spec(self) -> str | None:
        """Where the objective's own teacher is: a SpeechLM's folder, or an audio LM where the student is one."""
        return self.teacher.model if self.student.model else self.teacher.folder

    @property
    def teacher_encodes(self) -> bool:
        """Whether a live SpeechLM teacher has features of its own, beside those of the student."""
        other_sound = self.teacher.hears.of_the_sound() != self.student.hears.of_the_sound()
        return self.teacher.features is not None or other_sound

    @property
    def distils(self) -> bool:
        """Whether the student learns some teacher's distribution."""
        return self.needs_teacher or bool(self.sources)

    def compared_layers(self) -> list[tuple[str, LayersConfig]]:
        """The layer settings by their keys in the recipe."""
        return [("layers", self.layers), *((f"sources.{name}.layers", s.layers) for name, s in self.sources.items())]


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
    raise ConfigError(f"recipe {recipe!r}: no such file, and not one of the shipped {shipped}{_nearest(recipe, shipped)}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars, for JSON."""
    return dataclasses.asdict(config)


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


def section_of(cls: type, name: str) -> type | None:
    """The config class of a field that is a section; None for a plain value."""
    hint = typing.get_type_hints(cls)[name]
    return hint if dataclasses.is_dataclass(hint) else None


def entry_of(cls: type, name: str) -> type | None:
    """The config class of the entries of a field that maps names to sections; None for any other."""
    arguments = typing.get_args(typing.get_type_hints(cls)[name])
    return arguments[1] if len(arguments) == 2 and dataclasses.is_dataclass(arguments[1]) else None


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
            _check(math.isfinite(value), prefix + f.name, "a finite number", value)
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
            raise ConfigError(f"{source}: unknown key {prefix + str(key)!r}{_nearest(str(key), known, prefix)}")
        if (section := section_of(cls, key)) is not None:
            _check_keys(value, section, source=source, prefix=f"{prefix}{key}.")
        elif (entry := entry_of(cls, key)) is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix}{key}: expected names, each with its keys, got {value!r}")
            for name, inner in value.items():
                _check_keys(inner, entry, source=source, prefix=f"{prefix}{key}.{name}.")


def _nearest(word: str, known: Any, prefix: str = "") -> str:
    """The hint in an error message: the nearest of the `known` words, or a key of another section (`alpha`: `loss.alpha`)."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix + near[0]!r}?"
    everywhere = {
        f.name: f"{section.name}.{f.name}"
        for section in reversed(dataclasses.fields(Recipe))  # for a name in two sections the first section wins
        if dataclasses.is_dataclass(section.default_factory)
        for f in dataclasses.fields(section.default_factory)
    }
    near = difflib.get_close_matches(word, everywhere, n=1, cutoff=0.75)
    return f"; did you mean {everywhere[near[0]]!r}?" if near else f"; known: {', '.join(map(str, known))}"


def _needs(section: Any, prefix: str, name: str, given: bool, other: str) -> None:
    """ConfigError where a setting differs from its default and has no effect, because the `other` it needs is not `given`."""
    default = next(f.default for f in dataclasses.fields(section) if f.name == name)
    value = getattr(section, name)
    if value != default and not given:
        where = f"{prefix}.{name}" if prefix else name
        raise ConfigError(f"{where}: expected {default!r}, the default, without {other}, got {value!r}: it would have no effect")


def _check(ok: bool, name: str, expected: str, got: Any) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


def _one_of(value: str, name: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}{_nearest(value, allowed)}")
