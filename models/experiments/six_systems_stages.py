"""The stages of `models six-systems`: what each makes, and what it needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.experiments.pipeline import Context, Stage
from models.experiments.shared_steps import (
    TRAINING,
    ask,
    first_stages,
    four_parts,
    load_model,
    load_speech_lm,
    own_start_words,
    read_items,
    step_words,
    train_supervised,
    write_answered_pool,
    write_cache,
    write_parts,
    write_stage_1_pool,
)
from models.experiments.six_systems_settings import (
    ANCHORS,
    BEFORE_ALPHAS,
    LAYERED,
    LONG,
    OF_LONG,
    SWEEPS,
    TEACHER_ALPHAS,
    TIMES,
    SixSettings,
    System,
    student_stages,
)

LATENCY_QUESTIONS = 24
LATENCY_TOKENS = 8


def run_corpus(context: Context) -> dict[str, Any]:
    """Make clips, questions and hints in four parts: teacher, distill, dev, test."""
    from models.corpora.build import build_corpus
    from models.data.manifest import read_manifest

    settings = context.settings
    path = build_corpus(
        context.folder, sources=settings.sources, size=settings.corpus_size, seed=settings.corpus_seed, tasks=settings.tasks,
        hint_correlation=settings.hint_correlation, fold=None,
    )
    manifest = read_manifest(path, check_audio=True)
    counts = write_parts(context.folder, four_parts(manifest, settings.max_clips))
    return {"questions": counts, "unavailable": manifest.header["unavailable"]}


def run_teacher(context: Context) -> dict[str, Any]:
    """Train the teacher on its biased items.

    extra["times"]: how many times `teacher_steps` it is trained; by default once.
    """
    settings, times = context.settings, (context.extra or {}).get("times", 1)
    if not (context.folder / "final").exists():
        train_supervised(context, words=step_words(int(times * settings.teacher_steps), settings.teacher_learning_rate))
    return {}


def run_teacher_answers(context: Context) -> dict[str, Any]:
    """Ask the teacher of the stage `extra["of"]` with each of `extra["alphas"]` (None = greedy), and on dev greedily."""
    of, alphas = context.extra["of"], context.extra["alphas"]
    folder, split = context.folders[of] / "final", context.settings.split
    result = {split: ask(context, folder, part=split, alphas=alphas)}
    if split != "dev":
        result["dev"] = ask(context, folder, part="dev", controls=False)
    return result


def run_pool(context: Context) -> dict[str, Any]:
    """Let `extra["anchor"]` write Y of the distillation pool, and cache both paths of the teacher over it for all students.

    extra["teacher"]: the stage that trained the teacher; by default "teacher".
    """
    from models.data.manifest import write_manifest

    anchor = context.extra["anchor"]
    teacher = _teacher(context)
    model, store, extra = load_speech_lm(context, teacher)
    examples = [e for e in read_items(context, "distill") if e in store]
    if anchor == "teacher":
        result = write_answered_pool(context.folder / "pool.jsonl", model, store, extra, examples)
    elif anchor == "template":
        write_manifest(context.folder / "pool.jsonl", examples)
        result = {}
    else:
        result = write_stage_1_pool(context, examples)
    forced = read_items(context, "pool", folder=context.folder)
    write_cache(context.folder / "cache", teacher, model, store, extra, forced)
    return {"pool": len(forced)} | result


def _teacher(context: Context) -> Path:
    return context.folders[context.extra.get("teacher", "teacher")] / "final"


def run_before(context: Context) -> dict[str, Any]:
    """Train the student by true labels for each seed: on the training items of the teacher, without distillation."""
    from models.experiments.student_group import StudentGroup

    settings, group = context.settings, StudentGroup(context)
    words = [
        *step_words(settings.student_steps, settings.student_learning_rate),
        "loss.ce_token_weight=choice",
        "loss.ce_background_weight=0",
        *own_start_words(context),
    ]
    for seed in range(settings.seeds):
        group.train(
            context.folder / str(seed),
            "sft_teacher",
            manifest=context.folders["corpus"] / "teacher.jsonl",
            start=context.folders["student_lm"] / "untrained",
            words=[*words, f"run.seed={seed}"],
        )
    return {}


def run_students(context: Context) -> dict[str, Any]:
    """Train the students of `extra["runs"]` one after another: (folder, recipe, seed, words)."""
    from models.experiments.student_group import StudentGroup

    settings, group = context.settings, StudentGroup(context)
    pool = context.folders[context.extra["pool"]]
    for name, recipe, seed, more in context.extra["runs"]:
        words = [
            *step_words(settings.student_steps, settings.student_learning_rate),
            f"run.seed={seed}",
            # Only the choice is scored, so only the choice is learned.
            "loss.ce_background_weight=0",
            *own_start_words(context),
        ]
        if recipe != "ce_only":
            words += [f"teacher.folder={_teacher(context)}"]
            words += ["teacher.keep_mib=4096"] if recipe == LAYERED.recipe else [f"teacher.cache={pool / 'cache'}"]
        group.train(
            context.folder / name,
            recipe,
            manifest=pool / "pool.jsonl",
            start=context.folders["student_lm"] / "untrained",
            words=[*words, *more],
        )
    return {}


def run_answers(context: Context) -> dict[str, Any]:
    """Ask each trained model of the stage `extra["of"]` the questions of the split, once.

    extra["asked"]: folder -> options of `models.experiments.shared_steps.ask_model`.
    """
    from models.experiments.student_group import StudentGroup

    group, trained = StudentGroup(context), context.folders[context.extra["of"]]
    return {
        name: group.ask(context.folder / name, trained / name / "final", part=context.settings.split, **options)
        for name, options in context.extra["asked"].items()
    }


def run_latency(context: Context) -> dict[str, Any]:
    """Milliseconds of one freely written answer by teacher and student, with greedy and with contrastive decoding.

    The four take turns, question by question, so that a slow minute affects all of them. The features are computed before.
    """
    from models.evaluation.ask import generate_answers
    from models.speech_lm.features import FeatureStore

    store = FeatureStore.load(context.folders["features"] / "features.safetensors")
    questions = [e for e in read_items(context, "test") if e in store and e.kind == "neutral"][: LATENCY_QUESTIONS + 2]
    models = {
        "teacher": load_model(context, context.folders["teacher"] / "final"),
        "student": load_model(context, context.folders["before"] / "0" / "final"),
    }
    seconds: dict[str, list[float]] = {}
    for example in questions:
        for name, model in models.items():
            for decoding, alpha in (("greedy", None), ("contrastive", 1.0)):
                started = time.perf_counter()
                generate_answers(
                    model, [example], store.rows([example]), collate=model.make_collator(), alpha=alpha,
                    max_new_tokens=LATENCY_TOKENS,
                )  # fmt: skip
                seconds.setdefault(f"{name}_{decoding}", []).append(time.perf_counter() - started)
    # The first two questions warm up.
    return {name: 1e3 * statistics.median(values[2:]) for name, values in seconds.items()}


_CORPUS = ("sources", "corpus_size", "corpus_seed", "tasks", "hint_correlation", "max_clips")
_TEACHING = (*TRAINING, "teacher_steps", "teacher_learning_rate")
_STUDYING = (*TRAINING, "student_steps", "student_learning_rate")
_Run = tuple[str, str, int, tuple[str, ...]]  # of a student: folder, recipe, seed, key=value words


def make_stages(settings: SixSettings) -> list[Stage]:
    """All stages; each comes after the stages that it needs."""
    stages = first_stages(Stage("corpus", "corpus", (), _CORPUS, run_corpus))
    stages.append(Stage("teacher", "teacher (sft, biased)", ("corpus", "features"), _TEACHING, run_teacher))
    stages.append(_teacher_answers("teacher", TEACHER_ALPHAS))
    for name, (times, said) in TIMES.items() if settings.sweep_seeds else ():
        title = f"teacher, trained {said} as long"
        stages.append(Stage(name, title, ("corpus", "features"), _TEACHING, run_teacher, extra={"times": times}))
        stages.append(_teacher_answers(name))
    stages.append(_pool(ANCHORS[0]))
    title, told = "student by true labels", {"recipe": _as_read("sft_teacher")}
    stages.append(Stage("before", title, ("corpus", "features", "student_lm"), (*_STUDYING, "seeds"), run_before, extra=told))
    asked = {str(seed): {"alphas": BEFORE_ALPHAS, "controls": seed == 0} for seed in range(settings.seeds)}
    stages.append(_answers("before", title, asked))
    for name, systems, seeds in student_stages(settings):
        stages += _students_and_answers(name, f"{name}, seeds {' '.join(map(str, seeds))}", "pool_teacher", _runs(systems, seeds))
    if settings.sweep_seeds:
        stages += _sweep_stages(settings)
    stages.append(Stage("latency", "latency of an answer", ("corpus", "features", "teacher", "before"), TRAINING, run_latency))
    return stages


def _sweep_stages(settings: SixSettings) -> list[Stage]:
    """The students of the sweeps, of the other anchors and of the longer teacher."""
    seeds = range(settings.sweep_seeds)
    runs = [
        (f"{name}-{value:g}-{seed}", "caad", seed, ("loss.alpha=2", f"{key}={value}"))
        for name, key, values in SWEEPS
        for value, system in values.items()
        for seed in seeds
        if system is None
    ]
    stages = _students_and_answers("sweeps", "sweeps of alpha, lambda, tau", "pool_teacher", runs)
    recipes = {"kd": 0, "caad": 2}
    runs = [(f"{recipe}-{seed}", recipe, seed, (f"loss.alpha={alpha}",)) for recipe, alpha in recipes.items() for seed in seeds]
    for anchor in ANCHORS[1:]:
        pool = _pool(anchor)
        stages += [pool, *_students_and_answers(f"anchor_{anchor}", f"anchor {anchor}", pool.name, runs)]
    pool = _pool(ANCHORS[0], LONG)
    runs = _runs(OF_LONG, range(settings.seeds))
    return [*stages, pool, *_students_and_answers(f"of_{LONG}", f"students of {LONG}", pool.name, runs, LONG)]


def _runs(systems: Sequence[System], seeds: Sequence[int]) -> list[_Run]:
    return [(f"{s.name}-{seed}", s.recipe, seed, (f"loss.alpha={s.alpha}", *s.words)) for seed in seeds for s in systems]


def _as_read(recipe: str) -> dict[str, Any]:
    """What the file of a recipe says: a part of the fingerprint of the stages that use it."""
    from models.training.recipe import to_dict
    from models.training.recipe_files import load_recipe

    return to_dict(load_recipe(recipe, ["teacher.folder=x"]))


def _pool(anchor: str, teacher: str | None = None) -> Stage:
    """The stage that makes the distillation pool. `teacher` is the stage that trains it; None = "teacher"."""
    told = {"anchor": anchor} | ({"teacher": teacher} if teacher else {})
    needs = ("corpus", "features", "teacher", *([teacher] if teacher else []))
    return Stage(f"pool_{teacher or anchor}", f"Y by {teacher or anchor}, both paths", needs, TRAINING, run_pool, extra=told)


def _students_and_answers(
    name: str, title: str, pool: str, runs: Sequence[_Run], teacher: str | None = None
) -> list[Stage]:
    """The stage that trains students, and the stage that asks them. Controls are asked of seed 0 alone."""
    told = {"pool": pool, "runs": runs, "recipes": {recipe: _as_read(recipe) for _, recipe, _, _ in runs}}
    needs = ("corpus", "features", "teacher", "student_lm", pool)
    if teacher:
        told["teacher"] = teacher
        needs += (teacher,)
    asked = {folder: {"controls": seed == 0} for folder, _, seed, _ in runs}
    return [Stage(name, title, needs, _STUDYING, run_students, extra=told), _answers(name, title, asked)]


def _answers(of: str, title: str, asked: Mapping[str, Any]) -> Stage:
    told = {"of": of, "asked": asked}
    return Stage(f"answers_{of}", f"answers: {title}", ("corpus", "features", of), ("split", "device"), run_answers, extra=told)


def _teacher_answers(of: str, alphas: Sequence[float | None] = (None,)) -> Stage:
    needs, told = ("corpus", "features", of), {"of": of, "alphas": alphas}
    return Stage(f"answers_{of}", f"answers: {of}", needs, ("split", "device"), run_teacher_answers, extra=told)
