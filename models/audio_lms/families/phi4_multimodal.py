"""Phi-4-multimodal: a conformer, an MLP, Phi-4-mini; the features have a name of their own.

Its checkpoint keeps the LoRA that hears in a folder beside the weights. Merge it first: here the weights are loaded as they are.

Negative path: zeroed features. The model adds its audio to the embeddings of the placeholders, so their number must stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.audio_lms.family import AudioLMError, Family


def load_processor(folder: str) -> Any:
    """Phi4MultimodalProcessor without the part that sees, which needs torchvision."""
    from transformers import Phi4MultimodalProcessor
    from transformers.processing_utils import ProcessorMixin

    class Hearing(Phi4MultimodalProcessor):
        def __init__(self, audio_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            ProcessorMixin.__init__(self, audio_processor, tokenizer, chat_template=chat_template)
            for token in ("image", "audio"):
                setattr(self, f"{token}_token", getattr(tokenizer, f"{token}_token"))
                setattr(self, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))

    return Hearing.from_pretrained(folder)


def check(folder: Path) -> None:
    """The weights alone do not hear: they were trained with the LoRA."""
    if (folder / "speech-lora").is_dir():
        raise AudioLMError(
            f"{folder}: expected weights with the LoRA of speech-lora merged into them, got it beside them; load both with "
            'transformers (model.load_adapter(..., adapter_kwargs={"subfolder": "speech-lora"})), merge and save'
        )


FAMILY = Family(
    name="Phi-4-multimodal",
    model_types=("phi4_multimodal",),
    model_class="Phi4MultimodalForCausalLM",
    tokens_per_second=12.5,
    features=("audio_input_features",),
    mask="audio_attention_mask",
    language_model=r"(model\.(embed_tokens|layers|norm)|lm_head)\b(?!_extend)",
    lora=r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    connector=r"model\.embed_tokens_extend\.audio_embed\.(up|down)_proj_for_speech\b",
    load_processor=load_processor,
    check=check,
)
