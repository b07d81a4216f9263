"""Every Python block of README.md and docs/ runs, page by page, its blocks one after the other in one namespace."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.tables import pages

pytest.importorskip("transformers", reason="the pages' audio LMs are transformers'")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
sys.path.insert(0, str(Path(__file__).parents[1] / "kdkernels"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import tiny_lms
import tiny_speech
import transformers

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Where a page names a model of the hub or asks for many steps, the test gives it a tiny random model and one step.
SMALL = {"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": True, "save_strategy": "no"}


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def audio_lm(*_: Any) -> torch.nn.Module:
    model, _ = tiny_lms.qwen2_audio()
    model.generation_config.repetition_penalty, model.generation_config.do_sample = None, False
    return model


def rows() -> list[dict[str, Any]]:
    """Three samples that fit `audio_lm`, answers of three tokens."""
    _, batch = tiny_lms.qwen2_audio()
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    columns = {**batch, "labels": labels}
    return [
        {name: x[row] for name, x in columns.items()} | {"sample_id": f"clip-{row}"} for row in range(tiny_lms.ROWS)
    ]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(x) if isinstance(x[0], torch.Tensor) else x for name, x in columns.items()}


def trainer_page() -> dict[str, Any]:
    saved = tiny_speech.make_speech_lm().save_pretrained("saved", include_frozen=True)
    waveform = torch.randn(8000).clamp(-1, 1).numpy()
    models = {"student": audio_lm(), "big_model": audio_lm()}
    return {**models, "collate": collate, "dataset": rows(), "saved": saved, "waveform": waveform}


def teacher_page() -> dict[str, Any]:
    batch = collate(rows())
    labels = batch.pop("labels")
    del batch["sample_id"]
    return {"audio_lm": audio_lm(), "inputs": batch, "labels": labels}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": lambda: {"collate": collate, "dataset": rows()},
    "teachers.md": teacher_page,
    "training.md": trainer_page,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Qwen2AudioForConditionalGeneration, "from_pretrained", audio_lm)
    real = transformers.TrainingArguments
    monkeypatch.setattr(transformers, "TrainingArguments", lambda folder, **given: real(folder, **{**given, **SMALL}))
    torch.manual_seed(0)
    namespace = GIVEN.get(page.name, dict)()
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)  # a page of this repository
        if isinstance(loss := namespace.get("loss"), torch.Tensor):
            assert loss.isfinite().all(), f"{page.name}, block {number}"


def test_pages_have_blocks():
    counts = {page.name: len(blocks(page)) for page in pages()}
    assert counts["README.md"] >= 3 and counts["losses.md"] >= 5 and counts["teachers.md"] >= 2
