"""Qwen3-Omni's thinker: a mixture of experts that answers in text, out of the full checkpoint or by itself.

A LoRA goes on the attention alone: the experts are stacked weights, not linear layers.

Negative path: zeroed log-mel features, as for Qwen2.5-Omni.
"""

from __future__ import annotations

from typing import Any

from models.audio_lms.families.qwen2_5_omni import hearing_only
from models.audio_lms.family import Family


def load_processor(folder: str) -> Any:
    """Qwen3OmniMoeProcessor without the parts that see."""
    from transformers import Qwen3OmniMoeProcessor

    return hearing_only(Qwen3OmniMoeProcessor).from_pretrained(folder)


FAMILY = Family(
    name="Qwen3-Omni",
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    tokens_per_second=13.0,
    lora=r"model\.language_model\.layers\.\d+\.self_attn\.\w+_proj",
    connector=r"model\.audio_tower\.(ln_post|proj1|proj2)\b",
    load_processor=load_processor,
)
