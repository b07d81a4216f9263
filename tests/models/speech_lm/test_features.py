import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile as sf
import torch
from transformers import WhisperFeatureExtractor

from models.corpora.hearing import PLAIN, Hearing
from models.data.audio import write_audio
from models.data.manifest import Example
from models.io_utils import sha256_file
from models.speech_lm.config import SpeechLMConfig
from models.speech_lm.connector import Connector, ConnectorConfig
from models.speech_lm.features import (
    Clip,
    FeatureError,
    FeatureStore,
    clip_features,
    clip_key,
    extract_features,
    made_by,
    main,
)
from models.speech_lm.log_mel import LogMelError, check_backend, log_mel


def example(name, **fields):
    return Example(id=f"{name}{sorted(fields.items())}", audio=name, **fields)


def encode(waves):
    """(B, 2, 3, 4) that tells the clips apart: their length and their first sample."""
    return torch.stack([torch.full((2, 3, 4), len(w) / 1000 + float(w[0])) for w in waves])


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write_audio(tmp_path / f"{i}.wav", np.full(1600 * (i + 1), 0.5, np.float32))
    return tmp_path


def test_each_clip_is_encoded_once_and_found_again(folder):
    calls = []

    def counting(waves):
        calls.append(len(waves))
        return encode(waves)

    asked = [example("0.wav"), example("0.wav", context="hint"), example("1.wav"), example("2.wav", end_seconds=0.1)]
    store, problems = extract_features(asked, counting, audio_root=folder, batch_clips=2, progress_bar=False)
    assert problems == [] and calls == [2, 1] and len(store) == 3
    rows = store.rows([asked[1], Example(id="t", audio=None), asked[3]])
    assert rows.shape == (3, 2, 3, 4) and rows.dtype == torch.float32
    assert rows[0, 0, 0, 0] == pytest.approx(2.1, abs=2e-3)
    assert rows[1].abs().max() == 0  # text only
    assert rows[2, 0, 0, 0] == pytest.approx(2.1, abs=2e-3)  # a tenth of a second of the third clip
    assert asked[2] in store and example("9.wav") not in store


def test_saved_and_loaded(folder, tmp_path):
    store, _ = extract_features([example("0.wav"), example("1.wav")], encode, audio_root=folder, progress_bar=False)
    loaded = FeatureStore.load(store.save(tmp_path / "f.safetensors"))
    assert torch.equal(loaded.features, store.features)
    assert torch.equal(loaded.rows([example("1.wav")]), store.rows([example("1.wav")]))
    (tmp_path / "f.safetensors").write_bytes(b"junk")
    with pytest.raises(FeatureError, match=r"f\.safetensors: not a feature file"):
        FeatureStore.load(tmp_path / "f.safetensors")


def test_unreadable_clips_are_skipped_and_named_up_to_a_limit(folder):
    (folder / "bad.wav").write_bytes(b"RIFFjunk")
    asked = [example(f"{i}.wav") for i in range(3)] + [example("bad.wav")]
    store, problems = extract_features(asked, encode, audio_root=folder, max_bad_fraction=0.25, progress_bar=False)
    assert len(store) == 3 and [p[0] for p in problems] == [asked[3].id]
    with pytest.raises(FeatureError, match=r"1 of 4 clips could not be read \(max 5%\): bad\.wav"):
        extract_features(asked, encode, audio_root=folder, progress_bar=False)
    with pytest.raises(FeatureError, match=r"example missing.wav.*no features of clip missing.wav@0.0-None"):
        store.rows([example("missing.wav")])


def test_spans_are_part_of_the_key():
    assert clip_key(example("a.wav")) != clip_key(example("a.wav", start_seconds=1.0))
    assert clip_key(Example(id="t", audio=None)) == ""


def test_shapes_and_doubles_are_checked():
    with pytest.raises(ValueError, match=r"features: expected \(2, K, T, D\), got \(1, 2, 3, 4\)"):
        FeatureStore(["a", "b"], torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="keys: expected each key once"):
        FeatureStore(["a", "a"], torch.zeros(2, 2, 3, 4))


def test_command_line_errors_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl"), "--model", str(tmp_path), "--out", str(tmp_path / "f")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


class Hears:
    """As much of a SpeechLM as features need."""

    def __init__(self, *, seed=0, **settings):
        generator = torch.Generator().manual_seed(seed)  # of its own: ranks of a test are threads, which share torch's generator
        self.encoder = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
        for weight in self.encoder.parameters():
            weight.data = torch.rand(weight.shape, generator=generator).bfloat16()
        self.config = SpeechLMConfig(lm="", encoder="", **{"encoder_layers": (1,), "audio_frames": 3, **settings})

    def encode_audio(self, waves):
        return encode(waves)


@pytest.fixture
def stored(folder):
    asked = [example(f"{i}.wav") for i in range(3)]
    store, usable = clip_features(Hears(), asked, audio_root=folder, progress_bar=False)
    assert usable == asked
    return store.save(folder / "f.safetensors"), asked


def test_a_file_says_what_made_it_and_of_what(folder, stored):
    path, asked = stored
    store = FeatureStore.load(path)
    assert store.made_by == made_by(Hears())
    assert store.clip(asked[1]) == Clip(0.2, sha256_file(folder / "1.wav")[:16])
    again, usable = clip_features(Hears(), asked, audio_root=folder, features=path)
    assert torch.equal(again.rows(asked), store.rows(asked)) and len(again) == len(store) and usable == asked


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "made with encoder [0-9a-f]{16}, the model hears with [0-9a-f]{16}"),
        ({"encoder_layers": (1, 2)}, r"made with encoder_layers \[1\], the model hears with \[1, 2\]"),
        ({"audio_frames": 4}, "made with audio_frames 3, the model hears with 4"),
        ({"max_audio_seconds": 5.0}, "made with max_audio_seconds 4.0, the model hears with 5.0"),
    ],
)
def test_features_of_another_encoder_are_refused(folder, stored, other, message):
    path, asked = stored
    with pytest.raises(FeatureError, match=rf"f\.safetensors: the features were {message}"):
        clip_features(Hears(**other), asked, audio_root=folder, features=path)


def test_features_of_unknown_origin_are_refused(folder):
    FeatureStore([clip_key(example("0.wav"))], torch.zeros(1, 2, 3, 4)).save(folder / "old.safetensors")
    with pytest.raises(FeatureError, match="do not say what made them; make them again: python -m models features"):
        clip_features(Hears(), [example("0.wav")], audio_root=folder, features=folder / "old.safetensors")


def test_other_sound_under_the_same_name_is_refused(folder, stored):
    path, asked = stored
    write_audio(folder / "1.wav", np.full(3200, 0.25, np.float32))
    with pytest.raises(FeatureError, match=r"1 clips hold other sound than the features were made of; example 1\.wav.*: 1\.wav"):
        clip_features(Hears(), asked, audio_root=folder, features=path)


def test_clips_that_are_elsewhere_are_counted(folder, stored):
    path, asked = stored
    (folder / "1.wav").unlink()
    said = []
    _, usable = clip_features(Hears(), asked, audio_root=folder, features=path, say=said.append)
    assert usable == asked and said == [f"{path}: the files of 1 clips are not in {folder}, so their sound was not compared"]


@pytest.mark.parametrize("from_file", [False, True])
def test_clips_longer_than_the_window_are_counted_and_may_stop_the_run(folder, from_file):
    model, asked, said = Hears(max_audio_seconds=0.15), [example(f"{i}.wav") for i in range(3)], []
    write_audio(folder / "2.wav", np.full(16_000, 0.5, np.float32))
    options = {"audio_root": folder, "progress_bar": False}
    if from_file:
        store, _ = clip_features(model, asked, **options, say=lambda line: None)
        options["features"] = store.save(folder / "cut.safetensors")
    clip_features(model, asked, **options, say=said.append)
    longer = "1 of 3 clips are longer than the 0.15 s that the model hears, up to 1.0 s"
    assert said == [f"{longer}: the rest of each is cut off"]
    with pytest.raises(FeatureError, match=r"that is more than max_cut_fraction 0.3"):
        clip_features(model, asked, **options, max_cut_fraction=0.3, say=said.append)


# --- shards on disk -----------------------------------------------------------------------------------------------------


class Threads:
    """Ranks as threads of this process; `gather` waits for all of them, as torch.distributed does."""

    def __init__(self, size):
        self.size, self.barrier, self.values = size, threading.Barrier(size), [None] * size

    def run(self, function):
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: function(self.Rank(self, rank)), range(self.size)))

    class Rank:
        def __init__(self, ranks, rank):
            self.ranks, self.rank, self.size = ranks, rank, ranks.size

        def gather(self, value):
            self.ranks.values[self.rank] = value
            self.ranks.barrier.wait(20)
            values = list(self.ranks.values)
            self.ranks.barrier.wait(20)
            return values


def listening(calls, **settings):
    """A `Hears` that encodes, and notes how many clips."""
    model = Hears(**settings)
    model.encode_audio = lambda waves: calls.append(len(waves)) or encode(waves)
    return model


@pytest.mark.parametrize("hears", [PLAIN, Hearing(snr_db=(0.0, 10.0))])
def test_ranks_encode_each_clip_once_and_read_the_same_rows(folder, hears):
    for i in range(3, 9):
        write_audio(folder / f"{i}.wav", np.full(1600 * (i + 1), 0.5, np.float32))
    (folder / "bad.wav").write_bytes(b"RIFFjunk")
    asked = [example(f"{i}.wav") for i in range(9)] + [example("0.wav", context="hint"), example("bad.wav")]
    options = {"audio_root": folder, "max_bad_fraction": 0.2, "progress_bar": False, "batch_clips": 2, "shard_mib": 9e-5}
    options["hears"] = hears
    calls, said = [], []
    whole, usable = clip_features(listening([]), asked, say=said.append, **options)
    made = Threads(3).run(
        lambda rank: clip_features(listening(calls), asked, folder=folder / "f", ranks=rank, say=lambda line: None, **options)
    )
    assert sum(calls) == 9 and len(list((folder / "f").iterdir())) == 6  # two batches a rank, each a shard here
    for store, heard in made:
        assert heard == usable and len(store) == 9 and torch.equal(store.rows(usable), whole.rows(usable))
        assert store.clip(usable[4]) == whole.clip(usable[4])
    # Again: nothing is encoded; one more clip: only that one; a file of `features` in its place: read too.
    write_audio(folder / "9.wav", np.full(1600, 0.25, np.float32))
    store, _ = clip_features(listening(calls), [*asked, example("9.wav")], folder=folder / "f", say=said.append, **options)
    assert sum(calls) == 10 and len(store) == 10
    again, _ = clip_features(listening(calls), asked, features=folder / "f", say=said.append, **options)
    assert sum(calls) == 10 and torch.equal(again.rows(usable), whole.rows(usable))


def test_shards_of_another_model_or_other_sound_are_refused(folder):
    asked = [example("0.wav"), example("1.wav")]
    options = {"audio_root": folder, "folder": folder / "f", "progress_bar": False}
    clip_features(listening([]), asked, **options)
    with pytest.raises(FeatureError, match="made with audio_frames 3, the model hears with 5"):
        clip_features(listening([], audio_frames=5), asked, **options)
    with pytest.raises(FeatureError, match=r"made with hears None, the model hears with .'codec': 'ulaw'."):
        clip_features(listening([]), asked, hears=Hearing(codec="ulaw"), **options)
    with pytest.raises(ValueError, match="clips: expected one with a SpeechLM, got 2"):
        clip_features(listening([]), [example("0.wav", more_audio=("1.wav",))], **options)
    write_audio(folder / "1.wav", np.full(800, -0.5, np.float32))
    with pytest.raises(FeatureError, match=r"1 clips hold other sound than the features were made of; example 1.wav"):
        clip_features(listening([]), asked, **options)
    shard = next((folder / "f").iterdir())
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(FeatureError, match="not a feature file"):
        clip_features(listening([]), asked, **options)


def test_every_rank_raises_the_error_of_one(folder):
    (folder / "bad.wav").write_bytes(b"RIFFjunk")
    asked = [example("0.wav"), example("bad.wav"), example("1.wav")]

    def run(rank):
        with pytest.raises(FeatureError, match="1 of 3 clips could not be read"):
            clip_features(listening([]), asked, audio_root=folder, folder=folder / "f", ranks=rank, progress_bar=False)
        return True

    assert Threads(2).run(run) == [True, True]


def test_ranks_that_do_not_see_one_folder_are_told(folder):
    asked = [example("0.wav"), example("1.wav")]

    def run(rank):
        with pytest.raises(FeatureError, match="expected a folder that all ranks see, but rank 0"):
            clip_features(
                listening([]), asked, audio_root=folder, folder=folder / f"f{rank.rank}", ranks=rank, progress_bar=False
            )
        return True

    assert Threads(2).run(run) == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_clips(tmp_path):
    """Features of 1 MiB a clip, in shards of 2 MiB: the peak for 48 clips is that for 12, not 36 MiB more."""

    def used_mib():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

    peaks = []

    def encode_large(waves):
        peaks[-1] = max(peaks[-1], used_mib())
        return torch.full((len(waves), 2, 256, 1024), float(waves[0][0]))

    for i in range(48):
        sf.write(tmp_path / f"{i}.wav", np.full(160 + i, 0.5), 16_000)
    for number, count in enumerate((12, 12, 48)):  # the first only fills the allocator's pools
        asked = [example(f"{i}.wav") for i in range(count)]
        model = Hears()
        model.encode_audio = encode_large
        peaks.append(0.0)
        store, _ = clip_features(
            model, asked, audio_root=tmp_path, folder=tmp_path / f"{number}", batch_clips=1, shard_mib=2, progress_bar=False
        )
        for start in range(0, count, 4):
            assert store.rows(asked[start : start + 4]).mean() == pytest.approx(0.5, abs=1e-3)
            peaks[-1] = max(peaks[-1], used_mib())
    assert len(store) == 48
    assert peaks[2] - peaks[1] < 18, peaks


def test_statistics_of_parts_are_those_of_the_whole():
    features = 3 + 2 * torch.randn(40, 2, 5, 4)
    whole, parts = (Connector(ConnectorConfig(num_feature_layers=2, feature_dim=4, num_frames=5, output_dim=8)) for _ in range(2))
    whole.fit_statistics(features)
    parts.fit_statistics(iter([features[:7], features[:0], features[7:]]))
    flat = features.transpose(1, 2).flatten(0, 1).double()
    assert torch.allclose(whole.feature_mean[:, 0].double(), flat.mean(0)) and torch.allclose(
        whole.feature_std[:, 0].double(), flat.std(0) + 1e-4
    )
    assert torch.allclose(parts.feature_mean, whole.feature_mean) and torch.allclose(parts.feature_std, whole.feature_std)
    with pytest.raises(ValueError, match="at least two frames"):
        parts.fit_statistics(iter([]))


# --- log-mel spectrograms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_the_processors(mels):
    extractor = WhisperFeatureExtractor(feature_size=mels)
    rng = np.random.default_rng(0)
    time = np.arange(32_000) / 16_000
    waves = [0.3 * np.sin(2 * np.pi * 220 * time), 0.1 * rng.standard_normal(32_000), np.where(time < 1, np.sin(2764 * time), 0)]
    waves = [wave.astype(np.float32) for wave in [*waves, np.zeros(32_000)]]
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "padding": "do_not_pad", "truncation": False}
    expected = extractor(waves, **options).input_features
    made = log_mel(torch.from_numpy(np.stack(waves)), extractor)
    assert made.shape == expected.shape == (4, mels, 200) and torch.allclose(made, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="expected torch or torchaudio, got 'processor'"):
        log_mel(torch.zeros(1, 400), extractor, backend="processor")


def test_torchaudio_that_cannot_be_imported_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(LogMelError, match=r"pip install 'torchaudio=="):
        check_backend("torchaudio")
    with pytest.raises(ValueError, match="expected one of processor, torch, torchaudio"):
        check_backend("librosa")


def test_log_mel_by_torchaudio():
    pytest.importorskip("torchaudio", exc_type=Exception)
    extractor = WhisperFeatureExtractor()
    waves = torch.randn(2, 16_000)
    assert torch.allclose(log_mel(waves, extractor, backend="torchaudio"), log_mel(waves, extractor), rtol=0, atol=1e-5)
