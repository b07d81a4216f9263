import dataclasses
from pathlib import Path

import pytest

from models.training.checkpoint import CheckpointError, check_same_settings
from models.training.commands import RECIPES_DIR
from models.training.continued_settings import saved_settings_to_continue, settings_to_continue
from models.training.recipe import Recipe
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import LossConfig, OptimConfig, SourceConfig, TeacherConfig


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RECIPES_DIR.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path.stem)
    assert isinstance(recipe, Recipe)
    assert load_recipe(str(path)) == recipe


def test_overrides_win_and_types_are_kept(tmp_path):
    path = write(tmp_path, "objective: sft\noptim: {steps: 7}\ndata: {splits: [train, dev]}\n")
    recipe = load_recipe(path, ["optim.learning_rate=1e-4", "data.tasks=[gender]", "loss.alpha=1", "model.settings.a=3"])
    assert recipe.optim.steps == 7
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.data.splits == ("train", "dev") and recipe.data.tasks == ("gender",)
    assert recipe.loss.alpha == 1.0 and isinstance(recipe.loss.alpha, float)
    assert recipe.model.settings == {"a": 3}
    with pytest.raises(AttributeError):
        recipe.optim.steps = 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {learning_rat: 1}", r"r\.yaml: unknown key 'optim\.learning_rat'; did you mean 'optim\.learning_rate'"),
        ("alpha: 1", r"unknown key 'alpha'; did you mean 'loss\.alpha'"),
        ("zzz: 1", r"unknown key 'zzz'; known: objective, data"),
        ("optim: 3", r"r\.yaml: optim: expected keys"),
        ("objective: cad", r"objective: expected one of .*did you mean 'caad'"),
        ("objective: caad", r"teacher\.folder: objective 'caad' needs a teacher"),
        ("objective: sft\noptim: {steps: many}", r"r\.yaml: optim\.steps:"),
        ("objective: sft\noptim: {steps: 0}", r"optim\.steps: expected >= 1, got 0"),
        ("objective: sft\nloss: {kd_weight: 1.5}", r"loss\.kd_weight: expected in \[0, 1\], got 1\.5"),
        ("- 1", "expected sections"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_mistakes_on_the_command_line_are_named(tmp_path):
    path = write(tmp_path, "objective: sft")
    with pytest.raises(ConfigError, match=r"command line: unknown key 'optim.step'; did you mean 'optim.steps'"):
        load_recipe(path, ["optim.step=3"])
    with pytest.raises(ConfigError, match="expected key=value"):
        load_recipe(path, ["optim.steps"])
    with pytest.raises(ConfigError, match=r"recipe 'cad': no such file.*did you mean 'caad'"):
        load_recipe("cad")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.alpha=[1"], r"command line \(loss\.alpha=\[1\): not readable as YAML"),
        (["optim.learning_rate=.inf"], r"optim\.learning_rate: expected a finite number, got inf"),
        (["loss.impl=cudda"], r"loss\.impl: expected one of .*did you mean 'cuda'"),
        (["loss.chunk_tokens=0"], r"loss\.chunk_tokens: expected >= 1, got 0"),
        (["loss.plausibility=0.1", "loss.divergence=reverse_kl"], r"loss\.plausibility: expected null with .*reverse_kl"),
        (["data.splits=[trian]"], r"data\.splits: expected one of train, dev, test.*did you mean 'train'"),
        (["model.folder=base", "model.settings.num_queries=4"], r"model\.settings: expected none where model\.folder"),
        (["data.manifest=${oc.env:KDKERNELS_NO_SUCH}"], r"data\.manifest: .*KDKERNELS_NO_SUCH"),
    ],
)
def test_values_that_could_only_fail_later_are_refused_at_once(words, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("sft_teacher", words)


def test_accumulation_must_divide():
    with pytest.raises(ConfigError, match=r"micro_batch_examples: expected a divisor of batch_examples \(16\), got 5"):
        OptimConfig(batch_examples=16, micro_batch_examples=5)


def test_learning_rate_schedule():
    optim = OptimConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate_fraction=0.1)
    assert optim.learning_rate_at(1) == pytest.approx(0.1)
    assert optim.learning_rate_at(10) == pytest.approx(1.0)
    assert optim.learning_rate_at(55) == pytest.approx(0.55)
    assert optim.learning_rate_at(100) == pytest.approx(0.1)
    rates = [optim.learning_rate_at(s) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_alpha_ramp():
    loss = LossConfig(alpha=2.0, alpha_start=0.0, alpha_ramp_steps=4)
    assert [loss.alpha_at(s) for s in (1, 3, 5, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert LossConfig(alpha=1.5).alpha_at(1) == 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.parallel=fsdp2"], "model.prefix_cache_mib: expected 0 with run.parallel=fsdp2, got 4096"),
        (["objective=kd", "loss.center_text=true"], "loss.center_text: expected false with objective 'kd', which has no"),
        (["objective=sft", "loss.center_text=true"], "loss.center_text: expected false with objective 'sft', which has"),
        (["objective=sharpened", "loss.center_text=true"], "loss.center_text: expected false with objective 'sharpened'"),
        (["objective=ce_only", "loss.alpha_half_divergence=1"], "loss.alpha_half_divergence: expected null with"),
        (["objective=kd", "loss.alpha_half_divergence=1"], "loss.alpha_half_divergence: expected null with objective 'kd'"),
        (["loss.alpha_start=0"], "loss.alpha_ramp_steps: expected >= 1 with loss.alpha_start=0, got 0"),
        (["loss.alpha_ramp_steps=9"], "loss.alpha_ramp_steps: expected 0 without loss.alpha_start, got 9"),
        (["sources.a.role=acoustic", "sources.a.weight_start=0"], "sources.a.weight_ramp_steps: expected >= 1 with"),
        (["run.device=cuda:1", "model.bf16_products=true"], "model.bf16_products: expected false with run.device=cuda:1"),
        (["data.packing=varlen", "model.bf16_products=true"], "model.bf16_products: expected false with data.packing=varlen"),
        (["loss.jsd_beta=0.3"], "loss.jsd_beta: expected 0.5, the default, without loss.divergence=jsd, got 0.3"),
        (["sources.a.role=acoustic", "sources.a.jsd_beta=0.3"], "sources.a.jsd_beta: expected 0.5, the default, without"),
        (["layers.every=3"], "layers.every: expected 7, the default, without layers.map=skip, got 3"),
        (["layers.pairs=[1-2]", "layers.map=top"], "layers.map: expected 'all', the default, without an empty layers.pairs"),
        (["layers.pairs=[1-2]", "layers.embeddings=true"], "layers.embeddings: expected false with layers.pairs"),
        (["model.fresh_connector=true"], "model.fresh_connector: expected False, the default, without model.folder"),
        (["data.tasks=[a]", "data.tasks=[b]"], "(data.tasks=[b]): expected data.tasks once, with all its values in one list"),
        (["data.packing=varlen", "run.device=cpu"], "data.packing: expected none or pack with run.device=cpu"),
        (["run.gradient_checkpointing=true", "layers.weight=1"], "layers.weight: expected 0 with run.gradient_checkpointing"),
    ],
)
def test_settings_that_conflict_name_both_keys(words, message):
    with pytest.raises(ConfigError) as raised:
        load_recipe("caad", ["teacher.folder=x", *words])
    assert message in str(raised.value)


def test_a_checkpoint_without_a_later_key_has_its_default():
    """A run that was stopped before a library's update goes on after it, but not with another value of the new key."""
    sources = {"text": SourceConfig(role="text", folder="t")}
    recipe = Recipe(teacher=TeacherConfig(folder="t"), sources=sources)
    saved = settings_to_continue(recipe)
    del saved["layers"]["form"], saved["sources"]["text"]["layers"]["form"], saved["optim"]["answer_noise"]
    assert saved_settings_to_continue(saved) == settings_to_continue(recipe)
    other = dataclasses.replace(recipe, layers=dataclasses.replace(recipe.layers, form="attention"))
    with pytest.raises(CheckpointError, match=r"another recipe: layers\.form was 'projection', is 'attention'"):
        check_same_settings(saved_settings_to_continue(saved), settings_to_continue(other), Path("c"))
