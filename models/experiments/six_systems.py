"""The table of the CAAD paper on the built-in corpus: does the student hear? (arXiv 2606.23052)

    python -m models six-systems                 # five seeds; --write puts the tables into models/experiments/results
    python -m models six-systems --split dev     # the same systems on the dev split, where settings are chosen
    python -m models six-systems --fast-smoke    # the same code on synthetic clips and tiny random models

    corpus -> features -> teacher, biased by hints that are nearly always true (one, frozen, for all seeds)
           -> its own answers on the distillation pool = pseudo ground truth; both of its paths cached
           -> for each seed: the student by true labels, the controls, standard KD, CAAD, our additions
           -> every question with no hint, a true one, a false one and, where the corpus has it, an irrelevant text

Systems of the paper: the teacher with greedy and with contrastive decoding, the student by true labels with both decodings,
standard KD, CAAD alpha 1 and 2. CAAD alpha 0.5 is added, because on dev it lost almost nothing under true hints. The student by
true labels has no distillation. The distilled students start where it starts, not from its trained weights.

Controls: CE only; the target sharpened without subtraction; a teacher trained for half and one for twice the steps. The table has
each teacher's loss on dev questions that are mixed as in its training. It shows whether the bias is still there when the training
is complete. The longer teacher has students by standard KD and CAAD alpha 2.

Additions: alpha by token, alpha ramped over steps, KD weighted by the divergence of the paths, the text path centred, the
plausibility mask, layers. Each differs from CAAD alpha 2 in the named setting alone. `caad+` was best on dev. The additions have
one seed. The mask got the other seeds after its first answers on the test split. There it lost almost nothing under true hints,
though on dev its ALL had been the lowest.

The sweeps over alpha, lambda and tau use the same cached states of the teacher. The anchor sweep changes who writes Y: the
teacher (heard), Stage 1 from the metadata (as in the paper), or a template from the true label.

What the tables cannot say: the intervals hold for this one teacher, and with the longer one the gain is smaller. There is one
task, and the bias of the teacher is induced. All 176 test recordings are real and were seen while settings were tuned. No
training clip has the same character, but some actors voice characters of both parts. One question in three has a false hint. No
question of the paper's ALL has one, so the two gains cannot be compared.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from models.experiments.commands import six_systems_parser
from models.experiments.pipeline import Context, log_console, read_done, run_pipeline
from models.experiments.shared_steps import print_scores, print_sentences, read_items
from models.experiments.six_systems_settings import FULL, RESULTS, SMOKE
from models.experiments.six_systems_stages import make_stages
from models.experiments.six_systems_tables import (
    collect,
    dev_nats,
    paired_rows,
    strength_rows,
    sweep_rows,
    table_rows,
    training_csv,
    verdicts,
)
from models.io_utils import atomic_write_text, cache_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = six_systems_parser()
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.split != "test" or arguments.fast_smoke):
        parser.error("--write: the committed tables need the whole run on the test split")
    settings = dataclasses.replace(SMOKE if arguments.fast_smoke else FULL, device=arguments.device, split=arguments.split)
    if arguments.no_sweeps:
        settings = dataclasses.replace(settings, sweep_seeds=0)
    if arguments.seeds is not None:
        if arguments.seeds < 1:
            parser.error(f"--seeds: expected at least 1, got {arguments.seeds}")
        settings = dataclasses.replace(settings, seeds=arguments.seeds)
    console, stages = log_console(), make_stages(settings)
    started = time.monotonic()
    folders, _ = run_pipeline(
        arguments, stages, settings, cache_dir() / "six_systems", command="six-systems", argv=argv, console=console
    )
    from models.reporting.results_csv import rows_csv

    found = collect(folders, settings)
    rows = table_rows(found, read_done(folders["latency"])["result"], dev_nats(folders, settings))
    paired = paired_rows(found)
    columns = ("all", "neutral", "aligned", "conflict", "irrelevant", "shift_tir_adv", "follows_hint")
    title = "accuracy in %, mean and standard deviation over seeds; Shift = TIR_adv, lower is better"
    print_scores(console, rows, columns, title=title, latency=True)
    print_sentences(console, verdicts(rows, paired), smoke=arguments.fast_smoke)
    questions = read_items(Context(settings, Path(), folders, None), settings.split)
    sweeps = sweep_rows(found, folders, settings) + strength_rows(found, questions)
    texts = {name: rows_csv(t) for name, t in (("six_systems", rows), ("six_systems_paired", paired), ("sweeps", sweeps))}
    texts["training"] = training_csv(folders, settings)
    out = Path(arguments.out)
    for folder in (out, *([RESULTS] if arguments.write else [])):
        for name, text in texts.items():
            atomic_write_text(folder / f"{name}.csv", text)
    console.print(f"total {time.monotonic() - started:.0f} s; {out.resolve()}", soft_wrap=True)
    return 0
