"""Which sources and layers are worth their cost: the table of source- and layer-wise distillation (arXiv 2509.18579).

    python -m models ablation                 # three seeds; models/experiments/results/sources_layers.csv with --write
    python -m models ablation --fast-smoke    # the same code on synthetic clips and tiny random models

    corpus -> features -> audio-aware teacher (all tasks) -> for each seed a student that can already hear (all tasks, briefly)
           -> from there, on questions about what the words mean and which word is said, one student for each row of the table

Perception tasks (voice, rate, accent, noise) are not trained any more in that last step: what a row keeps of them is what the
acoustic teacher is for. The text teacher is the language model that the student was cut out of; the student's own, with layers
dropped, answers those questions by chance. Every row is one recipe of models/training/recipes. Scores are on clips,
voices, places and events that no training saw, without a hint; `conflict` is the accuracy under a false hint.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.experiments.commands import ablation_parser
from models.experiments.pipeline import Context, Stage, log_console, run_pipeline
from models.experiments.shared_steps import (
    ask,
    backbone_settings,
    read_items,
    run_backbones,
    run_features,
    run_student_lm,
    train_by_recipe,
    write_parts,
)
from models.io_utils import atomic_write_text, cache_dir

PERCEPTION = ("gender", "speaking_rate", "accent", "noise")
CONTENT = ("content", "place", "mood")
RESULTS = Path(__file__).parent / "results" / "sources_layers.csv"
_TEXT_BATCH = 32

# name, label, recipe (None: the student before distillation); the first six in the order of the paper's table
SYSTEMS = (
    ("baseline", "student before distillation", None),
    ("sft", "SFT only", "sft"),
    ("text_kd_top", "top-layer text KD + SFT", "text_kd_top"),
    ("text_kd_skip", "skip-layer text KD + SFT", "text_kd_skip"),
    ("text_kd_all", "all-layer text KD + SFT", "text_kd_all"),
    ("text_acoustic_kd", "all-layer text KD + acoustic KD + SFT", "text_acoustic_kd"),
    ("caad", "CAAD", "caad"),
    ("caad_layers", "CAAD + layers", "caad_layers"),
    ("everything", "CAAD + layers + text KD + acoustic KD", "everything"),
)
TEXT_TEACHER = ("text_teacher", "text teacher itself, reading the metadata")
# Claims of the paper's table, as differences between two rows: (better, worse, score, what it says).
CLAIMS = (
    ("baseline", "sft", "perception", "SFT alone forgets perception"),
    ("text_kd_top", "sft", "content", "top-layer text KD beats SFT on content"),
    ("text_kd_all", "text_kd_top", "content", "all layers beat the top layer on content"),
    ("text_kd_all", "text_kd_skip", "content", "all layers beat one in seven on content"),
    ("text_acoustic_kd", "text_kd_all", "perception", "the acoustic teacher keeps perception"),
    ("text_acoustic_kd", "sft", "all", "both sources beat SFT on all"),
)


@dataclass(frozen=True)
class AblationSettings:
    """Everything that decides what the ablation computes."""

    sources: tuple[str, ...] = ("queen", "espeak")
    corpus_size: str = "sources"
    corpus_seed: int = 0
    lm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    encoder: str = "openai/whisper-tiny.en"
    tiny_backbones: bool = False
    keep_layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 27, 28, 29)
    healing_steps: int = 96
    teacher_steps: int = 160
    start_steps: int = 200
    student_steps: int = 100
    learning_rate: float = 1e-3
    start_learning_rate: float = 2e-3
    layer_weight: float = 0.3
    batch_examples: int = 16
    seed: int = 0  # of teacher and student language model; the rows' seeds are 0, 1, 2
    seeds: int = 3
    device: str = "cpu"


FULL = AblationSettings()
SMOKE = AblationSettings(
    sources=("espeak",), corpus_size="tiny", tiny_backbones=True, keep_layers=(0, 2), healing_steps=3, teacher_steps=4,
    start_steps=4, student_steps=2, batch_examples=4, seeds=1,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The stages
# --------------------------------------------------------------------------------------------------------------------


def run_corpus(context: Context) -> dict[str, Any]:
    """Clips and questions; the targets are the true answers as sentences. `distill` holds the content tasks alone."""
    from models.corpora.build import build_corpus
    from models.data.manifest import read_manifest

    settings = context.settings
    path = build_corpus(
        context.folder,
        sources=settings.sources,
        size=settings.corpus_size,
        seed=settings.corpus_seed,
        tasks=(*PERCEPTION, *CONTENT),
    )
    manifest = read_manifest(path, check_audio=True)
    parts = {
        "teacher": manifest.select(split="train", pool="teacher"),
        "distill": [e for e in manifest.select(split="train", pool="distill") if e.task in CONTENT],
        "test": manifest.select(split="test"),
    }
    return {"questions": write_parts(context.folder, parts), "unavailable": manifest.header["unavailable"]}


def run_teacher(context: Context) -> dict[str, Any]:
    """The audio-aware teacher: supervised on all tasks, one clip in ten masked."""
    settings = context.settings
    train_by_recipe(
        context,
        "sft_teacher",
        manifest=context.folders["corpus"] / "teacher.jsonl",
        folder=context.folders["features"] / "untrained",
        words=[f"optim.steps={settings.teacher_steps}", f"optim.learning_rate={settings.learning_rate}"],
    )
    return {}


def run_start(context: Context) -> dict[str, Any]:
    """The student before distillation: all tasks, so that it hears something already; then asked."""
    settings = context.settings
    train_by_recipe(
        context,
        "sft_teacher",
        manifest=context.folders["corpus"] / "teacher.jsonl",
        folder=context.folders["student_lm"] / "untrained",
        words=[
            f"optim.steps={settings.start_steps}",
            f"optim.learning_rate={settings.start_learning_rate}",
            f"run.seed={context.extra['seed']}",
            "model.fresh_connector=true",
            f"model.feature_statistics={context.folders['features'] / 'untrained'}",
        ],
    )
    return ask(context, context.folder / "final", kinds=("neutral", "conflict"), controls=False)


def run_rows(context: Context) -> dict[str, Any]:
    """One row of the table, every seed: from the seed's start, by the row's recipe, on the content tasks; then asked."""
    from models.experiments.student_group import Cohort

    settings, recipe = context.settings, context.extra["recipe"]
    words = [
        f"optim.steps={settings.student_steps}",
        f"optim.learning_rate={settings.learning_rate}",
        # The papers train on the true answers beside the teachers; only the answer's tokens are scored.
        "loss.ce_token_weight=choice",
        "loss.ce_background_weight=0",
        "loss.kd_weight=0.5",
        *context.extra["words"],
    ]
    if context.extra["needs_teacher"]:
        words += [f"teacher.folder={context.folders['teacher'] / 'final'}", "teacher.keep_mib=1024"]
    cohort = Cohort(context)
    return {
        str(seed): cohort.run(
            context.folder / str(seed),
            recipe,
            manifest=context.folders["corpus"] / "distill.jsonl",
            start=context.folders[f"start_{seed}"] / "final",
            words=[*words, f"run.seed={seed}"],
            kinds=("neutral", "conflict"),
            controls=False,
        )
        for seed in range(settings.seeds)
    }


def run_text_teacher(context: Context) -> dict[str, Any]:
    """The text teacher asked itself: it reads what is known about a clip and writes the answer, as in Stage 1."""
    from models.evaluation.predictions import Prediction, append_predictions, write_header
    from models.pseudo_gt.writers import BackboneWriter

    writer = BackboneWriter.load(str(backbone_settings(context.settings)["lm"]))
    questions = [e for e in read_items(context, "test") if e.kind == "neutral"]
    questions.sort(key=lambda e: e.task)  # the worked examples of a task are read once
    path = context.folder / "test-greedy.jsonl"
    write_header(path, {"split": "test", "mode": "generate"})
    for start in range(0, len(questions), _TEXT_BATCH):
        asked = questions[start : start + _TEXT_BATCH]
        answers = [
            Prediction(
                id=e.id, task=e.task, kind=e.kind, answer=e.answer, choices=e.choices, prediction=text, pair_id=e.pair_id
            )
            for e, text in zip(asked, writer(asked), strict=True)
        ]
        append_predictions(path, answers)
    return {"answers": len(questions)}


def make_stages(settings: AblationSettings) -> list[Stage]:
    """All stages, in an order that honours their needs."""
    from models.training.recipe import load_recipe, to_dict

    backbone = ("lm", "encoder", "tiny_backbones", "seed", "device")
    training = (*backbone, "batch_examples")
    stages = [
        Stage("backbones", "backbones", (), ("lm", "encoder", "tiny_backbones"), run_backbones),
        Stage("corpus", "corpus", (), ("sources", "corpus_size", "corpus_seed"), run_corpus),
        Stage("features", "encoder features", ("backbones", "corpus"), backbone, run_features),
        Stage(
            "student_lm", "student: drop layers, heal", ("backbones", "corpus"), (*backbone, "keep_layers", "healing_steps"),
            run_student_lm,
        ),
        Stage(
            "teacher", "audio-aware teacher", ("corpus", "features"), (*training, "teacher_steps", "learning_rate"), run_teacher
        ),
    ]  # fmt: skip
    for seed in range(settings.seeds):
        stages.append(
            Stage(
                f"start_{seed}", f"student that hears, seed {seed}", ("corpus", "features", "student_lm"),
                (*training, "start_steps", "start_learning_rate"), run_start, extra={"seed": seed},
            )
        )  # fmt: skip
    stages.append(
        Stage("text_teacher", "text teacher, asked itself", ("corpus",), ("lm", "tiny_backbones"), run_text_teacher)
    )
    starts = tuple(f"start_{seed}" for seed in range(settings.seeds))
    for name, label, recipe in SYSTEMS:
        if recipe is None:
            continue
        read = load_recipe(recipe, ["teacher.folder=x"])
        words = [f"{key}.weight={settings.layer_weight}" for key, layers in read.compared_layers() if layers.weight > 0]
        lm = str(backbone_settings(settings)["lm"])
        words += [f"sources.{source}.folder={lm}" for source, s in read.sources.items() if s.role == "text"]
        taught = ("teacher",) if read.needs_teacher else ()
        stages.append(
            Stage(
                name, label, ("corpus", "features", *starts, *taught),
                (*training, "student_steps", "learning_rate", "seeds"), run_rows,
                # What the recipe's file says is part of the fingerprint too.
                extra={"recipe": recipe, "words": words, "needs_teacher": read.needs_teacher, "read": to_dict(read)},
            )
        )  # fmt: skip
    return stages


# --------------------------------------------------------------------------------------------------------------------
# What came out
# --------------------------------------------------------------------------------------------------------------------


def collect(folders: Mapping[str, Path], settings: AblationSettings) -> list[dict[str, Any]]:
    """A row a system and seed: means over tasks of the accuracy without a hint, of all under a false one, and each task's.

    The last row is the text teacher's own answers, which it gives without the sound.
    """
    asked = [
        (name, label, seed, folders[f"start_{seed}"] if recipe is None else folders[name] / str(seed))
        for name, label, recipe in SYSTEMS
        for seed in range(settings.seeds)
    ]
    return [_scores(*one) for one in [*asked, (*TEXT_TEACHER, 0, folders["text_teacher"])]]


def _scores(name: str, label: str, seed: int, folder: Path) -> dict[str, Any]:
    from models.evaluation.predictions import read_predictions
    from models.evaluation.scoring import score

    _, predictions = read_predictions(folder / "test-greedy.jsonl")
    by_task = score(predictions, bootstrap_samples=1)["by_task"]
    accuracy = {(kind, task): e.value for task, t in by_task.items() for kind, e in t["by_kind"].items() if e.count}
    everything = (*PERCEPTION, *CONTENT)

    def mean(tasks: Sequence[str], kind: str = "neutral") -> float:
        return statistics.mean(accuracy[kind, task] for task in tasks)

    return {
        "system": name,
        "label": label,
        "seed": seed,
        "perception": mean(PERCEPTION),
        "content": mean(CONTENT),
        "all": mean(everything),
        "conflict": mean(everything, "conflict") if ("conflict", everything[0]) in accuracy else "",
        **{f"task_{task}": accuracy["neutral", task] for task in everything},
        "questions": len(predictions),
    }


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence a claim of the paper's table: reproduced, not reproduced, or within noise.

    A difference counts where it has one sign in every seed and its mean is above twice its standard error over seeds.
    """
    scores = {(row["system"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    sentences = []
    for better, worse, score, claim in CLAIMS:
        differences = [100 * (scores[better, seed][score] - scores[worse, seed][score]) for seed in seeds]
        mean = statistics.mean(differences)
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("inf")
        clear = abs(mean) > 2 * error and all(d * mean > 0 for d in differences)
        word = "within noise" if not clear else "reproduced" if mean > 0 else "NOT reproduced"
        each = ", ".join(f"{d:+.1f}" for d in differences)
        sentences.append(f"{claim}: {word} ({mean:+.1f} points; by seed {each})")
    return sentences


def print_table(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Means and spreads over seeds."""
    table = Table(title="accuracy in %, mean and standard deviation over seeds")
    columns = ("perception", "content", "all", "conflict")
    columns += tuple(f"task_{task}" for task in (*PERCEPTION, *CONTENT))
    table.add_column("system", no_wrap=True)
    for column in columns:
        table.add_column(column.removeprefix("task_"), justify="right", no_wrap=True)
    for name, label in (*(system[:2] for system in SYSTEMS), TEXT_TEACHER):
        own = [row for row in rows if row["system"] == name]
        cells = []
        for number, column in enumerate(columns):
            values = [100 * row[column] for row in own if row[column] != ""]
            spread = f" ±{statistics.stdev(values):.1f}" if number < 4 and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        table.add_row(label, *cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    arguments = ablation_parser().parse_args(argv)
    settings = dataclasses.replace(SMOKE if arguments.fast_smoke else FULL, device=arguments.device)
    console, stages = log_console(), make_stages(settings)
    started = time.monotonic()
    try:
        folders, _ = run_pipeline(
            arguments, stages, settings, cache_dir() / "ablation", command="ablation", argv=argv, console=console
        )
    except SystemExit as ended:
        return ended.code
    rows = collect(folders, settings)
    print_table(console, rows)
    sentences = verdicts(rows)
    if arguments.fast_smoke:
        sentences = ["Smoke run: random models, the numbers mean nothing.", *sentences]
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    from models.reporting.results_csv import rows_csv

    text = rows_csv(rows)
    path = atomic_write_text(Path(arguments.out) / "sources_layers.csv", text)
    if arguments.write:
        path = atomic_write_text(RESULTS, text)
    counts = {name: len(read_items(Context(settings, Path(), folders, None), name)) for name in ("teacher", "distill", "test")}
    console.print(f"questions {counts}; total {time.monotonic() - started:.0f} s; {path.resolve()}", soft_wrap=True)
    return 0
