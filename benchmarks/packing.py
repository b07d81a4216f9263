"""Packed rows against padded ones: the teacher's two paths and the student's step. `python -m benchmarks.packing`

The models have SmolLM2-135M's shapes and random float32 weights: a student of ten layers and a teacher of thirty, as in
benchmarks/step.py. The prompts have the built-in form. Their transcripts have 1 to 40 words, and most of them are short. The
same batch is laid out in four ways: padded rows and packed rows, each with and without the prefix cache
(models/speech_lm/prefix_cache.py). That cache holds the text before the audio, for both paths. `tokens` counts what the
teacher's two paths run through the layers, padding included. `padding` is its share of them. With a GPU and flash-attention
there is a fifth layout: `varlen` is one row without any padding.

First the teacher's states and the connector's gradient in every layout are compared with those of padded rows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .common import benchmark_parser, finish, refuse_wrong, relative_error, time_calls, time_columns
from .step import StepCase

# layout -> data.packing, prefix cache
LAYOUTS = {
    "padded": ("none", False),
    "packed": ("pack", False),
    "padded, prefix cache": ("none", True),
    "packed, prefix cache": ("pack", True),
}
VARLEN = {"varlen": ("varlen", False)}
BASELINE = "padded"
# Float32 over thirty layers. The prefix cache stores bfloat16, which rounds keys and values by 2^-9. flash-attention runs in
# bfloat16.
BUDGETS = {"padded": 1e-6, "packed": 1e-4, "padded, prefix cache": 2e-2, "packed, prefix cache": 2e-2, "varlen": 5e-2}
WORDS = (
    "where", "are", "you", "going", "so", "late", "and", "who", "told", "you", "that", "we", "would", "meet", "here", "again",
    "after", "all", "these", "years",
)  # fmt: skip


def transcript_words(count: int, *, seed: int = 0) -> list[int]:
    """The number of words in each transcript: log-normal with median 8, cut to 1 to 40, as in speech corpora."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(torch.randn(count, generator=generator) * 0.8) * 8
    return drawn.round().clamp(1, 40).int().tolist()


class PackingCase(StepCase):
    """The models of benchmarks/step.py, and the same batch in every layout.

    Args:
        pack_tokens: largest number of tokens in a packed row.
        others: see `StepCase`.
    """

    def __init__(self, examples: int, device: torch.device, *, pack_tokens: int = 512, **others: Any) -> None:
        super().__init__(examples, device, **others)
        lengths = transcript_words(examples)
        self.examples = [
            dataclasses.replace(example, transcription=" ".join(WORDS[i % len(WORDS)] for i in range(length)) + ".")
            for example, length in zip(self.examples, lengths, strict=True)
        ]
        self.pack_tokens = pack_tokens

    def layout(self, name: str) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
        """Two calls: the teacher's two paths, which return its states, and the student's step, which returns the gradient."""
        from models.training.recipe_sections import DataConfig
        from models.training.teachers import LiveTeacher
        from models.training.training_data import make_training_data

        packing, cached = {**LAYOUTS, **VARLEN}[name]
        options = {
            "prefix_cache_mib": 4096 * cached,
            "layout": DataConfig(packing=packing, pack_tokens=self.pack_tokens),
        }
        teacher_data = make_training_data(self.teacher, self.examples, self.store, **options)
        live = LiveTeacher(self.teacher, teacher_data, device=self.device)
        data = make_training_data(self.student, self.examples, self.store, **options)
        batch = data.crop(data.make_batch(self.examples)).to(self.device)
        parameters = [p for p in self.student.parameters() if p.requires_grad]

        def paths() -> torch.Tensor:
            states = live(batch, self.examples)
            return torch.cat([states.audio_hidden, states.text_hidden])

        def student() -> torch.Tensor:
            hidden = self.student.hidden_states_at(batch.target_index, **data.model_inputs(batch))
            # The squares would not do: behind the final norm their sum is constant, and its gradient is rounding alone.
            direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
            gradients = torch.autograd.grad((hidden.float() * direction).mean(), parameters)
            return torch.cat([g.flatten() for g in gradients])

        return paths, student

    def tokens(self, paths: Callable[[], torch.Tensor]) -> int:
        """How many tokens run through the teacher's layers in one call of `paths` after its prefixes have been cached."""
        seen: list[int] = []

        def count(_module: Any, arguments: tuple, keywords: dict) -> None:
            states = arguments[0] if arguments else keywords["hidden_states"]
            seen.append(states.shape[0] * states.shape[1])

        handle = self.teacher.lm.get_decoder().layers[0].register_forward_pre_hook(count, with_kwargs=True)
        try:
            paths()
        finally:
            handle.remove()
        return sum(seen)

    def real_tokens(self, *, cached: bool) -> int:
        """How many tokens of both paths are no padding. Where the text before the audio is cached, it does not count."""
        return 2 * self.tokens_run(self.teacher, cached=cached)


def measure(case: PackingCase, repeats: int, layouts: Sequence[str] = tuple(LAYOUTS)) -> list[dict]:
    """A row for each layout. The BASELINE comes first."""
    names = list(dict.fromkeys((BASELINE, *layouts)))
    calls = {name: case.layout(name) for name in names}
    expected = [call() for call in calls[BASELINE]]
    for name in names:  # the first call also fills the prefix cache
        errors = {
            f"{name}: {what}": relative_error(call(), wanted)
            for what, call, wanted in zip(("states", "gradient"), calls[name], expected, strict=True)
        }
        refuse_wrong(errors, BUDGETS[name])
    timed = {f"{name}: {what}": call for name in names for what, call in zip(("paths", "student"), calls[name], strict=True)}
    timings = time_calls(timed, repeats=repeats, device=case.device, warmup=1)
    rows = []
    for name in names:
        paths, student = timings[f"{name}: paths"], timings[f"{name}: student"]
        run, real = case.tokens(calls[name][0]), case.real_tokens(cached={**LAYOUTS, **VARLEN}[name][1])
        rows.append(
            {
                "layout": name,
                "examples": len(case.examples),
                "pack_tokens": case.pack_tokens,
                "tokens": run,
                "padding": 1 - real / run,
                **time_columns(paths),
                "student_ms": student.median * 1e3,
                "speedup": timings[f"{BASELINE}: paths"].median / paths.median,
                "student_speedup": timings[f"{BASELINE}: student"].median / student.median,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("packing", __doc__, repeats=5)
    parser.add_argument("--examples", type=int, default=16, help="examples in a batch")
    parser.add_argument("--pack-tokens", type=int, default=512, help="largest number of tokens in a packed row")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    case = PackingCase(args.examples, device, pack_tokens=args.pack_tokens)
    layouts = list(LAYOUTS)
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        layouts += VARLEN
    rows = measure(case, args.repeats, layouts)
    finish(args, "packing", "the teacher's two paths (median_ms), and the student's forward and backward", rows)


if __name__ == "__main__":
    main()
