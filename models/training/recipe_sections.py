"""The sections of a recipe. The comment beside a key is its description in docs/recipes.md and in `models train --keys`."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from kdkernels.layer_mse import DIRECTIONS, LAYER_MAPS, layer_map
from kdkernels.ops.dispatch import IMPLEMENTATIONS
from kdkernels.ops.rows import DIVERGENCES
from models.audio_lms.settings import DTYPES, NEGATIVES, TRAINS, Lora
from models.corpora.hearing import Hearing
from models.data.commands import FORMS
from models.data.manifest import SPLITS
from models.speech_lm.commands import LOG_MELS, RESAMPLERS
from models.training.recipe_checks import ConfigError, check, check_has_effect, check_one_of, check_ramp

PARALLEL = ("none", "ddp", "fsdp2")
ROLES = ("audio", "text", "acoustic")
PACKINGS = ("none", "pack", "varlen")
TOKEN_WEIGHTS = ("uniform", "choice", "divergence")
AVERAGES = ("tokens", "samples")
LAYER_FORMS = ("projection", "attention")


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
        check_one_of(self.packing, "data.packing", PACKINGS)
        check_one_of(self.form, "data.form", ("auto", "manifest", *FORMS))
        check(self.pack_tokens >= 1, "data.pack_tokens", ">= 1", self.pack_tokens)
        check(0.0 <= self.max_bad_fraction <= 1.0, "data.max_bad_fraction", "a fraction in [0, 1]", self.max_bad_fraction)
        check(0.0 <= self.max_cut_fraction <= 1.0, "data.max_cut_fraction", "a fraction in [0, 1]", self.max_cut_fraction)
        check(self.max_clip_seconds > 0, "data.max_clip_seconds", "> 0", self.max_clip_seconds)
        for split in self.splits:
            check_one_of(split, "data.splits", SPLITS)
        fraction = self.on_policy_fraction
        check(0.0 <= fraction <= 1.0, "data.on_policy_fraction", "a fraction in [0, 1]", fraction)
        for name in ("every_steps", "batch_examples", "max_new_tokens"):
            value = getattr(self, f"on_policy_{name}")
            check(value >= 1, f"data.on_policy_{name}", ">= 1", value)
        check(self.on_policy_temperature >= 0, "data.on_policy_temperature", ">= 0", self.on_policy_temperature)
        check(self.on_policy_top_k >= 0, "data.on_policy_top_k", ">= 0", self.on_policy_top_k)
        check(0 < self.on_policy_top_p <= 1, "data.on_policy_top_p", "in (0, 1]", self.on_policy_top_p)
        for f in dataclasses.fields(self):
            if f.name.startswith("on_policy_") and f.name != "on_policy_fraction":
                check_has_effect(self, "data", f.name, fraction > 0, "data.on_policy_fraction")


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
        check(self.batch_clips >= 1, "features.batch_clips", ">= 1", self.batch_clips)
        check(self.shard_mib > 0, "features.shard_mib", "> 0", self.shard_mib)
        check_one_of(self.backend, "features.backend", LOG_MELS)
        check_one_of(self.resampler, "features.resampler", RESAMPLERS)


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
        check(self.prefix_cache_mib >= 0, "model.prefix_cache_mib", ">= 0", self.prefix_cache_mib)
        if self.folder is not None and self.settings:
            raise ConfigError(f"model.settings: expected none where model.folder is given, got {self.settings!r}")
        check_has_effect(self, "model", "fresh_connector", self.folder is not None, "model.folder")


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
        check_one_of(self.trains, "student.trains", TRAINS)
        check_one_of(self.dtype, "student.dtype", DTYPES)
        check(self.trains == "lora" or not self.merge, "student.merge", f"false with student.trains={self.trains}", self.merge)


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
        check_one_of(self.dtype, "teacher.dtype", DTYPES)
        check_one_of(self.negative, "teacher.negative", NEGATIVES)
        check(self.keep_mib >= 0, "teacher.keep_mib", ">= 0", self.keep_mib)
        check(self.projection >= 0, "teacher.projection", ">= 0", self.projection)
        if self.projection and self.keep_mib:
            raise ConfigError(f"teacher.keep_mib: expected 0 with teacher.projection, which keeps no states, got {self.keep_mib}")
        check_has_effect(self, "teacher", "projection_on_the_way", self.projection > 0, "teacher.projection")
        check(self.batch_examples >= 0, "teacher.batch_examples", ">= 0", self.batch_examples)


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
        check(self.alpha >= 0, "loss.alpha", ">= 0", self.alpha)
        check(self.alpha_start is None or self.alpha_start >= 0, "loss.alpha_start", ">= 0", self.alpha_start)
        check(self.alpha_ramp_steps >= 0, "loss.alpha_ramp_steps", ">= 0", self.alpha_ramp_steps)
        check_ramp("loss.alpha", self.alpha_start, self.alpha_ramp_steps)
        half = self.alpha_half_divergence
        check(half is None or half > 0, "loss.alpha_half_divergence", "> 0", half)
        check(self.temperature > 0, "loss.temperature", "> 0", self.temperature)
        check(0 <= self.kd_weight <= 1, "loss.kd_weight", "in [0, 1]", self.kd_weight)
        check(0 <= self.jsd_beta <= 1, "loss.jsd_beta", "in [0, 1]", self.jsd_beta)
        check_one_of(self.divergence, "loss.divergence", DIVERGENCES)
        check_one_of(self.kd_token_weight, "loss.kd_token_weight", TOKEN_WEIGHTS)
        check_one_of(self.ce_token_weight, "loss.ce_token_weight", ("uniform", "choice"))
        check(self.kd_background_weight >= 0, "loss.kd_background_weight", ">= 0", self.kd_background_weight)
        check(self.ce_background_weight >= 0, "loss.ce_background_weight", ">= 0", self.ce_background_weight)
        fraction = self.ce_background_fraction
        check(0 < fraction <= 1, "loss.ce_background_fraction", "in (0, 1]", fraction)
        check_one_of(self.kd_average, "loss.kd_average", AVERAGES)
        check_one_of(self.ce_average, "loss.ce_average", AVERAGES)
        check_one_of(self.ce_target, "loss.ce_target", ("answer", "teacher"))
        if self.ce_average == "samples" and fraction < 1:
            raise ConfigError(f"loss.ce_background_fraction: expected 1 with loss.ce_average=samples, got {fraction}")
        ok = self.plausibility is None or 0 < self.plausibility <= 1
        check(ok, "loss.plausibility", "in (0, 1]", self.plausibility)
        if self.plausibility is not None and self.divergence == "reverse_kl":
            raise ConfigError("loss.plausibility: expected null with divergence reverse_kl, which would be infinite")
        check_has_effect(self, "loss", "jsd_beta", self.divergence == "jsd", "loss.divergence=jsd")
        check(self.chunk_tokens is None or self.chunk_tokens >= 1, "loss.chunk_tokens", ">= 1", self.chunk_tokens)
        check_one_of(self.impl, "loss.impl", IMPLEMENTATIONS)

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
        check(self.weight >= 0, "layers.weight", ">= 0", self.weight)
        check_one_of(self.map, "layers.map", LAYER_MAPS)
        check(self.every >= 1, "layers.every", ">= 1", self.every)
        check(self.alpha >= 0, "layers.alpha", ">= 0", self.alpha)
        check_one_of(self.direction, "layers.direction", DIRECTIONS)
        check_one_of(self.form, "layers.form", LAYER_FORMS)
        check(self.heads >= 1, "layers.heads", ">= 1", self.heads)
        check_has_effect(self, "layers", "heads", self.form == "attention", "layers.form=attention")
        check_has_effect(self, "layers", "direction", self.form == "projection", "layers.form=projection")
        for pair in self.pairs:
            check(re.fullmatch(r"\d+-\d+", pair) is not None, "layers.pairs", "student-teacher, such as 7-9", pair)
        check(not (self.pairs and self.embeddings), "layers.embeddings", "false with layers.pairs (0 is a layer there)", True)
        check_has_effect(self, "layers", "every", self.map == "skip" and not self.pairs, "layers.map=skip")
        check_has_effect(self, "layers", "map", not self.pairs, "an empty layers.pairs")

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
        check_one_of(self.role, "role", ROLES)
        check(self.weight >= 0, "weight", ">= 0", self.weight)
        check(self.weight_start is None or self.weight_start >= 0, "weight_start", ">= 0", self.weight_start)
        check(self.weight_ramp_steps >= 0, "weight_ramp_steps", ">= 0", self.weight_ramp_steps)
        check_ramp("weight", self.weight_start, self.weight_ramp_steps)
        check(self.alpha >= 0, "alpha", ">= 0", self.alpha)
        check_one_of(self.divergence, "divergence", DIVERGENCES)
        check(0 <= self.jsd_beta <= 1, "jsd_beta", "in [0, 1]", self.jsd_beta)
        check(self.keep_mib >= 0, "keep_mib", ">= 0", self.keep_mib)
        if self.folder is None and self.role != "acoustic":
            raise ConfigError(f"folder: role {self.role!r} needs one, got none")
        if self.role != "audio" and (self.alpha > 0 or self.layers.alpha > 0):
            raise ConfigError(f"alpha: expected 0 with role {self.role!r}, which has no path without the audio")
        check_has_effect(self, "", "jsd_beta", self.divergence == "jsd", "divergence=jsd")
        if self.role != "audio" and self.hears.settings():
            other = "reads words" if self.role == "text" else "hears what the student hears"
            raise ConfigError(f"hears: expected its defaults with role {self.role!r}, which {other}")
        if self.role != "text" and self.reasoning:
            raise ConfigError(f"reasoning: expected false with role {self.role!r}, which reads no metadata")

    def weight_at(self, step: int) -> float:
        """Weight at optimiser step `step` (the first is 1): linear from weight_start to weight."""
        return ramp(self.weight, self.weight_start, self.weight_ramp_steps, step)


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
        check(self.steps >= 1, "optim.steps", ">= 1", self.steps)
        check(self.batch_examples >= 1, "optim.batch_examples", ">= 1", self.batch_examples)
        micro = self.micro_batch_examples
        ok = micro is None or (micro >= 1 and self.batch_examples % micro == 0)
        check(ok, "optim.micro_batch_examples", f"a divisor of batch_examples ({self.batch_examples})", micro)
        check(self.learning_rate > 0, "optim.learning_rate", "> 0", self.learning_rate)
        fraction = self.min_learning_rate_fraction
        check(0 <= fraction <= 1, "optim.min_learning_rate_fraction", "in [0, 1]", fraction)
        check(self.warmup_steps >= 0, "optim.warmup_steps", ">= 0", self.warmup_steps)
        check(0 <= self.beta1 < 1, "optim.beta1", "in [0, 1)", self.beta1)
        check(0 <= self.beta2 < 1, "optim.beta2", "in [0, 1)", self.beta2)
        check(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        check(self.max_grad_norm > 0, "optim.max_grad_norm", "> 0", self.max_grad_norm)
        check(0 <= self.audio_dropout < 1, "optim.audio_dropout", "in [0, 1)", self.audio_dropout)
        check(self.answer_noise >= 0, "optim.answer_noise", ">= 0", self.answer_noise)

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
        check(bool(self.out_dir), "run.out_dir", "a folder", self.out_dir)
        check(self.seed >= 0, "run.seed", ">= 0", self.seed)
        check_one_of(self.parallel, "run.parallel", PARALLEL)
        check(self.log_every_steps >= 1, "run.log_every_steps", ">= 1", self.log_every_steps)
        check(self.save_every_steps >= 1, "run.save_every_steps", ">= 1", self.save_every_steps)
        check(self.keep_last_checkpoints >= 1, "run.keep_last_checkpoints", ">= 1", self.keep_last_checkpoints)
        check_has_effect(self, "run", "hub_private", self.push_to_hub is not None, "run.push_to_hub")
