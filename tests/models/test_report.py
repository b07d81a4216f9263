import base64
import dataclasses
import io
import os
import re

import numpy as np
import pytest
import soundfile

from models.data.audio import write_audio
from models.data.manifest import Example, write_manifest
from models.evaluate import append_predictions, write_header
from models.report import Report, choose_clips, draw_curves, main, write_report
from models.scoring import Prediction

KINDS = ("neutral", "aligned", "conflict")


def examples(count=4):
    return [
        Example(
            id=f"c{i}/{kind}", audio=f"c{i}.wav", transcription=f"<b>line {i}</b>", task="gender", question="Who & what?",
            choices=("man", "woman"), answer=("man", "woman")[i % 2], split="test", kind=kind, pair_id=f"c{i}",
            context="" if kind == "neutral" else "Note: the speaker is a <man>.",
        )
        for i in range(count) for kind in KINDS
    ]  # fmt: skip


def predictions(right):
    made = []
    for n, e in enumerate(examples()):
        other = "woman" if e.answer == "man" else "man"
        text = e.answer if right(n, e) else other
        for control in ("", "no_audio") if e.kind == "neutral" else ("",):
            made.append(
                Prediction(
                    id=e.id + ("#" + control if control else ""), task=e.task, kind=e.kind, answer=e.answer, choices=e.choices,
                    prediction=f"The speaker is a {text}.", pair_id=e.pair_id, control=control,
                )
            )  # fmt: skip
    return made


@pytest.fixture
def report(tmp_path):
    for i in range(4):
        write_audio(tmp_path / f"c{i}.wav", np.zeros(800, np.float32))
    curve = [{"step": s, "loss": 1 / s, "kd": 2 / s, "seconds": 1.0} for s in (1, 2, 3)]
    return Report(
        title="A <title>",
        findings=["CAAD < KD"],
        systems={
            "always right": predictions(lambda n, e: True),
            "follows hints": predictions(lambda n, e: e.kind != "conflict" or e.id == "c0/conflict"),
        },
        curves={"run": curve},
        examples=examples(),
        audio_root=tmp_path,
        facts=[("Settings", [("a<b", 1)])],
    )


def test_one_file_that_loads_nothing(report, tmp_path):
    html = write_report(tmp_path / "r.html", report).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    images = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)
    assert len(images) == 3  # bars, loss, kd
    assert all(b"<svg" in base64.b64decode(i) for i in images)
    sounds = re.findall(r"data:audio/flac;base64,([A-Za-z0-9+/=]+)", html)
    assert base64.b64decode(sounds[0]).startswith(b"fLaC")


def test_what_comes_from_data_is_escaped(report, tmp_path):
    html = write_report(tmp_path / "r.html", report).read_text()
    for raw in ("<title>A <title>", "<b>line", "speaker is a <man>", "a<b"):
        assert raw not in html
    assert "A &lt;title&gt;" in html and "&lt;b&gt;line 0&lt;/b&gt;" in html


def test_numbers_are_those_of_the_predictions(report, tmp_path):
    html = write_report(tmp_path / "r.html", report).read_text()
    row = re.search(r"<tr><td>follows hints</td>(.*?)</tr>", html, re.DOTALL).group(1)
    cells = re.findall(r"<td>([\d.]+)<small>", row)
    assert cells == ["1.000", "1.000", "0.250", "0.750"]  # neutral, aligned, conflict, all
    shift = re.findall(r"<tr><td>follows hints</td>(.*?)</tr>", html, re.DOTALL)[1]
    assert re.findall(r"<td>([\d.]+)<small>", shift) == ["0.750", "0.750", "0.000"]


def test_clips_of_disagreement_first_and_labels_in_turn(report):
    clips = choose_clips(report)
    assert len(clips) == 4
    assert [clip.title for clip in clips] == ["c1", "c2", "c3", "c0"]  # on c0 both systems are right
    assert [clip.answer for clip in clips] == ["woman", "man", "woman", "man"]
    cells = dict(clips[0].answers)["follows hints"]
    assert [right for _, right in cells] == [True, True, False]


def test_a_missing_clip_is_left_out(report, tmp_path):
    (tmp_path / "c0.wav").unlink()
    assert "c0" not in [clip.title for clip in choose_clips(report)]


def test_a_clip_is_its_span_and_nothing_but_sound(report, tmp_path):
    write_audio(tmp_path / "c1.wav", np.zeros(16_000 * 40, np.float32))  # longer than is embedded, but for the span
    (tmp_path / "c2.wav").unlink()
    os.mkfifo(tmp_path / "c2.wav")  # reading it would wait for ever
    (tmp_path / "c3.wav").write_text("root:x:0:0")
    report.examples = [
        dataclasses.replace(e, start_seconds=35.0, end_seconds=36.0) if e.audio == "c1.wav" else e for e in report.examples
    ]
    clips = choose_clips(report)
    assert [clip.title for clip in clips] == ["c1", "c0"]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(clips[0].audio.partition(",")[2])))
    assert len(samples) == rate == 16_000


def test_a_label_is_no_formula(report, tmp_path):
    hostile = r"$\frac{$ <script>alert(1)</script>"
    report.systems, report.curves = {hostile: report.systems["always right"]}, {hostile: report.curves["run"]}
    html = write_report(tmp_path / "r.html", report).read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html
    for image in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html):
        assert b"<script" not in base64.b64decode(image)


def test_curves_that_no_run_has_are_not_drawn():
    assert [caption for caption, _ in draw_curves({"a": [{"step": 1, "loss": 1.0}], "b": []})] == ["loss"]
    assert draw_curves({}) == []


def test_empty_report(tmp_path):
    assert "<h1>Nothing</h1>" in write_report(tmp_path / "r.html", Report(title="Nothing")).read_text()


def test_command_line(report, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    write_header(path, {})
    append_predictions(path, report.systems["follows hints"])
    write_manifest(tmp_path / "m.jsonl", examples())
    out = tmp_path / "r.html"
    words = ["--out", str(out), "--predictions", f"mine={path}", "--manifest", str(tmp_path / "m.jsonl")]
    assert main(words) == 0
    assert "mine" in out.read_text() and "<audio" in out.read_text()
    assert main(["--out", str(out), "--predictions", "no-label"]) == 1
    assert capsys.readouterr().err == "error: expected LABEL=FILE, got 'no-label'\n"
    for words, message in (
        (["--metrics", f"mine={tmp_path / 'none.jsonl'}"], "--metrics: no file"),
        (["--predictions", f"a={path}", f"a={path}"], "expected each label once, got 'a' twice"),
        (["--manifest", str(tmp_path / "none.jsonl")], "none.jsonl: cannot be read"),
        (["--out", str(tmp_path / "p.jsonl" / "r.html")], "p.jsonl"),
    ):
        assert main(["--out", str(out), "--predictions", f"mine={path}", *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
