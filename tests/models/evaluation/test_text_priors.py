"""Priors: the language model's own answer to the prompt without audio, asked once a prompt; and where it is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from models.data.manifest import Example, write_manifest
from models.data.readers import read_data
from models.evaluation.predictions import EvaluationError
from models.evaluation.text_priors import (
    Prior,
    main,
    natural_conflicts,
    read_priors,
    summarize_priors,
    text_priors,
    write_priors,
)
from tests.models.tiny_speech import make_lm, make_tokenizer

QUESTION = "Is the speaker a man or a woman?"


@pytest.fixture(scope="module")
def backbone():
    tokenizer = make_tokenizer()
    return make_lm(tokenizer), tokenizer


def make_question(pair: str, context_type: str = "neutral", answer: str = "man", **changes) -> Example:
    context = {"faithful": f"Note: the speaker is a {answer}.", "irrelevant": "Note: the cup is blue."}.get(context_type, "")
    told = {
        "id": f"{pair}/{context_type}", "audio": f"{pair}.flac", "transcription": f"Where is {pair}?", "task": "gender",
        "question": QUESTION, "choices": ("man", "woman"), "answer": answer, "split": "test", "context": context,
        "kind": "aligned" if context_type == "faithful" else "neutral", "pair_id": pair,
        "metadata": {"context_type": context_type},
    }  # fmt: skip
    return Example(**{**told, **changes})


def _log_likelihood(lm, tokenizer, text: str, start: int, count: int) -> float:
    """Of the tokens start to start + count of a text, by one plain forward pass."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = [tokenizer.bos_token_id, *ids] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ids
    with torch.no_grad():
        log_p = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_p[n - 1, ids[n]]) for n in range(start, start + count))


def test_the_prior_is_what_the_language_model_says_to_the_prompt_without_its_audio_line(backbone):
    lm, tokenizer = backbone
    question = make_question("x", choices=("0", "1"), task="digits", question="Which?", answer="0")
    prompt = "Transcript: Where is x?\nQuestion: Which?\nAnswer:"
    scores = {}
    for choice in question.choices:
        text = f"{prompt} The answer is {choice}."
        before = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        words = [tokenizer(f" The answer is {c}.", add_special_tokens=False).input_ids for c in question.choices]
        at = [n for n, pair in enumerate(zip(*words, strict=True)) if len(set(pair)) > 1]
        assert len(at) == 1  # each choice is one token here
        scores[choice] = _log_likelihood(lm, tokenizer, text, before + at[0], 1)
    prior = text_priors([question], lm, tokenizer, progress_bar=False)[question.id]
    assert prior.scores == pytest.approx(scores, abs=1e-4)
    best = max(scores, key=scores.get)
    share = math.exp(scores[best]) / sum(math.exp(s) for s in scores.values())
    assert prior.answer == best and prior.probability == pytest.approx(share, abs=1e-4) and 0.5 <= share < 1.0


def test_equal_prompts_are_asked_about_once_and_batches_change_nothing(backbone):
    lm, tokenizer = backbone
    same = [make_question(f"q{n}", transcription="", answer=("man", "woman")[n % 2]) for n in range(5)]
    others = [make_question(f"r{n}", transcription="So late" * n) for n in range(1, 4)]
    rows = []
    hook = lm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    one = text_priors(same, lm, tokenizer, progress_bar=False)
    hook.remove()
    assert sum(rows) <= 2 and len(set(map(str, one.values()))) == 1 and len(one) == 5
    together = text_priors([*same, *others], lm, tokenizer, batch_examples=64, progress_bar=False)
    apart = text_priors([*others[::-1], *same], lm, tokenizer, batch_examples=1, progress_bar=False)
    assert together.keys() == apart.keys()
    for name, prior in together.items():
        assert prior.answer == apart[name].answer and prior.scores == pytest.approx(apart[name].scores, abs=1e-4)


def test_arguments_are_checked(backbone):
    lm, tokenizer = backbone
    with pytest.raises(ValueError, match="batch_examples: expected at least 1, got 0"):
        text_priors([make_question("a")], lm, tokenizer, batch_examples=0)
    with pytest.raises(ValueError, match="example a/neutral: expected choices, got none"):
        text_priors([make_question("a", choices=())], lm, tokenizer, progress_bar=False)


def test_likelihoods_of_nan_are_no_prior(tmp_path, monkeypatch, capsys, backbone):
    lm, tokenizer = backbone
    nan = {"man": math.nan, "woman": math.nan}
    monkeypatch.setattr("models.evaluation.text_priors.choice_scores", lambda *_, **__: [[nan]])
    with pytest.raises(EvaluationError, match=r"example 'a/neutral': expected log-likelihoods .* got 'man' nan, 'woman' nan"):
        text_priors([make_question("a")], lm, tokenizer, progress_bar=False)
    monkeypatch.setattr("models.backbones.resolve.load_causal_lm", lambda spec, dtype: (lm, tokenizer))
    manifest = write_manifest(tmp_path / "manifest.jsonl", [make_question("a")])
    assert main([str(manifest), "--lm", "tiny", "--out", str(tmp_path / "priors.json")]) == 1
    assert "error: example 'a/neutral'" in capsys.readouterr().err and not (tmp_path / "priors.json").exists()


def test_a_natural_conflict_is_a_wrong_prior_where_the_text_says_nothing():
    groups = [make_question(pair, kind) for pair in ("a", "b", "c") for kind in ("neutral", "faithful", "irrelevant")]
    told = {"a": ("woman", 0.9), "b": ("woman", 0.6), "c": ("man", 0.99)}
    priors = {f"{pair}/neutral": Prior(answer, share, {}) for pair, (answer, share) in told.items()}
    priors["c/irrelevant"] = Prior("woman", 0.9, {})  # not the one that counts
    everything = natural_conflicts(groups, priors)
    assert everything == {f"{pair}/{kind}" for pair in "ab" for kind in ("neutral", "faithful", "irrelevant")}
    assert natural_conflicts(groups, priors, min_probability=0.8) == {e.id for e in groups if e.pair_id == "a"}
    alone = dataclasses.replace(groups[0], pair_id=None)
    assert natural_conflicts([alone], priors) == {alone.id}
    with pytest.raises(ValueError, match="example a/faithful: expected a neutral example of its pair"):
        natural_conflicts([groups[1]], priors)
    with pytest.raises(ValueError, match="example a/neutral: expected a neutral example of its pair"):
        natural_conflicts([groups[0]], {})


def test_the_summary_counts_by_task_and_context():
    groups = [make_question("a"), make_question("b", answer="woman"), make_question("b", "irrelevant", answer="woman")]
    priors = {e.id: Prior("man", 0.75, {}) for e in groups}
    assert summarize_priors(groups, priors) == {
        "gender": {
            "neutral": {"count": 2, "accuracy": 0.5, "probability": 0.75, "answers": {"man": 2}},
            "irrelevant": {"count": 1, "accuracy": 0.0, "probability": 0.75, "answers": {"man": 1}},
        }
    }
    unknown = [make_question("c", answer=None), make_question("d", answer=None, task="echo")]
    summary = summarize_priors([*groups, *unknown], priors | {e.id: Prior("man", 0.75, {}) for e in unknown})
    assert summary["gender"]["neutral"] == {"count": 3, "accuracy": 0.5, "probability": 0.75, "answers": {"man": 3}}
    assert summary["echo"]["neutral"] == {"count": 1, "probability": 0.75, "answers": {"man": 1}}



def test_files_are_read_back_and_other_files_refused(tmp_path):
    priors = {"a/neutral": Prior("man", 0.75, {"man": -0.1, "woman": -1.2})}
    path = write_priors(tmp_path / "priors.json", priors, header={"lm": "x"})
    assert read_priors(path) == priors and json.loads(path.read_text())["lm"] == "x"
    for content in ("[]", "{}", '{"kdkernels_priors": 2}', "no json", '{"kdkernels_priors": 1, "priors": {"a": {"x": 1}}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"priors\.json: expected "):
            read_priors(path)


def test_command_line(tmp_path, monkeypatch, capsys, backbone):
    monkeypatch.setattr("models.backbones.resolve.load_causal_lm", lambda spec, dtype: (backbone[0].to(dtype), backbone[1]))
    monkeypatch.setattr("models.backbones.resolve.resolve_backbone", lambda spec, kind: SimpleNamespace(sha256=lambda: "0" * 64))
    monkeypatch.setattr("models.backbones.device.inference_dtype", lambda device: torch.float32)
    questions = [make_question(pair, kind) for pair in "ab" for kind in ("neutral", "faithful")]
    questions.append(make_question("c", split="dev"))
    manifest = write_manifest(tmp_path / "manifest.jsonl", questions)
    out = tmp_path / "priors.json"
    assert main([str(manifest), "--lm", "tiny", "--out", str(out)]) == 0
    assert set(read_priors(out)) == {"a/neutral", "b/neutral"}
    assert "gender" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["lm_sha256"] == "0" * 64 and record["by_task"]["gender"]["neutral"]["count"] == 2
    words = ["--splits", "test", "dev", "--contexts", "neutral", "aligned"]
    assert main([str(manifest), "--lm", "tiny", "--out", str(out), *words]) == 0
    assert len(read_priors(out)) == 5
    more = [make_question(f"n{n}") for n in range(30)] + [make_question("free", choices=())]
    bad = json.dumps(make_question("bad").to_row() | {"answer": "dog"})
    longer = write_manifest(tmp_path / "longer.jsonl", more)
    longer.write_text(longer.read_text() + bad + "\n")
    capsys.readouterr()
    assert main([str(longer), "--lm", "tiny", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert len(read_priors(out)) == 30 and "skipped free/neutral: no choices to rank\n" in told
    assert f"skipped {longer}: row 33 (bad/neutral): answer: expected one of" in told
    folder = tmp_path / "kaldi"
    folder.mkdir()
    (folder / "wav.scp").write_text("u1 a.wav\n")
    assert main([str(folder), "--lm", "tiny", "--out", str(out), "--splits", "train"]) == 1
    assert "no question with choices" in capsys.readouterr().err
    read = read_data  # rows with choices in a folder, as data sets of the package datasets are
    with monkeypatch.context() as patch:
        patch.setattr("models.evaluation.text_priors.read_data", lambda path, **options: read(manifest, **options))
        hashes = []
        for audio in ("a.wav", "b.wav"):
            (folder / "wav.scp").write_text(f"u1 {audio}\n")
            assert main([str(folder), "--lm", "tiny", "--out", str(out)]) == 0
            hashes.append(json.loads(out.read_text())["manifest_sha256"])
    assert len(read_priors(out)) == 2 and hashes[0] != hashes[1]
    capsys.readouterr()
    assert main([str(manifest), "--lm", "tiny", "--out", str(out), "--splits", "train"]) == 1
    assert "error: " in capsys.readouterr().err
    monkeypatch.setattr("models.evaluation.text_priors.read_data", lambda *_, **__: pytest.fail("the manifest was read"))
    for words, message in (
        (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--batch-examples", "0"], "--batch-examples: expected at least 1, got 0"),
        (["--out", str(manifest)], "--out: expected another file than the manifest"),
        (["--out", str(tmp_path / "x" / ".." / manifest.name)], "--out: expected another file than the manifest"),
    ):
        assert main([str(manifest), "--lm", "tiny", "--out", str(out), *words]) == 1
        assert message in capsys.readouterr().err
