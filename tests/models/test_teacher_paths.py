"""kdkernels' teacher and contrastive decoding over a SpeechLM: the negative path is audio_present = False."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_speech import make_examples, make_features, make_speech_lm

from kdkernels.decoding import contrastive_generate
from kdkernels.teacher import DualPathTeacher, MarkAbsent

ROWS = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = make_speech_lm()
    model.fit_feature_statistics(make_features(model, 8))
    return model.eval()


def collated(model, **options):
    return model.make_collator()(make_examples(ROWS), make_features(model, ROWS), **options)


@pytest.mark.parametrize("with_prefix_cache", [False, True])
@pytest.mark.parametrize("rows_per_pass", [None, 3])
def test_both_paths_equal_two_full_forwards(model, rows_per_pass, with_prefix_cache):
    batch = collated(model)
    inputs = batch.model_inputs()
    silent = {**inputs, "audio_present": torch.zeros(ROWS, dtype=torch.bool)}
    with torch.no_grad():
        audio, text = (model(**path).logits.flatten(0, 1)[batch.target_index] for path in (inputs, silent))
    assert (audio - text).abs().max() > 0.1
    if with_prefix_cache:
        inputs = {**inputs, "prefix_cache": model.make_prefix_cache(dtype=torch.float32)}
    teacher = DualPathTeacher(model, negative=MarkAbsent(), rows_per_pass=rows_per_pass)
    states = teacher(inputs, batch.target_index)
    torch.testing.assert_close(teacher.head.logits(states.audio_hidden), audio, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.head.logits(states.text_hidden), text, rtol=1e-4, atol=1e-4)


def test_contrastive_generation(model):
    prompts = collated(model, with_target=False)
    options = {"negative": MarkAbsent(), "max_new_tokens": 6, "eos_token_id": model.tokenizer.eos_token_id}
    greedy = contrastive_generate(model, prompts.model_inputs(), alpha=0.0, **options)
    texts = [text.strip() for text in model.tokenizer.batch_decode(greedy, skip_special_tokens=True)]
    assert texts == model.generate(prompts, max_new_tokens=6)
    contrasted = contrastive_generate(model, prompts.model_inputs(), alpha=2.0, **options)
    recomputed = contrastive_generate(model, prompts.model_inputs(), alpha=2.0, use_cache=False, **options)
    assert torch.equal(contrasted, recomputed) and not torch.equal(contrasted, greedy)
