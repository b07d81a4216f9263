"""The manifest: what is written reads back; each kind of bad row is skipped and named; too many stop the run."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.data.audio import write_audio
from models.data.check import main
from models.data.manifest import Example, ManifestError, read_manifest, write_manifest

REPOSITORY = Path(__file__).parents[3]
GOOD = {"id": "good", "audio": "a.flac", "choices": ["man", "woman"], "answer": "man"}


@pytest.fixture()
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_audio(folder / "a.flac", np.zeros(16_000, np.float32) + 0.1)
    write_audio(tmp_path / "outside.flac", np.zeros(16_000, np.float32) + 0.1)
    return folder


def _write(root, lines, *, header='{"kdkernels_manifest": 1}') -> Path:
    path = root / "manifest.jsonl"
    encoded = [line if isinstance(line, bytes) else line.encode() for line in [header, *lines]]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def _problem(root, line, **options):
    """The one problem of a manifest that holds a good row and `line`."""
    manifest = read_manifest(_write(root, [json.dumps(GOOD), line]), max_bad_fraction=0.5, **options)
    assert [example.id for example in manifest] == ["good"]
    (problem,) = manifest.problems
    assert problem.row == 3
    return problem


def _row(**fields) -> str:
    return json.dumps({**GOOD, "id": "bad", **fields})


def test_written_manifests_read_back_equal(root):
    examples = [
        Example(
            id="x/1",
            audio="a.flac",
            start_seconds=0.25,
            end_seconds=0.75,
            transcription="Où est-il?\u2028 “Here”",
            metadata={"gender": "man", "snr_db": -3.5, "words": ["a", None]},
            task="gender",
            context="Note: the speaker is a woman.",
            question="?",
            choices=("man", "woman"),
            answer="man",
            target="The speaker is a man.",
            target_source="template",
            split="test",
            kind="conflict",
            pair_id="x",
        ),
        Example(id="x/2", audio=None),
    ]
    path = write_manifest(root / "m.jsonl", examples, header={"sources": ["queen"]})
    manifest = read_manifest(path)
    assert manifest.examples == examples and manifest.problems == []
    assert manifest.header == {"sources": ["queen"], "kdkernels_manifest": 1}
    assert manifest.audio_path(examples[0]) == root / "a.flac" and manifest.audio_path(examples[1]) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "bad", ', "bad JSON: .* at column"),
        ("[1, 2]", "bad JSON: expected an object, got list"),
        ('{"id": "bad", "audio": null, "id": "worse"}', "bad JSON: key 'id' twice"),
        ('{"id": "bad", "audio": null, "start_seconds": NaN}', "bad JSON: NaN is not a number"),
        ('{"id": "bad", "audio": null, "metadata": {"snr_db": Infinity}}', "bad JSON: Infinity"),
        ('{"id": "bad", "audio": null, "metadata": {"snr_db": 1e999}}', "bad JSON: 1e999 is too large a number"),
        ('{"id": "bad", "audio": null, "start_seconds": 1' + "0" * 400 + "}", "is too large a number"),
        ('{"id": "bad", "audio": null, "start_seconds": ' + "9" * 5000 + "}", "is too large a number"),
        ("[" * 100_000, "bad JSON: nested too deeply"),
        (b'{"id": "b\xff"}', "not UTF-8 at byte 9"),
        (b'{"id": "' + b"x" * (1 << 20) + b'"}', "line longer than 1048576 bytes"),
        ('{"audio": "a.flac"}', "missing field 'id'"),
        ('{"id": "bad", "audio": null, "more_audio": ["b.flac"]}', "more_audio: expected none without audio"),
        ('{"id": "bad", "audio": "a.flac", "more_audio": "b.flac"}', "more_audio: expected a list of paths, got str"),
        ('{"id": "bad", "audio": "a.flac", "more_audio": ["../b.flac"]}', "more_audio: expected a path inside the audio root"),
        ('{"id": "bad"}', "missing field 'audio'"),
        (_row(transcripton="x"), "unknown field 'transcripton', did you mean 'transcription'"),
        (_row(zzz=1), "unknown field 'zzz'$"),
        (_row(id="good"), "duplicate id 'good', first in row 2"),
        (_row(id=7), "id: expected a string, got int"),
        (_row(id=" "), "id: expected a name"),
        (_row(question="\ud800"), "question: expected text, got half of a surrogate pair"),
        (_row(transcription=None), "transcription: expected a string, got NoneType"),
        (_row(transcription="hi <|audio|>"), "transcription: expected plain text, got the audio placeholder"),
        (_row(metadata=[]), "metadata: expected an object, got list"),
        (_row(choices="man"), "choices: expected a list of strings, got str"),
        (_row(choices=["man", 3]), "choices: expected a string, got int"),
        (_row(choices=["man", "man."]), r"choices: 'man' and 'man\.' cannot be told apart in an answer"),
        (_row(choices=["man", ""]), "choices: expected labels, got an empty string"),
        (_row(answer="child"), r"answer: expected one of \['man', 'woman'\], got 'child'"),
        (_row(split="tset"), "split: expected one of .*, got 'tset', did you mean 'test'"),
        (_row(kind="faithful"), "kind: expected one of .*, got 'faithful'"),
        (_row(target_source="gpt"), "target_source: expected one of"),
        (_row(start_seconds=-1), "start_seconds: expected a finite number from 0, got -1"),
        (_row(start_seconds=True), "start_seconds: expected a number of seconds, got bool"),
        (_row(start_seconds=0.5, end_seconds=0.5), "end_seconds: expected more than start_seconds 0.5, got 0.5"),
        (_row(start_seconds=0.5, end_seconds=0.1), "end_seconds: expected more"),
        (_row(start_seconds=5), "audio: span starts at 5 s"),
        (_row(end_seconds=9), "audio: span ends at 9 s"),
        (_row(audio="../outside.flac"), "audio: expected a path inside the audio root, got '../outside.flac'"),
        (_row(audio="x/../../outside.flac"), "audio: expected a path inside the audio root"),
        (_row(audio="..\\outside.flac"), "audio: expected a path inside the audio root"),
        (_row(audio="/etc/passwd"), "audio: expected a path inside the audio root, got '/etc/passwd'"),
        (_row(audio="C:/a.flac"), "audio: expected a path inside the audio root"),
        (_row(audio="a\0.flac"), "audio: expected a relative path"),
        (_row(audio=""), "audio: expected a relative path or null"),
        (_row(audio="no.flac"), "audio: missing file"),
        (_row(audio="x" * 5000), "audio: "),
    ],
)
def test_each_kind_of_bad_row_is_skipped_and_named(root, line, reason):
    problem = _problem(root, line)
    assert re.search(reason, problem.reason), problem.reason
    assert "\n" not in problem.reason and len(problem.reason) < 6000


def test_audio_reached_through_a_link_out_of_the_root_is_refused(root):
    os.symlink(root.parent / "outside.flac", root / "link.flac")
    os.symlink(root.parent, root / "folder")
    os.symlink(root / "loop.flac", root / "loop.flac")
    assert "leaves the audio root through a link" in _problem(root, _row(audio="link.flac")).reason
    assert "leaves the audio root through a link" in _problem(root, _row(audio="folder/outside.flac")).reason
    assert "audio: " in _problem(root, _row(audio="loop.flac")).reason


def test_links_out_of_the_root_may_be_allowed(root, capsys):
    """The snapshot of a hub's cache: every clip is a link into a folder of blobs beside it."""
    os.symlink(root.parent / "outside.flac", root / "link.flac")
    os.symlink(root.parent / "gone.flac", root / "dangling.flac")
    rows = [json.dumps(GOOD), json.dumps({**GOOD, "id": "link", "audio": "link.flac"}), _row(audio="dangling.flac")]
    path = _write(root, rows)
    manifest = read_manifest(path, allow_links=True, max_bad_fraction=0.5)
    assert [example.id for example in manifest] == ["good", "link"]
    assert [problem.reason for problem in manifest.problems] == ["audio: missing file ('dangling.flac')"]
    assert main([str(path), "--max-bad-fraction", "0.5", "--allow-links"]) == 0
    assert "2 examples, 1 rows skipped" in capsys.readouterr().out
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("--allow-links (in Python allow_links=True, in a recipe data.allow_links=true) permits that") == 2


def test_check_lists_all_bad_rows_where_this_is_asked_for(root, capsys):
    path = _write(root, [json.dumps(GOOD), *(_row(id=f"bad{n}", audio="gone.flac") for n in range(30))])
    assert main([str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "  ... and 10 more; --all lists them" and "bad20" not in printed.err
    assert "rows: 31, 30 of them bad" in printed.out and "1 examples, 30 rows skipped" in printed.out
    assert main([str(path), "--all"]) == 1
    lines = capsys.readouterr().err.splitlines()
    reason = "audio: missing file ('gone.flac')"
    assert lines[1:] == [f"  {path}: row {n + 3} (bad{n}): {reason}" for n in range(30)]


def test_the_header_may_name_the_audio_root(root, tmp_path):
    for named in ("../data", str(root), "../data/."):
        elsewhere = tmp_path / "lists" / "m.jsonl"
        write_manifest(elsewhere, [Example(id="a", audio="a.flac")], header={"audio_root": named, "seed": 1})
        manifest = read_manifest(elsewhere)
        assert manifest.audio_path(manifest.examples[0]).resolve() == root / "a.flac"
    other = tmp_path / "other"
    other.mkdir()
    assert len(read_manifest(elsewhere, audio_root=other, max_bad_fraction=1.0).problems) == 1  # what the caller says counts
    for named, message in (("../nowhere", "expected a folder of audio, got"), (3, "expected a folder as 'audio_root'")):
        write_manifest(elsewhere, [Example(id="a", audio="a.flac")], header={"audio_root": named})
        with pytest.raises(ManifestError, match=message):
            read_manifest(elsewhere)


def test_check_says_what_is_wrong_with_a_clip(root, capsys):
    write_audio(root / "long.flac", np.zeros(16_000 * 31, np.float32))
    (root / "text.mkv").write_text("This is no sound.")
    write_audio(root / "short.wav", np.ones(2), sample_rate=96_000)
    rows = [_row(id=name, audio=name) for name in ("long.flac", "text.mkv", "short.wav")]
    path = _write(root, [json.dumps(GOOD), *rows, json.dumps({**GOOD, "id": "twice", "choices": ["man", "man", "woman"]})])
    assert main([str(path), "--max-bad-fraction", "0.6"]) == 0
    out = capsys.readouterr().out
    assert "3 of them bad (" in out and "too short 1" in out and "row 5 (short.wav): audio: too short: 2.1e-05 s" in out
    assert "row 3 (long.flac): audio: too long: 31.0 s, at most 30 s are allowed" in out
    assert "row 4 (text.mkv): audio: " in out and "2 examples, 3 rows skipped" in out


def test_a_link_inside_the_root_is_fine(root):
    os.symlink(root / "a.flac", root / "link.flac")
    manifest = read_manifest(_write(root, [json.dumps({**GOOD, "audio": "link.flac"})]))
    assert len(manifest) == 1


def test_too_long_is_decided_by_the_span(root):
    path = _write(root, [_row(), json.dumps({**GOOD, "end_seconds": 0.25})])
    manifest = read_manifest(path, max_bad_fraction=0.5, max_seconds=0.5)
    assert [problem.reason for problem in manifest.problems] == ["audio: too long: 1.0 s, at most 0.5 s are allowed ('a.flac')"]


def test_the_bad_one_of_several_clips_is_named(root):
    problem = _problem(root, _row(audio="a.flac", more_audio=["a.flac", "~/b.flac"]))
    assert problem.reason == "audio: missing file ('~/b.flac')"


def test_audio_need_not_be_there_when_it_is_not_checked(root):
    manifest = read_manifest(_write(root, [json.dumps({**GOOD, "audio": "no.flac"})]), check_audio=False)
    assert len(manifest) == 1


def test_too_many_bad_rows_stop_with_the_list(root):
    lines = [json.dumps({**GOOD, "id": f"g{i}"}) for i in range(18)] + [_row(audio="no.flac"), '{"id"']
    path = _write(root, lines)
    assert len(read_manifest(path, max_bad_fraction=0.1).problems) == 2  # exactly the fraction is allowed
    with pytest.raises(ManifestError, match=r"2 of 20 rows are bad, more than max_bad_fraction 0.05") as caught:
        read_manifest(path)
    assert "row 20 (bad): audio: missing file" in str(caught.value) and "row 21: bad JSON" in str(caught.value)
    assert [problem.row for problem in caught.value.problems] == [20, 21]


def test_a_long_list_is_cut_in_the_message_but_not_in_problems(root):
    with pytest.raises(ManifestError, match="and 30 more") as caught:
        read_manifest(_write(root, ["{}"] * 50))
    assert len(caught.value.problems) == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b'{"kdkernels_manifest": 1}\n', "at least one row"),
        (b'{"kdkernels_manifest": 2}\n{}\n', "got version 2"),
        (b'{"id": "a", "audio": null}\n', "python -m models convert reads other layouts"),
        (b"\x89PNG\r\n", "expected a first line like"),
    ],
)
def test_files_that_are_no_manifest(tmp_path, content, message):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / "m.jsonl")


def test_missing_manifest_folder_and_bad_fraction(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "no.jsonl")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="max_bad_fraction: expected a number from 0 to 1, got 2"):
        read_manifest(tmp_path / "no.jsonl", max_bad_fraction=2)


def test_a_manifest_whose_name_ends_with_gz_is_packed(root):
    examples = [Example(id=f"{n}", audio="a.flac", answer="女") for n in range(3)]
    path = write_manifest(root / "m.jsonl.gz", examples)
    assert read_manifest(path).examples == examples
    assert gzip.decompress(path.read_bytes()) == write_manifest(root / "m.jsonl", examples).read_bytes()


@pytest.mark.parametrize("seconds", ["nan", "0", "-1"])
def test_check_refuses_a_limit_that_is_no_length(root, capsys, seconds):
    from models.data.check import main as check

    assert check([str(_write(root, [json.dumps(GOOD)])), f"--max-seconds={seconds}"]) == 1
    assert "error: --max-seconds: expected a positive number, got " in capsys.readouterr().err


def test_names_that_differ_in_their_unicode_form_alone_are_told_apart(root):
    """Two strings that look the same in a message; file names from a Mac are often of the other form."""
    write_audio(root / "caf\u00e9.wav", np.zeros(16_000, np.float32) + 0.1)
    assert "missing file; its name is there in another Unicode form (NFC)" in _problem(root, _row(audio="cafe\u0301.wav")).reason
    assert _problem(root, _row(audio="the\u0301.wav")).reason == "audio: missing file ('the\u0301.wav')"
    line = _row(choices=["\u00e9t\u00e9", "hiver"], answer="e\u0301te\u0301")
    assert _problem(root, line).reason.endswith("; one of them is the same in another Unicode form (NFC or NFD)")
    assert _problem(root, _row(choices=["man", "woman"], answer="child")).reason.endswith("got 'child'")


def test_a_byte_order_mark_and_blank_lines_are_no_rows(root):
    path = root / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"kdkernels_manifest": 1}\r\n\r\n' + json.dumps(GOOD).encode() + b"\r\n\n")
    assert len(read_manifest(path)) == 1


def test_write_refuses_doubles_and_nan_and_keeps_the_old_file(root):
    path = write_manifest(root / "m.jsonl", [Example(id="a", audio=None)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="unique ids, got 'a' twice"):
        write_manifest(path, [Example(id="a", audio=None)] * 2)
    with pytest.raises(ValueError):
        write_manifest(path, [Example(id="a", audio=None, metadata={"x": float("nan")})])
    with pytest.raises(ValueError, match="header: expected"):
        write_manifest(path, [], header={"kdkernels_manifest": 9})
    assert path.read_bytes() == before and list(root.glob(".m.jsonl*")) == []


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<|audio|>" not in text)


@settings(max_examples=50)
@given(
    st.lists(_text.filter(str.strip), unique=True, max_size=5),
    _text,
    st.dictionaries(
        _text, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text
    ),
)
def test_any_text_survives_the_round_trip(tmp_path_factory, ids, text, metadata):
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    examples = [Example(id=name, audio=None, transcription=text, context=text, metadata=metadata) for name in ids]
    write_manifest(path, examples)
    if examples:
        assert read_manifest(path).examples == examples


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_no_bytes_whatever_make_the_reader_fail_otherwise(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    path.write_bytes(b'{"kdkernels_manifest": 1}\n' + content)
    with contextlib.suppress(ManifestError):
        read_manifest(path, max_bad_fraction=1.0)


def test_command_line_prints_counts_or_one_message(root, capsys):
    assert main([str(_write(root, [json.dumps(GOOD)]))]) == 0
    assert "1 examples, 0 rows skipped" in capsys.readouterr().out
    assert main([str(root / "no.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_command_line_never_shows_a_traceback(root):
    (root / "m.jsonl").write_bytes(os.urandom(1000))
    result = subprocess.run(
        [sys.executable, "-m", "models", "check", str(root / "m.jsonl")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr and "error: " in result.stderr


def test_a_repeated_choice_stands_once():
    example = Example(id="1", audio=None, choices=["yes", "no", "yes"], answer="yes")
    assert example.choices == ("yes", "no")
