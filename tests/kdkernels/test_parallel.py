"""Vocabulary-parallel loss over gloo: loss, gradients and statistics against one device in float64."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import hidden, relative_error

from kdkernels import fused_linear_caad_loss

VOCAB = 61
CASES = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "alpha_per_token": {"alpha": torch.linspace(0, 3, 23), "temperature": 1.0},
    "plausibility": {"plausibility": 0.2},
    "softcaps": {"student_softcap": 4.0, "teacher_softcap": 6.0, "student_logit_scale": 0.7},
    "vocab_size": {"vocab_size": 40},
    "unreduced": {"reduction": "none"},
    "statistics": {"return_stats": True},
    "ce_only": {"kd_weight": 0.0},
}


def arguments():
    out = hidden(teacher_vocab=64)
    out["target"] = out["target"].clamp(max=39)
    out["student_weight"].requires_grad_()
    out["student_bias"] = torch.linspace(-1, 1, VOCAB).requires_grad_()
    return out


def run(inputs, options):
    inputs = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in inputs.items()}
    loss = fused_linear_caad_loss(**inputs, **options)
    stats = None
    if isinstance(loss, tuple):
        loss, stats = loss
    loss.backward(torch.linspace(1, 2, 23).to(loss.dtype) if loss.dim() else torch.tensor(1.5, dtype=loss.dtype))
    return loss.detach(), [inputs[k].grad for k in ("student_hidden", "student_weight", "student_bias")], stats


def worker(rank, sizes, port, failures):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(sizes))
    try:
        group = dist.group.WORLD
        first = sum(s for s, _ in sizes[:rank])
        rows_s, rows_t = sizes[rank]
        for name, options in CASES.items():
            whole = arguments()
            double = {k: x.double() if x.is_floating_point() else x for k, x in whole.items()}
            expected, expected_grads, expected_stats = run(double, {**options, "impl": "reference"})
            shard = dict(whole)
            shard["student_weight"] = whole["student_weight"].detach()[first : first + rows_s].requires_grad_()
            shard["student_bias"] = whole["student_bias"].detach()[first : first + rows_s].requires_grad_()
            shard["teacher_weight"] = whole["teacher_weight"][first : first + rows_t]
            loss, grads, stats = run(shard, {**options, "process_group": group, "chunk_tokens": 7})
            mine = slice(first, first + rows_s)
            expected_grads[1:] = [g[mine] for g in expected_grads[1:]]
            errors = [relative_error(loss, expected)]
            # A slice beyond vocab_size has no gradient at all.
            errors += [
                relative_error(g, e) if e.abs().sum() else float(g.abs().sum())
                for g, e in zip(grads, expected_grads, strict=True)
                if e.numel()
            ]
            if stats is not None:
                errors += [relative_error(x, e) for x, e in zip(stats, expected_stats, strict=True)]
            if not max(errors) < 1e-5:
                failures.put(f"rank {rank} {name}: {errors}")
        try:
            run({**shard, "teacher_weight": whole["teacher_weight"][: 10 + rank]}, {"process_group": group})
            failures.put("shards that do not line up were accepted")
        except ValueError as error:
            if "same id on every rank" not in str(error):
                failures.put(str(error))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[(31, 31), (30, 33)], [(20, 20), (11, 11), (30, 33)]], ids=["two", "three_uneven"])
def test_ranks_agree_with_one_device(sizes):
    context = mp.get_context("spawn")
    failures = context.SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(sizes, port, failures), nprocs=len(sizes))
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert not found, "\n".join(found)
