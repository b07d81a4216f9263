"""A saved SpeechLM by transformers' AutoConfig and AutoModel.

    import models.speech_lm.auto                                    # registers the two classes below
    model = AutoModel.from_pretrained("runs/caad/final")            # a SpeechLM

No code of the folder runs: `trust_remote_code` stays off. Without the import transformers does not know the kind of model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from models.speech_lm.config import SpeechLMConfig
from models.speech_lm.model import SpeechLM
from models.speech_lm.saving import MODEL_TYPE, SpeechLMError, read_record

__all__ = ["SpeechLMAutoConfig", "SpeechLMAutoModel"]


PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # what a folder of a model holds
_OF_AUTO_MODEL = ("_from_auto", "adapter_kwargs", "trust_remote_code")
_OF_THE_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")


class SpeechLMAutoConfig(PreTrainedConfig):
    """What AutoConfig gives for the folder of a SpeechLM.

    Attributes:
        settings: those of `SpeechLMConfig`, by name.
    """

    model_type = MODEL_TYPE
    settings: dict[str, Any] | None = None

    def speech_lm_config(self) -> SpeechLMConfig:
        """The settings as the model takes them."""
        return SpeechLMConfig.from_dict(self.settings or {})


class SpeechLMAutoModel:
    """What AutoModel asks for a SpeechLM. Its `from_pretrained` gives a `SpeechLM`, not an object of this class."""

    config_class = SpeechLMAutoConfig

    @classmethod
    def from_pretrained(
        cls,
        spec: str | os.PathLike[str],
        *,
        config: SpeechLMAutoConfig | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> SpeechLM:
        """`SpeechLM.from_pretrained`, also by hub id.

        Args:
            spec: folder or hub id.
            config: of AutoConfig; it has to be that of the folder.
            dtype: None or "auto"; a SpeechLM has its dtype in its settings (`lm_dtype`).
            options: how a hub id is fetched (revision, token, cache_dir, force_download, local_files_only), and what AutoModel
                adds to every call.

        Raises:
            ValueError: another dtype, or an option that a SpeechLM does not have.
            SpeechLMError, BackboneError: the model or a backbone is missing or damaged.
        """
        if dtype not in (None, "auto"):
            raise ValueError(f"dtype: expected None, as a SpeechLM has it in its settings (lm_dtype), got {dtype!r}")
        unknown = sorted(options.keys() - {*_OF_AUTO_MODEL, *_OF_THE_HUB})
        if unknown:
            raise ValueError(f"{unknown[0]}: expected no such loading option with a SpeechLM, got {options[unknown[0]]!r}")
        folder = Path(spec)
        if not folder.is_dir():
            try:
                fetched = {name: options[name] for name in _OF_THE_HUB if name in options}
                folder = Path(huggingface_hub.snapshot_download(os.fspath(spec), allow_patterns=PATTERNS, **fetched))
            except Exception as error:  # the hub library raises many kinds: missing, gated, interrupted
                raise SpeechLMError(f"{spec}: expected a folder or a hub id of a SpeechLM: {error}") from error
        if config is not None and config.speech_lm_config() != read_record(folder)[0]:
            raise SpeechLMError(f"{folder}: expected the same settings in config.json and speech_lm.json, got others")
        return SpeechLM.from_pretrained(folder).eval()

    @classmethod
    def _from_config(cls, config: SpeechLMAutoConfig, **_: Any) -> SpeechLM:
        """AutoModel.from_config: a new connector with random weights on the backbones that the settings name."""
        return SpeechLM.from_config(config.speech_lm_config())


AutoConfig.register(MODEL_TYPE, SpeechLMAutoConfig, exist_ok=True)
AutoModel.register(SpeechLMAutoConfig, SpeechLMAutoModel, exist_ok=True)
