"""On-policy distillation in CAADTrainer: the student's own tokens on all paths, exact sums, exact resume."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
import tiny_lms
from test_trainer import Recorder, arguments, captured_hidden, dual_path, examples, logged, speech_lm, student_inputs

from kdkernels import (
    CAADOptions,
    CAADTrainer,
    ContrastCache,
    DualPathTeacher,
    LMHead,
    OnPolicy,
    Sampling,
    answer_index,
    fused_linear_caad_loss,
)  # fmt: skip

END = 9
GREEDY = Sampling(temperature=0, max_new_tokens=5)


def trainer_of(folder, *, on_policy=None, options=None, teacher=None, rows=None, student=None, **arguments_) -> CAADTrainer:
    trainer = CAADTrainer(
        student or speech_lm(),
        arguments(folder, train_sampling_strategy="sequential", **arguments_),
        teacher=teacher or dual_path(),
        options=options or CAADOptions(kd_weight=1.0),
        on_policy=on_policy or OnPolicy(end_token_ids=(END,), sampling=GREEDY),
        data_collator=Recorder(),
        train_dataset=rows or examples(),
    )
    trainer.seen = []
    compute = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        trainer.seen.append(dict(inputs))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return trainer


def answers_of(batch, prefix="") -> list[list[int]]:
    ids, labels, mask = (batch[prefix + name] for name in ("input_ids", "labels", "attention_mask"))
    assert bool(((labels == -100) | (labels == ids)).all()) and not bool(((labels != -100) & (mask == 0)).any())
    return [row[row != -100].tolist() for row in labels]


@torch.no_grad()
def greedy(model, row: dict) -> list[int]:
    """A row's answer by whole forwards, without a cache; no placeholder of audio in it."""
    start = int((row["labels"] != -100).int().argmax())
    ids, made = row["input_ids"][:start][None], []
    while len(made) < 5 and END not in made:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": row["input_features"][None]}
        logits = model(**inputs).logits[0, -1]
        logits[tiny_lms.AUDIO_TOKEN] = -torch.inf
        made.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([made[-1:]])], 1)
    return made


@pytest.mark.parametrize(
    ("divergence", "contrast"),
    [
        ("forward_kl", True),
        pytest.param("forward_kl", False, marks=pytest.mark.slow),
        pytest.param("reverse_kl", True, marks=pytest.mark.slow),
        pytest.param("jsd", False, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_an_offline_step_on_the_very_answers(tmp_path, divergence, contrast):
    teacher = dual_path() if contrast else DualPathTeacher(speech_lm(1), negative=None)
    options = CAADOptions(kd_weight=1.0, divergence=divergence)
    trainer = trainer_of(tmp_path, teacher=teacher, options=options, max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    student, rows = speech_lm(), examples()
    expected = [greedy(student, row) for row in rows[:8]]
    assert [answer for batch in trainer.seen for answer in answers_of(batch)] == expected
    losses, count = [], 0
    for batch in trainer.seen:
        index, target = answer_index(batch["labels"])
        states = teacher(student_inputs(batch), index)
        loss = fused_linear_caad_loss(
            captured_hidden(student, batch)[index], student.get_output_embeddings().weight, states.audio_hidden,
            states.text_hidden, teacher.head.weight, None, divergence=divergence, reduction="sum",
            alpha=2.0 if contrast else 0.0, kd_weight=1.0,
        )  # fmt: skip
        losses.append(loss.item())
        count += len(target)
    assert count == sum(map(len, expected))
    assert logged(trainer) == [pytest.approx(sum(losses) / count, rel=1e-5)]
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert line["answer_tokens"] == count / 8
    assert line["answer_ends"] == sum(END in answer for answer in expected) / 8


def test_a_student_s_answer_has_no_ce_term(tmp_path):
    trainer = trainer_of(tmp_path, options=CAADOptions(kd_weight=0.4), max_steps=1)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert line["loss"] == pytest.approx(0.4 * line["kd"], rel=1e-4) and "ce" not in line


@pytest.mark.slow
def test_accumulation_and_the_fraction(tmp_path):
    """1 x 8 rows are 4 x 2; rows that are not chosen keep the dataset's labels, with their CE term; every second step alone."""
    sampling = Sampling(top_k=30, top_p=0.9, temperature=1.5, max_new_tokens=5)
    settings = OnPolicy(fraction=0.5, every_steps=2, sampling=sampling, end_token_ids=(END,))
    lines, seen = [], []
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        trainer = trainer_of(
            tmp_path, on_policy=settings, options=CAADOptions(kd_weight=0.5), max_steps=2, learning_rate=1e-3,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        trainer.train()
        lines.append(logged(trainer))
        seen.append([answer for batch in trainer.seen for answer in answers_of(batch)])
    assert lines[1] == pytest.approx(lines[0], rel=1e-5) and lines[2] == pytest.approx(lines[0], rel=1e-5)
    assert seen[0] == seen[1] == seen[2]
    own = [row["labels"][row["labels"] != -100].tolist() for row in examples()]
    assert seen[0][:8] == own[:8]
    kept = [one == other for one, other in zip(seen[0][8:], own[8:], strict=True)]
    assert 1 < sum(kept) < 7
    (batch,) = trainer_of(tmp_path, on_policy=settings)._own_answers.put_into(2, [Recorder()(examples()[:8])])
    weights, answers = batch["ce_token_weight"], answers_of(batch)
    for row, answer in enumerate(answers):
        assert bool((weights[row] == float(answer == own[row])).all())


@pytest.mark.slow
def test_resumes_to_the_bit(tmp_path):
    settings = OnPolicy(fraction=0.7, sampling=Sampling(max_new_tokens=4), end_token_ids=(END,))
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path / "whole", on_policy=settings, **more)
    whole.train()
    parts = trainer_of(tmp_path / "whole", on_policy=settings, **more)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert logged(whole) == logged(parts)
    other = trainer_of(tmp_path / "whole", **more)
    with pytest.raises(ValueError, match=r"on_policy was .*'fraction': 0.7.* and is .*'fraction': 1.0"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_teacher_and_negative_path_have_prompts_of_their_own(tmp_path):
    """The student's answer stands behind each of them."""
    rows = examples(4)
    for row in rows:
        for prefix, words in (("teacher_", 3), ("negative_", 1)):
            extra = torch.full((words,), 11)
            row[f"{prefix}input_ids"] = torch.cat([extra, row["input_ids"]])
            row[f"{prefix}attention_mask"] = torch.ones_like(row[f"{prefix}input_ids"])
            row[f"{prefix}labels"] = torch.cat([torch.full_like(extra, -100), row["labels"]])
            row[f"{prefix}input_features"] = row["input_features"]
    trainer = trainer_of(tmp_path, rows=rows, max_steps=1)
    trainer.train()
    for batch in trainer.seen:
        own = answers_of(batch)
        assert own == answers_of(batch, "teacher_") == answers_of(batch, "negative_")
        assert bool((batch["teacher_input_ids"][:, :3] == 11).all())
        assert torch.equal(batch["teacher_input_ids"][:, 3:], batch["input_ids"])


def test_what_does_not_fit_is_refused(tmp_path):
    head = LMHead.from_model(speech_lm())
    ContrastCache.writer(tmp_path / "cache", hidden_size=head.weight.shape[1], fingerprint={}).close()
    with pytest.raises(ValueError, match="on_policy: expected None with a ContrastCache"):
        CAADTrainer(
            speech_lm(), arguments(tmp_path), teacher=ContrastCache(tmp_path / "cache"), teacher_head=head,
            on_policy=OnPolicy(end_token_ids=(END,)), train_dataset=examples(),
        )  # fmt: skip
    trainer = trainer_of(tmp_path, rows=[{**row, "alpha": torch.ones(row["labels"].shape)} for row in examples()])
    with pytest.raises(ValueError, match=r"inputs\['alpha'\]: expected none with on_policy"):
        trainer.train()
    with pytest.raises(TypeError, match="on_policy: expected an OnPolicy or None, got float"):
        trainer_of(tmp_path, on_policy=0.5)
    with pytest.raises(ValueError, match=r"fraction: expected a number in \[0, 1\]"):
        OnPolicy(fraction=2)
