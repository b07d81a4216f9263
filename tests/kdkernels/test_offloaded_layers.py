"""Layers that accelerate keeps elsewhere between forwards, as a device_map with offloading does: the same states and losses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import accelerate
import tiny_lms

from kdkernels import DualPathTeacher, LMHead, MaskFeatures, answer_index
from kdkernels.head_loss import HeadLoss


def speech_lm():
    torch.manual_seed(0)
    return tiny_lms.voxtral()[0]


def make_batch():
    ids = torch.randint(1, 80, (2, tiny_lms.LENGTH), generator=torch.Generator().manual_seed(5))
    ids[:, 2:6] = tiny_lms.AUDIO_TOKEN
    labels = ids.clone()
    labels[:, :12] = -100
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features}, labels


def test_offloaded_layers_change_nothing():
    inputs, labels = make_batch()
    index, _ = answer_index(labels)
    whole, offloaded = speech_lm(), speech_lm()
    for layer in offloaded.get_decoder().layers:
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert {p.device.type for p in offloaded.parameters()} == {"cpu", "meta"}
    states = []
    for model in (whole, offloaded):
        made = DualPathTeacher(model, negative=MaskFeatures("input_features"), layers=(1,))(inputs, index)
        with torch.no_grad():
            product = HeadLoss(model)(model, inputs, index, lambda hidden, weight, bias: hidden @ weight.T)
        states.append((made.audio_hidden, made.text_hidden, product))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


def test_an_offloaded_head_is_refused():
    model = speech_lm()
    accelerate.cpu_offload(model.get_output_embeddings(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="its weight is on the meta device"):
        LMHead.from_model(model)
