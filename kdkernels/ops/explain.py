"""Says which implementation a call would run, why, in what chunks and about how long, without running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import is_whole
from ..loss_options import LinearLossOptions
from .chunking import (
    CHUNKS,
    DEVICES,
    WITHOUT_LOGITS,
    ChunkPlan,
    DeviceModel,
    Prediction,
    choose_path,
    device_model,
    known_device,
    plan_chunks,
    predict,
    row_items,
)
from .dispatch import IMPLEMENTATIONS, choose, choose_on_absent, gemm_sums_wanted, overlap_wanted


def explain(
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    n_tokens: int = 8192,
    vocab_size: int = 128256,
    student_hidden_size: int | None = None,
    teacher_hidden_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    round_contrast: bool = False,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    gradient: bool = True,
    divergence: str = "forward_kl",
    student_softcap: float | None = None,
    head_trains: bool = False,
    projected: bool = False,
    return_stats: bool = False,
) -> str:
    """The plan of a loss call in words: the implementation and the reason for it.

    With ``student_hidden_size`` also the path and the chunks of the linear loss, and whether a
    :class:`kdkernels.TeacherProjection` could take the teacher's place. With ``teacher_hidden_size`` too also what that would
    save, and on a GPU whose rates are known the time that the call should take.

    Args:
        device: of the logits or hidden states; or a GPU's name ("A100", "H100", "H200", "B200", "RTX 4090", "RTX 5090"). That
            GPU need not be in this machine, and this machine is not asked: a CUDA build of PyTorch with Triton is assumed.
        dtype: of the hidden states and weights; n_tokens: N; vocab_size: V; student_hidden_size: H_s, or None for
            ``fused_caad_loss``; teacher_hidden_size: H_t.
        gradient: whether one is wanted (False: evaluation). head_trains: whether the student's head wants one.
        projected: whether the call is :func:`kdkernels.fused_linear_projected_loss`.
        The rest: as in :func:`kdkernels.fused_linear_caad_loss`.

    For each implementation that cannot run the text says why. Nothing is allocated. No rate is measured by this call; the text
    says where a device's rates come from. Times are work divided by the device's rate, with every multiprocessor busy and the
    two teacher paths collapsed. Measured times are longer.

    Raises ValueError or TypeError for an option that the loss does not take.
    """
    name, device = _device(device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    for size_name, size in (("n_tokens", n_tokens), ("vocab_size", vocab_size)):
        if size is None:
            raise TypeError(f"{size_name}: expected an int, got None")
    _check_sizes(n_tokens=n_tokens, student_hidden_size=student_hidden_size, teacher_hidden_size=teacher_hidden_size)
    LinearLossOptions(
        impl=impl, divergence=divergence, vocab_size=vocab_size, chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes,
        logits_dtype=logits_dtype, round_contrast=round_contrast, student_softcap=student_softcap, return_stats=return_stats,
    )  # fmt: skip
    logits_dtype = torch.float32 if logits_dtype is None else logits_dtype
    obstacles = _against_a_projection(divergence, student_softcap, head_trains)
    if projected and obstacles:
        raise ValueError(f"projected: expected False with {' and '.join(obstacles)}, got True")
    call = _Call(
        name=name, device=device, dtype=dtype, n_tokens=n_tokens, vocab_size=vocab_size,
        student_hidden_size=student_hidden_size, teacher_hidden_size=teacher_hidden_size, logits_dtype=logits_dtype,
        round_contrast=round_contrast, chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes, gradient=gradient,
        divergence=divergence, head_trains=head_trains, projected=projected, return_stats=return_stats,
    )  # fmt: skip
    chosen, lines = call.implementations(impl)
    if student_hidden_size is None:
        return "\n".join(lines)
    path, reason = call.path(chosen)
    lines.append(f"path: {path} ({reason})")
    if path == CHUNKS and call.is_unknown():
        lines.append(
            "chunks: not known without the CUDA device (its free memory and multiprocessors decide); name one, device='H100'"
        )
        return "\n".join(lines)
    if path == CHUNKS:
        lines += call.chunks(chosen, student_hidden_size)
    if gradient and not projected:
        lines.append(_projection_in_words(obstacles, student_hidden_size, teacher_hidden_size, call.teacher_gemms))
    return "\n".join(lines + call.times(path))


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call to explain; see :func:`explain`. ``name``: of a GPU in DEVICES that need not be here; None: ``device`` is."""

    name: str | None
    device: torch.device
    dtype: torch.dtype
    n_tokens: int
    vocab_size: int
    student_hidden_size: int | None
    teacher_hidden_size: int | None
    logits_dtype: torch.dtype
    round_contrast: bool
    chunk_tokens: int | None
    workspace_bytes: int | None
    gradient: bool
    divergence: str
    head_trains: bool
    projected: bool
    return_stats: bool

    @property
    def teacher_tensors(self) -> int:
        """Tensors of teacher logits in a chunk."""
        return 0 if self.projected else 2 if self.return_stats else 1

    @property
    def teacher_gemms(self) -> int:
        """Products with the teacher's head. Float32 logits take the contrast of bf16 states as the sum of two bf16 tensors."""
        if self.projected or self.return_stats:
            return self.teacher_tensors
        in_two = self.dtype == torch.bfloat16 and self.logits_dtype == torch.float32 and not self.round_contrast
        return 2 if in_two else 1

    def is_unknown(self) -> bool:
        """Whether the call is for a GPU of this machine, which has none."""
        return self.name is None and self.device.type == "cuda" and not torch.cuda.is_available()

    def implementations(self, impl: str) -> tuple[str | None, list[str]]:
        """The implementation that would run, or None; and in words why, and whether each of the others could."""
        lines, chosen = [], None
        if self.name is not None:
            assumed = "Triton and a build for that GPU are assumed, this machine is not asked"
            lines.append(f"{self.name}: taken from a table; {assumed}")
        try:
            chosen, reason = self._rule(impl)
            lines.append(f"impl={impl!r} runs {chosen!r}: {reason}")
        except (RuntimeError, TypeError, ValueError) as error:
            lines.append(f"impl={impl!r} fails: {error}")
        for other in IMPLEMENTATIONS[1:]:
            try:
                _, reason = self._rule(other)
                lines.append(f"  {other}: available" if self.name is None or other != "cuda" else f"  {other}: {reason}")
            except (RuntimeError, TypeError, ValueError) as error:
                lines.append(f"  {other}: not {'here' if self.name is None else 'there'}: {error}")
        return chosen, lines

    def _rule(self, impl: str) -> tuple[str, str]:
        without_cuda = "for projections" if self.projected else ""
        if self.name is None:
            return choose(impl, self.device, [self.dtype], without_cuda=without_cuda)
        capability = known_device(self.name).capability
        return choose_on_absent(impl, self.name, capability, [self.dtype], without_cuda=without_cuda)

    def path(self, chosen: str | None) -> tuple[str, str]:
        """The path of the linear loss, and the reason for it."""
        if self.projected:
            return CHUNKS, "a projection is distilled from logits of the student"
        return choose_path(
            impl=chosen or "reference", gradient=self.gradient, divergence=self.divergence, want_stats=self.return_stats,
            chunk_tokens=self.chunk_tokens,
        )  # fmt: skip

    def chunks(self, chosen: str | None, student_width: int) -> list[str]:
        """The chunks of tokens in words."""
        row, lines = row_items(self.vocab_size, self.device), []
        if row > self.vocab_size:
            lines.append(f"rows of {row} items for {self.vocab_size} ids, so that each begins at a multiple of 128 bytes")
        plan = plan_chunks(
            n_tokens=self.n_tokens,
            bytes_per_token=(1 + self.teacher_tensors) * row * self.logits_dtype.itemsize,
            student_width=student_width,
            device=None if self.name is not None else self.device,
            device_name=self.name,
            chunk_tokens=self.chunk_tokens,
            workspace_bytes=self.workspace_bytes,
        )
        lines.append(_chunks_in_words(plan, self.n_tokens, self.vocab_size))
        if self.logits_dtype not in (torch.float32, self.dtype):
            lines.append(
                f"logits_dtype {self.logits_dtype} beside {self.dtype} weights: each product is made in float32 and rounded, "
                "which takes longer than float32 logits"
            )
        if self.device.type == "cuda" and chosen in WITHOUT_LOGITS and self.gradient and not self.projected:
            lines += _switches_in_words(self.device)
        return lines

    def times(self, path: str) -> list[str]:
        """The time that the call should take in words, where the device's rates are known."""
        model = None
        if self.name is not None:
            model = device_model(self.name)
        elif self.device.type == "cuda" and torch.cuda.is_available():
            model = device_model(torch.cuda.get_device_name(self.device))
        if model is None or self.teacher_hidden_size is None or self.student_hidden_size is None:
            return []
        expected = predict(
            model,
            n_tokens=self.n_tokens,
            vocab=self.vocab_size,
            student_width=self.student_hidden_size,
            teacher_width=self.teacher_hidden_size,
            teacher_gemms=self.teacher_tensors,
            teacher_tensors=self.teacher_tensors,
            logits_bytes=self.logits_dtype.itemsize,
            gradient_bytes=min(self.dtype.itemsize, self.logits_dtype.itemsize),
            gradient=self.gradient,
            head_trains=self.head_trains,
            path=path,
        )
        lines = _times_in_words(expected, model, path)
        if self.teacher_gemms > self.teacher_tensors:
            half = 2.0 * self.n_tokens * self.vocab_size * self.teacher_hidden_size / model.flop_per_second
            lines.append(f"  and {half * 1e3:.1f} ms for the contrast's second bf16 summand, which float32 logits take")
        return lines


def _against_a_projection(divergence: str, student_softcap: float | None, head_trains: bool) -> list[str]:
    """What keeps a teacher from being projected, in words."""
    given = {
        "head_trains=True": head_trains,
        f"divergence={divergence!r}": divergence != "forward_kl",
        f"student_softcap={student_softcap}": student_softcap is not None,
    }
    return [words for words, is_so in given.items() if is_so]


def _projection_in_words(obstacles: list[str], student_width: int, teacher_width: int | None, teacher_gemms: int) -> str:
    """``teacher_gemms``: products with the teacher's head that a projection would save."""
    if obstacles:
        return f"projection: not possible with {' and '.join(obstacles)}"
    teacher = "F_t" if teacher_gemms == 1 else f"{teacher_gemms} F_t"
    saved = ""
    if teacher_width is not None:
        saved = f", {2 * student_width / (2 * student_width + teacher_gemms * teacher_width):.2f} of it"
    return (
        "projection: possible with a fixed alpha and temperature; project_teacher once, then fused_linear_projected_loss "
        f"multiplies 2 F_s instead of 2 F_s + {teacher}{saved} (F_s = 2 N V H_s FLOP, F_t = 2 N V H_t)"
    )


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        least = 0 if name == "n_tokens" else 1
        if size is not None and not (is_whole(size) and size >= least):
            raise ValueError(f"{name}: expected a whole number >= {least}, got {size!r}")


def _device(device: str | torch.device) -> tuple[str | None, torch.device]:
    """(name in DEVICES or None, device)"""
    if isinstance(device, str) and device_model(device) is not None:
        return device, torch.device("cuda")
    try:
        return None, torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a torch device or one of {', '.join(DEVICES)}, got {device!r}") from error


def _chunks_in_words(plan: ChunkPlan, n_tokens: int, vocab: int) -> str:
    naive = 3 * n_tokens * vocab * 4
    return (
        f"{plan.chunks} chunks of {plan.chunk_tokens} tokens, {plan.scratch_bytes / 2**20:.0f} MiB of logits at a time "
        f"({plan.reason}); three float32 logit tensors would be {naive / 2**20:.0f} MiB"
    )


def _switches_in_words(device: torch.device) -> list[str]:
    switches = {
        "KDKERNELS_GEMM_SUMS": (gemm_sums_wanted(), "products that leave each row's sums, where the call has such a form"),
        "KDKERNELS_OVERLAP": (overlap_wanted(device), "rows beside the next chunk's products"),
    }
    return [f"{name} is {'on' if on else 'off'}: {what}; not timed on a GPU yet" for name, (on, what) in switches.items()]


def _times_in_words(expected: Prediction, model: DeviceModel, path: str) -> list[str]:
    tera, terabytes = model.flop_per_second / 1e12, model.bytes_per_second / 1e12
    lines = [
        f"predicted, at {tera:.0f} TFLOP/s and {terabytes:.1f} TB/s ({model.source}): {expected.seconds * 1e3:.1f} ms",
        f"  GEMMs {expected.gemm_seconds * 1e3:.1f} ms ({expected.gemm_flop / 1e12:.1f} TFLOP)",
    ]
    if path == CHUNKS:
        lines.append(f"  row kernel {expected.row_seconds * 1e3:.1f} ms ({expected.row_bytes / 1e9:.1f} GB)")
    return lines
