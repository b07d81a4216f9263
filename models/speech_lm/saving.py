"""A speech LM as a folder: safetensors and JSON, with its frozen backbones inside or named by their SHA-256.

    speech_lm.json          format version, settings, SHA-256 of the backbones that are not stored
    config.json             the settings again, in the form that transformers' AutoConfig reads (models/speech_lm/auto.py)
    connector.safetensors   the connector's weights and the statistics of its features
    lm/, encoder/           backbones that are stored
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from models.backbones import resolve
from models.io_utils import atomic_dir, atomic_write_json, save_tensors
from models.speech_lm.config import SpeechLMConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT_VERSION = 1
MODEL_TYPE = "kdkernels_speech_lm"  # in config.json; transformers finds the class by it


class SpeechLMError(RuntimeError):
    """A saved speech LM is missing, damaged, or does not fit its backbones."""


class Backbones(Protocol):
    """Where backbones come from; the module models.backbones.resolve is the default."""

    def load_causal_lm(self, spec: str, *, dtype: torch.dtype) -> tuple[nn.Module, PreTrainedTokenizerBase]: ...

    def load_speech_encoder(self, spec: str) -> tuple[nn.Module, Any]: ...


def save_folder(model: Any, folder: Path, *, stored: frozenset[str], sha256: dict[str, str | None]) -> Path:
    """Write a SpeechLM; the folder appears complete or not at all, in place of an older one.

    Args:
        stored: backbones ("lm", "encoder") that the folder holds.
        sha256: part -> SHA-256 of each backbone that it does not hold.
    """
    with atomic_dir(folder) as target:
        state = {name: value.detach().cpu().contiguous() for name, value in model.connector.state_dict().items()}
        save_tensors(state, target / "connector.safetensors")
        if "lm" in stored:
            model.lm.save_pretrained(target / "lm")
            model.tokenizer.save_pretrained(target / "lm")
        if "encoder" in stored:
            model.encoder.save_pretrained(target / "encoder")
            model.feature_extractor.save_pretrained(target / "encoder")
        record = {
            "format_version": _FORMAT_VERSION,
            "config": dataclasses.asdict(model.config),
            "frozen": {f"{part}_sha256": value for part, value in sha256.items()},
        }
        atomic_write_json(target / "speech_lm.json", record)
        auto = {"model_type": MODEL_TYPE, "architectures": ["SpeechLM"], "settings": record["config"]}
        atomic_write_json(target / "config.json", auto)
    return folder


def read_record(folder: Path) -> tuple[SpeechLMConfig, dict[str, str | None]]:
    """Settings of a saved speech LM, and the SHA-256 of the backbones that it does not hold.

    Raises:
        SpeechLMError: no such model, a damaged file, or another version.
    """
    try:
        record = json.loads((folder / "speech_lm.json").read_text())
        version, settings, frozen = (record[key] for key in ("format_version", "config", "frozen"))
    except FileNotFoundError:
        raise SpeechLMError(f"{folder}: expected a saved speech LM with speech_lm.json, found none") from None
    except KeyError as error:
        raise SpeechLMError(f"{folder}/speech_lm.json: damaged: it has no {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise SpeechLMError(f"{folder}/speech_lm.json: unreadable: {error}") from None
    if version != _FORMAT_VERSION:
        raise SpeechLMError(f"{folder}: expected format version {_FORMAT_VERSION}, got {version}")
    try:
        return SpeechLMConfig.from_dict(settings), frozen
    except (AttributeError, TypeError, ValueError) as error:
        raise SpeechLMError(f"{folder}/speech_lm.json: {error}") from None


def check_folder(folder: str | os.PathLike[str], *, backbones: bool = True, encoder: bool = True) -> None:
    """Check what can be checked before a saved speech LM is loaded; nothing large is read.

    Args:
        backbones: look for the backbones that the folder does not hold; one of the hub is fetched.
        encoder: the encoder is needed too.

    Raises:
        SpeechLMError: no such model, or a damaged file.
        BackboneError: a backbone is not found.
    """
    folder = Path(folder)
    config, _ = read_record(folder)
    try:
        with safe_open(str(folder / "connector.safetensors"), framework="pt"):
            pass
    except Exception as error:  # safetensors raises several unrelated types
        raise SpeechLMError(f"{folder}/connector.safetensors: {error}") from None
    if not backbones:
        return
    for part, kind in (("lm", "causal_lm"), ("encoder", "speech_encoder"))[: 2 if encoder else 1]:
        spec = str(folder / part) if (folder / part).is_dir() else getattr(config, part)
        resolve.resolve_backbone(spec, kind=kind)


def load_connector(connector: nn.Module, folder: Path) -> None:
    """Put the saved weights into `connector`; SpeechLMError where they are missing, damaged, or of another shape."""
    try:
        connector.load_state_dict(load_file(folder / "connector.safetensors"), strict=True)
    except Exception as error:  # safetensors and torch raise several unrelated types
        raise SpeechLMError(f"{folder}/connector.safetensors: {error}") from None


def backbone_sha256(config: SpeechLMConfig, part: str, resolver: Any) -> str | None:
    """Identity of a backbone's weights ("lm" or "encoder"); None where `resolver` is another than the default one."""
    if resolver is not resolve:
        return None
    kind = "causal_lm" if part == "lm" else "speech_encoder"
    return resolve.resolve_backbone(getattr(config, part), kind=kind).sha256()


def check_backbone(
    config: SpeechLMConfig, part: str, expected: str | None, resolver: Any, label: str | os.PathLike[str]
) -> None:
    """SpeechLMError where the backbone `part` is not the one that the connector was trained with."""
    actual = None if expected is None else backbone_sha256(config, part, resolver)
    if actual is not None and expected != actual:
        raise SpeechLMError(
            f"{label}: its connector was trained with {getattr(config, part)} of SHA-256 {expected}, "
            f"got {actual}; use the same source of the backbone, or save with include_frozen=True"
        )
