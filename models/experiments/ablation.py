"""Which sources and layers are worth their cost: the table of source-wise and layer-wise distillation (arXiv 2509.18579).

    python -m models ablation                 # three seeds; --write puts the table into models/experiments/results
    python -m models ablation --fast-smoke    # the same code on synthetic clips and tiny random models

    corpus -> features -> audio-aware teacher (all tasks)
           -> for each seed a student that hears already (all tasks, a short training)
           -> from there, for each row of the table, a student trained on the content tasks: meaning, and which word is said

That last step trains no perception task (voice, rate, accent, noise). The accuracy that a row keeps on them shows the use of the
acoustic teacher. The text teacher is the whole language model from which the student was cut. The student's own language model
has fewer layers and answers the content questions by chance. Each row is a recipe of models/training/recipes.

Scores are on test clips without a hint; `conflict` is the accuracy under a false hint. No training clip has the same character,
place or event, but some actors voice characters of both parts. Whether a claim of the paper holds is judged by a 95% t interval
over the seeds. The intervals are not corrected for the number of claims, and they say nothing about another teacher.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.evaluation.t_interval import t_interval
from models.experiments.commands import ablation_parser
from models.experiments.pipeline import Context, Stage, log_console, run_pipeline
from models.experiments.shared_steps import (
    TRAINING,
    ask,
    backbone_settings,
    first_stages,
    own_start_words,
    print_scores,
    print_sentences,
    read_items,
    step_words,
    train_supervised,
    write_parts,
)
from models.io_utils import atomic_write_text, cache_dir
from models.reporting.systems import system_name

PERCEPTION = ("gender", "speaking_rate", "accent", "noise")
CONTENT = ("content", "place", "mood")
RESULTS = Path(__file__).parent / "results" / "sources_layers.csv"
_TEXT_BATCH = 32

# The system and its recipe (None: the student before distillation). The first six have the order of the paper's table.
SYSTEMS = (
    ("baseline", None),
    ("sft", "sft"),
    ("text_kd_top", "text_kd_top"),
    ("text_kd_skip", "text_kd_skip"),
    ("text_kd_all", "text_kd_all"),
    ("text_acoustic_kd", "text_acoustic_kd"),
    ("caad", "caad"),
    ("caad_layers", "caad_layers"),
    ("everything", "everything"),
)
TEXT_TEACHER = "text_teacher"
# Claims of the paper's table, as differences between two rows: (better, worse, score, the claim).
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
    seed: int = 0  # of teacher and student language model; the rows have the seeds 0, 1, 2
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
    """Make clips and questions. The targets are the true answers as sentences. `distill` has content tasks only."""
    from models.corpora.build import build_corpus
    from models.data.manifest import read_manifest

    settings = context.settings
    path = build_corpus(
        context.folder,
        sources=settings.sources,
        size=settings.corpus_size,
        seed=settings.corpus_seed,
        tasks=(*PERCEPTION, *CONTENT),
        fold=None,
    )
    manifest = read_manifest(path, check_audio=True)
    parts = {
        "teacher": manifest.select(split="train", pool="teacher"),
        "distill": [e for e in manifest.select(split="train", pool="distill") if e.task in CONTENT],
        "test": manifest.select(split="test"),
    }
    return {"questions": write_parts(context.folder, parts), "unavailable": manifest.header["unavailable"]}


def run_teacher(context: Context) -> dict[str, Any]:
    """Train the audio-aware teacher on all tasks."""
    train_supervised(context, words=step_words(context.settings.teacher_steps, context.settings.learning_rate))
    return {}


def run_start(context: Context) -> dict[str, Any]:
    """Train the student before distillation on all tasks, so that it hears something already. Then ask it."""
    settings = context.settings
    train_supervised(
        context,
        start=context.folders["student_lm"] / "untrained",
        words=[
            *step_words(settings.start_steps, settings.start_learning_rate),
            f"run.seed={context.extra['seed']}",
            *own_start_words(context),
        ],
    )
    return ask(context, context.folder / "final", kinds=("neutral", "conflict"), controls=False)


def run_rows(context: Context) -> dict[str, Any]:
    """Train one row of the table for every seed: from the start of the seed, by the recipe of the row. Then ask it."""
    from models.experiments.student_group import Cohort

    settings, recipe = context.settings, context.extra["recipe"]
    words = [
        *step_words(settings.student_steps, settings.learning_rate),
        # The papers train on the true answers as well as on the teachers. Only the tokens of the answer are scored.
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
    """Ask the text teacher: it reads the metadata of a clip and writes the answer, as in Stage 1."""
    from models.evaluation.predictions import Prediction, append_predictions, write_header
    from models.pseudo_gt.writers import BackboneWriter

    writer = BackboneWriter.load(str(backbone_settings(context.settings)["lm"]))
    questions = [e for e in read_items(context, "test") if e.kind == "neutral"]
    questions.sort(key=lambda e: e.task)  # so the worked examples of a task are read once
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
    """All stages; each comes after the stages that it needs."""
    corpus = Stage("corpus", "corpus", (), ("sources", "corpus_size", "corpus_seed"), run_corpus)
    stages = first_stages(corpus)
    stages.append(
        Stage(
            "teacher", "audio-aware teacher", ("corpus", "features"), (*TRAINING, "teacher_steps", "learning_rate"), run_teacher
        )
    )  # fmt: skip
    for seed in range(settings.seeds):
        stages.append(
            Stage(
                f"start_{seed}", f"student that hears, seed {seed}", ("corpus", "features", "student_lm"),
                (*TRAINING, "start_steps", "start_learning_rate"), run_start, extra={"seed": seed},
            )
        )  # fmt: skip
    stages.append(
        Stage("text_teacher", "answers of the text teacher", ("corpus",), ("lm", "tiny_backbones"), run_text_teacher)
    )
    return stages + [_row_stage(settings, *system) for system in SYSTEMS if system[1] is not None]


def _row_stage(settings: AblationSettings, name: str, recipe: str) -> Stage:
    """The stage of one row of the table."""
    from models.training.recipe import load_recipe, to_dict

    read = load_recipe(recipe, ["teacher.folder=x"])
    words = [f"{key}.weight={settings.layer_weight}" for key, layers in read.compared_layers() if layers.weight > 0]
    lm = str(backbone_settings(settings)["lm"])
    words += [f"sources.{source}.folder={lm}" for source, s in read.sources.items() if s.role == "text"]
    starts = tuple(f"start_{seed}" for seed in range(settings.seeds))
    taught = ("teacher",) if read.needs_teacher else ()
    return Stage(
        name, system_name(name), ("corpus", "features", *starts, *taught),
        (*TRAINING, "student_steps", "learning_rate", "seeds"), run_rows,
        # The text of the recipe is part of the fingerprint too.
        extra={"recipe": recipe, "words": words, "needs_teacher": read.needs_teacher, "read": to_dict(read)},
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# What came out
# --------------------------------------------------------------------------------------------------------------------


def collect(folders: Mapping[str, Path], settings: AblationSettings) -> list[dict[str, Any]]:
    """A row for each system and seed: accuracies without a hint as means over tasks and by task, and under a false hint.

    The last row is the text teacher, which answers without the sound.
    """
    asked = [
        (name, seed, folders[f"start_{seed}"] if recipe is None else folders[name] / str(seed))
        for name, recipe in SYSTEMS
        for seed in range(settings.seeds)
    ]
    return [_scores(*one) for one in [*asked, (TEXT_TEACHER, 0, folders["text_teacher"])]]


def _scores(name: str, seed: int, folder: Path) -> dict[str, Any]:
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
        "label": system_name(name),
        "seed": seed,
        "perception": mean(PERCEPTION),
        "content": mean(CONTENT),
        "all": mean(everything),
        "conflict": mean(everything, "conflict") if ("conflict", everything[0]) in accuracy else "",
        **{f"task_{task}": accuracy["neutral", task] for task in everything},
        "questions": len(predictions),
    }


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each claim of the paper's table: reproduced, not reproduced, or within noise.

    A difference is more than noise where the 95% t interval of its mean over seeds excludes 0.
    """
    scores = {(row["system"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    sentences = []
    for better, worse, score, claim in CLAIMS:
        differences = [100 * (scores[better, seed][score] - scores[worse, seed][score]) for seed in seeds]
        found = t_interval(differences)
        word = "within noise" if not found.excludes_zero else "reproduced" if found.mean > 0 else "not reproduced"
        each = ", ".join(f"{d:+.1f}" for d in differences)
        ends = f"95% t interval {found.low:+.1f} to {found.high:+.1f}" if len(seeds) > 1 else "no interval from one seed"
        sentences.append(f"{claim}: {word} ({found.mean:+.1f} points; {ends}; by seed {each})")
    return sentences


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    arguments = ablation_parser().parse_args(argv)
    settings = dataclasses.replace(SMOKE if arguments.fast_smoke else FULL, device=arguments.device)
    console, stages = log_console(), make_stages(settings)
    started = time.monotonic()
    folders, _ = run_pipeline(
        arguments, stages, settings, cache_dir() / "ablation", command="ablation", argv=argv, console=console
    )
    rows = collect(folders, settings)
    columns = ("perception", "content", "all", "conflict", *(f"task_{task}" for task in (*PERCEPTION, *CONTENT)))
    print_scores(console, rows, columns, title="accuracy in %, mean and standard deviation over seeds")
    print_sentences(console, verdicts(rows), smoke=arguments.fast_smoke)
    from models.reporting.results_csv import rows_csv

    text = rows_csv(rows)
    path = atomic_write_text(Path(arguments.out) / "sources_layers.csv", text)
    if arguments.write:
        path = atomic_write_text(RESULTS, text)
    counts = {name: len(read_items(Context(settings, Path(), folders, None), name)) for name in ("teacher", "distill", "test")}
    console.print(f"questions {counts}; total {time.monotonic() - started:.0f} s; {path.resolve()}", soft_wrap=True)
    return 0
