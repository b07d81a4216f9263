"""Teacher and student must mean the same tokens by the ids that they share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
import tiny_lms
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from kdkernels import CAADTrainer, DualPathTeacher
from kdkernels.integrations import CAADLossMixin


def lm(rows: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def tokenizer(*words: str):
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=words[0])


def trainer(tmp_path, student_rows: int, teacher, **options):
    args = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)
    teacher = lm(teacher) if isinstance(teacher, int) else teacher
    return CAADTrainer(lm(student_rows), args, teacher=DualPathTeacher(teacher, negative=None), **options)


def test_sizes_alone(tmp_path):
    trainer(tmp_path, 1000, 2024)  # padding
    with pytest.raises(ValueError, match=r"student's head has 1,000 rows and the teacher's 2,025\. .*assume_same_tokens=True"):
        trainer(tmp_path, 1000, 2025)
    trainer(tmp_path, 1000, 2025, assume_same_tokens=True)


def test_tokenizers_decide(tmp_path):
    ours = tokenizer("<unk>", "a", "b")
    more = tokenizer("<unk>", "a", "b", "audio")
    other = tokenizer("<unk>", "b", "a", "audio")
    trainer(tmp_path, 10, 5000, processing_class=ours, teacher_processing_class=more)
    message = r"got 2 that differ: id 1 is 'b' for the teacher and 'a' for the student; .* 10 rows .* 10\."
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 10, 10, processing_class=ours, teacher_processing_class=other)
    trainer(tmp_path, 10, 10, processing_class=ours, teacher_processing_class=other, assume_same_tokens=True)


def test_tokenizer_beside_the_teachers_weights(tmp_path):
    folder = tmp_path / "teacher"
    lm(10).save_pretrained(folder)
    tokenizer("<unk>", "b", "a").save_pretrained(folder)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="got 2 that differ"):
        trainer(tmp_path, 10, loaded, processing_class=tokenizer("<unk>", "a", "b"))


def saved(folder, *words: str):
    """A model from a folder, with a tokenizer of these words beside its weights."""
    lm(10).save_pretrained(folder)
    tokenizer(*words).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def distil(tmp_path, student, teacher, trainer_class=CAADTrainer, **options):
    args = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)
    dual = DualPathTeacher(teacher, negative=None)
    if trainer_class is CAADTrainer:
        return CAADTrainer(student, args, teacher=dual, **options)
    trainer = trainer_class(student, args)
    trainer.use_teacher(dual, **options)
    return trainer


class Mixed(CAADLossMixin, Trainer):
    pass


@pytest.mark.parametrize("trainer_class", [CAADTrainer, Mixed])
def test_tokenizers_beside_the_weights_of_both(tmp_path, trainer_class):
    """Two heads of one size, and no tokenizer is passed: the sizes alone would let another tokenizer through."""
    ours, other = saved(tmp_path / "ours", "<unk>", "a", "b"), saved(tmp_path / "other", "<unk>", "b", "a")
    with pytest.raises(ValueError, match="got 2 that differ: id 1 is 'b' for the teacher and 'a' for the student"):
        distil(tmp_path, ours, other, trainer_class)
    distil(tmp_path, ours, other, trainer_class, assume_same_tokens=True)
    distil(tmp_path, ours, saved(tmp_path / "same", "<unk>", "a", "b"), trainer_class)
    with pytest.raises(ValueError, match=r"student's head has 10 rows and the teacher's 2,000"):
        distil(tmp_path, ours, lm(2000), trainer_class)
    given = {"teacher_processing_class": tokenizer("<unk>", "a", "b", "audio")}
    distil(tmp_path, ours, lm(2000), trainer_class, **given)


def test_a_folder_without_a_tokenizers_files_has_no_tokenizer(tmp_path):
    """transformers makes one of special tokens alone for Qwen2-Audio; its id 0 is no token of the checkpoint."""
    teacher, _ = tiny_lms.qwen2_audio()
    teacher.generation_config.repetition_penalty = None
    teacher.generation_config.do_sample = False
    teacher.save_pretrained(tmp_path / "teacher")
    teacher = type(teacher).from_pretrained(tmp_path / "teacher")
    rows = teacher.get_output_embeddings().weight.shape[0]
    trainer(tmp_path, rows, teacher, processing_class=tokenizer("!", "a", "b"))
    with pytest.raises(ValueError, match=f"student's head has {rows + 2000:,} rows"):
        trainer(tmp_path, rows + 2000, teacher, processing_class=tokenizer("!", "a", "b"))
