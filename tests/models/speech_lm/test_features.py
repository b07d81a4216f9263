import numpy as np
import pytest
import torch

from models.data.audio import write_audio
from models.data.manifest import Example
from models.io_utils import sha256_file
from models.speech_lm.config import SpeechLMConfig
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
        torch.manual_seed(seed)
        self.encoder = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
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
    longer = "1 of 3 clips are longer than the 0.15 s that the model hears (max_audio_seconds), up to 1.0 s"
    assert said == [f"{longer}: the rest of each is cut off"]
    with pytest.raises(FeatureError, match=r"that is more than max_cut_fraction 0.3"):
        clip_features(model, asked, **options, max_cut_fraction=0.3, say=said.append)
