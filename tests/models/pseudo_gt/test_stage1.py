"""Stage 1: wording, checking of answers, and a journal that loses and doubles nothing wherever it is killed."""

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
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.data.answers import named_choices
from models.data.manifest import Example, Manifest, read_manifest, write_manifest
from models.data.prompts import TASKS
from models.pseudo_gt.stage1 import (
    BackboneWriter,
    Stage1Error,
    check_answer,
    describe,
    main,
    run_stage1,
    set_targets,
    worked_examples,
)

REPOSITORY = Path(__file__).parents[3]


def _gender(number: int, label: str = "man", **fields) -> Example:
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


def test_wording_tells_the_facts_and_neither_the_hint_nor_the_speaker():
    assert describe(_gender(1)) == "[00:00-00:02] Line 1. (Gender: man, SNR: -3 dB)"
    timed = _gender(1, start_seconds=61.0, end_seconds=65.5, metadata={"text": "All of it.", "language": "Danish"})
    assert describe(timed) == "[01:01-01:05] All of it. (Language: Danish)"
    assert describe(Example(id="a", audio=None, transcription="Hm")) == "Hm"


def test_wording_has_a_place_for_every_task_that_is_not_about_the_meaning():
    for task in TASKS.values():
        if task.name not in ("place", "mood"):  # which the words tell
            label = (task.choices or ("German",))[0]
            example = Example(id="a", audio="a.flac", task=task.name, metadata={task.name: label, "text": "Go home."})
            assert label in describe(example), task.name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The speaker is a man.", None),
        ("THE SPEAKER IS A *MAN*!", None),
        ("", "empty"),
        (" \n", "empty"),
        ("man " * 50, "too long"),
        ("The speaker is tall.", "no choice named"),
        ("The speaker is a mankind.", "no choice named"),
        ("A man or a woman.", "several choices named"),
        ("The speaker is a woman.", "wrong choice named"),
    ],
)
def test_answers_are_checked(text, reason):
    assert check_answer(text, _gender(1)) == reason


def test_answers_to_free_and_to_unlabelled_questions():
    assert check_answer("Anything.", _gender(1, choices=(), answer=None)) is None
    assert check_answer("The speaker is a woman.", _gender(1, answer=None)) is None
    assert check_answer("A man or a woman.", _gender(1, answer=None)) == "several choices named"


def test_the_longer_of_two_choices_counts_where_one_contains_the_other():
    assert named_choices("It is very fast.", ("fast", "very fast")) == ["very fast"]
    assert named_choices("It is fast.", ("fast", "very fast")) == ["fast"]
    assert named_choices("fast, not very fast", ("fast", "very fast")) == ["fast", "very fast"]


@given(st.text(max_size=60))
def test_checking_never_fails(text):
    assert check_answer(text, _gender(1)) is None or isinstance(check_answer(text, _gender(1)), str)


def test_worked_examples_are_shared_by_a_task_and_end_with_the_first_label():
    shared = worked_examples(_gender(1))
    assert shared == worked_examples(_gender(2, "woman"))
    assert shared.startswith("Question: Is the speaker a man or a woman?\n\n")
    answers = [block.rpartition(" -> ")[2] for block in shared.strip().split("\n\n")[1:]]
    assert answers == [f"The speaker is a {label}." for label in ("man", "woman", "woman", "man")]
    own = worked_examples(_gender(1, task="content", question="Which word is spoken, cat or dog?", choices=()))
    assert own.startswith("Question: Which word") and own == worked_examples(_gender(1, task="new", choices=()))


def test_set_targets_by_id():
    examples = [_gender(1), _gender(2, target="kept", target_source="human")]
    done = set_targets(examples, {"clip-1": "The speaker\nis a man."})
    assert (done[0].target, done[0].target_source) == ("The speaker is a man.", "teacher")
    assert done[1] == examples[1]
    with pytest.raises(ValueError, match="targets: expected ids of the examples, got 1 others, such as 'x'"):
        set_targets(examples, {"x": "a"})
    with pytest.raises(ValueError, match="targets: expected text, got an empty one for 'clip-1'"):
        set_targets(examples, {"clip-1": " "})
    with pytest.raises(ValueError, match="target_source: expected one of"):
        set_targets(examples, {}, target_source="oracle")


def test_template_source_fills_in_sentences_and_is_named(tmp_path):
    examples = [_gender(1), _gender(2, "woman"), _gender(3, split="test"), _gender(4, metadata={"pool": "distill"})]
    manifest = _manifest(tmp_path, examples)
    report = run_stage1(manifest, tmp_path / "out.jsonl", source="template", pool="teacher", progress=False)
    assert (report.accepted, report.passed_through, report.acceptance()) == (2, 2, 1.0)
    out = read_manifest(tmp_path / "out.jsonl")
    assert [e.target for e in out] == ["The speaker is a man.", "The speaker is a woman.", None, None]
    assert [e.target_source for e in out] == ["template", "template", None, None]
    assert out.header["seed"] == 3 and out.header["stage1"]["source"] == "template"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_rejected_answers_are_counted_listed_and_left_out(tmp_path):
    answers = {0: "The speaker is a man.", 1: "The speaker is a woman.", 2: "", 3: "Well."}
    manifest = _manifest(tmp_path, [_gender(number) for number in answers])
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
    manifest = _manifest(tmp_path, [_gender(number) for number in range(4)])
    with pytest.raises(Stage1Error, match=r"more than 50% of the answers were rejected; 0 targets accepted"):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=lambda batch: [""] * len(batch), progress=False)
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl.rejects.jsonl").exists()


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(tmp_path):
    manifest = _manifest(tmp_path, [_gender(1), _gender(2)])
    run_stage1(manifest, tmp_path / "out.jsonl", source="template", progress=False)

    def refuse(_batch):
        raise AssertionError("written again")

    again = run_stage1(manifest, tmp_path / "out.jsonl", source="template", writer=refuse, progress=False)
    assert (again.accepted, again.resumed) == (2, 2)
    with pytest.raises(AssertionError, match="written again"):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=refuse, progress=False)


def test_the_last_torn_line_is_dropped_and_written_again(tmp_path):
    manifest = _manifest(tmp_path, [_gender(number) for number in range(5)])

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
    manifest = _manifest(tmp_path, [dataclasses.replace(_gender(number), choices=(), answer=None) for number in range(8)])
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
    manifest = _manifest(tmp_path, [_gender(1), _gender(2)])
    journal = tmp_path / "out.jsonl.journal"

    def fail(batch):
        if batch[0].id != "clip-1":
            raise KeyboardInterrupt
        return ["The speaker is a man."]

    with pytest.raises(KeyboardInterrupt):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=fail, batch_examples=1, progress=False)
    if cut == "other settings":
        changed = dataclasses.replace(manifest, examples=[_gender(3)])
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
    examples = [_gender(number, "man" if number % 3 else "woman") for number in range(120)]
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
    write_manifest(folder / "in.jsonl", [_gender(1, audio="audio/a.flac")])
    manifest = read_manifest(folder / "in.jsonl", check_audio=False)
    run_stage1(manifest, tmp_path / "out.jsonl", source="template", progress=False)
    assert read_manifest(tmp_path / "out.jsonl", check_audio=False).examples[0].audio == "deep/corpus/audio/a.flac"
    with pytest.raises(ValueError, match=r"out: expected a file in .* or above it"):
        run_stage1(manifest, folder / "below" / "out.jsonl", source="template", progress=False)


def test_a_run_that_failed_before_its_first_answer_does_not_stand_in_the_way_of_another(tmp_path):
    def fails(examples):
        raise Stage1Error("no backbone")

    manifest, out = _manifest(tmp_path, [_gender(1)]), tmp_path / "out.jsonl"
    with pytest.raises(Stage1Error, match="no backbone"):
        run_stage1(manifest, out, writer=fails, progress=False)
    assert run_stage1(manifest, out, source="template", progress=False).accepted == 1


def test_rows_that_pass_through_are_part_of_what_is_finished(tmp_path):
    out = tmp_path / "out.jsonl"
    run_stage1(_manifest(tmp_path, [_gender(1)]), out, source="template", progress=False)
    run_stage1(_manifest(tmp_path, [_gender(1), _gender(2, split="test")]), out, source="template", progress=False)
    assert [example.id for example in read_manifest(out)] == ["clip-1", "clip-2"]


def test_a_selection_of_nothing_is_an_error(tmp_path):
    manifest = _manifest(tmp_path, [_gender(1)])
    with pytest.raises(Stage1Error, match=r"no row to write a target for .*task gendre"):
        run_stage1(manifest, tmp_path / "out.jsonl", source="template", task="gendre", progress=False)
    with pytest.raises(ValueError, match=r"splits: expected some of .*got 'trian'"):
        run_stage1(manifest, tmp_path / "out.jsonl", source="template", splits=("trian",), progress=False)


def test_bad_arguments_are_named(tmp_path):
    manifest = _manifest(tmp_path, [_gender(1)])
    for options, message in (
        ({"source": "oracle"}, "source: expected one of"),
        ({"batch_examples": 0}, "batch_examples: expected at least 1, got 0"),
        ({"max_reject_fraction": 2}, "max_reject_fraction: expected a number from 0 to 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stage1(manifest, tmp_path / "out.jsonl", **options)
    with pytest.raises(Stage1Error, match="writer: expected 1 answers, got 0"):
        run_stage1(manifest, tmp_path / "out.jsonl", writer=lambda batch: [], progress=False)


def test_command_line(tmp_path, capsys):
    _manifest(tmp_path, [_gender(1)])
    arguments = [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main([*arguments, "--source", "template"]) == 0
    assert "1 targets accepted (100.0%)" in capsys.readouterr().out
    assert main([*arguments, "--source", "magic"]) == 1
    assert capsys.readouterr().err.startswith("error: source: expected one of")


class _Characters:
    """A tokenizer of single characters, with a token of its own for the end of a line."""

    eos_token_id, pad_token_id = 1, 0

    def encode(self, text, *, add_special_tokens=True):
        return [2 + ord(c) % 94 if c != "\n" else 97 for c in text]

    def batch_decode(self, rows, *, skip_special_tokens):
        return [
            "".join("\n" if t == 97 else chr(94 + (int(t) - 2 - 94 % 94) % 94) for t in row if t > 1) for row in rows
        ]


def test_backbone_writer_in_batches_equals_one_by_one_without_any_cache():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=98, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    tokenizer = _Characters()
    writer = BackboneWriter(model, tokenizer, max_new_tokens=8)
    examples = [
        _gender(1),
        _gender(2, "woman", transcription="A much longer line than the first one was."),
        _gender(3, task="content", question="Which word is spoken, cat or dog?", choices=("cat", "dog"), answer=None),
    ]
    expected = []
    for example in examples:
        end = describe(example)
        if example.task == "content":
            end = f"Question: {example.question}\n{end}"
        ids = torch.tensor([tokenizer.encode(worked_examples(example) + end + " ->")])
        answer = []
        with torch.no_grad():
            for _ in range(8):  # greedy, everything computed anew for each token
                token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
                if token in (1, 97):
                    break
                answer.append(token)
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        expected.append(tokenizer.batch_decode([answer], skip_special_tokens=True)[0].strip().split("\n")[0].strip())
    assert writer(examples) == expected
    assert writer(examples) == expected  # the shared keys and values are as they were
