"""The field's own row forms become examples; rows of another shape are problems, not tracebacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.data.audio import write_audio
from models.data.check import main as check
from models.data.convert import main
from models.data.manifest import Example, ManifestError, read_manifest
from models.data.readers import parse_description, read_data, read_foreign
from models.pseudo_gt.wording import describe, prompt_end

DESTA = {
    "id": "d1",
    "audios": [{"audio_filepath": "a.flac", "transcription": "Good luck."}],
    "messages": [
        {"role": "system", "content": "Focus on the audio clips."},
        {"role": "user", "content": "<start_audio><|AUDIO|><end_audio>\n\nWho speaks?"},
    ],
    "seed_description": "[00:00-00:05] Good luck. (Gender: female, Emotion: happy)",
    "target": "A woman.",
}
DESTA_25 = {
    "messages": [
        {"role": "user", "content": "<|AUDIO|> Who speaks?", "audios": [{"audio": "a.flac", "text": "Good luck."}]}
    ],
    "response": "A woman.",
}
SUPERB = {"file": "a.flac", "instruction": "Which is it? The answer could be Yes, no, or maybe.", "label": "yes"}
MCR = {
    "id": "m1",
    "audio": {"path": "a.flac", "array": None},
    "question": "Which emotion?",
    "options": {"A": "happy", "B": "sad"},
    "answer": "sad",
    "contexts": {"neutral": "", "faithful": "He cried.", "adversarial": "He laughed.", "irrelevant": "It rains."},
}


@pytest.fixture()
def root(tmp_path):
    write_audio(tmp_path / "a.flac", np.full(16_000, 0.1, np.float32))
    return tmp_path


def _read(root, rows, form, **options):
    path = root / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_foreign(path, form=form, **options)


def test_desta_rows(root):
    first, second = _read(root, [DESTA, DESTA_25], "desta")
    assert (first.id, first.audio, first.transcription) == ("d1", "a.flac", "Good luck.")
    assert (first.question, first.system, first.context) == ("Who speaks?", "Focus on the audio clips.", "")
    assert (first.target, first.target_source) == ("A woman.", "text_backbone")
    assert first.metadata == {"seed_description": DESTA["seed_description"], "gender": "female", "emotion": "happy"}
    assert (second.question, second.transcription, second.target) == ("Who speaks?", "Good luck.", "A woman.")
    (judged,) = _read(root, [{**DESTA, "answer": "woman"}], "desta")
    assert (first.answer, judged.answer, judged.target) == (None, "woman", "A woman.")


def test_null_values_count_as_absent(root):
    (example,) = _read(root, [{**DESTA, "id": None, "target": None, "response": "A man.", "task": None}], "desta")
    assert (example.id, example.target, example.task) == ("1/a.flac", "A man.", "")
    rows = [{**SUPERB, "id": None, "task": None, "instruction": f"{n}?", "text": None, "split": None} for n in range(3)]
    assert [(e.id, e.task, e.context, e.split) for e in _read(root, rows, "dynamic_superb")] == [
        (f"{n}/a.flac", "", "", "test") for n in (1, 2, 3)
    ]
    (example,) = _read(root, [{**SUPERB, "label": 0, "choices": None, "instruction": "How many?"}], "dynamic_superb")
    assert (example.answer, example.choices) == ("0", ())
    (example, *_) = _read(root, [{**MCR, "choices": None, "pair_id": None, "contexts": {"neutral": None}}], "mcr_bench")
    assert (example.choices, example.pair_id, example.context) == (("happy", "sad"), "m1", "")


def test_seed_rows_of_the_caad_authors(root, capsys):
    """No form is named; the system turn keeps its lines, and Stage 1 reads the description as it is."""
    plain = {**DESTA, "id": "plain", "messages": DESTA["messages"][1:]}
    del plain["target"]
    two = "[00:00-00:05] Good luck. (Gender: female, Emotion: happy)\n[00:05-00:09] Thanks. (Gender: male, Emotion: sad)"
    turns = [{"role": "system", "content": "Focus on the audio.\n\n1. Be brief."}, DESTA["messages"][1]]
    rows = [DESTA, plain, {**DESTA, "id": "two", "messages": turns, "seed_description": two}]
    path = root / "seeds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check([str(path)]) == 0
    assert "form: desta" in (out := capsys.readouterr().out) and "2 examples have a target, 1 have none" in out
    first, second, third = read_data(path)
    assert (first.target, second.target, second.system) == ("A woman.", None, "")
    assert describe(first) == DESTA["seed_description"]
    assert third.system == "Focus on the audio.\n\n1. Be brief." and describe(third) == " ".join(two.split())
    assert prompt_end(first) == (
        f"Focus on the audio clips.\nQuestion: Who speaks?\n{DESTA['seed_description']} ->"
    )
    assert prompt_end(second).startswith("Question: Who speaks?")


def test_a_seed_row_may_have_several_clips(root):
    write_audio(root / "b.flac", np.full(16_000, 0.1, np.float32))
    mark = "<start_audio><|AUDIO|><end_audio>"
    row = {
        **DESTA,
        "audios": [DESTA["audios"][0], {"audio_filepath": "b.flac", "transcription": "Thanks."}],
        "messages": [{"role": "user", "content": f"{mark}\n{mark}\nWho speaks louder?"}],
    }
    (example,) = _read(root, [row], "desta")
    assert (example.audio, example.more_audio, example.question) == ("a.flac", ("b.flac",), "Who speaks louder?")
    assert example.transcription == "Good luck.\nThanks."
    bad = [
        ({**row, "messages": [{"role": "user", "content": f"{mark * 3} Who?"}]}, "one for each mark of a clip, got 2 for 3"),
        ({**row, "audios": [DESTA["audios"][0], {"text": "Thanks."}]}, "expected a path under one of path, audio"),
        ({**row, "audios": []}, "expected at least one, got none"),
    ]
    for wrong, message in bad:
        (problem,) = _read(root, [wrong], "desta", max_bad_fraction=1.0).problems
        assert message in problem.reason and problem.row == 1


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ("<start_audio><|AUDIO|><end_audio>\n\nWho speaks?", "Who speaks?"),
        ("<start_audio> <|AUDIO|> <end_audio> Who speaks?", "Who speaks?"),
        ("<start_audio>clips/a.flac<end_audio> Who speaks?", "Who speaks?"),
        ("<start_audio> clips/a.flac <end_audio> Who speaks?", "Who speaks?"),
        ("<start_audio><end_audio>Who speaks?", "Who speaks?"),
        ("<audio>a.flac</audio>Who speaks?", "Who speaks?"),
        ("<|audio_bos|><|AUDIO|><|audio_eos|>Who speaks?", "Who speaks?"),
        ("<audio>\nWho speaks?", "Who speaks?"),
        ("Who speaks? <audio>", "Who speaks?"),
        ("Listen: <audio> Who speaks?", "Listen:  Who speaks?"),
        ("What do <start_audio> and <end_audio> mean?", "What do <start_audio> and <end_audio> mean?"),
        ("What do <audio> and </audio> mean?", "What do <audio> and </audio> mean?"),
        ("What do <start_audio>and<end_audio> mean?", "What do <start_audio>and<end_audio> mean?"),
        ("<start_audio>a<end_audio> Who speaks?", "Who speaks?"),  # the name of its file
        ("What does the <audio> tag do?", "What does the <audio> tag do?"),
        (
            "<start_audio><|AUDIO|><end_audio> What do <start_audio> and <end_audio> mean?",
            "What do <start_audio> and <end_audio> mean?",
        ),
        ("<|AUDIO|> What does <start_audio> a b <end_audio> hold?", "What does <start_audio> a b <end_audio> hold?"),
    ],
)
def test_only_the_mark_of_the_clip_is_taken_out_of_a_turn(root, content, question):
    (example,) = _read(root, [{**DESTA, "messages": [{"role": "user", "content": content}]}], "desta")
    assert example.question == question


def test_a_converted_manifest_names_the_folder_of_its_audio(root, tmp_path_factory, capsys):
    away, outside = tmp_path_factory.mktemp("away"), tmp_path_factory.mktemp("outside")
    (root / "a.flac").rename(outside / "a.flac")
    (root / "a.flac").symlink_to(outside / "a.flac")
    (root / "rows.jsonl").write_text(json.dumps(DESTA))
    words = [str(root / "rows.jsonl"), "--form", "desta", "--audio-root", str(root), "--out", str(away / "m.jsonl")]
    assert main(words) == 1 and "--allow-links" in capsys.readouterr().err
    assert main([*words, "--allow-links"]) == 0
    manifest = read_manifest(away / "m.jsonl", allow_links=True)
    assert len(manifest) == 1 and manifest.audio_root.resolve() == root


def test_rows_without_a_split_are_training_data_or_a_benchmark(root):
    for form, row, split in (("desta", DESTA, "train"), ("dynamic_superb", SUPERB, "test"), ("mcr_bench", MCR, "test")):
        assert {e.split for e in _read(root, [row], form)} == {split}
        assert {e.split for e in _read(root, [row], form, split="dev")} == {"dev"}
        assert {e.split for e in _read(root, [{**row, "split": "dev"}], form)} == {"dev"}
        words = [str(root / "rows.jsonl"), "--form", form, "--out", str(root / "m.jsonl"), "--overwrite"]
        (root / "rows.jsonl").write_text(json.dumps(row))
        assert main(words) == 0 and {e.split for e in read_manifest(root / "m.jsonl")} == {split}


def test_a_second_question_under_one_id_gets_a_number(root):
    write_audio(root / "b.flac", np.full(16_000, 0.1, np.float32))
    other = {**DESTA, "messages": [{"role": "user", "content": "<|AUDIO|> What is said?"}], "target": "Good luck."}
    third = {**DESTA, "messages": [{"role": "user", "content": "<|AUDIO|> How?"}]}
    manifest = _read(root, [DESTA, other, DESTA, other, third], "desta", max_bad_fraction=0.5)
    assert [(e.id, e.question) for e in manifest] == [("d1", "Who speaks?"), ("d1#2", "What is said?"), ("d1#3", "How?")]
    rows = root / "rows.jsonl"
    assert [str(p) for p in manifest.problems] == [f"{rows}: row {n} (d1): duplicate id 'd1', first in row 1" for n in (3, 4)]
    elsewhere = {**other, "audios": [{"audio": "b.flac"}]}
    manifest = _read(root, [DESTA, elsewhere], "desta", max_bad_fraction=0.5)
    assert [p.reason for p in manifest.problems] == ["duplicate id 'd1', first in row 1"]
    superb = [{**SUPERB, "id": 7}, {**SUPERB, "id": 7, "instruction": "Say yes or no."}, {**SUPERB, "id": 7, "text": "x"}]
    assert [e.id for e in _read(root, superb, "dynamic_superb")] == ["7", "7#2", "7#3"]


def test_questions_and_contexts_of_one_id_stay_pairs(root):
    examples = _read(root, [MCR, {**MCR, "question": "How?"}], "mcr_bench").examples
    assert [e.id for e in examples] == [*(f"m1/{c}" for c in MCR["contexts"]), *(f"m1/{c}#2" for c in MCR["contexts"])]
    assert [e.pair_id for e in examples] == ["m1"] * 4 + ["m1#2"] * 4
    plain = {key: value for key, value in MCR.items() if key != "contexts"}
    contexts = [{**plain, "context_type": kind, "context": text} for kind, text in MCR["contexts"].items()]
    examples = _read(root, [*contexts, {**contexts[1], "question": "How?"}], "mcr_bench").examples
    assert [e.id for e in examples] == ["m1", "m1#2", "m1#3", "m1#4", "m1#5"]
    assert [e.pair_id for e in examples] == ["m1", "m1", "m1", "m1", "m1#5"]


def test_dynamic_superb_rows_read_their_choices_from_the_instruction(root):
    (example,) = _read(root, [SUPERB], "dynamic_superb")
    assert (example.choices, example.answer) == (("yes", "no", "maybe"), "yes")  # spelt as the label is
    (example,) = _read(root, [{**SUPERB, "label": "purple"}], "dynamic_superb")
    assert (example.choices, example.answer) == ((), "purple")
    (example,) = _read(root, [{**SUPERB, "instruction": "Say it.", "choices": ["yes", "no"]}], "dynamic_superb")
    assert example.choices == ("yes", "no")


def test_the_text_of_a_dynamic_superb_row_is_part_of_the_question_and_no_transcript(root):
    (example,) = _read(root, [{**SUPERB, "text": "good luck"}], "dynamic_superb")
    assert (example.context, example.transcription) == ("good luck", "")
    (example,) = _read(root, [{**SUPERB, "transcription": "good luck"}], "dynamic_superb")
    assert (example.context, example.transcription) == ("", "good luck")


@pytest.mark.parametrize("folder", ["SpeechDetection_LJSpeech", "SpeechDetection_LJSpeech/test"])
def test_dynamic_superb_metadata_is_an_object_of_rows_by_clip(tmp_path, folder):
    write_audio(tmp_path / folder / "a.flac", np.full(16_000, 0.1, np.float32))
    path = tmp_path / folder / "metadata.json"
    path.write_text(json.dumps({"a.flac": {**SUPERB, "file": "elsewhere/b.flac", "id": 7}}))
    (example,) = read_foreign(path, form="dynamic_superb")
    assert (example.id, example.audio) == ("SpeechDetection_LJSpeech/a.flac", "a.flac")
    assert (example.task, example.answer) == ("SpeechDetection_LJSpeech", "yes")
    for content, message in (
        ("[]", r"expected an object of rows by clip, got '\['"),
        ('{"a.flac": 1}', "expected an object"),
        ("{", "bad JSON"),
        ('{"a.flac": {}, "a.flac": {}}', "key 'a.flac' twice"),
        ("{1: {}}", "row 1: bad JSON: Expecting a name in quotes at column 2"),
    ):
        path.write_text(content)
        with pytest.raises(ManifestError, match=message):
            read_foreign(path, form="dynamic_superb")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_foreign(tmp_path / "metadata.json", form="dynamic_superb")


def test_mcr_rows_as_published(root):
    row = {"audio": "a.flac", "gt": "sad", "neutral": "Which emotion?", "faithful": "He cried.", "adversarial": "He laughed."}
    examples = _read(root, [{**row, "irrelevant": "It rains."}, row], "mcr_bench").examples
    assert [e.metadata["context_type"] for e in examples] == [*MCR["contexts"], "neutral", "faithful", "adversarial"]
    assert [e.context for e in examples[:4]] == ["", "He cried.", "He laughed.", "It rains."]
    assert {(e.question, e.answer, e.choices) for e in examples} == {("Which emotion?", "sad", ())}
    assert [e.kind for e in examples[:4]] == ["neutral", "aligned", "conflict", "neutral"]
    assert len({e.pair_id for e in examples}) == 2
    manifest = _read(root, [row, {k: v for k, v in row.items() if k != "neutral"}], "mcr_bench", max_bad_fraction=0.5)
    assert [p.reason for p in manifest.problems] == ["missing field 'neutral'"]


@pytest.mark.parametrize("answer", ["B", "sad"])
def test_an_mcr_answer_may_be_a_letter(root, answer):
    example, *_ = _read(root, [{**MCR, "answer": answer}], "mcr_bench")
    assert (example.answer, example.choices) == ("sad", ("happy", "sad"))


def test_mcr_rows_become_one_example_a_context_under_one_pair(root):
    examples = _read(root, [MCR], "mcr_bench").examples
    assert [e.kind for e in examples] == ["neutral", "aligned", "conflict", "neutral"]
    assert {e.pair_id for e in examples} == {"m1"} and len({e.id for e in examples}) == 4
    assert examples[2].context == "He laughed." and examples[3].metadata["context_type"] == "irrelevant"
    single = {
        **{k: v for k, v in MCR.items() if k != "contexts"},
        "context_type": "adversarial",
        "context": "He laughed.",
    }
    (example,) = _read(root, [{**single, "id": "x/3", "pair_id": "x"}], "mcr_bench")
    assert (example.id, example.pair_id, example.kind) == ("x/3", "x", "conflict")


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("desta", "{", "bad JSON"),
        ("desta", {k: v for k, v in DESTA.items() if k != "messages"}, "missing field 'messages'"),
        ("desta", {**DESTA, "messages": "hello"}, "messages: expected a list of objects"),
        ("desta", {**DESTA, "messages": DESTA["messages"] * 2}, "messages: expected one user turn, got 2"),
        ("desta", {**DESTA, "audios": DESTA["audios"] * 2}, "audios: expected one for each mark of a clip, got 2 for 1"),
        ("desta", {**DESTA, "audios": [3]}, "audios: expected a path, got int"),
        ("desta", {**DESTA, "audios": [{"file": "a.flac", "text": "Hi."}]}, "audios: expected a path under one of path, audio"),
        ("desta", {**DESTA, "audios": [None]}, "audios: expected a path, got null"),
        ("desta", {**DESTA, "audios": [{"audio": "../a.flac"}]}, "audio: expected a path inside the audio root"),
        ("desta", {**DESTA, "audios": [{"audio": "/etc/passwd"}]}, "audios: expected a path inside the audio root"),
        ("desta", {**DESTA, "audios": [{"audio": "b.flac"}]}, "audio: missing file"),
        ("dynamic_superb", {k: v for k, v in SUPERB.items() if k != "file"}, "missing field 'audio'"),
        ("dynamic_superb", {**SUPERB, "audio2": "b.flac"}, "audio2: expected one clip, got two"),
        ("dynamic_superb", {**SUPERB, "audio2": {"array": [0.1]}}, "audio2: expected a path, got a clip's samples"),
        ("mcr_bench", {**MCR, "audio": {"path": None, "bytes": "UklG"}}, "audio: expected a path, got a clip's bytes"),
        ("mcr_bench", {**MCR, "answer": "angry"}, "answer: expected one of"),
        ("mcr_bench", {**MCR, "options": "happy or sad"}, "choices: expected a list or an object, got str"),
        ("dynamic_superb", {**SUPERB, "choices": "yes or no"}, "choices: expected a list or an object, got str"),
        ("mcr_bench", {**MCR, "contexts": {"hostile": ""}}, "context_type: expected one of"),
        ("mcr_bench", {**MCR, "contexts": []}, "contexts: expected an object"),
        ("mcr_bench", {**MCR, "answer": ["A"]}, "answer: expected text, got list"),
        ("dynamic_superb", {**SUPERB, "label": None}, "missing field 'label'"),
        ("dynamic_superb", {**SUPERB, "label": ["yes"]}, "label: expected text, got list"),
        ("desta", {**DESTA, "target": {"text": "A."}}, "target: expected text, got dict"),
    ],
)
def test_rows_of_another_shape_are_problems(root, form, row, reason):
    good = {"desta": DESTA, "dynamic_superb": SUPERB, "mcr_bench": MCR}[form]
    manifest = _read(root, [{**good, "id": "good"}, row], form, max_bad_fraction=0.5)
    assert {e.pair_id or e.id for e in manifest} == {"good"}
    (problem,) = manifest.problems
    assert problem.row == 2 and reason in problem.reason


def test_doubles_arrays_absolute_paths_and_limits(root):
    manifest = _read(root, [DESTA, DESTA], "desta", max_bad_fraction=0.5)
    assert [p.reason for p in manifest.problems] == ["duplicate id 'd1', first in row 1"]
    with pytest.raises(ManifestError, match="1 of 2 rows are bad"):
        _read(root, [DESTA, DESTA], "desta")
    absolute = {**DESTA, "audios": [{"audio": str(root / "a.flac")}]}
    (example,) = _read(root, [absolute], "desta")
    assert example.audio == "a.flac"
    (root / "rows.json").write_text(json.dumps([DESTA, DESTA_25], indent=1))
    assert len(read_foreign(root / "rows.json", form="desta")) == 2
    with pytest.raises(ManifestError, match="at least one row"):
        _read(root, [], "desta")
    with pytest.raises(ManifestError, match="row 1: bad JSON: expected an object, got int"):
        _read(root, ["[1]"], "desta")
    with pytest.raises(ValueError, match="form: expected one of"):
        _read(root, [DESTA], "nist")


@given(
    st.from_regex(r"[A-Za-z][A-Za-z ,.?']{0,30}[a-z.?]", fullmatch=True),
    st.integers(0, 600),
    st.integers(1, 29),
    st.from_regex(r"[a-z]{1,10}", fullmatch=True),
)
def test_parse_description_undoes_the_wording_of_stage_1(text, start, length, label):
    example = Example(
        id="a", audio=None, start_seconds=start, end_seconds=start + length, transcription=text,
        metadata={"gender": label, "accent": "Scottish"},
    )  # fmt: skip
    words = " ".join(text.split())
    assert parse_description(describe(example)) == (
        words, {"gender": label, "accent": "Scottish"}, float(start), float(start + length),
    )  # fmt: skip


def test_a_description_keeps_commas_within_values_and_several_segments_together():
    text = "[00:00-00:05] Good luck. (Emotion: sad, slightly tired, Gender: female)"
    assert parse_description(text)[1] == {"emotion": "sad, slightly tired", "gender": "female"}
    assert parse_description("[00:00-00:05] Hi. (Gender: female)\n[00:05-00:09] Hello. (Gender: male)") is None


@given(st.text(max_size=80))
def test_parse_description_never_fails(text):
    parse_description(text)


def test_a_conversion_that_cannot_work_is_found_first(root, capsys):
    rows = root / "rows.jsonl"
    rows.write_text(json.dumps(DESTA))
    for words, message in (
        (["--out", str(rows)], "--out: expected another file than the rows"),
        (["--audio-root", str(root / "none")], "audio_root: expected a folder"),
        (["--max-bad-fraction", "7"], "max_bad_fraction: expected a number from 0 to 1, got 7"),
    ):
        assert main([str(rows), "--form", "desta", "--out", str(root / "m.jsonl"), *words]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(rows), "--form", "desta", "--out", str(root / "m.jsonl"), "--split", "trian"])
    assert json.loads(rows.read_text()) == DESTA and not (root / "m.jsonl").exists()


@pytest.mark.parametrize("flags", [[], ["--streaming"]])
def test_a_conversion_never_writes_over_its_rows(root, capsys, monkeypatch, flags):
    """Whatever the path of --out looks like; the folders of Kaldi and of metadata hold rows too."""
    (root / "rows.jsonl").write_text(json.dumps({"audio": "a.flac", "question": "?"}))
    (root / "sub").mkdir()
    (root / "link.jsonl").symlink_to("rows.jsonl")
    (root / "hard.jsonl").hardlink_to(root / "rows.jsonl")
    (root / "wav.scp").write_text("u1 a.flac\n")
    (root / "text").write_text("u1 Good luck.\n")
    (root / "set").mkdir()
    (root / "set" / "metadata.jsonl").write_text('{"file_name": "a.flac"}\n')
    monkeypatch.chdir(root / "sub")
    for rows, out in (
        (root / "rows.jsonl", "../rows.jsonl"),
        (root / "rows.jsonl", root / "sub" / ".." / "rows.jsonl"),
        (root / "link.jsonl", root / "rows.jsonl"),
        (root / "rows.jsonl", root / "link.jsonl"),
        (root / "rows.jsonl", root / "hard.jsonl"),
        (root, root / "text"),
        (root / "wav.scp", root / "text"),
        (root / "set", root / "set" / "metadata.jsonl"),
    ):
        before = Path(out).read_bytes()
        assert main([str(rows), "--out", str(out), *flags]) == 1
        assert "--out: expected another file than the rows" in capsys.readouterr().err
        assert Path(out).read_bytes() == before


@pytest.mark.parametrize("flags", [[], ["--streaming"]], ids=["whole", "streaming"])
@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_a_file_that_holds_something_else_is_not_written_over(root, capsys, monkeypatch, flags, name):
    rows, out = root / "rows.jsonl", root / name
    rows.write_text(json.dumps(DESTA))
    words = [str(rows), "--out", str(out), *flags]
    out.write_bytes(b"notes")
    with monkeypatch.context() as patched:
        for reader in ("convert.read_foreign", "streaming.ForeignRows"):
            patched.setattr(f"models.data.{reader}", lambda *_, **__: pytest.fail("the rows were read"))
        assert main(words) == 1
    assert capsys.readouterr().err == f"error: {out}: holds no manifest; choose another --out or --overwrite\n"
    assert out.read_bytes() == b"notes"
    assert main([*words, "--overwrite"]) == 0 and [e.id for e in read_manifest(out)] == ["d1"]
    whole = out.read_bytes()
    assert main(words) == 0 and out.read_bytes() == whole  # the same command again
    for more in (json.dumps(DESTA | {"id": "d2"}), json.dumps(DESTA) + "\n" + json.dumps(DESTA | {"id": "d2"})):
        rows.write_text(more)
        (root / f"{name}.part").unlink(missing_ok=True)
        assert main(words) == 1
        told = f"error: {out}: holds other rows or another header than these; choose another --out or --overwrite\n"
        assert capsys.readouterr().err == told and out.read_bytes() == whole
        assert (root / f"{name}.part").exists() == bool(flags) and not list(root.glob(".*.tmp"))
    assert main([*words, "--overwrite"]) == 0 and [e.id for e in read_manifest(out)] == ["d1", "d2"]
    assert not (root / f"{name}.part").exists()
    out.write_bytes(b"")  # an empty file is nothing
    assert main(words) == 0 and len(read_manifest(out)) == 2


def test_command_line_converts_to_a_manifest(root, capsys):
    (root / "rows.jsonl").write_text(json.dumps(DESTA))
    assert main([str(root / "rows.jsonl"), "--form", "desta", "--out", str(root / "m.jsonl"), "--split", "train"]) == 0
    (example,) = read_manifest(root / "m.jsonl")
    assert (example.id, example.split) == ("d1", "train")
    with pytest.raises(SystemExit, match="2"):
        main([str(root / "rows.jsonl"), "--form", "nist", "--out", str(root / "m.jsonl")])
    assert "error: argument --form: invalid choice: 'nist'" in capsys.readouterr().err
