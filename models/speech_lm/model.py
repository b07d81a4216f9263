"""A speech language model: frozen Whisper encoder, trained connector, frozen causal language model.

    waveforms --encode_audio--> features (B, K, T, D) --connector--> (B, Q, H) --+
                                                                                 +-> LM body -> hidden states -> head
    input_ids (B, L), audio positions holding the placeholder id --embeddings----+

    model = SpeechLM.from_config(SpeechLMConfig())
    features = model.encode_audio([waveform])                      # 16 kHz mono; frozen, so encode each clip once
    model.fit_feature_statistics(features)
    batch = model.make_collator()(examples, features)
    hidden = model.hidden_states_at(batch.target_index, **batch.model_inputs())   # (N, H); no logits are built

The text before the audio is the same in every epoch, whatever the connector has learned; a `PrefixCache` keeps its keys
and values. Legend: B rows, L columns, K encoder layers, T frames, D encoder width, Q queries, H language model width.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import is_flash_attention_requested

from kdkernels.layer_states import LayerStates
from kdkernels.packing import Packing
from models.backbones import resolve
from models.backbones.causal_lm import cache_keyword
from models.io_utils import atomic_dir, atomic_write_json, save_tensors
from models.speech_lm.collation import Collator, SpeechBatch, find_placeholder_id
from models.speech_lm.connector import Connector, ConnectorConfig
from models.speech_lm.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_RATE = 16_000
_FORMAT_VERSION = 1
_SAMPLES_PER_POSITION = 320  # Whisper: a mel frame every 160 samples, the second convolution halves them
_MEL_FRAMES_PER_POSITION = 2
_ENCODE_BATCH_CLIPS = 8  # measured best on CPUs; larger batches fall out of the caches
_MAX_WHISPER_SECONDS = 30.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SpeechLMError(RuntimeError):
    """A saved speech LM is missing, damaged, or does not fit its backbones."""


class Backbones(Protocol):
    """Where backbones come from; the module models.backbones.resolve is the default."""

    def load_causal_lm(self, spec: str, *, dtype: torch.dtype) -> tuple[nn.Module, PreTrainedTokenizerBase]: ...

    def load_speech_encoder(self, spec: str) -> tuple[nn.Module, Any]: ...


@dataclass(frozen=True, kw_only=True)
class SpeechLMConfig:
    """Settings of a speech LM.

    Args:
        lm, encoder: hub id or local folder of the backbones.
        encoder_layers: which hidden states of the encoder are used: 0 is its input, i is after layer i. Whisper's last
            layer keeps the words and drops the voice, so early and middle ones.
        encoder_dim: width of the encoder; None = looked up when the model is made.
        max_audio_seconds: window of the encoder; a longer clip is cut to it. Short windows are much faster.
        audio_frames: T, frames a clip is pooled to, whatever its length.
        num_queries: audio tokens in the prompt. The papers use 64 for 30 seconds; 8 do for 4.
        connector_width, connector_layers, connector_heads, layer_mix, pooled_statistics, output_scale: see
            ConnectorConfig.
        placeholder_token: the vocabulary's token that marks audio positions; None = a reserved one is found.
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
        if not 0 < self.max_audio_seconds <= _MAX_WHISPER_SECONDS:
            raise ValueError(
                f"max_audio_seconds: expected in (0, {_MAX_WHISPER_SECONDS:g}], got {self.max_audio_seconds}"
            )
        if not 1 <= self.audio_frames <= self.max_positions:
            raise ValueError(
                f"audio_frames: expected 1 to {self.max_positions}, the encoder's positions in "
                f"{self.max_audio_seconds} s, got {self.audio_frames}"
            )
        if self.lm_dtype not in _DTYPES:
            raise ValueError(f"lm_dtype: expected one of {sorted(_DTYPES)}, got {self.lm_dtype!r}")

    @property
    def max_positions(self) -> int:
        """Encoder positions of the longest clip."""
        return round(self.max_audio_seconds * SAMPLE_RATE) // _SAMPLES_PER_POSITION

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeechLMConfig:
        """From a mapping; an unknown key is a ValueError that names the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f"{key}: unknown setting" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        return cls(**values)


class SpeechLM(nn.Module):
    """See the module's docstring.

    Attributes:
        config: the settings; `encoder_dim` is filled in.
        tokenizer: of the language model.
        connector: the part that trains.
        lm: the causal language model, frozen unless `config.train_lm`.
        placeholder_token_id: the id at audio positions.
    """

    def __init__(
        self,
        config: SpeechLMConfig,
        *,
        lm: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        encoder: nn.Module | None = None,
        feature_extractor: Any = None,
        resolver: Backbones | None = None,
    ) -> None:
        """Put given parts together; `from_config` and `from_pretrained` are the usual ways in.

        Args:
            lm, tokenizer: the language model and its tokenizer.
            encoder, feature_extractor: both or neither; without them they are loaded when first needed.
            resolver: where they are loaded from then.
        """
        super().__init__()
        if (encoder is None) != (feature_extractor is None):
            raise ValueError("encoder, feature_extractor: expected both or neither")
        self._resolver: Backbones = resolver if resolver is not None else resolve
        if config.encoder_dim is None:
            if encoder is None:
                encoder, feature_extractor = self._resolver.load_speech_encoder(config.encoder)
            config = dataclasses.replace(config, encoder_dim=encoder.config.d_model)
        self.config = config
        self.tokenizer = tokenizer
        self.placeholder_token_id = _placeholder_id(config, tokenizer)
        self.lm = lm.requires_grad_(config.train_lm)
        self.connector = Connector(
            ConnectorConfig(
                num_feature_layers=len(config.encoder_layers),
                feature_dim=config.encoder_dim,
                num_frames=config.audio_frames,
                output_dim=lm.get_input_embeddings().embedding_dim,
                num_queries=config.num_queries,
                width=config.connector_width,
                num_layers=config.connector_layers,
                num_heads=config.connector_heads,
                layer_mix=config.layer_mix,
                pooled_statistics=config.pooled_statistics,
                output_scale=config.output_scale,
            )
        )
        self._encoder: nn.Module | None = None
        self._feature_extractor: Any = None
        if encoder is not None:
            self._set_encoder(encoder, feature_extractor)
        self._gradient_checkpointing = False
        self._stored_parts: frozenset[str] = (
            frozenset()
        )  # backbones that were loaded from a saved SpeechLM's own folder
        self.train(self.training)

    # --- making, saving, loading ------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: SpeechLMConfig, *, resolver: Backbones | None = None) -> SpeechLM:
        """A new model: backbones from `resolver` (default: models.backbones.resolve), connector with random weights.

        Raises:
            BackboneError: a backbone cannot be had; the message lists what was tried.
        """
        if not isinstance(config, SpeechLMConfig):
            raise TypeError(f"config: expected a SpeechLMConfig, got {type(config).__name__}")
        source = resolver if resolver is not None else resolve
        lm, tokenizer = source.load_causal_lm(config.lm, dtype=_DTYPES[config.lm_dtype])
        return cls(config, lm=lm, tokenizer=tokenizer, resolver=source)

    def save_pretrained(self, folder: str | os.PathLike[str], *, include_frozen: bool = False) -> Path:
        """Write the model as safetensors and JSON; the folder appears complete or not at all.

        Args:
            folder: it is replaced if it exists.
            include_frozen: store the backbones too. Otherwise they are named, with the SHA-256 of their weights, and
                looked for again by `from_pretrained`. A language model that trains, and a backbone that came out of
                such a folder, are always stored.
        """
        folder = Path(folder)
        with atomic_dir(folder) as target:
            state = {name: value.detach().cpu().contiguous() for name, value in self.connector.state_dict().items()}
            save_tensors(state, target / "connector.safetensors")
            frozen: dict[str, str | None] = {}
            if include_frozen or self.config.train_lm or "lm" in self._stored_parts:
                self.lm.save_pretrained(target / "lm")
                self.tokenizer.save_pretrained(target / "lm")
            else:
                frozen["lm_sha256"] = self._backbone_sha256("lm")
            if include_frozen or "encoder" in self._stored_parts:
                self.encoder.save_pretrained(target / "encoder")
                self._feature_extractor.save_pretrained(target / "encoder")
            else:
                frozen["encoder_sha256"] = self._backbone_sha256("encoder")
            record = {"format_version": _FORMAT_VERSION, "config": dataclasses.asdict(self.config), "frozen": frozen}
            atomic_write_json(target / "speech_lm.json", record)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, resolver: Backbones | None = None) -> SpeechLM:
        """Load what `save_pretrained` wrote; backbones that were not stored come from `resolver`.

        Raises:
            SpeechLMError: no such model, a damaged file, another version, or a backbone whose weights are not those
                that the connector was trained with.
            BackboneError: a backbone cannot be had.
        """
        folder = Path(folder)
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
            config = SpeechLMConfig.from_dict(settings)
        except (AttributeError, TypeError, ValueError) as error:
            raise SpeechLMError(f"{folder}/speech_lm.json: {error}") from None
        source = resolver if resolver is not None else resolve
        stored_lm = folder / "lm"
        lm_spec = str(stored_lm) if stored_lm.is_dir() else config.lm
        lm, tokenizer = source.load_causal_lm(lm_spec, dtype=_DTYPES[config.lm_dtype])
        encoder, extractor = None, None
        if (folder / "encoder").is_dir():
            encoder, extractor = source.load_speech_encoder(str(folder / "encoder"))
        try:
            model = cls(config, lm=lm, tokenizer=tokenizer, encoder=encoder, feature_extractor=extractor, resolver=source)
        except ValueError as error:
            raise SpeechLMError(f"{folder}/speech_lm.json: {error}") from None
        model._stored_parts = frozenset(part for part in ("lm", "encoder") if (folder / part).is_dir())
        model._check_sha256("lm", frozen.get("lm_sha256"), folder)
        model._expected_encoder_sha256 = frozen.get("encoder_sha256")  # checked when it is loaded
        try:
            model.connector.load_state_dict(load_file(folder / "connector.safetensors"), strict=True)
        except Exception as error:  # safetensors and torch raise several unrelated types
            raise SpeechLMError(f"{folder}/connector.safetensors: {error}") from None
        return model

    _expected_encoder_sha256: str | None = None

    def make_collator(self, **options: Any) -> Collator:
        """A `Collator` with this model's tokenizer, number of queries and placeholder."""
        return Collator(
            self.tokenizer, self.config.num_queries, placeholder_token_id=self.placeholder_token_id, **options
        )

    def make_prefix_cache(self, **options: Any) -> PrefixCache:
        """An empty `PrefixCache` of this model's language model.

        Raises:
            ValueError: the language model trains, so that nothing may be kept of it.
        """
        if any(parameter.requires_grad for parameter in self.lm.parameters()):
            raise ValueError("train_lm: a prefix cache needs a frozen language model")
        return PrefixCache(self.lm, **options)

    # --- audio ------------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> nn.Module:
        """The frozen Whisper encoder, loaded at first use."""
        if self._encoder is None:
            self._set_encoder(*self._resolver.load_speech_encoder(self.config.encoder))
            if self._expected_encoder_sha256 is not None:
                self._check_sha256("encoder", self._expected_encoder_sha256, self.config.encoder)
        return self._encoder

    @torch.no_grad()
    def encode_audio(self, waveforms: Sequence[np.ndarray], *, batch_clips: int = _ENCODE_BATCH_CLIPS) -> Tensor:
        """Run the frozen encoder.

        Args:
            waveforms: 16 kHz mono, 1-D float arrays in [-1, 1]; cut to `config.max_audio_seconds`.
            batch_clips: clips a forward pass.

        Returns:
            (B, K, T, D) float32 on the encoder's device: the chosen layers' hidden states over the clip's own length,
            averaged down to T frames. Raw: the connector standardises them. Peak extra memory is that of one batch.

        Raises:
            ValueError: no waveform, or one that is not 1-D, empty, or not finite.
        """
        if not len(waveforms):
            raise ValueError("waveforms: expected at least one, got none")
        limit = self.config.max_positions * _SAMPLES_PER_POSITION
        clips = [_checked_waveform(wave, number)[:limit] for number, wave in enumerate(waveforms)]
        encoder = self.encoder
        device, dtype = encoder.conv1.weight.device, encoder.conv1.weight.dtype
        pooled = []
        for start in range(0, len(clips), batch_clips):
            batch = clips[start : start + batch_clips]
            windows = [np.pad(clip, (0, limit - len(clip))) for clip in batch]
            mel = self._feature_extractor(
                windows, sampling_rate=SAMPLE_RATE, return_tensors="pt", padding="do_not_pad", truncation=False
            ).input_features[..., : self.config.max_positions * _MEL_FRAMES_PER_POSITION]
            states = self._encoder_states(mel.to(device, dtype)).float()  # (B, K, positions, D)
            for clip, state in zip(batch, states, strict=True):
                # At least T positions, so that a very short clip pools real positions and not copies of one.
                valid = max(
                    self.config.audio_frames, min(self.config.max_positions, len(clip) // _SAMPLES_PER_POSITION)
                )
                frames = F.adaptive_avg_pool1d(state[:, :valid].transpose(1, 2), self.config.audio_frames)
                pooled.append(frames.transpose(1, 2))  # (K, T, D)
        return torch.stack(pooled)

    def fit_feature_statistics(self, features: Tensor) -> None:
        """Set the connector's standardisation from raw features (N, K, T, D), those of the training split."""
        self.connector.fit_statistics(features)

    # --- text and audio ---------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_present: Tensor | None = None,
        *,
        prefix_cache: PrefixCache | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Logits.

        Args:
            input_ids: (B, L) int64; audio positions hold the placeholder id, `num_queries` times a clip, text and clips
                interleaved in any order; a row may have none.
            attention_mask: (B, L) of ones where there is a token, padded on either side; None = no padding. With
                `past_key_values` it covers those positions first, as in transformers.
            audio_features: (B, K, T, D) from `encode_audio`, one clip a row, or (B, M, K, T, D) with up to M clips a row in
                the order of their placeholders; None = every clip masked.
            audio_present: (B,) bool, or (B, M); False masks the audio (standardised features zero): the negative path.
            prefix_cache: keys and values of the text before the first audio position are taken from it. Logits at those
                positions are zeros: they are not computed.
            past_key_values: of an earlier call with `use_cache`; audio then lies in the past, and none is taken here.
            use_cache: return past_key_values, for a loop that appends tokens to rows padded on the left.
            logits_to_keep: 0 = all columns, n = the last n columns, tensor = these columns.

        Returns:
            an output with `.logits` (B, columns, V) and `.past_key_values`.

        Raises:
            ValueError: shapes or arguments that do not fit together, named.
        """
        layout = self._layout(input_ids, attention_mask, prefix_cache, past_key_values, use_cache)
        hidden = self._run(layout, audio_features, audio_present)
        if layout.start is not None:
            hidden = layout.scatter(hidden, input_ids.shape[1])
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=self._logits(hidden),
            past_key_values=layout.past if use_cache or past_key_values is not None else None,
        )

    def hidden_states_at(
        self,
        index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_present: Tensor | None = None,
        *,
        prefix_cache: PrefixCache | None = None,
        pack_tokens: int | None = None,
        layers: Sequence[int] = (),
    ) -> Tensor:
        """The LM head's inputs at chosen positions; the head is not run and no logits exist.

        Args:
            index: (N,) int64, row * L + column; after the first audio position where `prefix_cache` is given.
            input_ids, attention_mask, audio_features, audio_present, prefix_cache: see `forward`.
            pack_tokens: run the language model on the rows laid side by side in rows of at most this many tokens, without
                padding; the samples do not see each other. A longer row makes that the limit, and flash-attention takes one row
                whatever its length: its varlen kernel by cu_seqlens (not run here, for want of a GPU). With SDPA masks are
                block-diagonal: a row costs its square, so bins of a few samples are best. One wait for a CUDA device a call.
            layers: also the states of these layers of the language model, counted as in `kdkernels.layer_map`.

        Returns:
            (N, H) in the language model's dtype, with a gradient to the connector (and to the LM if it trains); with K layers
            (N, 1 + K, H), what the head reads first.

        Raises:
            ValueError: `index` is not 1-D int64, or (on the CPU) out of range or inside the cached prefix; no such layer; layers
                with gradient checkpointing, which runs each layer without a gradient first; pack_tokens with a language model
                whose layers are not attention alone, or together with prefix_cache where its attention is not plain SDPA.
        """
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"index: expected (N,) int64, got {tuple(index.shape)} {index.dtype}")
        if layers and self._gradient_checkpointing and self.training:
            raise ValueError("layers: cannot be combined with gradient checkpointing")
        if pack_tokens is not None:
            self._check_packable(pack_tokens, prefix_cache)
        layout = self._layout(input_ids, attention_mask, prefix_cache, None, False, pack_tokens)
        columns = input_ids.shape[1]
        row, column = index // columns, index % columns
        if layout.start is not None:
            column = column - layout.start[row]
        if index.device.type == "cpu" and len(index):  # elsewhere a look at the values would stall the device
            if index.min() < 0 or index.max() >= input_ids.numel():
                raise ValueError(
                    f"index: expected values in [0, {input_ids.numel()}), got {index.min()} to {index.max()}"
                )
            if column.min() < 0:
                raise ValueError(
                    "index: expected positions after the first audio token, got some inside the cached prefix"
                )
        index = row * layout.ids.shape[1] + column
        if layout.packing is not None:
            index = layout.packing.at(index)
        if not layers:
            return self._run(layout, audio_features, audio_present).flatten(0, 1)[index]
        with LayerStates(self.lm, layers, index) as taken:
            hidden = self._run(layout, audio_features, audio_present)  # (B, S, H), or packed
        return torch.cat([hidden.flatten(0, 1)[index][:, None], taken.stacked()], 1)

    @torch.no_grad()
    def generate(
        self,
        batch: SpeechBatch | Mapping[str, Any],
        *,
        max_new_tokens: int = 16,
        prefix_cache: PrefixCache | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> list[str]:
        """Greedy continuation of a batch of prompts, with a KV cache.

        Args:
            batch: prompts that end with their last prompt token (`collator(..., with_target=False)`), or their model
                inputs as a mapping.
            max_new_tokens: limit a row.
            prefix_cache: see `forward`.
            stop_token_ids: a row ends at any of these; default: the tokenizer's end of text.

        Returns:
            one text a row, special tokens and outer white space removed.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
        inputs = dict(batch.model_inputs() if isinstance(batch, SpeechBatch) else batch)
        prefix_cache = inputs.pop("prefix_cache", None) if prefix_cache is None else prefix_cache
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        layout = self._layout(ids, mask, prefix_cache, None, True)
        hidden = self._run(layout, inputs.get("audio_features"), inputs.get("audio_present"))
        rows = torch.arange(len(ids), device=ids.device)
        last = (layout.own_mask * torch.arange(1, layout.ids.shape[1] + 1, device=ids.device)).argmax(1)
        position = layout.position_ids[rows, last]
        hidden, mask = hidden[rows, last], layout.mask
        stop = [self.tokenizer.eos_token_id] if stop_token_ids is None else list(stop_token_ids)
        stop_ids = torch.tensor([token for token in stop if token is not None], dtype=torch.int64, device=ids.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        generated: list[Tensor] = []
        for step in range(max_new_tokens):
            token = self._logits(hidden).argmax(-1)  # (B,)
            done |= torch.isin(token, stop_ids)
            generated.append(torch.where(done, -1, token))
            if step == max_new_tokens - 1 or bool(done.all()):
                break
            position = position + 1
            mask = F.pad(mask, (0, 1), value=1)
            embeddings = self.lm.get_input_embeddings()(token[:, None])
            hidden = self._body(embeddings, mask, position[:, None], layout.past, True)[:, -1]
        tokens = torch.stack(generated, dim=1).tolist()
        texts = [[token for token in row if token >= 0] for row in tokens]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in texts]

    # --- what the rest of the project asks of a model -----------------------------------------------------------------

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.lm.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.lm.get_input_embeddings()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The connector's parameters, and the language model's if it trains."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the language model's activations in the backward pass: less memory, a third more time."""
        if hasattr(self.lm, "activation_checkpointing_enable"):  # the newer name; the older one warns
            self.lm.activation_checkpointing_enable()
        else:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._gradient_checkpointing = True
        self.train(self.training)

    def train(self, mode: bool = True) -> SpeechLM:
        """Frozen parts stay in evaluation mode; transformers checkpoints activations in training mode only."""
        super().train(mode)
        self.lm.train(mode and (self.config.train_lm or getattr(self, "_gradient_checkpointing", False)))
        if self._encoder is not None:
            self._encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the connector lies."""
        return self.connector.queries.device

    # --- inner parts --------------------------------------------------------------------------------------------------

    def _layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prefix_cache: PrefixCache | None,
        past: Any,
        use_cache: bool,
        pack_tokens: int | None = None,
    ) -> _Layout:
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids: expected (B, L) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
        rows, columns = input_ids.shape
        if isinstance(past, _PrefixedCache):
            return self._continued_layout(input_ids, attention_mask, past)
        past_columns = past.get_seq_length() if past is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(rows, past_columns + columns, dtype=torch.int64, device=input_ids.device)
        if tuple(attention_mask.shape) != (rows, past_columns + columns):
            raise ValueError(
                f"attention_mask: expected ({rows}, {past_columns + columns}), got {tuple(attention_mask.shape)}"
            )
        attention_mask = attention_mask.long()
        if prefix_cache is None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past_columns:]
            if past is None and use_cache:
                past = DynamicCache()
            own_mask = attention_mask[:, past_columns:]
            if pack_tokens is not None:
                packing = self._packing(own_mask, pack_tokens)
                return _Layout(input_ids, own_mask, None, packing.positions(), None, None, False, packing)
            return _Layout(input_ids, own_mask, attention_mask, positions, past, None, past_columns > 0)
        if past is not None:
            raise ValueError("past_key_values: cannot be combined with prefix_cache")
        if prefix_cache.lm is not self.lm:
            raise ValueError("prefix_cache: expected one made with this model's language model, got another's")
        if self._gradient_checkpointing and self.training:
            raise ValueError("prefix_cache: cannot be combined with gradient checkpointing, which drops the KV cache")
        return self._split_layout(input_ids, attention_mask, prefix_cache, pack_tokens)

    def _check_packable(self, pack_tokens: int, prefix_cache: PrefixCache | None) -> None:
        if not isinstance(pack_tokens, int) or pack_tokens < 1:
            raise ValueError(f"pack_tokens: expected a positive int or None, got {pack_tokens!r}")
        config = self.lm.config
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"pack_tokens: expected layers of attention, which keep samples apart, got {sorted(kinds)}")
        if prefix_cache is not None:
            sliding = "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None)
            if config._attn_implementation != "sdpa" or sliding:
                got = "a sliding window" if sliding else config._attn_implementation
                raise ValueError(f"prefix_cache: expected SDPA without a sliding window where pack_tokens is given, got {got}")

    def _packing(self, mask: Tensor, pack_tokens: int) -> Packing:
        return Packing.of_mask(mask, None if self._runs_varlen else pack_tokens)

    @property
    def _runs_varlen(self) -> bool:
        return is_flash_attention_requested(self.lm.config)

    def _split_layout(
        self, input_ids: Tensor, attention_mask: Tensor, prefix_cache: PrefixCache, pack_tokens: int | None
    ) -> _Layout:
        """Each row's text before the audio goes to the left as cached states, the rest to the right as tokens."""
        columns = input_ids.shape[1]
        prefixes: list[list[int]] = []
        starts: list[int] = []
        lengths: list[int] = []
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            count = sum(mask)
            first = mask.index(1) if count else 0
            if any(value != 1 for value in mask[first : first + count]):
                raise ValueError(f"attention_mask: expected each row's tokens side by side, got gaps in row {row}")
            ids = ids[first : first + count]
            split = ids.index(self.placeholder_token_id) if self.placeholder_token_id in ids else 0
            prefixes.append(ids[:split])
            starts.append(first + split)
            lengths.append(count - split)
        device = input_ids.device
        start = torch.tensor(starts, device=device)
        length = torch.tensor(lengths, device=device)
        offset = torch.arange(max(lengths), device=device)
        own_mask = (offset < length[:, None]).long()  # (B, S)
        ids = input_ids.gather(1, (start[:, None] + offset).clamp(max=columns - 1))
        positions = torch.tensor([[len(prefix)] for prefix in prefixes], device=device) + offset
        packing = None
        if pack_tokens is None:
            cached = prefix_cache.rows(prefixes)
            mask = torch.cat([cached.mask, own_mask], 1)
        else:
            packing = self._packing(own_mask, pack_tokens)
            cached = prefix_cache.packed_rows([[prefixes[sample] for sample in samples] for samples in packing.bins])
            positions = packing.take(positions, fill=0)
            # A query sees its own sample's prefix, and its own sample's tokens up to itself.
            same = packing.number[:, :, None] == torch.cat([cached.mask, packing.number], 1)[:, None]  # (R, P, prefixes + P)
            mask = same.tril(cached.mask.shape[1])[:, None]
        past = _PrefixedCache(mask)
        for layer, (keys, values) in enumerate(zip(cached.keys, cached.values, strict=True)):
            past.update(keys, values, layer)
        return _Layout(ids, own_mask, past.mask, positions, past, start, False, packing)

    @staticmethod
    def _continued_layout(input_ids: Tensor, attention_mask: Tensor | None, past: _PrefixedCache) -> _Layout:
        """New tokens after a call with `prefix_cache`: of the caller's mask only their own columns are of use."""
        rows, columns = input_ids.shape
        if attention_mask is None:
            attention_mask = past.mask.new_ones(rows, columns)
        if attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
            raise ValueError(
                f"attention_mask: expected ({rows}, at least {columns}), got {tuple(attention_mask.shape)}"
            )
        own_mask = attention_mask[:, -columns:].long()
        positions = past.mask.sum(1, keepdim=True) + own_mask.cumsum(1) - 1
        past.mask = torch.cat([past.mask, own_mask], 1)
        return _Layout(input_ids, own_mask, past.mask, positions.clamp(min=0), past, None, True)

    def _run(self, layout: _Layout, features: Tensor | None, present: Tensor | None) -> Tensor:
        embeddings = self.lm.get_input_embeddings()
        is_audio = layout.ids == self.placeholder_token_id
        x = embeddings(layout.ids)  # (B, S, H)
        if not layout.continues:
            x = self._insert_audio(x, is_audio, features, present)
        if layout.packing is None:
            return self._body(x, layout.mask, layout.position_ids, layout.past, layout.past is not None)
        x, keywords = layout.packing.take(x), {}
        if self._runs_varlen:
            begins, longest = layout.packing.cumulative_lengths(), max(layout.packing.lengths)
            keywords = {f"cu_seq_lens_{side}": begins for side in "qk"} | {f"max_length_{side}": longest for side in "qk"}
        return self._body(x, layout.mask, layout.position_ids, layout.past, layout.past is not None, **keywords)

    def _insert_audio(self, x: Tensor, is_audio: Tensor, features: Tensor | None, present: Tensor | None) -> Tensor:
        """Put the connector's vectors at the audio positions, by gather and where: no read-back from the device."""
        rows, queries = x.shape[0], self.config.num_queries
        clips = 1 if features is None or features.dim() == 4 else features.shape[1]
        if is_audio.device.type == "cpu":
            counts = is_audio.sum(1)
            if not counts.any():
                return x
            wrong = ((counts % queries != 0) | (counts > clips * queries)).nonzero().flatten().tolist()
            if wrong:
                expected = f"{queries} audio positions a row or none"
                if clips > 1:
                    expected = f"{queries} audio positions a clip, at most {clips} clips a row"
                raise ValueError(f"input_ids: expected {expected}, got {counts[wrong[0]].item()} in row {wrong[0]}")
        if features is None:
            shape = self.connector.config
            features = x.new_zeros(rows, shape.num_feature_layers, shape.num_frames, shape.feature_dim)
            present = torch.zeros(rows, dtype=torch.bool, device=x.device)
        if features.shape[0] != rows:
            raise ValueError(f"audio_features: expected {rows} rows, one a row of input_ids, got {features.shape[0]}")
        if features.dim() == 5:
            if present is not None and present.dim() == 1:
                present = present[:, None].expand(rows, clips)
            if present is not None and tuple(present.shape) != (rows, clips):
                raise ValueError(f"audio_present: expected ({rows},) or ({rows}, {clips}), got {tuple(present.shape)}")
            features, present = features.flatten(0, 1), None if present is None else present.flatten()
        elif present is not None and tuple(present.shape) != (rows,):
            raise ValueError(f"audio_present: expected ({rows},), got {tuple(present.shape)}")
        audio = self.connector(features, present).to(x.dtype)  # (B * M, Q, H)
        audio = audio.reshape(rows, clips * queries, audio.shape[-1])
        slot = (is_audio.cumsum(1) - 1).clamp(0, clips * queries - 1)  # which query stands at each position
        spread = audio.gather(1, slot[..., None].expand(-1, -1, audio.shape[-1]))
        return torch.where(is_audio[..., None], spread, x)

    def _body(
        self, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor, past: Any, use_cache: bool, **varlen: Any
    ) -> Tensor:
        decoder = self.lm.get_decoder()
        return decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{cache_keyword(decoder): past},
            **varlen,
        ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        """The LM head with what some families put behind it: Cohere's and Granite's scale, Gemma's soft cap."""
        config = self.lm.config
        logits = self.lm.get_output_embeddings()(hidden)
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits

    def _encoder_states(self, mel: Tensor) -> Tensor:
        """Chosen hidden states (B, K, positions, D) of a window shorter than Whisper's 30 s.

        The position table is cut to the window, and layers above the highest chosen one are not run.
        """
        encoder = self.encoder
        x = F.gelu(encoder.conv1(mel))
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        states = {0: x}
        for number, layer in enumerate(encoder.layers[: max(self.config.encoder_layers)], start=1):
            x = layer(x, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
            states[number] = x
        if len(encoder.layers) in states:
            states[len(encoder.layers)] = encoder.layer_norm(x)
        return torch.stack([states[number] for number in self.config.encoder_layers], dim=1)

    def _set_encoder(self, encoder: nn.Module, feature_extractor: Any) -> None:
        if encoder.config.d_model != self.config.encoder_dim:
            raise ValueError(f"encoder: expected width {self.config.encoder_dim}, got {encoder.config.d_model}")
        highest = max(self.config.encoder_layers)
        if highest > len(encoder.layers):
            raise ValueError(
                f"encoder_layers: expected at most {len(encoder.layers)}, the encoder's depth, got {highest}"
            )
        device = self.connector.queries.device
        self._encoder = encoder.requires_grad_(False).eval().to(device)
        self._feature_extractor = feature_extractor

    def _backbone_sha256(self, part: str) -> str | None:
        """Identity of a backbone's weights; None where the resolver has no notion of it (given parts, tests)."""
        if self._resolver is not resolve:
            return None
        kind = "causal_lm" if part == "lm" else "speech_encoder"
        return resolve.resolve_backbone(getattr(self.config, part), kind=kind).sha256()

    def _check_sha256(self, part: str, expected: str | None, label: str | os.PathLike[str]) -> None:
        actual = None if expected is None else self._backbone_sha256(part)
        if actual is not None and expected != actual:
            raise SpeechLMError(
                f"{label}: its connector was trained with {getattr(self.config, part)} of SHA-256 {expected}, "
                f"got {actual}; use the same source of the backbone, or save with include_frozen=True"
            )


class _PrefixedCache(DynamicCache):
    """A KV cache that begins with cached prefixes; its columns are not the caller's, so it brings its own mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask  # (B, columns of the cache), or (R, 1, P, columns of the cache) of packed rows


@dataclass
class _Layout:
    """How rows are laid out for the language model's body.

    ids, own_mask, position_ids: (B, S) tokens that are run; mask: (B, P + S) with the cached ones before; past: KV
    cache or None; start: (B,) the caller's column of each row's first run token, None = column 0 and S = L; continues:
    the call goes on from the caller's own KV cache; packing: how the B rows are laid into fewer ones before they are run, with
    position_ids and mask (None = transformers makes it of them) of those, or None.
    """

    ids: Tensor
    own_mask: Tensor
    mask: Tensor | None
    position_ids: Tensor
    past: Any
    start: Tensor | None
    continues: bool
    packing: Packing | None = None

    def scatter(self, hidden: Tensor, columns: int) -> Tensor:
        """Back to the caller's columns, zeros elsewhere."""
        offset = torch.arange(hidden.shape[1], device=hidden.device)
        target = (self.start[:, None] + offset).clamp(max=columns)  # padding goes to an extra column that is cut off
        target = torch.where(self.own_mask.bool(), target, columns)
        out = hidden.new_zeros(hidden.shape[0], columns + 1, hidden.shape[2])
        return out.scatter(1, target[..., None].expand(-1, -1, hidden.shape[2]), hidden)[:, :columns]


def _placeholder_id(config: SpeechLMConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    if config.placeholder_token is None:
        return find_placeholder_id(tokenizer)
    token_id = tokenizer.get_vocab().get(config.placeholder_token)
    if token_id is None:
        raise ValueError(f"placeholder_token: expected a token of the vocabulary, got {config.placeholder_token!r}")
    return token_id


def _checked_waveform(waveform: np.ndarray, number: int) -> np.ndarray:
    wave = np.asarray(waveform)
    if wave.ndim != 1 or wave.size == 0:
        raise ValueError(f"waveforms[{number}]: expected a non-empty 1-D array, got shape {wave.shape}")
    if not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(f"waveforms[{number}]: expected floats in [-1, 1], got {wave.dtype}")
    if not np.isfinite(wave).all():
        raise ValueError(f"waveforms[{number}]: expected finite samples, got infinities or NaN")
    return wave.astype(np.float32, copy=False)
