"""Answers that audio LMs make themselves, and on-policy distillation from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdkernels.sampling import Sampling, uniform_draws, unspoken_ids
from models.audio_lms.model import AudioLM
from models.backbones.answer_noise import AnswerNoise
from models.data.example import AnsweredExample
from models.training.on_policy import OnPolicy
from models.training.train import main as train
from tests.models.audio_lms import tiny_audio_lms as tiny
from tests.models.audio_lms.audio_world import make_world, text_teacher, words
from tests.models.audio_lms.test_families import CLIPS, EXAMPLES

OWN = ("data.on_policy_fraction=1", "data.on_policy_max_new_tokens=6")


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers(tmp_path, family):
    """At temperature 0 those of `generate`; sampled ones have ordinary tokens and an end, and become targets as they are."""
    model = AudioLM.from_pretrained(tiny.FAMILIES[family](tmp_path / family))
    collate, draws = model.make_collator(), uniform_draws([1, 2], 12)
    prompts, end = collate(EXAMPLES, CLIPS, with_target=False), collate.end_id
    suppressed = unspoken_ids(model.tokenizer, [end], model.get_output_embeddings().weight.shape[0])
    greedy = model.own_answers(prompts, draws, sampling=Sampling(temperature=0, max_new_tokens=12))
    texts = [model.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in greedy]
    stops = {end, model.tokenizer.eos_token_id}
    if not any(stops & set(answer[:-1]) for answer in greedy):
        assert texts == model.generate(prompts, max_new_tokens=12)
    sampled = model.own_answers(prompts, draws, sampling=Sampling(temperature=3.0, max_new_tokens=12), suppressed=suppressed)
    assert sampled != greedy and not any(suppressed & set(answer) for answer in sampled)
    answered = [AnsweredExample.of(example, tokens) for example, tokens in zip(EXAMPLES, sampled, strict=True)]
    batch = collate(answered, CLIPS)
    assert batch.target.tolist() == sampled[0] + sampled[1] and bool(batch.choice_mask.all())
    assert torch.equal(batch.input_ids.flatten()[batch.target_index + 1], batch.target)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), "qwen2_audio")


def curves(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kd", "caad"])
def test_a_lora_learns_from_its_own_answers_and_parts_add_up(world, recipe, monkeypatch):
    calls = []
    answered = OnPolicy.answered

    def recording(self, step, examples):
        calls.append(answered(self, step, examples))
        return calls[-1]

    monkeypatch.setattr(OnPolicy, "answered", recording)
    text = ["sources.text.role=text", f"sources.text.folder={text_teacher(world)}", "sources.text.keep_mib=0"]
    options = [f"teacher.model={world / 'teacher'}", *OWN, *text, "optim.steps=2", "loss.kd_weight=1"]
    options += ["run.gradient_checkpointing=true", "student.lora.dropout=0"]
    for parts in ("1", "4"):
        assert train([recipe, *words(world, f"{recipe}-{parts}", *options, f"optim.micro_batch_examples={parts}")]) == 0
    assert calls[:2] == calls[2:]
    assert all(isinstance(example, AnsweredExample) for example in calls[0].values())
    one, four = (curves(world / f"{recipe}-{parts}") for parts in ("1", "4"))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in four], rel=1e-4)
    assert four[0]["answer_tokens"] == sum(len(example.answer_tokens) for example in calls[0].values()) / 4
    assert four[0]["kd_text"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_noise_stands_on_the_answer_alone(tmp_path, family):
    model = AudioLM.from_pretrained(tiny.FAMILIES[family](tmp_path / family))
    batch = model.make_collator()(EXAMPLES, CLIPS)
    lengths = torch.bincount(batch.target_row)
    starts = lengths.cumsum(0) - lengths
    width = model.get_input_embeddings().weight.shape[1]
    columns = batch.target_index[starts] % batch.input_ids.shape[1] + 1
    noise = AnswerNoise.drawn(5.0, columns, lengths.tolist(), width, [1, 2])
    with torch.no_grad():
        plain = model.hidden_states_at(batch.target_index, **batch.model_inputs())
        noisy = model.hidden_states_at(batch.target_index, **batch.model_inputs(), answer_noise=noise)
        again = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    same = torch.isclose(plain, noisy, rtol=1e-5, atol=1e-6).all(-1)
    assert same.nonzero()[:, 0].tolist() == starts.tolist() and torch.equal(plain, again)
