"""The training loop on several ranks: the steps of one, stopped together, gone on from by another number of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "kdkernels"))
import train_fakes as fakes
from ranks import run_ranks

from models.config import ConfigError
from models.distributed import Ranks
from models.metrics import read_metrics
from models.sources import TrainingData

ROOT = Path(__file__).parents[2]
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


def run(failures, out_dir, objective, words, killed_rank=None):
    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    model, data = fakes.FakeLM(seed=1), fakes.make_data()
    model.dropout = torch.nn.Identity()  # each rank draws its own
    if killed_rank == ranks.rank:
        data = Killing(data.examples, data.make_batch)
    result, _ = fakes.run(out_dir, objective, *WORDS, *words, data=data, model=model, ranks=ranks)
    return result.step, result.stopped_by


def outcome(folder):
    """(curves, weights) of a finished run."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]
    return lines, load_file(folder / "final" / "model.safetensors")


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


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(one_rank, parallel, tmp_path):
    objective, alone = one_rank
    assert run_ranks(run, 2, tmp_path, objective, [f"run.parallel={parallel}"]) == [(20, None)] * 2
    expected = outcome(alone)
    same(outcome(tmp_path), expected)
    assert len(expected[0]) == 5 and expected[0][-1]["loss"] < expected[0][0]["loss"]


def test_going_on_with_another_number_of_ranks(one_rank, tmp_path):
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


def test_a_signal_to_one_rank_stops_all(tmp_path):
    stopped = run_ranks(run, 2, tmp_path, "caad", ["run.parallel=ddp"], 1)
    assert stopped == [(5, signal.SIGTERM)] * 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_settings_that_do_not_go_with_ranks(tmp_path):
    with pytest.raises(ConfigError, match=r"optim.batch_examples: expected a multiple of the 3 ranks, got 16"):
        fakes.run(tmp_path, "caad", ranks=Ranks(CPU, 0, 3))
    with pytest.raises(ConfigError, match=r"model.prefix_cache_mib: expected 0 with run.parallel=fsdp2, got 4096"):
        fakes.run(tmp_path, "caad", "run.parallel=fsdp2", "model.prefix_cache_mib=4096")
    with pytest.raises(ValueError, match="'ddp' needs a process group; start with torchrun"):
        fakes.run(tmp_path, "caad", "run.parallel=ddp")
    with pytest.raises(ValueError, match="strategy: expected ddp or fsdp2 on 2 ranks, got 'none'"):
        fakes.run(tmp_path, "caad", ranks=Ranks(CPU, 0, 2))


def speech_run(failures, out_dir, parallel):
    """A SpeechLM with a decoder of transformers, whose layers are sharded one by one; its features come with the examples."""
    from tiny_speech import make_examples, make_features, make_speech_lm

    from models.sources import make_training_data

    ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
    student, teacher = make_speech_lm(), make_speech_lm()
    with torch.no_grad():
        for parameter in teacher.connector.parameters():
            parameter.add_(0.05)
    features = make_features(student, 8)
    for lm in (student, teacher):
        lm.fit_feature_statistics(features)
    examples = make_examples(8)

    class Store:
        def rows(self, chosen):
            return features[[int(example.id[1:]) for example in chosen]]

    from kdkernels.teacher import DualPathTeacher, MarkAbsent
    from models.config import SourceConfig
    from models.sources import OWN_TEACHER
    from models.teachers import Source, TeacherStates
    from models.train import train

    recipe = fakes.fake_recipe(
        out_dir, "caad", "optim.steps=4", "optim.batch_examples=4", "optim.warmup_steps=1", "run.log_every_steps=1",
        "model.prefix_cache_mib=0", f"run.parallel={parallel}", "optim.audio_dropout=0",
    )  # fmt: skip
    data = make_training_data(student, examples, Store(), prefix_cache_mib=0)
    dual = DualPathTeacher(teacher, negative=MarkAbsent())

    def states_of(batch, _examples):
        states = dual(batch.model_inputs(), batch.target_index)
        return TeacherStates(states.audio_hidden, states.text_hidden, dual.head)

    source = Source(OWN_TEACHER, SourceConfig(role="audio", folder="fake"), states_of)
    train(recipe, model=student, data=data, sources=[source], ranks=ranks)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_speech_lm(tmp_path, parallel):
    curves, weights = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run_ranks(speech_run, ranks, folder, parallel)
        curves.append([line["loss"] for line in read_metrics(folder / "metrics.jsonl")])
        weights.append(load_file(folder / "final" / "connector.safetensors"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-3) and len(set(curves[0])) == 4
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-2, atol=1e-2, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The processes that torchrun starts find each other, train, and leave one result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(fakes.__file__)), str(tmp_path), "caad", *WORDS, "run.parallel=fsdp2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8, 12, 16, 20]
    assert (tmp_path / "final" / "model.safetensors").is_file()
