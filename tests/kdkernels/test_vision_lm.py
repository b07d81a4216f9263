"""Another modality: teacher and loss on a vision LM of transformers, whose negative path has a masked image."""

from __future__ import annotations

import pytest
import torch

from kdkernels import fused_caad_loss, fused_linear_caad_loss
from kdkernels.paths import MaskFeatures
from kdkernels.teacher import DualPathTeacher, answer_index

pytest.importorskip("transformers")

ROWS, LENGTH, IMAGE_TOKENS, IMAGE_ID, VOCAB = 3, 12, 4, 60, 61


def llava(seed: int):
    """A LLaVA of two random layers; its image of 8 x 8 pixels is four tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=IMAGE_TOKENS)
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE_ID, (ROWS, LENGTH), generator=generator)
    ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_ID
    labels = ids.clone()
    labels[:, : LENGTH - 4] = -100
    pixels = torch.randn(ROWS, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, labels


def test_both_paths_are_those_of_plain_forwards(batch):
    inputs, labels = batch
    model = llava(0)
    index, _ = answer_index(labels)
    states = DualPathTeacher(model, negative=MaskFeatures("pixel_values"))(inputs, index)
    with torch.no_grad():
        seen = model(**inputs).logits.flatten(0, 1)[index]
        unseen = model(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits.flatten(0, 1)[index]
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(states.audio_hidden), seen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(states.text_hidden), unseen, rtol=1e-4, atol=1e-5)
    assert (seen - unseen).abs().max() > 1e-3  # the image counts


def test_a_student_learns_from_the_contrast_of_the_two_paths(batch):
    inputs, labels = batch
    teacher, student = llava(0), llava(1)
    student.requires_grad_(False)
    student.model.multi_modal_projector.requires_grad_(True)
    index, target = answer_index(labels)
    states = DualPathTeacher(teacher, negative=MaskFeatures("pixel_values"))(inputs, index)
    heads = [model.get_output_embeddings().weight for model in (student, teacher)]
    trained = list(student.model.multi_modal_projector.parameters())
    optimizer = torch.optim.Adam(trained, lr=3e-3)

    def loss():
        hidden = student.model(**inputs).last_hidden_state.flatten(0, 1)[index]
        fused = fused_linear_caad_loss(
            hidden, heads[0], states.audio_hidden, states.text_hidden, heads[1], target, alpha=2.0, temperature=2.0
        )
        logits = [h @ w.T for h, w in ((hidden, heads[0]), *((h, heads[1]) for h in (states.audio_hidden, states.text_hidden)))]
        torch.testing.assert_close(fused, fused_caad_loss(*logits, target, alpha=2.0, impl="reference"), rtol=1e-4, atol=1e-5)
        return fused

    first = loss()
    for _ in range(12):
        optimizer.zero_grad()
        loss().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
    assert loss() < first and all(p.grad is None for p in teacher.parameters())
