"""Weights of a Trainer's checkpoint, back in the model they were saved from, or an error.

`save_pretrained` writes the names (and, for some models, the layout) of the model's hub checkpoint. `from_pretrained` converts
them back, but the Trainer of transformers 5 loads them as they are: `load_state_dict(..., strict=False)`. Where the names
differ, nothing is loaded, a warning says so, and the training goes on from the initial weights.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..head_layers import is_partitioned

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["CheckpointLoading", "base_fingerprint", "weights_fingerprint"]

logger = logging.getLogger(__name__)

_WHOLE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ADAPTER = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
# Files of a checkpoint beside its weights; transformers writes its state last.
_OPTIMIZER, _SCHEDULER, _STATE = ("optimizer.pt", "optimizer.bin"), "scheduler.pt", "trainer_state.json"
_PROMPTS = "prompt_encoder"  # PEFT's module of trained prompts; the files have those as "prompt_embeddings"
_SETTINGS = "adapter_config.json"
_OF_THE_ADAPTER = ("peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora")  # what a resumed run must share
_SAMPLED = 64  # values of a weight in a fingerprint
_SHOWN = 3  # keys in an error


class CheckpointLoading(_Trainer):
    """Mix-in for any Trainer of transformers: `resume_from_checkpoint` and `load_best_model_at_end` load all trained weights.

        class MyTrainer(CheckpointLoading, Trainer): ...

    It loads whole models (one file or several, safetensors or bin), adapters that `model.add_adapter` has put into the model,
    and PEFT models. FSDP and DeepSpeed load their own files; this class leaves them to it.

    keeps_statistics: whether the Trainer leaves the running statistics of frozen batch norms alone. Otherwise an adapter that
    comes back to a model that has some is warned of.

    Memory: a whole model is read on the CPU, in the widest dtype of the model's parameters, and freed after it is copied.

    Warnings: the checkpoint has no state of the optimiser (save_only_model). Or a new run starts beside checkpoints of an earlier
    one: a later resume takes the highest number, and save_total_limit may delete the new ones.

    Raises:
        ValueError: when training starts, nothing trains, or a parameter does that no save would hold: one beside a LoRA, whose
            file holds the adapter alone. The error names the first ones. Or the checkpoint is one whose save was cut off.
        RuntimeError: after loading, a parameter that trains has not come from the checkpoint, or the checkpoint holds a tensor
            that the model does not have. The error names the first ones. Frozen weights may be missing; they stay as they are.
    """

    keeps_statistics = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        _check_saved(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        if (folder := self._resumed(resume_from_checkpoint)) is not None:
            self._check_checkpoint(folder)
        elif not resume_from_checkpoint:
            self._warn_of_an_earlier_run()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _resumed(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The folder that the Trainer will load; None for none, and where there is none (which the Trainer says itself)."""
        output = self.args.output_dir
        if isinstance(resume_from_checkpoint, bool):
            newest = get_last_checkpoint(output) if resume_from_checkpoint and os.path.isdir(str(output)) else None
            return None if newest is None else Path(newest)
        folder = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return folder if folder is not None and folder.is_dir() else None

    def _check_checkpoint(self, folder: Path) -> None:
        """Before anything is loaded: ValueError where its save was cut off, a warning where it has no state of the optimiser."""
        _check_complete(folder)
        own_files = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not own_files and not (_has(folder, _OPTIMIZER) and (folder / _SCHEDULER).is_file()):
            logger.warning(
                "%s has no state of the optimiser and the learning rate, as with save_only_model: both begin again, so this is "
                "not the undisturbed run",
                folder,
            )

    def _warn_of_an_earlier_run(self) -> None:
        output, saves = str(self.args.output_dir), self.args.save_strategy != SaveStrategy.NO and self.args.should_save
        if saves and os.path.isdir(output) and (newest := get_last_checkpoint(output)) is not None:
            logger.warning(
                "%s holds checkpoints of an earlier run up to %s, and this run starts at step 1. resume_from_checkpoint=True "
                "takes the highest number of any run, and save_total_limit may delete the new ones. Move the old ones away",
                output,
                Path(newest).name,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self._load_checked(Path(resume_from_checkpoint), self.model if model is None else model, load)

    def _load_best_model(self) -> None:
        self._load_checked(Path(str(self.state.best_model_checkpoint)), self.model, super()._load_best_model)

    def _load_checked(self, folder: Path, model: Any, load: Any) -> None:
        """Loads by this module where it can, else by the Trainer's own `load`."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            load()
            return
        root: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        trained = _trained(root)
        whole, adapter = _has(folder, _WHOLE), _has(folder, _ADAPTER)
        _check_adapter_settings(root, folder)
        injected = isinstance(root, PreTrainedModel) and getattr(root, "_hf_peft_config_loaded", False)
        if not isinstance(root, PreTrainedModel) or getattr(root, "hf_quantizer", None) is not None or not (whole or adapter):
            load()
            if hasattr(root, "peft_config") and not injected:
                _check_adapters(root, folder, trained, warn=not self.keeps_statistics)
            elif whole:
                _check(folder, trained, loaded=(names := set(_read_whole(folder))), unexpected=names - root.state_dict().keys())
            else:
                _check(folder, trained, loaded=set())  # for the best model the Trainer only warns
            return
        loaded: set[str] = set()
        if whole:
            loaded |= (_load_renamed if injected else _load_whole)(root, folder)
        if injected and adapter:
            loaded |= _load_injected(root, folder, warn=not self.keeps_statistics)
        _check(folder, trained, loaded=loaded)


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _has(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _check_complete(folder: Path) -> None:
    """Raises ValueError where the save was cut off: transformers writes the trainer's state last."""
    if (folder / _STATE).is_file():
        return
    beside = [f for f in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (f / _STATE).is_file()]
    newest = max(beside, key=lambda f: int(number) if (number := f.name.rpartition("-")[2]).isdecimal() else -1, default=None)
    what = "no complete one lies beside it" if newest is None else f"pass resume_from_checkpoint={os.fspath(newest)!r}"
    raise ValueError(
        f"resume_from_checkpoint: expected a complete checkpoint, got {folder} without {_STATE}, which is written "
        f"last: its save was cut off, or it is the folder of a model alone; {what}"
    )


def _load_whole(model: PreTrainedModel, folder: Path) -> set[str]:
    """What from_pretrained makes of the folder, copied into the model; the names of its parameters that came from there.

    The config builds no module that was changed after the model was made: its tensors are read by their names in the file.
    """
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    config = copy.deepcopy(model.config)
    load: Any = type(model).from_pretrained
    with torch.random.fork_rng(devices=[]):
        fresh, info = load(
            os.fspath(folder),
            config=config,
            dtype=functools.reduce(torch.promote_types, dtypes, dtypes[0]),  # narrower ones are exact in it
            attn_implementation="eager",  # it computes nothing
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are looked at below
        )
    sizes = {name: (saved, built) for name, saved, built in info["mismatched_keys"]}
    missing = info["missing_keys"] - sizes.keys()
    state = {name: tensor for name, tensor in fresh.state_dict().items() if name not in missing and name not in sizes}
    own = model.state_dict()
    otherwise = {*info["unexpected_keys"], *sizes}
    if otherwise & own.keys():
        by_name, _ = _by_name(model, folder)
        fitting = {name: x for name, x in by_name.items() if name in otherwise and x.shape == own[name].shape}
        state |= fitting
        otherwise -= fitting.keys()
    _check(folder, set(), loaded=set(), unexpected={_with_sizes(name, sizes, own) for name in otherwise})
    result: Any = model.load_state_dict(state, strict=False)
    _check(folder, set(), loaded=set(), unexpected=set(result.unexpected_keys))
    if missing := missing & own.keys():
        logger.warning("%s: the checkpoint lacks %s; they stay as they are", folder, _some(missing))
    return _in_memory_of(state, own)


def _with_sizes(name: str, sizes: dict[str, Any], own: dict[str, Tensor]) -> str:
    if name not in sizes:
        return name
    saved, built = sizes[name]
    return f"{name} {tuple(saved)} instead of {tuple(own[name].shape if name in own else built)}"


def _load_renamed(model: Any, folder: Path) -> set[str]:
    """As `_load_whole`, for a model with an adapter in it: from_pretrained would build it without, and lose `base_layer`."""
    found, unknown = _by_name(model, folder)
    _check(folder, set(), loaded=set(), unexpected=unknown)
    model.load_state_dict(found, strict=False)
    return _in_memory_of(found, model.state_dict())


def _by_name(model: Any, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """The folder's tensors by the model's names, and the keys that the model would not write."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    name_of = {id(tensor): name for name, tensor in state.items()}
    renamed = revert_weight_conversion(model, state)
    on_disk = {key: name_of[id(tensor)] for key, tensor in renamed.items() if id(tensor) in name_of}
    tensors = _read_whole(folder)
    return {on_disk[key]: tensor for key, tensor in tensors.items() if key in on_disk}, tensors.keys() - on_disk.keys()


def _in_memory_of(names: Collection[str], state: dict[str, Tensor]) -> set[str]:
    """`names` and the other names of their tensors: a file has one name of weights that are tied."""
    memory = {state[name].data_ptr() for name in names}
    return {name for name, tensor in state.items() if tensor.data_ptr() in memory}


def _load_injected(model: Any, folder: Path, *, warn: bool) -> set[str]:
    """The weights of the one active adapter that `model.add_adapter` has put in, as its save_pretrained has written them."""
    import peft

    (name,) = dict.fromkeys(model.active_adapters())  # save_pretrained refuses several
    state = {key.removeprefix("base_model.model."): value for key, value in _read_adapter(folder).items()}
    result: Any = peft.set_peft_model_state_dict(model, state, adapter_name=name)
    _check(folder, set(), loaded=set(), unexpected=set(result.unexpected_keys))
    if warn:
        _warn_of_statistics(model, folder)
    return _covered(model, name, state)


def _check_adapter_settings(model: Any, folder: Path) -> None:
    """Before loading: PEFT loads the weights alone, and leaves the scale of the adapter to the one that is there."""
    configs: Any = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        file = folder / name / _SETTINGS  # of "default", or of the only one that add_adapter has put in, beside the weights
        if not file.is_file() and (name == "default" or len(configs) == 1):
            file = folder / _SETTINGS
        saved = _json(file) if file.is_file() else {}
        for key in _OF_THE_ADAPTER:
            if key in saved and hasattr(config, key) and saved[key] != (now := getattr(config, key)):
                raise RuntimeError(f"{file}: expected the model's {key} {now!r}, got {saved[key]!r}; build the adapter as it was")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise RuntimeError(f"{file}: expected a JSON object, got {error}") from error
    if not isinstance(found, dict):
        raise RuntimeError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def base_fingerprint(model: Any) -> str | None:
    """Of the weights under a model's adapters, which no checkpoint holds: up to 64 values of each. None without an adapter.

    Waits for a CUDA device. None also where ZeRO-3 has partitioned them.
    """
    names = _adapters(model)
    if not names or any(map(is_partitioned, model.parameters())):
        return None
    saved = set().union(*(_of_the_file(model, name, state := _adapter_state(model, name), state) for name in names))
    prompts = f"{_PROMPTS}."
    kept = ((name, p) for name, p in model.named_parameters() if name not in saved and not name.startswith(prompts))
    return _weights_digest(kept)


def weights_fingerprint(model: nn.Module) -> str | None:
    """Of all weights of a model: up to 64 values of each that is on a device. None where ZeRO-3 has partitioned them.

    Waits for a CUDA device.
    """
    return None if any(map(is_partitioned, model.parameters())) else _weights_digest(model.named_parameters())


def _weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in weights:
        if parameter.is_meta:
            continue
        x = parameter.detach().flatten()
        picked = torch.linspace(0, max(len(x) - 1, 0), min(_SAMPLED, len(x)), dtype=torch.float64).round().long()
        digest.update(f"{name} {tuple(parameter.shape)} {x.dtype}".encode())
        digest.update(x[picked.to(x.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _adapters(model: Any) -> list[str]:
    """The adapters that a save writes."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return list(model.active_adapters())
    return list(getattr(model, "peft_config", None) or ())


def _check_adapters(model: Any, folder: Path, trained: set[str], *, warn: bool) -> None:
    """After PeftModel has loaded its adapter: are its trained parameters in the file?"""
    name = model.active_adapters[0]
    if not (_has(folder, _ADAPTER) or _has(folder / name, _ADAPTER)):
        _check(folder, trained, loaded=set())  # the file of a whole model has none of the adapter
        return
    place = folder if _has(folder, _ADAPTER) and not _has(folder / name, _ADAPTER) else folder / name
    state = _read_adapter(place)
    known = _adapter_state(model, name).keys() | model.state_dict().keys()
    _check(place, trained, loaded=_covered(model, name, state), unexpected=state.keys() - known)
    if warn:
        _warn_of_statistics(model, place)


def _warn_of_statistics(model: nn.Module, folder: Path) -> None:
    """A batch norm learns its running statistics in training, also when it is frozen; an adapter's file has none of them."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean") and buffer is not None and "modules_to_save" not in name:
            logger.warning(
                "%s: an adapter's checkpoint has no running statistics, and training changes those of %s; give LoraConfig "
                "modules_to_save=[%r], so that they are saved",
                folder,
                name.removesuffix(".running_mean"),
                name.split(".")[-2],
            )
            return


def _adapter_state(model: Any, name: str, embeddings: Any = False) -> dict[str, Tensor]:
    import peft

    return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)


def _covered(model: Any, name: str, state: Collection[str]) -> set[str]:
    """Names of the parameters that the file's keys stand for: PEFT leaves the adapter's name out of them."""
    return _of_the_file(model, name, {key: x for key, x in _adapter_state(model, name).items() if key in state}, state)


def _of_the_file(model: Any, name: str, tensors: dict[str, Tensor], keys: Collection[str]) -> set[str]:
    """Names of the parameters that are these tensors of the model, or that have these keys."""
    memory = {tensor.data_ptr() for tensor in tensors.values()}
    found = {key for key, p in model.named_parameters(remove_duplicate=False) if p.data_ptr() in memory or key in keys}
    return found | ({f"{_PROMPTS}.{name}.embedding.weight"} if "prompt_embeddings" in keys else set())


def _check_saved(model: Any) -> None:
    """Before the training: does something train, and would the files of adapters hold all of it? PEFT writes nothing else."""
    if not _trained(model):
        raise ValueError(
            "model: expected a weight that trains, got none with requires_grad; the freeze() of a teacher that is the same model "
            "freezes it too, so load the teacher separately"
        )
    if not (names := _adapters(model)):
        return
    lost = _trained(model)
    lost -= {key for name in names for key in lost if key.startswith(f"{_PROMPTS}.{name}.")}  # the prompts they make are saved
    for embeddings in (False, "auto"):  # "auto", as save_pretrained does it, may ask the hub
        for name in names if lost else ():
            state = _adapter_state(model, name, embeddings)
            lost -= _of_the_file(model, name, state, state)
    if lost:
        module = sorted(lost)[0].rpartition(".")[0].removeprefix("base_model.model.")
        raise ValueError(
            f"model: expected only weights to train that its adapter's file holds, got {_some(lost)}; each save would lose them. "
            f"Give LoraConfig(modules_to_save=[{module!r}]) their modules, or freeze them by requires_grad_(False)"
        )


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    return _read(next(folder / name for name in _ADAPTER if (folder / name).is_file()))


def _read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a whole model's files, mapped."""
    for index, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
        elif (folder / single).is_file():
            names = [single]
        else:
            continue
        return {key: tensor for name in names for key, tensor in _read(folder / name).items()}
    raise FileNotFoundError(f"{folder}: expected one of {', '.join(_WHOLE)}, got none")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by transformers' own reader: of a .bin file it takes tensors alone."""
    from transformers.modeling_utils import load_state_dict

    return load_state_dict(os.fspath(path), map_location="cpu", weights_only=True)


def _check(folder: Path, trained: set[str], *, loaded: set[str], unexpected: Collection[str] = ()) -> None:
    if missing := trained - loaded:
        raise RuntimeError(
            f"{folder}: expected the weights of every parameter that trains, got none for {_some(missing)}; the training would "
            "go on from their initial values"
        )
    if unexpected:
        raise RuntimeError(
            f"{folder}: expected weights of this model only, got {_some(unexpected)}, which the model does not have; build the "
            "model with the configuration and the adapters that it was saved with"
        )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
