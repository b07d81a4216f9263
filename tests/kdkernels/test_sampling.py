"""Sampled answers: the right distribution, top-k and top-p, where an answer ends, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the models that answer")
import tiny_lms

from kdkernels.sampling import Sampling, TokenSampler, own_answers, uniform_draws, unspoken_ids, until_end


def chosen(logits: list[float], draw: float, *, suppressed=(), **options) -> int:
    sampler = TokenSampler(Sampling(**options), torch.tensor([[draw]], dtype=torch.float64), suppressed=suppressed)
    return int(sampler.choose(torch.tensor([logits])))


def test_a_token_is_chosen_by_its_share_of_the_unit_interval():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist()  # sums 0.1, 0.3, 0.6, 1
    assert [chosen(logits, u) for u in (0.0, 0.09, 0.11, 0.29, 0.31, 0.61, 1 - 2**-53)] == [0, 0, 1, 1, 2, 3, 3]
    assert [chosen(logits, u, temperature=0) for u in (0.0, 0.5)] == [3, 3]
    # temperature 1/2 squares: 1/30, 4/30, 9/30, 16/30
    assert [chosen(logits, u / 30, temperature=0.5) for u in (0.9, 1.1, 4.9, 5.1, 13.9, 14.1)] == [0, 1, 1, 2, 2, 3]
    # top_k 2 leaves 0.3 and 0.4
    assert [chosen(logits, u, top_k=2) for u in (0.0, 0.42, 0.44)] == [2, 2, 3]
    # 0.4 + 0.3 reach 0.65, so these two stay; 0.4 alone reaches 0.4
    assert [chosen(logits, u, top_p=0.65) for u in (0.0, 0.42, 0.44)] == [2, 2, 3]
    assert chosen(logits, 0.0, top_p=0.01) == 3
    assert [chosen(logits, u, suppressed=[3, 2, 9]) for u in (0.32, 0.34)] == [0, 1]
    assert chosen([0.0, -torch.inf, 0.0, -torch.inf], 1 - 2**-53) == 2


@pytest.mark.parametrize("temperature", [0.0, 1e-37, 1.0])
def test_a_row_without_a_token_to_choose_is_named(temperature):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, nan, 0.0], [-inf, -inf, 0.0], [-inf, 3.0, -inf], [inf, 0.0, 0.0]])
    sampler = TokenSampler(Sampling(temperature), torch.full((5, 2), 0.5, dtype=torch.float64), suppressed=[2])
    assert sampler.choose(logits)[[0, 3]].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"logits: expected finite numbers.*in rows \[1, 2, 4\]"):
        sampler.check()
    fine = TokenSampler(Sampling(temperature), torch.full((2, 2), 0.5, dtype=torch.float64), suppressed=[2])
    fine.choose(logits[[0, 3]])
    fine.check()


def test_a_student_with_weights_that_are_not_finite_raises():
    model, inputs = tiny_lms.voxtral()
    model.get_output_embeddings().weight.data[5] = torch.nan
    with pytest.raises(ValueError, match=r"logits: expected finite numbers.*in rows \[0, 1"):
        own_answers(
            model, inputs, uniform_draws(range(len(inputs["input_ids"])), 2), sampling=Sampling(max_new_tokens=2), end_ids=[7]
        )


def test_answers_end_with_their_first_end_token():
    assert until_end(torch.tensor([[5, 2, 2], [2, 7, 7], [5, 6, 7]]), [2]) == [[5, 2], [2], [5, 6, 7]]


@pytest.mark.parametrize("family", ["voxtral", "qwen2_audio"])
def test_answers_are_those_of_forwards_without_a_cache_and_of_a_row_alone(family):
    torch.manual_seed(0)
    model, inputs = getattr(tiny_lms, family)()
    model.generation_config.do_sample = True  # which has no effect, as the penalty that tiny_lms sets
    rows, steps, end = len(inputs["input_ids"]), 6, 7
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=steps)
    draws = uniform_draws(range(rows), steps)
    suppressed = [tiny_lms.AUDIO_TOKEN, 3]
    answers = own_answers(model, inputs, draws, sampling=sampling, end_ids=[end], suppressed=suppressed)
    assert len({tuple(answer) for answer in answers}) == rows and not model.training
    for row, answer in enumerate(answers):
        alone = {name: x[row : row + 1] for name, x in inputs.items()}
        again = own_answers(model, alone, draws[row : row + 1], sampling=sampling, end_ids=[end], suppressed=suppressed)
        assert again == [answer]
        ids, mask = alone["input_ids"], alone["attention_mask"]
        keep = mask[0].bool()
        ids, mask = ids[:, keep], mask[:, keep]
        sampler = TokenSampler(sampling, draws[row : row + 1], suppressed=suppressed)
        for token in answer:
            with torch.no_grad():
                logits = model(**alone | {"input_ids": ids, "attention_mask": mask}).logits[:, -1]
            assert int(sampler.choose(logits)) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            mask = torch.ones_like(ids)
        assert (answer[-1] == end) or len(answer) == steps


def test_ids_that_no_answer_has():
    class Tokenizer:
        all_special_ids = (0, 1)

        def __len__(self):
            return 5

        def get_added_vocab(self):
            return {"<audio>": 5}

        def get_vocab(self):
            return {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<audio>": 5}

    assert unspoken_ids(Tokenizer(), [1], 8) == {0, 5, 6, 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0"),
        ({"temperature": 1e-300}, r"temperature: expected a finite number >= 0, got 1e-300 .*in float32"),
        ({"top_k": -1}, "top_k: expected >= 0"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected >= 1"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
