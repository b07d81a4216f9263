"""The chunk planner: bytes, tiles, named GPUs, and times as the design works them out."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kdkernels import explain
from kdkernels.ops import chunking, cuda_caad
from kdkernels.ops.chunking import DEVICES, NO_LOGITS, device_model, plan_chunks, predict
from kdkernels.ops.dispatch import choose_on_absent

CPU = torch.device("cpu")
# Llama-3.2-3B from an 8B teacher, the design's example.
EXAMPLE = {"n_tokens": 8192, "vocab": 128256, "student_width": 3072, "teacher_width": 4096}


def plan(**change):
    options = {"n_tokens": 8192, "bytes_per_token": 2 * 128256 * 4, "student_width": 3072, "device_name": "H100"}
    return plan_chunks(**{**options, **change})


def test_the_workspace_bounds_the_bytes():
    for workspace in (1 << 28, 1 << 30, 3 << 30):
        made = plan(workspace_bytes=workspace)
        assert made.scratch_bytes == made.chunk_tokens * 2 * 128256 * 4 <= workspace
        assert (made.chunks - 1) * made.chunk_tokens < 8192 <= made.chunks * made.chunk_tokens
    made = plan(device=CPU, device_name=None, n_tokens=1000, bytes_per_token=1000, workspace_bytes=100_000)
    assert (made.chunk_tokens, made.chunks, made.scratch_bytes) == (100, 10, 100_000)
    assert plan(device=CPU, device_name=None, n_tokens=10, bytes_per_token=8).chunk_tokens == 10
    assert plan(n_tokens=0).chunks == 0
    with pytest.raises(
        ValueError, match=r"workspace_bytes: expected at least 1000 \(the logits of one token\), got 999"
    ):
        plan(bytes_per_token=1000, workspace_bytes=999)
    with pytest.raises(ValueError, match="out of memory: one token's logits take"):
        plan(bytes_per_token=1 << 40)


def test_1408_tokens_beat_1024_on_132_multiprocessors():
    """At H_s 3072 dh of 1408 tokens is 132 tiles, one full wave; of 1024 it is 96 tiles in the same time."""
    made = plan()
    assert made.chunk_tokens == 1408 and "132 multiprocessors to 97%" in made.reason  # the last chunk has 1152 tokens
    assert "to 100%" in plan(n_tokens=1408 * 6).reason
    assert "to 73%" in plan(workspace_bytes=1024 * 2 * 128256 * 4, n_tokens=1024).reason


def test_the_last_chunk_counts():
    """Of 2176 tokens 1408 leave 768: two waves. With 128 tokens more than a whole number of waves another size is better."""

    def waves(tokens, size):
        whole, rest = divmod(tokens, size)
        return whole * -(-(size // 128 * 12) // 132) + -(-(-(-rest // 128) * 12) // 132)

    for tokens in (500, 2176, 2944, 8192, 10000):
        made = plan(n_tokens=tokens, workspace_bytes=4096 * 2 * 128256 * 4)
        sizes = range(128, 4097, 128)
        size = -(-made.chunk_tokens // 128) * 128
        assert waves(tokens, size) == min(waves(tokens, x) for x in sizes)


def test_every_named_gpu_has_a_plan():
    for name, model in DEVICES.items():
        made = plan(device_name=name)
        assert 128 <= made.chunk_tokens <= 4096 and f"{model.multiprocessors} multiprocessors" in made.reason
        assert made.scratch_bytes <= chunking.CUDA_WORKSPACE_BYTES
    assert device_model("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert device_model("NVIDIA GeForce RTX 4090") is DEVICES["RTX 4090"]
    assert device_model("NVIDIA T4") is None
    with pytest.raises(ValueError, match=r"device_name: expected a name with one of H100, .* in it, got 'T4'"):
        plan(device_name="T4")
    with pytest.raises(ValueError, match="device: expected either a device or a device_name"):
        plan(device_name=None)


def test_only_measured_rates_are_called_measured():
    assert [k for k, x in DEVICES.items() if "measured" in x.source] == ["H100"]
    assert all("measured once" in x.source or "data sheet" in x.source for x in DEVICES.values())
    assert DEVICES["H200"].flop_per_second == pytest.approx(800e12) and DEVICES["A100"].bytes_per_second < 2.039e12


def ms(seconds):
    return round(seconds * 1e3, 1)


def test_predictions_are_the_designs():
    h100 = DEVICES["H100"]
    floor = predict(h100, **EXAMPLE)
    assert ms(floor.gemm_seconds) == 26.9
    # Two passes over student and contrast and one write: bf16, and float32 with the bf16 gradient the linear loss asks for.
    assert ms(predict(h100, **EXAMPLE, logits_bytes=2).row_seconds) == 3.5
    assert ms(floor.row_seconds) == 6.3
    assert ms(predict(h100, **EXAMPLE, logits_bytes=2, passes=1).row_seconds) == 2.1
    assert ms(predict(h100, **EXAMPLE, passes=1).row_seconds) == 3.5
    assert ms(predict(h100, **EXAMPLE, head_trains=True).gemm_seconds) == 35.0
    assert floor.seconds == floor.gemm_seconds + floor.row_seconds


def test_predictions_without_a_gradient():
    h100 = DEVICES["H100"]
    chunks = predict(h100, **EXAMPLE, gradient=False)
    assert ms(chunks.gemm_seconds) == 18.8 and chunks.row_bytes == 8192 * 128256 * 2 * 4
    without = predict(h100, **EXAMPLE, gradient=False, path=NO_LOGITS)
    assert without.gemm_seconds == chunks.gemm_seconds and without.row_seconds == 0


SIZES = {"n_tokens": 8192, "vocab_size": 128256, "student_hidden_size": 3072, "teacher_hidden_size": 4096}


def test_explain_for_a_gpu_that_is_not_here():
    said = explain(device="H100", **SIZES)
    assert "path: chunks (a gradient is wanted" in said
    assert "6 chunks of 1408 tokens, 1378 MiB of logits at a time" in said
    assert "800 TFLOP/s and 3.0 TB/s (measured once on an H100 SXM, not on this machine): 33.2 ms" in said
    assert "GEMMs 26.9 ms (21.5 TFLOP)" in said and "row kernel 6.3 ms (18.9 GB)" in said
    assert "10.8 ms for the contrast's second bf16 summand" in said
    assert "row kernel 3.5 ms" in explain(device="H100", logits_dtype=torch.bfloat16, **SIZES)
    assert "derated" in explain(device="A100", **SIZES)


def test_explain_names_the_switches_that_are_off_by_default(monkeypatch):
    sizes = {"device": "H100", "student_hidden_size": 64}
    monkeypatch.delenv("KDKERNELS_GEMM_SUMS", raising=False)
    monkeypatch.setenv("KDKERNELS_OVERLAP", "1")
    text = explain(**sizes)
    assert "KDKERNELS_GEMM_SUMS is off" in text and "KDKERNELS_OVERLAP is on" in text
    assert "KDKERNELS_" not in explain(**sizes, gradient=False)
    assert "KDKERNELS_" not in explain(**sizes | {"device": "cpu"})


def test_explain_for_a_vocabulary_with_padded_rows():
    said = explain(device="H100", **{**SIZES, "vocab_size": 128257})
    assert "rows of 128320 items for 128257 ids" in said
    assert "rows of" not in explain(device="H100", **SIZES) and "rows of" not in explain(**{**SIZES, "vocab_size": 128257})


def test_explain_says_whether_a_projection_is_possible():
    small = {"student_hidden_size": 576, "teacher_hidden_size": 960}
    coarse = {"logits_dtype": torch.bfloat16}
    assert "multiplies 2 F_s instead of 2 F_s + F_t, 0.55 of it" in explain(**small, **coarse)
    assert "2 F_s + F_t, 0.55 of it" in explain(**small, round_contrast=True)
    assert "2 F_s + 2 F_t, 0.38 of it" in explain(**small)
    assert "projection: possible" in explain(student_hidden_size=576)
    for change in ({"head_trains": True}, {"divergence": "jsd"}, {"student_softcap": 30.0}):
        assert f"projection: not possible with {next(iter(change))}=" in explain(**small, **change)
        with pytest.raises(ValueError, match="projected: expected False with"):
            explain(**small, **change, projected=True)
    assert "projection:" not in explain(**small, gradient=False)


def test_explain_for_a_projected_teacher():
    said = explain(device="H100", projected=True, **SIZES)
    assert "GEMMs 16.1 ms" in said and "row kernel 3.5 ms" in said and "2004 MiB of logits" in said
    assert "second bf16 summand" not in said and "projection:" not in said
    refused = "impl='cuda' fails: impl: expected 'auto', 'reference', 'cpu' or 'triton' for projections"
    assert refused in explain(device="H100", impl="cuda", projected=True)
    assert "35.0 ms" in explain(device="H100", head_trains=True, **SIZES)


@pytest.mark.parametrize("name", DEVICES)
def test_explain_asks_nothing_of_this_machine_about_an_absent_gpu(name, monkeypatch):
    """Without Triton, and with the CUDA C++ kernel's switch set: both belong to this machine."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: None)
    monkeypatch.setattr(cuda_caad, "unavailable", lambda index: "nothing here")
    monkeypatch.setenv("KDKERNELS_CUDA_ROWS", "1")
    said = explain(device=name, **SIZES)
    assert f"impl='auto' runs 'triton': tensors on a CUDA device ({name})" in said and f"{name}: taken from a table" in said
    assert "  triton: available" in said and "  cpu: not there: impl='cpu': expected tensors on the CPU" in said
    has_clusters = DEVICES[name].capability >= (9, 0)
    assert ("  cuda: where kdkernels is built" in said) == has_clusters
    assert ("  cuda: not there: impl='cuda': expected a device that holds clusters" in said) != has_clusters
    assert "predicted, at" in said
    assert "runs 'reference': torch.float64 has only" in explain(device=name, dtype=torch.float64)
    assert "impl='cpu' fails" in explain(device=name, impl="cpu")
    assert "impl='triton' fails: impl='triton': expected tensors of float32" in explain(
        device=name, impl="triton", dtype=torch.float64
    )
    with pytest.raises(ValueError, match="impl"):
        choose_on_absent("fast", name, (9, 0), [torch.bfloat16])


def test_explain_evaluation():
    said = explain(device="H100", gradient=False, **SIZES)
    assert "path: no logits (no gradient is wanted" in said and "row kernel" not in said and "chunks of" not in said
    for change in ({"chunk_tokens": 8}, {"divergence": "jsd"}, {"return_stats": True}):
        said = explain(device="H100", gradient=False, **SIZES, **change)
        assert "path: chunks" in said and "row kernel" in said


def test_explain_elsewhere():
    said = explain(**SIZES)
    assert "path: chunks" in said and "32 chunks of 256 tokens" in said and "predicted" not in said
    assert "path" not in explain(device="H100")
    if not torch.cuda.is_available():
        assert "name one, device='H100'" in explain(device="cuda", **SIZES)
    with pytest.raises(ValueError, match=r"device: expected a torch device or one of H100, .* got 'T4'"):
        explain(device="T4", **SIZES)
