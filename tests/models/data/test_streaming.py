"""Data sets turned into a manifest while they are read: the same manifest, after a kill too, with flat memory."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest

from models.data import hf_datasets, streaming
from models.data.audio import write_audio
from models.data.convert import main
from models.data.manifest import ManifestError, read_manifest
from models.data.readers import read_foreign


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    for name in ("a.wav", "b.wav"):
        write_audio(tmp_path / name, np.sin(np.arange(8000) * 0.1).astype(np.float32) * 0.1)
    return tmp_path


def rows(count, filler=""):
    return [
        {"id": f"q{n // 2}", "audio_path": ("a.wav", "b.wav")[n // 2 % 2], "question": f"Who{n}?{filler}", "answer": "a man"}
        for n in range(count)
    ]


def jsonl(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_the_manifest_is_that_of_convert(root, capsys):
    bad = [*rows(10), {"audio_path": "none.wav", "question": "?"}, rows(3)[2]]
    source = jsonl(root / "rows.jsonl", bad)
    for name, flag in (("whole", []), ("streamed", ["--streaming"])):
        assert main([str(source), "--out", str(root / f"{name}.jsonl"), "--max-bad-fraction", "0.3", *flag]) == 0
    assert (root / "streamed.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes()
    said = capsys.readouterr().out
    assert said.count("10 examples, 2 rows skipped") == 2 and said.count("q1#2") == 0
    assert main([str(source), "--out", str(root / "streamed.jsonl"), "--streaming"]) == 1
    assert "more than max_bad_fraction" in capsys.readouterr().err
    assert not list(root.glob(".*.tmp"))


@pytest.mark.parametrize("flag", [[], ["--streaming"]])
def test_a_manifest_without_rows_is_not_written(root, capsys, flag):
    """It could not be read again."""
    source = jsonl(root / "rows.jsonl", [{"audio_path": "none.wav", "question": "?"}] * 2)
    assert main([str(source), "--out", str(root / "m.jsonl"), "--max-bad-fraction", "1", *flag]) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl: all 2 rows are bad" in error and "none.wav" in error and not (root / "m.jsonl").exists()


class Killed(Exception):
    pass


def killed_at(monkeypatch, number):
    """Stops before this row is written, as a kill would: nothing after it is flushed."""
    add = streaming._Journal.add

    def dying(self, n, *rest):
        if n == number:
            raise Killed
        add(self, n, *rest)

    monkeypatch.setattr(streaming._Journal, "add", dying)


def test_a_killed_run_goes_on(root, monkeypatch):
    monkeypatch.setattr(streaming, "COMMIT_ROWS", 4)
    source = jsonl(root / "rows.jsonl", rows(15))
    streaming.stream_into_manifest(source, root / "whole.jsonl")
    with monkeypatch.context() as patch:
        killed_at(patch, 10)
        with pytest.raises(Killed):
            streaming.stream_into_manifest(source, root / "m.jsonl")
    part = root / "m.jsonl.part"
    part.write_bytes(part.read_bytes()[:-7])  # a line that was cut off
    with pytest.raises(ManifestError, match="remove it to begin again"):
        streaming.stream_into_manifest(source, root / "m.jsonl", split="dev")
    read = []
    converted = streaming._converted
    monkeypatch.setattr(streaming, "_converted", lambda *a: read.append(a[1]) or converted(*a))
    streaming.stream_into_manifest(source, root / "m.jsonl")
    assert read == list(range(9, 16))
    assert (root / "m.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes() and not part.exists()


def test_a_full_disk_is_named_with_its_file_and_the_run_goes_on(root, in_child, monkeypatch):
    monkeypatch.setattr(streaming, "COMMIT_ROWS", 4)
    source = jsonl(root / "rows.jsonl", rows(60, filler="x" * 100))
    streaming.stream_into_manifest(source, root / "whole.jsonl")
    with pytest.raises(RuntimeError, match=r"OSError: .* too large: '.*m\.jsonl\.part'"):
        in_child(lambda: streaming.stream_into_manifest(source, root / "m.jsonl"), file_bytes=3_000)
    fsync = os.fsync

    def full(descriptor):
        if list(root.glob(".m.jsonl.tmp")):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*m\.jsonl\.tmp'"):
            streaming.stream_into_manifest(source, root / "m.jsonl")
    assert not list(root.glob(".*.tmp")) and not (root / "m.jsonl").exists()
    streaming.stream_into_manifest(source, root / "m.jsonl")
    assert (root / "m.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes()


def test_a_manifest_whose_name_ends_with_gz_is_packed(root):
    source = jsonl(root / "rows.jsonl", rows(9))
    for flags in ([], ["--streaming"]):
        assert main([str(source), "--out", str(root / "m.jsonl.gz"), *flags]) == 0
        assert read_manifest(root / "m.jsonl.gz").examples == read_foreign(source, form="auto").examples


def test_a_second_conversion_into_the_same_file_is_refused(root, monkeypatch):
    """Both would write one journal, and the manifest of one run would have rows of the other."""
    source, other = jsonl(root / "rows.jsonl", rows(6)), jsonl(root / "other.jsonl", rows(4, filler=" Other."))
    streaming.stream_into_manifest(source, root / "whole.jsonl")
    add = streaming._Journal.add

    def disturbed(self, n, *rest):
        if n == 3:
            with pytest.raises(BlockingIOError, match=r"m\.jsonl\.part: another conversion is writing here"):
                streaming.stream_into_manifest(other, root / "m.jsonl")
        add(self, n, *rest)

    monkeypatch.setattr(streaming._Journal, "add", disturbed)
    streaming.stream_into_manifest(source, root / "m.jsonl")
    assert (root / "m.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes()


def test_a_clip_that_came_later_is_found_by_the_same_command(root, capsys):
    source = jsonl(root / "rows.jsonl", [*rows(2), {"audio_path": "late.wav", "question": "?", "answer": "a man"}])
    command = [str(source), "--out", str(root / "m.jsonl"), "--streaming"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "1 of 3 rows are bad" in error and f"{root / 'm.jsonl.part'} keeps the rows" in error
    (root / "a.wav").rename(root / "late.wav")  # rows that were good are not checked again
    assert main(command) == 0
    assert [e.audio for e in read_manifest(root / "m.jsonl", check_audio=False)] == ["a.wav", "a.wav", "late.wav"]
    assert not (root / "m.jsonl.part").exists()


def test_other_rows_in_the_same_file_are_no_continuation(root, capsys):
    source = jsonl(root / "rows.jsonl", [*rows(2), {"audio_path": "late.wav", "question": "?", "answer": "a man"}])
    command = [str(source), "--out", str(root / "m.jsonl"), "--streaming", "--max-bad-fraction"]
    assert main([*command, "0"]) == 1
    before = source.stat()
    jsonl(source, [*rows(2)[::-1], {"audio_path": "late.wav", "question": "?", "answer": "a boy"}])
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    capsys.readouterr()
    assert main([*command, "1"]) == 1 and not (root / "m.jsonl").exists()
    error = capsys.readouterr().err
    assert f"{root / 'm.jsonl.part'}: expected the journal of these rows" in error and "remove it to begin again" in error
    (root / "m.jsonl.part").unlink()
    assert main([*command, "1"]) == 0
    assert [e.question for e in read_manifest(root / "m.jsonl")] == ["Who1?", "Who0?"]


def test_a_run_that_goes_on_judges_bad_rows_as_a_new_one_does(root, monkeypatch):
    """The clip of the first row comes after the kill, so the third row is the duplicate now."""
    late = {"id": "q", "audio_path": "late.wav", "question": "Who?", "answer": "a man"}
    source = jsonl(root / "rows.jsonl", [late, *rows(1), {**late, "audio_path": "a.wav"}, *rows(3)[2:]])
    with monkeypatch.context() as patch:
        killed_at(patch, 4)
        with pytest.raises(Killed):
            streaming.stream_into_manifest(source, root / "m.jsonl", max_bad_fraction=0.5)
    (root / "b.wav").rename(root / "late.wav")
    write_audio(root / "b.wav", np.ones(8000, np.float32) * 0.1)
    for name in ("m", "new"):
        streaming.stream_into_manifest(source, root / f"{name}.jsonl", max_bad_fraction=0.5)
    assert (root / "m.jsonl").read_bytes() == (root / "new.jsonl").read_bytes()
    assert [e.id for e in read_manifest(root / "m.jsonl")] == ["q", "q0", "q1"]


def test_a_damaged_journal_is_named(root):
    source = jsonl(root / "rows.jsonl", rows(2))
    (root / "m.jsonl.part").write_text("no journal\n")
    with pytest.raises(ManifestError, match=r"m\.jsonl\.part: expected a journal's line at byte 0"):
        streaming.stream_into_manifest(source, root / "m.jsonl")


def test_a_pipe_is_not_read_for_its_ends(root):
    os.mkfifo(root / "rows.jsonl")
    with pytest.raises(ManifestError, match=r"rows\.jsonl: expected a file that can be read again"):
        streaming.stream_into_manifest(root / "rows.jsonl", root / "m.jsonl", form="columns")


def test_memory_does_not_grow_with_the_texts(root):
    peaks = []
    for count in (200, 800):
        source = jsonl(root / f"{count}.jsonl", rows(count, "x" * 4000))
        tracemalloc.start()
        streaming.stream_into_manifest(source, root / f"{count}.out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(read_manifest(root / "800.out")) == 800
    assert peaks[1] - peaks[0] < 600 * 1500  # the texts of the 600 rows more are 4,000 bytes each


def sharded(datasets, root, kind):
    clip = (root / "a.wav").read_bytes()
    if kind == "webdataset":
        for shard in range(2):
            with tarfile.open(root / f"train-{shard}.tar", "w") as tar:
                for n in range(10):
                    fields = json.dumps({"question": f"Who{shard}{n}?", "answer": "a man"}).encode()
                    for suffix, data in (("wav", clip), ("json", fields)):
                        member = tarfile.TarInfo(f"s{shard}{n}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return
    for shard in range(2):
        audio = [{"bytes": clip + bytes([n]) * 2, "path": f"{n}.wav"} for n in range(10)]
        columns = {"audio": audio, "question": [f"Who{shard}{n}?" for n in range(10)], "answer": ["a man"] * 10}
        made = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio())
        made.save_to_disk(str(root / "set")) if kind == "saved" else made.to_parquet(str(root / f"train-{shard}.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "webdataset", "saved"])
def test_a_stream_goes_on_behind_the_rows_it_has_given(root, monkeypatch, kind):
    """The rows before the position are not taken from the data set again."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(streaming, "COMMIT_ROWS", 4)
    folder = root / "in"
    folder.mkdir()
    (root / "a.wav").rename(folder / "a.wav")
    sharded(datasets, folder, kind)
    (folder / "a.wav").unlink()
    source = folder / "set" if kind == "saved" else folder
    count = 10 if kind == "saved" else 20
    streaming.stream_into_manifest(source, root / "whole.jsonl")
    expected = read_foreign(source, form="auto").examples
    assert read_manifest(root / "whole.jsonl").examples == expected and len(expected) == count
    assert all("Who" in example.question for example in expected)
    stop = count - 4
    with monkeypatch.context() as patch:
        killed_at(patch, stop)
        with pytest.raises(Killed):
            streaming.stream_into_manifest(source, root / "m.jsonl")
    given = []
    rows_from = hf_datasets.DatasetRows.rows_from
    monkeypatch.setattr(
        hf_datasets.DatasetRows, "rows_from", lambda *a: (given.append(row[0]) or row for row in rows_from(*a))
    )
    streaming.stream_into_manifest(source, root / "m.jsonl")
    assert given == list(range((stop - 1) // 4 * 4 + 1, count + 1))
    assert (root / "m.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes()
