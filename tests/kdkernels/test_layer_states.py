"""States of chosen layers against transformers' own hidden_states."""

import pytest
import tiny_lms
import torch

from kdkernels.layer_states import LayerStates, decoder_layers, resolve_layers
from kdkernels.teacher import DualPathTeacher, MaskFeatures

MODELS = {**tiny_lms.AUDIO_MODELS, **tiny_lms.TEXT_MODELS}
INDEX = torch.tensor([3, 17, 25, 59])


def expected_states(model, inputs, layers):
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    return torch.stack([hidden[k].flatten(0, 1)[INDEX] for k in layers], 1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equal_transformers_own(name):
    model, inputs = MODELS[name]()
    depth = len(decoder_layers(model))
    layers = [depth, *range(depth)]
    with LayerStates(model, layers, INDEX) as states:
        model(**inputs)
    try:
        expected = expected_states(model, inputs, layers)
    except TypeError as error:
        pytest.skip(f"transformers hands out no hidden_states of {name}: {error}")
    torch.testing.assert_close(states.stacked(), expected, atol=1e-6, rtol=1e-6)


def test_gradients_flow_and_hooks_are_gone():
    model, inputs = next(iter(tiny_lms.TEXT_MODELS.values()))()
    with LayerStates(model, [1], INDEX) as states:
        model(**inputs)
    states.stacked().sum().backward()
    first = next(decoder_layers(model)[0].parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0
    before = states.stacked().detach().clone()
    model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)})
    assert torch.equal(states.stacked(), before)


def test_errors():
    assert resolve_layers([-1, 0, 2], 4) == [4, 0, 2]
    with pytest.raises(ValueError, match=r"layers: expected 0 to 4 \(0 = the first layer's input\), got 5"):
        resolve_layers([5], 4)
    with pytest.raises(ValueError, match="each layer once"):
        resolve_layers([4, -1], 4)
    with pytest.raises(ValueError, match=r"model: expected a list of layers .* in Linear, got none"):
        decoder_layers(torch.nn.Linear(2, 2))
    model, _ = next(iter(tiny_lms.TEXT_MODELS.values()))()
    with pytest.raises(RuntimeError, match=r"expected the model to run layers \[1\], got nothing of \[1\]"):
        LayerStates(model, [1], INDEX).stacked()


@pytest.mark.parametrize("rows_per_pass", [None, 1])
def test_the_teacher_hands_out_both_paths(rows_per_pass):
    model, inputs = tiny_lms.AUDIO_MODELS["qwen2_audio"]()
    negative = MaskFeatures("input_features")
    plain = DualPathTeacher(model, negative=negative)(inputs, INDEX)
    states = DualPathTeacher(model, negative=negative, layers=[0, 1], rows_per_pass=rows_per_pass)(inputs, INDEX)
    assert plain.audio_layers is None and plain.text_layers is None
    torch.testing.assert_close(states.audio_hidden, plain.audio_hidden, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(states.audio_layers, expected_states(model, inputs, [0, 1]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            states.text_layers, expected_states(model, dict(negative(inputs)), [0, 1]), atol=1e-5, rtol=1e-5
        )
    assert not torch.allclose(states.audio_layers, states.text_layers)
