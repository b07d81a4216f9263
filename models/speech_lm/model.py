"""A speech language model: frozen Whisper encoder, trained connector, frozen causal language model.

    waveforms --encode_audio--> features (B, K, T, D) --connector--> (B, Q, H) --+
                                                                                 +-> LM body -> hidden states -> head
    input_ids (B, L), audio positions holding the placeholder id --embeddings----+

    model = SpeechLM.from_config(SpeechLMConfig())
    features = model.encode_audio([waveform])                      # 16 kHz mono; frozen, so encode each clip once
    model.fit_feature_statistics(features)
    batch = model.make_collator()(examples, features)
    hidden = model.hidden_states_at(batch.target_index, **batch.model_inputs())   # (N, H); no logits are built

The connector changes nothing about the text before the audio, so a `PrefixCache` can keep that text's keys and values for all
epochs. Legend: B rows, L columns, K encoder layers, T frames, D encoder width, Q queries, H language model width.

Beside this file: config (settings), whisper_features (waveforms to features), connector, row_layout (padded, prefixed and packed
rows), saving (the folder of a saved model), collation (examples to batches).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import is_flash_attention_requested

from kdkernels.decoding import contrastive_generate
from kdkernels.layer_states import LayerStates
from kdkernels.model_modes import accepts, evaluating
from kdkernels.packing import Packing
from kdkernels.positions import check_lengths
from kdkernels.sampling import Sampling, TokenSampler, until_end
from kdkernels.teacher import MarkAbsent
from models.backbones import resolve
from models.backbones.answer_noise import AnswerNoise
from models.backbones.causal_lm import cache_keyword, check_token_ids, has_only_attention, logit_post, named_ends
from models.speech_lm.collation import Collator, SpeechBatch, find_placeholder_id
from models.speech_lm.config import SAMPLE_RATE, SpeechLMConfig
from models.speech_lm.connector import Connector
from models.speech_lm.log_mel import check_backend
from models.speech_lm.prefix_cache import PrefixCache, why_not_cached
from models.speech_lm.resampling import check_resampler
from models.speech_lm.row_layout import (
    Packer,
    PrefixedCache,
    RowLayout,
    check_packable,
    continued_layout,
    full_mask,
    left_padded,
    plain_layout,
    prefixed_layout,
)
from models.speech_lm.saving import (
    Backbones,
    SpeechLMError,
    backbone_sha256,
    check_backbone,
    load_connector,
    read_record,
    save_folder,
)
from models.speech_lm.whisper_features import check_encoder, checked_clips, encode_clips

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SAMPLE_RATE", "Backbones", "SpeechLM", "SpeechLMConfig", "SpeechLMError"]

_ENCODE_BATCH_CLIPS = 8  # the fastest on CPUs; larger batches do not fit into the processor's caches


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
        """Put given parts together. `from_config` and `from_pretrained` are the usual ways to make a model.

        Args:
            lm, tokenizer: the language model and its tokenizer.
            encoder, feature_extractor: both or neither; without them `resolver` loads them when they are first needed.
            resolver: where backbones come from; None = models.backbones.resolve.
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
        special = [self.placeholder_token_id, *filter(None, (tokenizer.eos_token_id, tokenizer.bos_token_id))]
        check_token_ids(special, lm, tokenizer)
        self.lm = lm.requires_grad_(config.train_lm)
        self.connector = Connector(config.connector_config(lm.get_input_embeddings().embedding_dim))
        self._encoder: nn.Module | None = None
        self.log_mel = "processor"  # what makes the encoder's input, see `use_log_mel`
        self.resampler = "soxr"  # of the clips, see `use_resampler`
        self._feature_extractor: Any = None
        if encoder is not None:
            self._set_encoder(encoder, feature_extractor)
        self._gradient_checkpointing = False
        self._stored_parts: frozenset[str] = frozenset()  # backbones that came out of a saved SpeechLM's own folder
        self._expected_encoder_sha256: str | None = None  # of the saved SpeechLM that this one was loaded from
        self.train(self.training)

    # --- making, saving, loading ------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: SpeechLMConfig, *, resolver: Backbones | None = None) -> SpeechLM:
        """A new model: backbones from `resolver` (default: models.backbones.resolve), connector with random weights.

        Raises:
            BackboneError: a backbone is not found; the message lists the places that were tried.
        """
        if not isinstance(config, SpeechLMConfig):
            raise TypeError(f"config: expected a SpeechLMConfig, got {type(config).__name__}")
        source = resolver if resolver is not None else resolve
        lm, tokenizer = source.load_causal_lm(config.lm, dtype=config.torch_dtype)
        return cls(config, lm=lm, tokenizer=tokenizer, resolver=source)

    def save_pretrained(self, folder: str | os.PathLike[str], *, include_frozen: bool = False) -> Path:
        """Write the model as safetensors and JSON; the folder appears complete or not at all.

        Args:
            folder: it is replaced if it exists.
            include_frozen: store the backbones too. Otherwise the folder names them, with the SHA-256 of their weights, and
                `from_pretrained` looks for them again. A language model that trains is always stored, and so is a backbone
                that came out of such a folder.
        """
        stored = set(self._stored_parts)
        if include_frozen or self.config.train_lm:
            stored |= {"lm"}
        if include_frozen:
            stored |= {"encoder"}
        named = {part: backbone_sha256(self.config, part, self._resolver) for part in ("lm", "encoder") if part not in stored}
        return save_folder(self, Path(folder), stored=frozenset(stored), sha256=named)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, resolver: Backbones | None = None) -> SpeechLM:
        """Load what `save_pretrained` wrote; backbones that were not stored come from `resolver`.

        Raises:
            SpeechLMError: no such model, a damaged file, another version, or a backbone whose weights are not those
                that the connector was trained with.
            BackboneError: a backbone is not found.
        """
        folder = Path(folder)
        config, frozen = read_record(folder)
        source = resolver if resolver is not None else resolve
        stored = frozenset(part for part in ("lm", "encoder") if (folder / part).is_dir())
        lm_spec = str(folder / "lm") if "lm" in stored else config.lm
        lm, tokenizer = source.load_causal_lm(lm_spec, dtype=config.torch_dtype)
        encoder, extractor = None, None
        if "encoder" in stored:
            encoder, extractor = source.load_speech_encoder(str(folder / "encoder"))
        try:
            model = cls(config, lm=lm, tokenizer=tokenizer, encoder=encoder, feature_extractor=extractor, resolver=source)
        except ValueError as error:
            raise SpeechLMError(f"{folder}/speech_lm.json: {error}") from None
        model._stored_parts = stored
        check_backbone(config, "lm", frozen.get("lm_sha256"), source, folder)
        model._expected_encoder_sha256 = frozen.get("encoder_sha256")  # checked when the encoder is loaded
        load_connector(model.connector, folder)
        return model

    def make_collator(self, **options: Any) -> Collator:
        """A `Collator` with this model's tokenizer, number of queries and placeholder."""
        return Collator(
            self.tokenizer, self.config.num_queries, placeholder_token_id=self.placeholder_token_id, lm=self.lm, **options
        )

    def make_prefix_cache(self, **options: Any) -> PrefixCache:
        """An empty `PrefixCache` of this model's language model.

        Raises:
            ValueError: the language model trains, so its keys and values change in every step; or it keeps other states.
        """
        if any(parameter.requires_grad for parameter in self.lm.parameters()):
            raise ValueError("train_lm: a prefix cache needs a frozen language model")
        if (why := why_not_cached(self.lm)) is not None:
            raise ValueError(f"prefix_cache: {type(self.lm).__name__} has to run without one: {why}")
        return PrefixCache(self.lm, **options)

    def prefix_inputs(self, **options: Any) -> dict[str, Any]:
        """`{"prefix_cache": make_prefix_cache(**options)}`; empty, with a line that says so, where the language model's states
        cannot be kept."""
        if (why := why_not_cached(self.lm)) is not None:
            tqdm.write(f"prefix cache: {type(self.lm).__name__} runs without one: {why}")
            return {}
        return {"prefix_cache": self.make_prefix_cache(**options)}

    # --- audio ------------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> nn.Module:
        """The frozen Whisper encoder, loaded at first use."""
        if self._encoder is None:
            self._set_encoder(*self._resolver.load_speech_encoder(self.config.encoder))
            expected = self._expected_encoder_sha256
            check_backbone(self.config, "encoder", expected, self._resolver, self.config.encoder)
        return self._encoder

    @property
    def feature_extractor(self) -> Any:
        """What turns a waveform into the encoder's input; loaded with the encoder."""
        return self._feature_extractor

    def encode_audio(self, waveforms: Sequence[np.ndarray], *, batch_clips: int = _ENCODE_BATCH_CLIPS) -> Tensor:
        """Run the frozen encoder.

        Args:
            waveforms: 16 kHz mono, 1-D float arrays in [-1, 1]; cut to `config.max_audio_seconds`.
            batch_clips: clips a forward pass.

        Returns:
            (B, K, T, D) float32 on the encoder's device: the chosen layers' hidden states over the clip's own length,
            averaged down to T frames. They are raw: the connector standardises them. Peak extra memory is that of one batch.

        Raises:
            ValueError: no waveform, or one that is not 1-D, empty, or not finite.
        """
        clips = checked_clips(waveforms, self.config)
        return encode_clips(
            self.encoder, self._feature_extractor, self.config, clips, batch_clips=batch_clips, backend=self.log_mel
        )

    def use_log_mel(self, backend: str) -> None:
        """Choose what makes the encoder's input: processor (the default), torch or torchaudio; see log_mel.py.

        Raises:
            LogMelError: torchaudio cannot be imported.
            ValueError: another name.
        """
        check_backend(backend)
        self.log_mel = backend

    def use_resampler(self, name: str) -> None:
        """Choose what resamples clips before they are encoded: soxr (the default) or torchaudio; see resampling.py.

        Raises:
            LogMelError: torchaudio cannot be imported.
            ValueError: another name.
        """
        check_resampler(name)
        self.resampler = name

    def fit_feature_statistics(self, features: Tensor | Iterable[Tensor]) -> None:
        """Set the connector's standardisation from raw features (N, K, T, D), or parts of them; use the training split's."""
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
            audio_features: (B, K, T, D) from `encode_audio` with one clip in each row, or (B, M, K, T, D) with up to M clips in
                each row, in the order of their placeholders. None = every clip masked.
            audio_present: (B,) bool, or (B, M); False masks the audio (its standardised features are zero): the negative path.
            prefix_cache: holds keys and values of the text before the first audio position. Logits at those positions are
                zeros: they are not computed.
            past_key_values: of an earlier call with `use_cache`. The audio is then in the past; this call inserts none.
            use_cache: return past_key_values, for a loop that appends tokens to rows padded on the left.
            logits_to_keep: 0 = all columns, n = the last n columns, tensor = these columns.

        Returns:
            an output with `.logits` (B, columns, V) and `.past_key_values`.

        Raises:
            ValueError: shapes or arguments that do not fit together; the message names them.
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
        answer_noise: AnswerNoise | None = None,
    ) -> Tensor:
        """The LM head's inputs at chosen positions; the head is not run and no logits exist.

        Args:
            index: (N,) int64, row * L + column; after the first audio position where `prefix_cache` is given.
            input_ids, attention_mask, audio_features, audio_present, prefix_cache: see `forward`.
            pack_tokens: lay the rows side by side, without padding, in packed rows of at most this many tokens. If one row is
                longer, its length is the limit. The samples do not see each other. With SDPA the masks are block-diagonal: the
                time of a packed row grows with the square of its length, so a few samples a row are best. Flash-attention
                takes one row of any length, by its varlen kernel (not tested: needs a GPU). One wait for a CUDA device a call.
            layers: also the states of these layers of the language model, counted as in `kdkernels.layer_map`.
            answer_noise: is added to the embeddings of the answers' tokens.

        Returns:
            (N, H) in the language model's dtype, with a gradient to the connector (and to the LM if it trains). With K layers
            (N, 1 + K, H): first what the head reads.

        Raises:
            ValueError: in one of these cases.

                - `index` is not 1-D int64. On the CPU also: it is out of range or inside the cached prefix.
                - The model has no such layer, or it has gradient checkpointing, which first runs each layer without a gradient.
                - pack_tokens is given, and the language model has other layers than attention.
                - pack_tokens and prefix_cache are given, and the attention is not plain SDPA.
        """
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"index: expected (N,) int64, got {tuple(index.shape)} {index.dtype}")
        if layers and self._gradient_checkpointing and self.training:
            raise ValueError("layers: cannot be combined with gradient checkpointing")
        if pack_tokens is not None:
            check_packable(self.lm.config, pack_tokens, prefix_cache)
        layout = self._layout(input_ids, attention_mask, prefix_cache, None, False, pack_tokens)
        index = layout.positions_of(index, input_ids.shape[1], input_ids.numel())
        if not layers:
            return self._run(layout, audio_features, audio_present, answer_noise).flatten(0, 1)[index]
        with LayerStates(self.lm, layers, index) as taken:
            hidden = self._run(layout, audio_features, audio_present, answer_noise)  # (B, S, H), or packed
        return torch.cat([hidden.flatten(0, 1)[index][:, None], taken.stacked()], 1)

    @torch.no_grad()
    def generate(
        self,
        batch: SpeechBatch | Mapping[str, Any],
        *,
        max_new_tokens: int = 16,
        prefix_cache: PrefixCache | None = None,
    ) -> list[str]:
        """Greedy continuation of a batch of prompts, with a KV cache.

        Args:
            batch: rows that end with the last token of their prompt (`collator(..., with_target=False)`), or their model
                inputs as a mapping.
            max_new_tokens: limit of each row.
            prefix_cache: see `forward`.

        Returns:
            one text for each row, without special tokens and outer white space.

        Raises:
            ValueError: the positions of a row would depend on the others, see `kdkernels.positions`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
        ends = set(self.end_ids)
        rows = self._new_tokens(batch, lambda logits: logits.argmax(-1), ends, max_new_tokens, prefix_cache)
        texts = [row[:-1] if row[-1] in ends else row for row in rows]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in texts]

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer: the end of text, and what the language model's generation config names."""
        return sorted(named_ends(self.lm, self.tokenizer))

    @torch.no_grad()
    def answer_ids(
        self,
        batch: SpeechBatch | Mapping[str, Any],
        *,
        max_new_tokens: int = 16,
        alpha: float | None = None,
        **contrast: Any,
    ) -> list[list[int]]:
        """Greedy answers to a batch of prompts; with `alpha` by contrastive decoding of the paths with and without the audio.

        Args:
            batch: as in `generate`.
            max_new_tokens: limit of each row.
            contrast: other keywords of `kdkernels.contrastive_generate`; only with alpha.

        Returns:
            B lists of ids. One whose last id is none of `end_ids` was cut off after `max_new_tokens`.
        """
        if alpha is None:
            if contrast:
                raise ValueError(f"alpha: expected a number beside {', '.join(contrast)}, got None")
            draws = torch.zeros(len(batch), max_new_tokens, dtype=torch.float64)  # of sampling, which greedy does without
            return self.own_answers(batch, draws, sampling=Sampling(0.0, max_new_tokens=max_new_tokens))
        inputs = batch.model_inputs() if isinstance(batch, SpeechBatch) else batch
        tokens = contrastive_generate(
            self, inputs, negative=MarkAbsent(), alpha=alpha, max_new_tokens=max_new_tokens, eos_token_id=self.end_ids, **contrast
        )
        return until_end(tokens, self.end_ids)

    @torch.no_grad()
    def own_answers(
        self,
        batch: SpeechBatch | Mapping[str, Any],
        draws: Tensor,
        *,
        sampling: Sampling,
        suppressed: Iterable[int] = (),
        prefix_cache: PrefixCache | None = None,
    ) -> list[list[int]]:
        """Sampled answers to a batch of prompts, as token ids, with a KV cache.

        Args:
            batch, prefix_cache: as in `generate`.
            draws, sampling, suppressed: as in `kdkernels.sampling.own_answers`.

        Returns:
            B lists of ids. One whose last id is none of `end_ids` was cut off after `sampling.max_new_tokens`.
        """
        ends = set(self.end_ids)
        sampler = TokenSampler(sampling, draws, suppressed=set(suppressed) - ends)
        with evaluating(self):
            answers = self._new_tokens(batch, sampler.choose, ends, sampling.max_new_tokens, prefix_cache)
        sampler.check()
        return answers

    def _new_tokens(
        self,
        batch: SpeechBatch | Mapping[str, Any],
        choose: Callable[[Tensor], Tensor],
        ends: set[int],
        max_new_tokens: int,
        prefix_cache: PrefixCache | None,
    ) -> list[list[int]]:
        """Each row's new tokens, the end included. `choose`: logits (B, V) of the next token -> ids (B,)."""
        inputs = dict(batch.model_inputs() if isinstance(batch, SpeechBatch) else batch)
        prefix_cache = inputs.pop("prefix_cache", None) if prefix_cache is None else prefix_cache
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if prefix_cache is None:  # new tokens follow their row's last one in the next column, where a sliding window expects them
            ids, mask = left_padded(ids, full_mask(ids, mask, 0))
        lengths = full_mask(ids, mask, 0).sum(1)
        shortest = int(lengths.min()) if prefix_cache is None else 0  # a prefix was read alone
        check_lengths(self.lm, shortest, int(lengths.max()) + max_new_tokens - 1)
        layout = self._layout(ids, mask, prefix_cache, None, True)
        hidden = self._run(layout, inputs.get("audio_features"), inputs.get("audio_present"))
        rows = torch.arange(len(ids), device=ids.device)
        last = (layout.own_mask * torch.arange(1, layout.ids.shape[1] + 1, device=ids.device)).argmax(1)
        position = layout.position_ids[rows, last]
        hidden, mask = hidden[rows, last], layout.mask
        end_ids = torch.tensor(sorted(ends), dtype=torch.int64, device=ids.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        made: list[Tensor] = []
        for step in range(max_new_tokens):
            token = choose(self._logits(hidden))  # (B,)
            done |= torch.isin(token, end_ids)
            made.append(token)
            if step == max_new_tokens - 1 or bool(done.all()):
                break
            position = position + 1
            mask = F.pad(mask, (0, 1), value=1)
            embeddings = self.lm.get_input_embeddings()(token[:, None])
            hidden = self._body(embeddings, mask, position[:, None], layout.past, True)[:, -1]
        return until_end(torch.stack(made, dim=1), ends)

    # --- what training and evaluation ask of a model ------------------------------------------------------------------

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
        """Keeps frozen parts in evaluation mode. (transformers checkpoints activations in training mode only.)"""
        super().train(mode)
        self.lm.train(mode and (self.config.train_lm or getattr(self, "_gradient_checkpointing", False)))
        if self._encoder is not None:
            self._encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The device of the connector."""
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
    ) -> RowLayout:
        """Check the arguments of a call and lay out its rows; arguments as in `forward` and `hidden_states_at`."""
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids: expected (B, L) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
        if isinstance(past, PrefixedCache):
            return continued_layout(input_ids, attention_mask, past)
        past_columns = 0
        if past is not None:  # not asked of the cache: one without keys and values does not know
            columns = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            past_columns = max(columns - input_ids.shape[1], past.get_seq_length() if has_only_attention(self.lm) else 0)
        attention_mask = full_mask(input_ids, attention_mask, past_columns)
        pack = None if pack_tokens is None else self._packer(pack_tokens)
        if prefix_cache is None:
            if past is None and use_cache:  # with a config it keeps other states too, without one all columns of keys and values
                past = DynamicCache() if has_only_attention(self.lm) else DynamicCache(config=self.lm.config)
            return plain_layout(input_ids, attention_mask, past, past_columns, pack)
        if past is not None:
            raise ValueError("past_key_values: cannot be combined with prefix_cache")
        if prefix_cache.lm is not self.lm:
            raise ValueError("prefix_cache: expected one made with this model's language model, got another's")
        if self._gradient_checkpointing and self.training:
            raise ValueError("prefix_cache: cannot be combined with gradient checkpointing, which drops the KV cache")
        layout = prefixed_layout(input_ids, attention_mask, prefix_cache, self.placeholder_token_id, pack)
        layout.grows = use_cache
        return layout

    def _packer(self, pack_tokens: int) -> Packer:
        limit = None if self._runs_varlen else pack_tokens  # varlen: everything in one row
        return lambda mask: Packing.of_mask(mask, limit)

    @property
    def _runs_varlen(self) -> bool:
        return is_flash_attention_requested(self.lm.config)

    def _run(
        self, layout: RowLayout, features: Tensor | None, present: Tensor | None, noise: AnswerNoise | None = None
    ) -> Tensor:
        """(B, S, H) last hidden states of the tokens that are run, or those of packed rows."""
        embeddings = self.lm.get_input_embeddings()
        is_audio = layout.ids == self.placeholder_token_id
        x = embeddings(layout.ids)  # (B, S, H)
        x = x if noise is None else noise.added(x, layout.start)
        if not layout.continues:
            x = self._insert_audio(x, is_audio, features, present)
        keywords: dict[str, Any] = {}
        if layout.packing is not None:
            x = layout.packing.take(x)
            if self._runs_varlen:
                begins, longest = layout.packing.cumulative_lengths(), max(layout.packing.lengths)
                keywords = {f"cu_seq_lens_{side}": begins for side in "qk"} | {f"max_length_{side}": longest for side in "qk"}
        hidden = self._body(x, layout.mask, layout.position_ids, layout.past, layout.past is not None, **keywords)
        if layout.grows:
            layout.close_gaps()
        return hidden

    def _insert_audio(self, x: Tensor, is_audio: Tensor, features: Tensor | None, present: Tensor | None) -> Tensor:
        """Put the connector's vectors at the audio positions, by gather and where: the CPU does not wait for the device."""
        rows, queries = x.shape[0], self.config.num_queries
        clips = 1 if features is None or features.dim() == 4 else features.shape[1]
        if is_audio.device.type == "cpu":  # elsewhere a look at the values would stall the device
            counts = is_audio.sum(1)
            if not counts.any():
                return x
            self._check_audio_positions(counts, clips)
        if features is None:
            shape = self.connector.config
            features = x.new_zeros(rows, shape.num_feature_layers, shape.num_frames, shape.feature_dim)
            present = torch.zeros(rows, dtype=torch.bool, device=x.device)
        features, present = _one_clip_a_row(features, present, rows, clips)
        audio = self.connector(features, present).to(x.dtype)  # (B * M, Q, H)
        audio = audio.reshape(rows, clips * queries, audio.shape[-1])
        slot = (is_audio.cumsum(1) - 1).clamp(0, clips * queries - 1)  # which query stands at each position
        spread = audio.gather(1, slot[..., None].expand(-1, -1, audio.shape[-1]))
        return torch.where(is_audio[..., None], spread, x)

    def _check_audio_positions(self, counts: Tensor, clips: int) -> None:
        """`counts`: (B,) audio positions of each row; ValueError unless each is that of whole clips, at most `clips` of them."""
        queries = self.config.num_queries
        wrong = ((counts % queries != 0) | (counts > clips * queries)).nonzero().flatten().tolist()
        if wrong:
            expected = f"{queries} audio positions a row or none"
            if clips > 1:
                expected = f"{queries} audio positions a clip, at most {clips} clips a row"
            raise ValueError(f"input_ids: expected {expected}, got {counts[wrong[0]].item()} in row {wrong[0]}")

    def _body(
        self, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor, past: Any, use_cache: bool, **varlen: Any
    ) -> Tensor:
        decoder = self.lm.get_decoder()
        if accepts(decoder, "position_ids"):
            varlen["position_ids"] = position_ids
        return decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            use_cache=use_cache,
            **{cache_keyword(decoder): past},
            **varlen,
        ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        return logit_post(self.lm)(self.lm.get_output_embeddings()(hidden))

    def _set_encoder(self, encoder: nn.Module, feature_extractor: Any) -> None:
        check_encoder(encoder, self.config)
        device = self.connector.queries.device
        self._encoder = encoder.requires_grad_(False).eval().to(device)
        self._feature_extractor = feature_extractor


def _placeholder_id(config: SpeechLMConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    if config.placeholder_token is None:
        return find_placeholder_id(tokenizer)
    token_id = tokenizer.get_vocab().get(config.placeholder_token)
    if token_id is None:
        raise ValueError(f"placeholder_token: expected a token of the vocabulary, got {config.placeholder_token!r}")
    return token_id


def _one_clip_a_row(
    features: Tensor, present: Tensor | None, rows: int, clips: int
) -> tuple[Tensor, Tensor | None]:
    """Features (B, K, T, D) or (B, M, K, T, D) as (B * M, K, T, D), and `present` (B,) or (B, M) as (B * M,)."""
    if features.shape[0] != rows:
        raise ValueError(f"audio_features: expected {rows} rows, one a row of input_ids, got {features.shape[0]}")
    if features.dim() == 5:
        if present is not None and present.dim() == 1:
            present = present[:, None].expand(rows, clips)
        if present is not None and tuple(present.shape) != (rows, clips):
            raise ValueError(f"audio_present: expected ({rows},) or ({rows}, {clips}), got {tuple(present.shape)}")
        return features.flatten(0, 1), None if present is None else present.flatten()
    if present is not None and tuple(present.shape) != (rows,):
        raise ValueError(f"audio_present: expected ({rows},), got {tuple(present.shape)}")
    return features, present
