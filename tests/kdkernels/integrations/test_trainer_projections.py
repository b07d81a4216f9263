"""CAADTrainer from a ProjectionCache: the losses are those of the states, and what the projections do not fit is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
pytest.importorskip("safetensors", reason="the cache's shards are safetensors files")
import tiny_lms
from test_trainer import Recorder, arguments, dual_path, examples, speech_lm, student_inputs

from kdkernels import CAADOptions, CAADTrainer, ContrastCache, LMHead, ProjectionCache, answer_index, project_cache

OPTIONS = CAADOptions(alpha=1.5, temperature=1.3, plausibility=0.01)
LOGGED = ("loss", "kd", "ce", "student_entropy", "teacher_entropy", "top1_agreement")


def frozen_head(seed: int = 0):
    model = speech_lm(seed)
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """(states, the teacher's head, projections of them for frozen_head())."""
    folder, rows, teacher = tmp_path_factory.mktemp("caches"), examples(), dual_path()
    batch = Recorder()(rows)
    index, target = answer_index(batch["labels"])
    states = teacher(student_inputs(batch), index)
    with ContrastCache.writer(folder, fingerprint={"test": 1}, hidden_size=32, dtype=torch.float32) as writer:
        for row, example in enumerate(rows):
            mine = index // tiny_lms.LENGTH == row
            writer.add(example["sample_id"], states.audio_hidden[mine], states.text_hidden[mine], target[mine])
    cache, head = ContrastCache(folder), LMHead.from_model(frozen_head())
    values = {"alpha": 1.5, "temperature": 1.3, "plausibility": 0.01, "top_k": 8}
    project_cache(cache, folder / "p", teacher_head=teacher.head, student_head=head, **values)
    project_cache(cache, folder / "kd", teacher_head=teacher.head, student_head=head, **{**values, "contrast": "none"})
    return cache, teacher.head, ProjectionCache(folder / "p")


def trainer_of(folder, teacher, *, model=None, options=OPTIONS, rows=None, head=None, **more):
    rows = rows or examples()
    return CAADTrainer(
        model or frozen_head(), arguments(folder, **more), teacher=teacher, teacher_head=head, options=options,
        data_collator=Recorder(), train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip


@pytest.mark.slow
def test_training_and_evaluation_are_those_from_the_states(tmp_path, caches):
    states, head, projections = caches
    found = []
    for name, teacher in (("states", {"teacher": states, "head": head}), ("projections", {"teacher": projections})):
        trainer = trainer_of(tmp_path / name, **teacher, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "kd" in line]
        found.append([*(line[key] for line in lines for key in LOGGED), *(trainer.evaluate()[f"eval_{key}"] for key in LOGGED)])
    assert len(found[0]) == 5 * len(LOGGED) and found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
    card = (tmp_path / "projections" / "checkpoint-4" / "README.md").read_text()
    assert "projections in a ProjectionCache" in card
    # A run goes on from its checkpoint, to the same weights; with another loss it does not.
    again = trainer_of(tmp_path / "projections", projections, max_steps=4, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "projections" / "checkpoint-2"))
    for (name, one), other in zip(again.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    other = trainer_of(tmp_path, projections, options=CAADOptions(**{**vars(OPTIONS), "kd_weight": 0.5}))
    with pytest.raises(ValueError, match=r"options: expected those of the checkpoint .*: kd_weight was 0.7 and is 0.5"):
        other.train(resume_from_checkpoint=str(tmp_path / "projections" / "checkpoint-2"))


def test_projections_of_one_path_are_plain_distillation(tmp_path, caches):
    plain = CAADOptions(temperature=1.3, plausibility=0.01)
    cache = ProjectionCache(caches[0].folder / "kd")
    trainer = trainer_of(tmp_path, cache, options=plain)
    assert trainer.evaluate()["eval_kd"] > 0
    with pytest.raises(ValueError, match=r"options.alpha: expected None in plain distillation, got 1.5"):
        trainer_of(tmp_path, cache)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha": 1.0}, "settings: .* were made for alpha 1.5, not 1.0"),
        ({"temperature": 2.0}, "were made for temperature 1.3, not 2.0"),
        ({"plausibility": None}, "were made for plausibility 0.01, not None"),
        ({"vocab_size": 9}, "were made for vocab_size [0-9]+, not 9"),
        ({"plausibility": None, "divergence": "jsd"}, "options.divergence: expected 'forward_kl' with a ProjectionCache"),
        ({"alpha_start": 0.0, "alpha_ramp_steps": 3}, "options.alpha_ramp_steps: expected 0 with a ProjectionCache, got 3"),
    ],
)
def test_other_options_are_refused_before_the_run(tmp_path, caches, change, says):
    with pytest.raises(ValueError, match=says):
        trainer_of(tmp_path, caches[2], options=CAADOptions(**{**vars(OPTIONS), **change}))


def test_other_heads_columns_and_targets_are_refused(tmp_path, caches):
    projections = caches[2]
    with pytest.raises(ValueError, match="model: expected a frozen LM head with a ProjectionCache, got one that trains"):
        trainer_of(tmp_path, projections, model=speech_lm())
    with pytest.raises(ValueError, match=r"were made for the student head [0-9a-f]{12}, not"):
        trainer_of(tmp_path, projections, model=frozen_head(7))
    with pytest.raises(TypeError, match="teacher_head: expected None with a ProjectionCache"):
        trainer_of(tmp_path, projections, head=caches[1])
    rows = examples()
    for row in rows:
        row["alpha"] = torch.ones(tiny_lms.LENGTH)
    with pytest.raises(ValueError, match=r"inputs\['alpha'\]: expected None with a ProjectionCache, whose alpha is fixed"):
        trainer_of(tmp_path, projections, rows=rows).train()
    rows = examples()
    rows[0]["labels"] = rows[0]["labels"].flip(0)
    with pytest.raises(ValueError, match="target tokens of the ProjectionCache, got others in sample clip-0 "):
        trainer_of(tmp_path, projections, rows=rows).evaluate()
