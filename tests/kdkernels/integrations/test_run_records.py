"""What a run logs of its loss, and what it leaves beside its weights."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
from huggingface_hub import ModelCard
from test_trainer import Recorder, arguments, cached, captured_hidden, dual_path, examples, speech_lm, student_inputs

from kdkernels import CAADOptions, CAADTrainer, ContrastCache, OnPolicy, Sampling, answer_index, fused_linear_caad_loss
from kdkernels.projection_cache import ProjectionSettings


def trainer_of(folder, *, options=None, rows=None, **arguments_) -> CAADTrainer:
    resume = {name: arguments_.pop(name) for name in ("resume_with_other_options",) if name in arguments_}
    return CAADTrainer(
        speech_lm(),
        arguments(folder, **arguments_),
        teacher=dual_path(),
        options=options or CAADOptions(alpha=1.5),
        data_collator=Recorder(),
        train_dataset=examples() if rows is None else rows,
        **resume,
    )


def test_statistics_of_the_logged_step(tmp_path):
    """Over three micro-batches, by token: their counts differ, so a mean of means would be another number."""
    trainer = trainer_of(tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    collator = trainer.data_collator
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    student, teacher = speech_lm(), dual_path()
    parts = []
    for batch in collator.batches[:3]:  # the loader draws one more
        index, target = answer_index(batch["labels"])
        states = teacher(student_inputs(batch), index)
        hidden = captured_hidden(student, batch)[index]
        weight = student.get_output_embeddings().weight
        _, stats = fused_linear_caad_loss(
            hidden, weight, states.audio_hidden, states.text_hidden, teacher.head.weight, target, alpha=1.5, return_stats=True
        )
        parts.append(stats)
    assert len({len(part.kd) for part in parts}) > 1
    for name in parts[0]._fields:
        expected = torch.cat([getattr(part, name) for part in parts]).mean().item()
        assert line[name] == pytest.approx(expected, rel=1e-4), name
    assert line["alpha"] == 1.5 and line["path_divergence"] > 0


def test_only_logged_steps_measure(tmp_path, monkeypatch):
    import kdkernels.integrations.trainer as module

    asked = []
    original = module.fused_linear_caad_loss

    def counted(*args, **kwargs):
        asked.append(bool(kwargs.get("return_stats")))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "fused_linear_caad_loss", counted)
    trainer_of(tmp_path, max_steps=4, logging_steps=2).train()
    assert asked.count(False) == 8 and asked.count(True) == 4  # two micro-batches of two steps


def test_options_and_card_beside_each_checkpoint(tmp_path):
    trainer_of(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    assert json.loads((folder / "caad_options.json").read_text())["alpha"] == 1.5
    card = ModelCard.load(folder / "README.md")
    assert {"distillation", "kdkernels"} <= set(card.data.tags)
    for words in ("arxiv.org/abs/2606.23052", "VoxtralForConditionalGeneration", "list, 16 rows", "| alpha | 1.5 |"):
        assert words in card.text


@pytest.mark.parametrize(
    "made",
    [
        lambda: CAADOptions(
            alpha=np.float32(1.5), alpha_start=np.float16(1), alpha_ramp_steps=np.int64(4), temperature=np.float32(2),
            kd_weight=np.float32(0.5), plausibility=np.float32(0.5), vocab_size=np.int64(90), chunk_tokens=np.int64(64),
        ),
        lambda: CAADOptions(divergence="jsd", jsd_beta=np.float32(0.25), workspace_bytes=np.uint32(1 << 20)),
        lambda: OnPolicy(fraction=np.float32(0.5), every_steps=np.int64(2), end_token_ids=(np.int64(9),)),
        lambda: Sampling(temperature=np.float32(0.5), top_k=np.int32(3), top_p=np.float32(0.5), max_new_tokens=np.int64(3)),
        lambda: ProjectionSettings("", vocab_size=np.int64(90), alpha=np.float32(1)),
    ],
)  # fmt: skip
def test_numbers_of_numpy_become_python_numbers(made):
    values = dataclasses.asdict(made())
    json.dumps(values)
    assert not [name for name, value in values.items() if isinstance(value, np.generic)]


def test_a_checkpoint_with_numbers_of_numpy(tmp_path):
    options = CAADOptions(temperature=np.float32(2), vocab_size=np.int64(90))
    trainer_of(tmp_path, options=options, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer_of(tmp_path, options=CAADOptions(vocab_size=90), max_steps=2).train(resume_from_checkpoint=True)


def test_records_that_fail_do_not_cost_the_weights(tmp_path, monkeypatch):
    import kdkernels.integrations.trainer as module

    def full(*_args, **_options):
        raise OSError("no space")

    monkeypatch.setattr(module, "write_options", full)
    with pytest.raises(OSError, match="no space"):
        trainer_of(tmp_path).save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_resume_with_other_options(tmp_path, caplog):
    trainer_of(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = CAADOptions(alpha=1.0, kd_weight=0.5, chunk_tokens=64)
    for where in (str(tmp_path / "checkpoint-1"), True):
        with pytest.raises(ValueError, match=r"got others: alpha was 1.5 and is 1.0; kd_weight was 0.7 and is 0.5\. Pass"):
            trainer_of(tmp_path, options=other).train(resume_from_checkpoint=where)
    trainer_of(tmp_path, options=CAADOptions(alpha=1.5, chunk_tokens=64), max_steps=2).train(resume_from_checkpoint=True)
    going_on = trainer_of(tmp_path, options=other, max_steps=2, resume_with_other_options=True)
    going_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert going_on.state.global_step == 2 and "kd_weight was 0.7 and is 0.5. Training goes on" in caplog.text


def test_resume_with_another_teacher(tmp_path, caplog):
    def trainer(seed: int, **more) -> CAADTrainer:
        return CAADTrainer(
            speech_lm(), arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), teacher=dual_path(seed),
            data_collator=Recorder(), train_dataset=examples(), **more,
        )  # fmt: skip

    trainer(1).train()
    trainer(1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"got others: teacher was '\w+' and is '\w+'\. Pass"):
        trainer(2).train(resume_from_checkpoint=True)
    assert "Training goes on" not in caplog.text
    trainer(2, resume_with_other_options=True).train(resume_from_checkpoint=True)
    assert "Training goes on with the new ones" in caplog.text


def test_head_of_another_teacher_than_the_caches(tmp_path):
    """The cache has a sample of its teacher's head: not only a run that goes on is refused, but the first one too."""
    teacher = dual_path(1)
    width = teacher.head.weight.shape[1]
    ContrastCache.writer(tmp_path / "cache", fingerprint={}, hidden_size=width, teacher_head=teacher.head).close()
    given = {"teacher": ContrastCache(tmp_path / "cache"), "data_collator": Recorder(), "train_dataset": examples()}
    CAADTrainer(speech_lm(), arguments(tmp_path), teacher_head=dual_path(1).head, **given)
    with pytest.raises(ValueError, match="teacher_head: expected that of the teacher whose states"):
        CAADTrainer(speech_lm(), arguments(tmp_path), teacher_head=dual_path(2).head, **given)


def test_resume_with_another_cache(tmp_path, caplog):
    rows, teachers = examples(4), [dual_path(1), dual_path(2)]
    caches = [cached(tmp_path / f"{seed}", t, rows, {"seed": seed, "text": "same"}) for seed, t in enumerate(teachers)]

    def trainer(cache: int, head: int, **more) -> CAADTrainer:
        return CAADTrainer(
            speech_lm(), arguments(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1), teacher=caches[cache],
            teacher_head=teachers[head].head, data_collator=Recorder(), train_dataset=rows, **more,
        )  # fmt: skip

    trainer(0, 0).train()
    with pytest.raises(ValueError, match=r"got others: teacher_head was '\w+' and is '\w+'\. Pass"):
        trainer(0, 1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"teacher_cache\['seed'\] was 0 and is 1\. Pass"):
        trainer(1, 0).train(resume_from_checkpoint=True)
    trainer(1, 1, resume_with_other_options=True).train(resume_from_checkpoint=True)
    assert "Training goes on with the new ones" in caplog.text
    file = tmp_path / "run" / "checkpoint-1" / "caad_options.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if not name.startswith("teacher_")}
    file.write_text(json.dumps(older))
    trainer(1, 1).train(resume_from_checkpoint=True)
    assert "has no teacher_cache, teacher_head: it was not compared" in caplog.text


def test_checkpoint_with_broken_options_or_without(tmp_path, caplog):
    trainer_of(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-1" / "caad_options.json"
    for text in ('{"alpha": 1', "[1]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"caad_options\.json: expected a JSON object of CAADOptions, got"):
            trainer_of(tmp_path).train(resume_from_checkpoint=True)
    file.unlink()
    trainer_of(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert "were not compared" in caplog.text


def test_alpha_of_each_token_is_logged_by_its_weight(tmp_path):
    rows = examples()
    generator = torch.Generator().manual_seed(5)
    for row in rows:
        row["kd_token_weight"], row["alpha"] = torch.rand(2, len(row["labels"]), generator=generator)
    trainer = trainer_of(tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    picked = [batch["labels"][:, 1:] != -100 for batch in trainer.data_collator.batches[:3]]
    weight, alpha = (
        torch.cat([batch[name][:, 1:][mask] for batch, mask in zip(trainer.data_collator.batches, picked, strict=False)])
        for name in ("kd_token_weight", "alpha")
    )
    assert line["alpha"] == pytest.approx(((weight * alpha).sum() / weight.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_no_bit_of_the_training_depends_on_the_log(tmp_path, precision):
    trained, logs = [], []
    for options in ({"logging_steps": 1}, {"logging_steps": 3, "logging_first_step": True}, {"logging_strategy": "epoch"}):
        trainer = trainer_of(tmp_path, max_steps=4, **options, **precision)
        trainer.train()
        trained.append([p.detach().clone() for p in trainer.model.parameters()])
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    for others in trained[1:]:
        assert all(torch.equal(a, b) for a, b in zip(trained[0], others, strict=True))
    every, third, (epoch,) = logs
    assert [line["kd"] for line in third] == [every[0]["kd"], every[2]["kd"]]
    kd = [line["kd"] for line in every]
    assert min(kd) < epoch["kd"] < max(kd)  # of all steps, not of the last


def test_what_lies_below_the_head_compiles(tmp_path):
    """As the error of args.torch_compile says."""
    with pytest.raises(ValueError, match=r"compile what lies below it: `student\.get_decoder\(\)\.compile\(\)`"):
        trainer_of(tmp_path, torch_compile=True)
    losses = []
    for compiled in (False, True):
        trainer = trainer_of(tmp_path, max_steps=2)
        if compiled:
            trainer.model.get_decoder().compile(backend="eager")
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
