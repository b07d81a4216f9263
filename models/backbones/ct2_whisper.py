"""Reads CTranslate2's Whisper files with numpy alone and renames the variables to transformers' parameters.

CTranslate2 stores a model as one `model.bin`: a header, then every variable as name, shape, type and raw bytes, then a
list of aliases (names that share another variable's data). Some Python packages carry Whisper in this form. Reading it
needs neither CTranslate2 nor a model hub.

    uint32 version | string spec | uint32 revision | uint32 count
    count x ( string name | uint8 rank | uint32 dims[rank] | uint8 type | uint32 bytes | data )
    uint32 aliases | aliases x ( string alias | string name )

A string is a uint16 length (terminating zero included) and its bytes. Everything is little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

_SUPPORTED_VERSION = 6
_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
_MAX_RANK = 8  # numpy stops at 32 or 64
_HEAD_WIDTH = 64  # every published Whisper has heads of 64
_MULTILINGUAL_VOCAB_SIZE = 51865  # the English-only models have one token fewer, and their special tokens lie one lower
_SPEC_NAME = "WhisperSpec"


class Ct2FormatError(ValueError):
    """The file is not a CTranslate2 model of the kind read here, or it is cut short."""


@dataclass(frozen=True)
class Ct2Model:
    """What a `model.bin` holds: the spec's name and revision, and every variable (aliases resolved) by name."""

    spec: str
    revision: int
    variables: dict[str, np.ndarray]


def read_ct2_model(path: str | os.PathLike[str]) -> Ct2Model:
    """Read a CTranslate2 `model.bin` (binary version 6).

    Args:
        path: the file. It is memory-mapped, so an array takes no memory until it is used.

    Returns:
        The model; its arrays are read-only views into the file.

    Raises:
        FileNotFoundError: no such file.
        Ct2FormatError: another version, an unknown data type, a size that disagrees with the shape, a truncated file,
            or bytes left over at the end.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise Ct2FormatError(f"{path.name}: the file is empty")
    reader = _Reader(np.memmap(path, dtype=np.uint8, mode="r"), path.name)
    version = reader.number("<I", "version")
    if version != _SUPPORTED_VERSION:
        raise Ct2FormatError(f"{path.name}: expected CTranslate2 binary version {_SUPPORTED_VERSION}, got {version}")
    spec = reader.string("spec name")
    revision = reader.number("<I", "revision")
    variables: dict[str, np.ndarray] = {}
    for _ in range(reader.number("<I", "number of variables")):
        name = reader.string("variable name")
        variables[name] = reader.array(name)
    for _ in range(reader.number("<I", "number of aliases")):
        alias, name = reader.string("alias"), reader.string("alias target")
        if name not in variables:
            raise Ct2FormatError(f"{path.name}: alias {alias!r} points to {name!r}, which the file does not hold")
        variables[alias] = variables[name]
    if reader.remaining:
        raise Ct2FormatError(f"{path.name}: {reader.remaining} bytes left over after the last alias")
    return Ct2Model(spec, revision, variables)


def whisper_state_dict(model: Ct2Model) -> dict[str, torch.Tensor]:
    """Rename a CTranslate2 Whisper's variables to those of transformers' `WhisperForConditionalGeneration`.

    CTranslate2 fuses the projections of queries, keys and values into one matrix (in cross attention those of keys and
    values). This function splits them. Whisper's keys have no bias, so the zeros that the fused bias has for them are
    dropped. int8 matrices have a scale for each row and are divided by it. All tensors are fp32 copies.

    Raises:
        Ct2FormatError: the model is not a Whisper, or a variable is missing.
    """
    if model.spec != _SPEC_NAME:
        raise Ct2FormatError(f"expected the spec {_SPEC_NAME!r}, got {model.spec!r}")
    source = _Variables(model.variables)
    state: dict[str, torch.Tensor] = {}

    def copy_norm(name: str, to: str) -> None:
        state[f"{to}.weight"], state[f"{to}.bias"] = source[f"{name}/gamma"], source[f"{name}/beta"]

    def copy_linear(name: str, to: str) -> None:
        state[f"{to}.weight"], state[f"{to}.bias"] = source[f"{name}/weight"], source[f"{name}/bias"]

    def split_linear(name: str, to: str, parts: tuple[str, ...]) -> None:
        weights = source[f"{name}/weight"].chunk(len(parts))
        biases = source[f"{name}/bias"].chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{to}.{part}.weight"] = weight.clone()
            if part != "k_proj":
                state[f"{to}.{part}.bias"] = bias.clone()

    for conv in ("conv1", "conv2"):
        copy_linear(f"encoder/{conv}", f"model.encoder.{conv}")
    embeddings = source["decoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"] = embeddings
    state["proj_out.weight"] = embeddings
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        copy_norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for layer in range(_count_layers(model.variables, side)):
            name, to = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            split_linear(f"{name}/self_attention/linear_0", f"{to}.self_attn", ("q_proj", "k_proj", "v_proj"))
            copy_linear(f"{name}/self_attention/linear_1", f"{to}.self_attn.out_proj")
            copy_norm(f"{name}/self_attention/layer_norm", f"{to}.self_attn_layer_norm")
            if side == "decoder":
                copy_linear(f"{name}/attention/linear_0", f"{to}.encoder_attn.q_proj")
                split_linear(f"{name}/attention/linear_1", f"{to}.encoder_attn", ("k_proj", "v_proj"))
                copy_linear(f"{name}/attention/linear_2", f"{to}.encoder_attn.out_proj")
                copy_norm(f"{name}/attention/layer_norm", f"{to}.encoder_attn_layer_norm")
            copy_linear(f"{name}/ffn/linear_0", f"{to}.fc1")
            copy_linear(f"{name}/ffn/linear_1", f"{to}.fc2")
            copy_norm(f"{name}/ffn/layer_norm", f"{to}.final_layer_norm")
    return state


def load_ct2_whisper(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32):
    """Build transformers' `WhisperForConditionalGeneration` from a CTranslate2 `model.bin`; no other file is needed.

    Raises:
        Ct2FormatError: the file cannot be read as a Whisper, or its variables do not fit the model they describe.
    """
    label = Path(path).name
    model = read_ct2_model(path)
    try:
        return _build_whisper(whisper_state_dict(model)).to(dtype).eval()
    except Ct2FormatError as error:
        raise Ct2FormatError(f"{label}: {error}") from None
    except (ValueError, IndexError, KeyError, RuntimeError) as error:  # torch's errors for shapes that a Whisper does not have
        raise Ct2FormatError(f"{label}: the variables are not those of a Whisper: {error}") from None


def _build_whisper(state: dict[str, torch.Tensor]):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    width = state["model.encoder.layer_norm.weight"].numel()
    feed_forward_width = state["model.encoder.layers.0.fc1.weight"].shape[0]
    vocab_size = state["proj_out.weight"].shape[0]
    end_of_text = 50257 if vocab_size >= _MULTILINGUAL_VOCAB_SIZE else 50256
    config = WhisperConfig(
        vocab_size=vocab_size,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=min(end_of_text, vocab_size - 1),
        decoder_start_token_id=end_of_text + 1,
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        encoder_layers=_count_state_layers(state, "encoder"),
        decoder_layers=_count_state_layers(state, "decoder"),
        encoder_attention_heads=max(1, width // _HEAD_WIDTH),
        decoder_attention_heads=max(1, width // _HEAD_WIDTH),
        encoder_ffn_dim=feed_forward_width,
        decoder_ffn_dim=feed_forward_width,
        max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
    )
    if problem := misfit(lambda: WhisperForConditionalGeneration(config), state):
        raise Ct2FormatError(f"the variables do not fit a Whisper of width {width}: {problem}")
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, strict=True)
    return model


def misfit(make: Callable[[], torch.nn.Module], state: dict[str, torch.Tensor]) -> str | None:
    """How `state` differs from the model's; None if it fits. The model is made without memory: the file may give wrong sizes."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in make().state_dict().items()}
    got = {name: tuple(t.shape) for name, t in state.items()}
    wrong = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
    if not wrong:
        return None
    name = wrong[0]
    return f"{name}: expected {expected.get(name, 'none')}, got {got.get(name, 'none')} ({len(wrong)} such)"


class _Reader:
    """A cursor over the file's bytes that checks every length before it reads."""

    def __init__(self, data: np.ndarray, label: str) -> None:
        self._data, self._label, self._offset = data, label, 0

    @property
    def remaining(self) -> int:
        return self._data.size - self._offset

    def take(self, size: int, what: str) -> np.ndarray:
        if size > self.remaining:
            raise Ct2FormatError(
                f"{self._label}: cut short at byte {self._offset} in {what}: "
                f"expected {size} bytes, got {self.remaining}"
            )
        self._offset += size
        return self._data[self._offset - size : self._offset]

    def number(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what).tobytes())[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("<H", what), what).tobytes()
        try:
            return raw.rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            raise Ct2FormatError(f"{self._label}: the {what} before byte {self._offset} is not UTF-8 text") from None

    def array(self, name: str) -> np.ndarray:
        rank = self.number("<B", name)
        if rank > _MAX_RANK:
            raise Ct2FormatError(f"{self._label}: {name!r} has {rank} dimensions, expected at most {_MAX_RANK}")
        shape = [self.number("<I", name) for _ in range(rank)]
        type_id = self.number("<B", name)
        size = self.number("<I", name)
        dtype = _DTYPES.get(type_id)
        if dtype is None:
            raise Ct2FormatError(
                f"{self._label}: {name!r} has the data type {type_id}, expected one of {sorted(_DTYPES)}"
            )
        expected = dtype.itemsize
        for dim in shape:  # python integers: a corrupt shape must not overflow
            expected *= dim
        if expected != size:
            raise Ct2FormatError(
                f"{self._label}: {name!r} of shape {shape} needs {expected} bytes, the file says {size}"
            )
        if not expected:  # with one dimension of 0 the others could be of any size
            raise Ct2FormatError(f"{self._label}: {name!r} of shape {shape} is empty")
        return self.take(size, name).view(dtype).reshape(shape)


class _Variables:
    """Variables by name as fp32 tensors, int8 ones rescaled."""

    def __init__(self, variables: dict[str, np.ndarray]) -> None:
        self._variables = variables

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._variables:
            raise Ct2FormatError(f"the variable {name!r} is missing")
        raw = self._variables[name]
        value = raw.astype(np.float32)
        if raw.dtype == np.int8:
            if f"{name}_scale" not in self._variables:
                raise Ct2FormatError(f"the variable {name!r} is int8 and {name + '_scale'!r} is missing")
            scale = self._variables[f"{name}_scale"].astype(np.float32)
            value = value / scale.reshape(-1, *[1] * (value.ndim - 1))
        return torch.from_numpy(value)


def _count_layers(variables: dict[str, np.ndarray], side: str) -> int:
    count = 0
    while f"{side}/layer_{count}/ffn/linear_0/weight" in variables:
        count += 1
    return count


def _count_state_layers(state: dict[str, torch.Tensor], side: str) -> int:
    return len({key.split(".")[3] for key in state if key.startswith(f"model.{side}.layers.")})
