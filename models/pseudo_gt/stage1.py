"""Stage 1: the text backbone, or a model that hears the clips, writes the pseudo ground truth Y.

    python -m models pseudo-gt data/demo/manifest.jsonl --out data/demo/stage1.jsonl

The story of a run:

1. A clip's metadata are put into words, "[00:00-00:03] Good luck. (Gender: man, SNR: -3 dB)", without the hint of the
   prompt (wording.py).
2. A frozen language model continues a few worked examples with the answer, greedily and in batches (writers.py). With
   `--source template` the task's sentence is filled in with the label instead; a row without choices has no label and is left as
   it is. With `--source audio_lm` an audio LM hears each clip and answers
   its question freely (listening.py). The manifest names the source of each target.
3. Every answer goes to a journal beside OUT and is on the disk before the next batch (journal.py). A killed run
   continues from there: no line is lost, and none is written twice.
4. An answer is rejected if it is empty, cut off or too long, or if it names no choice, several, or the wrong one; a free answer
   if it repeats itself (acceptance.py). A row whose answer is rejected is left out of the manifest; OUT.rejects.jsonl holds it
   with the reason.

The same command again does nothing where OUT is finished. An OUT of other settings, or any other file, is not written over
without `--restart`.
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

from models.corpora.hearing import parse_hearing
from models.data.manifest import (
    SPLITS,
    Example,
    Manifest,
    ManifestError,
    header_with_root,
    read_header,
    read_manifest,
    write_manifest,
)
from models.data.problems import print_skipped
from models.data.readers import read_data
from models.io_utils import fingerprint, same_file
from models.pseudo_gt.acceptance import check_answer, set_targets, write_rejects
from models.pseudo_gt.commands import (
    ACCEPTS,
    DEFAULT_BACKBONE,
    DEFAULT_MAX_CHARACTERS,
    SOURCES,
    default_limits,
    pseudo_gt_parser,
)
from models.pseudo_gt.journal import Journal, Stage1Error
from models.pseudo_gt.listening import Listening, ListeningWriter
from models.pseudo_gt.wording import WORDING_VERSION, describe, not_told, published_description, told_by_name
from models.pseudo_gt.writers import BackboneWriter, Writer, write_by_template


@dataclass
class Stage1Report:
    """What a run did: rows accepted, passed through, rejected (by reason), and how many were there already.

    `without_choices` counts those of the rows passed through that a template has no label for. `not_told` counts the rows by the
    metadata that the backbone did not read.
    """

    accepted: int = 0
    passed_through: int = 0
    without_choices: int = 0
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
        if self.without_choices:
            lines.append(f"left as they are: {self.without_choices} rows without choices, which a template has no label for")
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
    batch_examples: int | None = None,
    max_reject_fraction: float = 0.5,
    max_new_tokens: int | None = None,
    max_characters: int | None = None,
    restart: bool = False,
    progress: bool = True,
    listening: Listening | None = None,
    accept: str | None = None,
    keep_targets: bool = False,
) -> Stage1Report:
    """Give the manifest's examples their targets and write the result to `out`.

    Args:
        manifest: what `read_manifest` returned.
        out: the manifest to write. It may lie anywhere; where its folder is not above the audio root, its header names the
            root. OUT.journal lies beside it while the run lasts, and OUT.rejects.jsonl with the rejected rows. If `out` was
            already made from the same examples in the same way, nothing is done. Another file there is not written over.
        source: "text_backbone", "template" or "audio_lm". With "template" examples without choices pass through unchanged too.
        writer: writes the answers. None is the one of `source`; it is made only if answers are missing.
        backbone: id or folder of a causal language model.
        splits, pool, task: which examples get targets: those of one of the names; None is all. The others pass through
            unchanged.
        batch_examples: how many examples the writer gets at once; None = 64, or 16 with "audio_lm".
        max_reject_fraction: if more answers are rejected, or if no row is left, only the rejects are written: the wording does
            not suit the backbone.
        max_new_tokens: longest answer of the backbone or the audio LM. An answer that does not end within it is rejected. None =
            24, or 256 with "audio_lm".
        max_characters: a longer answer is rejected; None = 160, or 2,000 with "audio_lm".
        restart: discard the answers of an unfinished run, and write over what `out` holds.
        progress: show a bar on stderr.
        listening: the model of "audio_lm", and how it decodes.
        accept: "choice" or "free", see `check_answer`; None = "choice", or "free" with "audio_lm".
        keep_targets: examples that have a target pass through too.

    Returns:
        Stage1Report.

    Raises:
        ValueError: an argument outside its range.
        Stage1Error: no such row, too many rejected answers, another run writes here, or `out` or its journal is of other
            settings.
    """
    _check_options(source, splits, batch_examples, max_reject_fraction, max_new_tokens, max_characters, accept, listening)
    at_once = batch_examples or default_limits(source)[2]
    out = Path(out)
    started = time.monotonic()
    chosen = _select(manifest, splits, pool, task, keep_targets=keep_targets)
    selected = [example for example in chosen if source != "template" or example.choices]
    if not selected:
        raise Stage1Error(f"source template: none of the {len(chosen)} rows has choices; free answers need another --source")
    recipe = _Recipe.of(source, backbone, max_new_tokens, max_characters, listening, accept)
    identity, rows = recipe.identity(selected), fingerprint([example.to_row() for example in manifest])
    report = Stage1Report(passed_through=len(manifest) - len(selected), without_choices=len(chosen) - len(selected))
    if recipe.backbone is not None:
        report.not_told = Counter(name for example in selected for name in not_told(example))
    prefix, root = _audio_prefix(manifest.audio_root, out)
    clips = {} if listening is None else _clip_hashes(selected, manifest.audio_root)
    made_from = {"fingerprint": identity, "rows": rows} | ({"clips": fingerprint(clips)} if clips else {})
    with Journal(journal_path(out), identity, clips=clips, restart=restart) as journal:
        # Answers of these settings go on: beside a finished `out` they are of a run with `restart` that was stopped.
        if not restart and not journal.begun() and (made := _finished(out, recipe, made_from, report)) is not None:
            _bring_to(made, out, manifest, prefix, root)
            return report
        answers = journal.read({example.id for example in selected})
        report.resumed = len(answers)
        if writer is None and len(answers) < len(selected):
            writer = recipe.make_writer(manifest.audio_root, selected)
        _write_answers(selected, answers, journal, writer, at_once, progress=progress)

        targets, rejects = _sort_out(selected, answers, recipe)
        report.accepted = len(targets)
        report.rejected = Counter(row["reason"] for row in rejects)
        report.seconds = time.monotonic() - started
        write_rejects(out, rejects)
        rejected = {row["id"] for row in rejects}
        kept = [example for example in manifest if example.id not in rejected]
        too_many = 1.0 - report.acceptance() > max_reject_fraction
        if too_many or not kept:  # a manifest without rows cannot be read again
            journal.complete()
            share = f"more than {max_reject_fraction:.0%} of the" if too_many else "all"
            raise Stage1Error(f"{share} answers were rejected; {report.summary()}")
        finished = [_rebase(example, prefix) for example in set_targets(kept, targets, target_source=source)]
        write_manifest(out, finished, header=_header(manifest, root, out, recipe, made_from, report))
        journal.discard()
    return report


def _check_options(
    source: str,
    splits: Sequence[str],
    batch_examples: int | None,
    max_reject_fraction: float,
    max_new_tokens: int | None,
    max_characters: int | None,
    accept: str | None,
    listening: Listening | None,
) -> None:
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {list(SOURCES)}, got {source!r}")
    if accept is not None and accept not in ACCEPTS:
        raise ValueError(f"accept: expected one of {list(ACCEPTS)}, got {accept!r}")
    if (listening is None) == (source == "audio_lm"):
        wanted = "a model that hears" if listening is None else "none"
        raise ValueError(f"listening: expected {wanted} with source {source!r}, got {listening}")
    for name, number in (
        ("batch_examples", batch_examples),
        ("max_new_tokens", max_new_tokens),
        ("max_characters", max_characters),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if not 0.0 <= max_reject_fraction <= 1.0:
        raise ValueError(f"max_reject_fraction: expected a number from 0 to 1, got {max_reject_fraction}")
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"splits: expected some of {list(SPLITS)}, got {split!r}")


def _select(
    manifest: Manifest,
    splits: Sequence[str],
    pool: str | Sequence[str] | None,
    task: str | Sequence[str] | None,
    *,
    keep_targets: bool,
) -> list[Example]:
    pools, tasks = ((names,) if isinstance(names, str) else names for names in (pool, task))
    selected = [
        example
        for example in manifest
        if example.split in splits
        and (pools is None or example.metadata.get("pool") in pools)
        and (tasks is None or example.task in tasks)
        and not (keep_targets and (example.target or "").strip())
    ]
    if not selected:
        kept = ", rows with a target left out" if keep_targets else ""
        raise Stage1Error(f"no row to write a target for (splits {list(splits)}, pool {pool}, task {task}{kept})")
    for name, wanted, there in (
        ("pool", pools, [example.metadata.get("pool") for example in manifest]),
        ("task", tasks, [example.task for example in manifest]),
    ):
        if lacking := [each for each in wanted or () if each not in there]:
            known = ", ".join(sorted({str(each) for each in there if each})) or "none"
            raise Stage1Error(f"{name}: no row of {', '.join(map(repr, lacking))}; the manifest holds {known}")
    return selected


@dataclass(frozen=True)
class _Recipe:
    """How the answers are made: their source, its model and limit if it has one; and which of them are accepted."""

    source: str
    backbone: str | None
    max_new_tokens: int | None
    max_characters: int
    listening: Listening | None = None
    accept: str = "choice"

    @classmethod
    def of(
        cls,
        source: str,
        backbone: str,
        max_new_tokens: int | None,
        max_characters: int | None,
        listening: Listening | None,
        accept: str | None,
    ) -> _Recipe:
        """From the arguments of `run_stage1`, of which None is the default of the source."""
        new_tokens, characters, _, accepts = default_limits(source)
        limit = None if source == "template" else max_new_tokens or new_tokens
        model = backbone if source == "text_backbone" else None
        return cls(source, model, limit, max_characters or characters, listening, accept or accepts)

    def identity(self, selected: Sequence[Example]) -> str:
        """The fingerprint of all that decides the answers, not which of them are accepted."""
        rows = [example.to_row() for example in selected]
        limit = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        made = {"source": self.source, "backbone": self.backbone, **limit}
        if self.listening is not None:
            made["listening"] = self.listening.fingerprint()
        told = sorted({name for example in selected for name in told_by_name(example)})
        by_name = {"told_by_name": told} if told and self.backbone is not None else {}
        if self.backbone is not None and any(published_description(example) is not None for example in selected):
            by_name["descriptions"] = "as published"
        return fingerprint({"wording": WORDING_VERSION, **made, "examples": rows, **by_name})

    def make_writer(self, audio_root: Path, selected: Sequence[Example]) -> Writer:
        if self.listening is not None:
            listener = ListeningWriter.load(self.listening, audio_root, max_new_tokens=self.max_new_tokens)
            listener.check(selected)
            return listener
        if self.backbone is None:
            return write_by_template
        return BackboneWriter.load(self.backbone, max_new_tokens=self.max_new_tokens)

    def accepted_by(self) -> dict[str, Any]:
        """What decides which answers are accepted, as the header of the result holds it."""
        return {"max_characters": self.max_characters} | ({} if self.accept == "choice" else {"accept": self.accept})


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
    selected: Sequence[Example], answers: Mapping[str, str], recipe: _Recipe
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The accepted answers by id, and the rejected ones as rows with their reason."""
    targets: dict[str, str] = {}
    rejects: list[dict[str, str]] = []
    for example in selected:
        text = answers[example.id]
        reason = check_answer(text, example, max_characters=recipe.max_characters, accept=recipe.accept)
        if reason is None:
            targets[example.id] = text
        else:
            rejects.append({"id": example.id, "reason": reason, "text": text})
    return targets, rejects


def _clip_hashes(examples: Sequence[Example], audio_root: Path) -> dict[str, str]:
    """The hash of the sound of each example, by id; an example without a clip is left out."""
    from models.speech_lm.clip_keys import file_hashes

    files = file_hashes(examples, audio_root)
    return {e.id: fingerprint([files[audio] for audio, _, _ in e.clips]) for e in examples if e.clips}


def _header(
    manifest: Manifest, root: Path, out: Path, recipe: _Recipe, made_from: Mapping[str, str], report: Stage1Report
) -> dict[str, object]:
    """The input's header, and what this run did.

    Args:
        made_from: fingerprints of the settings, of all rows of the input (some pass through to `out`), and of the clips if they
            are heard.
    """
    return {
        **header_with_root(manifest.header, audio_root=root, folder=out.parent),
        "stage1": {
            "source": recipe.source,
            "backbone": recipe.backbone,
            "max_new_tokens": recipe.max_new_tokens,
            **({} if recipe.listening is None else {"listening": recipe.listening.settings()}),
            **recipe.accepted_by(),
            **made_from,
            "accepted": report.accepted,
            "rejected": dict(report.rejected),
            "passed_through": report.passed_through,
        },
    }


def _earlier_header(out: Path, recipe: _Recipe, made_from: Mapping[str, str] | None = None) -> Mapping[str, Any] | None:
    """What the header of `out` says of the run that made it; None if nothing is there.

    Args:
        made_from: as in `_header`; None = not known yet, then the settings alone are compared.

    Raises:
        Stage1Error: `out` is not the result of these settings, rows and clips.
    """
    if not out.exists() or not out.stat().st_size:
        return None
    try:
        stage1 = read_header(out).get("stage1")
    except ManifestError:
        stage1 = None
    if not isinstance(stage1, Mapping) or not {"fingerprint", "accepted", "rejected"} <= set(stage1):
        raise Stage1Error(f"{out}: holds no result of Stage 1; choose another --out or --restart")
    now = {"source": recipe.source, "backbone": recipe.backbone, "max_new_tokens": recipe.max_new_tokens}
    now |= {"max_characters": recipe.max_characters, "accept": recipe.accept}
    unsaid = {"max_characters": DEFAULT_MAX_CHARACTERS, "accept": "choice"}
    differs = [name for name, value in now.items() if stage1.get(name, unsaid.get(name)) != value]
    if made_from is not None:
        differs += [name for name in ("rows", "clips") if stage1.get(name) != made_from.get(name)]
        if not differs and stage1["fingerprint"] != made_from["fingerprint"]:
            differs = ["which rows get targets, the model or the wording"]
    if differs:
        raise Stage1Error(
            f"{out}: holds targets of other settings, of another manifest or of other audio (not the same: "
            f"{', '.join(differs)}); choose another --out or --restart"
        )
    return stage1


def _finished(out: Path, recipe: _Recipe, made_from: Mapping[str, str], report: Stage1Report) -> Manifest | None:
    """The result that an earlier run has written to `out`; fills the report from its header. Raises as `_earlier_header`."""
    stage1 = _earlier_header(out, recipe, made_from)
    if stage1 is None:
        return None
    try:
        made = read_manifest(out, check_audio=False, max_bad_fraction=0.0)
    except ManifestError as error:
        raise Stage1Error(f"{error}\nchoose another --out or --restart") from None
    report.accepted = report.resumed = stage1["accepted"]
    report.rejected = Counter(stage1["rejected"])
    report.resumed += sum(report.rejected.values())
    return made


def _bring_to(made: Manifest, out: Path, manifest: Manifest, prefix: str, root: Path) -> None:
    """Write `out`, which holds `made`, again where the clips lie elsewhere than when it was made: their paths, and the root."""
    now = {example.id: _rebase(example, prefix) for example in manifest}
    there = [(example, now.get(example.id, example)) for example in made]
    rows = [dataclasses.replace(example, audio=at.audio, more_audio=at.more_audio) for example, at in there]
    if rows != made.examples or made.audio_root.resolve() != root:
        write_manifest(out, rows, header=header_with_root(made.header, audio_root=root, folder=out.parent))


def journal_path(out: Path) -> Path:
    """The file that a run has beside `out` until it is finished."""
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
    _check_source(arguments)
    if same_file(arguments.out, arguments.manifest):
        raise ValueError(f"--out: expected another file than the manifest, got {str(arguments.out)!r}")
    options: dict[str, Any] = {
        "source": arguments.source,
        "splits": tuple(filter(None, arguments.splits.split(","))),
        "batch_examples": arguments.batch_examples,
        "max_reject_fraction": arguments.max_reject_fraction,
        "max_new_tokens": arguments.max_new_tokens,
        "max_characters": arguments.max_characters,
        "accept": arguments.accept,
        "listening": _listening(arguments),
    }
    _check_options(**options)
    return {
        **options,
        "backbone": arguments.backbone or DEFAULT_BACKBONE,
        "pool": arguments.pool or None,
        "task": arguments.task or None,
        "restart": arguments.restart,
        "keep_targets": arguments.keep_targets,
    }


_OF_RECIPE = ("source", "backbone", "max_new_tokens", "max_characters", "listening", "accept")
_LISTENING = ("alpha", "formula", "plausibility", "dtype", "attention", "device", "max_cut_fraction")
# Options of one source -> that source.
_OF_SOURCE = {
    "backbone": "text_backbone",
    **dict.fromkeys(("audio_lm", "hears", *_LISTENING), "audio_lm"),
}


def _check_source(arguments: argparse.Namespace) -> None:
    """ValueError for an option that has no effect with --source, and for a source without its model."""
    for name, source in _OF_SOURCE.items():
        if getattr(arguments, name) not in (None, []) and arguments.source != source:
            raise ValueError(f"--{name.replace('_', '-')}: expected --source {source} beside it, got {arguments.source}")
    if arguments.source == "template" and arguments.max_new_tokens is not None:
        raise ValueError("--max-new-tokens: expected --source text_backbone beside it, or audio_lm, got template")
    if arguments.source == "audio_lm" and arguments.audio_lm is None:
        raise ValueError("--audio-lm: expected a model with --source audio_lm, got none")


def _listening(arguments: argparse.Namespace) -> Listening | None:
    """Who listens, as the command line says; None if nobody does."""
    if arguments.source != "audio_lm":
        return None
    given = {name: value for name in _LISTENING if (value := getattr(arguments, name)) is not None}
    if arguments.hears:
        given["hears"] = parse_hearing(arguments.hears)
    try:
        return Listening(arguments.audio_lm, **given)
    except ValueError as error:
        name, colon, what = str(error).partition(":")
        raise ValueError(f"--{name.replace('_', '-')}{colon}{what}") from None


def _find_model(source: str, options: Mapping[str, Any]) -> None:
    """Find the source's model, which may have to be fetched; a RuntimeError says where it was looked for."""
    from models.backbones.resolve import resolve_backbone
    from models.speech_lm.listeners import find_listener

    if source == "text_backbone":
        resolve_backbone(options["backbone"], kind="causal_lm")
    elif source == "audio_lm":
        find_listener(options["listening"].model)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Status 1 and one message if Stage 1 cannot be done; 130 after Ctrl-C (run it again to go on)."""
    arguments = pseudo_gt_parser().parse_args(argv)
    try:
        options = _options(arguments)
        begun = arguments.out.exists() or journal_path(arguments.out).exists()
        if not begun:  # a wrong name is found before all clips are read
            _find_model(arguments.source, options)
        if not options["restart"] and not journal_path(arguments.out).exists():
            _earlier_header(arguments.out, _Recipe.of(**{name: options[name] for name in _OF_RECIPE}))
        manifest = read_data(
            arguments.manifest, audio_root=arguments.audio_root, allow_links=arguments.allow_links
        )
        print_skipped(manifest.problems, file=sys.stderr)
        report = run_stage1(manifest, arguments.out, **options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:  # those of models and Stage1Error are RuntimeErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.summary())
    print(arguments.out)
    return 0
