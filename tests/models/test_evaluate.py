import dataclasses
import json

import numpy as np
import pytest
import torch

from models.data.audio import write_audio
from models.data.manifest import Example, write_manifest
from models.data.prompts import target_template
from models.evaluate import (
    EvaluationError,
    append_predictions,
    choice_scores,
    evaluate,
    main,
    print_summary,
    read_predictions,
    summarize,
    swapped,
    write_header,
)
from models.features import FeatureStore, clip_key
from models.scoring import Prediction
from models.speech_lm import SpeechLM, SpeechLMConfig
from models.stage_steps import make_tiny_backbones


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
        assert o.task == e.task and o.answer != e.answer
    alone = [example(0)]
    assert swapped(alone) == alone


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


def test_predictions_file_survives_a_kill(model, examples, store, tmp_path):
    path = tmp_path / "p.jsonl"
    made = evaluate(model, examples, store, collate=model.make_collator(), progress_bar=False)[None]
    write_header(path, {"a": 1})
    append_predictions(path, made)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while the last line was written
    header, kept = read_predictions(path)
    assert header["settings"] == {"a": 1}
    assert kept == made[:-1] and path.read_bytes() == whole[:-20]  # reading alone writes nothing
    assert read_predictions(path, repair=True)[1] == made[:-1]
    append_predictions(path, made[-1:])
    assert path.read_bytes() == whole

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
    assert read_predictions(path)[1] == made[:1]


def test_labels_are_no_markup_on_the_terminal(capsys):
    made = Prediction(id="1", task="[/red]", kind="neutral", answer="[bold]", prediction="[bold]", choices=("[bold]", "b"))
    print_summary(summarize([made]))
    shown = capsys.readouterr().out
    assert "[/red]" in shown and "[bold]" in shown


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
    assert "error: run.device" in capsys.readouterr().err
    write_header(files / "none.p", {})
    assert main(["--rescore", str(files / "none.p")]) == 1
    assert "no prediction in it" in capsys.readouterr().err


def test_a_model_trained_again_is_not_given_the_old_ones_answers(files, model, tmp_path, capsys):
    words = [str(tmp_path / "model"), str(files / "m.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    model.save_pretrained(tmp_path / "model")
    assert main(words) == 0
    other = SpeechLM.from_pretrained(tmp_path / "model")
    other.connector.queries.data.add_(1)
    other.save_pretrained(tmp_path / "model")
    assert main(words) == 1
    assert "of another model" in capsys.readouterr().err


def test_skipped_rows_are_listed(files, tmp_path, capsys):
    lines = (files / "m.jsonl").read_text()
    gone = json.dumps(example(9).to_row() | {"audio": "gone.wav"})
    more = [json.dumps(example(i % 4).to_row() | {"id": f"more{i}"}) for i in range(20)]
    (files / "bad.jsonl").write_text(lines + "\n".join([gone, *more]) + "\n")
    assert main([str(files / "model"), str(files / "bad.jsonl"), "--out", str(tmp_path / "p.jsonl"), "--device", "cpu"]) == 0
    assert "skipped row 10 (gender9/neutral): audio: missing file" in capsys.readouterr().out


def test_clips_without_features_are_named_or_stop_the_evaluation(files, store, tmp_path, capsys):
    store.save(tmp_path / "all.safetensors")
    FeatureStore([clip_key(example(i)) for i in range(3)], store.features[:3]).save(tmp_path / "few.safetensors")
    words = [str(files / "model"), str(files / "m.jsonl"), "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "a.jsonl"), "--features", str(tmp_path / "all.safetensors")]) == 0
    assert "skipped" not in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "b.jsonl"), "--features", str(tmp_path / "few.safetensors")]) == 1
    assert "lacks the clips of 2 of 8 questions" in capsys.readouterr().err
