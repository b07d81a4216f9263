"""Tiny causal language models of many families of transformers, with random weights: what a speech LM may be built on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NO_MAMBA_KERNEL = {"use_mamba_kernels": False}

# family: the configuration's settings beside the shape.
FAMILIES: dict[str, Mapping[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "head_dim": 8},
    "GPT2": _GPT2,
    "GPTNeoX": {},
    "GPTJ": {**_GPT2, "rotary_dim": 4},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Phi": {},
    "Phi3": {},
    "Falcon": {},
    "StableLm": {},
    "Starcoder2": {"sliding_window": None},
    "Olmo2": {},
    "Nemotron": {},
    "SmolLM3": {},
    "Mixtral": _EXPERTS,
    "HyperCLOVAX": {"logits_scaling": 0.5},
    "GptOss": {**_EXPERTS, "head_dim": 8, "sliding_window": 128},
}  # fmt: skip
# With other states than keys and values, or beside them.
HYBRIDS: dict[str, Mapping[str, Any]] = {
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
                 "mamba_chunk_size": 16, "head_dim": 8, "lm_head_multiplier": 0.5},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2,
                  "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
                  "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "Jamba": {**_NO_MAMBA_KERNEL, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
    "Mamba": {"state_size": 8, **_NO_MAMBA_KERNEL},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16, "attn_layer_indices": [1]},
}  # fmt: skip


def make_family(name: str, vocab_size: int, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model of the family `name`, its weights large enough to make tokens matter."""
    torch.manual_seed(seed)
    settings = {**_SHAPE, **(FAMILIES | HYBRIDS)[name], **changes, "vocab_size": vocab_size}
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    model_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "A_log" not in key:
                parameter.normal_(std=0.15)
    return model.eval()
