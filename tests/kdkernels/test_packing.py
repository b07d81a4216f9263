"""Packed rows: bins, where tokens go, and states of transformers' audio LMs equal to those of padded rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the teacher is tested on transformers' own model classes")
import tiny_lms

from kdkernels.packing import Packing, fill_bins, pack_batch
from kdkernels.paths import as_batch
from kdkernels.teacher import DualPathTeacher, MarkAbsent, MaskFeatures

# float32: what rounding leaves between summing over 20 columns and over 60, most of them masked.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LENGTHS = (20, 16, 13)  # of the rows below, padded to 20


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 60), st.booleans())
def test_bins_hold_every_sample_once_and_no_more_than_the_capacity(lengths, capacity, keep_order):
    bins = fill_bins(lengths, capacity, keep_order=keep_order)
    flat = [sample for samples in bins for sample in samples]
    assert sorted(flat) == list(range(len(lengths)))
    assert max(sum(lengths[s] for s in samples) for samples in bins) <= max(capacity, *lengths)
    if keep_order:
        assert flat == sorted(flat)


def test_bins_of_first_fit_decreasing_are_levelled():
    assert fill_bins([5, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert fill_bins([6, 3, 3, 2], 12) == [[0, 3], [1, 2]]  # not [0, 1, 2] and 10 columns of padding beside [3]
    assert fill_bins([5, 5, 1], 10, keep_order=True) == [[0], [1, 2]]  # not [0, 1] and a row of padding beside [2]


def test_place_and_source_are_inverse():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    packing = Packing.of_mask(mask, 4)
    ids = torch.arange(1, 13).view(3, 4)
    assert packing.bins == [[0], [1, 2]] and packing.lengths == [3, 2, 1]
    assert packing.take(ids, fill=0).tolist() == [[1, 2, 3], [7, 8, 9]]
    assert packing.positions().tolist() == [[0, 1, 2], [0, 1, 0]]
    assert packing.number.tolist() == [[1, 1, 1], [1, 1, 2]]
    index = mask.flatten().nonzero()[:, 0]
    assert torch.equal(packing.take(ids).flatten()[packing.at(index)], ids.flatten()[index])
    one_row = Packing.of_mask(mask, None)
    assert one_row.cumulative_lengths().tolist() == [0, 3, 5, 6]
    assert one_row.cumulative_lengths().dtype == torch.int32


def test_what_lies_behind_the_last_sample():
    packing = Packing.of_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]), 3)
    assert packing.take(torch.full((2, 3), 7), fill=0).tolist() == [[7, 7, 7], [7, 7, 0]]
    assert packing.number.tolist() == [[1, 1, 1], [1, 1, 0]] and packing.source[1, 2] == -1


def test_errors():
    with pytest.raises(ValueError, match="index: expected positions of tokens, got padding at row 1, column 2"):
        Packing.of_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]), 3).at(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="capacity: expected at least 1 token, got 0"):
        fill_bins([1], 0)
    with pytest.raises(ValueError, match="lengths: expected at least one sample"):
        fill_bins([], 1)
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"inputs\['position_ids'\]: expected none with pack_tokens"):
        pack_batch(as_batch({"input_ids": ids, "position_ids": ids}, "inputs"), 8)
    with pytest.raises(ValueError, match=r"inputs\['attention_mask'\]: expected \(2, 3\) with pack_tokens, got \(2, 1, 3, 3\)"):
        mask = torch.ones(2, 1, 3, 3)
        pack_batch(as_batch({"input_ids": ids, "attention_mask": mask}, "inputs"), 8)
    model, _ = tiny_lms.llama()
    with pytest.raises(ValueError, match="pack_tokens: expected a positive int or None, got 0"):
        DualPathTeacher(model, negative=None, pack_tokens=0)
    model.hidden_states_at = lambda index, **inputs: None
    with pytest.raises(ValueError, match="pack_tokens: expected None with a model that has hidden_states_at"):
        DualPathTeacher(model, negative=MarkAbsent(), pack_tokens=64)


def padded_inputs(name):
    """Rows of unequal length, and the positions behind the audio."""
    model, inputs = {**tiny_lms.AUDIO_MODELS, **tiny_lms.TEXT_MODELS}[name]()
    for row, length in enumerate(LENGTHS):
        inputs["attention_mask"][row, length:] = 0
        inputs["input_ids"][row, length:] = 0
    index = [row * tiny_lms.LENGTH + column for row, length in enumerate(LENGTHS) for column in range(11, length)]
    return model, inputs, torch.tensor(index)


@pytest.mark.parametrize("pack_tokens", [36, 400])  # two or three rows of both paths' six; one row
@pytest.mark.parametrize("name", tiny_lms.AUDIO_MODELS)
def test_audio_models_packed_equal_padded(name, pack_tokens):
    model, inputs, index = padded_inputs(name)
    negative = MaskFeatures(tiny_lms.feature_name(inputs))
    expected = DualPathTeacher(model, negative=negative, layers=[1])(inputs, index)
    teacher = DualPathTeacher(model, negative=negative, layers=[1], pack_tokens=pack_tokens)
    teacher._packing_checked = True  # its own comparison must not be what this test rests on
    shapes = []
    model.register_forward_pre_hook(lambda _m, _a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    states = teacher(inputs, index)
    assert len(shapes) == 1 and shapes[0][0] < 6 and shapes[0][0] * shapes[0][1] < 6 * tiny_lms.LENGTH
    assert (expected.audio_hidden - expected.text_hidden).abs().max() > 0.01
    for key in ("audio_hidden", "text_hidden", "audio_layers", "text_layers"):
        torch.testing.assert_close(getattr(states, key), getattr(expected, key), **CLOSE)


def test_text_inputs_of_another_length_without_audio():
    model, inputs, index = padded_inputs("voxtral")
    shift = 9
    text_inputs = {key: inputs[key][:, shift:] for key in ("input_ids", "attention_mask")}
    row = index // tiny_lms.LENGTH
    text_index = index - row * shift - shift
    paths = {"text_inputs": text_inputs, "text_index": text_index}
    expected = DualPathTeacher(model, negative=None)(inputs, index, **paths)
    states = DualPathTeacher(model, negative=None, pack_tokens=50)(inputs, index, **paths)
    torch.testing.assert_close(states.audio_hidden, expected.audio_hidden, **CLOSE)
    torch.testing.assert_close(states.text_hidden, expected.text_hidden, **CLOSE)


def test_passes_of_some_rows():
    model, inputs, index = padded_inputs("voxtral")
    negative = MaskFeatures("input_features")
    expected = DualPathTeacher(model, negative=negative)(inputs, index)
    states = DualPathTeacher(model, negative=negative, rows_per_pass=4, pack_tokens=50)(inputs, index)
    torch.testing.assert_close(states.audio_hidden, expected.audio_hidden, **CLOSE)
    torch.testing.assert_close(states.text_hidden, expected.text_hidden, **CLOSE)


def test_samples_cannot_see_each_other():
    model, inputs, index = padded_inputs("qwen2_audio")
    teacher = DualPathTeacher(model, negative=MaskFeatures("input_features"), pack_tokens=400)
    before = teacher(inputs, index)
    inputs["input_ids"][1, 12] = 3
    inputs["input_features"][1] += 1
    after = teacher(inputs, index)
    changed = index // tiny_lms.LENGTH == 1
    assert torch.equal(before.audio_hidden[~changed], after.audio_hidden[~changed])
    assert torch.equal(before.text_hidden[~changed], after.text_hidden[~changed])
    assert (before.audio_hidden[changed] - after.audio_hidden[changed]).abs().max() > 0.01


def test_a_model_that_does_not_keep_samples_apart_is_refused():
    model, inputs, index = padded_inputs("llama")
    forward = model.model.forward

    def sees_all(*args, **keywords):
        keywords["position_ids"] = None
        return forward(*args, **keywords)

    model.model.forward = sees_all
    text = {"text_inputs": inputs, "text_index": index}
    with pytest.raises(ValueError, match="pack_tokens: expected LlamaForCausalLM to keep packed samples apart, got states"):
        DualPathTeacher(model, negative=None, pack_tokens=400)(inputs, index, **text)
