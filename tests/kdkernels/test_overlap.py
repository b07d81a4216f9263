"""Row kernels on a second stream: on the CPU with streams that do nothing until someone waits, on a GPU with its own."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from cases import BF16, FP32, hidden, on_device

from kdkernels import fused_linear_caad_loss
from kdkernels.ops import linear, overlap, schema
from kdkernels.ops.rows import RowResult

LEAVES = ("student_hidden", "student_weight", "student_bias")


def gradients(arguments, **options):
    arguments = arguments | {k: arguments[k].detach().clone().requires_grad_() for k in LEAVES}
    loss = fused_linear_caad_loss(**arguments, **({"impl": "cpu"} | options))
    return [loss.detach(), *torch.autograd.grad(loss, [arguments[k] for k in LEAVES])]


def case(dtype):
    arguments = hidden(n=23, vocab=61, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    return arguments | {"student_bias": torch.randn(61, generator=generator).to(dtype)}


class LazyStreams:
    """The caller's stream is the program itself. What is asked of the second one runs when the caller's waits for it."""

    def __init__(self) -> None:
        self.waiting, self.started, self.ended = [], 0, 0
        self.may_start = False  # whether the second stream was told to wait for the caller's since its last launch
        self.on_second = False
        self.most_under_way = 0
        self.caller = SimpleNamespace(
            wait_event=self.run_until, wait_stream=lambda second: self.run_until(self.started)
        )
        self.second = SimpleNamespace(wait_stream=self.second_waits, record_event=lambda: self.started)

    def second_waits(self, other) -> None:
        assert other is self.caller
        self.may_start = True

    @contextlib.contextmanager
    def stream(self, chosen):
        assert chosen is self.second
        self.on_second = True
        yield
        self.on_second = False

    def late(self, rows):
        return functools.partial(self.launched, rows)

    def launched(self, rows, *arguments, **options) -> RowResult:
        """In place of a kernel's launch: NaN for now."""
        assert self.on_second and self.may_start
        self.may_start = False
        n = arguments[0].shape[1]
        out = RowResult.empty(n, 0, torch.device("cpu"))
        for result in (out.kd, out.ce):
            result.fill_(torch.nan)

        def run() -> None:
            found = rows(*arguments, **options)
            out.kd.copy_(found.kd)
            out.ce.copy_(found.ce)

        self.waiting.append(run)
        self.started += 1
        self.most_under_way = max(self.most_under_way, len(self.waiting))
        return out

    def run_until(self, launch: int) -> None:
        while self.ended < launch:
            self.waiting.pop(0)()
            self.ended += 1


@pytest.fixture
def lazy(monkeypatch):
    streams = LazyStreams()
    marked = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams.caller)
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    monkeypatch.setattr(overlap, "_second_stream", lambda device: streams.second)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: marked.append(stream))
    monkeypatch.setattr(schema, "overlap_wanted", lambda device: True)
    launcher = schema.row_launcher
    monkeypatch.setattr(schema, "row_launcher", lambda impl: streams.late(launcher(impl)))
    yield streams
    assert streams.started == streams.ended and not streams.waiting
    assert len(marked) == 2 * streams.started and all(x is streams.caller for x in marked)


@pytest.mark.parametrize(("dtype", "logits_dtype"), [(FP32, None), (BF16, None), (BF16, BF16)])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 21, 64])  # the last is one chunk
def test_the_same_bits_from_a_second_stream_that_comes_as_late_as_it_may(dtype, logits_dtype, chunk_tokens, request):
    options = {"chunk_tokens": chunk_tokens, "logits_dtype": logits_dtype}
    expected = gradients(case(dtype), **options)
    lazy = request.getfixturevalue("lazy")
    for mine, other in zip(gradients(case(dtype), **options), expected, strict=True):
        assert torch.equal(mine, other)
    assert lazy.most_under_way == (
        1 if chunk_tokens == 64 else 2
    )  # rows of a chunk run beside the next chunk's products


@pytest.mark.slow
def test_two_chunks_have_sums_of_their_own(monkeypatch, request):
    """The same with GEMMs that leave the rows' sums: those of the next chunk come before the rows of this one are read."""
    gemm_sums = pytest.importorskip("kdkernels.ops.triton_gemm_sums", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("these streams are the CPU's, and Triton's kernels run on the GPU")
    monkeypatch.setattr(gemm_sums, "_tiles", lambda *_, **__: gemm_sums._Tiles(16, 32, 16, 1, 2, 4))
    monkeypatch.setenv("KDKERNELS_GEMM_SUMS", "1")
    options = {"chunk_tokens": 6, "impl": "triton"}
    expected = gradients(case(BF16), **options)
    lazy = request.getfixturevalue("lazy")
    rows, made = gemm_sums.SummedRows.rows.fget, []

    def late(sums):
        made.append(sums)
        # Where its sums lie is settled when a kernel is launched, not when it runs.
        return lambda *a, **k: lazy.launched(functools.partial(of_chunk, sums, sums.chunk), *a, **k)

    def of_chunk(sums, chunk, *arguments, **options):
        now, sums.chunk = sums.chunk, chunk
        out = rows(sums)(*arguments, **options)
        sums.chunk = now
        return out

    monkeypatch.setattr(gemm_sums.SummedRows, "rows", property(late))
    for mine, other in zip(gradients(case(BF16), **options), expected, strict=True):
        assert torch.equal(mine, other)
    assert made and lazy.most_under_way == 2


def test_both_sets_of_scratch_are_within_the_workspace(lazy, monkeypatch):
    sizes, take = [], linear.take_scratch
    monkeypatch.setattr(linear, "take_scratch", lambda size, device: sizes.append(size) or take(size, device))
    workspace = 2 * 2 * 4 * 61 * 3  # two sets for three tokens
    gradients(case(FP32), workspace_bytes=workspace)
    assert sizes == [workspace] and lazy.started == 8


def test_the_caller_waits_for_the_second_stream_also_where_a_product_fails(lazy, monkeypatch):
    product, calls = linear.gemm, []

    def fails_at_the_second_chunk(*arguments):
        calls.append(1)
        if len(calls) == 3:  # a chunk has two
            raise RuntimeError("no memory")
        return product(*arguments)

    monkeypatch.setattr(linear, "gemm", fails_at_the_second_chunk)
    with pytest.raises(RuntimeError, match="no memory"):
        gradients(case(FP32), chunk_tokens=5)
    assert lazy.started == 1  # and the fixture looks that it ended


def test_it_is_off_by_default_and_for_cuda_alone(monkeypatch):
    from kdkernels.ops.dispatch import overlap_wanted

    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.delenv("KDKERNELS_OVERLAP", raising=False)
    assert not overlap_wanted(cuda)
    monkeypatch.setenv("KDKERNELS_OVERLAP", "1")
    assert overlap_wanted(cuda) and not overlap_wanted(cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("sums", ["0", "1"])
def test_gpu_two_streams_give_the_bits_of_one(sums, monkeypatch):
    arguments = on_device(case(BF16), "triton")
    monkeypatch.setenv("KDKERNELS_GEMM_SUMS", sums)
    options = {"chunk_tokens": 5, "impl": "triton"}
    expected = gradients(arguments, **options)
    monkeypatch.setenv("KDKERNELS_OVERLAP", "1")
    for _ in range(20):
        for mine, other in zip(gradients(arguments, **options), expected, strict=True):
            assert torch.equal(mine, other)
