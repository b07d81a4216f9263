"""What the stages of several pipelines do: backbones, features, the student's language model, training, asking.

Each `run_*` is the function of a stage (models/experiments/pipeline.py); settings need the fields that it names, as
`models.experiments.demo.DemoSettings` has them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.experiments.pipeline import Context, check_status
from models.io_utils import cache_dir


def run_backbones(context: Context) -> dict[str, Any]:
    """Language model and encoder: found or fetched here, once, and not by several stages at the same time."""
    from models.backbones.resolve import BackboneError, resolve_backbone

    ids = backbone_settings(context.settings)
    try:
        found = [resolve_backbone(ids["lm"], kind="causal_lm"), resolve_backbone(ids["encoder"], kind="speech_encoder")]
    except BackboneError as error:
        raise SystemExit(str(error)) from error
    return {b.kind: {"id": b.spec, "from": b.source, "sha256": b.sha256()} for b in found}


def run_features(context: Context) -> dict[str, Any]:
    """Every clip through the frozen encoder, once; and the untrained teacher with the features' statistics."""
    import torch

    from models.backbones.device import pick_device
    from models.speech_lm.features import extract_features
    from models.speech_lm.model import SpeechLM, SpeechLMConfig

    parts = [name for name in ("teacher", "distill", "dev", "test") if (context.folders["corpus"] / f"{name}.jsonl").exists()]
    examples = {name: read_items(context, name) for name in parts}
    torch.manual_seed(context.settings.seed)
    model = SpeechLM.from_config(SpeechLMConfig(**backbone_settings(context.settings))).to(pick_device(context.settings.device))
    store, problems = extract_features(
        [e for part in examples.values() for e in part], model.encode_audio, audio_root=context.folders["corpus"]
    )
    store.save(context.folder / "features.safetensors")
    usable = [e for e in examples["teacher"] if e in store]
    model.fit_feature_statistics(store.rows(usable))
    model.save_pretrained(context.folder / "untrained")
    return {"clips": len(store), "skipped": [list(p) for p in problems]}


def run_student_lm(context: Context) -> dict[str, Any]:
    """The student's language model: layers dropped, then healed on text; with an untrained connector."""
    import torch

    from models.backbones.healing import healed_student, healing_texts
    from models.backbones.healing_config import HealingConfig
    from models.speech_lm.model import SpeechLM, SpeechLMConfig

    settings = context.settings
    backbone = backbone_settings(settings)
    texts = healing_texts(read_items(context, "teacher") + read_items(context, "distill"), seed=settings.seed)
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


def read_items(context: Context, name: str, *, folder: Path | None = None) -> list[Any]:
    """Examples of NAME.jsonl in `folder`, by default that of the stage "corpus", where the clips are."""
    from models.data.manifest import read_manifest

    corpus = context.folders["corpus"]
    return list(read_manifest((folder or corpus) / f"{name}.jsonl", audio_root=corpus, check_audio=False).examples)


def write_parts(folder: Path, parts: dict[str, Sequence[Any]]) -> dict[str, int]:
    """NAME.jsonl of each part, with the true answers as sentences for targets in all but "dev" and "test"; counts by part."""
    from models.data.manifest import write_manifest
    from models.data.prompts import target_template

    for name, examples in parts.items():
        if name not in ("dev", "test"):
            examples = [dataclasses.replace(e, target=target_template(e, e.answer), target_source="template") for e in examples]
        write_manifest(folder / f"{name}.jsonl", examples)
    return {name: len(examples) for name, examples in parts.items()}


def limited(examples: Sequence[Any], clips: int | None) -> list[Any]:
    """Examples of the first `clips` clips, tasks and answers in turn; all where there is no limit."""
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
    """A trained model on its device, its products in the precision that is fast there."""
    from models.backbones.device import pick_device
    from models.speech_lm.frozen_linear import use_bf16_products
    from models.speech_lm.model import SpeechLM

    model = SpeechLM.from_pretrained(folder).to(pick_device(context.settings.device)).eval()
    if multiplies_bf16(context.settings):
        use_bf16_products(model.lm.get_decoder())
    return model


def load_speech_lm(context: Context, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """`load_model`, the features, and the model's prefix cache as extra inputs."""
    from models.speech_lm.features import FeatureStore

    model = load_model(context, folder)
    store = FeatureStore.load(context.folders["features"] / "features.safetensors")
    return model, store, {"prefix_cache": model.make_prefix_cache()}


def recipe_words(context: Context, *, manifest: Path, folder: Path, out_dir: Path, words: Sequence[str]) -> list[str]:
    """What the recipe of a stage's training is told: data, model, run, and `words` after them."""
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


def train_by_recipe(context: Context, recipe: str, *, manifest: Path, folder: Path, words: list[str]) -> None:
    from models.training.train import main

    all_words = recipe_words(context, manifest=manifest, folder=folder, out_dir=context.folder, words=words)
    check_status("models.training.train", main([recipe, *all_words]))


def ask(context: Context, folder: Path, *, part: str = "test", **options: Any) -> dict[str, Any]:
    """The questions of `part` to the SpeechLM in `folder`; see `ask_model`."""
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
    controls: bool = True,
) -> dict[str, Any]:
    """Questions, and the two controls on the neutral ones. Predictions are saved for tables and reports.

    Args:
        out: folder of the predictions, PART-greedy.jsonl and PART-contrastiveALPHA.jsonl.
        questions: examples whose clips are in `store`.
        extra: added to every batch's inputs, such as the prefix cache.
        alphas: None = greedily, a number = by contrastive decoding.
        kinds: of the questions; empty = all.
    """
    from models.evaluation.ask import evaluate
    from models.evaluation.predictions import append_predictions, write_header

    asked = [e for e in questions if not kinds or e.kind in kinds]
    options = {"collate": model.make_collator(), "extra_inputs": extra}
    answers = evaluate(model, asked, store, alphas=alphas, **options)
    if controls:
        neutral = [e for e in asked if e.kind == "neutral"]
        options |= {"controls": ("no_audio", "swapped_audio"), "plain": False}
        answers[None] += evaluate(model, neutral, store, **options)[None]
    for alpha, predictions in answers.items():
        path = out / f"{part}-{'greedy' if alpha is None else f'contrastive{alpha:g}'}.jsonl"
        write_header(path, {"alpha": alpha, "split": part, "mode": "choice"})
        append_predictions(path, predictions)
    return {"answers": {str(alpha): len(predictions) for alpha, predictions in answers.items()}}


def write_answered_pool(path: Path, model: Any, store: Any, extra: dict[str, Any], examples: Sequence[Any]) -> dict[str, Any]:
    """A manifest of `examples` with the model's own answers as their targets: pseudo ground truth that it has heard itself.

    Args:
        model, store, extra: as `load_speech_lm` returns them.

    Returns:
        how many there are, and how often the answers are right, by context.
    """
    from models.data.manifest import write_manifest
    from models.evaluation.ask import evaluate
    from models.evaluation.scoring import judge

    answers = evaluate(model, examples, store, collate=model.make_collator(), extra_inputs=extra)[None]
    texts = {p.id: p.prediction for p in answers}
    write_manifest(path, [dataclasses.replace(e, target=texts[e.id], target_source="teacher") for e in examples])
    by_kind: dict[str, list[bool]] = {}
    for prediction, right in zip(answers, judge(answers), strict=True):
        by_kind.setdefault(prediction.kind, []).append(bool(right))
    return {"pool": len(answers), "pseudo_label_accuracy": {k: sum(v) / len(v) for k, v in by_kind.items()}}


def write_cache(
    folder: Path, teacher: Path, model: Any, store: Any, extra: dict[str, Any], examples: Sequence[Any]
) -> None:
    """Both paths of `model`, loaded from the folder `teacher`, over the targets of `examples` into a ContrastCache (float32)."""
    import torch

    from models.training.cache_identity import teacher_fingerprint
    from models.training.fill_cache import fill_cache

    made_from = teacher_fingerprint(teacher)
    fill_cache(folder, model, store, examples, made_from=made_from, extra_inputs=extra, dtype=torch.float32)


def backbone_settings(settings: Any) -> dict[str, Any]:
    if not settings.tiny_backbones:
        return {"lm": settings.lm, "encoder": settings.encoder}
    folder = make_tiny_backbones(cache_dir() / "demo" / "tiny-backbones")
    return {"lm": str(folder / "lm"), "encoder": str(folder / "encoder"), "encoder_layers": (1, 2), "connector_width": 32}


def make_tiny_backbones(folder: Path, *, vocab_size: int = 258) -> Path:
    """A random Llama of three layers with a byte-level tokenizer and a random Whisper encoder: shape, not skill.

    Args:
        vocab_size: rows of the LM head; above the tokenizer's 258 they have no token.
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
    """Short products where the processor has them: the demo's steps then take two thirds of the time."""
    from models.backbones.device import has_fast_bfloat16, pick_device

    device = pick_device(settings.device)
    return device.type == "cpu" and has_fast_bfloat16(device)


