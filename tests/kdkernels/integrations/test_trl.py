"""The loss in TRL's trainers; tested with TRL 1.16. Skipped without TRL."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl", reason="pip install '.[trl]'")
pytest.importorskip("datasets", reason="TRL's trainers take datasets")
import datasets
import tiny_lms
from transformers import PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdkernels import CAADOptions, DualPathTeacher
from kdkernels.integrations import CAADLossMixin


def text_lm(seed: int):
    torch.manual_seed(seed)
    model, _ = tiny_lms.llama()
    model.generation_config.repetition_penalty = None
    model.generation_config.do_sample = False
    return model


def tokenizer():
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(tiny_lms.VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0", eos_token="w1")


def batch() -> dict:
    ids = tiny_lms.token_ids(2)
    labels = ids.clone()
    labels[0, :12] = labels[1, :15] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def settings(folder) -> dict:
    return {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "save_strategy": "no", "logging_steps": 1, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip


def test_sft_trainer_trains_by_the_teacher(tmp_path):
    class Distilling(CAADLossMixin, SFTTrainer):
        pass

    rows = datasets.Dataset.from_dict({"input_ids": tiny_lms.token_ids(8).tolist()})
    student, other, teacher = text_lm(0), text_lm(0), text_lm(1)
    trainer = Distilling(student, args=SFTConfig(**settings(tmp_path)), train_dataset=rows, processing_class=tokenizer())
    trainer.use_teacher(DualPathTeacher(teacher, negative=None), CAADOptions(kd_weight=1.0, temperature=2.0))
    given = batch()
    counted = given["labels"][:, 1:] != -100
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    s, t = (model(**inputs).logits[:, :-1][counted] / 2 for model in (other, teacher))
    expected = 4 * F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    assert trainer.compute_loss(trainer.model, given).item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert len([line for line in trainer.state.log_history if "loss" in line]) == 2


def test_gkd_loss_is_trls_own(tmp_path):
    class Distilling(CAADLossMixin, GKDTrainer):
        pass

    rows = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "w2"}]] * 2})
    student, teacher = text_lm(0), text_lm(1)
    args = GKDConfig(**settings(tmp_path), beta=0.3, lmbda=0.0)
    trainer = Distilling(student, teacher, args, train_dataset=rows, processing_class=tokenizer(), data_collator=lambda x: x)
    options = CAADOptions(kd_weight=1.0, temperature=1.0, divergence="jsd", jsd_beta=0.3)
    trainer.use_teacher(DualPathTeacher(teacher, negative=None), options)
    given = {**batch(), "prompts": torch.zeros(2, 3, dtype=torch.int64)}
    theirs = GKDTrainer.compute_loss(trainer, trainer.model, given)
    assert trainer.compute_loss(trainer.model, given).item() == pytest.approx(theirs.item(), rel=1e-5)


def completions() -> dict:
    """Prompts padded on the left, completions on the right; one token of the second row is a tool's."""
    ids = tiny_lms.token_ids(2)
    prompt_mask, completion_mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, ids.shape[1] - 8, dtype=torch.int64)
    prompt_mask[0, :3], completion_mask[1, -2:] = 0, 0
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[1, 1] = 0
    return {
        "prompt_ids": ids[:, :8], "prompt_mask": prompt_mask, "completion_ids": ids[:, 8:], "completion_mask": completion_mask,
        "tool_mask": tool_mask, "num_items_in_batch": torch.tensor(37.0),
    }  # fmt: skip


def distilling(folder, *, beta: float):
    class Distilling(CAADLossMixin, DistillationTrainer):
        pass

    rows = datasets.Dataset.from_dict({"prompt": ["w2 w3", "w4 w5", "w6 w7", "w8 w9"]})
    student, teacher = text_lm(0), text_lm(1)
    args = DistillationConfig(**settings(folder), beta=beta, max_completion_length=4, temperature=1.0)
    trainer = Distilling(student, teacher, args, train_dataset=rows, processing_class=tokenizer())
    divergence = {0.0: {}, 1.0: {"divergence": "reverse_kl"}}.get(beta, {"divergence": "jsd", "jsd_beta": beta})
    options = CAADOptions(kd_weight=1.0, temperature=1.0, **divergence)
    trainer.use_teacher(DualPathTeacher(teacher, negative=None), options)
    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_distillation_trainers_loss_is_trls_own(tmp_path, beta, training):
    trainer = distilling(tmp_path, beta=beta)
    trainer.model.train(training)
    given = completions()
    theirs = DistillationTrainer.compute_loss(trainer, trainer.model, given)
    ours = trainer.compute_loss(trainer.model, given)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5) and ours.item() > 0
    gradients = []
    for loss in (theirs, ours):
        trainer.model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_distillation_trainer_trains_on_the_students_own_answers(tmp_path):
    trainer = distilling(tmp_path, beta=0.5)
    before = trainer.model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2 and all(line["loss"] > 0 for line in lines)
    assert not torch.equal(before, trainer.model.state_dict()["model.layers.0.mlp.up_proj.weight"])
