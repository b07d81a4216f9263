"""On-policy distillation in the loop: the loss of an offline run on the very same answers, exact sums, exact resume."""

from __future__ import annotations

import pytest
import tiny_speech
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_run_setup import train, weights, world  # noqa: F401 (world is a fixture)

from kdkernels import fused_linear_caad_loss
from models.data.example import AnsweredExample
from models.data.manifest import read_manifest
from models.speech_lm.features import FeatureStore
from models.speech_lm.model import SpeechLM
from models.training import loop
from models.training.curves import read_metrics
from models.training.objective import token_weights
from models.training.on_policy import OnPolicy
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import LossConfig

OWN = ["data.on_policy_fraction=1", "data.on_policy_max_new_tokens=5", "run.log_every_steps=1", "loss.kd_weight=1"]


def test_an_answer_becomes_the_target_as_it_is():
    """Its end is a target only where the student has made it; all of its tokens count."""
    model = tiny_speech.make_speech_lm()
    end, examples = model.tokenizer.eos_token_id, tiny_speech.make_examples(3)
    answers = [(40, 50, end), (end,), (40, 50, 60, 70)]  # ended, empty, cut off
    answered = [AnsweredExample.of(example, answer) for example, answer in zip(examples, answers, strict=True)]
    batch = model.make_collator()(answered, tiny_speech.make_features(model, 3))
    assert batch.target.tolist() == [40, 50, end, end, 40, 50, 60, 70] and batch.target_row.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert bool(batch.choice_mask.all())
    for loss, ce in ((LossConfig(), 0.0), (LossConfig(ce_target="teacher"), 1.0)):
        weights = token_weights(loss, batch, None, None, torch.tensor([True, True, True]))
        assert weights.kd.tolist() == [1.0] * 8 and weights.ce.tolist() == [ce] * 8


@pytest.fixture
def recorded(monkeypatch):
    """Every (step, examples with the student's answers) of the runs of a test."""
    calls = []
    answered = OnPolicy.answered

    def recording(self, step, examples):
        made = answered(self, step, examples)
        calls.append((step, made))
        return made

    monkeypatch.setattr(OnPolicy, "answered", recording)
    return calls


def curves(root, out):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(root / out / "metrics.jsonl")]


def teacher(root):
    return f"teacher.folder={root / 'teacher' / 'final'}"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kd", "caad"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_is_that_of_the_student_s_own_answers(world, recorded, objective, divergence):  # noqa: F811
    """Both paths of the teacher, and the student, by hand from the very tokens; and the cut answers have no end."""
    out = f"own-{objective}-{divergence}"
    words = [teacher(world), *OWN, "optim.steps=1", f"loss.divergence={divergence}", "model.prefix_cache_mib=0"]
    assert train(world, objective, out, *words) == 0
    (line,), ((_, examples),) = curves(world, out), recorded
    examples = list(examples.values())
    assert all(isinstance(example, AnsweredExample) for example in examples) and len(examples) == 4
    student = SpeechLM.from_pretrained(world / "untrained")
    listener = SpeechLM.from_pretrained(world / "teacher" / "final")
    batch = student.make_collator()(examples, FeatureStore.load(world / "f.safetensors").rows(examples))
    end, lengths = student.tokenizer.eos_token_id, [len(example.answer_tokens) for example in examples]
    assert batch.target.tolist() == [token for example in examples for token in example.answer_tokens]
    assert all(end not in example.answer_tokens[:-1] for example in examples)
    assert all(example.answer_tokens[-1] == end or len(example.answer_tokens) == 5 for example in examples)
    assert line["answer_tokens"] == pytest.approx(sum(lengths) / 4)
    inputs = batch.model_inputs()
    audio = listener.hidden_states_at(batch.target_index, **inputs)
    text = listener.hidden_states_at(batch.target_index, **inputs | {"audio_present": torch.zeros(4, dtype=torch.bool)})
    expected = fused_linear_caad_loss(
        student.hidden_states_at(batch.target_index, **inputs), student.get_output_embeddings().weight, audio,
        text if objective == "caad" else None, listener.get_output_embeddings().weight, None,
        alpha=2.0 if objective == "caad" else 0.0, divergence=divergence, kd_weight=1.0,
    )  # fmt: skip
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert "ce" not in line


@pytest.mark.slow
def test_a_student_s_answer_has_no_label(world, recorded):  # noqa: F811
    """With fraction 1 the CE term is 0; with a half it is that of the other examples alone."""
    assert train(world, "caad", "no-label", teacher(world), *OWN, "loss.kd_weight=0.4", "optim.steps=1") == 0
    (line,) = curves(world, "no-label")
    assert line["loss"] == pytest.approx(0.4 * line["kd"], rel=1e-5) and "ce" not in line
    half = [teacher(world), *OWN, "data.on_policy_fraction=0.5", "optim.steps=6", "loss.ce_token_weight=uniform"]
    assert train(world, "caad", "half", *half, "loss.kd_weight=0.4", "model.prefix_cache_mib=0") == 0
    steps = [list(made.values()) for _, made in recorded[1:]]
    shares = [sum(isinstance(example, AnsweredExample) for example in made) for made in steps]
    assert 6 < sum(shares) < 18 and len(set(shares)) > 1
    labelled = [example for example in steps[0] if not isinstance(example, AnsweredExample)]
    assert 0 < len(labelled) < 4
    student = SpeechLM.from_pretrained(world / "untrained")
    batch = student.make_collator()(labelled, FeatureStore.load(world / "f.safetensors").rows(labelled))
    logits = student._logits(student.hidden_states_at(batch.target_index, **batch.model_inputs()))
    assert curves(world, "half")[0]["ce"] == pytest.approx(F.cross_entropy(logits, batch.target).item(), rel=1e-4)


@pytest.mark.slow
def test_parts_of_a_step_add_up_and_the_numbers_of_the_step_decide(world, recorded):  # noqa: F811
    words = [teacher(world), *OWN, "data.on_policy_fraction=0.7", "optim.steps=3", "optim.learning_rate=1e-3"]
    for out, more in {
        "whole": [], "parts": ["optim.micro_batch_examples=1"], "one": ["data.on_policy_batch_examples=1"],
    }.items():  # fmt: skip
        assert train(world, "caad", f"sum-{out}", *words, *more) == 0
        for line, expected in zip(curves(world, f"sum-{out}"), curves(world, "sum-whole"), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-7), out
    whole, parts, one = (recorded[start : start + 3] for start in (0, 3, 6))
    assert whole == parts == one
    answers = [e.answer_tokens for _, made in whole for e in made.values() if isinstance(e, AnsweredExample)]
    assert len(set(answers)) > len(answers) / 2


@pytest.mark.slow
def test_a_killed_run_continues_to_the_bit(world, monkeypatch):  # noqa: F811
    words = [teacher(world), *OWN, "data.on_policy_fraction=0.6", "data.on_policy_every_steps=2", "data.on_policy_top_p=0.9"]
    words += ["optim.steps=5", "run.save_every_steps=1", "optim.audio_dropout=0.3"]
    assert train(world, "caad", "undisturbed", *words) == 0
    step = loop.TrainingLoop.step

    def dying(self, at, logged):
        if at == 4:
            raise KeyboardInterrupt
        step(self, at, logged)

    monkeypatch.setattr(loop.TrainingLoop, "step", dying)
    assert train(world, "caad", "killed", *words) == 130
    monkeypatch.undo()
    assert train(world, "caad", "killed", *words, "run.resume=auto") == 0
    assert curves(world, "killed") == curves(world, "undisturbed")
    assert ["answer_tokens" in line for line in curves(world, "killed")] == [False, True, False, True, False]
    for name, weight in weights(world, "undisturbed").items():
        assert torch.equal(weights(world, "killed")[name], weight), name


def ranked(failures, root, out, words, trains):
    """How many answers this rank has made in each step."""
    import torch.distributed as dist

    from models.training.build_sources import build_sources
    from models.training.distributed import Ranks
    from models.training.recipe_files import load_recipe
    from models.training.student import build_model
    from models.training.train import train as run
    from models.training.training_data import build_data

    ranks = Ranks(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    counts = []
    answered = OnPolicy.answered

    def counting(self, step, examples):
        made = answered(self, step, examples)
        counts.append(sum(isinstance(example, AnsweredExample) for example in made.values()))
        return made

    OnPolicy.answered = counting
    recipe = load_recipe("caad", [*words, f"run.out_dir={root / out}"])
    torch.manual_seed(0)
    model = build_model(recipe)
    if trains == "lm":
        model.lm.requires_grad_(True)
    data = build_data(recipe, model, read_manifest(root / "m.jsonl").examples, root)
    run(recipe, model=model, data=data, sources=build_sources(recipe, data, model, device=ranks.device), ranks=ranks)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["connector", "lm"])
def test_two_ranks_train_as_one(world, trains):  # noqa: F811
    """Also where one of them has no answer to make, and with answers of different lengths; sharded weights stay sharded."""
    words = [
        f"data.manifest={world / 'm.jsonl'}", f"model.folder={world / 'untrained'}", f"data.features={world / 'f.safetensors'}",
        "optim.batch_examples=4", "optim.micro_batch_examples=1", "optim.steps=4", "optim.learning_rate=1e-3", teacher(world),
        "optim.warmup_steps=1", "run.device=cpu", "run.tensorboard=false", "run.progress_bar=false", *OWN,
        "data.on_policy_fraction=0.4", "loss.kd_weight=0.5", "model.prefix_cache_mib=0",
    ]  # fmt: skip
    for size, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        counts = run_ranks(ranked, size, world, f"{trains}-{parallel}-{size}", [*words, f"run.parallel={parallel}"], trains)
        if size == 2:
            steps = list(zip(*counts, strict=True))
            assert any(0 in step and max(step) > 0 for step in steps) and all(max(count) > 0 for count in counts), steps
            for line, expected in zip(curves(world, f"{trains}-{parallel}-2"), curves(world, f"{trains}-ddp-1"), strict=True):
                assert line == pytest.approx(expected, rel=1e-3, abs=1e-5), parallel


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.cache=x"], "teacher.cache: expected null, as the student's answers change, with data.on_policy_fraction"),
        (["teacher.keep_mib=1"], "teacher.keep_mib: expected 0, as the student's answers change"),
        (["teacher.projection=8"], "teacher.projection: expected 0, as the student's answers change"),
        (["sources.s.role=acoustic"], "sources.s.keep_mib: expected 0, as the student's answers change"),
        (["objective=ce_only"], "objective: expected one with a teacher"),
        (["loss.center_text=true"], "loss.center_text: expected false"),
        (["data.on_policy_fraction=1.5"], "data.on_policy_fraction: expected a fraction"),
        (["data.on_policy_fraction=0", "data.on_policy_top_k=3"], "data.on_policy_top_k: expected 0, the default, without"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(words, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("caad", ["teacher.folder=t", "data.on_policy_fraction=0.5", *words])
