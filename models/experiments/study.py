"""The study of docs/protocol.md: several teachers, actors that by the credits no training has heard, and more baselines.

    python -m models study E1                       # 4 folds of actors x 2 teachers; stop it and start it again at will
    python -m models study E1 --teachers 1 --folds 0
    python -m models study E3                       # several tasks whose bias nobody trained; curves over steps of one teacher
    python -m models study E5                       # settings of KD and CAAD on dev, equally many runs of each; curves over steps
    python -m models study axes                     # beyond the papers: what each path hears, alpha by token, on-policy
    python -m models study external                 # ask the finished models of E1 about other games, once and at the end
    python -m models study probes                   # how much of E3's labels the recordings tell without hearing
    python -m models study E1 --collect --write     # only gather what is finished
    python -m models study E1 --smoke               # the same code on synthetic clips and tiny random models

For each teacher:

    corpus of the fold -> features -> teacher -> is it good enough on dev? (the gate)
           -> its own answers on the distillation pool, both of its paths cached  -> kd, caad1, caad2
           -> its answers without any hint, cached                                 -> hint_stripped
           -> its answers under the hints of the clips, other hints for the student -> kd_shuffled
           -> the true labels of the same pool                                     -> ce_true
           -> Stage 1's answers from the metadata, both paths cached               -> kd_metadata, caad2_metadata
           -> every test question in four contexts: none, faithful, adversarial, irrelevant

The rows go to study.csv and the predictions, packed, to study/. With --write they go to models/experiments/results, which has
the rows of all earlier runs: only what is complete is there. The student's language model is healed on made-up sentences, so it
has read no line of the game before its training.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import io
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from models.experiments.commands import study_parser
from models.experiments.negative_paths import NEGATIVE_PATHS, negative_rows, rows_in, write_contrast_cache
from models.experiments.pipeline import (
    Context,
    Stage,
    check_status,
    log_console,
    read_done,
    run_pipeline,
    stage_folders,
)
from models.experiments.shared_steps import (
    BACKBONE,
    TRAINING,
    ask,
    backbone_settings,
    heal_student_lm,
    limited,
    load_speech_lm,
    own_start_words,
    predictions_name,
    read_items,
    recipe_words,
    run_backbones,
    run_features,
    step_words,
    train_by_recipe,
    write_answered_pool,
    write_cache,
    write_parts,
    write_stage_1_pool,
)
from models.experiments.study_endpoints import MIN_TEXT_EFFECT, PAIRS, all_endpoints, as_row, followed_tasks, sentence
from models.io_utils import atomic_write_text, cache_dir, source_commit

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "teacher", "fold", "seed", "system", "task", "category", "context", "accuracy", "items", "commit", "date",
)  # fmt: skip
PROBE_COLUMNS = (
    "fold", "task", "description", "size", "train", "dev", "test", "balanced_accuracy", "commit", "date",
)  # fmt: skip
GATE_COLUMNS = ("teacher", "task", "heard", "shift", "text_effect", "in_study", "weights", "commit", "date")
CONTEXTS = {"neutral": "none", "aligned": "faithful", "conflict": "adversarial", "irrelevant": "irrelevant"}
TEACHER_ALPHAS = (None, 1.0, 2.0)
# How the teacher reads the prompts of a pool, where it differs from the student: models.corpora.hearing.Hearing.
TEACHER_READS: dict[str, dict[str, Any]] = {"stripped": {"context": False}, "shuffled": {"context_from": "own_context"}}
# The gate of a task: a teacher that does not hear it cannot teach it. A bias that is not there cannot be cured.
MIN_HEARD = 0.8
MIN_SHIFT = 0.1
CLEAN_SNR_DB = 60.0  # of the clips that the teacher of the pool "clean" hears


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
# The control of E3 and of its curves: the teacher's scores are as large as CAAD makes them, and nothing is taken away.
SHARPENED = System("sharpened2", "sharpened", 2.0, "own")
CURVES_TEACHER = "f0s0"
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
_TRIED: dict[str, tuple[tuple[str, ...], ...]] = {
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
    min_text_effect: float | None = None  # of a task in the study, see `_text_effect`; None = the gate does not ask for it
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
_NEW_TASKS = ("language", "speaking_rate", "cry")
_TASKS = ("gender", "noise", "reverberation", "bandwidth", "sentence_type", *_NEW_TASKS)
_NATURAL = StudySettings(
    sources=_RECORDED, corpus_size="study_tasks", tasks=("gender", "noise", "reverberation", *_NEW_TASKS), teacher_hinted=False,
)  # fmt: skip
EXPERIMENTS: dict[str, StudySettings] = {
    "E1": StudySettings(),
    "E2": StudySettings(
        sources=_RECORDED, corpus_size="study_tasks", tasks=_TASKS, hearing_steps=240, min_text_effect=MIN_TEXT_EFFECT,
    ),
    "E3": _NATURAL,
    "E5": StudySettings(),  # one teacher of E1, on dev
    "axes": StudySettings(),  # teachers as those of E1, with AXES
    "external": StudySettings(),  # the teachers and students of E1, asked about other games
    "probes": _NATURAL,  # the clips of E3, without a teacher
}  # fmt: skip
_SMOKE: dict[str, Any] = {
    "sources": ("espeak",), "corpus_size": "benchmark_tiny", "tasks": ("gender", "noise"), "max_clips": 8,
    "tiny_backbones": True, "keep_layers": (0, 2), "healing_steps": 3, "healing_sentences": 24, "teacher_steps": 4,
    "student_steps": 2, "batch_examples": 4,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The stages
# --------------------------------------------------------------------------------------------------------------------


def run_corpus(context: Context) -> dict[str, Any]:
    """Make the clips and questions of the fold in four parts: teacher, distill, dev, test."""
    from models.corpora.build import build_corpus
    from models.data.manifest import read_manifest
    from models.io_utils import sha256_file

    settings = context.settings
    path = build_corpus(
        context.folder, sources=settings.sources, size=settings.corpus_size, seed=settings.corpus_seed, tasks=settings.tasks,
        hint_correlation=settings.hint_correlation, fold=settings.fold,
    )
    manifest = read_manifest(path, check_audio=True)
    parts = {
        "teacher": manifest.select(split="train", pool="teacher"),
        "distill": manifest.select(split="train", pool="distill"),
        "dev": manifest.select(split="dev"),
        "test": manifest.select(split="test"),
    }
    parts = {name: limited(examples, settings.max_clips) for name, examples in parts.items()}
    check_actors(parts)
    counts = write_parts(context.folder, parts)
    return {"questions": counts, "unavailable": manifest.header["unavailable"], "manifest_sha256": sha256_file(path)}


def run_clean_corpus(context: Context) -> dict[str, Any]:
    """Make the clips of the fold once more, almost without noise. They have the names of the noisy ones."""
    from models.corpora.build import build_corpus

    settings = context.settings
    build_corpus(
        context.folder, sources=settings.sources, size=settings.corpus_size, seed=settings.corpus_seed, tasks=settings.tasks,
        hint_correlation=settings.hint_correlation, fold=settings.fold,
        **dict.fromkeys(("min_snr_db", "max_snr_db"), context.extra["snr_db"]),
    )
    return {}


def check_actors(parts: Mapping[str, Sequence[Any]]) -> None:
    """SystemExit if an actor of the questions is in a part that is trained on, or in both dev and test."""
    heard = {name: {e.metadata["actor"] for e in examples} for name, examples in parts.items()}
    trained = heard["teacher"] | heard["distill"]
    for one, other in ((heard["dev"], trained), (heard["test"], trained), (heard["dev"], heard["test"])):
        if one & other:
            raise SystemExit(f"corpus: expected no actor in two parts, got {', '.join(sorted(one & other))}")


def run_student_lm(context: Context) -> dict[str, Any]:
    """Make the student's language model, healed on made-up sentences: the same for all folds. See the module's docstring."""
    heal_student_lm(context, healing_examples(context.settings.tasks, context.settings.healing_sentences), seed=0)
    return {}


def healing_examples(tasks: Sequence[str], count: int) -> list[Any]:
    """Questions about made-up sentences: a third without a hint, the others with a random one."""
    from models.corpora.plans.base import OBJECTS, PLACES, SUBJECTS, VERBS
    from models.corpora.plans.recorded import LANGUAGES
    from models.data.manifest import Example
    from models.data.prompts import TASKS, hint_for

    draw, examples = random.Random(0), []
    for number in range(count):
        task = TASKS[tasks[number % len(tasks)]]
        choices = LANGUAGES if task.name == "language" else task.choices  # other corpora have other languages
        words = (draw.choice(SUBJECTS), draw.choice(VERBS), draw.choice(OBJECTS), draw.choice(PLACES))
        text = "The {} {} the {} {}.".format(*words)
        context = "" if draw.random() < 1 / 3 else hint_for(task.name, draw.choice(choices))
        examples.append(
            Example(
                id=f"healing-{number}", audio=None, transcription=text, task=task.name, context=context, question=task.question,
                choices=choices, answer=draw.choice(choices), split="train",
            )
        )  # fmt: skip
    return examples


def run_teacher(context: Context) -> dict[str, Any]:
    """Train the teacher: first, if the settings say so, without any hint, then as its pool is."""
    from models.training.train import main

    settings = context.settings
    if (context.folder / "final").exists():
        return {}
    taught = read_items(context, "teacher")
    manifest, start = context.folders["corpus"] / "teacher.jsonl", context.folders["features"] / "untrained"
    if settings.hearing_steps or not settings.teacher_hinted:
        from models.data.manifest import write_manifest

        bare = context.folders["corpus"] / "teacher_bare.jsonl"
        write_manifest(bare, [dataclasses.replace(e, context="", kind="neutral") for e in taught])
        if not settings.teacher_hinted:
            manifest = bare
    if settings.hearing_steps:
        hearing = context.folder / "hearing"
        words = step_words(settings.hearing_steps, settings.teacher_learning_rate)
        words += ["loss.ce_token_weight=choice"]
        all_words = recipe_words(context, manifest=bare, folder=start, out_dir=hearing, words=words)
        if not (hearing / "final").exists():
            check_status("train", main(["sft_teacher", *all_words]))
        start = hearing / "final"
    words = step_words(settings.teacher_steps, settings.teacher_learning_rate)
    train_by_recipe(context, "sft_teacher", manifest=manifest, folder=start, words=words)
    return {}


def run_gate(context: Context) -> dict[str, Any]:
    """Ask the teacher on dev, and say which tasks it hears and by how much hints mislead it there, and which weights it has."""
    from models.io_utils import fingerprint, sha256_file

    teacher = context.folders["teacher"] / "final"
    ask(context, teacher, part="dev", controls=False)
    weights = fingerprint([sha256_file(path) for path in sorted(teacher.glob("*.safetensors"))])
    return {"tasks": _gate_tasks(context.folder), "weights": weights[:16]}


def _gate_tasks(folder: Path) -> dict[str, dict[str, float]]:
    """What the answers on dev in the gate's folder say about each task."""
    from models.evaluation.predictions import read_predictions

    _, predictions = read_predictions(folder / predictions_name("dev"))
    found = {}
    for task in dict.fromkeys(p.task for p in predictions):
        own = [p for p in predictions if p.task == task]
        heard = _accuracy([p for p in own if p.kind == "neutral"])
        found[task] = {"heard": heard, "shift": _shift(own), "text_effect": _text_effect(own)}
    return found


def run_teacher_answers(context: Context) -> dict[str, Any]:
    """Ask the teacher the test questions, greedily and by contrastive decoding; with `extra["gated"]` as in `run_students`."""
    return ask(context, context.folders["teacher"] / "final", alphas=TEACHER_ALPHAS, tasks=gated_tasks(context))


def run_pool(context: Context) -> dict[str, Any]:
    """Write the answers of the distillation pool, and cache the teacher's paths over them. `extra["pool"]` says how:

        own         the teacher answers; it reads the hints that the student reads
        stripped    it answers and scores without any hint; the student reads the hints
        shuffled    it reads the hint of its clip; the student reads that of another clip, drawn at random
        true        the true labels, without a teacher
        metadata    Stage 1 answers from the metadata, as in the paper
        swapped, reversed, narrow, flat    the answers of "own", with another negative path (negative_paths.py)
        clean       the teacher answers and scores the clips without noise; the student hears the noise

    With `extra["gated"]` only the tasks that pass the gate are taught.
    """
    from models.corpora.hearing import Hearing
    from models.data.manifest import write_manifest

    pool, teacher = context.extra["pool"], context.folders["teacher"] / "final"
    hears = Hearing(**TEACHER_READS.get(pool, {}))
    model, store, extra = load_speech_lm(context, teacher)
    examples = taught(context, [e for e in read_items(context, "distill") if e in store])
    if pool == "shuffled":
        examples = with_other_hints(examples, context.settings.seed)
    result: dict[str, Any] = {}
    if pool in NEGATIVE_PATHS:
        forced = read_items(context, "pool", folder=context.folders["pool_own"])
        options = {"audio_root": context.folders["corpus"], "seed": context.settings.seed, "made": context.folder / "made"}
        negative = negative_rows(pool, model, store, forced, **options)
        write_manifest(context.folder / "pool.jsonl", forced)
        write_contrast_cache(context.folder / "cache", teacher, model, store, extra, forced, negative)
        return {"pool": len(forced)}
    if pool == "clean":
        heard = rows_in(context.folders["corpus_clean"], model, examples)
        result = write_answered_pool(context.folder / "pool.jsonl", model, SimpleNamespace(rows=heard), extra, examples)
        forced = read_items(context, "pool", folder=context.folder)
        write_contrast_cache(context.folder / "cache", teacher, model, store, extra, forced, positive=heard)
        return {"pool": len(forced)} | result
    if pool == "true":
        write_manifest(context.folder / "pool.jsonl", examples)
    elif pool == "metadata":
        result = write_stage_1_pool(context, examples)
    else:
        result = write_answered_pool(context.folder / "pool.jsonl", model, store, extra, examples, hears=hears)
    forced = read_items(context, "pool", folder=context.folder)
    if pool != "true":
        write_cache(context.folder / "cache", teacher, model, store, extra, forced, hears=hears)
    return {"pool": len(forced)} | result


def taught(context: Context, examples: Sequence[Any]) -> list[Any]:
    """The examples of the tasks that are taught; see `gated_tasks`."""
    tasks = gated_tasks(context)
    return [e for e in examples if not tasks or e.task in tasks]


def gated_tasks(context: Context) -> tuple[str, ...]:
    """With `extra["gated"]` the tasks that pass the teacher's gate; otherwise none, which stands for all tasks."""
    if not (context.extra or {}).get("gated"):
        return ()
    tasks = tuple(sorted(in_study(context.result("gate"), context.settings)))
    if not tasks:
        raise SystemExit(f"gate: expected a task that {context.settings.teacher} hears and is misled in, got none")
    return tasks


def with_other_hints(examples: Sequence[Any], seed: int) -> list[Any]:
    """The examples with the contexts of each task in another order. The metadata "own_context" keeps what stood there."""
    draw = random.Random(seed)
    dealt: dict[str, Any] = {}
    for task in dict.fromkeys(e.task for e in examples):
        own = [e for e in examples if e.task == task]
        for e, other in zip(own, draw.sample(own, len(own)), strict=True):
            metadata = {**e.metadata, "own_context": e.context}
            dealt[e.id] = dataclasses.replace(e, context=other.context, metadata=metadata)
    return [dealt[e.id] for e in examples]


def run_students(context: Context) -> dict[str, Any]:
    """Train and ask the students of one pool one after another: those of `extra["systems"]`, asked about `extra["part"]`.

    With `extra["gated"]` they are asked about the tasks that pass the gate alone: the others are not taught.
    """
    from models.experiments.student_group import Cohort

    cohort, extra = Cohort(context), context.extra
    asked = {"part": extra["part"], "tasks": gated_tasks(context), "controls": False}
    return {
        name: cohort.run(context.folder / name, recipe, **_lesson(context, extra["pool"], alpha, more), **asked)
        for name, recipe, alpha, more in extra["systems"]
    }


def run_curves(context: Context) -> dict[str, Any]:
    """Train the students of `extra["curves"]` for longer, and ask them dev on the way: models/experiments/learning_curves.py."""
    from models.experiments.learning_curves import train_and_ask
    from models.experiments.student_group import Cohort

    cohort, tasks = Cohort(context), gated_tasks(context)
    return {
        name: train_and_ask(context, name, recipe, cohort=cohort, tasks=tasks, **_lesson(context, "own", alpha, more))
        for name, recipe, alpha, more in context.extra["curves"]
    }


def _lesson(context: Context, pool: str, alpha: float | None, more: Sequence[str]) -> dict[str, Any]:
    """What a student of the pool is trained on, where it starts, and by which words: arguments of `Cohort.run`."""
    settings, live = context.settings, pool == "live"  # the students' own answers are new in each step: no cache holds them
    folder = context.folders["pool_own" if live else f"pool_{pool}"]
    words = [
        *step_words(settings.student_steps, settings.student_learning_rate),
        "optim.audio_dropout=0",
        f"run.seed={settings.seed}",
        # Only the choice is scored, so only the choice is learned.
        "loss.ce_token_weight=choice",
        "loss.ce_background_weight=0",
        *own_start_words(context),
    ]
    if alpha is not None:
        words += [f"teacher.folder={context.folders['teacher'] / 'final'}", f"loss.alpha={alpha}"]
        words += [] if live else [f"teacher.cache={folder / 'cache'}"]
        words += [f"teacher.hears.{key}={value}" for key, value in TEACHER_READS.get(pool, {}).items()]
    start = context.folders["student_lm"] / "untrained"
    return {"manifest": folder / "pool.jsonl", "start": start, "words": [*words, *more]}


def run_probes(context: Context) -> dict[str, Any]:
    """Probe the clips of the tasks in `extra["tasks"]`: what tells their labels without hearing?"""
    from models.backbones.resolve import load_speech_encoder
    from models.experiments.label_probes import probe_tasks
    from models.speech_lm.feature_store import FeatureStore

    encoder, extractor = load_speech_encoder(backbone_settings(context.settings)["encoder"])
    parts = {part: read_items(context, part) for part in ("teacher", "distill", "dev", "test")}
    store = FeatureStore.load(context.folders["features"] / "features.safetensors")
    tasks = context.extra["tasks"] if not context.settings.tiny_backbones else context.settings.tasks
    return {"probes": probe_tasks(parts, tasks, store, encoder, extractor, context.folders["corpus"])}


def run_external_corpus(context: Context) -> dict[str, Any]:
    """Make the questions about other games, which are the same for all teachers."""
    from models.corpora.build import build_corpus
    from models.data.manifest import read_manifest
    from models.io_utils import sha256_file

    settings, sources = context.settings, context.extra["sources"]
    path = build_corpus(context.folder, sources=sources, size="external", seed=settings.corpus_seed)
    examples = limited(read_manifest(path, check_audio=True).examples, settings.max_clips)
    return {"questions": write_parts(context.folder, {"test": examples}), "manifest_sha256": sha256_file(path)}


def run_external_features(context: Context) -> dict[str, Any]:
    """Run the clips of the external questions through the frozen encoder."""
    from models.backbones.device import pick_device
    from models.speech_lm.features import clip_features
    from models.speech_lm.model import SpeechLM, SpeechLMConfig

    corpus = context.folders["external_corpus"]
    model = SpeechLM.from_config(SpeechLMConfig(**backbone_settings(context.settings)))
    model = model.to(pick_device(context.settings.device))
    store, heard = clip_features(model, read_items(_abroad(context), "test"), audio_root=corpus)
    store.save(context.folder / "features.safetensors")
    return {"clips": len(store), "questions": len(heard)}


def run_external_teacher(context: Context) -> dict[str, Any]:
    """Ask the teacher the external questions, greedily and by contrastive decoding."""
    return ask(_abroad(context), context.folders["teacher"] / "final", alphas=TEACHER_ALPHAS, controls=False)


def run_external_students(context: Context) -> dict[str, Any]:
    """Ask the students of one stage, which `extra["of"]` names, the external questions."""
    from models.experiments.student_group import Cohort

    cohort, trained = Cohort(_abroad(context)), context.folders[context.extra["of"]]
    asked = {}
    for name in context.extra["students"]:
        asked[name] = cohort.ask(context.folder / name, trained / name / "final", controls=False)
    return asked


def _abroad(context: Context) -> Context:
    """The context with the external questions and features in the places of the teacher's own."""
    told = {name.removeprefix("external_"): folder for name, folder in context.folders.items() if name.startswith("external_")}
    return dataclasses.replace(context, folders={**context.folders, **told})


_CORPUS = ("fold", "sources", "corpus_size", "corpus_seed", "tasks", "hint_correlation", "max_clips")
_TEACHING = (*TRAINING, "teacher_steps", "teacher_learning_rate", "teacher_hinted", "hearing_steps")
_STUDYING = (*TRAINING, "student_steps", "student_learning_rate")


def make_stages(settings: StudySettings, experiment: str) -> list[Stage]:
    """All stages of one teacher; each comes after the stages that it needs. The last ones are the students.

    The students with the settings of E5 are among them as soon as study_dev.csv says what E5 has chosen.
    """
    healing = ("lm", "encoder", "tiny_backbones", "keep_layers", "healing_steps", "healing_sentences", "tasks")
    gated = len(settings.tasks) > 1 and not settings.tiny_backbones  # no tiny model passes the gate
    answering, asked = ((*_HEARD, "gate"), {"gated": True}) if gated else (_HEARD, None)
    stages = [
        Stage("backbones", "backbones", (), ("lm", "encoder", "tiny_backbones"), run_backbones),
        Stage("corpus", "corpus", (), _CORPUS, run_corpus),
        Stage("features", "encoder features", ("backbones", "corpus"), BACKBONE, run_features),
        Stage("student_lm", "student: drop layers, heal", ("backbones",), healing, run_student_lm),
        Stage("teacher", "teacher", ("corpus", "features"), _TEACHING, run_teacher),
        Stage("gate", "gate: the teacher on dev", _HEARD, ("device",), run_gate),
        Stage("answers_teacher", "answers of the teacher", answering, ("device",), run_teacher_answers, extra=asked),
    ]
    if experiment == "external":
        own = make_stages(settings, "E1")
        return [*own, *external_stages(own)]
    if experiment == "probes":
        needs = ("backbones", "corpus", "features")
        return [*stages[:3], Stage("probes", "what tells the labels", needs, BACKBONE, run_probes, extra={"tasks": _NEW_TASKS})]
    if experiment == "E5":
        return [*stages, _pool("own"), _students("tried", "own", list(tried_systems()), part="dev"), _curves()]
    if experiment == "axes":
        stages += [_pool("own"), _students("students_own", "own", [s for s in SYSTEMS if s.pool == "own"])]
        stages += [_pool(path) for path in NEGATIVE_PATHS]
        stages += [Stage("corpus_clean", "corpus without noise", (), _CORPUS, run_clean_corpus, {"snr_db": CLEAN_SNR_DB})]
        stages.append(_pool("clean"))
        pools = dict.fromkeys(s.pool for s in AXES)
        return stages + [_students(f"axes_{pool}", pool, [s for s in AXES if s.pool == pool]) for pool in pools]
    for pool in POOLS:
        stages.append(_pool(pool, gated=gated))
        stages.append(_students(f"students_{pool}", pool, [s for s in SYSTEMS if s.pool == pool], gated=gated))
    tuned = [] if settings.tiny_backbones else tuned_systems(RESULTS / "study_dev.csv")
    stages += [_students("students_tuned", "own", tuned, gated=gated)] if tuned else []
    if experiment == "E3":
        stages.append(_students("students_control", "own", [SHARPENED], gated=gated))
        stages += [_curves(SHARPENED, gated=True)] if settings.teacher == CURVES_TEACHER else []
    return stages


_HEARD = ("corpus", "features", "teacher")
EXTERNAL_SOURCES = ("fillets", "drascula")


def external_stages(own: Sequence[Stage]) -> list[Stage]:
    """The stages that ask what the stages `own` have trained about other games."""
    questions = ("external_corpus", "external_features")
    options = {"sources": EXTERNAL_SOURCES}
    backbone = ("lm", "encoder", "tiny_backbones", "device")
    stages = [
        Stage("external_corpus", "other games: questions", (), ("corpus_seed", "max_clips"), run_external_corpus, extra=options),
        Stage("external_features", "other games: features", ("backbones", "external_corpus"), backbone, run_external_features),
        Stage("external_teacher", "other games: teacher", (*questions, "teacher"), ("device",), run_external_teacher),
    ]
    for stage in own:
        if stage.run is run_students:
            asked = {"of": stage.name, "students": [name for name, *_ in stage.extra["systems"]]}
            title = f"other games: {stage.title}"
            needs = (*questions, stage.name)
            stages.append(Stage(f"external_{stage.name}", title, needs, ("device",), run_external_students, extra=asked))
    return stages


def _pool(pool: str, *, gated: bool = False) -> Stage:
    """The stage of one pool. `gated`: only the tasks that pass the gate are in it, which the stage then needs."""
    needs = [*_HEARD, *(["pool_own"] if pool in NEGATIVE_PATHS else ["corpus_clean"] if pool == "clean" else [])]
    extra: dict[str, Any] = {"pool": pool}
    if gated:
        needs.append("gate")
        extra["gated"] = True
    return Stage(f"pool_{pool}", f"Y: {pool}", tuple(needs), TRAINING, run_pool, extra=extra)


def _students(name: str, pool: str, systems: Sequence[System], *, part: str = "test", gated: bool = False) -> Stage:
    """The stage that trains the systems of one pool and asks them the questions of `part`. `gated`: as in `_pool`."""
    told: dict[str, Any] = {
        "pool": pool,
        "part": part,
        "systems": [(s.name, s.recipe, s.alpha, s.words) for s in systems],
        "recipes": {s.recipe: _as_written(s.recipe) for s in systems},
    }
    needs = [*_HEARD, "student_lm", "pool_own" if pool == "live" else f"pool_{pool}"]
    if gated:
        needs.append("gate")
        told["gated"] = True
    return Stage(name, name.replace("_", ": "), tuple(needs), _STUDYING, run_students, extra=told)


def _curves(*more: System, gated: bool = False) -> Stage:
    """The stage of the curves over steps, by the settings of `kd` and `caad2`, and of `more`. `gated`: as in `_pool`."""
    systems = [*(s for s in SYSTEMS if s.name in ("kd", "caad2")), *more]
    told: dict[str, Any] = {
        "curves": [(s.name, s.recipe, s.alpha, s.words) for s in systems],
        "recipes": {s.recipe: _as_written(s.recipe) for s in systems},
    }
    needs = [*_HEARD, "student_lm", "pool_own"]
    if gated:
        needs.append("gate")
        told["gated"] = True
    return Stage("curves", "curves over steps", tuple(needs), _STUDYING, run_curves, extra=told)


def tuned_systems(chosen: Path) -> list[System]:
    """kd_tuned and caad_tuned, with the settings that E5 has chosen; none until the file says them."""
    best = {row["family"]: row["try"] for row in _read_rows(chosen) if row["chosen"]}
    return [dataclasses.replace(s, name=f"{s.recipe}_tuned") for s in tried_systems() if s.name in best.values()]


def tried_systems() -> Iterator[System]:
    """What E5 trains: the settings of `_TRIED`."""
    for family, tries in _TRIED.items():
        for number, words in enumerate(tries):
            yield System(f"{family}_{number}", family, 0.0 if family == "kd" else 2.0, "own", words)


def _as_written(recipe: str) -> str:
    """The file of a recipe: a part of the fingerprint of the stages that use it. New keys with defaults do not change it."""
    from models.training.recipe_files import find_recipe

    return find_recipe(recipe).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# What came out
# --------------------------------------------------------------------------------------------------------------------


def _accuracy(predictions: Sequence[Any]) -> float:
    from models.evaluation.scoring import judge

    return float(judge(predictions).mean()) if predictions else float("nan")


def _shift(predictions: Sequence[Any]) -> float:
    """TIR_adv: of the questions that are right without a text, the share that is wrong under a false one."""
    from models.evaluation.scoring import judge

    right = {(p.pair_id, p.kind): bool(r) for p, r in zip(predictions, judge(predictions), strict=True)}
    known = [pair for pair, kind in right if kind == "neutral" and right[pair, kind]]
    fallen = [not right[pair, "conflict"] for pair in known if (pair, "conflict") in right]
    return statistics.mean(fallen) if fallen else float("nan")


def _text_effect(predictions: Sequence[Any]) -> float:
    """Accuracy under faithful minus accuracy under adversarial text. A constant answer has 0, however large its Shift is."""
    faithful, adversarial = (_accuracy([p for p in predictions if p.kind == kind]) for kind in ("aligned", "conflict"))
    return faithful - adversarial


def finished(settings: StudySettings, stages: Sequence[Stage], root: Path, *, part: str = "test") -> dict[str, list[Any]]:
    """System -> predictions on `part`, of everything of this teacher that is complete."""
    from models.evaluation.predictions import read_predictions

    folders = stage_folders(stages, settings, root)
    found: dict[str, list[Any]] = {}
    if part == "test" and read_done(folders["answers_teacher"]) is not None:
        for alpha in TEACHER_ALPHAS:
            name = "teacher" if alpha is None else f"teacher_cd{alpha:g}"
            found[name] = read_predictions(folders["answers_teacher"] / predictions_name(part, alpha))[1]
    for stage in stages:
        for name, *_ in (stage.extra or {}).get("systems", ()):
            folder = folders[stage.name] / name
            if stage.extra["part"] == part and (folder / "asked.json").exists():
                found[name] = read_predictions(folder / predictions_name(part))[1]
    return {name: [p for p in predictions if not p.control] for name, predictions in found.items()}


def finished_external(settings: StudySettings, stages: Sequence[Stage], root: Path) -> dict[str, dict[str, list[Any]]]:
    """Game -> system -> predictions, of all models of this teacher that were asked about other games."""
    from models.evaluation.predictions import read_predictions

    folders = stage_folders(stages, settings, root)
    files: dict[str, Path] = {}
    if read_done(folders["external_teacher"]) is not None:
        for alpha in TEACHER_ALPHAS:
            name = "teacher" if alpha is None else f"teacher_cd{alpha:g}"
            files[name] = folders["external_teacher"] / predictions_name("test", alpha)
    for stage in stages:
        if stage.run is run_external_students:
            for name in stage.extra["students"]:
                if (folders[stage.name] / name / "asked.json").exists():
                    files[name] = folders[stage.name] / name / predictions_name("test")
    answers = {system: read_predictions(path)[1] for system, path in files.items()}
    return {
        source: {system: [p for p in own if p.speaker.startswith(f"{source}-")] for system, own in answers.items()}
        for source in EXTERNAL_SOURCES
    }


def table_rows(settings: StudySettings, found: Mapping[str, Sequence[Any]], *, prefix: str = "") -> list[dict[str, Any]]:
    """The rows of study.csv of one teacher: accuracy by system, task and context."""
    from models.data.prompts import TASKS

    origin = _origin()
    rows = []
    for system, predictions in found.items():
        for task in dict.fromkeys(p.task for p in predictions):
            for kind, context in CONTEXTS.items():
                own = [p for p in predictions if p.task == task and p.kind == kind]
                if own:
                    rows.append(
                        {
                            "teacher": prefix + settings.teacher, "fold": settings.fold, "seed": settings.seed, "system": system,
                            "task": task, "category": TASKS[task].category, "context": context,
                            "accuracy": f"{_accuracy(own):.4f}", "items": len(own), **origin,
                        }
                    )  # fmt: skip
    return rows


def _origin() -> dict[str, str]:
    """Commit and date of a row."""
    return {"commit": source_commit("models", "kdkernels", "csrc"), "date": datetime.date.today().isoformat()}


def merge_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] = COLUMNS,
    keys: Sequence[str] = ("teacher", "system", "task", "context"),
    values: Sequence[str] = ("accuracy", "items"),
) -> int:
    """Add rows to the CSV, which keeps its other rows. An equal result keeps its commit and date. Returns the number of rows.

    Args:
        keys: the columns that say which row of the file a row replaces.
        values: the columns that make the result.
    """
    held: dict[tuple[str, ...], Mapping[str, Any]] = {tuple(row[name] for name in keys): row for row in _read_rows(path)}
    for row in rows:
        key = tuple(str(row[name]) for name in keys)
        if key not in held or any(held[key].get(name) != str(row[name]) for name in values):
            held[key] = row
    _write_csv(path, [held[name] for name in sorted(held, key=lambda k: k[0])], columns)
    return len(held)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def replace_teacher(folder: Path, gate: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the gate's rows of one teacher into the tables of `folder`. If the tables have another teacher of the same name (the
    training on another machine rounds differently), its rows and predictions are removed: students of two teachers do not
    compare. Returns a sentence that says so, if it was the case."""
    path, said = folder / "study_gate.csv", []
    name, weights = gate[0]["teacher"], gate[0]["weights"]
    if any(row["teacher"] == name and row.get("weights", "") != weights for row in _read_rows(path)):
        rows = _read_rows(folder / "study.csv")
        kept = [row for row in rows if row["teacher"] != name]
        if len(kept) < len(rows):
            _write_csv(folder / "study.csv", kept, COLUMNS)
        for packed in (folder / "study").glob(f"{name}-*.jsonl.gz"):
            packed.unlink()
        _write_csv(path, [row for row in _read_rows(path) if row["teacher"] != name], GATE_COLUMNS)
        said = [f"{name} was trained again: {len(rows) - len(kept)} rows of the earlier teacher of this name are removed"]
    merge_rows(path, gate, columns=GATE_COLUMNS, keys=("teacher", "task"), values=("heard", "shift", "text_effect"))
    return said


def pack_all(folder: Path, teacher: str, found: Mapping[str, Sequence[Any]]) -> None:
    """Write the predictions of each system to TEACHER-SYSTEM.jsonl.gz. Scores have three places where that changes no answer."""
    from models.evaluation.predictions import pack_predictions

    def rounded(p: Any) -> Any:
        short = dataclasses.replace(p, scores={choice: round(score, 3) for choice, score in p.scores.items()})
        return short if short.said() == p.said() else p

    for system, predictions in found.items():
        rows = [rounded(p) for p in sorted(predictions, key=lambda p: p.id)]
        pack_predictions(folder / f"{teacher}-{system}.jsonl.gz", {"teacher": teacher, "system": system}, rows)


def dev_rows(found: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows of study_dev.csv: what each try of E5 scores on dev, and the best of each family by the mean of the contexts."""
    words = {s.name: s.words for s in tried_systems()}
    rows: list[dict[str, Any]] = []
    for name, predictions in found.items():
        scores = {c: _accuracy([p for p in predictions if p.kind == kind]) for kind, c in CONTEXTS.items()}
        mean = statistics.mean(scores.values())
        settings = " ".join(words[name]) or "as kd and caad2 of the study"
        rows.append({"family": name.split("_")[0], "try": name, "settings": settings} | scores | {"mean": mean, "chosen": ""})
    for family, tries in _TRIED.items():
        own = [row for row in rows if row["family"] == family]
        if len(own) == len(tries):
            max(own, key=lambda row: row["mean"])["chosen"] = "yes"
    return rows


def in_study(gate: Mapping[str, Any], settings: StudySettings) -> set[str]:
    """The tasks that pass the gate."""
    return {task for task, seen in gate["tasks"].items() if not _faults(seen, settings)}


def _faults(seen: Mapping[str, float], settings: StudySettings) -> list[str]:
    """Why a task does not pass the gate, in words; empty if it passes."""
    least = settings.min_text_effect
    faults = {
        f"it hears less than {MIN_HEARD:.0%}": seen["heard"] < MIN_HEARD,
        f"Shift below {MIN_SHIFT:.0%}": seen["shift"] < MIN_SHIFT,
        f"text effect below {least or 0:.0%}": least is not None and seen["text_effect"] < least,
    }
    return [fault for fault, found in faults.items() if found]


def gate_sentences(settings: StudySettings, gate: Mapping[str, Any]) -> list[str]:
    """Per task: whether the teacher hears it and is misled on dev, and what follows."""
    sentences = []
    for task, seen in gate["tasks"].items():
        faults = _faults(seen, settings)
        verdict = f"NOT in the study: {', '.join(faults)}" if faults else "in the study"
        effect = f", text effect {seen['text_effect']:.1%}" if "text_effect" in seen else ""  # earlier versions had none
        sentences.append(
            f"{settings.teacher}, {task}: dev without a hint {seen['heard']:.1%}, Shift {seen['shift']:.1%}{effect}; {verdict}"
        )
    return sentences


def gate_rows(settings: StudySettings, gate: Mapping[str, Any], *, prefix: str = "") -> list[dict[str, Any]]:
    """The rows of study_gate.csv of one teacher: by task what it hears on dev, its Shift and text effect there, and whether the
    task is in the study; and a hash of the teacher's weights."""
    return [
        {
            "teacher": prefix + settings.teacher, "task": task, "heard": f"{seen['heard']:.4f}", "shift": f"{seen['shift']:.4f}",
            "text_effect": f"{seen['text_effect']:.4f}", "in_study": "yes" if task in in_study(gate, settings) else "no",
            "weights": gate.get("weights", ""), **_origin(),
        }
        for task, seen in gate["tasks"].items()
    ]  # fmt: skip


def print_table(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy in %, systems by contexts, as the mean over teachers and tasks."""
    teachers = {row["teacher"] for row in rows}
    table = Table(title=f"accuracy in %, mean over {len(teachers)} teacher(s)")
    for column in ("system", *CONTEXTS.values(), "teachers"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        cells = []
        for context in CONTEXTS.values():
            values = [100 * float(row["accuracy"]) for row in own if row["context"] == context]
            cells.append(f"{statistics.mean(values):.1f}" if values else "-")
        table.add_row(system, *cells, str(len({row["teacher"] for row in own})))
    console.print(table)


def chosen_teachers(experiment: str, folds: Sequence[int], teachers: int, *, smoke: bool, device: str) -> list[StudySettings]:
    """The settings of each teacher of an experiment: first one of each fold, then the second ones. E5 has only the first, and
    the probes one of each fold."""
    base = dataclasses.replace(EXPERIMENTS[experiment], device=device)
    if smoke:
        base = dataclasses.replace(base, **_SMOKE, hearing_steps=min(base.hearing_steps, 2))
    every = [dataclasses.replace(base, fold=fold, seed=seed) for seed in range(teachers) for fold in folds]
    alone = {"E5": 1, "probes": len(folds)}
    return every[: alone.get(experiment, len(every))]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = study_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    if arguments.write and arguments.fast_smoke:
        parser.error("--write: the committed tables need a whole run")
    for name in arguments.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"EXPERIMENT: expected some of {', '.join(EXPERIMENTS)}, got {name!r}")
    if arguments.teachers < 1 or not set(arguments.folds) <= set(range(4)):
        parser.error("--teachers, --folds: expected at least 1 teacher and folds from 0 to 3")
    root = Path(arguments.cache_dir) if arguments.cache_dir else cache_dir() / "study"
    console, started = log_console(), time.monotonic()
    for experiment in arguments.experiments or ["E1"]:
        options = {"smoke": arguments.fast_smoke, "device": arguments.device}
        teachers = chosen_teachers(experiment, arguments.folds, arguments.teachers, **options)
        if arguments.run_stage:
            (settings,) = [s for s in teachers if s.teacher == arguments.only]
            stages = make_stages(settings, experiment)
            run_pipeline(arguments, stages, settings, root, command="study", argv=words, console=console)
        for settings in teachers:
            stages = make_stages(settings, experiment)
            own_words = [*_words_of(arguments, experiment), "--only", settings.teacher]
            run = {"external": _run_external, "probes": _run_probes}.get(experiment, _run)
            try:
                if not arguments.collect:
                    run(arguments, experiment, settings, stages, root, own_words, console)
            finally:
                _save(arguments, experiment, settings, stages, root, console)
        _print_endpoints(arguments, experiment, console)
    console.print(f"total {time.monotonic() - started:.0f} s; {Path(arguments.out).resolve()}", soft_wrap=True)
    return 0


def _words_of(arguments: Any, experiment: str) -> list[str]:
    """The words of the command for the process of a stage."""
    words = [experiment, "--teachers", str(arguments.teachers), "--folds", *map(str, arguments.folds)]
    words += ["--device", arguments.device]
    words += ["--smoke"] if arguments.fast_smoke else []
    return words + (["--cache-dir", arguments.cache_dir] if arguments.cache_dir else [])


def _run(
    arguments: Any, experiment: str, settings: StudySettings, stages: Sequence[Stage], root: Path, words: Sequence[str],
    console: Console,
) -> None:  # fmt: skip
    """Run the stages of one teacher. The gate may end it before any student is trained."""
    console.print(f"[bold]{experiment}, teacher {settings.teacher}[/bold]")
    until = next(number for number, stage in enumerate(stages) if stage.name == "gate") + 1
    options = {"command": "study", "argv": words, "console": console}
    folders, _ = run_pipeline(arguments, stages[:until], settings, root, **options)
    gate = read_done(folders["gate"])["result"]
    for line in gate_sentences(settings, gate):
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    if in_study(gate, settings) or arguments.fast_smoke:
        made = argparse.Namespace(**{**vars(arguments), "fresh": False})  # the stages up to the gate stay
        run_pipeline(made, stages, settings, root, **options)


def _run_external(
    arguments: Any, experiment: str, settings: StudySettings, stages: Sequence[Stage], root: Path, words: Sequence[str],
    console: Console,
) -> None:  # fmt: skip
    """Ask what is trained. Nothing is trained here: what E1 has not finished is left out, with a line that says so."""
    folders = stage_folders(stages, settings, root)
    ready: dict[str, Stage] = {}
    for stage in stages:
        asks = stage.name.startswith("external_")
        if set(stage.needs) <= ready.keys() and (asks or read_done(folders[stage.name]) is not None):
            ready[stage.name] = stage
    missing = [stage.name for stage in stages if stage.run is run_external_students and stage.name not in ready]
    console.print(f"[bold]{experiment}, teacher {settings.teacher}[/bold]")
    if missing or "external_teacher" not in ready:
        told = ", ".join(name.removeprefix("external_") for name in missing) or "teacher"
        console.print(f"- not asked, since E1 has not finished them: {told}", highlight=False, soft_wrap=True)
    if "external_teacher" not in ready:
        return
    if arguments.fresh:  # the models of E1 stay
        for name in ready:
            if name.startswith("external_"):
                shutil.rmtree(folders[name], ignore_errors=True)
    made = argparse.Namespace(**{**vars(arguments), "fresh": False})
    run_pipeline(made, list(ready.values()), settings, root, command="study", argv=words, console=console)


def _run_probes(
    arguments: Any, experiment: str, settings: StudySettings, stages: Sequence[Stage], root: Path, words: Sequence[str],
    console: Console,
) -> None:  # fmt: skip
    """Probe the clips of one fold. No model is trained."""
    console.print(f"[bold]{experiment}, fold {settings.fold}[/bold]")
    run_pipeline(arguments, stages, settings, root, command="study", argv=words, console=console)


def _save(
    arguments: Any, experiment: str, settings: StudySettings, stages: Sequence[Stage], root: Path, console: Console
) -> None:
    """Write what is complete."""
    from models.experiments.learning_curves import curve_rows
    from models.reporting.results_csv import rows_csv
    from models.reporting.study import EXTERNAL

    targets = [Path(arguments.out), *([RESULTS] if arguments.write else [])]
    curves = stage_folders(stages, settings, root).get("curves")
    if curves is not None:
        names, teacher = [s.name for s in (*SYSTEMS, SHARPENED)], {"teacher": settings.teacher, "seed": settings.seed}
        rows = curve_rows(curves, names, settings.student_steps, teacher, by_task=experiment != "E5")
        for folder in targets if rows else ():
            atomic_write_text(folder / f"study_curves{'' if experiment == 'E5' else '_' + experiment}.csv", rows_csv(rows))
    if experiment == "E5":
        rows = dev_rows(finished(settings, stages, root, part="dev"))
        for folder in targets if rows else ():
            atomic_write_text(folder / "study_dev.csv", rows_csv(rows))
        return
    if experiment == "probes":
        done = read_done(stage_folders(stages, settings, root)["probes"])
        for folder in targets if done is not None else ():
            rows = [{"fold": settings.fold, **row, **_origin()} for row in done["result"]["probes"]]
            keys, values = PROBE_COLUMNS[:3], PROBE_COLUMNS[3:8]
            merge_rows(folder / "study_probes.csv", rows, columns=PROBE_COLUMNS, keys=keys, values=values)
        return
    if experiment == "external":
        for source, found in finished_external(settings, stages, root).items():
            _write_rows(settings, found, f"{EXTERNAL}{source}-", targets, console)
        return
    found = finished(settings, stages, root)
    asked = stage_folders(stages, settings, root)["gate"]
    gate = read_done(asked)
    if gate is not None and not arguments.fast_smoke:
        for folder in targets:
            now = gate["result"] | {"tasks": _gate_tasks(asked)}  # the gate of an earlier version has no text effect
            rows = gate_rows(settings, now, prefix=_prefix(experiment))
            for line in replace_teacher(folder, rows):
                console.print(f"- {folder}: {line}", highlight=False, soft_wrap=True)
        kept = in_study(gate["result"], settings)
        found = {s: [p for p in own if s.startswith("teacher") or p.task in kept] for s, own in found.items()}
        found = {system: own for system, own in found.items() if own}
    _write_rows(settings, found, _prefix(experiment), targets, console)


def _write_rows(
    settings: StudySettings, found: Mapping[str, Sequence[Any]], prefix: str, targets: Sequence[Path], console: Console
) -> None:
    """Add the rows and the packed predictions of one teacher to each folder of `targets`, and print the table."""
    rows = table_rows(settings, found, prefix=prefix)
    for folder in targets if rows else ():
        merge_rows(folder / "study.csv", rows)
        pack_all(folder / "study", prefix + settings.teacher, found)
    if rows:
        print_table(console, rows)


def _prefix(experiment: str) -> str:
    """Of the teachers' names in the tables: those of E1 have none."""
    return "" if experiment == "E1" else f"{experiment}-"


def _print_endpoints(arguments: Any, experiment: str, console: Console) -> None:
    """P1 to P3 of all teachers whose predictions are kept, in words and as study_endpoints.csv. Dev and the probes have none,
    and other games neither: the protocol makes no claim about them."""
    if experiment in ("E5", "external", "probes"):
        return
    from models.reporting.results_csv import rows_csv

    pairs = AXES_PAIRS if experiment == "axes" else PAIRS
    for folder in (Path(arguments.out), *([RESULTS] if arguments.write else [])):
        found = all_endpoints(folder / "study", pairs, prefix=_prefix(experiment))
        if not found:
            continue
        name = f"study_endpoints{'' if experiment == 'E1' else '_' + experiment}.csv"
        atomic_write_text(folder / name, rows_csv([as_row(e) for e in found]))
        if experiment == "E3":  # its gate did not ask for a text effect
            kept = followed_tasks(_read_rows(folder / "study_gate.csv"), _prefix(experiment))
            followed = all_endpoints(folder / "study", pairs, prefix=_prefix(experiment), kept=kept)
            atomic_write_text(folder / "study_followed.csv", rows_csv([as_row(e) for e in followed]))
        if folder == Path(arguments.out):
            for endpoint in found:
                console.print(f"- {sentence(endpoint)}", highlight=False, soft_wrap=True)
