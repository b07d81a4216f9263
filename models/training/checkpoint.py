"""Checkpoints: complete or absent, and exact. They hold weights, optimiser, position in the data, every random generator.

A checkpoint is a folder `step-00000120` with

    model.safetensors       the trained weights (the recipe names the frozen backbones; they are not copied)
    optimizer.safetensors   the optimiser's tensors, named by parameter
    rng.safetensors         states of torch's CPU and CUDA generators and of NumPy's
    trainer.json            step, optimiser settings, Python's generator, what the loop adds
    manifest.json           size and SHA-256 of each file; written last

It is written under a temporary name, flushed to the disk and renamed: a kill at any moment leaves the checkpoint before it as it
was. It holds no pickle, so nothing in it can run code.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.io_utils import atomic_dir, atomic_write_json, fingerprint, save_tensors, sha256_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
RESULT_NAME = "final"  # the folder of a run's result, in run.out_dir
_FILE_NAMES = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer.json"}
_STEP_NAME = re.compile(r"step-(\d{8})$")
_LEFT_NAME = re.compile(r"\.step-\d{8}\..*\.(tmp|old)$")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another run; the message names the file and says what to do."""


@dataclass
class Checkpoint:
    """A checkpoint as it was read."""

    path: Path
    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    trainer: dict[str, Any]
    rng: dict[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(
    root: str | Path,
    step: int,
    *,
    model_state: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    parameter_names: Mapping[torch.nn.Parameter, str],
    trainer_state: Mapping[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write `root/step-XXXXXXXX` atomically; keep `keep_last` checkpoints up to this step and none of a later step.

    Args:
        model_state: name -> tensor of what is trained (see `trainable_state`).
        optimizer: any torch optimiser whose state of each parameter is tensors and numbers.
        parameter_names: the name of every parameter the optimiser holds.
        trainer_state: what the loop adds, as JSON can hold it.

    Returns:
        the folder.

    Raises:
        ValueError: an optimiser state of a type that safetensors and JSON cannot hold.
        OSError: no room or no rights; it names the file or the folder. Earlier checkpoints stay as they were.
    """
    path = Path(root) / f"step-{step:08d}"
    tensors, numbers = _split_optimizer(optimizer, parameter_names)
    rng_tensors, rng_numbers = _rng_state()
    with atomic_dir(path) as folder:
        save_tensors({name: t.detach().cpu().contiguous() for name, t in model_state.items()}, folder / "model.safetensors")
        save_tensors(tensors, folder / "optimizer.safetensors")
        save_tensors(rng_tensors, folder / "rng.safetensors")
        trainer = {"step": step, "optimizer": numbers, "rng": rng_numbers, "state": dict(trainer_state)}
        (folder / "trainer.json").write_text(json.dumps(trainer, allow_nan=False), encoding="utf-8")
        write_manifest(folder, step, FORMAT_VERSION)
    prune_checkpoints(root, path, keep_last)
    return path


def write_manifest(folder: Path, step: int, format_version: int | str) -> None:
    """Write size and SHA-256 of every file in `folder`; call it when all of them are there."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(folder.iterdir())}
    atomic_write_json(folder / MANIFEST_NAME, {"format": format_version, "step": step, "files": files})


def prune_checkpoints(root: str | Path, path: Path, keep_last: int) -> None:
    """Keep `keep_last` checkpoints up to `path`, the new one, and none of a later step; delete what killed saves have left.

    A checkpoint of a later step belongs to a run that was continued from an earlier one: "newest" must not mean that one.
    """
    kept = [p for p in list_checkpoints(root) if p.name <= path.name][-keep_last:]
    for old in list_checkpoints(root):
        if old not in kept:
            with contextlib.suppress(OSError):
                old.rename(old.with_name(f".{old.name}.pruned.old"))  # renamed first: one that is half deleted is not listed
    for left in Path(root).iterdir():
        if _LEFT_NAME.match(left.name):
            shutil.rmtree(left, ignore_errors=True)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest.

    Raises:
        CheckpointError: no manifest, a file missing, of the wrong size or hash, or a format this version does not know.
    """
    path = Path(path)
    check_manifest(path, FORMAT_VERSION, _FILE_NAMES)
    try:
        trainer = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        model, optimizer, rng = (load_file(path / f"{n}.safetensors") for n in ("model", "optimizer", "rng"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from error
    return Checkpoint(path=path, step=trainer["step"], model=model, optimizer=optimizer, trainer=trainer, rng=rng)


def check_manifest(path: Path, format_version: int | str, names: set[str]) -> None:
    """Compare every file with the manifest, which must have this format and list `names`; CheckpointError otherwise."""
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a complete checkpoint, it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST_NAME}: damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format_version:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(
            f"{path}: checkpoint format {format_version} expected, got {got}; run.parallel=none has a format of its own"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or names - files.keys():
        raise CheckpointError(f"{path / MANIFEST_NAME}: damaged: expected an entry for each of {sorted(names)}")
    for name, entry in files.items():
        _check_file(path / name, entry)


def list_checkpoints(root: str | Path) -> list[Path]:
    """The checkpoint folders under `root`, oldest first, without the temporary ones of a killed run."""
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _STEP_NAME.match(p.name) and p.is_dir())


def find_checkpoint(root: str | Path, resume: str, load: Callable[[Path], Any] = load_checkpoint) -> Any:
    """The checkpoint that `run.resume` asks for, as `load` reads it, or None.

    Args:
        root: folder of the run's checkpoints.
        load: reads a folder and raises CheckpointError where it is damaged.
        resume: "never" gives None. "auto" gives the newest, an error if it is damaged, or None if there is none. "fallback" gives
            the newest that is intact. Anything else is a folder, and gives the checkpoint in it.

    Raises:
        CheckpointError: the checkpoint is damaged; the message names the intact one before it, if there is one.
    """
    if resume == "never":
        return None
    if resume not in ("auto", "fallback"):
        if not Path(resume).is_dir():
            raise CheckpointError(f"run.resume: expected never, auto, fallback or a checkpoint's folder, got {resume!r}")
        return load(Path(resume))
    _put_back(Path(root))
    errors = []
    for path in reversed(list_checkpoints(root)):
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        if errors and resume == "auto":
            raise CheckpointError(
                f"{errors[0]}. The last intact one is {path}: run.resume=fallback continues from it"
            )
        return checkpoint
    if errors:
        raise CheckpointError(f"{errors[0]}. No intact checkpoint is left in {root}: run.resume=never starts from step 1")
    return None


def set_aside(root: str | Path, curves: Path, result: Path) -> None:
    """Rename the folder of an earlier run's checkpoints to `<root>.previous`, and that of its result to `<result>.previous`. An
    older folder of such a name is deleted.

    The run's file of curves goes with the checkpoints, if it is there: a run that goes on from one of them takes it from there.
    `find_checkpoint` must not take them for those of a new run. And somebody who forgot `run.resume=auto` must not lose hours
    of training.
    """
    root = Path(root)
    _put_back(root)
    if list_checkpoints(root):
        previous = _renamed_to_previous(root)
        if curves.is_file():
            curves.rename(previous / curves.name)
    if result.is_dir():
        _renamed_to_previous(result)


def _renamed_to_previous(folder: Path) -> Path:
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    return folder.rename(previous)


def _put_back(root: Path) -> None:
    """Restore a checkpoint that a second save of its step was replacing when a kill came, between the two renames."""
    for aside in root.glob(".step-*.old/step-*"):
        if not (root / aside.name).exists():
            aside.rename(root / aside.name)


def restore_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Put the saved weights and buffers back; frozen parameters stay as they are.

    Raises:
        CheckpointError: a tensor of the model is not in the checkpoint, or has another shape there.
    """
    expected = {name: tuple(t.shape) for name, t in trainable_state(model).items()}
    saved = {name: tuple(t.shape) for name, t in checkpoint.model.items()}
    check_same_entries(checkpoint.path, "model", saved, expected)
    model.load_state_dict(checkpoint.model, strict=False)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, parameter_names: Mapping[torch.nn.Parameter, str]
) -> None:
    """Put the saved optimiser state back, each tensor on its parameter's device."""
    numbers = checkpoint.trainer["optimizer"]
    names = {name: p for p, name in parameter_names.items()}
    saved = {key.split("|", 1)[0] for key in checkpoint.optimizer} | set(numbers["state"])
    held = {parameter_names[p] for group in optimizer.param_groups for p in group["params"]}
    if saved - held or (saved and held - saved):
        raise CheckpointError(
            f"{checkpoint.path}: optimiser state of other parameters: only saved {sorted(saved - held)[:3]}, "
            f"only in this model {sorted(held - saved)[:3]}"
        )
    for key, tensor in checkpoint.optimizer.items():
        name, entry = key.split("|", 1)
        # AdamW keeps its step counter on the CPU for any device (unless capturable).
        device = names[name].device if tensor.dim() else torch.device("cpu")
        optimizer.state[names[name]][entry] = tensor.to(device)
    for name, entries in numbers["state"].items():
        optimizer.state[names[name]].update(entries)
    for group, saved_group in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved_group.items()})


def restore_rng(checkpoint: Checkpoint) -> None:
    """Put every random generator back: Python, NumPy, torch on the CPU, and on the CUDA devices that are saved and present."""
    numbers = checkpoint.trainer["rng"]
    version, *rest = numbers["python"]
    random.setstate((version, tuple(rest[0]), rest[1]))
    kind, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((kind, checkpoint.rng["numpy"].numpy().view(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(checkpoint.rng["torch_cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            state = checkpoint.rng.get(f"torch_cuda_{index}")
            if state is not None:
                torch.cuda.set_rng_state(state, index)


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint has to hold: every entry of the state dict except frozen parameters.

    Buffers are in it (feature statistics are buffers); backbones are frozen parameters and are not. A parameter with two
    names (a tied LM head) has the first of them.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    others = {name for name, _ in model.named_parameters(remove_duplicate=False)} - trained
    return {name: t for name, t in model.state_dict().items() if name not in others}


def check_same_settings(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise a CheckpointError unless the checkpoint `path` was made with the same settings; it names those that differ."""
    if fingerprint(saved) == fingerprint(now):
        return
    flat_saved, flat_now = dict(_flatten(saved)), dict(_flatten(now))
    different = [
        f"{key} was {flat_saved.get(key)!r}, is {flat_now.get(key)!r}"
        for key in sorted(flat_saved.keys() | flat_now.keys())
        if flat_saved.get(key) != flat_now.get(key)
    ]
    raise CheckpointError(f"{path}: of another recipe: {'; '.join(different)}")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_same_entries(path: Path, what: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a CheckpointError that names the first entry in which the checkpoint `path` differs from this `what`.

    Args:
        saved, expected: name -> shape, of the checkpoint and of what it is loaded into.
    """
    different = sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{path}: of another {what}: {name} is {saved.get(name, 'missing')} there, "
            f"{expected.get(name, 'missing')} here ({len(different)} such)"
        )


def _split_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {"state": {}, "groups": []}
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[parameter]}|{entry}"] = value.detach().cpu().contiguous().clone()
            elif value is None or isinstance(value, (bool, int, float, str)):
                numbers["state"].setdefault(names[parameter], {})[entry] = value
            else:
                raise ValueError(f"optimizer: state {entry!r} is a {type(value).__name__}; expected tensors and numbers")
    for group in optimizer.param_groups:
        numbers["groups"].append({k: v for k, v in group.items() if k != "params"})
    return tensors, numbers


def _rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    # safetensors.torch cannot store uint32: the same bits are stored as int32.
    tensors = {"torch_cpu": torch.get_rng_state(), "numpy": torch.from_numpy(keys.view(np.int32).copy())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"torch_cuda_{index}"] = state
    return tensors, {"python": random.getstate(), "numpy": [kind, position, has_gauss, cached]}


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, though the checkpoint's manifest names it")
    size = path.stat().st_size
    if not isinstance(entry, Mapping) or not {"bytes", "sha256"} <= entry.keys():
        raise CheckpointError(f"{path}: damaged: the manifest has no size and SHA-256 of it")
    if size != entry["bytes"]:
        raise CheckpointError(f"{path}: damaged: {entry['bytes']} bytes expected, got {size}")
    if sha256_file(path) != entry["sha256"]:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not the manifest's")
