"""Students of one process: the same as each by itself, with the shared work done once."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from models.data.manifest import read_manifest, write_manifest
from models.evaluation.predictions import read_predictions
from models.experiments import shared_steps
from models.experiments.pipeline import Context
from models.experiments.student_group import StudentGroup
from models.training import build_sources
from tests.models.training.test_run_setup import train, world  # noqa: F401 (world is a fixture)


@pytest.fixture
def context(world, tmp_path):  # noqa: F811
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    features = tmp_path / "features"
    features.mkdir()
    (features / "features.safetensors").write_bytes((world / "f.safetensors").read_bytes())
    examples = read_manifest(world / "m.jsonl", check_audio=False).examples
    write_manifest(corpus / "test.jsonl", examples[:6])
    settings = SimpleNamespace(batch_examples=4, seed=0, device="cpu")
    return Context(settings, tmp_path / "out", {"corpus": corpus, "features": features}, None)


WORDS = ["optim.steps=5", "optim.warmup_steps=2", "optim.learning_rate=0.01", "run.tensorboard=false", "run.progress_bar=false"]
WORDS += ["run.log_every_steps=3"]  # as `train` has it: a logged step also makes its statistics, and rounds otherwise


def words(world, *more):  # noqa: F811
    return [*WORDS, f"data.audio_root={world}", "model.bf16_products=false", *more]


@pytest.fixture
def built(monkeypatch):
    """The names of the sources that are built, and not taken from an earlier student."""
    names, real = [], build_sources._build_source
    monkeypatch.setattr(build_sources, "_build_source", lambda *a: names.append(a[1]) or real(*a))
    return names


def connector(folder):
    return load_file(folder / "final" / "connector.safetensors")


@pytest.mark.slow
def test_a_student_of_a_cohort_is_the_student_that_the_command_makes(world, context, built):  # noqa: F811
    teacher = [f"teacher.folder={world / 'teacher' / 'final'}", "teacher.keep_mib=64"]
    group = StudentGroup(context)
    runs = {
        "ce": ("ce_only", []),
        "caad": ("caad", teacher),
        "kd": ("kd", teacher),
        "layers": ("caad_layers", [*teacher, "run.seed=3"]),
        "layers_again": ("caad_layers", [*teacher, "run.seed=3"]),
        "other_start": ("caad_layers", teacher),
    }
    starts = {"other_start": world / "teacher" / "final"}  # another student of the same depth shares the teacher's states
    for name, (recipe, more) in runs.items():
        result = group.run(
            context.folder / name, recipe, manifest=world / "m.jsonl", start=starts.get(name, world / "untrained"),
            words=words(world, *more),
        )  # fmt: skip
        assert result["answers"] == {"None": 18}
    assert built == ["teacher", "teacher"]  # once without layers, once with them
    for name in ("ce", "caad", "kd", "layers"):
        recipe, more = runs[name]
        assert train(world, recipe, f"alone_{name}", *words(world, *more)) == 0
        alone, together = connector(world / f"alone_{name}"), connector(context.folder / name)
        for key, value in alone.items():
            assert torch.equal(value, together[key]), (name, key)
    layers = [connector(context.folder / name) for name in ("layers", "layers_again")]
    assert all(torch.equal(layers[0][key], layers[1][key]) for key in layers[0])  # projections start untrained both times


@pytest.mark.slow
def test_on_policy_students_share_one_live_teacher(world, context, built):  # noqa: F811
    teacher = [f"teacher.folder={world / 'teacher' / 'final'}", "data.on_policy_max_new_tokens=3"]
    group = StudentGroup(context)
    more = {
        "half": ["data.on_policy_fraction=0.5"],
        "whole": ["data.on_policy_fraction=1", "loss.divergence=reverse_kl"],
    }
    for name, own in more.items():
        group.train(
            context.folder / name, "caad", manifest=world / "m.jsonl", start=world / "untrained",
            words=words(world, *teacher, *own),
        )  # fmt: skip
    assert built == ["teacher"]
    assert train(world, "caad", "alone_whole", *words(world, *teacher, *more["whole"])) == 0
    alone, together = connector(world / "alone_whole"), connector(context.folder / "whole")
    assert all(torch.equal(value, together[key]) for key, value in alone.items())


@pytest.mark.slow
def test_what_was_asked_is_not_made_again_and_what_was_trained_is_only_asked(world, context, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shared_steps, "multiplies_bf16", lambda _: False)  # as `words` has it for the training
    options = {"manifest": world / "m.jsonl", "start": world / "untrained", "words": words(world)}
    folder = context.folder / "ce"
    first = StudentGroup(context).run(folder, "ce_only", **options)
    before = read_predictions(folder / "test-greedy.jsonl")[1]
    (folder / "asked.json").unlink()  # as if the process had been killed while it asked
    group = StudentGroup(context)
    monkeypatch.setattr(StudentGroup, "_train", lambda *_: pytest.fail("trained again"))
    assert group.run(folder, "ce_only", **options) == first == json.loads((folder / "asked.json").read_text())
    assert read_predictions(folder / "test-greedy.jsonl")[1] == before
    Path(folder / "test-greedy.jsonl").unlink()
    assert group.run(folder, "ce_only", **options) == first  # asked.json is there: nothing is done
    assert not (folder / "test-greedy.jsonl").exists()
    corpus = context.folders["corpus"]
    examples = read_manifest(corpus / "test.jsonl", check_audio=False).examples
    write_manifest(corpus / "dev.jsonl", [*examples[:4], *(dataclasses.replace(e, task="other") for e in examples[4:])])
    group.ask(context.folder / "one_task", folder / "final", part="dev", tasks=["other"], controls=False)
    answers = read_predictions(context.folder / "one_task" / "dev-greedy.jsonl")[1]
    assert [p.id for p in answers] == [e.id for e in examples[4:]]


@pytest.mark.slow
def test_a_student_is_asked_as_it_was_after_an_earlier_step(world, context, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shared_steps, "multiplies_bf16", lambda _: False)  # as `words` has it for the training
    options = {"manifest": world / "m.jsonl", "start": world / "untrained"}
    group, kept = StudentGroup(context), ["run.save_every_steps=1", "run.keep_last_checkpoints=5"]
    group.train(context.folder / "whole", "ce_only", **options, words=words(world, *kept))
    for step in (2, 5):
        group.ask_at(context.folder / f"at_{step}", context.folder / "whole", step)
    group.run(context.folder / "again", "ce_only", **options, words=words(world))
    asked = {f: read_predictions(context.folder / f / "test-greedy.jsonl")[1] for f in ("at_2", "at_5", "again")}
    assert asked["at_5"] == asked["again"]
    assert [p.scores for p in asked["at_2"]] != [p.scores for p in asked["at_5"]]
