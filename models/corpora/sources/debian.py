"""Fetches recorded speech from Debian packages by name and hash. It installs nothing and needs no root.

`apt-get download` finds the package through the machine's own sources and `dpkg-deb -x` unpacks it into the cache.
A package is used only if the .deb has the pinned SHA-256, or if the part that is used has its pinned one. The second case
occurs because other releases carry the same recordings under another version. A machine without apt gets `PackageUnavailable`
with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tenacity

from models.io_utils import atomic_dir, atomic_write_json, cache_dir, sha256_file

_APT_TIMEOUT_SECONDS = 600
_ATTEMPTS = 3
_WAIT_SECONDS = 1
_MARKER = "verified.json"
_PERMANENT = (
    "Unable to locate package",
    "was not found",
    "has no installation candidate",
    "Can't select candidate version",
)


class PackageUnavailable(RuntimeError):
    """This machine cannot fetch the package; the message says why and what to do."""


class PackageCorrupt(RuntimeError):
    """The fetched package is not the pinned one."""


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """A pinned package.

    Args:
        name, version: as the Debian archive calls them.
        deb_sha256: of the .deb file of that version.
        payload: the file or folder in it that is used. Only this and the copyright file are kept.
        payload_sha256: of that file, or `tree_sha256` of that folder.
        size_mib: download size, for messages.
        licence: of the recordings, for the corpus header.
    """

    name: str
    version: str
    deb_sha256: str
    payload: str
    payload_sha256: str
    size_mib: int
    licence: str


def fetch_package(package: DebianPackage, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """The payload of `package`, from the cache or downloaded.

    Args:
        package: what to fetch.
        cache: folder to keep it in; None is `cache_dir()/"debian"`.

    Returns:
        path of the payload (a file or a folder). A file's hash is checked on each call, a folder's once.

    Raises:
        PackageUnavailable: no apt here, no network, or no source that has the package.
        PackageCorrupt: the downloaded package has neither the pinned package hash nor the pinned payload hash.
    """
    folder = (Path(cache) if cache is not None else cache_dir() / "debian") / package.name
    if _is_verified(folder, package):
        return folder / package.payload
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise PackageUnavailable(
            f"{package.name}: {' and '.join(missing)} not found; the recordings come from a Debian package. Unpack "
            f"version {package.version} of it into {folder} elsewhere, or use the sources that need no apt"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package.name}.", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        deb = _download(package, scratch)
        unpacked = scratch / "unpacked"
        _run(["dpkg-deb", "-x", str(deb), str(unpacked)], package)
        deb_sha256 = sha256_file(deb)
        _check_payload(package, unpacked / package.payload, deb_sha256)
        with atomic_dir(folder) as target:
            for part in (package.payload, f"usr/share/doc/{package.name}/copyright"):
                if (unpacked / part).exists():
                    (target / part).parent.mkdir(parents=True, exist_ok=True)
                    (unpacked / part).replace(target / part)
            _remove_dead_links(target)
            atomic_write_json(
                target / _MARKER, {"deb_sha256": deb_sha256, "payload_sha256": package.payload_sha256, "name": deb.name}
            )
    return folder / package.payload


def _remove_dead_links(folder: Path) -> None:
    """Remove the links that lead out of what is kept: their files are in another package, or were not kept."""
    for path in [path for path in folder.rglob("*") if path.is_symlink() and not path.exists()]:
        path.unlink()


def tree_sha256(folder: str | os.PathLike[str]) -> str:
    """One SHA-256 of all regular files below `folder`: of their relative paths and contents, in sorted order."""
    folder = Path(folder)
    digest = hashlib.sha256()
    names = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in sorted(names, key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _is_verified(folder: Path, package: DebianPackage) -> bool:
    payload = folder / package.payload
    if payload.is_file():
        return sha256_file(payload) == package.payload_sha256
    if not payload.is_dir():
        return False
    try:
        return json.loads((folder / _MARKER).read_text())["payload_sha256"] == package.payload_sha256
    except (OSError, ValueError, KeyError, TypeError):  # unpacked by hand: then thousands of files are hashed
        return tree_sha256(payload) == package.payload_sha256


def _check_payload(package: DebianPackage, payload: Path, deb_sha256: str) -> None:
    if deb_sha256 == package.deb_sha256:
        return
    if payload.is_file():
        found = sha256_file(payload)
    elif payload.is_dir():
        found = tree_sha256(payload)
    else:
        found = "nothing there"
    if found != package.payload_sha256:
        raise PackageCorrupt(
            f"{package.name}: expected version {package.version} (sha256 {package.deb_sha256[:12]}...) or the same "
            f"{package.payload} (sha256 {package.payload_sha256[:12]}...), got a package with sha256 {deb_sha256[:12]} "
            f"and {found[:12]} there"
        )


def _download(package: DebianPackage, scratch: Path) -> Path:
    """The .deb: the pinned version, else the version that apt has; with package lists of our own if the machine has none."""
    private_lists = _private_lists(scratch)
    attempts: list[tuple[list[str], str]] = [
        ([], f"{package.name}={package.version}"),
        ([], package.name),
        (private_lists, f"{package.name}={package.version}"),
        (private_lists, package.name),
    ]
    updated = False
    reason = ""
    for options, name in attempts:
        if options and not updated:
            # Container images often have no package lists. Fetching them into our own folder needs no root.
            updated = True
            reason = _retrying(["apt-get", *_APT_OPTIONS, *options, "update"], scratch)
            if reason:
                break
        reason = _retrying(["apt-get", *_APT_OPTIONS, *options, "download", name], scratch)
        if not reason:
            debs = sorted(scratch.glob("*.deb"))
            if debs:
                return debs[0]
            reason = "apt-get reported success but left no file"
    raise PackageUnavailable(
        f"{package.name} ({package.size_mib} MiB) cannot be downloaded: {reason}. It needs apt sources with Debian's "
        f"(or Ubuntu's universe) packages and a network; otherwise use the sources that need no apt"
    )


_APT_OPTIONS = ("-q", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30", "-o", "APT::Sandbox::User=")


def _private_lists(scratch: Path) -> list[str]:
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / "apt" / folder).mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::Lists={scratch / 'apt' / 'lists'}", "-o", f"Dir::Cache={scratch / 'apt' / 'cache'}"]


class _Passing(Exception):
    """A failure that may not happen again a moment later."""


def _retrying(command: list[str], scratch: Path) -> str:
    """Run an apt command; try again after a failure that may pass. Returns "" or the reason of the last failure."""

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=_WAIT_SECONDS, max=10),
        retry=tenacity.retry_if_exception_type(_Passing),
        reraise=True,
    )
    def attempt() -> str:
        try:
            result = subprocess.run(
                command,
                cwd=scratch,
                env={**os.environ, "LC_ALL": "C"},  # the messages are compared below
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_APT_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"apt-get took longer than {_APT_TIMEOUT_SECONDS} s"
        except OSError as error:
            return f"apt-get cannot be run ({error.strerror})"
        if result.returncode == 0:
            return ""
        reason = _last_error(result.stderr) or f"apt-get ended with status {result.returncode}"
        if any(text in reason for text in _PERMANENT):
            return reason
        raise _Passing(reason)

    try:
        return attempt()
    except _Passing as error:
        return str(error)


def _last_error(stderr: str) -> str:
    lines = [line[3:].strip() for line in stderr.splitlines() if line.startswith("E: ")]
    return lines[0] if lines else ""


def _run(command: list[str], package: DebianPackage) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise PackageUnavailable(f"{package.name}: {command[0]} cannot be run ({error.strerror})") from None
    if result.returncode != 0:
        reason = " ".join(result.stderr.split())[:200]
        raise PackageCorrupt(f"{package.name}: {command[0]} could not unpack the package ({reason})")
