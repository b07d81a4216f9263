"""A continued run has the models and the words that it began with."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from models.training import loop
from models.training.checkpoint import CheckpointError
from models.training.recipe_files import load_recipe
from models.training.run_identity import EXAMPLES, check_identity, run_identity
from models.training.train import main as train
from models.training.training_data import read_examples
from tests.models import train_fakes as fakes
from tests.models.audio_lms import tiny_audio_lms as tiny
from tests.models.audio_lms.audio_world import make_world, text_teacher, words

FAMILY = "qwen2_audio"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), FAMILY)


def changed(one: dict, other: dict) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_what_the_identity_tells_apart(world):
    text = text_teacher(world)
    more = [f"teacher.model={world / 'teacher'}", f"sources.text.folder={text}", "sources.text.role=text"]
    recipe = load_recipe("caad", words(world, "x", *more))
    examples, _ = read_examples(recipe)
    before = run_identity(recipe, examples)
    assert before.keys() == {"student.model", "teacher.model", "sources.text.folder", EXAMPLES}
    assert run_identity(recipe, [dataclasses.replace(e, audio="moved.wav", metadata={}) for e in examples]) == before
    for field in ("id", "target", "question", "transcription", "context"):
        other = dataclasses.replace(examples[0], **{field: "x"})
        assert changed(before, run_identity(recipe, [other, *examples[1:]])) == {EXAMPLES}
    file = next((world / "teacher").glob("*.safetensors"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert changed(before, run_identity(recipe, examples)) == {"teacher.model"}
    file.write_bytes(kept)


def test_the_error_names_the_keys(tmp_path):
    saved = {"student.model": "a", "teacher.model": "b", EXAMPLES: "c"}
    check_identity(tmp_path, saved, {**saved, "a later key": "d"})
    with pytest.raises(CheckpointError, match=r"teacher\.model has other files now; data\.manifest has other prompts or"):
        check_identity(tmp_path, saved, {**saved, "teacher.model": "x", EXAMPLES: "y"})


def test_in_a_checkpoint(tmp_path, capsys):
    """One without the identity is continued, and a line says that it was not compared."""
    fakes.run(tmp_path, "sft", "optim.steps=2", identity={"student.model": "a"})
    with pytest.raises(CheckpointError, match=r"step-00000002: expected the models .* student\.model has other files now"):
        fakes.run(tmp_path, "sft", "optim.steps=2", "run.resume=auto", identity={"student.model": "b"})
    fakes.run(tmp_path / "old", "sft", "optim.steps=2")
    fakes.run(tmp_path / "old", "sft", "optim.steps=2", "run.resume=auto", identity={"student.model": "b"})
    captured = capsys.readouterr()
    assert "does not say what its models, prompts and targets were" in captured.out + captured.err


@pytest.mark.slow
def test_a_killed_run_does_not_continue_with_others(world, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    step = loop.TrainingLoop.step

    def dying(self, at, logged):
        if at == 3:
            raise Killed
        step(self, at, logged)

    run = ["caad", *words(world, "killed", f"teacher.model={world / 'teacher'}")]
    monkeypatch.setattr(loop.TrainingLoop, "step", dying)
    with pytest.raises(Killed):
        train(run)
    monkeypatch.undo()
    for key, name in (("teacher.model", "teacher"), ("student.model", "student")):
        shutil.move(world / name, world / "kept")
        tiny.FAMILIES[FAMILY](world / name, seed=77, **({"width": 48, "layers": 3} if name == "teacher" else {}))
        assert train([*run, "run.resume=auto"]) == 1
        assert f"{key} has other files now" in capsys.readouterr().err
        shutil.rmtree(world / name)
        shutil.move(world / "kept", world / name)
    manifest = world / "manifest.jsonl"
    kept = manifest.read_text()
    manifest.write_text(kept.replace("The tone is high.", "The tone is so high."))
    assert train([*run, "run.resume=auto"]) == 1
    assert "data.manifest has other prompts or targets now" in capsys.readouterr().err
    manifest.write_text(kept)
    assert train([*run, "run.resume=auto"]) == 0
