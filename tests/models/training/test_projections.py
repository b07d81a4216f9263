"""teacher.projection: the losses are those from the teacher's states, runs resume bit for bit, what cannot work is refused."""

import pytest
import torch
from test_run_setup import train, weights, world  # noqa: F401 (world is a fixture)
from tiny_speech import make_speech_lm

from models.training.checkpoint import find_checkpoint
from models.training.curves import read_metrics
from models.training.projections import project_own_teacher
from models.training.recipe import ConfigError, load_recipe
from models.training.teachers import SourceError


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
    newest = find_checkpoint(world / "projected-parts" / "checkpoints", "auto")
    for file in newest.path.iterdir():  # as if it had been killed after step 3
        file.unlink()
    newest.path.rmdir()
    assert train(world, "caad", "projected-parts", *words, "run.resume=auto") == 0
    one, other = weights(world, "projected-whole"), weights(world, "projected-parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


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
