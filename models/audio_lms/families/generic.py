"""Any other audio LM of transformers, through its processor.

What cannot be known of it is guessed by the names that transformers' audio LMs share: the sound is in `input_features`, the
language model is `model.language_model`, the connector is `model.multi_modal_projector` or `model.projector`.

Negative path: zeroed features. They keep the length and the placeholders, which every model accepts.
"""

from __future__ import annotations

from typing import Any

from models.audio_lms.family import AudioLMError, Family


def family_of(config: Any) -> Family:
    """A family for this config, or AudioLMError where transformers has no class for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as NAMES

    if config.model_type not in NAMES:
        raise AudioLMError(
            f"model type {config.model_type!r}: expected an audio LM of transformers, but AutoModelForMultimodalLM does not "
            "know it; a file in models/audio_lms/families could say how to load it"
        )
    return Family(
        name=f"{config.model_type} (not listed)",
        model_types=(config.model_type,),
        model_class=NAMES[config.model_type],
        connector=r"model\.(multi_modal_projector|projector)\b",
    )
