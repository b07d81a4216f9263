"""A manifest of tones, a teacher and a smaller student: what the commands are tested with."""

from __future__ import annotations

from pathlib import Path

from models.data.audio import write_audio
from models.data.manifest import Example, write_manifest
from tests.models.audio_lms import tiny_audio_lms as tiny

QUESTION = "Is the tone high or low?"


def make_world(folder: Path, family: str, *, examples: int = 6) -> Path:
    """`folder` with manifest.jsonl, teacher/ and student/ of `family`."""
    rows = []
    for number in range(examples):
        word, hertz = (("high", 1200.0), ("low", 300.0))[number % 2]
        write_audio(folder / f"{number}.wav", tiny.tone(hertz, seconds=0.5 + 0.05 * number, seed=number))
        for split in ("train", "test"):
            rows.append(
                Example(
                    id=f"{split}-{number}", audio=f"{number}.wav", task="pitch", question=QUESTION, choices=("high", "low"),
                    answer=word, target=f"The tone is {word}.", target_source="template", split=split,
                    metadata={"pitch": word}, transcription="beep" if number == 1 else "",
                )
            )  # fmt: skip
    write_manifest(folder / "manifest.jsonl", rows)
    tiny.FAMILIES[family](folder / "teacher", seed=1, width=48, layers=3)
    tiny.FAMILIES[family](folder / "student", seed=2)
    return folder


def words(world: Path, out: str, *more: str) -> list[str]:
    """Overrides of a recipe for a run of a few steps in `world`."""
    return [
        f"data.manifest={world / 'manifest.jsonl'}", f"student.model={world / 'student'}", f"run.out_dir={world / out}",
        "student.lora.r=4", "optim.steps=4", "optim.batch_examples=4", "optim.micro_batch_examples=2", "optim.warmup_steps=1",
        "run.device=cpu", "run.log_every_steps=1", "run.save_every_steps=1", "run.tensorboard=false", "run.progress_bar=false",
        "loss.impl=reference", "student.dtype=float32", "teacher.dtype=float32", *more,
    ]  # fmt: skip
