"""Teacher and student must mean the same tokens by the ids that they share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from kdkernels import CAADTrainer, DualPathTeacher


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
