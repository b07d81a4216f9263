"""Rows of data sets that the package `datasets` reads: save_to_disk folders, parquet files, WebDataset's tar files, folders of
audio with metadata.

Clips are never decoded there, so torchcodec is not needed: `models/data/audio.py` reads them. Clips that lie inside Arrow or
parquet files are written once as files into the cache folder ($KDKERNELS_CACHE/clips), named by the SHA-256 of their bytes. One
row at a time is in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.data.example import SPLITS
from models.data.problems import ManifestError
from models.data.row_values import split_name
from models.io_utils import atomic_write_bytes, cache_dir

INSTALL = 'pip install "datasets>=3"'
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
_SHARDS = {"parquet": ".parquet", "webdataset": ".tar"}
_ROWS_LOOKED_AT = 1000  # for the first clip; earlier rows may be of text only
_UNNAMED = "unnamed"  # the split of shards that name none; `datasets` takes no empty name
_SUFFIX = re.compile(r"\.\w{1,5}")


def holds_dataset(path: str | os.PathLike[str]) -> str | None:
    """The kind of data set in a file or folder: saved, parquet, webdataset or audiofolder; None for another file or folder."""
    path = Path(path)
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix == ".tar":
        return "webdataset"
    if not path.is_dir() or (path / "wav.scp").is_file():
        return None
    if any((path / name).is_file() for name in _SAVED):
        return "saved"
    inside = [path, *(folder for folder in sorted(path.iterdir()) if folder.is_dir())]
    if any((folder / name).is_file() for folder in inside for name in _METADATA):
        return "audiofolder"
    for kind, suffix in _SHARDS.items():
        if next(path.rglob(f"*{suffix}"), None):
            return kind
    names = itertools.islice((name for folder in inside for name in folder.iterdir()), 1000)
    return "audiofolder" if any(name.suffix.lower() in _SOUNDS for name in names) else None


def dataset_files(path: Path, kind: str) -> list[Path]:
    """The files that hold the rows of a data set of this kind; not the clips that lie beside them."""
    if kind in _SHARDS:
        return [path] if path.is_file() else sorted(path.rglob(f"*{_SHARDS[kind]}"))
    if kind == "saved":
        return sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json"))
    return sorted(file for file in path.rglob("*") if file.name in _METADATA)


def listed_clips(path: Path, kind: str) -> list[str]:
    """The clips of a folder of audio, whose listing says which rows there are and in which order; none for other kinds."""
    if kind != "audiofolder":
        return []
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.suffix.lower() in _SOUNDS)


class DatasetRows:
    """The numbered rows of a data set, with a path in the place of each clip.

    Args:
        path: what `holds_dataset` knows.
        kind: as it says.

    Attributes:
        kind: the same.
        first: the first row; empty without one.
        holds_clips: whether the clips are inside the data set, as the first one says.
        root: folder of the clips: the cache folder's where they are inside the data set, else the data set's own.

    Raises:
        ManifestError: `datasets` is not installed, or cannot read it.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str):
        self.path, self.kind = Path(path), kind
        try:
            self._splits = _open(self.path, kind)
            rows = itertools.islice((row for _, split in self._splits for row in split), _ROWS_LOOKED_AT)
            self.first: dict[str, Any] = next(rows, {})
            clips = (value for row in itertools.chain([self.first], rows) for value in _values(row) if _is_clip(value))
            self.holds_clips = _clip_bytes(next(clips, None)) is not None
        except ImportError as error:
            raise ManifestError(
                f"{path}: data sets of this kind are read by the package datasets: {INSTALL} ({error})"
            ) from None
        except Exception as error:  # datasets raises several unrelated types
            raise ManifestError(f"{path}: datasets cannot read it: {error}") from error
        self.root = self.path if self.path.is_dir() else self.path.parent
        if self.holds_clips:
            self.root = cache_dir() / "clips"
            self.root.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return self.rows_from(None)

    def position(self) -> dict[str, Any]:
        """Where the iteration is, behind the row that it gave last; JSON."""
        index, taken, number, split = self._at
        state = split.state_dict() if hasattr(split, "state_dict") else None
        return {"split": index, "taken": taken, "number": number, "state": state}

    def rows_from(self, position: dict[str, Any] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """The numbered rows behind a `position`; None = all of them. A streamed data set reads no row before it again."""
        number = 0 if position is None else position["number"]
        for index, (name, split) in enumerate(self._splits):
            taken = 0
            if position is not None and index <= position["split"]:
                if index < position["split"]:
                    continue
                taken = position["taken"]
                if position["state"] is None:
                    split = split.skip(taken)
                else:
                    split.load_state_dict(position["state"])
            names = {
                key: feature.names for key, feature in (split.features or {}).items() if hasattr(feature, "int2str")
            }
            try:
                for row in split:
                    number, taken = number + 1, taken + 1
                    self._at = (index, taken, number, split)
                    made = {key: self._plain(value) for key, value in row.items()}
                    for key, labels in names.items():
                        if isinstance(made.get(key), int) and 0 <= made[key] < len(labels):
                            made[key] = labels[made[key]]
                    if "__key__" in made:
                        made = _web_row(made)
                    if name and made.get("split") is None:
                        made["split"] = split_name(name)
                    yield number, made
            except Exception as error:  # pyarrow raises several unrelated types
                raise ManifestError(f"{self.path}: row {number + 1} cannot be read: {error}") from error

    def _plain(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._plain(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        data = _clip_bytes(value)
        if data is not None:
            return self._written(data, str(value.get("path") or ""))
        if set(value) == {"bytes", "path"}:
            return value["path"]
        return {key: self._plain(entry) for key, entry in value.items() if entry is not None}

    def _written(self, data: bytes, name: str) -> str:
        """The path of a clip's bytes in the cache folder. Several processes may write the same clip."""
        suffix = Path(name).suffix.lower()
        digest = hashlib.sha256(data).hexdigest()
        relative = f"{digest[:2]}/{digest[2:34]}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
        file = self.root / relative
        if not file.is_file() or file.stat().st_size != len(data):
            atomic_write_bytes(file, data)
        return relative


def _web_row(row: dict[str, Any]) -> dict[str, Any]:
    """A sample of a WebDataset: the fields of its json member, its key as the id, and its sound, whatever its suffix is."""
    fields = row.get("json") if isinstance(row.get("json"), dict) else {}
    sounds = [value for name, value in row.items() if f".{name.lower()}" in _SOUNDS and value is not None]
    return {"id": row["__key__"], **({"audio": sounds[0]} if sounds else {}), **fields}


def _clip_bytes(value: Any) -> bytes | None:
    return value["bytes"] if isinstance(value, dict) and isinstance(value.get("bytes"), bytes) else None


def _is_clip(value: Any) -> bool:
    """Whether this is a clip as `datasets` hands it out, not null."""
    if _clip_bytes(value) is not None:
        return True
    return isinstance(value, dict) and set(value) == {"bytes", "path"} and value["path"] is not None


def _values(value: Any) -> Iterator[Any]:
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for entry in inner:
        yield from _values(entry)


def _open(path: Path, kind: str) -> list[tuple[str, Any]]:
    """(name, rows) of each split; no name where the data set has no splits. Clips are not decoded."""
    import datasets

    if kind == "saved":
        loaded = datasets.load_from_disk(str(path))
    elif kind in _SHARDS:
        by_split: dict[str, list[str]] = {}
        for file in dataset_files(path, kind):
            below = Path(file.name) if path.is_file() else file.relative_to(path)
            by_split.setdefault(_split_of(below) or _UNNAMED, []).append(str(file))
        loaded = datasets.load_dataset(kind, data_files=by_split, streaming=True)
    else:
        loaded = datasets.load_dataset("audiofolder", data_dir=str(path), streaming=True)
        if list(loaded) == ["train"] and not any(_split_of(file.relative_to(path)) for file in dataset_files(path, kind)):
            loaded = loaded["train"]  # its name where no folder says one
    splits = list(loaded.items()) if isinstance(loaded, dict) else [("", loaded)]
    splits = [("" if name == _UNNAMED else name, split) for name, split in splits]
    if kind in ("webdataset", "audiofolder"):
        # `datasets` would encode these sounds with torchcodec, also where nothing is decoded.
        text = datasets.Value("string")
        sound = text if kind == "audiofolder" else {"bytes": datasets.Value("binary"), "path": text}
        return [(str(name), _with_sounds(split, sound, datasets)) for name, split in splits]
    return [(str(name), _undecoded(split, datasets)) for name, split in splits]


def _split_of(file: Path) -> str | None:
    """The split that a shard's name says, or else the nearest of its folders that says one; None without one.

    So hubs name them: train-00000-of-00002.parquet, default/validation/0000.parquet. Whole words count: test, not testimony.
    """
    for part in (file.stem, *reversed(file.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if (split := split_name(word)) in SPLITS:
                return split
    return None


def _with_sounds(split: Any, plain: Any, datasets: Any) -> Any:
    """The split with the feature `plain` in the place of its Audio."""
    for name, feature in (split.features or {}).items():
        if isinstance(feature, datasets.Audio):
            split = split.cast_column(name, plain)
    return split


def _undecoded(split: Any, datasets: Any) -> Any:
    """The split with every Audio feature set to hand out paths and bytes."""

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Audio):
            return datasets.Audio(decode=False)
        if isinstance(feature, dict):
            return {key: plain(inner) for key, inner in feature.items()}
        if isinstance(feature, list):
            return [plain(inner) for inner in feature]
        if hasattr(feature, "feature"):
            return type(feature)(plain(feature.feature))
        return feature

    for name, feature in (split.features or {}).items():
        made = plain(feature)
        if made != feature or isinstance(feature, datasets.Audio):
            split = split.cast_column(name, made)
    return split
