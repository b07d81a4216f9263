"""Stage 1: the text backbone writes the pseudo ground truth Y from what is known about each clip.

    python -m models pseudo-gt data/demo/manifest.jsonl --out data/demo/stage1.jsonl

The story of a run:

1. A clip's metadata are put into words, "[00:00-00:03] Good luck. (Gender: man, SNR: -3 dB)", without the hint of the
   prompt (wording.py).
2. A frozen language model continues a few worked examples with the answer, greedily and in batches (writers.py). With
   `--source template` the task's sentence is filled in instead. The manifest names the source of each target.
3. Every answer goes to a journal beside OUT and is on the disk before the next batch (journal.py). A killed run
   continues from there: no line is lost, and none is written twice.
4. An answer is rejected if it is empty, cut off or too long, or if it names no choice, several, or the wrong one
   (acceptance.py). A row whose answer is rejected is left out of the manifest; OUT.rejects.jsonl holds it with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models.data.manifest import (
    SPLITS,
    Example,
    Manifest,
    ManifestError,
    header_with_root,
    read_manifest,
    write_manifest,
)
from models.data.readers import read_data
from models.io_utils import fingerprint
from models.pseudo_gt.acceptance import check_answer, set_targets, write_rejects
from models.pseudo_gt.commands import (
    DEFAULT_BACKBONE,
    DEFAULT_MAX_CHARACTERS,
    DEFAULT_MAX_NEW_TOKENS,
    SOURCES,
    pseudo_gt_parser,
)
from models.pseudo_gt.journal import Journal, Stage1Error
from models.pseudo_gt.wording import WORDING_VERSION, describe, not_told, told_by_name
from models.pseudo_gt.writers import BackboneWriter, Writer, write_by_template


@dataclass
class Stage1Report:
    """What a run did: rows accepted, passed through, rejected (by reason), and how many were there already.

    `not_told` counts the rows by the metadata that the backbone did not read.
    """

    accepted: int = 0
    passed_through: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    not_told: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    seconds: float = 0.0

    def acceptance(self) -> float:
        """The accepted share of the answers; 1.0 if there are none."""
        written = self.accepted + sum(self.rejected.values())
        return self.accepted / written if written else 1.0

    def summary(self) -> str:
        """A line of counts, a line for each reason of a rejection, and the metadata that were not told."""
        lines = [
            f"{self.accepted} targets accepted ({self.acceptance():.1%}), {sum(self.rejected.values())} rejected, "
            f"{self.passed_through} rows passed through, {self.resumed} taken from an earlier run, {self.seconds:.0f} s"
        ]
        lines += [f"  {count:6} {reason}" for reason, count in self.rejected.most_common()]
        if self.not_told:
            names = ", ".join(f"{name} ({count})" for name, count in self.not_told.most_common())
            lines.append(f"metadata that the backbone was not told, with the number of rows: {names}")
        return "\n".join(lines)


def run_stage1(
    manifest: Manifest,
    out: str | os.PathLike[str],
    *,
    source: str = "text_backbone",
    writer: Writer | None = None,
    backbone: str = DEFAULT_BACKBONE,
    splits: Sequence[str] = ("train", "dev"),
    pool: str | Sequence[str] | None = None,
    task: str | Sequence[str] | None = None,
    batch_examples: int = 64,
    max_reject_fraction: float = 0.5,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    max_characters: int = DEFAULT_MAX_CHARACTERS,
    restart: bool = False,
    progress: bool = True,
) -> Stage1Report:
    """Give the manifest's examples their targets and write the result to `out`.

    Args:
        manifest: what `read_manifest` returned.
        out: the manifest to write. It may lie anywhere; where its folder is not above the audio root, its header names the
            root. OUT.journal lies beside it while the run lasts, and OUT.rejects.jsonl with the rejected rows. If `out` was
            already made from the same examples in the same way, nothing is done.
        source: "text_backbone" or "template".
        writer: writes the answers. None is the one of `source`; it is made only if answers are missing.
        backbone: id or folder of a causal language model.
        splits, pool, task: which examples get targets: those of one of the names; None is all. The others pass through
            unchanged.
        batch_examples: how many examples the backbone gets at once.
        max_reject_fraction: if more answers are rejected, only the rejects are written: the wording does not suit the
            backbone.
        max_new_tokens: longest answer of the backbone. An answer that does not end within it is rejected.
        max_characters: a longer answer is rejected.
        restart: discard the answers of an unfinished run, and write a finished `out` again.
        progress: show a bar on stderr.

    Returns:
        Stage1Report.

    Raises:
        ValueError: an argument outside its range.
        Stage1Error: no such row, too many rejected answers, another run writes here, or the journal has other settings.
    """
    _check_options(source, splits, batch_examples, max_reject_fraction, max_new_tokens, max_characters)
    out = Path(out)
    started = time.monotonic()
    selected = _select(manifest, splits, pool, task)
    by_backbone = source == "text_backbone"
    recipe = _Recipe(source, backbone if by_backbone else None, max_new_tokens if by_backbone else None, max_characters)
    identity, rows = recipe.identity(selected), fingerprint([example.to_row() for example in manifest])
    report = Stage1Report(passed_through=len(manifest) - len(selected))
    if by_backbone:
        report.not_told = Counter(name for example in selected for name in not_told(example))
    prefix, root = _audio_prefix(manifest.audio_root, out)
    with Journal(_journal(out), identity, restart=restart) as journal:
        if not restart and _is_finished(out, recipe, identity, rows, report):
            journal.discard()
            return report
        answers = journal.read({example.id for example in selected})
        report.resumed = len(answers)
        if writer is None and len(answers) < len(selected):
            writer = recipe.make_writer()
        _write_answers(selected, answers, journal, writer, batch_examples, progress=progress)

        targets, rejects = _sort_out(selected, answers, max_characters)
        report.accepted = len(targets)
        report.rejected = Counter(row["reason"] for row in rejects)
        report.seconds = time.monotonic() - started
        write_rejects(out, rejects)
        if 1.0 - report.acceptance() > max_reject_fraction:
            journal.complete()
            raise Stage1Error(f"more than {max_reject_fraction:.0%} of the answers were rejected; {report.summary()}")
        rejected = {row["id"] for row in rejects}
        kept = [example for example in manifest if example.id not in rejected]
        finished = [_rebase(example, prefix) for example in set_targets(kept, targets, target_source=source)]
        write_manifest(out, finished, header=_header(manifest, root, out, recipe, identity, rows, report))
        journal.discard()
    return report


def _check_options(
    source: str,
    splits: Sequence[str],
    batch_examples: int,
    max_reject_fraction: float,
    max_new_tokens: int,
    max_characters: int,
) -> None:
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {list(SOURCES)}, got {source!r}")
    for name, number in (
        ("batch_examples", batch_examples),
        ("max_new_tokens", max_new_tokens),
        ("max_characters", max_characters),
    ):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if not 0.0 <= max_reject_fraction <= 1.0:
        raise ValueError(f"max_reject_fraction: expected a number from 0 to 1, got {max_reject_fraction}")
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"splits: expected some of {list(SPLITS)}, got {split!r}")


def _select(
    manifest: Manifest, splits: Sequence[str], pool: str | Sequence[str] | None, task: str | Sequence[str] | None
) -> list[Example]:
    pools, tasks = ((names,) if isinstance(names, str) else names for names in (pool, task))
    selected = [
        example
        for example in manifest
        if example.split in splits
        and (pools is None or example.metadata.get("pool") in pools)
        and (tasks is None or example.task in tasks)
    ]
    if not selected:
        raise Stage1Error(f"no row to write a target for (splits {list(splits)}, pool {pool}, task {task})")
    return selected


@dataclass(frozen=True)
class _Recipe:
    """How the answers are made: their source, the backbone and its limit if the source is one, and the longest accepted."""

    source: str
    backbone: str | None
    max_new_tokens: int | None
    max_characters: int

    def identity(self, selected: Sequence[Example]) -> str:
        """The fingerprint of all that decides the answers, not which of them are accepted."""
        rows = [example.to_row() for example in selected]
        limit = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        made = {"source": self.source, "backbone": self.backbone, **limit}
        told = sorted({name for example in selected for name in told_by_name(example)})
        by_name = {"told_by_name": told} if told and self.backbone is not None else {}
        return fingerprint({"wording": WORDING_VERSION, **made, "examples": rows, **by_name})

    def make_writer(self) -> Writer:
        if self.backbone is None:
            return write_by_template
        return BackboneWriter.load(self.backbone, max_new_tokens=self.max_new_tokens)


def _write_answers(
    selected: Sequence[Example],
    answers: dict[str, str],
    journal: Journal,
    writer: Writer | None,
    batch_examples: int,
    *,
    progress: bool,
) -> None:
    """Ask `writer` for the missing answers, batch by batch; each batch goes to the journal and to `answers`.

    The batches are those of an undisturbed run. A batch that a kill has cut is asked again, whole: in another batch a row may
    round to another answer.
    """
    order = sorted(selected, key=lambda example: len(describe(example)))  # batches of equal lengths need little padding
    batches = [order[start : start + batch_examples] for start in range(0, len(order), batch_examples)]
    with tqdm(total=len(selected), initial=len(answers), desc="stage 1", unit="row", disable=not progress) as bar:
        for batch in batches:
            if all(example.id in answers for example in batch):
                continue
            texts = writer(batch)
            if len(texts) != len(batch):
                raise Stage1Error(f"writer: expected {len(batch)} answers, got {len(texts)}")
            written = {e.id: text for e, text in zip(batch, texts, strict=True) if e.id not in answers}
            journal.append(written)
            answers.update(written)
            bar.update(len(written))


def _sort_out(
    selected: Sequence[Example], answers: Mapping[str, str], max_characters: int
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The accepted answers by id, and the rejected ones as rows with their reason."""
    targets: dict[str, str] = {}
    rejects: list[dict[str, str]] = []
    for example in selected:
        text = answers[example.id]
        reason = check_answer(text, example, max_characters=max_characters)
        if reason is None:
            targets[example.id] = text
        else:
            rejects.append({"id": example.id, "reason": reason, "text": text})
    return targets, rejects


def _header(
    manifest: Manifest, root: Path, out: Path, recipe: _Recipe, identity: str, rows: str, report: Stage1Report
) -> dict[str, object]:
    """The input's header, and what this run did. `rows` stands for all rows of the input: some pass through to `out`."""
    return {
        **header_with_root(manifest.header, audio_root=root, folder=out.parent),
        "stage1": {
            "source": recipe.source,
            "backbone": recipe.backbone,
            "max_new_tokens": recipe.max_new_tokens,
            "max_characters": recipe.max_characters,
            "fingerprint": identity,
            "rows": rows,
            "accepted": report.accepted,
            "rejected": dict(report.rejected),
            "passed_through": report.passed_through,
        },
    }


def _is_finished(out: Path, recipe: _Recipe, identity: str, rows: str, report: Stage1Report) -> bool:
    """Whether `out` is the complete result of these settings and rows; fills the report from its header."""
    if not out.exists():
        return False
    try:
        stage1 = read_manifest(out, check_audio=False).header["stage1"]
        made = stage1["fingerprint"], stage1["rows"], stage1.get("max_characters", DEFAULT_MAX_CHARACTERS)
        if made != (identity, rows, recipe.max_characters):
            return False
        report.accepted = report.resumed = stage1["accepted"]
        report.rejected = Counter(stage1["rejected"])
        report.resumed += sum(report.rejected.values())
    except (ManifestError, KeyError, TypeError):
        return False
    return True


def _journal(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _audio_prefix(audio_root: Path, out: Path) -> tuple[str, Path]:
    """What to put before the audio paths of `out`, and the folder that they are then relative to.

    A manifest above the audio root needs no header to find the clips: its own folder is the root.
    """
    root, folder = audio_root.resolve(), out.parent.resolve()
    if not root.is_relative_to(folder):
        return "", root
    prefix = root.relative_to(folder).as_posix()
    return "" if prefix == "." else f"{prefix}/", folder


def _rebase(example: Example, prefix: str) -> Example:
    if example.audio is None or not prefix:
        return example
    more = tuple(prefix + path for path in example.more_audio)
    return dataclasses.replace(example, audio=prefix + example.audio, more_audio=more)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `run_stage1`, checked before the manifest's clips are read."""
    if arguments.source == "template":
        for name in ("backbone", "max_new_tokens"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: expected --source text_backbone beside it, got template")
    if arguments.out.absolute() == arguments.manifest.absolute():
        raise ValueError(f"--out: expected another file than the manifest, got {str(arguments.out)!r}")
    options: dict[str, Any] = {
        "source": arguments.source,
        "splits": tuple(filter(None, arguments.splits.split(","))),
        "batch_examples": arguments.batch_examples,
        "max_reject_fraction": arguments.max_reject_fraction,
        "max_new_tokens": DEFAULT_MAX_NEW_TOKENS if arguments.max_new_tokens is None else arguments.max_new_tokens,
        "max_characters": arguments.max_characters,
    }
    _check_options(**options)
    return {
        **options,
        "backbone": arguments.backbone or DEFAULT_BACKBONE,
        "pool": arguments.pool or None,
        "task": arguments.task or None,
        "restart": arguments.restart,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Status 1 and one message if Stage 1 cannot be done; 130 after Ctrl-C (run it again to go on)."""
    from models.backbones.resolve import resolve_backbone

    arguments = pseudo_gt_parser().parse_args(argv)
    try:
        options = _options(arguments)
        if arguments.source == "text_backbone" and not (arguments.out.exists() or _journal(arguments.out).exists()):
            resolve_backbone(options["backbone"], kind="causal_lm")  # so a wrong id is found before all clips are read
        manifest = read_data(
            arguments.manifest, audio_root=arguments.audio_root, allow_links=arguments.allow_links
        )
        for problem in manifest.problems:
            print(f"skipped {problem}", file=sys.stderr)
        report = run_stage1(manifest, arguments.out, **options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:  # BackboneError and Stage1Error are RuntimeErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.summary())
    print(arguments.out)
    return 0
