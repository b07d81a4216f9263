"""Recipes: all settings of a training run, in one checked file.

A recipe is a YAML file with the sections of `Recipe`; `key=value` words on the command line override its values:

    python -m models train caad loss.alpha=1 optim.steps=300 run.out_dir=runs/caad1

The first word is a name from models/training/recipes or the path of a file. Every key is checked. For an unknown key the error
names the nearest known one, and the file (or the command line) that the key came from. Keys have their units in their names.

Beside this file: recipe_sections (the sections and their keys), recipe_files (reading), recipe_keys (listing the keys).
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from models.corpora.hearing import Hearing
from models.training.recipe_checks import ConfigError, check_one_of
from models.training.recipe_sections import (
    DataConfig,
    FeaturesConfig,
    LayersConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
)

OBJECTIVES = ("sft", "ce_only", "kd", "sharpened", "caad", "caad+", "sources")
TEACHER_OBJECTIVES = ("kd", "sharpened", "caad", "caad+")
# Objective caad+ adds these settings to caad: the best of those tried on the dev split of models/experiments/six_systems.py.
CAAD_PLUS = {"alpha": 4.0, "center_text": True}


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
        check_one_of(self.objective, "objective", OBJECTIVES)
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


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars, for JSON."""
    return dataclasses.asdict(config)


def section_of(cls: type, name: str) -> type | None:
    """The config class of a field that is a section; None for a plain value."""
    hint = typing.get_type_hints(cls)[name]
    return hint if dataclasses.is_dataclass(hint) else None


def entry_of(cls: type, name: str) -> type | None:
    """The config class of the entries of a field that maps names to sections; None for any other."""
    arguments = typing.get_args(typing.get_type_hints(cls)[name])
    return arguments[1] if len(arguments) == 2 and dataclasses.is_dataclass(arguments[1]) else None
