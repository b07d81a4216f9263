"""A full disk, a folder that cannot be written, truncated and altered files, NaN: an error that names the file or the example,
and the last good state kept. Checkpoints, manifests, Stage 1, features, predictions."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch

from models.data.manifest import Example, Manifest, read_manifest, write_manifest
from models.evaluation.predictions import (
    EvaluationError,
    Prediction,
    append_predictions,
    read_predictions,
    write_header,
)
from models.pseudo_gt.stage1 import Stage1Error, run_stage1
from models.speech_lm.features import FeatureError, FeatureStore, extract_features
from models.training.checkpoint import CheckpointError, find_checkpoint, list_checkpoints
from tests.models.training.test_checkpoint import save, setup, train

EXAMPLES = [
    Example(id=f"clip{i}", audio=None, transcription="word " * 20, task="gender", choices=("man", "woman"), answer="man")
    for i in range(12)
]


def prediction(number: int) -> Prediction:
    return Prediction(
        id=f"clip{number}", task="gender", kind="neutral", choices=["man", "woman"], answer="man", prediction="man " * 50
    )


def failing(call):
    """Type and text of the error of `call`; None if there is none."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def open_to_others(folder):
    """So that a process without rights finds its way to what pytest keeps for its owner."""
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if parent.stat().st_uid == os.geteuid() and not mode & stat.S_IXOTH:
            os.chmod(parent, mode | stat.S_IXOTH)


@pytest.fixture
def read_only(tmp_path):
    """Closes the folder that it is given, until the test ends."""
    closed = []

    def close(folder):
        open_to_others(folder / "x")
        os.chmod(folder, 0o555)
        closed.append(folder)

    yield close
    for folder in closed:
        os.chmod(folder, 0o755)


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def two_steps(root):
    net, optimizer, names = setup()
    train(net, optimizer, 1)
    save(root, 1, net, optimizer, names)
    return net, optimizer, names


@pytest.mark.parametrize("room", [0, 50, 400, 3000])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_it(tmp_path, in_child, room):
    state = two_steps(tmp_path)
    kind, message = in_child(lambda: failing(lambda: save(tmp_path, 2, *state)), file_bytes=room)
    assert kind == "OSError" and "File too large" in message and "step-00000002" in message
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and find_checkpoint(tmp_path, "auto").step == 1
    save(tmp_path, 2, *state)  # the disk has room again
    assert find_checkpoint(tmp_path, "auto").step == 2


def test_a_checkpoint_in_a_folder_that_cannot_be_written(tmp_path, in_child, read_only):
    state = two_steps(tmp_path / "run")
    read_only(tmp_path / "run")
    kind, message = in_child(lambda: failing(lambda: save(tmp_path / "run", 2, *state)), unprivileged=True)
    assert kind == "PermissionError" and str(tmp_path / "run") in message
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-00000001"]


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    """A flip anywhere in any of its files is found before a weight is taken from it."""
    path = tmp_path / "step-00000001"
    two_steps(tmp_path)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 12)):
            data = bytearray(whole)
            data[at] ^= 1 << at % 8
            file.write_bytes(data)
            if file.name == "manifest.json" and _same_manifest(whole, data):
                continue
            with pytest.raises(CheckpointError, match=r"step-00000001"):
                find_checkpoint(tmp_path, "auto")
        file.write_bytes(whole)
    assert find_checkpoint(tmp_path, "auto").step == 1


def _same_manifest(whole: bytes, data: bytes) -> bool:
    """A manifest's own bits are not summed: one that says the same in other blanks, or another step, is as good."""
    try:
        old, new = json.loads(whole), json.loads(data)
    except ValueError:
        return False
    return {k: old[k] for k in ("format", "files")} == {k: new.get(k) for k in ("format", "files")}


# -- manifests and stage 1 -------------------------------------------------------------------------------------------------


def test_a_manifest_that_finds_no_room_leaves_the_old_one(tmp_path, in_child):
    path = write_manifest(tmp_path / "m.jsonl", EXAMPLES[:1])
    kind, message = in_child(lambda: failing(lambda: write_manifest(path, EXAMPLES)), file_bytes=500)
    assert kind == "OSError" and message == f"[Errno 27] File too large: '{path}'"
    assert read_manifest(path).examples == EXAMPLES[:1] and [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_manifest_in_a_folder_that_cannot_be_written(tmp_path, in_child, read_only):
    path = write_manifest(tmp_path / "data" / "m.jsonl", EXAMPLES[:1])
    read_only(tmp_path / "data")
    kind, message = in_child(lambda: failing(lambda: write_manifest(path, EXAMPLES)), unprivileged=True)
    assert kind == "PermissionError" and str(path.parent) in message and read_manifest(path).examples == EXAMPLES[:1]


def stage1(folder, asked=None):
    def writer(batch):
        if asked is not None:
            asked.extend(example.id for example in batch)
        return ["The speaker is a man."] * len(batch)

    manifest = Manifest(EXAMPLES, [], folder, {})
    return run_stage1(manifest, folder / "out.jsonl", writer=writer, batch_examples=2, progress=False)


@pytest.mark.parametrize("room", [0, 30, 300, 450, 2000])
def test_stage_1_goes_on_once_there_is_room(tmp_path, in_child, room):
    """In the journal's first line, in its answers, and in the manifest at the end."""
    (tmp_path / "whole").mkdir()
    stage1(tmp_path / "whole")
    folder = tmp_path / "work"
    folder.mkdir()
    kind, message = in_child(lambda: failing(lambda: stage1(folder)), file_bytes=room)
    assert kind == "OSError" and f"'{folder}/out.jsonl" in message
    journal = folder / "out.jsonl.journal"  # without a line it is not kept
    kept = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
    asked: list[str] = []
    stage1(folder, asked)
    assert len(asked) == len(set(asked)) == 12 - kept and (room < 300 or kept > 0)
    assert (folder / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()


def test_stage_1_in_a_folder_that_cannot_be_written(tmp_path, in_child, read_only):
    (tmp_path / "data").mkdir()
    read_only(tmp_path / "data")
    kind, message = in_child(lambda: failing(lambda: stage1(tmp_path / "data")), unprivileged=True)
    assert kind == "PermissionError" and "out.jsonl.journal" in message


@pytest.mark.parametrize("line", ['{"id": "clip1", "text": 3}', '{"id": "clip1"}', "[" * 50_000, "7", '{"id": [], "text": ""}'])
def test_a_journal_of_other_lines_is_damaged(tmp_path, in_child, line):
    in_child(lambda: failing(lambda: stage1(tmp_path)), file_bytes=300)
    journal = tmp_path / "out.jsonl.journal"
    kept = journal.read_bytes()
    journal.write_bytes(kept[: kept.rfind(b"\n") + 1] + line.encode() + b"\n")
    with pytest.raises(Stage1Error, match=r"out.jsonl.journal: damaged, not only at its end"):
        stage1(tmp_path)


# -- features --------------------------------------------------------------------------------------------------------------


def test_features_that_find_no_room_leave_the_old_ones(tmp_path, in_child, read_only):
    path = tmp_path / "data" / "f.safetensors"
    FeatureStore(["a"], torch.ones(1, 1, 2, 2)).save(path)
    more = FeatureStore(["a", "b"], torch.zeros(2, 4, 25, 16))
    kind, message = in_child(lambda: failing(lambda: more.save(path)), file_bytes=1000)
    assert kind == "OSError" and message == f"[Errno 27] File too large: '{path}'"
    read_only(path.parent)
    kind, message = in_child(lambda: failing(lambda: more.save(path)), unprivileged=True)
    assert kind == "PermissionError" and str(path.parent) in message
    assert torch.equal(FeatureStore.load(path).features, torch.ones(1, 1, 2, 2).half())


def test_a_feature_file_cut_off_or_of_other_content_is_named(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "f.safetensors"
    whole = FeatureStore(["a", "b"], torch.ones(2, 1, 2, 2)).save(path).read_bytes()
    for size in (0, 7, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FeatureError, match=r"f\.safetensors: not a feature file"):
            FeatureStore.load(path)
    path.write_bytes(b"\xff" * 8 + whole[8:])  # a header of 2^64 bytes
    with pytest.raises(FeatureError, match=r"f\.safetensors: not a feature file"):
        FeatureStore.load(path)
    for keys in (None, "[" * 50_000, "7", '["a"]', '["a", "a"]', '[["a"], {}]'):
        save_file({"features": torch.ones(2, 1, 2, 2)}, path, metadata=None if keys is None else {"keys": keys})
        with pytest.raises(FeatureError, match=r"f\.safetensors: not a feature file"):
            FeatureStore.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_clips_whose_features_are_not_finite_are_skipped_and_named(tmp_path, value):
    """1e6 is finite, but not in the float16 of the store."""
    import numpy as np

    from models.data.audio import write_audio

    for i in range(4):
        write_audio(tmp_path / f"{i}.wav", np.full(1600 * (i + 1), 0.5, np.float32))
    examples = [Example(id=f"e{i}", audio=f"{i}.wav") for i in range(4)]

    def encode(waves):
        return torch.stack([torch.full((1, 2, 2), value if len(w) == 3200 else 1.0) for w in waves])

    options = {"audio_root": tmp_path, "batch_clips": 3, "progress_bar": False}
    store, problems = extract_features(examples, encode, max_bad_fraction=0.25, **options)
    assert problems == [("e1", "1.wav: the encoder's features are not finite in float16")]
    assert len(store) == 3 and examples[1] not in store and store.rows(examples[:1]).isfinite().all()
    with pytest.raises(FeatureError, match=r"1 of 4 clips could not be read .*e1: 1\.wav: the encoder's features"):
        extract_features(examples, encode, **options)
    with pytest.raises(FeatureError, match="examples: expected at least one clip"):
        extract_features(examples[1:2], encode, max_bad_fraction=1.0, **options)


# -- predictions -----------------------------------------------------------------------------------------------------------


def test_predictions_that_find_no_room_lose_no_line_before_them(tmp_path, in_child):
    path = tmp_path / "p.jsonl"
    write_header(path, {})
    append_predictions(path, [prediction(0), prediction(1)])
    size = path.stat().st_size
    kind, message = in_child(lambda: failing(lambda: append_predictions(path, [prediction(2)])), file_bytes=size + 30)
    assert kind == "OSError" and message == f"[Errno 27] File too large: '{path}'" and path.stat().st_size == size
    append_predictions(path, [prediction(2)])
    assert [p.id for p in read_predictions(path)[1]] == ["clip0", "clip1", "clip2"]


def test_predictions_in_a_folder_that_cannot_be_written(tmp_path, in_child, read_only):
    (tmp_path / "data").mkdir()
    read_only(tmp_path / "data")
    kind, message = in_child(lambda: failing(lambda: write_header(tmp_path / "data" / "p.jsonl", {})), unprivileged=True)
    assert kind == "PermissionError" and str(tmp_path / "data") in message


@pytest.mark.parametrize("line", ["[" * 50_000, "7", '{"id": "x"}', '{"id": "x", "unknown": 1}', "\0\0"])
def test_predictions_of_other_lines_are_damaged(tmp_path, line):
    path = tmp_path / "p.jsonl"
    write_header(path, {})
    with open(path, "a") as file:
        file.write(line + "\n")
    append_predictions(path, [prediction(0)])
    with pytest.raises(EvaluationError, match=r"p.jsonl: line 2 is damaged"):
        read_predictions(path)
    path.write_text(line)
    with pytest.raises(EvaluationError, match="expected a first line"):
        read_predictions(path)
