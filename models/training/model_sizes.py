"""How large a model is, by its config alone: the model is built on torch's meta device, where weights have shapes and no memory.

A config is looked for in a folder, then in the table of published sizes below, then in the hub's cache on this disk.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdkernels.head_layers import head_module
from kdkernels.layer_states import decoder_layers
from models.audio_lms.family import AudioLMError, Family, matches
from models.audio_lms.model import gets_lora, model_class_of
from models.audio_lms.settings import Lora


class UnknownSizeError(RuntimeError):
    """No config of a model is at hand; the message lists the places that were tried."""


def _qwen_omni(width: int, layers: int, heads: int, kv: int, mlp: int, vocab: int) -> dict[str, Any]:
    text = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": mlp, "vocab_size": vocab,
    }  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": width}
    return {
        "model_type": "qwen2_5_omni_thinker", "text_config": text, "audio_config": {"output_dim": width}, "vision_config": vision,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _decoder(kind: str, width: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": mlp, "vocab_size": vocab, **more,
    }  # fmt: skip


def _whisper(width: int, layers: int, heads: int, mels: int = 80) -> dict[str, Any]:
    return {
        "model_type": "whisper", "d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width, "num_mel_bins": mels,
    }  # fmt: skip


# Of the models that the shipped recipes and their comments name, from the published configs.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Omni-7B": _qwen_omni(3584, 28, 28, 4, 18_944, 152_064),
    "Qwen/Qwen2.5-Omni-3B": _qwen_omni(2048, 36, 16, 2, 11_008, 151_936),
    "Qwen/Qwen2-Audio-7B-Instruct": {
        "model_type": "qwen2_audio",
        "text_config": _decoder("qwen2", 4096, 32, 32, 32, 11_008, 156_032),
    },
    "Qwen/Qwen3-8B": _decoder("qwen3", 4096, 36, 32, 8, 12_288, 151_936, tie_word_embeddings=False),
    "Qwen/Qwen2.5-1.5B-Instruct": _decoder("qwen2", 1536, 28, 12, 2, 8_960, 151_936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": _decoder("qwen2", 3584, 28, 28, 4, 18_944, 152_064, tie_word_embeddings=False),
    "meta-llama/Llama-3.2-1B-Instruct": _decoder("llama", 2048, 16, 32, 8, 8_192, 128_256, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B-Instruct": _decoder("llama", 3072, 28, 24, 8, 8_192, 128_256, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B-Instruct": _decoder("llama", 4096, 32, 32, 8, 14_336, 128_256),
    "google/gemma-3-1b-it": _decoder("gemma3_text", 1152, 26, 4, 1, 6_912, 262_144, head_dim=256),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _decoder("llama", 576, 30, 9, 3, 1_536, 49_152, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _decoder("llama", 960, 32, 15, 5, 2_560, 49_152, tie_word_embeddings=True),
    "openai/whisper-tiny.en": _whisper(384, 4, 6),
    "openai/whisper-small": _whisper(768, 12, 12),
    "openai/whisper-medium": _whisper(1024, 24, 16),
    "openai/whisper-large-v3": _whisper(1280, 32, 20, mels=128),
}


@dataclass(frozen=True)
class Sizes:
    """Weights of a model by what they do.

    Attributes:
        name: hub id or folder.
        total: all that are loaded, shared ones once.
        body: of the language model's layers that a token goes through; of a mixture of experts those that are chosen.
        stored_body: of all of the language model's layers.
        encoder: between sound and placeholders, the connector included; 0 of a text model.
        width, layers, vocabulary: of the language model; rows of its LM head.
        mlp_width: of its widest linear layer, as activations need it.
        known_from: "config" or "table".
    """

    name: str
    total: int
    body: int
    stored_body: int
    encoder: int
    width: int
    layers: int
    vocabulary: int
    mlp_width: int
    known_from: str


def audio_lm_on_meta(spec: str) -> tuple[nn.Module, Family, str]:
    """(model without memory, its family, where its config is from) of an audio LM."""
    from models.audio_lms.families import family_of

    config, known_from = config_of(spec)
    family = family_of(config)
    with torch.device("meta"):
        return model_class_of(family)._from_config(_thinker(config), dtype=torch.bfloat16), family, known_from


def text_lm_on_meta(spec: str) -> tuple[nn.Module, str]:
    """(model without memory, where its config is from) of a causal LM."""
    from transformers import AutoModelForCausalLM

    config, known_from = config_of(spec)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=torch.bfloat16, trust_remote_code=False)
    return lm, known_from


def encoder_weights(spec: str) -> tuple[int, int, str]:
    """(weights, width, where its config is from) of a Whisper encoder."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config, known_from = config_of(spec)
    with torch.device("meta"):
        encoder = WhisperEncoder(config)
    return sum(p.numel() for p in encoder.parameters()), config.d_model, known_from


def sizes_of(name: str, lm: nn.Module, family: Family | None, known_from: str) -> Sizes:
    """Count the weights of a model, on the meta device or on any other."""
    layers = decoder_layers(lm)
    text: Any = lm.config.get_text_config()
    stored = active = 0
    chosen = getattr(text, "num_experts_per_tok", None)
    for layer in layers:
        for key, weight in layer.named_parameters():
            stored += weight.numel()
            active += weight.numel() * chosen // text.num_experts if chosen and ".experts." in f".{key}" else weight.numel()
    encoder = 0
    if family is not None:
        for key, weight in lm.named_parameters():
            reads = matches(family.language_model, key) and not matches(family.connector, key)
            encoder += 0 if reads or re.search("visual|vision|image", key) else weight.numel()
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    head = head_module(lm).weight
    return Sizes(
        name, sum(p.numel() for p in lm.parameters()), active, stored, encoder, head.shape[1], len(layers), head.shape[0],
        max((max(m.in_features, m.out_features) for m in linear), default=head.shape[1]), known_from,
    )  # fmt: skip


def trained_weights(lm: nn.Module, family: Family, trains: str, lora: Lora) -> int:
    """How many weights of an audio LM train, as `student.trains` and `student.lora` say."""
    if trains == "lora":
        linear = [m for name, m in lm.named_modules() if isinstance(m, nn.Linear) and gets_lora(name, family, lora)]
        return sum(lora.r * (m.in_features + m.out_features) for m in linear)
    wanted = f"({family.language_model}|{family.connector})" if trains == "full" else family.connector
    return sum(p.numel() for name, p in lm.named_parameters() if matches(wanted, name))


def config_of(spec: str | os.PathLike[str]) -> tuple[Any, str]:
    """(config, "config" or "table") of a hub id or folder.

    Raises:
        UnknownSizeError: none is at hand. Nothing is downloaded.
        AudioLMError: transformers does not know its kind.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    spec = os.fspath(spec)
    hub_id, _, revision = spec.partition("@")
    known = KNOWN.get(hub_id)
    local = (Path(spec).expanduser() / "config.json").is_file()
    adapter = Path(spec).expanduser() / "adapter_config.json"
    if not local and adapter.is_file():
        return config_of(json.loads(adapter.read_text())["base_model_name_or_path"])
    if not local and known is not None:
        values = {key: value for key, value in known.items() if key != "model_type"}
        return CONFIG_MAPPING[known["model_type"]](**values), "table"
    try:
        where = Path(spec).expanduser() if local else hub_id
        return AutoConfig.from_pretrained(
            where, revision=revision or None, local_files_only=True, trust_remote_code=False
        ), "config"
    except (OSError, ValueError) as error:
        if "model type" in str(error):
            raise AudioLMError(f"{spec}: {' '.join(str(error).split())[:200]}") from None
        raise UnknownSizeError(
            f"{spec}: expected a folder with config.json, a model in the hub's cache on this disk, or one of the table "
            f"({', '.join(KNOWN)}); fetch it with python -m models backbones fetch, or name a folder"
        ) from None


def _thinker(config: Any) -> Any:
    """Of a full Omni checkpoint the part that answers in text."""
    return getattr(config, "thinker_config", config)
