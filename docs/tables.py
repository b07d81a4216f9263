"""Writes the tables and the numbers of README.md and docs/: from the committed CSV files, and the keys of recipes from the code.

    python -m docs.tables            # rewrites what stands between the markers
    python -m docs.tables --check    # names every table and number that differs from its source; exit status 1 if there is one

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`, each on a line of its own. NAME is a key of `TABLES`
or of `RECIPE_TABLES`.

A number stands in a sentence as `<!-- n: FILE/ROWS/COLUMN/FORMAT -->12.3<!-- /n -->`:

    FILE    the CSV's name without its ending
    ROWS    column=value, several joined by ";"; several rows give their mean
    COLUMN  a column; a:b is column a divided by column b
    FORMAT  a key of `FORMATS`
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from models.evaluation.t_interval import t_interval
from models.experiments.ablation import claim_rows
from models.experiments.study_endpoints import followed_tasks, holm
from models.experiments.study_tables import chosen_steps
from models.reporting.systems import ANCHORS, CONTEXTS, SYSTEMS, system_key
from models.training.recipe_keys import Section, sections

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "models" / "experiments" / "results", ROOT / "benchmarks" / "results")
NO_BREAK = "\u00a0"  # a line of a cell does not end in the middle of a number and its spread
MINUS, RANGE = "−", f"{NO_BREAK}to{NO_BREAK}"

Row = Mapping[str, str]
Table = tuple[Sequence[str], Iterable[Sequence[str]]]


class TableError(ValueError):
    """A marker or a CSV file cannot be used; the message names it."""


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


@cache
def read(name: str) -> tuple[Row, ...]:
    """The rows of a committed CSV file, by its name without the ending. Old names of a system become its key."""
    for folder in FOLDERS:
        path = folder / f"{name}.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                found = tuple(csv.DictReader(file))
            return tuple(row | {"system": system_key(row["system"])} if "system" in row else row for row in found)
    raise TableError(f"{name}: expected {name}.csv in one of {', '.join(str(f.relative_to(ROOT)) for f in FOLDERS)}")


def rows(name: str, /, **where: str | int) -> list[Row]:
    """The rows of a CSV file in which every named column has the given value; at least one."""
    found = [row for row in read(name) if all(row.get(key) == str(value) for key, value in where.items())]
    if not found:
        raise TableError(f"{name}.csv: no row with {where}")
    return found


def numbers(found: Iterable[Row], column: str) -> list[float]:
    """The finite numbers of a column; blank cells and "nan" are left out."""
    return [value for row in found if row[column] and math.isfinite(value := float(row[column]))]


def mean(name: str, column: str, /, **where: str | int) -> float | None:
    """Mean of a column over the rows that match; None where nothing was measured."""
    found = numbers(rows(name, **where), column)
    return statistics.mean(found) if found else None


# --------------------------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------------------------


def signed(value: float, digits: int = 1) -> str:
    return f"{'+' if value >= 0 else MINUS}{abs(value):.{digits}f}"


def or_blank(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else form(value)


FORMATS: dict[str, Callable[[float], str]] = {
    "percent": lambda x: f"{100 * x:.1f}",
    "whole_percent": lambda x: f"{100 * x:.0f}",
    "points": lambda x: signed(100 * x),
    "one": lambda x: f"{x:.1f}",
    "two": lambda x: f"{x:.2f}",
    "three": lambda x: f"{x:.3f}",
    "whole": lambda x: f"{x:,.0f}",
    "minutes": lambda x: f"{x / 60:.1f}",
    "kilo": lambda x: f"{x / 1000:.1f}",
    "error": lambda x: f"{x:.1e}",
}
percent, one, two, whole, error = (or_blank(FORMATS[name]) for name in ("percent", "one", "two", "whole", "error"))


def spread(name: str, column: str, **where: str | int) -> str:
    """Mean ± standard deviation over seeds, in percent; the mean alone where there is one row."""
    return mean_and_deviation([100 * value for value in numbers(rows(name, **where), column)])


def mean_and_deviation(found: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of one number, and nothing of none."""
    if not found:
        return ""
    return f"{statistics.mean(found):.1f}" + (f"{NO_BREAK}±{NO_BREAK}{statistics.stdev(found):.1f}" if len(found) > 1 else "")


def paired(system: str, minus: str, context: str) -> str:
    """A difference of six_systems_paired.csv with its interval, in points."""
    (row,) = rows("six_systems_paired", system=system, minus=minus, context=context)
    difference, low, high = (100 * float(row[column]) for column in ("difference", "low", "high"))
    return f"{signed(difference)} ({signed(low)}{RANGE}{signed(high)})"


# --------------------------------------------------------------------------------------------------------------------
# Results of the experiments
# --------------------------------------------------------------------------------------------------------------------

SIX = ("teacher", "teacher_cd1", "teacher_cd2", "before", "before_cd1", "ce_only", "sharpened2", "kd", "caad05", "caad1", "caad2",
       "caad2_plausible", "caad_plus", "teacher_long", "kd_of_long", "caad2_of_long")  # fmt: skip
KINDS = ("neutral", "aligned", "conflict")
HINTS = tuple(CONTEXTS[kind] for kind in KINDS)


def _six(systems: Iterable[str], columns: Sequence[str]) -> Iterable[list[str]]:
    for system in systems:
        latency = whole(mean("six_systems", "latency_ms", system=system))
        yield [SYSTEMS[system], *(spread("six_systems", column, system=system) for column in columns), latency]


def six_systems() -> Table:
    columns = (*KINDS, "all", "shift_tir_adv")
    head = ("system", *HINTS, "ALL", "Shift (TIR_adv)", "ms an answer")
    return head, _six(SIX, columns)


def readme_results() -> Table:
    """The systems with eight teachers in E1 and E3, side by side."""
    contexts = {"none": "no text", "faithful": "true text", "adversarial": "false text"}
    lines: dict[str, list[str]] = {}
    for prefix in (FIRST, NATURAL):
        for system in ("kd", "kd_tuned", "caad2", "hint_stripped", "ce_true"):
            own = [row for row in study_rows(prefix) if row["system"] == system]
            cells = (one(statistics.mean(of)) for of in over_teachers(own, contexts))  # deviations are in results.md
            lines.setdefault(system, [SYSTEMS[system]]).extend(cells)
    return ("system", *(f"{name}: {c}" for name in ("E1", "E3") for c in contexts.values())), lines.values()


def six_differences() -> Table:
    pairs = (("caad05", "kd"), ("caad1", "kd"), ("caad2", "kd"), ("caad2_plausible", "kd"), ("caad_plus", "kd"),
             ("caad2_of_long", "kd_of_long"), ("caad2", "sharpened2"), ("caad2", "ce_only"), ("caad_plus", "caad2"),
             ("caad_plus", "teacher_cd1"))  # fmt: skip
    head = ("difference", *HINTS, "ALL")
    return head, (
        [f"{SYSTEMS[a]} − {SYSTEMS[b]}", *(paired(a, b, context) for context in (*KINDS, "all"))] for a, b in pairs
    )


def six_relative() -> Table:
    """Gain over standard KD relative to KD's own accuracy."""

    def gain(system: str, base: str, column: str) -> str:
        of, over = (mean("six_systems", column, system=name) for name in (system, base))
        return f"{signed(100 * (of / over - 1))}%"

    pairs = (("caad1", "kd"), ("caad2", "kd"), ("caad2_of_long", "kd_of_long"))
    head = ("relative gain over KD", "no hint", "true hint", "ALL, a third of it false hints")
    return head, ([SYSTEMS[a], *(gain(a, b, column) for column in ("neutral", "aligned", "all"))] for a, b in pairs)


def six_additions() -> Table:
    systems = ("caad2_layers", "caad2_weighted", "caad2_ramp", "caad2_centered", "caad2_adaptive", "caad2_plausible")
    head = ("added to CAAD alpha 2", "seeds", *HINTS, "ALL")

    def line(system: str) -> list[str]:
        seeds = rows("six_systems_paired", system=system, minus="caad2")[0]["seeds"]
        added = SYSTEMS[system].removeprefix(f"{SYSTEMS['caad2']}, ")
        return [added, seeds, *(paired(system, "caad2", context) for context in (*KINDS, "all"))]

    return head, map(line, systems)


def six_by_noise() -> Table:
    """Accuracy under hints by the clip's signal-to-noise ratio."""
    systems = ("kd", "caad1", "caad2")
    levels = dict.fromkeys(row["value"] for row in rows("sweeps", sweep="conflict_strength"))

    def cells(level: str) -> Iterable[str]:
        for context in ("aligned", "conflict"):
            for system in systems:
                yield percent(mean("sweeps", context, sweep="conflict_strength", value=level, system=system))

    head = ("SNR in dB", *(f"{hint}, {SYSTEMS[system]}" for hint in HINTS[1:] for system in systems))
    return head, ([level.replace("-", MINUS), *cells(level)] for level in levels)


def sweep(name: str, head: str, labels: Mapping[str, str] | None = None) -> Callable[[], Table]:
    """CAAD (and KD, where the sweep has it) over the values of a setting, seed 0."""

    def build() -> Table:
        found = [row for row in rows("sweeps", sweep=name, seed=0) if row["system"] != "teacher"]
        lines = (
            [
                (labels or {}).get(row["value"], row["value"]),
                {"kd": "KD", "caad": "CAAD"}[row["system"]],
                *(percent(float(row[column])) for column in (*KINDS, "all")),
            ]
            for row in found
        )
        return (head, "student", *HINTS, "ALL"), lines

    return build


# System -> whether a recipe of its name makes it.
ABLATION = {
    "baseline": False, "sft": True, "text_kd_top": True, "text_kd_skip": True, "text_kd_all": True, "text_acoustic_kd": True,
    "caad": True, "caad_layers": True, "everything": True, "text_teacher": False,
}  # fmt: skip
CLAIMS = (
    ("baseline", "sft", "perception", "SFT alone forgets perception"),
    ("text_acoustic_kd", "text_kd_all", "perception", "the acoustic teacher keeps perception"),
    ("text_kd_top", "sft", "content", "top-layer text KD beats SFT on content"),
    ("text_kd_all", "text_kd_top", "content", "all layers beat the top layer on content"),
    ("text_kd_all", "text_kd_skip", "content", "all layers beat one in seven on content"),
    ("text_acoustic_kd", "sft", "all", "both sources beat SFT on all"),
)


def ablation(name: str = "sources_layers") -> Table:
    columns = ("perception", "content", "all")
    head = ("system and its recipe", *columns)
    return head, (
        [SYSTEMS[system] + (f", `{system}`" if recipe else ""), *(spread(name, column, system=system) for column in columns)]
        for system, recipe in ABLATION.items()
    )


def study_ablation_tasks() -> Table:
    """The tasks of E4: the teacher on dev, and some systems on test. A task that does not count is in no mean."""
    systems = ("baseline", "sft", "text_acoustic_kd")

    def line(row: Row) -> list[str]:
        task, counts = row["task"], row["counts"]
        scores = (spread("study_sources_layers", f"task_{task}", system=system) for system in systems)
        return [task.replace("_", " "), percent(float(row["teacher_on_dev"])), counts, *scores]

    head = ("task", "teacher on dev", "counts", *(SYSTEMS[system] for system in systems))
    return head, (line(row) for row in read("study_sources_gate"))


VERDICTS = {"within noise": "not decided", "reproduced": "holds", "not reproduced": "the opposite holds"}


def study_ablation_claims() -> Table:
    """study_sources_claims.csv, in the order of the older table."""
    head = ("claim of the paper", "difference", "95% t interval", "p (Holm)", "here")
    return head, (_claim(rows("study_sources_claims", claim=claim)[0]) for *_, claim in CLAIMS)


def _claim(row: Mapping[str, Any]) -> list[str]:
    difference, low, high = (100 * float(row[column]) for column in ("difference", "t_low", "t_high"))
    interval, p = f"{signed(low)}{RANGE}{signed(high)}", f"{float(row['p_holm']):.3f}"
    return [row["claim"], signed(difference), interval, p, VERDICTS[row["verdict"]]]


def ablation_claims() -> Table:
    """The paper's claims with t intervals over seeds, the same seeds on both sides, and Holm's p over all claims."""
    scores = ("perception", "content", "all")
    measured = [row | {score: float(row[score]) for score in scores} for row in read("sources_layers")]
    found = {row["claim"]: row for row in claim_rows([row for row in measured if row["system"] != "text_teacher"])}

    def line(better: str, worse: str, column: str, claim: str) -> list[str]:
        of, over = ({row["seed"]: 100 * row[column] for row in measured if row["system"] == name} for name in (better, worse))
        name, difference, interval, *rest = _claim(found[claim])
        return [name, difference, interval, ", ".join(signed(of[seed] - over[seed]) for seed in of), *rest]

    head = ("claim of the paper", "difference", "95% t interval", "by seed", "p (Holm)", "here")
    return head, (line(*claim) for claim in CLAIMS)


DEMO = ("teacher", "teacher_cd1", "teacher_cd2", "ce_only", "kd", "sharpened2", "caad1", "caad2")
MACHINES = {
    "demo": "AVX-512 BF16",
    "demo_earlier": "AVX-512 BF16, earlier commit",
    "demo_amx": "AMX",
    "demo_avx2": "AVX2",
}


def demo() -> Table:
    head = ("system", *HINTS, "Shift (TIR_adv)")

    def line(system: str) -> list[str]:
        (row,) = rows("demo", system=system)
        return [SYSTEMS[system], *(percent(float(row[column])) for column in (*KINDS, "tir_adv"))]

    return head, map(line, DEMO)


def demo_machines() -> Table:
    head = ("false hint, by processor", *MACHINES.values())
    return head, ([SYSTEMS[system], *(percent(mean(name, "conflict", system=system)) for name in MACHINES)] for system in DEMO)


# --------------------------------------------------------------------------------------------------------------------
# Benchmarks
# --------------------------------------------------------------------------------------------------------------------

PROJECTED = "kdkernels from projections, 64 ids"
LIGER = "Liger chunked JSD, compiled, chunk "  # stands for the chunk with which it is fastest
CHOSEN = {
    "eager": "eager PyTorch",
    "torch.compile": "torch.compile",
    LIGER: "Liger, chunk {chunk}",
    "kdkernels (default: fp32 logits)": "kdkernels",
    "kdkernels fp32 logits, rounded contrast": "kdkernels, `round_contrast=True`",
    "kdkernels bf16 logits": "kdkernels, `logits_dtype=torch.bfloat16`",
}


def fastest(found: Iterable[Row], name: str) -> Row | None:
    """Of one comparison the row of a contender, or of its fastest chunk where the name leaves the chunk open."""
    of = [row for row in found if row["contender"] == name or (name == LIGER and row["contender"].startswith(LIGER))]
    return min(of, key=lambda row: float(row["median_ms"]), default=None)


def _linear(labels: Mapping[str, str]) -> Iterable[list[str]]:
    for contender, label in labels.items():
        row = fastest(read("linear_cpu"), contender)
        if row is None:
            raise TableError(f"linear_cpu.csv: no row of {contender}")
        cells = (
            (one, "speedup_over_eager"),
            (two, "times_floor"),
            (error, "gradient_error"),
            (whole, "peak_extra_mib"),
        )
        name = label.format(chunk=row["contender"].removeprefix(LIGER))
        yield [name, *(form(next(iter(numbers([row], column)), None)) for form, column in cells)]


LINEAR_HEAD = ("linear loss", "times faster than eager", "times the bare GEMMs", "gradient error", "extra MiB")


def readme_loss() -> Table:
    return LINEAR_HEAD, _linear({**CHOSEN, PROJECTED: "kdkernels, teacher projected before the training"})


def linear() -> Table:
    return LINEAR_HEAD, _linear({row["contender"]: row["contender"] for row in read("linear_cpu")})


def row_kernel() -> Table:
    head = ("row kernel", "dtype", "ns per token and id", "times faster than eager", "gradient error")

    def line(row: Row) -> list[str]:
        found = {column: next(iter(numbers([row], column)), None) for column in row if column in
                 ("ns_per_position", "speedup_over_eager", "gradient_error")}  # fmt: skip
        return [row["contender"], row["dtype"], two(found["ns_per_position"]), one(found["speedup_over_eager"]),
                error(found["gradient_error"])]  # fmt: skip

    return head, map(line, read("rows_cpu"))


def small_calls() -> Table:
    """Loss and gradient from logits in float32, where the call itself counts."""
    found = rows("rows_small_cpu", dtype="float32")
    shapes = dict.fromkeys((row["rows"], row["vocab"]) for row in found)
    head = ("us a call, loss and gradient", *(f"{tokens} tokens, {int(ids):,} ids" for tokens, ids in shapes))
    labels = {"eager": "eager PyTorch", "torch.compile": "torch.compile", "kdkernels": "kdkernels"}

    def cell(contender: str, tokens: str, ids: str) -> str:
        (row,) = (row for row in found if (row["contender"], row["rows"], row["vocab"]) == (contender, tokens, ids))
        return whole(1000 * float(row["median_ms"]))

    return head, ([label, *(cell(contender, *shape) for shape in shapes)] for contender, label in labels.items())


def linear_sweep() -> Table:
    """The linear loss over each size, the other sizes as in the main table."""
    head = ("what varies", "value", "kdkernels, ns per token and id", "times the bare GEMMs", "with bf16 logits")
    ours, half = "kdkernels (default: fp32 logits)", "kdkernels bf16 logits"

    def line(row: Row) -> list[str]:
        (other,) = rows("linear_sweep_cpu", sweep=row["sweep"], value=row["value"], contender=half)
        return [row["sweep"], f"{int(row['value']):,}", one(float(row["ns_per_position"])), two(float(row["times_floor"])),
                two(float(other["times_floor"]))]  # fmt: skip

    return head, map(line, rows("linear_sweep_cpu", contender=ours))


def several_teachers() -> Table:
    labels = {
        "eager": "eager PyTorch",
        "kdkernels a call a teacher, fp32 logits": "kdkernels, a call for each teacher",
        "kdkernels one call, fp32 logits": "kdkernels, one call",
        "kdkernels one call, bf16 logits": "kdkernels, one call, bf16 logits",
    }
    head = ("ms for 1, 2 and 3 teachers", "1", "2", "3")
    return head, (
        [label, *(whole(mean("multi_teacher_cpu", "median_ms", contender=name, sources=k)) for k in (1, 2, 3))]
        for name, label in labels.items()
    )


CONTRAST_SETTINGS = ("bf16 logits", "fp32 logits, rounded contrast", "fp32 logits (default)")


CONTRAST_PROBLEMS = (
    "first", "logits of std 1", "std 0.8, KL 0.002, V 16,384, H 1,024", "std 10.8, V 49,152, H 576", "KL 0.0005", "KL 0.03",
    "KL 1.1", "temperature 1", "temperature 4", "alpha 8", "V 65,536", "H 1,024", "head with long rows",
    "SmolLM2-135M-Instruct, KL 0.0005", "SmolLM2-135M-Instruct, KL 0.004", "SmolLM2-135M-Instruct, KL 0.03",
    "SmolLM2-135M-Instruct, KL 0.3",
)  # fmt: skip


def contrast_errors() -> Table:
    """Sorted by the quotient that decides."""
    found = rows("contrast_cpu", part="error", setting=CONTRAST_SETTINGS[1])
    found = [row for row in found if row["problem"] in CONTRAST_PROBLEMS]
    head = ("gradient error", "size of z_hat", "KL", "size over distance", "bf16 logits", "rounded contrast", "default")

    def line(row: Row) -> list[str]:
        of_problem = (mean("contrast_cpu", "gradient_error", problem=row["problem"], setting=x) for x in CONTRAST_SETTINGS)
        return [row["problem"], one(float(row["terms_std"])), f"{float(row['kl']):.2g}", one(float(row["size_over_distance"])),
                *map(error, of_problem)]  # fmt: skip

    return head, map(line, sorted(found, key=lambda row: float(row["size_over_distance"])))


def contrast_times() -> Table:
    shapes = dict.fromkeys(row["problem"] for row in rows("contrast_cpu", part="time"))
    head = ("time, as a multiple of the bare GEMMs", *shapes)
    return head, (
        [name, *(two(mean("contrast_cpu", "times_gemms", setting=name, problem=shape)) for shape in shapes)]
        for name in CONTRAST_SETTINGS
    )


def projection() -> Table:
    shapes = dict.fromkeys(row["shape"] for row in read("projection_cpu") if row["median_ms"])
    labels = {
        "CE alone": "cross-entropy alone",
        "from projections, 64 ids": "the whole loss from projections, 64 ids",
        "from projections, 16 ids": "the same, 16 ids",
        "from states": "the whole loss from the teacher's states",
        "making the projection": "making the projection, once for each token",
    }
    head = ("time, as a multiple of cross-entropy alone", *shapes)
    return head, (
        [label, *(two(mean("projection_cpu", "times_ce", contender=name, shape=shape)) for shape in shapes)]
        for name, label in labels.items()
    )


def projection_errors() -> Table:
    """By the divergence that is reached."""
    found = rows("projection_cpu", shape="near convergence")
    reached = dict.fromkeys(row["kl"] for row in found)
    head = ("gradient error at a KL of", *(f"{float(kl):.2g}" for kl in reached))
    contenders = dict.fromkeys(row["contender"] for row in found)
    return head, (
        [name, *(error(mean("projection_cpu", "gradient_error", contender=name, kl=kl)) for kl in reached)] for name in contenders
    )


def parallel() -> Table:
    head = ("ms on two ranks", "eager PyTorch", "kdkernels", "times faster")

    def line(row: Row) -> list[str]:
        (eager,) = rows("parallel_cpu", what=row["what"], contender="eager")
        times = [whole(float(x["median_ms"])) for x in (eager, row)]
        return [row["what"], *times, one(float(row["speedup_over_eager"]))]

    return head, map(line, rows("parallel_cpu", contender="kdkernels"))


# Their own kernels need a GPU.
ON_THE_CPU = {"CCE": "CCE's form for torch.compile", "TRL chunked divergence": "TRL's form in PyTorch"}


def peers(objective: str) -> Callable[[], Table]:
    """ms of each contender at the shapes of model pairs."""

    def build() -> Table:
        found = rows("peers_cpu", objective=objective)
        pairs = dict.fromkeys(row["pair"] for row in found)
        contenders = dict.fromkeys(row["contender"] for row in found if numbers([row], "median_ms"))

        def cell(contender: str, pair: str) -> str:
            of = [row for row in found if (row["contender"], row["pair"]) == (contender, pair)]
            return whole(next(iter(numbers(of, "median_ms")), None))

        return (f"ms, {objective}", *pairs), (
            [ON_THE_CPU.get(name, name), *(cell(name, pair) for pair in pairs)] for name in contenders
        )

    return build


def peers_shapes() -> Table:
    """How many times faster than eager PyTorch at the shapes that are hard for this library, and the gradient's error."""
    found = read("peers_shapes_cpu")
    pairs = dict.fromkeys(row["pair"] for row in found)

    def cell(contender: str, pair: str) -> str:
        row = fastest((row for row in found if row["pair"] == pair and row["objective"] == "KD + CE"), contender)
        return f"{two(float(row['speedup_over_eager']))} ({error(float(row['gradient_error']))})" if row else ""

    return ("times faster than eager", *pairs), (
        [label.format(chunk="256 or 1024"), *(cell(contender, pair) for pair in pairs)]
        for contender, label in {**CHOSEN, PROJECTED: "kdkernels, teacher projected before"}.items()
    )


def memory() -> Table:
    head = ("extra MiB", "256 tokens", "1,024 tokens", "4,096 tokens", "256 tokens, 131,072 ids")
    labels = {row["contender"]: row["contender"] for row in read("memory_cpu")}
    cells = (("tokens", 256, 49152), ("tokens", 1024, 49152), ("tokens", 4096, 49152), ("vocab", 256, 131072))

    def cell(contender: str, over: str, tokens: int, vocab: int) -> str:
        return whole(mean("memory_cpu", "peak_extra_mib", contender=contender, over=over, tokens=tokens, vocab=vocab))

    return head, ([name, *(cell(name, *place) for place in cells)] for name in labels)


def large_vocab() -> Table:
    head = ("family", "ids", "MiB, fused", "MiB, naive", "ms a step, fused", "ms a step, naive")

    def line(recipe: str) -> list[str]:
        fused, naive = (rows("large_vocab_cpu", recipe=recipe, method=method)[0] for method in ("fused", "naive"))
        return [fused["family"], f"{int(fused['student_vocab']):,}",
                *(whole(float(row["peak_extra_mib"])) for row in (fused, naive)),
                *(whole(float(row["step_ms"])) for row in (fused, naive))]  # fmt: skip

    return head, map(line, dict.fromkeys(row["recipe"] for row in read("large_vocab_cpu")))


def accuracy() -> Table:
    head = ("gradient error, KD alone, bf16", "random states", "near convergence")
    found = [r for r in rows("accuracy_cpu", kind="linear", objective="KD", dtype="bfloat16") if r["place"]]

    def cell(contender: str, place: str) -> str:
        of = [row for row in found if (row["contender"], row["place"]) == (contender, place)]
        return error(next(iter(numbers(of, "gradient_error")), None))

    return head, (
        [name, cell(name, "random"), cell(name, "near convergence")]
        for name in dict.fromkeys(r["contender"] for r in found)
    )


def layers() -> Table:
    """Layer loss without normalisation."""
    head = ("layer loss", "dtype", "eager", "torch.compile", "kdkernels", "floor", "gradient error, eager", "kdkernels")
    found = rows("layers_cpu", normalize="False")

    def line(key: tuple[str, str]) -> list[str]:
        of = {row["contender"]: row for row in found if (row["pair"], row["dtype"]) == key}
        times = (one(float(of[name]["median_ms"])) for name in ("eager", "torch.compile", "kdkernels", "floor"))
        return [*key, *times, *(error(float(of[name]["gradient_error"])) for name in ("eager", "kdkernels"))]

    return head, map(line, dict.fromkeys((row["pair"], row["dtype"]) for row in found))


def cache_size() -> Table:
    head = ("kept for each token", "kB", "mass of the target in the wrong place")
    found = [row for row in read("cache_cpu") if row["bytes_a_token"]]
    return head, (
        [r["kept"], FORMATS["kilo"](float(r["bytes_a_token"])), f"{percent(float(r['total_variation']))}%"]
        for r in found
    )


def packing() -> Table:
    head = ("layout", "padding", "ms, both paths of the teacher", "times faster", "ms, student's step", "times faster")
    return head, (
        [r["layout"], f"{100 * float(r['padding']):.0f}%", whole(float(r["median_ms"])), one(float(r["speedup"])),
         whole(float(r["student_ms"])), one(float(r["student_speedup"]))]
        for r in read("packing_cpu")
    )  # fmt: skip


def step() -> Table:
    head = (
        "teachers",
        "their passes, ms",
        "rest of the step, ms",
        "of it their LM heads, ms",
        "overhead beyond the heads",
    )

    def line(row: Row) -> list[str]:
        forward = sum(sum(numbers([row], f"{name}_teacher_ms")) for name in ("own", "text", "acoustic"))
        return [row["system"], whole(forward), whole(float(row["median_ms"])), whole(float(row["heads_ms"])),
                f"{signed(100 * float(row['overhead_beyond_heads']), 0)}%"]  # fmt: skip

    return head, map(line, read("step_cpu"))


def plan() -> Table:
    head = ("part", "predicted, s", "measured, s", "of the GEMM rate")
    return head, (
        [r["part"], two(float(r["predicted_s"])), two(float(r["measured_s"])), f"{100 * float(r['utilisation']):.0f}%"]
        for r in read("plan_calibration_cpu")
    )


STUDY = (
    "teacher", "teacher_cd1", "teacher_cd2", "kd", "kd_tuned", "kd_steps", "caad1", "caad2", "caad_tuned", "caad2_steps",
    "sharpened2", "hint_stripped", "kd_shuffled", "ce_true", "kd_metadata", "caad2_metadata", "caad2_swapped", "caad2_reversed",
    "caad2_narrow", "caad2_flat",
    "kd_clean_teacher", "caad2_clean_teacher", "caad2_adaptive", "caad2_centered", "caad2_uniform", "caad2_on50", "caad2_on100",
    "caad2_on100_reverse", "caad2_on100_jsd",
)  # fmt: skip
PROBED = {
    "statistics": "12 statistics of the signal",
    "length": "length of the clip",
    "mel": "mel bands",
    "first_convolution": "first convolution",
    "encoder": "layers 1 and 3 of Whisper tiny.en",
}


STUDY_CONTEXTS = ("none", "faithful", "adversarial", "irrelevant")
# How the names of an experiment's teachers begin.
FIRST, AGAIN, SEVERAL, NATURAL, AXES = "", "E1B-", "E2-", "E3-", "axes-"


def study_rows(prefix: str) -> list[Row]:
    """The rows of the teachers of one experiment. Those of E1 have no prefix."""
    return [row for row in read("study") if re.fullmatch(re.escape(prefix) + r"f\d+s\d+", row["teacher"])]


def study(prefix: str = FIRST) -> Table:
    """Accuracy in % by system and context, of the systems that are in the file: only complete ones are."""
    found, lines = study_rows(prefix), []
    for system in (name for name in STUDY if any(row["system"] == name for row in found)):
        own = [row for row in found if row["system"] == system]
        cells = map(mean_and_deviation, over_teachers(own, STUDY_CONTEXTS))
        lines.append([SYSTEMS[system], str(len({row["teacher"] for row in own})), *cells])
    return ("system", "teachers", *STUDY_CONTEXTS), lines


def over_teachers(own: Sequence[Row], contexts: Iterable[str]) -> list[list[float]]:
    """Accuracy in % of each teacher, by context: the mean over the tasks that passed its gate."""
    found = []
    for context in contexts:
        of: dict[str, list[float]] = {}
        for row in own:
            if row["context"] == context:
                of.setdefault(row["teacher"], []).append(100 * float(row["accuracy"]))
        found.append([statistics.mean(values) for values in of.values()])
    return found


def study_tasks(prefix: str) -> Table:
    """An experiment by task: accuracy in % without a text / under adversarial text, mean over the teachers whose gate the task
    passed."""
    found = study_rows(prefix)
    systems = [name for name in STUDY if any(row["system"] == name for row in found)]

    def cell(system: str, task: str) -> str:
        own = [row for row in found if (row["system"], row["task"]) == (system, task)]
        means = (numbers([r for r in own if r["context"] == context], "accuracy") for context in ("none", "adversarial"))
        return " / ".join(f"{100 * statistics.mean(values):.0f}" for values in means) if own else ""

    tasks = sorted({row["task"] for row in found})
    count = {task: len({row["teacher"] for row in found if row["task"] == task}) for task in tasks}
    head = [f"{task.replace('_', ' ')} ({count[task]})" for task in tasks]
    return ("system", *head), ([SYSTEMS[system], *(cell(system, task) for task in tasks)] for system in systems)


def study_gate(prefix: str) -> Table:
    """An experiment on dev: what each teacher hears without a hint, its Shift and its text effect, by task."""
    found = [row for row in read("study_gate") if row["teacher"].startswith(prefix)]
    teachers = list(dict.fromkeys(row["teacher"] for row in found))

    def cell(row: Row) -> str:
        mark = "**" if row["in_study"] == "yes" else ""
        parts = (f"{100 * float(row[column]):.0f}".replace("-", MINUS) for column in ("heard", "shift", "text_effect"))
        return f"{mark}{' / '.join(parts)}{mark}"

    cells = {(row["task"], row["teacher"]): cell(row) for row in found}
    tasks = sorted({row["task"] for row in found})
    lines = ([task.replace("_", " "), *(cells[task, teacher] for teacher in teachers)] for task in tasks)
    return ("task", *(teacher.removeprefix(prefix) for teacher in teachers)), lines


def study_endpoints(file: str = "study_endpoints") -> Table:
    """The endpoints of E1 in points: mean, 95% t interval over teachers, 95% bootstrap over teachers and actors, verdict, and the
    t interval over the means of the folds."""
    head = (
        "endpoint", "difference", "teachers", "points", "over teachers", "over teachers and actors", "over folds", "p (Holm)",
        "verdict",
    )  # fmt: skip

    def line(row: Row) -> list[str]:
        difference = f"{SYSTEMS[row['first']]} {MINUS} {SYSTEMS[row['second']]}"
        intervals = (ends(row, "t"), ends(row, "actors"), ends(row, "folds"))
        return [row["name"], difference, row["teachers"], signed(100 * float(row["difference"])), *intervals,
                f"{float(row['p_holm']):.3f}", row["verdict"]]  # fmt: skip

    return head, map(line, read(file))


def ends(row: Row, unit: str) -> str:
    """The interval of an endpoint in points; nothing where there is none."""
    return RANGE.join(signed(100 * float(row[f"{unit}_{end}"])) for end in ("low", "high")) if row[f"{unit}_low"] else ""


def study_axes_endpoints() -> Table:
    """The axes: each difference in points, with the 95% t interval over teachers, by endpoint."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    teachers: dict[tuple[str, str], str] = {}
    for row in read("study_endpoints_axes"):
        pair = row["first"], row["second"]
        interval = f" ({over})" if (over := ends(row, "t")) else ""
        found.setdefault(pair, {})[row["name"]] = signed(100 * float(row["difference"])) + interval
        teachers[pair] = row["teachers"]
    lines = ([f"{SYSTEMS[a]} {MINUS} {SYSTEMS[b]}", teachers[a, b], *of.values()] for (a, b), of in found.items())
    return ("difference", "teachers", "P1, no text", "P2, adversarial", "P3, faithful"), lines


# The studies that the claims table compares, and their endpoints.
CLAIMED = {"E1": "study_endpoints", "E2": "study_endpoints_E2", "E3": "study_endpoints_E3"}
# Its rows: a pair of systems, and the name of what CAAD alpha 2 is compared with.
CLAIMED_PAIRS = {
    ("caad2", "kd_tuned"): SYSTEMS["kd_tuned"],
    ("caad2", "kd"): SYSTEMS["kd"],
    ("caad2_steps", "kd_steps"): f"{SYSTEMS['kd']}, steps of both chosen on dev",
    ("caad2", "sharpened2"): SYSTEMS["sharpened2"],
    ("caad2_metadata", "kd_metadata"): f"{SYSTEMS['kd']}, both with answers from the metadata",
    ("caad2", "hint_stripped"): SYSTEMS["hint_stripped"],
    ("caad2", "ce_true"): SYSTEMS["ce_true"],
}


def claimed() -> dict[tuple[str, str, tuple[str, str]], Row]:
    """(study, endpoint, pair) -> its row, of all comparisons of the claims table. Two teachers of eight decide nothing, so E1 has
    no answers from the metadata there."""
    return {
        (study, row["name"], (row["first"], row["second"])): row
        for study, file in CLAIMED.items()
        for row in read(file)
        if (row["first"], row["second"]) in CLAIMED_PAIRS and row["verdict"] != "too few teachers"
    }


def study_claims() -> Table:
    """CAAD alpha 2 minus each other system in points, by endpoint and study. Bold holds, and in italics the opposite holds. Both
    do so also after Holm's correction over all comparisons of this table."""
    found = claimed()
    together = dict(zip(found, holm([float(row["p"]) for row in found.values()]), strict=True))
    marks = {"holds": "**", "the opposite holds": "*"}

    def cell(key: tuple[str, str, tuple[str, str]]) -> str:
        if key not in found:
            return ""
        mark = marks.get(found[key]["verdict"], "") if together[key] < 0.05 else ""
        return f"{mark}{signed(100 * float(found[key]['difference']))}{mark}"

    endpoints = {"P1": "no text", "P2": "adversarial", "P3": "faithful"}
    lines = (
        [title, f"{name}, {text}", *(cell((study, name, pair)) for study in CLAIMED)]
        for pair, title in CLAIMED_PAIRS.items()
        for name, text in endpoints.items()
    )
    return ("CAAD alpha 2 minus", "endpoint", *CLAIMED), lines


def study_text_effects() -> Table:
    """Accuracy under faithful minus accuracy under adversarial text in points, mean over teachers, and by how much CAAD alpha 2
    has more of it, with the t interval over teachers. The last columns have the tasks in which the teacher follows texts."""
    followed = followed_tasks(read("study_gate"), NATURAL)

    def effects(prefix: str, system: str, kept: Mapping[str, set[str]] | None) -> dict[str, float]:
        of: dict[str, dict[str, list[float]]] = {}
        for row in study_rows(prefix):
            if row["system"] == system and (kept is None or row["task"] in kept.get(row["teacher"], ())):
                by_context = of.setdefault(row["teacher"], {"faithful": [], "adversarial": []})
                by_context.get(row["context"], []).append(100 * float(row["accuracy"]))
        return {t: statistics.mean(x["faithful"]) - statistics.mean(x["adversarial"]) for t, x in of.items()}

    lines: dict[str, list[str]] = {}
    for prefix, kept in ((FIRST, None), (SEVERAL, None), (NATURAL, None), (NATURAL, followed)):
        ours = effects(prefix, "caad2", kept)
        for system in ("kd", "kd_tuned", "sharpened2", "hint_stripped", "ce_true", "caad2"):
            cells = lines.setdefault(system, [SYSTEMS[system]])
            if not (own := effects(prefix, system, kept)):
                cells += ["", ""]
                continue
            less = t_interval([ours[teacher] - own[teacher] for teacher in own])
            over = f"{signed(less.mean)} ({signed(less.low)}{RANGE}{signed(less.high)})"
            cells += [one(statistics.mean(own.values())), "" if system == "caad2" else over]
    names = ("E1", "E2", "E3", "E3, tasks whose texts the teacher follows")
    return ("system", *(head for name in names for head in (name, "CAAD alpha 2 minus it"))), lines.values()


def study_curves() -> Table:
    """E5: accuracy on dev by optimizer step, one teacher."""
    found = read("study_curves")
    columns = list(dict.fromkeys((row["system"], row["context"]) for row in found))
    accuracy = {(row["step"], row["system"], row["context"]): f"{100 * float(row['accuracy']):.1f}" for row in found}
    lines = ([step, *(accuracy[(step, *column)] for column in columns)] for step in dict.fromkeys(row["step"] for row in found))
    return ("step", *(f"{SYSTEMS[system]}, {context}" for system, context in columns)), lines


def study_natural_curves() -> Table:
    """E3: accuracy on dev by optimizer step, mean over tasks, one teacher."""
    found = read("study_curves_E3")
    columns = list(dict.fromkeys((row["system"], row["context"]) for row in found))

    def cell(step: str, system: str, context: str) -> str:
        own = [row for row in found if (row["step"], row["system"], row["context"]) == (step, system, context)]
        return f"{100 * statistics.mean(numbers(own, 'accuracy')):.0f}" if own else ""

    lines = ([step, *(cell(step, *column) for column in columns)] for step in dict.fromkeys(row["step"] for row in found))
    return ("step", *(f"{SYSTEMS[system]}, {context}" for system, context in columns)), lines


def study_steps() -> Table:
    """E2 on dev: accuracy in % by system and number of steps, mean over the teachers; what dev chooses is in bold."""
    found = [row for row in read("study_steps") if row["teacher"].startswith(SEVERAL)]
    both = {(row["system"], int(row["steps"])) for row in found}
    tried = [f"{system}_{steps}" for system, steps in sorted(both, key=lambda x: (STUDY.index(x[0]), x[1]))]
    chosen = chosen_steps(found, tried)

    def line(name: str) -> list[str]:
        system, steps = name.rsplit("_", 1)
        own = [row for row in found if (row["system"], row["steps"]) == (system, steps)]
        by_context = [100 * statistics.mean(numbers([r for r in own if r["context"] == c], "accuracy")) for c in STUDY_CONTEXTS]
        mark = "**" if name in chosen else ""
        return [SYSTEMS[system], f"{mark}{steps}{mark}", *(one(x) for x in by_context), one(statistics.mean(by_context))]

    return ("system", "steps", *STUDY_CONTEXTS, "mean"), map(line, tried)


def study_probes() -> Table:
    """Balanced accuracy in % of the linear probes on test, mean over folds."""
    found = read("study_probes")
    descriptions = list(dict.fromkeys(row["description"] for row in found))

    def cell(task: str, description: str) -> str:
        own = [row for row in found if (row["task"], row["description"]) == (task, description)]
        return f"{100 * statistics.mean(float(row['balanced_accuracy']) for row in own):.0f}"

    tasks = dict.fromkeys(row["task"] for row in found)
    lines = ([task.replace("_", " "), *(cell(task, d) for d in descriptions)] for task in tasks)
    return ("task", *(PROBED[d] for d in descriptions)), lines


def stress() -> Table:
    head = ("what was killed", "rounds", "kills", "equal to an undisturbed run, bit for bit", "lost", "doubled")
    columns = ("what", "rounds", "kills", "bitwise_equal", "lost", "doubled")
    return head, ([row[column] for column in columns] for row in read("stress_cpu"))


TABLES: dict[str, Callable[[], Table]] = {
    "readme_results": readme_results,
    "readme_loss": readme_loss,
    "six_systems": six_systems,
    "six_differences": six_differences,
    "six_relative": six_relative,
    "six_additions": six_additions,
    "six_by_noise": six_by_noise,
    "sweep_alpha": sweep("alpha", "alpha"),
    "sweep_lambda": sweep("lambda", "lambda"),
    "sweep_tau": sweep("tau", "tau"),
    "sweep_anchor": sweep("anchor", "who writes the answers", ANCHORS),
    "ablation": ablation,
    "ablation_claims": ablation_claims,
    "study_ablation": lambda: ablation("study_sources_layers"),
    "study_ablation_tasks": study_ablation_tasks,
    "study_ablation_claims": study_ablation_claims,
    "demo": demo,
    "study_claims": study_claims,
    "study": study,
    "study_again": lambda: study(AGAIN),
    "study_again_endpoints": lambda: study_endpoints("study_endpoints_E1B"),
    "study_natural_gate": lambda: study_gate(NATURAL),
    "study_several_gate": lambda: study_gate(SEVERAL),
    "study_several": lambda: study(SEVERAL),
    "study_several_tasks": lambda: study_tasks(SEVERAL),
    "study_several_endpoints": lambda: study_endpoints("study_endpoints_E2"),
    "study_steps": study_steps,
    "study_natural": lambda: study(NATURAL),
    "study_natural_tasks": lambda: study_tasks(NATURAL),
    "study_endpoints": study_endpoints,
    "study_natural_endpoints": lambda: study_endpoints("study_endpoints_E3"),
    "study_text_effects": study_text_effects,
    "study_axes": lambda: study(AXES),
    "study_axes_endpoints": study_axes_endpoints,
    "study_curves": study_curves,
    "study_natural_curves": study_natural_curves,
    "study_probes": study_probes,
    "demo_machines": demo_machines,
    "row_kernel": row_kernel,
    "linear": linear,
    "linear_sweep": linear_sweep,
    "contrast_errors": contrast_errors,
    "contrast_times": contrast_times,
    "projection": projection,
    "projection_errors": projection_errors,
    "several_teachers": several_teachers,
    "parallel": parallel,
    "small_calls": small_calls,
    "peers_shapes": peers_shapes,
    "peers_kd_ce": peers("KD + CE"),
    "peers_kd": peers("KD"),
    "peers_ce": peers("CE"),
    "memory": memory,
    "large_vocab": large_vocab,
    "accuracy": accuracy,
    "layers": layers,
    "cache_size": cache_size,
    "packing": packing,
    "step": step,
    "plan": plan,
    "stress": stress,
}


# --------------------------------------------------------------------------------------------------------------------
# Keys of a recipe
# --------------------------------------------------------------------------------------------------------------------

# Such as recipe_loss and recipe_student_lora; "recipe" has the keys that are in no section.
RECIPE_TABLES = {"_".join(["recipe", *filter(None, section.places[0].lower().split("."))]): section for section in sections()}


def recipe_keys(section: Section) -> Table:
    keys = ((f"`{key.name}`", key.default and f"`{key.default}`", key.meaning) for key in section.keys)
    return ("key", "default", "meaning"), keys


# --------------------------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------------------------

_TABLE = re.compile(r"^<!-- table: (?P<name>\w+) -->\n(?P<body>.*?)^<!-- /table -->$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"<!-- n: (?P<key>.+?) -->(?P<body>.*?)<!-- /n -->", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold a marker."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def markdown(name: str) -> str:
    """The table that a marker names."""
    if name in RECIPE_TABLES:
        return render(recipe_keys(RECIPE_TABLES[name]), others="---")
    if name in TABLES:
        return render(TABLES[name]())
    raise TableError(f"table {name}: expected one of {', '.join([*TABLES, *RECIPE_TABLES])}")


def render(table: Table, *, others: str = "---:") -> str:
    """A table as Markdown; the first column is text, the others are numbers where `others` does not say otherwise."""
    head, body = table
    lines = [list(head), ["---"] + [others] * (len(head) - 1), *map(list, body)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def number(key: str) -> str:
    """The number that a marker names."""
    parts = key.split("/")
    if len(parts) != 4:
        raise TableError(f"n: {key}: expected FILE/ROWS/COLUMN/FORMAT")
    name, where, column, form = parts
    if form not in FORMATS:
        raise TableError(f"n: {key}: expected a format among {', '.join(FORMATS)}, got {form!r}")
    found = rows(name, **dict(pair.split("=", 1) for pair in where.split(";")))
    values = [mean_of(found, part) for part in column.split(":")]
    return FORMATS[form](values[0] if len(values) == 1 else values[0] / values[1])


def mean_of(found: Sequence[Row], column: str) -> float:
    if column not in found[0]:
        raise TableError(f"column {column!r}: expected one of {', '.join(found[0])}")
    return statistics.mean(numbers(found, column))


def written(text: str) -> tuple[str, list[str]]:
    """A page as it should be, and the names of the tables and numbers in which it differs."""
    stale = []

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        body = f"\n{markdown(name)}\n"
        if body != match["body"]:
            stale.append(f"table {name}")
        return f"<!-- table: {name} -->\n{body}<!-- /table -->"

    def inline(match: re.Match[str]) -> str:
        value = number(match["key"])
        if value != match["body"]:
            stale.append(f"n: {match['key']}: the page says {match['body']!r}, the CSV {value!r}")
        return f"<!-- n: {match['key']} -->{value}<!-- /n -->"

    return _NUMBER.sub(inline, _TABLE.sub(table, text)), stale


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m docs.tables", description="Tables and numbers of the docs, from the CSV files and the code."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where a page differs from its source"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    check = build_parser().parse_args(argv).check
    differs = False
    for path in pages():
        text = path.read_text(encoding="utf-8")
        try:
            fresh, stale = written(text)
        except TableError as problem:
            print(f"{path.relative_to(ROOT)}: {problem}", file=sys.stderr)
            return 1
        if check:
            for name in stale:
                print(
                    f"{path.relative_to(ROOT)}: {name}: differs from its source; run `python -m docs.tables`",
                    file=sys.stderr,
                )
            differs |= bool(stale)
        elif fresh != text:
            path.write_text(fresh, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {len(stale)} written")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
