"""The same objective by all contenders: eager PyTorch, torch.compile, Liger, TRL, FLA, CCE, and ours.

All minimise  kd_weight tau^2 KL(softmax(z_hat / tau) || softmax(s / tau)) + (1 - kd_weight) CE(s, y), averaged over tokens, with
z_hat = (1 + alpha) z_audio - alpha z_text. A library that has only one of the terms is compared on that term (`Objective`). The
libraries get the combined teacher state (1 + alpha) h_audio - alpha h_text. So they too need only one GEMM for the teacher.

Legend: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kdkernels import TeacherProjection

ALPHA, TEMPERATURE, KD_WEIGHT = 2.0, 2.0, 0.7
VOCAB_BLOCK = 8192  # rows of a head converted to float64 at a time


@dataclass(frozen=True)
class Objective:
    name: str
    kd_weight: float
    alpha: float = ALPHA
    temperature: float = TEMPERATURE


FULL = Objective("KD + CE", KD_WEIGHT)
KD = Objective("KD", 1.0)
CE = Objective("CE", 0.0)
OBJECTIVES = (FULL, KD, CE)


class Unavailable(Exception):
    """A contender cannot run here. The message says why: it is not installed, or there is no GPU."""


def eager_loss(
    student: Tensor,
    audio: Tensor | None,
    text: Tensor | None,
    target: Tensor,
    objective: Objective = FULL,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The loss from logits (N, V), written in the usual way: torch's softmax, kl_div and cross_entropy in ``dtype``."""
    z_hat = None
    if objective.kd_weight > 0:
        z_hat = (1 + objective.alpha) * audio.to(dtype) - objective.alpha * text.to(dtype)
    return loss_from_contrast(student.to(dtype), z_hat, target, objective)


def loss_from_contrast(student: Tensor, z_hat: Tensor | None, target: Tensor, objective: Objective = FULL) -> Tensor:
    """The same from the teacher's contrast of logits, which a CE alone does not need."""
    tau, weight = objective.temperature, objective.kd_weight
    loss = student.new_zeros(())
    if z_hat is not None:
        kd = F.kl_div(F.log_softmax(student / tau, -1), F.softmax(z_hat / tau, -1), reduction="batchmean")
        loss = loss + weight * tau**2 * kd
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(student, target)
    return loss


def exact_loss(
    student: Tensor, audio: Tensor | None, text: Tensor | None, target: Tensor, objective: Objective = FULL
) -> Tensor:
    """The same in float64."""
    return eager_loss(student, audio, text, target, objective, torch.float64)


def authors_loss(student: Tensor, audio: Tensor, text: Tensor, target: Tensor, objective: Objective = FULL) -> Tensor:
    """CAAD as its authors average it.

    KD is averaged over the tokens of each sample, then over samples. CE is averaged over all tokens of the batch. The samples
    have equal length here, so the loss is the same as that of the others. The logits are stored in full, and the samples are
    computed one after the other.
    """
    samples = next(k for k in (8, 4, 2, 1) if student.shape[0] % k == 0)
    tau, alpha = objective.temperature, objective.alpha
    kd = student.new_zeros((), dtype=torch.float32)
    for s, a, t in zip(*(x.chunk(samples) for x in (student, audio, text)), strict=True):
        z_hat = (1 + alpha) * a.float() - alpha * t.float()
        kd = kd + F.kl_div(F.log_softmax(s.float() / tau, -1), F.softmax(z_hat / tau, -1), reduction="batchmean")
    ce = F.cross_entropy(student.float(), target)
    return objective.kd_weight * tau**2 * kd / samples + (1 - objective.kd_weight) * ce


@dataclass
class LinearCase:
    """Hidden states (N, H), heads (V, H) and targets of one shape. The head is frozen, as in the paper, unless it ``trains``.

    Padding may give the heads different V. Then only the shared ids count.
    """

    hidden: Tensor
    weight: Tensor
    audio: Tensor
    text: Tensor
    teacher_weight: Tensor
    target: Tensor
    trains: bool = False

    @classmethod
    def random(
        cls,
        n: int,
        vocab: int,
        width: int,
        teacher_width: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        *,
        teacher_vocab: int | None = None,
    ) -> LinearCase:
        g = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            # In its own dtype, because a float32 copy of a large head may not fit into memory.
            return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, scale, generator=g)

        teacher_vocab = vocab if teacher_vocab is None else teacher_vocab
        # The logits get a standard deviation near 3, as those of language models have.
        return cls(
            hidden=normal(n, width, 1.0),
            weight=normal(vocab, width, 3.0 * width**-0.5),
            audio=normal(n, teacher_width, 1.0),
            text=normal(n, teacher_width, 1.0),
            teacher_weight=normal(teacher_vocab, teacher_width, 3.0 * teacher_width**-0.5),
            target=torch.randint(0, min(vocab, teacher_vocab), (n,), generator=g, device=device),
        )

    @classmethod
    def near_convergence(
        cls, n: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device, *, kl: float = 0.004, seed: int = 0
    ) -> LinearCase:
        """A student as at the end of a training: its divergence from z_hat is about ``kl`` nats at temperature tau.

        It shares the teacher's head. Its states are those of the contrast plus noise.
        """
        case = cls.random(n, vocab, width, width, dtype, device, seed)
        noise = torch.empty(n, width, device=device).normal_(generator=torch.Generator(device).manual_seed(seed + 1))
        contrast = contrastive_hidden(case, torch.float32)
        scale = 0.01
        for _ in range(6):  # apart from rounding, the divergence is quadratic in the noise
            case = replace(case, hidden=(contrast + scale * noise).to(dtype), weight=case.teacher_weight)
            scale *= math.sqrt(kl / max(mean_kl(case), 1e-12))
        return case

    @property
    def vocab(self) -> int:
        return min(self.weight.shape[0], self.teacher_weight.shape[0])

    @property
    def flop(self) -> float:
        """Operations: the student's logits, one teacher GEMM, dh, and dW of a head that trains."""
        products = 3 if self.trains else 2
        return 2.0 * self.hidden.shape[0] * self.vocab * (products * self.weight.shape[1] + self.teacher_weight.shape[1])

    @property
    def least_bytes(self) -> float:
        """The least that a step must move: the student's head twice, the teacher's once, the hidden states and dh."""
        v, (n, width), teacher_width = self.vocab, self.hidden.shape, self.teacher_weight.shape[1]
        return float(self.weight.element_size()) * (v * (2 * width + teacher_width) + n * 2 * (width + teacher_width))

    def head(self, n: int) -> LinearCase:
        return replace(self, hidden=self.hidden[:n], audio=self.audio[:n], text=self.text[:n], target=self.target[:n])

    def trimmed(self) -> LinearCase:
        """The case with heads of the shared ids alone, for contenders that cannot take two vocabularies."""
        return replace(self, weight=self.weight[: self.vocab], teacher_weight=self.teacher_weight[: self.vocab])


Step = Callable[[LinearCase], Tensor]  # returns dL/dh (N, H), and below it dL/dW (V, H) if the head trains
Key = TypeVar("Key")


def contrastive_hidden(c: LinearCase, dtype: torch.dtype, alpha: float = ALPHA) -> Tensor:
    return ((1 + alpha) * c.audio.float() - alpha * c.text.float()).to(dtype)


def _gradient(loss: Callable[[Tensor, Tensor], Tensor], c: LinearCase) -> Tensor:
    """``loss`` takes the student's states and head."""
    leaves = [c.hidden.detach().requires_grad_(), c.weight.detach().requires_grad_(c.trains)]
    loss(*leaves).backward()
    return torch.cat([x.grad for x in leaves]) if c.trains else leaves[0].grad


def naive_step(loss_function: Callable[..., Tensor] = eager_loss, objective: Objective = FULL) -> Step:
    """GEMMs for all logits (of both teacher paths, if the objective has a teacher), then the loss from these logits."""

    def step(c: LinearCase) -> Tensor:
        c = c.trimmed()
        audio = text = None
        if objective.kd_weight > 0:
            audio, text = c.audio @ c.teacher_weight.T, c.text @ c.teacher_weight.T
        return _gradient(lambda h, w: loss_function(h @ w.T, audio, text, c.target, objective), c)

    return step


def ours_step(logits_dtype: torch.dtype | None, objective: Objective = FULL, **options) -> Step:
    from kdkernels import fused_linear_caad_loss

    def step(c: LinearCase) -> Tensor:
        return _gradient(
            lambda h, w: fused_linear_caad_loss(
                h, w, c.audio, c.text, c.teacher_weight, c.target, alpha=objective.alpha,
                temperature=objective.temperature, kd_weight=objective.kd_weight, logits_dtype=logits_dtype, **options,
            ),
            c,
        )  # fmt: skip

    return step


class ProjectedStep:
    """dL/dh from the teacher's projection, which a run makes once and which is not a part of the step.

    Args:
        top_k: ids that the projection keeps apart.
        store: what the projection's tail goes through before it is used.
    """

    def __init__(
        self, objective: Objective = FULL, *, top_k: int = 64, store: Callable[[Tensor], Tensor] = lambda tail: tail
    ) -> None:
        self._objective, self._top_k, self._store = objective, top_k, store
        self._made: dict[int, tuple[LinearCase, TeacherProjection]] = {}

    def prepare(self, c: LinearCase) -> None:
        """Make the projection of the case, unless it is there."""
        if id(c) not in self._made:  # the case beside it keeps its id from being given to another
            exact = project(c, self._objective, top_k=self._top_k)
            self._made[id(c)] = (c, replace(exact, tail=self._store(exact.tail)))

    def __call__(self, c: LinearCase) -> Tensor:
        from kdkernels import fused_linear_projected_loss

        self.prepare(c)
        projection, weight = self._made[id(c)][1], self._objective.kd_weight
        return _gradient(lambda h, w: fused_linear_projected_loss(h, w, projection, c.target, kd_weight=weight), c)


def project(c: LinearCase, objective: Objective = FULL, *, top_k: int = 64) -> TeacherProjection:
    from kdkernels import project_teacher

    return project_teacher(
        c.audio, c.text, c.teacher_weight, c.weight, alpha=objective.alpha, temperature=objective.temperature, top_k=top_k
    )


def liger_step(chunk_size: int, compiled: bool = True, objective: Objective = FULL) -> Step:
    """Liger's chunked JSD at beta 0 (forward KL). Its soft loss lacks tau^2, so the weight takes it.

    It computes the gradient of the student's head, also of a frozen one: a product more than the others. No option avoids it.
    """
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Unavailable(f"not installed (pip install liger-kernel): {error}") from error

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - objective.kd_weight,
        weight_soft_loss=objective.kd_weight * objective.temperature**2,
        beta=0.0,
        temperature=objective.temperature,
        compiled=compiled,
        chunk_size=chunk_size,
    )

    def step(c: LinearCase) -> Tensor:
        c = c.trimmed()
        contrast = contrastive_hidden(c, c.audio.dtype, objective.alpha)
        return _gradient(lambda h, w: loss(h, w, contrast, c.teacher_weight, c.target), c)

    return step


def _need_cuda(device_type: str) -> None:
    if device_type != "cuda":
        raise Unavailable("its kernels need a CUDA device")


def liger_fused_jsd_step(device_type: str, objective: Objective = KD) -> Step:
    """Liger's fused_linear_jsd (Triton) at beta 0. It has no CE term."""
    _need_cuda(device_type)
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        raise Unavailable(f"not installed (pip install liger-kernel): {error}") from error

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=objective.temperature)
    square = objective.temperature**2

    def step(c: LinearCase) -> Tensor:
        c = c.trimmed()
        contrast = contrastive_hidden(c, c.audio.dtype, objective.alpha)
        return _gradient(lambda h, w: square * loss(h, w, contrast, c.teacher_weight, None), c)

    return step


def trl_step(objective: Objective = KD) -> Step:
    """TRL's chunked divergence (DistillationTrainer) at beta 0. It has no CE term, and its loss lacks tau^2.

    Its kernels need a GPU. On the CPU its form in torch runs, whose products are in float32.
    """
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise Unavailable(f"not installed (pip install 'trl>=1.15'): {error}") from error

    tau = objective.temperature

    def step(c: LinearCase) -> Tensor:
        c = c.trimmed()
        contrast = contrastive_hidden(c, c.audio.dtype, objective.alpha)

        def loss(h: Tensor, w: Tensor) -> Tensor:
            divergence, _ = ChunkedDivergenceFunction.apply(
                h, w, None, contrast, c.teacher_weight, None, 0.0, tau, 1.0, None, 1.0, None
            )
            return tau**2 * divergence.mean()

        return _gradient(loss, c)

    return step


def fla_step(device_type: str, objective: Objective = KD) -> Step:
    """flash-linear-attention's fused_kl_div (Triton). It has no temperature, so tau divides the states: exact for tau 2."""
    _need_cuda(device_type)
    try:
        from fla.modules.fused_kl_div import fused_kl_div_loss
    except ImportError as error:
        raise Unavailable(f"not installed (pip install fla-core): {error}") from error

    tau = objective.temperature

    def step(c: LinearCase) -> Tensor:
        c = c.trimmed()
        contrast = contrastive_hidden(c, c.audio.dtype, objective.alpha) / tau
        return _gradient(
            lambda h, w: tau**2 * fused_kl_div_loss(h / tau, contrast, w, c.teacher_weight), c
        )  # fmt: skip

    return step


def cce_step(device_type: str) -> Step:
    """Apple's cut cross-entropy: CE alone. On the CPU its torch.compile form runs, because its own kernels need a GPU."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"not installed (pip install cut-cross-entropy): {error}") from error

    impl = "cce" if device_type == "cuda" else "torch_compile"

    def step(c: LinearCase) -> Tensor:
        c = c.trimmed()
        return _gradient(lambda h, w: linear_cross_entropy(h, w, c.target, impl=impl), c)

    return step


def compiled_step(objective: Objective = FULL) -> Step:
    """The whole step in one graph, products and backward too, with one teacher GEMM on the combined state."""

    def loss(h: Tensor, w: Tensor, audio: Tensor, text: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        z_hat = None
        if objective.kd_weight > 0:
            alpha = objective.alpha
            contrast = ((1 + alpha) * audio.float() - alpha * text.float()).to(audio.dtype)
            z_hat = (contrast @ teacher_weight.T).float()
        return loss_from_contrast((h @ w.T).float(), z_hat, target, objective)

    # Each shape gets a graph of its own, as in a training with batches of one size.
    compiled = torch.compile(loss, dynamic=False)

    def step(c: LinearCase) -> Tensor:
        c = c.trimmed()
        return _gradient(lambda h, w: compiled(h, w, c.audio, c.text, c.teacher_weight, c.target), c)

    return step


@dataclass(frozen=True)
class Contender:
    """A way to compute dL/dh of one objective. ``build`` raises Unavailable if it cannot run."""

    name: str
    objective: Objective
    build: Callable[[], Step]
    compiles: bool = False  # by torch.compile: the first call of a shape compiles and must not be measured
    frozen_head: bool = False  # needs a student's head that does not train


# The chunk with which each library does best. It has several if that depends on the shape.
LIGER_CHUNKS = {"cpu": (256, 1024), "cuda": (1024, 2048)}
CHUNKS = {"cpu": (128, 256, 512), "cuda": (1024, 1408, 2048)}  # ours, and the bare GEMMs'
PROJECTED = "kdkernels from projections, 64 ids"


def contenders(device_type: str, objectives: tuple[Objective, ...] = OBJECTIVES) -> list[Contender]:
    """All contenders, ours last. Eager and ours stand there once for each objective."""
    bf16 = torch.bfloat16
    everyone = [
        Contender("eager", FULL, naive_step),
        Contender("torch.compile", FULL, compiled_step, compiles=True),
        Contender("CAAD authors' form", FULL, lambda: naive_step(authors_loss)),
        *(
            Contender(f"Liger chunked JSD, compiled, chunk {n}", FULL, lambda n=n: liger_step(n), compiles=True)
            for n in LIGER_CHUNKS[device_type]
        ),
        Contender("kdkernels bf16 logits", FULL, lambda: ours_step(bf16)),
        Contender("kdkernels fp32 logits, rounded contrast", FULL, lambda: ours_step(None, round_contrast=True)),
        Contender("kdkernels (default: fp32 logits)", FULL, lambda: ours_step(None)),
        Contender(PROJECTED, FULL, ProjectedStep, frozen_head=True),
        Contender("eager", KD, lambda: naive_step(objective=KD)),
        Contender("torch.compile", KD, lambda: compiled_step(KD), compiles=True),
        *(
            Contender(f"Liger chunked JSD, compiled, chunk {n}", KD, lambda n=n: liger_step(n, objective=KD), compiles=True)
            for n in LIGER_CHUNKS[device_type]
        ),
        Contender("TRL chunked divergence", KD, trl_step),
        Contender("Liger fused_linear_jsd", KD, lambda: liger_fused_jsd_step(device_type)),
        Contender("FLA fused_kl_div", KD, lambda: fla_step(device_type)),
        Contender("kdkernels bf16 logits", KD, lambda: ours_step(bf16, KD)),
        Contender("kdkernels fp32 logits, rounded contrast", KD, lambda: ours_step(None, KD, round_contrast=True)),
        Contender("kdkernels (default: fp32 logits)", KD, lambda: ours_step(None, KD)),
        Contender(PROJECTED, KD, lambda: ProjectedStep(KD), frozen_head=True),
        Contender("eager", CE, lambda: naive_step(objective=CE)),
        Contender("CCE", CE, lambda: cce_step(device_type), compiles=True),
        Contender("kdkernels bf16 logits", CE, lambda: ours_step(bf16, CE)),
        Contender("kdkernels (default: fp32 logits)", CE, lambda: ours_step(None, CE)),
    ]
    return [x for x in everyone if x.objective in objectives]


def fixed_chunks(device_type: str) -> list[Contender]:
    """Ours with bf16 logits at given chunks, to compare with the chunk that it chooses."""
    return [
        Contender(f"kdkernels bf16 logits, chunk {n}", FULL, lambda n=n: ours_step(torch.bfloat16, chunk_tokens=n))
        for n in CHUNKS[device_type]
    ]


def build(listed: Iterable[Contender]) -> tuple[dict[str, Step], dict[str, str]]:
    """Two dictionaries: name -> step, and name -> why the contender is unavailable here. The names must differ."""
    steps, missing = {}, {}
    for contender in listed:
        try:
            steps[contender.name] = contender.build()
        except Unavailable as why:
            missing[contender.name] = str(why)
    return steps, missing


def full_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (n, V) in float64 on the CPU. The head is converted block by block."""
    hidden = hidden.cpu().double()
    return torch.cat([hidden @ w.cpu().double().T for w in weight.split(VOCAB_BLOCK)], dim=1)


def exact_gradient(c: LinearCase, objective: Objective = FULL) -> Tensor:
    """What a Step returns, by the formula in float64 on the CPU."""
    c = c.trimmed()
    student = full_logits(c.hidden, c.weight).requires_grad_()
    audio, text = (full_logits(x, c.teacher_weight) for x in (c.audio, c.text))
    (d_logits,) = torch.autograd.grad(exact_loss(student, audio, text, c.target.cpu(), objective), student)
    blocks = zip(d_logits.split(VOCAB_BLOCK, dim=1), c.weight.split(VOCAB_BLOCK), strict=True)
    hidden_grad = sum(d @ w.cpu().double() for d, w in blocks)
    return torch.cat([hidden_grad, d_logits.T @ c.hidden.cpu().double()]) if c.trains else hidden_grad


def mean_kl(c: LinearCase, objective: Objective = KD) -> float:
    """KL(softmax(z_hat / tau) || softmax(s / tau)) in nats, mean over tokens, in float64."""
    c = c.trimmed()
    student, audio, text = (
        full_logits(h, w) for h, w in ((c.hidden, c.weight), (c.audio, c.teacher_weight), (c.text, c.teacher_weight))
    )
    loss = exact_loss(student, audio, text, c.target.cpu(), objective)
    return float(loss) / objective.temperature**2


def gradient_errors(
    steps: dict[Key, tuple[Objective, Step]], case: LinearCase, check_tokens: int = 64
) -> dict[Key, float]:
    """Relative error against float64 of each step's gradient, for the first tokens, under the step's own key.

    With a head that trains: the larger of the errors of dh and, of these tokens alone, of dW.
    """
    from .common import relative_error

    n = case.hidden.shape[0]
    check_tokens = min(check_tokens, n)
    few = case.head(check_tokens)
    exact = {objective: exact_gradient(few, objective) for objective, _ in steps.values()}
    # The mean over fewer tokens is another loss. The gradient of these tokens differs by this factor alone.
    scale = n / check_tokens
    return {
        name: max(
            relative_error(step(case)[:check_tokens].cpu() * scale, exact[objective][:check_tokens]),
            relative_error(step(few)[check_tokens:], exact[objective][check_tokens:]) if case.trains else 0.0,
        )
        for name, (objective, step) in steps.items()
    }


# A contender with a smaller error counts as right. This tells a wrong formula from a coarse dtype, and no more.
ERROR_BUDGETS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def refuse_wrong_gradients(errors: dict[str, float], dtype: torch.dtype) -> None:
    """`common.refuse_wrong` with the budget of the inputs' dtype. bf16 logits of float32 inputs get bf16's budget."""
    from .common import refuse_wrong

    coarse = {name for name in errors if "bf16 logits" in name}
    refuse_wrong({name: error for name, error in errors.items() if name not in coarse}, ERROR_BUDGETS[dtype])
    refuse_wrong({name: errors[name] for name in coarse}, max(ERROR_BUDGETS[dtype], ERROR_BUDGETS[torch.bfloat16]))


def bare_gemms(c: LinearCase, chunk: int, objective: Objective = FULL) -> Callable[[], None]:
    """The floor: the GEMMs in chunks into reused scratch, and nothing else: three, without a KD term two, and dW of a head that
    trains."""
    c = c.trimmed()
    n, vocab = c.hidden.shape[0], c.weight.shape[0]
    chunk = min(chunk, n)
    student, teacher = (torch.empty(chunk, vocab, dtype=c.weight.dtype, device=c.weight.device) for _ in range(2))
    out, weight_grad = torch.empty_like(c.hidden), torch.zeros_like(c.weight) if c.trains else None

    def run() -> None:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            torch.mm(c.hidden[rows], c.weight.T, out=student[:size])
            if objective.kd_weight > 0:
                torch.mm(c.audio[rows], c.teacher_weight.T, out=teacher[:size])
            torch.mm(student[:size], c.weight, out=out[rows])
            if weight_grad is not None:
                torch.addmm(weight_grad, student[:size].T, c.hidden[rows], out=weight_grad)

    return run
