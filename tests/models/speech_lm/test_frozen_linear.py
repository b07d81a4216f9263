import pytest
import torch
from torch import nn

from models.speech_lm.frozen_linear import use_bf16_products


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False)).double().requires_grad_(False)


def test_close_to_float32_with_gradient_to_the_input():
    exact, short = body(), body().float()
    assert use_bf16_products(short) == 2
    x = torch.randn(5, 7, 64, requires_grad=True)
    y = short(x)
    assert y.dtype == torch.float32
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    x64 = x.detach().double().requires_grad_()
    y64 = exact(x64)
    (y64 * direction).sum().backward()
    # Each product rounds two factors and the result to 8 bits: 2^-9 of the size each, some of it averaged out.
    for got, want in ((y, y64), (x.grad, x64.grad)):
        assert (got - want).norm() / want.norm() < 3 * 2**-9
        assert (got - want).norm() > 0


def test_layers_that_train_are_left_alone():
    model = body().float()
    model[0].requires_grad_(True)
    assert use_bf16_products(model) == 1
    assert type(model[0]) is nn.Linear


def test_nothing_of_it_is_saved():
    model = body().float()
    use_bf16_products(model)
    assert model.state_dict() == {}


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 4, 64)])
def test_any_leading_shape(shape):
    model = body().float()
    use_bf16_products(model)
    assert model(torch.randn(shape)).shape == (*shape[:-1], 32)
