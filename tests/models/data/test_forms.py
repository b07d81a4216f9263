"""Rows as users of other tools have them: found by their form, checked, and read by training as the same examples."""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from models.data import hf_datasets
from models.data.audio import load_audio, write_audio
from models.data.check import main as check
from models.data.check import script_of
from models.data.find_form import find_form
from models.data.manifest import ManifestError
from models.data.readers import read_data, read_foreign
from models.training.recipe import Recipe
from models.training.recipe_sections import DataConfig
from models.training.teacher_states import SourceError
from models.training.training_data import read_examples


@pytest.fixture()
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        write_audio(folder / name, np.full(16_000, 0.1, np.float32))
    return folder


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def swift(audio, question="<audio>Who speaks?", answer="A woman.", **other):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "audios": [audio], **other}


def train_reads(path, **data):
    return read_examples(Recipe(objective="sft", data=DataConfig(manifest=str(path), **data)))[0]


def only(path, row, **options):
    (example,) = read_data(lines(path, [row]), **options).examples
    return example


CUT = {
    "id": "cut-1", "start": 0.25, "duration": 0.5, "channel": 0, "type": "MonoCut",
    "supervisions": [{"id": "s", "recording_id": "r", "start": 0.0, "duration": 0.5, "text": "good luck", "speaker": "JOE",
                      "language": "en", "custom": {"question": "Who speaks?", "answer": "A man."}}],
    "recording": {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "sampling_rate": 16_000,
                  "num_samples": 16_000, "duration": 1.0, "channel_ids": [0]},
}  # fmt: skip
TWO_PARTS = [{"type": "audio", "audio": "a.wav"}, {"type": "audio", "audio": "b.wav"}, {"type": "text", "text": "One voice?"}]


# --- what first users bring -------------------------------------------------------------------------------------------


@pytest.fixture()
def first_rows(root):
    """ms-swift rows about an mp3 that starts amid a frame, a clip of three hours, a link and a good clip; Chinese answers."""
    mp3 = root / "cut.mp3"
    sf.write(mp3, np.sin(np.arange(32_000, dtype=np.float32)), 16_000)
    mp3.write_bytes(mp3.read_bytes()[1000:])
    with sf.SoundFile(root / "long.wav", "w", 4_000, 1, subtype="PCM_U8") as file:
        file.write(np.zeros(4_000 * 3 * 3600, np.float32))
    write_audio(root.parent / "elsewhere.wav", np.zeros(16_000, np.float32))
    os.symlink(root.parent / "elsewhere.wav", root / "link.wav")
    names = ("cut.mp3", "long.wav", "link.wav", "a.wav", "gone.wav")
    rows = [swift(name, "<audio>谁在说话？", "说话的是一位女士。", id=name) for name in names]
    return lines(root / "rows.jsonl", rows)


def test_check_names_what_is_wrong_with_the_rows_of_first_users(first_rows, capsys):
    assert check([str(first_rows)]) == 1
    printed = capsys.readouterr()
    out, error = printed.out, printed.err
    assert "form: messages" in out and "rows: 5, 3 of them bad" in out
    assert {"too long 1", "missing 1", "link that leaves the audio root 1"} <= set(
        out.split("(")[1].split(")")[0].split(", ")
    )
    assert "clips: 2 in 2 files" in out
    assert "Han               2; characters: median 9, 95% 9, longest 9" in out
    assert f"{first_rows}: row 2 (long.wav): audio: too long: 10800.0 s, at most 30 s are allowed" in error
    assert f"{first_rows}: row 3 (link.wav): audio: path leaves the audio root through a link" in error
    assert (
        f"{first_rows}: row 5 (gone.wav): audio: missing file" in error
        and f"{first_rows}: 3 of 5 rows are bad" in error
    )
    assert check([str(first_rows), "--allow-links", "--max-bad-fraction", "0.4"]) == 0
    assert "2 of them bad" in capsys.readouterr().out


def test_training_reads_the_rows_of_first_users(first_rows, root):
    with pytest.raises(SourceError, match=r"3 of 5 rows are bad"):
        train_reads(first_rows)
    examples = train_reads(first_rows, max_bad_fraction=1.0, allow_links=True)
    assert [(e.audio, e.question, e.target) for e in examples] == [
        (name, "谁在说话？", "说话的是一位女士。") for name in ("cut.mp3", "link.wav", "a.wav")
    ]
    assert 1.5 < len(load_audio(root / "cut.mp3")) / 16_000 < 2.2


def test_a_path_of_windows_and_the_folder_of_the_search_are_named(root):
    rows = [swift("clips\\a.wav"), swift("gone.wav")]
    with pytest.raises(SourceError) as caught:
        train_reads(lines(root / "rows.jsonl", rows))
    message = str(caught.value)
    assert "row 1: audio: missing file; a path has / between its folders, this one has \\ (" in message
    assert "row 2: audio: missing file ('gone.wav')" in message
    assert f"clips were looked for in {root}; --audio-root (in a recipe data.audio_root) names another folder" in message


def test_rows_without_a_target_or_a_question_are_counted(root, capsys):
    rows = [{"audio": "a.wav", "question": "Who?", "answer": "a man"}, {"audio": "b.wav", "user_question": "Who?"}]
    path = lines(root / "rows.jsonl", [*rows, {**rows[0], "split": "test"}])
    assert check([str(path)]) == 0
    assert "questions: 1 examples have none" in capsys.readouterr().out
    assert [e.audio for e in train_reads(path)] == ["a.wav"]
    assert f"{path}: 1 of 2 examples have no target and are left out" in capsys.readouterr().out
    assert check([str(lines(root / "whole.jsonl", rows[:1]))]) == 0 and len(train_reads(root / "whole.jsonl")) == 1
    told = capsys.readouterr().out
    assert "questions:" not in told and "left out" not in told


# --- conversations ----------------------------------------------------------------------------------------------------


def test_every_answer_of_a_conversation_is_an_example(root):
    turns = [
        ("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "<audio>\nWho speaks?"),
        ("assistant", "A woman."), ("user", "How old?"), ("assistant", "About forty."),
    ]  # fmt: skip
    row = {
        "id": "c",
        "messages": [{"role": role, "content": text} for role, text in turns],
        "audios": ["a.wav"],
        "speaker": "s1",
    }
    row["messages"][4]["loss"] = False
    first, third = read_data(lines(root / "rows.jsonl", [row])).examples
    assert (first.id, first.audio, first.question, first.target) == ("c/turn-1", None, "Hello.", "Hi.")
    assert (third.id, third.audio, third.question, third.target) == ("c/turn-3", "a.wav", "How old?", "About forty.")
    assert (first.system, first.context) == ("Be brief.", "") and third.system == "Be brief."
    assert third.context.split("\n") == [
        "User: Hello.",
        "Assistant: Hi.",
        "User: Who speaks?",
        "Assistant: A woman.",
    ]
    assert third.metadata == {"speaker": "s1"} and third.answer == third.target and third.target_source == "human"


@pytest.mark.parametrize(("loss", "taught"), [(None, True), (True, True), (1, True), (1.0, True), (False, False), (0, False)])
def test_an_answer_without_loss_is_context_alone(root, loss, taught):
    row = swift("a.wav")
    row["messages"][1]["loss"] = loss
    row["messages"] += [{"role": "user", "content": "How old?"}, {"role": "assistant", "content": "About forty."}]
    examples = read_data(lines(root / "rows.jsonl", [row])).examples
    assert [e.target for e in examples] == [*(["A woman."] if taught else []), "About forty."]
    assert examples[-1].context == "User: Who speaks?\nAssistant: A woman."


@pytest.mark.parametrize(
    "row",
    [
        swift("a.wav"),
        {"conversations": [{"from": "human", "value": "<audio>Who speaks?"}, {"from": "gpt", "value": "A woman."}],
         "audios": ["a.wav"]},
        {"query": "<audio>Who speaks?", "response": "A woman.", "audios": "a.wav"},
        {"instruction": "<audio>", "input": "Who speaks?", "output": "A woman.", "audios": [{"path": "a.wav"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "Who speaks?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "A woman."}]}]},
        {"conversations": [{"from": "User", "value": "a.wav", "type": "audio"},
                           {"from": "User", "value": "Who speaks?", "type": "text"},
                           {"from": "Assistant", "value": "A woman.", "type": "text"}]},
        {"audio_filepath": "a.wav", "duration": 1.0, "question": "Who speaks?", "answer": "A woman."},
        {"audio": "a.wav", "prompt": "Who speaks?", "response": "A woman."},
    ],
)  # fmt: skip
def test_spellings_of_one_row_give_one_example(root, row):
    for path in (lines(root / "rows.jsonl", [row]), root / "rows.json"):
        if path.suffix == ".json":
            path.write_text(json.dumps([row]))
        (example,) = train_reads(path)
        assert (example.audio, example.question, example.target) == ("a.wav", "Who speaks?", "A woman.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**swift("a.wav"), "audios": ["a.wav", "b.wav"]}, "expected one clip for each <audio>, got 2 for 1"),
        ({**swift("a.wav", "<audio><audio>Who?"), "audios": ["a.wav", "b.wav", "a.wav"]}, "got 3 for 2"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], "audios": ["b.wav"]},
            "expected clips there or inside the turns, got 1 and 1",
        ),
        (swift("a.wav", "<audio><audio>Who?"), "expected one clip for each <audio>, got 1 for 2"),
        (swift("a.wav", answer=" "), "expected an answer in turn 2, got an empty one"),
        (swift("a.wav", "Who?", "<audio>"), "expected <audio> in a turn of the user"),
        (swift("https://x.org/a.wav"), "expected a file, got the address"),
        (swift("/nowhere/a.wav"), "--audio-root"),
        (
            {"messages": [{"role": "tool", "content": "x"}], "audios": ["a.wav"]},
            "expected the role system, user or assistant",
        ),
        ({**swift("a.wav"), "images": ["x.png"]}, "only text and audio are read"),
        ({"messages": [{"role": "assistant", "content": "x"}], "audios": ["a.wav"]}, "a turn of the user first"),
        (swift(None), "audios: expected a path, got null"),
        ({"query": "<audio>Who?", "response": "x", "audios": ["a.wav"], "images": ["x.png"]}, "images: expected none, got some"),
        ({"query": "<audio>Who?", "response": "x", "audios": ["a.wav"], "history": [["q", None]]},
         "history: expected text, got null"),
        ({"query": "<audio>Who?", "response": "x", "audios": ["a.wav"], "history": [["q"]]}, "history: expected a list of pairs"),
        ({"query": "<audio>Who?", "response": {"text": "x"}, "audios": ["a.wav"]}, "response: expected text, got dict"),
        (swift("a.wav", [{"type": "text", "text": None}, {"type": "text", "text": "<audio>"}]), "messages: text: expected text"),
        (swift("a.wav", answer=None), "messages: expected text or audio in a turn, got null"),
        (swift("a.wav", task=["gender"]), "task: expected text, got list"),
        ({"audio": "a.wav", "question": "Q", "choices": {"A": "x"}, "answer": ["A"]}, "answer: expected text, got list"),
        ({"audio": "a.wav", "question": "Q", "answer": True}, 'answer: expected text, got the JSON value true, which is not the'),
        ({"audio": "a.wav", "question": "Q", "choices": ["x", None]}, "choices: expected text, got null"),
        ({"audio": "a.wav", "question": "Q", "choices": 3}, "choices: expected a list or an object, got int"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "x", "loss": False}], "audio": "a.wav"},
         'messages: expected an answer to learn, got "loss": false in each'),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "x", "loss": "no"}], "audio": "a.wav"},
         "messages: expected loss to be true or false, got 'no'"),
        ({**CUT, "recording": "r"}, "recording: expected objects"),
        ({**CUT, "supervisions": [{"text": ["x"]}]}, "text: expected text, got list"),
        (swift({"file": "a.wav"}), "audios: expected a path under one of path, audio, audio_filepath,"),
        (swift({"bytes": "UklG", "path": None}), "audios: expected a path, got a clip's bytes"),
        ({**swift("a.wav"), "audios": None}, "expected one clip for each <audio>, got 0 for 1"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "file": "a.wav"}]}, {"role": "assistant", "content": "x"}]},
         "messages: expected a path under one of path"),
        ({"messages": [{"role": "user", "content": "<audio><audio>Who?"}, {"role": "user", "content": TWO_PARTS[:1]},
                       {"role": "assistant", "content": "x"}]}, "expected one clip for each <audio>, got 1 for 2"),
        ({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": TWO_PARTS[1:]}]},
         "messages: expected <audio> in a turn of the user, got it in an answer"),
        ({"audio": {"array": [0.1]}, "question": "Who?"}, "audio: expected a path, got a clip's samples"),
        ({"audio": {"bytes": "UklG", "path": None}, "question": "Who?"}, "audio: expected a path, got a clip's bytes"),
        ({"audio": None, "question": "<audio>Who?"}, "audio: expected a clip for the <audio> of the question, got null"),
        ({"audio": "a.wav", "more_audio": [None]}, "more_audio: expected a path, got null"),
        ({**CUT, "recording": {**CUT["recording"], "sources": [{"type": "file", "source": None}]}},
         "source: expected a path, got null"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_one_example_says_why(root, row, message):
    (problem,) = read_data(lines(root / "rows.jsonl", [row]), max_bad_fraction=1.0).problems
    assert message in problem.reason


@pytest.mark.parametrize(
    "row",
    [
        {**swift("", "<audio>\n<audio>One voice?"), "audios": ["a.wav", "b.wav"]},
        {**swift("", "One voice?"), "audios": [{"path": "a.wav"}, {"path": "b.wav"}]},
        {"query": "<audio><audio>One voice?", "response": "Yes.", "audios": ["a.wav", "b.wav"]},
        {"messages": [{"role": "user", "content": TWO_PARTS}, {"role": "assistant", "content": "Yes."}]},
        {"messages": [{"role": "system", "content": "<audio> Compare."}, {"role": "user", "content": "<audio>One voice?"},
                      {"role": "assistant", "content": "Yes."}], "audios": ["a.wav", "b.wav"]},
        {"messages": [{"role": "system", "content": TWO_PARTS[:1]}, {"role": "user", "content": TWO_PARTS[1:]},
                      {"role": "assistant", "content": "Yes."}]},
        {**swift("", "<audio><audio>One voice?"), "audios": None, "audio": ["a.wav", "b.wav"]},
        {**swift("", "One voice?"), "audios": [], "audio": ["a.wav", "b.wav"]},
    ],
)  # fmt: skip
def test_a_question_may_have_two_clips(root, row):
    example = only(root / "rows.jsonl", row)
    assert (example.audio, example.more_audio, example.question) == ("a.wav", ("b.wav",), "One voice?")


@pytest.mark.parametrize(
    ("answer", "beside", "label"),
    [
        ("A woman.", {"choices": ["man", "woman"]}, "woman"),
        ("woman", {"choices": ["man", "woman"], "answer": "woman"}, "woman"),
        ("She is one.", {"options": ["man", "woman"], "answer": "woman"}, "woman"),
        ("B", {"choices": {"A": "man", "B": "woman"}}, "woman"),
        ("The speaker is a woman.", {"answer": "woman"}, "woman"),
        ("A woman.", {"choices": None, "answer": ""}, "A woman."),
    ],
)
def test_choices_and_the_label_beside_messages_are_kept(root, answer, beside, label):
    example = only(root / "rows.jsonl", swift("a.wav", answer=answer) | beside)
    choices = ("man", "woman") if beside.get("choices") or "options" in beside else ()
    assert (example.choices, example.answer, example.target) == (choices, label, answer)


def test_an_unanswered_question_takes_the_label_beside_it(root):
    row = {"messages": [{"role": "user", "content": "<audio>Who?"}], "audios": ["a.wav"], "choices": ["man", "woman"]}
    example = only(root / "rows.jsonl", row)
    assert (example.choices, example.answer, example.target) == (("man", "woman"), None, None)
    example = only(root / "rows.jsonl", row | {"answer": "man"})
    assert (example.choices, example.answer, example.target) == (("man", "woman"), "man", "man")
    example = only(root / "rows.jsonl", row | {"answer": "man", "target": "A man."}, form="desta")
    assert (example.choices, example.answer, example.target) == (("man", "woman"), "man", "A man.")


def test_choices_beside_messages_that_cannot_be_kept_are_named(root):
    more = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "A man."}]
    two = swift("a.wav")
    two["messages"] += more
    rows = [
        swift("a.wav", answer="A child.", choices=["man", "woman"]),
        swift("a.wav", answer="A man or a woman.", choices=["man", "woman"]),
        swift("a.wav", answer="A man.", choices=["man", "woman"]) | {"answer": "child"},
        two | {"choices": ["man", "woman"]},
        two | {"answer": "man"},
    ]
    problems = read_data(lines(root / "rows.jsonl", rows), max_bad_fraction=1.0).problems
    named = "choices: expected an answer that names one of ['man', 'woman'], or answer beside them, got "
    assert [p.reason for p in problems] == [
        f"{named}'A child.', which names none",
        f"{named}'A man or a woman.', which names 'man' and 'woman'",
        "answer: expected one of ['man', 'woman'], got 'child'",
        "choices: expected one answer to learn in messages beside it, got 2",
        "answer: expected one answer to learn in messages beside it, got 2",
    ]


def test_a_row_of_messages_without_any_is_no_question(root):
    path = lines(root / "rows.jsonl", [swift("a.wav", id="1"), {"id": "2", "messages": None, "audios": ["a.wav"]}])
    (problem,) = read_data(path, max_bad_fraction=0.5).problems
    assert str(problem) == f"{path}: row 2 (2): messages: expected these, or conversations, query or instruction, got none"


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({"messages": None, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
          "audio": "a.wav"}, "A"),
        ({"query": None, "instruction": "Q", "input": "", "output": 0, "audio": "a.wav"}, "0"),
        ({"query": "<audio>Q", "response": 0, "audios": ["a.wav"], "history": None, "system": None}, "0"),
        ({"query": "<audio>Q", "response": 1, "audios": None, "audio": "a.wav"}, "1"),
        ({"messages": [{"role": "user", "content": "<audio>Q"}], "audios": ["a.wav"], "response": None, "target": "T"}, "T"),
        ({"messages": [{"role": "user", "content": "Q"}], "audio": "a.wav", "target": "T"}, "T"),
        (swift("a.wav", "<audio>Q", "A", task=None, dataset=None, split=None, transcription=None), "A"),
        ({"audio": "a.wav", "question": "Q", "target": None, "answer": 0, "choices": None}, "0"),
        ({"audio": "a.wav", "question": "Q", "choices": {"A": 1, "B": 2}, "answer": "B"}, "2"),
        ({"audio_filepath": "a.wav", "question": "Q", "answer": "A", "duration": None, "text": None}, "A"),
        ({**CUT, "supervisions": [{"start": None, "text": "t", "custom": {"text": None, "question": "Q", "answer": 0}}],
          "custom": None, "id": "1/a.wav"}, "0"),
    ],
)  # fmt: skip
def test_null_is_absent_and_zero_is_an_answer(root, row, target):
    example = only(root / "rows.jsonl", {"id": None, **row})
    assert (example.id, example.audio, example.question, example.target) == ("1/a.wav", "a.wav", "Q", target)
    assert (example.task, example.split, example.system) == ("", "train", "")
    assert example.transcription == ("t" if "recording" in row else "")


def test_a_system_turn_does_not_part_a_question_from_its_answer(root):
    turns = [("user", "<audio>Q1"), ("system", "S1"), ("user", "Q2"), ("assistant", "A1"), ("system", "S2"), ("user", "Q3"),
             ("assistant", "A3")]  # fmt: skip
    for count, expected in ((4, [("Q1\nQ2", "A1")]), (7, [("Q1\nQ2", "A1"), ("Q3", "A3")])):
        messages = [{"role": role, "content": text} for role, text in turns[:count]]
        examples = read_data(lines(root / "rows.jsonl", [{"messages": messages, "audios": ["a.wav"]}])).examples
        assert [(e.question, e.target) for e in examples] == expected
        assert {e.system for e in examples} == {"S1" if count == 4 else "S1\nS2"}


def test_a_later_question_of_a_conversation_is_about_all_clips_so_far(root):
    turns = ["<audio>Who speaks?", "A woman.", "And here? <audio>", "A man.", "Who is louder?", "The man."]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    examples = read_data(lines(root / "rows.jsonl", [{"messages": messages, "audios": ["a.wav", "b.wav"]}])).examples
    assert [(e.audio, e.more_audio) for e in examples] == [("a.wav", ()), ("a.wav", ("b.wav",)), ("a.wav", ("b.wav",))]
    assert [e.question for e in examples] == ["Who speaks?", "And here?", "Who is louder?"]


def test_a_row_whose_clips_and_marks_differ_in_number_is_named_with_its_file(root, capsys):
    path = lines(root / "rows.jsonl", [swift("a.wav", id="good"), {**swift("", id="bad"), "audios": ["a.wav", "b.wav"]}])
    assert check([str(path)]) == 1
    assert f"{path}: row 2 (bad): audios: expected one clip for each <audio>, got 2 for 1" in capsys.readouterr().err
    with pytest.raises(ManifestError) as caught:
        read_data(path)
    assert str(path) in str(caught.value) and "row 2 (bad): audios: expected one clip" in str(caught.value)


def test_a_row_of_columns_says_that_it_has_no_clip(root):
    row = {"question": "Who speaks?", "answer": "A woman."}
    assert only(root / "rows.jsonl", {**row, "audio": None}).audio is None
    path = lines(root / "rows.jsonl", [{**row, "audio": "a.wav"}, {**row, "adio": "b.wav"}])
    (problem,) = read_data(path, max_bad_fraction=0.5).problems
    assert problem.row == 2 and problem.reason.startswith("audio: expected a clip under this name or one of audio_filepath,")


def test_absolute_paths_need_a_root_above_them(root, tmp_path):
    rows = lines(tmp_path / "rows.jsonl", [swift(str(root / "a.wav"))])
    assert [e.audio for e in read_data(rows)] == ["data/a.wav"]
    assert [e.audio for e in read_data(rows, audio_root=root)] == ["a.wav"]


# --- manifests of speech recognition ------------------------------------------------------------------------------------


def test_nemo_rows_are_spans(root):
    row = {"audio_filepath": "a.wav", "offset": 0.25, "duration": 0.5, "text": "good luck", "lang": "en"}
    example = only(root / "rows.jsonl", row)
    assert (example.start_seconds, example.end_seconds, example.transcription) == (0.25, 0.75, "good luck")
    assert example.target is None and example.metadata == {"lang": "en"}
    (problem,) = read_data(lines(root / "rows.jsonl", [{**row, "offset": 0.9}]), max_bad_fraction=1.0).problems
    assert problem.reason == "audio: span ends at 1.4 s, the clip ends at 1.00 s ('a.wav')"


@pytest.mark.parametrize("duration", [0, 0.0, -1])
def test_a_span_of_no_length_is_not_the_whole_file(root, duration):
    nemo = {"audio_filepath": "a.wav", "text": "good luck"}
    manifest = read_data(lines(root / "rows.jsonl", [nemo, nemo | {"duration": duration}]), max_bad_fraction=0.5)
    assert [(e.start_seconds, e.end_seconds) for e in manifest] == [(0.0, None)]
    named = f"{root / 'rows.jsonl'}: row 2: duration: expected seconds above 0, got {duration:g}"
    assert [str(p) for p in manifest.problems] == [named]
    silent = CUT | {"id": "cut-2", "start": 0, "duration": duration, "recording": CUT["recording"] | {"duration": duration}}
    manifest = read_data(lines(root / "cuts.jsonl", [CUT, silent]), max_bad_fraction=0.5)
    assert [p.reason for p in manifest.problems] == [f"duration: expected seconds above 0, got {duration:g}"]


def test_lhotse_cuts(root):
    with gzip.open(root / "cuts.jsonl.gz", "wt") as file:
        file.write(json.dumps(CUT) + "\n")
    (example,) = read_data(root / "cuts.jsonl.gz").examples
    assert (example.id, example.audio, example.start_seconds, example.end_seconds) == ("cut-1", "a.wav", 0.25, 0.75)
    assert (example.transcription, example.question, example.target) == ("good luck", "Who speaks?", "A man.")
    assert example.metadata == {"speaker": "JOE", "language": "en"}
    (root / "cuts.jsonl.gz").write_bytes((root / "cuts.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ManifestError, match="cannot be read"):
        read_data(root / "cuts.jsonl.gz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "MixedCut"}, "expected MonoCut, got MixedCut; CutSet.save_audios"),
        ({"recording": {**CUT["recording"], "transforms": [{"name": "Speed"}]}}, "expected none of transforms"),
        (
            {"recording": {**CUT["recording"], "sources": [{"type": "command", "source": "cat a.wav"}]}},
            "no command is run",
        ),
    ],
)
def test_cuts_that_are_no_span_of_a_file_say_why(root, change, message):
    (problem,) = read_data(lines(root / "cuts.jsonl", [{**CUT, **change}]), max_bad_fraction=1.0).problems
    assert message in problem.reason


def test_kaldi_folders(root, tmp_path):
    (root / "wav.scp").write_text(f"u1 {root}/a.wav\nu2 b.wav\nu3 touch {tmp_path}/ran |\nu4 x.ark:17\n")
    (root / "text").write_text("u1 good luck\nu2 你好\n", encoding="utf-8")
    (root / "utt2spk").write_text("u1 JOE\n")
    manifest = read_data(root, max_bad_fraction=1.0)
    assert [(e.id, e.audio, e.transcription) for e in manifest] == [
        ("u1", "a.wav", "good luck"),
        ("u2", "b.wav", "你好"),
    ]
    assert manifest.examples[0].metadata == {"speaker": "JOE"}
    assert [p.row for p in manifest.problems] == [3, 4] and "no command is run" in manifest.problems[0].reason
    assert not (tmp_path / "ran").exists()
    (root / "wav.scp").write_text("r1 a.wav\n")
    (root / "segments").write_text("u1 r1 0.25 0.75\n")
    (example,) = read_data(root / "wav.scp").examples
    assert (example.start_seconds, example.end_seconds, example.transcription) == (0.25, 0.75, "good luck")


# --- data sets of the package datasets -----------------------------------------------------------------------------------


def test_without_the_package_the_error_names_the_command(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (root / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ManifestError, match=r'pip install "datasets>=3"'):
        read_data(root / "rows.parquet")


class _Audio:
    def __init__(self, decode=True):
        self.decode = decode


class _Labels:
    names = ("man", "woman")

    def int2str(self, number):
        return self.names[number]


class _Split(list):
    """Rows as `datasets` hands them out; a clip that would be decoded raises an error."""

    features = None

    def cast_column(self, name, feature):
        made = _Split(list.__iter__(self))
        made.features = {**self.features, name: feature}
        return made

    def __iter__(self):
        assert not any(isinstance(f, _Audio) and f.decode for f in self.features.values()), "the clip would be decoded"
        return super().__iter__()


def test_clips_inside_a_data_set_become_files_once(root, tmp_path, monkeypatch):
    """The rows of a stand-in for `datasets`, which the fast tests do without."""
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    data = (root / "a.wav").read_bytes()
    rows = _Split(
        {"audio": {"bytes": data, "path": f"{n}.wav"}, "question": "Who?", "answer": n % 2, "text": None}
        for n in range(2)
    )
    rows.append({"audio": None, "question": "Why?", "answer": 0, "text": None})
    rows.features = {"audio": _Audio(), "answer": _Labels()}
    module = types.SimpleNamespace(Audio=_Audio, load_from_disk=lambda path: {"validation": rows})
    monkeypatch.setitem(sys.modules, "datasets", module)
    (root / "dataset_dict.json").write_text("{}")
    manifest = read_data(root)
    assert [(e.answer, e.split) for e in manifest] == [("man", "dev"), ("woman", "dev"), ("man", "dev")]
    (file,) = [path for path in (tmp_path / "cache" / "clips").rglob("*") if path.is_file()]
    assert file.read_bytes() == data and {manifest.audio_path(e) for e in manifest} == {file, None}


def test_the_clips_of_a_data_set_that_begins_with_text_become_files_in_the_cache(root, tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    rows = _Split([{"audio": None, "question": "Why?", "answer": "no"}] * 2)
    rows.append({"audio": {"bytes": (root / "a.wav").read_bytes(), "path": "a.wav"}, "question": "Who?", "answer": "man"})
    rows.features = {}
    module = types.SimpleNamespace(Audio=_Audio, load_from_disk=lambda path: rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    manifest = read_data(folder)
    assert [e.answer for e in manifest] == ["no", "no", "man"]
    assert [path.name for path in folder.iterdir()] == ["state.json"]  # nothing is written beside the user's rows
    assert manifest.audio_path(manifest.examples[2]).is_relative_to(tmp_path / "cache" / "clips")


@pytest.mark.parametrize(
    ("shard", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("validation-00000-of-00001.parquet", "dev"),
        ("val.parquet", "dev"),
        ("my_test.parquet", "test"),
        ("default/test/0000.parquet", "test"),
        ("default/validation/0000.parquet", "dev"),
        ("en/train/test-0.parquet", "test"),
        ("valid/shard-000.tar", "dev"),
        ("testimony.parquet", None),
        ("data/0000.parquet", None),
    ],
)
def test_a_shard_is_of_the_split_that_its_name_or_folder_says(shard, split):
    assert hf_datasets._split_of(Path(shard)) == split


@pytest.mark.slow
def test_shards_in_folders_of_splits(root, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    for name in ("default/train/0000", "default/test/0000", "default/validation/0000", "other/0000"):
        path = tmp_path / "hub" / f"{name}.parquet"
        path.parent.mkdir(parents=True)
        columns = {"audio": [{"bytes": (root / "a.wav").read_bytes(), "path": "a.wav"}], "question": [name], "answer": ["x"]}
        datasets.Dataset.from_dict(columns).to_parquet(str(path))
    for given, unnamed in ((None, "train"), ("test", "test")):
        found = {e.question.split("/")[-2]: e.split for e in read_foreign(tmp_path / "hub", form="auto", split=given)}
        assert found == {"train": "train", "test": "test", "validation": "dev", "other": unnamed}


@pytest.mark.slow
def test_data_sets_of_the_real_package(root, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    clips = [{"bytes": (root / name).read_bytes(), "path": name} for name in ("a.wav", "b.wav")]
    made = datasets.Dataset.from_dict({"audio": clips, "question": ["Who?", "Who?"], "answer": [0, 1]})
    made = made.cast_column("answer", datasets.ClassLabel(names=["man", "woman"])).cast_column(
        "audio", datasets.Audio()
    )
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "train.parquet"))
    folder = root / "train"
    folder.mkdir()
    (root / "a.wav").rename(folder / "a.wav")
    lines(folder / "metadata.jsonl", [{"file_name": "a.wav", "question": "Who?", "answer": "man"}])
    (root / "b.wav").unlink()
    for path, answers in (
        (tmp_path / "saved", ["man", "woman"]),
        (tmp_path / "train.parquet", ["man", "woman"]),
        (root, ["man"]),
    ):
        manifest = read_data(path)
        assert [e.answer for e in manifest] == answers and manifest.problems == [], path
        assert all(len(load_audio(manifest.audio_path(e))) == 16_000 for e in manifest)
    assert manifest.examples[0].audio == "train/a.wav"


# --- which form, and what check counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"kdkernels_manifest": 1}, "manifest"),
        (swift("a.wav"), "messages"),
        (
            {"messages": [{"role": "user", "content": "x"}], "audios": [{"audio_filepath": "a"}], "response": "y"},
            "desta",
        ),
        (CUT, "lhotse"),
        ({"audio_filepath": "a.wav", "text": "x"}, "nemo"),
        ({"file": "a.wav", "instruction": "x", "label": "y"}, "dynamic_superb"),
        ({"audio": "a.wav", "gt": "x", "neutral": "y"}, "mcr_bench"),
        ({"audio": "a.wav", "question": "x", "answer": "y", "options": ["y", "z"]}, "columns"),
    ],
)
def test_the_form_is_found(tmp_path, row, form):
    assert find_form(lines(tmp_path / "rows.jsonl", [row])) == form


def test_an_unknown_form_is_an_error_that_names_all(tmp_path, root):
    with pytest.raises(ManifestError, match="names one of desta, messages, columns"):
        read_data(lines(tmp_path / "rows.jsonl", [{"x": 1}]))
    with pytest.raises(ManifestError, match=r"got rows of a manifest without that line; write it before them, .*--form columns"):
        read_data(lines(tmp_path / "rows.jsonl", [{"id": "1", "audio": "a.wav", "question": "x"}]))
    assert (
        train_reads(lines(root / "rows.jsonl", [{"id": "1", "audio": "a.wav", "target": "x"}]), form="columns")[
            0
        ].target
        == "x"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(swift("a.wav")).encode("utf-16"), "got row 1: not UTF-8 at byte 0"),
        ((json.dumps(swift("a.wav")) + ",\n").encode() * 2, r"got row 1: bad JSON: Extra data at column \d+; a file of rows is"),
        (json.dumps(swift("a.wav"), indent=1).encode(), r"got row 1: bad JSON: .*one JSON object a line or one JSON array"),
        (b"audio,question\na.wav,Who?\n", "got row 1: bad JSON: Expecting value at column 1"),
        (b'{"x": 1}\n{"x"}\n', "got rows with the keys x; row 2: bad JSON"),
        (b"[]", "got no row"),
        (b" \n", "got no row"),
        (b"", "got an empty file"),
        (b"[" + json.dumps(swift("a.wav")).encode() + b",\n {'x': 1}]", r"rows.jsonl: row 2: bad JSON: .* at line 2, column 3"),
        (b"[" + json.dumps(swift("a.wav")).encode() + b",\n]", r"rows.jsonl: row 2: bad JSON: .* at line (1|2), column \d+"),
        (b"[" + json.dumps(swift("a.wav")).encode() + b"\n] x", r"rows.jsonl: row 1: bad JSON: Extra data at line 2, column 3"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(root, content, message):
    (root / "rows.jsonl").write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_data(root / "rows.jsonl")


def test_an_array_may_be_one_long_line(root, capsys):
    rows = [swift("a.wav", id=str(n), dataset="x" * 600) for n in range(2000)]
    for name, options in (("rows.json", {}), ("rows.json.gz", {"form": "messages"})):
        data = b"\xef\xbb\xbf\n " + json.dumps(rows).encode()
        assert len(data) > 1 << 20
        (root / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert [e.id for e in read_data(root / name, **options)] == [row["id"] for row in rows]


def test_bad_elements_of_an_array_are_bad_rows_as_in_lines(root):
    good = swift("a.wav")
    texts = [json.dumps(good), json.dumps({**good, "age": float("nan")}), "null", "[1]", '{"x": 1, "x": 2}', json.dumps(good)]
    found = []
    for name, text in (("rows.json", f"[{', '.join(texts)}]"), ("rows.jsonl", "\n".join(texts))):
        (root / name).write_text(text)
        manifest = read_data(root / name, max_bad_fraction=1.0)
        found.append([str(problem).removeprefix(f"{root / name}: ") for problem in manifest.problems])
        assert [e.id for e in manifest] == ["1/a.wav", "6/a.wav"]
    assert found[0] == found[1] == [
        "row 2: bad JSON: NaN is not a number",
        "row 3: bad JSON: expected an object, got NoneType",
        "row 4: bad JSON: expected an object, got list",
        "row 5: bad JSON: key 'x' twice",
    ]


def test_check_counts_duplicates_splits_and_scripts(root, capsys):
    rows = [
        swift("a.wav", id="1"),
        swift("a.wav", id="2"),
        swift("a.wav", "<audio>Who else?", "아무도", id="3", split="test"),
    ]
    pair = {"audio": "a.wav", "more_audio": ["b.wav"], "question": "Is it one speaker?", "answer": "no"}
    assert check([str(lines(root / "rows.jsonl", rows)), "--form", "messages"]) == 0
    out = capsys.readouterr().out
    assert "duplicates: 1 examples ask the same question about the same clip again" in out
    assert "1 files stand in several splits: a.wav (test+train)" in out
    assert "Latin             2" in out and "Hangul            1" in out
    assert check([str(lines(root / "pair.jsonl", [pair, {**pair, "more_audio": []}, pair]))]) == 0
    out = capsys.readouterr().out
    assert "clips: 2 in 2 files" in out and "duplicates: 1 examples" in out
    with pytest.raises(ManifestError, match="more_audio: expected a list of paths, got str"):
        read_data(lines(root / "pair.jsonl", [{**pair, "more_audio": "b.wav"}]))


def test_script_of_a_text():
    assert [script_of(text) for text in ("A woman.", "女士", "Это он", "3 4!")] == ["Latin", "Han", "Cyrillic", "-"]
