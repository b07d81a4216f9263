"""Teacher and student hear different audio and read different prompts: live, from a cache, and in an evaluation."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from models.audio_lms.clips import ClipReader
from models.audio_lms.family import AudioLMError
from models.audio_lms.model import AudioLM
from models.cli import main as models
from models.corpora.hearing import PLAIN, Hearing
from models.data.manifest import read_manifest, write_manifest
from models.speech_lm import listeners
from models.training.build_sources import build_sources
from models.training.loop import TrainingLoop
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.student import build_model
from models.training.teacher_states import SourceError
from models.training.training_data import build_data, read_examples
from tests.models.audio_lms.audio_world import make_world, words
from tests.models.audio_lms.test_families import logits_of

NOISY = ["student.hears.snr_db=[-5]", "student.hears.band=narrow", "student.hears.transcript=false"]
HEARS = Hearing(snr_db=(-5.0,), band="narrow", transcript=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), "qwen2_audio")


def built(world, *changes, recipe="caad"):
    recipe = load_recipe(recipe, words(world, "x", f"teacher.model={world / 'teacher'}", *changes))
    model = build_model(recipe)
    data = build_data(recipe, model, *read_examples(recipe))
    return data, build_sources(recipe, data, model, device=torch.device("cpu"))[0].teacher


@torch.no_grad()
def states_of(world, data, hears):
    """The teacher's own logits of three examples that it hears so, on both paths."""
    teacher = AudioLM.from_pretrained(world / "teacher")
    chosen = data.examples[:3]
    clips = ClipReader(world, sampling_rate=16_000, hears=hears).rows(chosen)
    batch = teacher.make_collator()([hears.shown(e) for e in chosen], clips)
    return [logits_of(teacher, batch, hears=one) for one in (True, False)]


def close(states, logits):
    for hidden, expected in zip((states.audio_hidden, states.text_hidden), logits, strict=True):
        torch.testing.assert_close(states.head.logits(hidden), expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_hears_the_clip_and_the_student_noise(world):
    data, teacher = built(world, *NOISY)
    chosen = data.examples[:3]
    batch = data.make_batch(chosen)
    close(teacher(batch, chosen), states_of(world, data, PLAIN))
    student = AudioLM.from_pretrained(world / "student").make_collator()
    heard = student([HEARS.shown(e) for e in chosen], ClipReader(world, sampling_rate=16_000, hears=HEARS).rows(chosen))
    plain = student(chosen, ClipReader(world, sampling_rate=16_000).rows(chosen))
    assert torch.equal(batch.features["input_features"], heard.features["input_features"])
    assert not torch.allclose(batch.features["input_features"], plain.features["input_features"])
    assert torch.equal(batch.input_ids, heard.input_ids) and batch.input_ids.shape != plain.input_ids.shape


def test_hint_stripped_the_teacher_reads_no_context_and_the_student_does(world):
    """The recipe of that name, on answers that the teacher has written without the context too: docs/teachers.md."""
    hinted, pool = world / "hinted.jsonl", world / "stripped.jsonl"
    hint = "A note says that the tone is high."
    plain = read_manifest(world / "manifest.jsonl").examples
    write_manifest(hinted, [dataclasses.replace(e, context=hint, target=None, target_source=None) for e in plain])
    written = [str(hinted), "--audio-root", str(world), "--source", "audio_lm", "--audio-lm", str(world / "teacher")]
    written += ["--out", str(pool), "--accept", "free", "--max-reject-fraction", "1", "--dtype", "float32", "--device", "cpu"]
    assert models(["pseudo-gt", *written, "--hears", "context=false"]) == 0
    answered = read_manifest(pool).examples
    assert answered and all(e.context == hint for e in answered)
    more = [f"data.manifest={pool}", f"data.audio_root={world}", f"teacher.model={world / 'teacher'}"]
    data, teacher = built(world, *more, recipe="hint_stripped")
    chosen = data.examples[:3]
    batch = data.make_batch(chosen)
    (heard, _) = states_of(world, data, Hearing(context=False))
    states = teacher(batch, chosen)
    torch.testing.assert_close(states.head.logits(states.audio_hidden), heard, rtol=1e-4, atol=1e-4)
    (misled, _) = states_of(world, data, PLAIN)
    assert not torch.allclose(heard, misled, atol=1e-3)
    student = AudioLM.from_pretrained(world / "student").make_collator()
    clips = ClipReader(world, sampling_rate=16_000).rows(chosen)
    assert torch.equal(batch.input_ids, student(chosen, clips).input_ids)  # with the context


def test_clips_are_decoded_once_where_both_hear_the_same_and_ahead_for_both(world):
    for changes, readers in (((), 1), (NOISY, 2)):
        recipe = load_recipe("caad", words(world, "y", f"teacher.model={world / 'teacher'}", *changes))
        model = build_model(recipe)
        data = build_data(recipe, model, *read_examples(recipe))
        sources = build_sources(recipe, data, model, device=torch.device("cpu"))
        loop = TrainingLoop(recipe, model=model, data=data, sources=sources)
        loop.draw(1)
        assert len(loop.read_ahead) == readers
        assert all(len(reader._ahead) > 0 for reader in loop.read_ahead)


@pytest.mark.slow
def test_a_cache_says_what_its_teacher_heard(world):
    cache = ["cache", str(world / "teacher"), str(world / "manifest.jsonl"), "--out", str(world / "cache")]
    exact = ["--dtype", "float32", "--teacher-dtype", "float32", "--device", "cpu", "--measure", "2"]
    assert models([*cache, *exact, "--hears", "snr_db=-5", "band=narrow", "transcript=false", "--negative", "absent"]) == 0
    same = [word.replace("student", "teacher") for word in NOISY] + ["teacher.negative=absent"]
    data, cached = built(world, f"teacher.cache={world / 'cache'}", *same)
    chosen = data.examples[:3]
    _, live = built(world, *same)
    batch = data.make_batch(chosen)
    for one, other in zip(cached(batch, chosen).tensors().values(), live(batch, chosen).tensors().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for changes, message in {(): "hears", tuple(same[1:]): "hears", tuple(same[:-1]): "negative"}.items():
        with pytest.raises(SourceError, match=f"teacher.cache: .*{message}"):
            built(world, f"teacher.cache={world / 'cache'}", *changes)


def test_paths_without_the_audio(world):
    """Zeros, the features of silence, or a prompt without the clip; the path with the audio is the same."""
    data, zeros = built(world)
    batch, chosen = data.make_batch(data.examples[:3]), data.examples[:3]
    teacher = AudioLM.from_pretrained(world / "teacher")
    clips = ClipReader(world, sampling_rate=16_000).rows(chosen)
    unheard = teacher.make_collator()(chosen, [None] * 3)
    silent = teacher.make_collator()(chosen, clips)
    silent.features["input_features"] = torch.full_like(silent.features["input_features"], -1.5)  # log10(1e-10) / 4 + 1
    heard = zeros(batch, chosen)
    for negative, expected in {"absent": unheard, "silence": silent}.items():
        _, other = built(world, f"teacher.negative={negative}")
        states = other(batch, chosen)
        torch.testing.assert_close(states.audio_hidden, heard.audio_hidden, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(
                states.head.logits(states.text_hidden), logits_of(teacher, expected, hears=True), rtol=1e-4, atol=1e-4
            )
        assert not torch.allclose(states.text_hidden, heard.text_hidden, atol=1e-2)
    with pytest.raises(ConfigError, match=r"teacher\.negative: expected one of zeros, silence, absent"):
        built(world, "teacher.negative=none")


def test_silence_needs_constant_features(world, monkeypatch):
    lm = AudioLM.from_pretrained(world / "teacher")
    call = type(lm.processor).__call__

    def humming(self, *args, **options):
        made = call(self, *args, **options)
        made["input_features"] = made["input_features"] + torch.arange(made["input_features"].shape[-1])
        return made

    monkeypatch.setattr(type(lm.processor), "__call__", humming)
    with pytest.raises(AudioLMError, match="negative: expected zeros or absent with Qwen2-Audio"):
        AudioLM.from_pretrained(world / "teacher", negative="silence")


@pytest.mark.slow
def test_an_evaluation_hears_what_the_student_has_learned_on(world, tmp_path, monkeypatch):
    monkeypatch.setattr(listeners, "inference_dtype", lambda device: torch.float32)  # bfloat16 depends on the processor
    assert models(["train", "sft", *words(world, "noisy", *NOISY, "optim.steps=1")]) == 0
    final = world / "noisy" / "final"
    assert json.loads((final / "hears.json").read_text()) == HEARS.settings()
    scores = {}
    said = ["--hears", "snr_db=-5", "band=narrow", "transcript=false"]
    for name, more in {"trained": [], "said": said, "clean": ["--hears", "clean"]}.items():
        out = tmp_path / f"{name}.jsonl"
        asked = ["evaluate", str(final), str(world / "manifest.jsonl"), "--out", str(out), "--device", "cpu"]
        assert models([*asked, *more]) == 0
        header, *rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert header["settings"].get("hears") == (None if name == "clean" else HEARS.settings())
        scores[name] = [row["scores"] for row in rows]
    assert scores["trained"] == scores["said"] != scores["clean"]
    # By hand: the likelihoods of the model on these clips and prompts.
    from models.evaluation.choice_scores import choice_scores

    lm = AudioLM.from_pretrained(final)
    manifest = read_manifest(world / "manifest.jsonl")
    example = next(e for e in manifest.examples if e.id == "test-1")
    row = next(r for r in map(json.loads, (tmp_path / "trained.jsonl").read_text().splitlines()[1:]) if r["id"] == "test-1")
    heard = ClipReader(world, sampling_rate=16_000, hears=HEARS).rows([example])
    ((by_hand,),) = choice_scores(lm, [HEARS.shown(example)], heard, collate=lm.make_collator())
    assert row["scores"] == pytest.approx(by_hand, rel=1e-3, abs=1e-3)
