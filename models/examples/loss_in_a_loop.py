"""Contrastive distillation in a plain PyTorch loop: the loss is one call, the rest is the loop you have.

What it shows: the teacher's two passes (with the audio and without), the hidden states at the positions that predict the answer
Y, `fused_linear_caad_loss` from these states (or `fused_caad_loss` from logits), and gradient accumulation: both terms are
divided by the number of positions of the whole step, so four batches of 2 are one batch of 8.

Install with `pip install '.[train]'`, then run from the repository root:

    python models/examples/loss_in_a_loop.py                  # tiny random models, seconds on a CPU
    python models/examples/loss_in_a_loop.py --from-logits    # the same losses by fused_caad_loss
    python models/examples/loss_in_a_loop.py --device cuda --teacher Qwen/Qwen2-Audio-7B-Instruct --student ID

For real models: replace `toy_task.tones` by your own samples, and lower --learning-rate to 1e-5. Student and teacher need the
same tokenizer: the loss compares them token by token.
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
    teacher_head = LMHead.from_model(teacher)
    without_audio = MaskFeatures("input_features")  # the negative path: same tokens, silent features
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    samples = toy_task.tones(options.batch * options.accumulate, options.seed)

    for step in range(1, options.steps + 1):
        parts = []
        for batch in toy_task.batches(samples, options.batch, seed=step):
            inputs = toy_task.encode(processor, batch, options.device)
            teacher_inputs = toy_task.encode(teacher_processor, batch, options.device)
            index, target = answer_index(inputs.pop("labels"))
            teacher_index, teacher_target = answer_index(teacher_inputs.pop("labels"))
            if not torch.equal(target, teacher_target):
                raise SystemExit("teacher: expected the student's tokenizer, got other tokens for the same answer")
            parts.append((inputs, index, target, teacher_inputs, teacher_index))
        # The divisors are known before the first backward: each part is then its share of the step's mean.
        positions = float(sum(len(target) for _, _, target, _, _ in parts))
        step_loss = 0.0
        for inputs, index, target, teacher_inputs, teacher_index in parts:
            with torch.no_grad():
                audio_hidden = hidden_states(teacher, teacher_inputs, teacher_index)
                text_hidden = hidden_states(teacher, without_audio(teacher_inputs), teacher_index)
            student_hidden = hidden_states(student, inputs, index)
            head = student.get_output_embeddings()
            settings = {
                "alpha": options.alpha, "temperature": options.temperature, "kd_weight": options.kd_weight,
                "kd_normalizer": positions, "ce_normalizer": positions,
            }  # fmt: skip
            if options.from_logits:
                loss = fused_caad_loss(
                    head(student_hidden), teacher_head.logits(audio_hidden), teacher_head.logits(text_hidden), target, **settings
                )
            else:  # logits of a chunk of tokens at a time
                loss = fused_linear_caad_loss(
                    student_hidden, head.weight, audio_hidden, text_hidden, target=target, student_bias=head.bias,
                    **teacher_head.keywords("teacher"), **settings,
                )  # fmt: skip
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {step_loss:.4f}", flush=True)


def hidden_states(model: Any, inputs: dict[str, Tensor], index: Tensor) -> Tensor:
    """(N, H): what the LM head reads at the positions `index` of the flattened batch."""
    # One column of logits: without logits_to_keep the model would make them for all positions.
    outputs = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    return outputs.hidden_states[-1].flatten(0, 1)[index]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny", help="id or folder of an audio LM of transformers (default: tiny, random)")
    parser.add_argument("--student", default="tiny", help="as --teacher; a smaller model with the same tokenizer")
    parser.add_argument("--from-logits", action="store_true", help="fused_caad_loss on logits, which takes more memory")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the contrast (default: 1)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the distillation term (default: 2)")
    parser.add_argument("--kd-weight", type=float, default=0.5, help="share of the distillation term (default: 0.5)")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (default: 20)")
    parser.add_argument("--batch", type=int, default=2, help="samples of one backward pass (default: 2)")
    parser.add_argument("--accumulate", type=int, default=4, help="backward passes of one step (default: 4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
