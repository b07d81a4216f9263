"""A mask in place of a target, cross-entropy without a teacher, and the losses of other libraries by these ones."""

import pytest
import torch
from cases import FP64, hidden, logits, on_device
from torch.nn.functional import cross_entropy, log_softmax

from kdkernels import (
    CAADLoss,
    TeacherSource,
    explain,
    fused_caad_loss,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
    fused_linear_projected_loss,
    project_teacher,
)

IMPLS = ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)]


def gradient(loss, leaf):
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad


def masked_logits(impl):
    student, audio, text, target = on_device(logits(), impl)
    mask = torch.arange(len(target), device=target.device) % 3 != 2
    return student.detach().requires_grad_(), audio, text, target, mask


# -- mask ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_a_mask_alone_is_a_made_up_target(impl, ignore_index):
    student, audio, text, _target, mask = masked_logits(impl)
    made_up = torch.where(mask, 1, -100)
    with torch.no_grad():
        student[~mask] = float("nan")  # positions that do not count are not read
    options = {"impl": impl, "ignore_index": ignore_index}
    actual = fused_caad_loss(student, audio, text, mask=mask, **options)
    expected = fused_caad_loss(student, audio, text, made_up, kd_weight=1.0, impl=impl)
    assert expected.item() > 0 and torch.equal(actual, expected)
    assert torch.equal(gradient(actual, student), gradient(expected, student))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_position_counts_where_mask_and_target_say_so(impl):
    student, audio, text, target, mask = masked_logits(impl)
    assert bool((target[mask] == -100).any())
    actual = fused_caad_loss(student, audio, text, target, mask=mask.long(), impl=impl, reduction="none")
    expected = fused_caad_loss(student, audio, text, torch.where(mask, target, -100), impl=impl, reduction="none")
    assert torch.equal(actual, expected)
    assert torch.equal(actual == 0, ~mask | (target == -100))


def test_every_loss_takes_the_mask():
    heads = hidden()
    student, weight = heads["student_hidden"], heads["student_weight"]
    audio, text, teacher = (heads[f"teacher_{name}"] for name in ("audio_hidden", "text_hidden", "weight"))
    target = heads["target"]
    mask = torch.arange(len(target)) % 3 != 1
    as_target = torch.where(mask, target, -100)
    projection = project_teacher(audio, text, teacher, weight, alpha=1.0, temperature=2.0)
    calls = [
        lambda y, **more: fused_linear_caad_loss(student, weight, audio, text, teacher, y, **more),
        lambda y, **more: fused_linear_multi_teacher_loss(student, weight, [TeacherSource(audio, teacher, text)], y, **more),
        lambda y, **more: fused_linear_projected_loss(student, weight, projection, y, **more),
        lambda y, **more: CAADLoss()(student @ weight.T, audio @ teacher.T, text @ teacher.T, y, **more),
    ]
    for call in calls:
        loss = call(target, mask=mask)
        torch.testing.assert_close(loss, call(as_target), rtol=0, atol=0)
        assert not torch.equal(loss, call(target))


def test_masks_that_do_not_fit():
    student, audio, text, _target, mask = masked_logits("cpu")
    with pytest.raises(ValueError, match=r"mask: expected shape \(6,\), got \(5,\)"):
        fused_caad_loss(student[:6], audio[:6], text[:6], mask=mask[:5])
    with pytest.raises(TypeError, match=r"mask: expected bool, or whole numbers .*, got torch.float32"):
        fused_caad_loss(student, audio, text, mask=mask.float())
    with pytest.raises(TypeError, match="mask"):
        fused_caad_loss(student, audio, text, mask=mask.tolist())


# -- cross-entropy alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_needs_no_teacher(impl):
    student, _, _, target, mask = masked_logits(impl)
    both = torch.where(mask, target, -100)
    loss = fused_caad_loss(student, None, None, target, kd_weight=0.0, mask=mask, impl=impl)
    exact = student.detach().double().requires_grad_()
    expected = cross_entropy(exact, both)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(loss, student).double(), gradient(expected, exact), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_from_hidden_states_needs_no_teacher(impl):
    heads = on_device(hidden(), impl)
    student, target = heads["student_hidden"].requires_grad_(), heads["target"]
    weight = heads["student_weight"].requires_grad_()
    loss = fused_linear_caad_loss(student, weight, None, None, None, target, kd_weight=0.0, impl=impl)
    exact, exact_weight = (x.detach().double().requires_grad_() for x in (student, weight))
    expected = cross_entropy(exact @ exact_weight.T, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    pairs = zip(torch.autograd.grad(loss, (student, weight)), torch.autograd.grad(expected, (exact, exact_weight)), strict=True)
    for actual, right in pairs:
        torch.testing.assert_close(actual.double(), right, rtol=1e-3, atol=1e-6)


def test_calls_without_a_teacher_that_need_one():
    student, _audio, text, target, mask = masked_logits("cpu")
    heads = hidden()
    hidden_states, weight = heads["student_hidden"], heads["student_weight"]
    with pytest.raises(ValueError, match=r"teacher_audio_logits: expected a tensor with kd_weight=0.7, got None"):
        fused_caad_loss(student, None, None, target)
    with pytest.raises(ValueError, match="teacher_text_logits: expected None without teacher_audio_logits"):
        fused_caad_loss(student, None, text, target, kd_weight=0)
    with pytest.raises(ValueError, match="teacher_audio_logits: expected a tensor, or a target"):
        fused_caad_loss(student, None, None, kd_weight=0, mask=mask)
    with pytest.raises(ValueError, match="teacher_audio_logits: expected a tensor with return_stats=True"):
        fused_caad_loss(student, None, None, target, kd_weight=0, return_stats=True)
    with pytest.raises(ValueError, match="teacher_weight, teacher_bias: expected None"):
        fused_linear_caad_loss(hidden_states, weight, None, None, heads["teacher_weight"], heads["target"], kd_weight=0)
    with pytest.raises(TypeError, match="teacher_weight: expected a tensor beside teacher_audio_hidden, got None"):
        fused_linear_caad_loss(hidden_states, weight, heads["teacher_audio_hidden"], None, None, heads["target"])


@pytest.mark.slow
def test_compiled():
    student, audio, text, target, mask = masked_logits("cpu")

    def loss(student, mask):
        with_teacher = fused_caad_loss(student, audio, text, mask=mask)
        limit = fused_caad_loss(student, audio, text, target, divergence="jsd", jsd_beta=1.0)
        return with_teacher + limit + fused_caad_loss(student, None, None, target, mask=mask, kd_weight=0.0)

    compiled = torch.compile(loss, fullgraph=True)
    for m in (mask, ~mask):
        actual, expected = compiled(student, m), loss(student, m)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradient(actual, student), gradient(expected, student))


# -- other libraries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("beta", "divergence"), [(0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_jsd_beta_are_the_kls(impl, beta, divergence):
    student, audio, text, target, _ = masked_logits(impl)
    actual = fused_caad_loss(student, audio, text, target, divergence="jsd", jsd_beta=beta, impl=impl)
    expected = fused_caad_loss(student, audio, text, target, divergence=divergence, impl=impl)
    assert torch.equal(actual, expected) and torch.equal(gradient(actual, student), gradient(expected, student))


def test_the_ends_of_jsd_beta_elsewhere():
    heads = hidden()
    tensors = [heads[name] for name in ("teacher_audio_hidden", "teacher_weight", "teacher_text_hidden")]
    student = heads["student_hidden"], heads["student_weight"]
    ends = [
        fused_linear_multi_teacher_loss(*student, [TeacherSource(*tensors, divergence=d, jsd_beta=beta)], heads["target"])
        for d, beta in (("jsd", 1), ("reverse_kl", 0.5))
    ]
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match=r"plausibility: expected None with divergence='jsd' and jsd_beta=1 "):
        fused_caad_loss(*logits()[:3], divergence="jsd", jsd_beta=1, plausibility=0.1)
    with pytest.raises(ValueError, match=r"jsd_beta: expected a number in \[0, 1\], got 1.5"):
        fused_caad_loss(*logits()[:3], divergence="jsd", jsd_beta=1.5)
    assert explain(device="cpu", n_tokens=4, vocab_size=8, student_hidden_size=4, divergence="jsd")


def distributions(student, teacher, temperature):
    return log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)


def generalised_jsd(student, teacher, target, beta, temperature):
    """The mean over valid positions, as TRL 1.16.0 and Liger 0.8.5 have it: without tau^2."""
    log_p, log_q = distributions(student, teacher, temperature)
    if beta == 0:
        value = log_p.exp() * (log_p - log_q)
    elif beta == 1:
        value = log_q.exp() * (log_q - log_p)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        value = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return value.sum(-1)[target != -100].mean()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_of_trl(beta):
    student, audio, _, target = logits(dtype=FP64)
    tau = 2.0
    ours = fused_caad_loss(
        student, audio, None, target, divergence="jsd", jsd_beta=beta, temperature=tau, kd_weight=1.0, impl="reference"
    )
    torch.testing.assert_close(ours / tau**2, generalised_jsd(student, audio, target, beta, tau), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("hard", "soft"), [(0.3, 0.7), (0.5, 1.5)])
def test_the_loss_of_liger(hard, soft):
    student, audio, _, target = logits(dtype=FP64)
    tau, valid = 2.0, int((target != -100).sum())
    ours = fused_caad_loss(
        student, audio, None, target, divergence="jsd", jsd_beta=0.3, temperature=tau, kd_weight=0.5,
        kd_normalizer=0.5 * valid * tau**2 / soft, ce_normalizer=0.5 * valid / hard, impl="reference",
    )  # fmt: skip
    expected = soft * generalised_jsd(student, audio, target, 0.3, tau) + hard * cross_entropy(student, target)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_the_losses_of_torchtune(ratio):
    """torchtune 0.6.1: forward KL without the teacher's entropy, which is a constant; a ratio between the two KLs."""
    student, audio, _, target = logits(dtype=FP64)
    student.requires_grad_()
    log_p, log_q = distributions(student, audio, 1.0)
    valid = target != -100
    forward = -(log_p.exp() * log_q).sum(-1)[valid].mean()
    reverse = -(log_q.exp() * (log_p - log_q)).sum(-1)[valid].mean()
    options = {"temperature": 1.0, "kd_weight": 1.0, "impl": "reference"}
    ours = [fused_caad_loss(student, audio, None, target, divergence=d, **options) for d in ("forward_kl", "reverse_kl")]
    ours = ratio * ours[0] + (1 - ratio) * ours[1]
    theirs = ratio * forward + (1 - ratio) * reverse
    entropy = -(log_p.exp() * log_p).sum(-1)[valid].mean()
    torch.testing.assert_close(ours, theirs - ratio * entropy, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient(ours, student), gradient(theirs, student), rtol=1e-9, atol=1e-15)
