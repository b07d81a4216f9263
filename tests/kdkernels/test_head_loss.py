"""HeadLoss: a loss in the place of the LM head has the values and gradients of one from the model's own logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the student is tested on transformers' own model classes")
import tiny_lms

from kdkernels import DualPathTeacher, LMHead, MaskFeatures, answer_index, fused_caad_loss, fused_linear_caad_loss
from kdkernels.head_capture import logit_post
from kdkernels.head_loss import HeadLoss

# Of PEFT's adapters that go inside a linear layer, those that are no LoRA.
OTHER_ADAPTERS = ["AdaLora", "IA3", "Vera", "OFT", "BOFT", "LoKr", "LoHa", "FourierFT", "HRA", "VBLoRA", "RandLora", "Miss"]


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


@pytest.mark.slow
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
    assert seen == [4 * 32, 0]  # asked once, with four rows
    seen.clear()
    for _ in range(2):
        at_head(model, inputs, index, cross_entropy(target))
    assert seen == [0, 0]


def test_several_results():
    model, inputs = tiny_lms.llama()
    index, target = answers(inputs)
    found = HeadLoss(model)(model, inputs, index, lambda hidden, weight, _: (hidden.sum(), weight.sum()))
    assert found[1].item() == model.lm_head.weight.sum().item() and len(target) == len(index)


def own_loss(model, inputs, index, target):
    """From the model's own logits."""
    return nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1)[index], target)


class Normalised(nn.Linear):
    def forward(self, hidden):
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


class StartsAtZero(nn.Linear):
    """A LoRA of someone's own: its second factor is 0 until it has been trained."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.down = nn.Parameter(torch.randn(2, sizes[0]))
        self.up = nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, hidden):
        return super().forward(hidden) + hidden @ self.down.T @ self.up.T


class StartsAtOne(nn.Linear):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, hidden):
        return super().forward(hidden) * self.factor


class Direction(nn.Linear):
    """Weight norm with a fixed length, which is the weight's own at first."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("length", self.weight.detach().norm(dim=1, keepdim=True))

    def forward(self, hidden):
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight) * self.length)


class TestWhatTheHeadComputes:
    @pytest.fixture
    def case(self):
        model, inputs = tiny_lms.llama()
        return model, inputs, *answers(inputs)

    def test_forward_replaced_on_the_module(self, case):
        model, inputs, index, target = case
        forward = model.lm_head.forward
        model.lm_head.forward = lambda hidden: 0.5 * forward(hidden)
        with pytest.raises(TypeError, match="whose forward, replaced on this module, computes something else"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))

    def test_forward_replaced_after_the_first_call(self, case):
        model, inputs, index, target = case
        at_head = HeadLoss(model)
        at_head(model, inputs, index, cross_entropy(target))
        forward = model.lm_head.forward
        model.lm_head.forward = lambda hidden: forward(hidden)  # the same
        expected = own_loss(model, inputs, index, target).item()
        assert at_head(model, inputs, index, cross_entropy(target)).item() == pytest.approx(expected, rel=1e-5)
        model.lm_head.forward = lambda hidden: forward(hidden).relu()
        with pytest.raises(TypeError, match="replaced on this module, computes something else"):
            at_head(model, inputs, index, cross_entropy(target))

    def test_forward_that_accelerate_replaces(self, case):
        hooks = pytest.importorskip("accelerate.hooks", reason="accelerate replaces the forward to move tensors")
        model, inputs, index, target = case
        expected = own_loss(model, inputs, index, target).item()
        hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu"))
        assert "forward" in vars(model.lm_head)
        found = HeadLoss(model)(model, inputs, index, cross_entropy(target))
        assert found.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("layer", [Normalised, StartsAtZero, StartsAtOne, Direction])
    def test_forward_of_its_class(self, case, layer):
        """Three of them compute nn.Linear's logits at first; what trains in them tells them apart."""
        model, inputs, index, target = case
        model.lm_head = layer(32, tiny_lms.VOCAB, bias=False)
        with pytest.raises(TypeError, match=f"got a .*{layer.__name__} whose forward computes something else"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))

    def test_dropout_in_the_head(self, case):
        class Dropping(nn.Linear):
            def forward(self, hidden):
                return super().forward(nn.functional.dropout(hidden, 0.5, self.training))

        model, inputs, index, target = case
        model.lm_head = Dropping(32, tiny_lms.VOCAB, bias=False).eval()
        at_head = HeadLoss(model)
        expected = own_loss(model, inputs, index, target).item()
        assert at_head(model, inputs, index, cross_entropy(target)).item() == pytest.approx(expected, rel=1e-5)
        model.train()
        with pytest.raises(TypeError, match="Dropping whose forward computes something else"):
            at_head(model, inputs, index, cross_entropy(target))

    def test_asking_draws_no_random_number(self, case):
        model, inputs, index, target = case
        before = torch.get_rng_state()
        HeadLoss(model)(model, inputs, index, cross_entropy(target))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("old", [False, True])
    def test_weight_norm_of_torch(self, case, old):
        """Made from two parameters by a parametrization, or by a pre-hook that comes before the loss."""
        model, inputs, index, target = case
        norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        norm(model.lm_head)
        own_loss(model, inputs, index, target).backward()
        expected = gradients(model)
        HeadLoss(model)(model, inputs, index, cross_entropy(target)).backward()
        assert_same_gradients(gradients(model), expected)

    def test_weights_that_are_not_finite(self, case):
        model, inputs, index, target = case
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
        assert HeadLoss(model)(model, inputs, index, cross_entropy(target)).isnan()
        assert DualPathTeacher(model, negative=dict).head.weight.isnan().any()

    def test_another_head_than_at_first(self, case):
        model, inputs, index, target = case
        at_head = HeadLoss(model)
        for new in (model.lm_head, nn.Linear(32, tiny_lms.VOCAB, bias=True)):
            model.set_output_embeddings(new)
            expected = own_loss(model, inputs, index, target).item()
            assert at_head(model, inputs, index, cross_entropy(target)).item() == pytest.approx(expected, rel=1e-5)

    def test_config_that_changes(self):
        model, inputs = tiny_lms.gemma2()
        index, target = answers(inputs)
        at_head = HeadLoss(model, softcap=6.0)
        at_head(model, inputs, index, cross_entropy(target))
        model.config.final_logit_softcapping = 3.0
        with pytest.raises(ValueError, match=r"expected what the model does to its logits, 3.* got 6\.0"):
            at_head(model, inputs, index, cross_entropy(target))

    def test_output_as_a_tuple(self, case):
        model, inputs, index, target = case
        expected = own_loss(model, inputs, index, target).item()
        found = HeadLoss(model)(model, {**inputs, "return_dict": False}, index, cross_entropy(target))
        assert found.item() == pytest.approx(expected, rel=1e-5)


class TestHooks:
    @pytest.fixture
    def case(self):
        model, inputs = tiny_lms.llama()
        return model, inputs, *answers(inputs)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("change", [None, lambda logits: logits * 0.5])
    def test_a_hook_that_wants_logits(self, case, change, training):
        """It would get the loss, and change it."""
        model, inputs, index, target = case
        at_head = HeadLoss(model)
        at_head(model, inputs, index, cross_entropy(target))
        handle = model.lm_head.register_forward_hook(lambda _m, _args, output: change and change(output))
        with torch.set_grad_enabled(training), pytest.raises(TypeError, match=r"LM head: expected no forward hook on it, got "):
            at_head(model, inputs, index, cross_entropy(target))
        handle.remove()
        at_head(model, inputs, index, cross_entropy(target))

    def test_a_hook_on_the_model(self, case):
        model, inputs, index, target = case
        model.register_forward_hook(lambda _m, _args, output: None)
        with pytest.raises(TypeError, match=r"model: LlamaForCausalLM: expected no forward hook on it"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))

    def test_a_backward_hook(self, case):
        model, inputs, index, target = case
        model.lm_head.register_full_backward_hook(lambda _m, _inputs, _outputs: None)
        with pytest.raises(TypeError, match="LM head: expected no backward hook on it"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))
        with torch.no_grad():
            HeadLoss(model)(model, inputs, index, cross_entropy(target))

    def test_a_pre_hook_gets_the_hidden_states(self, case):
        model, inputs, index, target = case
        seen = []
        model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape) or (args[0] * 0.25,))
        expected = own_loss(model, inputs, index, target).item()
        found = HeadLoss(model)(model, inputs, index, cross_entropy(target))
        assert found.item() == pytest.approx(expected, rel=1e-5)
        assert seen == [(3, 20, 32)] * 2

    def test_hooks_elsewhere_run(self, case):
        model, inputs, index, target = case
        seen = []
        for module in (model.model, model.model.layers[0]):
            module.register_forward_hook(lambda _m, _args, output: seen.append(output))
        HeadLoss(model)(model, inputs, index, cross_entropy(target))
        assert len(seen) == 2

    def test_head_called_with_more_than_hidden_states(self, case):
        class Choosing(nn.Linear):
            def forward(self, hidden, adapter_names=None):
                return super().forward(hidden)

        model, inputs, index, target = case
        model.lm_head = Choosing(32, tiny_lms.VOCAB)
        model.lm_head.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "adapter_names": ["a"]}), with_kwargs=True
        )
        with pytest.raises(ValueError, match=r"call its LM head with hidden states alone, got .* \['adapter_names'\]"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))


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

    def test_a_base_with_a_forward_of_its_own(self, case, peft):
        model, inputs = tiny_lms.llama()
        model.lm_head = Normalised(32, tiny_lms.VOCAB, bias=False)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
        index, target = answers(inputs)
        with pytest.raises(TypeError, match=r"got a peft\.\S*Linear whose forward computes something else"):
            HeadLoss(model)(model, inputs, index, cross_entropy(target))

    def test_adapters_that_play_no_part(self, case, peft):
        """Merged, off, off after a merge, or none of the active ones."""

        def compare(model, inputs, index, target):
            with torch.no_grad():
                found = HeadLoss(model)(model, inputs, index, cross_entropy(target)).item()
                assert found == pytest.approx(own_loss(model, inputs, index, target).item(), rel=1e-5)
            return found

        model, *rest = case(target_modules=["lm_head"])
        with_adapter = compare(model, *rest)
        model.merge_adapter()
        assert compare(model, *rest) == pytest.approx(with_adapter, rel=1e-4)
        model.base_model.disable_adapter_layers()
        without = compare(model, *rest)
        assert abs(without - with_adapter) > 0.1
        model.base_model.enable_adapter_layers()
        assert compare(model, *rest) == pytest.approx(with_adapter, rel=1e-4)
        model.add_adapter("body", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("body")
        assert compare(model, *rest) == pytest.approx(without, rel=1e-4)

    def test_an_adapter_switched_between_two_calls(self, case, peft):
        model, inputs, index, target = case(target_modules=["lm_head"])
        at_head = HeadLoss(model)
        for switch in (lambda: None, model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers):
            switch()
            expected = own_loss(model, inputs, index, target).item()
            assert at_head(model, inputs, index, cross_entropy(target)).item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OTHER_ADAPTERS)
    def test_other_adapters(self, peft, name):
        """Refused while they are active, ignored while they are not."""
        options = {
            "AdaLora": {"total_step": 10},
            "IA3": {"feedforward_modules": []},
            "HRA": {"r": 2},
            "Miss": {"r": 2},
            "BOFT": {"boft_block_size": 1},
            "OFT": {"oft_block_size": 4, "r": 0},
            "FourierFT": {"n_frequency": 20},
            "VBLoRA": {"vector_length": 1},
        }
        torch.manual_seed(0)
        model, inputs = tiny_lms.llama()
        index, target = answers(inputs)
        expected = own_loss(model, inputs, index, target).item()
        config = getattr(peft, f"{name}Config")(target_modules=["lm_head"], task_type="CAUSAL_LM", **options.get(name, {}))
        model = peft.get_peft_model(model, config)
        module = type(model.get_output_embeddings()).__module__
        for _ in range(2):
            with pytest.raises(TypeError, match=rf"LM head: a {module}\.\w+ adapter sits on it.*where only a plain LoRA works"):
                HeadLoss(model)(model, inputs, index, cross_entropy(target))
        with pytest.raises(TypeError, match=rf"LM head: a {module}\.\w+ adapter sits on it"):
            LMHead.from_model(model, merge_lora=True)
        with model.disable_adapter():
            found = HeadLoss(model)(model, inputs, index, cross_entropy(target)).item()
            assert found == pytest.approx(expected, rel=1e-5)
            LMHead.from_model(model)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
        try:
            model.merge_adapter()
        except (NotImplementedError, AttributeError):
            return
        if model.get_output_embeddings().merged:
            expected = own_loss(model, inputs, index, target).item()
            found = HeadLoss(model)(model, inputs, index, cross_entropy(target)).item()
            assert found == pytest.approx(expected, rel=1e-4)

    def test_adapter_of_the_audio_that_a_generate_without_audio_turned_off(self):
        """The student would train without it, and nothing of it."""
        model, inputs = tiny_lms.granite_speech_with_adapter(target_modules=["q_proj"])
        index, target = answers(inputs)
        at_head = HeadLoss(model)
        expected = at_head(model, inputs, index, cross_entropy(target)).item()
        tiny_lms.text_only_generate(model, inputs)
        with pytest.raises(ValueError, match=r"expected the adapters of GraniteSpeech\w+ that belong to its audio to be on"):
            at_head(model, inputs, index, cross_entropy(target))
        with tiny_lms.any_peft():
            model.enable_adapters()
        assert at_head(model, inputs, index, cross_entropy(target)).item() == expected

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
