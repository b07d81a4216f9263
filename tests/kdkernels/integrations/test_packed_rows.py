"""Packed rows in CAADTrainer: several samples in one row train as padded ones do, and errors name them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
pytest.importorskip("safetensors", reason="the cache's shards are safetensors files")
from test_plain_kd import collate, rows, text_lm, trainer_of

from kdkernels import CAADOptions, ContrastCache, DualPathTeacher, LMHead, ProjectionCache, answer_index, project_cache

OPTIONS = CAADOptions(alpha=1.5, temperature=1.3)


def packed(examples: list[dict]) -> dict:
    """As transformers' DataCollatorWithFlattening: no sample's first token is a target."""
    labels = [torch.cat([example["labels"].new_full((1,), -100), example["labels"][1:]]) for example in examples]
    return {
        "input_ids": torch.cat([example["input_ids"] for example in examples])[None],
        "position_ids": torch.cat([torch.arange(len(x)) for x in labels])[None],
        "labels": torch.cat(labels)[None],
        "sample_id": [example["sample_id"] for example in examples],
    }


def without_words(inputs):
    return {**inputs, "input_ids": torch.where(inputs["input_ids"] > 40, 5, inputs["input_ids"])}


def student():
    model = text_lm(0)
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """The teacher live, its states and their projections for `student()`."""
    folder, teacher = tmp_path_factory.mktemp("caches"), DualPathTeacher(text_lm(1), negative=without_words)
    with ContrastCache.writer(folder, fingerprint={}, hidden_size=32, dtype=torch.float32) as writer:
        for row in rows():
            batch = collate([row])
            index, target = answer_index(batch["labels"])
            states = teacher({name: batch[name] for name in ("input_ids", "attention_mask")}, index)
            writer.add(row["sample_id"], states.audio_hidden, states.text_hidden, target)
    cache, heads = ContrastCache(folder), {"teacher_head": teacher.head, "student_head": LMHead.from_model(student())}
    project_cache(cache, folder / "p", **heads, alpha=1.5, temperature=1.3, top_k=8)
    return {
        "live": {"teacher": teacher},
        "states": {"teacher": cache, "teacher_head": teacher.head},
        "projections": {"teacher": ProjectionCache(folder / "p")},
    }


def training(folder, pack, teacher, examples=None):
    trainer = trainer_of(folder, student(), options=OPTIONS, examples=examples, **teacher)
    trainer.data_collator = pack
    trainer.train()
    return [*(line["loss"] for line in trainer.state.log_history if "loss" in line), trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("kind", ["live", "states", "projections"])
def test_they_train_as_padded_rows(tmp_path, teachers, kind):
    padded = training(tmp_path, collate, teachers["live"])
    assert training(tmp_path, packed, teachers[kind]) == pytest.approx(padded, rel=1e-4)


@pytest.mark.parametrize("kind", ["states", "projections"])
def test_other_answers_name_the_rows_samples(tmp_path, teachers, kind):
    examples = rows()
    for row in examples:
        row["labels"][-1] = 80
    with pytest.raises(ValueError, match=r"labels: expected the target tokens of .* got others in sample row 0 of 1 \(text-"):
        training(tmp_path, packed, teachers[kind], examples)


def test_a_label_beyond_the_vocabulary_names_the_rows_samples(tmp_path, teachers):
    examples = rows()
    for row in examples:
        row["labels"][-1] = 200
    with pytest.raises(ValueError, match=r"labels: expected ids in \[0, 97\) or -100, got 200 in sample row 0 of 1 \(text-"):
        training(tmp_path, packed, teachers["live"], examples)


def test_a_loss_that_is_not_finite_names_the_rows_samples(tmp_path, teachers):
    trainer = trainer_of(tmp_path, student(), options=OPTIONS, **teachers["live"])
    trainer.data_collator = packed
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"got loss nan; nothing was updated. Samples: row 0 of 1 \(text-\d, text-\d\)"):
        trainer.train()


@pytest.mark.parametrize("kind", ["states", "projections"])
@pytest.mark.parametrize("names", [list(range(8)), torch.arange(8)], ids=["numbers", "tensor"])
def test_names_that_are_no_strings(tmp_path, teachers, kind, names):
    examples = [{**row, "sample_id": name} for row, name in zip(rows(), names, strict=True)]
    with pytest.raises(TypeError, match=r"inputs\['sample_id'\]: expected strings, the samples' names in the .*Cache, got"):
        training(tmp_path, collate, teachers[kind], examples)
