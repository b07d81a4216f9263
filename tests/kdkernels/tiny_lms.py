"""Tiny, randomly initialised LMs of transformers' real classes, and inputs that fit them (CPU, under 0.2 s each).

Every factory returns (model, inputs): a model in evaluation mode and a batch of three rows whose sound matters, audio
placeholders already expanded.  Weights are drawn wide enough for the two paths and the logits' order to differ clearly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

VOCAB = 97
AUDIO_TOKEN = 90
ROWS = 3
LENGTH = 20
FIRST_AUDIO = 2

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

Inputs = dict[str, Any]


def token_ids(rows: int = ROWS, length: int = LENGTH, *, audio_tokens: int = 0) -> Tensor:
    """(rows, length) text ids below 80 with a run of audio placeholders."""
    ids = torch.randint(1, 80, (rows, length))
    ids[:, FIRST_AUDIO : FIRST_AUDIO + audio_tokens] = AUDIO_TOKEN
    return ids


def _finished(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.6 / parameter.shape[-1] ** 0.25)
    # A checkpoint's own generation settings must not reach the baseline: this one would change most greedy outputs.
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    return model.eval()


def _with_mask(ids: Tensor, **features: Tensor) -> Inputs:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}


def qwen2_audio() -> tuple[nn.Module, Inputs]:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    config = Qwen2AudioConfig(
        audio_config=audio, text_config={"model_type": "qwen2", **_TEXT}, audio_token_id=AUDIO_TOKEN
    )
    inputs = _with_mask(
        token_ids(audio_tokens=8),
        input_features=torch.randn(ROWS, 8, 32),
        feature_attention_mask=torch.ones(ROWS, 32, dtype=torch.int64),
    )
    return _finished(Qwen2AudioForConditionalGeneration(config)), inputs


def voxtral() -> tuple[nn.Module, Inputs]:
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    audio = {
        "model_type": "voxtral_encoder",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    text = {"model_type": "llama", "head_dim": 8, **_TEXT}
    config = VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_TOKEN)
    inputs = _with_mask(token_ids(audio_tokens=4), input_features=torch.randn(ROWS, 8, 32))
    return _finished(VoxtralForConditionalGeneration(config)), inputs


def granite_speech() -> tuple[nn.Module, Inputs]:
    """Its config names logits_scaling 8, its forward does not apply it."""
    from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

    encoder = {
        "model_type": "granite_speech_encoder",
        "input_dim": 10,
        "num_layers": 1,
        "hidden_dim": 32,
        "feedforward_mult": 2,
        "num_heads": 4,
        "dim_head": 8,
        "output_dim": 12,
        "context_size": 20,
        "max_pos_emb": 20,
        "dropout": 0.0,
        "conv_kernel_size": 3,
        "conv_expansion_factor": 2,
    }
    projector = {
        "model_type": "blip_2_qformer",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "encoder_hidden_size": 32,
        "cross_attention_frequency": 1,
        "max_position_embeddings": 16,
    }
    config = GraniteSpeechConfig(
        text_config={"model_type": "granite", "logits_scaling": 8.0, **_TEXT},
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=AUDIO_TOKEN,
        has_lora_adapter=False,
        window_size=6,
        downsample_rate=3,
    )
    inputs = _with_mask(
        token_ids(audio_tokens=4),
        input_features=torch.randn(ROWS, 12, 10),
        input_features_mask=torch.ones(ROWS, 4, dtype=torch.bool),
    )
    return _finished(GraniteSpeechForConditionalGeneration(config)), inputs


def add_adapter(model: nn.Module, **options: Any) -> nn.Module:
    """What transformers' model.add_adapter does, whatever version of PEFT it asks for."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    model.peft_config = {"default": peft.LoraConfig(r=2, init_lora_weights=False, **options)}
    peft.inject_adapter_in_model(model.peft_config["default"], model)
    model._hf_peft_config_loaded = True
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    return model.eval()


def granite_speech_with_adapter(**options: Any) -> tuple[nn.Module, Inputs]:
    """As its checkpoints come: with a LoRA that its own generate() turns on with audio and off without."""
    model, inputs = granite_speech()
    model.config.has_lora_adapter = True
    model.generation_config.do_sample = False
    return add_adapter(model, **options), inputs


def any_peft() -> Any:
    """Inside, transformers asks for no version of PEFT."""
    return mock.patch("transformers.integrations.peft.check_peft_version")


def text_only_generate(model: nn.Module, inputs: Inputs) -> None:
    with any_peft():
        model.generate(input_ids=inputs["input_ids"][:, 8:12], max_new_tokens=1)


def omni_thinker() -> tuple[nn.Module, Inputs]:
    """Multimodal rotary positions (3, B, L), computed by the model itself."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    audio = {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "n_window": 8,
        "output_dim": 32,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
        text_config={"rope_parameters": rope, **_TEXT},
        audio_token_index=AUDIO_TOKEN,
        image_token_index=91,
        video_token_index=92,
        audio_start_token_id=93,
        audio_end_token_id=94,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    ids = token_ids(audio_tokens=8)
    ids[:, FIRST_AUDIO - 1] = 93
    ids[:, FIRST_AUDIO + 8] = 94
    inputs = _with_mask(
        ids,
        input_features=torch.randn(ROWS, 8, 32),
        feature_attention_mask=torch.ones(ROWS, 32, dtype=torch.int64),
    )
    return _finished(Qwen2_5OmniThinkerForConditionalGeneration(config)), inputs


def phi4_multimodal() -> tuple[nn.Module, Inputs]:
    """Adds its audio to the embeddings in the decoder itself; features have a name of their own."""
    from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

    audio = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_blocks": 2,
        "num_attention_heads": 4,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 8,
        "input_size": 16,
        "audio_token_id": AUDIO_TOKEN,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "crop_size": 28,
        "image_token_id": 91,
    }
    config = Phi4MultimodalConfig(
        **_TEXT, audio_config=audio, vision_config=vision, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )
    inputs = _with_mask(
        token_ids(audio_tokens=4),
        audio_input_features=torch.randn(ROWS, 32, 16),
        audio_embed_sizes=torch.full((ROWS,), 4),
    )
    return _finished(Phi4MultimodalForCausalLM(config)), inputs


def audio_flamingo3() -> tuple[nn.Module, Inputs]:
    from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration

    audio = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    config = AudioFlamingo3Config(
        audio_config=audio, text_config={"model_type": "qwen2", **_TEXT}, audio_token_id=AUDIO_TOKEN
    )
    inputs = _with_mask(
        token_ids(audio_tokens=8),
        input_features=torch.randn(ROWS, 8, 32),
        input_features_mask=torch.ones(ROWS, 32, dtype=torch.int64),
    )
    model = _finished(AudioFlamingo3ForConditionalGeneration(config))
    with torch.no_grad():
        model.lm_head.weight[AUDIO_TOKEN] = 0  # it refuses audio tokens without audio, so it must not write them
    return model, inputs


def glm_asr() -> tuple[nn.Module, Inputs]:
    """As Ultravox is built: stacked encoder frames, an MLP, Llama; its head is tied to the embeddings."""
    from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration

    audio = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_mel_bins": 8,
        "max_position_embeddings": 16,
    }
    text = {"model_type": "llama", "bos_token_id": None, "eos_token_id": None, **_TEXT}
    config = GlmAsrConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_TOKEN)
    inputs = _with_mask(
        token_ids(audio_tokens=4),
        input_features=torch.randn(ROWS, 8, 32),
        input_features_mask=torch.ones(ROWS, 32, dtype=torch.int64),
    )
    return _finished(GlmAsrForConditionalGeneration(config)), inputs


def llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_TEXT, bos_token_id=None, eos_token_id=None)
    return _finished(LlamaForCausalLM(config)), _with_mask(token_ids())


def gemma2(softcap: float | None = 6.0) -> tuple[nn.Module, Inputs]:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**_TEXT, head_dim=8, final_logit_softcapping=softcap, sliding_window=64)
    return _finished(Gemma2ForCausalLM(config)), _with_mask(token_ids())


def cohere(scale: float = 0.0625) -> tuple[nn.Module, Inputs]:
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(**_TEXT, logit_scale=scale, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return _finished(CohereForCausalLM(config)), _with_mask(token_ids())


def granite(scaling: float = 8.0) -> tuple[nn.Module, Inputs]:
    from transformers import GraniteConfig, GraniteForCausalLM

    return _finished(GraniteForCausalLM(GraniteConfig(**_TEXT, logits_scaling=scaling))), _with_mask(token_ids())


def recurrent_gemma(softcap: float = 6.0) -> tuple[nn.Module, Inputs]:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(**_TEXT, lru_width=32, logits_soft_cap=softcap, attention_window_size=16)
    return _finished(RecurrentGemmaForCausalLM(config)), _with_mask(token_ids())


def xlstm(softcap: float = 6.0) -> tuple[nn.Module, Inputs]:
    from transformers import xLSTMConfig, xLSTMForCausalLM

    config = xLSTMConfig(
        vocab_size=VOCAB, hidden_size=32, embedding_dim=32, num_hidden_layers=1, num_heads=2, output_logit_soft_cap=softcap
    )
    return _finished(xLSTMForCausalLM(config)), _with_mask(token_ids())


AUDIO_MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "qwen2_audio": qwen2_audio,
    "voxtral": voxtral,
    "granite_speech": granite_speech,
    "omni_thinker": omni_thinker,
    "phi4_multimodal": phi4_multimodal,
    "audio_flamingo3": audio_flamingo3,
    "glm_asr": glm_asr,
}


def feature_name(inputs: Inputs) -> str:
    """What the model calls its log-mel features."""
    return "audio_input_features" if "audio_input_features" in inputs else "input_features"


TEXT_MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "llama": llama,
    "gemma2": gemma2,
    "cohere": cohere,
    "granite": granite,
}
