"""Contrastive decoding at test time: the baseline that CAAD distils into the student.

Two forward passes a token, with the audio and without; both paths are rows of one batch with one KV cache.

Legend: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_not_negative, check_tensor, is_number, is_positive, shown
from .model_modes import audio_adapters_on, evaluating
from .ops.rows import MASK_BELOW
from .paths import SEQUENCE_PADDING, Inputs, Negative, PathBatch, as_batch, clean, join, tokens_of
from .positions import check_lengths

__all__ = ["contrast_logits", "contrastive_generate"]

FORMULAS = ("extrapolate", "authors", "aad")
_AAD_ALPHA = 0.5


def contrast_logits(
    audio_logits: Tensor,
    text_logits: Tensor,
    *,
    alpha: float | None = None,
    formula: str = "extrapolate",
    plausibility: float | None = None,
) -> Tensor:
    """Contrastive scores of the next token.

        extrapolate:  (1 + alpha) z_audio - alpha z_text       the CAAD paper's target
        authors:      z_audio - alpha z_text                   what CAAD's public code decodes with
        aad:          extrapolate with alpha 0.5               audio-aware decoding, no mask in the original

    With plausibility beta only tokens v with z_audio_v >= max z_audio + log beta are kept, the others get -inf.

    Args:
        audio_logits, text_logits: (..., V) of the two paths; -inf, or less than -1e30, on either side becomes -inf.
        alpha: strength, >= 0; may be left out for "aad" only.
        formula: one of the three above.
        plausibility: beta in (0, 1], or None.

    Returns:
        (..., V) float32.

    Raises:
        ValueError: naming the argument.
    """
    alpha = _check_contrast(alpha, formula, plausibility)
    check_tensor("audio_logits", audio_logits)
    check_tensor("text_logits", text_logits)
    if audio_logits.shape != text_logits.shape:
        raise ValueError(f"text_logits: expected shape {tuple(audio_logits.shape)}, got {tuple(text_logits.shape)}")
    audio, text = audio_logits.float(), text_logits.float()
    scores = audio - alpha * text if formula == "authors" else audio + alpha * (audio - text)
    dropped = (audio < MASK_BELOW) | (text < MASK_BELOW)
    if plausibility is not None:
        dropped |= audio < audio.amax(dim=-1, keepdim=True) + math.log(plausibility)
    return scores.masked_fill(dropped, -math.inf)


def _check_contrast(alpha: float | None, formula: str, plausibility: float | None) -> float:
    if formula not in FORMULAS:
        raise ValueError(f"formula: expected one of {', '.join(FORMULAS)}, got {formula!r}")
    if alpha is None:
        if formula != "aad":
            raise ValueError(f"alpha: expected a number for formula {formula!r}, got None")
        alpha = _AAD_ALPHA
    check_not_negative("alpha", alpha)
    if plausibility is not None and not (is_number(plausibility) and 0 < plausibility <= 1):
        raise ValueError(f"plausibility: expected a number in (0, 1] or None, got {plausibility!r}")
    return alpha


@torch.no_grad()
def contrastive_generate(
    model: nn.Module,
    inputs: Inputs,
    *,
    negative: Negative | None = None,
    text_inputs: Inputs | None = None,
    alpha: float | None = None,
    formula: str = "extrapolate",
    plausibility: float | None = None,
    max_new_tokens: int = 64,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Continues prompts by the contrast of the two paths; see `contrast_logits` for the formulas.

    The chosen token goes to both paths. transformers models run through their own `generate`, with the positions and caches
    of their family, but with an empty generation config. So a checkpoint's sampling and penalties have no effect, and
    `model.generation_config` is replaced during the call. Other modules run through their `forward`, which has to take
    `past_key_values` and `use_cache`.

    Args:
        model: a transformers LM that can generate (with or without PEFT), or a module whose forward takes `input_ids`,
            `attention_mask`, `past_key_values`, `use_cache` and returns `.logits` and `.past_key_values`.
        inputs: the prompts of the positive path, padded on either side; without `position_ids`, which follow from the
            attention mask.
        negative: makes the negative path's inputs, see `DualPathTeacher`; `DropKey` does not fit here.
        text_inputs: the negative path's prompts. Their length may differ. Give either this or negative.
        alpha, formula, plausibility: see `contrast_logits`.
        max_new_tokens: T at most.
        eos_token_id: a row ends after any of these; None takes the model's generation config's, [] never ends.
        pad_token_id: fills ended rows; None takes the generation config's, or else an end token.
        temperature: None chooses the best token, a number samples from softmax(scores / temperature).
        top_k: sample from this many best tokens (and those equal to the last of them); None = from all. It needs temperature.
        top_p: sample from the fewest of these that together have this probability, in (0, 1]; None = from all. It needs
            temperature.
        generator: for sampling, on the model's device.
        use_cache: False recomputes both prompts for each token, which is slow. Models without a cache need it.
        return_scores: also return the contrastive scores that each token was chosen from.

    Returns:
        (B, T) int64, the new tokens alone; with return_scores also (B, T, V) float32.

    Raises:
        ValueError, TypeError: for a bad argument, with its name. A model without a cache raises ValueError unless
        use_cache=False. So does one whose positions would change with the longest row (rope types "longrope" and "dynamic").

    Memory: the KV cache of 2 B rows; logits of the last position only where the model takes `logits_to_keep`.
    """
    alpha = _check_contrast(alpha, formula, plausibility)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected a positive int, got {max_new_tokens!r}")
    if temperature is not None and not is_positive(temperature):
        raise ValueError(f"temperature: expected a positive number or None (best token), got {shown(temperature)}")
    for name, limit in (("top_k", top_k), ("top_p", top_p)):
        if limit is not None and temperature is None:
            raise ValueError(f"{name}: expected None without temperature, which means the best token, got {limit}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: expected a positive int or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1] or None, got {top_p}")
    both = _both_prompts(inputs, negative, text_inputs)
    lengths = both.inputs["attention_mask"].sum(1)
    check_lengths(model, int(lengths.min()), int(lengths.max()) + max_new_tokens - 1)
    chooser = _Chooser(
        lambda audio, text: contrast_logits(audio, text, alpha=alpha, formula=formula, plausibility=plausibility),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        keep_scores=return_scores,
    )
    model = _without_peft(model)
    eos = eos_ids_of(model, eos_token_id)
    pad = _pad_id(model, pad_token_id, eos)
    with evaluating(model), audio_adapters_on(model):
        if _is_transformers(model):
            tokens = generate_with(model, both, chooser, max_new_tokens, eos, pad, use_cache=use_cache)
        else:
            tokens = _loop(model, both, chooser, max_new_tokens, eos, pad, use_cache)
    tokens = tokens[: both.rows // 2]
    return (tokens, chooser.stacked_scores(tokens.shape[1])) if return_scores else tokens


def kept_probabilities(
    scores: Tensor, temperature: float, *, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """(B, V) softmax(scores / temperature), 0 where top_k or top_p leaves a token out; the sum may be below 1.

    Of the top_k best tokens the fewest stay that together have top_p of their probability, at least one.
    """
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    probabilities = torch.softmax((scores - scores.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p is None or top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(dim=-1) - ordered  # of the better tokens; 0 for the best
    return torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))


class _Chooser:
    """Next tokens from the logits of both paths, (2 B, V) with the positive path's rows first."""

    def __init__(
        self,
        contrast: Callable[[Tensor, Tensor], Tensor],
        *,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
        keep_scores: bool,
    ):
        self._contrast = contrast
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._generator = generator
        self._scores: list[Tensor] | None = [] if keep_scores else None

    def choose(self, logits: Tensor) -> Tensor:
        """(2 B, V) -> (B,)"""
        scores = self._contrast(*logits.chunk(2))
        if self._scores is not None:
            self._scores.append(scores)
        if self._temperature is None:
            return scores.argmax(dim=-1)
        probabilities = kept_probabilities(scores, self._temperature, top_k=self._top_k, top_p=self._top_p)
        return torch.multinomial(probabilities, 1, generator=self._generator).squeeze(1)

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """As a logits processor of transformers: all but the chosen token is -inf, on both paths' rows."""
        chosen = self.choose(logits).repeat(2)[:, None]  # (2 B, 1)
        return torch.full_like(logits, -math.inf).scatter_(1, chosen, 0.0)

    def stacked_scores(self, steps: int) -> Tensor:
        assert self._scores is not None
        return torch.stack(self._scores[:steps], dim=1)  # (B, T, V)


# --------------------------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------------------------


def _both_prompts(inputs: Inputs, negative: Negative | None, text_inputs: Inputs | None) -> PathBatch:
    """Both paths' prompts as one batch, every row ending at the last column."""
    if (negative is None) == (text_inputs is None):
        got = "neither" if negative is None else "both"
        raise ValueError(f"negative, text_inputs: expected exactly one of them, got {got}")
    cleaned = clean(inputs, "inputs")
    if negative is not None:
        positive = getattr(negative, "positive", None)
        cleaned = cleaned if positive is None else positive(cleaned)
        text_inputs = negative(cleaned)
    assert text_inputs is not None  # given, or made above
    text_cleaned = clean(text_inputs, "text_inputs" if negative is None else "negative(inputs)")
    if negative is not None and text_cleaned.keys() != cleaned.keys():
        raise ValueError(
            f"negative: expected it to keep the inputs' names {sorted(cleaned)}, got {sorted(text_cleaned)}; "
            "the two paths share a batch here"
        )
    for name, given in (("inputs", cleaned), ("text_inputs", text_cleaned)):
        if "position_ids" in given:
            raise ValueError(f"{name}: expected no position_ids (they follow from the attention mask), got some")
    audio = _right_aligned(as_batch(cleaned, "inputs"))
    text = _right_aligned(as_batch(text_cleaned, "text_inputs"))
    if audio.rows != text.rows:
        raise ValueError(f"text_inputs: expected {audio.rows} rows as in inputs, got {text.rows}")
    return _with_mask(join(audio, text, pad_left=True))


def plain_prompts(inputs: Inputs) -> PathBatch:
    """Prompts of one path as a batch, every row ending at the last column."""
    cleaned = clean(inputs, "inputs")
    if "position_ids" in cleaned:
        raise ValueError("inputs: expected no position_ids (they follow from the attention mask), got some")
    return _with_mask(_right_aligned(as_batch(dict(cleaned), "inputs")))


def _with_mask(batch: PathBatch) -> PathBatch:
    if "attention_mask" not in batch.inputs:
        tokens = tokens_of(batch.inputs, "inputs")
        batch.inputs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    return batch


def _right_aligned(batch: PathBatch) -> PathBatch:
    """Padding moved to the left, so that new tokens follow the prompt directly."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or batch.length == 0 or bool(mask[:, -1].bool().all()):
        return batch
    column = torch.arange(batch.length, device=mask.device)
    last = (column * mask.bool()).amax(dim=1)  # (B,)
    source = (column - (batch.length - 1 - last)[:, None]) % batch.length  # (B, L)
    rolled = dict(batch.inputs)
    for key in SEQUENCE_PADDING.keys() & rolled.keys():
        value = rolled[key]
        if value.shape[:2] != source.shape:
            raise ValueError(f"inputs[{key!r}]: expected shape {tuple(source.shape)}, got {tuple(value.shape)}")
        where = source.reshape(*source.shape, *[1] * (value.ndim - 2)).expand(value.shape)
        rolled[key] = value.gather(1, where)
    return PathBatch(rolled, batch.rows, batch.length)


# --------------------------------------------------------------------------------------------------------------------
# The two ways to run a model
# --------------------------------------------------------------------------------------------------------------------


def generate_with(
    model: Any,
    both: PathBatch,
    chooser: Callable[[Tensor, Tensor], Tensor],
    max_new_tokens: int,
    eos: list[int],
    pad: int,
    *,
    use_cache: bool,
    synced_gpus: bool | None = None,
) -> Tensor:
    """transformers' own loop, new tokens alone; the choice happens in a logits processor, which leaves one token above -inf."""
    from transformers import GenerationConfig, LogitsProcessorList

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos or None,
        pad_token_id=pad,
        use_cache=use_cache,
    )
    with _bare_generation_config(model, GenerationConfig()):
        synced = {} if synced_gpus is None else {"synced_gpus": synced_gpus}
        tokens = model.generate(
            **both.inputs, generation_config=config, logits_processor=LogitsProcessorList([chooser]), **synced
        )
    # With inputs_embeds alone transformers returns the new tokens only.
    return tokens[:, both.length :] if "input_ids" in both.inputs else tokens


@contextlib.contextmanager
def _bare_generation_config(model: Any, bare: Any) -> Iterator[None]:
    """Empties it: transformers fills what a generation config leaves open from the model's own, penalties included."""
    own = model.generation_config
    model.generation_config = bare
    try:
        yield
    finally:
        model.generation_config = own


def _loop(
    model: nn.Module, both: PathBatch, chooser: _Chooser, max_new_tokens: int, eos: list[int], pad: int, use_cache: bool
) -> Tensor:
    """The same by calls of forward, for modules that are no transformers models."""
    parameters = inspect.signature(model.forward).parameters
    if use_cache and not {"past_key_values", "use_cache"} <= parameters.keys():
        raise ValueError(
            f"model: expected {type(model).__name__}.forward to take past_key_values and use_cache, it takes "
            f"{sorted(parameters)}; pass use_cache=False to recompute both paths for every token"
        )
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    if use_cache:
        options["use_cache"] = True
    elif "input_ids" not in both.inputs:
        raise ValueError("inputs: expected input_ids with use_cache=False, got inputs_embeds alone")
    mask = both.inputs["attention_mask"]
    ended = torch.zeros(both.rows // 2, dtype=torch.bool, device=mask.device)
    eos_ids = torch.tensor(eos, dtype=torch.int64, device=mask.device)
    current = dict(both.inputs)
    chosen: list[Tensor] = []
    while True:
        output = model(**current, **options)
        token = chooser.choose(output.logits[:, -1]).masked_fill(ended, pad)  # (B,)
        chosen.append(token)
        ended = ended | torch.isin(token, eos_ids)
        if len(chosen) == max_new_tokens or bool(ended.all()):
            return torch.stack(chosen, dim=1).repeat(2, 1)
        column = token.repeat(2)[:, None]
        mask = F.pad(mask, (0, 1), value=1)
        if not use_cache:
            current = {**current, "input_ids": torch.cat([current["input_ids"], column], 1), "attention_mask": mask}
            continue
        past = getattr(output, "past_key_values", None)
        if past is None:
            raise ValueError(
                f"model: expected {type(model).__name__}.forward(use_cache=True) to return past_key_values, got none; "
                "pass use_cache=False to recompute both paths for every token"
            )
        current = {"input_ids": column, "attention_mask": mask, "past_key_values": past}
        if "position_ids" in parameters:
            current["position_ids"] = mask.sum(dim=1, keepdim=True) - 1


def _is_transformers(model: Any) -> bool:
    return hasattr(model, "generation_config") and hasattr(model, "prepare_inputs_for_generation")


def transformers_model(model: Any) -> Any:
    """The model that generates, out of PEFT's wrapper. Raises TypeError where it is none of transformers."""
    base = _without_peft(model)
    if not _is_transformers(base):
        raise TypeError(f"model: expected a transformers LM with generate(), got {type(base).__name__}")
    return base


def _without_peft(model: Any) -> nn.Module:
    """PEFT's adapters live in the layers; its wrapper's generate would keep our generation config."""
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError("model: expected PEFT adapters inside the layers, got prompt learning, which is not supported")
    return model.get_base_model()


def eos_ids_of(model: nn.Module, given: int | Sequence[int] | None) -> list[int]:
    if given is None:
        for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            given = source.get("eos_token_id") if isinstance(source, Mapping) else getattr(source, "eos_token_id", None)
            if given is not None:
                break
    if given is None:
        return []
    return [given] if isinstance(given, int) else [int(token) for token in given]


def _pad_id(model: nn.Module, given: int | None, eos: list[int]) -> int:
    if given is not None:
        return given
    own = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return own if own is not None else (eos[0] if eos else 0)
