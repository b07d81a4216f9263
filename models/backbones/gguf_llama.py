"""A GGUF file with a Llama or a Qwen2 inside, turned into a model of transformers and a fast tokenizer.

transformers can read GGUF too (`gguf_file=`), but it needs accelerate, and the model keeps a quantization_config that
stops it from being saved. It also loses two properties of the tokenizer: which tokens are special, and that every digit
is a token. The weights read here equal those that transformers reads, bit for bit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from models.backbones.ct2_whisper import misfit

_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight"}  # fmt: skip
# Architecture -> names of transformers' configuration and model. Qwen2 also has biases for queries, keys and values.
_ARCHITECTURES = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM")}
_BIASED = ("attn_q", "attn_k", "attn_v")
# How Qwen2 splits text before its byte pairs: as transformers' Qwen2TokenizerFast does.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_LAYERS = 1000
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class GgufFormatError(ValueError):
    """The file is not a GGUF with a model of the kinds read here, or it is damaged; the message names it."""


def load_gguf_llama(path: str | os.PathLike[str]):
    """Read model and tokenizer from a GGUF file.

    Args:
        path: a GGUF file of architecture "llama" or "qwen2" with a byte-level BPE tokenizer ("gpt2").

    Returns:
        (LlamaForCausalLM or Qwen2ForCausalLM in fp32 with dequantised weights, PreTrainedTokenizerFast)

    Raises:
        ImportError: the package `gguf` is missing.
        FileNotFoundError: no such file.
        GgufFormatError: another architecture or tokenizer, tensors that do not fit the configuration, or a damaged file.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the package gguf: pip install gguf") from error
    label = Path(path).name
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        architecture = fields.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise GgufFormatError(f"{label}: expected the architecture {' or '.join(_ARCHITECTURES)}, got {architecture!r}")
        return _build_model(reader.tensors, fields, label), _build_tokenizer(fields, label)
    except (GgufFormatError, FileNotFoundError):
        raise
    except Exception as error:  # the package trusts the header, and a wrong one makes it fail in many ways
        raise GgufFormatError(f"{label}: damaged ({type(error).__name__}: {str(error)[:200]})") from error


def _build_model(tensors: Any, fields: dict[str, Any], label: str):
    import transformers
    from gguf import dequantize

    kind = fields["general.architecture"]
    config_class, model_class = (getattr(transformers, name) for name in _ARCHITECTURES[kind])
    heads = fields[f"{kind}.attention.head_count"]
    key_value_heads = fields.get(f"{kind}.attention.head_count_kv", heads)
    names = {tensor.name for tensor in tensors}
    # The header's numbers decide how large the model is, so they must agree with the tensors in the file.
    depth = len({name.split(".")[1] for name in names if name.startswith("blk.")})
    if fields[f"{kind}.block_count"] != depth or depth > _MAX_LAYERS:
        said = fields[f"{kind}.block_count"]
        raise GgufFormatError(f"{label}: the header says {said} layers, the tensors are those of {depth}")
    config = config_class(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields[f"{kind}.embedding_length"],
        intermediate_size=fields[f"{kind}.feed_forward_length"],
        num_hidden_layers=fields[f"{kind}.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=fields[f"{kind}.context_length"],
        # The file stores the fp32 number nearest to the epsilon. Other configs have the decimal number itself.
        rms_norm_eps=float(f"{fields[f'{kind}.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields.get(f"{kind}.rope.freq_base", 10_000.0))},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )
    state: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if kind == "llama" and tensor.name.endswith("attn_q.weight"):
            value = _undo_rope_order(value, heads)
        elif kind == "llama" and tensor.name.endswith("attn_k.weight"):
            value = _undo_rope_order(value, key_value_heads)
        state[_rename(tensor.name, label)] = value
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if problem := misfit(lambda: model_class(config), state):
        raise GgufFormatError(f"{label}: the tensors do not fit the file's own configuration: {problem}")
    model = model_class(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _build_tokenizer(fields: dict[str, Any], label: str):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise GgufFormatError(f"{label}: expected a byte-level BPE tokenizer ('gpt2'), got {kind!r}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif fields.get("tokenizer.ggml.pre") == "qwen2":
        split = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def token_at(key: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token_at("bos"),
        eos_token=token_at("eos"),
        unk_token=token_at("unknown"),
        pad_token=token_at("padding"),
        extra_special_tokens=special,
        clean_up_tokenization_spaces=False,
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast


def _undo_rope_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of each rotary pair; transformers stores one half after the other."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _rename(name: str, label: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[3] in ("weight", "bias"):
        known = _TENSOR_NAMES if parts[3] == "weight" else _BIASED
        if parts[2] in known:
            return f"model.layers.{parts[1]}.{_TENSOR_NAMES[parts[2]]}.{parts[3]}"
    raise GgufFormatError(f"{label}: a model of this kind has no tensor {name!r}")
