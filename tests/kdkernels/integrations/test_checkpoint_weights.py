"""Checkpoints of CAADTrainer, and of a Trainer with the mix-in: what was trained comes back, or an error says what did not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
import tiny_lms
from test_trainer import arguments
from transformers import Trainer, TrainerCallback

from kdkernels import CAADTrainer, DualPathTeacher, MaskFeatures
from kdkernels.integrations.checkpoint_weights import CheckpointWeights, load_checkpoint_weights

MODELS = [
    "voxtral", *(pytest.param(name, marks=pytest.mark.slow) for name in tiny_lms.AUDIO_MODELS if name != "voxtral")
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, seed: int, *, lora: bool = False):
    """(model, its teacher, rows)"""
    torch.manual_seed(seed)
    model, inputs = tiny_lms.AUDIO_MODELS[name]()
    model.generation_config.repetition_penalty = None  # tiny_lms sets what save_pretrained refuses
    model.generation_config.do_sample = False
    torch.manual_seed(99)
    teacher, inputs = tiny_lms.AUDIO_MODELS[name]()
    if lora:
        peft = pytest.importorskip("peft")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=r".*(self_attn\.(q_proj|v_proj|qkv_proj))")
        model = peft.get_peft_model(model, config)
    labels = inputs["input_ids"].clone()
    labels[:, :14] = -100
    rows = [{k: v[row] for k, v in {**inputs, "labels": labels}.items()} for row in range(tiny_lms.ROWS)]
    return model, DualPathTeacher(teacher, negative=MaskFeatures(tiny_lms.feature_name(inputs))), rows


def trainer_of(folder: Path, name: str, seed: int, *, lora: bool = False, **options) -> CAADTrainer:
    model, teacher, rows = build(name, seed, lora=lora)
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1, **options}
    args = arguments(folder, **options)
    return CAADTrainer(model, args, teacher=teacher, train_dataset=rows, eval_dataset=rows)


def trained(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class _BestIsTheFirst(TrainerCallback):
    """Whatever the losses are: the last model is then not the best."""

    def on_save(self, args, state, control, **_):
        state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoint-1")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
class TestEveryAudioLM:
    def test_resumed_is_undisturbed_bit_for_bit(self, tmp_path, name, lora):
        # Of a full model every weight trains, so the second may start from others; a LoRA needs the same weights below it.
        whole = trainer_of(tmp_path, name, 0, lora=lora)
        whole.train()
        again = trainer_of(tmp_path, name, 0 if lora else 5, lora=lora)
        if lora:
            with torch.no_grad():
                for p in again.model.parameters():
                    if p.requires_grad:
                        p.zero_()
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert losses(again)[-2:] == losses(whole)[-2:]
        one, other = trained(whole), trained(again)
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[key], other[key]) for key in one)

    def test_the_best_model_is_loaded(self, tmp_path, name, lora):
        options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
        trainer = trainer_of(tmp_path, name, 0, lora=lora, save_steps=1, learning_rate=0.1, **options)
        trainer.add_callback(_BestIsTheFirst())
        trainer.train()
        found = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        assert found[0] != found[-1]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(found[0], rel=1e-6)

    def test_saved_answers_as_it_did(self, tmp_path, name, lora):
        trainer = trainer_of(tmp_path, name, 0, lora=lora, max_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        base, _, rows = build(name, 0)
        if lora:
            import peft

            back = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
        else:
            back = type(base).from_pretrained(tmp_path / "saved")
        held = trainer.model.state_dict()
        assert all(torch.equal(held[key], x) for key, x in back.state_dict().items())
        inputs = {k: torch.stack([row[k] for row in rows]) for k in rows[0] if k != "labels"}
        answers = [m.eval().generate(**inputs, max_new_tokens=3, do_sample=False) for m in (trainer.model, back)]
        assert torch.equal(*answers)


def test_checkpoints_in_shards_and_under_the_modules_names(tmp_path):
    for number, options in enumerate(({"max_shard_size": "20KB"}, {"save_original_format": False})):
        model, _, _ = build("voxtral", 3)
        folder = tmp_path / str(number)
        model.save_pretrained(folder, **options)
        if number == 0:
            assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) > 10
        other, _, _ = build("voxtral", 4)
        load_checkpoint_weights(other, folder)
        assert all(torch.equal(x, other.state_dict()[key]) for key, x in model.state_dict().items())


def test_a_checkpoint_that_lacks_what_trains_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    trainer = trainer_of(tmp_path, "voxtral", 0, max_steps=2)
    trainer.train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    kept = load_file(file)
    name = next(key for key in kept if key.endswith("mlp.up_proj.weight"))
    save_file({k: v for k, v in kept.items() if k != name}, file, metadata={"format": "pt"})
    again = trainer_of(tmp_path, "voxtral", 0)
    with pytest.raises(ValueError, match=r"weights that train .* but 1 did not come back \('.*mlp\.up_proj\.weight'\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    save_file({**kept, name: kept[name][:1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected '.*up_proj\.weight' of shape \(48, 32\) in .*, got \(1, 32\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_adapter_that_does_not_come_back_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    trainer = trainer_of(tmp_path, "voxtral", 0, lora=True, max_steps=2)
    trainer.train()
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    kept = load_file(file)
    save_file({k: v for k, v in list(kept.items())[1:]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of the adapter in .* but 1 did not come back"):
        trainer_of(tmp_path, "voxtral", 0, lora=True).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_mix_in_for_a_plain_trainer(tmp_path):
    class MyTrainer(CheckpointWeights, Trainer):
        pass

    _, _, rows = build("voxtral", 0)
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    whole = MyTrainer(build("voxtral", 0)[0], arguments(tmp_path, **options), train_dataset=rows)
    whole.train()
    again = MyTrainer(build("voxtral", 5)[0], arguments(tmp_path, **options), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(x, trained(again)[key]) for key, x in trained(whole).items())
