"""The whole path in one command: recorded speech in, a distilled speech LM out, and what the distillation was worth.

    python -m models.demo                 # about 14 minutes on 2 cores after the downloads; again: seconds
    python -m models.demo --fast-smoke    # the same code on synthetic clips and tiny random models, for CI

    corpus -> features -> Stage 1 (the text backbone writes Y) -> teacher, biased by hints that are nearly always true
           -> its student: layers dropped, healed on text
           -> the teacher's own answers as pseudo ground truth; both of its paths cached
           -> students: CE only, KD, sharpened control, CAAD alpha 1 and 2
           -> test clips under a true, a false and no hint -> table, verdict, report

What it shows: a teacher that has learned to trust hints answers from the hint where the sound says otherwise. Plain KD hands that
bias down. CAAD's target subtracts what the teacher would have said without hearing anything. The verdict is computed from the
numbers; where CAAD does not win, it says so.

Each stage is a process of its own and leaves a folder named by the fingerprint of its settings and inputs: what is there is not
made again, and a stopped demo goes on where it was. Independent stages run side by side, one core each.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.io_utils import atomic_write_json, atomic_write_text, cache_dir, fingerprint, source_commit

DONE_NAME = "done.json"
# Raised whenever a stage's code changes what it makes from the same settings.
STAGES_VERSION = 1
CONTEXTS = (("neutral", "no hint"), ("aligned", "true hint"), ("conflict", "false hint"))


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides what the demo computes."""

    sources: tuple[str, ...] = ("queen", "espeak")
    corpus_size: str = "demo"
    task: str = "gender"
    max_train_clips: int | None = None  # of each pool; None = all
    max_test_clips: int | None = None
    lm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    encoder: str = "openai/whisper-tiny.en"
    tiny_backbones: bool = False  # random ones, made on the spot
    keep_layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 27, 28, 29)
    healing_steps: int = 96
    target_source: str = "text_backbone"  # of the teacher's training targets
    teacher_steps: int = 120
    teacher_learning_rate: float = 1e-3
    student_steps: int = 120
    student_learning_rate: float = 2e-3
    batch_examples: int = 16
    seed: int = 0
    device: str = "cpu"


FULL = DemoSettings()
SMOKE = DemoSettings(
    sources=("espeak",), corpus_size="tiny", max_train_clips=16, max_test_clips=6, tiny_backbones=True, keep_layers=(0, 2),
    healing_steps=3, target_source="template", teacher_steps=6, student_steps=4, batch_examples=4,
)  # fmt: skip

# name, label, objective, alpha
STUDENTS = (
    ("ce_only", "student, CE only", "ce_only", 0.0),
    ("kd", "student, KD", "kd", 0.0),
    ("sharpened2", "student, sharpened KD 2", "sharpened", 2.0),
    ("caad1", "student, CAAD alpha 1", "caad", 1.0),
    ("caad2", "student, CAAD alpha 2", "caad", 2.0),
)
TEACHER_ALPHAS = (None, 1.0, 2.0)


@dataclass(frozen=True)
class Stage:
    """One step: what it needs, the settings it depends on, and the function that fills its folder."""

    name: str
    title: str
    needs: tuple[str, ...]
    settings: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    extra: Any = None  # further input, part of the fingerprint


@dataclass(frozen=True)
class Context:
    """What a stage's function gets: settings, its own folder, and the folders and results of the stages it needs."""

    settings: DemoSettings
    folder: Path
    folders: Mapping[str, Path]
    extra: Any

    def result(self, stage: str) -> dict[str, Any]:
        """What a needed stage returned."""
        return read_done(self.folders[stage])["result"]


# --------------------------------------------------------------------------------------------------------------------
# The stages
# --------------------------------------------------------------------------------------------------------------------


def run_backbones(context: Context) -> dict[str, Any]:
    """Language model and encoder: found or fetched here, once, and not by several stages at the same time."""
    from models.backbones import BackboneError, resolve_backbone

    ids = _backbones(context.settings)
    try:
        found = [resolve_backbone(ids["lm"], kind="causal_lm"), resolve_backbone(ids["encoder"], kind="speech_encoder")]
    except BackboneError as error:
        raise SystemExit(str(error)) from error
    return {b.kind: {"id": b.spec, "from": b.source, "sha256": b.sha256()} for b in found}


def run_corpus(context: Context) -> dict[str, Any]:
    """Clips, questions and hints, in the demo's three parts: teacher, distill, test."""
    from models.data.corpus import build_corpus
    from models.data.manifest import read_manifest, write_manifest

    settings = context.settings
    path = build_corpus(
        context.folder, sources=settings.sources, size=settings.corpus_size, seed=settings.seed, tasks=(settings.task,)
    )
    manifest = read_manifest(path, check_audio=True)
    parts = {
        "teacher": _limited(manifest.select(split="train", pool="teacher"), settings.max_train_clips),
        "distill": _limited(manifest.select(split="train", pool="distill"), settings.max_train_clips),
        "test": _limited(manifest.select(split="test"), settings.max_test_clips),
    }
    for name, examples in parts.items():
        write_manifest(context.folder / f"{name}.jsonl", examples)
    return {
        "questions": {name: len(examples) for name, examples in parts.items()},
        "skipped": len(manifest.problems),
        "unavailable": manifest.header.get("unavailable", {}),
    }


def run_features(context: Context) -> dict[str, Any]:
    """Every clip through the frozen encoder, once; and the untrained teacher with the features' statistics."""
    import torch

    from models.features import extract_features
    from models.speech_lm import SpeechLM, SpeechLMConfig
    from models.train import pick_device

    examples = {name: _read_items(context, name) for name in ("teacher", "distill", "test")}
    torch.manual_seed(context.settings.seed)
    model = SpeechLM.from_config(SpeechLMConfig(**_backbones(context.settings))).to(pick_device(context.settings.device))
    store, problems = extract_features(
        [e for part in examples.values() for e in part], model.encode_audio, audio_root=context.folders["corpus"]
    )
    store.save(context.folder / "features.safetensors")
    usable = [e for e in examples["teacher"] if e in store]
    model.fit_feature_statistics(store.rows(usable))
    model.save_pretrained(context.folder / "untrained")
    return {"clips": len(store), "skipped": [list(p) for p in problems]}


def run_stage1(context: Context) -> dict[str, Any]:
    """Stage 1: Y for the teacher's training items, written from the metadata by the text backbone (or by a template)."""
    from models import pseudo_gt
    from models.data.manifest import read_manifest

    settings = context.settings
    out = stage1_manifest(context.folders | {"stage1": context.folder})
    words = [str(context.folders["corpus"] / "teacher.jsonl"), "--out", str(out), "--source", settings.target_source]
    words += ["--audio-root", str(context.folders["corpus"])]
    if settings.target_source == "text_backbone":
        words += ["--backbone", settings.lm]
    _check_status("models.pseudo_gt", pseudo_gt.main(words))
    examples = read_manifest(out, check_audio=False).examples
    return {"targets": len(examples), "examples_of_targets": sorted({e.target for e in examples if e.target})[:6]}


def stage1_manifest(folders: Mapping[str, Path]) -> Path:
    """Where Stage 1 writes: a manifest has to lie where its clips are within reach, so beside the corpus' own."""
    return folders["corpus"] / f"{folders['stage1'].name}.jsonl"


def run_teacher(context: Context) -> dict[str, Any]:
    """The teacher: supervised on its biased training items; one clip in ten masked."""
    settings = context.settings
    _train(
        context,
        "sft_teacher",
        manifest=stage1_manifest(context.folders),
        folder=context.folders["features"] / "untrained",
        words=[f"optim.steps={settings.teacher_steps}", f"optim.learning_rate={settings.teacher_learning_rate}"],
    )
    return {}


def run_student_lm(context: Context) -> dict[str, Any]:
    """The student's language model: layers dropped, then healed on text; with an untrained connector."""
    import torch

    from models.healing import HealingConfig, healed_student, healing_texts
    from models.speech_lm import SpeechLM, SpeechLMConfig

    settings = context.settings
    backbone = _backbones(settings)
    texts = healing_texts(_read_items(context, "teacher") + _read_items(context, "distill"), seed=settings.seed)
    held_out = min(64, len(texts) // 4)
    folder = healed_student(
        backbone["lm"],
        texts,
        keep_layers=settings.keep_layers,
        config=HealingConfig(steps=settings.healing_steps, held_out=held_out, batch_size=min(8, len(texts) - held_out)),
    )
    torch.manual_seed(settings.seed)
    SpeechLM.from_config(SpeechLMConfig(**{**backbone, "lm": str(folder)})).save_pretrained(context.folder / "untrained")
    return {"healing": json.loads((folder / "healing.json").read_text())["report"]}


def run_pool(context: Context) -> dict[str, Any]:
    """The teacher answers the distillation pool: its answers are the students' Y."""
    from models.data.manifest import write_manifest
    from models.evaluate import evaluate
    from models.scoring import judge

    model, store, extra = _speech_lm(context, context.folders["teacher"] / "final")
    examples = [e for e in _read_items(context, "distill") if e in store]
    answers = evaluate(model, examples, store, collate=model.make_collator(), extra_inputs=extra)[None]
    texts = {p.id: p.prediction for p in answers}
    forced = [dataclasses.replace(e, target=texts[e.id], target_source="teacher") for e in examples]
    write_manifest(context.folder / "pool.jsonl", forced)
    right = judge(answers)
    kinds = {k: [r for p, r in zip(answers, right, strict=True) if p.kind == k] for k, _ in CONTEXTS}
    return {"pool": len(forced), "pseudo_label_accuracy": {k: float(sum(v) / len(v)) for k, v in kinds.items() if v}}


def run_cache(context: Context) -> dict[str, Any]:
    """Both of the teacher's paths over its own answers, once, for all students that learn from it."""
    import torch
    from tqdm import tqdm

    from kdkernels.contrast_cache import ContrastCache
    from kdkernels.teacher import DualPathTeacher, MarkAbsent
    from models.data.manifest import read_manifest

    model, store, extra = _speech_lm(context, context.folders["teacher"] / "final")
    pool = read_manifest(context.folders["pool"] / "pool.jsonl", audio_root=context.folders["corpus"], check_audio=False)
    forced = pool.examples
    teacher = DualPathTeacher(model, negative=MarkAbsent())
    collate = model.make_collator()
    made_from = {"teacher": fingerprint(str(context.folders["teacher"].name)), "targets": fingerprint([e.target for e in forced])}
    writer = ContrastCache.writer(
        context.folder / "cache", fingerprint=made_from, hidden_size=teacher.head.weight.shape[1], dtype=torch.float32
    )
    with writer, tqdm(total=len(forced), desc="cache both paths", unit="example") as bar:
        for start in range(0, len(forced), 32):
            chosen = forced[start : start + 32]
            batch = collate(chosen, store.rows(chosen)).to(model.device)
            states = teacher({**batch.model_inputs(), **extra}, batch.target_index)
            for row, example in enumerate(chosen):
                here = batch.target_row == row
                if example.id not in writer:
                    writer.add(example.id, states.audio_hidden[here], states.text_hidden[here], batch.target[here])
            bar.update(len(chosen))
    return {"examples": len(forced)}


def run_student(context: Context) -> dict[str, Any]:
    """One student: trained, then asked the test questions."""
    settings = context.settings
    objective, alpha = context.extra["objective"], context.extra["alpha"]
    words = [f"optim.steps={settings.student_steps}", f"optim.learning_rate={settings.student_learning_rate}"]
    # Only the answer's token is learned, since only the choices are scored: a step takes two thirds of the time. Students that
    # are to answer freely need loss.ce_background_weight above 0 (and ce_background_fraction, to keep it cheap).
    words += ["loss.ce_background_weight=0"]
    if objective != "ce_only":
        words += [
            f"teacher.folder={context.folders['teacher'] / 'final'}",
            f"teacher.cache={context.folders['cache'] / 'cache'}",
            f"loss.alpha={alpha}",
        ]
    if not (context.folder / "final").exists():
        _train(
            context,
            objective,
            manifest=context.folders["pool"] / "pool.jsonl",
            folder=context.folders["student_lm"] / "untrained",
            # The statistics of the features come from the teacher's clips: one standardisation for all.
            words=[*words, f"model.feature_statistics={context.folders['features'] / 'untrained'}"],
        )
    return _ask(context, context.folder / "final", alphas=(None,))


def run_teacher_answers(context: Context) -> dict[str, Any]:
    """The teacher on the test questions: greedy, and by contrastive decoding."""
    return _ask(context, context.folders["teacher"] / "final", alphas=TEACHER_ALPHAS)


def make_stages() -> list[Stage]:
    """All stages, in an order that honours their needs; of those that may run, the first ones are started."""
    backbone = ("lm", "encoder", "tiny_backbones", "seed", "device")
    training = (*backbone, "batch_examples")
    stages = [
        Stage("backbones", "backbones", (), ("lm", "encoder", "tiny_backbones"), run_backbones),
        Stage(
            "corpus", "corpus", (),
            ("sources", "corpus_size", "task", "seed", "max_train_clips", "max_test_clips"), run_corpus,
        ),
        Stage("features", "encoder features", ("backbones", "corpus"), backbone, run_features),
        Stage("stage1", "Stage 1: pseudo ground truth", ("backbones", "corpus"), ("lm", "target_source"), run_stage1),
        Stage(
            "student_lm", "student: drop layers, heal", ("backbones", "corpus"),
            (*backbone, "keep_layers", "healing_steps"), run_student_lm,
        ),
        Stage(
            "teacher", "teacher (sft, biased)", ("corpus", "features", "stage1"),
            (*training, "teacher_steps", "teacher_learning_rate"), run_teacher,
        ),
        Stage("pool", "teacher's answers on the pool", ("corpus", "features", "teacher"), training, run_pool),
        Stage("cache", "cache of its two paths", ("corpus", "features", "teacher", "pool"), training, run_cache),
    ]  # fmt: skip
    for name, label, objective, alpha in STUDENTS:
        taught = () if objective == "ce_only" else ("cache",)
        student = Stage(
            f"student_{name}", label, ("corpus", "features", "teacher", "student_lm", "pool", *taught),
            (*training, "student_steps", "student_learning_rate"), run_student,
            extra={"objective": objective, "alpha": alpha},
        )  # fmt: skip
        stages.append(student)
    needs = ("corpus", "features", "teacher")
    stages.append(Stage("answers_teacher", "teacher's test answers", needs, training, run_teacher_answers, list(TEACHER_ALPHAS)))
    return stages


# --------------------------------------------------------------------------------------------------------------------
# What stages share
# --------------------------------------------------------------------------------------------------------------------


def _limited(examples: Sequence[Any], clips: int | None) -> list[Any]:
    """Examples of the first `clips` clips, men and women in turn; all where there is no limit."""
    if clips is None:
        return list(examples)
    by_answer: dict[str, list[str]] = {}
    for e in examples:
        names = by_answer.setdefault(e.answer, [])
        if e.audio not in names:
            names.append(e.audio)
    turns = [name for group in zip(*by_answer.values(), strict=False) for name in group]
    chosen = set(turns[:clips])
    return [e for e in examples if e.audio in chosen]


def _read_items(context: Context, name: str) -> list[Any]:
    from models.data.manifest import read_manifest

    return list(
        read_manifest(
            context.folders["corpus"] / f"{name}.jsonl", audio_root=context.folders["corpus"], check_audio=False
        ).examples
    )


def _speech_lm(context: Context, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A trained model on its device, the features, and its prefix cache as extra inputs."""
    from models.features import FeatureStore
    from models.frozen_linear import use_bf16_products
    from models.speech_lm import SpeechLM
    from models.train import pick_device

    model = SpeechLM.from_pretrained(folder).to(pick_device(context.settings.device)).eval()
    if _bf16_products(context.settings):
        use_bf16_products(model.lm.get_decoder())
    store = FeatureStore.load(context.folders["features"] / "features.safetensors")
    return model, store, {"prefix_cache": model.make_prefix_cache()}


def _train(context: Context, recipe: str, *, manifest: Path, folder: Path, words: list[str]) -> None:
    from models.train import main

    settings = context.settings
    all_words = [
        recipe,
        f"data.manifest={manifest}",
        f"data.audio_root={context.folders['corpus']}",
        f"data.features={context.folders['features'] / 'features.safetensors'}",
        f"model.folder={folder}",
        f"optim.batch_examples={settings.batch_examples}",
        f"run.out_dir={context.folder}",
        f"run.seed={settings.seed}",
        f"run.device={settings.device}",
        f"model.bf16_products={str(_bf16_products(settings)).lower()}",
        "run.resume=auto",
        *words,
    ]
    _check_status("models.train", main(all_words))


def _ask(context: Context, folder: Path, *, alphas: Sequence[float | None]) -> dict[str, Any]:
    """Test questions under all contexts; the two controls on the neutral ones. Predictions are saved for the report."""
    from models.evaluate import append_predictions, evaluate, write_header

    model, store, extra = _speech_lm(context, folder)
    test = [e for e in _read_items(context, "test") if e in store]
    options = {"collate": model.make_collator(), "extra_inputs": extra}
    answers = evaluate(model, test, store, alphas=alphas, **options)
    neutral = [e for e in test if e.kind == "neutral"]
    answers[None] += evaluate(model, neutral, store, controls=("no_audio", "swapped_audio"), plain=False, **options)[None]
    for alpha, predictions in answers.items():
        path = context.folder / f"test-{'greedy' if alpha is None else f'contrastive{alpha:g}'}.jsonl"
        write_header(path, {"model": str(folder), "alpha": alpha, "split": "test", "mode": "choice"})
        append_predictions(path, predictions)
    return {"answers": {str(alpha): len(predictions) for alpha, predictions in answers.items()}}


def _backbones(settings: DemoSettings) -> dict[str, Any]:
    if not settings.tiny_backbones:
        return {"lm": settings.lm, "encoder": settings.encoder}
    folder = make_tiny_backbones(cache_dir() / "demo" / "tiny-backbones")
    return {"lm": str(folder / "lm"), "encoder": str(folder / "encoder"), "encoder_layers": (1, 2), "connector_width": 32}


def make_tiny_backbones(folder: Path) -> Path:
    """A random Llama of three layers with a byte-level tokenizer and a random Whisper encoder: shape, not skill."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperModel,
        set_seed,
    )

    from models.io_utils import atomic_dir

    if folder.is_dir():
        return folder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|audio|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=specials[0], pad_token=specials[0], additional_special_tokens=specials[1:]
    )
    set_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
        )
    )  # fmt: skip
    speech = WhisperModel(
        WhisperConfig(
            d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64, pad_token_id=0, bos_token_id=0, eos_token_id=0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    with atomic_dir(folder) as target:
        lm.save_pretrained(target / "lm")
        wrapped.save_pretrained(target / "lm")
        speech.save_pretrained(target / "encoder")
        WhisperFeatureExtractor(feature_size=80).save_pretrained(target / "encoder")
    return folder


def _bf16_products(settings: DemoSettings) -> bool:
    """Short products where the processor has them: the demo's steps then take two thirds of the time."""
    from models.frozen_linear import cpu_multiplies_bf16
    from models.train import pick_device

    return pick_device(settings.device).type == "cpu" and cpu_multiplies_bf16()


def _check_status(what: str, status: int) -> None:
    if status:
        raise SystemExit(status if status > 128 else f"{what} ended with status {status}")


# --------------------------------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------------------------------


class StageError(RuntimeError):
    """A stage ended badly; the message has the end of its log."""


def stage_folders(stages: Sequence[Stage], settings: DemoSettings, root: Path) -> dict[str, Path]:
    """Each stage's folder, named by its fingerprint: version, settings it depends on, folders it reads."""
    folders: dict[str, Path] = {}
    for stage in stages:
        key = {
            "version": STAGES_VERSION,
            "settings": {name: getattr(settings, name) for name in stage.settings},
            "needs": [folders[name].name for name in stage.needs],
            "extra": stage.extra,
        }
        folders[stage.name] = root / f"{stage.name}-{fingerprint(key)[:12]}"
    return folders


def read_done(folder: Path) -> dict[str, Any] | None:
    """What a finished stage noted: result and seconds. None = not finished."""
    try:
        return json.loads((folder / DONE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def run_stages(
    stages: Sequence[Stage],
    folders: Mapping[str, Path],
    *,
    command: Callable[[Stage], list[str]],
    workers: int,
    threads: int,
    console: Console,
) -> dict[str, float]:
    """Run what is not done, `workers` processes at a time.

    Args:
        command: the command line that runs a stage in its own process.
        threads: of each process.

    Returns:
        seconds of each stage, as measured when it was made.

    Raises:
        StageError: a stage failed; the others that ran were stopped (and can be gone on with).
        KeyboardInterrupt: Ctrl-C; running stages have saved what they had.
    """
    done = {s.name for s in stages if read_done(folders[s.name]) is not None}
    for stage in stages:
        if stage.name in done:
            console.print(f"  [dim]{stage.title:34} cached ({folders[stage.name].name})[/dim]")
    running: dict[str, tuple[subprocess.Popen, Path, float]] = {}
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    status = console.status("") if console.is_terminal else None
    if status:
        status.start()
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    except ValueError:  # not in the main thread
        before = None
    try:
        while len(done) < len(stages):
            ready = [s for s in stages if s.name not in done and s.name not in running and set(s.needs) <= done]
            for stage in ready[: workers - len(running)]:
                folder = folders[stage.name]
                folder.mkdir(parents=True, exist_ok=True)
                log = folder / "log.txt"
                with open(log, "ab") as file:
                    # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once. A
                    # second one would break off the saving.
                    process = subprocess.Popen(
                        command(stage), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                    )
                running[stage.name] = (process, log, time.monotonic())
                if not status:
                    console.print(f"  {stage.title:34} started")
            for stage in [s for s in stages if s.name in running]:
                process, log, started = running[stage.name]
                if process.poll() is None:
                    continue
                del running[stage.name]
                noted = read_done(folders[stage.name])
                if process.returncode != 0 or noted is None:
                    raise StageError(f"{stage.title}: status {process.returncode}; the end of {log}:\n{_tail(log)}")
                done.add(stage.name)
                console.print(f"  {stage.title:34} {time.monotonic() - started:5.0f} s")
            if status:
                now = time.monotonic()
                shown = [f"{name} {now - began:.0f} s {_progress(log)}" for name, (_, log, began) in running.items()]
                status.update("; ".join(shown))
            time.sleep(0.1)
    except BaseException:
        for process, _, _ in running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # they save and go
        for process, _, _ in running.values():
            process.wait()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if status:
            status.stop()
    return {s.name: read_done(folders[s.name])["seconds"] for s in stages}


def run_stages_here(
    stages: Sequence[Stage], folders: Mapping[str, Path], *, settings: DemoSettings, root: Path, console: Console
) -> dict[str, float]:
    """`run_stages` in this process, one after the other."""
    seconds = {}
    for stage in stages:
        cached = read_done(folders[stage.name]) is not None
        if not cached:
            folders[stage.name].mkdir(parents=True, exist_ok=True)
            try:
                run_one_stage(stage.name, settings, root)
            except SystemExit as error:
                raise StageError(f"{stage.title}: {error}") from error
        seconds[stage.name] = read_done(folders[stage.name])["seconds"]
        console.print(f"  {stage.title:34} " + ("cached" if cached else f"{seconds[stage.name]:5.0f} s"))
    return seconds


def run_one_stage(name: str, settings: DemoSettings, root: Path) -> None:
    """What a stage's process does: run it and note that it is done."""
    stages = {s.name: s for s in make_stages()}
    if name not in stages:
        raise ValueError(f"stage: expected one of {', '.join(stages)}, got {name!r}")
    folders = stage_folders(list(stages.values()), settings, root)
    stage = stages[name]
    started = time.monotonic()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    needed = {need: folders[need] for need in stage.needs}
    result = stage.run(Context(settings, folders[name], needed, stage.extra))
    # CPU seconds as well: what a stage takes on a machine that has nothing else to do.
    noted = {"result": result, "seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time(), 1)}
    atomic_write_json(folders[name] / DONE_NAME, noted)


def _tail(log: Path, lines: int = 25) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _progress(log: Path) -> str:
    """The counter of the last progress bar in a log: "120/300"."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        text = file.read().decode("utf-8", errors="replace")
    words = [w for line in text.replace("\r", "\n").splitlines() for w in line.replace("|", " ").split() if "/" in w]
    counters = [w for w in words if all(part.isdigit() for part in w.split("/", 1))]
    return counters[-1] if counters else ""


# --------------------------------------------------------------------------------------------------------------------
# What came out
# --------------------------------------------------------------------------------------------------------------------


def collect(folders: Mapping[str, Path]) -> dict[str, list[Any]]:
    """Test predictions of every system, by label, in the order of the table."""
    from models.evaluate import read_predictions

    files = {"teacher, greedy": folders["answers_teacher"] / "test-greedy.jsonl"}
    for alpha in TEACHER_ALPHAS[1:]:
        label = f"teacher, contrastive {alpha:g}"
        files[label] = folders["answers_teacher"] / f"test-contrastive{alpha:g}.jsonl"
    for name, label, _, _ in STUDENTS:
        files[label] = folders[f"student_{name}"] / "test-greedy.jsonl"
    return {label: read_predictions(path)[1] for label, path in files.items()}


def verdict(predictions: Mapping[str, Sequence[Any]]) -> list[str]:
    """What the numbers say about CAAD, in sentences. Computed; a loss or a draw is said as plainly as a win.

    Compared are the answers under a false hint (what CAAD is for) and with no hint (what it must not cost), pair by pair, with
    95% bootstrap intervals over clips. The first sentence is about plain KD; the controls follow.
    """
    from models.scoring import paired_difference

    ours = {alpha: _plain(predictions[f"student, CAAD alpha {alpha}"]) for alpha in (1, 2)}
    details, wins, costs = [], [], []
    for label in ("student, KD", "student, sharpened KD 2", "student, CE only"):
        other = _plain(predictions[label])
        for alpha, answers in ours.items():
            conflict = paired_difference(answers, other, kind="conflict")
            neutral = paired_difference(answers, other, kind="neutral")
            details.append(
                f"CAAD alpha {alpha} against {label.removeprefix('student, ')}: under a false hint {_points(conflict)}, "
                f"{_compared(conflict)}; without a hint {_points(neutral)}, {_compared(neutral)}."
            )
            if label == "student, KD":
                wins += [f"alpha {alpha}"] if conflict.low > 0 else []
                costs += [f"alpha {alpha}"] if neutral.high < 0 else []
    if wins:
        headline = f"CAAD ({' and '.join(wins)}) follows a false hint less often than plain KD does"
        headline += f", and pays for it without a hint ({' and '.join(costs)})." if costs else "."
    else:
        headline = "CAAD does NOT show an advantage over plain KD under a false hint in this run."
    return [headline, *details]


def caveat(folders: Mapping[str, Path], settings: DemoSettings) -> str:
    """What the numbers stand on, so that nobody takes them for more."""
    from models.data.manifest import read_manifest

    def read(part: str) -> list[Any]:
        return read_manifest(folders["corpus"] / f"{part}.jsonl", check_audio=False).examples

    hinted = [e.kind for e in read("teacher") if e.kind != "neutral"]
    true = sum(kind == "aligned" for kind in hinted) / max(1, len(hinted))
    test = read("test")
    voices = {e.metadata.get("speaker") for e in test}
    clips = {e.audio for e in test}
    return (
        f"On one task ({settings.task}), one seed, {len(clips)} test clips of {len(voices)} unseen voices; the teacher's bias "
        f"was induced: {true:.0%} of the hints it was trained with were true. Answers are the likelier of the two choices."
    )


def _points(difference: Any) -> str:
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.1f} points (95% {low:+.1f} to {high:+.1f}, {difference.count} clips)"


def _compared(difference: Any) -> str:
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no clear difference"


def _plain(predictions: Sequence[Any]) -> list[Any]:
    return [p for p in predictions if not p.control]


def print_table(console: Console, predictions: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The table on the terminal; returns the scores of every system."""
    from models.evaluate import summarize

    table = Table(title="accuracy on unseen speakers, by what the prompt says (Shift = TIR_adv, lower is better)")
    for column in ("system", *(label for _, label in CONTEXTS), "Shift", "no audio", "swapped"):
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=True)
    scores = {}
    for label, answers in predictions.items():
        scores[label] = summary = summarize(answers)
        plain = summary["plain"]
        cells = [plain["by_kind"][kind].value for kind, _ in CONTEXTS if kind in plain["by_kind"]]
        cells += [plain["tir_adv"].value]
        cells += [summary[c]["accuracy"].value if c in summary else None for c in ("no_audio", "swapped_audio")]
        table.add_row(label, *("-" if v is None else f"{v:.3f}" for v in cells))
    console.print(table)
    return scores


def _shown(result: Mapping[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False).strip("{}").replace('"', "")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m models.demo", description="The whole path, once.")
    parser.add_argument("--fast-smoke", action="store_true", help="synthetic clips, tiny random models: a minute, for CI")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/demo", help="folder of report.html and results.json")
    parser.add_argument("--fresh", action="store_true", help="make every stage anew (downloads are kept)")
    parser.add_argument(
        "--workers", type=int, default=None, help="stages at a time, each a process; 0 = all in this process, one by one"
    )
    parser.add_argument("--run-stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    settings = dataclasses.replace(SMOKE if arguments.fast_smoke else FULL, device=arguments.device, seed=arguments.seed)
    root = cache_dir() / "demo"
    if arguments.run_stage:
        try:
            run_one_stage(arguments.run_stage, settings, root)
        except KeyboardInterrupt:
            return 130
        return 0

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width; 80 would break the table
    stages = make_stages()
    folders = stage_folders(stages, settings, root)
    if arguments.fresh:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A smoke stage is shorter than the imports of a process of its own.
    workers = arguments.workers if arguments.workers is not None else 0 if arguments.fast_smoke else min(2, cores)
    threads = max(1, cores // max(1, workers))
    base = [sys.executable, "-m", "models.demo", "--device", settings.device, "--seed", str(settings.seed)]
    base += ["--fast-smoke"] if arguments.fast_smoke else []
    started = time.monotonic()
    console.print(f"demo: {workers or 1} stage(s) at a time, {threads} thread(s) each; stages are kept in", root, soft_wrap=True)
    try:
        if workers:
            seconds = run_stages(
                stages,
                folders,
                command=lambda s: [*base, "--run-stage", s.name],
                workers=workers,
                threads=threads,
                console=console,
            )
        else:
            seconds = run_stages_here(stages, folders, settings=settings, root=root, console=console)
    except StageError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        return 130
    for source, reason in read_done(folders["corpus"])["result"]["unavailable"].items():
        console.print(f"warning: without the recordings of {source}: {reason}", markup=False)
    predictions = collect(folders)
    scores = print_table(console, predictions)
    sentences = [*verdict(predictions), caveat(folders, settings)]
    if arguments.fast_smoke:
        sentences = ["Smoke run: random models, the numbers mean nothing.", *sentences]
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)

    from models.evaluate import to_json
    from models.report import write_report

    out = Path(arguments.out)
    results = {"settings": dataclasses.asdict(settings), "scores": to_json(scores), "verdict": sentences, "seconds": seconds}
    results |= {"commit": source_commit(), "date": datetime.date.today().isoformat()}
    atomic_write_json(out / "results.json", results)
    atomic_write_text(out / "results.csv", results_csv(results))
    report = write_report(out / "report.html", make_report(settings, stages, folders, predictions, sentences, seconds))
    console.print(f"total {time.monotonic() - started:.0f} s; report: {report.resolve()}", soft_wrap=True)
    return 0


def results_csv(results: Mapping[str, Any]) -> str:
    """A row a system, from what results.json holds: accuracies by context with their 95% intervals, and TIR_adv."""
    import torch

    seconds = sum(results["seconds"].values())
    rows = []
    for system, by_control in results["scores"].items():
        score = by_control["plain"]
        row: dict[str, Any] = {"system": system, "seed": results["settings"]["seed"]}
        for kind, _ in CONTEXTS:
            value = score["by_kind"][kind]
            ends = {f"{kind}_{end}": round(value[end], 4) for end in ("low", "high")}
            row |= {kind: round(value["value"], 4), **ends}
        tir = score["tir_adv"]["value"]
        row |= {"tir_adv": "" if tir is None else round(tir, 4), "clips": score["by_kind"]["neutral"]["count"]}
        row |= {"stage_seconds": round(seconds), "torch": torch.__version__}
        row |= {"commit": results["commit"], "date": results["date"]}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def make_report(
    settings: DemoSettings,
    stages: Sequence[Stage],
    folders: Mapping[str, Path],
    predictions: Mapping[str, Sequence[Any]],
    sentences: Sequence[str],
    seconds: Mapping[str, float],
) -> Any:
    """The demo's report: systems, curves of every training, clips, settings, what each stage did and how long it took."""
    from models.data.manifest import read_manifest
    from models.metrics import read_metrics
    from models.report import Report

    trained = {"teacher": folders["teacher"], **{label: folders[f"student_{name}"] for name, label, _, _ in STUDENTS}}
    told = [s for s in stages if s.run is not run_student]
    notes = [(s.title, _shown(read_done(folders[s.name])["result"])) for s in told]
    return Report(
        title="kdkernels demo: what contrastive audio-aware distillation does to a biased teacher's student",
        findings=list(sentences),
        systems=predictions,
        curves={label: read_metrics(folder / "metrics.jsonl") for label, folder in trained.items()},
        examples=read_manifest(folders["corpus"] / "test.jsonl", check_audio=False).examples,
        audio_root=folders["corpus"],
        facts=[
            ("What the stages did", [n for n in notes if n[1]]),
            ("Seconds of each stage", [(s.title, f"{seconds[s.name]:.0f}") for s in stages]),
            ("Settings", [(k, str(v)) for k, v in dataclasses.asdict(settings).items()]),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
