"""What the study trains: its students, its experiments, and the settings of each teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.experiments.negative_paths import NEGATIVE_PATHS
from models.experiments.study_endpoints import MIN_TEXT_EFFECT

RESULTS = Path(__file__).parent / "results"
CONTEXTS = {"neutral": "none", "aligned": "faithful", "conflict": "adversarial", "irrelevant": "irrelevant"}
TEACHER_ALPHAS = (None, 1.0, 2.0)


@dataclass(frozen=True)
class System:
    """One student. `pool` is what it learns from: see `run_pool`."""

    name: str
    recipe: str
    alpha: float | None
    pool: str
    words: tuple[str, ...] = ()


SYSTEMS = (
    System("kd", "kd", 0.0, "own"),
    System("caad2", "caad", 2.0, "own"),
    System("caad1", "caad", 1.0, "own"),
    System("hint_stripped", "kd", 0.0, "stripped"),
    System("kd_shuffled", "kd", 0.0, "shuffled"),
    System("ce_true", "sft_teacher", None, "true"),
    System("kd_metadata", "kd", 0.0, "metadata"),
    System("caad2_metadata", "caad", 2.0, "metadata"),
)
# The control of E1B, E2, E3 and its curves: the teacher's scores are as large as CAAD makes them, and nothing is taken away.
SHARPENED = System("sharpened2", "sharpened", 2.0, "own")
CURVES_TEACHER = "f0s0"
# How long to train, in E1B and E2: dev of each asks as many runs of KD as of CAAD, and one choice of each is for all teachers.
STEP_SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the steps of the study's students
_STEPPED = (System("kd", "kd", 0.0, "own"), System("caad2", "caad", 2.0, "own"))
_ON_POLICY = ("loss.kd_token_weight=uniform", "data.on_policy_max_new_tokens=12")
# Beyond the papers, each against caad2: what the contrast takes away, alpha by token, and answers of the student's own.
AXES = (
    *(System(f"caad2_{path}", "caad", 2.0, path) for path in NEGATIVE_PATHS),
    System("caad2_clean_teacher", "caad", 2.0, "clean"),
    System("kd_clean_teacher", "kd", 0.0, "clean"),  # what a better hearing of the teacher gives without any contrast
    System("caad2_adaptive", "caad", 2.0, "own", ("loss.alpha_half_divergence=0.1",)),
    System("caad2_centered", "caad", 2.0, "own", ("loss.center_text=true",)),
    System("caad2_uniform", "caad", 2.0, "own", ("loss.kd_token_weight=uniform",)),  # the off-policy one of the next four
    *(
        System(f"caad2_{name}", "caad", 2.0, "live", (*_ON_POLICY, *words))
        for name, words in {
            "on50": ("data.on_policy_fraction=0.5",),
            "on100": ("data.on_policy_fraction=1",),
            "on100_reverse": ("data.on_policy_fraction=1", "loss.divergence=reverse_kl"),
            "on100_jsd": ("data.on_policy_fraction=1", "loss.divergence=jsd"),
        }.items()
    ),
)
# Each axis against caad2. Where the teacher hears more, KD from it stands beside: against CAAD from it, and against plain KD.
AXES_PAIRS = (
    *((s.name, "caad2") for s in AXES if s.recipe == "caad"),
    ("caad2_clean_teacher", "kd_clean_teacher"),
    ("kd_clean_teacher", "kd"),
)
POOLS = tuple(dict.fromkeys(system.pool for system in SYSTEMS))
# What E5 tries on dev: eight runs of each. Each changes the first, which is the setting of `kd` and of `caad2` above.
TRIED: dict[str, tuple[tuple[str, ...], ...]] = {
    "kd": (
        (), ("loss.kd_weight=0.5",), ("loss.kd_weight=0.9",), ("loss.temperature=1",), ("loss.temperature=4",),
        ("optim.steps=240",), ("loss.kd_weight=0.9", "optim.steps=240"), ("loss.temperature=1", "optim.steps=240"),
    ),
    "caad": (
        (), ("loss.alpha=1",), ("loss.alpha=4",), ("loss.kd_weight=0.5",), ("loss.kd_weight=0.9",), ("loss.temperature=1",),
        ("loss.temperature=4",), ("optim.steps=240",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StudySettings:
    """Everything that decides the students of one teacher."""

    fold: int = 0  # of actors (models/corpora/plans/base.py)
    seed: int = 0  # of teacher and students
    sources: tuple[str, ...] = ("queen", "espeak")
    corpus_size: str = "study"
    corpus_seed: int = 0
    tasks: tuple[str, ...] = ("gender",)
    hint_correlation: float = 0.995  # share of true hints in the teacher's training
    teacher_hinted: bool = True  # false = the teacher never sees a hint: whatever bias it has is its language model's
    hearing_steps: int = 0  # of a first phase of the teacher's training that has no hints
    min_text_effect: float | None = None  # of a task in the study, see `text_effect`; None = the gate does not ask for it
    max_clips: int | None = None  # of each pool and of the questions; None = all
    lm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    encoder: str = "openai/whisper-tiny.en"
    tiny_backbones: bool = False
    keep_layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 27, 28, 29)
    healing_steps: int = 96
    healing_sentences: int = 800
    teacher_steps: int = 240
    teacher_learning_rate: float = 1e-3
    student_steps: int = 120
    student_learning_rate: float = 2e-3
    batch_examples: int = 16
    device: str = "cpu"

    @property
    def teacher(self) -> str:
        """The teacher's name in the tables."""
        return f"f{self.fold}s{self.seed}"


_RECORDED = ("queen", "drascula", "hedgewars")
NEW_TASKS = ("language", "speaking_rate", "cry")
_TASKS = ("gender", "noise", "reverberation", "bandwidth", "sentence_type", *NEW_TASKS)
_NATURAL = StudySettings(
    sources=_RECORDED, corpus_size="study_tasks", tasks=("gender", "noise", "reverberation", *NEW_TASKS), teacher_hinted=False,
)  # fmt: skip
EXPERIMENTS: dict[str, StudySettings] = {
    "E1": StudySettings(),
    "E1B": StudySettings(),  # E1 again with new teachers and all systems
    "E2": StudySettings(
        sources=_RECORDED, corpus_size="study_tasks", tasks=_TASKS, hearing_steps=240, min_text_effect=MIN_TEXT_EFFECT,
    ),
    "E3": _NATURAL,
    "E5": StudySettings(),  # one teacher of E1, on dev
    "axes": StudySettings(),  # teachers as those of E1, with AXES
    "external": StudySettings(),  # the teachers and students of E1B, asked about other games
    "probes": _NATURAL,  # the clips of E3, without a teacher
}  # fmt: skip
_FIRST_SEEDS = {"E1B": 4, "external": 4}  # E1 had 0 to 3; the other experiments begin with 0
_SMOKE: dict[str, Any] = {
    "sources": ("espeak",), "corpus_size": "benchmark_tiny", "tasks": ("gender", "noise"), "max_clips": 8,
    "tiny_backbones": True, "keep_layers": (0, 2), "healing_steps": 3, "healing_sentences": 24, "teacher_steps": 4,
    "student_steps": 2, "batch_examples": 4,
}  # fmt: skip
EXTERNAL_SOURCES = ("fillets", "drascula")


def tried_systems() -> Iterator[System]:
    """What E5 trains: the settings of `TRIED`."""
    for family, tries in TRIED.items():
        for number, words in enumerate(tries):
            yield System(f"{family}_{number}", family, 0.0 if family == "kd" else 2.0, "own", words)


def step_systems(student_steps: int) -> Iterator[System]:
    """What E1B and E2 train to choose the steps: "kd_30" and so on."""
    for system in _STEPPED:
        for steps in dict.fromkeys(max(1, round(share * student_steps)) for share in STEP_SHARES):
            yield dataclasses.replace(system, name=f"{system.name}_{steps}", words=(f"optim.steps={steps}",))


def teacher_prefix(experiment: str) -> str:
    """Begins the teachers' names in the tables: those of E1 have none."""
    return "" if experiment == "E1" else f"{experiment}-"


def chosen_teachers(experiment: str, folds: Sequence[int], teachers: int, *, smoke: bool, device: str) -> list[StudySettings]:
    """The settings of each teacher of an experiment: first one of each fold, then the second ones. E5 has only the first, and
    the probes one of each fold."""
    base = dataclasses.replace(EXPERIMENTS[experiment], device=device)
    if smoke:
        base = dataclasses.replace(base, **_SMOKE, hearing_steps=min(base.hearing_steps, 2))
    first = _FIRST_SEEDS.get(experiment, 0)
    every = [dataclasses.replace(base, fold=fold, seed=first + number) for number in range(teachers) for fold in folds]
    alone = {"E5": 1, "probes": len(folds)}
    return every[: alone.get(experiment, len(every))]
