"""A graph that is kept: what the first backward handed out may be changed before the second."""

from __future__ import annotations

import pytest
import torch
from cases import hidden, logits

from kdkernels import TeacherSource, fused_caad_loss, fused_layer_mse_loss, fused_linear_caad_loss
from kdkernels import fused_linear_multi_teacher_loss as fused_sources


def rows_loss():
    student, *others = logits(4)
    return fused_caad_loss(student, *others), [student]


def linear_loss():
    arguments = hidden(9)
    leaves = [arguments["student_hidden"], arguments["student_weight"].requires_grad_()]
    return fused_linear_caad_loss(**arguments), leaves


def sources_loss():
    arguments = hidden(9)
    leaves = [arguments["student_hidden"], arguments["student_weight"].requires_grad_()]
    sources = [TeacherSource(arguments["teacher_audio_hidden"], arguments["teacher_weight"])] * 2
    return fused_sources(*leaves, sources, arguments["target"]), leaves


def layers_loss():
    torch.manual_seed(0)
    student, projection = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    return fused_layer_mse_loss([student], [torch.randn(9, 3)], [projection]), [student, projection]


@pytest.mark.parametrize("divisor", [1, 4])
@pytest.mark.parametrize("make", [rows_loss, linear_loss, sources_loss, layers_loss])
def test_a_changed_gradient_does_not_reach_the_second_backward(make, divisor):
    loss, leaves = make()
    loss = loss / divisor
    loss.backward(retain_graph=True)
    expected = [x.grad.clone() for x in leaves]
    for leaf in leaves:
        leaf.grad.mul_(100)
        leaf.grad = None
    loss.backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)
