"""The contrast of two teacher paths, rounded or not: error and time of dL/dh. `python -m benchmarks.contrast`

Three settings of `fused_linear_caad_loss` with bf16 states and frozen bf16 heads are compared: bf16 logits; float32 logits beside
a contrast that is rounded once to bf16 (`round_contrast=True`); and the default, float32 logits beside a contrast of two bf16
summands.

The first table has the gradient errors of the divergence against float64, on problems that differ from the first one in one
property. The student's states are those of the contrast plus noise, as much as the divergence asks for. The rounding moves each
term of z_hat = sum_j c_j w_j by a share of its size, and the gradient is made of how far student and teacher are apart. So the
table also has the quotient of these two:

    size over distance = sqrt(sum_j c_j^2 Var_p(w_j)) / (tau sqrt(2 KL))

with the variances over the ids v under the teacher's p, and the error divided by it. Near convergence KL is the variance of
s - z_hat under p, divided by 2 tau^2. Two ways of rounding are computed beside them, outside the loss: stochastic rounding, and
rounding that carries a token's remainder to the next token.

The second table has the times, measured in turn in one process. Their quotients are those of the lower quartiles, because other
work on the machine only ever adds time. `--shapes` without a name leaves the times in the CSV as they are, `--only` without a
name the errors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.arguments import Collect
from models.backbones.model_folder import BackboneError
from models.backbones.resolve import load_causal_lm

from .common import RESULTS, benchmark_parser, finish, relative_error, time_calls, time_columns
from .contenders import (
    CHUNKS,
    FULL,
    LinearCase,
    Objective,
    Step,
    bare_gemms,
    exact_gradient,
    full_logits,
    gradient_errors,
    ours_step,
    refuse_wrong_gradients,
)

SETTINGS: dict[str, tuple[torch.dtype | None, bool]] = {  # logits_dtype, round_contrast
    "bf16 logits": (torch.bfloat16, False),
    "fp32 logits, rounded contrast": (None, True),
    "fp32 logits (default)": (None, False),
}
SHAPES = {"SmolLM2": (512, 49152, 576, 960), "Llama 3": (128, 128256, 2048, 4096)}
LM = "HuggingFaceTB/SmolLM2-135M-Instruct"
CUT = 48  # tokens of the text that the second path of the language model does not see


@dataclass(frozen=True)
class Problem:
    """Random states and a head that student and teacher share."""

    name: str
    tokens: int = 32
    vocab: int = 8192
    width: int = 256
    logits_std: float = 6.0  # of z_hat over the ids
    alpha: float = 2.0
    temperature: float = 2.0
    kl: float = 0.004  # nats
    paths: float = 0.0  # correlation of the two paths' states
    head: str = "random"  # | common row | long rows | low rank
    outliers: int = 0  # entries of the states that are 30 times as large
    noise: str = "random"  # of the student's states: random | along the contrast | one direction

    def case(self, seed: int, device: torch.device) -> LinearCase:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape).normal_(generator=g)

        n, vocab, width = self.tokens, self.vocab, self.width
        weight = normal(vocab, 16) @ normal(16, width) if self.head == "low rank" else normal(vocab, width)
        if self.head == "common row":
            weight += 3 * normal(1, width)
        if self.head == "long rows":
            weight *= torch.exp(0.3 * normal(vocab, 1))
        audio = normal(n, width)
        text = self.paths * audio + math.sqrt(1 - self.paths**2) * normal(n, width)
        for states in (audio, text):
            states[:, : self.outliers] *= 30
        contrast = (1 + self.alpha) * audio - self.alpha * text
        weight *= self.logits_std / float((contrast @ weight.T).std(1).mean())
        noise = {
            "random": normal(n, width),
            "along the contrast": contrast,
            "one direction": normal(n, 1) * normal(1, width),
        }[self.noise]
        weight, audio, text = (x.to(device, torch.bfloat16) for x in (weight, audio, text))
        target = torch.randint(0, vocab, (n,), generator=g).to(device)
        case = LinearCase(audio, weight, audio, text, weight, target)
        return apart(case, noise.to(device), self.kl, self.objective)

    @property
    def objective(self) -> Objective:
        return Objective("KD", 1.0, self.alpha, self.temperature)


# Every property that could decide, each by itself.
PROBLEMS = [
    Problem("first"),
    *(Problem(f"logits of std {std:g}", logits_std=std) for std in (1, 2, 4, 10.8)),
    *(Problem(f"KL {kl:g}", kl=kl) for kl in (0.0005, 0.002, 0.03, 0.3, 1.1)),
    Problem("std 0.8, KL 0.002, V 16,384, H 1,024", vocab=16384, width=1024, logits_std=0.8, kl=0.002),
    Problem("std 10.8, V 49,152, H 576", vocab=49152, width=576, logits_std=10.8),
    Problem("V 1,024", vocab=1024),
    Problem("V 65,536", vocab=65536),
    Problem("H 64", width=64),
    Problem("H 1,024", width=1024),
    Problem("alpha 0.5", alpha=0.5),
    Problem("alpha 8", alpha=8.0),
    Problem("paths alike (0.95)", paths=0.95),
    Problem("paths alike (0.95), alpha 8", paths=0.95, alpha=8.0),
    Problem("temperature 1", temperature=1.0),
    Problem("temperature 4", temperature=4.0),
    Problem("states with outliers", outliers=4),
    Problem("head with a common row", head="common row"),
    Problem("head of rank 16", head="low rank"),
    Problem("head with long rows", head="long rows"),
    Problem("noise along the contrast", noise="along the contrast"),
    # From 32 tokens on, as in all problems here, a CPU with AVX-512 BF16 makes 16-bit integers of the two summands.
    Problem("128 tokens", tokens=128),
    Problem("128 tokens, KL 0.0005", tokens=128, kl=0.0005),
    Problem("128 tokens, states with outliers", tokens=128, outliers=4),
    Problem("noise in one direction", noise="one direction"),
]


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("contrast", __doc__, repeats=11)
    parser.add_argument("--seeds", type=int, default=3, help="problems of each kind; the table has their mean")
    parser.add_argument("--shapes", nargs="*", action=Collect, default=list(SHAPES), choices=list(SHAPES), help="to be timed")
    parser.add_argument("--tokens", type=int, help="N of the timed shapes, instead of their own")
    parser.add_argument("--only", nargs="*", action=Collect, help="names of problems; default: all")
    parser.add_argument("--lm", default=LM, help="language model whose head and states make further problems; '' for none")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows = []
    for problem in PROBLEMS:
        if args.only is None or problem.name in args.only:
            rows += errors(problem.name, problem.objective, [problem.case(seed, device) for seed in range(args.seeds)])
    if args.lm and args.only is None:
        rows += lm_errors(args.lm, args.seeds, device)
    for name in args.shapes:
        n, *sizes = SHAPES[name]
        rows += times(name, (args.tokens or n, *sizes), device, args.repeats)
    kept = {"error": args.only == [], "time": not args.shapes}
    finish(args, "contrast", "bf16, frozen head", rows, keep=lambda row: kept[row["part"]])


def apart(case: LinearCase, noise: Tensor, kl: float, objective: Objective) -> LinearCase:
    """The case with a student whose states are those of the contrast plus noise, at about ``kl`` nats."""
    contrast = (1 + objective.alpha) * case.audio.float() - objective.alpha * case.text.float()
    scale = 0.01 * float(contrast.norm() / noise.norm())
    z = full_logits(contrast, case.teacher_weight)
    for _ in range(8):  # near convergence the divergence is quadratic in the noise
        hidden = contrast + scale * noise
        reached = float(_kl(full_logits(hidden, case.weight), z, objective.temperature).mean())
        scale *= min(max(math.sqrt(kl / max(reached, 1e-12)), 0.1), 10.0)
    return replace(case, hidden=(contrast + scale * noise).to(case.hidden.dtype))


def _kl(s: Tensor, z: Tensor, tau: float) -> Tensor:
    """(N,) KL(softmax(z / tau) || softmax(s / tau))"""
    log_p, log_q = torch.log_softmax(z / tau, 1), torch.log_softmax(s / tau, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def errors(name: str, objective: Objective, cases: list[LinearCase]) -> list[dict]:
    """One row for each setting: means over the cases."""
    steps = {setting: ours_step(dtype, objective, round_contrast=once) for setting, (dtype, once) in SETTINGS.items()}
    found: dict[str, list[float]] = {setting: [] for setting in (*steps, *ROUNDINGS)}
    of_problem = []
    for case in cases:
        exact = exact_gradient(case, objective)
        for setting, step in steps.items():
            found[setting].append(relative_error(step(case).cpu(), exact))
        for setting, rounded in ROUNDINGS.items():
            found[setting].append(relative_error(_from_contrast(case, rounded, objective), exact))
        of_problem.append(properties(case, objective))
    means = {key: statistics.mean(x[key] for x in of_problem) for key in of_problem[0]}
    case = cases[0]
    return [
        {
            "part": "error", "setting": setting, "problem": name, "tokens": len(case.hidden), "vocab": case.vocab,
            "student_width": case.weight.shape[1], "teacher_width": case.teacher_weight.shape[1], "alpha": objective.alpha,
            "temperature": objective.temperature, "seeds": len(cases), **means, "gradient_error": statistics.mean(values),
            "largest_error": max(values), "error_over_quotient": statistics.mean(values) / means["size_over_distance"],
        }
        for setting, values in found.items()
    ]  # fmt: skip


def properties(case: LinearCase, objective: Objective) -> dict[str, float]:
    tau, w = objective.temperature, case.teacher_weight.cpu().double()
    contrast = ((1 + objective.alpha) * case.audio.float() - objective.alpha * case.text.float()).cpu().double()
    z = contrast @ w.T
    kl = float(_kl(full_logits(case.hidden, case.weight), z, tau).mean())
    log_p = torch.log_softmax(z / tau, 1)
    p = log_p.exp()
    variance = p @ w.square() - (p @ w).square()  # (N, H_t)
    terms_std = math.sqrt(float((contrast.square() * variance).sum(1).mean()))
    return {
        "logits_std": float(z.std(1).mean()),
        "terms_std": terms_std,
        "kl": kl,
        "likely_ids": math.exp(float(-(p * log_p).sum(1).mean())),
        "size_over_distance": terms_std / (tau * math.sqrt(2 * kl)),
    }


def _from_contrast(case: LinearCase, rounded: Callable[[Tensor], Tensor], objective: Objective) -> Tensor:
    """The gradient of the divergence in float64 but for the rounding of the contrast."""
    contrast = (1 + objective.alpha) * case.audio.float() - objective.alpha * case.text.float()
    tau = objective.temperature
    p = torch.softmax(full_logits(rounded(contrast.cpu()), case.teacher_weight) / tau, 1)
    q = torch.softmax(full_logits(case.hidden, case.weight) / tau, 1)
    return (tau / len(p)) * ((q - p) @ case.weight.cpu().double())


def _stochastically(x: Tensor) -> Tensor:
    """To bf16, upwards as often as x lies near the upper neighbour. On average it is x."""
    below = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return ((x.contiguous().view(torch.int32) + below) & ~0xFFFF).view(torch.float32)


def _with_feedback(x: Tensor) -> Tensor:
    """To bf16, each token's remainder added to the next token. The sum over the tokens keeps its value."""
    rest, out = torch.zeros_like(x[0]), []
    for token in x:
        out.append((token + rest).bfloat16().float())
        rest = token + rest - out[-1]
    return torch.stack(out)


ROUNDINGS = {"rounded stochastically, computed": _stochastically, "rounded with feedback, computed": _with_feedback}


def lm_errors(spec: str, seeds: int, device: torch.device) -> list[dict]:
    """Problems from a language model's head and its states for a text. The second path does not see the text's beginning."""
    try:
        model, tokenizer = load_causal_lm(spec, dtype=torch.float32)
    except BackboneError as error:
        print(f"{spec}: no problems from it, {error}")
        return []
    text = (RESULTS.parent.parent / "README.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : CUT + 96]
    with torch.inference_mode():
        states = [model.model(x).last_hidden_state[0, -64:].clone() for x in (ids, ids[:, CUT:])]
    weight = model.get_output_embeddings().weight.detach().to(device, torch.bfloat16)
    audio, cut = (x.to(device, torch.bfloat16) for x in states)
    case = LinearCase(audio, weight, audio, cut, weight, ids[0, -64:].to(device))
    rows = []
    for kl in (0.0005, 0.004, 0.03, 0.3):
        objective, cases = Objective("KD", 1.0), []
        for seed in range(seeds):
            noise = torch.empty(audio.shape).normal_(generator=torch.Generator().manual_seed(seed)).to(device)
            cases.append(apart(case, noise, kl, objective))
        rows += errors(f"{spec.rpartition('/')[2]}, KL {kl:g}", objective, cases)
    return rows


def times(shape: str, sizes: tuple[int, int, int, int], device: torch.device, repeats: int) -> list[dict]:
    """The whole loss of independent states, which is as far from convergence as a random student."""
    case = LinearCase.random(*sizes, torch.bfloat16, device)
    steps: dict[str, tuple[Objective, Step]] = {
        setting: (FULL, ours_step(dtype, round_contrast=once)) for setting, (dtype, once) in SETTINGS.items()
    }
    found = gradient_errors(steps, case)
    refuse_wrong_gradients(found, torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {name: (lambda step=step: step(case)) for name, (_, step) in steps.items()}
    calls |= {f"bare GEMMs, chunk {c}": bare_gemms(case, c) for c in CHUNKS[device.type]}
    timings = time_calls(calls, repeats=repeats, device=device, warmup=1)
    floor = min(timing.low for name, timing in timings.items() if name not in steps)
    return [
        {
            "part": "time", "setting": name, "problem": shape, "tokens": sizes[0], "vocab": sizes[1],
            "student_width": sizes[2], "teacher_width": sizes[3], "alpha": FULL.alpha, "temperature": FULL.temperature,
            "gradient_error": found.get(name, float("nan")), **time_columns(timing), "times_gemms": timing.low / floor,
            "times_default": timing.low / timings["fp32 logits (default)"].low,
        }
        for name, timing in timings.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
