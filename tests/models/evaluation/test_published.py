"""MMAU, MMAR and LISTEN by made-up copies of their published files, and their metrics by values worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models.cli import main as models
from models.data.audio import encode_audio, write_audio
from models.data.manifest import ManifestError
from models.evaluation import published
from models.evaluation.benchmarks import SuiteError, load_suite
from models.evaluation.predictions import Prediction, append_predictions, groups_of, read_predictions, write_header
from models.evaluation.published_scores import listen_choice, listen_metrics, mmau_match
from models.evaluation.scoring import judge, score

MMAU = {
    "question": "Who speaks?", "choices": ["Man", "Woman", "Man", "Robot"], "answer": "Man", "dataset": "AudioSet",
    "split": "test-mini", "category": ["Reasoning"], "sub-category": "Acoustic Source Inference", "difficulty": "medium",
}  # fmt: skip
MMAR = {
    "question": "Which place", "choices": ["Dense Forest", "Open Grassland", ""], "answer": "Open Grassland", "modality": "music",
    "category": "Cultural Layer", "sub-category": "Culture", "language": None, "source": "made up",
}  # fmt: skip


def sound(hertz=300.0):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(1600) / 16000).astype(np.float32)


@pytest.fixture()
def mmau(tmp_path):
    """Three questions of the published form; the third repeats no choice and has one more field."""
    rows = []
    for number, task in enumerate(("sound", "music", "speech")):
        write_audio(tmp_path / "test-mini-audios" / f"{number}.wav", sound(300 + 100 * number))
        rows.append({"id": f"q{number}", "audio_id": f"./test-mini-audios/{number}.wav", "task": task, **MMAU})
    rows[2] |= {"choices": ["Man", "Woman"], "difficulty": "hard", "note": "new"}
    (tmp_path / "mmau-test-mini.json").write_text(json.dumps(rows, indent=2))
    return tmp_path


def test_mmau_as_published(mmau):
    suite = load_suite("mmau", audio_root=mmau)
    assert [e.task for e in suite.examples] == ["sound", "music", "speech"] and not suite.problems and suite.mode == "generate"
    first = suite.examples[0]
    assert (first.id, first.audio, first.answer, first.split) == ("q0", "test-mini-audios/0.wav", "Man", "test")
    assert first.choices == ("Man", "Woman", "Robot")
    assert first.question.endswith("following options: ['Man', 'Woman', 'Man', 'Robot'].")  # as published
    assert groups_of(first) == {"difficulty": "medium", "sub-category": "Acoustic Source Inference"}
    again = load_suite("mmau", manifest=mmau / "mmau-test-mini.json", audio_root=mmau)
    assert again.examples == suite.examples


def test_a_row_of_another_form_is_named(mmau):
    rows = json.loads((mmau / "mmau-test-mini.json").read_text())
    del rows[0]["audio_id"]
    rows[1]["choices"] = "Man, Woman"
    rows[2]["audio_id"] = "../../etc/passwd"
    (mmau / "mmau-test-mini.json").write_text(json.dumps(rows))
    found = load_suite("mmau", audio_root=mmau, max_bad_fraction=1.0)
    assert [p.reason.split(":")[0] for p in found.problems] == ["missing field 'audio_id'", "choices", "audio"]
    with pytest.raises(ManifestError, match="3 of 3 rows are bad"):
        load_suite("mmau", audio_root=mmau)


def test_mmar_as_published(tmp_path):
    write_audio(tmp_path / "audio" / "x.wav", sound())
    (tmp_path / "MMAR-meta.jsonl").write_text(json.dumps({"id": "x", "audio_path": "./audio/x.wav", **MMAR}) + "\n")
    (example,) = load_suite("mmar", audio_root=tmp_path).examples
    assert (example.task, example.audio, example.choices) == ("music", "audio/x.wav", ("Dense Forest", "Open Grassland"))
    assert groups_of(example) == {"category": "Cultural Layer", "sub-category": "Culture"}


@pytest.mark.parametrize(
    ("said", "answer", "choices", "right"),
    [
        ("Man", "Man", ["Man", "Woman"], True),
        ("The speaker is a MAN!", "Man", ["Man", "Woman"], True),
        ("A man or a woman", "Man", ["Man", "Woman"], False),
        ("Woman", "Man", ["Man", "Woman"], False),
        ("", "Man", ["Man"], False),
        ("...", "Man", ["Man"], False),
        ("fourteen", "fourteen", ["four", "fourteen", "fourteen"], True),  # a repeated choice
        ("hall concert", "concert hall", ["concert hall", "dance hall"], True),  # order does not count
        ("concert hall dance", "concert hall", ["concert hall", "dance hall"], False),
        ("happy then sad", "sad then happy", ["sad then happy", "happy then sad"], True),  # the same words: no other choice
        ("very fast", "fast", ["fast", "very fast"], False),
        ("fast", "very fast", ["fast", "very fast"], False),
        ("light_switch", "light_switch", ["light", "switch"], True),  # an underscore is part of a word
    ],
)
def test_the_rule_of_mmau(said, answer, choices, right):
    assert mmau_match(said, answer, choices) is right


def prediction(number, said, answer="Man", choices=("Man", "Woman"), **more):
    return Prediction(id=f"p{number}", task="sound", kind="neutral", answer=answer, prediction=said, choices=choices, **more)


def test_mmau_scores_by_task_and_group():
    made = [
        prediction(0, "A man.", groups={"difficulty": "easy"}),
        prediction(1, "a man, no woman", groups={"difficulty": "easy"}),
        prediction(2, "x", scores={"Man": -1.0, "Woman": -2.0}, groups={"difficulty": "hard"}),  # ranked: the likeliest counts
        prediction(3, "x", scores={"Man": -3.0, "Woman": -2.0}, groups={"difficulty": "hard"}),
    ]
    assert judge(made, scorer="mmau").tolist() == [True, False, True, False]
    found = score(made, scorer="mmau", bootstrap_samples=2)
    assert found["accuracy"].value == 0.5 and found["scorer"] == "mmau" and "listen" not in found
    by = found["by_group"]["difficulty"]
    assert (by["easy"].value, by["easy"].count, by["hard"].value) == (0.5, 2, 0.5)


@pytest.mark.parametrize(
    ("said", "named"),
    [("B", "sad"), ("c.", "fear"), ("(B) sad", "sad"), ("d", None), ("", None), ("The letter is", None), ("Answer: B", "happy")],
)
def test_the_letter_of_listen(said, named):
    """The first character that is one of the letters counts, also inside a word: so is the published rule."""
    assert listen_choice(said, ("happy", "sad", "fear")) == named


def test_the_metrics_of_listen():
    """Truth happy happy happy sad sad; answers happy sad (none) sad anger: one is left out; happy and happiness are one label."""
    choices = ("happy", "sad", "anger")
    answers = [("happy", "A"), ("happy", "B"), ("happy", ""), ("sad", "B"), ("sad", "C")]
    made = [prediction(n, said, answer=truth, choices=choices) for n, (truth, said) in enumerate(answers)]
    found = listen_metrics(made)
    assert found["weighted_accuracy"] == pytest.approx(2 / 4) and found["micro_f1"] == pytest.approx(2 / 4)
    assert found["uar"] == pytest.approx((1 / 2 + 1 / 2) / 2)  # anger does not occur
    # happiness: TP 1, FN 1. sadness: TP 1, FP 1, FN 1. anger: FP 1.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    # Truth 1/2, 1/2, 0 and answers 1/4, 1/2, 1/4 of happiness, sadness, anger, drawn by chance.
    assert found["chance_accuracy"] == pytest.approx(1 / 8 + 1 / 4)
    assert found["chance_macro_f1"] == pytest.approx((2 * (1 / 8) / (3 / 4) + 2 * (1 / 4) / 1) / 3)
    assert (found["answered"], found["count"]) == (4, 5)
    assert judge(made, scorer="listen").tolist() == [True, False, False, True, False]
    assert listen_metrics(made[2:3])["uar"] == 0.0
    same = [prediction(0, "B", answer="happy", choices=("happy", "happiness"))]
    assert listen_metrics(same)["weighted_accuracy"] == 1.0  # one emotion by two names


LISTEN = {
    "question": "Which emotion?", "choices": ["happy", "sad"], "answer": "sad", "transcription": "So late.",
    "explicit_emotion": "happy",
}  # fmt: skip


def listen_row(number, experiment, **more):
    audio = {"bytes": encode_audio(sound(200 + 50 * number)), "path": f"{number}.wav"}
    return {"id": f"clip{number}", "experiment_type": experiment, "audio": audio, **LISTEN, **more}


def test_listen_rows_become_the_questions_of_their_experiments(tmp_path):
    made = [e for number, kind in enumerate(("1", "2A", "2B", "3A", "3B", "4")) for e in rows_of(number, kind, tmp_path)]
    assert [(e.task, e.audio is not None) for e in made] == [
        ("1_text", False), ("1_audio", True), ("1_audio_and_text", True), ("2A", False), ("2B", True), ("2C", True),
        ("3A", False), ("3B", True), ("3C", True), ("4", True),
    ]  # fmt: skip
    by = {e.task: e for e in made}
    assert by["2A"].answer == "happy" and by["2B"].answer == "sad"  # what the words say, what the voice says
    assert len(by["3B"].choices) == 10 and set(by["3B"].choices) > {"happy", "sad", "frustration"}
    letters = "\n".join(f"{letter}. {choice}" for letter, choice in zip("AB", by["2C"].choices, strict=True))
    assert by["2C"].question == (
        "Transcription: So late.\nListen to the audio and read the transcription, then classify the emotion.\nWhich emotion?\n"
        f"{letters}\nRespond with only the letter (A, B):"
    )
    assert by["3A"].question.startswith("Transcription: So late.\nRead the transcription and classify the emotion.\n")
    assert by["4"].question.startswith("Listen to the audio and classify the emotion.\nWhich")
    orders = {published.listen_choices(f"clip{n}", ["happy", "sad"], "2B") for n in range(20)}
    assert orders == {("happy", "sad"), ("sad", "happy")}
    assert rows_of(0, "2A", tmp_path, transcription=None) == [] and rows_of(0, "2A", tmp_path, explicit_emotion="") == []


def rows_of(number, kind, folder, **more):
    return published.listen_examples(listen_row(number, kind, **more), folder)


def test_listen_unpacks_each_clip_once_and_names_bad_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    rows = [listen_row(0, "2B"), listen_row(1, "2B"), listen_row(2, "2B", audio={"bytes": b"", "path": "x"}), listen_row(3, "4")]
    monkeypatch.setattr(published, "listen_rows", lambda root: iter(rows))
    suite = load_suite("listen", audio_root=tmp_path, max_bad_fraction=0.5)
    assert len(suite.examples) == 5 and len(list((tmp_path / "cache" / "listen" / "clips").iterdir())) == 3
    assert [str(p) for p in suite.problems] == [f"{tmp_path}: row 3 (clip2): audio: expected the bytes of a clip, got none"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "listen" / "clips").iterdir()}
    load_suite("listen", audio_root=tmp_path, max_bad_fraction=0.5)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "listen" / "clips").iterdir()}


def test_listen_from_its_parquet_files(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="LISTEN is published as parquet")
    import pyarrow.parquet as parquet

    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ManifestError, match=r"no data/train-\*.parquet in it"):
        load_suite("listen", audio_root=tmp_path)
    (tmp_path / "data").mkdir()
    for part in range(2):
        rows = [listen_row(10 * part + n, "4", conversation_format="x") for n in range(3)]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"train-{part:05d}-of-00002.parquet")
    suite = load_suite("listen", audio_root=tmp_path)
    assert [e.id for e in suite.examples] == [f"4/clip{n}" for n in (0, 1, 2, 10, 11, 12)]
    parquet.write_table(pa.Table.from_pylist([{"id": "x"}]), tmp_path / "data" / "train-00000-of-00002.parquet")
    with pytest.raises(ManifestError, match="found no 'question'"):
        load_suite("listen", audio_root=tmp_path)
    with pytest.raises(SuiteError, match="it has no single file"):
        load_suite("listen", manifest=tmp_path / "x", audio_root=tmp_path)


def test_the_benchmarks_rule_is_the_default(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    write_header(path, {"benchmark": "mmau"})
    append_predictions(path, [prediction(0, "fourteen or four", answer="fourteen", choices=("fourteen", "four"))])
    for words, rule in (([], "mmau"), (["--scorer", "lenient"], "lenient")):
        assert models(["evaluate", "--rescore", str(path), "--json", str(tmp_path / f"{rule}.json"), *words]) == 0
        shown = json.loads((tmp_path / f"{rule}.json").read_text())["summary"]["plain"]
        assert (shown["scorer"], shown["accuracy"]["value"]) == (rule, float(rule == "lenient"))
    assert f"by {rule};" in capsys.readouterr().out
    assert read_predictions(path)[1][0].groups == {}


def test_a_checkpoint_is_checked_before_any_clip_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "listen_rows", lambda root: pytest.fail("the clips were unpacked"))
    (tmp_path / "empty").mkdir()
    for checkpoint in ("none", str(tmp_path / "empty")):
        assert models(["evaluate", checkpoint, "--benchmark", "listen", "--audio-root", str(tmp_path)]) == 1
        assert "error: checkpoint" in capsys.readouterr().err
