"""Packages: pinned by hash, fetched by apt (here a fake one), with a clear message if they are not available."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from models.corpora.sources.debian import (
    DebianPackage,
    PackageCorrupt,
    PackageUnavailable,
    fetch_package,
    tree_sha256,
)
from models.corpora.sources.packages import AMAZON_QUEEN
from models.io_utils import sha256_file

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")


@pytest.fixture()
def served(tmp_path, monkeypatch):
    """A package, its pin, and an apt-get that serves it: "SERVES" in `mode` lists the names it knows."""
    content = tmp_path / "content"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN" / "control").write_text(
        "Package: game\nVersion: 1.0-1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: sounds\n"
    )
    (content / "usr/share/game").mkdir(parents=True)
    (content / "usr/share/game/sounds.1c").write_bytes(b"sounds" * 100)
    (content / "usr/share/game/unused").write_bytes(b"unused")
    (content / "usr/share/doc/game").mkdir(parents=True)
    (content / "usr/share/doc/game/copyright").write_text("free")
    deb = tmp_path / "game.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(content), str(deb)], check=True, capture_output=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    apt = tools / "apt-get"
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr("models.corpora.sources.debian._WAIT_SECONDS", 0)

    def serve(script: str) -> None:
        apt.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nfor name; do :; done\n{script.format(deb=deb)}\n')
        apt.chmod(0o755)

    pin = DebianPackage(
        name="game",
        version="1.0-1",
        deb_sha256=sha256_file(deb),
        payload="usr/share/game/sounds.1c",
        payload_sha256=hashlib.sha256(b"sounds" * 100).hexdigest(),
        size_mib=1,
        licence="free",
    )
    serve("cp {deb} .")
    return pin, serve, tmp_path / "cache", tmp_path / "calls"


@needs_dpkg
def test_the_payload_and_the_copyright_are_kept_and_nothing_is_fetched_twice(served):
    pin, _, cache, calls = served
    path = fetch_package(pin, cache=cache)
    assert path.read_bytes() == b"sounds" * 100
    kept = sorted(p.relative_to(cache / "game").as_posix() for p in (cache / "game").rglob("*") if p.is_file())
    assert kept == ["usr/share/doc/game/copyright", "usr/share/game/sounds.1c", "verified.json"]
    assert fetch_package(pin, cache=cache) == path
    assert len(calls.read_text().splitlines()) == 1 and "download game=1.0-1" in calls.read_text()
    assert [p.name for p in cache.iterdir()] == ["game"]


@needs_dpkg
def test_a_payload_spoilt_in_the_cache_is_fetched_anew(served):
    pin, _, cache, _ = served
    fetch_package(pin, cache=cache).write_bytes(b"spoilt")
    assert fetch_package(pin, cache=cache).read_bytes() == b"sounds" * 100


@needs_dpkg
def test_another_version_counts_if_its_payload_is_the_same(served):
    pin, serve, cache, _ = served
    other = dataclasses.replace(pin, version="1.0-2", deb_sha256="0" * 64)
    serve('case "$name" in *=*) echo "E: 1.0-2 was not found" >&2; exit 100;; *) cp {deb} .;; esac')
    assert fetch_package(other, cache=cache).read_bytes() == b"sounds" * 100
    with pytest.raises(PackageCorrupt, match=r"game: expected version 1\.0-2"):
        fetch_package(dataclasses.replace(other, payload_sha256="1" * 64), cache=cache)


@needs_dpkg
def test_a_folder_is_pinned_by_all_its_files(served):
    pin, _, cache, _ = served
    folder = dataclasses.replace(pin, payload="usr/share/game", payload_sha256="1" * 64, deb_sha256="0" * 64)
    with pytest.raises(PackageCorrupt):
        fetch_package(folder, cache=cache)
    unpacked = cache.parent / "content" / "usr/share/game"
    right = dataclasses.replace(folder, payload_sha256=tree_sha256(unpacked))
    assert (fetch_package(right, cache=cache) / "unused").read_bytes() == b"unused"
    (unpacked / "unused").rename(unpacked / "renamed")
    assert tree_sha256(unpacked) != right.payload_sha256


@needs_dpkg
def test_a_machine_without_package_lists_gets_its_own(served):
    pin, serve, cache, calls = served
    serve(
        'case "$*" in *Dir::State::Lists*update) exit 0;; *Dir::State::Lists*) cp {deb} .;; '
        '*) echo "E: Unable to locate package game" >&2; exit 100;; esac'
    )
    assert fetch_package(pin, cache=cache).exists()
    assert [line.split()[-1] for line in calls.read_text().splitlines()] == [
        "game=1.0-1",
        "game",
        "update",
        "game=1.0-1",
    ]


@needs_dpkg
def test_passing_failures_are_tried_again_and_lasting_ones_named(served):
    pin, serve, cache, _ = served
    serve('if [ -e {deb}.tried ]; then cp {deb} .; else touch {deb}.tried; echo "E: Failed to fetch" >&2; exit 100; fi')
    assert fetch_package(pin, cache=cache).exists()
    shutil.rmtree(cache)
    serve('echo "E: Temporary failure resolving" >&2; exit 100')
    with pytest.raises(PackageUnavailable, match=r"game \(1 MiB\) cannot be downloaded: Temporary failure resolving"):
        fetch_package(pin, cache=cache)
    assert list(cache.iterdir()) == []


@needs_dpkg
def test_a_broken_package_is_corrupt(served):
    pin, serve, cache, _ = served
    serve("echo nonsense > game.deb")
    with pytest.raises(PackageCorrupt, match="game: dpkg-deb could not unpack the package"):
        fetch_package(pin, cache=cache)


def test_without_apt_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageUnavailable, match=r"apt-get and dpkg-deb not found.*sources that need no apt"):
        fetch_package(AMAZON_QUEEN, cache=tmp_path / "cache")


def test_a_file_unpacked_by_hand_is_taken_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    pin = dataclasses.replace(AMAZON_QUEEN, payload_sha256=hashlib.sha256(b"x").hexdigest())
    path = Path(tmp_path / "cache" / pin.name / pin.payload)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert fetch_package(pin, cache=tmp_path / "cache") == path
