"""Qwen2.5-Omni's thinker: the part that answers in text, out of the full checkpoint or by itself.

The talker, which speaks, is not loaded. The processor's image and video parts are not loaded either: they need torchvision.

Negative path: zeroed log-mel features. The positions of the answer's tokens depend on the clip's length, so it must stay.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from models.audio_lms.family import Family


def load_processor(folder: str) -> Any:
    """Qwen2_5OmniProcessor without the parts that see."""
    from transformers import Qwen2_5OmniProcessor

    return hearing_only(Qwen2_5OmniProcessor).from_pretrained(folder)


def hearing_only(processor_class: Any) -> Any:
    """An Omni processor class whose objects have a feature extractor and a tokenizer, and nothing for images and video."""
    from transformers.processing_utils import ProcessorMixin

    class Hearing(processor_class):
        # transformers before 5.23 reads merge_size and model_input_names without an image too.
        image_processor = video_processor = SimpleNamespace(merge_size=1, model_input_names=[])

        # transformers reads the names of the parts from this signature.
        def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            ProcessorMixin.__init__(self, feature_extractor, tokenizer, chat_template=chat_template)
            for kind in ("image", "audio", "video"):
                setattr(self, f"{kind}_token", getattr(tokenizer, f"{kind}_token"))
                setattr(self, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))

    return Hearing


FAMILY = Family(
    name="Qwen2.5-Omni",
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    model_class="Qwen2_5OmniThinkerForConditionalGeneration",
    hears_seconds=300.0,
    connector=r"model\.audio_tower\.proj\b",
    load_processor=load_processor,
)
