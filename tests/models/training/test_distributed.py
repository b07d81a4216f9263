"""DDP and FSDP2 against one device; checkpoints from which another number of ranks continues (gloo, tiny models)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kdkernels import fused_linear_caad_loss
from models.training.checkpoint import CheckpointError
from models.training.distributed import (
    Ranks,
    clip_grad_norm,
    find_distributed,
    gradient_sync,
    load_distributed,
    make_whole,
    parallelize,
    parameter_groups,
    save_distributed,
)

CPU = torch.device("cpu")
VOCAB, WIDTH, TEACHER_WIDTH, LENGTH, EXAMPLES = 67, 16, 12, 9, 8


def make_lm(seed=0, layers=2):
    """Embeddings and head are one tensor; another one is frozen."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    lm = LlamaForCausalLM(config)
    lm.model.layers[0].mlp.requires_grad_(False)
    return lm


class Step(nn.Module):
    """The loss inside a forward, as `parallelize` wants it."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        lm.scale = nn.Parameter(torch.tensor(1.0))  # FSDP2 does not shard a scalar

    def forward(self, ids, target, index, audio, text, teacher_weight, total):
        hidden = self.lm.model(input_ids=ids).last_hidden_state.flatten(0, 1)[index] * self.lm.scale
        return fused_linear_caad_loss(
            hidden, self.lm.lm_head.weight, audio, text, teacher_weight, target, kd_normalizer=total, ce_normalizer=total
        )


def example(number):
    """(ids, number of the columns that predict, teacher's states), the same wherever it is asked for."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    return ids, 1 + number % 4, torch.randn(2, LENGTH, TEACHER_WIDTH, generator=generator)


def make_part(numbers):
    rows = [example(number) for number in numbers]
    index = [row * LENGTH + n for row, (_, count, _) in enumerate(rows) for n in range(count)]
    target = torch.cat([ids[1 : 1 + count] for ids, count, _ in rows])
    audio, text = (torch.cat([states[path, :count] for _, count, states in rows]) for path in (0, 1))
    return torch.stack([ids for ids, *_ in rows]), target, torch.tensor(index), audio, text


def make_training(strategy, ranks, *, seed=0, layers=2):
    lm = make_lm(seed, layers)
    step = parallelize(Step(lm), strategy, ranks, lm=lm)
    # A large eps: where a gradient is nearly 0, Adam would otherwise turn its rounding into whole steps.
    groups = parameter_groups([p for p in lm.parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(groups, lr=0.03, eps=1e-2, foreach=True)  # as on a CUDA device
    return lm, step, optimizer


def train_steps(step, optimizer, numbers, ranks):
    """Optimiser steps `numbers`, two parts each; [(loss, gradient's norm)] of the whole step."""
    teacher_weight = torch.randn(VOCAB, TEACHER_WIDTH, generator=torch.Generator().manual_seed(99))
    seen = []
    for number in numbers:
        drawn = torch.randperm(100, generator=torch.Generator().manual_seed(number))[:EXAMPLES].tolist()
        mine = ranks.own(drawn)
        half = len(mine) // 2
        parts = [make_part(mine[:half]), make_part(mine[half:])]
        total = ranks.sum(torch.tensor(float(sum(len(target) for _, target, *_ in parts))))
        optimizer.zero_grad()
        losses = torch.zeros(())
        for number_of_part, part in enumerate(parts):
            with gradient_sync(step, number_of_part == len(parts) - 1):
                loss = step(*part, teacher_weight, total)
                (loss * ranks.size).backward()
            losses += loss.detach()
        norm = clip_grad_norm([p for p in step.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        seen.append((float(ranks.sum(losses)), float(norm)))
    return seen


def whole_weights(lm):
    return {name: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in lm.named_parameters()}


@pytest.fixture(scope="module")
def one_device():
    """Six steps without interruption."""
    torch.set_num_threads(1)
    ranks = Ranks(CPU)
    lm, step, optimizer = make_training("none", ranks)
    seen = train_steps(step, optimizer, range(6), ranks)
    return seen, {name: p.clone() for name, p in whole_weights(lm).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def six_steps(failures, strategy):
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    lm, step, optimizer = make_training(strategy, ranks)
    seen = train_steps(step, optimizer, range(6), ranks)
    sharded = [name for name, p in lm.named_parameters() if hasattr(p, "placements")]
    if bool(sharded) != (strategy == "fsdp2"):
        failures.put(f"{strategy}: sharded are {sharded}")
    return seen, whole_weights(lm)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_take_the_steps_of_one(one_device, strategy):
    for seen, weights in run_ranks(six_steps, 2, strategy):
        assert seen == [pytest.approx(pair, rel=1e-4) for pair in one_device[0]]
        same(weights, one_device[1])
    assert len({round(loss, 3) for loss, _ in one_device[0]}) == 6 and one_device[0][0][1] > 1.0  # it is clipped


def phase(failures, folder, strategy, numbers):
    """Continues from the checkpoint in `folder`, with wrong weights before that, and saves."""
    ranks = Ranks(CPU)
    if dist.is_initialized():
        ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    checkpoint = find_distributed(folder, "auto", ranks)
    lm, step, optimizer = make_training(strategy, ranks, seed=0 if checkpoint is None else 5)
    if checkpoint is not None:
        # What is frozen is not in a checkpoint.
        right = dict(make_lm(0).named_parameters())
        for name, parameter in lm.named_parameters():
            if not parameter.requires_grad:
                copy_into(parameter, right[name])
        load_distributed(checkpoint, model=lm, optimizer=optimizer)
        assert (checkpoint.step, checkpoint.trainer["state"]) == (numbers[0], {"note": "kept"}), checkpoint
    train_steps(step, optimizer, numbers, ranks)
    state = {"note": "kept"}
    save_distributed(folder, numbers[-1] + 1, model=lm, optimizer=optimizer, trainer_state=state, ranks=ranks, keep_last=2)
    return whole_weights(lm)


def copy_into(parameter, whole):
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        placed = hasattr(parameter, "placements")
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements) if placed else whole)


@pytest.mark.slow
def test_two_ranks_then_one_then_more(one_device, tmp_path):
    """Three divide neither the examples nor the widths."""
    run_ranks(phase, 2, tmp_path, "fsdp2", [0, 1])
    phase(None, tmp_path, "none", [2, 3])
    for strategy, size in (("ddp", 2), ("fsdp2", 3)):
        folder = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{strategy}")
        for weights in run_ranks(phase, size, folder, strategy, [4, 5]):
            same(weights, one_device[1])
        assert sorted(p.name for p in folder.iterdir()) == ["step-00000004", "step-00000006"]  # two are kept


def saved(tmp_path, *, steps=(1,), **options):
    ranks = Ranks(CPU)
    lm, step, optimizer = make_training("none", ranks, **options)
    train_steps(step, optimizer, range(1), ranks)
    for number in steps:
        save_distributed(tmp_path, number, model=lm, optimizer=optimizer, trainer_state={}, ranks=ranks)
    return lm, step, optimizer


def test_continuing_is_bitwise_on_the_same_number_of_ranks(tmp_path):
    _, step, optimizer = saved(tmp_path)
    expected = train_steps(step, optimizer, [7, 8], Ranks(CPU))
    lm, step, optimizer = make_training("none", Ranks(CPU))
    load_distributed(find_distributed(tmp_path, "auto", Ranks(CPU)), model=lm, optimizer=optimizer)
    assert train_steps(step, optimizer, [7, 8], Ranks(CPU)) == expected


def test_no_pickle_in_a_checkpoint(tmp_path):
    saved(tmp_path)
    suffixes = {path.suffix for path in (tmp_path / "step-00000001").iterdir()}
    assert suffixes == {".safetensors", ".json"}


class TestErrors:
    def test_damaged_missing_and_fallback(self, tmp_path):
        saved(tmp_path, steps=(1, 2))
        (shard,) = (tmp_path / "step-00000002").glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{shard.name}: damaged: its SHA-256.*run.resume=fallback continues from it"):
            find_distributed(tmp_path, "auto", Ranks(CPU))
        assert find_distributed(tmp_path, "fallback", Ranks(CPU)).path.name == "step-00000001"
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"{shard.name}: missing"):
            find_distributed(tmp_path, str(tmp_path / "step-00000002"), Ranks(CPU))
        assert find_distributed(tmp_path, "never", Ranks(CPU)) is None
        assert find_distributed(tmp_path / "nothing", "auto", Ranks(CPU)) is None

    def test_other_model_and_other_optimizer(self, tmp_path):
        saved(tmp_path, layers=3)
        found = find_distributed(tmp_path, "auto", Ranks(CPU))
        lm, _, optimizer = make_training("none", Ranks(CPU))
        with pytest.raises(CheckpointError, match=r"of another model or optimiser: model\.\S+layers\.2\.\S+ is .* missing here"):
            load_distributed(found, model=lm, optimizer=optimizer)
        lm, *_ = make_training("none", Ranks(CPU), layers=3)
        optimizer = torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        with pytest.raises(CheckpointError, match=r"optimizer\.\S+ is .* missing here"):
            load_distributed(found, model=lm, optimizer=optimizer)

    def test_checkpoint_of_another_format(self, tmp_path):
        saved(tmp_path)
        manifest = tmp_path / "step-00000001" / "manifest.json"
        manifest.write_text(manifest.read_text().replace("distributed 1", "distributed 9"))
        with pytest.raises(CheckpointError, match="checkpoint format distributed 1 expected, got distributed 9"):
            find_distributed(tmp_path, "auto", Ranks(CPU))

    def test_strategies(self):
        lm = make_lm()
        with pytest.raises(ValueError, match="strategy: expected one of none, ddp, fsdp2, got 'zero'"):
            parallelize(Step(lm), "zero", Ranks(CPU))
        with pytest.raises(ValueError, match="strategy: expected ddp or fsdp2 on 2 ranks, got 'none'"):
            parallelize(Step(lm), "none", Ranks(CPU, 1, 2))
        with pytest.raises(ValueError, match="'ddp' needs a process group; start with torchrun"):
            parallelize(Step(lm), "ddp", Ranks(CPU))


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Ranks.started_by_torchrun(CPU, "ddp") as ranks:
        assert ranks == Ranks(CPU) and ranks.is_first and not dist.is_initialized()
        assert ranks.own([1, 2, 3]) == [1, 2, 3] and ranks.any(True) and not ranks.any(False) and ranks.gather(5) == [5]
    monkeypatch.setenv("WORLD_SIZE", "1")  # some clusters set it always
    with Ranks.started_by_torchrun(CPU, "none"):
        assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"run.parallel: expected ddp or fsdp2 in 2 processes of torchrun, got 'none'"):
        Ranks.started_by_torchrun(CPU, "none").__enter__()


def made_whole(failures):
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    lm, step, optimizer = make_training("fsdp2", ranks)
    train_steps(step, optimizer, range(1), ranks)
    expected = whole_weights(lm)
    make_whole(lm, ranks)
    if ranks.is_first:
        if lm.lm_head.weight is not lm.model.embed_tokens.weight:
            failures.put("the head is not tied any more")
        found = {name: p.detach() for name, p in lm.named_parameters()}
        if not all(type(p) is torch.Tensor and torch.equal(p, expected[name]) for name, p in found.items()):
            failures.put("not the weights that were sharded")


def test_whole_for_saving():
    run_ranks(made_whole, 2)


def cannot_write(failures, folder, how):
    """The second rank does not see the first's folder, or fails to write its part; {rank: what it raised}."""
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    lm, step, optimizer = make_training("fsdp2", ranks)
    train_steps(step, optimizer, range(1), ranks)
    keep = {"model": lm, "optimizer": optimizer, "trainer_state": {}, "ranks": ranks}
    save_distributed(folder, 1, **keep)
    if ranks.rank == 1 and how == "apart":
        Path.is_dir = lambda self: False
    if ranks.rank == 1 and how == "full":
        import torch.distributed.checkpoint as dcp

        def write_data(*_):
            raise OSError(28, "No space left on device")

        dcp.HuggingFaceStorageWriter.write_data = write_data
    try:
        save_distributed(folder, 2, **keep)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [("apart", "expected a folder that all ranks see, but rank 1 does not see"), ("full", "rank 1: OSError: .*No space left")],
)
def test_a_checkpoint_that_one_rank_cannot_write_fails_on_all(tmp_path, how, message):
    raised = run_ranks(cannot_write, 2, tmp_path, how)
    assert raised[0] == raised[1] and re.search(message, raised[0]), raised
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def shares(failures):
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    return ranks.own(list(range(5))), ranks.any(ranks.rank == 1), ranks.sum(torch.tensor(ranks.rank + 1.0)).item()


def test_shares_of_two_ranks():
    assert run_ranks(shares, 2) == [([0, 2, 4], True, 3.0), ([1, 3], True, 3.0)]
