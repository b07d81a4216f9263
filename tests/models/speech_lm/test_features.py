import numpy as np
import pytest
import torch

from models.data.audio import write_audio
from models.data.manifest import Example
from models.speech_lm.features import FeatureError, FeatureStore, clip_key, extract_features, main


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
