"""The whole path in one command: from recorded speech to a distilled speech LM, and what the distillation was worth.

    python -m models demo                 # about 14 minutes on 2 cores after the downloads, seconds when run again
    python -m models demo --fast-smoke    # the same code on synthetic clips and tiny random models, for CI

    corpus -> features -> Stage 1 (the text backbone writes Y) -> teacher, biased by hints that are nearly always true
           -> its student: layers dropped, healed on text
           -> the teacher's own answers as pseudo ground truth, both of its paths cached
           -> students: CE only, KD, sharpened control, CAAD alpha 1 and 2
           -> test clips under a true, a false and no hint -> table, verdict, report

The teacher has learned to trust hints: it follows a hint where the sound says otherwise. Plain KD passes that bias on to the
student. The target of CAAD subtracts what the teacher would have said without the audio. The verdict is computed from the numbers
and says so where CAAD does not win.

The demo has one teacher, one task and one seed, so it shows how the method works and not how large the gain is. Its result
differs between processors and commits, because the rounding decides which bias the teacher gets. The recordings of the test are
real (synthesised where apt cannot fetch them). No training clip has the same character, but some characters of both parts are
voiced by the same actor.

Each stage is made once, and a stopped demo continues where it stopped (models/experiments/pipeline.py).
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.experiments.commands import demo_parser
from models.experiments.pipeline import Context, Stage, log_console, read_done, run_pipeline
from models.experiments.shared_steps import (
    TRAINING,
    ask,
    first_stages,
    interval_words,
    limited,
    load_speech_lm,
    predictions_name,
    print_sentences,
    read_items,
    step_words,
    train_supervised,
    write_answered_pool,
    write_cache,
    write_pseudo_gt,
)
from models.io_utils import atomic_write_json, atomic_write_text, cache_dir, source_commit
from models.reporting.systems import CONTEXTS, system_name

KINDS = ("neutral", "aligned", "conflict")


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides what the demo computes."""

    sources: tuple[str, ...] = ("queen", "espeak")
    corpus_size: str = "demo"
    task: str = "gender"
    max_train_clips: int | None = None  # of each pool; None = all
    max_test_clips: int | None = None
    lm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    encoder: str = "openai/whisper-tiny.en"
    tiny_backbones: bool = False  # random models, made by the stage
    keep_layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 27, 28, 29)
    healing_steps: int = 96
    target_source: str = "text_backbone"  # who writes the training targets of the teacher
    teacher_steps: int = 120
    teacher_learning_rate: float = 1e-3
    student_steps: int = 120
    student_learning_rate: float = 2e-3
    batch_examples: int = 16
    seed: int = 0
    device: str = "cpu"


FULL = DemoSettings()
SMOKE = DemoSettings(
    sources=("espeak",), corpus_size="tiny", max_train_clips=16, max_test_clips=6, tiny_backbones=True, keep_layers=(0, 2),
    healing_steps=3, target_source="template", teacher_steps=6, student_steps=4, batch_examples=4,
)  # fmt: skip

# system, objective, alpha
STUDENTS = (
    ("ce_only", "ce_only", 0.0),
    ("kd", "kd", 0.0),
    ("sharpened2", "sharpened", 2.0),
    ("caad1", "caad", 1.0),
    ("caad2", "caad", 2.0),
)
TEACHER_ALPHAS = (None, 1.0, 2.0)
# The students of one process share what is frozen (models/experiments/student_group.py). Two processes, for two cores.
COHORTS = (("kd", "caad1", "caad2"), ("ce_only", "sharpened2"))


# --------------------------------------------------------------------------------------------------------------------
# The stages
# --------------------------------------------------------------------------------------------------------------------


def run_corpus(context: Context) -> dict[str, Any]:
    """Make clips, questions and hints in three parts: teacher, distill, test."""
    from models.corpora.build import build_corpus
    from models.data.manifest import read_manifest, write_manifest

    settings = context.settings
    path = build_corpus(
        context.folder, sources=settings.sources, size=settings.corpus_size, seed=settings.seed, tasks=(settings.task,),
        fold=None,
    )
    manifest = read_manifest(path, check_audio=True)
    parts = {
        "teacher": limited(manifest.select(split="train", pool="teacher"), settings.max_train_clips),
        "distill": limited(manifest.select(split="train", pool="distill"), settings.max_train_clips),
        "test": limited(manifest.select(split="test"), settings.max_test_clips),
    }
    for name, examples in parts.items():
        write_manifest(context.folder / f"{name}.jsonl", examples)
    return {
        "questions": {name: len(examples) for name, examples in parts.items()},
        "skipped": len(manifest.problems),
        "unavailable": manifest.header.get("unavailable", {}),
    }


def run_stage1(context: Context) -> dict[str, Any]:
    """Stage 1: the text backbone, or a template, writes Y for the training items of the teacher from their metadata."""
    from models.data.manifest import read_manifest

    settings = context.settings
    out = stage1_manifest(context.folders | {"stage1": context.folder})
    words = [str(context.folders["corpus"] / "teacher.jsonl"), "--source", settings.target_source]
    words += ["--audio-root", str(context.folders["corpus"])]
    if settings.target_source == "text_backbone":
        words += ["--backbone", settings.lm]
    write_pseudo_gt(words, out)
    examples = read_manifest(out, check_audio=False).examples
    return {"targets": len(examples), "examples_of_targets": sorted({e.target for e in examples if e.target})[:6]}


def stage1_manifest(folders: Mapping[str, Path]) -> Path:
    """The manifest that Stage 1 writes. It is in the folder of the corpus, since paths of clips are relative to a manifest."""
    return folders["corpus"] / f"{folders['stage1'].name}.jsonl"


def run_teacher(context: Context) -> dict[str, Any]:
    """Train the teacher on its biased items."""
    settings = context.settings
    words = step_words(settings.teacher_steps, settings.teacher_learning_rate)
    train_supervised(context, manifest=stage1_manifest(context.folders), words=words)
    return {}


def run_pool(context: Context) -> dict[str, Any]:
    """Let the teacher answer the distillation pool: its answers are the students' Y. Then cache both of its paths over them."""
    teacher = context.folders["teacher"] / "final"
    model, store, extra = load_speech_lm(context, teacher)
    examples = [e for e in read_items(context, "distill") if e in store]
    result = write_answered_pool(context.folder / "pool.jsonl", model, store, extra, examples)
    forced = read_items(context, "pool", folder=context.folder)
    write_cache(context.folder / "cache", teacher, model, store, extra, forced)
    return result


def run_student(context: Context) -> dict[str, Any]:
    """Train the students of one group one after another, and ask each the test questions."""
    from models.experiments.student_group import StudentGroup

    settings, group = context.settings, StudentGroup(context)
    result = {}
    for name, objective, alpha in context.extra:
        words = [
            *step_words(settings.student_steps, settings.student_learning_rate),
            # Only the choices are scored, so only the token of the answer is learned: a step takes two thirds of the time.
            # A student that answers freely needs loss.ce_background_weight above 0. ce_background_fraction keeps that cheap.
            "loss.ce_background_weight=0",
            # The statistics of the features come from the teacher's clips, so all models standardise alike.
            f"model.feature_statistics={context.folders['features'] / 'untrained'}",
        ]
        if objective != "ce_only":
            words += [
                f"teacher.folder={context.folders['teacher'] / 'final'}",
                f"teacher.cache={context.folders['pool'] / 'cache'}",
                f"loss.alpha={alpha}",
            ]
        result[name] = group.run(
            context.folder / name,
            objective,
            manifest=context.folders["pool"] / "pool.jsonl",
            start=context.folders["student_lm"] / "untrained",
            words=words,
        )
    return result


def run_teacher_answers(context: Context) -> dict[str, Any]:
    """Ask the teacher the test questions, greedily and by contrastive decoding."""
    return ask(context, context.folders["teacher"] / "final", alphas=TEACHER_ALPHAS)


def make_stages() -> list[Stage]:
    """All stages; each comes after the stages that it needs. Of those that are ready, the first ones start first."""
    corpus = ("sources", "corpus_size", "task", "seed", "max_train_clips", "max_test_clips")
    *first, student_lm = first_stages(Stage("corpus", "corpus", (), corpus, run_corpus))
    stages = [
        *first,
        # The teacher waits for Stage 1, and most stages wait for the teacher.
        Stage("stage1", "Stage 1: pseudo ground truth", ("backbones", "corpus"), ("lm", "target_source"), run_stage1),
        student_lm,
        Stage(
            "teacher", "teacher (sft, biased)", ("corpus", "features", "stage1"),
            (*TRAINING, "teacher_steps", "teacher_learning_rate"), run_teacher,
        ),
        Stage("pool", "teacher's answers, both its paths", ("corpus", "features", "teacher"), TRAINING, run_pool),
    ]  # fmt: skip
    for number, names in enumerate(COHORTS, start=1):
        told = [student for student in STUDENTS if student[0] in names]
        stages.append(
            Stage(
                f"students_{number}", f"students: {', '.join(names)}", ("corpus", "features", "teacher", "student_lm", "pool"),
                (*TRAINING, "student_steps", "student_learning_rate"), run_student, extra=told,
            )
        )  # fmt: skip
    needs = ("corpus", "features", "teacher")
    stages.append(Stage("answers_teacher", "teacher's test answers", needs, TRAINING, run_teacher_answers, list(TEACHER_ALPHAS)))
    return stages


# --------------------------------------------------------------------------------------------------------------------
# What came out
# --------------------------------------------------------------------------------------------------------------------


def collect(folders: Mapping[str, Path]) -> dict[str, list[Any]]:
    """System -> test predictions, in the order of the table."""
    from models.evaluation.predictions import read_predictions

    files = {}
    for alpha in TEACHER_ALPHAS:
        system = "teacher" if alpha is None else f"teacher_cd{alpha:g}"
        files[system] = folders["answers_teacher"] / predictions_name("test", alpha)
    for system, _, _ in STUDENTS:
        files[system] = student_folder(folders, system) / predictions_name("test")
    return {system: read_predictions(path)[1] for system, path in files.items()}


def student_folder(folders: Mapping[str, Path], name: str) -> Path:
    """The folder of a student: its run and its predictions."""
    number = next(i for i, names in enumerate(COHORTS, start=1) if name in names)
    return folders[f"students_{number}"] / name


def verdict(predictions: Mapping[str, Sequence[Any]]) -> list[str]:
    """What the numbers say about CAAD, in sentences. A loss or a draw is said as plainly as a win.

    Answers are compared pair by pair: under a false hint, where CAAD should gain, and without a hint, where it should not lose.
    The 95% intervals come from a bootstrap over clips. The first sentence compares with plain KD, and the controls follow.
    """
    from models.evaluation.scoring import paired_difference

    ours = {alpha: _plain(predictions[f"caad{alpha}"]) for alpha in (1, 2)}
    details, wins, costs = [], [], []
    for system in ("kd", "sharpened2", "ce_only"):
        other = _plain(predictions[system])
        for alpha, answers in ours.items():
            conflict = paired_difference(answers, other, kind="conflict")
            neutral = paired_difference(answers, other, kind="neutral")
            details.append(
                f"CAAD alpha {alpha} against {system_name(system)}: under a false hint {_points(conflict)}, "
                f"{_compared(conflict)}; without a hint {_points(neutral)}, {_compared(neutral)}."
            )
            if system == "kd":
                wins += [f"alpha {alpha}"] if _compared(conflict) == "better" else []
                costs += [f"alpha {alpha}"] if _compared(neutral) == "worse" else []
    if wins:
        headline = f"CAAD ({' and '.join(wins)}) follows a false hint less often than plain KD does"
        headline += f", but is less accurate without a hint ({' and '.join(costs)})." if costs else "."
    else:
        headline = "CAAD does NOT show an advantage over plain KD under a false hint in this run."
    return [headline, *details]


def caveat(folders: Mapping[str, Path], settings: DemoSettings) -> str:
    """What limits the numbers: the data, the teacher, the seed."""
    from models.data.manifest import read_manifest

    def read(part: str) -> list[Any]:
        return read_manifest(folders["corpus"] / f"{part}.jsonl", check_audio=False).examples

    hinted = [e.kind for e in read("teacher") if e.kind != "neutral"]
    true = sum(kind == "aligned" for kind in hinted) / max(1, len(hinted))
    test = read("test")
    voices = {e.metadata.get("speaker") for e in test}
    clips = {e.audio for e in test}
    return (
        f"These are {len(clips)} test clips of {len(voices)} voices, one task ({settings.task}), one teacher and one seed. "
        "The training clips have other voices, but one actor may voice characters in both parts. The bias of the teacher "
        f"was induced: {true:.0%} of the hints in its training were true. An answer is the likelier of the two choices."
    )


def _points(difference: Any) -> str:
    ends = interval_words(difference.low, difference.high)
    return f"{100 * difference.value:+.1f} points ({ends}, {difference.count} clips)"


def _compared(difference: Any) -> str:
    if difference.low is None:
        return "no clear difference"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no clear difference"


def _plain(predictions: Sequence[Any]) -> list[Any]:
    return [p for p in predictions if not p.control]


def print_table(console: Console, predictions: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Print the table and return the scores of every system."""
    from models.evaluation.summary import summarize

    table = Table(title="accuracy on the test clips in %, by what the prompt says (Shift = TIR_adv, lower is better)")
    for column in ("system", *(CONTEXTS[kind] for kind in KINDS), "Shift", "no audio", "swapped"):
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=True)
    scores = {}
    for system, answers in predictions.items():
        scores[system] = summary = summarize(answers)
        plain = summary["plain"]
        cells = [plain["by_kind"][kind].value for kind in KINDS if kind in plain["by_kind"]]
        cells += [plain["tir_adv"].value]
        cells += [summary[c]["accuracy"].value if c in summary else None for c in ("no_audio", "swapped_audio")]
        table.add_row(system_name(system), *("-" if v is None else f"{100 * v:.1f}" for v in cells))
    console.print(table)
    return scores


def _shown(result: Mapping[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False).strip("{}").replace('"', "")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    arguments = demo_parser().parse_args(argv)
    settings = dataclasses.replace(SMOKE if arguments.fast_smoke else FULL, device=arguments.device, seed=arguments.seed)
    console, stages = log_console(), make_stages()
    started = time.monotonic()
    folders, seconds = run_pipeline(
        arguments, stages, settings, cache_dir() / "demo", command="demo", argv=argv, console=console
    )
    for source, reason in read_done(folders["corpus"])["result"]["unavailable"].items():
        console.print(f"warning: the recordings of {source} are not in this corpus: {reason}", markup=False)
    predictions = collect(folders)
    scores = print_table(console, predictions)
    headline, *details = verdict(predictions)
    sentences = [headline, *details, caveat(folders, settings)]
    sentences = print_sentences(console, sentences, smoke=arguments.fast_smoke)

    from models.evaluation.score_tables import to_json
    from models.reporting.report import write_report

    out = Path(arguments.out)
    results = {"settings": dataclasses.asdict(settings), "scores": to_json(scores), "verdict": sentences, "seconds": seconds}
    results |= {"commit": source_commit(), "date": datetime.date.today().isoformat()}
    atomic_write_json(out / "results.json", results)
    atomic_write_text(out / "results.csv", results_csv(results))
    findings = [sentence for sentence in sentences if sentence not in details]  # the report has verdicts of its own
    report = write_report(out / "report.html", make_report(settings, stages, folders, predictions, findings, seconds))
    console.print(f"total {time.monotonic() - started:.0f} s; report: {report.resolve()}", soft_wrap=True)
    return 0


def results_csv(results: Mapping[str, Any]) -> str:
    """A row for each system, from the content of results.json: accuracies by context with 95% intervals, and TIR_adv."""
    import torch

    seconds = sum(results["seconds"].values())
    rows = []
    for system, by_control in results["scores"].items():
        score = by_control["plain"]
        row: dict[str, Any] = {"system": system, "label": system_name(system), "seed": results["settings"]["seed"]}
        for kind in KINDS:
            value = score["by_kind"][kind]
            ends = {f"{kind}_{end}": "" if value[end] is None else round(value[end], 4) for end in ("low", "high")}
            row |= {kind: round(value["value"], 4), **ends}
        tir = score["tir_adv"]["value"]
        row |= {"tir_adv": "" if tir is None else round(tir, 4), "clips": score["by_kind"]["neutral"]["count"]}
        row |= {"stage_seconds": round(seconds), "torch": torch.__version__}
        row |= {"commit": results["commit"], "date": results["date"]}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def make_report(
    settings: DemoSettings,
    stages: Sequence[Stage],
    folders: Mapping[str, Path],
    predictions: Mapping[str, Sequence[Any]],
    findings: Sequence[str],
    seconds: Mapping[str, float],
) -> Any:
    """The report of the demo: systems, curves of every training, clips, settings, what each stage did and its seconds."""
    from models.data.manifest import read_manifest
    from models.reporting.report import Report
    from models.training.curves import read_metrics

    trained = {"teacher": folders["teacher"], **{system: student_folder(folders, system) for system, _, _ in STUDENTS}}
    told = [s for s in stages if s.run is not run_student]
    notes = [(s.title, _shown(read_done(folders[s.name])["result"])) for s in told]
    return Report(
        title="kdkernels demo: what contrastive audio-aware distillation does to a biased teacher's student",
        findings=findings,
        systems={system_name(system): answers for system, answers in predictions.items()},
        curves={system_name(system): read_metrics(folder / "metrics.jsonl") for system, folder in trained.items()},
        examples=read_manifest(folders["corpus"] / "test.jsonl", check_audio=False).examples,
        audio_root=folders["corpus"],
        reference=system_name("kd"),
        facts=[
            ("What the stages did", [n for n in notes if n[1]]),
            ("Seconds of each stage", [(s.title, f"{seconds[s.name]:.0f}") for s in stages]),
            ("Settings", [(k, str(v)) for k, v in dataclasses.asdict(settings).items()]),
        ],
    )
