"""Small launches of the CUDA row kernel for the tools that watch them: `python -m benchmarks.gpu.launches [--large]`."""

from __future__ import annotations

import argparse

import torch

from .measure import DEVICE, Rows


def small() -> None:
    """Every kernel, one to 16 blocks a cluster, one and several chunks, in place and not, ignored rows, a text path left out."""
    from kdkernels.ops import cuda_caad
    from kdkernels.ops.rows import DIVERGENCES, RowSpec

    g = torch.Generator().manual_seed(0)
    for number, divergence in enumerate(DIVERGENCES):
        for softcap in (None, 30.0):
            for vocab, blocks, dtype in (
                (300, 2, torch.float32),
                (9000, 1, torch.bfloat16),
                (20000, 16, torch.bfloat16),
            ):
                spec = RowSpec(vocab=vocab, divergence=divergence, student_softcap=softcap, temperature=1.0 + number)
                width = vocab + 8
                student, audio, text = (torch.randn(1, 6, width, generator=g).to(dtype).to(DEVICE) for _ in range(3))
                target = torch.randint(0, vocab, (6,), generator=g).to(DEVICE)
                target[1] = -100
                alpha = torch.rand(6, generator=g).to(DEVICE)
                alpha[3] = 0.0
                grad = student if number == 0 else torch.empty_like(student)
                one = torch.ones(6, device=DEVICE)
                cuda_caad.caad_rows(student, audio, text, target, alpha, one, one, spec, grad=grad, blocks=blocks)
    torch.cuda.synchronize()


def large() -> None:
    """Two launches at the size of the measurements, in bf16 with a text path: the first warms up."""
    case = Rows(1024, torch.bfloat16, torch.bfloat16, text=True, impl="cuda")
    for _ in range(2):
        case.into(case.student)
    torch.cuda.synchronize()
    print(f"one read: {case.read_bytes} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launches", description=__doc__)
    parser.add_argument("--large", action="store_true", help="two launches at the size of the measurements")
    large() if parser.parse_args().large else small()
