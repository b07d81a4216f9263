"""The CPU kernels: loads the compiled library when first needed, and passes it addresses, sizes and strides.

``caad_rows`` solves the row problem (``rows``), ``mix_rows`` the mixture problem (``mixture``), ``NativeShard`` a rank's part of
rows over several ranks (``shards``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from .rows import DIVERGENCES, PlainTerms, RowProblem, RowResult, RowSpec, row_launcher_of
from .shards import STAT_SUMS, SUMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def import_extension(name: str) -> ModuleType:
    """The compiled module ``kdkernels.<name>``. Raises ImportError where there is none."""
    try:
        return importlib.import_module(f"kdkernels.{name}")
    except ModuleNotFoundError:
        # In a checkout whose package shadows the installed one, the library lies with the installed one.
        try:
            files = importlib.metadata.files("kdkernels") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        for file in files:
            if file.parent.name == "kdkernels" and file.name.startswith(f"{name}.") and file.suffix in (".so", ".pyd"):
                spec = importlib.util.spec_from_file_location(f"kdkernels.{name}", str(file.locate()))
                if spec is not None and spec.loader is not None:
                    module = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    return module
        raise


@functools.cache
def load_library() -> Any:
    """The extension module ``kdkernels._native``. Raises RuntimeError saying why it is missing and how to get it."""
    try:
        return import_extension("_native")
    except ImportError as error:
        raise RuntimeError(
            f"kdkernels' native CPU library (kdkernels._native) could not be loaded: {error}. `pip install .` in "
            "the checkout of kdkernels compiles it; that needs a C++17 compiler (GCC 9 or Clang 12, or newer). Or use "
            "impl='reference', which needs no library."
        ) from error


def available() -> bool:
    try:
        load_library()
    except RuntimeError:
        return False
    return True


def instruction_set() -> str:
    """ "generic", "avx2", "avx512" or "avx512_bf16": the best this machine has, unless KDKERNELS_CPU_ISA names another."""
    return os.environ.get("KDKERNELS_CPU_ISA") or load_library().best_isa()


def _solve_rows(problem: RowProblem) -> RowResult:
    """See :mod:`kdkernels.ops.rows`. Scratch: up to 12 bytes per vocabulary entry and thread."""
    lib, spec = load_library(), problem.spec
    out = problem.empty_result()
    loss = torch.empty_like(out.kd)
    p, keep = _teacher_problem(problem.audio, problem.text, problem.target, problem.alpha, spec)
    p.student_width = problem.student.shape[2]
    p.student = _row_tensor(problem.student)
    if problem.grad is not None:
        p.grad = _row_tensor(problem.grad)
    kd_coef, ce_coef = problem.kd_coef.float().contiguous(), problem.ce_coef.float().contiguous()
    p.kd_coef, p.ce_coef = kd_coef.data_ptr(), ce_coef.data_ptr()
    p.kd, p.ce, p.loss = out.kd.data_ptr(), out.ce.data_ptr(), loss.data_ptr()
    if out.stats is not None:
        p.stats = out.stats.data_ptr()
    p.with_kd, p.with_ce = spec.with_kd, problem.with_ce
    _set_head(p, "student", spec.student_scale, spec.student_softcap)
    lib.caad_rows(p, instruction_set())
    if problem.grad is not None and spec.student_softcap is not None:
        # The slope of the softcap at NaN is NaN, also where no term has a factor.
        silent = ((kd_coef == 0) & (ce_coef == 0)).view(*problem.grad.shape[:2])
        if bool(silent.any()):
            problem.grad[silent] = 0
    del keep, kd_coef, ce_coef  # until here: the library reads at their addresses
    return RowResult(out.kd, out.ce, out.stats, loss)


caad_rows = row_launcher_of(_solve_rows)


def _set_head(problem: Any, side: str, scale: float, softcap: float | None) -> None:
    """Every field costs time in every call. These are seldom other than what they are at first."""
    if scale != 1.0:
        setattr(problem, f"{side}_scale", scale)
    if softcap is not None:
        setattr(problem, f"{side}_softcap", softcap)


def token_factors(
    target: torch.Tensor | None,
    rows: int,
    vocab: int,
    ignore_index: int,
    shares: tuple[float, float],
    kd_norm: float | None,
    ce_norm: float | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(d loss / d kd_i, d loss / d ce_i), (N,) float32 each: share / norm, and 0 at ignored positions and for a norm of 0.

    ``target`` is (N,) int64, contiguous, or None: no position is ignored. A norm None is the number of the others.
    Returns None for a target with an id outside [0, vocab).
    """
    kd_coef, ce_coef = (torch.empty(rows, dtype=torch.float32, device="cpu") for _ in range(2))
    address = 0 if target is None else target.data_ptr()
    norms = (-1.0 if norm is None else norm for norm in (kd_norm, ce_norm))
    found = load_library().token_factors(
        rows, address, vocab, ignore_index, *shares, *norms, kd_coef.data_ptr(), ce_coef.data_ptr()
    )
    return None if found else (kd_coef, ce_coef)


def plain_rows(
    student: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor | None,
    terms: PlainTerms,
    *,
    grad: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """(loss per token (N,) float32, number of ids outside [0, vocab)): :func:`token_factors` and the rows in one call.

    With such an id neither the loss nor the gradient is written. The logits are those of :class:`RowProblem`.
    """
    lib, (outer, inner, width), (spec, target, alpha, shares, norms) = load_library(), student.shape, terms
    loss = torch.empty(outer * inner, dtype=torch.float32, device="cpu")
    bad = lib.plain_rows(
        _row_tensor(student), _row_tensor(audio), _row_tensor(text), _row_tensor(grad),
        0 if target is None else target.data_ptr(), loss.data_ptr(), outer, inner, spec.vocab, width, alpha, spec.temperature,
        _divergences()[spec.divergence], spec.jsd_beta, spec.plausibility is not None, spec.log_plausibility, spec.ignore_index,
        spec.with_kd, spec.with_ce, *shares, *(-1.0 if norm is None else norm for norm in norms), torch.get_num_threads(),
        instruction_set(),
    )  # fmt: skip
    return loss, bad


def _row_tensor(x: torch.Tensor | None) -> Any:
    if x is None:
        return _no_rows()
    outer, inner, *_ = x.stride()
    return load_library().RowTensor(x.data_ptr(), _codes()[x.dtype], outer, inner)


@functools.cache
def _no_rows() -> Any:
    return load_library().RowTensor(0, load_library().DType.f32, 0, 0)


@functools.cache
def _divergences() -> dict[str, Any]:
    """The library's codes of the divergences."""
    return {name: getattr(load_library().Divergence, name) for name in DIVERGENCES}


@functools.cache
def _codes() -> dict[torch.dtype, Any]:
    """The library's codes of the dtypes."""
    names = load_library().DType
    return {torch.float32: names.f32, torch.bfloat16: names.bf16, torch.float16: names.f16}


def _teacher_problem(
    audio: torch.Tensor, text: torch.Tensor | None, target: torch.Tensor | None, alpha: torch.Tensor, spec: RowSpec
) -> tuple[Any, list[torch.Tensor]]:
    """(the library's RowProblem with what concerns the teacher and both sides alike, new tensors that it points into)"""
    lib = load_library()
    keep: list[torch.Tensor] = []
    p = lib.RowProblem()
    p.outer, p.inner, p.vocab = audio.shape[0], audio.shape[1], spec.vocab
    p.audio = _row_tensor(audio)
    if text is not None:
        keep.append(alpha := alpha.float().contiguous())
        p.text, p.alpha, p.alpha_stride = _row_tensor(text), alpha.data_ptr(), int(alpha.numel() > 1)
    if target is not None:
        keep.append(target := target.contiguous())
        p.target = target.data_ptr()
    p.temperature = spec.temperature
    if spec.divergence != "forward_kl":
        p.divergence, p.jsd_beta = _divergences()[spec.divergence], spec.jsd_beta
    if spec.plausibility is not None:
        p.has_plausibility, p.log_plausibility = True, spec.log_plausibility
    p.ignore_index = spec.ignore_index
    _set_head(p, "teacher", spec.teacher_scale, spec.teacher_softcap)
    p.threads = torch.get_num_threads()
    return p, keep


class NativeShard:
    """See :mod:`kdkernels.ops.shards`. No scratch: what comes after the exchange reads the slice again."""

    def __init__(self, problem: RowProblem, first: int) -> None:
        lib, spec = load_library(), problem.spec
        self.problem = problem
        s = lib.ShardProblem()
        p, self.keep = _teacher_problem(problem.audio, problem.text, problem.target, problem.alpha, spec)
        p.student_width, p.student = problem.student.shape[2], _row_tensor(problem.student)
        if problem.grad is not None:
            p.grad = _row_tensor(problem.grad)
        p.with_kd, p.with_ce = spec.with_kd, problem.with_ce
        p.student_scale, p.student_softcap = spec.student_scale, spec.student_softcap or 0.0
        s.source, s.first, s.with_stats = p, first, problem.want_stats
        self.shard = s

    def _run(self, part: str) -> None:
        lib = load_library()
        self.shard.part = getattr(lib.ShardPart, part)
        lib.shard_rows(self.shard, instruction_set())

    def _kept(self, x: torch.Tensor) -> int:
        """The tensor's address, which the library may read from here on."""
        self.keep.append(x)
        return x.data_ptr()

    def audio_max(self) -> torch.Tensor:
        out = torch.empty(self.problem.rows, dtype=torch.float32, device="cpu")
        self.shard.out = out.data_ptr()
        self._run("audio_max")
        return out

    def sums(self, audio_max: torch.Tensor | None) -> torch.Tensor:
        kinds = len(SUMS) + self.problem.want_stats * len(STAT_SUMS)
        out = torch.empty(kinds, self.problem.rows, dtype=torch.float64, device="cpu")
        self.shard.sums = self._kept(out)
        if audio_max is not None:
            self.shard.audio_max = self._kept(audio_max)
        self._run("sums")
        return out

    def jsd_sums(self, factors: torch.Tensor) -> torch.Tensor:
        out = torch.empty(2, self.problem.rows, dtype=torch.float64, device="cpu")
        self.shard.factors, self.shard.out = self._kept(factors), out.data_ptr()
        self._run("jsd")
        return out

    def gradient(self, factors: torch.Tensor) -> None:
        self.shard.factors = self._kept(factors)
        self._run("gradient")


def mix_rows(
    audio: torch.Tensor,
    text: torch.Tensor | None,
    target: torch.Tensor | None,
    alpha: torch.Tensor,
    share: torch.Tensor,
    spec: RowSpec,
    total: torch.Tensor,
    sums: torch.Tensor | None,
    *,
    last: bool,
) -> torch.Tensor:
    """See :mod:`kdkernels.ops.mixture`; sums are float64. Scratch: 4 bytes per vocabulary entry and thread."""
    lib = load_library()
    m = lib.MixProblem()
    m.first, m.last = sums is None, last
    if sums is None:
        sums = torch.empty(2, share.numel(), dtype=torch.float64, device="cpu")
    share = share.float().contiguous()
    m.source, keep = _teacher_problem(audio, text, target, alpha, spec)
    m.total, m.share, m.sums = _row_tensor(total), share.data_ptr(), sums.data_ptr()
    lib.mix_rows(m, instruction_set())
    del keep
    return sums


def projected_rows(
    student: torch.Tensor,
    ids: torch.Tensor,
    probabilities: torch.Tensor,
    mass: torch.Tensor,
    rest: torch.Tensor,
    target: torch.Tensor | None,
    kd_coef: torch.Tensor,
    ce_coef: torch.Tensor,
    spec: RowSpec,
    *,
    grad: torch.Tensor | None,
    out: RowResult,
) -> None:
    """See :mod:`kdkernels.ops.projection`; fills ``out`` and ``grad``. Scratch: up to 8 bytes per vocabulary entry and thread."""
    lib = load_library()
    q = lib.ProjectedProblem()
    p = lib.RowProblem()
    p.outer, p.inner, p.vocab, p.student_width = student.shape[0], student.shape[1], spec.vocab, student.shape[2]
    p.student = _row_tensor(student)
    if grad is not None:
        p.grad = _row_tensor(grad)
    ids, probabilities = ids.to(torch.int32).contiguous(), probabilities.float().contiguous()
    mass, rest = mass.float().contiguous(), rest.double().contiguous()
    kd_coef, ce_coef = kd_coef.float().contiguous(), ce_coef.float().contiguous()
    if target is not None:
        target = target.contiguous()
        p.target = target.data_ptr()
    p.kd_coef, p.ce_coef = kd_coef.data_ptr(), ce_coef.data_ptr()
    p.kd, p.ce = out.kd.data_ptr(), out.ce.data_ptr()
    p.stats = 0 if out.stats is None else out.stats.data_ptr()
    p.with_kd, p.with_ce = spec.with_kd, spec.with_ce and target is not None
    p.temperature, p.student_scale, p.ignore_index = spec.temperature, spec.student_scale, spec.ignore_index
    p.threads = torch.get_num_threads()
    q.source, q.top_k = p, ids.shape[1]
    q.ids, q.probabilities = ids.data_ptr(), probabilities.data_ptr()
    q.mass, q.rest = mass.data_ptr(), rest.data_ptr()
    lib.projected_rows(q, instruction_set())


def layer_rows(
    u: torch.Tensor,
    v: torch.Tensor,
    text: torch.Tensor | None,
    valid: torch.Tensor | None,
    alpha: torch.Tensor,
    coef: torch.Tensor,
    *,
    normalize: bool,
    grad_u: torch.Tensor | None = None,
    grad_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :mod:`kdkernels.ops.layer_rows`. Scratch: two float32 rows a thread."""
    lib = load_library()
    loss = torch.empty(u.shape[0], dtype=torch.float32, device="cpu")
    coef = coef.float().contiguous()
    p = lib.LayerProblem()
    p.rows, p.width = u.shape
    for name, x in (("u", u), ("v", v), ("text", text), ("grad_u", grad_u), ("grad_v", grad_v)):
        if x is not None:
            setattr(p, name, _row_tensor(x))
    if text is not None:
        alpha = alpha.float().contiguous()
        p.alpha, p.alpha_stride = alpha.data_ptr(), int(alpha.numel() > 1)
    if valid is not None:
        valid = valid.contiguous()
        p.valid = valid.data_ptr()
    p.coef, p.loss = coef.data_ptr(), loss.data_ptr()
    p.normalize, p.threads = normalize, torch.get_num_threads()
    lib.layer_rows(p, instruction_set())
    return loss


def multiplies_bf16() -> bool:
    """Whether :func:`bf16_gemm` is fastest here: with vdpbf16ps and without AMX. With AMX torch's own library is faster."""
    return available() and instruction_set() == "avx512_bf16" and not has_amx()


def has_amx() -> bool:
    """Whether torch's own library can use the processor's AMX. Only a private name of torch tells."""
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def bf16_gemm(
    parts: Sequence[torch.Tensor],
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    weight_by_rows: bool = False,
    as_items: bool = False,
) -> None:
    """out (C, V) float32 = sum of parts (C, H) @ weight (V, H).T, all bf16, accumulated in float32.

    At most two parts: the weight is read once for both. Last strides are 1 and H is even. Scratch: 256 KiB a thread.

    ``accumulate`` adds to what out holds. With ``weight_by_rows`` the weight is given as (H, V). ``as_items``: from ITEM_TOKENS
    tokens on, the sum of the two parts and the weight are rounded to 16-bit integers, in groups of 128 along H, which takes one
    product instead of two. The relative error is near 6e-5, that of two parts 3e-6. Scratch: 10 H bytes a token more.
    """
    lib = load_library()
    g = lib.Bf16Gemm()
    items: tuple[torch.Tensor, ...] = ()
    if as_items and len(parts) == 2 and len(out) >= ITEM_TOKENS:
        items = _as_items(parts[0].float() + parts[1].float(), weight, lib.ITEM_GROUP, lib.ITEM_NORM)
        g.items, g.item_step, g.column_factor = (x.data_ptr() for x in items)
    for number, part in enumerate(parts):
        g.add_part(number, part.data_ptr(), part.stride(0))
    g.w, g.ldw = weight.data_ptr(), weight.stride(0)
    g.c, g.ldc = out.data_ptr(), out.stride(0)
    g.m, g.n, g.k = out.shape[0], out.shape[1], parts[0].shape[1]
    g.accumulate, g.w_by_rows = accumulate, weight_by_rows
    g.threads = torch.get_num_threads()
    lib.gemm_bf16(g)
    if items:
        step = items[1]
        if not bool((lost := ~step.isfinite().all(1)).any()):
            return
        # Tokens with infinities or NaN, or too large for float32: integers cannot say which logits are infinite.
        assert not accumulate
        few = torch.empty(int(lost.sum()), out.shape[1], dtype=torch.float32)
        bf16_gemm([x[lost] for x in parts], weight, few, weight_by_rows=weight_by_rows)
        out[lost] = few


# For fewer tokens, to make integers of the weight takes longer than their product saves.
ITEM_TOKENS = 32


def _as_items(x: torch.Tensor, weight: torch.Tensor, size: int, norm: float) -> tuple[torch.Tensor, ...]:
    """x (C, H) as (C, G size) int16, 0 beyond the width; the step of each group of ``size``, (C, G); factors (G size,).

    x is divided by the factors, and the weight will be multiplied by them. The norm of a group of integers is at most ``norm``.
    Steps of groups with infinities or NaN are not finite.
    """
    groups = -(-x.shape[1] // size)
    spare = groups * size - x.shape[1]
    factor = torch.nn.functional.pad(_balance(x, weight), (0, spare), value=1.0)
    x = torch.nn.functional.pad(x, (0, spare)).div_(factor).view(len(x), groups, size)
    most = x.abs().amax(-1, keepdim=True)
    most = torch.where(most > 1e-30, most, 1.0)  # a group of denormals counts as 0
    step = most * torch.maximum((x / most).norm(dim=-1, keepdim=True) / norm, torch.tensor(1 / 32767))
    return (x / step).round_().to(torch.int16), step[..., 0], factor


def _balance(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(H,) powers of two that make a column's items in x (C, H) and in the weight about equally large, and 1 where they are.

    Without them a large column of the states, which a head often meets with small weights, would set the step of its group.
    """
    sizes = []
    for columns in (x.abs().amax(0), weight[:: max(1, len(weight) // 64)].float().square_().mean(0).sqrt_()):
        finite = columns.nan_to_num(0.0, 0.0)
        least = (1e-4 * finite.max()).clamp_(min=1e-30)
        sizes.append(torch.where(columns.isfinite(), finite.clamp_(min=least), math.nan))
    half = (sizes[0] / sizes[1]).log2_().div_(2)
    return torch.exp2((half - half.nanmedian()).trunc_().nan_to_num_(0.0))


def transpose_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """(N, M) bf16, contiguous, of x (M, N) float32, whose last stride is 1: what `x.T.to(torch.bfloat16).contiguous()` is."""
    lib = load_library()
    out = torch.empty(x.shape[1], x.shape[0], dtype=torch.bfloat16)
    t = lib.TransposeToBf16()
    t.x, t.ldx, t.out, t.ldo = x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0)
    t.m, t.n, t.threads = x.shape[0], x.shape[1], torch.get_num_threads()
    lib.transpose_to_bf16(t)
    return out
