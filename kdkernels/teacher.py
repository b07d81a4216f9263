"""The frozen teacher, run with and without the audio: synchronised teacher forcing (CAAD, arXiv 2606.23052).

The pseudo ground truth Y is forced through the teacher twice, once with the audio (positive path) and once without (negative
path).  Both paths are the rows of ONE batched pass.  The teacher hands out the hidden states at the positions that predict Y,
never logits: `fused_linear_caad_loss` builds those chunk by chunk.

Legend: B rows of a batch, L columns of its longest row, N positions that predict Y, H hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_tensor, is_whole
from .head_capture import HeadCapture, fit_post, post_numbers, probe_values
from .head_checks import check_linear, refuse_hooks
from .head_layers import head_module, head_parameters, head_state
from .layer_states import LayerStates
from .lm_head import LMHead, apply_post
from .model_modes import accepts, audio_adapters_on, evaluating, hearing
from .packing import pack_batch
from .paths import DropKey, Inputs, MarkAbsent, MaskFeatures, Negative, PathBatch, as_batch, clean, join

# Relative, between packed and padded rows: bfloat16 rounds to 2^-9 a layer, while samples that see each other are off by order 1.
_PACKING_TOLERANCE = 0.1

__all__ = [
    "DropKey",
    "DualPathStates",
    "DualPathTeacher",
    "LMHead",
    "MarkAbsent",
    "MaskFeatures",
    "answer_index",
]


def answer_index(labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Flat positions whose hidden states predict the labels, and the labels there: the next-token shift.

        index[n] = row * L + column   with   labels[row, column + 1] == target[n] != ignore_index

    Args:
        labels: (B, L) int64, aligned with `input_ids` (not shifted); `ignore_index` where nothing is to be predicted.
        ignore_index: the label of positions without a target.

    Returns:
        index (N,) int64 and target (N,) int64, ordered by row, then by column.  No position predicts a label in column 0, so
        it is left out, as in transformers' own shift.

    Raises:
        TypeError: labels are no int64 tensor; ignore_index is no int.
        ValueError: labels are not two-dimensional.

    On CUDA this waits for the device, because N is not known before. A collator calls it on the CPU.
    """
    check_tensor("labels", labels)
    if not is_whole(ignore_index):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    if labels.ndim != 2:
        raise ValueError(f"labels: expected shape (B, L), got {tuple(labels.shape)}")
    length = labels.shape[1]
    shifted = labels[:, 1:]  # (B, L - 1)
    row, column = (shifted != ignore_index).nonzero(as_tuple=True)
    return row * length + column, shifted[row, column]


@dataclass(frozen=True, eq=False)
class DualPathStates:
    """The LM head's inputs at the N positions that predict Y, on both paths: (N, H) each, in the model's dtype.

    text_hidden and text_layers are None where there is no negative path (plain distillation).
    audio_layers, text_layers: (N, K, H), the K layers asked for, or None.
    """

    audio_hidden: Tensor
    text_hidden: Tensor | None
    audio_layers: Tensor | None = None
    text_layers: Tensor | None = None

    @classmethod
    def _split(cls, audio: Tensor, text: Tensor | None) -> DualPathStates:
        """Made from (N, H) each, or (N, 1 + K, H) with layers."""
        if audio.dim() == 2:
            return cls(audio, text)
        if text is None:
            return cls(audio[:, 0], None, audio[:, 1:])
        return cls(audio[:, 0], text[:, 0], audio[:, 1:], text[:, 1:])


class DualPathTeacher(nn.Module):
    """A frozen audio LM on two paths, with the audio and without, in one batched pass.

        z_audio = head(audio_hidden),  z_text = head(text_hidden)      at the positions that predict Y

    Works with any causal LM of transformers: hooks take the LM head's input, and the head itself computes nothing. Works also
    with any module that has `hidden_states_at(index, **inputs) -> (N, H)`, where index is row * L + column. If `layers` are
    wanted, that method takes `layers=` and returns (N, 1 + K, H): the head's input, then the layers.

    Args:
        model: the teacher.  It is used in evaluation mode and without gradients; `freeze()` also clears requires_grad.
        negative: makes the inputs of the negative path from those of the positive one:
            `MaskFeatures("input_features")`, `DropKey(...)`, `MarkAbsent()`, or any callable mapping -> mapping that
            keeps the tokens' positions.  None: a call with text_inputs has two paths, and a call without is plain distillation
            from one path. So a text LM can be the teacher, and no row runs twice.
        rows_per_pass: None runs the 2 B rows of both paths at once. A number splits them into passes of that many rows; each pass
            waits for a CUDA device once.
        pack_tokens: put the rows of a pass side by side, without padding, in rows of at most this many tokens. A longer row
            raises that limit; flash-attention takes one row of any length. The attention mask is left out, and position ids
            restart at each sample. So transformers keeps samples apart, and flash-attention runs its varlen kernel (not tested
            on a GPU). A model with its own hidden_states_at cannot take this. The first call also runs without packing and
            compares. Each pass waits for a CUDA device once.
        head: the LM head, where it cannot be read from the model (`LMHead.from_model` says why). A copy stays as it is; one
            that shares the model's memory follows the model.
        merge_lora: see `LMHead.from_model`; the merge is made each time that `head` is read.
        layers: also hand out the states of these layers at the same positions, counted as in `kdkernels.layer_map`.

    Attributes:
        head: `LMHead`. It is read from the model each time, so it is the head that the model has now.
            `teacher.head.keywords("teacher")` are the keywords of `fused_linear_caad_loss`.

    A row that the caller has packed (position_ids that restart, no attention mask) is a pass of its own on each path.

    Each call puts the model in the modes of an evaluation with audio, and restores its own modes afterwards. These are evaluation
    mode, the adapters that the model turns on for audio (Granite Speech), and an output without cache, layers and attentions.

    Raises:
        TypeError, ValueError: see `LMHead.from_model`. Also for rows_per_pass or pack_tokens that is not a positive int, and for
            pack_tokens with a model that has hidden_states_at.

    Memory beyond the model's own activations: rows_per_pass * L * H for one pass's hidden states, 2 N H for the result, and 2 N H
    for each of `layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        negative: Negative | None,
        rows_per_pass: int | None = None,
        pack_tokens: int | None = None,
        head: LMHead | None = None,
        merge_lora: bool = False,
        layers: Sequence[int] = (),
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if negative is not None and not callable(negative):
            raise TypeError(f"negative: expected a callable inputs -> inputs or None, got {type(negative).__name__}")
        for name, value in (("rows_per_pass", rows_per_pass), ("pack_tokens", pack_tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive int or None, got {value!r}")
        self.model = model
        self.negative = negative
        self.rows_per_pass = rows_per_pass
        self.pack_tokens = pack_tokens
        if pack_tokens is not None and self._has_protocol:
            raise ValueError("pack_tokens: expected None with a model that has hidden_states_at, which packs by its own inputs")
        self.layers = tuple(layers)
        self.merge_lora = merge_lora
        self._own_head = head  # what the caller gave, or None
        self._follows = head is None or self._shares_memory(head)
        self._known_state: tuple[Any, ...] | None = None
        self._post: tuple[float | None, float] = (None, 1.0)
        self._post_checked = False
        self._packing_checked = False
        self.eval()
        with hearing(model):
            self._look_at_head()

    @property
    def head(self) -> LMHead:
        """The LM head as it is now.

        Raises:
            TypeError, ValueError: see `LMHead.from_model`; the model may have changed since it was given.
        """
        own = self._own_head
        head = self._model_head()
        if head is None:
            assert own is not None
            return own
        with evaluating(head), audio_adapters_on(self.model):
            self._look_at_head()
            if own is not None and not self._follows:
                return own
            weight, bias = head_parameters(head, merge_lora=self.merge_lora)
        return LMHead(weight, bias, *self._post)

    @head.setter
    def head(self, head: LMHead) -> None:
        self._own_head, self._follows = head, self._shares_memory(head)
        self._known_state, self._post_checked = None, False

    def _look_at_head(self) -> None:
        """Asks the head what it computes, the first time and whenever modules, parameters or adapters in it have changed."""
        head = self._model_head()
        if head is None:
            return
        refuse_hooks(head)
        state = (head_state(head), post_numbers(self.model, head))
        if state == self._known_state:
            return
        own = self._own_head or LMHead.from_model(self.model, merge_lora=self.merge_lora)
        if self._own_head is not None and self._follows:
            check_linear(head, *head_parameters(head, merge_lora=self.merge_lora))
        self._post = (own.softcap, own.logit_scale)
        self._known_state, self._post_checked = state, False

    def _model_head(self) -> nn.Module | None:
        """The head of the model. It is None if none can be found there, and the caller gave one."""
        try:
            return head_module(self.model)
        except TypeError:
            if self._own_head is None:
                raise
            return None

    def _shares_memory(self, head: LMHead) -> bool:
        try:
            weight, _ = head_parameters(head_module(self.model))
        except (TypeError, ValueError):
            return False
        return weight.data_ptr() == head.weight.data_ptr() and weight.shape == head.weight.shape

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualPathTeacher:
        """`.to()`, `.half()` and the like: a head of the caller's own goes along."""
        super()._apply(fn, recurse)
        if self._own_head is not None and not self._follows:
            bias = self._own_head.bias
            self._own_head = dataclasses.replace(
                self._own_head, weight=fn(self._own_head.weight), bias=None if bias is None else fn(bias)
            )
        return self

    def freeze(self) -> DualPathTeacher:
        """Clears requires_grad of every parameter of the teacher (do not share modules with a trained student)."""
        self.model.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> DualPathTeacher:
        """A teacher has no training mode: `student_and_teacher.train()` leaves it in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        inputs: Inputs,
        index: Tensor,
        *,
        text_inputs: Inputs | None = None,
        text_index: Tensor | None = None,
    ) -> DualPathStates:
        """Hidden states of both paths at the positions that predict Y.

        Args:
            inputs: keyword arguments of the model for the positive path, Y forced: `input_ids` (B, L), attention mask,
                audio features.  `labels` and `logits_to_keep` are ignored: there are no logits.
            index: (N,) int64, row * L + column, the positions whose hidden states predict Y (see `answer_index`).
            text_inputs: inputs of the negative path. Their length may differ; the shorter path is padded on the right. None
                makes them with `negative`; where that is None too, only the positive path runs.  Audio features may be missing
                if no placeholder is left.
            text_index: (N,) int64 in text_inputs' own length. Required with text_inputs; ValueError without.

        Returns:
            DualPathStates: audio_hidden and text_hidden, (N, H), without gradient, in memory of their own. text_hidden is None
                without a negative path.

        Raises:
            ValueError, TypeError: for a bad argument, with its name. An index beyond B * L raises on the CPU only: on CUDA the
                check would wait for the device.
        """
        audio = self._positive(inputs)
        if text_inputs is None:
            if text_index is not None:
                raise ValueError("text_index: expected None without text_inputs, got a tensor")
            if self.negative is None:
                _check_index(index, "index", audio)
                return DualPathStates._split(self._states(audio, index), None)
            text = as_batch(clean(self.negative(audio.inputs), "negative(inputs)"), "negative(inputs)")
            if (text.rows, text.length) != (audio.rows, audio.length):
                raise ValueError(
                    f"negative: expected it to keep the tokens' shape {(audio.rows, audio.length)}, got "
                    f"{(text.rows, text.length)}; pass text_inputs and text_index instead"
                )
            text_index = index
            same_batch = text.inputs.keys() == audio.inputs.keys()
        else:
            if text_index is None:
                raise ValueError("text_index: expected (N,) positions in text_inputs, got None")
            text = as_batch(clean(text_inputs, "text_inputs"), "text_inputs")
            # Rows without audio can share a batch where features are flattened, as in transformers; a model with its
            # own hidden_states_at may want one entry a row.
            same_batch = text.inputs.keys() == audio.inputs.keys() or not self._has_protocol
        same_batch = same_batch and not (_packed_by_caller(audio) or _packed_by_caller(text))
        _check_index(index, "index", audio)
        _check_index(text_index, "text_index", text)
        if index.shape != text_index.shape:
            raise ValueError(f"text_index: expected as many positions as index, {len(index)}, got {len(text_index)}")
        if not same_batch:
            return DualPathStates._split(self._states(audio, index), self._states(text, text_index))
        both = join(audio, text)
        positions = [
            _relocate(index, audio, both, first_row=0),
            _relocate(text_index.to(index.device), text, both, first_row=audio.rows),
        ]
        states = self._states(both, torch.cat(positions))
        return DualPathStates._split(states[: len(index)], states[len(index) :])

    @property
    def _has_protocol(self) -> bool:
        return callable(getattr(self.model, "hidden_states_at", None))

    def _positive(self, inputs: Inputs) -> PathBatch:
        cleaned = clean(inputs, "inputs")
        positive = getattr(self.negative, "positive", None)
        return as_batch(cleaned if positive is None else positive(cleaned), "inputs")

    def _states(self, batch: PathBatch, index: Tensor) -> Tensor:
        """(N, H) at `index`, or (N, 1 + K, H) with layers, in passes of at most rows_per_pass rows."""
        if batch.rows == 0:
            raise ValueError("inputs: expected at least one row, got none")
        if self.rows_per_pass is None or self.rows_per_pass >= batch.rows:
            return self._one_pass(batch, index)
        result: Tensor | None = None
        for start in range(0, batch.rows, self.rows_per_pass):
            stop = min(start + self.rows_per_pass, batch.rows)
            part = batch.slice(start, stop)
            local = index - start * batch.length
            here = ((local >= 0) & (local < part.rows * part.length)).nonzero().squeeze(1)  # waits for a CUDA device
            if len(here):
                states = self._one_pass(part, local[here])
                if result is None:
                    result = states.new_empty(len(index), *states.shape[1:])
                result[here.to(states.device)] = states
        return self._one_pass(batch.slice(0, 1), index) if result is None else result  # no position at all: (0, H)

    def _one_pass(self, batch: PathBatch, index: Tensor) -> Tensor:
        with hearing(self.model):
            self._look_at_head()
            if self._has_protocol:
                keywords = {"layers": self.layers} if self.layers else {}
                model: Any = self.model
                states = model.hidden_states_at(index, **batch.inputs, **keywords)
                expected = (len(index), 1 + len(self.layers)) if self.layers else (len(index),)
                if states.shape[:-1] != expected:
                    shape = ", ".join(map(str, expected))
                    raise ValueError(f"model.hidden_states_at: expected shape ({shape}, H), got {tuple(states.shape)}")
                return states.detach()
            if self.pack_tokens is None:
                return self._taken(batch, index)
            return self._packed(batch, index)

    def _packed(self, batch: PathBatch, index: Tensor) -> Tensor:
        """`_taken` of the rows side by side, compared with padded ones the first time."""
        config: Any = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        flash = "flash" in (getattr(config, "_attn_implementation", None) or "")
        grids = 4 if "mrope_section" in (getattr(config, "rope_parameters", None) or {}) else 1
        packed, packing = pack_batch(batch, None if flash else self.pack_tokens, position_grids=grids)
        states = self._taken(packed, packing.at(index))
        if not self._packing_checked and len(index):
            padded = self._taken(batch, index)
            difference = float((states - padded).double().norm() / padded.double().norm())
            if not difference < _PACKING_TOLERANCE:
                raise ValueError(
                    f"pack_tokens: expected {type(self.model).__name__} to keep packed samples apart, got states that are "
                    f"{difference:.2g} off those of padded rows; pass pack_tokens=None"
                )
            self._packing_checked = True
        return states

    def _taken(self, batch: PathBatch, index: Tensor) -> Tensor:
        """(N, H) at `index`, or (N, 1 + K, H) with layers, of one forward."""
        if self.layers:
            with LayerStates(self.model, self.layers, index) as layers:
                hidden = self._captured(batch)
        else:
            hidden = self._captured(batch)
        if hidden.shape[:-1] not in ((batch.rows, batch.length), (batch.rows * batch.length,)):
            raise ValueError(
                f"model: expected its LM head to see ({batch.rows}, {batch.length}, H), got {tuple(hidden.shape)}; if "
                "it expands an audio placeholder into several positions, expand placeholders in input_ids beforehand"
            )
        hidden = hidden.reshape(-1, hidden.shape[-1])  # (B * L, H)
        states = hidden.index_select(0, index.to(hidden.device))
        return torch.cat([states[:, None], layers.stacked().to(states.device)], 1) if self.layers else states

    def _captured(self, batch: PathBatch) -> Tensor:
        options = {"use_cache": False} if accepts(self.model, "use_cache") else {}
        head = head_module(self.model)
        probe = None if self._post_checked else probe_values()
        with HeadCapture(head, probe=probe) as capture:
            output = self.model(**batch.inputs, **options)
        hidden = capture.hidden()
        if probe is not None:
            self._check_post(capture.seen(output))
        return hidden

    def _check_post(self, seen: Tensor | None) -> None:
        """Once: raises ValueError if the model does something else to its logits than `self.head` says. Waits for the device."""
        if seen is not None:
            expected = apply_post(probe_values(), *self._post).double()
            if not torch.allclose(seen.double().cpu(), expected, rtol=1e-2, atol=1e-6):
                softcap, scale = fit_post(seen)
                raise ValueError(
                    f"head: expected what the model does to its logits, softcap={softcap} logit_scale={scale:.6g}, got "
                    f"softcap={self._post[0]} logit_scale={self._post[1]:.6g}; pass head=LMHead(...)"
                )
        self._post_checked = True


def _packed_by_caller(batch: PathBatch) -> bool:
    """Whether one row may hold several samples. Flash-attention keeps them apart in a row that is alone, and in no other."""
    given = batch.inputs
    restarts = batch.rows == 1 and "position_ids" in given and "attention_mask" not in given
    return restarts or "cu_seq_lens_q" in given


def _check_index(index: Tensor, name: str, batch: PathBatch) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected a tensor of torch.int64, got {got}")
    if index.ndim != 1:
        raise ValueError(f"{name}: expected shape (N,), got {tuple(index.shape)}")
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= batch.rows * batch.length:
            raise ValueError(
                f"{name}: expected positions in [0, {batch.rows * batch.length}), {batch.rows} rows of "
                f"{batch.length}, got {low if low < 0 else high}"
            )


def _relocate(index: Tensor, path: PathBatch, both: PathBatch, *, first_row: int) -> Tensor:
    """A path's own positions as positions in the joined batch, which is padded on the right."""
    row = torch.div(index, max(path.length, 1), rounding_mode="floor")
    return (row + first_row) * both.length + (index - row * path.length)
