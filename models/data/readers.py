"""Reads rows in the layouts of other projects and papers as `Example`s.

    python -m models convert rows.jsonl --audio-root /data/audio --out manifest.jsonl

`read_data` finds the form by the rows; commands read their manifest through it. The forms, each as JSON lines (also .gz), as
one JSON array, or as a data set of the package `datasets` (models/data/hf_datasets.py):

messages       conversations as ms-swift and LLaMA-Factory share them (models/data/conversations.py)
columns        {"audio", "question", "answer", "choices", "text", ...}, by common names of columns
nemo, lhotse   speech recognition's manifests; kaldi is a folder with wav.scp (models/data/speech_manifests.py)

desta          {"id", "audios": [{"audio_filepath" or "audio", "transcription" or "text"}], "messages": [{"role",
               "content"}], "seed_description", "answer", "target" or "response"}; the audios may stand in the user's message.
               The mark of the clip is taken out of a turn: a placeholder, or a path between two marks. A system turn
               stays one ("system" of the example). These are the seed rows of CAAD's authors too.
dynamic_superb {"file" or "audio", "instruction", "label", "text"}. The choices are those of "choices"; without it they
               are read from the instruction ("The answer could be yes or no."). "text" is part of the question (the text
               to match), not a transcript: it becomes the context. A metadata.json of the benchmark's own script, one
               object {"clip.wav": row}, is read too. Its task is the folder's name.
mcr_bench      {"id", "audio", "question", "choices" or "options", "answer", "context_type", "context"}, one row for
               each context (neutral, faithful, adversarial, irrelevant); or "contexts": {type: text}, and each of them
               becomes an example. As published: {"audio", "gt", "neutral", "faithful", "adversarial", "irrelevant"},
               where neutral is the bare question and the others are the descriptions beside it. The kind is aligned
               for faithful, conflict for adversarial, and neutral for the other two; the metadata hold the type.

Rows of the benchmarks that name no split are test data, other rows training data. A second question under one id about the
same clip gets the id with "#2" behind it. Rows of other shapes are problems: they are skipped and listed like the bad rows of
a manifest.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from models.data.audio import MAX_SECONDS, AudioError, AudioInfo
from models.data.commands import FORMS
from models.data.conversations import from_messages
from models.data.find_form import MANIFEST_FORM, find_form, form_of_row
from models.data.hf_datasets import DatasetRows, dataset_files, holds_dataset
from models.data.json_rows import read_named_rows, read_rows
from models.data.manifest import (
    SPLITS,
    Example,
    Manifest,
    ManifestError,
    read_manifest,
)
from models.data.row_values import (
    Defaults,
    as_list,
    as_text,
    clip_marks,
    first_of,
    listed_choices,
    text_of,
    text_or_none,
    turn_text,
    without_nulls,
)
from models.data.rows import AudioChecker, collect_examples
from models.data.speech_manifests import from_columns, from_kaldi, from_lhotse, from_nemo, kaldi_files, kaldi_rows

# The split of rows that name none, where it is not "train".
_SPLITS = {"dynamic_superb": "test", "mcr_bench": "test"}
# MCR-BENCH's context types and the kind of each.
CONTEXT_KINDS = {"neutral": "neutral", "faithful": "aligned", "adversarial": "conflict", "irrelevant": "neutral"}
_OFFERED = re.compile(
    r"\b(?:answers?|labels?|responses?|options?)\s+(?:could|should|can|may|must|might)\s+be\s+(.+)", re.I
)
_MAX_DESCRIPTION_CHARACTERS = 4096  # matching may take time with its square
_TIMES = re.compile(r"\[\d{1,6}:\d\d(?:\.\d+)?-\d{1,6}:\d\d(?:\.\d+)?\]")
_SEGMENT = re.compile(
    r"\[(\d{1,6}):(\d\d(?:\.\d+)?)-(\d{1,6}):(\d\d(?:\.\d+)?)\]\s*(.*?)\s*\(((?:[^()]|\([^()]*\))*)\)\s*$", re.DOTALL
)


def read_data(path: str | os.PathLike[str], *, form: str = "auto", **options: Any) -> Manifest:
    """Read a manifest, or rows of another form.

    Args:
        path: file or folder.
        form: "auto" finds the form by the rows; "manifest" or one of FORMS names it.
        options: the keywords that `read_manifest` and `read_foreign` share.

    Raises:
        ManifestError, ValueError: as these two do; also where no form is found.
    """
    path = Path(path)
    if form == "auto" and holds_dataset(path) is None:
        form = find_form(path)
    return read_manifest(path, **options) if form == MANIFEST_FORM else read_foreign(path, form=form, **options)


def read_foreign(
    path: str | os.PathLike[str],
    *,
    form: str,
    audio_root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    target_source: str = "text_backbone",
    max_bad_fraction: float = 0.05,
    check_audio: bool = True,
    max_seconds: float = MAX_SECONDS,
    allow_links: bool = False,
    infos: dict[str, AudioInfo | AudioError] | None = None,
    several_clips: bool = False,
) -> Manifest:
    """Read a file or folder of one of FORMS.

    Args:
        path: JSON lines, a JSON array, a folder of Kaldi, or a data set of the package `datasets`.
        form: one of FORMS, or "auto"; see the module's docstring.
        audio_root: folder that audio paths are relative to; absolute ones lie below it. None is the file's own folder. Clips that
            are inside a data set lie in the cache folder.
        split: split of rows that do not name one; None is "test" for the benchmarks and "train" for other forms.
        target_source: who wrote the targets of the desta form.
        max_bad_fraction, check_audio, max_seconds, allow_links, infos: as for `read_manifest`.
        several_clips: rows of Dynamic-SUPERB with a second clip give questions about two. Otherwise they are problems.

    Returns:
        Manifest; the rows of problems count lines (array: elements) from 1.

    Raises:
        ValueError: `form` is unknown, or `max_bad_fraction` lies outside [0, 1].
        ManifestError: the audio root is no folder, or the file cannot be read, has no row, or too many bad ones.
    """
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction: expected a number from 0 to 1, got {max_bad_fraction}")
    opened = ForeignRows(
        path, form=form, audio_root=audio_root, split=split, target_source=target_source, several_clips=several_clips
    )
    root, form = opened.root, opened.form
    if check_audio and not root.is_dir():
        raise ManifestError(f"audio_root: expected a folder, got {root}")
    count = 0

    def counted(rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    examples, problems = collect_examples(
        path,
        counted(opened.rows()),
        opened.convert,
        checker=AudioChecker(root, max_seconds=max_seconds, allow_links=allow_links, known=infos) if check_audio else None,
        max_bad_fraction=max_bad_fraction,
    )
    return Manifest(examples, problems, root, {"form": form}, opened.path, count)


class ForeignRows:
    """A file or folder of one of FORMS: its numbered rows, and what turns one into examples. Arguments as in `read_foreign`.

    Attributes:
        form: the one that was named or found.
        root: folder of the audio.
        dataset: of the package `datasets`, or None.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        form: str,
        audio_root: str | os.PathLike[str] | None = None,
        split: str | None = None,
        target_source: str = "text_backbone",
        several_clips: bool = False,
    ) -> None:
        converters: dict[str, Callable[[Mapping[str, Any], Defaults], Iterator[Example]]] = {
            "desta": _from_desta,
            "messages": from_messages,
            "columns": from_columns,
            "nemo": from_nemo,
            "lhotse": from_lhotse,
            "kaldi": from_kaldi,
            "dynamic_superb": _from_dynamic_superb,
            "mcr_bench": _from_mcr_bench,
        }
        if form not in converters and form != "auto":
            raise ValueError(f"form: expected one of {list(FORMS)}, got {form!r}")
        self.path = path = Path(path)
        kind = None if form == "kaldi" else holds_dataset(path)
        self.dataset = dataset = None if kind is None else DatasetRows(path, kind)
        if form == "auto":
            form = find_form(path) if dataset is None else form_of_row(dataset.first) or "columns"
        if form not in converters:
            raise ManifestError(f"{path}: expected rows of one of {', '.join(FORMS)}, got a manifest")
        self.form = form
        if dataset is not None and (dataset.holds_clips or audio_root is None):
            self.root = dataset.root
        elif audio_root is not None:
            self.root = Path(audio_root)
        else:
            self.root = path if path.is_dir() else path.parent
        self._split = _SPLITS.get(form, "train") if split is None else split
        self._converter, self._target_source, self._several_clips = converters[form], target_source, several_clips
        self.numbers = Numbers()

    def rows(self) -> Iterable[tuple[int, Any]]:
        return _rows(self.path, self.form) if self.dataset is None else self.dataset

    def convert(self, number: int, row: dict[str, Any]) -> list[Example]:
        row = without_nulls(row)
        defaults = Defaults(number, self.root, self._split, self._target_source, self._several_clips)
        try:
            return self.numbers.tell_apart(row, list(self._converter(row, defaults)))
        except KeyError as error:
            raise ValueError(f"missing field {error}") from None
        except AttributeError as error:  # a value of another kind than the form has
            raise TypeError(str(error)) from None


def row_files(path: Path, form: str) -> list[Path]:
    """The files that hold the rows of `path`; not their clips. `form`: one of FORMS, or "auto"."""
    kind = None if form == "kaldi" else holds_dataset(path)
    if kind is not None:
        return dataset_files(path, kind)
    return kaldi_files(path) if form == "kaldi" or path.is_dir() or path.suffix == ".scp" else [path]


def parse_description(text: str) -> tuple[str, dict[str, str], float, float] | None:
    """Take `[00:00-00:05] text (Gender: female, Emotion: happy)` apart.

    Returns:
        (text, {"gender": "female", "emotion": "happy"}, start, end in seconds), or None for text of another form, such as
        one of several segments. A comma in a value belongs to the value.
    """
    text = text.strip()
    match = _SEGMENT.fullmatch(text) if len(text) <= _MAX_DESCRIPTION_CHARACTERS else None
    if match is None:
        return None
    start_minutes, start_seconds, end_minutes, end_seconds, words, facts = match.groups()
    if _TIMES.search(words):
        return None
    metadata: dict[str, str] = {}
    last = ""
    for fact in facts.split(","):
        name, colon, value = fact.partition(":")
        if colon:
            last = "_".join(name.casefold().split())
            metadata[last] = value.strip()
        elif last:
            metadata[last] += f", {fact.strip()}"
    start = 60 * int(start_minutes) + float(start_seconds)
    return words, metadata, start, 60 * int(end_minutes) + float(end_seconds)


def holds_times(text: str) -> bool:
    """Whether a description has the times of a segment in it: `[00:00-00:05]`."""
    return _TIMES.search(text) is not None


class Numbers:
    """Tells questions apart that came under one id about one clip: the second gets "#2" behind its id."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._rows: dict[str, list[list[tuple[Any, ...]]]] = {}

    def remember(self, row_id: str, examples: list[Example]) -> None:
        """A row that `tell_apart` has seen before a break."""
        self._rows.setdefault(row_id, []).append(_asked(examples))
        self._ids.update(e.id for e in examples)

    def tell_apart(self, row: Mapping[str, Any], examples: list[Example]) -> list[Example]:
        """The examples of a row. Those of a row that asks nothing new, or about another clip, keep their id: a duplicate."""
        if "id" not in row or not examples:
            return examples
        asked = _asked(examples)
        earlier = self._rows.setdefault(str(row["id"]), [])
        if any(set(asked) & set(other) or other[0][0] != asked[0][0] for other in earlier):
            return examples
        if any(e.id in self._ids for e in examples):
            number = len(earlier) + 1
            # The contexts of one question may come as rows of one id; they stay a pair.
            same = next((n for n, other in enumerate(earlier, 1) if other[0][1] == asked[0][1]), number)
            pair = f"#{same}" if same > 1 else ""
            examples = [
                dataclasses.replace(e, id=f"{e.id}#{number}", pair_id=None if e.pair_id is None else e.pair_id + pair)
                for e in examples
            ]
        earlier.append(asked)
        self._ids.update(e.id for e in examples)
        return examples


def _asked(examples: list[Example]) -> list[tuple[int, int, int]]:
    """Numbers in the place of the texts, which may be those of a million rows."""
    return [(hash(e.audio), hash((e.audio, e.question, e.choices)), hash(e.context)) for e in examples]


def _from_desta(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError("messages: expected a list of objects")
    turns = [message for message in messages if message.get("role") == "user"]
    if len(turns) != 1:
        raise ValueError(f"messages: expected one user turn, got {len(turns)}")
    audios = as_list(row.get("audios") or row.get("audio") or turns[0].get("audios"))
    if not audios:
        raise ValueError("audios: expected at least one, got none")
    clips = [defaults.clip(clip, "audios") for clip in audios]
    if len(clips) > 1 and (marks := clip_marks(turns[0])) not in (0, len(clips)):
        raise ValueError(f"audios: expected one for each mark of a clip, got {len(clips)} for {marks}")
    audio, *more = clips
    words = [text_of(clip, "transcription", "text") for clip in audios if isinstance(clip, Mapping)]
    target = text_or_none(row, "target", "response")
    metadata: dict[str, Any] = {}
    if description := text_of(row, "seed_description"):
        metadata["seed_description"] = description
        if parsed := parse_description(description):
            metadata.update(parsed[1])
    choices, answer = listed_choices(first_of(row, ("choices", "options")) or (), text_or_none(row, "answer"))
    yield Example(
        id=defaults.name(row, audio),
        audio=audio,
        more_audio=tuple(more),
        transcription="\n".join(filter(None, words)),
        metadata=metadata,
        task=text_of(row, "task", "dataset"),
        system="\n".join(turn_text(message, clips) for message in messages if message.get("role") == "system"),
        question=turn_text(turns[0], clips),
        choices=choices,
        answer=answer,
        target=target,
        target_source=defaults.target_source if target is not None else None,
        split=row.get("split", defaults.split),
    )


def _from_dynamic_superb(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    if (named := first_of(row, ("audio", "file"))) is None:
        raise KeyError("audio")
    audio, second = defaults.clip(named), defaults.clip_or_none(first_of(row, ("audio2", "file2")), "audio2")
    if second is not None and not defaults.several_clips:
        raise ValueError("audio2: expected one clip, got two")
    instruction, label = as_text(row["instruction"], "instruction"), as_text(row["label"], "label")
    choices = _offered(instruction)
    if "choices" in row:
        choices, label = listed_choices(row["choices"], label)
    if label not in choices:
        # Instructions and labels sometimes differ in case. If the label is not offered at all, the question has free answers.
        same = [choice for choice in choices if choice.casefold() == label.casefold()]
        choices = tuple(label if choice in same else choice for choice in choices) if same else ()
    metadata = {key: row[key] for key in ("speaker", "speakerID", "dataset", "category") if key in row}
    yield Example(
        id=defaults.name(row, audio),
        audio=audio,
        more_audio=() if second is None else (second,),
        transcription=text_of(row, "transcription"),
        metadata=metadata,
        task=text_of(row, "task", "instance"),
        context=text_of(row, "text"),
        question=instruction,
        choices=choices,
        answer=label,
        split=row.get("split", defaults.split),
    )


def _offered(instruction: str) -> tuple[str, ...]:
    """The choices that an instruction names; () if it names none, or only one."""
    match = _OFFERED.search(" ".join(instruction.split()))  # the pattern would start at each of many blanks
    if match is None:
        return ()
    listed = re.split(r"\s*,\s*(?:(?:or|and)\s+)?|\s+(?:or|and)\s+|/", match[1].strip().rstrip(".?! "))
    choices = tuple(dict.fromkeys(choice.strip(" '\"“”") for choice in listed if choice.strip(" '\"“”")))
    return choices if len(choices) > 1 else ()


def _from_mcr_bench(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    audio = defaults.clip_or_none(row["audio"])
    if "gt" in row:  # as published
        described = {kind: row[kind] for kind in CONTEXT_KINDS if kind != "neutral" and row.get(kind)}
        row = {**row, "question": row["neutral"], "answer": row["gt"], "contexts": {"neutral": "", **described}}
    choices, answer = listed_choices(first_of(row, ("choices", "options")) or (), as_text(row["answer"], "answer"))
    if "contexts" in row:
        contexts = row["contexts"]
        if not isinstance(contexts, Mapping) or not contexts:
            raise TypeError("contexts: expected an object of texts by type")
    else:
        contexts = {row.get("context_type", "neutral"): row.get("context", "")}
    group = text_or_none(row, "pair_id") or defaults.name(row, audio)
    for context_type, context in contexts.items():
        if context_type not in CONTEXT_KINDS:
            raise ValueError(f"context_type: expected one of {list(CONTEXT_KINDS)}, got {context_type!r}")
        name = f"{group}/{context_type}" if "contexts" in row else defaults.name(row, audio)
        yield Example(
            id=name,
            audio=audio,
            transcription=text_of(row, "transcription"),
            metadata={"context_type": context_type},
            task=text_of(row, "task"),
            context=text_of({"context": context}, "context"),
            question=as_text(row["question"], "question"),
            choices=choices,
            answer=answer,
            split=row.get("split", defaults.split),
            kind=CONTEXT_KINDS[context_type],
            pair_id=group,
        )


def _rows(path: Path, form: str) -> Iterator[tuple[int, bytes | dict[str, Any] | None]]:
    """Numbered rows. The rows of a metadata.json (one object of rows by clip) get their clip and task."""
    if form == "kaldi":
        yield from kaldi_rows(path)
        return
    if form != "dynamic_superb" or path.name != "metadata.json":
        yield from read_rows(path)
        return
    folder = path.absolute().parent
    task = folder.parent.name if folder.name in SPLITS else folder.name
    for number, (clip, row) in enumerate(read_named_rows(path), 1):
        yield number, {**row, "id": f"{task}/{clip}", "task": task, "audio": clip} if isinstance(row, dict) else row
