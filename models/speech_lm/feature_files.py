"""Encoder features on disk: one file or a folder of shards, read row by row, so no process holds them all.

A shard is a feature file like any other (`FeatureStore.save`). Its name comes from the clips in it, so processes that write into
one folder never write the same file. In memory is an index of 32 bytes a clip. A row is read from its place in the file; the
system's page cache keeps what is read often, and gives it back when memory is short.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from models.io_utils import atomic_write_bytes, fingerprint, sha256_file
from models.speech_lm.clip_keys import Clip, FeatureError

SHARD_PATTERN = "features-*.safetensors"


def write_feature_file(
    path: str | Path, keys: Sequence[str], features: torch.Tensor, *, made_by: dict[str, Any] | None, clips: Sequence[Clip] | None
) -> Path:
    """Write features (n, K, T, D) float16 atomically, with what made them and of what."""
    metadata = {"keys": json.dumps(list(keys)), "made_by": json.dumps(made_by)}
    if clips is not None:
        metadata["clips"] = json.dumps(list(clips))
    return atomic_write_bytes(path, save({"features": features.contiguous()}, metadata))


def write_shard(
    folder: str | Path, keys: Sequence[str], features: torch.Tensor, *, made_by: dict[str, Any] | None, clips: Sequence[Clip]
) -> Path:
    """Write a shard under the name that its clips give it; arguments as for `write_feature_file`."""
    path = Path(folder) / f"features-{fingerprint([keys, clips])[:16]}.safetensors"
    return write_feature_file(path, keys, features, made_by=made_by, clips=clips)


def read_header(path: str | Path) -> tuple[list[str], list[Clip] | None, dict[str, Any] | None, tuple[int, ...], int]:
    """Keys, clips, `made_by`, shape and the offset of the first row in bytes, of a feature file whose tensors are not read.

    Raises:
        FeatureError: no such file, or a file of another kind.
    """
    try:
        with safe_open(str(path), framework="pt") as file:  # it checks that the file has the size that its header says
            metadata = file.metadata()
        keys = json.loads(metadata["keys"])
        clips = [Clip(*clip) for clip in json.loads(metadata["clips"])] if "clips" in metadata else None
        with open(path, "rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            entry = json.loads(raw.read(length))["features"]
        shape = tuple(entry["shape"])
        if entry["dtype"] != "F16" or len(shape) != 4 or shape[0] != len(keys):
            raise ValueError(f"expected ({len(keys)}, K, T, D) in F16, got {shape} in {entry['dtype']}")
        return keys, clips, json.loads(metadata.get("made_by", "null")), shape, 8 + length + entry["data_offsets"][0]
    except Exception as error:  # safetensors raises several unrelated types, and none names the file
        raise FeatureError(f"{path}: not a feature file: {error}") from error


def feature_paths(path: str | Path) -> list[Path]:
    """The files that `path` stands for: a feature file alone, or all shards of a folder."""
    return sorted(Path(path).glob(SHARD_PATTERN)) if Path(path).is_dir() else [Path(path)]


def features_sha256(path: str | Path) -> str:
    """SHA-256 of a feature file; of a folder a fingerprint of those of its shards, in the order of their names."""
    hashes = [sha256_file(file) for file in feature_paths(path)]
    return fingerprint(hashes) if Path(path).is_dir() else hashes[0]


class FeatureFiles:
    """The rows of one feature file, or of all shards of a folder, by clip key.

    Args:
        path: file or folder.

    Attributes:
        made_by: what made the features, the same for all files; None = unknown.
        row_shape: (K, T, D).

    Raises:
        FeatureError: no file, a damaged one, files that different models made, or a clip in two files with different sound.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = feature_paths(self.path)
        if not self._files:
            raise FeatureError(f"{path}: expected shards of features ({SHARD_PATTERN}) in it, got none")
        self.made_by: dict[str, Any] | None = None
        self.row_shape: tuple[int, ...] = ()
        self._begins: list[int] = []
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("key", "file", "row", "seconds", "sha")}
        self.knows_clips = True
        for number, file in enumerate(self._files):
            keys, clips, made_by, shape, begin = read_header(file)
            if number and (made_by, shape[1:]) != (self.made_by, self.row_shape):
                raise FeatureError(f"{file}: expected features as in {self._files[0].name}, got those of another model")
            self.made_by, self.row_shape = made_by, shape[1:]
            self._begins.append(begin)
            self.knows_clips = self.knows_clips and clips is not None
            parts["key"].append(np.fromiter(map(_digest, keys), np.uint64, len(keys)))
            parts["file"].append(np.full(len(keys), number, np.int32))
            parts["row"].append(np.arange(len(keys), dtype=np.int32))
            parts["seconds"].append(np.array([clip.seconds for clip in clips or ()] or np.zeros(len(keys)), np.float64))
            parts["sha"].append(np.array([int(clip.sha256, 16) for clip in clips or ()] or np.zeros(len(keys)), np.uint64))
        index = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        order = np.argsort(index["key"], kind="stable")
        self._index = {name: array[order] for name, array in index.items()}
        same = self._index["key"][1:] == self._index["key"][:-1]
        if (same & (self._index["sha"][1:] != self._index["sha"][:-1])).any():
            raise FeatureError(f"{path}: a clip stands in two shards with different sound; remove the folder to encode it again")
        if same.any():  # processes that did not know of each other encoded a clip twice
            first = np.concatenate([[True], ~same])
            self._index = {name: array[first] for name, array in self._index.items()}

    def __len__(self) -> int:
        return len(self._index["key"])

    def find(self, key: str) -> int | None:
        """The number of a clip's entry; None if it has none."""
        digest = _digest(key)
        at = int(np.searchsorted(self._index["key"], np.uint64(digest)))
        return at if at < len(self) and int(self._index["key"][at]) == digest else None

    def clip(self, entry: int) -> Clip | None:
        """What an entry's features were made of; None where the file does not say."""
        if not self.knows_clips:
            return None
        return Clip(float(self._index["seconds"][entry]), f"{int(self._index['sha'][entry]):016x}")

    def read(self, entries: Sequence[int]) -> torch.Tensor:
        """(n, K, T, D) float16 of the entries, in their order."""
        out = np.empty((len(entries), *self.row_shape), np.float16)
        for file, places in self._by_file(entries):
            with open(self._files[file], "rb", buffering=0) as raw:
                for place in places:
                    raw.seek(self._begins[file] + int(self._index["row"][entries[place]]) * out[place].nbytes)
                    if raw.readinto(memoryview(out[place]).cast("B")) != out[place].nbytes:
                        raise FeatureError(f"{self._files[file]}: cut off since it was opened")
        return torch.from_numpy(out)

    def _by_file(self, entries: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        places: dict[int, list[int]] = {}
        for place, entry in enumerate(entries):
            places.setdefault(int(self._index["file"][entry]), []).append(place)
        yield from places.items()


def _digest(key: str) -> int:
    """64 bits of a clip's key: among a million keys two are alike with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
