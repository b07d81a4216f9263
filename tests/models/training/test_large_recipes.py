"""The recipes of the large families, with small bodies and LM heads of full length, the teacher's padded as the family's is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from models.data.audio import write_audio
from models.data.manifest import Example, write_manifest
from models.experiments.shared_steps import make_tiny_backbones
from models.speech_lm.model import SpeechLM
from models.training.commands import RECIPES_DIR
from models.training.curves import read_metrics
from models.training.recipe_files import load_recipe
from models.training.train import main

FAMILIES = {
    "llama": (128_256, 128_256), "qwen": (151_936, 152_064), "gemma": (262_144, 262_208), "desta2": (128_256, 128_256),
}  # fmt: skip
SFT = {"desta2": "sft_desta2"}  # the recipe that makes the teacher
CLIPS = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    drawn = np.random.default_rng(0)
    examples = []
    for i in range(CLIPS):
        write_audio(root / f"{i}.wav", drawn.normal(0, 0.1, 8000).astype(np.float32))
        answer = ("man", "woman")[i % 2]
        asked = {"question": "Is the speaker a man or a woman?", "choices": ("man", "woman"), "answer": answer}
        examples.append(
            Example(id=f"e{i}", audio=f"{i}.wav", split="train", task="gender", target=f"The speaker is a {answer}.", **asked)
        )
    return write_manifest(root / "manifest.jsonl", examples)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_by_the_recipe(tmp_path, manifest, family, capsys):
    student_ids, teacher_ids = FAMILIES[family]
    recipe = load_recipe(f"caad_{family}")
    assert f"{student_ids:,} ids" in (RECIPES_DIR / f"caad_{family}.yaml").read_text()
    folders = {
        name: make_tiny_backbones(tmp_path / name, vocab_size=ids)
        for name, ids in (("student", student_ids), ("teacher", teacher_ids))
    }

    def words(name: str) -> list[str]:
        settings = {"encoder_layers": [1, 2], "connector_width": 32, "connector_layers": 1, "num_queries": 4}
        settings |= {"lm": str(folders[name] / "lm"), "encoder": str(folders["student"] / "encoder"), "placeholder_token": None}
        few = ["optim.batch_examples=4", "optim.micro_batch_examples=2", "run.progress_bar=false", "run.tensorboard=false"]
        changed = [f"model.settings.{key}={json.dumps(value)}" for key, value in settings.items()]
        return [f"data.manifest={manifest}", f"run.out_dir={tmp_path / 'runs' / name}", "run.log_every_steps=1", *changed, *few]

    heard = [f"model.settings.{key}={recipe.model.settings[key]}" for key in ("max_audio_seconds", "audio_frames")]
    assert main([SFT.get(family, "sft_teacher"), *words("teacher"), *heard, "optim.steps=1", "optim.warmup_steps=0"]) == 0
    final = tmp_path / "runs" / "teacher" / "final"
    assert SpeechLM.from_pretrained(final).lm.lm_head.weight.shape[0] == teacher_ids
    learning = [*words("student"), f"teacher.folder={final}", "optim.steps=2", "optim.warmup_steps=0"]
    assert main([f"caad_{family}", *learning]) == 0
    curve = read_metrics(tmp_path / "runs" / "student" / "metrics.jsonl")
    assert [line["step"] for line in curve] == [1, 2]
    for line in curve:  # random models: as undecided as so many ids allow
        assert line["kd"] > 0 and line["student_entropy"] == pytest.approx(math.log(student_ids), abs=0.01)
        assert line["teacher_entropy"] == pytest.approx(math.log(student_ids), abs=0.01)
    assert main([f"caad_{family}", *learning, "model.settings.audio_frames=25"]) == 1
    frames = recipe.model.settings["audio_frames"]
    assert f"teacher.folder: expected audio_frames 25, as the student has, got {frames}" in capsys.readouterr().err
