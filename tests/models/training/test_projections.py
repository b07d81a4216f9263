"""teacher.projection: the losses are those from the teacher's states, runs resume bit for bit, what cannot work is refused."""

import dataclasses
import re
import shutil

import pytest
import torch
import train_fakes as fakes
from test_run_setup import train, weights, world  # noqa: F401 (world is a fixture)
from tiny_speech import make_speech_lm

from kdkernels import ProjectionCache
from models.training import build_sources
from models.training.checkpoint import find_checkpoint
from models.training.curves import read_metrics
from models.training.fill_cache import main as cache_main
from models.training.loop import TrainingLoop
from models.training.projections import project_own_teacher
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.teacher_states import SourceError
from models.training.train import seed_everything
from models.training.train import train as loop


def curves(world, name):  # noqa: F811
    return read_metrics(world / name / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["caad"], ["kd", "loss.kd_token_weight=uniform"], ["caad_plus", "loss.alpha_half_divergence=0.5"],
     ["caad", "loss.kd_token_weight=divergence", "loss.plausibility=0.01"], ["sharpened"]],
    ids=lambda words: "-".join(words),
)  # fmt: skip
def test_losses_are_those_from_states(world, words):  # noqa: F811
    recipe, *words = [*words, "optim.steps=5", f"teacher.folder={world / 'teacher' / 'final'}", "run.log_every_steps=1"]
    names = [f"{recipe}-{'-'.join(w.split('=')[0] for w in words[:-3])}-{kind}" for kind in ("states", "projection")]
    assert train(world, recipe, names[0], *words) == 0
    assert train(world, recipe, names[1], *words, "teacher.projection=16") == 0
    pairs = list(zip(curves(world, names[0]), curves(world, names[1]), strict=True))
    assert len(pairs) == 5
    for one, other in pairs:
        for curve in ("loss", "kd", "ce", "student_entropy", "teacher_entropy", "top1_agreement"):
            assert other[curve] == pytest.approx(one[curve], rel=1e-3, abs=1e-5), curve


@pytest.mark.slow
def test_resumes_bit_for_bit(world):  # noqa: F811
    words = ["optim.steps=6", "run.save_every_steps=3", f"teacher.folder={world / 'teacher' / 'final'}", "teacher.projection=8"]
    assert train(world, "caad", "projected-whole", *words) == 0
    assert train(world, "caad", "projected-parts", *words) == 0
    back_to_step_3(world / "projected-parts")
    assert train(world, "caad", "projected-parts", *words, "run.resume=auto") == 0
    one, other = weights(world, "projected-whole"), weights(world, "projected-parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def back_to_step_3(folder):
    """As if the run had been killed after step 3."""
    shutil.rmtree(find_checkpoint(folder / "checkpoints", "auto").path)


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_projections_made_on_the_way(tmp_path, resume):
    """The teacher reads each example in the first epoch alone; a run that goes on asks for what it lacks, with the same bits."""
    words = ["optim.batch_examples=8", "optim.steps=12", "run.log_every_steps=1", "teacher.projection=9", "optim.audio_dropout=0"]
    words += ["run.save_every_steps=3"]
    seen = {}

    def run(name, *more):
        recipe, data = fakes.fake_recipe(tmp_path / name, "caad", *words, *more), fakes.make_data()
        (own,) = fakes.make_sources(recipe, data)

        def teacher(batch, examples):
            seen[name] = [*seen.get(name, []), *batch.ids]
            return own.teacher(batch, examples)

        seed_everything(0)
        sources, model = [dataclasses.replace(own, teacher=teacher)], fakes.FakeLM(seed=1)
        loop(recipe, model=model, data=data, sources=sources)
        return model.connector.weight

    whole = run("whole", "teacher.projection_on_the_way=true")
    assert sorted(seen["whole"]) == sorted(f"clip{i}" for i in range(40))  # 5 steps of 8, then none
    run("before")
    for one, other in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "before")), strict=True):
        assert one["kd"] == pytest.approx(other["kd"], rel=1e-4) and one["loss"] == pytest.approx(other["loss"], rel=1e-4)

    def killed(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return draw(self, step)

    draw = TrainingLoop.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "draw", killed)
        with pytest.raises(KeyboardInterrupt):
            run("parts", "teacher.projection_on_the_way=true")
    assert len(seen["parts"]) == 24
    assert torch.equal(run("parts", "teacher.projection_on_the_way=true", f"run.resume={resume}"), whole)
    assert len(seen["parts"]) == {"auto": 40, "never": 64}[resume]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["caad", "loss.divergence=jsd"], "loss.divergence: expected forward_kl with teacher.projection, got jsd"),
        (["caad", "loss.alpha_start=0", "loss.alpha_ramp_steps=9"], "loss.alpha_ramp_steps: expected 0, a constant alpha, with"),
        (["caad", "loss.round_contrast=true"], "loss.round_contrast: expected false with teacher.projection, got True"),
        (["caad_layers"], "layers.weight: expected 0 with teacher.projection"),
        (["everything", "layers.weight=0", "teacher.keep_mib=0"], "sources: expected none with teacher.projection, got"),
        (["sft"], "objective: expected one of kd, sharpened, caad, caad+ with teacher.projection, got sft"),
        (["caad", "teacher.keep_mib=1"], "teacher.keep_mib: expected 0 with teacher.projection"),
        (["caad", "teacher.projection_on_the_way=true", "run.parallel=ddp"], "teacher.projection_on_the_way: expected false"),
    ],
)
def test_settings_that_conflict(words, says):
    with pytest.raises(ConfigError, match=says.replace("+", r"\+").replace(".", r"\.")):
        load_recipe(words[0], [*words[1:], "teacher.projection=8"])


def test_a_head_that_trains_is_refused():
    recipe = load_recipe("caad", ["teacher.folder=teacher", "teacher.projection=8"])
    student = make_speech_lm()
    student.get_output_embeddings().weight.requires_grad_()
    with pytest.raises(SourceError, match=r"teacher\.projection: expected 0 with an LM head that trains"):
        project_own_teacher(recipe, [], None, student, torch.device("cpu"))


def project_words(world, *more):  # noqa: F811
    """Arguments of `cache` that project the states of world/"to_project" for a run of `train`."""
    recipe = ["caad", f"model.folder={world / 'untrained'}", "run.device=cpu", "teacher.projection=16", *more]
    return [str(world / "teacher" / "final"), "--out", str(world / "to_project"), "--device", "cpu", "--project", *recipe]


@pytest.mark.slow
def test_a_run_reads_the_projections_of_the_command(world, capsys, monkeypatch):  # noqa: F811
    teacher, cache = str(world / "teacher" / "final"), world / "to_project"
    words = [f"teacher.folder={teacher}", f"teacher.cache={cache}", "optim.steps=5", "run.log_every_steps=1"]
    states = [teacher, str(world / "m.jsonl"), "--out", str(cache), "--features", str(world / "f.safetensors")]
    assert cache_main([*states, "--dtype", "float32", "--device", "cpu"]) == 0
    assert cache_main(project_words(world)) == 0
    said = capsys.readouterr().out
    (found,) = ProjectionCache.beside(cache)
    assert found.name.startswith("projections-alpha2-tau2-") and f"12 samples projected, 12 in {found}" in said
    assert re.search(r"12 samples, \d+ tokens: \d+ bytes a token as projections, \d+ as states", said)
    # A second pair of numbers lies beside the first, and two processes share it.
    for part in ("0/2", "1/2"):
        assert cache_main(project_words(world, "loss.alpha=1", "--part", part)) == 0
    assert len(ProjectionCache.beside(cache)) == 2
    assert train(world, "caad", "from_states", *words) == 0
    # Another alpha than both: the run makes its own from the states, and says why.
    assert train(world, "caad", "own", *words, "teacher.projection=8", "loss.alpha=3", "optim.steps=1") == 0
    said = capsys.readouterr().out
    assert "were made for alpha 2.0, not 3.0" in said and (world / "own" / "projections" / "cache.json").is_file()
    # With the folder of projections alone neither the states nor the teacher's weights are read, and other numbers are refused.
    words[1] = f"teacher.cache={found}"
    monkeypatch.setattr(build_sources, "_load_source", None)
    assert train(world, "caad", "from_projections", *words, "teacher.projection=16") == 0
    assert not (world / "from_projections" / "projections").exists()
    pairs = list(zip(curves(world, "from_states"), curves(world, "from_projections"), strict=True))
    assert len(pairs) == 5
    for one, other in pairs:
        for curve in ("loss", "kd", "ce", "student_entropy", "teacher_entropy", "top1_agreement"):
            assert other[curve] == pytest.approx(one[curve], rel=1e-3, abs=1e-5), curve
    for change, says in (
        ("loss.temperature=1", "were made for temperature 2.0, not 1.0"),
        ("teacher.projection=17", "has 16 ids a token, 17 are asked for"),
        ("loss.kd_token_weight=divergence", "needs both paths of the teacher"),
        ("teacher.projection=0", "teacher.projection: expected a number such as 64 with the projections of"),
    ):
        assert train(world, "caad", "refused", *words, "teacher.projection=16", change) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--project", "caad", "loss.divergence=jsd"], "loss.divergence: expected forward_kl with teacher.projection"),
        (["--project", "caad_plus"], "but loss.center_text moves the teacher's states"),
        (["--project", "sft"], "objective: expected one of kd"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, words, says):
    (tmp_path / "speech_lm.json").touch()
    assert cache_main([str(tmp_path), "--out", str(tmp_path / "cache"), *words]) == 1
    assert says in capsys.readouterr().err
