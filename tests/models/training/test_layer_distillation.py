"""Layers in the training loop: from the recipe to the projections' last step."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from test_run_setup import train, world  # noqa: F401 (world is a fixture)

from kdkernels.layer_mse import LayerProjections
from models.speech_lm.model import SpeechLM
from models.training import layer_distillation
from models.training.checkpoint import find_checkpoint
from models.training.curves import read_metrics
from models.training.layer_distillation import Examples, LayerDistillation
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import LayersConfig
from models.training.teacher_states import TeacherStates

LAYERS = ["optim.steps=6", "layers.weight=0.5", "layers.map=skip", "layers.every=2", "layers.embeddings=true"]


def final(root, out):
    return SpeechLM.from_pretrained(root / out / "final")


@pytest.mark.slow
def test_layers_at_equal_widths(world):  # noqa: F811
    """A student that is its teacher is at distance 0, and another one comes nearer."""
    teacher = world / "teacher" / "final"
    same = [
        *LAYERS,
        f"teacher.folder={teacher}",
        f"model.folder={teacher}",
        "optim.steps=1",
        "optim.learning_rate=1e-9",
    ]
    assert train(world, "caad", "same", *same) == 0
    assert read_metrics(world / "same" / "metrics.jsonl")[0]["layers"] < 1e-9
    assert (
        train(world, "caad", "nearer", *LAYERS, f"teacher.folder={teacher}", "layers.weight=100", "optim.steps=12") == 0
    )
    curve = [line["layers"] for line in read_metrics(world / "nearer" / "metrics.jsonl")]
    assert 0 < curve[-1] < curve[0]


ATTENTION = ["layers.form=attention", "layers.heads=2", "loss.kd_background_weight=0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ATTENTION], ids=["projection", "attention"])
def test_resumes_bit_for_bit_and_leaves_nothing_behind(world, form):  # noqa: F811
    words = [*LAYERS, *form, f"teacher.folder={world / 'teacher' / 'final'}", "layers.alpha=0.5", "run.save_every_steps=3"]
    whole, parts = (f"{out}-{len(form)}" for out in ("whole", "parts"))
    assert train(world, "caad", whole, *words) == 0
    assert train(world, "caad", parts, *words) == 0
    newest = find_checkpoint(world / parts / "checkpoints", "auto")
    for file in newest.path.iterdir():  # as if it had been killed after step 3
        file.unlink()
    newest.path.rmdir()
    assert train(world, "caad", parts, *words, "run.resume=auto") == 0
    one, other = (final(world, out).connector.state_dict() for out in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (
        load_file(find_checkpoint(world / out / "checkpoints", "auto").path / "model.safetensors") for out in (whole, parts)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    trained = {name.rpartition(".")[2] for name in one if name.startswith("layer_distillation.")}
    assert trained == ({f"{part}_{k}" for part in ("query", "key", "value") for k in range(3)} if form else set())


@pytest.mark.slow
def test_attention_is_in_the_optimiser_from_the_first_step(world):  # noqa: F811
    words = [*LAYERS, *ATTENTION, f"teacher.folder={world / 'teacher' / 'final'}", "optim.steps=1", "optim.weight_decay=0"]
    assert train(world, "caad", "attention", *words) == 0
    checkpoint = find_checkpoint(world / "attention" / "checkpoints", "auto").path
    saved = {name: w for name, w in load_file(checkpoint / "model.safetensors").items() if "layer_distillation" in name}
    assert len(saved) == 9
    for name, weight in saved.items():  # as many columns as rows here, so each began as the identity
        assert (weight - torch.eye(len(weight))).abs().max() > 1e-6, name
    assert not [name for name in load_file(world / "attention" / "final" / "connector.safetensors") if "distillation" in name]


def test_projections_train_are_saved_and_are_not_exported(world, monkeypatch):  # noqa: F811
    def with_a_weight(*arguments, **options):
        return LayerProjections(*arguments, **{**options, "identity_where_equal": False})

    monkeypatch.setattr(layer_distillation, "LayerProjections", with_a_weight)
    assert train(world, "caad", "projected", *LAYERS, f"teacher.folder={world / 'teacher' / 'final'}") == 0
    saved = load_file(find_checkpoint(world / "projected" / "checkpoints", "auto").path / "model.safetensors")
    weights = {name: w for name, w in saved.items() if name.startswith("layer_distillation.")}
    assert len(weights) == 3
    for w in weights.values():
        assert (w - w.diag().diag()).abs().max() > 1e-4  # it was the identity, and weight decay leaves zeros alone
    exported = load_file(world / "projected" / "final" / "connector.safetensors")
    assert not [name for name in exported if "distillation" in name]


@pytest.mark.parametrize("form", [[], pytest.param(ATTENTION, marks=pytest.mark.slow)], ids=["projection", "attention"])
def test_parts_of_a_step_add_up(world, form):  # noqa: F811
    teacher = f"teacher.folder={world / 'teacher' / 'final'}"
    words = [*LAYERS, *form, teacher, "optim.steps=1", "loss.ce_background_fraction=1"]
    outs = [f"{out}-{len(form)}" for out in ("one-part", "two-parts")]
    assert train(world, "caad", outs[0], *words) == 0
    assert train(world, "caad", outs[1], *words, "optim.micro_batch_examples=2") == 0
    lines = [read_metrics(world / out / "metrics.jsonl")[0] for out in outs]
    for name in ("loss", "layers", "grad_norm"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4)


def test_layer_states_match_a_run_without_the_prefix_cache(world):  # noqa: F811
    model = final(world, "teacher")
    from models.data.manifest import read_manifest
    from models.speech_lm.features import FeatureStore

    examples = read_manifest(world / "m.jsonl").examples[:3]
    batch = model.make_collator()(examples, FeatureStore.load(world / "f.safetensors").rows(examples))
    inputs = batch.model_inputs()
    plain = model.hidden_states_at(batch.target_index, **inputs)
    states = model.hidden_states_at(batch.target_index, **inputs, layers=[0, 1, 3])
    cached = model.hidden_states_at(
        batch.target_index, **inputs, prefix_cache=model.make_prefix_cache(dtype=torch.float32), layers=[0, 1, 3]
    )
    assert states.shape == (len(batch.target_index), 4, plain.shape[1])
    assert torch.equal(states[:, 0], plain) and torch.equal(
        states[:, 3], plain
    )  # 3 layers: the last is behind the norm
    torch.testing.assert_close(cached, states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers.weight=-1"], "layers.weight: expected >= 0"),
        (["layers.map=some"], "layers.map: expected one of top, skip, all"),
        (["layers.pairs=[top]"], "layers.pairs: expected student-teacher, such as 7-9"),
        (["layers.form=cross"], "layers.form: expected one of projection, attention"),
        (["layers.heads=2"], "layers.heads: expected 1, the default, without layers.form=attention"),
        (["layers.form=attention", "layers.direction=teacher_to_student"], "layers.direction: expected 'student_to_teacher'"),
        (["layers.weight=1", "objective=ce_only"], "layers.weight: expected 0 with objective 'ce_only'"),
        (["layers.weight=1", "run.gradient_checkpointing=true"], "expected 0 with run.gradient_checkpointing"),
    ],
)
def test_recipe_errors(words, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("caad", words)


def test_pairs():
    recipe = load_recipe("caad", ["layers.pairs=[1-2,3-9]"])
    assert recipe.layers.layer_pairs(3, 9) == [(1, 2), (3, 9)]
    with pytest.raises(ConfigError, match=r"layers.pairs: .* got \(3, 9\)"):
        recipe.layers.layer_pairs(3, 8)


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_directions_alone_are_compared_as_2_minus_2_cos(direction):
    torch.manual_seed(0)
    settings = LayersConfig(weight=1.0, normalize=True, direction=direction)
    layers = LayerDistillation.build(settings, depths=(3, 6), widths=(8, 12))
    student = {k: torch.randn(5, 8) for k in layers.student_layers}
    audio = torch.randn(5, len(layers.teacher_layers), 12)
    states = TeacherStates(torch.zeros(5, 12), None, None, audio)
    counts = torch.tensor([True, True, False, True, True])
    loss = layers.loss(student, states, counts, torch.tensor(4))
    expected = []
    for (s, t), weight in zip(layers.pairs, layers.projections.weights, strict=True):
        mine, theirs = student[s], audio[:, layers.teacher_layers.index(t)]
        mine, theirs = (mine @ weight.T, theirs) if direction == "student_to_teacher" else (mine, theirs @ weight.T)
        expected.append((2 - 2 * torch.cosine_similarity(mine, theirs))[counts].mean())
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    silent = dataclasses.replace(states, speaks=torch.tensor([True, False, True, True, True]))
    assert layers.loss(student, silent, counts, torch.tensor(4)) < loss


@pytest.mark.parametrize("normalize", [False, True])
def test_attention_is_that_of_each_example_by_itself(normalize):
    """Tokens that do not count and tokens about which the teacher is silent are neither compared nor attended to."""
    torch.manual_seed(0)
    settings = LayersConfig(weight=1.0, form="attention", heads=2, alpha=0.5, normalize=normalize)
    layers = LayerDistillation.build(settings, depths=(3, 6), widths=(8, 12))
    lengths = (3, 0, 4, 1)
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    student = {k: torch.randn(8, 8) for k in layers.student_layers}
    audio, text = torch.randn(2, 8, len(layers.teacher_layers), 12)
    speaks = torch.tensor([True, True, True, True, False, True, True, True])
    states = TeacherStates(torch.zeros(8, 12), None, None, audio, text, speaks)
    counts = torch.tensor([True, False, True, True, True, True, True, True])
    examples = Examples(rows, 4, 5)  # longer than any of them
    loss = layers.loss(student, states, counts, torch.tensor(7), examples)
    total = 0.0
    for row in range(4):
        here = (rows == row) & counts & speaks
        if here.any():
            mine = [student[pair[0]][here][None] for pair in layers.pairs]
            heard, read = ([x[here][None, :, layers.teacher_layers.index(t)] for _, t in layers.pairs] for x in (audio, text))
            total += layers.projections(
                mine, heard, teacher_text_hidden=read, alpha=0.5, normalize=normalize, reduction="sum"
            ) * (8 if normalize else 1)  # fmt: skip
    assert loss.item() == pytest.approx(float(total.detach()) / 3 / 7, rel=1e-5)
    with pytest.raises(ValueError, match="examples: expected which tokens belong together"):
        layers.loss(student, states, counts, torch.tensor(7))
    with pytest.raises(ConfigError, match=r"layers.heads: expected a divisor of the student's width 8, got 3"):
        LayerDistillation.build(dataclasses.replace(settings, heads=3), depths=(3, 6), widths=(8, 12))


def test_a_bias_is_built_where_a_projection_is():
    for bias in (False, True):
        layers = LayerDistillation.build(LayersConfig(weight=1.0, bias=bias), depths=(3, 6), widths=(8, 12))
        assert [name for name, _ in layers.projections.named_parameters() if "bias" in name] == [
            f"bias_{k}" for k in range(3 * bias)
        ]
