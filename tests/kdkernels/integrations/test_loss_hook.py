"""CAADLossMixin on transformers' own Trainer."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the mix-in is for transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
from test_plain_kd import KD_WEIGHT, TAU, by_hand, check_step, collate, rows, text_lm
from transformers import Trainer, TrainingArguments

from kdkernels import CAADOptions, DualPathTeacher
from kdkernels.integrations import CAADLossMixin


class Distilling(CAADLossMixin, Trainer):
    pass


def trainer_of(folder, student) -> Distilling:
    args = TrainingArguments(str(folder), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, max_steps=1)
    return Distilling(student, args, data_collator=collate, train_dataset=rows())


def test_equals_a_hand_written_distillation(tmp_path):
    student, other, teacher = text_lm(0), text_lm(0), text_lm(1)
    trainer = trainer_of(tmp_path, student)
    trainer.use_teacher(DualPathTeacher(teacher, negative=None), CAADOptions(temperature=TAU, kd_weight=KD_WEIGHT))
    batch = {name: x for name, x in collate(rows()).items() if name != "sample_id"}
    check_step(student, trainer.compute_loss(student, batch), other, by_hand(other, teacher, batch))


def test_what_is_missing_is_named(tmp_path):
    trainer = trainer_of(tmp_path, text_lm(0))
    with pytest.raises(ValueError, match=r"teacher: expected use_teacher\(\.\.\.\) to be called before"):
        trainer.train()
    trainer.use_teacher(DualPathTeacher(text_lm(1), negative=None))
    with pytest.raises(ValueError, match=r"inputs: expected a column 'labels' \(B, L\)"):
        trainer.compute_loss(trainer.model, {"input_ids": collate(rows())["input_ids"]})
