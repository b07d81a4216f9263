"""Other negative paths than silence: which clip is heard on them, and what the cache then holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kdkernels.contrast_cache import ContrastCache
from models.data.audio import load_audio, write_audio
from models.data.manifest import Example, read_manifest
from models.experiments.negative_paths import (
    Backwards,
    negative_rows,
    other_clips,
    rows_in,
    speak_flat,
    write_contrast_cache,
)
from models.experiments.shared_steps import write_cache
from models.speech_lm.features import FeatureStore
from models.speech_lm.model import SpeechLM
from models.training.cache_identity import teacher_fingerprint
from tests.models.training.test_run_setup import world  # noqa: F401 (world is a fixture)


def test_a_swapped_clip_has_another_answer_of_the_same_task():
    asked = [
        Example(
            id=f"c{n}", audio=f"{n}.wav", transcription="", task="gender" if n < 9 else "noise", target=f"It is {n % 2}.",
            question="Which?", split="train",
        )
        for n in range(12)
    ]  # fmt: skip
    chosen = other_clips(asked, seed=0)
    for e in asked:
        other = chosen[e.id]
        assert other.task == e.task and other.target != e.target and other.audio != e.audio
    assert chosen != other_clips(asked, seed=1)
    same = [dataclasses.replace(e, target="The speaker is a man.") for e in asked]
    assert all(other.audio != e.audio for e, other in zip(same, other_clips(same, seed=0).values(), strict=True))
    with pytest.raises(ValueError, match="two clips of the task 'gender' or more, got one"):
        other_clips(asked[:1], seed=0)


def test_backwards():
    samples = np.arange(5, dtype=np.float32)
    assert np.array_equal(Backwards().sound(samples, "a", sample_rate=16_000), samples[::-1])


@pytest.mark.slow
def test_the_cache_holds_what_the_teacher_says_of_the_other_sound(world, tmp_path):  # noqa: F811
    examples = read_manifest(world / "m.jsonl", check_audio=False).examples
    folder = world / "teacher" / "final"
    model, store = SpeechLM.from_pretrained(folder).eval(), FeatureStore.load(world / "f.safetensors")
    write_cache(tmp_path / "silence", folder, model, store, {}, examples)
    plain = ContrastCache(tmp_path / "silence", fingerprint=teacher_fingerprint(folder))
    names = [e.id for e in examples]
    wanted = plain.get(names)
    for kind in ("swapped", "reversed", "narrow"):
        rows = negative_rows(kind, model, store, examples, audio_root=world, seed=0, made=tmp_path / "made")
        write_contrast_cache(tmp_path / kind, folder, model, store, {}, examples, rows)
        found = ContrastCache(tmp_path / kind, fingerprint=teacher_fingerprint(folder)).get(names)
        assert torch.equal(found.target, wanted.target)
        torch.testing.assert_close(found.audio_hidden, wanted.audio_hidden, rtol=1e-4, atol=1e-5)
        assert (found.text_hidden - wanted.text_hidden).abs().max() > 1e-4, kind
        assert (found.text_hidden - found.audio_hidden).abs().max() > 1e-4, kind
    # Swapped: the states of the clip that is heard, in the place of its own.
    heard = other_clips(examples, seed=0)
    moved = [dataclasses.replace(e, audio=heard[e.id].audio) for e in examples]
    write_cache(tmp_path / "moved", folder, model, store, {}, moved)
    states = ContrastCache(tmp_path / "moved", fingerprint=teacher_fingerprint(folder)).get(names)
    found = ContrastCache(tmp_path / "swapped", fingerprint=teacher_fingerprint(folder)).get(names)
    torch.testing.assert_close(found.text_hidden, states.audio_hidden, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kind: expected one of swapped, reversed, narrow, flat, got 'silence'"):
        negative_rows("silence", model, store, examples, audio_root=world, seed=0, made=tmp_path / "made")


@pytest.mark.slow
def test_a_teacher_with_another_ear_fills_a_cache_of_the_clips_that_its_student_hears(world, tmp_path):  # noqa: F811
    examples = read_manifest(world / "m.jsonl", check_audio=False).examples
    folder, names = world / "teacher" / "final", [e.id for e in examples]
    model, store = SpeechLM.from_pretrained(folder).eval(), FeatureStore.load(world / "f.safetensors")
    made_from = teacher_fingerprint(folder)
    write_cache(tmp_path / "own", folder, model, store, {}, examples)
    own = ContrastCache(tmp_path / "own", fingerprint=made_from)
    for name in {e.audio for e in examples}:  # in another folder: the same clips backwards
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        write_audio(tmp_path / "other" / name, load_audio(world / name)[::-1])
    heard = rows_in(tmp_path / "other", model, examples)
    write_contrast_cache(tmp_path / "same", folder, model, store, {}, examples)
    write_contrast_cache(tmp_path / "cache", folder, model, store, {}, examples, positive=heard)
    same, found = (ContrastCache(tmp_path / kind, fingerprint=made_from) for kind in ("same", "cache"))
    wanted = own.get(names)
    torch.testing.assert_close(same.get(names).text_hidden, wanted.text_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.get(names).text_hidden, wanted.text_hidden, rtol=1e-4, atol=1e-5)  # silence, as before
    assert (found.get(names).audio_hidden - wanted.audio_hidden).abs().max() > 1e-4
    # A training compares the content with what the student hears.
    assert [found.content(name) for name in names] == [own.content(name) for name in names]


def test_a_flat_voice_says_the_same_words_with_as_much_noise(tmp_path):
    pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")
    said = [
        Example(
            id=f"c{n}", audio=f"a/{n}.flac", transcription="", task="gender", question="Which?", split="train",
            metadata={"text": "Why did you carry that ladder over there?"} | ({"snr_db": 0.0} if n else {}),
        )
        for n in range(2)
    ]  # fmt: skip
    for folder in ("one", "again", "other"):
        speak_flat(said, tmp_path / folder, seed=int(folder == "other"), max_seconds=4.0)
    read = {f: [load_audio(tmp_path / f / e.audio) for e in said] for f in ("one", "again", "other")}
    assert all(np.array_equal(a, b) for a, b in zip(read["one"], read["again"], strict=True))
    assert not np.array_equal(read["one"][1], read["other"][1])
    quiet = [np.quantile(np.abs(samples), 0.1) for samples in read["one"]]
    assert quiet[1] > 3 * quiet[0]  # the pauses of the second clip are full of noise
