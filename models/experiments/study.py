"""The study of docs/protocol.md: several teachers, actors that by the credits no training has heard, and more baselines.

    python -m models study E1                       # 4 folds of actors x 2 teachers; stop it and start it again at will
    python -m models study E1 --teachers 1 --folds 0
    python -m models study E1B                      # E1 again: eight new teachers and all systems
    python -m models study E2                       # several tasks with hints; the steps of KD and CAAD, chosen on dev
    python -m models study E3                       # several tasks whose bias nobody trained; curves over steps of one teacher
    python -m models study E5                       # settings of KD and CAAD on dev, equally many runs of each; curves over steps
    python -m models study axes                     # beyond the papers: what each path hears, alpha by token, on-policy
    python -m models study external                 # ask the finished models of E1B about other games, once and at the end
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
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from models.experiments.commands import study_parser
from models.experiments.pipeline import Stage, log_console, read_done, run_pipeline, stage_folders
from models.experiments.study_endpoints import PAIRS, all_endpoints, as_row, followed_tasks, sentence
from models.experiments.study_gate import gate_sentences, gate_tasks, in_study
from models.experiments.study_settings import (
    AXES_PAIRS,
    EXPERIMENTS,
    RESULTS,
    SHARPENED,
    SYSTEMS,
    StudySettings,
    chosen_teachers,
    teacher_prefix,
)
from models.experiments.study_stages import make_stages, run_external_students
from models.experiments.study_tables import (
    PROBE_COLUMNS,
    STEP_COLUMNS,
    dev_rows,
    finished,
    finished_external,
    gate_rows,
    merge_rows,
    pack_all,
    print_table,
    read_rows,
    replace_teacher,
    row_origin,
    step_rows,
    table_rows,
)
from models.io_utils import atomic_write_text, cache_dir


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
    """Ask what is trained. Nothing is trained here: what E1B has not finished is left out, with a line that says so."""
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
        console.print(f"- not asked, since E1B has not finished them: {told}", highlight=False, soft_wrap=True)
    if "external_teacher" not in ready:
        return
    if arguments.fresh:  # the models of E1B stay
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
            rows = [{"fold": settings.fold, **row, **row_origin()} for row in done["result"]["probes"]]
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
            now = gate["result"] | {"tasks": gate_tasks(asked)}  # the gate of an earlier version has no text effect
            rows = gate_rows(settings, now, prefix=teacher_prefix(experiment))
            for line in replace_teacher(folder, rows):
                console.print(f"- {folder}: {line}", highlight=False, soft_wrap=True)
        kept = in_study(gate["result"], settings)
        found = {s: [p for p in own if s.startswith("teacher") or p.task in kept] for s, own in found.items()}
        found = {system: own for system, own in found.items() if own}
    _write_rows(settings, found, teacher_prefix(experiment), targets, console)
    tried = step_rows(settings, finished(settings, stages, root, part="dev"), prefix=teacher_prefix(experiment))
    for folder in targets if tried else ():
        merge_rows(folder / "study_steps.csv", tried, columns=STEP_COLUMNS, keys=STEP_COLUMNS[:4])


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


def _print_endpoints(arguments: Any, experiment: str, console: Console) -> None:
    """P1 to P3 of all teachers whose predictions are kept, in words and as study_endpoints.csv. Dev and the probes have none,
    and other games neither: the protocol makes no claim about them."""
    if experiment in ("E5", "external", "probes"):
        return
    from models.reporting.results_csv import rows_csv

    pairs = AXES_PAIRS if experiment == "axes" else PAIRS
    for folder in (Path(arguments.out), *([RESULTS] if arguments.write else [])):
        found = all_endpoints(folder / "study", pairs, prefix=teacher_prefix(experiment))
        if not found:
            continue
        name = f"study_endpoints{'' if experiment == 'E1' else '_' + experiment}.csv"
        atomic_write_text(folder / name, rows_csv([as_row(e) for e in found]))
        if experiment == "E3":  # its gate did not ask for a text effect
            kept = followed_tasks(read_rows(folder / "study_gate.csv"), teacher_prefix(experiment))
            followed = all_endpoints(folder / "study", pairs, prefix=teacher_prefix(experiment), kept=kept)
            atomic_write_text(folder / "study_followed.csv", rows_csv([as_row(e) for e in followed]))
        if folder == Path(arguments.out):
            for endpoint in found:
                console.print(f"- {sentence(endpoint)}", highlight=False, soft_wrap=True)
