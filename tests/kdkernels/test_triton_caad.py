"""The Triton row kernels against the eager formula in float64: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import TRITON_DEVICE as DEVICE
from cases import logits, on_device

triton_caad = pytest.importorskip("kdkernels.ops.triton_caad", reason="needs Triton")
from kdkernels import fused_caad_loss  # noqa: E402
from kdkernels.ops import reference  # noqa: E402
from kdkernels.ops.rows import DIVERGENCES, STAT_NAMES, RowSpec  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INF = math.inf
INTERPRETED = not isinstance(triton_caad._caad_row_kernel, triton_caad.triton.JITFunction)
# Relative error of one rounding to nearest; the kernel's own arithmetic is float32. Triton's interpreter cuts off what bf16
# cannot hold.
ROUNDING = {FP32: 0.0, BF16: 2.0**-7 if INTERPRETED else 2.0**-8, FP16: 2.0**-11}


# NumPy, under the interpreter, warns of what GPUs do silently: infinities in the branch that `where` does not take.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 logits, so that a short row has several; the launch table gives such a row one block."""
    monkeypatch.setattr(
        triton_caad,
        "launch_table",
        lambda spec, itemsize, *_: {"GROUPS": 128 * itemsize // 16, "GROUP": 16 // itemsize, "num_warps": 1},
    )


def make(n=4, vocab=331, *, dtypes=(FP32, FP32), seed=0, scale=3.0, targets=True):
    """student, audio, text (1, n, vocab), target (n,) with one ignored row, alpha, kd_coef and ce_coef (n,)."""
    g = torch.Generator().manual_seed(seed)
    student, audio, text = (
        (torch.randn(1, n, vocab, generator=g) * scale).to(dtype).to(DEVICE)
        for dtype in (dtypes[0], dtypes[1], dtypes[1])
    )
    target = torch.randint(0, vocab, (n,), generator=g) if targets else None
    if targets and n > 1:
        target[1] = -100
    alpha, kd_coef, ce_coef = (torch.rand(n, generator=g).to(DEVICE) * 2 for _ in range(3))
    if n > 2:
        alpha[2] = 0.0
    return student, audio, text, None if target is None else target.to(DEVICE), alpha, kd_coef, ce_coef


def oracle(student, audio, text, target, alpha, kd_coef, ce_coef, spec, *, want_stats=False):
    """(RowResult, gradient) in float64; the gradient over the student's full width."""
    leaf = student.double().detach().requires_grad_()
    text = None if text is None else text.double()
    result = reference.caad_rows(leaf, audio.double(), text, target, alpha.double(), spec, want_stats=want_stats)
    # Rows of infinite or undefined loss would make the sum's gradient NaN elsewhere too.
    total = (result.kd * kd_coef).nan_to_num(0, 0, 0).sum() + (result.ce * ce_coef).nan_to_num(0, 0, 0).sum()
    total = total + (leaf * 0.0).nan_to_num(0, 0, 0).sum()
    total.backward()
    return result, leaf.grad


def run(student, audio, text, target, alpha, kd_coef, ce_coef, spec, *, want_stats=False, grad_dtype=None):
    grad = torch.full(student.shape, math.nan, dtype=grad_dtype or student.dtype, device=student.device)
    result = triton_caad.caad_rows(
        student, audio, text, target, alpha, kd_coef, ce_coef, spec, grad=grad, want_stats=want_stats
    )
    return result, grad


def check(arguments, spec, *, want_stats=False, grad_dtype=None):
    result, grad = run(*arguments, spec, want_stats=want_stats, grad_dtype=grad_dtype)
    expected, expected_grad = oracle(*arguments, spec, want_stats=want_stats)
    scale = float(expected_grad.abs().max())
    for actual, exact in ((result.kd, expected.kd), (result.ce, expected.ce)):
        torch.testing.assert_close(actual.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    # A quarter of the step between subnormals is what rounding to fp16 leaves of tiny gradients.
    budget = ROUNDING[grad.dtype] * expected_grad.abs() + 1e-5 * scale + (2.0**-25 if grad.dtype == FP16 else 0.0)
    error = (grad.double() - expected_grad).abs()
    assert bool((error <= budget).all()), f"gradient off by {float((error - budget).max())} beyond its budget"
    if want_stats:
        torch.testing.assert_close(result.stats.double(), expected.stats, rtol=1e-5, atol=1e-5)
    else:
        assert result.stats is None


# -- agreement with the formula ----------------------------------------------------------------------------------------

DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (BF16, FP32)]


def names(value):
    return "-".join(str(x).removeprefix("torch.") for x in value) if isinstance(value, tuple) else None


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [320, 331])  # 16-byte loads, and loads one by one
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_fp64(divergence, temperature, vocab, small_blocks):
    check(make(vocab=vocab), RowSpec(vocab=vocab, divergence=divergence, temperature=temperature))


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=names)
def test_dtypes_match_fp64(dtypes, divergence, small_blocks):
    check(make(vocab=331, dtypes=dtypes), RowSpec(vocab=331, divergence=divergence))
    check(make(vocab=320, dtypes=dtypes, seed=1), RowSpec(vocab=320, divergence=divergence, temperature=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000, 2049])
def test_any_width(vocab, divergence):
    check(make(vocab=vocab), RowSpec(vocab=vocab, divergence=divergence), want_stats=True)


@pytest.mark.parametrize("grad_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradient_of_another_dtype(dtype, grad_dtype, small_blocks):
    check(make(vocab=256, dtypes=(dtype, dtype)), RowSpec(vocab=256), grad_dtype=grad_dtype)


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


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, divergence, small_blocks):
    if option == "plausibility" and divergence == "reverse_kl":
        pytest.skip("not defined: the front end refuses it")
    student, audio, text, target, *rest = make(vocab=257, seed=3)
    text = None if option == "no text" else text
    target = None if option == "no target" else target
    number = list(OPTIONS).index(option) + DIVERGENCES.index(divergence)
    temperature = (1.0, 2.0, 3.0)[number % 3]
    spec = RowSpec(vocab=257, divergence=divergence, temperature=temperature, **OPTIONS[option])
    check((student, audio, text, target, *rest), spec, want_stats=number % 2 == 0)


def test_one_alpha_for_all_rows():
    *inputs, kd_coef, ce_coef = make()
    inputs[-1] = torch.tensor([1.5], device=DEVICE)
    check((*inputs, kd_coef, ce_coef), RowSpec(vocab=331))


def test_near_convergence_keeps_its_digits():
    student, audio, text, target, alpha, *rest = make(vocab=2049, seed=5)
    z = audio + alpha[:, None] * (audio - text)
    student = z + 1e-2 * student
    arguments = (student, audio, text, target, alpha, *rest)
    for divergence in DIVERGENCES:
        spec = RowSpec(vocab=2049, divergence=divergence, with_ce=False)
        expected, _ = oracle(*arguments, spec)
        actual, _ = run(*arguments, spec)
        assert float(expected.kd.detach().max()) < 1e-3
        torch.testing.assert_close(actual.kd.double(), expected.kd.detach(), rtol=2e-2, atol=5e-7)
        assert not (actual.kd < 0).any()


def test_large_constants_cancel():
    """Rows shifted by 1000: the logits' own rounding is all that is left."""
    student, audio, text, *rest = make(seed=6)
    check((student + 1000, audio - 1000, text - 1000, *rest), RowSpec(vocab=331))


# -- layouts -----------------------------------------------------------------------------------------------------------


def layouts(tensor):
    """Views of the same values (B, T, V), last stride 1, with poison between the rows."""
    batch, seq, vocab = tensor.shape
    wide = torch.full((batch, seq, vocab + 11), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., :vocab] = tensor
    swapped = torch.full((seq, batch, vocab + 16), math.nan, dtype=tensor.dtype, device=tensor.device)
    swapped[..., :vocab] = tensor.transpose(0, 1)
    sliced = torch.full((batch, 3 * seq, vocab), math.nan, dtype=tensor.dtype, device=tensor.device)
    sliced[:, 1::3] = tensor
    return [tensor, wide[..., :vocab], swapped.transpose(0, 1)[..., :vocab], sliced[:, 1::3]]


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [47, 96])
def test_strides(vocab, small_blocks):
    student, audio, text, *rest = make(6, vocab)
    student, audio, text = (x.reshape(2, 3, vocab) for x in (student, audio, text))
    spec = RowSpec(vocab=vocab)
    result, expected = run(student, audio, text, *rest, spec)
    for i, (s, a, t) in enumerate(zip(layouts(student), layouts(audio)[::-1], layouts(text), strict=True)):
        grad = layouts(torch.full_like(student, math.nan))[i]
        memory = grad if grad._base is None else grad._base
        other = triton_caad.caad_rows(s, a, t, *rest, spec, grad=grad)
        torch.testing.assert_close(other.kd, result.kd, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
        assert int(memory.isnan().sum()) == memory.numel() - grad.numel(), "written outside of the rows"


def test_rows_that_are_one_row():
    """Stride 0: a (1, 1, V) text path expanded over all rows."""
    student, audio, text, *rest = make(4, 96)
    text = text[:, :1].expand(1, 4, 96)
    check((student, audio, text, *rest), RowSpec(vocab=96))


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(80, 80), (90, 64), (64, 90)])
def test_columns_beyond_the_vocabulary(widths, small_blocks):
    student, audio, text, *rest = make(4, 90)
    student, audio, text = student[..., : widths[0]].clone(), audio[..., : widths[1]], text[..., : widths[1]]
    student[..., 60:], audio[..., 60:], text[..., 60:] = math.nan, math.nan, math.nan
    rest[0] = rest[0].clamp_max(59)
    spec = RowSpec(vocab=60)
    _, grad = run(student, audio, text, *rest, spec)
    expected, expected_grad = run(student[..., :60].clone(), audio, text, *rest, spec)
    assert torch.isfinite(expected.kd).all()
    torch.testing.assert_close(grad[..., :60], expected_grad, rtol=1e-5, atol=1e-7)
    assert not grad[..., 60:].any()


@pytest.mark.slow
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
@pytest.mark.parametrize(("vocab", "width"), [(331, 331), (320, 336)])
def test_gradient_over_the_student(vocab, width, dtypes, divergence, small_blocks):
    """In place, also with smaller items: the same bits as into memory of its own."""
    student, *others = make(4, width, dtypes=(dtypes[0], FP32))
    others[2] = others[2].clamp_max(vocab - 1)
    spec = RowSpec(vocab=vocab, divergence=divergence)
    expected, expected_grad = run(student, *others, spec, grad_dtype=dtypes[1])
    memory = student.clone()
    items = dtypes[0].itemsize // dtypes[1].itemsize
    grad = memory.view(dtypes[1]).as_strided(student.shape, (0, width * items, 1))
    result = triton_caad.caad_rows(memory, *others, spec, grad=grad)
    assert torch.equal(result.kd, expected.kd) and torch.equal(result.ce, expected.ce)
    assert torch.equal(grad, expected_grad)


def test_unsafe_overlaps_are_refused():
    student, *others = make(3, 64, dtypes=(BF16, BF16))
    spec = RowSpec(vocab=64)
    memory = torch.zeros(3 * 64 + 8, dtype=BF16, device=DEVICE)
    memory[: 3 * 64] = student.reshape(-1)
    inside = memory[: 3 * 64].view(1, 3, 64)
    with pytest.raises(ValueError, match="grad: expected memory of its own"):
        triton_caad.caad_rows(inside, *others, spec, grad=memory[8:].view(1, 3, 64))
    wider = memory[:192].view(FP32).as_strided((1, 1, 64), (0, 0, 1))
    one = [x[:, :1] if x.dim() == 3 else x[:1] for x in others]
    with pytest.raises(ValueError, match=r"torch\.float32 over torch\.bfloat16"):
        triton_caad.caad_rows(inside[:, :1], *one, spec, grad=wider)
    # Beside each other in one storage is no overlap.
    pair = torch.zeros(3, 2, 64, dtype=BF16, device=DEVICE)
    pair[:, 0] = student[0]
    triton_caad.caad_rows(pair[None, :, 0], *others, spec, grad=pair[None, :, 1])
    torch.testing.assert_close(pair[:, 1], run(student, *others, spec)[1][0])


# -- masked tokens, undefined rows -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_masked_everywhere(divergence, temperature, small_blocks):
    student, audio, text, target, *rest = make(vocab=300)
    for x in (student, audio, text):
        x[..., 100:180] = -INF
    target[target >= 100] %= 100
    spec = RowSpec(vocab=300, divergence=divergence, temperature=temperature)
    check((student, audio, text, target, *rest), spec, want_stats=True)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("path", [1, 2])
def test_tokens_masked_on_one_teacher_path(path, divergence, small_blocks):
    arguments = make(vocab=300)
    arguments[path][..., 64:200] = -INF
    arguments[path][..., 17] = -INF
    check(arguments, RowSpec(vocab=300, divergence=divergence))


def test_text_is_not_read_where_alpha_is_0(small_blocks):
    arguments = list(make(vocab=300))
    arguments[2][0, 2] = math.nan
    check(arguments, RowSpec(vocab=300))


def test_forward_kl_where_the_student_is_masked(small_blocks):
    arguments = make(vocab=300)
    arguments[0][0, 0, 250] = -INF
    arguments[0][0, 3, :] = -INF
    arguments[0][0, 3, 299] = 1.0
    arguments[3][arguments[3] == 250] = 0
    spec = RowSpec(vocab=300, with_ce=False)
    result, grad = run(*arguments, spec)
    assert result.kd[0] == INF and result.kd[3] == INF and torch.isfinite(result.kd[2])
    student, audio, text, _, alpha, kd_coef, _ = (x.double() for x in arguments)
    p = torch.softmax((audio + alpha[:, None] * (audio - text))[0] / 2, -1)
    expected = kd_coef[:, None] * 2 * (torch.softmax(student[0] / 2, -1) - p)
    expected[student[0] == -INF] = 0
    expected[1] = 0
    torch.testing.assert_close(grad[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_reverse_kl_where_the_teacher_is_masked(small_blocks):
    arguments = make(vocab=300)
    arguments[1][0, 0, 250] = -INF
    arguments[2][0, 3, :17] = -INF
    result, grad = run(*arguments, RowSpec(vocab=300, divergence="reverse_kl", with_ce=False))
    assert result.kd[0] == INF and result.kd[3] == INF and torch.isfinite(result.kd[2])
    assert not grad[0, [0, 1, 3]].any() and torch.isfinite(grad).all() and grad[0, 2].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_masked_throughout_teaches_nothing(divergence, small_blocks):
    arguments = make(vocab=300)
    arguments[1][0, 0] = -INF
    arguments[2][0, 3] = -INF
    result, grad = run(*arguments, RowSpec(vocab=300, divergence=divergence, with_ce=False), want_stats=True)
    assert result.kd[0] == 0 and result.kd[3] == 0 and not grad[0, [0, 3]].any()
    assert torch.isfinite(result.kd).all() and torch.isfinite(grad).all()
    assert (result.stats[1, [0, 3]] == 0).all() and result.stats[1, 2] > 0
    assert result.stats[3, 0] == 0 and result.stats[3, 3] == INF


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_masked_throughout_gives_no_nan(divergence, small_blocks):
    arguments = make(vocab=300)
    arguments[0][0, 0] = -INF
    result, grad = run(*arguments, RowSpec(vocab=300, divergence=divergence), want_stats=True)
    assert float(result.kd[0]) == {"forward_kl": INF, "reverse_kl": 0.0}.get(divergence, float(result.kd[0]))
    if divergence == "jsd":  # p meets m = p / 2 and q has no mass
        assert float(result.kd[0]) == pytest.approx(4 * 0.5 * math.log(2), rel=1e-6)
    assert float(result.ce[0]) == INF and not grad[0, 0].any() and torch.isfinite(grad).all()


def test_a_masked_label_is_inf(small_blocks):
    arguments = make(vocab=300)
    arguments[3][0] = 7
    arguments[0][0, 0, 7] = -INF
    result, grad = run(*arguments, RowSpec(vocab=300, with_kd=False))
    q1 = torch.softmax(arguments[0][0, 0].double(), -1) * arguments[-1][0].double()
    assert result.ce[0] == INF and torch.isfinite(result.ce[1:]).all()
    torch.testing.assert_close(grad[0, 0].double(), q1, rtol=1e-5, atol=1e-7)


def test_finite_masks(small_blocks):
    """The lowest bf16 and fp32 numbers, as libraries write masks, act as -inf."""
    arguments = make(vocab=300)
    arguments[3].clamp_max_(199)
    for x in arguments[:3]:
        x[..., 200:250] = torch.finfo(BF16).min
        x[..., 250:] = torch.finfo(FP32).min
    expected, expected_grad = run(*(x[..., :200].clone() for x in arguments[:3]), *arguments[3:], RowSpec(vocab=200))
    result, grad = run(*arguments, RowSpec(vocab=300))
    torch.testing.assert_close(result.kd, expected.kd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.ce, expected.ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[..., :200], expected_grad, rtol=1e-5, atol=1e-6)
    assert not grad[..., 200:].any()


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_is_not_hidden(divergence, small_blocks):
    for which, row, column in ((0, 0, 277), (1, 2, 0), (2, 3, 120)):
        arguments = make(vocab=300)
        arguments[which][0, row, column] = math.nan
        result, grad = run(*arguments, RowSpec(vocab=300, divergence=divergence))
        assert result.kd.isnan().nonzero().flatten().tolist() == [row]
        assert result.ce.isnan().any() == (which == 0)
        assert grad[0, row].isnan().all()
        assert torch.isfinite(grad[0, [i for i in range(4) if i != row]]).all()


def test_ignored_rows_are_not_read(small_blocks):
    arguments = make(vocab=300)
    for x in arguments[:3]:
        x[0, 1] = math.nan
    for x in arguments[4:]:
        x[1] = math.nan
    result, grad = run(*arguments, RowSpec(vocab=300), want_stats=True)
    assert result.kd[1] == 0 and result.ce[1] == 0 and not result.stats[:, 1].any() and not grad[0, 1].any()
    assert torch.isfinite(result.kd).all() and torch.isfinite(result.ce).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("label", [300, -1, 2**40, -(2**40)])
def test_a_label_out_of_range_is_nan(label):
    arguments = make(vocab=300)
    arguments[3][0] = label
    result, grad = run(*arguments, RowSpec(vocab=300))
    assert result.ce[0].isnan() and grad[0, 0].isnan().all()
    assert torch.isfinite(result.kd).all() and torch.isfinite(result.ce[1:]).all() and torch.isfinite(grad[0, 1:]).all()


@pytest.mark.parametrize("alpha", [-0.5, INF, math.nan])
def test_an_illegal_alpha_is_nan(alpha):
    arguments = make(vocab=300)
    arguments[4][0] = alpha
    result, grad = run(*arguments, RowSpec(vocab=300))
    assert result.kd[0].isnan() and grad[0, 0].isnan().all()
    assert torch.isfinite(result.ce).all() and torch.isfinite(result.kd[1:]).all() and torch.isfinite(grad[0, 1:]).all()


def test_ties_count_the_first_token(small_blocks):
    student = torch.zeros(1, 3, 300, device=DEVICE)
    audio = torch.zeros(1, 3, 300, device=DEVICE)
    student[0, 0, [150, 290]] = 1.0
    audio[0, 0, [150, 291]] = 1.0
    student[0, 1, [150, 290]] = 1.0
    audio[0, 1, [149, 290]] = 1.0
    one = torch.ones(3, device=DEVICE)
    result = triton_caad.caad_rows(student, audio, None, None, one, one, one, RowSpec(vocab=300), want_stats=True)
    assert result.stats[STAT_NAMES.index("top1_agreement")].tolist() == [1.0, 0.0, 1.0]


def test_no_rows():
    arguments = make(0, 64, targets=False)
    result, grad = run(*arguments, RowSpec(vocab=64), want_stats=True)
    assert result.kd.shape == (0,) and result.stats.shape == (len(STAT_NAMES), 0) and grad.shape == (1, 0, 64)


def test_cpu_tensors_need_the_interpreter():
    if INTERPRETED:
        pytest.skip("the interpreter takes CPU tensors")
    with pytest.raises(RuntimeError, match="need CUDA tensors, got a tensor on cpu"):
        triton_caad.caad_rows(*(None if x is None else x.cpu() for x in make(2, 64)), RowSpec(vocab=64))


# -- scale_rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rowwise", [False, True])
def test_scale_rows(rowwise, dtype):
    source = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    factor = torch.tensor([0.5, 1.0, 0.0, -2.0, 3.0, 0.1], device=DEVICE) if rowwise else torch.tensor(0.3, device=DEVICE)
    spread = factor.reshape(2, 3, 1) if rowwise else factor
    expected = (source.float() * spread).to(dtype)
    if INTERPRETED:  # rounds to bf16 by cutting off
        expected = triton_caad.scale_rows(source, factor)
        exact = source.double() * spread.double()
        assert bool(((expected.double() - exact).abs() <= (ROUNDING[dtype] + 1e-7) * exact.abs()).all())
    assert torch.equal(triton_caad.scale_rows(source, factor), expected)
    padded = torch.full((3, 2, 311), math.nan, device=DEVICE, dtype=dtype)
    out = triton_caad.scale_rows(source, factor, out=padded.transpose(0, 1)[..., :300])
    assert torch.equal(out, expected) and padded[..., 300:].isnan().all()
    assert triton_caad.scale_rows(source, factor, out=source) is source and torch.equal(source, expected)


def test_scale_rows_by_one_leaves_nan_alone():
    source = torch.full((1, 2, 40), math.nan, device=DEVICE)
    assert triton_caad.scale_rows(source, torch.ones((), device=DEVICE), out=source).isnan().all()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=names)
def test_gpu_real_vocabularies(dtypes, divergence):
    for vocab in (49152, 50257, 128256):
        check(make(64, vocab, dtypes=dtypes), RowSpec(vocab=vocab, divergence=divergence), want_stats=True)


@pytest.mark.gpu
def test_gpu_in_place_has_no_race():
    """All multiprocessors busy, many times: bf16 over fp32 rows has the bits of a gradient in memory of its own."""
    student, *others = make(2048, 32000)
    spec = RowSpec(vocab=32000)
    _, expected = run(student, *others, spec, grad_dtype=BF16)
    for _ in range(20):
        memory = student.clone()
        grad = memory.view(BF16).as_strided(student.shape, (0, 64000, 1))
        triton_caad.caad_rows(memory, *others, spec, grad=grad)
        assert torch.equal(grad, expected)


@pytest.mark.gpu
def test_gpu_row_offsets_beyond_two_to_the_31():
    vocab, rows = 128256, 16800  # 2.15e9 items
    memory = torch.zeros(1, rows, vocab, dtype=BF16, device=DEVICE)
    ends = torch.tensor([0, 1, rows - 2, rows - 1], device=DEVICE)
    student, _, _, target, alpha, kd_coef, ce_coef = make(4, vocab, dtypes=(BF16, BF16))
    memory[0, ends] = student[0]
    wide = torch.full((rows,), -100, device=DEVICE)
    wide[ends] = target
    spread = [torch.zeros(rows, device=DEVICE).index_copy_(0, ends, x) for x in (alpha, kd_coef, ce_coef)]
    spec = RowSpec(vocab=vocab)
    teacher = torch.zeros(1, 1, vocab, dtype=BF16, device=DEVICE).expand(1, rows, vocab)
    expected, expected_grad = run(student, teacher[:, :4], None, target, alpha, kd_coef, ce_coef, spec)
    result = triton_caad.caad_rows(memory, teacher, None, wide, *spread, spec, grad=memory)
    assert torch.equal(result.kd[ends], expected.kd) and torch.equal(memory[0, ends], expected_grad[0])
    assert not memory[0, 2 : rows - 2].any()


@pytest.mark.gpu
def test_gpu_no_sync_and_graph_capture():
    arguments = make(64, 32000)
    spec = RowSpec(vocab=32000)
    expected, expected_grad = run(*arguments, spec)
    grad = torch.zeros_like(arguments[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_caad.caad_rows(*arguments, spec, grad=grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_caad.caad_rows(*arguments, spec, grad=grad)
    grad.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured.kd, expected.kd) and torch.equal(grad, expected_grad)


@pytest.mark.gpu
def test_gpu_repeats_bitwise():
    arguments = make(256, 50257, dtypes=(BF16, BF16))
    first, second = (run(*arguments, RowSpec(vocab=50257), want_stats=True) for _ in range(2))
    assert all(
        torch.equal(x, y)
        for x, y in itertools.chain(
            zip((first[0].kd, first[0].ce, first[0].stats), (second[0].kd, second[0].ce, second[0].stats), strict=True),
            [(first[1], second[1])],
        )
    )


@pytest.mark.parametrize("options", [{"kd_weight": 0.0}, {"kd_weight": 0.0, "return_stats": True}, {}])
def test_a_mask_is_looked_for_only_where_the_teacher_is_read(options, monkeypatch):
    """Without the distillation term its pass over the teacher would read memory that nobody has checked."""
    launched, kernel = [], triton_caad._caad_row_kernel

    class Noting:
        def __getitem__(self, grid):
            return lambda **arguments: (launched.append(arguments), kernel[grid](**arguments))

    monkeypatch.setattr(triton_caad, "_caad_row_kernel", Noting())
    fused_caad_loss(*on_device(logits(), "triton"), plausibility=0.1, impl="triton", **options)
    assert [arguments["HAS_PLAUSIBILITY"] for arguments in launched] == [options != {"kd_weight": 0.0}]
