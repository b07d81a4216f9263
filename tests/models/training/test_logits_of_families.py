"""The training loop's logits are the language model's own, whatever its family does to them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lm_families import FAMILIES, HYBRIDS, make_family
from tiny_speech import make_config, make_examples, make_features, make_tokenizer

from models.backbones.causal_lm import read_head
from models.speech_lm.model import SpeechLM
from models.training.build_sources import OWN_TEACHER
from models.training.objective import TokenWeights, objective_loss
from models.training.recipe_files import load_recipe
from models.training.teacher_states import TeacherStates

TOKENIZER = make_tokenizer()
RECIPES = {"kd": load_recipe("kd", ["teacher.folder=x", "loss.kd_weight=1"]), "sft": load_recipe("sft")}


def speech_lm(lm) -> SpeechLM:
    torch.manual_seed(2)
    return SpeechLM(make_config(), lm=lm, tokenizer=TOKENIZER).eval()


def loss_of(recipe, model, hidden, target, states) -> float:
    ones = torch.ones(len(target))
    total = ones.sum()
    return float(objective_loss(recipe, 1, model, hidden, target, states, TokenWeights(ones, ones), total, total)[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES | HYBRIDS)
def test_losses_are_those_of_the_language_models_own_logits(family):
    """KD of a model from itself is 0, and CE is that of the logits of its own forward."""
    lm = make_family(family, len(TOKENIZER))
    model = speech_lm(lm)
    ids = torch.randint(5, len(TOKENIZER), (2, 12), generator=torch.Generator().manual_seed(1))
    ids[ids == model.placeholder_token_id] = 7
    mask = torch.ones_like(ids)
    index = torch.tensor([3, 6, 10, 12, 20])
    target = ids.flatten()[index + 1]
    with torch.no_grad():
        logits = lm(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[index].float()
        hidden = model.hidden_states_at(index, ids, mask)
        torch.testing.assert_close(model(ids, mask).logits.flatten(0, 1)[index], logits, rtol=1e-5, atol=1e-5)
    states = {OWN_TEACHER: TeacherStates(hidden, None, read_head(model))}
    assert abs(loss_of(RECIPES["kd"], model, hidden, target, states)) < 1e-6
    expected = float(F.cross_entropy(logits, target))
    assert loss_of(RECIPES["sft"], model, hidden, target, {}) == pytest.approx(expected, abs=1e-5)
    assert expected > 1


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite", "Cohere", "GPTJ"])
def test_a_head_that_trains_gets_the_gradient_of_its_own_logits(family):
    model = speech_lm(make_family(family, len(TOKENIZER), tie_word_embeddings=False))
    head = model.get_output_embeddings().requires_grad_(True)
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    target = torch.arange(6)
    ones = torch.ones(6)
    for name, recipe in RECIPES.items():
        states = {OWN_TEACHER: TeacherStates(hidden.flip(0), None, read_head(model))} if name == "kd" else {}
        loss, _ = objective_loss(recipe, 1, model, hidden, target, states, TokenWeights(ones, ones), ones.sum(), ones.sum())
        (got,) = torch.autograd.grad(loss, head.weight)
        logits = model._logits(hidden)
        if name == "sft":
            wanted = F.cross_entropy(logits, target)
        else:
            tau = recipe.loss.temperature
            p = (model._logits(hidden.flip(0)).detach() / tau).softmax(-1)
            wanted = tau**2 * (p * (p.log() - (logits / tau).log_softmax(-1))).sum() / 6
        (expected,) = torch.autograd.grad(wanted, head.weight)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_model_whose_logits_no_head_explains_is_an_error():
    lm = make_family("Llama", len(TOKENIZER))
    forward = lm.forward

    def shifted(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        output.logits = output.logits + torch.arange(len(TOKENIZER))
        return output

    lm.forward = shifted
    model = speech_lm(lm)
    with pytest.raises(ValueError, match="lm: expected a language model whose logits are those of its LM head"):
        model.generate(model.make_collator()(make_examples(1), make_features(model, 1), with_target=False))


def test_round_contrast_reaches_the_loss():
    model = speech_lm(make_family("Llama", len(TOKENIZER)))
    model.lm.bfloat16()
    g = torch.Generator().manual_seed(3)
    head = read_head(model)
    hidden, audio, text = (torch.randn(8, head.weight.shape[1], generator=g).bfloat16() for _ in range(3))
    states, target, ones = {OWN_TEACHER: TeacherStates(audio, text, head)}, torch.arange(5, 13), torch.ones(8)
    arguments = (1, model, hidden, target, states, TokenWeights(ones, ones), ones.sum(), ones.sum())
    exact, rounded = (
        float(objective_loss(load_recipe("caad", [f"loss.round_contrast={x}"]), *arguments, with_stats=False)[0])
        for x in ("false", "true")
    )
    assert 0 < abs(rounded - exact) < 0.01 * exact
