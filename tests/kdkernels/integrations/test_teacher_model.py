"""The live teacher of a Trainer: apart from the student, left where it was placed, and with all columns that it takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
import accelerate
from test_trainer import Recorder, arguments, dual_path, examples, logged, speech_lm
from transformers import Trainer

from kdkernels import CAADTrainer, DualPathTeacher, MaskFeatures
from kdkernels.integrations import CAADLossMixin
from kdkernels.integrations.teacher_model import input_names


class Distilling(CAADLossMixin, Trainer):
    pass


def trainer_of(folder, student, teacher, *, rows=None, **options) -> CAADTrainer:
    rows = examples(4) if rows is None else rows
    return CAADTrainer(
        student, arguments(folder, max_steps=1, **options), teacher=teacher, data_collator=Recorder(), train_dataset=rows
    )


def with_lora(model):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*q_proj"))


def of_audio(model) -> DualPathTeacher:
    return DualPathTeacher(model, negative=MaskFeatures("input_features"))


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["full", "lora"])
def test_a_teacher_of_the_students_trained_weights_is_refused(tmp_path, wrap):
    model = speech_lm()
    teacher, student = of_audio(model), wrap(model)
    name = next(name for name, p in student.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=rf"teacher: expected frozen weights, got the student's own {name}, which trains"):
        trainer_of(tmp_path, student, teacher)
    with pytest.raises(ValueError, match=r"teacher: expected frozen weights"):
        Distilling(student, arguments(tmp_path)).use_teacher(teacher)


def test_frozen_weights_may_be_shared(tmp_path):
    student, teacher = speech_lm(), speech_lm(1)
    student.model.audio_tower = teacher.model.audio_tower.requires_grad_(False)
    assert trainer_of(tmp_path, student, of_audio(teacher)).train().global_step == 1


def test_a_student_that_is_frozen_with_its_teacher(tmp_path):
    model = speech_lm()
    for trainer in (trainer_of(tmp_path, model, of_audio(model).freeze()), Distilling(model, arguments(tmp_path))):
        with pytest.raises(ValueError, match=r"model: expected a weight that trains, got none with requires_grad"):
            trainer.train()


def test_an_offloaded_teacher_stays_where_it_is(tmp_path):
    losses = []
    for offloaded in (False, True):
        model = speech_lm(1)
        for layer in model.get_decoder().layers if offloaded else ():
            accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
        trainer = trainer_of(tmp_path, speech_lm(), of_audio(model))
        trainer.train()
        losses.append(logged(trainer))
        Distilling(speech_lm(), arguments(tmp_path)).use_teacher(of_audio(model))
    assert losses[0] == losses[1]


def test_columns_below_the_wrappers():
    inner = speech_lm()
    names, others = input_names(inner)
    assert "input_features" in names and others
    for wrapped in (with_lora(inner), torch.compile(speech_lm()), torch.compile(with_lora(speech_lm()))):
        assert set(names) <= set(input_names(wrapped)[0])
    assert input_names(torch.nn.Linear(2, 2)) == (["input"], False)


class Own(torch.nn.Module):
    """A teacher that names none of its inputs."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = speech_lm(1), set()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def hidden_states_at(self, index, **inputs):
        self.seen |= inputs.keys()
        weights = self.inner.get_input_embeddings().weight
        return weights[inputs["input_ids"]].flatten(0, 1)[index]


@pytest.mark.parametrize("kind", ["rows", "dataset"])
def test_columns_that_no_signature_names_are_kept(tmp_path, kind):
    rows = [{**row, "other": 1, "teacher_spoken": torch.ones(2)} for row in examples(4)]
    rows = [{**row, "teacher_input_ids": row["input_ids"], "teacher_labels": row["labels"]} for row in rows]
    if kind == "dataset":
        datasets = pytest.importorskip("datasets", reason="the Trainer drops columns of a dataset in another way")
        rows = datasets.Dataset.from_list([{k: getattr(v, "tolist", lambda v=v: v)() for k, v in row.items()} for row in rows])
        rows = rows.with_format("torch")
    teacher = Own()
    trainer = trainer_of(tmp_path, speech_lm(), DualPathTeacher(teacher, negative=None), rows=rows)
    trainer.train()
    assert "spoken" in teacher.seen and "other" not in trainer.data_collator.batches[0]


def test_a_peft_teacher_gets_its_own_columns(tmp_path):
    losses = []
    for wrap in (lambda model: model, with_lora):
        rows = []
        for row in examples(4):
            features = torch.full_like(row["input_features"], 0.5)
            own = {"input_ids": row["input_ids"], "labels": row["labels"], "input_features": features}
            rows.append({**row, **{f"teacher_{name}": value for name, value in own.items()}})
        trainer = trainer_of(tmp_path, speech_lm(), of_audio(wrap(speech_lm(1))), rows=rows)
        trainer.train()
        assert "teacher_input_features" in trainer.data_collator.batches[0]
        losses.append(logged(trainer))
    assert losses[0] == losses[1]


def test_a_compiled_student_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model: expected it without torch\.compile.*get_decoder\(\)\.compile"):
        trainer_of(tmp_path, torch.compile(speech_lm()), dual_path())
