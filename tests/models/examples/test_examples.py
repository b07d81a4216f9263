"""The example scripts run as a reader runs them, on tiny models: the loss falls, --help works, they stay short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the examples distil models of transformers")
pytest.importorskip("peft", reason="audio_lm_trainer.py trains a LoRA of peft")

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "models" / "examples"
SCRIPTS = ("loss_in_a_loop", "audio_lm_trainer", "teacher_into_cache")


def run(script, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{script}.py"), *words], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(text):
    return [float(found) for found in re.findall(r"^step +\d+  loss (\S+)", text, re.MULTILINE)]


def falls(values):
    """The last quarter of the steps has a clearly lower mean than the first."""
    quarter = len(values) // 4
    return sum(values[-quarter:]) < 0.9 * sum(values[:quarter])


@pytest.mark.slow
def test_the_loop_from_hidden_states_and_from_logits():
    from_hidden, from_logits = losses(run("loss_in_a_loop")), losses(run("loss_in_a_loop", "--from-logits"))
    assert len(from_hidden) == 20 and falls(from_hidden)
    assert from_logits == pytest.approx(from_hidden, abs=2e-3)  # printed to four places; AdamW passes rounding on


@pytest.mark.slow
def test_accumulated_batches_are_one_batch():
    parts = losses(run("loss_in_a_loop", "--batch", "2", "--accumulate", "4", "--steps", "3"))
    whole = losses(run("loss_in_a_loop", "--batch", "8", "--accumulate", "1", "--steps", "3"))
    assert parts == pytest.approx(whole, abs=2e-3)


@pytest.mark.slow
def test_the_trainer_with_a_lora(tmp_path):
    text = run("audio_lm_trainer", "--out", str(tmp_path / "lora"), "--save")
    assert len(losses(text)) == 20 and falls(losses(text))
    assert re.search(r"^on other clips: loss \d", text, re.MULTILINE)
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_cache_gives_the_losses_of_the_live_teacher(tmp_path):
    words = ("--cache", str(tmp_path / "cache"))
    text = run("teacher_into_cache", *words)
    assert len(losses(text)) == 20 and falls(losses(text))
    assert text.endswith("the losses are equal up to rounding\n")
    written = (tmp_path / "cache" / "shard-0-00000.safetensors").stat().st_mtime_ns
    assert losses(run("teacher_into_cache", *words)) == losses(text)
    assert (tmp_path / "cache" / "shard-0-00000.safetensors").stat().st_mtime_ns == written  # the teacher did not run again


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_to_run_it(script):
    text = run(script, "--help")
    assert f"python models/examples/{script}.py" in text and "For real models" in text and "--seed" in text


def test_a_script_is_short():
    files = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert files == sorted([*SCRIPTS, "toy_task"])
    for name in files:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 150, name


def test_the_last_hidden_states_are_what_the_head_reads(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import loss_in_a_loop
    import toy_task

    model, processor = toy_task.load("tiny", seed=3)
    inputs = toy_task.encode(processor, toy_task.tones(3, seed=0))
    labels = inputs.pop("labels")
    index = torch.arange(labels.numel())
    with torch.no_grad():
        hidden = loss_in_a_loop.hidden_states(model.eval(), inputs, index)
        logits = model(**inputs).logits
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits.flatten(0, 1))
    answers = [processor.tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in labels]
    assert answers == ["The tone is high.", "The tone is low.", "The tone is high."]
