import base64
import dataclasses
import hashlib
import io
import os
import re

import numpy as np
import pytest
import soundfile
from markdown_it import MarkdownIt
from report_cases import HOSTILE, examples, make_report, write_results

from models.data.audio import write_audio
from models.data.manifest import write_manifest
from models.evaluation.predictions import append_predictions, write_header
from models.reporting.report import Report, choose_clips, main, write_report


@pytest.fixture
def report(tmp_path):
    return make_report(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Folder with r.html and "my report.md" of a report that has everything."""
    folder = tmp_path_factory.mktemp("full")
    report = make_report(folder)
    report.results = write_results(folder / "results")
    write_report(folder / "r.html", report, markdown=folder / "out" / "my report.md")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """HTML of a report of predictions alone."""
    folder = tmp_path_factory.mktemp("page")
    return write_report(folder / "r.html", make_report(folder)).read_text()


def rows_of(html, label):
    """The cells of each table row that is headed so: [(text, note)]."""
    found = re.findall(rf'<tr><th scope="row">{re.escape(label)}</th>(.*?)</tr>', html, re.DOTALL)
    return [re.findall(r"<td[^>]*>(?:<b>)?([^<]*)(?:</b>)?(?:<small>([^<]*)</small>)?</td>", row) for row in found]


def test_one_file_that_loads_nothing(full):
    html = (full / "r.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html).replace("http-equiv", "")
    images = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)
    assert len(images) == 10  # six systems, bias, differences, 3 sweeps, sources, accuracy, loss, kd
    assert all(b"<svg" in base64.b64decode(i) for i in images)
    sounds = re.findall(r"data:audio/flac;base64,([A-Za-z0-9+/=]+)", html)
    assert len(sounds) == 4 and base64.b64decode(sounds[0]).startswith(b"fLaC")


def test_every_link_has_its_aim_and_every_picture_its_words(full):
    html = (full / "r.html").read_text()
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]*)"', html)) <= set(ids)
    assert len(re.findall(r"<figcaption>[^<]+</figcaption>", html)) == html.count("<img ") == 10
    assert all(len(alt) > 20 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', html))
    assert html.count("<caption>") == html.count("<table")


def test_what_comes_from_data_is_escaped(page):
    for raw in ("<title>A <title>", "<b>line", "speaker is a <man>", "a<b"):
        assert raw not in page
    assert "A &lt;title&gt;" in page and "&lt;b&gt;line 0&lt;/b&gt;" in page


def test_only_the_pages_own_script_and_style_may_run(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert not re.search(r"<[^>]+ (style|on\w+)=", re.sub(r'"[^"]*"', '""', page))


def test_the_page_begins_with_verdicts_a_table_and_a_figure(page):
    start = page.index('<section id="headline">')
    headline = page[start : page.index("</section>", start)]
    sentence = "Under a false hint, follows hints is ahead of always right: −75.0 points"
    assert f"<li><b>The opposite holds in this run.</b> {sentence}" in headline
    assert headline.index("<li>") < headline.index("<table>") < headline.index("<img ") and headline.count("<table>") == 1
    assert "<h2>" not in page[:start] and "<details" not in page[:start]
    assert rows_of(headline, "always right")[0][2] == ("100.0", "") and "<b>100.0</b>" in headline
    rest = page[start + len(headline) :]
    depth = 0
    for tag in re.findall(r"</?details|<table", rest):
        depth += {"<details": 1, "</details": -1}.get(tag, 0)
        assert tag != "<table" or depth > 0  # all else is folded


def test_shares_are_in_percent_wherever_they_are_read(full):
    html = (full / "r.html").read_text()
    cells = re.findall(r"<td[^>]*>(?:<b>)?([^<]*)", html) + re.findall(r"<small>([^<]*)</small>", html)
    assert not [cell for cell in cells if re.search(r"\b0\.\d\d", cell)]


def test_numbers_are_those_of_the_predictions(page):
    headline, *_clips, accuracy, shift, _controls, difference, _classes = rows_of(page, "follows hints")
    assert [text for text, _ in headline] == ["100.0", "100.0", "25.0"]  # three kinds
    assert [text for text, _ in accuracy] == ["100.0", "100.0", "25.0", "75.0"]  # three kinds and all; strict is the same
    assert [text for text, _ in shift] == ["75.0", "75.0", "0.0"]
    assert [text for text, _ in difference] == ["+0.0", "+0.0", "−75.0", "−25.0"]  # to "always right"
    assert accuracy[2][1].endswith("n 4")


@pytest.mark.slow
def test_reference_of_the_differences(report, tmp_path):
    report.reference = "follows hints"
    html = write_report(tmp_path / "r.html", report).read_text()
    assert [text for text, _ in rows_of(html, "always right")[-2]] == ["+0.0", "+0.0", "+75.0", "+25.0"]
    report.reference = "nobody"
    with pytest.raises(ValueError, match=r"reference: expected one of \['always right', 'follows hints'\], got 'nobody'"):
        write_report(tmp_path / "r.html", report)


def test_clips_of_disagreement_first_and_labels_in_turn(report):
    clips, unreadable = choose_clips(report)
    assert unreadable == []
    assert [clip.title for clip in clips] == ["c1", "c2", "c3", "c0"]  # on c0 both systems are right
    assert [clip.answer for clip in clips] == ["woman", "man", "woman", "man"]
    cells = dict(clips[0].table.rows)["follows hints"]
    assert [cell.mark for cell in cells] == ["right", "right", "wrong"]


@pytest.mark.slow
def test_a_missing_clip_is_left_out_and_named(report, tmp_path):
    (tmp_path / "c0.wav").unlink()
    clips, unreadable = choose_clips(report)
    assert "c0" not in [clip.title for clip in clips] and unreadable == ["c0"]
    assert "<li>c0: its clip could not be read.</li>" in write_report(tmp_path / "r.html", report).read_text()


def test_a_clip_behind_a_link_out_of_the_audio_root_is_embedded_only_if_links_are_allowed(report, tmp_path):
    away = tmp_path.parent / f"{tmp_path.name}-away.wav"
    (tmp_path / "c0.wav").rename(away)
    (tmp_path / "c0.wav").symlink_to(away)
    clips, (unreadable,) = choose_clips(report)
    assert "c0" not in [clip.title for clip in clips] and unreadable.startswith("c0 (path leaves the audio root")
    report.allow_links = True
    clips, unreadable = choose_clips(report)
    assert "c0" in [clip.title for clip in clips] and unreadable == []


def test_a_clip_is_its_span_and_nothing_but_sound(report, tmp_path):
    write_audio(tmp_path / "c1.wav", np.zeros(16_000 * 40, np.float32))  # longer than is embedded, but for the span
    (tmp_path / "c2.wav").unlink()
    os.mkfifo(tmp_path / "c2.wav")  # reading it would wait for ever
    (tmp_path / "c3.wav").write_text("root:x:0:0")
    report.examples = [
        dataclasses.replace(e, start_seconds=35.0, end_seconds=36.0) if e.audio == "c1.wav" else e for e in report.examples
    ]
    clips, _ = choose_clips(report)
    assert [clip.title for clip in clips] == ["c1", "c0"]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(clips[0].audio.partition(",")[2])))
    assert len(samples) == rate == 16_000


def make_hostile(report):
    """Everything that comes from data is `HOSTILE`."""
    report.systems = {HOSTILE: report.systems["follows hints"]}
    report.curves = {HOSTILE: report.curves["run"], "_hidden": report.curves["run"]}
    report.examples = [
        dataclasses.replace(e, transcription=HOSTILE, context=HOSTILE, question=HOSTILE) for e in report.examples
    ]
    report.title, report.findings, report.missing = HOSTILE, [HOSTILE, "1. one", "- two"], [HOSTILE]
    report.facts = [(HOSTILE, [(HOSTILE, HOSTILE)])]
    return report


def test_a_label_is_no_formula_and_no_script(report, tmp_path):
    html = write_report(tmp_path / "r.html", make_hostile(report)).read_text()
    assert html.count("<script>") == 1 and "&lt;script&gt;" in html
    images = [base64.b64decode(i) for i in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)]
    assert len(images) == 3
    for image in images:
        assert b"<script" not in image and rb"$\frac{$ &lt;script" in image
    assert b"_hidden" in images[2]  # the curves


def test_in_markdown_data_is_nothing_but_text(report, tmp_path):
    write_report(tmp_path / "r.html", make_hostile(report), markdown=tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    parser = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
    shown = 0
    for token in parser.parse(text):
        assert token.type not in ("html_block", "fence", "code_block", "ordered_list_open")
        inline = token.children or []
        links = [t.attrs.get("href") or t.attrs.get("src") for t in inline if t.type in ("link_open", "image")]
        assert all(re.fullmatch(r"r_files/[a-z0-9-]+\.(svg|flac)", link) for link in links), links
        assert not any(t.type in ("html_inline", "code_inline", "em_open") for t in inline), token.content
        shown += "".join(t.content for t in inline if t.type in ("text", "text_special")).count(HOSTILE)
    # title, finding, missing, fact (heading, caption, name, value), a row in 5 tables; 4 clips: question, words, 3 hints, row
    assert shown == 3 + 4 + 5 + 4 * 6
    for linked in ("https://e.f", "www.g.h"):  # what GitHub makes links of
        assert linked not in text


def test_markdown_has_what_the_page_has(full):
    html = (full / "r.html").read_text()
    text = (full / "out" / "my report.md").read_text()
    assert len(re.findall(r"^\|( --- \|)+$", text, re.MULTILINE)) == html.count("<table")
    files = sorted(path.name for path in (full / "out" / "my report_files").iterdir())
    assert sum(name.endswith(".svg") for name in files) == html.count("<img ") == 10
    assert [name for name in files if name.endswith(".flac")] == [f"clip-{n}.flac" for n in (1, 2, 3, 4)]
    assert sorted(re.findall(r"\]\(my%20report_files/([^)]+)\)", text)) == files
    assert "| follows hints | 100.0 (n 4) |" in text and "✗ The speaker is a woman." in text
    assert "\n\n\n" not in text


def test_empty_report(tmp_path):
    html = write_report(tmp_path / "r.html", Report(title="Nothing")).read_text()
    assert "<h1>Nothing</h1>" in html and "Not in this report" not in html
    html = write_report(tmp_path / "r.html", Report(title="x", systems={"s": []}, curves={"c": []})).read_text()
    assert "s: no predictions in its file." in html and "c: no training curve in its metrics." in html


def test_command_line(report, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    write_header(path, {})
    append_predictions(path, report.systems["follows hints"])
    write_manifest(tmp_path / "m.jsonl", examples())
    out = tmp_path / "r.html"
    words = ["--out", str(out), "--predictions", f"mine={path}", "--manifest", str(tmp_path / "m.jsonl")]
    assert main(words) == 0
    assert "mine" in out.read_text() and "<audio" in out.read_text() and "six_systems" not in out.read_text()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "demo_seconds.csv").write_text("stage,seconds\nfirst,1\n")
    assert main([*words, "--results", str(tmp_path / "results"), "--markdown", str(tmp_path / "r.md")]) == 0
    assert "From demo_seconds.csv" in out.read_text() and "From demo\\_seconds.csv" in (tmp_path / "r.md").read_text()
    assert "six_systems.csv is not among the results" in out.read_text()
    assert main(["--out", str(out), "--predictions", "no-label"]) == 1
    assert capsys.readouterr().err == "error: expected LABEL=FILE, got 'no-label'\n"
    answers, unfinished = report.systems["follows hints"], tmp_path / "unfinished.jsonl"
    write_header(unfinished, {}, questions=len(answers) + 1)
    append_predictions(unfinished, answers)
    assert main(["--out", str(out), "--predictions", f"mine={unfinished}"]) == 1
    assert f"{unfinished}: {len(answers)} of {len(answers) + 1} questions are answered; run the same" in capsys.readouterr().err
    for words, message in (
        (["--metrics", f"mine={tmp_path / 'none.jsonl'}"], "--metrics: no file"),
        (["--predictions", f"a={path}", f"a={path}"], "expected each label once, got 'a' twice"),
        (["--manifest", str(tmp_path / "none.jsonl")], "none.jsonl: cannot be read"),
        (["--out", str(tmp_path / "p.jsonl" / "r.html")], "p.jsonl"),
        (["--results", str(tmp_path / "none")], "results: expected a folder, got"),
        (["--audio-root", str(tmp_path)], "--audio-root: expected --manifest beside it"),
        (["--max-clips", "-1"], "--max-clips: expected at least 0, got -1"),
        (["--markdown", str(out)], "--markdown: expected another file than --out"),
        (["--markdown", str(out.parent / "x" / ".." / out.name)], "--markdown: expected another file than --out"),
        (["--reference", "him"], "reference: expected one of ['mine'], got 'him'"),
    ):
        assert main(["--out", str(out), "--predictions", f"mine={path}", *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error


@pytest.mark.slow
def test_without_arguments_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "From sources_layers.csv" in html and "Clips to listen to need --predictions and --manifest." in html
