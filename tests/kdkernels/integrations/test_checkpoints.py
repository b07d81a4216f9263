"""Resume, the best model, save and load: for every tiny audio LM, whole and with a LoRA."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
import tiny_lms
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from kdkernels import CAADTrainer, DualPathTeacher, MaskFeatures
from kdkernels.integrations import CheckpointLoading

ROWS = 8
KINDS = ("full", "lora", "injected_lora")


def build(family: str, kind="full", seed: int = 0):
    torch.manual_seed(seed)
    model, inputs = tiny_lms.AUDIO_MODELS[family]()
    model.generation_config.repetition_penalty = None  # tiny_lms sets what save_pretrained refuses
    model.generation_config.do_sample = False
    if kind != "full":
        peft = pytest.importorskip("peft", reason="adapters are PEFT's")
        target = r".*(q_proj|v_proj|qkv_proj)"
        # A batch norm's running statistics change in training: an adapter's checkpoint has them where they are asked for.
        norms = ["batch_norm"] if family == "granite_speech" and kind == "lora" else None
        if not isinstance(kind, str):  # a configuration of PEFT
            model = peft.get_peft_model(model, kind)
        elif kind in ("lora", "lora alone"):
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target, modules_to_save=norms))
        else:
            model.requires_grad_(False)
            tiny_lms.add_adapter(model, target_modules=target)
    return model, inputs


def rows_of(inputs: dict) -> list[dict]:
    """One example a row, more rows than the model's inputs have; features stay whole, one entry a row."""
    labels = inputs["input_ids"].clone()
    labels[:, :15] = -100
    columns = {**inputs, "labels": labels}
    return [{name: value[row % 3] for name, value in columns.items()} for row in range(ROWS)]


def collate(rows: list[dict]) -> dict:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_of(folder, family: str, kind, *, seed: int = 0, change=None, **options) -> CAADTrainer:
    model, _ = build(family, kind, seed)
    if change is not None:
        change(model)
    teacher, inputs = build(family, seed=9)
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    return CAADTrainer(
        model,
        args,
        teacher=DualPathTeacher(teacher, negative=MaskFeatures(tiny_lms.feature_name(inputs))),
        data_collator=collate,
        train_dataset=rows_of(inputs),
        eval_dataset=rows_of(inputs)[:2],
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(value, got[name])]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_lms.any_peft():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "family", [name if name == "voxtral" else pytest.param(name, marks=pytest.mark.slow) for name in tiny_lms.AUDIO_MODELS]
)
def test_resume_is_the_undisturbed_run(tmp_path, family, kind):
    """The resumed model is built with other weights where all of them are saved, so that none may stay."""
    whole = trainer_of(tmp_path / "whole", family, kind)
    whole.train()
    seed = 5 if kind == "full" else 0
    resumed = trainer_of(tmp_path / "resumed", family, kind, seed=seed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(set(losses(whole))) == 4
    assert_same(weights(resumed.model), weights(whole.model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny_lms.AUDIO_MODELS)
def test_best_model(tmp_path, family, kind):
    """The first of two checkpoints, by losses that are made up."""
    trainer = trainer_of(
        tmp_path,
        family,
        kind,
        max_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    made_up = itertools.count(1)
    trainer.evaluate = lambda **_options: {"eval_loss": float(next(made_up))}
    seen: list[dict] = []
    save = trainer._save_checkpoint

    def watched(*args, **kwargs):
        seen.append(weights(trainer.model))
        save(*args, **kwargs)

    trainer._save_checkpoint = watched
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert_same(weights(trainer.model), seen[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", tiny_lms.AUDIO_MODELS)
def test_saved_loaded_and_generates_the_same(tmp_path, family, kind):
    trainer = trainer_of(tmp_path, family, kind, max_steps=1, save_strategy="no")
    trainer.train()
    model = trainer.model.eval()
    model.save_pretrained(tmp_path / "saved")
    if kind == "full":
        loaded = type(model).from_pretrained(tmp_path / "saved")
    else:
        import peft

        loaded = peft.PeftModel.from_pretrained(build(family)[0], str(tmp_path / "saved"))
    _, inputs = build(family)
    made = [m.eval().generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*made)


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded_bin"])
def test_other_files_of_a_checkpoint(tmp_path, form):
    """As older versions of transformers, or a large model, leave them."""
    whole = trainer_of(tmp_path / "whole", "qwen2_audio", "full")
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form == "sharded":
        keys = list(state)
        weight_map = {key: f"model-{1 + (key in keys[::2]):05d}-of-00002.safetensors" for key in keys}
        for name in set(weight_map.values()):
            part = {key: state[key] for key in keys if weight_map[key] == name}
            save_file(part, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        name = "pytorch_model-00001-of-00001.bin"
        torch.save(state, folder / name)
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)})
        )
    resumed = trainer_of(tmp_path / "resumed", "qwen2_audio", "full", seed=5)
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))


def with_longer_connector(model) -> None:
    """Only the projector trains."""
    name, linear = next((n, m) for n, m in model.named_modules() if "projector" in n and isinstance(m, nn.Linear))
    longer = nn.Sequential(linear, nn.GELU(), nn.Linear(linear.out_features, linear.out_features))
    model.set_submodule(name, longer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projector" in name)


def with_biased_head(model) -> None:
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)


def with_wider_head(model) -> None:
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features + 8, bias=False)


def with_extra_module(model) -> None:
    model.extra = nn.Linear(2, 2)


CHANGES = (with_longer_connector, with_biased_head, with_wider_head, with_extra_module)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral"])
def test_resume_of_a_changed_model_is_the_undisturbed_run(tmp_path, family, change):
    whole = trainer_of(tmp_path / "whole", family, "full", change=change)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", family, "full", seed=5, change=change)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))


class Resuming(CheckpointLoading, Trainer):
    pass


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_the_config_does_not_build_is_loaded(tmp_path, change):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    saved, loaded = (build("qwen2_audio", seed=seed)[0] for seed in (0, 5))
    for model in (saved, loaded):
        change(model)
    Resuming(saved, args).save_model(str(tmp_path / "saved"))
    Resuming(loaded, args)._load_from_checkpoint(str(tmp_path / "saved"))
    assert_same(weights(loaded), weights(saved))


def test_another_size_is_named_with_both(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    saved, loaded = (build("qwen2_audio", seed=seed)[0] for seed in (0, 5))
    with_wider_head(saved)
    Resuming(saved, args).save_model(str(tmp_path / "saved"))
    with pytest.raises(RuntimeError, match=r"got lm_head\.weight \(105, 32\) instead of \(97, 32\)"):
        Resuming(loaded, args)._load_from_checkpoint(str(tmp_path / "saved"))


class TestErrors:
    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("saved")
        trainer_of(folder, "qwen2_audio", "full", max_steps=2).train()
        trainer_of(folder / "lora", "qwen2_audio", "lora", max_steps=2).train()
        return folder

    @pytest.mark.parametrize("kind", ["full", "lora"])
    def test_missing_and_unexpected_keys_are_named(self, tmp_path, saved, kind):
        name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
        source = (saved if kind == "full" else saved / "lora") / "checkpoint-2"
        state = load_file(source / name)
        key = sorted(key for key in state if "q_proj" in key and "language_model" in key)[0]
        for change, message in (("missing", "expected the weights of every parameter that trains"), ("unexpected", "no_such")):
            folder = tmp_path / change
            shutil.copytree(source, folder)
            changed = dict(state)
            if change == "missing":
                del changed[key]
            else:
                changed[key.replace("q_proj", "no_such_proj")] = state[key].clone()
            save_file(changed, folder / name, metadata={"format": "pt"})
            with pytest.raises(RuntimeError, match=message):
                trainer_of(tmp_path / "out", "qwen2_audio", kind).train(resume_from_checkpoint=str(folder))

    @pytest.mark.parametrize(("file_of", "kind"), [("full", "lora"), ("full", "injected_lora"), ("lora", "full")])
    def test_files_of_another_kind(self, tmp_path, saved, file_of, kind):
        folder = (saved if file_of == "full" else saved / "lora") / "checkpoint-2"
        with pytest.raises(RuntimeError, match=r"checkpoint-2: expected (the weights of every|weights of this)"):
            trainer_of(tmp_path, "qwen2_audio", kind).train(resume_from_checkpoint=str(folder))

    @pytest.mark.parametrize("kind", ["lora", "injected_lora"])
    def test_another_scale_of_the_adapter(self, tmp_path, kind):
        """The weights fit, and the adapter would be another one."""
        trainer_of(tmp_path, "qwen2_audio", kind, max_steps=1, save_steps=1).train()
        trainer = trainer_of(tmp_path, "qwen2_audio", kind)
        trainer.model.peft_config["default"].lora_alpha = 64
        with pytest.raises(RuntimeError, match=r"adapter_config\.json: expected the model's lora_alpha 64, got 8"):
            trainer.train(resume_from_checkpoint=True)
        file = tmp_path / "checkpoint-1" / "adapter_config.json"
        file.write_text("[]")
        with pytest.raises(RuntimeError, match=r"adapter_config\.json: expected a JSON object, got list"):
            trainer.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("kind", ["lora", "injected_lora"])
    def test_another_base_of_the_adapter(self, tmp_path, kind, caplog):
        trainer_of(tmp_path, "qwen2_audio", kind, max_steps=1, save_steps=1).train()
        file = tmp_path / "checkpoint-1" / "caad_options.json"
        with pytest.raises(ValueError, match=r"got others: student_base was '\w+' and is '\w+'\. Pass resume_with_other"):
            trainer_of(tmp_path, "qwen2_audio", kind, seed=5).train(resume_from_checkpoint=True)
        older = {name: value for name, value in json.loads(file.read_text()).items() if name != "student_base"}
        file.write_text(json.dumps(older))
        trainer_of(tmp_path, "qwen2_audio", kind, max_steps=2).train(resume_from_checkpoint=True)
        assert "caad_options.json has no student_base: it was not compared" in caplog.text

    @pytest.mark.parametrize("kind", KINDS)
    def test_best_model_without_its_file(self, tmp_path, kind):
        trainer = trainer_of(tmp_path, "qwen2_audio", kind)
        (tmp_path / "checkpoint-1").mkdir()
        trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
        with pytest.raises(RuntimeError, match=r"expected the weights of every parameter that trains, got none for"):
            trainer._load_best_model()

    @pytest.mark.parametrize("kind", ["lora", "injected_lora"])
    def test_trained_beside_the_adapter(self, tmp_path, kind):
        """PEFT saves its adapter only: a projector that trains as well would be lost."""
        trainer = trainer_of(tmp_path, "qwen2_audio", kind, max_steps=1)
        projector = next(p for n, p in trainer.model.named_parameters() if "projector" in n)
        projector.requires_grad_(True)
        with pytest.raises(ValueError, match=r"got .*projector.*modules_to_save=\['model\.multi_modal_projector\.linear'\]"):
            trainer.train()
        projector.requires_grad_(False)
        trainer.train()

    def test_what_the_error_proposes_is_saved(self, tmp_path):
        peft = pytest.importorskip("peft", reason="adapters are PEFT's")
        model, inputs = build("qwen2_audio")
        config = peft.LoraConfig(
            r=2, target_modules=r".*q_proj", modules_to_save=["model.multi_modal_projector.linear"], use_dora=True,
            bias="lora_only", trainable_token_indices={"embed_tokens": [3, 4]},
        )  # fmt: skip
        args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
        trainer = Resuming(peft.get_peft_model(model, config), args, data_collator=collate, train_dataset=rows_of(inputs))
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        trained = weights(trainer.model)
        (key,) = [key for key in saved if key.endswith("projector.linear.weight")]
        (name,) = [name for name in trained if name.endswith("projector.linear.modules_to_save.default.weight")]
        assert torch.equal(saved[key], trained[name])

    @pytest.mark.slow
    def test_trained_prompts(self, tmp_path):
        """Prefix tuning resumes; a network that makes the prompts is saved as its prompts, and cannot."""
        peft = pytest.importorskip("peft", reason="adapters are PEFT's")

        def trainer(folder, **more):
            config = peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=2, token_dim=16, num_attention_heads=2, **more
            )
            return trainer_of(folder, "qwen2_audio", config, max_steps=2, save_steps=1)

        whole, resumed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
        assert_same(weights(resumed.model), weights(whole.model))
        assert losses(resumed) == losses(whole)
        network = {"prefix_projection": True, "encoder_hidden_size": 16}
        trainer(tmp_path / "c", **network).train()
        with pytest.raises(RuntimeError, match="size mismatch"):  # PEFT's own
            trainer(tmp_path / "d", **network).train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-1"))


def test_a_save_that_was_cut_off_is_named_and_the_complete_one_before_it(tmp_path):
    """transformers writes trainer_state.json last; of half a checkpoint it would only miss that file."""
    trainer_of(tmp_path, "qwen2_audio", "full").train()
    newest = tmp_path / "checkpoint-4"
    for name in ("trainer_state.json", "optimizer.pt", "caad_options.json"):  # a kill behind the weights
        (newest / name).unlink()
    going_on = trainer_of(tmp_path, "qwen2_audio", "full")
    with pytest.raises(ValueError, match=r"got \S+checkpoint-4 without trainer_state\.json.*from_checkpoint='\S+checkpoint-2'$"):
        going_on.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no complete one lies beside it"):
        going_on.train(resume_from_checkpoint=str(newest))


def test_what_a_run_goes_on_without_is_said(tmp_path, caplog):
    trainer_of(tmp_path, "qwen2_audio", "full", max_steps=2, save_only_model=True).train()
    assert not caplog.text
    trainer_of(tmp_path, "qwen2_audio", "full", max_steps=3).train(resume_from_checkpoint=True)
    assert "checkpoint-2 has no state of the optimiser and the learning rate" in caplog.text
    assert "earlier run" not in caplog.text
    trainer_of(tmp_path, "qwen2_audio", "full", max_steps=1).train()
    assert "holds checkpoints of an earlier run up to checkpoint-3, and this run starts at step 1" in caplog.text


def test_mix_in_for_a_plain_trainer(tmp_path):
    """transformers' own Trainer keeps the initial weights; if this fails, transformers has changed and the docs with it."""

    ours = trainer_of(tmp_path, "voxtral", "full", max_steps=2)
    ours.train()
    expected = weights(ours.model)
    for trainer, same in ((Resuming, True), (Trainer, False)):
        fresh, _ = build("voxtral", seed=5)
        made = trainer(fresh, ours.args)
        made._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
        changed = [name for name, value in expected.items() if not torch.equal(value, fresh.state_dict()[name])]
        assert (not changed) == same


def test_running_statistics_of_a_frozen_encoder_stay(tmp_path):
    """A LoRA's checkpoint has none of them, so training must not change them."""
    trainer = trainer_of(tmp_path, "granite_speech", "lora alone")
    norms = [m for m in trainer.model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    before = [m.running_mean.clone() for m in norms]
    assert norms
    trainer.compute_loss(trainer.model.train(), collate(trainer.train_dataset[:2]))
    assert all(torch.equal(m.running_mean, x) for m, x in zip(norms, before, strict=True))
    assert not any(m.training for m in norms)
