"""The training loop on several ranks: they take the steps of one rank, stop together, and other numbers of ranks continue."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_speech
import torch
import torch.distributed as dist
import train_fakes as fakes
from ranks import run_ranks
from safetensors.torch import load_file

from models.training.build_sources import build_sources
from models.training.checkpoint import CheckpointError
from models.training.curves import read_metrics
from models.training.distributed import Ranks
from models.training.recipe_checks import ConfigError
from models.training.train import train
from models.training.training_data import TrainingData, make_training_data

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
WORDS = (
    "optim.batch_examples=8", "optim.micro_batch_examples=2", "run.save_every_steps=8", "optim.learning_rate=0.01",
    "model.prefix_cache_mib=0", "run.keep_last_checkpoints=5",
)  # fmt: skip


class Killing(TrainingData):
    """Sends SIGTERM to its process in the fifth step."""

    def draw(self, cursor, count, *, seed):
        if cursor == 4 * count:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().draw(cursor, count, seed=seed)


def make_model():
    model = fakes.FakeLM(seed=1)
    model.dropout = torch.nn.Identity()  # each rank draws its own
    return model


def run(failures, out_dir, objective, words, killed_rank=None):
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    model, data = make_model(), fakes.make_data()
    if killed_rank == ranks.rank:
        data = Killing(data.examples, data.make_batch)
    result, _ = fakes.run(out_dir, objective, *WORDS, *words, data=data, model=model, ranks=ranks)
    return result.step, result.stopped_by


def curves_of(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]


def outcome(folder):
    """(curves, weights) of a finished run."""
    return curves_of(folder), load_file(folder / "final" / "model.safetensors")


def same(found, expected):
    assert [line.keys() for line in found[0]] == [line.keys() for line in expected[0]]
    for line, other in zip(found[0], expected[0], strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module", params=["caad", "sft"])
def one_rank(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(run, 1, folder, request.param, ["run.parallel=ddp"])
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(one_rank, parallel, tmp_path):
    objective, alone = one_rank
    assert run_ranks(run, 2, tmp_path, objective, [f"run.parallel={parallel}"]) == [(20, None)] * 2
    expected = outcome(alone)
    same(outcome(tmp_path), expected)
    assert len(expected[0]) == 5 and expected[0][-1]["loss"] < expected[0][0]["loss"]


def projected_run(failures, out_dir, words):
    """What a rank's teacher has read before the first step, and in the steps."""
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    recipe, data, read = fakes.fake_recipe(out_dir, "caad", *WORDS, *words), fakes.make_data(), []
    (own,) = fakes.make_sources(recipe, data)

    def teacher(batch, examples):
        read.append(batch.ids)
        return own.teacher(batch, examples)

    train(recipe, model=make_model(), data=data, sources=[dataclasses.replace(own, teacher=teacher)], ranks=ranks)
    return read


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_each_rank_projects_its_own_share_and_reads_all(tmp_path, parallel):
    """Twice: the second run finds what the first has left."""
    words = ["teacher.projection=9", f"run.parallel={parallel}"]
    (read,) = run_ranks(projected_run, 1, tmp_path / "one", ["teacher.projection=9", "run.parallel=ddp"])
    shares = run_ranks(projected_run, 2, tmp_path / "two", words)
    assert [len(ids) for ids in read] == [32, 8] and shares == [read[:1], read[1:]]
    indexes = sorted(path.name for path in (tmp_path / "two" / "projections").glob("index-*"))
    assert indexes == ["index-rank0.jsonl", "index-rank1.jsonl"]
    same(outcome(tmp_path / "two"), outcome(tmp_path / "one"))
    assert run_ranks(projected_run, 2, tmp_path / "two", [*words, "run.resume=auto"]) == [[], []]


@pytest.fixture
def one_thread():
    """As many as the ranks have: products of other threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_one_rank_is_the_loop_alone(tmp_path):
    """To the last bit, without audio dropout: ranks seed their random numbers in each step, the loop alone does not."""
    words = [*WORDS, "optim.audio_dropout=0"]
    run_ranks(run, 1, tmp_path / "ddp", "caad", ["run.parallel=ddp", "optim.audio_dropout=0"])
    fakes.run(tmp_path / "none", "caad", *words, model=make_model())
    (curves, weights), (expected, expected_weights) = outcome(tmp_path / "ddp"), outcome(tmp_path / "none")
    assert curves == expected and all(torch.equal(weights[name], w) for name, w in expected_weights.items())
    with pytest.raises(CheckpointError, match=r"format 1 expected, got distributed 1; run.parallel=none has a format of its own"):
        fakes.run(tmp_path / "ddp", "caad", *words, "run.resume=auto")


@pytest.mark.slow
def test_another_number_of_ranks_continues(one_rank, tmp_path):
    """Two ranks to step 8, one to step 16, two to the end."""
    objective, alone = one_rank
    for ranks, parallel, steps in ((2, "fsdp2", 8), (1, "ddp", 16), (2, "ddp", 20)):
        checkpoints = tmp_path / "checkpoints"
        words = [f"run.parallel={parallel}", "run.resume=auto"]
        run_ranks(run, ranks, tmp_path, objective, words)
        if steps < 20:
            for path in checkpoints.iterdir():
                if path.name > f"step-{steps:08d}":
                    path.rename(tmp_path / f"later-{ranks}-{path.name}")
            assert sorted(p.name for p in checkpoints.iterdir())[-1] == f"step-{steps:08d}"
    same(outcome(tmp_path), outcome(alone))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path):
    stopped = run_ranks(run, 2, tmp_path, "caad", ["run.parallel=ddp"], 1)
    assert stopped == [(5, signal.SIGTERM)] * 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def failing(failures, out_dir):
    """One bad clip, which one rank draws: what each rank raised."""
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    data = fakes.make_data()
    data.examples[11].audio[0] = torch.nan
    try:
        fakes.run(out_dir, "caad", *WORDS, "run.parallel=ddp", data=data, model=make_model(), ranks=ranks)
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return "no error", ""


@pytest.mark.slow
def test_what_stops_one_rank_stops_all_with_its_words(tmp_path):
    first, second = run_ranks(failing, 2, tmp_path)
    message = r"step \d: loss nan; nothing was updated. Examples of the batch: (clip\d+, )?clip11(, clip\d+)?$"
    assert first == second and first[0] == "NonFiniteError" and re.match(message, first[1]), (first, second)
    assert not (tmp_path / "final").exists()


def test_settings_that_ranks_do_not_allow(tmp_path):
    with pytest.raises(ConfigError, match=r"optim.batch_examples: expected a multiple of the 3 ranks, got 16"):
        fakes.run(tmp_path, "caad", ranks=Ranks(CPU, 0, 3))
    with pytest.raises(ConfigError, match=r"model.prefix_cache_mib: expected 0 with run.parallel=fsdp2, got 4096"):
        fakes.run(tmp_path, "caad", "run.parallel=fsdp2", "model.prefix_cache_mib=4096")
    with pytest.raises(ValueError, match="'ddp' needs a process group; start with torchrun"):
        fakes.run(tmp_path, "caad", "run.parallel=ddp")
    with pytest.raises(ValueError, match="strategy: expected ddp or fsdp2 on 2 ranks, got 'none'"):
        fakes.run(tmp_path, "caad", ranks=Ranks(CPU, 0, 2))


def speech_run(failures, out_dir, teacher_folder, parallel, train_lm, lm_dtype):
    """A SpeechLM with a decoder of transformers, whose layers are sharded one by one, its teacher and a snapshot of itself."""
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    student = tiny_speech.make_speech_lm(train_lm=train_lm, lm_dtype=lm_dtype)
    features = tiny_speech.make_features(student, 8)
    student.fit_feature_statistics(features)

    class Store:
        def rows(self, chosen):
            return features[[int(example.id[1:]) for example in chosen]]

    words = ["run.gradient_checkpointing=true"] if train_lm else [
        "layers.weight=0.5", "sources.snapshot.layers.weight=0.5", "sources.snapshot.layers.form=attention",
    ]  # fmt: skip
    recipe = fakes.fake_recipe(
        out_dir, "caad", "optim.steps=4", "optim.batch_examples=4", "optim.micro_batch_examples=1", "optim.warmup_steps=1",
        "run.log_every_steps=1", "model.prefix_cache_mib=0", f"run.parallel={parallel}", f"teacher.folder={teacher_folder}",
        "sources.snapshot.role=acoustic", "sources.snapshot.weight=0.5", "teacher.keep_mib=0", "sources.snapshot.keep_mib=0",
        *words,
    )  # fmt: skip
    data = make_training_data(student, tiny_speech.make_examples(8), Store(), prefix_cache_mib=0)
    torch.manual_seed(0)  # projections are drawn
    sources = build_sources(recipe, data, student, device=CPU)
    train(recipe, model=student, data=data, sources=sources, ranks=ranks)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    teacher = tiny_speech.make_speech_lm()
    with torch.no_grad():
        for parameter in teacher.connector.parameters():
            parameter.add_(0.05)
    return teacher.save_pretrained(tmp_path_factory.mktemp("teacher") / "lm", include_frozen=True)


@pytest.mark.slow
@pytest.mark.parametrize("lm_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_lm", [False, True])
def test_a_speech_lm(tmp_path, teacher_folder, train_lm, lm_dtype):
    """Layers and a further source with a frozen language model; with one that trains, a tied head and checkpointing."""
    curves, weights = {}, {}
    for parallel, ranks in (("ddp", 1), ("ddp", 2), ("fsdp2", 2)):
        key = f"{parallel} on {ranks}"
        run_ranks(speech_run, ranks, tmp_path / key, teacher_folder, parallel, train_lm, lm_dtype)
        curves[key] = curves_of(tmp_path / key)
        files = (tmp_path / key / "final").rglob("*.safetensors")
        weights[key] = {name: x for path in files for name, x in load_file(path).items()}
    expected = curves["ddp on 1"]
    assert len({line["loss"] for line in expected}) == 4 and {"kd_teacher", "kd_snapshot"} <= expected[0].keys()
    assert train_lm or (expected[-1]["layers"] > 0 and expected[-1]["layers_snapshot"] > 0)
    for key in ("ddp on 2", "fsdp2 on 2"):
        rel = 1e-2 if lm_dtype == "bfloat16" else 1e-3  # gradients rounded to 8 bits
        assert curves[key] == [pytest.approx(line, rel=rel, abs=1e-5) for line in expected], key
        assert weights[key].keys() == weights["ddp on 1"].keys()
        for name, weight in weights["ddp on 1"].items():
            close = torch.isclose(weights[key][name], weight, rtol=1e-2, atol=1e-2)
            # AdamW makes whole steps of a gradient that is nothing but the rounding of bfloat16.
            assert close.float().mean() >= (0.99 if lm_dtype == "bfloat16" else 1.0), f"{key}, {name}"


def torchrun(folder, *words):
    """(command, environment) of two processes that train into `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(fakes.__file__)), str(folder), "caad", *WORDS, *words]
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The processes that torchrun starts find each other, train, and leave one result."""
    command, environment = torchrun(tmp_path, "run.parallel=fsdp2")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8, 12, 16, 20]
    assert (tmp_path / "final" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_torchrun_that_is_told_to_stop_leaves_one_checkpoint_to_continue_from(tmp_path, parallel):
    """SIGTERM, as a scheduler sends it: torchrun passes it on, and all ranks save one step together."""
    command, environment = torchrun(tmp_path, f"run.parallel={parallel}", "run.save_every_steps=1000", "optim.steps=200")
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.1)
        running.terminate()
        said = running.communicate(timeout=100)[1]
    finally:
        running.kill()
    assert running.returncode != 0 and not (tmp_path / "final").exists()
    (path,) = (tmp_path / "checkpoints").iterdir()
    step = int(path.name.removeprefix("step-"))
    assert 4 <= step < 200, said
    done = subprocess.run([*command, "run.resume=auto"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps == list(range(4, 201, 4))


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_the_last_checkpoint_continues(tmp_path):
    """SIGKILL to one of two processes of torchrun in its eighth step: the run ends in time, the checkpoint continues."""
    command, environment = torchrun(tmp_path, "run.parallel=ddp", "run.save_every_steps=4")
    environment |= {"KILL_BY": "SIGKILL", "KILL_AT": "8", "KILL_RANK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert not (tmp_path / "final").exists()
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000004"]
    del environment["KILL_AT"]
    done = subprocess.run([*command, "run.resume=auto"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads:") == 2
    assert "gloo" not in done.stdout, "a thread of gloo that outlives its group can end the process by SIGABRT"
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8, 12, 16, 20]
