import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_fakes as fakes
from safetensors.torch import load_file

from kdkernels.teacher import LMHead
from models.backbones.device import pick_device
from models.training.checkpoint import CheckpointError, list_checkpoints
from models.training.curves import read_metrics
from models.training.objective import counted_positions, select_positions, token_weights
from models.training.recipe import OBJECTIVES
from models.training.recipe_sections import LossConfig
from models.training.teacher_states import TeacherStates, path_divergence
from models.training.train import NonFiniteError, main, train

ROOT = Path(__file__).parents[3]


def lines(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(Path(folder) / "metrics.jsonl")]


def final(folder):
    return (Path(folder) / "final" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_and_keeps_frozen_weights(tmp_path, objective):
    before = fakes.FakeLM(seed=1)
    result, model = fakes.run(tmp_path, objective, "optim.steps=120", "optim.audio_dropout=0")
    assert result.stopped_by is None and result.step == 120
    curve = lines(tmp_path)
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert torch.equal(model.head.weight, before.head.weight) and torch.equal(model.table, before.table)
    assert not torch.equal(model.connector.weight, before.connector.weight)
    assert ("kd" in curve[0]) == (objective in ("kd", "sharpened", "caad", "caad+", "sources"))
    assert ("alpha" in curve[0]) == (objective in ("sharpened", "caad", "caad+"))


@pytest.mark.slow
def test_objectives_differ_where_they_should(tmp_path):
    weights = {}
    for name, words in {
        "kd": ("kd",), "caad0": ("caad", "loss.alpha=0"), "caad2": ("caad", "loss.alpha=2"), "sharp": ("sharpened",),
    }.items():
        weights[name] = fakes.run(tmp_path / name, *words)[1].connector.weight.detach()
    assert torch.allclose(weights["kd"], weights["caad0"], rtol=1e-5, atol=1e-6)  # alpha 0 is plain distillation
    assert not torch.allclose(weights["kd"], weights["caad2"], atol=1e-3)
    assert not torch.allclose(weights["sharp"], weights["caad2"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "caad"])
@pytest.mark.parametrize("mode", ["uniform", "choice", "divergence"])
def test_four_parts_of_four_are_a_batch_of_sixteen(tmp_path, objective, mode):
    ce_mode = "uniform" if mode == "divergence" else mode
    words = (
        "optim.steps=6", f"loss.kd_token_weight={mode}", f"loss.ce_token_weight={ce_mode}", "loss.kd_background_weight=0.1",
        "optim.learning_rate=0.01",
    )
    models = {}
    for micro in (16, 4, 1):
        torch.manual_seed(0)
        recipe = fakes.fake_recipe(tmp_path / str(micro), objective, *words, f"optim.micro_batch_examples={micro}")
        data, model = fakes.make_data(), fakes.FakeLM(seed=1)
        model.dropout = torch.nn.Identity()  # draws by call, so it alone would differ
        train(recipe, model=model, data=data, sources=fakes.make_sources(recipe, data))
        models[micro] = model.connector.weight.detach()
    assert torch.allclose(models[4], models[16], rtol=1e-5, atol=1e-7)
    assert torch.allclose(models[1], models[16], rtol=1e-5, atol=1e-7)


def run_killed(out_dir, *words, kill_at=0, by="SIGINT"):
    env = os.environ | {"KILL_AT": str(kill_at), "KILL_BY": by, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(fakes.__file__)), str(out_dir), "caad", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_killed(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("by", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(tmp_path, undisturbed, by, status):
    killed = run_killed(tmp_path / "b", kill_at=9, by=by)
    assert killed.returncode == status, killed.stderr
    assert "Stopped after step 9" in killed.stderr and "RESUME" in killed.stderr
    assert [p.name for p in list_checkpoints(tmp_path / "b" / "checkpoints")] == ["step-00000009"]
    assert not (tmp_path / "b" / "final").exists()
    resumed = run_killed(tmp_path / "b", "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert final(undisturbed) == final(tmp_path / "b")
    assert lines(undisturbed) == lines(tmp_path / "b")
    assert [line["step"] for line in lines(tmp_path / "b")] == [4, 8, 12, 16, 20]


@pytest.mark.slow
def test_a_run_killed_outright_continues_from_its_last_checkpoint(tmp_path, undisturbed):
    words = ("run.save_every_steps=5",)
    assert run_killed(tmp_path, *words, kill_at=13, by="SIGKILL").returncode == -9
    resumed = run_killed(tmp_path, *words, "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert final(undisturbed) == final(tmp_path)
    assert lines(undisturbed) == lines(tmp_path)


def test_a_new_run_does_not_continue_from_an_earlier_one(tmp_path):
    class Stopping(fakes.TrainingData):
        def draw(self, cursor, count, *, seed):
            if cursor == 3 * 16:
                os.kill(os.getpid(), signal.SIGINT)
            return super().draw(cursor, count, seed=seed)

    data = fakes.make_data()
    fakes.run(tmp_path / "a", "kd", "optim.steps=6")
    fakes.run(tmp_path / "b", "kd", "optim.steps=6", "run.seed=1")
    earlier = final(tmp_path / "b")
    result, _ = fakes.run(tmp_path / "b", "kd", "optim.steps=6", data=Stopping(data.examples, data.make_batch))
    assert (result.step, result.stopped_by) == (4, signal.SIGINT)
    assert [p.name for p in list_checkpoints(tmp_path / "b" / "checkpoints")] == ["step-00000004"]
    assert [p.name for p in list_checkpoints(tmp_path / "b" / "checkpoints.previous")] == ["step-00000006"]
    assert not (tmp_path / "b" / "final").exists()  # its result is kept too, and nothing of it is lost
    assert (tmp_path / "b" / "final.previous" / "model.safetensors").read_bytes() == earlier
    fakes.run(tmp_path / "b", "kd", "optim.steps=6", "run.resume=auto")
    assert final(tmp_path / "a") == final(tmp_path / "b")


def test_a_run_that_was_started_again_by_mistake_goes_on_with_its_curves(tmp_path):
    """The new run sets the checkpoints aside; the curves were overwritten."""
    words = ("kd", "optim.steps=6", "run.log_every_steps=1")
    fakes.run(tmp_path / "a", *words)
    fakes.run(tmp_path / "b", *words, "run.save_every_steps=2", "run.keep_last_checkpoints=3")
    fakes.run(tmp_path / "b", *words, "run.seed=1")
    assert [line["step"] for line in lines(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]
    fakes.run(tmp_path / "b", *words, f"run.resume={tmp_path / 'b' / 'checkpoints.previous' / 'step-00000004'}")
    assert final(tmp_path / "a") == final(tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones_behind(tmp_path):
    words = ("kd", "optim.steps=9", "run.save_every_steps=3", "run.keep_last_checkpoints=3")
    fakes.run(tmp_path, *words)
    good = final(tmp_path)
    fakes.run(tmp_path, *words, "run.save_every_steps=4", f"run.resume={tmp_path / 'checkpoints' / 'step-00000003'}")
    assert final(tmp_path) == good
    assert [p.name[-1] for p in list_checkpoints(tmp_path / "checkpoints")] == ["4", "8", "9"]


def test_a_checkpoint_of_another_model_is_named(tmp_path, monkeypatch):
    fakes.run(tmp_path, "kd", "optim.steps=3")
    monkeypatch.setattr(fakes, "WIDTH", fakes.WIDTH + 1)
    with pytest.raises(CheckpointError, match=r"step-00000003: of another model: connector\.bias is \(8,\) there, \(9,\) here"):
        fakes.run(tmp_path, "kd", "optim.steps=3", "run.resume=auto")


def test_resume_after_the_end_changes_nothing(tmp_path):
    fakes.run(tmp_path, "kd", "optim.steps=5")
    before = final(tmp_path)
    fakes.run(tmp_path, "kd", "optim.steps=5", "run.resume=auto")
    assert final(tmp_path) == before


def test_resume_with_other_settings_is_refused(tmp_path):
    fakes.run(tmp_path, "kd", "optim.steps=5")
    with pytest.raises(CheckpointError, match=r"another recipe: loss\.temperature was 2\.0, is 3\.0"):
        fakes.run(tmp_path, "kd", "optim.steps=5", "run.resume=auto", "loss.temperature=3")


def test_resume_with_other_examples_is_refused(tmp_path):
    fakes.run(tmp_path, "kd", "optim.steps=5")
    data = fakes.make_data()
    with pytest.raises(CheckpointError, match="made with other examples than the 39 that were read now"):
        fewer = fakes.TrainingData(data.examples[:-1], data.make_batch)
        fakes.run(tmp_path, "kd", "optim.steps=5", "run.resume=auto", data=fewer)


def test_resume_from_a_damaged_checkpoint(tmp_path):
    words = ("kd", "optim.steps=6", "run.save_every_steps=3")
    fakes.run(tmp_path, *words)
    good = final(tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"step-00000006.*damaged.*step-00000003"):
        fakes.run(tmp_path, *words, "run.resume=auto")
    fakes.run(tmp_path, *words, "run.resume=fallback")
    assert final(tmp_path) == good


@pytest.mark.parametrize("objective", ["sft", "caad"])
def test_a_non_finite_step_names_its_examples_and_updates_nothing(tmp_path, objective):
    data = fakes.make_data()
    order = data.draw(0, 16, seed=0)
    bad = data.examples[order[6]]
    bad.audio = torch.full_like(bad.audio, float("nan"))
    recipe = fakes.fake_recipe(tmp_path, objective, "optim.micro_batch_examples=4", "optim.audio_dropout=0")
    model = fakes.FakeLM(seed=1)
    before = model.connector.weight.detach().clone()
    with pytest.raises(NonFiniteError, match=rf"step 1: loss nan.*\b{bad.id}\b") as caught:
        train(recipe, model=model, data=data, sources=fakes.make_sources(recipe, data))
    others = [data.examples[row].id for row in order[:4]]
    assert not any(f" {name}," in str(caught.value) for name in others)  # only the part that holds it
    assert torch.equal(model.connector.weight, before)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_an_infinite_gradient_of_a_finite_loss_stops_too(tmp_path):
    data, model = fakes.make_data(), fakes.FakeLM(seed=1)
    model.connector.weight.register_hook(lambda g: g * float("inf"))
    before = model.connector.bias.detach().clone()
    with pytest.raises(NonFiniteError, match="step 1: gradient norm"):
        train(fakes.fake_recipe(tmp_path, "sft"), model=model, data=data)
    assert torch.equal(model.connector.bias, before)


def test_order_is_a_permutation_each_epoch_and_a_function_of_the_cursor():
    data = fakes.make_data()
    stream = data.draw(0, 3 * fakes.EXAMPLES, seed=0)
    epochs = [stream[i : i + fakes.EXAMPLES] for i in range(0, len(stream), fakes.EXAMPLES)]
    assert all(sorted(epoch) == list(range(fakes.EXAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert data.draw(33, 16, seed=0) == stream[33:49]
    assert data.draw(0, 16, seed=1) != stream[:16]


def batch_of_two():
    return fakes.FakeBatch(
        ids=["a", "b"], audio=torch.zeros(2, 5), target=torch.arange(5), target_index=torch.arange(5),
        target_row=torch.tensor([0, 0, 0, 1, 1]), choice_mask=torch.tensor([False, True, False, False, False]),
    )


def test_token_weights():
    loss = LossConfig(kd_token_weight="choice", kd_background_weight=0.25, ce_token_weight="uniform")
    weights = token_weights(loss, batch_of_two(), None)
    # The second example spells no choice: it counts uniformly instead of vanishing.
    assert weights.kd.tolist() == [0.25, 1.0, 0.25, 1.0, 1.0]
    assert weights.ce.tolist() == [1.0] * 5


def test_a_fraction_of_the_examples_carries_the_background():
    loss = LossConfig(ce_background_weight=0.1, ce_background_fraction=0.25)
    batch = dataclasses.replace(batch_of_two(), choice_mask=torch.tensor([False, True, False, True, False]))
    for charged, expected in (([True, False], [0.4, 1, 0.4, 1, 0]), ([False, True], [0, 1, 0, 1, 0.4])):
        weights = token_weights(loss, batch, None, torch.tensor(charged))
        assert weights.ce.tolist() == pytest.approx(expected)
        assert weights.kd.tolist() == [0, 1, 0, 1, 0]
    assert token_weights(loss, batch, None).ce.tolist() == pytest.approx([0.1, 1, 0.1, 1, 0.1])


def test_positions_without_weight_are_left_out():
    batch = dataclasses.replace(batch_of_two(), choice_mask=torch.tensor([False, True, False, True, False]))
    charged = torch.tensor([False, True])
    for words, expected in (
        ((), [1, 3, 4]),
        (("loss.kd_weight=1",), [1, 3]),
        (("loss.kd_token_weight=uniform",), None),
        (("loss.kd_token_weight=divergence",), None),
    ):
        recipe = fakes.fake_recipe("x", "caad", "loss.ce_background_fraction=0.5", *words)
        counted = counted_positions(recipe, batch, charged)
        assert (counted if expected is None else counted.tolist()) == expected
    states = {"teacher": TeacherStates(torch.arange(5.0)[:, None], None, None)}
    kept, states = select_positions(batch, states, torch.tensor([1, 4]))
    assert kept.target.tolist() == [1, 4] and kept.target_row.tolist() == [0, 1]
    assert states["teacher"].audio_hidden.tolist() == [[1.0], [4.0]] and states["teacher"].text_hidden is None


def test_divergence_weights_are_the_kl_between_the_paths():
    torch.manual_seed(0)
    head = LMHead(torch.randn(11, 4), torch.randn(11), softcap=5.0, logit_scale=0.5)
    states = TeacherStates(torch.randn(5, 4), torch.randn(5, 4), head)
    states.text_hidden[2] = states.audio_hidden[2]
    states = states.with_divergence()
    weights = token_weights(LossConfig(kd_token_weight="divergence"), batch_of_two(), states).kd

    def log_p(hidden):
        z = (hidden @ head.weight.T + head.bias) * 0.5
        return (5.0 * torch.tanh(z / 5.0)).double().log_softmax(-1)

    a, t = log_p(states.audio_hidden), log_p(states.text_hidden)
    assert torch.allclose(weights.double(), (a.exp() * (a - t)).sum(-1), atol=1e-5)
    assert weights[2] == 0
    assert torch.allclose(path_divergence(states, chunk_tokens=2), weights, atol=1e-6)
    with pytest.raises(ValueError, match="both paths"):
        path_divergence(TeacherStates(states.audio_hidden, None, head))


def test_mistakes_of_the_caller(tmp_path):
    data, model = fakes.make_data(), fakes.FakeLM(seed=1)
    with pytest.raises(ValueError, match=r"sources: objective .kd. with this recipe needs \[.teacher.\], got \[\]"):
        train(fakes.fake_recipe(tmp_path, "kd"), model=model, data=data)
    with pytest.raises(ValueError, match="at least one example"):
        train(fakes.fake_recipe(tmp_path, "sft"), model=model, data=fakes.TrainingData([], data.make_batch))
    with pytest.raises(ValueError, match="requires grad"):
        train(fakes.fake_recipe(tmp_path, "sft"), model=model.requires_grad_(False), data=data)
    with pytest.raises(ValueError, match=r"run.device: expected auto, cpu"):
        pick_device("gpu", name="run.device")


def test_command_line_errors_are_one_line(capsys):
    assert main(["caad", "loss.alhpa=1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: command line: unknown key 'loss.alhpa'; did you mean 'loss.alpha'")
    assert message.count("\n") == 1


def test_help_lists_recipes_and_keys(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for word in ("sft_teacher", "caad  ", "Ctrl-C", "--keys"):
        assert word in shown
    assert main(["--keys"]) == 0
    shown = capsys.readouterr().out
    for word in ("data.manifest=", "loss.alpha=2.0\n", "run.resume=never\n      never | auto (newest)"):
        assert word in shown


@pytest.mark.gpu
def test_bf16_autocast_on_cuda(tmp_path):
    result, _ = fakes.run(tmp_path, "caad", "run.device=cuda", "loss.impl=auto")
    assert load_file(result.folder / "final" / "model.safetensors")["connector.weight"].isfinite().all()
