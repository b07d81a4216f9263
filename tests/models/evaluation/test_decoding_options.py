"""The CAAD authors' formula and sampling in `evaluate`."""

from __future__ import annotations

import pytest
import torch
from tiny_speech import make_examples, make_features, make_speech_lm

from models.data.example import Example
from models.evaluation.ask import Decoding, evaluate, generate_answers
from models.evaluation.choice_scores import choice_scores
from models.evaluation.evaluate import main


@pytest.fixture(scope="module")
def model():
    made = make_speech_lm().eval()
    made.connector.output_scale.data.fill_(3.0)  # loud enough that the sound decides something in a random model
    return made


def test_the_authors_formula_subtracts_from_the_plain_path(model):
    """Of choices of one token each the differences of the scores are those of the logits, which are linear in both paths."""
    asked = [Example(id=str(n), audio="x.wav", question="Which?", choices=("1", "2"), answer="1") for n in range(3)]
    options = {"collate": model.make_collator(), "alphas": (0.0, 1.5)}
    features = make_features(model, 3)
    plain, extrapolated = choice_scores(model, asked, features, **options)
    zero, authors = choice_scores(model, asked, features, formula="authors", **options)
    assert zero == plain

    def gap(scores):
        return torch.tensor([one["1"] - one["2"] for one in scores])

    torch.testing.assert_close(gap(authors), gap(extrapolated) - 1.5 * gap(plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(gap(authors), gap(extrapolated), atol=1e-2)


def answers(model, ids=(0, 1, 2, 3), **decoding):
    examples = [make_examples()[i] for i in ids]
    return generate_answers(
        model, examples, make_features(model, 4)[list(ids)], collate=model.make_collator(), alpha=1.0, max_new_tokens=6,
        decoding=Decoding(**decoding),
    )  # fmt: skip


@pytest.mark.slow
def test_sampling_depends_on_the_seed_and_the_questions_alone(model):
    best = answers(model)
    sampled = answers(model, temperature=5.0, seed=1)
    torch.manual_seed(7)
    assert answers(model, temperature=5.0, seed=1) == sampled != best
    assert answers(model, temperature=5.0, seed=2) != sampled
    assert answers(model, temperature=5.0, top_k=1) == best
    assert answers(model, formula="authors") != best


@pytest.mark.slow
def test_evaluate_hands_the_decoding_on(model):
    class Store:
        def rows(self, examples):
            return make_features(model, 4)[[int(e.id[1:]) for e in examples]]

    def said(**decoding):
        made = evaluate(
            model, make_examples(), Store(), collate=model.make_collator(), mode="generate", alphas=(1.0,), max_new_tokens=4,
            decoding=Decoding(**decoding), progress_bar=False,
        )  # fmt: skip
        return {p.id: p.prediction for p in made[1.0]}

    assert said(formula="authors") != said() and said(temperature=5.0) != said()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formula", "authors"], "--formula: expected --decoding contrastive beside it"),
        (["--top-k", "3"], "--top-k: expected --decoding contrastive beside it"),
        (["--decoding", "contrastive", "--top-p", "0"], "--top-p: expected a number in (0, 1], got 0.0"),
        (["--decoding", "contrastive", "--top-k", "0"], "--top-k: expected at least 1, got 0"),
        (["--decoding", "contrastive", "--temperature", "nan"], "--temperature: expected a positive number, got nan"),
        (["--decoding", "contrastive", "--seed", "3"], "--seed: expected --temperature, --top-k or --top-p beside it, got 3"),
    ],
)
def test_options_that_do_nothing_are_named(words, message, capsys):
    assert main(["none", "manifest.jsonl", *words]) == 1
    assert f"error: {message}" in capsys.readouterr().err
