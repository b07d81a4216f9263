"""The cases of `benchmarks.rows`, `linear` and `layers` for pytest-benchmark: `pytest benchmarks --benchmark-only`.

Its --benchmark-compare and --benchmark-autosave show what a change does on one machine. The committed CSVs come from the
commands. The sizes are those of one chunk, so a run takes a minute.
"""

import pytest
import torch

from benchmarks import layers
from benchmarks.common import relative_error
from benchmarks.contenders import CHUNKS, ERROR_BUDGETS, FULL, LinearCase, bare_gemms, contenders, gradient_errors
from benchmarks.rows import BUDGETS, RowCase, exact_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = {"cpu": 49152, "cuda": 128256}[DEVICE.type]
ROW_NAMES = ("eager", "CAAD authors' form", "kdkernels", "kdkernels, in place")
LINEAR = {x.name: x for x in contenders(DEVICE.type, (FULL,)) if not x.compiles}


def synchronised(call):
    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def row_case(request):
    return RowCase(64, VOCAB, getattr(torch, request.param), DEVICE)


@pytest.mark.parametrize("name", ROW_NAMES)
def test_rows(benchmark, row_case, name):
    call = row_case.contenders(compiled=False)[name]
    exact = row_case.gradient(exact_loss, row_case.student.double())
    assert relative_error(call(), exact) < BUDGETS[row_case.student.dtype]
    benchmark(synchronised(call))


def test_rows_floor(benchmark, row_case):
    benchmark(synchronised(row_case.copies()))


@pytest.fixture(scope="module")
def linear_case():
    return LinearCase.random(256, VOCAB, 576, 960, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("name", LINEAR)
def test_linear(benchmark, linear_case, name):
    step = LINEAR[name].build()
    errors = gradient_errors({name: (FULL, step)}, linear_case, check_tokens=16)
    assert errors[name] < ERROR_BUDGETS[torch.bfloat16]
    benchmark(synchronised(lambda: step(linear_case)))


def test_linear_floor(benchmark, linear_case):
    benchmark(synchronised(bare_gemms(linear_case, max(CHUNKS[DEVICE.type]))))


@pytest.fixture(scope="module", params=[False, True], ids=["errors", "directions"])
def layer_case(request):
    return layers.LayerCase(layers.SHAPES[1], 256, torch.bfloat16, DEVICE, normalize=request.param)


@pytest.mark.parametrize("name", layers.contenders(compiled=False))
def test_layers(benchmark, layer_case, name):
    loss = layers.contenders(compiled=False)[name]
    assert max(layers.gradient_errors({name: loss}, layer_case).values()) < layers.BUDGETS[torch.bfloat16]
    benchmark(synchronised(lambda: layer_case.gradients(loss)))


def test_layers_floor(benchmark, layer_case):
    benchmark(synchronised(layers.floor(layer_case)))
