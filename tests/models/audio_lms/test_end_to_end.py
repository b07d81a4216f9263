"""The whole way by commands: corpus, Stage 1, cache, train, kill, resume, evaluate, from_pretrained, ask; also on two ranks.

The models are tiny and random, of the real classes with the real processors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.cli import main as models
from models.evaluation.predictions import read_predictions
from tests.kdkernels.tiny_lms import any_peft
from tests.models.audio_lms.audio_world import QUESTION, corpus_and_stage1, make_world, text_teacher, words
from tests.models.audio_lms.test_training import Killed, curves, kill_in_step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "recipe", "options"),
    [
        ("qwen2_audio", "qwen2_audio", ["student.merge=true"]),
        ("qwen2_5_omni", "qwen_omni", ["student.lora.targets=[q_proj,v_proj]"]),
    ],
)
def test_distil_resume_evaluate_load_and_ask(family, recipe, options, tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path, family)
    manifest = str(corpus_and_stage1(world))
    target = {row["id"]: row["target"] for row in map(json.loads, Path(manifest).read_text().splitlines()[1:])}
    assert (target["train-0"], target["train-1"]) == ("The answer is high.", "The answer is low.")
    teacher, cache = (str(world / name) for name in ("teacher", "cache"))
    run = ["train", recipe, *words(world, "run", f"teacher.model={teacher}", "teacher.batch_examples=1", *options)]

    # From a live teacher, killed and continued.
    kill_in_step(monkeypatch, 3)
    with pytest.raises(Killed):
        models(run)
    monkeypatch.undo()
    assert models([*run, "run.resume=auto"]) == 0
    live = curves(world / "run")
    assert [line["step"] for line in live] == [1, 2, 3, 4]

    # From a cache of the same teacher: the same curves.
    filled = ["cache", teacher, manifest, "--out", cache, "--dtype", "float32", "--teacher-dtype", "float32"]
    assert models([*filled, "--batch-examples", "1", "--device", "cpu", "--measure", "2"]) == 0
    assert "12 samples written" in capsys.readouterr().out
    assert models([*run, f"run.out_dir={world / 'cached'}", f"teacher.cache={cache}"]) == 0
    for one, other in zip(live, curves(world / "cached"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)

    # Evaluated in both modes, with a control; the second call finds all answers.
    final = str(world / "run" / "final")
    for mode in ("choice", "generate"):
        out = world / f"{mode}.jsonl"
        asked = ["evaluate", final, manifest, "--mode", mode, "--out", str(out), "--device", "cpu", "--max-new-tokens", "4"]
        assert models([*asked, "--controls", "no_audio", "--json", str(world / f"{mode}.json")]) == 0
        assert len(out.read_text().splitlines()) == 1 + 12
        assert models([*asked, "--controls", "no_audio"]) == 0
        assert "12 answers are there" in capsys.readouterr().out
    asked = ["evaluate", final, manifest, "--out", str(world / "c.jsonl"), "--device", "cpu"]
    assert models([*asked, "--decoding", "contrastive"]) == 0

    # Loaded by transformers alone: the merged weights, or the adapter on its base.
    from transformers import AutoModelForMultimodalLM

    with any_peft():
        lm = AutoModelForMultimodalLM.from_pretrained(final)
    merged = "student.merge=true" in options
    assert ((world / "run" / "final" / "adapter_config.json").is_file()) != merged
    if not merged:
        adapter = load_file(world / "run" / "final" / "adapter_model.safetensors")
        assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj"}
    assert any(torch.isfinite(x).all() for x in lm.parameters())

    # And asked.
    capsys.readouterr()
    clips = [str(world / "0.wav"), str(world / "1.wav")]
    assert models(["ask", final, clips[0], QUESTION, "--device", "cpu", "--max-new-tokens", "3"]) == 0
    assert models(["ask", final, *clips, "Which is higher?", "--device", "cpu", "--max-new-tokens", "3", "--alpha", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert models(["ask", final, str(world / "no.wav"), QUESTION]) == 1
    assert "clip: no file" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_ms_swift_about_two_clips(tmp_path):
    """Trained and evaluated as they came; what the model reads has both clips, so a row without the second is another row."""
    world = make_world(tmp_path, "qwen2_audio")
    rows = []
    for number in range(4):
        answer = ("Yes.", "No.")[number % 2]
        turns = [("system", "Be brief."), ("user", "<audio><audio>Are they one tone?"), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        clips = [f"{number}.wav", f"{number + number % 2}.wav"]
        rows.append({"id": str(number), "messages": messages, "audios": clips, "split": ("train", "test")[number // 2]})
    (world / "swift.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"data.manifest={world / 'swift.jsonl'}", f"teacher.model={world / 'teacher'}", "optim.steps=2"]
    options += ["optim.batch_examples=2", "optim.micro_batch_examples=1"]
    assert models(["train", "qwen2_audio", *words(world, "run", *options)]) == 0
    both = curves(world / "run")
    assert len(both) == 2
    asked = ["evaluate", str(world / "run" / "final"), str(world / "swift.jsonl"), "--mode", "generate", "--device", "cpu"]
    assert models([*asked, "--out", str(world / "two.jsonl"), "--max-new-tokens", "3"]) == 0
    assert [p.clip for p in read_predictions(world / "two.jsonl")[1]] == [
        "2.wav@0.0-None+2.wav@0.0-None",
        "3.wav@0.0-None+4.wav@0.0-None",
    ]
    for row in rows:
        row["audios"] = row["audios"][:1]
        row["messages"][1]["content"] = "<audio>Are they one tone?"
    (world / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert models(["train", "qwen2_audio", *words(world, "one", *options[1:], f"data.manifest={world / 'one.jsonl'}")]) == 0
    assert curves(world / "one")[0]["loss"] != both[0]["loss"]


# What torchrun starts; a rank dies before the step that the first word names.
DYING = """
import sys
from models.cli import main
from models.training import loop

step = loop.TrainingLoop.step

def dying(self, at, logged):
    if at == int(sys.argv[1]):
        sys.exit(9)
    step(self, at, logged)

loop.TrainingLoop.step = dying
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_ranks_are_one_and_go_on_after_a_kill(tmp_path, capsys):
    """DDP on two ranks, killed in the third step, goes on with FSDP2: the curves of one process, and a model that answers."""
    world = make_world(tmp_path, "qwen2_5_omni")
    corpus_and_stage1(world)
    run = ["train", "qwen_omni", *words(world, "alone", f"teacher.model={world / 'teacher'}")]
    assert models(run) == 0
    (world / "dying.py").write_text(DYING)
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [*run, f"run.out_dir={world / 'two'}"]
    root = Path(__file__).parents[3]
    here = {"cwd": root, "capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(root)}}
    killed = subprocess.run([*started, str(world / "dying.py"), "3", *two, "run.parallel=ddp"], **here)
    assert killed.returncode != 0 and [line["step"] for line in curves(world / "two")] == [1, 2], killed.stderr[-2000:]
    again = subprocess.run([*started, "-m", "models", *two, "run.parallel=fsdp2", "run.resume=auto"], **here)
    assert again.returncode == 0, again.stderr[-2000:]
    for one, other in zip(curves(world / "alone"), curves(world / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    capsys.readouterr()
    answered = ["ask", str(world / "two" / "final"), str(world / "0.wav"), QUESTION, "--device", "cpu", "--max-new-tokens", "3"]
    assert models(answered) == 0 and capsys.readouterr().out


@pytest.mark.slow
def test_all_layers_of_a_text_teacher_and_of_a_snapshot(tmp_path):
    """arXiv 2509.18579; the text teacher has other widths, other special tokens and more layers."""
    world = make_world(tmp_path, "qwen2_5_omni")
    options = [f"sources.text.folder={text_teacher(world, width=48, layers=3)}", "optim.steps=2"]
    assert models(["train", "qwen_omni_sources", *words(world, "run", *options)]) == 0
    last = curves(world / "run")[-1]
    assert {"kd_text", "kd_acoustic", "layers_text", "layers_acoustic"} <= last.keys()
    assert last["layers_acoustic"] < 0.1 < last["layers_text"]  # the snapshot is the student of two steps ago
    saved = load_file(world / "run" / "final" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)  # the projections are not in the result


@pytest.mark.slow
def test_evaluate_gives_a_trained_student_its_due(tmp_path, capsys):
    """A student that has learned its six clips by heart answers them; without the audio it answers by chance."""
    world = make_world(tmp_path, "qwen2_audio")
    more = ["optim.steps=40", "optim.learning_rate=0.02", "optim.warmup_steps=5", "run.save_every_steps=40"]
    more += ["student.trains=full"]
    assert models(["train", "sft", *words(world, "sft", *more)]) == 0
    final, scores = str(world / "sft" / "final"), world / "scores.json"
    asked = ["evaluate", final, str(world / "manifest.jsonl"), "--out", str(world / "p.jsonl"), "--json", str(scores)]
    assert models([*asked, "--device", "cpu", "--controls", "no_audio"]) == 0
    found = [json.loads(line) for line in (world / "p.jsonl").read_text().splitlines()[1:]]
    right = {kind: [p["answer"] in p["prediction"] for p in found if p["control"] == kind] for kind in ("", "no_audio")}
    assert all(right[""]) and not all(right["no_audio"])
