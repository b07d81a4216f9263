"""Which sources and layers are worth their cost: the table of source-wise and layer-wise distillation (arXiv 2509.18579).

    python -m models ablation                 # three seeds; --write puts the table into models/experiments/results
    python -m models ablation --study         # E4 of docs/protocol.md: five seeds, unheard actors, Holm's correction
    python -m models ablation --fast-smoke    # the same code on synthetic clips and tiny random models

    corpus -> features -> audio-aware teacher (all tasks)
           -> for each seed a student that hears already (all tasks, a short training)
           -> from there, for each row of the table, a student trained on the content tasks: meaning, and which word is said

That last step trains no perception task (voice, rate, accent, noise). The accuracy that a row keeps on them shows the use of the
acoustic teacher. The text teacher is the whole language model from which the student was cut. The student's own language model
has fewer layers and answers the content questions by chance. Each row is a recipe of models/training/recipes.

Scores are on test clips without a hint; `conflict` is the accuracy under a false hint. No training clip has the same character,
place or event, but some actors voice characters of both parts. A claim of the paper holds if its p over the seeds, corrected by
Holm over all claims, is below 5%. The t intervals are not corrected, and nothing here says anything about another teacher.

With --study the tasks are those of real recordings, and no training has heard the actors of the test. Nothing is trained with
hints. A task counts only if the audio-aware teacher has learned it on dev and leaves room above: see MIN_LEARNED and MAX_LEARNED.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.evaluation.t_interval import p_value, t_interval
from models.experiments.commands import ablation_parser
from models.experiments.pipeline import Context, Stage, log_console, read_done, run_pipeline
from models.experiments.shared_steps import (
    TRAINING,
    ask,
    backbone_settings,
    first_stages,
    interval_words,
    own_start_words,
    predictions_name,
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
# With --study, on dev: with two choices a guess has half. A task that is nearly always right cannot tell systems apart.
MIN_LEARNED, MAX_LEARNED = 0.65, 0.98
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
    perception: tuple[str, ...] = PERCEPTION
    content: tuple[str, ...] = CONTENT
    fold: int | None = None  # of actors; None = the split by character, with hints in training and without the gate

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, those of perception first."""
        return (*self.perception, *self.content)


FULL = AblationSettings()
STUDY = AblationSettings(
    sources=("queen",), corpus_size="study_sources", perception=("gender", "noise", "bandwidth", "reverberation"),
    content=("content", "keyword", "sentence_type"), fold=0, teacher_steps=480, start_steps=320, student_steps=120, seeds=5,
)  # fmt: skip
_SMOKE: dict[str, Any] = {
    "sources": ("espeak",), "tiny_backbones": True, "keep_layers": (0, 2), "healing_steps": 3, "teacher_steps": 4,
    "start_steps": 4, "student_steps": 2, "batch_examples": 4,
}  # fmt: skip
SMOKE = dataclasses.replace(FULL, **_SMOKE, corpus_size="tiny", seeds=1)
STUDY_SMOKE = dataclasses.replace(STUDY, **_SMOKE, corpus_size="benchmark_tiny", seeds=2)


# --------------------------------------------------------------------------------------------------------------------
# The stages
# --------------------------------------------------------------------------------------------------------------------


def run_corpus(context: Context) -> dict[str, Any]:
    """Make clips and questions. The targets are the true answers as sentences. `distill` has content tasks only.

    With a fold of actors there is a part "dev" for the gate, and the questions that are trained on have no text.
    """
    from models.corpora.build import build_corpus
    from models.data.manifest import read_manifest
    from models.evaluation.predictions import context_kind

    settings = context.settings
    path = build_corpus(
        context.folder,
        sources=settings.sources,
        size=settings.corpus_size,
        seed=settings.corpus_seed,
        tasks=settings.tasks,
        fold=settings.fold,
    )
    manifest = read_manifest(path, check_audio=True)
    parts = {
        "teacher": manifest.select(split="train", pool="teacher"),
        "distill": [e for e in manifest.select(split="train", pool="distill") if e.task in settings.content],
        "test": manifest.select(split="test"),
    }
    if settings.fold is not None:
        bare = {n: [dataclasses.replace(e, context="", kind="neutral") for e in parts[n]] for n in ("teacher", "distill")}
        parts |= bare | {"dev": [e for e in manifest.select(split="dev") if context_kind(e) == "neutral"]}
    return {"questions": write_parts(context.folder, parts), "unavailable": manifest.header["unavailable"]}


def run_teacher(context: Context) -> dict[str, Any]:
    """Train the audio-aware teacher on all tasks."""
    train_supervised(context, words=step_words(context.settings.teacher_steps, context.settings.learning_rate))
    return {}


def run_gate(context: Context) -> dict[str, Any]:
    """Ask the audio-aware teacher on dev: the tasks that it has learned and that leave room above count."""
    from models.evaluation.predictions import read_predictions
    from models.evaluation.scoring import judge

    ask(context, context.folders["teacher"] / "final", part="dev", controls=False)
    _, predictions = read_predictions(context.folder / predictions_name("dev"))
    rights = {task: judge([p for p in predictions if p.task == task]) for task in context.settings.tasks}
    return {"learned": {task: float(right.mean()) for task, right in rights.items()}}


def counted_tasks(gate: Mapping[str, Any], *, smoke: bool = False) -> list[str]:
    """The tasks of a gate that count. In a smoke run, whose models have learned nothing, all of them."""
    return [task for task, share in gate["learned"].items() if smoke or MIN_LEARNED <= share <= MAX_LEARNED]


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
    from models.experiments.student_group import StudentGroup

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
    group = StudentGroup(context)
    return {
        str(seed): group.run(
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
    from models.evaluation.predictions import Prediction, append_predictions, context_kind, write_header
    from models.pseudo_gt.writers import BackboneWriter

    writer = BackboneWriter.load(str(backbone_settings(context.settings)["lm"]))
    questions = [e for e in read_items(context, "test") if context_kind(e) == "neutral"]
    questions.sort(key=lambda e: e.task)  # so the worked examples of a task are read once
    path = context.folder / "test-greedy.jsonl"
    write_header(path, {"split": "test", "mode": "generate"}, questions=len(questions))
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
    told = None if settings.fold is None else {"fold": settings.fold, "tasks": [settings.perception, settings.content]}
    corpus = Stage("corpus", "corpus", (), ("sources", "corpus_size", "corpus_seed"), run_corpus, told)
    stages = first_stages(corpus)
    stages.append(
        Stage(
            "teacher", "audio-aware teacher", ("corpus", "features"), (*TRAINING, "teacher_steps", "learning_rate"), run_teacher
        )
    )  # fmt: skip
    if settings.fold is not None:
        stages.append(Stage("gate", "gate: the teacher on dev", ("corpus", "features", "teacher"), ("device",), run_gate))
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
    from models.training.recipe import to_dict
    from models.training.recipe_files import load_recipe

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


def collect(
    folders: Mapping[str, Path], settings: AblationSettings, counted: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """A row for each system and seed: accuracies without a hint as means over tasks and by task, and under a false hint.

    The last row is the text teacher, which answers without the sound.

    Args:
        counted: the tasks that the means are over; None = all.
    """
    asked = [
        (name, seed, folders[f"start_{seed}"] if recipe is None else folders[name] / str(seed))
        for name, recipe in SYSTEMS
        for seed in range(settings.seeds)
    ]
    means = settings.tasks if counted is None else tuple(counted)
    return [_scores(*one, settings, means) for one in [*asked, (TEXT_TEACHER, 0, folders["text_teacher"])]]


def _scores(name: str, seed: int, folder: Path, settings: AblationSettings, counted: Sequence[str]) -> dict[str, Any]:
    from models.evaluation.predictions import read_predictions
    from models.evaluation.scoring import score

    _, predictions = read_predictions(folder / "test-greedy.jsonl")
    by_task = score(predictions, bootstrap_samples=1)["by_task"]
    accuracy = {(kind, task): e.value for task, t in by_task.items() for kind, e in t["by_kind"].items() if e.count}

    def mean(tasks: Sequence[str], kind: str = "neutral") -> float | str:
        values = [accuracy[kind, task] for task in tasks if task in counted]
        return statistics.mean(values) if values else ""

    return {
        "system": name,
        "label": system_name(name),
        "seed": seed,
        "perception": mean(settings.perception),
        "content": mean(settings.content),
        "all": mean(settings.tasks),
        "conflict": mean(settings.tasks, "conflict") if ("conflict", settings.tasks[0]) in accuracy else "",
        **{f"task_{task}": accuracy["neutral", task] for task in settings.tasks},
        "questions": len(predictions),
    }


def _differences(rows: Sequence[Mapping[str, Any]], better: str, worse: str, score: str) -> list[float]:
    """Points by seed, of the seeds that both rows have; empty where a score was not measured."""
    scores = {(row["system"], row["seed"]): row[score] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    pairs = [(scores[better, seed], scores[worse, seed]) for seed in seeds]
    return [] if any("" in pair for pair in pairs) else [100 * (mine - other) for mine, other in pairs]


def claim_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each claim of the paper's table with its t interval over seeds, p, Holm's p over all claims, and what that p says.

    study_sources_claims.csv has these rows. A claim about a score that no task counts in is left out.
    """
    from models.experiments.study_endpoints import holm

    made: list[dict[str, Any]] = []
    for better, worse, score, claim in CLAIMS:
        differences = [d / 100 for d in _differences(rows, better, worse, score)]
        if not differences:
            continue
        found = t_interval(differences)
        ends = {"t_low": found.low, "t_high": found.high} if found.is_known else {"t_low": "", "t_high": ""}
        made.append(
            {"claim": claim, "better": better, "worse": worse, "score": score, "seeds": len(differences)}
            | {"difference": found.mean, **ends, "p": p_value(differences)}
        )
    for row, p in zip(made, holm([row["p"] for row in made]), strict=True):
        word = "within noise" if p >= 0.05 else "reproduced" if row["difference"] > 0 else "not reproduced"
        row |= {"p_holm": p, "verdict": word}
    return made


def claim_sentence(row: Mapping[str, Any]) -> str:
    """A row of `claim_rows` in words."""
    ends = interval_words(row["t_low"], row["t_high"], "95% t interval")
    points = f"{100 * row['difference']:+.1f} points"
    return f"{row['claim']}: {row['verdict']} ({points}; {ends} over {row['seeds']} seed(s); Holm's p {row['p_holm']:.3f})"


def _gate_rows(gate: Mapping[str, Any], counted: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of study_sources_gate.csv: each task, what the teacher has on dev, and whether the task counts."""
    learned = gate["learned"].items()
    return [{"task": t, "teacher_on_dev": share, "counts": "yes" if t in counted else "no"} for t, share in learned]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = ablation_parser()
    arguments = parser.parse_args(argv)
    if arguments.write and arguments.fast_smoke:
        parser.error("--write: the committed tables need a whole run")
    small, whole = (STUDY_SMOKE, STUDY) if arguments.study else (SMOKE, FULL)
    settings = dataclasses.replace(small if arguments.fast_smoke else whole, device=arguments.device)
    console, stages = log_console(), make_stages(settings)
    started, root = time.monotonic(), cache_dir() / "ablation"
    options = {"command": "ablation", "argv": argv, "console": console}
    counted = None
    if arguments.study and not arguments.run_stage:
        until = next(number for number, stage in enumerate(stages) if stage.name == "gate") + 1
        folders, _ = run_pipeline(arguments, stages[:until], settings, root, **options)
        gate = read_done(folders["gate"])["result"]
        counted = counted_tasks(gate, smoke=arguments.fast_smoke)
        tasks = _gate_rows(gate, counted)
        said = [f"{r['task']}: the teacher has {r['teacher_on_dev']:.1%} on dev; counts: {r['counts']}" for r in tasks]
        print_sentences(console, said, smoke=arguments.fast_smoke)
        if not set(counted) & set(settings.perception) or not set(counted) & set(settings.content):
            console.print("Stopped: perception and content need a task each that counts. No student was trained.")
            return 1
        arguments.fresh = False  # the stages up to the gate stay
    folders, _ = run_pipeline(arguments, stages, settings, root, **options)
    rows = collect(folders, settings, counted)
    columns = ("perception", "content", "all", "conflict", *(f"task_{task}" for task in settings.tasks))
    print_scores(console, rows, columns, title="accuracy in %, mean and standard deviation over seeds")
    tables = {"sources_layers": rows}
    claimed = claim_rows(rows)
    if arguments.study:
        tables = {"study_sources_layers": rows, "study_sources_claims": claimed, "study_sources_gate": tasks}
    print_sentences(console, [claim_sentence(row) for row in claimed], smoke=arguments.fast_smoke)
    from models.reporting.results_csv import rows_csv

    for folder in (Path(arguments.out), *([RESULTS.parent] if arguments.write else [])):
        for name, table in tables.items():
            path = atomic_write_text(folder / f"{name}.csv", rows_csv(table))
    counts = {name: len(read_items(Context(settings, Path(), folders, None), name)) for name in ("teacher", "distill", "test")}
    console.print(f"questions {counts}; total {time.monotonic() - started:.0f} s; {path.resolve()}", soft_wrap=True)
    return 0
