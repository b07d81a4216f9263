"""Rows of speech recognition's manifests: NeMo, Lhotse and Kaldi.

A transcript becomes the example's transcription, which prompts show. Only an "answer" is what a model learns to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.data.example import Example
from models.data.json_rows import numbered_lines
from models.data.problems import ManifestError
from models.data.row_values import (
    CLIP_COLUMNS,
    MARK,
    Defaults,
    attributes,
    first_of,
    listed_choices,
    split_name,
    text_of,
    text_or_none,
    without_nulls,
)

_QUESTION = ("question", "instruction", "prompt", "query")
_ANSWER = ("answer", "response", "output", "label")
_TRANSCRIPTION = ("transcription", "transcript", "text", "sentence")
_BESIDE = {"text": "text", "speaker": "utt2spk", "language": "utt2lang"}  # Kaldi's files, by the field that each fills
_PIPE = (
    "the recording is a command (it ends with |), and no command is run; write its sound to a file and name that file"
)


def from_columns(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    """Rows whose columns have common names: audio, question, answer, choices, text ..."""
    if not any(name in row for name in CLIP_COLUMNS):
        raise ValueError(
            f"audio: expected a clip under this name or one of {', '.join(CLIP_COLUMNS[1:])}, got none; a row of text only has "
            '"audio": null'
        )
    name = next((name for name in CLIP_COLUMNS if row.get(name) is not None), "audio")
    audio = defaults.clip_or_none(row.get(name), name)
    if audio is None and MARK.search(text_of(row, *_QUESTION)):
        raise ValueError("audio: expected a clip for the <audio> of the question, got null")
    yield _example(row, defaults, audio)


def from_nemo(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    """NeMo's manifest: "audio_filepath", "duration" and "offset" in seconds, "text", and "answer" for questions."""
    if "shard_id" in row:
        raise ValueError("shard_id: expected clips as files, got a manifest of tar files; unpack them first")
    start, duration = _seconds(row, "offset") or 0.0, _duration(row)
    audio = defaults.clip_or_none(row["audio_filepath"], "audio_filepath")
    yield _example(row, defaults, audio, start=start, end=None if duration is None else start + duration)


def from_lhotse(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    """Lhotse's MonoCut: a span of a recording that is one file, with its supervisions."""
    if (kind := row.get("type", "MonoCut")) != "MonoCut":
        raise ValueError(f"type: expected MonoCut, got {kind}; CutSet.save_audios of lhotse writes such cuts to files")
    (recording,) = _objects([row["recording"]], "recording")
    if recording.get("transforms"):
        raise ValueError("recording: expected none of transforms, got some; CutSet.save_audios of lhotse applies them")
    sources = _objects(recording["sources"], "recording: sources")
    if len(sources) != 1 or sources[0].get("type") != "file":
        kinds = [source.get("type") for source in sources]
        why = f"; {_PIPE}" if "command" in kinds else ""
        raise ValueError(f"recording: expected one source of type file, got {kinds}{why}")
    said = sorted(_objects(row.get("supervisions", []), "supervisions"), key=lambda each: _seconds(each, "start") or 0.0)
    merged: dict[str, Any] = {}
    for each in said:
        merged |= {key: value for key, value in each.items() if key in ("speaker", "gender", "language")}
        merged |= _objects([each.get("custom") or {}], "supervisions: custom")[0]
    merged |= _objects([row.get("custom", {})], "custom")[0]
    merged = without_nulls({**merged, "id": row["id"]})
    merged.setdefault("text", " ".join(filter(None, (text_of(each, "text") for each in said))))
    start, duration = _seconds(row, "start") or 0.0, _duration(row)
    whole = start == 0 and duration == _seconds(recording, "duration")
    end = None if whole or duration is None else start + duration
    yield _example(merged, defaults, defaults.clip(sources[0]["source"], "source"), start=start, end=end)


def from_kaldi(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    """A row of `kaldi_rows`."""
    if row["audio"].rstrip().endswith("|"):
        raise ValueError(f"audio: {_PIPE}")
    if re.search(r"\.ark:\d+$", row["audio"]):
        raise ValueError(
            "audio: expected a file, got a place in an ark archive; write its sound to a file and name that file"
        )
    yield _example(row, defaults, defaults.clip(row["audio"]), start=row["start"], end=row.get("end"))


def kaldi_files(path: Path) -> list[Path]:
    """Those of Kaldi's files that `kaldi_rows` reads of `path`."""
    folder, scp = (path, "wav.scp") if path.is_dir() else (path.parent, path.name)
    return [file for name in (scp, "segments", *_BESIDE.values()) if (file := folder / name).is_file()]


def kaldi_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of Kaldi's files in one folder: wav.scp or segments, with text, utt2spk and utt2lang beside them.

    Args:
        path: the folder, or its wav.scp. Rows are numbered as in segments if that file is there, else as in wav.scp.

    Raises:
        ManifestError: a file cannot be read, or a line of segments has another form.
    """
    path = Path(path)
    scp = path / "wav.scp" if path.is_dir() else path
    beside = {key: _table(scp.parent / name) for key, name in _BESIDE.items()}

    def row(name: str, audio: str, start: float = 0.0, end: float | None = None) -> dict[str, Any]:
        known = {key: table[name] for key, table in beside.items() if name in table}
        return {"id": name, "audio": audio, "start": start, "end": end, **known}

    segments = scp.parent / "segments"
    if not segments.is_file():
        for number, line in _text_lines(scp):
            name, _, audio = line.partition(" ")
            yield number, row(name, audio.strip())
        return
    recordings = _table(scp)
    for number, line in _text_lines(segments):
        try:
            name, recording, start, end = line.split()
            yield number, row(name, recordings[recording], float(start), None if float(end) < 0 else float(end))
        except (ValueError, KeyError):
            raise ManifestError(
                f"{segments}: line {number}: expected an utterance, a recording of {scp.name}, begin and end, got {line[:80]!r}"
            ) from None


def _example(
    row: Mapping[str, Any], defaults: Defaults, audio: str | None, *, start: float = 0.0, end: float | None = None
) -> Example:
    choices, answer = listed_choices(first_of(row, ("choices", "options")) or (), text_or_none(row, *_ANSWER))
    target = text_or_none(row, "target")
    target = answer if target is None else target
    more = row.get("more_audio", ())
    return Example(
        id=defaults.name(row, audio),
        audio=audio,
        start_seconds=start,
        end_seconds=end,
        more_audio=tuple(defaults.clip(path, "more_audio") for path in more) if isinstance(more, (list, tuple)) else more,
        transcription=text_of(row, *_TRANSCRIPTION),
        metadata=attributes(row),
        task=text_of(row, "task"),
        context=text_of(row, "context"),
        system=text_of(row, "system"),
        question=text_of(row, *_QUESTION),
        choices=choices,
        answer=answer,
        target=target,
        target_source=None if target is None else "human",
        split=split_name(row.get("split", defaults.split)),
    )


def _objects(values: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise TypeError(f"{name}: expected objects, got another value")
    return values


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number of seconds, got {type(value).__name__}")
    return float(value)


def _duration(row: Mapping[str, Any]) -> float | None:
    """Seconds of a span; None is the rest of the file."""
    seconds = _seconds(row, "duration")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"duration: expected seconds above 0, got {seconds:g}")
    return seconds


def _table(path: Path) -> dict[str, str]:
    """First word of each line -> the rest; empty without the file."""
    if not path.is_file():
        return {}
    return {name: rest.strip() for name, _, rest in (line.partition(" ") for _, line in _text_lines(path))}


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in numbered_lines(path):
        if line is None:
            raise ManifestError(f"{path}: line {number}: longer than a row may be")
        try:
            yield number, " ".join(line.decode("utf-8-sig").split())
        except UnicodeDecodeError:
            raise ManifestError(f"{path}: line {number}: not UTF-8") from None
