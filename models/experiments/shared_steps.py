"""Steps that several pipelines share: backbones, features, the student's language model, training, asking, printing.

Each `run_*` is the function of a stage (models/experiments/pipeline.py). It reads the settings by the names that
`models.experiments.demo.DemoSettings` gives them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.experiments.pipeline import Context, Stage, check_status
from models.io_utils import cache_dir

# The settings that decide what a model computes, and those that decide what a training makes of it.
BACKBONE = ("lm", "encoder", "tiny_backbones", "seed", "device")
TRAINING = (*BACKBONE, "batch_examples")


def first_stages(corpus: Stage) -> list[Stage]:
    """Four stages with which every pipeline starts: backbones, its own corpus, features, the student's language model."""
    return [
        Stage("backbones", "backbones", (), ("lm", "encoder", "tiny_backbones"), run_backbones),
        corpus,
        Stage("features", "encoder features", ("backbones", "corpus"), BACKBONE, run_features),
        Stage(
            "student_lm", "student: drop layers, heal", ("backbones", "corpus"), (*BACKBONE, "keep_layers", "healing_steps"),
            run_student_lm,
        ),
    ]  # fmt: skip


def run_backbones(context: Context) -> dict[str, Any]:
    """Find or fetch language model and encoder here, so that several stages do not fetch them at the same time."""
    from models.backbones.resolve import BackboneError, resolve_backbone

    ids = backbone_settings(context.settings)
    try:
        found = [resolve_backbone(ids["lm"], kind="causal_lm"), resolve_backbone(ids["encoder"], kind="speech_encoder")]
    except BackboneError as error:
        raise SystemExit(str(error)) from error
    return {b.kind: {"id": b.spec, "from": b.source, "sha256": b.sha256()} for b in found}


def run_features(context: Context) -> dict[str, Any]:
    """Run every clip through the frozen encoder once, and save the untrained teacher with the statistics of the features."""
    import torch

    from models.backbones.device import pick_device
    from models.speech_lm.features import clip_features
    from models.speech_lm.model import SpeechLM, SpeechLMConfig

    parts = [name for name in ("teacher", "distill", "dev", "test") if (context.folders["corpus"] / f"{name}.jsonl").exists()]
    examples = {name: read_items(context, name) for name in parts}
    torch.manual_seed(context.settings.seed)
    model = SpeechLM.from_config(SpeechLMConfig(**backbone_settings(context.settings))).to(pick_device(context.settings.device))
    everything = [e for part in examples.values() for e in part]
    store, heard = clip_features(model, everything, audio_root=context.folders["corpus"])
    store.save(context.folder / "features.safetensors")
    usable = [e for e in examples["teacher"] if e in store]
    model.fit_feature_statistics(store.rows(usable))
    model.save_pretrained(context.folder / "untrained")
    return {"clips": len(store), "skipped": len(everything) - len(heard)}


def run_student_lm(context: Context) -> dict[str, Any]:
    """Make the student's language model from the texts of the training items."""
    items = read_items(context, "teacher") + read_items(context, "distill")
    folder = heal_student_lm(context, items, seed=context.settings.seed)
    return {"healing": json.loads((folder / "healing.json").read_text())["report"]}


def heal_student_lm(context: Context, items: Sequence[Any], *, seed: int) -> Path:
    """Drop layers, train the rest on the items' texts, and save it as "untrained", with an untrained connector.

    Returns the folder of the healed language model.
    """
    import torch

    from models.backbones.healing import healed_student, healing_texts
    from models.backbones.healing_config import HealingConfig
    from models.speech_lm.model import SpeechLM, SpeechLMConfig

    settings = context.settings
    backbone = backbone_settings(settings)
    texts = healing_texts(items, seed=seed)
    held_out = min(64, len(texts) // 4)
    folder = healed_student(
        backbone["lm"],
        texts,
        keep_layers=settings.keep_layers,
        config=HealingConfig(steps=settings.healing_steps, held_out=held_out, batch_size=min(8, len(texts) - held_out)),
    )
    torch.manual_seed(seed)
    SpeechLM.from_config(SpeechLMConfig(**{**backbone, "lm": str(folder)})).save_pretrained(context.folder / "untrained")
    return folder


def read_items(context: Context, name: str, *, folder: Path | None = None) -> list[Any]:
    """The examples of NAME.jsonl in `folder`, by default the folder of the stage "corpus". The clips are always there."""
    from models.data.manifest import read_manifest

    corpus = context.folders["corpus"]
    return list(read_manifest((folder or corpus) / f"{name}.jsonl", audio_root=corpus, check_audio=False).examples)


def write_parts(folder: Path, parts: dict[str, Sequence[Any]]) -> dict[str, int]:
    """Write NAME.jsonl of each part and return the number of its examples.

    The targets are the true answers as sentences; the parts "dev" and "test" have none.
    """
    from models.data.manifest import write_manifest
    from models.data.prompts import target_template

    for name, examples in parts.items():
        if name not in ("dev", "test"):
            examples = [dataclasses.replace(e, target=target_template(e, e.answer), target_source="template") for e in examples]
        write_manifest(folder / f"{name}.jsonl", examples)
    return {name: len(examples) for name, examples in parts.items()}


def four_parts(manifest: Any, clips: int | None) -> dict[str, list[Any]]:
    """The examples for the teacher's training, for distillation, dev and test, each of at most `clips` clips; None = all."""
    parts = {
        "teacher": manifest.select(split="train", pool="teacher"),
        "distill": manifest.select(split="train", pool="distill"),
        "dev": manifest.select(split="dev"),
        "test": manifest.select(split="test"),
    }
    return {name: limited(examples, clips) for name, examples in parts.items()}


def interval_words(low: Any, high: Any, kind: str = "95%") -> str:
    """The interval of a difference in points; None and "", as tables have it, are no interval."""
    return "no interval" if low in (None, "") else f"{kind} {100 * low:+.1f} to {100 * high:+.1f}"


def limited(examples: Sequence[Any], clips: int | None) -> list[Any]:
    """The examples of at most `clips` clips, with tasks and answers in turn; None = all examples."""
    if clips is None:
        return list(examples)
    groups: dict[tuple[str, str | None], list[str]] = {}
    for e in examples:
        names = groups.setdefault((e.task, e.answer), [])
        if e.audio not in names:
            names.append(e.audio)
    turns = [name for group in zip(*groups.values(), strict=False) for name in group]
    chosen = set(turns[:clips])
    return [e for e in examples if e.audio in chosen]


def load_model(context: Context, folder: Path) -> Any:
    """A trained model on its device. On a CPU with fast bfloat16 its products use that."""
    from models.backbones.device import pick_device
    from models.speech_lm.frozen_linear import use_bf16_products
    from models.speech_lm.model import SpeechLM

    model = SpeechLM.from_pretrained(folder).to(pick_device(context.settings.device)).eval()
    if multiplies_bf16(context.settings):
        use_bf16_products(model.lm.get_decoder())
    return model


def load_speech_lm(context: Context, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The model of `load_model`, the features, and the model's prefix cache as extra inputs."""
    from models.speech_lm.features import FeatureStore

    model = load_model(context, folder)
    store = FeatureStore.load(context.folders["features"] / "features.safetensors")
    return model, store, model.prefix_inputs()


def recipe_words(context: Context, *, manifest: Path, folder: Path, out_dir: Path, words: Sequence[str]) -> list[str]:
    """The key=value words for the recipe of a training: data, model, run, and `words` after them."""
    settings = context.settings
    return [
        f"data.manifest={manifest}",
        f"data.audio_root={context.folders['corpus']}",
        f"data.features={context.folders['features'] / 'features.safetensors'}",
        f"model.folder={folder}",
        f"optim.batch_examples={settings.batch_examples}",
        f"run.out_dir={out_dir}",
        f"run.seed={settings.seed}",
        f"run.device={settings.device}",
        f"model.bf16_products={str(multiplies_bf16(settings)).lower()}",
        "run.resume=auto",
        *words,
    ]


def step_words(steps: int, learning_rate: float) -> list[str]:
    """The key=value words for the length of a training and its learning rate."""
    return [f"optim.steps={steps}", f"optim.learning_rate={learning_rate}"]


def own_start_words(context: Context) -> list[str]:
    """Each seed starts with connector weights of its own. The statistics of the features come from the teacher's clips."""
    return ["model.fresh_connector=true", f"model.feature_statistics={context.folders['features'] / 'untrained'}"]


def train_supervised(
    context: Context, *, words: Sequence[str], manifest: Path | None = None, start: Path | None = None
) -> None:
    """Train a model on targets alone, in the folder of the stage. One clip in ten is masked.

    Args:
        words: key=value words after those of every training.
        manifest: default: the teacher's part of the corpus.
        start: SpeechLM folder; default: the untrained teacher.
    """
    train_by_recipe(
        context,
        "sft_teacher",
        manifest=manifest or context.folders["corpus"] / "teacher.jsonl",
        folder=start or context.folders["features"] / "untrained",
        words=words,
    )


def train_by_recipe(context: Context, recipe: str, *, manifest: Path, folder: Path, words: Sequence[str]) -> None:
    """Train the SpeechLM in `folder` by a recipe of models/training/recipes, in the folder of the stage."""
    from models.training.train import main

    all_words = recipe_words(context, manifest=manifest, folder=folder, out_dir=context.folder, words=words)
    check_status("train", main([recipe, *all_words]))


def ask(context: Context, folder: Path, *, part: str = "test", **options: Any) -> dict[str, Any]:
    """Ask the SpeechLM in `folder` the questions of `part`; see `ask_model`."""
    model, store, extra = load_speech_lm(context, folder)
    questions = [e for e in read_items(context, part) if e in store]
    return ask_model(context.folder, model, questions, store, extra, part=part, **options)


def ask_model(
    out: Path,
    model: Any,
    questions: Sequence[Any],
    store: Any,
    extra: dict[str, Any],
    *,
    part: str = "test",
    alphas: Sequence[float | None] = (None,),
    kinds: Sequence[str] = (),
    tasks: Sequence[str] = (),
    controls: bool = True,
) -> dict[str, Any]:
    """Ask the questions, and the neutral ones with both controls as well. Save the predictions for tables and reports.

    Args:
        out: folder of the predictions, which `predictions_name` names.
        questions: examples whose clips are in `store`.
        extra: further inputs of every batch, such as the prefix cache.
        alphas: None = greedy decoding, a number = contrastive decoding.
        kinds, tasks: those of the questions to ask; empty = all.
        controls: also ask without the audio, and with the audio of another clip.
    """
    from models.evaluation.ask import evaluate
    from models.evaluation.predictions import append_predictions, context_kind, write_header

    asked = [e for e in questions if (not kinds or context_kind(e) in kinds) and (not tasks or e.task in tasks)]
    options = {"collate": model.make_collator(), "extra_inputs": extra}
    answers = evaluate(model, asked, store, alphas=alphas, **options)
    if controls:
        neutral = [e for e in asked if e.kind == "neutral"]
        options |= {"controls": ("no_audio", "swapped_audio"), "plain": False}
        answers[None] += evaluate(model, neutral, store, **options)[None]
    for alpha, predictions in answers.items():
        path = out / predictions_name(part, alpha)
        write_header(path, {"alpha": alpha, "split": part, "mode": "choice"}, questions=len(predictions))
        append_predictions(path, predictions)
    return {"answers": {str(alpha): len(predictions) for alpha, predictions in answers.items()}}


def predictions_name(part: str, alpha: float | None = None) -> str:
    """The file of the predictions that `ask_model` writes."""
    return f"{part}-greedy.jsonl" if alpha is None else f"{part}-contrastive{alpha:g}.jsonl"


def write_answered_pool(
    path: Path, model: Any, store: Any, extra: dict[str, Any], examples: Sequence[Any], *, hears: Any = None
) -> dict[str, Any]:
    """Write a manifest of `examples` with the model's own answers as targets.

    Args:
        model, store, extra: as `load_speech_lm` returns them.
        hears: a `models.corpora.hearing.Hearing` for the model's prompts; None = as they are.

    Returns:
        the number of answers, and the share of right answers by context.
    """
    from models.corpora.hearing import PLAIN
    from models.data.manifest import write_manifest
    from models.evaluation.ask import evaluate
    from models.evaluation.scoring import judge

    options = {"collate": model.make_collator(), "extra_inputs": extra, "hears": hears or PLAIN}
    answers = evaluate(model, examples, store, **options)[None]
    texts = {p.id: p.prediction for p in answers}
    write_manifest(path, [dataclasses.replace(e, target=texts[e.id], target_source="teacher") for e in examples])
    by_kind: dict[str, list[bool]] = {}
    for prediction, right in zip(answers, judge(answers), strict=True):
        by_kind.setdefault(prediction.kind, []).append(bool(right))
    return {"pool": len(answers), "pseudo_label_accuracy": {k: sum(v) / len(v) for k, v in by_kind.items()}}


def write_stage_1_pool(context: Context, examples: Sequence[Any]) -> dict[str, Any]:
    """Write pool.jsonl with what the text backbone writes from the metadata. Rejected outputs are left out and counted."""
    from models.data.manifest import read_manifest, write_manifest

    # Paths of clips are relative to a manifest, so it is written beside the corpus.
    told = context.folders["corpus"] / f"{context.folder.name}.jsonl"
    asked = told.with_suffix(".asked.jsonl")
    write_manifest(asked, [dataclasses.replace(e, target=None, target_source=None) for e in examples])
    words = [str(asked), "--source", "text_backbone", "--backbone", context.settings.lm]
    write_pseudo_gt([*words, "--audio-root", str(context.folders["corpus"])], told)
    written = [e for e in read_manifest(told, check_audio=False).examples if (e.target or "").strip()]
    write_manifest(context.folder / "pool.jsonl", written)
    return {"rejected": len(examples) - len(written)}


def write_pseudo_gt(words: Sequence[str], out: Path) -> None:
    """Run `pseudo-gt` with `words`. `out` lies beside the corpus and outlives the stage's folder. So what an earlier version has
    finished there is written again; a run that was stopped goes on."""
    from models.pseudo_gt.stage1 import journal_path, main

    restart = ["--restart"] if out.exists() and not journal_path(out).exists() else []
    check_status("pseudo-gt", main([*words, "--out", str(out), *restart]))


def write_cache(
    folder: Path, teacher: Path, model: Any, store: Any, extra: dict[str, Any], examples: Sequence[Any], *, hears: Any = None
) -> None:
    """Store both paths of `model` over the targets of `examples` in a ContrastCache (float32).

    Args:
        teacher: the folder of `model`.
        hears: a `models.corpora.hearing.Hearing`; None = the prompts as they are.
    """
    import torch

    from models.corpora.hearing import PLAIN
    from models.training.cache_identity import teacher_fingerprint
    from models.training.fill_cache import fill_cache

    hears = hears or PLAIN
    made_from = teacher_fingerprint(teacher, hears=hears)
    options = {"made_from": made_from, "extra_inputs": extra, "dtype": torch.float32, "hears": hears}
    fill_cache(folder, model, store, examples, **options)


def backbone_settings(settings: Any) -> dict[str, Any]:
    """The fields of `SpeechLMConfig` that name language model and encoder."""
    if not settings.tiny_backbones:
        return {"lm": settings.lm, "encoder": settings.encoder}
    folder = make_tiny_backbones(cache_dir() / "demo" / "tiny-backbones")
    return {"lm": str(folder / "lm"), "encoder": str(folder / "encoder"), "encoder_layers": (1, 2), "connector_width": 32}


def make_tiny_backbones(folder: Path, *, vocab_size: int = 258) -> Path:
    """Make a random Llama of three layers with a byte-level tokenizer, and a random Whisper encoder, in `folder`.

    Args:
        vocab_size: rows of the LM head. The tokenizer has 258 tokens; further rows have no token.
    """
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
            vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
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


def multiplies_bf16(settings: Any) -> bool:
    """Whether products use bfloat16: on a CPU where that is fast. A step of the demo then takes two thirds of the time."""
    from models.backbones.device import has_fast_bfloat16, pick_device

    device = pick_device(settings.device)
    return device.type == "cpu" and has_fast_bfloat16(device)


def print_scores(
    console: Console, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, title: str, latency: bool = False
) -> None:
    """Print the mean of each column over seeds, in %, with the standard deviation, in a row for each system.

    Columns task_NAME stand there as NAME and without a deviation, which would make the table too wide.

    Args:
        rows: with "system", "label" and the columns, one for each system and seed; "" = not measured.
        latency: add the column "latency_ms" of the first seed.
    """
    table = Table(title=title)
    table.add_column("system", no_wrap=True)
    for column in (*columns, *(["ms"] if latency else [])):
        table.add_column(column.removeprefix("task_"), justify="right", no_wrap=True)
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        cells = []
        for column in columns:
            values = [100 * row[column] for row in own if row[column] != ""]
            spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 and not column.startswith("task_") else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        if latency:
            cells.append(f"{own[0]['latency_ms']:.0f}")
        table.add_row(own[0]["label"], *cells)
    console.print(table)


def print_sentences(console: Console, sentences: Sequence[str], *, smoke: bool) -> list[str]:
    """Print what came out, and return it. A smoke run says first that its numbers mean nothing."""
    if smoke:
        sentences = ["Smoke run: random models, the numbers mean nothing.", *sentences]
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)
    return list(sentences)
