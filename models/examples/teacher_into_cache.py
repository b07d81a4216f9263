"""The teacher runs once: its hidden states go into a `ContrastCache`, and the student trains from there for several epochs.

What it shows: the teacher is frozen and the answers Y are fixed. So training needs only the teacher's hidden states at the
positions of Y. Every later epoch, and every other alpha or kd_weight, runs without the teacher. The student is trained twice:
from the live teacher and from the cache. The script prints both losses and fails if they differ by more than rounding.

Install with `pip install '.[train]'`, then run from the repository root:

    python models/examples/teacher_into_cache.py                  # tiny random models, seconds on a CPU
    python models/examples/teacher_into_cache.py --device cuda --teacher Qwen/Qwen2-Audio-7B-Instruct --student ID

For real models, replace `toy_task.tones` with your own samples, lower --learning-rate to 1e-5, and drop the run with the live
teacher. Put all that changes the teacher's states (its id, the prompts, the answers) into the fingerprint. A cache with another
fingerprint raises an error. If a model computes in bfloat16, its states lose nothing as bfloat16 on the disk.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import toy_task
from torch import Tensor

from kdkernels import ContrastCache, DualPathTeacher, LMHead, MaskFeatures, answer_index, fused_linear_caad_loss

# A function from samples to the teacher's audio_hidden and text_hidden, (N, H) each.
StatesOf = Callable[[list[toy_task.Sample]], tuple[Tensor, Tensor]]


def main() -> None:
    options = parse_arguments()
    model, teacher_processor = toy_task.load(options.teacher, seed=options.seed + 1, width=64, device=options.device)
    student, processor = toy_task.load(options.student, seed=options.seed, device=options.device)
    teacher = DualPathTeacher(model, negative=MaskFeatures("input_features")).freeze()
    samples = toy_task.tones(options.samples, options.seed)

    def live(batch: list[toy_task.Sample]) -> tuple[Tensor, Tensor]:
        inputs = toy_task.encode(teacher_processor, batch, options.device)
        index, _ = answer_index(inputs.pop("labels"))
        states = teacher(inputs, index)
        return states.audio_hidden, states.text_hidden

    started = time.perf_counter()
    fill_cache(options, teacher, teacher_processor, samples)
    cache = ContrastCache(options.cache)
    print(f"cache: {len(cache)} samples, {cache.bytes / 1e6:.2f} MB, {time.perf_counter() - started:.1f} s")

    def cached(batch: list[toy_task.Sample]) -> tuple[Tensor, Tensor]:
        states = cache.get([sample.id for sample in batch])
        dtype = teacher.head.weight.dtype
        return states.audio_hidden.to(options.device, dtype), states.text_hidden.to(options.device, dtype)

    losses = {}
    for name, states_of in (("live teacher", live), ("cache", cached)):
        started = time.perf_counter()
        losses[name] = train(copy.deepcopy(student), processor, samples, states_of, teacher.head, options)
        print(f"{name}: {time.perf_counter() - started:.1f} s")
    for step, (one, other) in enumerate(zip(*losses.values(), strict=True), start=1):
        print(f"step {step:3d}  loss {other:.4f}  with the live teacher {one:.4f}")
    apart = max(abs(one - other) / abs(one) for one, other in zip(*losses.values(), strict=True))
    print(f"largest relative difference of the losses: {apart:.1e}")
    if not apart < options.tolerance:
        raise SystemExit(f"the cache's losses differ from the live teacher's by more than {options.tolerance:g}")
    print("the losses are equal up to rounding")


def fill_cache(options: argparse.Namespace, teacher: DualPathTeacher, processor: Any, samples: list[toy_task.Sample]) -> None:
    """Store both paths of every sample. After a stop it continues behind the last finished shard."""
    fingerprint = {"teacher": options.teacher, "seed": options.seed, "negative": "input_features = 0"}
    head = teacher.head
    with ContrastCache.writer(
        options.cache, fingerprint=fingerprint, hidden_size=head.weight.shape[1], dtype=head.weight.dtype, teacher_head=head
    ) as writer:
        missing = [sample for sample in samples if sample.id not in writer]
        for batch in toy_task.batches(missing, options.batch, seed=options.seed):
            inputs = toy_task.encode(processor, batch, options.device)
            labels = inputs.pop("labels")
            index, target = answer_index(labels)
            states = teacher(inputs, index)
            lengths = (labels[:, 1:] != -100).sum(dim=1).tolist()
            parts = (x.split(lengths) for x in (states.audio_hidden, states.text_hidden, target))
            for sample, audio, text, tokens in zip(batch, *parts, strict=True):
                writer.add(sample.id, audio, text, tokens)


def train(
    student: Any,
    processor: Any,
    samples: list[toy_task.Sample],
    states_of: StatesOf,
    head: LMHead,
    options: argparse.Namespace,
) -> list[float]:
    """Train `student` in place and return the loss of every step. `head` is the teacher's LM head."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    own_head = LMHead.from_model(student)  # says what the student does to its logits
    losses = []
    for epoch in range(options.epochs):
        for batch in toy_task.batches(samples, options.batch, seed=options.seed + epoch):
            inputs = toy_task.encode(processor, batch, options.device)
            index, target = answer_index(inputs.pop("labels"))
            outputs = student.base_model(**inputs, use_cache=False)  # the model without its LM head: no logits
            hidden = outputs.last_hidden_state.flatten(0, 1)[index]
            audio_hidden, text_hidden = states_of(batch)
            own_layer = student.get_output_embeddings()
            loss = fused_linear_caad_loss(
                hidden, own_layer.weight, audio_hidden, text_hidden, target=target, student_bias=own_layer.bias,
                student_softcap=own_head.softcap, student_logit_scale=own_head.logit_scale,
                alpha=options.alpha, kd_weight=options.kd_weight, **head.keywords("teacher"),
            )  # fmt: skip
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def parse_arguments() -> argparse.Namespace:
    parser = toy_task.parser(__doc__, learning_rate=1e-2, batch=4)
    parser.add_argument("--cache", default="runs/teacher_into_cache", help="folder of the cache")
    parser.add_argument("--samples", type=int, default=16, help="clips (default: 16)")
    parser.add_argument("--epochs", type=int, default=5, help="times that the student sees each clip (default: 5)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference that is rounding")
    return parser.parse_args()


if __name__ == "__main__":
    main()
