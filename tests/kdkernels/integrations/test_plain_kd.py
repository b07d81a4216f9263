"""Plain distillation: one path, no alpha, text LMs as teacher and student."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
import tiny_lms
from transformers import TrainingArguments

from kdkernels import CAADOptions, CAADTrainer, ContrastCache, DualPathTeacher, LMHead, answer_index

TAU, KD_WEIGHT = 2.0, 0.6


def text_lm(seed: int):
    torch.manual_seed(seed)
    return tiny_lms.llama()[0]


def rows(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in range(count):
        ids = torch.randint(1, 80, (tiny_lms.LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: 14 + row % 4] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "sample_id": f"text-{row}"})
    return made


def collate(examples: list[dict]) -> dict:
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {name: torch.stack(x) if isinstance(x[0], torch.Tensor) else x for name, x in columns.items()}


def trainer_of(folder, student, *, options=None, examples=None, **teacher) -> CAADTrainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return CAADTrainer(
        student,
        args,
        options=options or CAADOptions(temperature=TAU, kd_weight=KD_WEIGHT),
        data_collator=collate,
        train_dataset=examples or rows(),
        eval_dataset=examples or rows(),
        **teacher,
    )


def by_hand(student, teacher, batch: dict) -> torch.Tensor:
    """Forward KL and cross-entropy as a textbook writes them, from whole logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    target = batch["labels"][:, 1:]
    counted = target != -100
    s = student(**inputs).logits[:, :-1][counted]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1][counted]
    kd = F.kl_div(F.log_softmax(s / TAU, -1), F.softmax(t / TAU, -1), reduction="batchmean") * TAU**2
    return KD_WEIGHT * kd + (1 - KD_WEIGHT) * F.cross_entropy(s, target[counted])


def check_step(student, loss, other, expected) -> None:
    """The losses of two equal models, and their gradients, are equal."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


class CountedRows:
    """Rows that a model's forward has run."""

    def __init__(self, model):
        self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model, _args, kwargs):
        self.rows += len(kwargs["input_ids"])


def test_equals_a_hand_written_distillation(tmp_path):
    student, other, teacher_model = text_lm(0), text_lm(0), text_lm(1)
    trainer = trainer_of(tmp_path, student, teacher=DualPathTeacher(teacher_model, negative=None))
    batch = collate(rows())
    check_step(student, trainer.compute_loss(student, batch), other, by_hand(other, teacher_model, batch))


def test_no_teacher_row_runs_twice(tmp_path):
    teacher_model = text_lm(1)
    trainer = trainer_of(tmp_path, text_lm(0), teacher=DualPathTeacher(teacher_model, negative=None))
    counted = CountedRows(teacher_model)
    trainer.train()
    assert counted.rows == 2 * 2 * 2  # steps, micro-batches, rows
    metrics = trainer.evaluate()
    assert metrics["eval_path_divergence"] == 0 and metrics["eval_kd"] > 0


def test_cache_of_one_path(tmp_path):
    """Half the bytes, the same training."""
    teacher = DualPathTeacher(text_lm(1), negative=None)
    with ContrastCache.writer(
        tmp_path / "cache", fingerprint={}, hidden_size=32, dtype=torch.float32, text_path=False
    ) as writer:
        for row in rows():
            batch = collate([row])
            index, target = answer_index(batch["labels"])
            states = teacher({name: batch[name] for name in ("input_ids", "attention_mask")}, index)
            assert states.text_hidden is None
            writer.add(row["sample_id"], states.audio_hidden, None, target)
    cache = ContrastCache(tmp_path / "cache")
    assert not cache.text_path and cache["text-0"].text_hidden is None
    tokens = sum(cache.rows(name) for name in cache)
    estimate = ContrastCache.estimate_bytes(tokens=tokens, hidden_size=32, dtype=torch.float32, text_path=False)
    assert estimate == tokens * (32 * 4 + 8) <= cache.bytes < 2 * estimate
    losses = []
    for given in ({"teacher": teacher}, {"teacher": cache, "teacher_head": LMHead.from_model(teacher.model)}):
        trainer = trainer_of(tmp_path / "out", text_lm(0), **given)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_cache_without_a_sample_of_the_dataset_is_refused_before_the_first_step(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    hidden, target = torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64)
    with ContrastCache.writer(tmp_path / "cache", fingerprint={}, hidden_size=32) as writer:
        for row in range(7):
            writer.add(f"text-{row}", hidden, hidden, target)
    head = LMHead.from_model(text_lm(1))
    whole = datasets.Dataset.from_list([{**row, "input_ids": row["input_ids"].tolist()} for row in rows()])
    given = {"teacher": ContrastCache(tmp_path / "cache"), "teacher_head": head}
    assert trainer_of(tmp_path / "out", text_lm(0), examples=whole.select(range(7)), **given)
    with pytest.raises(ValueError, match=r"train_dataset: expected all of the 8 samples .* without 1 of them: 'text-7'; "):
        trainer_of(tmp_path / "refused", text_lm(0), examples=whole, **given)
    assert not (tmp_path / "refused").exists()


def test_options_of_another_type(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    teacher = DualPathTeacher(text_lm(1), negative=None)
    with pytest.raises(TypeError, match="options: expected a CAADOptions or None, got dict"):
        CAADTrainer(text_lm(0), args, teacher=teacher, options={"alpha": 1.0}, data_collator=collate, train_dataset=rows())


def test_cache_refuses_the_other_kind(tmp_path):
    hidden, target = torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64)
    options = {"fingerprint": {}, "hidden_size": 32}
    with ContrastCache.writer(tmp_path / "one", text_path=False, **options) as writer:
        with pytest.raises(ValueError, match=r"text_hidden: expected None, in a cache of one path \(text_path=False\)"):
            writer.add("a", hidden, hidden, target)
        writer.add("a", hidden, None, target)
    with pytest.raises(ValueError, match=r"text_path: the cache .* has another; expected True, got False"):
        ContrastCache.writer(tmp_path / "one", **options)
    with ContrastCache.writer(tmp_path / "two", **options) as writer, pytest.raises(TypeError, match="text_hidden: expected"):
        writer.add("a", hidden, None, target)


def test_layers_of_one_path(tmp_path):
    model = text_lm(1)
    batch = collate(rows(2))
    index, target = answer_index(batch["labels"])
    states = DualPathTeacher(model, negative=None, layers=(1,))({"input_ids": batch["input_ids"]}, index)
    assert states.audio_layers.shape == (len(index), 1, 32) and states.text_layers is None
    with ContrastCache.writer(tmp_path / "cache", fingerprint={}, hidden_size=32, layers=(1,), text_path=False) as writer:
        writer.add("a", states.audio_hidden, None, target, audio_layers=states.audio_layers)
    held = ContrastCache(tmp_path / "cache")["a"]
    assert held.audio_layers.shape == states.audio_layers.shape and held.text_layers is None


@pytest.mark.parametrize(
    ("options", "column", "name"),
    [
        ({"alpha": 2.0}, False, r"options\.alpha"),
        ({"alpha": 0.0}, False, r"options\.alpha"),
        ({"alpha_start": 0.0, "alpha_ramp_steps": 2}, False, r"options\.alpha_start"),
        ({}, True, r"inputs\['alpha'\]"),
    ],
)
def test_alpha_without_a_negative_path(tmp_path, options, column, name):
    examples = rows()
    if column:
        for row in examples:
            row["alpha"] = torch.ones(tiny_lms.LENGTH)
    trainer = trainer_of(
        tmp_path,
        text_lm(0),
        teacher=DualPathTeacher(text_lm(1), negative=None),
        options=CAADOptions(**options),
        examples=examples,
    )
    with pytest.raises(ValueError, match=f"{name}: expected None in plain distillation, got .*no negative path"):
        trainer.train()


def test_alpha_of_two_paths_is_still_2():
    assert CAADOptions().alpha_at(1) == CAADOptions(alpha=2.0).alpha_at(1) == 2.0
    assert CAADOptions().keywords(1)["alpha"] == 2.0
