"""A vocabulary that 16 does not divide: on CUDA the rows of scratch are padded, and what stands in the padding has no effect."""

import pytest
import torch
from cases import BF16, hidden, on_device, relative_error, to_double

from kdkernels import (
    TeacherSource,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
    fused_linear_projected_loss,
    project_teacher,
)
from kdkernels.ops import chunking, linear, projection
from kdkernels.ops.chunking import row_items

VOCAB = 61


@pytest.fixture
def padded(monkeypatch):
    """On the CPU rows are padded as on CUDA, and fresh scratch is full of NaN."""

    def poisoned(size, device):
        return torch.full((-(-size // 4),), float("nan"), device=device).view(torch.uint8)

    monkeypatch.setitem(chunking.ROW_PADDING, "cpu", 64)
    for module in (linear, projection):
        monkeypatch.setattr(module, "take_scratch", poisoned)
        monkeypatch.setattr(module, "return_scratch", lambda memory: None)


def gradients(loss_of, arguments):
    arguments = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in arguments.items()}
    loss, stats = loss_of(**arguments), []
    if isinstance(loss, tuple):
        loss, stats = loss
    loss.backward()
    return [loss.detach(), *stats, *(x.grad for x in arguments.values() if x.grad is not None)]


def check(loss_of, arguments, impl, tolerance=1e-5, **options):
    arguments = on_device(arguments, impl)
    found = gradients(lambda **x: loss_of(**x, impl=impl, **options), arguments)
    options.pop("logits_dtype", None)
    expected = gradients(lambda **x: loss_of(**x, impl="reference", **options), to_double(arguments))
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) <= tolerance


def test_row_items():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [row_items(v, cuda) for v in (128257, 51865, 51866, 128256, 50272)] == [128320, 51904, 51904, 128256, 50272]
    assert row_items(51865, cpu) == 51865


OPTIONS = {
    "softcaps": {"student_softcap": 4.0, "teacher_softcap": 6.0, "vocab_size": 45},
    "plausibility": {"plausibility": 0.1},
    "reverse": {"divergence": "reverse_kl", "return_stats": True},
    "jsd": {"divergence": "jsd"},
    "bf16 logits": {"logits_dtype": BF16},
}
IMPLS = ["cpu", pytest.param("triton", marks=pytest.mark.slow)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_padding_has_no_effect(padded, name, impl):
    arguments = hidden(5, vocab=VOCAB, teacher_vocab=64)
    arguments["target"].clamp_(max=44)
    arguments["student_weight"].requires_grad_()
    arguments["student_bias"] = torch.randn(VOCAB, requires_grad=True, generator=torch.Generator().manual_seed(1))
    tolerance = 5e-2 if name == "bf16 logits" else 1e-5
    check(fused_linear_caad_loss, arguments, impl, tolerance, chunk_tokens=3, alpha=torch.linspace(0, 3, 5), **OPTIONS[name])


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_padding_has_no_effect_where_the_gradient_lies_in_wider_logits(padded, impl):
    arguments = hidden(5, vocab=VOCAB, dtype=BF16)
    arguments["student_weight"].requires_grad_()
    check(fused_linear_caad_loss, arguments, impl, 5e-2, chunk_tokens=3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergences", [("forward_kl", "forward_kl"), ("reverse_kl", "reverse_kl", "jsd")], ids=str)
def test_padding_has_no_effect_on_mixtures(padded, divergences, impl):
    arguments = hidden(4, vocab=VOCAB)
    student = {k: arguments[k] for k in ("student_hidden", "student_weight", "target")}

    def loss(**options):
        like = options["student_hidden"]
        audio, text, weight = (arguments[f"teacher_{x}"].to(like) for x in ("audio_hidden", "text_hidden", "weight"))
        sources = [
            TeacherSource(audio + k, weight, text_hidden=text, divergence=divergence, source_weight=1.0 + k)
            for k, divergence in enumerate(divergences)
        ]
        return fused_linear_multi_teacher_loss(sources=sources, **options)

    check(loss, student, impl, chunk_tokens=3)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_has_no_effect_on_projections(padded, impl):
    arguments = hidden(4, vocab=VOCAB)
    made = [arguments[k] for k in ("teacher_audio_hidden", "teacher_text_hidden", "teacher_weight", "student_weight")]

    def loss(**options):
        teacher = [x.to(options["student_hidden"]) for x in made]
        return fused_linear_projected_loss(projection=project_teacher(*teacher, alpha=2.0, temperature=2.0, top_k=4), **options)

    check(loss, {k: arguments[k] for k in ("student_hidden", "student_weight", "target")}, impl, 2e-5, chunk_tokens=3)


def test_row_kernel_reads_the_padding_and_drops_it():
    """The layout of the wide loads, which only aligned rows get."""
    pytest.importorskip("triton")
    from kdkernels.ops import triton_shared

    rows = torch.zeros(1, 2, 64)
    assert triton_shared._readable([rows, rows], rows, 61) == 64
    assert triton_shared._readable([rows], None, 64) is None  # 16 divides it
    assert triton_shared._readable([rows, rows[..., :61]], rows, 61) is None  # nothing to read there
    assert triton_shared._readable([torch.zeros(1, 2, 68)], None, 61) is None  # rows that are not aligned
