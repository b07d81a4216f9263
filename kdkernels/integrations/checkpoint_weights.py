"""Loads the weights of a Trainer's checkpoint into the model that trains, under whatever names they lie on the disk.

transformers 5 saves a model under the names of its published checkpoint, and these may differ from those of its modules:
`language_model.lm_head.weight` for `lm_head.weight`. Its Trainer reads them back under the modules' names. A weight that it does
not find keeps its value, and only a warning says so. Then a resumed run goes on from its first weights, and the best model is not
loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["CheckpointWeights", "load_checkpoint_weights"]

_SHOWN = 3  # keys in an error


class CheckpointWeights(_Base):
    """Mix-in for transformers' Trainer: `class MyTrainer(CheckpointWeights, Trainer)`.

    `train(resume_from_checkpoint=...)` and args.load_best_model_at_end load every weight that trains. They raise ValueError with
    the name of one that the checkpoint lacks. FSDP and DeepSpeed load their own checkpoints, as before.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        given = self.model if model is None else model
        if not self._load(Path(resume_from_checkpoint), given):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._check_adapters(Path(resume_from_checkpoint), given)

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        if not self._load(folder, self.model):
            super()._load_best_model()
            self._check_adapters(folder, self.model)

    def _load(self, folder: Path, model: Any) -> bool:
        """Whether it has loaded a whole transformers model. False: what lies there is not one, or is another's to load."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if not isinstance(inner, PreTrainedModel) or not _weight_files(folder):
            return False
        load_checkpoint_weights(inner, folder)
        return True

    def _check_adapters(self, folder: Path, model: Any) -> None:
        """Whether every weight of PEFT's active adapter has the value that lies in ``folder``."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not hasattr(model, "peft_config"):
            return
        from peft import get_peft_model_state_dict

        name = next(iter(model.active_adapters)) if isinstance(model.active_adapters, Iterable) else "default"
        own = folder / name if (folder / name).is_dir() else folder
        files = [own / file for file in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME) if (own / file).is_file()]
        if not files:
            raise ValueError(f"resume_from_checkpoint: expected {ADAPTER_SAFE_WEIGHTS_NAME} in {own}, got none")
        saved = dict(_tensors(files[0]))
        held = get_peft_model_state_dict(model, adapter_name=name)
        other = [key for key, x in held.items() if key not in saved or not torch.equal(saved[key].to(x), x)]
        _raise_if(other, folder, "weights of the adapter")


def load_checkpoint_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fills the parameters and buffers of ``model`` from the weights that a Trainer has saved in ``folder``.

    The values come back as they were saved, in the dtypes that the model has now. No second model is built. A tensor of the
    checkpoint is in memory only while it is copied.

    Raises:
        ValueError: a parameter that requires a gradient is not in the checkpoint, or has another shape there. It names the first.
    """
    places = _places(model)
    filled: set[int] = set()
    with torch.no_grad():
        for file in _weight_files(folder):
            for name, saved in _tensors(file):
                place = places.get(name)
                if place is None:
                    continue
                if place.shape != saved.shape:
                    raise ValueError(
                        f"resume_from_checkpoint: expected {name!r} of shape {tuple(place.shape)} in {folder}, got "
                        f"{tuple(saved.shape)}"
                    )
                place.copy_(saved)
                filled.add(_storage(place))
    missing = [name for name, p in model.named_parameters() if p.requires_grad and _storage(p) not in filled]
    _raise_if(missing, folder, "weights that train")


def _places(model: PreTrainedModel) -> dict[str, Tensor]:
    """Where a tensor of a checkpoint goes, by its name there: the model's own memory, or a part of it.

    transformers' own conversion says what it would save. Its tensors are those of the model, or views of them. A copy (of experts
    that lie differently on the disk) has no place, and the caller then misses the parameter.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own: Mapping[str, Tensor] = model.state_dict()
    memory = {_storage(x) for x in own.values()}
    on_disk = {name: x for name, x in revert_weight_conversion(model, dict(own)).items() if _storage(x) in memory}
    return {**own, **on_disk}


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _weight_files(folder: Path) -> list[Path]:
    """Those of a whole model, in one file or in shards; empty where there is none."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return [folder / name]
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (folder / name).is_file():
            index = json.loads((folder / name).read_text())
            return [folder / file for file in sorted(set(index["weight_map"].values()))]
    return []


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield name, opened.get_tensor(name)
        return
    yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def _raise_if(names: list[str], folder: Path, what: str) -> None:
    if names:
        shown = ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
        raise ValueError(
            f"resume_from_checkpoint: expected the model's {what} in {folder}, but {len(names)} did not come back ({shown}); "
            "training would go on from other weights"
        )
