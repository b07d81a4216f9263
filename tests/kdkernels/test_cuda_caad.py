"""The CUDA C++ row kernel against the eager formula in float64: on the GPU where there is one, emulated on the CPU everywhere.

The emulation (csrc/cuda/emulate_rows.cpp) runs the kernel's own arithmetic, layout, copies and order of merging, thread by
thread; and, in some tests, the kernel's own code with its threads in random orders. What only the GPU shows is whether the
primitives under it, in PTX, do what is expected of them.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdkernels import explain
from kdkernels.ops import cuda_caad, dispatch, reference
from kdkernels.ops import rows as row_problems
from kdkernels.ops.rows import DIVERGENCES, RowResult, RowSpec

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INF = math.inf
SHARED_BYTES = 232448  # what a block of an H100 can have
SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "emulate_rows.cpp"
# Relative error of one rounding to nearest; the kernel's own arithmetic is float32.
ROUNDING = {FP32: 0.0, BF16: 2.0**-8, FP16: 2.0**-11}


# -- both ways to run it ------------------------------------------------------------------------------------------------


class RowTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_uint64),
        ("stride_outer", ctypes.c_int64),
        ("stride_inner", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


class RowProblem(ctypes.Structure):
    """csrc/cuda/row_problem.h, field by field."""

    _fields_ = [
        *((x, ctypes.c_int64) for x in ("outer", "inner", "vocab", "student_width")),
        *((x, RowTensor) for x in ("student", "audio", "text", "grad")),
        *((x, ctypes.c_uint64) for x in ("target", "alpha")),
        ("alpha_stride", ctypes.c_int64),
        *((x, ctypes.c_uint64) for x in ("kd_coef", "ce_coef", "kd", "ce")),
        *((x, ctypes.c_int64) for x in ("ignore_index", "divergence", "has_plausibility", "with_kd", "with_ce")),
        *((x, ctypes.c_float) for x in ("temperature", "jsd_beta", "log_plausibility")),
        *((x, ctypes.c_float) for x in ("student_scale", "teacher_scale", "student_softcap", "teacher_softcap")),
    ]


class Emulated:
    device = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.emulator = library
        assert library.row_problem_bytes() == ctypes.sizeof(RowProblem)

    def __call__(self, *arguments, grad=None, blocks=2, clusters=2) -> RowResult:
        given = row_problems.RowProblem(*arguments, grad=grad)
        assert cuda_caad.misfit(given) is None
        kd, ce = torch.full((2, given.rows), math.nan).unbind(0)
        result = RowResult(kd=kd, ce=ce, stats=None)
        problem = RowProblem()
        keep = cuda_caad.fill_problem(problem, RowTensor, given, result)
        arrangement = self.start(problem, blocks, clusters)
        del keep
        assert arrangement >= 0, "the row does not fit"
        return result

    def start(self, problem: RowProblem, blocks: int, clusters: int) -> int:
        return self.emulator.emulate_rows(ctypes.byref(problem), blocks, SHARED_BYTES, ctypes.c_int64(clusters))


class Scheduled(Emulated):
    """The kernel's own code, its threads in the order of a seed wherever its barriers leave one."""

    def __init__(self, library: ctypes.CDLL, seed: int) -> None:
        super().__init__(library)
        self.seed = seed

    def start(self, problem: RowProblem, blocks: int, clusters: int) -> int:
        address, clusters = ctypes.byref(problem), ctypes.c_int64(clusters)
        arrangement = self.emulator.run_kernel(address, blocks, SHARED_BYTES, clusters, ctypes.c_uint64(self.seed))
        assert arrangement != -2, "a deadlock, or copies used as they may not be"
        return arrangement


class OnDevice:
    device = "cuda"

    def __init__(self) -> None:
        reason = cuda_caad.unavailable(torch.cuda.current_device())
        if reason is not None:  # test_gpu_the_kernel_is_there fails where that should not be
            pytest.skip(reason)

    def __call__(self, *arguments, grad=None, blocks=2, clusters=None) -> RowResult:
        return cuda_caad.caad_rows(*arguments, grad=grad, blocks=blocks)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++ to compile the emulation")
    path = tmp_path_factory.mktemp("emulate_rows") / "emulate_rows.so"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        str(SOURCE),
        "-o",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def rows(request):
    return Emulated(request.getfixturevalue("emulator")) if request.param == "emulated" else OnDevice()


# -- inputs and comparison ----------------------------------------------------------------------------------------------


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in rows that begin at multiples of 16 bytes, with NaN between them."""
    batch, seq, width = tensor.shape
    wide = torch.full((batch, seq, -(-width // 8) * 8 + 8), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., :width] = tensor
    return wide[..., :width]


def make(rows, n=4, vocab=331, *, dtypes=(FP32, FP32), seed=0, scale=3.0, targets=True):
    """student, audio, text (1, n, vocab), target (n,) with one ignored row, alpha, kd_coef and ce_coef (n,)."""
    g = torch.Generator().manual_seed(seed)
    student, audio, text = (
        aligned((torch.randn(1, n, vocab, generator=g) * scale).to(dtype)).to(rows.device)
        for dtype in (dtypes[0], dtypes[1], dtypes[1])
    )
    if rows.device != "cpu":  # a copy to another device loses the padding
        student, audio, text = map(aligned, (student, audio, text))
    target = torch.randint(0, vocab, (n,), generator=g) if targets else None
    if targets and n > 1:
        target[1] = -100
    alpha, kd_coef, ce_coef = (torch.rand(n, generator=g).to(rows.device) * 2 for _ in range(3))
    if n > 2:
        alpha[2] = 0.0
    return student, audio, text, None if target is None else target.to(rows.device), alpha, kd_coef, ce_coef


def oracle(student, audio, text, target, alpha, kd_coef, ce_coef, spec):
    """(RowResult, gradient) in float64; the gradient over the student's full width."""
    leaf = student.double().detach().requires_grad_()
    text = None if text is None else text.double()
    result = reference.caad_rows(leaf, audio.double(), text, target, alpha.double(), spec)
    # Rows of infinite or undefined loss would make the sum's gradient NaN elsewhere too.
    total = (result.kd * kd_coef).nan_to_num(0, 0, 0).sum() + (result.ce * ce_coef).nan_to_num(0, 0, 0).sum()
    total = total + (leaf * 0.0).nan_to_num(0, 0, 0).sum()
    total.backward()
    return result, leaf.grad


def run(rows, *arguments, grad_dtype=None, **options):
    student = arguments[0]
    grad = aligned(torch.full(student.shape, math.nan, dtype=grad_dtype or student.dtype, device=student.device))
    result = rows(*arguments, grad=grad, **options)
    memory = grad._base
    assert int(memory.isnan().sum()) - int(grad.isnan().sum()) == memory.numel() - grad.numel(), "written between rows"
    return result, grad


def check(rows, arguments, spec, *, grad_dtype=None, **options):
    result, grad = run(rows, *arguments, spec, grad_dtype=grad_dtype, **options)
    expected, expected_grad = oracle(*arguments, spec)
    scale = float(expected_grad.abs().max())
    for actual, exact in ((result.kd, expected.kd), (result.ce, expected.ce)):
        torch.testing.assert_close(actual.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    # A quarter of the step between subnormals is what rounding to fp16 leaves of tiny gradients.
    budget = ROUNDING[grad.dtype] * expected_grad.abs() + 1e-5 * scale + (2.0**-25 if grad.dtype == FP16 else 0.0)
    budget = budget + 2.0**-21  # probabilities of 1 that cancel (a vocabulary of one) leave their rounding
    error = (grad.double() - expected_grad).abs()
    assert bool((error <= budget).all()), f"gradient off by {float((error - budget).max())} beyond its budget"


def names(value):
    return "-".join(str(x).removeprefix("torch.") for x in value) if isinstance(value, tuple) else None


# -- agreement with the formula -----------------------------------------------------------------------------------------

DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (BF16, FP32)]


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [320, 331])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_fp64(rows, divergence, temperature, vocab):
    check(rows, make(rows, vocab=vocab), RowSpec(vocab=vocab, divergence=divergence, temperature=temperature))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=names)
def test_dtypes_match_fp64(rows, dtypes, divergence):
    check(rows, make(rows, vocab=331, dtypes=dtypes), RowSpec(vocab=331, divergence=divergence))
    spec = RowSpec(vocab=1320, divergence=divergence, temperature=1.0)
    check(rows, make(rows, vocab=1320, dtypes=dtypes, seed=1), spec, blocks=4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 255, 257, 1000, 2049])
def test_any_width(rows, vocab, divergence):
    check(rows, make(rows, vocab=vocab), RowSpec(vocab=vocab, divergence=divergence))


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP32, BF16)], ids=names)
@pytest.mark.parametrize(("vocab", "blocks"), [(4097, 1), (9001, 1), (20011, 2), (20011, 8), (20011, 16), (70000, 8)])
def test_slices_and_chunks(rows, vocab, blocks, dtypes):
    """One and several chunks a block, whole and begun; one to 16 blocks a cluster, also such that have no columns."""
    check(rows, make(rows, 3, vocab, dtypes=dtypes), RowSpec(vocab=vocab), blocks=blocks)
    if blocks == 8:
        spec = RowSpec(vocab=vocab, divergence="jsd", plausibility=0.01, temperature=3.0)
        check(rows, make(rows, 3, vocab, dtypes=dtypes, seed=1), spec, blocks=blocks)


@pytest.mark.parametrize("n", [1, 5, 11])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_clusters_go_from_row_to_row(rows, divergence, n):
    """More rows than clusters, with runs of ignored rows at the start, in the middle and at the end."""
    arguments = make(rows, n, 600, dtypes=(BF16, FP32))
    if n == 11:
        arguments[3][torch.tensor([0, 1, 4, 5, 6, 7, 8, 10])] = -100
    for clusters in (1, 2, 3):
        check(rows, arguments, RowSpec(vocab=600, divergence=divergence), clusters=clusters)


def test_all_rows_ignored(rows):
    arguments = make(rows, 5, 300)
    arguments[3][:] = -100
    result, grad = run(rows, *arguments, RowSpec(vocab=300))
    assert not result.kd.any() and not result.ce.any() and not grad.any()


@pytest.mark.parametrize("grad_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradient_of_another_dtype(rows, dtype, grad_dtype):
    check(rows, make(rows, vocab=261, dtypes=(dtype, dtype)), RowSpec(vocab=261), grad_dtype=grad_dtype)


OPTIONS = {
    "no text": {},
    "no target": {},
    "kd alone": {"with_ce": False},
    "ce alone": {"with_kd": False},
    "neither": {"with_kd": False, "with_ce": False},
    "plausibility": {"plausibility": 0.05},
    "scales": {"student_scale": 0.3, "teacher_scale": 0.7},
    "student softcap": {"student_softcap": 4.0},
    "teacher softcap": {"teacher_softcap": 4.0},
    "softcaps and scales": {
        "student_softcap": 30.0,
        "teacher_softcap": 5.0,
        "student_scale": 0.5,
        "teacher_scale": 2.0,
    },
    "jsd beta": {"jsd_beta": 0.1},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(rows, option, divergence):
    if option == "plausibility" and divergence == "reverse_kl":
        pytest.skip("not defined: the front end refuses it")
    student, audio, text, target, *rest = make(rows, vocab=257, seed=3)
    text = None if option == "no text" else text
    target = None if option == "no target" else target
    number = list(OPTIONS).index(option) + DIVERGENCES.index(divergence)
    temperature = (1.0, 2.0, 3.0)[number % 3]
    spec = RowSpec(vocab=257, divergence=divergence, temperature=temperature, **OPTIONS[option])
    check(rows, (student, audio, text, target, *rest), spec)


def test_no_gradient_gives_the_same_losses(rows):
    arguments = make(rows)
    for divergence in DIVERGENCES:
        spec = RowSpec(vocab=331, divergence=divergence)
        expected, _ = run(rows, *arguments, spec)
        result = rows(*arguments, spec)
        assert torch.equal(result.kd, expected.kd) and torch.equal(result.ce, expected.ce)


def test_one_alpha_for_all_rows(rows):
    *inputs, kd_coef, ce_coef = make(rows)
    inputs[-1] = torch.tensor([1.5], device=rows.device)
    check(rows, (*inputs, kd_coef, ce_coef), RowSpec(vocab=331))


def test_near_convergence_keeps_its_digits(rows):
    student, audio, text, target, alpha, *rest = make(rows, vocab=2049, seed=5)
    z = audio + alpha[:, None] * (audio - text)
    arguments = (aligned(z + 1e-2 * student), audio, text, target, alpha, *rest)
    for divergence in DIVERGENCES:
        spec = RowSpec(vocab=2049, divergence=divergence, with_ce=False)
        expected, _ = oracle(*arguments, spec)
        actual, _ = run(rows, *arguments, spec)
        assert float(expected.kd.detach().max()) < 1e-3
        torch.testing.assert_close(actual.kd.double(), expected.kd.detach(), rtol=2e-2, atol=5e-7)
        assert not (actual.kd < 0).any()


def test_large_constants_cancel(rows):
    """Rows shifted by 1000: the logits' own rounding is all that is left."""
    student, audio, text, *rest = make(rows, seed=6)
    check(rows, (aligned(student + 1000), aligned(audio - 1000), aligned(text - 1000), *rest), RowSpec(vocab=331))


# -- layouts --------------------------------------------------------------------------------------------------------------


def layouts(tensor):
    """Views of the same values (B, T, V), last stride 1, with poison between the rows."""
    batch, seq, vocab = tensor.shape
    wide = aligned(tensor)
    swapped = aligned(tensor.transpose(0, 1)).transpose(0, 1)
    sliced = aligned(torch.full((batch, 3 * seq, vocab), math.nan, dtype=tensor.dtype, device=tensor.device))[:, 1::3]
    sliced.copy_(tensor)
    return [wide, swapped, sliced]


@pytest.mark.parametrize("vocab", [47, 96])
def test_strides(rows, vocab):
    student, audio, text, *rest = make(rows, 6, vocab)
    student, audio, text = (x.reshape(2, 3, vocab) for x in (student, audio, text))
    spec = RowSpec(vocab=vocab)
    aligned_inputs = [aligned(x) for x in (student, audio, text)]
    result, expected = run(rows, *aligned_inputs, *rest, spec)
    for i, (s, a, t) in enumerate(zip(layouts(student), layouts(audio)[::-1], layouts(text), strict=True)):
        grad = layouts(torch.full_like(student, math.nan))[i]
        other = rows(s, a, t, *rest, spec, grad=grad)
        assert torch.equal(other.kd, result.kd) and torch.equal(grad, expected)
        assert int(grad._base.isnan().sum()) == grad._base.numel() - grad.numel(), "written outside of the rows"


def test_rows_that_are_one_row(rows):
    """Stride 0: a (1, 1, V) text path expanded over all rows."""
    student, audio, text, *rest = make(rows, 4, 96)
    check(rows, (student, audio, text[:, :1].expand(1, 4, 96), *rest), RowSpec(vocab=96))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("widths", [(80, 80), (90, 64), (64, 90), (700, 61)])
def test_columns_beyond_the_vocabulary(rows, widths, dtype):
    student, audio, text, *rest = make(rows, 4, 700, dtypes=(dtype, dtype))
    student, audio, text = aligned(student[..., : widths[0]]), audio[..., : widths[1]], text[..., : widths[1]]
    student[..., 60:], audio[..., 60:], text[..., 60:] = math.nan, math.nan, math.nan
    rest[0] = rest[0].clamp_max(59)
    spec = RowSpec(vocab=60)
    _, grad = run(rows, student, audio, text, *rest, spec)
    expected, expected_grad = run(rows, aligned(student[..., :60]), audio, text, *rest, spec)
    assert torch.isfinite(expected.kd).all()
    assert torch.equal(grad[..., :60], expected_grad)
    assert not grad[..., 60:].any()


@pytest.mark.parametrize(
    ("dtypes", "divergence"),
    [
        ((FP32, FP32), "forward_kl"),
        ((FP32, BF16), "forward_kl"),
        ((FP32, BF16), "reverse_kl"),
        ((FP32, BF16), "jsd"),
        ((FP32, FP16), "forward_kl"),
        ((BF16, BF16), "forward_kl"),
    ],
    ids=names,
)
@pytest.mark.parametrize(("vocab", "width"), [(332, 332), (320, 336), (4000, 9000)])
def test_gradient_over_the_student(rows, vocab, width, dtypes, divergence):
    """In place, also with smaller items: the same bits as into memory of its own."""
    student, *others = make(rows, 4, width, dtypes=(dtypes[0], FP32))
    others[2] = others[2].clamp_max(vocab - 1)
    spec = RowSpec(vocab=vocab, divergence=divergence)
    expected, expected_grad = run(rows, student, *others, spec, grad_dtype=dtypes[1], blocks=4)
    memory = student.contiguous().clone() if width % 8 == 0 else aligned(student)
    items = dtypes[0].itemsize // dtypes[1].itemsize
    storage = memory if memory._base is None else memory._base
    grad = storage.view(dtypes[1]).as_strided(student.shape, (0, storage.shape[-1] * items, 1))
    result = rows(memory, *others, spec, grad=grad, blocks=4)
    assert torch.equal(result.kd, expected.kd) and torch.equal(result.ce, expected.ce)
    assert torch.equal(grad, expected_grad)


# -- masked tokens, undefined rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_masked_everywhere(rows, divergence, temperature):
    student, audio, text, target, *rest = make(rows, vocab=300)
    for x in (student, audio, text):
        x[..., 100:180] = -INF
    target[target >= 100] %= 100
    check(
        rows, (student, audio, text, target, *rest), RowSpec(vocab=300, divergence=divergence, temperature=temperature)
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("path", [1, 2])
def test_tokens_masked_on_one_teacher_path(rows, path, divergence):
    arguments = make(rows, vocab=300)
    arguments[path][..., 64:200] = -INF
    arguments[path][..., 17] = -INF
    check(rows, arguments, RowSpec(vocab=300, divergence=divergence))


def test_forward_kl_is_inf_where_only_the_student_is_masked(rows):
    arguments = make(rows, vocab=300)
    arguments[0][0, 0, 200] = -INF
    arguments[3][0] = 7
    result, grad = run(rows, *arguments, RowSpec(vocab=300))
    assert result.kd[0] == INF and torch.isfinite(result.kd[1:]).all() and torch.isfinite(result.ce).all()
    assert torch.isfinite(grad).all() and grad[0, 0, 200] == 0 and grad[0, 0].any()


def test_reverse_kl_is_inf_where_only_the_teacher_is_masked(rows):
    arguments = make(rows, vocab=300)
    arguments[1][0, 0, 200] = -INF
    spec = RowSpec(vocab=300, divergence="reverse_kl", with_ce=False)
    result, grad = run(rows, *arguments, spec)
    assert result.kd[0] == INF and torch.isfinite(result.kd[1:]).all()
    assert not grad[0, 0].any() and torch.isfinite(grad).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_masked_throughout_teaches_nothing(rows, divergence):
    arguments = make(rows, vocab=300)
    arguments[1][0, 0] = -INF
    arguments[2][0, 3] = -INF
    result, grad = run(rows, *arguments, RowSpec(vocab=300, divergence=divergence, with_ce=False))
    assert result.kd[0] == 0 and result.kd[3] == 0 and not grad[0, [0, 3]].any()
    assert torch.isfinite(result.kd).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_masked_throughout_gives_no_nan(rows, divergence):
    arguments = make(rows, vocab=300)
    arguments[0][0, 0] = -INF
    result, grad = run(rows, *arguments, RowSpec(vocab=300, divergence=divergence))
    assert float(result.kd[0]) == {"forward_kl": INF, "reverse_kl": 0.0}.get(divergence, float(result.kd[0]))
    if divergence == "jsd":  # p meets m = p / 2 and q has no mass
        assert float(result.kd[0]) == pytest.approx(4 * 0.5 * math.log(2), rel=1e-6)
    assert float(result.ce[0]) == INF and not grad[0, 0].any() and torch.isfinite(grad).all()


def test_a_masked_label_is_inf(rows):
    arguments = make(rows, vocab=300)
    arguments[3][0] = 7
    arguments[0][0, 0, 7] = -INF
    result, grad = run(rows, *arguments, RowSpec(vocab=300, with_kd=False))
    q1 = torch.softmax(arguments[0][0, 0].double(), -1) * arguments[-1][0].double()
    assert result.ce[0] == INF and torch.isfinite(result.ce[1:]).all()
    torch.testing.assert_close(grad[0, 0].double(), q1, rtol=1e-5, atol=1e-7)


def test_finite_masks(rows):
    """The lowest bf16 and fp32 numbers, as libraries write masks, act as -inf."""
    arguments = make(rows, vocab=300)
    arguments[3].clamp_max_(199)
    for x in arguments[:3]:
        x[..., 200:250] = torch.finfo(BF16).min
        x[..., 250:] = torch.finfo(FP32).min
    narrow = [aligned(x[..., :200]) for x in arguments[:3]]
    expected, expected_grad = run(rows, *narrow, *arguments[3:], RowSpec(vocab=200))
    result, grad = run(rows, *arguments, RowSpec(vocab=300))
    torch.testing.assert_close(result.kd, expected.kd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.ce, expected.ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[..., :200], expected_grad, rtol=1e-5, atol=1e-6)
    assert not grad[..., 200:].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_a_finite_mask_on_one_side_alone_is_minus_infinity(rows, side, divergence):
    spec = RowSpec(vocab=300, divergence=divergence)
    results = []
    for mask in (-INF, torch.finfo(FP32).min, -3e30):
        arguments = make(rows, vocab=300)
        arguments[3].clamp_max_(199)
        arguments[side][..., 200:250] = mask
        result, grad = run(rows, *arguments, spec)
        results.append((result.kd, result.ce, grad))
    assert not any(x.isnan().any() for x in results[0])
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_is_not_hidden(rows, divergence):
    for which, row, column in ((0, 0, 277), (1, 2, 0), (2, 3, 120)):
        arguments = make(rows, vocab=300)
        arguments[which][0, row, column] = math.nan
        result, grad = run(rows, *arguments, RowSpec(vocab=300, divergence=divergence))
        assert result.kd.isnan().nonzero().flatten().tolist() == [row]
        assert result.ce.isnan().any() == (which == 0)
        assert grad[0, row].isnan().all()
        assert torch.isfinite(grad[0, [i for i in range(4) if i != row]]).all()


def test_ignored_rows_are_not_read(rows):
    arguments = make(rows, vocab=300)
    for x in arguments[:3]:
        x[0, 1] = math.nan
    for x in arguments[4:]:
        x[1] = math.nan
    result, grad = run(rows, *arguments, RowSpec(vocab=300), clusters=1)
    assert result.kd[1] == 0 and result.ce[1] == 0 and not grad[0, 1].any()
    assert torch.isfinite(result.kd).all() and torch.isfinite(result.ce).all() and torch.isfinite(grad).all()


def test_text_is_not_read_where_alpha_is_zero(rows):
    arguments = make(rows, vocab=300)
    expected, expected_grad = run(rows, *arguments, RowSpec(vocab=300), clusters=1)
    arguments[2][0, 2] = math.nan
    result, grad = run(rows, *arguments, RowSpec(vocab=300), clusters=1)
    assert torch.equal(result.kd, expected.kd) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("label", [300, -1, 2**40, -(2**40)])
def test_a_label_out_of_range_is_nan(rows, label):
    arguments = make(rows, vocab=300)
    arguments[3][0] = label
    result, grad = run(rows, *arguments, RowSpec(vocab=300))
    assert result.ce[0].isnan() and grad[0, 0].isnan().all()
    assert torch.isfinite(result.kd).all() and torch.isfinite(result.ce[1:]).all() and torch.isfinite(grad[0, 1:]).all()


@pytest.mark.parametrize("label", [0, 3, 4, 127, 128, 255, 256, 299])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_label_has_an_owner(rows, label, dtype):
    """At the ends of halves, groups and slices."""
    arguments = make(rows, 3, 300, dtypes=(dtype, FP32))
    arguments[3][:] = label
    check(rows, arguments, RowSpec(vocab=300, temperature=1.0), blocks=4)


@pytest.mark.parametrize("alpha", [-0.5, INF, math.nan])
def test_an_illegal_alpha_is_nan(rows, alpha):
    arguments = make(rows, vocab=300)
    arguments[4][0] = alpha
    result, grad = run(rows, *arguments, RowSpec(vocab=300))
    assert result.kd[0].isnan() and grad[0, 0].isnan().all()
    assert torch.isfinite(result.ce).all() and torch.isfinite(result.kd[1:]).all() and torch.isfinite(grad[0, 1:]).all()


def test_no_rows(rows):
    arguments = make(rows, 0, 64, targets=False)
    result, grad = run(rows, *arguments, RowSpec(vocab=64))
    assert result.kd.shape == (0,) and grad.shape == (1, 0, 64)


def test_every_bf16_and_fp16_value(emulator):
    """All 2-byte logits are read as what they are: the label's ce is log sum e^s - s of the row itself."""
    rows = Emulated(emulator)
    for dtype in (BF16, FP16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        values = values[values.isfinite() & (values.float().abs() < 80)]
        student = torch.zeros(1, 1, -(-values.numel() // 8) * 8, dtype=dtype)
        student[0, 0, : values.numel()] = values
        one = torch.ones(1)
        spec = RowSpec(vocab=student.shape[-1], with_kd=False)
        target = torch.tensor([5])
        check(rows, (student, student, None, target, one, one, one), spec, blocks=1)


# -- the kernel's own code, in any order of threads ------------------------------------------------------------------------

SCHEDULES = {
    "one block, chunks": ({"vocab": 9001}, {"blocks": 1, "clusters": 2}, {}),
    "two blocks, fp32": ({"vocab": 600}, {"blocks": 2, "clusters": 1}, {}),
    "four blocks, mixed": ({"vocab": 17000, "dtypes": (FP32, BF16)}, {"blocks": 4, "clusters": 2}, {}),
    "reverse": ({"vocab": 5000, "dtypes": (BF16, BF16)}, {"blocks": 2, "clusters": 1}, {"divergence": "reverse_kl"}),
    "jsd, plausibility": (
        {"vocab": 5000, "dtypes": (BF16, BF16)},
        {"blocks": 2, "clusters": 2},
        {"divergence": "jsd", "plausibility": 0.01, "temperature": 3.0},
    ),
    "softcap": ({"vocab": 300}, {"blocks": 4, "clusters": 1}, {"student_softcap": 4.0, "temperature": 1.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", SCHEDULES)
def test_no_order_of_threads_changes_a_bit(emulator, case, seed):
    """Rows follow each other through the same shared memory, some are ignored, one does without its text path."""
    inputs, launch, options = SCHEDULES[case]
    arguments = make(Emulated(emulator), 5, **inputs, seed=seed)
    spec = RowSpec(vocab=inputs["vocab"], **options)
    expected, expected_grad = run(Emulated(emulator), *arguments, spec, **launch)
    result, grad = run(Scheduled(emulator, seed), *arguments, spec, **launch)
    assert torch.equal(result.kd, expected.kd) and torch.equal(result.ce, expected.ce)
    assert torch.equal(grad, expected_grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_order_of_threads_overwrites_logits_before_they_are_read(emulator, dtype):
    student, *others = make(Emulated(emulator), 4, 8000)
    spec = RowSpec(vocab=8000)
    expected, expected_grad = run(Emulated(emulator), student, *others, spec, grad_dtype=dtype)
    for seed in range(2):
        memory = student.contiguous().clone()
        grad = memory.view(dtype).as_strided(student.shape, (0, 8000 * 4 // dtype.itemsize, 1))
        result = Scheduled(emulator, seed)(memory, *others, spec, grad=grad, clusters=2)
        assert torch.equal(result.kd, expected.kd) and torch.equal(grad, expected_grad)


# -- what does not fit ------------------------------------------------------------------------------------------------------


def misfit(student, audio, text, grad, spec, **options) -> str | None:
    one = torch.ones(1)
    return cuda_caad.misfit(row_problems.RowProblem(student, audio, text, None, one, one, one, spec, grad, **options))


def test_what_does_not_fit_is_named():
    x = torch.zeros(1, 4, 64)
    spec = RowSpec(vocab=64)
    assert misfit(x, x, x, x, spec) is None
    assert misfit(x[..., 4:], x[..., 4:], None, None, RowSpec(vocab=60)) is None
    assert "want_stats: expected False, got True" in misfit(x, x, None, None, spec, want_stats=True)
    assert "audio: expected float32, bfloat16 or float16, got torch.float64" in misfit(x, x.double(), None, None, spec)
    assert "text: expected rows that begin at multiples of 16 bytes" in misfit(
        x[..., :60], x[..., :60], x[..., 1:61], None, RowSpec(vocab=60)
    )
    odd = torch.zeros(1, 4, 61)
    assert "student: expected rows" in misfit(odd, x, None, None, RowSpec(vocab=61))
    assert "strides of 244 bytes" in misfit(odd, x, None, None, RowSpec(vocab=61))
    assert "grad: expected rows" in misfit(x, x, None, odd, RowSpec(vocab=61))
    # The last 16 bytes of a row of 61 reach past the end of this tensor, and not where the vocabulary is padded.
    one = torch.zeros(1, 1, 61)
    assert "student: expected memory for whole 16 bytes" in misfit(one, x, None, None, RowSpec(vocab=61))
    assert misfit(x[..., :61], x, None, None, RowSpec(vocab=61)) is None
    # Without kd the teacher's logits do not count.
    assert misfit(x, odd, odd, None, RowSpec(vocab=61, with_kd=False)) is None


def test_unsafe_overlaps_are_refused():
    memory = torch.zeros(3 * 64 + 8, dtype=BF16)
    inside = memory[: 3 * 64].view(1, 3, 64)
    with pytest.raises(ValueError, match="grad: expected memory of its own"):
        cuda_caad.check_overlap(inside, memory[8:].view(1, 3, 64))
    with pytest.raises(ValueError, match=r"torch\.float32 over torch\.bfloat16"):
        cuda_caad.check_overlap(inside[:, :1], memory[:192].view(FP32).as_strided((1, 1, 64), (0, 0, 1)))
    pair = torch.zeros(3, 2, 64, dtype=BF16)
    cuda_caad.check_overlap(pair[None, :, 0], pair[None, :, 1])  # beside each other in one storage is no overlap


def test_rows_too_large_for_a_cluster(emulator):
    """A vocabulary of 262k fits in float32 with both teacher paths, in 16 blocks; 128k in 8; four times that in none."""
    fits = {}
    for vocab in (128256, 152064, 262144, 524288):
        problem = RowProblem(outer=0, inner=1, vocab=vocab, with_kd=1)
        problem.student = problem.audio = problem.text = RowTensor(16, 0, 0, 0, 0)
        fits[vocab] = [
            b
            for b in (1, 2, 4, 8, 16)
            if emulator.emulate_rows(ctypes.byref(problem), b, SHARED_BYTES, ctypes.c_int64(1)) >= 0
        ]
    assert fits == {128256: [8, 16], 152064: [8, 16], 262144: [16], 524288: []}


# -- choosing it --------------------------------------------------------------------------------------------------------------


def test_cpu_tensors_are_refused():
    x = torch.zeros(1, 2, 64)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="expected a tensor on a CUDA device, got one on cpu"):
        cuda_caad.caad_rows(x, x, None, None, one, one, one, RowSpec(vocab=64))
    with pytest.raises(ValueError, match="impl='cuda': expected tensors on a CUDA device, got cpu"):
        dispatch.choose("cuda", torch.device("cpu"), [FP32])
    with pytest.raises(
        TypeError, match=r"impl='cuda': expected tensors of float32, bfloat16 or float16, got torch\.float64"
    ):
        dispatch.choose("cuda", torch.device("cuda"), [torch.float64])


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named 'kdkernels.{name}'")

    monkeypatch.setattr(cuda_caad.native, "import_extension", missing)
    cuda_caad.load_library.cache_clear()
    cuda_caad.unavailable.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"kdkernels\._native_cuda.*nvcc.*KDKERNELS_CUDA=ON"):
            dispatch.choose("cuda", torch.device("cuda:0"), [FP32])
    finally:
        cuda_caad.load_library.cache_clear()
        cuda_caad.unavailable.cache_clear()


@pytest.mark.parametrize("asked", ["0", "1"])
@pytest.mark.parametrize("reason", [None, "no clusters"])
def test_auto_takes_it_only_when_asked(monkeypatch, asked, reason):
    monkeypatch.setenv("KDKERNELS_CUDA_ROWS", asked)
    monkeypatch.setattr(cuda_caad, "unavailable", lambda index: reason)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    chosen, why = dispatch.choose("auto", torch.device("cuda:0"), [BF16])
    if asked == "0":
        assert chosen == "triton"
    elif reason is None:
        assert chosen == "cuda_or_triton" and dispatch.row_launcher(chosen) is dispatch.caad_rows_or_triton
    else:
        assert chosen == "triton" and "no clusters" in why
    assert dispatch.choose("auto", torch.device("cuda:0"), [BF16], without_cuda="for layers")[0] == "triton"
    said = explain(vocab_size=512, device="cuda", impl="auto", projected=True)
    assert "impl='auto' runs 'triton'" in said


def test_auto_falls_back_to_triton(monkeypatch):
    """CPU tensors stand for any call that the kernel does not take."""
    seen = {}

    def triton_rows(*arguments, grad, want_stats):
        seen.update(arguments=len(arguments), want_stats=want_stats)
        return "triton"

    monkeypatch.setattr(dispatch, "load_triton_rows", lambda: triton_rows)
    x, one = torch.zeros(1, 2, 64), torch.ones(1)
    spec = RowSpec(vocab=64)
    assert dispatch.caad_rows_or_triton(x, x, None, None, one, one, one, spec, want_stats=True) == "triton"
    assert seen == {"arguments": 8, "want_stats": True}


# -- on a GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_the_kernel_is_there():
    """On Hopper and the Blackwell of data centres, and its clusters reach 8 blocks at least."""
    capability = torch.cuda.get_device_capability()
    if capability not in ((9, 0), (10, 0)):
        pytest.skip(f"not compiled for compute capability {capability[0]}.{capability[1]}")
    assert cuda_caad.unavailable(torch.cuda.current_device()) is None
    assert cuda_caad.load_library().probe(torch.cuda.current_device()).max_cluster_blocks >= 8


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=names)
def test_gpu_real_vocabularies(dtypes, divergence):
    rows = OnDevice()
    for vocab in (32000, 49152, 128256, 151936):
        check(rows, make(rows, 64, vocab, dtypes=dtypes), RowSpec(vocab=vocab, divergence=divergence), blocks=0)


@pytest.mark.gpu
def test_gpu_sixteen_blocks():
    rows = OnDevice()
    check(rows, make(rows, 24, 262144), RowSpec(vocab=262144), blocks=0)


@pytest.mark.gpu
def test_gpu_gives_what_the_emulation_gives(emulator):
    """Same order of merging: the two differ by the device's exponential alone."""
    for dtypes in DTYPES:
        arguments = make(Emulated(emulator), 5, 20011, dtypes=dtypes)
        for divergence in DIVERGENCES:
            spec = RowSpec(vocab=20011, divergence=divergence)
            expected, expected_grad = run(Emulated(emulator), *arguments, spec, grad_dtype=FP32, blocks=4)
            there = [x.cuda() for x in arguments]
            there[:3] = map(aligned, there[:3])
            result, grad = run(OnDevice(), *there, spec, grad_dtype=FP32, blocks=4)
            torch.testing.assert_close(result.kd.cpu(), expected.kd, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad.cpu(), expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("grad_dtype", [FP32, BF16], ids=str)
def test_gpu_in_place_has_no_race(grad_dtype):
    """All multiprocessors busy, many times: over fp32 rows, the bits of a gradient in memory of its own."""
    rows = OnDevice()
    student, *others = make(rows, 2048, 32000)
    student = student.contiguous()
    spec = RowSpec(vocab=32000)
    for blocks in (2, 8):
        _, expected = run(rows, student, *others, spec, grad_dtype=grad_dtype, blocks=blocks)
        for _ in range(20):
            memory = student.clone()
            grad = memory.view(grad_dtype).as_strided(student.shape, (0, 32000 * 4 // grad_dtype.itemsize, 1))
            rows(memory, *others, spec, grad=grad, blocks=blocks)
            assert torch.equal(grad, expected)


@pytest.mark.gpu
def test_gpu_row_offsets_beyond_two_to_the_31():
    vocab, n = 128256, 16800  # 2.15e9 items
    memory = torch.zeros(1, n, vocab, dtype=BF16, device="cuda")
    ends = torch.tensor([0, 1, n - 2, n - 1], device="cuda")
    rows = OnDevice()
    student, _, _, target, alpha, kd_coef, ce_coef = make(rows, 4, vocab, dtypes=(BF16, BF16))
    memory[0, ends] = student[0]
    wide = torch.full((n,), -100, device="cuda")
    wide[ends] = target
    spread = [torch.zeros(n, device="cuda").index_copy_(0, ends, x) for x in (alpha, kd_coef, ce_coef)]
    spec = RowSpec(vocab=vocab)
    teacher = torch.zeros(1, 1, vocab, dtype=BF16, device="cuda").expand(1, n, vocab)
    expected, expected_grad = run(rows, student, teacher[:, :4], None, target, alpha, kd_coef, ce_coef, spec, blocks=4)
    result = rows(memory, teacher, None, wide, *spread, spec, grad=memory, blocks=4)
    assert torch.equal(result.kd[ends], expected.kd) and torch.equal(memory[0, ends], expected_grad[0])
    assert not memory[0, 2 : n - 2].any()


@pytest.mark.gpu
def test_gpu_no_sync_and_graph_capture():
    rows = OnDevice()
    arguments = make(rows, 64, 32000)
    spec = RowSpec(vocab=32000)
    expected, expected_grad = run(rows, *arguments, spec, blocks=0)
    grad = torch.zeros_like(expected_grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows(*arguments, spec, grad=grad, blocks=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rows(*arguments, spec, grad=grad, blocks=0)
    grad.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured.kd, expected.kd) and torch.equal(grad, expected_grad)


@pytest.mark.gpu
def test_gpu_repeats_bitwise_on_any_stream():
    rows = OnDevice()
    arguments = make(rows, 256, 50257, dtypes=(BF16, BF16))
    spec = RowSpec(vocab=50257)
    first, first_grad = run(rows, *arguments, spec, blocks=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second, second_grad = run(rows, *arguments, spec, blocks=2)
    stream.synchronize()
    assert (
        torch.equal(first.kd, second.kd) and torch.equal(first.ce, second.ce) and torch.equal(first_grad, second_grad)
    )


@pytest.mark.gpu
def test_gpu_names_what_does_not_fit():
    rows = OnDevice()
    x = torch.zeros(1, 2, 8 << 20, dtype=BF16, device="cuda")
    one = torch.ones(1, device="cuda")
    two = torch.ones(2, device="cuda")
    with pytest.raises(ValueError, match=r"impl='cuda': spec\.vocab: expected a row that fits"):
        rows(x, x, None, None, one, two, two, RowSpec(vocab=8 << 20), blocks=0)
    with pytest.raises(ValueError, match="impl='cuda': student: expected rows that begin at multiples of 16 bytes"):
        rows(x[..., 1:65], x, None, None, one, two, two, RowSpec(vocab=64), blocks=0)


@pytest.mark.gpu
def test_gpu_public_face(monkeypatch):
    """Both losses by name against Triton's; "auto", asked to, takes this kernel where a row fits, and Triton elsewhere."""
    from kdkernels import fused_caad_loss, fused_linear_caad_loss

    OnDevice()
    g = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda", dtype=BF16)

    for vocab in (32000, 1003):  # rows of 1003 do not begin at multiples of 16 bytes
        logits = [normal(33, vocab) * 3 for _ in range(3)]
        hidden = [normal(33, 64), normal(vocab, 64), normal(33, 96), normal(33, 96), normal(vocab, 96)]
        target = torch.randint(0, vocab, (33,), generator=g, device="cuda")
        target[3] = -100
        for function, inputs in ((fused_caad_loss, logits), (fused_linear_caad_loss, hidden)):
            if function is fused_linear_caad_loss and vocab % 8:
                continue  # how its chunks lie in memory is its own affair
            outcomes = {}
            for impl in ("triton", "cuda", "auto"):
                monkeypatch.setenv("KDKERNELS_CUDA_ROWS", "1" if impl == "auto" else "0")
                if impl == "cuda" and vocab % 8:
                    with pytest.raises(ValueError, match=r"impl='cuda': .* multiples of 16 bytes"):
                        function(*inputs, target, impl=impl)
                    continue
                leaf = inputs[0].clone().requires_grad_()
                loss = function(leaf, *inputs[1:], target, impl=impl)
                loss.backward()
                outcomes[impl] = (loss.detach(), leaf.grad)
            by_name = outcomes["triton" if vocab % 8 else "cuda"]
            assert all(torch.equal(x, y) for x, y in zip(outcomes["auto"], by_name, strict=True))
            torch.testing.assert_close(by_name[0], outcomes["triton"][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(by_name[1], outcomes["triton"][1], rtol=2e-2, atol=1e-4)
