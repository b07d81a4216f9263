"""GEMMs that leave row maxima and sums, and the row kernel that reads once: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BF16, FP16, FP32, hidden, on_device, relative_error, to_double
from cases import TRITON_DEVICE as DEVICE

triton_gemm_sums = pytest.importorskip("kdkernels.ops.triton_gemm_sums", reason="needs Triton")
from kdkernels import fused_linear_caad_loss  # noqa: E402
from kdkernels.ops import chunking, linear, triton_caad  # noqa: E402
from kdkernels.ops.rows import LinearTensors, RowSpec  # noqa: E402
from kdkernels.ops.triton_no_logits import _Limits  # noqa: E402

INF = math.inf
INTERPRETED = not isinstance(triton_gemm_sums._one_read_kernel, triton_gemm_sums.triton.JITFunction)
# Of one rounding. Triton's interpreter cuts off what bf16 cannot hold.
ROUNDING = {FP32: 0.0, BF16: 2.0**-7 if INTERPRETED else 2.0**-8, FP16: 2.0**-11}

# NumPy, under the interpreter, warns of what GPUs do silently: infinities in the branch that `where` does not take.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning", "ignore:All-NaN:RuntimeWarning"
    ),
]


TILES_OF = triton_gemm_sums._tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 x 32 on three multiprocessors, so that few tokens and ids have several tiles a program."""
    parts = 2

    def tiles(limits, itemsize, *, heavy, aligned):
        return triton_gemm_sums._Tiles(16, 32, 16, parts, 2, 4)

    monkeypatch.setattr(triton_gemm_sums, "_tiles", tiles)
    real = triton_gemm_sums._device_limits
    monkeypatch.setattr(
        triton_gemm_sums,
        "_device_limits",
        lambda device: _Limits(3, real(device).shared_bytes, real(device).capability),
    )


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("shared_kib", "capability"), [(163, 8), (99, 8), (227, 9), (227, 10), (99, 12)])
def test_tiles_fit_into_shared_memory(shared_kib, capability, heavy, itemsize):
    """Operands of all stages and, where bulk copies store, the part of the tile that is on its way."""
    limits = _Limits(100, shared_kib << 10, capability)
    tiles = TILES_OF(limits, itemsize, heavy=heavy, aligned=True)
    stored = tiles.rows * tiles.columns * itemsize // tiles.parts if capability >= 9 else 0
    assert 2 * tiles.stages * (tiles.rows + tiles.columns) * tiles.inner + stored < shared_kib << 10
    assert tiles.stages >= 2


def made(*shape, dtype=BF16, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def strided(rows, columns, stride, dtype):
    """(rows, columns) of NaN in rows that begin ``stride`` items apart."""
    return torch.full((rows, stride), math.nan, dtype=dtype, device=DEVICE)[:, :columns]


def sums_for(spec, vocab, width, *, logits_dtype=FP32, with_ce=True, bias=None):
    """SummedRows for heads (vocab, width) of bf16; a bias alone is of the student."""
    state, weight = made(2, width), made(vocab, width)
    heads = LinearTensors(state, weight, bias, state, None, weight, None)
    found = triton_gemm_sums.summed_rows(heads, spec, logits_dtype, with_ce=with_ce, want_stats=False)
    assert found is not None
    return found


# -- the GEMM -------------------------------------------------------------------------------------------------------------


# Rows 72 items apart take bulk copies, rows 71 apart pointers.
@pytest.mark.parametrize(
    ("temperature", "softcap", "bias", "summands", "logits_dtype", "stride"),
    [
        (2.0, None, False, 1, BF16, 72),
        pytest.param(2.0, None, False, 1, BF16, 71, marks=pytest.mark.slow),
        pytest.param(1.0, None, True, 2, FP32, 72, marks=pytest.mark.slow),
        pytest.param(3.0, 4.0, False, 2, FP32, 71, marks=pytest.mark.slow),
        pytest.param(1.0, None, False, 1, FP16, 72, marks=pytest.mark.slow),
    ],
)
def test_logits_and_their_sums(temperature, softcap, bias, summands, logits_dtype, stride):
    tokens, vocab, width = 19, 71, 40
    scaled = {"student_scale": 0.5, "student_softcap": softcap, "teacher_scale": 0.5, "teacher_softcap": softcap}
    spec = RowSpec(vocab=vocab, temperature=temperature, **scaled)
    states = [made(tokens, width, seed=i, scale=4.0 ** (1 - i)) for i in range(summands)]
    weight, added = made(vocab, width, seed=2), made(vocab, seed=3) if bias else None
    kernels = sums_for(spec, vocab, width, logits_dtype=logits_dtype, bias=added)
    student, teacher = (strided(tokens, vocab, stride, logits_dtype) for _ in range(2))
    kernels.student(states[0], weight, added, student)
    kernels.teacher(states[0], weight, added, teacher, *states[1:])
    for head, (out, used) in enumerate(((student, states[:1]), (teacher, states))):
        exact = sum(x.double() for x in used) @ weight.double().T + (0.0 if added is None else added.double())
        torch.testing.assert_close(out.double(), exact, rtol=ROUNDING[logits_dtype] + 1e-6, atol=1e-4)
        assert int(out._base.isnan().sum()) == out._base.numel() - out.numel(), "written between rows"
        logits = 0.5 * out.double()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        tiles = torch.nn.functional.pad(logits, (0, -vocab % 32), value=-INF).view(tokens, -1, 32)
        largest = tiles.amax(2)
        below = tiles - largest[:, :, None]
        expected = [largest, (below / temperature).exp().sum(2), below.exp().sum(2)]
        found = kernels.sums[0, head, :, :tokens].double()
        for field in range(3 if head == 0 else 2):
            torch.testing.assert_close(found[field], expected[field], rtol=1e-5, atol=1e-5)


# -- the row kernel -------------------------------------------------------------------------------------------------------


def both_kernels(
    spec, states, weights, bias, target, kd_coef, ce_coef, *, logits_dtype=FP32, grad_dtype=FP32, in_place=False
):
    """(kd, ce, gradient) of the row kernel that reads once, and of the one that reads twice, on the same logits."""
    tokens, vocab = len(states[0]), spec.vocab
    kernels = sums_for(
        spec, vocab, states[0].shape[1], logits_dtype=logits_dtype, with_ce=target is not None, bias=bias
    )
    student, teacher = (strided(tokens, vocab, -(-vocab // 16) * 16, logits_dtype) for _ in range(2))
    kernels.student(states[0], weights[0], bias, student)
    if spec.with_kd:
        kernels.teacher(states[1], weights[1], None, teacher)
    found = []
    for rows in (triton_caad.caad_rows, kernels.rows):  # the last one may write over the logits
        grad = strided(tokens, vocab, vocab + 16, grad_dtype)
        if in_place and rows is not triton_caad.caad_rows:
            grad = linear.gradient_view(student, grad_dtype)
        alpha = torch.zeros(1, device=DEVICE)
        arguments = (student[None], teacher[None], None, target, alpha, kd_coef, ce_coef, spec)
        out = rows(*arguments, grad=grad[None])
        found.append((out.kd, out.ce, grad.float()))
    return found[1], found[0]


def row_case(tokens=7, vocab=71, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = [made(tokens, width, seed=seed + 1), made(tokens, width, seed=seed + 2)]
    weights = [made(vocab, width, seed=seed + 3), made(vocab, width, seed=seed + 4)]
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[1] = -100
    return states, weights, target.to(DEVICE), *(torch.rand(tokens, generator=generator).to(DEVICE) for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "temperature"),
    [("kd and ce", 2.0), ("kd and ce", 1.0), ("kd and ce", 0.7), ("kd", 2.0), ("ce", 2.0), ("no target", 0.7)],
)
def test_rows_agree_with_those_that_read_twice(terms, temperature):
    spec = RowSpec(vocab=71, temperature=temperature, with_kd=terms != "ce", with_ce="ce" in terms)
    states, weights, target, kd_coef, ce_coef = row_case()
    target = None if terms == "no target" else target
    once, twice = both_kernels(spec, states, weights, None, target, kd_coef, ce_coef, in_place=True)
    for mine, other in zip(once, twice, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    if target is not None:
        assert not once[2][1].any() and once[2][0].any()


@pytest.mark.slow
def test_masks_and_nan_as_in_the_kernel_that_reads_twice():
    """Masked ids, an infinite divergence, a masked label, NaN with and without a factor, an illegal target."""
    states, weights, target, kd_coef, ce_coef = row_case(tokens=8)
    for state in states:
        state[2] = math.nan
        state[3] = math.nan  # its factors are 0
    states[1][7] = math.nan  # of the teacher alone, and the distillation term has no factor
    kd_coef[[3, 4, 7]] = 0.0
    ce_coef[3] = 0.0
    bias = torch.zeros(71, dtype=BF16, device=DEVICE)
    bias[[5, 6, 40]] = -INF  # z has mass there
    target[5], target[6] = 71, 5
    once, twice = both_kernels(RowSpec(vocab=71), states, weights, bias, target, kd_coef, ce_coef)
    for mine, other in zip(once, twice, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    kd, ce, grad = once
    assert kd[0] == INF and ce[6] == INF and kd[2].isnan() and grad[2].isnan().any()
    assert grad[5].isnan().any() and not grad[:2, [5, 6, 40]].any()
    if not (INTERPRETED and triton_caad.triton.__version__.startswith("3.6.")):  # whose minimum of a number and NaN is NaN
        assert not grad[3].any() and not grad[7].isnan().any()


# -- the loss -------------------------------------------------------------------------------------------------------------


def loss_and_gradients(arguments, switch, monkeypatch, **options):
    """Loss, gradients of the student's hidden states and head, and whether the kernels of this file ran."""
    monkeypatch.setenv("KDKERNELS_GEMM_SUMS", switch)
    launches, gemm = [], triton_gemm_sums.SummedRows._gemm
    monkeypatch.setattr(triton_gemm_sums.SummedRows, "_gemm", lambda *a, **k: launches.append(1) or gemm(*a, **k))
    arguments = {**arguments}
    leaves = [arguments[k].detach().clone().requires_grad_() for k in ("student_hidden", "student_weight")]
    arguments |= {"student_hidden": leaves[0], "student_weight": leaves[1]}
    loss = fused_linear_caad_loss(**arguments, **options)
    gradients = torch.autograd.grad(loss, leaves)
    monkeypatch.setattr(triton_gemm_sums.SummedRows, "_gemm", gemm)
    return loss.detach(), gradients, len(launches)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "logits_dtype"),
    [({}, None), ({}, BF16), ({"kd_weight": 0.0}, None), ({"temperature": 1.0, "student_softcap": 9.0}, None)],
    ids=str,
)
def test_loss_against_float64(options, logits_dtype, monkeypatch):
    monkeypatch.setitem(chunking.ROW_PADDING, "cpu", 64)  # as on a GPU
    arguments = hidden(n=21, vocab=75, width_s=24, width_t=40, dtype=BF16, scale=0.8)
    exact = to_double(arguments)
    exact["student_weight"].requires_grad_()
    expected = fused_linear_caad_loss(**exact, **options, impl="reference")
    wanted = torch.autograd.grad(expected, [exact["student_hidden"], exact["student_weight"]])
    options = options | {"impl": "triton", "chunk_tokens": 9, "logits_dtype": logits_dtype}
    arguments = on_device(arguments, "triton")
    loss, gradients, launches = loss_and_gradients(arguments, "1", monkeypatch, **options)
    assert launches == 3 * (1 if options.get("kd_weight") == 0.0 else 2)
    budget = 6e-3 if logits_dtype is None else 3e-2
    torch.testing.assert_close(
        loss.cpu().double(), expected.detach(), rtol=1e-5 if logits_dtype is None else 1e-2, atol=0.0
    )
    for mine, exactly in zip(gradients, wanted, strict=True):
        assert relative_error(mine.cpu(), exactly) < budget


@pytest.mark.parametrize(
    "options",
    [{"divergence": "reverse_kl"}, pytest.param({"plausibility": 0.1}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_call_that_one_stream_does_not_serve_stays_as_it_is(options, monkeypatch):
    arguments = on_device(hidden(n=3, vocab=37, dtype=BF16), "triton")
    options = options | {"impl": "triton", "chunk_tokens": 3}
    loss, gradients, launches = loss_and_gradients(arguments, "1", monkeypatch, **options)
    expected, others, _ = loss_and_gradients(arguments, "0", monkeypatch, **options)
    assert launches == 0 and torch.equal(loss, expected)
    assert all(map(torch.equal, gradients, others))


def test_what_it_serves(monkeypatch):
    """Off by default; one stream of one teacher tensor; heads that the tensor cores multiply as they are."""

    def serves(spec=None, impl="triton", *, text=False, want_stats=False, dtype=BF16):
        states, weight = made(2, 16, dtype=dtype), made(8, 16, dtype=dtype)
        heads = LinearTensors(states, weight, None, states, states if text else None, weight, None)
        found = linear.summed_rows_for(impl, heads, None, spec or RowSpec(vocab=8), FP32, want_stats, 1)
        return found is not None

    monkeypatch.delenv("KDKERNELS_GEMM_SUMS", raising=False)
    assert not serves()
    monkeypatch.setenv("KDKERNELS_GEMM_SUMS", "1")
    assert serves() and serves(text=True) and serves(RowSpec(vocab=8, teacher_softcap=9.0))
    assert not serves(RowSpec(vocab=8, teacher_softcap=9.0), text=True)  # the logits of two paths
    assert not any(serves(RowSpec(vocab=8, divergence=x)) for x in ("reverse_kl", "jsd"))
    assert not serves(RowSpec(vocab=8, plausibility=0.1)) and not serves(want_stats=True)
    assert not serves(dtype=FP32) and not serves(impl="cpu") and not serves(impl="cuda")


def test_sums_are_part_of_the_workspace(monkeypatch):
    sizes, take = [], linear.take_scratch
    monkeypatch.setattr(linear, "take_scratch", lambda size, device: sizes.append(size) or take(size, device))
    made_here, make = [], triton_gemm_sums.summed_rows
    monkeypatch.setattr(
        triton_gemm_sums, "summed_rows", lambda *a, **k: made_here.append(make(*a, **k)) or made_here[0]
    )
    workspace = 3 * (2 * 4 * 64 + 2 * 3 * 4 * 2)  # three tokens: two rows of logits, three fields of two tiles for each
    arguments = on_device(hidden(n=4, vocab=64, dtype=BF16), "triton")
    loss_and_gradients(arguments, "1", monkeypatch, impl="triton", workspace_bytes=workspace)
    assert sizes[0] + made_here[0].sums.numel() * 4 == workspace
