"""Contrastive distillation of an audio LM with transformers' Trainer and a LoRA of peft.

What it shows: `CAADTrainer` is transformers' Trainer with another loss. It takes the student (here with a LoRA on its
attention), a `DualPathTeacher`, and a collator that puts `labels` into each batch. Accumulation, logging, checkpoints, DDP and
FSDP are those of Trainer.

Install with `pip install '.[train]' peft`, then run from the repository root:

    python models/examples/audio_lm_trainer.py                  # tiny random Qwen2-Audio models, seconds on a CPU
    python models/examples/audio_lm_trainer.py --device cuda --teacher Qwen/Qwen2-Audio-7B-Instruct --student ID

For real models, replace `toy_task.tones` with your own samples, and lower --learning-rate to 1e-4. Student and teacher need the
same tokenizer. Their processors may differ: the columns teacher_NAME are the teacher's own inputs. If the teacher's audio inputs
are not called `input_features`, name them in `MaskFeatures`.
"""

from __future__ import annotations

import argparse
from typing import Any

import toy_task
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from kdkernels import CAADOptions, CAADTrainer, DualPathTeacher, MaskFeatures


class Collator:
    """Makes a batch for the student, and the same samples for the teacher under the names teacher_NAME."""

    def __init__(self, student_processor: Any, teacher_processor: Any):
        self.student_processor = student_processor
        self.teacher_processor = teacher_processor

    def __call__(self, samples: list[toy_task.Sample]) -> dict[str, Tensor]:
        batch = toy_task.encode(self.student_processor, samples)
        teacher_inputs = toy_task.encode(self.teacher_processor, samples)
        return batch | {f"teacher_{name}": value for name, value in teacher_inputs.items()}


def main() -> None:
    options = parse_arguments()
    teacher, teacher_processor = toy_task.load(options.teacher, seed=options.seed + 1, width=64)
    student, processor = toy_task.load(options.student, seed=options.seed)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    student = get_peft_model(student, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=attention))
    student.print_trainable_parameters()
    trainer = CAADTrainer(
        student,
        training_arguments(options),
        teacher=DualPathTeacher(teacher, negative=MaskFeatures("input_features")).freeze(),
        options=CAADOptions(alpha=options.alpha, kd_weight=options.kd_weight),
        data_collator=Collator(processor, teacher_processor),
        train_dataset=toy_task.tones(32, options.seed),
        eval_dataset=toy_task.tones(8, options.seed + 1),
    )
    trainer.remove_callback(PrinterCallback)  # it prints the same lines as dictionaries
    trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            print(f"step {line['step']:3d}  loss {line['loss']:.4f}")
    found = trainer.evaluate()
    shown = ("loss", "kd", "ce", "top1_agreement")
    print("on other clips: " + ", ".join(f"{name} {found[f'eval_{name}']:.4f}" for name in shown))
    if options.save:
        student.save_pretrained(options.out)
        print(f"the LoRA is in {options.out}")


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        bf16=options.device != "cpu",
        remove_unused_columns=False,  # the dataset's items are samples, which the collator turns into columns
        seed=options.seed,
    )


def parse_arguments() -> argparse.Namespace:
    parser = toy_task.parser(__doc__, learning_rate=3e-2, batch=4)
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes of one step (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (default: 20)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA (default: 8)")
    parser.add_argument("--out", default="runs/audio_lm_trainer", help="folder of the trained LoRA")
    parser.add_argument("--save", action="store_true", help="write the LoRA into --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
