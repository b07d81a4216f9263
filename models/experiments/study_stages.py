"""The stages of one teacher of the study: what each makes, and what it needs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from models.experiments.negative_paths import NEGATIVE_PATHS, negative_rows, rows_in, write_contrast_cache
from models.experiments.pipeline import Context, Stage, check_status
from models.experiments.shared_steps import (
    BACKBONE,
    TRAINING,
    ask,
    backbone_settings,
    four_parts,
    heal_student_lm,
    limited,
    load_speech_lm,
    own_start_words,
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
from models.experiments.study_gate import gate_tasks, in_study
from models.experiments.study_settings import (
    AXES,
    CURVES_TEACHER,
    EXTERNAL_SOURCES,
    NEW_TASKS,
    POOLS,
    RESULTS,
    SHARPENED,
    SYSTEMS,
    TEACHER_ALPHAS,
    StudySettings,
    System,
    step_systems,
    teacher_prefix,
    tried_systems,
)
from models.experiments.study_tables import chosen_steps, read_rows

# How the teacher reads the prompts of a pool, where it differs from the student: models.corpora.hearing.Hearing.
TEACHER_READS: dict[str, dict[str, Any]] = {"stripped": {"context": False}, "shuffled": {"context_from": "own_context"}}
CLEAN_SNR_DB = 60.0  # of the clips that the teacher of the pool "clean" hears


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
    parts = four_parts(manifest, settings.max_clips)
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
    return {"tasks": gate_tasks(context.folder), "weights": weights[:16]}


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
    from models.experiments.student_group import StudentGroup

    group, extra = StudentGroup(context), context.extra
    asked = {"part": extra["part"], "tasks": gated_tasks(context), "controls": False}
    return {
        name: group.run(context.folder / name, recipe, **_lesson(context, extra["pool"], alpha, more), **asked)
        for name, recipe, alpha, more in extra["systems"]
    }


def run_curves(context: Context) -> dict[str, Any]:
    """Train the students of `extra["curves"]` for longer, and ask them dev on the way: models/experiments/learning_curves.py."""
    from models.experiments.learning_curves import train_and_ask
    from models.experiments.student_group import StudentGroup

    group, tasks = StudentGroup(context), gated_tasks(context)
    return {
        name: train_and_ask(context, name, recipe, group=group, tasks=tasks, **_lesson(context, "own", alpha, more))
        for name, recipe, alpha, more in context.extra["curves"]
    }


def _lesson(context: Context, pool: str, alpha: float | None, more: Sequence[str]) -> dict[str, Any]:
    """What a student of the pool is trained on, where it starts, and by which words: arguments of `StudentGroup.run`."""
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
    from models.experiments.student_group import StudentGroup

    group, trained = StudentGroup(_abroad(context)), context.folders[context.extra["of"]]
    asked = {}
    for name in context.extra["students"]:
        asked[name] = group.ask(context.folder / name, trained / name / "final", controls=False)
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

    The students with the settings of E5 are among them as soon as study_dev.csv says what E5 has chosen, and those with the steps
    that dev of E1B or E2 chooses as soon as study_steps.csv has all its teachers.
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
        own = make_stages(settings, "E1B")
        return [*own, *external_stages(own)]
    if experiment == "probes":
        needs = ("backbones", "corpus", "features")
        return [*stages[:3], Stage("probes", "what tells the labels", needs, BACKBONE, run_probes, extra={"tasks": NEW_TASKS})]
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
    if experiment in ("E1B", "E2", "E3"):
        stages.append(_students("students_control", "own", [SHARPENED], gated=gated))
    if experiment in ("E1B", "E2"):
        stages.append(_students("tried_steps", "own", list(step_systems(settings.student_steps)), part="dev", gated=gated))
        stepped = [] if settings.tiny_backbones else stepped_systems(settings, RESULTS / "study_steps.csv", experiment)
        stages += [_students("students_steps", "own", stepped, gated=gated)] if stepped else []
    if experiment == "E3":
        stages += [_curves(SHARPENED, gated=True)] if settings.teacher == CURVES_TEACHER else []
    return stages


_HEARD = ("corpus", "features", "teacher")


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
        if stage.run is run_students and stage.extra["part"] == "test":
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
    best = {row["family"]: row["try"] for row in read_rows(chosen) if row["chosen"]}
    return [dataclasses.replace(s, name=f"{s.recipe}_tuned") for s in tried_systems() if s.name in best.values()]


def stepped_systems(settings: StudySettings, tried: Path, experiment: str) -> list[System]:
    """kd_steps and caad2_steps, with the steps that dev of the experiment has chosen; none until all its teachers were asked."""
    systems = list(step_systems(settings.student_steps))
    rows = [row for row in read_rows(tried) if row["teacher"].startswith(teacher_prefix(experiment))]
    best = chosen_steps(rows, [s.name for s in systems])
    return [dataclasses.replace(s, name=f"{s.name.split('_')[0]}_steps") for s in systems if s.name in best]


def _as_written(recipe: str) -> str:
    """The file of a recipe: a part of the fingerprint of the stages that use it. New keys with defaults do not change it."""
    from models.training.recipe_files import find_recipe

    return find_recipe(recipe).read_text(encoding="utf-8")
