"""Build the student of a training run, as its recipe says."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.audio_lms.family import AudioLMError
from models.audio_lms.model import AudioLM
from models.audio_lms.settings import Lora
from models.backbones.device import pick_device
from models.speech_lm.frozen_linear import use_bf16_products
from models.speech_lm.listeners import torch_dtype
from models.training.recipe import Recipe, to_dict
from models.training.teacher_states import SourceError


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The student: the audio LM of `recipe.student`, or the SpeechLM of `recipe.model`. What trains requires grad.

    Of a SpeechLM that is the connector, and its language model if its settings say so.
    """
    if recipe.student.model is not None:
        return _build_audio_student(recipe)
    from models.backbones.resolve import BackboneError
    from models.speech_lm.model import SpeechLM, SpeechLMConfig, SpeechLMError

    settings = recipe.model
    try:
        if settings.folder is None:
            model = SpeechLM.from_config(SpeechLMConfig.from_dict(settings.settings))
        else:
            model = SpeechLM.from_pretrained(settings.folder)
    except BackboneError as error:
        raise SourceError(str(error)) from error
    except SpeechLMError as error:
        raise SourceError(f"model.folder: {error}") from error
    except (TypeError, ValueError) as error:
        raise SourceError(f"{'model.settings' if settings.folder is None else 'model.folder'}: {error}") from error
    if settings.fresh_connector:
        model.connector.reset_parameters()
    if settings.feature_statistics is not None:
        copy_feature_statistics(settings.feature_statistics, model)
    if settings.bf16_products:
        use_bf16_products(model.lm.get_decoder())
    return model


def _build_audio_student(recipe: Recipe) -> AudioLM:
    settings = recipe.student
    trains_weights = settings.trains != "lora"  # those of the checkpoint; a LoRA's own are float32 in any case
    dtype = torch_dtype(settings.dtype, pick_device(recipe.run.device, name="run.device"), trains=trains_weights)
    try:
        return AudioLM.from_pretrained(
            settings.model, dtype=dtype, attention=settings.attention, device_map=settings.device_map, trains=settings.trains,
            lora=Lora(**to_dict(settings.lora)), merge=settings.merge,
        )  # fmt: skip
    except AudioLMError as error:
        raise SourceError(f"student.model: {error}") from error


def copy_feature_statistics(folder: str, model: torch.nn.Module) -> None:
    """Give `model` the standardisation of features of the SpeechLM in `folder`, and nothing else of it."""
    try:
        saved = load_file(Path(folder) / "connector.safetensors")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"model.feature_statistics: {folder}: {error}") from error
    for name, buffer in model.connector.named_buffers():
        if name not in saved or saved[name].shape != buffer.shape:
            raise SourceError(f"model.feature_statistics: {folder} has no {name} of shape {tuple(buffer.shape)}")
        buffer.copy_(saved[name])
