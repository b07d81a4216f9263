"""HeadLoss: a loss in the place of the LM head has the values and gradients of one from the model's own logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the student is tested on transformers' own model classes")
import tiny_lms

from kdkernels import DualPathTeacher, MaskFeatures, answer_index, fused_caad_loss, fused_linear_caad_loss
from kdkernels.head_loss import HeadLoss
from kdkernels.lm_head import logit_post


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def answers(inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :14] = -100
    labels[1, 15:] = -100
    return answer_index(labels)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def cross_entropy(target):
    """Of linear logits without soft cap and scale."""
    return lambda hidden, weight, bias: nn.functional.cross_entropy(
        nn.functional.linear(hidden, weight, bias), target
    )


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys() and len(found) > 3
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, gradient in expected.items():
        # Relative to the largest of all: some (a key's bias) are 0 but for rounding.
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("name", [*tiny_lms.AUDIO_MODELS, *tiny_lms.TEXT_MODELS])
def test_every_model_as_teacher_and_as_student(name):
    """The loss and each gradient equal those of fused_caad_loss on the logits of three full forwards."""
    make = {**tiny_lms.AUDIO_MODELS, **tiny_lms.TEXT_MODELS}[name]
    student, inputs = make()
    teacher_model, _ = make()
    index, target = answers(inputs)
    feature = tiny_lms.feature_name(inputs)
    if feature in inputs:
        negative = MaskFeatures(feature)
    else:
        negative = lambda given: {**given, "input_ids": given["input_ids"].clamp(max=40)}  # noqa: E731

    def logits(model, given):
        return model(**given).logits.flatten(0, 1)[index]

    with torch.no_grad():
        paths = [logits(teacher_model, given) for given in (inputs, negative(inputs))]
    expected = fused_caad_loss(logits(student, inputs), *paths, target)
    expected.backward()
    expected_gradients = gradients(student)

    teacher = DualPathTeacher(teacher_model, negative=negative)
    states = teacher(inputs, index)
    softcap, scale = logit_post(student)

    def loss(hidden, weight, bias):
        return fused_linear_caad_loss(
            hidden,
            weight,
            states.audio_hidden,
            states.text_hidden,
            target=target,
            student_bias=bias,
            student_softcap=softcap,
            student_logit_scale=scale,
            **teacher.head.keywords("teacher"),
        )

    at_head = HeadLoss(student, softcap=softcap, logit_scale=scale)
    for _ in range(2):  # the first call also checks
        found = at_head(student, inputs, index, loss)
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        assert_same_gradients(gradients(student), expected_gradients)


def test_nothing_stays_on_the_model():
    model, inputs = tiny_lms.llama()
    index, target = answers(inputs)
    before = model(**inputs).logits
    at_head = HeadLoss(model)
    at_head(model, inputs, index, cross_entropy(target))

    def fails(*_):
        raise KeyError("loss")

    with pytest.raises(KeyError):
        at_head(model, inputs, index, fails)
    assert torch.equal(model(**inputs).logits, before)
    assert not model._forward_hooks and not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def test_no_logits_are_built():
    model, inputs = tiny_lms.qwen2_audio()
    index, target = answers(inputs)
    at_head = HeadLoss(model)
    seen = []
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: seen.append(hidden.numel()) or forward(hidden)
    at_head(model, inputs, index, cross_entropy(target))
    assert seen == [32, 0]  # asked once, with one row
    seen.clear()
    for _ in range(2):
        at_head(model, inputs, index, cross_entropy(target))
    assert seen == [0, 0]


def test_several_results():
    model, inputs = tiny_lms.llama()
    index, target = answers(inputs)
    found = HeadLoss(model)(model, inputs, index, lambda hidden, weight, _: (hidden.sum(), weight.sum()))
    assert found[1].item() == model.lm_head.weight.sum().item() and len(target) == len(index)


class TestAdapters:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft", reason="LoRA on the LM head is PEFT's")

    @pytest.fixture
    def case(self, peft):
        def make(dtype=torch.float32, **options):
            torch.manual_seed(0)
            model, inputs = tiny_lms.llama()
            model = model.to(dtype)
            options = {"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
            model = peft.get_peft_model(model, peft.LoraConfig(**options))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_()
            return model, inputs, *answers(inputs)

        return make

    def compare(self, model, inputs, index, target):
        nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1)[index], target).backward()
        expected = gradients(model)
        HeadLoss(model)(model, inputs, index, cross_entropy(target)).backward()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        return found

    def test_lora_on_the_head_is_trained(self, case):
        found = self.compare(*case(target_modules=["lm_head"]))
        assert len(found) == 2 and all(float(x.norm()) > 0.1 for x in found.values())

    def test_lora_with_a_bias_and_two_adapters(self, case, peft):
        model, *rest = case(target_modules=["lm_head"], lora_bias=True)
        assert len(self.compare(model, *rest)) == 3
        model, *rest = case(target_modules=["lm_head"])
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        assert len(self.compare(model, *rest)) == 4

    def test_dropout_of_the_lora_is_drawn(self, case):
        model, inputs, index, target = case(target_modules=["lm_head"], lora_dropout=0.5)
        model.train()
        at_head = HeadLoss(model)
        losses = {at_head(model, inputs, index, cross_entropy(target)).item() for _ in range(4)}
        assert len(losses) == 4
        model.eval()
        assert at_head(model, inputs, index, cross_entropy(target)).item() not in losses
        self.compare(model, inputs, index, target)

    def test_small_updates_survive_a_bf16_head(self, case):
        """Merged into bf16 weights an update of 2^-12 would vanish."""
        model, inputs, index, _ = case(torch.bfloat16, target_modules=["lm_head"])
        head = model.get_output_embeddings()
        with torch.no_grad():
            head.lora_A["default"].weight.fill_(2.0**-6)
            head.lora_B["default"].weight.fill_(0.0)
            head.lora_B["default"].weight[5] = 2.0**-6

        def column(hidden, weight, bias):
            hidden, weight = hidden.double(), weight.double()
            return (hidden @ weight.T)[:, 5] - hidden[:, :32] @ weight[5, :32]

        added = HeadLoss(model)(model, inputs, index, column)
        assert (added.abs() > 0).all()

    def test_disabled_and_fully_trained(self, case):
        model, *rest = case(target_modules=["q_proj"], modules_to_save=["lm_head"])
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["default"].weight.normal_()
        assert any("modules_to_save" in name for name in self.compare(model, *rest))
        model, *rest = case(target_modules=["lm_head", "q_proj"])
        with torch.no_grad(), model.disable_adapter():
            inputs, index, target = rest
            expected = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1)[index], target)
            found = HeadLoss(model)(model, inputs, index, cross_entropy(target))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_single_trained_tokens(self, case):
        found = self.compare(*case(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]}))
        assert any("trainable_tokens_delta" in name for name in found)

    def test_dora_is_refused(self, case):
        model, inputs, index, target = case(target_modules=["lm_head"], use_dora=True)
        with pytest.raises(TypeError, match=r"LM head: a peft\.tuners\.lora\.layer\.Linear adapter sits on it"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))


class TestErrors:
    def test_what_the_model_does_to_its_logits(self):
        model, inputs = tiny_lms.granite()
        index, target = answers(inputs)
        with pytest.raises(ValueError, match=r"expected what the model does to its logits, None and 0.125, got None and 1"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))

    def test_sharded_head(self, tmp_path):
        import torch.distributed as dist
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        model, inputs = tiny_lms.llama()
        index, target = answers(inputs)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            sharded = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
            model.lm_head.weight = nn.Parameter(sharded)
            with pytest.raises(TypeError, match=r"its weight is a DTensor sharded as \(Shard\(dim=0\),\)"):
                HeadLoss(model)(model, inputs, index, cross_entropy(target))
        finally:
            dist.destroy_process_group()

    def test_other_models_and_heads(self):
        model, inputs = tiny_lms.llama()
        index, target = answers(inputs)
        with pytest.raises(ValueError, match="model: expected the LlamaForCausalLM given to HeadLoss"):
            HeadLoss(model)(tiny_lms.llama()[0], inputs, index, cross_entropy(target))

        class Twice(nn.Module):
            def __init__(self, calls):
                super().__init__()
                self.lm_head = nn.Linear(4, 7)
                self.calls = calls

            def get_output_embeddings(self):
                return self.lm_head

            def forward(self, input_ids):
                hidden = torch.ones(*input_ids.shape, 4)
                return SimpleNamespace(logits=[self.lm_head(hidden) for _ in range(self.calls)])

        for calls in (0, 2):
            twice = Twice(calls)
            with pytest.raises(ValueError, match=f"call its LM head .Linear. once, got {calls} calls"):
                HeadLoss(twice)(twice, {"input_ids": torch.ones(1, 3).long()}, torch.tensor([1]), lambda h, w, b: h.sum())
        with pytest.raises(ValueError, match=r"expected an output with \.logits of what its LM head returned"):
            once = Twice(1)
            HeadLoss(once)(once, {"input_ids": torch.ones(1, 3).long()}, torch.tensor([1]), lambda h, w, b: h.sum())
