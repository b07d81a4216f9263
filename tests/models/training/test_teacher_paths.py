"""kdkernels' teacher and contrastive decoding over a SpeechLM: the negative path is audio_present = False."""

from __future__ import annotations

import pytest
import torch
from tiny_speech import make_examples, make_features, make_speech_lm

from kdkernels import CAADTrainer, fused_linear_caad_loss
from kdkernels.decoding import contrastive_generate
from kdkernels.head_loss import HeadLoss
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


def test_loss_in_the_place_of_the_head(model):
    """A SpeechLM as student: the loss from its forward is that from hidden_states_at."""
    batch = collated(model)

    def loss(hidden, weight, _bias):
        return torch.nn.functional.cross_entropy(hidden @ weight.T, batch.target)

    hidden = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    expected = loss(hidden, model.get_output_embeddings().weight, None)
    expected.backward()
    gradient = model.connector.queries.grad.clone()
    model.zero_grad()
    found = HeadLoss(model)(model, batch.model_inputs(), batch.target_index, loss)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.connector.queries.grad, gradient, rtol=1e-3, atol=1e-6)
    model.zero_grad()


class Holder(torch.nn.Module):
    """transformers' Trainer writes into `model.config`, which is frozen in a SpeechLM."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def get_output_embeddings(self):
        return self.lm.get_output_embeddings()

    def forward(self, **inputs):
        return self.lm(**inputs)


def test_trainer_of_transformers(model, tmp_path):
    """Student and teacher are SpeechLMs; one step's loss against the fused loss on hidden_states_at."""
    from transformers import TrainingArguments

    student = make_speech_lm(num_queries=3)
    student.fit_feature_statistics(make_features(model, 8))
    teacher = DualPathTeacher(model, negative=MarkAbsent())
    batch = collated(student)
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.target_index + 1] = batch.target
    columns = {**batch.model_inputs(), "labels": labels}
    rows = [{name: x[row] for name, x in columns.items()} for row in range(ROWS)]

    def collate(chosen):
        return {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    states = teacher(batch.model_inputs(), batch.target_index)
    with torch.no_grad():
        expected = fused_linear_caad_loss(
            student.hidden_states_at(batch.target_index, **batch.model_inputs()),
            student.get_output_embeddings().weight,
            states.audio_hidden,
            states.text_hidden,
            teacher.head.weight,
            batch.target,
        )
    before = student.connector.queries.clone()
    trainer = CAADTrainer(Holder(student), arguments, teacher=teacher, data_collator=collate, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert not torch.equal(student.connector.queries, before)
