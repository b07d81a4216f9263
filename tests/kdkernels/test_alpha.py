"""Contrast strength by token."""

import pytest
import torch

from kdkernels import adaptive_alpha, fused_caad_loss


def test_the_formula():
    divergence = torch.tensor([0.0, 0.1, 0.3, 1e6, -1e-7])
    alpha = adaptive_alpha(divergence, 2.0, half_at=0.1)
    torch.testing.assert_close(alpha, torch.tensor([0.0, 1.0, 1.5, 2.0, 0.0]), rtol=1e-6, atol=0)
    by_token = adaptive_alpha(divergence.double(), torch.tensor([1.0, 1.0, 4.0, 4.0, 4.0]), half_at=0.1)
    torch.testing.assert_close(by_token, torch.tensor([0.0, 0.5, 3.0, 4.0, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_a_tensor_of_strengths_keeps_shape_and_dtype_of_the_divergence():
    divergence = torch.rand(3, 4)
    for shape in ((), (1,), (4,), (3, 1), (3, 4)):
        strength = torch.full(shape, 2.0, dtype=torch.float64)
        alpha = adaptive_alpha(divergence, strength, half_at=0.3)
        torch.testing.assert_close(alpha, adaptive_alpha(divergence, 2.0, half_at=0.3), rtol=0, atol=0)


def test_the_loss_takes_it_and_no_gradient_comes_back():
    student, audio, text = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    _, stats = fused_caad_loss(student, audio, text, target, alpha=0.0, return_stats=True)
    divergence = stats.path_divergence.requires_grad_()
    alpha = adaptive_alpha(divergence, 2.0, half_at=0.2)
    assert not alpha.requires_grad
    loss = fused_caad_loss(student, audio, text, target, alpha=alpha, reduction="none")
    each = [
        fused_caad_loss(*(x[i : i + 1] for x in (student, audio, text, target)), alpha=float(alpha[i]), reduction="none")
        for i in range(5)
    ]
    torch.testing.assert_close(loss, torch.cat(each), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(2), 2.0, 0.0), ValueError, "half_at: expected a finite number of nats > 0, got 0.0"),
        ((torch.ones(2), 2.0, 1e-300), ValueError, r"half_at: expected a finite number of nats > 0, got 1e-300 .*in float32"),
        ((torch.ones(2), -1.0, 0.1), ValueError, "alpha: expected a finite number >= 0, got -1.0"),
        ((torch.ones(2, dtype=torch.int64), 1.0, 0.1), TypeError, "divergence: expected a floating-point tensor"),
        (([1.0], 1.0, 0.1), TypeError, "divergence: expected a torch.Tensor, got list"),
        ((torch.ones(2), None, 0.1), ValueError, "alpha: expected a finite number >= 0, got None"),
        ((torch.ones(2), torch.tensor([1.0, -3.0]), 0.1), ValueError, "alpha: expected finite numbers >= 0, got -3.0"),
        ((torch.ones(2), torch.tensor(torch.nan), 0.1), ValueError, "alpha: expected finite numbers >= 0, got nan"),
        ((torch.ones(2), torch.ones(2, dtype=torch.complex64), 0.1), TypeError, "alpha: expected real numbers, got"),
        ((torch.ones(2), torch.ones(3), 0.1), ValueError, "alpha: expected a tensor that broadcasts to divergence's"),
        ((torch.ones(2), torch.ones(2, 1), 0.1), ValueError, "alpha: expected a tensor that broadcasts to divergence's"),
        ((torch.ones(2), 1.0, None), ValueError, "half_at: expected a finite number of nats > 0, got None"),
    ],
)
def test_mistakes_are_named(arguments, error, match):
    divergence, alpha, half_at = arguments
    with pytest.raises(error, match=match):
        adaptive_alpha(divergence, alpha, half_at=half_at)
