"""A manifest of tones, a teacher and a smaller student: what the commands are tested with."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

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


def corpus_and_stage1(world: Path) -> Path:
    """`world`'s manifest made anew by the commands: rows as others publish them, then Stage 1's answers."""
    from models.cli import main as models

    rows = [
        {
            "id": f"{split}-{number}", "audio": f"{number}.wav", "instruction": QUESTION, "label": ("high", "low")[number % 2],
            "choices": ["high", "low"], "task": "pitch", "split": split,
        }
        for number in range(6)
        for split in ("train", "test")
    ]  # fmt: skip
    manifest = world / "manifest.jsonl"
    manifest.unlink()
    (world / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = str(world / "corpus.jsonl")
    assert models(["convert", str(world / "rows.jsonl"), "--form", "dynamic_superb", "--out", corpus]) == 0
    assert models(["pseudo-gt", corpus, "--source", "template", "--splits", "train,test", "--out", str(manifest)]) == 0
    return manifest


def text_teacher(world: Path, *, width: int = 32, layers: int = 2) -> Path:
    """A language model with the ordinary tokens of the audio LMs, a longer head, and special tokens of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = tiny.tokenizer()
    backend = json.loads(made.backend_tokenizer.to_str().replace("<|AUDIO|>", "<|think|>"))
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token=tiny.SPECIAL[0], pad_token=tiny.SPECIAL[0],
        additional_special_tokens=["<|think|>"],
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY + 7, hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    tiny._wide(LlamaForCausalLM, config, 3).save_pretrained(world / "text")
    own.save_pretrained(world / "text")
    return world / "text"


def words(world: Path, out: str, *more: str) -> list[str]:
    """Overrides of a recipe for a run of a few steps in `world`."""
    return [
        f"data.manifest={world / 'manifest.jsonl'}", f"student.model={world / 'student'}", f"run.out_dir={world / out}",
        "student.lora.r=4", "optim.steps=4", "optim.batch_examples=4", "optim.micro_batch_examples=2", "optim.warmup_steps=1",
        "run.device=cpu", "run.log_every_steps=1", "run.save_every_steps=1", "run.tensorboard=false", "run.progress_bar=false",
        "loss.impl=reference", "student.dtype=float32", "teacher.dtype=float32", *more,
    ]  # fmt: skip
