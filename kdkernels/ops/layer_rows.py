"""The layer row problem: squared errors of hidden states, one row at a time, and the eager formula.

Legend: N rows (tokens), H width. Every backend (``native``, ``triton_layers``) offers a function of this signature::

    layer_rows(u, v, text, valid, alpha, coef, *, normalize, grad_u=None, grad_v=None) -> loss (N,) float32

    u        (N, H) fp32 | bf16 | fp16, last stride 1: the student's side
    v        (N, H) likewise: the teacher's side
    text     (N, H) in v's dtype, or None: v stands for v + alpha (v - text); not read where alpha is 0
    valid    (N,) bool or None: rows that are False are not read; their loss and gradients are 0
    alpha    (1,) or (N,) float32; a negative or non-finite one gives NaN (the CPU front end raises ValueError before)
    coef     (N,) float32: d total / d loss_i
    grad_u   None, or (N, H) which receives coef_i d loss_i / d u. May share u's memory, at no larger item size.
    grad_v   None, or the same for v (then without text). May share v's memory, at no larger item size.

    loss_i = sum_d (u_i - v_i)_d^2, of u / |u| and v / |v| with ``normalize``. A zero vector has no direction: it stays zero, and
    such a row has no gradient.

All arithmetic is in float32 (sums of a row in float64 on the CPU).
"""

from __future__ import annotations

import torch

from .rows import legal_alpha


def contrastive(v: torch.Tensor, text: torch.Tensor | None, alpha: torch.Tensor) -> torch.Tensor:
    """v + alpha (v - text) in at least float32, (N, H); NaN for an alpha that is negative or not finite."""
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    if text is None:
        return v
    a = legal_alpha(alpha).to(v.dtype).reshape(-1, 1)
    return torch.where(a == 0, v, v + a * (v - text.to(v.dtype)))


def squared_errors(u: torch.Tensor, v: torch.Tensor, *, normalize: bool) -> torch.Tensor:
    """loss (N,) by eager PyTorch; gradients by autograd."""
    if normalize:
        u, v = _unit(u), _unit(v)
        # Detached where one of them has no direction; the value stays.
        flat = (u.detach() == 0).all(-1, keepdim=True) | (v.detach() == 0).all(-1, keepdim=True)
        u, v = torch.where(flat, u.detach(), u), torch.where(flat, v.detach(), v)
    return (u - v).square().sum(-1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    squares = x.square().sum(-1, keepdim=True)
    zero = squares == 0  # before the root: its slope at 0 is infinite
    return torch.where(zero, torch.zeros_like(x), x / torch.where(zero, torch.ones_like(squares), squares).sqrt())
