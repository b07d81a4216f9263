"""Reads the files of published benchmarks that have one layout of their own: MMAU, MMAR and LISTEN.

mmau     github.com/Sakshi113/MMAU, version v05.15.25: mmau-test-mini.json with the folder test-mini-audios beside it
mmar     github.com/ddlBoJack/MMAR: MMAR-meta.jsonl with the folder audio beside it
listen   huggingface.co/datasets/VibeCheck1/LISTEN_full: data/train-*.parquet, the clips inside. They are unpacked into the cache
         folder, each once. Reading needs the package pyarrow

MMAU and MMAR publish no prompt. Here the choices stand behind the question as published, repeated ones too, after "Please choose
the answer from the following options:". LISTEN's prompt is that of its scripts, on one line. Its choices are shuffled by the
sample's id. (Its scripts shuffle by one random generator for all samples, whose result also depends on Python's hash seed.)
"""

from __future__ import annotations

import hashlib
import posixpath
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.data.example import Example
from models.data.manifest import ManifestError
from models.io_utils import atomic_write_bytes, cache_dir

FILES = {"mmau": "mmau-test-mini.json", "mmar": "MMAR-meta.jsonl"}
LAYOUTS = {
    "mmau": (
        "MMAU test-mini as published (github.com/Sakshi113/MMAU; its README links the clips):\n"
        "    FOLDER/mmau-test-mini.json   [{\"id\", \"audio_id\", \"question\", \"choices\", \"answer\", \"task\", ...}]\n"
        "    FOLDER/test-mini-audios/ID.wav"
    ),
    "mmar": (
        "MMAR as published (github.com/ddlBoJack/MMAR; the clips are on the Hugging Face hub, BoJack/MMAR):\n"
        "    FOLDER/MMAR-meta.jsonl   {\"id\", \"audio_path\", \"question\", \"choices\", \"answer\", \"modality\", ...}\n"
        "    FOLDER/audio/ID.wav"
    ),
    "listen": (
        "LISTEN as published (huggingface.co/datasets/VibeCheck1/LISTEN_full):\n"
        "    FOLDER/data/train-00000-of-NNNNN.parquet ..."
    ),
}  # fmt: skip
# Which field names the clip, the task, and the groups that the published metric shows beside the total.
_FIELDS = {
    "mmau": ("audio_id", "task", ("difficulty", "sub-category")),
    "mmar": ("audio_path", "modality", ("category", "sub-category")),
}
# LISTEN's experiments: the rows' experiment_type, whether the transcript is read, whether the clip is heard.
EXPERIMENTS = {
    "1_text": ("1", True, False), "1_audio": ("1", False, True), "1_audio_and_text": ("1", True, True),
    "2A": ("2A", True, False), "2B": ("2B", False, True), "2C": ("2B", True, True),
    "3A": ("3A", True, False), "3B": ("3B", False, True), "3C": ("3B", True, True),
    "4": ("4", False, True),
}  # fmt: skip
_EIGHT_EMOTIONS = ("neutral", "sadness", "surprise", "happiness", "fear", "anger", "excitement", "frustration")
_LISTEN_COLUMNS = ("id", "question", "answer", "choices", "transcription", "experiment_type", "explicit_emotion", "audio")
_PARQUET_ROWS = 64


def question_example(name: str, row: Mapping[str, Any]) -> Example:
    """A row of MMAU or MMAR. A row without an answer (MMAU's test) has none.

    Raises:
        ValueError, TypeError: a field is missing or of a wrong type.
    """
    clip, task, groups = _FIELDS[name]
    missing = [field for field in ("id", clip, "question", "choices", task) if field not in row]
    if missing:
        raise ValueError(f"missing field {missing[0]!r}")
    choices = row["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("choices: expected a list of strings")
    return Example(
        id=str(row["id"]),
        audio=posixpath.normpath(row[clip]) if isinstance(row[clip], str) else row[clip],
        task=str(row[task]),
        question=f"{row['question']} Please choose the answer from the following options: {choices}.",
        choices=tuple(choice for choice in choices if choice.strip()),  # 4 questions of MMAR have an empty one
        answer=row.get("answer"),
        split="test",
        metadata={"groups": {group: str(row[group]) for group in groups if group in row}},
    )


def listen_rows(root: Path) -> Iterator[dict[str, Any]]:
    """The rows of LISTEN's parquet files, a few at a time; a clip is {"bytes", "path"}.

    Raises:
        ManifestError: no such file, one that cannot be read, or pyarrow is missing.
    """
    files = sorted([*root.glob("data/train-*.parquet"), *root.glob("train-*.parquet")])
    if not files:
        raise ManifestError(f"{root}: no data/train-*.parquet in it")
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ManifestError(f"{root}: reading parquet files needs the package pyarrow: pip install pyarrow") from None
    for path in files:
        try:
            file = parquet.ParquetFile(path)
            lacking = [name for name in _LISTEN_COLUMNS if name not in file.schema_arrow.names]
            if lacking:
                raise ManifestError(f"{path}: expected the columns of LISTEN_full, found no {lacking[0]!r}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(_LISTEN_COLUMNS)):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(f"{path}: {error}") from error


def listen_examples(row: Mapping[str, Any], clips: Path) -> list[Example]:
    """The questions of a row, one for each experiment that uses it; its clip is written into `clips` if it is heard.

    A row without the answer that an experiment asks for is not asked there, as in the published scripts; neither is a
    transcript that is not there.

    Raises:
        ValueError, TypeError: a field is of a wrong type.
    """
    kind, transcript = str(row["experiment_type"]), row.get("transcription") or ""
    made = []
    for experiment, (rows_of, reads, hears) in EXPERIMENTS.items():
        if kind != rows_of or (reads and not transcript):
            continue
        answer = row["explicit_emotion"] if experiment in ("2A", "3A") else row["answer"]
        choices = listen_choices(str(row["id"]), row["choices"], experiment)
        if not answer or answer not in choices:
            continue
        made.append(
            Example(
                id=f"{experiment}/{row['id']}",
                audio=_unpacked(row["audio"], clips) if hears else None,
                task=experiment,
                question=listen_prompt(row["question"], choices, transcript if reads else "", hears=hears),
                choices=choices,
                answer=answer,
                split="test",
            )
        )
    return made


def listen_choices(sample_id: str, choices: Sequence[str], experiment: str) -> tuple[str, ...]:
    """The choices of a sample in the order of their letters; experiments 3A to 3C add eight emotions."""
    found: Iterable[str] = sorted({*choices, *_EIGHT_EMOTIONS}) if experiment.startswith("3") else dict.fromkeys(choices)
    shuffled = list(found)
    random.Random(f"{experiment} {sample_id}").shuffle(shuffled)
    return tuple(shuffled)


def listen_prompt(question: str, choices: Sequence[str], transcript: str, *, hears: bool) -> str:
    """The words of LISTEN's scripts."""
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    if not transcript:
        task = "Listen to the audio and classify the emotion."
    elif hears:
        task = "Listen to the audio and read the transcription, then classify the emotion."
    else:
        task = "Read the transcription and classify the emotion."
    said = [f"Transcription: {transcript}"] if transcript else []
    listed = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([*said, task, question, *listed, f"Respond with only the letter ({', '.join(letters)}):"])


def listen_clips_folder() -> Path:
    """Where LISTEN's clips are unpacked."""
    return cache_dir() / "listen" / "clips"


def _unpacked(audio: Any, folder: Path) -> str:
    """The name of a clip's file in `folder`, which is written if it is not there."""
    data = audio.get("bytes") if isinstance(audio, Mapping) else None
    if not isinstance(data, bytes) or not data:
        raise ValueError("audio: expected the bytes of a clip, got none")
    name = hashlib.sha256(data).hexdigest()[:32] + ".audio"
    if not (folder / name).is_file():
        atomic_write_bytes(folder / name, data)
    return name
