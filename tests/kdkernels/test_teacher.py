"""DualPathTeacher: both paths of one batched pass equal two separate full forwards of real transformers classes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the teacher is tested on transformers' own model classes")
import tiny_lms

from kdkernels import head_capture, head_layers
from kdkernels.teacher import (
    DropKey,
    DualPathTeacher,
    LMHead,
    MarkAbsent,
    MaskFeatures,
    answer_index,
)

# fp32 forwards of 3 and of 6 rows differ by the order of summation only; the logits here are of the order of 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def answer_positions(inputs, first=14):
    """Y is everything from column `first` on, one token less in each later row."""
    labels = inputs["input_ids"].clone()
    labels[:, :first] = -100
    for row in range(len(labels)):
        labels[row, labels.shape[1] - row :] = -100
    return answer_index(labels)


@torch.no_grad()
def logits_at(model, inputs, index):
    return model(**inputs).logits.flatten(0, 1)[index]


class TestAnswerIndex:
    def test_points_at_the_position_before_each_label(self):
        labels = torch.tensor([[-100, 5, 6, -100], [9, -100, -100, 7]])
        index, target = answer_index(labels)
        assert index.tolist() == [0, 1, 6]  # the 9 in column 0 is predicted by nothing
        assert target.tolist() == [5, 6, 7]

    def test_other_ignore_index(self):
        index, target = answer_index(torch.tensor([[0, -100, 0, 3]]), ignore_index=0)
        assert index.tolist() == [0, 2] and target.tolist() == [-100, 3]

    def test_nothing_to_predict(self):
        index, target = answer_index(torch.full((2, 3), -100))
        assert index.shape == target.shape == (0,) and index.dtype == torch.int64

    def test_errors(self):
        with pytest.raises(TypeError, match=r"labels: expected dtype torch.int64, got torch.int32"):
            answer_index(torch.zeros(1, 2, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"labels: expected shape \(B, L\), got \(3,\)"):
            answer_index(torch.zeros(3, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_pass", [None, 2])
@pytest.mark.parametrize("name", tiny_lms.AUDIO_MODELS)
def test_masked_features_equal_two_full_forwards(name, rows_per_pass):
    model, inputs = tiny_lms.AUDIO_MODELS[name]()
    index, _ = answer_positions(inputs)
    feature = tiny_lms.feature_name(inputs)
    teacher = DualPathTeacher(model, negative=MaskFeatures(feature), rows_per_pass=rows_per_pass)
    states = teacher(inputs, index)
    silent = {**inputs, feature: torch.zeros_like(inputs[feature])}
    audio, text = logits_at(model, inputs, index), logits_at(model, silent, index)
    assert (audio - text).abs().max() > 0.1  # the test can fail: the paths do differ
    assert states.audio_hidden.shape == (len(index), teacher.head.weight.shape[1])
    torch.testing.assert_close(teacher.head.logits(states.audio_hidden), audio, **CLOSE)
    torch.testing.assert_close(teacher.head.logits(states.text_hidden), text, **CLOSE)


@pytest.mark.parametrize("text_length", [11, 27])
@pytest.mark.parametrize("name", tiny_lms.AUDIO_MODELS)
def test_text_inputs_of_another_length_without_audio(name, text_length):
    model, inputs = tiny_lms.AUDIO_MODELS[name]()
    index, target = answer_positions(inputs)
    ids = tiny_lms.token_ids(length=text_length)
    shift = tiny_lms.LENGTH - text_length  # Y keeps its distance to the end of the row
    text_index = index - (index // tiny_lms.LENGTH) * shift - shift
    text_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    teacher = DualPathTeacher(model, negative=None)
    calls = count_forwards(model)
    states = teacher(inputs, index, text_inputs=text_inputs, text_index=text_index)
    assert calls == [2 * tiny_lms.ROWS]  # one pass
    torch.testing.assert_close(teacher.head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)
    torch.testing.assert_close(
        teacher.head.logits(states.text_hidden), logits_at(model, text_inputs, text_index), **CLOSE
    )
    assert len(target) == len(index)


def count_forwards(model):
    calls = []
    model.register_forward_pre_hook(lambda _m, _args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    return calls


@pytest.mark.parametrize("name", tiny_lms.TEXT_MODELS)
def test_text_only_models_and_their_logit_arithmetic(name):
    model, inputs = tiny_lms.TEXT_MODELS[name]()
    index, _ = answer_positions(inputs)
    ids = torch.cat([inputs["input_ids"][:, :3], inputs["input_ids"][:, 8:]], dim=1)  # a prompt without its middle
    text_inputs = {"input_ids": ids}
    text_index = index - (index // 20) * 5 - 5
    teacher = DualPathTeacher(model, negative=None)
    states = teacher({"input_ids": inputs["input_ids"]}, index, text_inputs=text_inputs, text_index=text_index)
    torch.testing.assert_close(teacher.head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)
    torch.testing.assert_close(
        teacher.head.logits(states.text_hidden), logits_at(model, text_inputs, text_index), **CLOSE
    )


def test_left_padded_rows_of_unequal_length():
    model, inputs = tiny_lms.voxtral()
    inputs["attention_mask"][1, :2] = 0
    index, _ = answer_positions(inputs)
    states = DualPathTeacher(model, negative=MaskFeatures("input_features"))(inputs, index)
    head = LMHead.from_model(model)
    torch.testing.assert_close(head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)


def test_multimodal_position_ids_are_split_along_their_own_batch_dimension():
    model, inputs = tiny_lms.omni_thinker()
    index, _ = answer_positions(inputs)
    inputs["position_ids"] = torch.arange(20).expand(3, tiny_lms.ROWS, 20) * 2
    head = LMHead.from_model(model)
    for rows_per_pass in (None, 2):
        teacher = DualPathTeacher(model, negative=MaskFeatures("input_features"), rows_per_pass=rows_per_pass)
        states = teacher(inputs, index)
        torch.testing.assert_close(head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)


def test_dropped_features_run_in_a_pass_of_their_own():
    model, inputs = tiny_lms.voxtral()  # embeds placeholders without features as tokens
    index, _ = answer_positions(inputs)
    teacher = DualPathTeacher(model, negative=DropKey("input_features"))
    calls = count_forwards(model)
    states = teacher(inputs, index)
    assert calls == [tiny_lms.ROWS, tiny_lms.ROWS]
    dropped = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(teacher.head.logits(states.text_hidden), logits_at(model, dropped, index), **CLOSE)


@pytest.mark.parametrize("boundaries", [False, True], ids=["positions", "flash_attention_arguments"])
def test_a_row_that_the_caller_has_packed_is_a_pass_of_its_own(boundaries):
    """Flash-attention keeps samples apart in a row that is alone; a second one would stop that, or double the boundaries."""
    model, padded = tiny_lms.llama()
    seen = []
    model.register_forward_pre_hook(lambda _model, _args, given: seen.append(given), with_kwargs=True)
    rows, length = padded["input_ids"].shape
    packed = {"input_ids": padded["input_ids"].reshape(1, -1), "position_ids": torch.arange(length).repeat(rows)[None]}
    if boundaries:
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
    teacher = DualPathTeacher(model, negative=lambda given: {**given, "input_ids": given["input_ids"].clamp(max=40)})
    index = torch.tensor([5, length + 7, 2 * length + 9])
    states = teacher(packed, index)
    assert [tuple(given["input_ids"].shape) for given in seen] == [(1, rows * length)] * 2
    for name in packed.keys() - {"input_ids"}:
        assert all(torch.equal(torch.as_tensor(given[name]), torch.as_tensor(packed[name])) for given in seen), name
    expected = teacher(padded, index)
    torch.testing.assert_close(states.audio_hidden, expected.audio_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.text_hidden, expected.text_hidden, rtol=1e-4, atol=1e-5)


def test_unused_positions_of_other_passes_do_not_leak():
    """Rows of a pass without any answer, index entries in no order."""
    model, inputs = tiny_lms.voxtral()
    index = torch.tensor([45, 3, 59, 44, 0])  # rows 2, 0, 2, 2, 0; none in row 1
    whole = DualPathTeacher(model, negative=MaskFeatures("input_features"))(inputs, index)
    splitting = DualPathTeacher(model, negative=MaskFeatures("input_features"), rows_per_pass=1)
    calls = count_forwards(model)
    split = splitting(inputs, index)
    torch.testing.assert_close(split.audio_hidden, whole.audio_hidden, **CLOSE)
    torch.testing.assert_close(split.text_hidden, whole.text_hidden, **CLOSE)
    assert calls == [1] * 4  # nothing is run for the rows without a position
    nothing = splitting(inputs, index[:0])
    assert nothing.audio_hidden.shape == nothing.text_hidden.shape == (0, 32)


@pytest.mark.parametrize("name", ["voxtral", "gemma2", "granite", "cohere"])
def test_the_loss_from_hidden_states_is_the_loss_from_the_models_logits(name):
    from kdkernels import fused_caad_loss, fused_linear_caad_loss

    model, inputs = {**tiny_lms.AUDIO_MODELS, **tiny_lms.TEXT_MODELS}[name]()
    index, target = answer_positions(inputs)
    feature = "input_features" if "input_features" in inputs else "attention_mask"
    text = {**inputs, feature: inputs[feature].clone()}
    text[feature][:, :6] = 0
    teacher = DualPathTeacher(model, negative=lambda given: {**given, feature: text[feature]})
    states = teacher(inputs, index)
    hidden, weight = torch.randn(len(index), 16), torch.randn(tiny_lms.VOCAB, 16)
    from_hidden = fused_linear_caad_loss(
        hidden,
        weight,
        states.audio_hidden,
        states.text_hidden,
        target=target,
        impl="reference",
        **teacher.head.keywords("teacher"),
    )
    logits = (logits_at(model, path, index) for path in (inputs, text))
    from_logits = fused_caad_loss(hidden @ weight.T, *logits, target=target, impl="reference")
    torch.testing.assert_close(from_hidden, from_logits, **CLOSE)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    model, inputs = tiny_lms.llama()
    model = model.cuda()
    index, _ = answer_positions(inputs)
    index, inputs = index.cuda(), {key: value.cuda() for key, value in inputs.items()}
    expected = logits_at(model, inputs, index)
    teacher = DualPathTeacher(model, negative=dict)
    teacher(inputs, index)  # the head's arithmetic is read back this once
    captured = teacher._captured
    hidden = torch.randn(2 * tiny_lms.ROWS, tiny_lms.LENGTH, 32, device="cuda")
    teacher._captured = lambda batch: hidden  # transformers' own masks may wait; ours to show is the rest
    torch.cuda.set_sync_debug_mode("error")
    try:
        states = teacher(inputs, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(states.audio_hidden, hidden.flatten(0, 1)[index])
    teacher._captured = captured
    states = teacher(inputs, index)
    torch.testing.assert_close(teacher.head.logits(states.text_hidden), expected, rtol=1e-3, atol=1e-3)


class TestNoLogits:
    @pytest.mark.slow
    @pytest.mark.parametrize("pack_tokens", [None, 50])
    @pytest.mark.parametrize("name", tiny_lms.AUDIO_MODELS)
    def test_the_head_never_multiplies(self, name, pack_tokens):
        model, inputs = tiny_lms.AUDIO_MODELS[name]()
        index, _ = answer_positions(inputs)
        negative = MaskFeatures(tiny_lms.feature_name(inputs))
        sizes = []
        head = head_layers.head_module(model)
        forward = head.forward
        head.forward = lambda hidden: sizes.append(hidden.numel()) or forward(hidden)
        teacher = DualPathTeacher(model, negative=negative, pack_tokens=pack_tokens)
        assert max(sizes) == 4 * head.weight.shape[1]  # asked once, with four rows
        sizes.clear()
        teacher(inputs, index)
        teacher(inputs, index)
        assert sizes == [0] * (2 if pack_tokens is None else 3)  # packed, the first call compares with padded rows

    def test_labels_and_logits_to_keep_are_ignored(self):
        model, inputs = tiny_lms.voxtral()
        index, _ = answer_positions(inputs)
        teacher = DualPathTeacher(model, negative=MaskFeatures("input_features"))
        plain = teacher(inputs, index)
        noisy = teacher({**inputs, "labels": inputs["input_ids"], "logits_to_keep": 1, "use_cache": True}, index)
        assert torch.equal(plain.audio_hidden, noisy.audio_hidden)

    def test_no_cache_is_built(self):
        model, inputs = tiny_lms.voxtral()
        seen = []
        model.register_forward_hook(lambda _m, _a, output: seen.append(output.past_key_values))
        DualPathTeacher(model, negative=MaskFeatures("input_features"))(inputs, torch.tensor([3]))
        assert seen == [None]

    def test_result_does_not_alias_the_full_hidden_states(self):
        model, inputs = tiny_lms.voxtral()
        states = DualPathTeacher(model, negative=MaskFeatures("input_features"))(inputs, torch.tensor([3, 4]))
        assert states.audio_hidden.untyped_storage().nbytes() <= 4 * 4 * 32  # both paths' two rows, not 6 * 20


class TestCapture:
    @pytest.mark.slow
    def test_hooks_are_gone_afterwards_and_after_an_error(self):
        model, inputs = tiny_lms.voxtral()
        before = model(**inputs).logits
        teacher = DualPathTeacher(model, negative=MaskFeatures("input_features"))
        teacher(inputs, torch.tensor([3]))
        bad = {**inputs, "input_features": inputs["input_features"][:2]}  # fewer features than placeholders
        with pytest.raises(ValueError, match="Audio features and audio tokens do not match"):
            teacher(bad, torch.tensor([3]))
        assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
        assert torch.equal(model(**inputs).logits, before)

    def test_another_thread_keeps_its_logits(self):
        model, inputs = tiny_lms.llama()
        expected = model(**inputs).logits
        results = {}

        def other():
            with torch.no_grad():
                results["logits"] = model(**inputs).logits

        capture = head_capture.HeadCapture(model.lm_head)
        with capture:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert torch.equal(results["logits"], expected) and capture.inputs == []

    def test_training_mode_is_restored_and_not_used(self):
        model, inputs = tiny_lms.llama()
        model.config.attention_dropout = 0.5
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        teacher = DualPathTeacher(model, negative=dict)
        expected = teacher(inputs, torch.tensor([5, 30])).audio_hidden
        model.train()  # a student that shares modules
        again = teacher(inputs, torch.tensor([5, 30])).audio_hidden
        assert torch.equal(again, expected) and model.training and model.model.layers[0].training
        teacher.train()
        assert not model.training

    def test_no_gradient_and_freeze(self):
        model, inputs = tiny_lms.llama()
        teacher = DualPathTeacher(model, negative=dict)
        assert not teacher(inputs, torch.tensor([5])).audio_hidden.requires_grad
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert teacher.freeze() is teacher
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_a_model_that_bypasses_its_head_is_refused(self):
        class Bypass(nn.Module):
            def __init__(self):
                super().__init__()
                self.lm_head = nn.Linear(4, 7)

            def forward(self, input_ids):
                return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4) @ self.lm_head.weight.T)

        teacher = DualPathTeacher(Bypass(), negative=dict)
        with pytest.raises(ValueError, match=r"call its LM head .* once, got 0 calls"):
            teacher({"input_ids": torch.zeros(1, 3, dtype=torch.int64)}, torch.tensor([1]))


class Protocol(nn.Module):
    """The smallest model with hidden_states_at: hidden state = token id, plus 100 where the audio is heard."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(1, 5)
        self.calls = []

    def get_output_embeddings(self):
        return self.lm_head

    def hidden_states_at(self, index, *, input_ids, audio_features, audio_present, prefix_cache=None):
        self.calls.append((tuple(input_ids.shape), audio_present.tolist(), prefix_cache))
        assert len(audio_features) == len(audio_present) == len(input_ids)
        hidden = input_ids + 100 * audio_present[:, None]
        return hidden.float().reshape(-1, 1)[index]


class TestProtocol:
    def test_hidden_states_at_gets_both_paths_as_rows(self):
        model = Protocol()
        cache = object()
        inputs = {"input_ids": torch.arange(6).view(2, 3), "audio_features": torch.ones(2, 1), "prefix_cache": cache}
        states = DualPathTeacher(model, negative=MarkAbsent())(inputs, torch.tensor([1, 5]))
        assert states.audio_hidden.flatten().tolist() == [101, 105]
        assert states.text_hidden.flatten().tolist() == [1, 5]
        assert model.calls == [((4, 3), [True, True, False, False], cache)]

    def test_rows_that_have_no_audio_stay_without(self):
        model = Protocol()
        inputs = {
            "input_ids": torch.arange(6).view(2, 3),
            "audio_features": torch.ones(2, 1),
            "audio_present": torch.tensor([True, False]),
        }
        states = DualPathTeacher(model, negative=MarkAbsent(), rows_per_pass=3)(inputs, torch.tensor([1, 5]))
        assert states.audio_hidden.flatten().tolist() == [101, 5]
        assert [call[:2] for call in model.calls] == [((3, 3), [True, False, False]), ((1, 3), [False])]

    def test_wrong_shape_is_named(self):
        model = Protocol()
        model.hidden_states_at = lambda index, **_: torch.zeros(1, 1)
        with pytest.raises(ValueError, match=r"hidden_states_at: expected shape \(4, H\), got \(1, 1\)"):
            DualPathTeacher(model, negative=dict)({"input_ids": torch.zeros(1, 2).long()}, torch.tensor([0, 1]))


class TestHead:
    @pytest.mark.parametrize(
        ("factory", "softcap", "scale"),
        [
            (tiny_lms.llama, None, 1.0),
            (tiny_lms.gemma2, 6.0, 1.0),
            (lambda: tiny_lms.gemma2(None), None, 1.0),
            (tiny_lms.cohere, None, 0.0625),
            (tiny_lms.granite, None, 0.125),
            (tiny_lms.recurrent_gemma, 6.0, 1.0),
            (tiny_lms.xlstm, 6.0, 1.0),
            (tiny_lms.granite_speech, None, 1.0),  # the config says 8, the forward does nothing
        ],
    )
    def test_reads_what_the_model_really_does(self, factory, softcap, scale):
        head = LMHead.from_model(factory()[0])
        assert (head.softcap, head.logit_scale) == (softcap, scale)
        assert head.bias is None and head.weight.shape == (tiny_lms.VOCAB, 32) and not head.weight.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_models_give_the_exact_numbers(self, dtype):
        gemma, inputs = tiny_lms.gemma2()
        assert LMHead.from_model(gemma.to(dtype)).softcap == 6.0
        assert LMHead.from_model(tiny_lms.granite()[0].to(dtype)).logit_scale == 0.125
        DualPathTeacher(gemma, negative=dict)(inputs, torch.tensor([1]))  # its check on the first pass holds as well

    def test_keywords_of_the_loss(self):
        head = LMHead(torch.zeros(3, 2), torch.zeros(3), softcap=5.0, logit_scale=0.5)
        keywords = head.keywords("student")
        assert keywords["student_weight"] is head.weight and keywords["student_bias"] is head.bias
        assert (keywords["student_softcap"], keywords["student_logit_scale"]) == (5.0, 0.5)
        with pytest.raises(ValueError, match="side: expected 'teacher' or 'student', got 'both'"):
            head.keywords("both")

    def test_scale_and_cap_in_both_orders_are_recognised(self):
        x = torch.tensor(head_capture.PROBE)
        scaled_first = 30 * torch.tanh(0.25 * x / 30)
        capped_first = 0.25 * 30 * torch.tanh(x / 30)
        assert head_capture.fit_post(scaled_first) == pytest.approx((30, 0.25))
        assert head_capture.fit_post(capped_first) == pytest.approx((7.5, 0.25))
        assert head_capture.fit_post(2 * x) == (None, 2.0)

    @pytest.mark.parametrize("function", [torch.relu, lambda x: x.clamp(-50, 50), lambda x: x + 1, lambda x: -x])
    def test_other_arithmetic_is_refused(self, function):
        with pytest.raises(ValueError, match="neither a scale nor a tanh soft cap"):
            head_capture.fit_post(function(torch.tensor(head_capture.PROBE)))

    def test_head_with_a_forward_of_its_own_is_asked(self):
        class Normalised(nn.Linear):
            def forward(self, hidden):
                return nn.functional.linear(hidden, nn.functional.normalize(self.weight))

        class Renamed(nn.Linear):
            def forward(self, hidden):
                return hidden @ self.weight.T

        with pytest.raises(TypeError, match=r"got a \S*Normalised whose forward computes something else"):
            LMHead.from_model(wrapping(Normalised(6, 3, bias=False)))
        head = Renamed(6, 3, bias=False)
        assert LMHead.from_model(wrapping(head)).weight.data_ptr() == head.weight.data_ptr()

    def test_a_scale_of_any_name_is_asked_for(self):
        """Its config is one that this library has not seen."""

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.config = SimpleNamespace(final_output_scaling=3.0)
                self.embed, self.lm_head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)

            def get_output_embeddings(self):
                return self.lm_head

            def forward(self, input_ids, attention_mask=None):
                return SimpleNamespace(logits=self.config.final_output_scaling * self.lm_head(self.embed(input_ids)))

        assert LMHead.from_model(Scaled()).logit_scale == 3.0

    @pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1 + 1e-5), (torch.float16, 1.003), (torch.bfloat16, 1.006)])
    def test_head_that_differs_by_little_is_noticed(self, dtype, factor):
        class Scaled(nn.Linear):
            def forward(self, hidden):
                return super().forward(hidden) * factor

        class Wide(nn.Linear):
            def forward(self, hidden):
                return nn.functional.linear(hidden.float(), self.weight.float())

        with pytest.raises(TypeError, match=r"got a \S*Scaled whose forward computes something else"):
            LMHead.from_model(wrapping(Scaled(64, 301, bias=False).to(dtype)))
        LMHead.from_model(wrapping(Wide(64, 301, bias=False).to(dtype)))  # it rounds elsewhere, no more

    def test_follows_the_model_to_another_dtype_and_shares_its_memory(self):
        model, _ = tiny_lms.voxtral()
        teacher = DualPathTeacher(model, negative=MaskFeatures("input_features")).to(torch.bfloat16)
        assert teacher.head.weight.dtype == torch.bfloat16
        assert teacher.head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
        own = LMHead(torch.randn(tiny_lms.VOCAB, 32))
        teacher = DualPathTeacher(model.float(), negative=MaskFeatures("input_features"), head=own).to(torch.bfloat16)
        assert torch.equal(teacher.head.weight, own.weight.bfloat16())

    def test_wrong_head_is_noticed_on_the_first_pass(self):
        model, inputs = tiny_lms.gemma2()
        wrong = LMHead(model.lm_head.weight.detach())
        with pytest.raises(ValueError, match=r"head: expected .* softcap=6.* got softcap=None logit_scale=1"):
            DualPathTeacher(model, negative=dict, head=wrong)(inputs, torch.tensor([1]))

    def test_hook_that_wants_logits(self):
        """Its change would be dropped."""
        model, inputs = tiny_lms.llama()
        teacher = DualPathTeacher(model, negative=dict)
        expected = teacher(inputs, torch.tensor([1]))
        handle = model.lm_head.register_forward_hook(lambda _m, _args, logits: 2 * logits)
        for call in (
            lambda: teacher(inputs, torch.tensor([1])),
            lambda: teacher.head,
            lambda: LMHead.from_model(model),
            lambda: DualPathTeacher(model, negative=dict),
        ):
            with pytest.raises(TypeError, match=r"LM head: expected no forward hook on it, got \S*test_teacher\.Test"):
                call()
        handle.remove()
        assert torch.equal(teacher(inputs, torch.tensor([1])).audio_hidden, expected.audio_hidden)

    def test_pre_hook_gets_the_hidden_states(self):
        model, inputs = tiny_lms.llama()
        index, _ = answer_positions(inputs)
        seen = []
        model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape) or (0.5 * args[0],))
        teacher = DualPathTeacher(model, negative=dict)
        states = teacher(inputs, index)
        assert seen == [(6, 20, 32)]
        torch.testing.assert_close(teacher.head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)

    def test_pre_hook_inside_a_wrapper_is_refused(self):
        """The head's input is taken before: its change would be dropped."""
        peft = pytest.importorskip("peft")
        model, inputs = tiny_lms.llama()
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(model, config).eval()
        teacher = DualPathTeacher(model, negative=dict)
        copy = model.get_output_embeddings().modules_to_save["default"]
        copy.register_forward_pre_hook(lambda _m, args: (2 * args[0],))
        with pytest.raises(TypeError, match="LM head: expected no forward pre hook on it, got"):
            teacher(inputs, torch.tensor([1]))

    @pytest.mark.parametrize("replaced", ["before", "after"])
    def test_forward_replaced_on_the_module(self, replaced):
        model, inputs = tiny_lms.llama()
        teacher = DualPathTeacher(model, negative=dict) if replaced == "after" else None
        forward = model.lm_head.forward
        model.lm_head.forward = lambda hidden: forward(hidden).relu()
        with pytest.raises(TypeError, match="replaced on this module, computes something else; pass head=LMHead"):
            (teacher or DualPathTeacher(model, negative=dict))(inputs, torch.tensor([1]))

    def test_no_head(self):
        with pytest.raises(TypeError, match=r"whose get_output_embeddings.. returns its LM head, got Sequential"):
            LMHead.from_model(nn.Sequential(nn.Linear(2, 2)))

    def test_sharded_head(self):
        from torch.distributed.tensor import Replicate, Shard

        class FakeDTensor(torch.Tensor):
            placements = (Shard(0),)

        head = nn.Linear(2, 3)
        head.weight = nn.Parameter(torch.zeros(3, 2).as_subclass(FakeDTensor))
        with pytest.raises(TypeError, match=r"its weight is a DTensor sharded as \(Shard\(dim=0\),\)"):
            LMHead.from_model(wrapping(head))
        FakeDTensor.placements = (Replicate(),)
        FakeDTensor.to_local = lambda self: self.as_subclass(torch.Tensor)
        assert type(LMHead.from_model(wrapping(head)).weight) is torch.Tensor

    def test_real_dtensor(self, tmp_path):
        import torch.distributed as dist
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            head, values = nn.Linear(2, 3, bias=False), torch.randn(3, 2)
            head.weight = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
            with pytest.raises(TypeError, match="DTensor sharded"):
                LMHead.from_model(wrapping(head))
            whole = LMHead.from_model(wrapping(head), gather=True).weight
            assert type(whole) is torch.Tensor and torch.equal(whole, values)
        finally:
            dist.destroy_process_group()

    def test_empty_and_offloaded_head(self):
        head = nn.Linear(2, 3, bias=False)
        head.weight = nn.Parameter(torch.zeros(0))
        with pytest.raises(ValueError, match=r"its weight is empty, shape .0,.: FSDP or ZeRO-3"):
            LMHead.from_model(wrapping(head))
        with pytest.raises(ValueError, match="on the meta device"):
            LMHead.from_model(wrapping(nn.Linear(2, 3, device="meta")))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_quantised_head(self, dtype):
        head = nn.Linear(2, 3, bias=False)
        head.weight = nn.Parameter(torch.zeros(3, 2).to(dtype), requires_grad=False)
        with pytest.raises(TypeError, match=f"its weight is quantised or wrapped: Parameter of {dtype}"):
            LMHead.from_model(wrapping(head))


def wrapping(head):
    model = nn.Module()
    model.lm_head = head
    return model


def assign_other_weights(model):
    model.load_state_dict(tiny_lms.llama()[0].state_dict(), assign=True)


def new_parameter(model):
    model.lm_head.weight = nn.Parameter(torch.randn(tiny_lms.VOCAB, 32))


def new_module(model):
    model.set_output_embeddings(nn.Linear(32, tiny_lms.VOCAB, bias=True))


def inner_to_bfloat16(model):
    model.bfloat16()


def other_precision_and_values(model):
    model.double()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)


def adapter_elsewhere_and_trained_head(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(model, config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_()


class TestHeadOfTheMoment:
    """The head is read at each call: what the model has now, not what it had when it was given."""

    @pytest.mark.parametrize(
        "change",
        [
            assign_other_weights,
            new_parameter,
            new_module,
            inner_to_bfloat16,
            other_precision_and_values,
            adapter_elsewhere_and_trained_head,
        ],
    )
    @pytest.mark.parametrize("given", [False, True])
    def test_follows_the_model(self, change, given):
        model, inputs = tiny_lms.llama()
        index, _ = answer_positions(inputs)
        head = LMHead.from_model(model) if given else None  # shares the model's memory
        teacher = DualPathTeacher(model, negative=dict, head=head)
        teacher(inputs, index)
        change(model)
        states, head = teacher(inputs, index), teacher.head
        expected = logits_at(model, inputs, index)
        tolerance = CLOSE if expected.dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 0.2}
        assert head.weight.dtype == states.audio_hidden.dtype == expected.dtype
        torch.testing.assert_close(head.logits(states.audio_hidden), expected, **tolerance)
        torch.testing.assert_close(teacher.head.logits(states.text_hidden), expected, **tolerance)
        assert teacher.head.weight.data_ptr() == head.weight.data_ptr()  # the model's memory, no copy

    def test_lora_that_is_added(self):
        peft = pytest.importorskip("peft", reason="LoRA on the LM head is PEFT's")
        for merge_lora in (False, True):
            model, inputs = tiny_lms.llama()
            index, _ = answer_positions(inputs)
            teacher = DualPathTeacher(model, negative=dict, merge_lora=merge_lora)
            states = teacher(inputs, index)
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
            if not merge_lora:
                with pytest.raises(TypeError, match=r"LoRA adapter \['default'\] of PEFT sits on it"):
                    teacher(inputs, index)
                with pytest.raises(TypeError, match="merge_lora=True"):
                    teacher.head.logits(states.audio_hidden)
                continue
            for _ in range(2):
                states = teacher(inputs, index)
                expected = logits_at(model, inputs, index)
                torch.testing.assert_close(teacher.head.logits(states.audio_hidden), expected, **CLOSE)
                with torch.no_grad():
                    model.lm_head.lora_B["default"].weight.mul_(2)  # trained further

    def test_soft_cap_that_changes(self):
        model, inputs = tiny_lms.gemma2()
        index, _ = answer_positions(inputs)
        teacher = DualPathTeacher(model, negative=dict)
        model.config.final_logit_softcapping = 3.0
        states = teacher(inputs, index)
        assert teacher.head.softcap == 3.0
        torch.testing.assert_close(teacher.head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)

    def test_a_copy_stays_as_it_is(self):
        model, inputs = tiny_lms.llama()
        own = LMHead(model.lm_head.weight.detach().clone())
        teacher = DualPathTeacher(model, negative=dict, head=own)
        new_parameter(model)
        teacher(inputs, torch.tensor([1]))
        assert teacher.head is own

    def test_the_head_is_asked_once(self):
        model, inputs = tiny_lms.llama()
        forward, calls = model.lm_head.forward, []
        model.lm_head.forward = lambda hidden: calls.append(hidden.numel()) or forward(hidden)
        teacher = DualPathTeacher(model, negative=dict)
        for _ in range(3):
            teacher(inputs, torch.tensor([1]))
            assert teacher.head.bias is None
        assert [n for n in calls if n] == [4 * 32]


class TestModes:
    def test_adapter_that_a_generate_without_audio_turned_off(self):
        model, inputs = tiny_lms.granite_speech_with_adapter(target_modules=["q_proj", "v_proj"], modules_to_save=["o_proj"])
        index, _ = answer_positions(inputs)
        teacher = DualPathTeacher(model, negative=MaskFeatures("input_features"))
        expected = teacher(inputs, index)
        logits = logits_at(model, inputs, index)
        tiny_lms.text_only_generate(model, inputs)
        assert (logits_at(model, inputs, index) - logits).abs().max() > 0.1  # off, also in a forward with audio
        trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        states = teacher(inputs, index)
        torch.testing.assert_close(states.audio_hidden, expected.audio_hidden)
        torch.testing.assert_close(states.text_hidden, expected.text_hidden)
        # What the teacher changed is as it was.
        assert (logits_at(model, inputs, index) - logits).abs().max() > 0.1
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
        made_now = DualPathTeacher(model, negative=MaskFeatures("input_features"))
        torch.testing.assert_close(made_now(inputs, index).audio_hidden, expected.audio_hidden)

    def test_adapter_on_the_head(self):
        model, inputs = tiny_lms.granite_speech_with_adapter(target_modules=["lm_head"])
        index, _ = answer_positions(inputs)
        expected = logits_at(model, inputs, index)
        tiny_lms.text_only_generate(model, inputs)
        teacher = DualPathTeacher(model, negative=MaskFeatures("input_features"), merge_lora=True)
        states = teacher(inputs, index)
        torch.testing.assert_close(teacher.head.logits(states.audio_hidden), expected, **CLOSE)

    def test_adapter_that_its_user_turned_off(self):
        """Of a model without such a switch: that is the model."""
        model, inputs = tiny_lms.voxtral()
        index, _ = answer_positions(inputs)
        teacher = DualPathTeacher(model, negative=MaskFeatures("input_features"))
        expected = teacher(inputs, index)
        tiny_lms.add_adapter(model, target_modules=["q_proj"])
        assert not torch.equal(teacher(inputs, index).audio_hidden, expected.audio_hidden)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(False)
        torch.testing.assert_close(teacher(inputs, index).audio_hidden, expected.audio_hidden)

    @pytest.mark.slow
    @pytest.mark.parametrize("pack_tokens", [None, 60])
    @pytest.mark.parametrize("name", tiny_lms.AUDIO_MODELS)
    def test_training_mode_leaves_no_trace(self, name, pack_tokens):
        """Dropout, gradient checkpointing and output flags of a model that someone trains: packed and padded rows alike."""
        model, inputs = tiny_lms.AUDIO_MODELS[name]()
        index, _ = answer_positions(inputs)
        negative = MaskFeatures(tiny_lms.feature_name(inputs))
        expected = DualPathTeacher(model, negative=negative)(inputs, index)
        for module in model.modules():
            for attribute, value in list(vars(module).items()):
                if "drop" in attribute and isinstance(value, float):
                    setattr(module, attribute, 0.5)
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable()
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
        for config in configs:
            config.output_hidden_states = config.use_cache = True
        model.train()
        teacher = DualPathTeacher(model, negative=negative, pack_tokens=pack_tokens)
        model.train()
        seen = []
        model.register_forward_hook(lambda _m, _args, output: seen.append(output))
        random = torch.get_rng_state()
        states = teacher(inputs, index)
        torch.testing.assert_close(states.audio_hidden, expected.audio_hidden, **CLOSE)
        torch.testing.assert_close(states.text_hidden, expected.text_hidden, **CLOSE)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(getattr(output, flag, None) is None for output in seen for flag in ("hidden_states", "cache"))
        assert all(module.training for module in model.modules())
        assert all(config.output_hidden_states and config.use_cache for config in configs)


class TestPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft", reason="LoRA on the LM head is PEFT's")

    def lora(self, peft, **options):
        model, inputs = tiny_lms.llama()
        config = peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return model.eval(), inputs

    def test_lora_elsewhere_is_fine(self, peft):
        model, inputs = self.lora(peft, target_modules=["q_proj"])
        index, _ = answer_positions(inputs)
        teacher = DualPathTeacher(model, negative=dict)
        states = teacher(inputs, index)
        torch.testing.assert_close(teacher.head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)

    def test_lora_on_the_head_is_refused_or_merged(self, peft):
        model, inputs = self.lora(peft, target_modules=["lm_head"])
        index, _ = answer_positions(inputs)
        with pytest.raises(TypeError, match=r"LoRA adapter \['default'\] of PEFT sits on it.*merge_lora=True"):
            DualPathTeacher(model, negative=dict)
        teacher = DualPathTeacher(model, negative=dict, merge_lora=True)
        states = teacher(inputs, index)
        expected = logits_at(model, inputs, index)
        base = nn.functional.linear(states.audio_hidden, model.get_output_embeddings().base_layer.weight)
        assert (base - expected).abs().max() > 0.1  # what ignoring the adapter would give
        torch.testing.assert_close(teacher.head.logits(states.audio_hidden), expected, **CLOSE)

    def test_single_trained_tokens_are_honoured(self, peft):
        """PEFT's trainable_token_indices replace rows of the head's weight."""
        model, inputs = tiny_lms.llama()
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]})
        model = peft.get_peft_model(model, config).eval()
        before = LMHead.from_model(model).weight
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.normal_()
        index, _ = answer_positions(inputs)
        teacher = DualPathTeacher(model, negative=dict)
        assert (teacher.head.weight != before).any(1).nonzero().flatten().tolist() == [3, 5]
        states = teacher(inputs, index)
        torch.testing.assert_close(teacher.head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)

    def test_dora_on_the_head_is_refused_even_with_merge(self, peft):
        model, _ = self.lora(peft, target_modules=["lm_head"], use_dora=True)
        with pytest.raises(TypeError, match="adapter sits on it, expected a plain linear layer; merge it first"):
            LMHead.from_model(model, merge_lora=True)

    def test_fully_trained_copy_of_the_head(self, peft):
        model, inputs = self.lora(peft, target_modules=["q_proj"], modules_to_save=["lm_head"])
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["default"].weight.normal_()
        index, _ = answer_positions(inputs)
        teacher = DualPathTeacher(model, negative=dict)
        states = teacher(inputs, index)
        torch.testing.assert_close(teacher.head.logits(states.audio_hidden), logits_at(model, inputs, index), **CLOSE)


class TestErrors:
    @pytest.fixture
    def teacher(self):
        model, self.inputs = tiny_lms.voxtral()
        return DualPathTeacher(model, negative=MaskFeatures("input_features"))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"index": torch.tensor([1.0])}, TypeError, "index: expected a tensor of torch.int64, got torch.float32"),
            ({"index": torch.tensor([[1]])}, ValueError, r"index: expected shape \(N,\), got \(1, 1\)"),
            ({"index": torch.tensor([60])}, ValueError, r"index: expected positions in \[0, 60\).*got 60"),
            ({"index": torch.tensor([-1])}, ValueError, "got -1"),
            ({"inputs": [1]}, TypeError, "inputs: expected a mapping of the model's inputs, got list"),
            ({"inputs": {"x": 1}}, ValueError, r"inputs: expected a tensor 'input_ids' .* got \['x'\]"),
            ({"text_index": torch.tensor([1])}, ValueError, "text_index: expected None without text_inputs"),
            (
                {"text_inputs": {"input_ids": torch.zeros(3, 5).long()}},
                ValueError,
                "text_index: expected .N,. positions in text_inputs, got None",
            ),
            (
                {"text_inputs": {"input_ids": torch.zeros(3, 5).long()}, "text_index": torch.tensor([1, 2])},
                ValueError,
                "text_index: expected as many positions as index, 1, got 2",
            ),
            (
                {"text_inputs": {"input_ids": torch.zeros(3, 5).long()}, "text_index": torch.tensor([15])},
                ValueError,
                r"text_index: expected positions in \[0, 15\)",
            ),
            (
                {
                    "text_inputs": {"input_ids": torch.zeros(3, 5).long(), "input_features": torch.zeros(3, 9, 32)},
                    "text_index": torch.tensor([1]),
                },
                ValueError,
                r"text_inputs\['input_features'\]: expected the trailing shape of the positive path, \(3, 8, 32\)",
            ),
        ],
    )
    def test_arguments_are_named(self, teacher, change, error, message):
        arguments = {"inputs": self.inputs, "index": torch.tensor([1]), **change}
        with pytest.raises(error, match=message):
            teacher(arguments.pop("inputs"), arguments.pop("index"), **arguments)

    def test_cache_of_another_sequence(self, teacher):
        with pytest.raises(ValueError, match=r"inputs: expected the inputs of a whole sequence, got \['past_key_val"):
            teacher({**self.inputs, "past_key_values": object()}, torch.tensor([1]))

    def test_negative_that_moves_tokens(self):
        model, inputs = tiny_lms.llama()
        teacher = DualPathTeacher(model, negative=lambda given: {"input_ids": given["input_ids"][:, 1:]})
        with pytest.raises(ValueError, match=r"negative: expected it to keep the tokens' shape \(3, 20\), got \(3, 19"):
            teacher(inputs, torch.tensor([1]))

    def test_missing_feature(self):
        model, inputs = tiny_lms.llama()
        with pytest.raises(ValueError, match="negative: expected the inputs to have 'input_features', got"):
            DualPathTeacher(model, negative=MaskFeatures("input_features"))(inputs, torch.tensor([1]))

    def test_splitting_features_that_are_not_one_a_row(self):
        model, inputs = tiny_lms.voxtral()
        ids = tiny_lms.token_ids(length=9)
        teacher = DualPathTeacher(model, negative=None, rows_per_pass=2)
        with pytest.raises(ValueError, match=r"rows_per_pass: expected one entry a row in inputs\['input_features'\]"):
            teacher(inputs, torch.tensor([1]), text_inputs={"input_ids": ids}, text_index=torch.tensor([1]))

    def test_constructor(self):
        model, _ = tiny_lms.llama()
        with pytest.raises(ValueError, match="rows_per_pass: expected a positive int or None, got 0"):
            DualPathTeacher(model, negative=None, rows_per_pass=0)
        with pytest.raises(TypeError, match="negative: expected a callable inputs -> inputs or None, got str"):
            DualPathTeacher(model, negative="input_features")
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
            DualPathTeacher("model", negative=None)
        with pytest.raises(ValueError, match="text_index: expected None without text_inputs"):
            ids = torch.zeros(1, 2).long()
            DualPathTeacher(model, negative=None)({"input_ids": ids}, torch.tensor([1]), text_index=torch.tensor([1]))
        with pytest.raises(ValueError, match="keys: expected at least one name"):
            MaskFeatures()
