"""Rows over several ranks: every implementation of a rank's part against whole rows in float64. The ranks are threads.

Triton's cases run on the GPU where there is one, else in its interpreter; all others on the CPU.
"""

from __future__ import annotations

import math
import threading
import types

import pytest
import torch
from cases import on_device, relative_error

from kdkernels import parallel
from kdkernels.ops import reference
from kdkernels.ops.dispatch import shard_launcher
from kdkernels.ops.rows import RowProblem, RowSpec

IMPLEMENTATIONS = ("reference", "cpu", "triton")
CUTS = (40, 0, 1157, 3)  # columns of each rank: less than a block of the CPU kernel, none, more than one
VOCAB, ROWS = sum(CUTS), 5
CASES = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 1.0},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "own_softmax_of_the_label": {"temperature": 3.0},
    "plausibility": {"plausibility": 0.05},
    "plausibility_1": {"plausibility": 1.0, "teacher_softcap": 20.0},
    "jsd_plausibility": {"plausibility": 0.05, "divergence": "jsd"},
    "softcaps": {"student_softcap": 4.0, "teacher_softcap": 6.0, "student_scale": 0.7, "teacher_scale": 1.2},
    "kd_alone": {"with_ce": False},
    "ce_alone": {"with_kd": False},
}


class Threads:
    """Stands for torch.distributed: the ranks are threads of this process that take turns, and meet in the collectives."""

    ReduceOp = types.SimpleNamespace(MAX="max")

    def __init__(self, ranks: int) -> None:
        self.ranks, self.turn, self.meet, self.told = ranks, threading.Lock(), threading.Barrier(ranks, timeout=60), {}
        self.me = threading.local()

    def run(self, task) -> list:
        results: dict = {}

        def one(rank: int) -> None:
            self.me.rank = rank
            with self.turn:
                try:
                    results[rank] = task(rank)
                except BaseException as error:
                    results[rank] = error
                    self.meet.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [x for x in results.values() if isinstance(x, BaseException)]
        for error in sorted(
            errors, key=lambda x: isinstance(x, threading.BrokenBarrierError)
        ):  # the cause before its effects
            raise error
        return [results[rank] for rank in range(self.ranks)]

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        self.told[self.me.rank] = mine.clone()
        self._wait()
        every = [self.told[rank] for rank in range(self.ranks)]
        self._wait()
        return every

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.meet.wait()
        finally:
            self.turn.acquire()

    def get_rank(self, group) -> int:
        return self.me.rank

    def get_world_size(self, group) -> int:
        return self.ranks

    def all_gather(self, into, mine, group) -> None:
        for x, told in zip(into, self._all(mine), strict=True):
            x.copy_(told)

    def all_reduce(self, mine, op=None, group=None) -> None:
        every = torch.stack(self._all(mine))
        mine.copy_(every.amax(0) if op == "max" else every.sum(0))


def whole_rows(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    student, audio, text = ((torch.randn(ROWS, VOCAB, generator=g) * 3).to(dtype) for _ in range(3))
    target = torch.tensor([2, -100, 45, VOCAB - 1, 700])
    alpha = torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0])
    return student, audio, text, target, alpha, torch.linspace(0.5, 1.5, ROWS), torch.linspace(1.5, 0.5, ROWS)


def exact(tensors, spec, want_stats=False):
    """(kd, ce, stats, gradient) of one device in float64."""
    student, audio, text, target, alpha, kd_coef, ce_coef = tensors
    leaf = student.double().requires_grad_()
    counts = (kd_coef != 0, ce_coef != 0)
    out = reference.caad_rows(
        leaf, audio.double(), text.double(), target, alpha, spec, want_stats=want_stats, counts=counts
    )
    loss = torch.where(kd_coef == 0, 0, kd_coef * out.kd) + torch.where(ce_coef == 0, 0, ce_coef * out.ce)
    return out.kd.detach(), out.ce.detach(), out.stats, torch.autograd.grad(loss.sum(), leaf)[0]


def over_ranks(monkeypatch, impl, tensors, spec, want_stats=False, grad_dtype=None):
    """What exact returns, from slices: results of every rank, and the gradient put together."""
    student, audio, text, target, alpha, kd_coef, ce_coef = on_device(tensors, impl)
    threads = Threads(len(CUTS))
    monkeypatch.setattr(parallel, "dist", threads)

    def one(rank):
        first = sum(CUTS[:rank])
        here = RowSpec(**{**vars(spec), "vocab": CUTS[rank]})
        s, a, t = (x[None, :, first : first + CUTS[rank]].clone() for x in (student, audio, text))
        grad = s if grad_dtype is None else s.view(grad_dtype)[..., : CUTS[rank]]
        problem = RowProblem(s, a, t, target, alpha, kd_coef, ce_coef, here, grad, want_stats)
        out = parallel._solve_rows(problem, group=None, first=first, vocab=VOCAB, shard=shard_launcher(impl))
        return on_device(out, "cpu"), grad[0].float().cpu()

    results = threads.run(one)
    for out, _ in results[1:]:
        torch.testing.assert_close(
            (out.kd, out.ce), (results[0][0].kd, results[0][0].ce), rtol=0, atol=0, equal_nan=True
        )
    return results[0][0], torch.cat([g for _, g in results], dim=1)


def check(got, gradient, expected, tolerance=1e-5, of_gradient=1e-5):
    kd, ce, stats, exact_gradient = expected
    for x, e in ((got.kd, kd), (got.ce, ce), *([] if stats is None else zip(got.stats, stats, strict=True))):
        torch.testing.assert_close(x.double(), e.double(), rtol=tolerance, atol=tolerance)
    assert relative_error(gradient, exact_gradient) < of_gradient


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_slices_give_the_whole_row(monkeypatch, impl, name):
    tensors, spec = whole_rows(), RowSpec(vocab=VOCAB, **CASES[name])
    check(*over_ranks(monkeypatch, impl, tensors, spec), exact(tensors, spec))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_statistics(monkeypatch, impl):
    tensors, spec = whole_rows(), RowSpec(vocab=VOCAB)
    tensors[1][3, 45], tensors[0][3, 45] = 30.0, 20.0  # one row agrees on its top token
    check(*over_ranks(monkeypatch, impl, tensors, spec, want_stats=True), exact(tensors, spec, want_stats=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_narrower_gradient_in_the_students_memory(monkeypatch, impl):
    tensors, spec = whole_rows(), RowSpec(vocab=VOCAB)
    got, gradient = over_ranks(monkeypatch, impl, tensors, spec, grad_dtype=torch.bfloat16)
    check(got, gradient, exact(tensors, spec), of_gradient=4e-3)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masks_and_rows_that_do_not_count(monkeypatch, impl, divergence):
    """-inf and finite masks on all sides, a rank that is masked throughout, NaN where a row has no factor or is ignored."""
    tensors, spec = whole_rows(), RowSpec(vocab=VOCAB, divergence=divergence)
    student, audio, text, _, _, kd_coef, ce_coef = tensors
    student[0, :40] = audio[0, :40] = text[0, :40] = -math.inf  # all of the first rank, the label among them
    student[2, 100:300] = torch.finfo(torch.float32).min  # an infinite forward_kl
    audio[3, 5:9] = -math.inf  # an infinite reverse_kl
    text[4, 900] = -2e30
    student[1] = audio[1] = math.nan  # ignored
    student[4] = math.nan
    kd_coef[4] = ce_coef[4] = 0
    got, gradient = over_ranks(monkeypatch, impl, tensors, spec)
    kd, ce, _, exact_gradient = exact(tensors, spec)
    silent = torch.tensor([False, False, False, False, True])
    for x, e in ((got.kd, kd), (got.ce, ce)):
        torch.testing.assert_close(x.double()[~silent], e.double()[~silent], rtol=1e-5, atol=1e-5)
    assert got.kd[4].isnan() and not gradient[4].any()
    assert relative_error(gradient, exact_gradient) < 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_bad_targets_reach_the_result_of_every_rank(monkeypatch, impl):
    tensors, spec = whole_rows(), RowSpec(vocab=VOCAB)
    student, audio, _, target, alpha, _, _ = tensors
    target[0] = VOCAB
    alpha[2] = -1.0
    student[3, 50] = math.nan
    audio[4, 50] = math.nan
    got, gradient = over_ranks(monkeypatch, impl, tensors, spec)
    assert got.kd.isnan().tolist() == [False, False, True, True, True]
    assert got.ce.isnan().tolist() == [True, False, False, True, False]
    assert gradient[[0, 2, 3, 4]].isnan().any(1).all() and not gradient[1].any()
