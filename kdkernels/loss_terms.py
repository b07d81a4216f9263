"""Turns the options of a call into what its kernels need, and their results into the shape that the caller gets.

Legend: ... leading dimensions (their product is N tokens), V valid ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_not_negative, check_shape, check_tensor
from .loss_options import LossOptions
from .ops import native
from .ops.dispatch import checks_enabled
from .ops.rows import PlainTerms, RowResult, RowSpec, filled, scalar
from .ops.schema import all_stats, check_values, first_illegal, runs_directly, weighted

_NO_TARGET = -100  # the ignored id where a mask alone says which positions count


class LossTerms(NamedTuple):
    """One call's options as tensors and a RowSpec; a loss is the sum of kd_coef kd_i + ce_coef ce_i."""

    spec: RowSpec
    target: Tensor | None  # (N,)
    alpha: Tensor  # (1,) or (N,)
    kd_coef: Tensor  # (N,): d loss / d kd_i
    ce_coef: Tensor
    leading: torch.Size
    reduction: str
    checked: bool  # whether the ids of `target` and `alpha` have been looked at

    @classmethod
    def build(
        cls,
        options: LossOptions,
        target: Tensor | None,
        *,
        leading: torch.Size,
        device: torch.device,
        dtype: torch.dtype,
        widths: tuple[int, ...],
    ) -> LossTerms:
        """Raises ValueError or TypeError for tensors among the options that do not fit.

        Args:
            dtype: in which the loss is summed.
            widths: vocabularies of the student and of each teacher; () where only the operator finds them out: the spec's vocab
                is then vocab_size, or 0.
        """
        vocab = valid_ids(options.vocab_size, widths) if widths else options.vocab_size or 0
        has_target = target is not None
        spec = options.row_spec(vocab, has_target=has_target)
        if target is not None:
            target = _flat_target(target, leading, device)
        if options.mask is not None:
            mask = _flat_mask(options.mask, leading, device)
            if target is None:  # nobody reads the ids: they only say which positions count
                spec = dataclasses.replace(spec, ignore_index=_NO_TARGET)
                target = torch.zeros(mask.shape, dtype=torch.int64, device=device)
            target = torch.where(mask, target, spec.ignore_index)
        alpha = alpha_tensor("alpha", options.alpha, leading, device, dtype)
        coefs = _native_coefficients(options, target, spec, math.prod(leading), has_target, device, dtype)
        checked = coefs is not None and not isinstance(options.alpha, Tensor)
        if coefs is None:
            valid = None if target is None else target != spec.ignore_index
            coefs = _coefficients(options, valid, has_target, leading, device, dtype)
        return cls(spec, target, alpha, *coefs, leading, options.reduction, checked)

    def check(self) -> None:
        """ValueError for values of target and alpha that are out of range, where looking at them costs no device sync."""
        if not self.checked:
            check_values(self.target, self.alpha, self.spec.vocab, self.spec.ignore_index)

    # Methods, since torch.compile of torch 2.9 and 2.10 does not know properties of a named tuple.

    def counts(self) -> tuple[Tensor, Tensor]:
        """(N,) bool each: whether a token's kd and its ce have a factor."""
        return self.kd_coef != 0, self.ce_coef != 0

    def is_reduced(self) -> bool:
        return self.reduction != "none"

    def shaped(self, loss: Tensor) -> Tensor:
        """Brings per-token (N,) or reduced losses into the caller's shape."""
        if not self.is_reduced():
            return loss.reshape(self.leading)
        return loss.sum() if loss.dim() else loss

    def weigh_reference(self, result: RowResult) -> tuple[Tensor, Tensor]:
        """(loss per token, statistics where there are any), values checked."""
        if not torch.compiler.is_compiling():
            self.check()
        loss = weighted(result.kd, result.ce, self.kd_coef, self.ce_coef)
        return loss, loss if result.stats is None else all_stats(result)


def plain_terms(
    options: LossOptions, target: Tensor | None, *, leading: torch.Size, device: torch.device, widths: tuple[int, ...]
) -> PlainTerms | None:
    """The terms of a loss that is summed over tokens which are all alike. None where the options ask for more.

    Raises as :meth:`LossTerms.build`.
    """
    has_target = target is not None
    alike = _alike(options, has_target)
    if alike is None or isinstance(options.alpha, Tensor) or options.mask is not None or options.reduction == "none":
        return None
    spec = options.row_spec(valid_ids(options.vocab_size, widths), has_target=has_target)
    flat = None if target is None else _flat_target(target, leading, device)
    return PlainTerms(spec, flat, float(options.alpha), *alike)


def valid_ids(vocab_size: int | None, widths: tuple[int, ...]) -> int:
    vocab = min(widths)
    if vocab_size is not None:
        if vocab_size > vocab:
            teachers = ", ".join(map(str, widths[1:]))
            raise ValueError(
                f"vocab_size: expected 1 to {vocab} (student {widths[0]}, teacher {teachers}), got {vocab_size}"
            )
        vocab = vocab_size if isinstance(vocab_size, (int, torch.SymInt)) else int(vocab_size)
    if vocab < 1:
        raise ValueError(
            f"student_logits: expected a vocabulary of at least 1, got widths {' and '.join(map(str, widths))}"
        )
    return vocab


def _flat_target(target: Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    """(N,)"""
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 ids, got {target.dtype}")
    check_shape("target", target, leading)
    if target.device != device:
        raise ValueError(f"target: expected device {device}, got {target.device}")
    return target.reshape(-1).contiguous()


def _flat_mask(mask: Tensor, leading: torch.Size, device: torch.device) -> Tensor:
    """(N,) bool"""
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask: expected bool, or whole numbers that are 0 where a position does not count, got {mask.dtype}")
    check_shape("mask", mask, leading)
    if mask.device != device:
        raise ValueError(f"mask: expected device {device}, got {mask.device}")
    return mask.reshape(-1) != 0


def alpha_tensor(
    name: str, alpha: float | Tensor, leading: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(1,) or (N,)"""
    if not isinstance(alpha, Tensor):
        check_not_negative(name, alpha)
        return filled((1,), alpha, dtype=dtype, device=device)
    if not (alpha.is_floating_point() or alpha.dtype in (torch.int32, torch.int64)):
        raise TypeError(f"{name}: expected a floating-point tensor, got {alpha.dtype}")
    if alpha.dim() and alpha.shape != leading:
        raise ValueError(f"{name}: expected a number or a tensor {tuple(leading)}, got {tuple(alpha.shape)}")
    return values_on(name, alpha, device, dtype).reshape(-1)


def _native_coefficients(
    options: LossOptions,
    target: Tensor | None,
    spec: RowSpec,
    rows: int,
    has_target: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """What :func:`_coefficients` returns, in one call of the native library that also looks at the ids. None: it does not apply.

    For few tokens the operations of torch that it saves take as long as the row kernel. It does not apply where tokens have
    weights, a norm is a tensor, an id is out of range, or the tensors are not on the CPU.
    """
    if device.type != "cpu" or dtype != torch.float32 or spec.vocab < 1 or not runs_directly(target) or not native.available():
        return None
    alike = _alike(options, has_target)
    if alike is None:
        return None
    shares, norms = alike
    return native.token_factors(target, rows, spec.vocab, spec.ignore_index, shares, *norms)


def _alike(options: LossOptions, has_target: bool) -> tuple[tuple[float, float], tuple[float | None, float | None]] | None:
    """(shares of kd and ce, their norms; None: the number of tokens that count) where the tokens that count have equal factors.

    None where tokens have weights or a norm is a tensor.
    """
    kd_norm, ce_norm = options.kd_normalizer, options.ce_normalizer
    if options.kd_token_weight is not None or options.ce_token_weight is not None:
        return None
    if isinstance(kd_norm, Tensor) or isinstance(ce_norm, Tensor):
        return None
    usual = None if options.reduction == "mean" else 1.0
    share = float(options.kd_share(has_target=has_target))
    return (share, 1.0 - share), (usual if kd_norm is None else float(kd_norm), usual if ce_norm is None else float(ce_norm))


def _coefficients(
    options: LossOptions,
    valid: Tensor | None,
    has_target: bool,
    leading: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """d loss / d kd_i and d loss / d ce_i, (N,) each. ``valid`` None: every position counts."""

    def of_term(name: str, weight: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
        w = token_weight(f"{name}_token_weight", weight, leading, valid, device, dtype)
        norm = _normalizer(f"{name}_normalizer", normalizer, device, dtype)
        if norm is None and options.reduction == "mean":
            norm = w.sum()
        return w if norm is None else torch.where(norm > 0, w / norm, 0.0)

    kd = of_term("kd", options.kd_token_weight, options.kd_normalizer)
    given = (options.kd_token_weight, options.ce_token_weight, options.kd_normalizer, options.ce_normalizer)
    alike = all(x is None for x in given)
    ce = kd if alike else of_term("ce", options.ce_token_weight, options.ce_normalizer)
    share = scalar(options.kd_share(has_target=has_target))
    return share * kd, (1.0 - share) * ce


def token_weight(
    name: str,
    weight: Tensor | None,
    leading: torch.Size,
    valid: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(N,) weights, 0 at ignored positions."""
    if weight is None:
        return torch.ones(math.prod(leading), dtype=dtype, device=device) if valid is None else valid.to(dtype)
    check_shape(name, weight, leading)
    if weight.device != device:
        raise ValueError(f"{name}: expected device {device}, got {weight.device}")
    weight = values_on(name, weight, device, dtype).reshape(-1)
    weight = weight if valid is None else torch.where(valid, weight, 0.0)
    check_amounts(name, weight)
    return weight


def _normalizer(name: str, value: float | Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return filled((), value, dtype=dtype, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got {tuple(value.shape)}")
    value = values_on(name, value, device, dtype).reshape(())
    check_amounts(name, value)
    return value


def check_amounts(name: str, x: Tensor) -> None:
    """ValueError for weights or divisors that are negative or not finite, where looking at them costs no device sync."""
    if looked_at(x.device) and (bad := first_illegal(x)) is not None:
        raise ValueError(f"{name}: expected finite numbers >= 0, got {bad}")


def values_on(name: str, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of an option where the loss is computed, without a gradient."""
    if x.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.device.type == "meta" and device.type != "meta":
        raise ValueError(f"{name}: expected a tensor with values, got one on the device meta")
    return x.detach().to(device=device, dtype=dtype)


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """What F.linear makes of its operands under torch.autocast: its dtype, for every floating dtype but float64; else unchanged.

    Autograd undoes the cast, so a gradient has the dtype of the caller's tensor.
    """
    device = next(x.device.type for x in tensors if x is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def accumulation_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype in which a loss of tensors of these dtypes is summed."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def looked_at(device: torch.device) -> bool:
    """Whether values of tensors on ``device`` are checked in this call."""
    return not torch.compiler.is_compiling() and checks_enabled(device)
