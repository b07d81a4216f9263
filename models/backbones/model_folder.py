"""A folder that holds a backbone: config.json and *.safetensors, and backbone.json where it was made from packages."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from models.io_utils import fingerprint, sha256_file

PREPARED_VERSION = 1
PREPARED_FILE = "backbone.json"
_INDEX_FILE = "model.safetensors.index.json"


class BackboneError(RuntimeError):
    """A backbone was not found, or cannot be used; the message lists what was tried and how to get it."""


def missing_files(folder: Path) -> str | None:
    """Says what the folder of a backbone lacks; None if it lacks nothing."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    return " and ".join(missing) or None


def has_all_shards(folder: Path) -> bool:
    """Whether every file of weights is there that the folder's index names."""
    if not (folder / _INDEX_FILE).is_file():
        return (folder / "model.safetensors").is_file()
    return all((folder / name).is_file() for name in _indexed_files(folder))


def weights_sha256(folder: str | os.PathLike[str]) -> str:
    """SHA-256 that identifies the weights in a folder; a folder made from packages has it in its backbone.json."""
    folder = Path(folder)
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((folder / PREPARED_FILE).read_text())
        if record["prepared_version"] == PREPARED_VERSION:
            return record["weights_sha256"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneError(f"{folder}: no *.safetensors to hash")
    if len(files) == 1:
        return sha256_file(files[0])
    return fingerprint([[file.name, sha256_file(file)] for file in files])


def read_encoder_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Whisper folder's encoder. Whisper's model classes save them under different prefixes."""
    indexed = (folder / _INDEX_FILE).is_file()
    files = (
        sorted(folder / name for name in _indexed_files(folder)) if indexed else sorted(folder.glob("*.safetensors"))
    )
    state: dict[str, torch.Tensor] = {}
    bare: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                for prefix in ("model.encoder.", "encoder."):
                    if key.startswith(prefix):
                        state[key.removeprefix(prefix)] = tensors.get_tensor(key).float()
                        break
                else:
                    if key.split(".")[0] in ("conv1", "conv2", "embed_positions", "layers", "layer_norm"):
                        bare[key] = tensors.get_tensor(key).float()
    return state or bare


def check_all_loaded(loaded: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model some of whose weights its files lack: transformers makes them at random, and warns.

    Args:
        loaded: what `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        BackboneError: names the folder and the first of the weights.
    """
    if lost := sorted(loaded["missing_keys"]):
        raise BackboneError(f"{folder}: expected all weights of the model, its files lack {len(lost)}, the first is {lost[0]}")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars for loads that take a tenth of a second, and no advice on generation settings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _indexed_files(folder: Path) -> set[str]:
    return set(json.loads((folder / _INDEX_FILE).read_text())["weight_map"].values())
