"""Precision by what the processor says of itself."""

import pytest
import torch

from models.backbones.device import has_fast_bfloat16, inference_dtype


@pytest.mark.parametrize(("avx512", "amx", "fast"), [(False, False, False), (True, False, True), (False, True, True)])
def test_a_cpu_with_either_instruction_set_is_fast(monkeypatch, avx512, amx, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert has_fast_bfloat16() is fast
    assert inference_dtype("cpu") is (torch.bfloat16 if fast else torch.float32)


def test_a_torch_that_cannot_say_counts_as_slow(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert not has_fast_bfloat16(torch.device("cpu"))


def test_other_devices_are_not_taken_for_cuda():
    assert not has_fast_bfloat16("meta")
