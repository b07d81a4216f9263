"""Contrastive distillation in a plain PyTorch loop. The loss is one call; the rest is the loop that you have.

What it shows:

- the teacher's two passes, with the audio and without;
- the hidden states at the positions that predict the answer Y;
- `fused_linear_caad_loss` from these states, or `fused_caad_loss` from logits;
- gradient accumulation: the number of positions of the whole step divides both terms, so four batches of 2 are one batch of 8.

Install with `pip install '.[train]'`, then run from the repository root:

    python models/examples/loss_in_a_loop.py                  # tiny random models, seconds on a CPU
    python models/examples/loss_in_a_loop.py --from-logits    # the same losses by fused_caad_loss
    python models/examples/loss_in_a_loop.py --device cuda --teacher Qwen/Qwen2-Audio-7B-Instruct --student ID

For real models, replace `toy_task.tones` with your own samples, and lower --learning-rate to 1e-5. Student and teacher need the
same tokenizer, because the loss compares them token by token.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import toy_task
from torch import Tensor

from kdkernels import LMHead, MaskFeatures, answer_index, fused_caad_loss, fused_linear_caad_loss


def main() -> None:
    options = parse_arguments()
    teacher, teacher_processor = toy_task.load(options.teacher, seed=options.seed + 1, width=64, device=options.device)
    student, processor = toy_task.load(options.student, seed=options.seed, device=options.device)
    teacher.eval().requires_grad_(False)
    student.train()
    teacher_head, student_head = LMHead.from_model(teacher), LMHead.from_model(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    samples = toy_task.tones(options.batch * options.accumulate, options.seed)

    for step in range(1, options.steps + 1):
        parts = []
        for batch in toy_task.batches(samples, options.batch, seed=step):
            inputs, index, target = inputs_and_positions(processor, batch, options.device)
            teacher_inputs, teacher_index, teacher_target = inputs_and_positions(teacher_processor, batch, options.device)
            if not torch.equal(target, teacher_target):
                raise SystemExit("teacher: expected the student's tokenizer, got other tokens for the same answer")
            parts.append((inputs, index, target, teacher_inputs, teacher_index))
        # The divisors are known before the first backward. So each part is its share of the mean over the whole step.
        positions = float(sum(len(target) for _, _, target, _, _ in parts))
        settings = {
            "alpha": options.alpha, "temperature": options.temperature, "kd_weight": options.kd_weight,
            "kd_normalizer": positions, "ce_normalizer": positions,
        }  # fmt: skip
        step_loss = 0.0
        for inputs, index, target, teacher_inputs, teacher_index in parts:
            audio_hidden, text_hidden = both_paths(teacher, teacher_inputs, teacher_index)
            student_hidden = hidden_states(student, inputs, index)
            head = student.get_output_embeddings()
            if options.from_logits:
                teacher_logits = [teacher_head.logits(hidden) for hidden in (audio_hidden, text_hidden)]
                loss = fused_caad_loss(student_head.post(head(student_hidden)), *teacher_logits, target, **settings)
            else:  # logits exist for a chunk of tokens at a time
                loss = fused_linear_caad_loss(
                    student_hidden, head.weight, audio_hidden, text_hidden, target=target, student_bias=head.bias,
                    student_softcap=student_head.softcap, student_logit_scale=student_head.logit_scale,
                    **teacher_head.keywords("teacher"), **settings,
                )  # fmt: skip
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {step_loss:.4f}", flush=True)


def inputs_and_positions(processor: Any, batch: list[toy_task.Sample], device: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The model's inputs, the positions (N,) that predict a token of Y, and these tokens (N,)."""
    inputs = toy_task.encode(processor, batch, device)
    return inputs, *answer_index(inputs.pop("labels"))


@torch.no_grad()
def both_paths(teacher: Any, inputs: dict[str, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's states with the audio and without it: the same tokens, but silent features."""
    silent = MaskFeatures("input_features")(inputs)
    return hidden_states(teacher, inputs, index), hidden_states(teacher, silent, index)


def hidden_states(model: Any, inputs: dict[str, Tensor], index: Tensor) -> Tensor:
    """(N, H): what the LM head reads at the positions `index` of the flattened batch."""
    outputs = model.base_model(**inputs, use_cache=False)  # the model without its LM head: no logits
    return outputs.last_hidden_state.flatten(0, 1)[index]


def parse_arguments() -> argparse.Namespace:
    parser = toy_task.parser(__doc__, learning_rate=1e-2, batch=2)
    parser.add_argument("--accumulate", type=int, default=4, help="backward passes of one step (default: 4)")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (default: 20)")
    parser.add_argument("--temperature", type=float, default=2.0, help="tau of the distillation term (default: 2)")
    parser.add_argument("--from-logits", action="store_true", help="fused_caad_loss on logits, which takes more memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
