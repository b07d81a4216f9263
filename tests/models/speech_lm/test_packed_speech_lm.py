"""A SpeechLM on packed rows: the states and gradients of padded ones, samples that cannot see each other, the recipe's option."""

from __future__ import annotations

import pytest
import torch
from tiny_speech import make_config, make_examples, make_features, make_lm, make_speech_lm, make_tokenizer

from kdkernels.teacher import DualPathTeacher, MarkAbsent
from models.speech_lm.collation import crop_to_targets
from models.speech_lm.model import SpeechLM
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import DataConfig
from models.training.teacher_states import SourceError
from models.training.teachers import ListeningTeacher, LiveTeacher
from models.training.text_teacher import TextTeacher
from models.training.training_data import make_training_data

ROWS = 6
# float32: the softmax and the products sum over other numbers of columns; states are of order 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = make_speech_lm()
    model.fit_feature_statistics(make_features(model, 8))
    return model.eval()


class Store:
    """Features by the numbers in the examples' ids."""

    def __init__(self, model):
        self.features = make_features(model, ROWS)

    def rows(self, examples):
        return self.features[[int(example.id[1:]) for example in examples]]


def collated(model):
    return model.make_collator()(make_examples(ROWS), make_features(model, ROWS))


def longest(batch):
    return int(batch.attention_mask.sum(1).max())


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[], [1, 4]])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("rows_worth", [1, 2.2, 100])
def test_packed_states_and_gradients_equal_padded(model, rows_worth, cached, layers):
    batch = collated(model)
    options = {"prefix_cache": model.make_prefix_cache(dtype=torch.float32) if cached else None, "layers": layers}
    lengths = batch.attention_mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    weight = torch.randn(len(batch.target), 32, generator=torch.Generator().manual_seed(0))

    def run(**packing):
        states = model.hidden_states_at(batch.target_index, **batch.model_inputs(), **options, **packing)
        shaped = weight if states.dim() == 2 else weight[:, None]
        gradients = torch.autograd.grad((states * shaped).sum(), list(model.connector.parameters()))
        return states.detach(), gradients

    expected, expected_gradients = run()
    seen = []
    handle = model.lm.model.register_forward_pre_hook(
        lambda _m, _a, k: seen.append(tuple(k["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    states, gradients = run(pack_tokens=int(rows_worth * longest(batch)))
    handle.remove()
    rows, columns = next(shape for shape in reversed(seen))
    if rows_worth > 1:
        assert rows < ROWS and rows * columns < batch.input_ids.numel()
    torch.testing.assert_close(states, expected, **CLOSE)
    scale = max(g.abs().max() for g in expected_gradients)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * scale.item())


@pytest.mark.parametrize("cached", [False, True])
def test_samples_cannot_see_each_other(model, cached):
    batch = collated(model)
    cache = model.make_prefix_cache(dtype=torch.float32) if cached else None

    def run(inputs):
        with torch.no_grad():
            return model.hidden_states_at(batch.target_index, **inputs, prefix_cache=cache, pack_tokens=1000)

    inputs = batch.model_inputs()
    before = run(inputs)
    changed = {key: inputs[key].clone() for key in ("input_ids", "audio_features")}
    changed["input_ids"][2, 1] = 9  # of the prefix
    changed["audio_features"][2] += 1
    after = run({**inputs, **changed})
    mine = batch.target_row == 2
    assert torch.equal(before[~mine], after[~mine])
    assert (before[mine] - after[mine]).abs().max() > 0.01


@pytest.mark.parametrize("cached", [False, True])
def test_both_paths_of_the_teacher(model, cached):
    batch = collated(model)
    inputs = batch.model_inputs() | {"prefix_cache": model.make_prefix_cache(dtype=torch.float32) if cached else None}
    teacher = DualPathTeacher(model, negative=MarkAbsent(), layers=[2])
    expected = teacher(inputs, batch.target_index)
    packed = teacher({**inputs, "pack_tokens": 3 * longest(batch)}, batch.target_index)
    assert (expected.audio_hidden - expected.text_hidden).abs().max() > 0.1
    for key in ("audio_hidden", "text_hidden", "audio_layers", "text_layers"):
        torch.testing.assert_close(getattr(packed, key), getattr(expected, key), **CLOSE)


@pytest.mark.parametrize("cache_mib", [0, 16])
def test_recipe_option_reaches_student_and_teachers(model, cache_mib):
    examples = make_examples(ROWS)
    device = torch.device("cpu")
    results = {}
    for packing in ("none", "pack"):
        layout = DataConfig(packing=packing, pack_tokens=200)
        data = make_training_data(model, examples, Store(model), prefix_cache_mib=cache_mib, layout=layout)
        batch = data.make_batch(examples)
        inputs = data.model_inputs(data.crop(batch))
        assert inputs.get("pack_tokens") == (200 if packing == "pack" else None)
        teachers = [kind(model, data, device=device) for kind in (LiveTeacher, ListeningTeacher)]
        seen = []
        handle = model.lm.model.register_forward_pre_hook(
            lambda _m, _a, k, seen=seen: seen.append(len(k["inputs_embeds"])) if "inputs_embeds" in k else None, with_kwargs=True
        )
        with torch.no_grad():
            student = model.hidden_states_at(data.crop(batch).target_index, **inputs)
        live, listening = (teacher(batch, examples) for teacher in teachers)
        handle.remove()
        results[packing] = (seen, [student, live.audio_hidden, live.text_hidden, listening.audio_hidden])
    (padded_rows, padded), (packed_rows, packed) = results.values()
    assert padded_rows == [ROWS, 2 * ROWS, ROWS] and all(a < b for a, b in zip(packed_rows, padded_rows, strict=True))
    # The cache stores bfloat16, and both layouts read the same numbers from it.
    for got, wanted in zip(packed, padded, strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_left_padded_rows_and_crop(model):
    batch = crop_to_targets(collated(model))
    inputs = batch.model_inputs()
    expected = model.hidden_states_at(batch.target_index, **inputs, pack_tokens=500)
    columns = inputs["input_ids"].shape[1]
    rolled = {key: torch.zeros_like(inputs[key]) for key in ("input_ids", "attention_mask")}
    index = batch.target_index.clone()
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for key in rolled:
            rolled[key][row, columns - length :] = inputs[key][row, :length]
        index[batch.target_row == row] += columns - length
    got = model.hidden_states_at(index, **{**inputs, **rolled}, pack_tokens=500)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_frozen_teacher_whose_language_model_was_trained_shares_prefixes():
    """Its config says train_lm, yet nothing of it changes any more."""
    lm = make_speech_lm(train_lm=True)
    with pytest.raises(ValueError, match="train_lm: a prefix cache needs a frozen language model"):
        lm.make_prefix_cache()
    lm.requires_grad_(False)
    batch = collated(lm)
    expected = DualPathTeacher(lm, negative=MarkAbsent())(batch.model_inputs(), batch.target_index)
    cache = lm.make_prefix_cache(dtype=torch.float32)
    inputs = batch.model_inputs() | {"prefix_cache": cache}
    states = DualPathTeacher(lm, negative=MarkAbsent())(inputs, batch.target_index)
    torch.testing.assert_close(states.audio_hidden, expected.audio_hidden, **CLOSE)
    torch.testing.assert_close(states.text_hidden, expected.text_hidden, **CLOSE)
    prefixes = {tuple(lm.make_collator().prefix_ids(example)) for example in make_examples(ROWS)}
    assert cache.misses == len(prefixes) == len(cache)  # once for both paths of all the examples that begin alike


def test_errors(model):
    batch = collated(model)

    def run(lm, **options):
        return lm.hidden_states_at(batch.target_index, **batch.model_inputs(), **{"pack_tokens": 64, **options})

    with pytest.raises(ValueError, match="pack_tokens: expected a positive int or None, got 0"):
        run(model, pack_tokens=0)
    with pytest.raises(ConfigError, match=r"data\.packing: expected one of none, pack, varlen, got 'packed'"):
        DataConfig(packing="packed")
    with pytest.raises(ConfigError, match=r"data\.pack_tokens: expected >= 1, got 0"):
        DataConfig(pack_tokens=0)
    assert load_recipe("sft").data.packing == "none"
    tokenizer = make_tokenizer()
    eager = SpeechLM(make_config(), lm=make_lm(tokenizer), tokenizer=tokenizer)
    eager.lm.set_attn_implementation("eager")
    torch.testing.assert_close(run(eager), run(eager, pack_tokens=None), **CLOSE)  # transformers' mask serves it as well
    with pytest.raises(ValueError, match=r"prefix_cache: expected SDPA without a sliding window .* got eager"):
        run(eager, prefix_cache=eager.make_prefix_cache())
    eager.lm.set_attn_implementation("sdpa")
    eager.lm.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"prefix_cache: expected SDPA without a sliding window .* got a sliding window"):
        run(eager, prefix_cache=eager.make_prefix_cache())
    eager.lm.config.layer_types = ["linear_attention"]
    with pytest.raises(ValueError, match=r"pack_tokens: expected layers of attention, .* got \['linear_attention'\]"):
        run(eager)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_varlen_without_flash_attention_says_so():
    lm = make_speech_lm()
    with pytest.raises(SourceError, match=r"data\.packing: varlen needs flash-attention 2"):
        make_training_data(lm, make_examples(2), Store(lm), layout=DataConfig(packing="varlen"))


def test_varlen_gets_one_row_and_cumulative_lengths(model, monkeypatch):
    """What flash-attention would be given; the kernel itself needs a GPU."""
    batch = collated(model)
    monkeypatch.setattr(SpeechLM, "_runs_varlen", property(lambda self: True))
    given = {}

    def body(embeddings, mask, position_ids, past, use_cache, **varlen):
        given.update(varlen, mask=mask, position_ids=position_ids)
        return embeddings

    monkeypatch.setattr(model, "_body", body)
    embedded = model.hidden_states_at(batch.target_index, **batch.model_inputs(), pack_tokens=8)
    lengths = batch.attention_mask.sum(1).tolist()
    assert given["mask"] is None and embedded.shape == (len(batch.target), 32)
    assert given["position_ids"].tolist() == [[n for length in lengths for n in range(length)]]
    assert torch.equal(given["cu_seq_lens_q"], torch.tensor([0, *lengths]).cumsum(0).int())
    assert given["cu_seq_lens_k"] is given["cu_seq_lens_q"]
    assert given["max_length_q"] == given["max_length_k"] == max(lengths)


@pytest.mark.gpu
def test_flash_attention_equals_padded_sdpa():
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    lm = make_speech_lm().to("cuda")
    lm.lm.bfloat16()
    batch = collated(lm).to("cuda")
    expected = lm.hidden_states_at(batch.target_index, **batch.model_inputs())
    lm.lm.set_attn_implementation("flash_attention_2")
    states = lm.hidden_states_at(batch.target_index, **batch.model_inputs(), pack_tokens=64)
    assert (states - expected).double().norm() <= 2e-2 * expected.double().norm()  # bfloat16, four layers


def test_no_adapter_runs_the_head(model, monkeypatch):
    """Student, both paths, one path, and the teacher that reads: none of them makes a logit in a step."""
    examples = make_examples(ROWS)
    device = torch.device("cpu")
    reader = make_lm(make_tokenizer(), seed=5)
    target_ids = model.make_collator().target_ids
    calls = []
    for lm in (model.lm, reader):
        forward = lm.lm_head.forward
        monkeypatch.setattr(lm.lm_head, "forward", lambda hidden, f=forward: calls.append(hidden.shape) or f(hidden))
    for packing in ("none", "pack"):
        for cache_mib in (0, 16):
            layout = DataConfig(packing=packing, pack_tokens=200)
            data = make_training_data(model, examples, Store(model), prefix_cache_mib=cache_mib, layout=layout)
            batch = data.make_batch(examples)
            teachers = [
                LiveTeacher(model, data, device=device, layers=[2]),
                ListeningTeacher(model, data, device=device),
                TextTeacher(reader, make_tokenizer(), target_ids=target_ids, end_ids=(), device=device),
            ]
            for teacher in teachers:  # the first time: LMHead.from_model looks at the head, worked examples are read
                teacher(batch, examples)
            assert all(shape[:-1].numel() <= 4 for shape in calls)  # the rows of that look
            calls.clear()
            for teacher in teachers:
                teacher(batch, examples)
            model.hidden_states_at(batch.target_index, **data.model_inputs(batch))
            assert calls == []
    model(**batch.model_inputs())
    assert len(calls) == 1  # the count counts
