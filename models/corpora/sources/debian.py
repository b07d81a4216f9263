"""Recorded speech from Debian packages: fetched by name and hash, unpacked without installing and without root.

`apt-get download` finds the package through the machine's own sources and `dpkg-deb -x` unpacks it into the cache.
Nothing is taken on trust: either the .deb has the pinned SHA-256, or the part that is used has (other releases carry
the same recordings under another version). A machine without apt gets `PackageUnavailable` with the reason.
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
    """The package cannot be had on this machine; the message says why and what to do."""


class PackageCorrupt(RuntimeError):
    """A package was fetched, and is not the one that was pinned."""


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """A pinned package.

    Args:
        name, version: as the Debian archive calls them.
        deb_sha256: of the .deb file of that version.
        payload: the file or folder in it that is used; nothing else is kept but the copyright file.
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


AMAZON_QUEEN = DebianPackage(
    name="flight-of-the-amazon-queen",
    version="1.0.0-9",
    deb_sha256="40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1",
    payload="usr/share/scummvm/flight-of-the-amazon-queen/queen.1c",
    payload_sha256="cc91960d133fcd4173eda4bac304e80d2bbdbaa085640287ab9e0507bd603f67",
    size_mib=34,
    licence="Flight of the Amazon Queen licence (free of charge; see the copyright file)",
)
TUX_PAINT = DebianPackage(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    deb_sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    payload="usr/share/tuxpaint/stamps",
    payload_sha256="2677de2e3c5dc79908680df3535896c65be5b2b124028f7a3cf805f14d5083b3",
    size_mib=154,
    licence="GPL-2",
)


def _asterisk(language: str, voice: str, deb_sha256: str, payload_sha256: str, size_mib: int, licence: str) -> DebianPackage:
    return DebianPackage(
        name=f"asterisk-core-sounds-{language}-wav",
        version="1.6.1-1",
        deb_sha256=deb_sha256,
        payload=f"usr/share/asterisk/sounds/{voice}",
        payload_sha256=payload_sha256,
        size_mib=size_mib,
        licence=licence,
    )


# (language, package): one voice each.
ASTERISK_PROMPTS = (
    (
        "English",
        _asterisk(
            "en",
            "en_US_f_Allison",
            "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
            "f91f9ce0c2bf34eee254042c2e67187786f08961d1366f2a82b631fbb9036805",
            18,
            "CC-BY-SA-3.0 (Allison Smith, Digium)",
        ),
    ),
    (
        "Spanish",
        _asterisk(
            "es",
            "es_MX_f_Allison",
            "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
            "05b41770c843b22a84e553277f50c838d59b92c6b78b186651a085f2679f1a54",
            23,
            "CC-BY-SA-3.0 (Allison Smith, Digium)",
        ),
    ),
    (
        "French",
        _asterisk(
            "fr",
            "fr_CA_f_June",
            "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
            "f61a586db3fc64dc6b22cb97139f05db5247de3c7bd953b37c039e4e2ec5abb8",
            18,
            "CC-BY-SA-3.0 (June Wallack, Digium)",
        ),
    ),
    (
        "Italian",
        _asterisk(
            "it",
            "it_IT_m_Carlo",
            "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
            "d26660026f72cd018449f6caaacf0e9f4684fe93fc19a43440cfc6fcebd92f98",
            18,
            "CC-BY-3.0 (Carlo Flora)",
        ),
    ),
    (
        "Russian",
        _asterisk(
            "ru",
            "ru_RU_f_IvrvoiceRU",
            "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
            "0f6769437537fb74ee770ed5208a084c95a9786a71b0f98c31a23b5314bb2711",
            18,
            "CC-BY-3.0 (Maxim Topal)",
        ),
    ),
    (
        "Italian",
        DebianPackage(
            name="asterisk-prompt-it-menardi-wav",
            version="1:1.4.22+mm20110907-3.1",
            deb_sha256="3094530d98f8758ac275572d59624c41f60969fef883f34f4886d144f3dfeb21",
            payload="usr/share/asterisk/sounds/it_IT_f_Menardi",
            payload_sha256="f895e225b4395e05e38a5ed74a57639600be22c52e6f441f3170bcc70e0974ab",
            size_mib=18,
            licence="CC-BY-SA-3.0 (Marco Menardi, Paola Dal Zot)",
        ),
    ),
)
KTUBERLING = DebianPackage(
    name="ktuberling-data",
    version="4:22.12.3-1",
    deb_sha256="fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed",
    payload="usr/share/ktuberling/sounds",
    payload_sha256="3af25d112b1e3d864f4ec5c831140f53ed8d87967710674d5b6f7cbed8e2c13c",
    size_mib=45,
    licence="GPL-2+",
)


def fetch_package(package: DebianPackage, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """The payload of `package`, from the cache or freshly downloaded.

    Args:
        package: what to fetch.
        cache: folder to keep it in; None is `cache_dir()/"debian"`.

    Returns:
        path of the payload (a file or a folder). Its hash is checked on each call for a file, once for a folder.

    Raises:
        PackageUnavailable: no apt here, no network, or no source that has the package.
        PackageCorrupt: what was served has neither the pinned package hash nor the pinned payload hash.
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
            atomic_write_json(
                target / _MARKER, {"deb_sha256": deb_sha256, "payload_sha256": package.payload_sha256, "name": deb.name}
            )
    return folder / package.payload


def tree_sha256(folder: str | os.PathLike[str]) -> str:
    """One SHA-256 for all regular files below `folder`: over their relative paths and contents, in sorted order."""
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
    except (OSError, ValueError, KeyError, TypeError):  # unpacked by hand: thousands of files are hashed then
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
    """The .deb: the pinned version, else whichever is served; with lists of our own where the machine has none."""
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
            # Images of containers often ship without package lists; reading them anew into our folder needs no root.
            updated = True
            reason = _retrying(["apt-get", *_APT_OPTIONS, *options, "update"], scratch)
            if reason:
                break
        reason = _retrying(["apt-get", *_APT_OPTIONS, *options, "download", name], scratch)
        if not reason:
            debs = sorted(scratch.glob("*.deb"))
            if debs:
                return debs[0]
            reason = "apt-get reported success and left no file"
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
    """A failure that may be over a moment later."""


def _retrying(command: list[str], scratch: Path) -> str:
    """Run an apt command, again if the failure may pass; returns "" or the reason of the last failure."""

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
