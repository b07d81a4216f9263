"""Stage 1: the run, and a journal that neither loses nor doubles an answer wherever the run is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.data.manifest import Example, Manifest, read_manifest, write_manifest
from models.io_utils import fingerprint
from models.pseudo_gt.journal import Stage1Error
from models.pseudo_gt.stage1 import _Recipe, main, run_stage1
from models.pseudo_gt.writers import Answer

REPOSITORY = Path(__file__).parents[3]


def gender(number: int, label: str = "man", **fields) -> Example:
    return Example(
        **{
            "id": f"clip-{number}",
            "audio": None,
            "transcription": f"Line {number}.",
            "metadata": {"gender": label, "duration_seconds": 2.5, "snr_db": -3.4, "speaker": "JOE", "pool": "teacher"},
            "task": "gender",
            "context": "Note: the speaker is a liar.",
            "question": "Is the speaker a man or a woman?",
            "choices": ("man", "woman"),
            "answer": label,
            **fields,
        }
    )


def _manifest(folder: Path, examples: list[Example]) -> Manifest:
    return read_manifest(write_manifest(folder / "in.jsonl", examples, header={"seed": 3}))


def test_template_source_fills_in_sentences_and_is_named(tmp_path):
    examples = [gender(1), gender(2, "woman"), gender(3, split="test"), gender(4, metadata={"pool": "distill"})]
    manifest = _manifest(tmp_path, examples)
    report = run_stage1(manifest, tmp_path / "out.jsonl", source="template", pool="teacher", progress=False)
    assert (report.accepted, report.passed_through, report.acceptance()) == (2, 2, 1.0)
    out = read_manifest(tmp_path / "out.jsonl")
    assert [e.target for e in out] == ["The speaker is a man.", "The speaker is a woman.", None, None]
    assert [e.target_source for e in out] == ["template", "template", None, None]
    assert out.header["seed"] == 3 and out.header["stage1"]["source"] == "template"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_template_leaves_free_answers_as_they_are(tmp_path, capsys):
    free = {"choices": (), "question": "How does she speak?", "answer": "The tone is high."}
    human = gender(1, **free, target="The tone is high.", target_source="human")
    manifest, out = _manifest(tmp_path, [human, gender(2), gender(3, **free)]), tmp_path / "out.jsonl"
    for _ in range(2):  # the second time it is finished
        report = run_stage1(manifest, out, source="template", progress=False)
        assert (report.accepted, report.passed_through, report.without_choices) == (1, 2, 2)
        assert "left as they are: 2 rows without choices, which a template has no label for" in report.summary()
    assert [(e.target, e.target_source) for e in read_manifest(out)] == [
        ("The tone is high.", "human"),
        ("The speaker is a man.", "template"),
        (None, None),
    ]
    _manifest(tmp_path, [human])
    assert main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "free.jsonl"), "--source", "template"]) == 1
    told = "error: source template: none of the 1 rows has choices; free answers need another --source\n"
    assert capsys.readouterr().err == told and not (tmp_path / "free.jsonl").exists()


def test_rejected_answers_are_counted_listed_and_left_out(tmp_path):
    answers = {0: "The speaker is a man.", 1: "The speaker is a woman.", 2: "", 3: "Well."}
    manifest = _manifest(tmp_path, [gender(number) for number in answers])
    report = run_stage1(
        manifest,
        tmp_path / "out.jsonl",
        writer=lambda batch: [answers[int(e.id[5:])] for e in batch],
        batch_examples=3,
        max_reject_fraction=0.75,
        progress=False,
    )
    assert dict(report.rejected) == {"wrong choice named": 1, "empty": 1, "no choice named": 1}
    assert [e.id for e in read_manifest(tmp_path / "out.jsonl")] == ["clip-0"]
    rejects = [json.loads(line) for line in (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in rejects] == [
        ("clip-1", "wrong choice named"),
        ("clip-2", "empty"),
        ("clip-3", "no choice named"),
    ]


def test_too_many_rejected_is_an_error_and_the_answers_stay_in_the_journal(tmp_path):
    manifest = _manifest(tmp_path, [gender(number) for number in range(4)])
    with pytest.raises(Stage1Error, match=r"more than 50% of the answers were rejected; 0 targets accepted"):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=lambda batch: [""] * len(batch), progress=False)
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl.rejects.jsonl").exists()


def test_a_result_without_a_row_is_not_written(tmp_path):
    """It could not be read again. The second run takes the answers from the journal and says the same."""
    manifest = _manifest(tmp_path, [gender(number) for number in range(4)])
    options = {"max_reject_fraction": 1.0, "progress": False}
    for writer in (lambda batch: [""] * len(batch), None):
        with pytest.raises(Stage1Error, match=r"all answers were rejected; 0 targets accepted"):
            run_stage1(manifest, tmp_path / "out.jsonl", writer=writer, **options)
    assert not (tmp_path / "out.jsonl").exists()
    assert len((tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()) == 4


def test_an_answer_that_was_cut_off_is_rejected_also_after_a_stop(tmp_path):
    manifest = _manifest(tmp_path, [gender(number) for number in range(3)])

    def writer(batch):
        if batch[0].id == "clip-2" and stops:
            raise KeyboardInterrupt
        return [Answer("The speaker is a man", ended=batch[0].id != "clip-0")]

    options = {"writer": writer, "batch_examples": 1, "progress": False}
    stops = True
    with pytest.raises(KeyboardInterrupt):
        run_stage1(manifest, tmp_path / "out.jsonl", **options)
    stops = False
    report = run_stage1(manifest, tmp_path / "out.jsonl", **options)
    assert dict(report.rejected) == {"cut off": 1} and report.resumed == 2
    out = read_manifest(tmp_path / "out.jsonl")
    assert [e.id for e in out] == ["clip-1", "clip-2"]
    assert (out.header["stage1"]["max_new_tokens"], out.header["stage1"]["max_characters"]) == (24, 160)


def test_another_limit_makes_the_manifest_again(tmp_path):
    manifest, asked = _manifest(tmp_path, [gender(1), gender(2)]), []

    def writer(batch):
        asked.append(len(batch))
        return ["The speaker is a man.", "The speaker is, as far as one can tell, a man."]

    options = {"writer": writer, "progress": False}
    with pytest.raises(Stage1Error, match="too long"):
        run_stage1(manifest, tmp_path / "out.jsonl", max_characters=30, max_reject_fraction=0.0, **options)
    assert run_stage1(manifest, tmp_path / "out.jsonl", **options).accepted == 2 and asked == [2]  # nothing is asked twice
    for changed, accepted in (({"max_characters": 30}, 1), ({"max_new_tokens": 40}, 2)):
        whole = (tmp_path / "out.jsonl").read_bytes()
        with pytest.raises(Stage1Error, match=rf"{next(iter(changed))}.*\); choose another --out or --restart"):
            run_stage1(manifest, tmp_path / "out.jsonl", **changed, **options)
        assert (tmp_path / "out.jsonl").read_bytes() == whole
        assert run_stage1(manifest, tmp_path / "out.jsonl", restart=True, **changed, **options).accepted == accepted
    assert asked == [2, 2, 2]


def test_restart_discards_what_an_earlier_run_left(tmp_path):
    manifest = _manifest(tmp_path, [gender(1), gender(2)])

    def stops(batch):
        if batch[0].id == "clip-2":
            raise KeyboardInterrupt
        return ["The speaker is a man."]

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_stage1(manifest, out, writer=stops, batch_examples=1, progress=False)
    with pytest.raises(Stage1Error, match=r"unfinished run of other settings.*--restart"):
        run_stage1(manifest, out, source="template", progress=False)
    report = run_stage1(manifest, out, source="template", restart=True, progress=False)
    assert (report.accepted, report.resumed) == (2, 0)
    assert run_stage1(manifest, out, source="template", restart=True, progress=False).resumed == 0
    out.unlink()
    (tmp_path / "out.jsonl.journal").write_bytes(b'{"stage1_journal": 1, "fingerprint": "x"}\n{{{\n')
    with pytest.raises(Stage1Error, match=r"damaged.*--restart"):
        run_stage1(manifest, out, writer=stops, progress=False)
    assert run_stage1(manifest, out, source="template", restart=True, progress=False).accepted == 2


def test_a_run_whose_answers_were_all_rejected_does_not_stand_in_the_way_of_another(tmp_path):
    manifest, out = _manifest(tmp_path, [gender(1), gender(2)]), tmp_path / "out.jsonl"
    for _ in range(2):
        with pytest.raises(Stage1Error, match="0 targets accepted"):
            run_stage1(manifest, out, writer=lambda batch: ["Well."] * len(batch), progress=False)
    assert run_stage1(manifest, out, source="template", progress=False).accepted == 2


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(tmp_path):
    manifest = _manifest(tmp_path, [gender(1), gender(2)])
    run_stage1(manifest, tmp_path / "out.jsonl", source="template", progress=False)

    def refuse(_batch):
        raise AssertionError("written again")

    again = run_stage1(manifest, tmp_path / "out.jsonl", source="template", writer=refuse, progress=False)
    assert (again.accepted, again.resumed) == (2, 2)
    with pytest.raises(AssertionError, match="written again"):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=refuse, restart=True, progress=False)


@pytest.mark.parametrize("out", ["made/out.jsonl", "out.jsonl"], ids=["a root in the header", "paths from the folder above"])
def test_a_finished_run_follows_clips_that_were_moved(tmp_path, out):
    """Without asking anything again, and with an answer that was rejected."""
    examples = [gender(n, audio=f"{n}.flac", more_audio=(f"{n}b.flac",)) for n in range(3)]
    asked = []

    def writer(batch):
        asked.extend(batch)
        return ["" if e.id == "clip-1" else "The speaker is a man." for e in batch]

    for root in ("first", "second", "second"):
        (tmp_path / root).mkdir(exist_ok=True)
        source = write_manifest(tmp_path / "in" / "in.jsonl", examples, header={"seed": 3})
        manifest = read_manifest(source, audio_root=tmp_path / root, check_audio=False)
        report = run_stage1(manifest, tmp_path / out, writer=writer, progress=False)
        made = read_manifest(tmp_path / out, check_audio=False)
        assert [made.audio_path(e).resolve() for e in made] == [tmp_path / root / f"{n}.flac" for n in (0, 2)]
        assert [(made.audio_root / e.more_audio[0]).resolve() for e in made] == [tmp_path / root / f"{n}b.flac" for n in (0, 2)]
        assert {e.target for e in made} == {"The speaker is a man."} and made.header["stage1"]["accepted"] == 2
        assert made.header["seed"] == 3
    assert len(asked) == 3 and report.resumed == 3


@pytest.mark.parametrize(("name", "known"), [("task", "gender"), ("pool", "teacher")])
def test_a_task_or_pool_without_a_row_is_named_beside_one_that_has_some(tmp_path, name, known):
    """Its rows would pass through without a target, and nobody would know."""
    manifest = _manifest(tmp_path, [gender(1)])
    with pytest.raises(Stage1Error, match=f"{name}: no row of 'typo'; the manifest holds {known}"):
        run_stage1(manifest, tmp_path / "out.jsonl", source="template", progress=False, **{name: [known, "typo"]})
    assert not (tmp_path / "out.jsonl").exists()


def test_the_last_torn_line_is_dropped_and_written_again(tmp_path):
    manifest = _manifest(tmp_path, [gender(number) for number in range(5)])

    def stops_after_three(batch):
        if batch[0].id == "clip-3":
            raise KeyboardInterrupt
        return ["The speaker is a man."] * len(batch)

    with pytest.raises(KeyboardInterrupt):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=stops_after_three, batch_examples=1, progress=False)
    journal = tmp_path / "out.jsonl.journal"
    whole = journal.read_bytes()
    asked: list[str] = []

    def writer(batch):
        asked.extend(e.id for e in batch)
        return ["The speaker is a man."] * len(batch)

    journal.write_bytes(whole[:-7])
    report = run_stage1(manifest, tmp_path / "out.jsonl", writer=writer, batch_examples=1, progress=False)
    assert asked == ["clip-2", "clip-3", "clip-4"] and report.resumed == 2 and report.accepted == 5


def test_a_batch_that_was_cut_is_asked_again_whole(tmp_path):
    """An answer may depend on its batch, by rounding: here it names it."""
    manifest = _manifest(tmp_path, [dataclasses.replace(gender(number), choices=(), answer=None) for number in range(8)])
    asked: list[list[str]] = []

    def writer(batch):
        asked.append([e.id for e in batch])
        return [f"{e.id} beside {', '.join(asked[-1])}" for e in batch]

    options = {"writer": writer, "batch_examples": 3, "progress": False}
    run_stage1(manifest, tmp_path / "whole.jsonl", **options)
    whole = list(asked)

    def stops_at_the_last(batch):
        if batch[0].id == whole[2][0]:
            raise KeyboardInterrupt
        return writer(batch)

    with pytest.raises(KeyboardInterrupt):
        run_stage1(manifest, tmp_path / "out.jsonl", **{**options, "writer": stops_at_the_last})
    journal = tmp_path / "out.jsonl.journal"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:5]) + b'{"id"')  # four answers and a half
    asked.clear()
    assert run_stage1(manifest, tmp_path / "out.jsonl", **options).resumed == 4
    assert asked == whole[1:]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("cut", ["other settings", "damage", "lock"])
def test_a_journal_that_cannot_be_continued_is_an_error(tmp_path, cut):
    manifest = _manifest(tmp_path, [gender(1), gender(2)])
    journal = tmp_path / "out.jsonl.journal"

    def fail(batch):
        if batch[0].id != "clip-1":
            raise KeyboardInterrupt
        return ["The speaker is a man."]

    with pytest.raises(KeyboardInterrupt):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=fail, batch_examples=1, progress=False)
    if cut == "other settings":
        changed = dataclasses.replace(manifest, examples=[gender(3)])
        with pytest.raises(Stage1Error, match="unfinished run of other settings"):
            run_stage1(changed, tmp_path / "out.jsonl", writer=fail, progress=False)
    elif cut == "damage":
        journal.write_bytes(journal.read_bytes() + b"{{{\n")
        with pytest.raises(Stage1Error, match="damaged, not only at its end"):
            run_stage1(manifest, tmp_path / "out.jsonl", writer=fail, progress=False)
    else:

        def second(_batch):
            run_stage1(manifest, tmp_path / "out.jsonl", writer=fail, progress=False)

        with pytest.raises(Stage1Error, match="another run is writing here"):
            run_stage1(manifest, tmp_path / "out.jsonl", writer=second, progress=False)


_SLOW_RUN = """
import sys, time
from models.data.manifest import read_manifest
from models.pseudo_gt.stage1 import run_stage1

def writer(batch):
    time.sleep(0.004)
    with open(sys.argv[3], "a") as log:
        log.writelines(example.id + "\\n" for example in batch)
    return [f"The speaker is a {example.answer}." for example in batch]

run_stage1(read_manifest(sys.argv[1]), sys.argv[2], writer=writer, batch_examples=2, progress=False)
"""


def test_killed_at_random_points_it_ends_with_the_same_manifest(tmp_path):
    examples = [gender(number, "man" if number % 3 else "woman") for number in range(120)]
    manifest = _manifest(tmp_path, examples)
    run_stage1(
        manifest,
        tmp_path / "whole.jsonl",
        progress=False,
        writer=lambda b: [f"The speaker is a {e.answer}." for e in b],
    )
    command = [sys.executable, "-c", _SLOW_RUN, *(str(tmp_path / name) for name in ("in.jsonl", "out.jsonl", "log"))]
    rng = random.Random(0)
    kills = 0
    while True:
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
        journal = tmp_path / "out.jsonl.journal"
        before = journal.stat().st_size if journal.exists() else 0
        wanted = before + rng.randrange(200, 3000)
        while kills < 5 and process.poll() is None and not (journal.exists() and journal.stat().st_size > wanted):
            time.sleep(0.001)
        if kills < 5 and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills >= 2
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    asked = (tmp_path / "log").read_text().split()
    assert set(asked) == {e.id for e in examples}
    assert len(asked) - len(set(asked)) <= 2 * kills  # a kill costs at most the batch under way
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_audio_paths_stay_within_reach_of_the_new_manifest(tmp_path):
    folder = tmp_path / "deep" / "corpus"
    folder.mkdir(parents=True)
    write_manifest(folder / "in.jsonl", [gender(1, audio="audio/a.flac")], header={"seed": 3})
    manifest = read_manifest(folder / "in.jsonl", check_audio=False)
    run_stage1(manifest, tmp_path / "out.jsonl", source="template", progress=False)
    assert read_manifest(tmp_path / "out.jsonl", check_audio=False).examples[0].audio == "deep/corpus/audio/a.flac"
    for out in (folder / "below" / "out.jsonl", tmp_path / "elsewhere" / "out.jsonl"):
        run_stage1(manifest, out, source="template", progress=False)
        made = read_manifest(out, check_audio=False)
        assert made.audio_path(made.examples[0]).resolve() == folder / "audio" / "a.flac"
        assert made.header["seed"] == 3 and str(tmp_path) not in out.read_text()
        assert run_stage1(manifest, out, source="template", progress=False).resumed == 1
        again = out.with_name("again.jsonl")  # the named root is handed on, also to a manifest above the audio
        run_stage1(made, again, source="template", splits=("train",), progress=False)
        run_stage1(made, tmp_path / "above.jsonl", source="template", progress=False)
        for path in (again, tmp_path / "above.jsonl"):
            read = read_manifest(path, check_audio=False)
            assert read.audio_path(read.examples[0]).resolve() == folder / "audio" / "a.flac"
        assert "audio_root" not in read_manifest(tmp_path / "above.jsonl", check_audio=False).header


def test_a_run_that_failed_before_its_first_answer_does_not_stand_in_the_way_of_another(tmp_path):
    def fails(examples):
        raise Stage1Error("no backbone")

    manifest, out = _manifest(tmp_path, [gender(1)]), tmp_path / "out.jsonl"
    with pytest.raises(Stage1Error, match="no backbone"):
        run_stage1(manifest, out, writer=fails, progress=False)
    assert run_stage1(manifest, out, source="template", progress=False).accepted == 1


def test_targets_that_are_there_are_kept_where_this_is_asked_for(tmp_path):
    rows = [gender(1, target="He is a man.", target_source="human"), gender(2)]
    manifest, out = _manifest(tmp_path, rows), tmp_path / "out.jsonl"
    report = run_stage1(manifest, out, source="template", keep_targets=True, progress=False)
    assert (report.accepted, report.passed_through) == (1, 1)
    assert [(e.target, e.target_source) for e in read_manifest(out)] == [
        ("He is a man.", "human"),
        ("The speaker is a man.", "template"),
    ]
    with pytest.raises(Stage1Error, match=r"no row to write a target for .*rows with a target left out"):
        run_stage1(_manifest(tmp_path, rows[:1]), out, source="template", keep_targets=True, progress=False)


def test_another_acceptance_is_another_result_of_the_same_answers(tmp_path):
    manifest, out = _manifest(tmp_path, [gender(1), gender(2)]), tmp_path / "out.jsonl"
    options = {"writer": lambda batch: ["Someone speaks."] * len(batch), "progress": False}
    with pytest.raises(Stage1Error, match="2 no choice named"):
        run_stage1(manifest, out, **options)
    assert run_stage1(manifest, out, accept="free", **options).accepted == 2
    assert run_stage1(manifest, out, accept="free", writer=None, progress=False).resumed == 2  # finished
    with pytest.raises(Stage1Error, match=r"\(not the same: accept\)"):
        run_stage1(manifest, out, **options)
    with pytest.raises(Stage1Error, match="2 no choice named"):
        run_stage1(manifest, out, restart=True, **options)


def test_rows_that_pass_through_are_part_of_what_is_finished(tmp_path):
    out = tmp_path / "out.jsonl"
    run_stage1(_manifest(tmp_path, [gender(1)]), out, source="template", progress=False)
    more = _manifest(tmp_path, [gender(1), gender(2, split="test")])
    with pytest.raises(Stage1Error, match=r"\(not the same: rows\)"):
        run_stage1(more, out, source="template", progress=False)
    run_stage1(more, out, source="template", restart=True, progress=False)
    assert [example.id for example in read_manifest(out)] == ["clip-1", "clip-2"]


def test_a_selection_of_nothing_is_an_error(tmp_path):
    manifest = _manifest(tmp_path, [gender(1)])
    with pytest.raises(Stage1Error, match=r"no row to write a target for .*task gendre"):
        run_stage1(manifest, tmp_path / "out.jsonl", source="template", task="gendre", progress=False)
    with pytest.raises(ValueError, match=r"splits: expected some of .*got 'trian'"):
        run_stage1(manifest, tmp_path / "out.jsonl", source="template", splits=("trian",), progress=False)


def test_metadata_that_are_not_told_are_listed_with_their_rows(tmp_path):
    rows = [gender(1), gender(2, metadata={"gender": "man", "speaker": "A", "speaking_style": "calm"})]
    manifest = _manifest(tmp_path, rows)
    report = run_stage1(
        manifest, tmp_path / "out.jsonl", writer=lambda batch: ["The speaker is a man."] * len(batch), progress=False
    )
    assert dict(report.not_told) == {"speaker": 2, "pool": 1}
    assert "the number of rows: speaker (2), pool (1)" in report.summary()
    told = run_stage1(manifest, tmp_path / "template.jsonl", source="template", progress=False)
    assert "metadata" not in told.summary()  # a template reads none


def test_the_fingerprint_changes_only_where_other_words_are_read():
    def identity(**metadata):
        return _Recipe("text_backbone", "lm", 24, 160).identity([gender(1, metadata={"gender": "man", **metadata})])

    def before(**metadata):
        rows = [gender(1, metadata={"gender": "man", **metadata}).to_row()]
        made = {"source": "text_backbone", "backbone": "lm", "max_new_tokens": 24}
        return fingerprint({"wording": 1, **made, "examples": rows})

    text = "[00:00-00:05] Line 1. (Gender: man)"
    assert identity(seed_description=text) != before(seed_description=text)  # once it was told in parts
    assert identity(speaker="JOE") == before(speaker="JOE") and identity(style="calm") != before(style="calm")


def test_bad_arguments_are_named(tmp_path):
    manifest = _manifest(tmp_path, [gender(1)])
    for options, message in (
        ({"source": "oracle"}, "source: expected one of"),
        ({"source": "audio_lm"}, "listening: expected a model that hears with source 'audio_lm', got None"),
        ({"accept": "all"}, "accept: expected one of"),
        ({"batch_examples": 0}, "batch_examples: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"max_characters": 0}, "max_characters: expected at least 1, got 0"),
        ({"max_reject_fraction": 2}, "max_reject_fraction: expected a number from 0 to 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stage1(manifest, tmp_path / "out.jsonl", **options)
    with pytest.raises(Stage1Error, match="writer: expected 1 answers, got 0"):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=lambda batch: [], progress=False)


def test_several_tasks_and_pools_get_answers(tmp_path):
    rows = [gender(1), gender(2, task="other"), gender(3, task="third"), gender(4, metadata={"pool": "distill"})]
    manifest = _manifest(tmp_path, rows)
    report = run_stage1(manifest, tmp_path / "out.jsonl", source="template", task=["gender", "other"], progress=False)
    assert (report.accepted, report.passed_through) == (3, 1)
    report = run_stage1(
        manifest, tmp_path / "pool.jsonl", source="template", pool=("teacher",), task="gender", progress=False
    )
    assert (report.accepted, report.passed_through) == (1, 3)
    with pytest.raises(Stage1Error, match=r"\(not the same: which rows get targets, the model or the wording\)"):
        run_stage1(manifest, tmp_path / "out.jsonl", source="template", progress=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "template", "--backbone", "x"], "--backbone: expected --source text_backbone beside it"),
        (["--max-cut-fraction", "0.1"], "--max-cut-fraction: expected --source audio_lm beside it, got text_backbone"),
        (["--source", "template", "--max-new-tokens", "9"], "--max-new-tokens: expected --source text_backbone beside it"),
        (["--splits", "trian"], "splits: expected some of"),
        (["--backbone", "gone/model"], "gone/model: the backbone was not found"),
        (["--max-reject-fraction", "2"], "max_reject_fraction: expected a number from 0 to 1"),
        (["--batch-examples", "0"], "batch_examples: expected at least 1"),
        (["--max-characters", "0"], "max_characters: expected at least 1"),
        (["--out", "in.jsonl"], "--out: expected another file than the manifest"),
        (["--out", "x/../in.jsonl"], "--out: expected another file than the manifest"),
    ],
)
def test_settings_that_cannot_work_are_found_before_the_manifest_is_read(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.pseudo_gt.stage1.read_data", lambda *_, **__: pytest.fail("the manifest was read"))
    assert main(["in.jsonl", "--out", "out.jsonl", *words]) == 1
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["notes", '{"kdkernels_manifest": 1}\n{"id": "1", "audio": null}\n'])
def test_a_file_that_is_no_result_is_not_written_over(tmp_path, capsys, monkeypatch, there):
    _manifest(tmp_path, [gender(1)])
    out = tmp_path / "out.jsonl"
    out.write_text(there)
    words = [str(tmp_path / "in.jsonl"), "--out", str(out), "--source", "template"]
    with monkeypatch.context() as patched:
        patched.setattr("models.pseudo_gt.stage1.read_data", lambda *_, **__: pytest.fail("the manifest was read"))
        assert main(words) == 1
    assert capsys.readouterr().err == f"error: {out}: holds no result of Stage 1; choose another --out or --restart\n"
    assert out.read_text() == there and sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert main([*words, "--restart"]) == 0 and read_manifest(out).examples[0].target == "The speaker is a man."


def test_a_result_of_other_settings_is_not_written_over(tmp_path, capsys, monkeypatch):
    """Nor are its rejects; a run with --restart that was stopped goes on without it."""
    manifest, out = _manifest(tmp_path, [gender(1), gender(2), gender(3)]), tmp_path / "out.jsonl"
    options = {"progress": False, "batch_examples": 1}
    run_stage1(manifest, out, writer=lambda batch: ["" if e.id == "clip-2" else "A man." for e in batch], **options)
    names = ["in.jsonl", "out.jsonl", "out.jsonl.rejects.jsonl"]
    there = {name: (tmp_path / name).read_bytes() for name in names}
    words = [str(tmp_path / "in.jsonl"), "--out", str(out), "--source", "template"]
    monkeypatch.setattr("models.pseudo_gt.stage1.read_data", lambda *_, **__: pytest.fail("the manifest was read"))
    assert main(words) == 1
    told = "not the same: source, backbone, max_new_tokens); choose another --out or --restart\n"
    assert capsys.readouterr().err.endswith(told)
    with pytest.raises(Stage1Error, match="not the same: source, backbone, max_new_tokens"):
        run_stage1(manifest, out, source="template", **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == there

    asked = []

    def stops(batch):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.extend(batch)
        return ["A man."]

    with pytest.raises(KeyboardInterrupt):
        run_stage1(manifest, out, backbone="other", writer=stops, restart=True, **options)
    report = run_stage1(manifest, out, backbone="other", writer=lambda batch: ["A man."] * len(batch), **options)
    assert (report.accepted, report.resumed) == (3, 1) and [path.name for path in sorted(tmp_path.iterdir())] == names[:2]

    out.write_bytes(out.read_bytes() + b"{}\n")
    with pytest.raises(Stage1Error, match=r"(?s)1 of 4 rows are bad.*choose another --out or --restart"):
        run_stage1(manifest, out, backbone="other", **options)


def test_command_line(tmp_path, capsys):
    _manifest(tmp_path, [gender(1)])
    arguments = [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main([*arguments, "--source", "template"]) == 0
    assert "1 targets accepted (100.0%)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--source", "magic"])
    assert capsys.readouterr().err.startswith("error: argument --source: invalid choice: 'magic'")
