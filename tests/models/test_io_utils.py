import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import io_utils


def test_write_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    io_utils.atomic_write_text(path, "one")
    io_utils.atomic_write_text(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~io_utils._umask()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    io_utils.atomic_write_bytes(path, b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        io_utils.atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_wrong_types_are_named(tmp_path):
    with pytest.raises(TypeError, match="data: expected bytes, got str"):
        io_utils.atomic_write_bytes(tmp_path / "x", "text")
    with pytest.raises(TypeError, match="text: expected str, got bytes"):
        io_utils.atomic_write_text(tmp_path / "x", b"bytes")
    with pytest.raises(ValueError):
        io_utils.atomic_write_json(tmp_path / "x", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_dir_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "ckpt"
    with pytest.raises(RuntimeError, match="halfway"), io_utils.atomic_dir(target) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []

    with io_utils.atomic_dir(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with io_utils.atomic_dir(target) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_failed_replacement_keeps_the_old_dir(tmp_path):
    target = tmp_path / "ckpt"
    with io_utils.atomic_dir(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), io_utils.atomic_dir(target) as folder:
        raise RuntimeError
    assert (target / "a").read_text() == "1"


def test_sha256_file(tmp_path):
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    assert io_utils.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_fingerprint_is_canonical(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        rate: float = 0.1
        layers: tuple[int, ...] = (1, 3)

    assert io_utils.fingerprint({"a": 1, "b": [1, 2]}) == io_utils.fingerprint({"b": (1, 2), "a": 1})
    assert io_utils.fingerprint(Settings()) == io_utils.fingerprint({"layers": [1, 3], "rate": 0.1})
    assert io_utils.fingerprint(Settings()) != io_utils.fingerprint(Settings(rate=0.2))
    assert io_utils.fingerprint(tmp_path) == io_utils.fingerprint(str(tmp_path))
    assert io_utils.fingerprint(1) != io_utils.fingerprint("1")


@pytest.mark.parametrize("bad", [{1, 2}, {1: "a"}, b"x", object()])
def test_fingerprint_refuses_what_has_no_canonical_text(bad):
    with pytest.raises(TypeError, match="fingerprint"):
        io_utils.fingerprint(bad)


def test_fingerprint_refuses_nan():
    with pytest.raises(ValueError):
        io_utils.fingerprint({"x": float("nan")})


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "c"))
    assert io_utils.cache_dir() == tmp_path / "c"
    assert (tmp_path / "c").is_dir()
    monkeypatch.delenv("KDKERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert io_utils.cache_dir() == tmp_path / ".cache" / "kdkernels"


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    code = "import sys; from models.io_utils import exclusive\nwith exclusive(sys.argv[1], 'a training'): pass"
    command, root = [sys.executable, "-c", code, str(tmp_path / "run")], Path(__file__).parents[2]
    with io_utils.exclusive(tmp_path / "run", "a training"):
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        assert done.returncode != 0 and "run: a training is at work there already" in done.stderr
    assert subprocess.run(command, cwd=root).returncode == 0


def test_a_file_is_held_by_one_at_a_time(tmp_path):
    path = tmp_path / "new" / "file"
    with io_utils.locked(path, "not now") as file:
        file.write(b"x")
        with pytest.raises(BlockingIOError, match=r"^not now$"), io_utils.locked(path, "not now"):
            pass
    with io_utils.locked(path, "not now"):
        assert path.read_bytes() == b"x"


def test_one_file_has_several_paths(tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(file)
    paths = [file, str(tmp_path / "folder" / ".." / "file"), tmp_path / "link"]
    for there in (False, True):
        assert all(io_utils.same_file(a, b) for a in paths for b in paths)
        assert not any(io_utils.same_file(a, other) or io_utils.same_file(other, a) for a in paths)
        if not there:
            file.touch()
    other.touch()
    os.link(file, tmp_path / "hard")
    assert io_utils.same_file(file, tmp_path / "hard") and not io_utils.same_file(file, other)


def test_the_commit_says_whether_the_sources_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        options = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *options, *words], cwd=tmp_path, check=True, capture_output=True)

    files = [tmp_path / name for name in ("models/io_utils.py", "kdkernels/a.py", "benchmarks/results/a.csv")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    monkeypatch.setattr(io_utils, "__file__", str(files[0]))
    assert io_utils.source_commit() == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = io_utils.source_commit()
    assert len(commit) == 12
    files[2].write_text("2")  # what an earlier run has written
    assert io_utils.source_commit() == commit == io_utils.source_commit("kdkernels", "benchmarks")
    files[1].write_text("2")
    assert io_utils.source_commit() == commit + "+changes" == io_utils.source_commit("kdkernels")
    assert io_utils.source_commit("models") == commit
