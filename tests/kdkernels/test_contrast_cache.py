"""ContrastCache: what was written comes back, a kill loses no finished shard, and damage is named."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc

import pytest
import torch

pytest.importorskip("safetensors", reason="the cache's shards are safetensors files")
from kdkernels.contrast_cache import ContrastCache, ContrastCacheWriter, CorruptCacheError
from kdkernels.lm_head import LMHead

H = 8
FINGERPRINT = {"model": "tiny", "y": {"sha256": "ab", "source": "text"}, "layers": (1, 2)}
ONE_SAMPLE_A_SHARD = 1e-6  # MiB
NAMES = ("audio_hidden", "text_hidden", "target")  # of what `states` returns
UNENCODABLE = os.fsdecode(b"clip-\xff")


def states(sample_id: str, rows: int = 3):
    generator = torch.Generator().manual_seed(sum(map(ord, sample_id)))
    return (
        torch.randn(rows, H, generator=generator),
        torch.randn(rows, H, generator=generator),
        torch.randint(0, 50_000, (rows,), generator=generator),
    )


def writer(folder, **options):
    return ContrastCache.writer(folder, **{"fingerprint": FINGERPRINT, "hidden_size": H, **options})


def filled(folder, ids=("a", "b", "c"), **options):
    with writer(folder, shard_mib=ONE_SAMPLE_A_SHARD, **options) as cache:
        for sample_id in ids:
            cache.add(sample_id, *states(sample_id))
    return folder


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


class TestRoundTrip:
    @pytest.mark.parametrize("shard_mib", [ONE_SAMPLE_A_SHARD, 0.0005, 256.0])
    def test_fp32_is_bitwise(self, tmp_path, shard_mib):
        ids = [f"clip/{number} é" for number in range(7)]
        with writer(tmp_path, dtype=torch.float32, shard_mib=shard_mib) as cache:
            for number, sample_id in enumerate(ids):
                cache.add(sample_id, *states(sample_id, rows=number))  # one of them has no row at all
        cache = ContrastCache(tmp_path, fingerprint=FINGERPRINT)
        assert len(cache) == 7 and list(cache) == ids and ids[3] in cache and "x" not in cache
        order = [ids[4], ids[1], ids[0], ids[6], ids[4]]
        got = cache.get(order)
        expected = [torch.cat(part) for part in zip(*(states(i, rows=ids.index(i)) for i in order), strict=True)]
        assert torch.equal(got.audio_hidden, expected[0]) and got.audio_hidden.dtype == torch.float32
        assert torch.equal(got.text_hidden, expected[1])
        assert torch.equal(got.target, expected[2]) and got.target.dtype == torch.int64
        assert got.lengths.tolist() == [4, 1, 0, 6, 4]
        assert [cache.rows(sample_id) for sample_id in ids] == list(range(7))

    def test_bf16_rounds_to_nearest(self, tmp_path):
        got = ContrastCache(filled(tmp_path))["b"]
        audio, text, target = states("b")
        assert got.audio_hidden.dtype == torch.bfloat16
        assert torch.equal(got.audio_hidden, audio.bfloat16()) and torch.equal(got.text_hidden, text.bfloat16())
        assert torch.equal(got.target, target)

    def test_added_tensors_may_be_reused_and_carry_grad(self, tmp_path):
        audio, text, target = states("a")
        leaf = audio.clone().requires_grad_()
        with writer(tmp_path, dtype=torch.float32) as cache:
            cache.add("a", leaf, text.double(), target)
            with torch.no_grad():
                leaf.zero_()
            target.zero_()
        got = ContrastCache(tmp_path)["a"]
        assert torch.equal(got.audio_hidden, audio) and got.target.any()

    def test_metadata(self, tmp_path):
        cache = ContrastCache(filled(tmp_path))
        assert cache.fingerprint == {"model": "tiny", "y": {"sha256": "ab", "source": "text"}, "layers": [1, 2]}
        assert (cache.hidden_size, cache.dtype) == (H, torch.bfloat16)
        assert cache.bytes == sum(path.stat().st_size for path in shards(tmp_path))

    def test_estimate(self, tmp_path):
        with writer(tmp_path, dtype=torch.float32) as cache:
            cache.add("a", torch.zeros(5000, H), torch.zeros(5000, H), torch.zeros(5000, dtype=torch.int64))
        estimate = ContrastCache.estimate_bytes(tokens=5000, hidden_size=H, dtype=torch.float32)
        assert estimate == 5000 * (2 * H * 4 + 8)
        assert estimate <= ContrastCache(tmp_path).bytes <= estimate + 1024
        assert ContrastCache.estimate_bytes(tokens=10, hidden_size=4096) == 10 * (2 * 4096 * 2 + 8)

    def test_layers_come_back_at_the_rows_asked_for(self, tmp_path):
        layered = {i: torch.randn(2, 3, 2, H, generator=torch.Generator().manual_seed(ord(i))) for i in "ab"}
        with writer(tmp_path, dtype=torch.float32, layers=(6, 12)) as cache:
            for i, (audio, text) in layered.items():
                cache.add(i, *states(i), audio_layers=audio, text_layers=text)
            with pytest.raises(ValueError, match=r"text_layers: expected the states of layers \[6, 12\], got none"):
                cache.add("c", *states("c"), audio_layers=layered["a"][0])
        cache = ContrastCache(tmp_path)
        assert cache.layers == (6, 12)
        got = cache.get(["b", "a"])
        assert torch.equal(got.audio_layers, torch.cat([layered["b"][0], layered["a"][0]]))
        assert torch.equal(got.text_layers, torch.cat([layered["b"][1], layered["a"][1]]))
        estimate = ContrastCache.estimate_bytes(tokens=6, hidden_size=H, dtype=torch.float32, layers=2)
        assert estimate == 6 * (6 * H * 4 + 8) <= cache.bytes
        with pytest.raises(ValueError, match=r"layers: the cache .* has another; expected \[6\], got \[6, 12\]"):
            writer(tmp_path, dtype=torch.float32, layers=(6,))

    def test_a_cache_without_layers_takes_none(self, tmp_path):
        assert ContrastCache(filled(tmp_path))["a"].audio_layers is None
        with writer(tmp_path) as cache, pytest.raises(ValueError, match="audio_layers: expected none, in a cache without"):
            cache.add("z", *states("z"), audio_layers=torch.zeros(3, 1, H), text_layers=torch.zeros(3, 1, H))

    def test_float8_keeps_each_row_to_its_own_scale(self, tmp_path):
        audio, text, target = states("a", rows=5)
        audio = audio * torch.tensor([1e-6, 1.0, 1e3, 0.0, 1e30])[:, None]
        with writer(tmp_path, dtype=torch.float8_e4m3fn) as cache:
            cache.add("a", audio, text, target)
        got = ContrastCache(tmp_path)["a"]
        assert got.audio_hidden.dtype == torch.float32
        for stored, exact in ((got.audio_hidden, audio), (got.text_hidden, text)):
            # e4m3 has three bits after the leading one; the smallest of a row's values may fall below its normal range.
            bound = exact.abs() / 16 + exact.abs().amax(-1, keepdim=True) / 448 * 2**-9
            assert ((stored - exact).abs() <= bound).all()
        assert torch.equal(got.audio_hidden[3], torch.zeros(H))
        assert ContrastCache.estimate_bytes(tokens=5, hidden_size=H, dtype=torch.float8_e4m3fn) == 5 * (2 * (H + 4) + 8)

    def test_contents_are_kept(self, tmp_path):
        with writer(tmp_path, shard_mib=ONE_SAMPLE_A_SHARD) as cache:
            cache.add("a", *states("a"), content="x-1")
            cache.add("b", *states("b"))
            assert cache.content("a") == "x-1" and cache.content("b") == "" and cache.content("c") is None
        with writer(tmp_path) as cache:
            assert cache.content("a") == "x-1"
        cache = ContrastCache(tmp_path)
        assert cache.content("a") == "x-1" and cache.content("b") == ""
        with pytest.raises(KeyError, match="sample 'c' is not in the cache"):
            cache.content("c")

    def test_reader_travels_to_a_worker(self, tmp_path):
        cache = ContrastCache(filled(tmp_path))
        before = cache["a"]
        again = pickle.loads(pickle.dumps(cache))["a"]
        assert torch.equal(again.audio_hidden, before.audio_hidden)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
    def test_reading_leaves_nothing_behind(self, tmp_path, dtype):
        """Bounds beyond Python's small integers, so that each slice that is kept takes memory of its own."""
        with writer(tmp_path, dtype=dtype) as cache:
            cache.add("before", *states("before", 1000))
            cache.add("read", *states("read"))
        cache = ContrastCache(tmp_path)
        tracemalloc.start()
        try:
            for _ in range(500):  # until what Python hands out anew has been traced, too
                cache["read"]
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(500):
                cache["read"]
            after = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert after - before < 500 * sys.getsizeof(1000), "less than an integer a read"

    def test_parts_of_several_writers_are_one_cache(self, tmp_path):
        with writer(tmp_path, part="rank0") as first, writer(tmp_path, part="rank1") as second:
            first.add("a", *states("a"))
            second.add("b", *states("b"))
        assert sorted(ContrastCache(tmp_path)) == ["a", "b"]
        with writer(tmp_path, part="rank2") as third, writer(tmp_path, part="rank3") as fourth:  # neither sees the other's
            third.add("c", *states("c"))
            fourth.add("c", *states("c"))
        with pytest.raises(CorruptCacheError, match=r"sample 'c' is in shard shard-rank2-00000.*two parts"):
            ContrastCache(tmp_path)


class TestResume:
    def test_goes_on_where_it_stopped(self, tmp_path):
        filled(tmp_path, "ab")
        before = {path.name: path.read_bytes() for path in shards(tmp_path)}
        with writer(tmp_path) as cache:
            assert cache.contains("a") and "b" in cache and "c" not in cache and len(cache) == 2
            with pytest.raises(ValueError, match="sample_id: expected an id the cache does not hold yet, got 'a'"):
                cache.add("a", *states("a"))
            cache.add("c", *states("c"))
        assert sorted(ContrastCache(tmp_path)) == ["a", "b", "c"]
        assert all((tmp_path / name).read_bytes() == data for name, data in before.items())

    def test_an_error_in_the_loop_keeps_what_was_added(self, tmp_path):
        with pytest.raises(ZeroDivisionError), writer(tmp_path) as cache:
            cache.add("a", *states("a"))
            raise ZeroDivisionError
        assert list(ContrastCache(tmp_path)) == ["a"]

    @pytest.mark.slow
    @pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
    def test_killed_in_the_middle(self, tmp_path, signal_number):
        """A process is killed while it writes; what it has finished is whole, and a second run completes it."""
        script = textwrap.dedent(
            """
            import sys, torch
            from kdkernels.contrast_cache import ContrastCache
            writer = ContrastCache.writer(sys.argv[1], fingerprint={"run": 1}, hidden_size=64, dtype=torch.float32,
                                          shard_mib=0.05)
            for number in range(20_000):
                if f"s{number}" not in writer:
                    rows = torch.full((20, 64), float(number))
                    writer.add(f"s{number}", rows, -rows, torch.full((20,), number))
                    if number % 10 == 0: print(number, flush=True)
            """
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        done = 0
        for _ in range(2):  # killed twice: the second run starts from a killed cache
            with subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
            ) as process:
                number = 0
                while number <= done + 60:
                    number = int(process.stdout.readline())
                time.sleep(0.003 * (1 + done % 7))  # anywhere within a shard
                process.send_signal(signal_number)
            cache = ContrastCache(tmp_path)
            assert number - 20 < len(cache) < 20_000
            ids = [f"s{i}" for i in range(len(cache))]
            got = cache.get(ids)  # consecutive from s0 on: none lost in between, none doubled
            assert torch.equal(got.audio_hidden[:, 0], torch.arange(len(ids)).repeat_interleave(20).float())
            assert torch.equal(got.text_hidden, -got.audio_hidden)
            done = len(cache)
        with writer(tmp_path, fingerprint={"run": 1}, hidden_size=64, dtype=torch.float32) as again:
            assert len(again) == done
            again.add("last", torch.ones(1, 64), torch.ones(1, 64), torch.ones(1, dtype=torch.int64))
        assert len(ContrastCache(tmp_path)) == done + 1
        assert not list(tmp_path.glob("*.tmp*"))

    def test_leftovers_of_a_kill_are_removed(self, tmp_path):
        """safetensors writes by way of a file of a random name, and so the shard in the making has its own folder."""
        filled(tmp_path, "a")
        leftover = tmp_path / "shard-0-00001.safetensors.tmp"
        leftover.mkdir()
        (leftover / ".tmpB4D1to").write_bytes(b"half a shard")
        other_part = tmp_path / "shard-1-00001.safetensors.tmp"
        other_part.mkdir()
        with writer(tmp_path) as cache:
            cache.add("b", *states("b"))
        assert not leftover.exists() and other_part.exists()
        assert list(ContrastCache(tmp_path)) == ["a", "b"]

    @pytest.mark.parametrize("cut", [1, 40])
    def test_torn_index_line(self, tmp_path, cut):
        filled(tmp_path, "ab")
        index = tmp_path / "index-0.jsonl"
        index.write_bytes(index.read_bytes()[:-cut])
        assert list(ContrastCache(tmp_path)) == ["a"]
        with writer(tmp_path) as cache:
            assert "b" not in cache
            cache.add("b", *states("b"))
        assert sorted(ContrastCache(tmp_path)) == ["a", "b"]
        assert len(shards(tmp_path)) == 2

    def test_leftovers_of_a_kill_are_cleared(self, tmp_path):
        filled(tmp_path, "a")
        (tmp_path / "shard-0-00001.safetensors").write_bytes(b"renamed, but not in the index yet")
        (tmp_path / "shard-0-00001.safetensors.tmp-77").write_bytes(b"half")
        (tmp_path / "shard-other-00000.safetensors").write_bytes(b"another part's own business")
        writer(tmp_path).close()
        assert [path.name for path in shards(tmp_path)] == [
            "shard-0-00000.safetensors",
            "shard-other-00000.safetensors",
        ]

    def test_two_writers_of_one_part(self, tmp_path):
        with writer(tmp_path), pytest.raises(RuntimeError, match="another writer is at work"):
            writer(tmp_path)
        writer(tmp_path).close()


class TestDamage:
    def test_truncated_shard(self, tmp_path):
        bad = shards(filled(tmp_path))[1]
        size = bad.stat().st_size
        os.truncate(bad, size - 5)
        for verify_checksums in (True, False):
            message = f"{re.escape(str(bad))} is truncated or altered: expected {size} bytes, got {size - 5}"
            with pytest.raises(CorruptCacheError, match=message):
                ContrastCache(tmp_path, verify_checksums=verify_checksums)

    def test_flipped_bit(self, tmp_path):
        bad = shards(filled(tmp_path))[2]
        data = bytearray(bad.read_bytes())
        data[-3] ^= 0x10
        bad.write_bytes(data)
        with pytest.raises(
            CorruptCacheError, match=f"{re.escape(str(bad))} is altered: expected sha256 [0-9a-f]{{64}}"
        ):
            ContrastCache(tmp_path)
        ContrastCache(tmp_path, verify_checksums=False)

    def test_missing_shard(self, tmp_path):
        bad = shards(filled(tmp_path))[0]
        bad.unlink()
        with pytest.raises(CorruptCacheError, match=f"{re.escape(str(bad))} is missing"):
            ContrastCache(tmp_path)

    def test_the_writer_repairs(self, tmp_path, caplog):
        bad = shards(filled(tmp_path))[1]
        os.truncate(bad, 10)
        with writer(tmp_path) as cache:
            assert [i in cache for i in "abc"] == [True, False, True]
            assert f"shard {bad} is truncated" in caplog.text and "its 1 samples" in caplog.text
            cache.add("b", *states("b"))
        assert torch.equal(ContrastCache(tmp_path)["b"].audio_hidden, states("b")[0].bfloat16())

    def test_unreadable_index_and_header(self, tmp_path):
        filled(tmp_path)
        index = tmp_path / "index-0.jsonl"
        lines = index.read_bytes().splitlines(keepends=True)
        index.write_bytes(lines[0] + b"{broken\n" + lines[2])
        with pytest.raises(CorruptCacheError, match=r"index-0.jsonl, line 2 is not readable JSON"):
            ContrastCache(tmp_path)
        (tmp_path / "cache.json").write_text("{")
        with pytest.raises(CorruptCacheError, match=r"cache.json is not readable JSON"):
            ContrastCache(tmp_path)


class TestClosed:
    def test_a_closed_writer_takes_no_sample(self, tmp_path):
        with writer(tmp_path) as cache:
            cache.add("a", *states("a"))
        with pytest.raises(ValueError, match="writer: expected an open one, got one that is closed"):
            cache.add("late", *states("late"))
        assert "late" not in cache and len(cache) == 1
        cache.flush()  # nothing is waiting
        cache.close()
        assert list(ContrastCache(tmp_path)) == ["a"]

    def test_a_closed_writer_leaves_the_shards_of_the_next_one_alone(self, tmp_path):
        closed = writer(tmp_path)
        closed.close()
        with writer(tmp_path) as cache:
            cache.add("b", *states("b"))
            cache.flush()
            with pytest.raises(ValueError, match="writer: expected an open one"):
                closed.add("a", *states("a"))
        assert list(ContrastCache(tmp_path)) == ["b"]

    def test_samples_that_could_not_be_written_are_not_written_after_the_lock_is_gone(self, tmp_path, monkeypatch):
        cache = writer(tmp_path)
        cache.add("a", *states("a"))

        def full(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr("kdkernels.shards._write_shard", full)
        with pytest.raises(OSError, match="No space"):
            cache.close()
        with writer(tmp_path) as other, pytest.raises(ValueError, match="writer: expected an open one"):
            cache.flush()
        assert len(other) == 0


    def test_another_number_of_parts_writes_no_sample_twice(self, tmp_path):
        for part, name in (("0", "a"), ("1", "b")):
            with writer(tmp_path, part=part) as cache:
                cache.add(name, *states(name), content=f"of {name}")
        with writer(tmp_path, part="0") as alone:
            assert "a" in alone and "b" in alone and "c" not in alone
            assert [alone.content(name) for name in "abc"] == ["of a", "of b", None]
            with pytest.raises(ValueError, match="sample_id: expected an id the cache does not hold yet, got 'b'"):
                alone.add("b", *states("b"))
            alone.add("c", *states("c"))
        assert set(ContrastCache(tmp_path)) == {"a", "b", "c"}

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    def test_a_forked_process_does_not_keep_the_lock(self, tmp_path):
        """A DataLoader's worker that outlives the writer has the lock's file open."""
        reading, writing = os.pipe()
        with writer(tmp_path) as cache:
            cache.add("a", *states("a"))
            child = os.fork()
            if child == 0:
                os.read(reading, 1)
                os._exit(0)
        try:
            with writer(tmp_path) as again:
                assert "a" in again
        finally:
            os.write(writing, b"x")
            os.waitpid(child, 0)
            os.close(reading)
            os.close(writing)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    def test_a_forked_process_does_not_give_the_lock_up(self, tmp_path):
        with writer(tmp_path) as cache:
            child = os.fork()
            if child == 0:
                cache.close()
                os._exit(0)
            os.waitpid(child, 0)
            with pytest.raises(RuntimeError, match="another writer is at work"):
                writer(tmp_path)


class TestRefusals:
    def test_other_fingerprint(self, tmp_path):
        filled(tmp_path)
        other = {**FINGERPRINT, "model": "large", "extra": 1}
        del other["layers"]
        message = (
            r"fingerprint: the cache .* was made from something else; extra: expected 1, got no such key; "
            r'layers: expected no such key, got \[1, 2\]; model: expected "large", got "tiny"$'
        )
        with pytest.raises(ValueError, match=message):
            ContrastCache(tmp_path, fingerprint=other)
        with pytest.raises(ValueError, match=message):
            writer(tmp_path, fingerprint=other)
        with writer(tmp_path, fingerprint={**FINGERPRINT, "layers": [1, 2]}):
            pass  # the refused writer has left no lock behind

    def test_other_hidden_size_or_dtype(self, tmp_path):
        filled(tmp_path)
        with pytest.raises(ValueError, match=r"hidden_size: the cache .* has another; expected 9, got 8"):
            writer(tmp_path, hidden_size=9)
        with pytest.raises(ValueError, match=r"dtype: the cache .* has another; expected float32, got bfloat16"):
            writer(tmp_path, dtype=torch.float32)

    def test_not_a_cache_and_other_version(self, tmp_path):
        with pytest.raises(ValueError, match=r"folder: expected a contrast cache, got .* without cache.json"):
            ContrastCache(tmp_path / "nowhere")
        filled(tmp_path)
        header = json.loads((tmp_path / "cache.json").read_text())
        (tmp_path / "cache.json").write_text(json.dumps({**header, "kdkernels_contrast_cache": 1}))
        with pytest.raises(ValueError, match=r"expected a contrast cache of format 2 in .*, got 1"):
            ContrastCache(tmp_path)

    def test_unknown_sample(self, tmp_path):
        cache = ContrastCache(filled(tmp_path))
        with pytest.raises(KeyError, match=r"sample 'x' is not in the cache .* \(3 samples\)"):
            cache.get(["a", "x"])
        with pytest.raises(TypeError, match="sample_ids: expected a sequence of ids, got the string 'a'"):
            cache.get("a")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"sample_id": ""}, TypeError, "sample_id: expected a string that is not empty, got ''"),
            (
                {"audio_hidden": torch.zeros(3, H + 1)},
                ValueError,
                r"audio_hidden: expected shape \(3, 8\), got \(3, 9\)",
            ),
            ({"text_hidden": torch.zeros(2, H)}, ValueError, r"text_hidden: expected shape \(3, 8\), got \(2, 8\)"),
            (
                {"text_hidden": torch.zeros(3, H).long()},
                TypeError,
                "text_hidden: expected a floating point tensor, got",
            ),
            ({"target": torch.zeros(3)}, TypeError, "target: expected a tensor of torch.int64, got torch.float32"),
            ({"target": torch.zeros(3, 1).long()}, ValueError, r"target: expected shape \(n,\), got \(3, 1\)"),
            (
                {"audio_hidden": torch.full((3, H), torch.nan)},
                ValueError,
                "finite states, got inf or NaN in sample 'a'",
            ),
        ],
    )
    def test_add(self, tmp_path, change, error, message):
        audio, text, target = states("a")
        arguments = {"sample_id": "a", "audio_hidden": audio, "text_hidden": text, "target": target, **change}
        with writer(tmp_path) as cache:
            with pytest.raises(error, match=message):
                cache.add(**arguments)
            assert "a" not in cache

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": 0}, "hidden_size: expected a positive int, got 0"),
            ({"shard_mib": 0}, "shard_mib: expected a positive number, got 0"),
            ({"shard_mib": math.inf}, "shard_mib: expected a positive number, got inf"),
            ({"shard_mib": "1"}, "shard_mib: expected a positive number, got '1'"),
            ({"part": "a/b"}, "part: expected letters, digits and underscores, got 'a/b'"),
            ({"dtype": torch.float16}, "dtype: expected torch.bfloat16, torch.float32 or torch.float8_e4m3fn, got torch.float16"),
            ({"hidden_size": True}, "hidden_size: expected a positive int, got True"),
            ({"layers": (-1,)}, r"layers: expected numbers of layers from 0 on, got \(-1,\)"),
            ({"layers": (1.0,)}, r"layers: expected numbers of layers from 0 on, got \(1.0,\)"),
            ({"layers": 3}, "layers: expected numbers of layers from 0 on, got 3"),
            ({"fingerprint": {"prompt": "x" * (17 << 20)}}, "fingerprint: expected at most 16777216 bytes of JSON, got 178"),
        ],
    )
    def test_writer_arguments(self, tmp_path, change, message):
        with pytest.raises(ValueError, match=message):
            writer(tmp_path, **change)
        filled(tmp_path)  # nothing is left behind that a correct writer would meet
        assert len(ContrastCache(tmp_path)) == 3

    def test_a_part_is_a_name(self, tmp_path):
        with pytest.raises(TypeError, match="part: expected a string, got int"):
            writer(tmp_path, part=1)

    @pytest.mark.parametrize("value", [torch.zeros(1), math.nan, -math.inf, UNENCODABLE, {UNENCODABLE: 1}], ids=str)
    def test_fingerprint_that_is_not_json(self, tmp_path, value):
        with pytest.raises(TypeError, match="fingerprint: expected JSON values only"):
            ContrastCacheWriter(tmp_path, fingerprint={"model": value}, hidden_size=H)
        filled(tmp_path)
        with pytest.raises(TypeError, match="fingerprint: expected JSON values only"):
            ContrastCache(tmp_path, fingerprint={"model": value})

    @pytest.mark.parametrize("argument", ["sample_id", "content"])
    def test_text_that_no_file_can_hold(self, tmp_path, argument):
        """It is refused where it enters: later it would take the samples that wait with it."""
        with writer(tmp_path) as cache:
            cache.add("before", *states("before"))
            for text, message in ((UNENCODABLE, "a string that UTF-8 can hold"), ("x" * 1048577, "at most 1048576 bytes")):
                with pytest.raises(ValueError, match=f"{argument}: expected {message}"):
                    cache.add(**{"sample_id": "a", argument: text}, **dict(zip(NAMES, states("a"), strict=True)))
            cache.add("after", *states("after"))
        assert list(ContrastCache(tmp_path)) == ["before", "after"]

    @pytest.mark.parametrize("long", ["sample_id", "content"])
    def test_long_lines_of_the_index(self, tmp_path, monkeypatch, long):
        """Short samples with long names: a shard is closed before its line is longer than a reader takes."""
        monkeypatch.setattr("kdkernels.shards._INDEX_LINE_BYTES", 4000)
        ids = [str(number) + "\0" * 100 * (long == "sample_id") for number in range(50)]  # six bytes each in JSON
        with writer(tmp_path) as cache:
            for sample_id in ids:
                cache.add(sample_id, *states("a", 1), content="\0" * 100 * (long == "content"))
        lines = (tmp_path / "index-0.jsonl").read_bytes().splitlines()
        assert len(lines) > 7 and max(map(len, lines)) < 5000
        assert list(ContrastCache(tmp_path)) == ids
        with pytest.raises(TypeError, match="fingerprint: expected a mapping of JSON values, got str"):
            ContrastCacheWriter(tmp_path, fingerprint="tiny", hidden_size=H)

    def test_missing_safetensors_is_explained(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match="pip install safetensors"):
            ContrastCache(tmp_path)


class TestHeadOfTheTeacher:
    """A cache that was given its teacher's LM head refuses another one."""

    HEAD = LMHead(torch.randn(1000, H, generator=torch.Generator().manual_seed(5)))

    def test_the_same_head_in_any_dtype_is_accepted(self, tmp_path):
        cache = ContrastCache(filled(tmp_path, teacher_head=self.HEAD))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            cache.check_head(LMHead(self.HEAD.weight.to(dtype)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_another_head_is_refused(self, tmp_path, dtype):
        cache = ContrastCache(filled(tmp_path, teacher_head=LMHead(self.HEAD.weight.to(dtype))))
        apart = self.HEAD.weight * 1.02
        with pytest.raises(ValueError, match=r"teacher_head: expected that of the teacher .* other weights"):
            cache.check_head(LMHead(apart))
        with pytest.raises(ValueError, match=rf"teacher_head: expected .* of shape \(1000, {H}\), got \(1008, {H}\)"):
            cache.check_head(LMHead(torch.cat([self.HEAD.weight, apart[:8]])))
        with pytest.raises(ValueError, match="other weights"):
            cache.check_head(LMHead(torch.full_like(apart, torch.nan)))

    def test_a_writer_that_goes_on_compares_it(self, tmp_path):
        filled(tmp_path, teacher_head=self.HEAD)
        filled(tmp_path, ids=("d",), teacher_head=self.HEAD)
        with pytest.raises(ValueError, match="other weights"):
            writer(tmp_path, teacher_head=LMHead(self.HEAD.weight + 1))

    def test_a_cache_without_it_takes_any(self, tmp_path):
        ContrastCache(filled(tmp_path)).check_head(self.HEAD)
        filled(tmp_path, ids=("d",), teacher_head=self.HEAD)

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(TypeError, match="teacher_head: expected an LMHead or None, got Tensor"):
            writer(tmp_path, teacher_head=self.HEAD.weight)
        with pytest.raises(ValueError, match=rf"teacher_head: expected a weight \(V, {H}\), got \(1000, {H + 1}\)"):
            writer(tmp_path, teacher_head=LMHead(torch.zeros(1000, H + 1)))

    @pytest.mark.parametrize("damage", [3, {}, {"shape": [1000, H], "values": ["a"]}, {"shape": None, "values": []}])
    def test_a_damaged_sample_is_named(self, tmp_path, damage):
        filled(tmp_path, teacher_head=self.HEAD)
        header = json.loads((tmp_path / "cache.json").read_text())
        (tmp_path / "cache.json").write_text(json.dumps({**header, "teacher_head": damage}))
        with pytest.raises(CorruptCacheError, match=r"cache\.json is damaged: teacher_head"):
            ContrastCache(tmp_path).check_head(self.HEAD)
