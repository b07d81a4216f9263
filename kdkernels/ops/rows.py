"""The row problem: what every kernel of the CAAD loss computes, one row of logits at a time.

Legend: B, T leading dimensions (row r = b * T + t), N = B * T rows, V_s / V_t widths of the student's and the teacher's
logits, V = ``spec.vocab`` valid ids.

Each backend (``native``, ``triton_caad``, ``cuda_caad``) solves a :class:`RowProblem`. It offers one function, ``caad_rows``,
with the signature of :class:`RowLauncher`.

Rows whose target is ``ignore_index`` are never read: their kd, ce and statistics are 0 and their gradient is 0.
A row with a target outside [0, V) or a negative or non-finite alpha gives NaN (the CPU front end raises ValueError before).

``mix_rows`` first turns several teachers into one such row: :mod:`kdkernels.ops.mixture`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")

# A logit below it counts as -inf in every implementation: libraries write masks as the lowest finite number of a dtype.
MASK_BELOW = -1e30

# Rows of RowResult.stats, in order. Entropies and the divergence are in nats, of the distributions at temperature tau.
STAT_NAMES = ("student_entropy", "teacher_entropy", "top1_agreement", "path_divergence")


def scalar(x: Any) -> Any:
    """``x`` as a float; while torch.compile traces, as a float64 tensor () on the CPU.

    The compiler makes a Python float that changes from call to call an input of its graph, but only where the float multiplies
    (adds to, divides, ...) a tensor. Where it goes into torch.full or an operator's list of numbers, its value of the moment
    becomes a constant. A float that is used in both ways is then stale there. So every number that a caller may change becomes a
    tensor here (or in :func:`filled`) before it is used.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device="cpu") * x
    return float(x)


def filled(shape: tuple[int, ...], x: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.full; see :func:`scalar`."""
    if torch.compiler.is_compiling():
        return torch.ones(shape, dtype=dtype, device=device) * x
    return torch.full(shape, float(x), dtype=dtype, device=device)


def legal_alpha(alpha: torch.Tensor) -> torch.Tensor:
    """alpha, but NaN where it is negative or not finite: for a contrast that no row kernel judges. The loss is NaN then."""
    return torch.where((alpha >= 0) & (alpha < math.inf), alpha, math.nan)


def packed_numbers(numbers: Sequence[Any]) -> torch.Tensor:
    """Floats, or what :func:`scalar` returned, as one tensor on the CPU for an operator, which reads it there."""
    if torch.compiler.is_compiling():
        return torch.stack([x if isinstance(x, torch.Tensor) else scalar(x) for x in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class RowSpec:
    """Everything of the row problem that is not a tensor.

    A logit l read from memory stands for ``softcap * tanh(scale * l / softcap)`` (``scale * l`` without a softcap); ``grad``
    is the gradient with respect to the value in memory.
    """

    vocab: int
    temperature: Any = 2.0  # float; like every number below a tensor () while torch.compile traces: see scalar
    divergence: str = "forward_kl"
    jsd_beta: Any = 0.5
    plausibility: Any = None  # or None
    ignore_index: int = -100
    with_kd: bool = True  # False: kd is not needed; it comes back as 0
    with_ce: bool = True  # False: ce is not needed (or there is no target); it comes back as 0
    student_scale: Any = 1.0
    teacher_scale: Any = 1.0
    student_softcap: Any = None  # or None
    teacher_softcap: Any = None  # or None

    @property
    def log_plausibility(self) -> float:
        """How far below the largest z_audio a token may be; 0 without a plausibility mask."""
        return 0.0 if self.plausibility is None else math.log(self.plausibility)

    def packed(self) -> tuple[list[int], torch.Tensor, str]:
        """(whole numbers and flags, numbers, divergence): an operator's arguments. Few, for each one costs time in every call."""
        whole, numbers, divergence = self.parts()
        return whole, packed_numbers(numbers), divergence

    def parts(self) -> tuple[list[int], list[Any], str]:
        """What :meth:`packed` packs."""
        return (
            [self.vocab, self.ignore_index, int(self.with_kd), int(self.with_ce)],
            [
                self.temperature,
                self.jsd_beta,
                0.0 if self.plausibility is None else self.plausibility,
                self.student_scale,
                self.teacher_scale,
                0.0 if self.student_softcap is None else self.student_softcap,
                0.0 if self.teacher_softcap is None else self.teacher_softcap,
            ],
            self.divergence,
        )

    @classmethod
    def unpacked(cls, whole: Sequence[int], numbers: torch.Tensor | Sequence[float], divergence: str) -> RowSpec:
        vocab, ignore_index, with_kd, with_ce = whole
        numbers = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
        temperature, jsd_beta, plausibility, student_scale, teacher_scale, student_softcap, teacher_softcap = numbers
        return cls(
            vocab=vocab,
            temperature=temperature,
            divergence=divergence,
            jsd_beta=jsd_beta,
            plausibility=plausibility or None,
            ignore_index=ignore_index,
            with_kd=bool(with_kd),
            with_ce=bool(with_ce),
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            student_softcap=student_softcap or None,
            teacher_softcap=teacher_softcap or None,
        )

    def of_student(self) -> RowSpec:
        """Without what concerns a teacher alone."""
        return dataclasses.replace(
            self, divergence="forward_kl", jsd_beta=0.5, plausibility=None, teacher_scale=1.0, teacher_softcap=None
        )


@dataclass(frozen=True)
class RowResult:
    """kd (N,) and ce (N,) float32, unweighted, kd with its tau^2; stats (len(STAT_NAMES), N) float32 or None."""

    kd: torch.Tensor
    ce: torch.Tensor
    stats: torch.Tensor | None
    loss: torch.Tensor | None = None  # (N,) float32: kd_coef kd + ce_coef ce, from a kernel that forms it

    @classmethod
    def empty(cls, rows: int, n_stats: int, device: torch.device) -> RowResult:
        """Memory for a kernel to write to; ``n_stats`` 0: no statistics."""
        # Each in memory of its own: Triton compiles a kernel again for a tensor that does not begin at a multiple of 16 bytes.
        kd, ce = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
        return cls(kd, ce, torch.empty(n_stats, rows, dtype=torch.float32, device=device) if n_stats else None)


class RowProblem(NamedTuple):
    """N rows and what is wanted of them."""

    student: torch.Tensor  # (B, T, V_s) fp32 | bf16 | fp16, last stride 1, any strides in front
    audio: torch.Tensor  # (B, T, V_t) likewise; its dtype may differ from the student's
    text: torch.Tensor | None  # (B, T, V_t), or None: plain distillation, alpha is not read
    target: torch.Tensor | None  # (N,) int64
    alpha: torch.Tensor  # (1,) or (N,) float32
    kd_coef: torch.Tensor  # (N,) float32: d loss / d kd_i
    ce_coef: torch.Tensor  # (N,) float32: d loss / d ce_i
    spec: RowSpec
    # None, or (B, T, V_s) with last stride 1, which receives kd_coef_i * d kd_i / d s + ce_coef_i * d ce_i / d s.
    # It may share `student`'s memory: row r of `grad` may overlap row r of `student` (and no other row), also at a smaller item
    # size; or likewise `audio`'s.
    grad: torch.Tensor | None = None
    want_stats: bool = False

    @property
    def rows(self) -> int:
        return self.student.shape[0] * self.student.shape[1]

    @property
    def with_ce(self) -> bool:
        return self.spec.with_ce and self.target is not None

    @property
    def reads_teacher(self) -> bool:
        return self.spec.with_kd or self.want_stats

    @property
    def masked(self) -> bool:
        """Whether the plausibility mask is looked for: only where the teacher is read at all."""
        return self.spec.plausibility is not None and self.reads_teacher

    @property
    def read(self) -> dict[str, torch.Tensor]:
        """The logits that a kernel reads, by their names."""
        named = {"student": self.student}
        if self.reads_teacher:
            named["audio"] = self.audio
            if self.text is not None:
                named["text"] = self.text
        return named

    def empty_result(self) -> RowResult:
        return RowResult.empty(self.rows, len(STAT_NAMES) if self.want_stats else 0, self.student.device)


class PlainTerms(NamedTuple):
    """The terms of a loss that is summed over tokens which all have the same alpha and factors. Most calls are such.

    The native library takes them in one call. The operations of torch that this saves take as long as the rows of few tokens.
    """

    spec: RowSpec
    target: torch.Tensor | None  # (N,) int64, contiguous
    alpha: float
    shares: tuple[float, float]  # of kd and ce: d loss / d kd_i is share / norm, and 0 at an ignored position
    norms: tuple[float | None, float | None]  # None: the number of positions that count; 0: the factor is 0


class RowLauncher(Protocol):
    """``caad_rows`` of a backend; :class:`RowProblem` says what the arguments are."""

    def __call__(
        self,
        student: torch.Tensor,
        audio: torch.Tensor,
        text: torch.Tensor | None,
        target: torch.Tensor | None,
        alpha: torch.Tensor,
        kd_coef: torch.Tensor,
        ce_coef: torch.Tensor,
        spec: RowSpec,
        *,
        grad: torch.Tensor | None = None,
        want_stats: bool = False,
    ) -> RowResult: ...


def row_launcher_of(solve: Callable[..., RowResult]) -> RowLauncher:
    """``caad_rows`` from the function that solves a :class:`RowProblem`, with that function's docstring.

    Keywords that the signature does not have go to ``solve``.
    """

    @functools.wraps(solve)
    def caad_rows(
        *arguments: Any, grad: torch.Tensor | None = None, want_stats: bool = False, **options: Any
    ) -> RowResult:
        return solve(RowProblem._make((*arguments, grad, want_stats)), **options)

    return caad_rows


class LinearTensors(NamedTuple):
    """Hidden states and LM heads of a student and its teacher, from which the logits of a row problem are made."""

    student_hidden: torch.Tensor  # (N, H_s); before flat() (..., H_s)
    student_weight: torch.Tensor  # (V_s, H_s)
    student_bias: torch.Tensor | None
    audio_hidden: torch.Tensor  # (N, H_t)
    text_hidden: torch.Tensor | None
    teacher_weight: torch.Tensor  # (V_t, H_t)
    teacher_bias: torch.Tensor | None

    def flat(self) -> LinearTensors:
        """Hidden states (N, H), and the teacher's tensors without a gradient."""

        def rows(hidden: torch.Tensor) -> torch.Tensor:
            return hidden.reshape(-1, hidden.shape[-1])

        return self._replace(
            student_hidden=rows(self.student_hidden),
            audio_hidden=rows(self.audio_hidden.detach()),
            text_hidden=None if self.text_hidden is None else rows(self.text_hidden.detach()),
            teacher_weight=self.teacher_weight.detach(),
            teacher_bias=None if self.teacher_bias is None else self.teacher_bias.detach(),
        )


def stat_count(teachers: int) -> int:
    """Rows of RowResult.stats with several teachers: the student's entropy, then one a teacher of each: kd, its entropy, top-1
    agreement, path divergence."""
    return 1 + teachers * len(STAT_NAMES)


def joined_stats(results: Sequence[RowResult]) -> torch.Tensor:
    """(stat_count, N) from the results against each teacher."""
    stats = torch.stack([r.stats for r in results if r.stats is not None], dim=1)  # (len(STAT_NAMES), K, N)
    return torch.cat([stats[0, :1], torch.stack([r.kd for r in results]), *stats[1:]])


def check_overlap(student: torch.Tensor, grad: torch.Tensor) -> None:
    """Raises ValueError for a gradient in the student's memory whose stores would reach logits before they are read."""
    if student.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr():
        return
    shift = grad.data_ptr() - student.data_ptr()
    row_bytes = student.shape[-1] * student.element_size()
    if 0 < shift < row_bytes or (shift == 0 and grad.element_size() > student.element_size()):
        raise ValueError(
            "grad: expected memory of its own, or rows that begin where the student's begin, with items no wider; got "
            f"rows that begin {shift} bytes later, {grad.dtype} over {student.dtype}"
        )
