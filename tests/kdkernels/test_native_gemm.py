"""The CPU product of bf16 matrices with a float32 result, against float64."""

import math

import pytest
import torch

from kdkernels.ops import gemm, native

needs_instructions = pytest.mark.skipif(
    not native.available() or native.load_library().best_isa() != "avx512_bf16", reason="needs a processor with avx512_bf16"
)


def bf16(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rounding(width, parts):
    """Of a float32 sum of `width` products of variance 1, added one by one: the k-th addition rounds by 2^-24 of sqrt(k), which
    makes a standard deviation of 2^-24 width / sqrt(6); five of them, for the largest of all elements. A second part adds as
    many times again."""
    return 5 * 2.0**-24 * width * (parts / 6) ** 0.5


@needs_instructions
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "vocab", "width"),
    [
        *[(1, 1, 2), (5, 63, 30), (6, 64, 32), (7, 65, 34), (13, 200, 96), (2, 300, 2048), (3, 70, 2050), (4, 129, 4100)],
        (50, 130, 2050),  # too many tokens for the kernel of few
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_matches_fp64(tokens, vocab, width, parts, threads):
    weight = bf16(vocab, width + 6, seed=1)[:, :width]  # rows further apart than they are wide
    hidden = [bf16(tokens, width + 2, seed=2 + i)[:, 2:] * 2.0 ** (-8 * i) for i in range(parts)]
    memory = torch.full((tokens, vocab + 5), 7.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native.bf16_gemm(hidden, weight, memory[:, :vocab])
    finally:
        torch.set_num_threads(before)
    expected = sum(h.double() for h in hidden) @ weight.double().T
    assert (memory[:, :vocab] - expected).abs().max() < rounding(width, parts)
    assert (memory[:, vocab:] == 7).all()


@needs_instructions
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 2), (7, 65, 34), (13, 200, 96), (3, 70, 2050)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_weight_by_rows_and_sums(rows, columns, inner, accumulate):
    weight, a = bf16(inner, columns + 3, seed=1)[:, :columns], bf16(rows, inner, seed=2)
    out = torch.full((rows, columns), 3.0)
    native.bf16_gemm([a], weight, out, accumulate=accumulate, weight_by_rows=True)
    expected = a.double() @ weight.double() + 3.0 * accumulate
    assert (out - expected).abs().max() < rounding(inner, 1) + 3e-6


@needs_instructions
def test_few_tokens_are_added_to_what_is_there():
    weight, a = bf16(100, 46, seed=1), bf16(11, 46, seed=2)
    out = torch.full((11, 100), 3.0)
    native.bf16_gemm([a], weight, out, accumulate=True)
    assert (out - a.double() @ weight.double().T - 3.0).abs().max() < rounding(46, 1) + 3e-6


@needs_instructions
def test_infinities_and_nan_arrive():
    weight, hidden = bf16(70, 64, seed=0), bf16(3, 64, seed=1)
    hidden[1, 5], hidden[2, 9] = float("inf"), float("nan")
    out = torch.empty(3, 70)
    native.bf16_gemm([hidden], weight, out)
    assert out[0].isfinite().all() and out[1].isinf().all() and out[2].isnan().all()


@needs_instructions
@pytest.mark.parametrize(("vocab", "width"), [(1, 2), (65, 126), (200, 130), (70, 2050), (129, 4100)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outlier", ["none", "in both", "met by small weights", "in some tokens"])
def test_integers_are_ten_times_as_exact_as_one_part(vocab, width, threads, outlier):
    tokens = native.ITEM_TOKENS + 5
    weight, contrast = bf16(vocab, width, seed=1), torch.randn(tokens, width, generator=torch.Generator().manual_seed(2))
    if outlier != "none":
        contrast[(slice(1, 4) if outlier == "in some tokens" else slice(None)), width // 2] *= 50
        weight[:, width // 2] *= 50 if outlier == "in both" else 1 / 50
    contrast[:, : width // 3] *= 1e-3
    contrast[3] = 0.0
    parts = gemm._summands(contrast, torch.bfloat16)
    memory = torch.full((tokens, vocab + 5), 7.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native.bf16_gemm(parts, weight, memory[:, :vocab], as_items=True)
    finally:
        torch.set_num_threads(before)
    exact, found = contrast.double() @ weight.double().T, memory[:, :vocab].double()
    rounded_once = (parts[0].double() @ weight.double().T - exact).norm()
    assert 0 < (found - exact).norm() < rounded_once / 10
    assert (memory[3, :vocab] == 0).all() and (memory[:, vocab:] == 7).all()


@needs_instructions
def test_integers_never_overflow():
    """Sums are largest where all products have one sign, and groups of one large item have the largest integers."""
    width = 512
    weight = torch.ones(4, width, dtype=torch.bfloat16)
    weight[1], weight[2, 1:], weight[3] = -1.0, 0.0, weight[3] * 3e4
    contrast = torch.ones(native.ITEM_TOKENS, width)
    contrast[1], contrast[2, 1:], contrast[3], contrast[4] = -1.0, 1e-6, 1e30, 1e-30
    out = torch.empty(len(contrast), 4)
    native.bf16_gemm(gemm._summands(contrast, torch.bfloat16), weight, out, as_items=True)
    exact = contrast.double() @ weight.double().T
    torch.testing.assert_close(out.double(), exact, rtol=2e-4, atol=0.0)


@needs_instructions
def test_infinities_and_nan_arrive_beside_integers():
    weight, hidden = bf16(70, 64, seed=0), bf16(native.ITEM_TOKENS, 64, seed=1)
    rest = hidden * 2.0**-9
    hidden[2, 9], rest[3, 4], weight[7, 7], weight[8, 8] = float("inf"), float("nan"), float("-inf"), float("nan")
    out = torch.empty(len(hidden), 70)
    native.bf16_gemm([hidden, rest], weight, out, as_items=True)
    expected = (hidden.double() + rest.double()) @ weight.double().T
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert (out - expected)[finite].norm() < 1e-4 * expected[finite].norm()


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("native_gemm", [True, False])
def test_either_way_gives_the_same_logits(width, native_gemm, monkeypatch):
    """An odd width and other processors go by way of float32 operands."""
    if not native_gemm:
        monkeypatch.setattr(native, "multiplies_bf16", lambda: False)
    weight, parts = bf16(130, width, seed=0), [bf16(5, width, seed=1), bf16(5, width, seed=2) * 2.0**-9]
    out = torch.empty(5, 130)
    gemm._gemm_by_vocabulary_blocks(parts, weight, out, as_items=True)
    expected = sum(p.double() for p in parts) @ weight.double().T
    assert (out - expected).abs().max() < rounding(width, len(parts))


def test_other_processors_are_refused():
    if native.load_library().best_isa() == "avx512_bf16":
        pytest.skip("this one is not")
    with pytest.raises(ValueError, match="avx512_bf16"):
        native.bf16_gemm([bf16(1, 2, seed=0)], bf16(1, 2, seed=1), torch.empty(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_a_weight_gradient_that_begins_reads_nothing_and_goes_on_by_adding(dtype, rows):
    torch.manual_seed(0)
    grad, hidden = torch.randn(rows, 37).to(dtype), torch.randn(rows, 20).to(dtype)
    total = gemm.empty_weight_gradient(torch.empty(37, 20, dtype=dtype)).fill_(math.nan)
    expected = grad.double().T @ hidden.double()
    for times in (1, 2):
        gemm.add_weight_gradient(total, grad, hidden, accumulate=times == 2)
        torch.testing.assert_close(total.double(), times * expected, rtol=1e-5, atol=1e-4)
    finished = gemm.finish_weight_gradient(total, dtype)
    assert finished.is_contiguous() and finished.dtype == dtype
    assert torch.equal(finished, total.to(dtype))


@needs_instructions
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 70), (31, 15), (32, 16), (33, 17), (64, 64), (65, 129), (700, 1000)])
def test_narrowing_what_lies_transposed_has_torchs_bits(rows, columns, threads):
    torch.manual_seed(0)
    x = torch.randn(rows, columns + 3)[:, :columns]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e-39, 3.4e38, 1.00390625, 1.01171875, -1.00390625])
    x.copy_(torch.where(torch.rand(x.shape) < 0.3, special[torch.randint(len(special), x.shape)], x))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native.transpose_to_bf16(x)
    finally:
        torch.set_num_threads(before)
    expected = x.T.to(torch.bfloat16).contiguous()
    assert found.shape == expected.shape and found.is_contiguous()
    same = found.view(torch.int16) == expected.view(torch.int16)
    assert bool((same | (found.isnan() & expected.isnan())).all())


@needs_instructions
def test_a_weight_gradient_of_one_chunk_is_rounded_once(monkeypatch):
    monkeypatch.setattr(native, "multiplies_bf16", lambda: True)
    logits, hidden = torch.randn(37, 70), bf16(37, 24, seed=1)
    grad = gemm.gradient_view(logits, torch.bfloat16)
    grad.copy_(bf16(37, 70, seed=2))
    total = gemm.empty_weight_gradient(bf16(70, 24, seed=3), at_once=True)
    gemm.add_weight_gradient(total, grad, hidden, accumulate=False)
    assert total.dtype == torch.bfloat16 and gemm.finish_weight_gradient(total, torch.bfloat16) is total
    exact = grad.double().T @ hidden.double()
    assert (total.double() - exact).norm() < 2.0**-9 * exact.norm()
