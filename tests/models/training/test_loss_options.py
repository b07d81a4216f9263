"""Options of the recipe's loss: averages over samples, labels of the teacher, noise on the answer's embeddings."""

from __future__ import annotations

import pytest
import tiny_speech
import torch
import torch.nn.functional as F
import train_fakes as fakes
from test_run_setup import train as train_speech
from test_run_setup import world  # noqa: F401 (a fixture)

from kdkernels import TeacherSource, contrast_logits, fused_caad_loss
from models.backbones.answer_noise import AnswerNoise
from models.training.curves import read_metrics
from models.training.objective import teacher_labels
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.train import train

ONE_STEP = ("optim.steps=1", "run.log_every_steps=1", "optim.audio_dropout=0", "loss.kd_token_weight=uniform",
            "loss.ce_token_weight=uniform", "optim.batch_examples=40")  # fmt: skip


def one_step(tmp_path, *words):
    """The line of a step over all 40 examples, and the logits of student and both paths of the teacher, and the batch."""
    recipe = fakes.fake_recipe(tmp_path, "caad", *ONE_STEP, *words)
    data, model, lm = fakes.make_data(), fakes.FakeLM(seed=1), fakes.FakeLM(seed=3).eval()
    model.dropout = torch.nn.Identity()
    batch = data.make_batch(data.examples)
    with torch.no_grad():
        found = []
        for each, hears in ((model, True), (lm, True), (lm, False)):
            present = torch.full((40,), hears)
            states = each.hidden_states_at(batch.target_index, audio=batch.audio, audio_present=present)
            found.append(F.linear(states, each.head.weight))
    train(recipe, model=model, data=data, sources=fakes.make_sources(recipe, data))
    return read_metrics(tmp_path / "metrics.jsonl")[-1], found, batch


@pytest.mark.parametrize("kd", ["tokens", "samples"])
@pytest.mark.parametrize("ce", ["tokens", "samples"])
@pytest.mark.parametrize("micro", [40, 8])
def test_each_term_is_averaged_over_what_the_recipe_says(tmp_path, kd, ce, micro):
    words = [f"loss.kd_average={kd}", f"loss.ce_average={ce}", f"optim.micro_batch_examples={micro}"]
    line, (student, audio, text), batch = one_step(tmp_path, *words)

    def mean(values, how):
        if how == "tokens":
            return values.mean()
        return torch.stack([values[batch.target_row == row].mean() for row in range(40)]).mean()

    kds = fused_caad_loss(student, audio, text, None, reduction="none", impl="reference")
    ces = F.cross_entropy(student, batch.target, reduction="none")
    assert abs(mean(kds, "tokens") / mean(kds, "samples") - 1) > 1e-3  # the two differ here
    assert line["loss"] == pytest.approx((0.7 * mean(kds, kd) + 0.3 * mean(ces, ce)).item(), rel=1e-5)
    assert (line["kd"], line["ce"]) == pytest.approx((mean(kds, kd).item(), mean(ces, ce).item()), rel=1e-5)


@pytest.mark.parametrize("more", [[], ["loss.plausibility=0.3"]])
def test_the_teacher_labels_the_ce_term(tmp_path, more):
    line, (student, audio, text), _ = one_step(tmp_path, "loss.ce_target=teacher", "loss.kd_weight=0", *more)
    scores = contrast_logits(audio, text, alpha=2.0, plausibility=0.3 if more else None)
    assert line["loss"] == pytest.approx(F.cross_entropy(student, scores.argmax(-1)).item(), rel=1e-5)
    assert (audio.argmax(-1) != scores.argmax(-1)).any()


def test_labels_have_the_student_s_ids_and_each_token_its_alpha():
    generator = torch.Generator().manual_seed(0)
    audio, text, weight = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (9, 6), (50, 6)))
    alpha = torch.rand(9, generator=generator) * 4
    source = TeacherSource(audio, weight, text_hidden=text, alpha=alpha, softcap=3.0, logit_scale=2.0)
    z_audio, z_text = (3 * torch.tanh(x @ weight.T * 2 / 3) for x in (audio, text))
    expected = (z_audio + alpha[:, None] * (z_audio - z_text))[:, :20].argmax(-1)
    assert torch.equal(teacher_labels(source, 20, chunk_tokens=4), expected)


def test_noise_stands_on_the_answer_alone_and_does_not_depend_on_the_layout():
    model = tiny_speech.make_speech_lm()
    examples = tiny_speech.make_examples(3)
    batch = model.make_collator()(examples, tiny_speech.make_features(model, 3))
    columns, width = batch.input_ids.shape[1], model.get_input_embeddings().weight.shape[1]
    lengths = torch.bincount(batch.target_row)
    first = batch.target_index[lengths.cumsum(0) - lengths]
    noise = AnswerNoise.drawn(5.0, first % columns + 1, lengths.tolist(), width, [1, 2, 3])
    bound = 5.0 / (lengths[0] * width) ** 0.5
    assert 0.9 * bound < noise.values[0].abs().max() <= bound
    with torch.no_grad():
        plain = model.hidden_states_at(batch.target_index, **batch.model_inputs())
        noisy = model.hidden_states_at(batch.target_index, **batch.model_inputs(), answer_noise=noise)
        cached = model.hidden_states_at(
            batch.target_index, **batch.model_inputs(), answer_noise=noise,
            prefix_cache=model.make_prefix_cache(dtype=torch.float32),
        )  # fmt: skip
        # By hand, in the embeddings of the first row alone.
        one = model.make_collator()(examples[:1], batch.audio_features[:1])
        x = model.get_input_embeddings()(one.input_ids)
        x[0, first[0] % columns + 1 : first[0] % columns + 1 + lengths[0]] += noise.values[0, : lengths[0]]
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: x.clone())
        by_hand = model.hidden_states_at(one.target_index, **one.model_inputs())
        handle.remove()
    starts = lengths.cumsum(0) - lengths  # predicted from the prompt
    same = torch.isclose(plain, noisy, atol=1e-5).all(-1)
    assert same.nonzero()[:, 0].tolist() == starts.tolist()
    torch.testing.assert_close(cached, noisy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_hand, noisy[: lengths[0]], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_noise_is_that_of_the_example_in_its_step(world):  # noqa: F811
    words = ["optim.steps=2", "optim.answer_noise=20", "run.log_every_steps=1", "optim.learning_rate=1e-3"]
    losses = {}
    for out, more in {"whole": [], "parts": ["optim.micro_batch_examples=1"], "none": ["optim.answer_noise=0"]}.items():
        assert train_speech(world, "sft", f"noise-{out}", *words, *more) == 0
        losses[out] = [line["loss"] for line in read_metrics(world / f"noise-{out}" / "metrics.jsonl")]
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-5)
    assert losses["none"] != pytest.approx(losses["whole"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.kd_average=rows"], "loss.kd_average: expected one of tokens, samples"),
        (["loss.ce_average=samples", "loss.ce_background_fraction=0.5"], "loss.ce_background_fraction: expected 1 with"),
        (["loss.ce_target=teacher", "teacher.projection=8"], "loss.ce_target: expected answer with teacher.projection"),
        (["loss.ce_target=teacher", "objective=sft"], "loss.ce_target: expected answer with objective 'sft'"),
        (["optim.answer_noise=-1"], "optim.answer_noise: expected >= 0"),
    ],
)
def test_what_does_not_fit(words, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("caad", ["teacher.folder=t", *words])
