"""Tiny random audio LMs of transformers' real classes with their real processors, as folders that look like checkpoints."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from tests.kdkernels import tiny_lms

RATE = 16_000
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>",
    "<|vision_bos|>", "<|vision_eos|>",
]  # fmt: skip
TOKENS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(SPECIAL) + len(TOKENS)
ID = {token: number for number, token in enumerate(SPECIAL)}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """One token a byte, and the special tokens of the Qwen family."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + TOKENS)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "audio", "video")}
    names |= {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    names |= {"turn_start_token": SPECIAL[1], "turn_end_token": SPECIAL[2]}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=SPECIAL[0], pad_token=SPECIAL[0], extra_special_tokens=names
    )


def whisper_extractor(seconds: int = 1) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)


def _save(folder: Path, model: nn.Module, *parts: Any, processor: str, **settings: Any) -> Path:
    """A checkpoint's folder: weights, tokenizer, chat template, and the processor's settings with its `parts`."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for part in parts:
        part.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor, **settings}))
    return folder


def _wide(model_class: Any, config: Any, seed: int) -> nn.Module:
    """Random weights, wide enough that the sound changes what the model answers."""
    torch.manual_seed(seed)
    return tiny_lms._finished(model_class(config))


def _hears(config: Any, *, width: int, layers: int) -> Any:
    """Text sizes and placeholder ids of the tokenizer above, and a window of one second of 80 mel bands."""
    text = config.get_text_config()
    text.vocab_size, text.hidden_size, text.num_hidden_layers, text.pad_token_id = VOCABULARY, width, layers, None
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0]] * layers
    return config


def qwen2_audio(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    from transformers import Qwen2AudioForConditionalGeneration

    config = _hears(tiny_lms.qwen2_audio()[0].config, width=width, layers=layers)
    config.audio_config.num_mel_bins, config.audio_config.max_source_positions = 80, 50
    config.audio_token_id = ID["<|AUDIO|>"]
    model = _wide(Qwen2AudioForConditionalGeneration, config, seed)
    return _save(folder, model, whisper_extractor(), processor="Qwen2AudioProcessor")


def qwen2_5_omni(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    config = _hears(tiny_lms.omni_thinker()[0].config, width=width, layers=layers)
    config.audio_config.num_mel_bins, config.audio_config.max_source_positions = 80, 50
    config.audio_config.output_dim = config.vision_config.out_hidden_size = width
    config.get_text_config().rope_parameters["mrope_section"] = [1, 1, width // 8 - 2]
    for name, token in OMNI_TOKENS.items():
        setattr(config, name, ID[token])
    model = _wide(Qwen2_5OmniThinkerForConditionalGeneration, config, seed)
    return _save(folder, model, whisper_extractor(), processor="Qwen2_5OmniProcessor")


OMNI_TOKENS = {
    "audio_token_id": "<|AUDIO|>", "image_token_id": "<|IMAGE|>", "video_token_id": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>",
}  # fmt: skip


def qwen3_omni(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    audio = {
        "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "num_mel_bins": 80,
        "max_source_positions": 50, "n_window": 50, "n_window_infer": 100, "output_dim": width, "downsample_hidden_size": 8,
    }  # fmt: skip
    text = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = Qwen3OmniMoeThinkerConfig(
        audio_config=audio, text_config=text, vision_config=vision, **{name: ID[token] for name, token in OMNI_TOKENS.items()}
    )
    model = _wide(Qwen3OmniMoeThinkerForConditionalGeneration, config, seed)
    return _save(folder, model, whisper_extractor(), processor="Qwen3OmniMoeProcessor")


def granite_speech(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    pytest.importorskip("torchaudio", reason="Granite Speech's features are torchaudio's")
    from transformers import GraniteSpeechFeatureExtractor, GraniteSpeechForConditionalGeneration

    config = _hears(tiny_lms.granite_speech()[0].config, width=width, layers=layers)
    config.encoder_config.input_dim = 160
    config.window_size, config.downsample_rate = 15, 5
    config.audio_token_id = config.audio_token_index = ID["<|AUDIO|>"]
    model = _wide(GraniteSpeechForConditionalGeneration, config, seed)
    return _save(folder, model, GraniteSpeechFeatureExtractor(), processor="GraniteSpeechProcessor", audio_token="<|AUDIO|>")


def audio_flamingo(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    from transformers import AudioFlamingo3ForConditionalGeneration

    config = _hears(tiny_lms.audio_flamingo3()[0].config, width=width, layers=layers)
    config.audio_config.num_mel_bins, config.audio_config.max_source_positions = 80, 50
    config.audio_token_id = ID["<|AUDIO|>"]
    model = _wide(AudioFlamingo3ForConditionalGeneration, config, seed)
    with torch.no_grad():
        model.lm_head.weight[ID["<|AUDIO|>"]] = 0  # it refuses audio tokens without audio, so it must not write them
    return _save(folder, model, whisper_extractor(), processor="AudioFlamingo3Processor", audio_token="<|AUDIO|>")


def glm_asr(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    from transformers import GlmAsrForConditionalGeneration

    config = _hears(tiny_lms.glm_asr()[0].config, width=width, layers=layers)
    config.audio_config.num_mel_bins, config.audio_config.max_position_embeddings = 80, 100
    config.audio_token_id = ID["<|AUDIO|>"]
    model = _wide(GlmAsrForConditionalGeneration, config, seed)
    return _save(folder, model, whisper_extractor(seconds=2), processor="GlmAsrProcessor", audio_token="<|AUDIO|>")


def phi4_multimodal(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalForCausalLM

    config = _hears(tiny_lms.phi4_multimodal()[0].config, width=width, layers=layers)
    audio = config.audio_config.to_dict() | {"input_size": 80, "audio_token_id": ID["<|AUDIO|>"]}
    config.audio_config = type(config.audio_config)(**{k: v for k, v in audio.items() if k != "nemo_final_size"})
    config.vision_config.image_token_id = ID["<|IMAGE|>"]
    model = _wide(Phi4MultimodalForCausalLM, config, seed)
    return _save(folder, model, Phi4MultimodalFeatureExtractor(), processor="Phi4MultimodalProcessor")


def voxtral(folder: Path, *, seed: int = 0, width: int = 32, layers: int = 2) -> Path:
    pytest.importorskip("mistral_common", reason="Voxtral's tokenizer is mistral-common's")
    from transformers import VoxtralForConditionalGeneration, WhisperFeatureExtractor

    config = _hears(tiny_lms.voxtral()[0].config, width=width, layers=layers)
    config.audio_config.num_mel_bins, config.audio_config.max_source_positions = 80, 1500
    config.audio_token_id = 24
    config.get_text_config().vocab_size = _tekken()["config"]["default_vocab_size"]
    model = _wide(VoxtralForConditionalGeneration, config, seed)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "VoxtralProcessor"}))
    (folder / "tekken.json").write_text(json.dumps(_tekken()))
    return folder


def _tekken() -> dict[str, Any]:
    """mistral-common's own format: one token a byte, the control tokens of Voxtral, and its encoding of audio."""
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    names = [token.value for token in SpecialTokens if token.value != "[AUDIO]"]
    names.insert(24, "[AUDIO]")  # where VoxtralProcessor looks for it
    special = [{"rank": n, "token_str": name, "is_control": True} for n, name in enumerate(names)]
    vocabulary = [
        {"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None} for n in range(256)
    ]
    return {
        "config": {
            "pattern": r"\s+|\S+", "num_vocab_tokens": 256, "default_vocab_size": 256 + len(special),
            "default_num_special_tokens": len(special), "version": "v7",
        },
        "vocab": vocabulary,
        "special_tokens": special,
        "audio": {
            "sampling_rate": RATE, "frame_rate": 12.5, "chunk_length_s": 30.0,
            "audio_encoding_config": {"num_mel_bins": 80, "hop_length": 160, "window_size": 400},
        },
    }  # fmt: skip


FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen2_audio": qwen2_audio,
    "qwen2_5_omni": qwen2_5_omni,
    "qwen3_omni": qwen3_omni,
    "voxtral": voxtral,
    "granite_speech": granite_speech,
    "audio_flamingo": audio_flamingo,
    "phi4_multimodal": phi4_multimodal,
    "glm_asr": glm_asr,
}


def tone(hertz: float, *, seconds: float = 0.6, seed: int = 0) -> np.ndarray:
    """A tone in noise, float32 at 16 kHz."""
    times = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(times))
    return (0.3 * np.sin(2 * np.pi * hertz * times) + 0.05 * noise).astype(np.float32)
