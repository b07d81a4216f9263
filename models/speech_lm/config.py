"""Settings of a speech LM, as they are saved with it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.speech_lm.connector import ConnectorConfig

SAMPLE_RATE = 16_000
SAMPLES_PER_POSITION = 320  # Whisper: a mel frame every 160 samples, the second convolution halves them
MAX_WHISPER_SECONDS = 30.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class SpeechLMConfig:
    """Settings of a speech LM.

    Args:
        lm, encoder: hub id or local folder of the backbones.
        encoder_layers: which hidden states of the encoder are used: 0 is its input, i is what layer i gives. Whisper's last
            layer keeps the words and loses the voice: so take early and middle layers.
        encoder_dim: width of the encoder; None = taken from the encoder when the model is made.
        max_audio_seconds: length of the encoder's window in seconds; a longer clip is cut. Short windows are much faster.
        audio_frames: T, to how many frames a clip is pooled, whatever its length.
        num_queries: audio tokens of a clip in the prompt. The papers use 64 for 30 seconds; 8 are enough for 4.
        connector_width, connector_layers, connector_heads, layer_mix, pooled_statistics, output_scale: see
            ConnectorConfig.
        placeholder_token: the vocabulary's token that marks audio positions; None = find a reserved one.
        lm_dtype: "float32", "bfloat16" or "float16"; the connector stays in float32.
        train_lm: let the language model train as well (its weights are then saved with the connector).
    """

    lm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    encoder: str = "openai/whisper-tiny.en"
    encoder_layers: tuple[int, ...] = (1, 3)
    encoder_dim: int | None = None
    max_audio_seconds: float = 4.0
    audio_frames: int = 25
    num_queries: int = 8
    connector_width: int = 192
    connector_layers: int = 2
    connector_heads: int = 4
    layer_mix: str = "concat"
    pooled_statistics: bool = True
    output_scale: float = 0.14
    placeholder_token: str | None = None
    lm_dtype: str = "float32"
    train_lm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder_layers", tuple(self.encoder_layers))
        if not self.encoder_layers or any(not isinstance(i, int) or i < 0 for i in self.encoder_layers):
            raise ValueError(f"encoder_layers: expected integers >= 0, at least one, got {self.encoder_layers!r}")
        if not 0 < self.max_audio_seconds <= MAX_WHISPER_SECONDS:
            raise ValueError(
                f"max_audio_seconds: expected in (0, {MAX_WHISPER_SECONDS:g}], got {self.max_audio_seconds}"
            )
        if not 1 <= self.audio_frames <= self.max_positions:
            raise ValueError(
                f"audio_frames: expected 1 to {self.max_positions}, the encoder's positions in "
                f"{self.max_audio_seconds} s, got {self.audio_frames}"
            )
        if self.lm_dtype not in DTYPES:
            raise ValueError(f"lm_dtype: expected one of {sorted(DTYPES)}, got {self.lm_dtype!r}")

    @property
    def max_positions(self) -> int:
        """Encoder positions of the longest clip."""
        return round(self.max_audio_seconds * SAMPLE_RATE) // SAMPLES_PER_POSITION

    @property
    def torch_dtype(self) -> torch.dtype:
        """`lm_dtype` as torch knows it."""
        return DTYPES[self.lm_dtype]

    def connector_config(self, output_dim: int) -> ConnectorConfig:
        """Shape of the connector in front of a language model of width `output_dim`."""
        return ConnectorConfig(
            num_feature_layers=len(self.encoder_layers),
            feature_dim=self.encoder_dim,
            num_frames=self.audio_frames,
            output_dim=output_dim,
            num_queries=self.num_queries,
            width=self.connector_width,
            num_layers=self.connector_layers,
            num_heads=self.connector_heads,
            layer_mix=self.layer_mix,
            pooled_statistics=self.pooled_statistics,
            output_scale=self.output_scale,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeechLMConfig:
        """Made from a mapping. An unknown key raises a ValueError that names the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f"{key}: unknown setting" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        return cls(**values)
