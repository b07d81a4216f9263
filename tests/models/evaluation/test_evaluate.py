import dataclasses
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import models.evaluation.evaluate
from models.data.audio import write_audio
from models.data.manifest import Example, write_manifest
from models.data.prompts import target_template
from models.evaluation.ask import Decoding, evaluate
from models.evaluation.choice_scores import choice_scores
from models.evaluation.controls import swapped
from models.evaluation.diagnostics import compare
from models.evaluation.evaluate import main, read_priors
from models.evaluation.predictions import (
    EvaluationError,
    Prediction,
    append_predictions,
    pack_predictions,
    read_predictions,
    write_header,
)
from models.evaluation.score_tables import print_comparison, print_summary
from models.evaluation.summary import summarize
from models.evaluation.text_priors import Prior, write_priors
from models.experiments.shared_steps import make_tiny_backbones
from models.io_utils import locked
from models.speech_lm.features import FeatureStore, clip_key, made_by
from models.speech_lm.model import SpeechLM, SpeechLMConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_backbones(tmp_path_factory.mktemp("tiny") / "backbones")
    torch.manual_seed(0)
    config = SpeechLMConfig(
        lm=str(folder / "lm"), encoder=str(folder / "encoder"), encoder_layers=(1, 2), connector_width=32, audio_frames=10
    )
    model = SpeechLM.from_config(config).eval()
    model.connector.output_scale.data.fill_(3.0)  # loud enough that the sound decides something in a random model
    return model


def example(i, kind="neutral", task="gender", choices=("man", "woman"), answer=None):
    hint = {"neutral": "", "aligned": "Note: yes.", "conflict": "Note: no."}[kind]
    return Example(
        id=f"{task}{i}/{kind}", audio=f"clip{i}.wav", transcription=f"text {i}", task=task, context=hint, question="Which?",
        choices=choices, answer=answer or choices[i % len(choices)], split="test", kind=kind, pair_id=f"{task}{i}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def examples():
    return [example(i, kind) for i in range(4) for kind in ("neutral", "aligned", "conflict")]


@pytest.fixture(scope="module")
def store(model):
    generator = torch.Generator().manual_seed(0)
    keys = [clip_key(example(i)) for i in range(4)]
    return FeatureStore(keys, torch.randn(4, 2, 10, model.config.encoder_dim, generator=generator))


def sequence_score(model, example, choice, features, alpha, heard=True):
    """The definition, token by token, from full logits without any of the shortcuts."""

    collate = model.make_collator()
    forced = [dataclasses.replace(example, target=target_template(example, c)) for c in example.choices]
    ids = [collate.target_ids(e) for e in forced]
    start = next(n for n, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    end = 0
    while all(t[-1 - end] == ids[0][-1 - end] for t in ids) and end < min(map(len, ids)) - start:
        end += 1
    if start + end == min(map(len, ids)):
        end = 0
    mine = example.choices.index(choice)
    batch = collate([forced[mine]], features[None])
    inputs = batch.model_inputs()
    flat = {}
    for name, present in (("audio", heard), ("text", False)):
        inputs["audio_present"] = torch.tensor([present])
        with torch.no_grad():
            flat[name] = model(**inputs).logits[0]
    z = (1 + alpha) * flat["audio"] - alpha * flat["text"]
    log_p = z.log_softmax(-1)
    positions = range(start, len(ids[mine]) - end)
    return sum(log_p[batch.target_index[n], batch.target[n]].item() for n in positions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices", [("man", "woman"), ("a", "b"), ("slowly", "quickly"), ("ab", "abc", "xbc"), ("aa", "aaa")], ids=str
)
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_scores_are_the_log_likelihood_of_the_choices_tokens(model, store, choices, alpha):
    asked = [example(i, task="t", choices=choices) for i in range(3)]
    features = store.rows([example(i) for i in range(3)])
    scores = choice_scores(model, asked, features, collate=model.make_collator(), alphas=[alpha])[0]
    for e, row, got in zip(asked, features, scores, strict=True):
        assert list(got) == list(choices)
        for choice in choices:
            assert got[choice] == pytest.approx(sequence_score(model, e, choice, row, alpha), abs=2e-4)


def test_single_token_choices_are_one_row(model, store, monkeypatch):
    rows = []
    collate = model.make_collator()

    class Counting(type(collate)):
        def __call__(self, examples, *a, **k):
            rows.append(len(examples))
            return super().__call__(examples, *a, **k)

    collate.__class__ = Counting
    asked = [example(i, task="t", choices=("a", "b")) for i in range(3)]
    choice_scores(model, asked, store.rows([example(i) for i in range(3)]), collate=collate)
    assert rows == [3]


def test_controls_take_the_sound_away(model, examples, store):
    collate = model.make_collator()
    made = evaluate(
        model, examples, store, collate=collate, controls=("no_audio", "swapped_audio"), progress_bar=False, batch_examples=5
    )[None]
    by_id = {p.id: p for p in made}
    assert len(made) == len(by_id) == 3 * len(examples)
    other = {e.id: o for e, o in zip(examples, swapped(examples), strict=True)}
    for e in examples:
        plain, mute, swap = (by_id[e.id + suffix] for suffix in ("", "#no_audio", "#swapped_audio"))
        assert mute.control == "no_audio" and swap.control == "swapped_audio" and plain.control == ""
        assert mute.scores["man"] == pytest.approx(
            sequence_score(model, e, "man", store.rows([e])[0], 0, heard=False), abs=2e-4
        )
        assert swap.scores["man"] == pytest.approx(
            sequence_score(model, e, "man", store.rows([other[e.id]])[0], 0), abs=2e-4
        )
        assert plain.scores["man"] != pytest.approx(mute.scores["man"], abs=1e-4)
    summary = summarize(made)
    assert set(summary) == {"plain", "no_audio", "swapped_audio"}
    assert summary["no_audio"]["count"] == len(examples)


def test_swapped_partners_have_another_answer_of_the_same_task(examples):
    mixed = examples + [example(i, task="rate", choices=("slowly", "quickly")) for i in range(2)]
    for e, o in zip(mixed, swapped(mixed), strict=True):
        assert o.task == e.task and o.answer != e.answer and o.clips != e.clips
    assert swapped([example(0)]) == [None]


def test_a_swapped_clip_answers_the_same_question_and_is_another_clip():
    def ask(clip, question, answer, choices=(), **more):
        return Example(id=f"{clip}/{question}/{answer}", audio=clip, question=question, choices=choices, answer=answer, **more)

    def partners(*asked):
        return [other and other.audio for other in swapped(asked)]

    who, mood = ("man", "woman"), ("sad", "happy")
    # Two questions about each of two clips, without a task: the clips differ in their mood alone.
    asked = [ask("a", "Who?", "man", who), ask("a", "Mood?", "happy", mood)]
    asked += [ask("b", "Who?", "man", who), ask("b", "Mood?", "sad", mood)]
    assert partners(*asked) == [None, "b", None, "a"]
    assert partners(ask("a", "Who?", "A man."), ask("b", "Who?", "a man"), ask("c", "Who?", "a woman")) == ["c", "c", "a"]
    assert partners(ask("a", "Who?", "Joe"), ask("a", "Who?", "Ann")) == [None, None]  # one clip
    halves = [ask("a", "Who?", "man", who, end_seconds=1.0), ask("a", "Who?", "woman", who, start_seconds=1.0)]
    assert partners(*halves) == ["a", "a"]  # two spans of a file
    # "car" was not among the choices of clip b: it may be heard there too. "dog" was among those of clip a, and is wrong there.
    assert partners(ask("a", "What?", "car", ("car", "dog")), ask("b", "What?", "dog", ("dog", "cat"))) == [None, "a"]
    assert partners(ask(None, "Who?", "man", who), ask("b", "Who?", "woman", who)) == [None, None]


def test_questions_without_a_partner_are_left_out_of_the_control_and_counted(files, tmp_path, capsys):
    alone = dataclasses.replace(example(0), id="alone", question="Who is it?", pair_id=None)
    manifest = write_manifest(tmp_path / "m.jsonl", [example(0), example(1), alone])
    words = [str(files / "model"), str(manifest), "--audio-root", str(files), "--out", str(tmp_path / "p.jsonl")]
    words += ["--device", "cpu", "--controls", "swapped_audio", "--json", str(tmp_path / "s.json")]
    for again in (False, True):  # the second time nothing is asked
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "left out of swapped_audio: 1 of 3 questions; no other clip has another answer to them" in shown
        assert ("going on" in shown) == again
    summary = json.loads((tmp_path / "s.json").read_text())["summary"]
    assert summary["plain"]["count"] == 3 and summary["swapped_audio"]["count"] == 2


def test_several_alphas_agree_with_one_at_a_time(model, examples, store):
    options = {"collate": model.make_collator(), "progress_bar": False}
    together = evaluate(model, examples, store, alphas=(None, 1.0, 2.0), **options)
    for alpha in (None, 1.0, 2.0):
        alone = evaluate(model, examples, store, alphas=(alpha,), **options)[alpha]
        for a, b in zip(together[alpha], alone, strict=True):
            assert a.id == b.id and a.scores == pytest.approx(b.scores, abs=1e-4)
    assert together[None][0].scores != pytest.approx(together[2.0][0].scores, abs=1e-3)


def test_free_generation_runs_both_ways(model, examples, store):
    options = {"collate": model.make_collator(), "progress_bar": False, "mode": "generate", "max_new_tokens": 3}
    made = evaluate(model, examples[:2], store, alphas=(None, 0.0), **options)
    assert [p.prediction for p in made[None]] == [p.prediction for p in made[0.0]]  # alpha 0 subtracts nothing


def test_mistakes_are_named(model, examples, store):
    options = {"collate": model.make_collator(), "progress_bar": False}
    with pytest.raises(ValueError, match="mode: expected 'choice' or 'generate', got 'rank'"):
        evaluate(model, examples, store, mode="rank", **options)
    with pytest.raises(ValueError, match=r"controls: expected some of .* got 'deaf'"):
        evaluate(model, examples, store, controls=("deaf",), **options)
    with pytest.raises(ValueError, match="batch_examples: expected at least 1, got 0"):
        evaluate(model, examples, store, batch_examples=0, **options)
    with pytest.raises(ValueError, match="alpha: expected a finite number >= 0, got -1"):
        evaluate(model, examples, store, alphas=(-1.0,), **options)
    free = [Example(id="x", audio=None, question="?", answer="y", split="test")]
    with pytest.raises(ValueError, match="example x: expected choices"):
        evaluate(model, free, store, **options)
    with pytest.raises(ValueError, match="example x: expected an answer to score against, got none"):
        evaluate(model, [dataclasses.replace(free[0], answer="\n")], store, **options)


def test_likelihoods_and_logits_of_nan_are_no_answer(model, store, files, tmp_path, capsys):
    sound = store.features.clone()
    sound[1] = math.nan
    options = {"collate": model.make_collator(), "progress_bar": False}
    asked, bad = [example(0), example(1)], FeatureStore([clip_key(example(i)) for i in range(4)], sound)
    with pytest.raises(EvaluationError, match=r"example 'gender1/neutral': expected .* got 'man' nan, 'woman' nan"):
        evaluate(model, asked, bad, **options)
    options |= {"mode": "generate", "max_new_tokens": 2}
    for alpha, decoding in ((None, Decoding()), (1.0, Decoding()), (1.0, Decoding(temperature=1.0))):
        with pytest.raises(ValueError, match="example 'gender1/neutral': the model's logits are NaN"):
            evaluate(model, asked, bad, alphas=(alpha,), decoding=decoding, **options)
    assert not model.get_output_embeddings()._forward_hooks  # what looked for NaN is gone

    model.save_pretrained(tmp_path / "broken")
    broken = SpeechLM.from_pretrained(tmp_path / "broken")
    broken.connector.output_scale.data.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    words = [str(tmp_path / "broken"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main(words) == 1
    assert "error: example 'gender" in capsys.readouterr().err and "NaN" not in (tmp_path / "p.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "answer: expected a string, got null"),
        ({"prediction": 5}, "prediction: expected a string, got 5"),
        ({"choices": "man"}, 'choices: expected a list of strings, got "man"'),
        ({"scores": {"man": "x"}}, 'scores: expected an object of numbers, got {"man": "x"}'),
        ({"groups": None}, "groups: expected an object of strings, got null"),
        ({"kind": "none"}, "kind: expected one of neutral, aligned, conflict, irrelevant, got 'none'"),
        ({"pair_id": 3}, "pair_id: expected a string or null, got 3"),
        ({"id": "q1"}, "id 'q1' twice, first in line 2"),
    ],
)
def test_a_line_of_predictions_that_cannot_be_one_is_named(tmp_path, capsys, change, message):
    """Such as those of another system, which its user has brought into this form."""
    rows = [Prediction(id=f"q{n}", task="t", kind="neutral", answer="a", prediction="a").to_row() for n in (1, 2)]
    path = tmp_path / "p.jsonl"
    write_header(path, {})
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in (rows[0], rows[1] | change))
    assert main(["--rescore", str(path)]) == 1
    assert f"error: {path}: line 3 is damaged: {message}\n" in capsys.readouterr().err


def test_nan_is_neither_written_nor_read_nor_scored(tmp_path):
    p = Prediction(id="q1", task="t", kind="neutral", answer="a", prediction="a", scores={"a": -1.0, "b": -2.0})
    path = tmp_path / "p.jsonl"
    write_header(path, {})
    append_predictions(path, [p])
    whole = path.read_bytes()
    for scores in ({"a": math.nan, "b": -2.0}, {"a": -1.0, "b": math.nan}, {"a": -math.inf, "b": -math.inf}):
        bad = dataclasses.replace(p, scores=scores)
        with pytest.raises(EvaluationError, match="prediction 'q1': cannot be written as JSON"):
            append_predictions(path, [p, bad])
        with pytest.raises(EvaluationError, match="prediction 'q1': cannot be written as JSON"):
            pack_predictions(tmp_path / "p.jsonl.gz", {}, [bad])
        with pytest.raises(EvaluationError, match="example 'q1': expected log-likelihoods"):
            summarize([bad])
        with pytest.raises(EvaluationError, match="example 'q1': expected log-likelihoods"):
            summarize([bad], scorer="mmau")  # a rule that reads the text alone; the calibration reads the scores
    assert path.read_bytes() == whole and not (tmp_path / "p.jsonl.gz").exists()
    path.write_bytes(whole.replace(b"-2.0", b"NaN"))  # as earlier versions wrote it, in the last line
    for repair in (False, True):
        with pytest.raises(EvaluationError, match="line 2 is damaged: bad JSON: NaN is not a number"):
            read_predictions(path, repair=repair)


def test_predictions_file_survives_a_kill(model, examples, store, tmp_path):
    path = tmp_path / "p.jsonl"
    made = evaluate(model, examples, store, collate=model.make_collator(), progress_bar=False)[None]
    write_header(path, {"a": 1})
    append_predictions(path, made)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while the last line was written
    header, kept = read_predictions(path, unfinished=True)
    assert header["settings"] == {"a": 1}
    assert kept == made[:-1] and path.read_bytes() == whole[:-20]  # reading alone writes nothing
    with pytest.raises(EvaluationError, match=f"line {len(made) + 1}, the last one, is cut short; run the same"):
        read_predictions(path)  # an answer is not lost without a word
    assert read_predictions(path, unfinished=True, repair=True)[1] == made[:-1]
    append_predictions(path, made[-1:])
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # only the line end is missing: the answer counts
    assert read_predictions(path)[1] == made
    assert read_predictions(path, unfinished=True, repair=True)[1] == made[:-1]

    lines = whole.decode().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:30] + "\n", *lines[2:]]))
    with pytest.raises(EvaluationError, match="line 2 is damaged"):
        read_predictions(path)
    path.write_text('{"kdkernels_manifest": 1}\n')
    with pytest.raises(EvaluationError, match="kdkernels_predictions"):
        read_predictions(path)


def test_predictions_of_any_text_are_read_back(model, examples, store, tmp_path):
    path = tmp_path / "p.jsonl"
    made = evaluate(model, examples[:2], store, collate=model.make_collator(), progress_bar=False)[None]
    texts = ["one\u2028two\x85three\r\n\x0b", "café"]
    made = [dataclasses.replace(p, prediction=text) for p, text in zip(made, texts, strict=True)]
    write_header(path, {})
    append_predictions(path, made)
    assert read_predictions(path)[1] == made
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index("é".encode()) + 1])  # killed in the middle of a character
    assert read_predictions(path, unfinished=True)[1] == made[:1]


def test_labels_are_no_markup_on_the_terminal(capsys):
    made = Prediction(
        id="1", task="[/red]", kind="neutral", answer="[bold]", prediction="[bold]", choices=("[bold]", "b"), category="[/b]",
        claim="b",
    )  # fmt: skip
    print_summary(summarize([made]))
    print_comparison(compare([made], [made], bootstrap_samples=5), "[/x]", "[/y]")
    shown = capsys.readouterr().out
    for text in ("[/red]", "[bold]", "[/b]", "[/x]", "[/y]"):
        assert text in shown


def test_predictions_hold_what_scoring_needs(model, store):
    hinted = example(0, "conflict")
    told = dataclasses.replace(hinted, context="Note: the speaker is a woman.", metadata={"category": "speaker"})
    (p,) = evaluate(model, [told], store, collate=model.make_collator(), progress_bar=False)[None]
    assert (p.category, p.claim, p.clip, p.question) == ("speaker", "woman", clip_key(told), "Which?")
    options = {"collate": model.make_collator(), "progress_bar": False, "controls": ["swapped_audio"], "plain": False}
    clips = {p.id: p.clip for p in evaluate(model, [told, example(1)], store, **options)[None]}
    assert clips[f"{told.id}#swapped_audio"] == clip_key(example(1))  # what was heard
    assert Prediction(**json.loads(json.dumps(p.to_row()))) == p


def test_a_prediction_says_who_speaks_and_in_how_much_noise_and_can_be_packed(model, store, tmp_path):
    known = {"speaker": "queen-JIM", "actor": "queen-a02", "snr_db": -3.5, "draw": "1"}
    asked = [dataclasses.replace(example(0), metadata=known), dataclasses.replace(example(1), metadata={"speaker": "s"})]
    made = evaluate(model, asked, store, collate=model.make_collator(), progress_bar=False)[None]
    first, second = sorted(made, key=lambda p: p.id)
    assert (first.speaker, first.actor, first.snr_db, first.draw) == ("queen-JIM", "queen-a02", -3.5, "1")
    assert (second.speaker, second.actor, second.snr_db, second.draw) == ("s", "s", None, "")
    path = pack_predictions(tmp_path / "p.jsonl.gz", {"alpha": None}, made)
    header, again = read_predictions(path)
    assert again == made and header["settings"] == {"alpha": None}
    packed = path.read_bytes()
    assert pack_predictions(tmp_path / "q.jsonl.gz", {"alpha": None}, made).read_bytes() == packed
    for damaged in (packed[:-9], b"no gzip", packed[:40] + b"\0" * 40 + packed[80:]):
        path.write_bytes(damaged)
        with pytest.raises(EvaluationError, match="damaged"):
            read_predictions(path)


def test_files_of_earlier_versions_are_scored(tmp_path):
    row = {"id": "1", "task": "t", "kind": "neutral", "answer": "a", "prediction": "a", "choices": ["a", "b"], "scores": {}}
    write_header(tmp_path / "p.jsonl", {})
    with open(tmp_path / "p.jsonl", "a") as file:
        file.write(json.dumps({**row, "pair_id": None, "control": ""}) + "\n")
    (p,) = read_predictions(tmp_path / "p.jsonl")[1]
    assert summarize([p])["plain"]["mean_of_tasks"].value == 1


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(4):
        tone = np.sin(np.arange(16000) * 0.05 * (i + 1)).astype(np.float32) * 0.1
        write_audio(folder / f"clip{i}.wav", tone)
    write_manifest(folder / "m.jsonl", [example(i, kind) for i in range(4) for kind in ("neutral", "conflict")])
    model.save_pretrained(folder / "model")
    return folder


def test_command_line_goes_on_where_it_was_and_scores_again(files, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(out), "--device", "cpu", "--controls", "no_audio"]
    assert main(words) == 0
    whole = out.read_text()
    assert whole.count("\n") == 1 + 2 * 8
    assert "tir_adv" in capsys.readouterr().out

    out.write_text("".join(whole.splitlines(keepends=True)[:6]) + '{"id": "cut')
    assert main(words) == 0
    assert "going on" in capsys.readouterr().out
    first, again = (sorted(json.loads(x)["id"] for x in t.splitlines()[1:]) for t in (whole, out.read_text()))
    assert first == again

    assert main(["--rescore", str(out)]) == 0
    assert "gender" in capsys.readouterr().out
    assert main([*words, "--decoding", "contrastive"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_an_unfinished_file_is_not_scored_as_a_whole_one(files, tmp_path, capsys):
    out, cut = tmp_path / "p.jsonl", tmp_path / "cut.jsonl"
    words = [str(files / "model"), str(files / "m.jsonl"), "--device", "cpu", "--controls", "no_audio"]
    assert main([*words, "--out", str(out)]) == 0
    header, *lines = out.read_bytes().splitlines(keepends=True)
    assert json.loads(header)["questions"] == len(lines) == 16
    cut.write_bytes(header + b"".join(lines[:7]))
    told = f"error: {cut}: 7 of 16 questions are answered; run the same evaluate command again, it goes on\n"
    for again in (["--rescore", str(cut)], ["--rescore", str(out), "--compare", str(cut)]):
        capsys.readouterr()
        assert main(again) == 1
        assert capsys.readouterr() == ("", told)
    cut.write_bytes(b"")
    assert main(["--rescore", str(cut)]) == 1
    assert f"error: {cut}: no question is answered; run the same evaluate command again" in capsys.readouterr().err
    cut.write_bytes(header + b"".join(lines)[:-20])
    assert main(["--rescore", str(cut)]) == 1
    assert "line 17, the last one, is cut short; run the same evaluate command again, it goes on" in capsys.readouterr().err
    assert main([*words, "--out", str(cut)]) == 0 and main(["--rescore", str(cut)]) == 0

    old = {name: value for name, value in json.loads(header).items() if name != "questions"}
    cut.write_bytes(json.dumps(old).encode() + b"\n" + b"".join(lines[:7]))  # of an earlier version, which did not say
    assert main(["--rescore", str(cut)]) == 0
    assert main([*words, "--out", str(cut)]) == 0 and len(read_predictions(cut)[1]) == 16
    cut.write_bytes(header.replace(b'"questions": 16', b'"questions": "16"') + b"".join(lines))
    assert main(["--rescore", str(cut)]) == 1
    assert f'{cut}: line 1: questions: expected a whole number, got "16"' in capsys.readouterr().err
    cut.write_bytes(header.replace(b'"questions": 16', b'"questions": 18') + b"".join(lines[:7]))
    assert main([*words, "--out", str(cut)]) == 1
    assert "expected 18 questions as in its first line, got 16 with a clip that can be heard" in capsys.readouterr().err


def test_questions_without_a_clip_to_hear_are_not_expected(files, store, tmp_path):
    out, few = tmp_path / "p.jsonl", tmp_path / "few.safetensors"
    origin = made_by(SpeechLM.from_pretrained(files / "model"))
    FeatureStore([clip_key(example(i)) for i in range(3)], store.features[:3], made_by=origin).save(few)
    words = [str(files / "model"), str(files / "m.jsonl"), "--device", "cpu", "--out", str(out), "--max-bad-fraction", "0.5"]
    assert main([*words, "--features", str(few)]) == 0
    header, made = read_predictions(out)
    assert header["questions"] == len(made) == 6
    assert main(["--rescore", str(out)]) == 0


def test_a_finished_evaluation_needs_no_model(files, tmp_path, monkeypatch, capsys):
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main(words) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(SpeechLM, "from_pretrained", lambda *_: pytest.fail("the model was loaded"))
    assert main(words) == 0
    assert capsys.readouterr().out == f"going on from {tmp_path / 'p.jsonl'}: 8 answers are there\n{first}"


def test_command_line_errors_are_one_line(files, capsys):
    assert main([str(files / "none"), str(files / "m.jsonl")]) == 1
    assert capsys.readouterr().err == f"error: checkpoint: no folder '{files / 'none'}'\n"
    assert main([str(files / "model"), str(files / "none.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["--rescore", str(files / "none.jsonl")]) == 1
    assert "not readable" in capsys.readouterr().err
    (files / "empty").mkdir(exist_ok=True)
    assert main([str(files / "empty"), str(files / "m.jsonl"), "--out", str(files / "p.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("error: checkpoint: ")
    assert not (files / "p.jsonl").exists()
    assert main([str(files / "model"), str(files / "m.jsonl"), "--device", "gpu"]) == 1
    assert "error: --device" in capsys.readouterr().err
    write_header(files / "none.p", {})
    assert main(["--rescore", str(files / "none.p")]) == 1
    assert "no prediction in it" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["folder", "record", "settings", "connector", "lm", "encoder"])
def test_a_checkpoint_is_looked_at_before_a_benchmark_is_built(files, tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr("models.evaluation.benchmarks._build", lambda: pytest.fail("the benchmark was built"))
    folder = tmp_path / "model"
    if missing != "folder":
        shutil.copytree(files / "model", folder)
    record = folder / "speech_lm.json"
    if missing == "record":
        record.unlink()
    elif missing == "settings":
        record.write_text(record.read_text().replace('"num_queries"', '"num_querys"'))
    elif missing == "connector":
        (folder / "connector.safetensors").write_bytes(b"x" * 9)
    elif missing in ("lm", "encoder"):
        settings = json.loads(record.read_text())
        settings["config"][missing] = str(tmp_path / "gone")
        record.write_text(json.dumps(settings))
        shutil.rmtree(folder / missing, ignore_errors=True)
    assert main([str(folder), "--benchmark", "builtin", "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("error: checkpoint: ") and not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "2"], "--alpha: expected --decoding contrastive beside it"),
        (["--rescore", "p.jsonl"], "--rescore: expected no CHECKPOINT, MANIFEST or --benchmark beside it"),
        (["--batch-examples", "0"], "--batch-examples: expected at least 1, got 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["--max-bad-fraction", "1.5"], "--max-bad-fraction: expected a number from 0 to 1, got 1.5"),
        (["--features", "gone.safetensors"], "--features: no file or folder 'gone.safetensors'"),
        (["--priors", "gone.json"], "--priors gone.json: not readable"),
        (["--out", "p.jsonl", "--json", "p.jsonl"], "--json: expected another file than --out"),
        (["--out", "p.jsonl", "--compare", "p.jsonl"], "--out: expected another file than COMPARE"),
        (["--out", "p.jsonl.gz"], "--out: expected a name without .gz, since lines are added one by one, got 'p.jsonl.gz'"),
    ],
)
def test_settings_that_cannot_work_are_found_before_anything_is_read(files, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.evaluation.evaluate.load_suite", lambda *_, **__: pytest.fail("the questions were read"))
    assert main([str(files / "model"), str(files / "m.jsonl"), "--device", "cpu", *words]) == 1
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_manifest_under_another_path_is_not_written_to(files, tmp_path, capsys):
    manifest = tmp_path / "m.jsonl"
    shutil.copy(files / "m.jsonl", manifest)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(manifest)
    os.link(manifest, tmp_path / "hard")
    words = [str(files / "model"), str(manifest), "--audio-root", str(files), "--device", "cpu"]
    for path in ("folder/../m.jsonl", "link", "hard"):
        for option, more in (("--out", []), ("--json", ["--out", str(tmp_path / "p.jsonl")])):
            assert main([*words, option, str(tmp_path / path), *more]) == 1
            assert f"{option}: expected another file than MANIFEST" in capsys.readouterr().err
    assert main(["--benchmark", words[1], words[0], *words[2:], "--json", str(tmp_path / "link")]) == 1
    assert "--json: expected another file than BENCHMARK" in capsys.readouterr().err
    assert manifest.read_bytes() == (files / "m.jsonl").read_bytes()


def test_an_earlier_file_of_other_settings_is_found_before_the_questions_are_read(files, tmp_path, monkeypatch, capsys):
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main(words) == 0
    monkeypatch.setattr("models.evaluation.evaluate.load_suite", lambda *_, **__: pytest.fail("the questions were read"))
    assert main([*words, "--controls", "no_audio"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_a_task_that_is_not_there_is_named_beside_one_that_is(files, tmp_path, capsys):
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main([*words, "--tasks", "gender", "gendre"]) == 1
    assert "no example in split 'test' of task gendre" in capsys.readouterr().err


def test_a_model_trained_again_is_not_given_the_old_ones_answers(files, model, tmp_path, capsys):
    words = [str(tmp_path / "model"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    model.save_pretrained(tmp_path / "model")
    assert main(words) == 0
    other = SpeechLM.from_pretrained(tmp_path / "model")
    other.connector.queries.data.add_(1)
    other.save_pretrained(tmp_path / "model")
    assert main(words) == 1
    assert "of another model" in capsys.readouterr().err


def test_answers_heard_from_other_audio_are_not_used_again(files, store, tmp_path, capsys):
    for root in ("equal", "other"):
        shutil.copytree(files, tmp_path / root, ignore=shutil.ignore_patterns("model", "*.jsonl"))
    write_audio(tmp_path / "other" / "clip2.wav", np.full(16000, 0.1, np.float32))
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main(words) == 0
    assert main([*words, "--audio-root", str(tmp_path / "equal")]) == 0  # the same sound in another place
    assert "8 answers are there" in capsys.readouterr().out
    assert main([*words, "--audio-root", str(tmp_path / "other")]) == 1
    assert "of other audio (not the same: clips_sha256)" in capsys.readouterr().err

    header, *rows = (tmp_path / "p.jsonl").read_text().splitlines(keepends=True)
    earlier = json.loads(header)
    del earlier["settings"]["clips_sha256"]  # a file of an earlier version does not say what was heard
    write_header(tmp_path / "old.jsonl", earlier["settings"])
    with open(tmp_path / "old.jsonl", "a") as file:
        file.writelines(rows)
    assert main([*words[:3], str(tmp_path / "old.jsonl"), *words[4:]]) == 1
    assert "of other audio (not the same: clips_sha256)" in capsys.readouterr().err

    origin, keys = made_by(SpeechLM.from_pretrained(files / "model")), [clip_key(example(i)) for i in range(4)]
    path = tmp_path / "features.safetensors"
    FeatureStore(keys, store.features, made_by=origin).save(path)
    words = [*words[:3], str(tmp_path / "stored.jsonl"), *words[4:], "--features", str(path)]
    assert main(words) == 0 and main(words) == 0
    FeatureStore(keys, store.features.flip(0), made_by=origin).save(path)
    assert main(words) == 1
    assert "(not the same: features_sha256)" in capsys.readouterr().err

    shards = [tmp_path / "shards" / f"features-{number}.safetensors" for number in range(2)]
    for number, shard in enumerate(shards):
        shard.parent.mkdir(exist_ok=True)
        FeatureStore(keys[number::2], store.features[number::2], made_by=origin).save(shard)
    words = [*words[:3], str(tmp_path / "sharded.jsonl"), *words[4:-1], str(tmp_path / "shards")]
    assert main(words) == 0 and main(words) == 0
    rows = [(tmp_path / name).read_text().splitlines()[1:] for name in ("stored.jsonl", "sharded.jsonl")]
    assert rows[0] == rows[1]
    FeatureStore(keys[1::2], store.features[::2], made_by=origin).save(shards[1])
    assert main(words) == 1
    assert "(not the same: features_sha256)" in capsys.readouterr().err


def test_one_evaluation_at_a_time_writes_to_a_file(files, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(out), "--device", "cpu"]
    with locked(out, "busy"):
        assert main(words) == 1
    assert capsys.readouterr().err == f"error: --out {out}: another evaluation is writing there\n" and out.read_bytes() == b""
    assert main(words) == 0  # an empty file is none
    whole = out.read_bytes()
    with open(out, "ab") as file:
        file.write(b'{"id": "being wri')  # by the other evaluation
    with locked(out, "busy"):
        assert main(words) == 1
    assert out.read_bytes() == whole + b'{"id": "being wri'  # which is not repaired under its hands


def test_what_a_killed_evaluation_leaves_is_removed(files, tmp_path):
    out = tmp_path / "p.jsonl"
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(out), "--device", "cpu"]
    other = tmp_path / ".q.jsonl.features.abcd1234"
    other.mkdir()
    for _ in range(2):  # the second time nothing is asked
        (tmp_path / ".p.jsonl.features.abcd1234").mkdir()
        (tmp_path / ".p.jsonl.features.abcd1234" / "shard").write_text("x")
        assert main(words) == 0
        assert sorted(tmp_path.iterdir()) == [other, out]


def test_a_file_without_a_prediction_is_not_kept_for_its_settings(files, tmp_path):
    out = tmp_path / "p.jsonl"
    write_header(out, {"checkpoint": "other"})  # of an evaluation that ended before its first batch
    assert main([str(files / "model"), str(files / "m.jsonl"), "--out", str(out), "--device", "cpu"]) == 0
    header, made = read_predictions(out)
    assert header["settings"]["checkpoint"] == str(files / "model") and len(made) == 8


def test_skipped_rows_are_listed(files, tmp_path, capsys):
    lines = (files / "m.jsonl").read_text()
    gone = json.dumps(example(9).to_row() | {"audio": "gone.wav"})
    more = [json.dumps(example(i % 4).to_row() | {"id": f"more{i}"}) for i in range(20)]
    (files / "bad.jsonl").write_text(lines + "\n".join([gone, *more]) + "\n")
    assert main([str(files / "model"), str(files / "bad.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]) == 0
    assert f"skipped {files / 'bad.jsonl'}: row 10 (gender9/neutral): audio: missing file" in capsys.readouterr().out


def test_clips_without_features_are_named_or_stop_the_evaluation(files, store, tmp_path, capsys):
    origin = made_by(SpeechLM.from_pretrained(files / "model"))
    for name, clips in (("all", 4), ("few", 3)):
        keys = [clip_key(example(i)) for i in range(clips)]
        FeatureStore(keys, store.features[:clips], made_by=origin).save(tmp_path / f"{name}.safetensors")
    words = [str(files / "model"), str(files / "m.jsonl"), "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "a.jsonl"), "--features", str(tmp_path / "all.safetensors")]) == 0
    assert "skipped" not in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "b.jsonl"), "--features", str(tmp_path / "few.safetensors")]) == 1
    assert "2 of 8 examples have no features, more than 5%" in capsys.readouterr().err


SLOW = """
import sys, time
import models.evaluation.evaluate as evaluation

append = evaluation.append_predictions

def slow_append(path, predictions):
    append(path, predictions)
    time.sleep(0.2)

evaluation.append_predictions = slow_append
sys.exit(evaluation.main(sys.argv[1:]))
"""


@pytest.mark.slow  # a process of its own: its imports
def test_a_killed_evaluation_goes_on_and_ends_as_if_it_had_not_been(files, tmp_path, capsys):
    words = [str(files / "model"), str(files / "m.jsonl"), "--device", "cpu", "--controls", "no_audio", "--batch-examples", "2"]
    assert main([*words, "--out", str(tmp_path / "whole.jsonl")]) == 0
    whole = {p.id: p for p in read_predictions(tmp_path / "whole.jsonl")[1]}

    out = tmp_path / "killed.jsonl"
    command = [sys.executable, "-c", SLOW, *words, "--out", str(out)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(models.evaluation.evaluate.__file__).parents[2])
    try:
        deadline = time.monotonic() + 240
        while not out.exists() or out.read_bytes().count(b"\n") < 4:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    left = out.read_bytes()
    done = read_predictions(out, unfinished=True)[1]
    assert 0 < len(done) < len(whole)
    out.write_bytes(left + b'{"id": "a line that was being wri')  # nor does half a line hinder it

    capsys.readouterr()
    assert main([*words, "--out", str(out)]) == 0
    assert f"going on from {out}: {len(done)} answers are there" in capsys.readouterr().out
    assert out.read_bytes().startswith(left)  # what was there is neither asked again nor written again
    again = read_predictions(out)[1]
    assert len(again) == len(whole) and {p.id for p in again} == set(whole)
    for p in again:
        assert p.scores == pytest.approx(whole[p.id].scores, abs=1e-4)  # other batches: other padding
        assert dataclasses.replace(p, scores={}) == dataclasses.replace(whole[p.id], scores={})


def test_every_figure_as_json_and_rescored_without_a_model(files, tmp_path, capsys):
    out, figures = tmp_path / "p.jsonl", tmp_path / "scores.json"
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(out), "--device", "cpu", "--controls", "no_audio"]
    assert main([*words, "--json", str(figures)]) == 0
    first = json.loads(figures.read_text())
    plain = first["summary"]["plain"]
    assert plain["count"] == 8 and set(plain["accuracy"]) == {"value", "low", "high", "count"}
    assert plain["mean_of_tasks"]["count"] == 1 and len(plain["calibration"]["bins"]) == 10
    assert set(plain["confusion"]) == {"no_audio"} and first["settings"]["mode"] == "choice"

    # By the file alone, with other options.
    rows = {json.loads(line)["id"]: json.loads(line) for line in out.read_text().splitlines()[1:]}
    (tmp_path / "priors.json").write_text(json.dumps({"gender0/neutral": "woman", "unknown": "man"}))
    other = tmp_path / "other.jsonl"
    other.write_text(out.read_text().replace("speaker is a woman", "speaker is a man"))
    options = ["--priors", str(tmp_path / "priors.json"), "--compare", str(other), "--json", str(figures), "--scorer", "strict"]
    assert main(["--rescore", str(out), *options]) == 0
    shown = capsys.readouterr().out
    again = json.loads(figures.read_text())
    assert again["settings"] == first["settings"]
    assert again["summary"]["plain"]["scorer"] == "strict"
    assert again["summary"]["plain"]["accuracy"] == plain["strict_accuracy"]
    priors = again["summary"]["plain"]["confusion"]["priors"]["all"]
    said_woman = "woman" in rows["gender0/neutral"]["prediction"]
    assert priors["prior_wrong"] == {"right": int(not said_woman), "as_prior": int(said_woman), "other": 0}
    plain_rows = [r for r in rows.values() if not r["control"]]
    women = [r for r in plain_rows if "woman" in r["prediction"]]  # "man" in the other file: right where that is the answer
    gain = sum(1 if r["answer"] == "woman" else -1 for r in women) / len(plain_rows)
    assert again["comparison"]["accuracy"]["value"] == pytest.approx(gain)
    assert again["compared_with"] == str(other) and "shared questions" in shown


def test_a_judge_of_the_users_own(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_judge.py").write_text("def judge(predictions):\n    return [p.question == 'Which?' for p in predictions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = [str(files / "model"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main([*words, "--scorer", "my_judge:jugde"]) == 1
    assert "module 'my_judge' has no 'jugde'" in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()  # found before any work
    assert main([*words, "--scorer", "my_judge:judge", "--json", str(tmp_path / "s.json")]) == 0
    plain = json.loads((tmp_path / "s.json").read_text())["summary"]["plain"]
    assert (plain["scorer"], plain["accuracy"]["value"]) == ("my_judge:judge", 1.0)


def test_benchmark_option_takes_a_manifest_too(files, tmp_path, capsys):
    words = ["--benchmark", str(files / "m.jsonl"), str(files / "model"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main(words) == 0
    assert "8 answers" in capsys.readouterr().out
    assert main(["--benchmark", "superb", *words[2:3], str(files / "m.jsonl")]) == 1
    assert "--benchmark: expected one of builtin, dynamic-superb, mcr" in capsys.readouterr().err


def test_published_benchmarks_are_asked_freely_and_named_incomplete(files, tmp_path, capsys):
    root = tmp_path / "superb"
    row = {"file": "x.flac", "instruction": "Is it noisy? The answer could be yes or no.", "label": "yes"}
    for task, rows in {"NoiseDetection_X": {"1.wav": row}, "SpeakerVerification_X": {"1.wav": row | {"file2": "y.flac"}}}.items():
        write_audio(root / task / "1.wav", np.full(16000, 0.1, np.float32))
        (root / task / "metadata.json").write_text(json.dumps(rows))
    words = ["--benchmark", "dynamic-superb", "--audio-root", str(root), str(files / "model"), "--device", "cpu"]
    words += ["--out", str(tmp_path / "p.jsonl"), "--max-new-tokens", "2"]
    assert main(words) == 0
    header, (p,) = read_predictions(tmp_path / "p.jsonl")
    assert header["settings"]["mode"] == "generate"
    assert (p.id, p.category, p.scores) == ("NoiseDetection_X/1.wav", "degradation", {})
    for again in (words, ["--rescore", str(tmp_path / "p.jsonl")]):
        capsys.readouterr()
        assert main(again) == 0
        shown = capsys.readouterr().out
        assert "left out: task SpeakerVerification_X: its questions have two clips each" in shown
        assert "mean_of_tasks is over 1 tasks, the published ALL over 51: do not compare the two" in shown
    assert main([*words[:3], str(tmp_path / "none"), *words[4:]]) == 1
    assert "--audio-root: no folder" in capsys.readouterr().err


def three_hours(path):
    """A wav of three hours of silence that takes no room: the file is a hole."""
    size = 3 * 3600 * 8000 * 2
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16, b"data", size)
    path.write_bytes(head)
    os.truncate(path, 44 + size)


def test_one_bad_row_of_each_kind_is_named_and_the_rest_is_scored(files, tmp_path, capsys):
    good = (files / "clip0.wav").read_bytes()
    (tmp_path / "good.wav").write_bytes(good)
    (tmp_path / "cut.wav").write_bytes(good[: len(good) // 2])
    (tmp_path / "noise.wav").write_bytes(b"this is no sound at all" * 100)
    three_hours(tmp_path / "long.wav")
    base = dataclasses.replace(example(0), audio="good.wav")
    rows = [dataclasses.replace(base, id=f"good{i}", pair_id=None) for i in range(20)]
    rows += [dataclasses.replace(base, id=name, audio=f"{name}.wav") for name in ("cut", "noise", "long")]
    rows += [dataclasses.replace(base, id="silent", answer=None), dataclasses.replace(base, id="blank", choices=(), answer=" ")]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    words = [str(files / "model"), str(manifest), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "3 of 25 rows are bad, more than max_bad_fraction 0.05" in error and "too long: 10800.0 s, at most 30 s" in error
    assert main([*words, "--max-bad-fraction", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert f"skipped {manifest}: row 22 (cut): audio: corrupt or cut off: the header claims" in shown
    assert f"skipped {manifest}: row 23 (noise): audio: corrupt or unknown header" in shown
    assert f"skipped {manifest}: row 24 (long): audio: too long: 10800.0 s, at most 30 s are allowed" in shown
    assert "skipped silent: no answer to score against" in shown and "20 answers" in shown
    assert "skipped blank: no answer to score against" in shown


def test_manifests_with_nothing_to_score_are_named(files, tmp_path, capsys):
    words = [str(files / "model"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]

    def error(manifest, *more):
        assert main([words[0], str(manifest), *words[1:], *more]) == 1
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    assert "none.jsonl: cannot be read (No such file or directory)" in error(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "or rows of a known form, got an empty file" in error(tmp_path / "empty.jsonl")
    header = write_manifest(tmp_path / "header.jsonl", [])
    assert "expected at least one row, got none" in error(header)
    unanswered = write_manifest(tmp_path / "unanswered.jsonl", [dataclasses.replace(example(0), audio=None, answer=None)])
    assert "none of the 1 examples in split 'test', tasks all has an answer to score against" in error(unanswered)
    assert "no example in split 'dev', tasks all; it holds test gender" in error(files / "m.jsonl", "--split", "dev")
    assert "no example in split 'test', tasks accent; it holds test gender" in error(files / "m.jsonl", "--tasks", "accent")
    assert not (tmp_path / "p.jsonl").exists()


def test_a_bad_priors_file_is_named(tmp_path):
    p = Prediction(id="1", task="t", kind="neutral", answer="a", prediction="a")
    path = tmp_path / "priors.json"
    for content, message in {
        "": "bad JSON", "[]": "expected an object, got list", '{"1": 3}': "expected a string for '1', got int",
        '{"2": "a"}': "none of its 1 ids is among the 1 predictions",
    }.items():  # fmt: skip
        path.write_text(content)
        with pytest.raises(EvaluationError, match=f"--priors .*{message}"):
            read_priors(path, [p])
    with pytest.raises(EvaluationError, match="not readable"):
        read_priors(tmp_path / "none", [p])
    path.write_text('{"1": "b", "2": "a"}')
    assert read_priors(path, [p]) == {"1": "b"}
    write_priors(path, {"1": Prior("b", 0.9, {"a": -3.0, "b": -1.0}), "2": Prior("a", 0.6, {})})
    assert read_priors(path, [p]) == {"1": "b"}
    path.write_text('{"kdkernels_priors": 99}')
    with pytest.raises(EvaluationError, match="expected kdkernels_priors 1, got 99"):
        read_priors(path, [p])
