"""Several processes, started by torchrun: what they share, and checkpoints from which any number of them can continue.

    torchrun --nproc-per-node 4 -m models train RECIPE run.parallel=fsdp2 ...

A rank is one of these processes. The engines are PyTorch's own: DistributedDataParallel, `fully_shard` (FSDP2),
torch.distributed.checkpoint. Each rank takes its part of a step's examples. The divisors of the objective are summed over ranks,
so a step on W ranks has the gradient of the same step on one. Every rank builds the whole model on its device before anything
is sharded.

A distributed checkpoint is a folder `step-00000120` with

    shard-*.safetensors   each rank's part of the trained weights and of the optimiser's tensors, with its offsets
    trainer.json          step, the optimiser's numbers, what the loop adds
    manifest.json         size and SHA-256 of each file; written last

It is written under a temporary name and renamed when every rank has finished, in a file system that all ranks see. It does not
depend on the number of ranks: tensors are read by name and offset. It holds no pickle, so nothing in it can run code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdkernels.layer_states import decoder_layers
from models.io_utils import atomic_dir
from models.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_manifest,
    check_same_entries,
    find_checkpoint,
    prune_checkpoints,
    write_manifest,
)
from models.training.recipe_sections import PARALLEL

FORMAT = "distributed 1"
_TRAINER = "trainer.json"
Item = TypeVar("Item")


class RankError(RuntimeError):
    """Another rank has ended, or has other numbers than this one; earlier checkpoints stay."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; with the defaults it is the only one."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    @contextlib.contextmanager
    def started_by_torchrun(cls, device: torch.device, strategy: str) -> Iterator[Ranks]:
        """Join the process group that torchrun describes, if torchrun started this process, and leave it afterwards.

        After an exception the group is not left: that could wait for ranks that wait for this one. The process has to end then,
        and torchrun ends the others within its --shutdown-timeout (TORCH_ELASTIC_SHUTDOWN_TIMEOUT; 30 s).

        Args:
            device: for a CUDA device the ranks take that of their local rank, and exchange by nccl; else they exchange by gloo.
            strategy: "none": join no group.

        Raises:
            ValueError: "none" in one of several processes.
            RankError: an exchange failed because another rank has ended.
        """
        started = int(os.environ.get("WORLD_SIZE", 0))
        if strategy == "none" and started > 1:
            raise ValueError(f"run.parallel: expected ddp or fsdp2 in {started} processes of torchrun, got 'none'")
        if strategy == "none" or not started:
            yield cls(device)
            return
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # DDP imports this module, and its functions keep the default group of the time of their import. Imported after the
        # group's start, it holds the group and the threads of gloo until the interpreter ends. A thread that frees a tensor
        # then ends the process by SIGABRT.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        ranks = cls(device, dist.get_rank(), dist.get_world_size())
        try:
            yield ranks
            gc.collect()  # a DDP wrapper holds the group, and lies in a circle of references
            dist.barrier()  # DTensor's cache holds the group after FSDP2: here a thread of gloo frees the last exchange's tensors
        except RuntimeError as error:
            if not _is_of_the_exchange(error):
                raise
            first_line = str(error).splitlines()[0]
            raise RankError(
                f"rank {ranks.rank} of {ranks.size}: another rank has ended ({first_line}); the last checkpoint stays, "
                "run.resume=auto continues from it"
            ) from error
        dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def own(self, items: Sequence[Item]) -> list[Item]:
        """This rank's share of a step's items: every `size`-th. The lengths of two shares differ by at most one."""
        return list(items[self.rank :: self.size])

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on each of them."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank, for a decision that must be the same on all of them."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: Item) -> list[Item]:
        """The values of all ranks in their order, on each of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], Item]) -> Item:
        """What `function` returns on the first rank, on every rank. Its CheckpointError is raised on every rank too."""
        result: list[Any] = [None, None]
        if self.is_first:
            try:
                result[0] = function()
            except CheckpointError as error:
                result[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise CheckpointError(result[1])
        return result[0]


def _is_of_the_exchange(error: RuntimeError) -> bool:
    """Whether an exchange between ranks raised it; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def parallelize(step: nn.Module, strategy: str, ranks: Ranks, *, lm: nn.Module | None = None) -> nn.Module:
    """`step` prepared for `strategy`; its forward computes the loss and holds the whole model.

    The loss has to be in that forward: FSDP2 gathers the LM head there, and DDP sees there which weights take part.

    Args:
        step: on its device, with the same weights on every rank.
        strategy: "none"; "ddp": every rank holds all weights; "fsdp2": each of the LM's layers is sharded, and so is the rest of
            `step`, which is changed in place. Weights that train in a rarer dtype stay whole on every rank, such as a float32
            connector beside a bfloat16 LM that trains.
        lm: with "fsdp2" its layers are sharded one by one (see `kdkernels.layer_states.decoder_layers`); None: no layer is.

    Both engines average gradients over ranks: multiply the loss by `ranks.size`, and sum its divisors over ranks. With "fsdp2"
    every rank has to call `step` as often as the others, and to use the same weights in it. With "ddp", if a weight took part in
    some part of a step, it has to take part in the last one on some rank (see `gradient_sync`). Otherwise gradients differ.

    Raises:
        ValueError: another strategy, "none" on several ranks, or no process group.
    """
    if strategy not in PARALLEL:
        raise ValueError(f"strategy: expected one of {', '.join(PARALLEL)}, got {strategy!r}")
    if strategy == "none":
        if ranks.size > 1:
            raise ValueError(f"strategy: expected ddp or fsdp2 on {ranks.size} ranks, got 'none'")
        return step
    if not dist.is_initialized():
        raise ValueError(f"strategy: {strategy!r} needs a process group; start with torchrun (one process will do)")
    if strategy == "ddp":
        # A part may leave some weights out on one rank: without the search the other ranks would wait for their gradients.
        return nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    whole = _refused_by_fsdp2(step)
    for parameter in whole:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_averaged)
    for layer in [] if lm is None else decoder_layers(lm):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    return fully_shard(step, mesh=mesh, ignored_params=whole)


def _refused_by_fsdp2(step: nn.Module) -> set[nn.Parameter]:
    """Scalars, and weights that train in a rarer dtype: FSDP2 reduces gradients of one dtype only."""
    elements: Counter[torch.dtype] = Counter()
    for parameter in step.parameters():
        elements[parameter.dtype] += parameter.numel() * parameter.requires_grad
    most = max(elements, key=elements.__getitem__, default=None)
    return {p for p in step.parameters() if not p.dim() or (p.requires_grad and p.dtype != most)}


def _averaged(parameter: Tensor) -> None:
    """Average a gradient over ranks. What it holds of earlier parts is the same on all ranks, and averaging keeps that."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def gradient_sync(step: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of one part of an optimiser step: DDP exchanges gradients in the last part only.

    FSDP2 reduces its shards in every part: so the gradient stays sharded.
    """
    ddp = isinstance(step, nn.parallel.DistributedDataParallel)
    return step.no_sync() if ddp and not last else contextlib.nullcontext()


def parameter_groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups for an optimiser: sharded parameters and whole ones, since torch cannot update a mixture of both at once."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(hasattr(parameter, "full_tensor"), []).append(parameter)
    return [{"params": group} for group in groups.values()]


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, also where some parameters are sharded. Returns the norm of all as a plain tensor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if hasattr(g, "full_tensor")]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    whole = [g for g in gradients if not hasattr(g, "full_tensor")]
    norms = [nn.utils.get_total_norm(sharded).full_tensor(), nn.utils.get_total_norm(whole)]
    norm = torch.linalg.vector_norm(torch.stack([x.to(norms[0]) for x in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        local.mul_(factor.to(local.device))
    return norm


def make_whole(model: nn.Module, ranks: Ranks) -> None:
    """Make sharded parameters whole on the CPU of the first rank, one by one, to save them after the last step."""
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a tied LM head stays tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not hasattr(parameter, "full_tensor"):
                continue
            if parameter not in whole:
                full = parameter.detach().full_tensor()
                whole[parameter] = nn.Parameter(full.cpu(), parameter.requires_grad) if ranks.is_first else parameter
            module.register_parameter(name, whole[parameter])


def save_distributed(
    root: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer_state: Mapping[str, Any],
    ranks: Ranks,
    keep_last: int = 2,
) -> Path:
    """Write `root/step-XXXXXXXX`; every rank has to make the call.

    Args:
        root: in a file system that all ranks see; `keep_last` checkpoints up to this step stay in it, and none of a later step.
        model: the one whose parameters the optimiser holds, not a DDP wrapper; its frozen parameters are not saved.
        trainer_state: what JSON can hold; that of the first rank is written.

    Returns:
        the folder.

    Raises:
        CheckpointError: on every rank, if one could not write or does not see the folder; nothing of this checkpoint stays.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    path = Path(root) / f"step-{step:08d}"
    tensors, numbers = _state(model, optimizer)
    with atomic_dir(path) if ranks.is_first else contextlib.nullcontext() as made:
        folder = ranks.from_first(lambda: made)
        sees = ranks.gather(folder.is_dir())
        if not all(sees):
            raise CheckpointError(
                f"{root}: expected a folder that all ranks see, but rank {sees.index(False)} does not see what rank 0 made there"
            )
        with _checkpointing(path):
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))  # waits for every rank

        def finish() -> None:
            plain = {name: _to_json(value) for name, value in numbers.items()}
            trainer = {"step": step, "optimizer": plain, "state": dict(trainer_state)}
            try:
                (folder / _TRAINER).write_text(json.dumps(trainer, allow_nan=False), encoding="utf-8")
                write_manifest(folder, step, FORMAT)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be written: {error}") from error

        ranks.from_first(finish)
    if ranks.is_first:
        prune_checkpoints(root, path, keep_last)
    return ranks.from_first(lambda: path)  # no rank continues before the folder has its name


def find_distributed(root: str | Path, resume: str, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint that `run.resume` asks for, its files checked by the first rank; see `find_checkpoint`.

    Returns:
        path, step and `trainer`; `load_distributed` reads the tensors.

    Raises:
        CheckpointError: on every rank.
    """

    def read(path: Path) -> Checkpoint:
        check_manifest(path, FORMAT, {_TRAINER})
        trainer = json.loads((path / _TRAINER).read_text(encoding="utf-8"))
        return Checkpoint(path=path, step=trainer["step"], model={}, optimizer={}, trainer=trainer)

    return ranks.from_first(lambda: find_checkpoint(root, resume, read))


def load_distributed(checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint back into `model` and `optimizer`, however they are sharded now; every rank has to make the call.

    Args:
        checkpoint: from `find_distributed`.

    Raises:
        CheckpointError: it is of another model or optimiser, and the message names a tensor; or a rank cannot read it.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    path, saved_numbers = checkpoint.path, checkpoint.trainer["optimizer"]
    tensors, numbers = _state(model, optimizer)
    with _checkpointing(path):
        reader = HuggingFaceStorageReader(str(path))
        saved = {name: tuple(x.size) for name, x in reader.read_metadata().state_dict_metadata.items()}
        saved |= dict.fromkeys(saved_numbers, "a number")
        expected = {name: tuple(x.shape) for name, x in tensors.items()} | dict.fromkeys(numbers, "a number")
        check_same_entries(path, "model or optimiser", saved, expected)
        load(tensors, storage_reader=reader)
    numbers = {name: _from_json(saved_numbers[name], value) for name, value in numbers.items()}
    state: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for name, value in {**tensors, **numbers}.items():
        part, _, key = name.partition(".")
        state[part][key] = value
    options = StateDictOptions(strict=False, flatten_optimizer_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is saved, by name: tensors, and values that are the same on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    # If a parameter has two names (a tied LM head), the first is saved, because safetensors refuses tensors that share memory.
    first = {name for name, _ in model.named_parameters()}
    for name in {name for name, _ in model.named_parameters(remove_duplicate=False)} - first:
        parts["model"].pop(name, None)
    everything = {f"{part}.{key}": value for part, entries in parts.items() for key, value in entries.items()}
    tensors = {name: value for name, value in everything.items() if isinstance(value, Tensor) and value.dim()}
    return tensors, {name: value for name, value in everything.items() if name not in tensors}


@contextlib.contextmanager
def _checkpointing(path: Path) -> Iterator[None]:
    """Around torch.distributed.checkpoint: its exception becomes a CheckpointError, which every rank raises.

    Its warning that there is no process group is hidden: one process is a number of ranks like any other.
    """
    from torch.distributed.checkpoint import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"{path}: rank {rank}: {type(cause).__name__}: {cause}") from None


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):  # a step counter
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _from_json(value: Any, like: Any) -> Any:
    if isinstance(like, Tensor):
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    return tuple(value) if isinstance(like, tuple) else value
