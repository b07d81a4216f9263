"""The endpoints of docs/protocol.md: differences between two systems, with teachers and actors as the units of inference.

A teacher with its students is one draw of the whole method, and an actor is one draw of the people that it hears. Questions are
neither: those on one recording, and those on one actor, go together.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.corpora.plans.base import ACTOR_FOLDS
from models.corpora.plans.recorded import DRASCULA_FOLDS, HEDGEWARS_FOLDS
from models.evaluation.predictions import Prediction, read_predictions
from models.evaluation.scoring import judge
from models.evaluation.t_interval import p_value, t_interval

# Name, context, lowest SNR in dB, and the difference that the test excludes.
ENDPOINTS = (
    ("P1", "neutral", -math.inf, 0.0),
    ("P2", "conflict", -math.inf, 0.0),
    ("P3", "aligned", -8.0, -0.01),
)
TUNED_FOLD = 0  # its dev actors choose the settings of the tuned systems
MIN_TEACHERS = 8  # fewer decide nothing
MIN_TEXT_EFFECT = 0.1  # on dev, of a teacher that follows texts: accuracy under faithful minus accuracy under adversarial text
_SAMPLES = 200_000  # draws of the bootstrap: its ends vary by less than 0.1 point from seed to seed
_AT_ONCE = 20_000


@dataclass(frozen=True)
class Endpoint:
    """One difference in accuracy, first minus second, as a share of 1.

    `t_low` and `t_high` are the 95% t interval over teachers, `actors_low` and `actors_high` that of the two-way bootstrap. With
    one teacher, or with equal ones, there is no t interval: its ends are infinite and `p` is 1.

    The teachers of a fold share their actors. So `folds_low`, `folds_high` and `folds_p` are of a t test whose units are the
    means of the folds. They stand beside the verdict, which the protocol takes from the teachers.
    """

    name: str
    first: str
    second: str
    teachers: int
    actors: int
    difference: float
    t_low: float
    t_high: float
    p: float
    actors_low: float
    actors_high: float
    bound: float
    folds: int
    folds_low: float
    folds_high: float
    folds_p: float
    p_holm: float = math.nan
    folds_p_holm: float = math.nan

    @property
    def holds(self) -> bool:
        """Whether both units of inference exclude the bound, on the good side, after Holm's correction."""
        return self._sure and min(self.t_low, self.actors_low) > self.bound

    @property
    def verdict(self) -> str:
        """In the words of study_endpoints.csv. The opposite holds where both units exclude the bound on the other side."""
        if self.teachers < MIN_TEACHERS:
            return "too few teachers"
        below = self._sure and max(self.t_high, self.actors_high) < self.bound
        return "holds" if self.holds else "the opposite holds" if below else "failed"

    @property
    def _sure(self) -> bool:
        return self.teachers >= MIN_TEACHERS and self.p_holm < 0.05


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: the smallest times n, the next times n - 1, and so on, never falling and at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def difference(
    pairs: Mapping[str, tuple[Sequence[Prediction], Sequence[Prediction]]],
    *,
    name: str,
    kind: str,
    min_snr_db: float,
    bound: float,
    systems: tuple[str, str],
    seed: int = 0,
) -> Endpoint:
    """One endpoint: the mean over tasks of the difference in accuracy on the same questions.

    Args:
        pairs: teacher, such as "f0s1" or "E3-f0s1" -> the predictions of the first and of the second system.
        kind: of the questions.
        min_snr_db: only clips with at least this SNR; with a finite value, clips of unknown SNR are left out.
        bound: what the t test compares with.

    Raises:
        ValueError: no teacher has such questions, or the two systems of a teacher were asked different ones.
    """
    cells: dict[tuple[str, str, str], list[float]] = defaultdict(list)  # (teacher, actor, task)
    for teacher, both in pairs.items():
        first, second = ({p.id: p for p in own if p.kind == kind and not p.control} for own in both)
        if first.keys() != second.keys():
            alone = len(first.keys() - second.keys()), len(second.keys() - first.keys())
            raise ValueError(
                f"{teacher}: expected the same questions of kind {kind!r} from {systems[0]} and {systems[1]}, got {alone[0]} of "
                f"the first alone and {alone[1]} of the second alone"
            )
        shared = [p for p in first.values() if _heard(p, min_snr_db)]
        gains = judge(shared).astype(float) - judge([second[p.id] for p in shared])
        for p, gain in zip(shared, gains, strict=True):
            cells[teacher, p.actor or p.clip, p.task].append(gain)
    if not cells:
        raise ValueError(f"pairs: expected questions of kind {kind!r}, got none")
    teachers, actors, tasks = (list(dict.fromkeys(key[axis] for key in cells)) for axis in range(3))
    sums = np.zeros((len(tasks), len(teachers), len(actors)))
    counts = np.zeros_like(sums)
    for (teacher, actor, task), values in cells.items():
        at = tasks.index(task), teachers.index(teacher), actors.index(actor)
        sums[at], counts[at] = sum(values), len(values)
    with np.errstate(invalid="ignore"):
        by_teacher = np.nanmean(sums.sum(2) / counts.sum(2), axis=0)
    mean = float(by_teacher.mean())
    by_fold: dict[str, list[float]] = defaultdict(list)
    for teacher, value in zip(teachers, by_teacher, strict=True):
        by_fold[re.sub(r"s\d+$", "", teacher)].append(float(value))
    fold_means = [statistics.mean(values) for values in by_fold.values()]
    ends = np.quantile(_two_way_means(sums, counts, np.random.default_rng(seed)), [0.025, 0.975])
    return Endpoint(
        name, *systems, len(teachers), len(actors), mean, *_t_test(by_teacher.tolist(), bound), float(ends[0]), float(ends[1]),
        bound, len(fold_means), *_t_test(fold_means, bound),
    )  # fmt: skip


def _t_test(values: Sequence[float], bound: float) -> tuple[float, float, float]:
    """Ends of the 95% t interval of a mean, and the p of its t test against `bound`."""
    found = t_interval(values)
    return found.low, found.high, p_value(values, bound)


def _two_way_means(sums: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The statistic of each draw of teachers and actors: the mean over teachers of the mean over their tasks.

    A teacher's task none of whose actors is drawn is left out of the draw. The other tasks keep their weights: with a teacher of
    two tasks each counts half as much as with a teacher of one.

    Args:
        sums, counts: (tasks, teachers, actors), of the gains.

    Returns:
        (draws,), without those in which nothing is left.
    """
    _, teachers, actors = sums.shape
    asked = counts.sum(2) > 0
    weights = asked / np.maximum(asked.sum(0), 1)
    found = []
    for start in range(0, _SAMPLES, _AT_ONCE):
        size = min(_AT_ONCE, _SAMPLES - start)
        drawn, heard = (generator.multinomial(n, np.full(n, 1 / n), size=size) for n in (teachers, actors))
        tops, bottoms = (np.einsum("kta,sa->skt", x, heard, optimize=True) for x in (sums, counts))
        here = weights * drawn[:, None, :] * (bottoms > 0)
        whole = here.sum((1, 2))
        means = (here * tops / np.maximum(bottoms, 1)).sum((1, 2)) / np.where(whole > 0, whole, 1)
        found.append(means[whole > 0])
    return np.concatenate(found)


def _heard(prediction: Prediction, min_snr_db: float) -> bool:
    if min_snr_db == -math.inf:
        return True
    return prediction.snr_db is not None and prediction.snr_db >= min_snr_db


# The claim of the protocol is the first. The others stand beside it, with a correction over all of them.
PAIRS = (
    ("caad2", "kd_tuned"), ("caad2", "kd"), ("caad2", "hint_stripped"), ("caad2", "ce_true"), ("caad2_metadata", "kd_metadata"),
    ("caad2", "sharpened2"), ("caad2_steps", "kd_steps"),
)  # fmt: skip


def all_endpoints(
    folder: Path,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    *,
    prefix: str = "",
    kept: Mapping[str, Collection[str]] | None = None,
) -> list[Endpoint]:
    """P1 to P3 of `pairs`, as far as there are predictions. Holm's correction is over the claim, and over all other pairs.

    Args:
        kept: teacher -> its tasks that count; None = all.
    """
    found = {pair: endpoints(folder, first=pair[0], second=pair[1], prefix=prefix, kept=kept) for pair in pairs}
    claim = found.pop(PAIRS[0], [])
    return with_holm(claim) + with_holm([e for of_pair in found.values() for e in of_pair])


def followed_tasks(gate: Sequence[Mapping[str, str]], prefix: str) -> dict[str, set[str]]:
    """Teacher -> its tasks in the study whose text effect on dev is at least MIN_TEXT_EFFECT, from the rows of study_gate.csv.

    A Shift alone does not say that a teacher follows texts: one that gives the same answer beside any text has a Shift of a half.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for row in gate:
        follows = row["text_effect"] and float(row["text_effect"]) >= MIN_TEXT_EFFECT
        if row["teacher"].startswith(prefix) and row["in_study"] == "yes" and follows:
            found[row["teacher"]].add(row["task"])
    return dict(found)


def untuned(system: str, predictions: Sequence[Prediction]) -> list[Prediction]:
    """The predictions that can test the system. They leave out the dev actors that chose its settings, whom other folds test: for
    a tuned one those of E5, which has one fold, and for one with chosen steps those of all folds and games."""
    seen: set[str] = set()
    if system.endswith("_tuned"):
        seen = {f"queen-{actor}" for actor in ACTOR_FOLDS[TUNED_FOLD]["dev"]}
    elif system.endswith("_steps"):
        games = {"queen": ACTOR_FOLDS, "drascula": DRASCULA_FOLDS, "hedgewars": HEDGEWARS_FOLDS}
        seen = {f"{game}-{actor}" for game, folds in games.items() for fold in folds for actor in fold["dev"]}
    return [p for p in predictions if p.actor not in seen]


def endpoints(
    folder: Path,
    *,
    first: str = "caad2",
    second: str = "kd",
    prefix: str = "",
    kept: Mapping[str, Collection[str]] | None = None,
) -> list[Endpoint]:
    """P1 to P3 of two systems, from the packed predictions in `folder`; empty if no teacher has both systems.

    Args:
        prefix: of the teachers' names: "" for E1, "E2-" for E2.
        kept: teacher -> its tasks that count; None = all.
    """
    pairs = {}
    for path in sorted(folder.glob(f"{prefix}f*s*-{first}.jsonl.gz")):
        teacher = path.name.removesuffix(f"-{first}.jsonl.gz")
        other = folder / f"{teacher}-{second}.jsonl.gz"
        if other.exists():
            both = (untuned(second, untuned(first, read_predictions(file)[1])) for file in (path, other))
            one, two = ([p for p in own if kept is None or p.task in kept.get(teacher, ())] for own in both)
            if one:
                pairs[teacher] = (one, two)
    if not pairs:
        return []
    return [
        difference(pairs, name=name, kind=kind, min_snr_db=snr, bound=bound, systems=(first, second))
        for name, kind, snr, bound in ENDPOINTS
    ]


def with_holm(found: Sequence[Endpoint]) -> list[Endpoint]:
    """The same endpoints with their p values corrected together: those over teachers, and those over folds."""
    corrected = zip(found, holm([e.p for e in found]), holm([e.folds_p for e in found]), strict=True)
    return [dataclasses.replace(e, p_holm=p, folds_p_holm=of_folds) for e, p, of_folds in corrected]


def as_row(endpoint: Endpoint) -> dict[str, Any]:
    """The row of study_endpoints.csv. A p value keeps four digits, however small it is."""
    row = dataclasses.asdict(endpoint)
    row = {name: "" if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    row |= {name: f"{row[name]:.4g}" for name in _P_VALUES if row[name] != ""}
    return row | {"verdict": endpoint.verdict}


_P_VALUES = ("p", "p_holm", "folds_p", "folds_p_holm")


def sentence(endpoint: Endpoint) -> str:
    """What came out, in words and points."""
    points = f"{100 * endpoint.difference:+.1f} points"
    known = math.isfinite(endpoint.t_low)
    t_ends = f"t over teachers {100 * endpoint.t_low:+.1f} to {100 * endpoint.t_high:+.1f}" if known else "no t"
    actors = f"teachers x actors {100 * endpoint.actors_low:+.1f} to {100 * endpoint.actors_high:+.1f}"
    p = f", Holm p {endpoint.p_holm:.3f}" if known else ""
    start = f"{endpoint.name}, {endpoint.first} - {endpoint.second}: {points} ({t_ends}; {actors}{p})"
    return f"{start}; {endpoint.teachers} teacher(s), {endpoint.actors} actor(s): {endpoint.verdict}"
