"""ContrastCache on a full disk, in a folder that cannot be written, and of files that lie: a named error, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat

import pytest
import torch

pytest.importorskip("safetensors", reason="the cache's shards are safetensors files")
from safetensors.torch import load_file, save_file

from kdkernels.contrast_cache import ContrastCache, CorruptCacheError

H = 8
ONE_SAMPLE_A_SHARD = 1e-6  # MiB


def states(number: int, rows: int = 3):
    generator = torch.Generator().manual_seed(number)
    return (*(torch.randn(rows, H, generator=generator) for _ in range(2)), torch.arange(rows) + number)


def writer(folder, **options):
    return ContrastCache.writer(folder, **{"fingerprint": {}, "hidden_size": H, "shard_mib": ONE_SAMPLE_A_SHARD, **options})


def filled(folder, count=3, **options):
    with writer(folder, **options) as cache:
        for number in range(count):
            cache.add(f"s{number}", *states(number))
    return folder


def add(folder, number, rows=3, **options):
    """Type and text of what goes wrong; None if nothing does."""
    try:
        with writer(folder, **options) as cache:
            cache.add(f"s{number}", *states(number, rows))
    except OSError as error:
        return type(error).__name__, str(error)
    return None


class TestDisk:
    def test_no_room_for_a_shard(self, tmp_path, in_child):
        filled(tmp_path)
        kind, message = in_child(lambda: add(tmp_path, 3, rows=2000), file_bytes=4096)
        assert kind == "OSError" and "shard-0-00003.safetensors" in message and "too large" in message
        assert list(ContrastCache(tmp_path)) == ["s0", "s1", "s2"]
        assert add(tmp_path, 3, rows=2000) is None  # the disk has room again
        assert list(ContrastCache(tmp_path)) == ["s0", "s1", "s2", "s3"]
        assert not list(tmp_path.glob("*.tmp*"))

    @pytest.mark.parametrize("room", [0, 1, 100])
    def test_no_room_for_a_line_of_the_index(self, tmp_path, in_child, room):
        """What was cut off must not stand before the line that is written when there is room again."""
        filled(tmp_path, 40)  # its index is longer than a shard
        index = tmp_path / "index-0.jsonl"
        size = index.stat().st_size
        assert size > 1000 > (tmp_path / "shard-0-00000.safetensors").stat().st_size

        def no_room_and_then_room():
            import resource

            cache = writer(tmp_path)
            try:
                cache.add("s40", *states(40))
                return "written"
            except OSError as error:
                message = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            cache.close()
            return message

        message = in_child(no_room_and_then_room, file_bytes=size + room)
        assert message == f"[Errno 27] File too large: '{index}'"
        cache = ContrastCache(tmp_path)
        assert len(cache) == 41 and torch.equal(cache["s40"].target, states(40)[2])

    def test_no_room_for_the_header(self, tmp_path, in_child):
        kind, message = in_child(lambda: add(tmp_path, 0, fingerprint={"made": "x" * 5000}), file_bytes=1000)
        assert kind == "OSError" and message.endswith("cache.json'")
        with pytest.raises(ValueError, match=r"without cache\.json"):
            ContrastCache(tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path, in_child):
        filled(tmp_path)
        os.chmod(tmp_path, stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        for parent in tmp_path.parents:  # of pytest, closed to others
            if parent.stat().st_uid == os.geteuid() and parent != parent.parent and not parent.stat().st_mode & stat.S_IXOTH:
                os.chmod(parent, parent.stat().st_mode | stat.S_IXOTH)
        kind, message = in_child(lambda: add(tmp_path, 3), unprivileged=True)
        assert kind == "PermissionError" and str(tmp_path) in message
        assert in_child(lambda: len(ContrastCache(tmp_path)), unprivileged=True) == 3
        os.chmod(tmp_path, 0o755)


class TestLies:
    """Files of somebody else's making. Checksums show an accident, but whoever makes a shard makes its checksum too."""

    def change(self, folder, **fields):
        """Put other values into the index' second line."""
        index = folder / "index-0.jsonl"
        lines = [json.loads(line) for line in index.read_text().splitlines()]
        lines[1] |= fields
        index.write_text("".join(json.dumps(line) + "\n" for line in lines))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"shard": "../secret"}, r"line 2 is damaged: expected shard-0-NUMBER.safetensors, got '../secret'"),
            ({"shard": "/etc/passwd"}, "expected shard-0-NUMBER"),
            ({"shard": "shard-0-../../x.safetensors"}, "expected shard-0-NUMBER"),
            ({"shard": "shard-1-00001.safetensors"}, "expected shard-0-NUMBER"),
            ({"shard": None}, "expected shard-0-NUMBER"),
            ({"bytes": "600"}, "expected bytes, sha256, rows and samples"),
            ({"bytes": True}, "expected bytes, sha256"),
            ({"sha256": 3}, "expected bytes, sha256"),
            ({"samples": {}}, "expected bytes, sha256"),
            ({"rows": 10**15}, r"1000000000000000 rows need at least \d+ bytes, it says"),
            ({"samples": [["s1", 0, 10**12, ""]]}, r"expected \[id, first row, rows, content\] within 3 rows"),
            ({"samples": [["s1", -1, 1, ""]]}, "within 3 rows"),
            ({"samples": [["s1", 2, 2, ""]]}, "within 3 rows"),
            ({"samples": [[7, 0, 1, ""]]}, "within 3 rows"),
            ({"samples": [["s1", 0, 1]]}, "within 3 rows"),
            ({"samples": ["s1"]}, "within 3 rows"),
        ],
    )
    def test_index(self, tmp_path, fields, message):
        self.change(filled(tmp_path), **fields)
        for opened in (ContrastCache, writer):
            with pytest.raises(CorruptCacheError, match=message):
                opened(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"[" * 100_000, "not readable JSON"),
            (b'{"kdkernels_contrast_cache": NaN}', "NaN is no number"),
            (b"\xff\xfe\x00", "not readable JSON"),
            (b"[]", "expected an object, got list"),
            (b'{"kdkernels_contrast_cache": 2}', "expected fingerprint, hidden_size"),
            (b'{"x": "' + b"x" * (17 << 20), "has more than 16777216 bytes"),
        ],
    )
    def test_header(self, tmp_path, content, message):
        (filled(tmp_path) / "cache.json").write_bytes(content)
        for opened in (ContrastCache, writer):
            with pytest.raises(CorruptCacheError, match=message):
                opened(tmp_path)

    @pytest.mark.parametrize(
        "fields",
        [{"hidden_size": 10**9}, {"hidden_size": 0}, {"dtype": "float64"}, {"dtype": []}, {"layers": 3}, {"layers": [-1]}],
    )
    def test_header_fields(self, tmp_path, fields):
        path = filled(tmp_path) / "cache.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        with pytest.raises(CorruptCacheError, match=r"cache.json is damaged|rows need at least"):
            ContrastCache(tmp_path)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"audio_hidden": torch.zeros(3, H)},
            {"audio_hidden": torch.zeros(2, H, dtype=torch.bfloat16)},
            {"target": torch.zeros(3)},
            {"extra": torch.zeros(3)},
        ],
    )
    def test_shard_of_other_tensors(self, tmp_path, tensors):
        path = filled(tmp_path) / "shard-0-00001.safetensors"
        good = load_file(path)
        save_file(good | tensors, path)
        self.change(tmp_path, bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        cache = ContrastCache(tmp_path)
        assert torch.equal(cache["s0"].target, states(0)[2])
        with pytest.raises(CorruptCacheError, match=r"shard-0-00001.safetensors is altered: expected 3 rows of"):
            cache.get(["s0", "s1"])

    def test_truncated_and_flipped_files_in_bounded_memory(self, tmp_path, in_child):
        """Any damage of any file: the old content, or the module's own error, in 512 MiB and two minutes."""
        filled(tmp_path)
        names = ("cache.json", "index-0.jsonl", "shard-0-00001.safetensors")
        whole = {name: (tmp_path / name).read_bytes() for name in names}

        def fuzz():
            rng = random.Random(0)
            errors = 0
            for number in range(600):
                name = names[number % 3]
                data = bytearray(whole[name])
                if rng.random() < 0.3:
                    del data[rng.randrange(len(data)) :]
                for _ in range(rng.choice((0, 1, 1, 4))):
                    # the first bytes hold a safetensors header's size
                    at = rng.randrange(min(len(data), 200)) if data else 0
                    data[at : at + 1] = bytes([rng.choice((rng.randrange(256), 0xFF, 0x39))])
                (tmp_path / name).write_bytes(data)
                try:
                    cache = ContrastCache(tmp_path, verify_checksums=False)
                    cache.get(list(cache))
                except CorruptCacheError:
                    errors += 1
                except ValueError as error:
                    assert str(error).startswith("folder: expected a contrast cache"), error
                    errors += 1
                (tmp_path / name).write_bytes(whole[name])
            return errors

        assert in_child(fuzz, memory_mib=512) > 200
