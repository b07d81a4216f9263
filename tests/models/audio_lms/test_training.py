"""The training loop with audio LMs of transformers: every objective, an exact resume, what a checkpoint holds, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.audio_lms.model import AudioLM
from models.training import loop
from models.training.build_sources import build_sources
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.student import build_model
from models.training.train import main as train
from models.training.training_data import build_data, read_examples
from tests.models.audio_lms.audio_world import make_world, text_teacher, words
from tests.models.audio_lms.test_families import logits_of


class Killed(BaseException):
    """What nobody catches: the process is gone."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), "qwen2_audio")


def kill_in_step(monkeypatch, number: int) -> None:
    step = loop.TrainingLoop.step

    def dying(self, at, logged):
        if at == number:
            raise Killed
        step(self, at, logged)

    monkeypatch.setattr(loop.TrainingLoop, "step", dying)


def curves(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "time", "examples_per_second")} for line in lines]


@pytest.mark.slow
def test_objectives(world):
    """Each of them trains: the loss is a number, and the LoRA has moved."""
    lm = f"teacher.model={world / 'teacher'}"
    for recipe, more in {
        "sft": [], "kd": [lm], "sharpened": [lm], "caad_plus": [lm, "teacher.keep_mib=8"],
        "text_acoustic_kd": [f"sources.text.folder={text_teacher(world)}"],
        "caad": [lm, "layers.weight=0.3", "layers.map=all", "loss.kd_token_weight=divergence", "optim.audio_dropout=0.5"],
    }.items():  # fmt: skip
        assert train([recipe, *words(world, f"runs/{recipe}", "optim.steps=1", *more)]) == 0
        assert curves(world / "runs" / recipe)[-1]["loss"] > 0
        adapter = load_file(world / "runs" / recipe / "final" / "adapter_model.safetensors")
        assert any(x.any() for key, x in adapter.items() if "lora_B" in key)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "connector"])
def test_a_killed_run_continues_to_the_bit(world, trains, monkeypatch):
    lora = ["student.lora.dropout=0.3"] if trains == "lora" else []
    teacher = f"teacher.model={world / 'teacher'}"
    options = [teacher, f"student.trains={trains}", *lora, "optim.audio_dropout=0.3"]
    assert train(["caad", *words(world, f"whole-{trains}", *options)]) == 0
    kill_in_step(monkeypatch, 3)
    with pytest.raises(Killed):
        train(["caad", *words(world, f"killed-{trains}", *options)])
    monkeypatch.undo()
    assert train(["caad", *words(world, f"killed-{trains}", *options, "run.resume=auto")]) == 0
    whole, killed = (world / f"{how}-{trains}" for how in ("whole", "killed"))
    for file in sorted((whole / "final").iterdir()):
        expected = file.read_bytes()
        if file.name == "README.md":  # the title of the model card is the name of the run
            expected = expected.replace(whole.name.encode(), killed.name.encode())
        assert expected == (killed / "final" / file.name).read_bytes(), file.name
    assert curves(whole) == curves(killed)
    held = load_file(killed / "checkpoints" / "step-00000004" / "model.safetensors")
    assert held and all(("lora_" if trains == "lora" else "multi_modal_projector") in name for name in held)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["lora", "full", "connector"])
def test_activation_checkpointing_changes_nothing(world, trains):
    options = [f"student.trains={trains}", "optim.steps=2"]
    for name, more in {"plain": [], "checkpointed": ["run.gradient_checkpointing=true"]}.items():
        assert train(["sft", *words(world, f"{name}-{trains}", *options, *more)]) == 0
    plain, checkpointed = (curves(world / f"{name}-{trains}") for name in ("plain", "checkpointed"))
    for one, other in zip(plain, checkpointed, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_live_teachers_states_are_those_of_its_own_logits(world):
    teacher = AudioLM.from_pretrained(world / "teacher")
    recipe = load_recipe("caad", words(world, "x", f"teacher.model={world / 'teacher'}"))
    model = build_model(recipe)
    data = build_data(recipe, model, *read_examples(recipe))
    (source,) = build_sources(recipe, data, model, device=torch.device("cpu"))
    batch = data.make_batch(data.examples[:3])
    states = source.teacher(batch, data.examples[:3])
    own = teacher.make_collator()(data.examples[:3], data.store.rows(data.examples[:3]))
    with torch.no_grad():
        for hidden, hears in ((states.audio_hidden, True), (states.text_hidden, False)):
            torch.testing.assert_close(states.head.logits(hidden), logits_of(teacher, own, hears=hears), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_device_map_changes_nothing(world):
    """Of one device; with several, layers lie on each, which no machine here has."""
    common = [f"teacher.model={world / 'teacher'}", "optim.steps=2"]
    for name, more in {"here": [], "mapped": ["student.device_map=cpu", "teacher.device_map=cpu"]}.items():
        assert train(["caad", *words(world, name, *common, *more)]) == 0
    assert curves(world / "here") == curves(world / "mapped")
    mapped = AudioLM.from_pretrained(world / "student", device_map="cpu", trains="lora")
    mapped.lm.get_base_model().hf_device_map = {"model": 0, "lm_head": 1}  # what transformers notes of several devices
    assert mapped.is_placed and mapped.to("meta") is mapped and mapped.device.type == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["teacher.model=t", "student.device_map=auto", "run.parallel=ddp"], "student.device_map: expected null with run"),
        (["student.model=null", "teacher.folder=t", "teacher.device_map=auto"], "teacher.device_map: expected null without"),
        (["teacher.folder=runs/x"], "teacher.model: objective 'caad' needs a teacher beside student.model, got none"),
        (["teacher.model=t", "model.folder=x"], "model.folder: expected its default with student.model"),
        (["teacher.model=t", "data.packing=pack"], "data.packing: expected none with student.model"),
        (["teacher.model=t", "data.features=f"], "data.features: expected null with student.model"),
        (["teacher.model=t", "student.trains=all"], "student.trains: expected one of full, lora, connector"),
        (["teacher.model=t", "student.lora.r=0"], "student.lora.r: expected at least 1, got 0"),
        (["teacher.model=t", "student.trains=full", "student.merge=true"], "student.merge: expected false"),
        (["student.model=null", "teacher.model=t"], "teacher.model: expected none without student.model, got 't'"),
    ],
)
def test_recipes_that_contradict_themselves(changes, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_recipe("caad", ["student.model=s", *changes])


def test_what_is_wrong_is_said_before_anything_is_loaded(world, capsys):
    (world / "speech").mkdir(exist_ok=True)
    (world / "speech" / "speech_lm.json").write_text("{}")
    for changes, message in {
        f"teacher.model={world / 'nothing'}": "teacher.model: ",
        f"teacher.model={world / 'speech'}": "teacher.model: expected an audio LM of transformers",
    }.items():
        assert train(["caad", *words(world, "x", changes)]) == 1
        assert message in capsys.readouterr().err


def test_another_tokenizer_is_refused(world, capsys):
    other = world / "other"
    shutil.copytree(world / "teacher", other)
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    assert train(["caad", *words(world, "x", f"teacher.model={other}")]) == 1
    assert "teacher.model: expected the student's tokenizer" in capsys.readouterr().err
