"""The losses inside larger graphs: torch.compile with a number of tokens that changes, and CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, hidden, logits, on_device, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels import fused_caad_loss, fused_linear_caad_loss
from kdkernels.loss_terms import LossTerms
from kdkernels.ops import chunking, linear

TOKENS = (23, 9, 40, 64)
# Calls that may compile. None: the first number of tokens is compiled as it is, the second makes the graph dynamic; True: dynamic
# from the start.
COMPILING_CALLS = {None: 2, True: 1}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_and_eager(objective, cases, dynamic):
    """Runs both on all cases, forward and backward, compares bits, and returns the number of graphs compiled after each call."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective, fullgraph=True, backend=counter, dynamic=dynamic)  # fullgraph: a break is an error
    compiled_by = []
    for leaf, arguments in cases:
        expected = objective(leaf, **arguments)
        (expected_grad,) = torch.autograd.grad(expected, leaf)
        loss = compiled(leaf, **arguments)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)
        assert expected_grad.abs().sum() > 0
        compiled_by.append(counter.frame_count)
    return compiled_by


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", COMPILING_CALLS)
def test_hidden_states_to_loss_compiles_once_for_any_number_of_tokens(dynamic):
    torch.manual_seed(0)
    body = torch.nn.Linear(12, 12)  # stands for the student: the graph has more in it than the loss

    def objective(states, **arguments):
        return fused_linear_caad_loss(torch.tanh(body(states)), **arguments)

    cases = []
    for n in TOKENS:
        arguments = hidden(n)
        cases.append((arguments.pop("student_hidden"), arguments))
    compiled_by = compiled_and_eager(objective, cases, dynamic)
    assert compiled_by[-1] == compiled_by[COMPILING_CALLS[dynamic] - 1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", COMPILING_CALLS)
def test_logits_to_loss_compiles_once_for_any_number_of_tokens(dynamic):
    def objective(student, audio, text, target):
        return fused_caad_loss(student * 1.5, audio, text, target)

    cases = []
    for n in TOKENS:
        student, audio, text, target = logits(n)
        cases.append((student, {"audio": audio, "text": text, "target": target}))
    compiled_by = compiled_and_eager(objective, cases, dynamic)
    assert compiled_by[-1] == compiled_by[COMPILING_CALLS[dynamic] - 1] > 0


def test_what_a_compiled_loss_holds_has_no_properties():
    """torch.compile of torch 2.9 and 2.10 takes a property of a named tuple for a value, and the losses did not compile there."""
    assert [name for name, value in vars(LossTerms).items() if isinstance(value, property)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("dtype", "plausibility"), [(FP32, None), (BF16, None), (BF16, 0.1)])
def test_gpu_linear_loss_and_backward_in_a_cuda_graph(dtype, plausibility, head_trains):
    """Replayed on other values: nothing about the graph may have been read from the first ones."""
    vocab, n = 4000, 300
    first, second = ({k: x.detach().cuda() for k, x in hidden(n, vocab, 256, 384, dtype=dtype, seed=s).items()} for s in (0, 1))
    second["target"][: n // 2] = -100  # another number of valid tokens
    leaves = ["student_hidden", "student_weight"][: 1 + head_trains]

    def step(arguments):
        # The chunk is given: the default follows the memory that is free, which a capture changes.
        arguments = {k: x.requires_grad_(k in leaves) if x.is_floating_point() else x for k, x in arguments.items()}
        loss = fused_linear_caad_loss(**arguments, plausibility=plausibility, chunk_tokens=128)
        return loss.detach(), *torch.autograd.grad(loss, [arguments[k] for k in leaves])

    expected = [x.clone() for x in step(second)]
    static = {k: x.clone() for k, x in first.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled, cuBLAS gets its workspace
        step(static)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    with torch.no_grad():
        for key, value in second.items():
            static[key].copy_(value)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        assert relative_error(got, wanted) <= 1e-6  # cuBLAS may take another kernel while capturing


@pytest.fixture
def plans(monkeypatch):
    """(chunk_tokens as given, chunks) of every plan that the chunk loop asks for."""
    made, plan_chunks = [], linear.plan_chunks

    def planned(**options):
        plan = plan_chunks(**options)
        made.append((options["chunk_tokens"], plan.chunks))
        return plan

    monkeypatch.setattr(linear, "plan_chunks", planned)
    return made


def step_of_default_chunks(arguments, *, gradient, **options):
    """Loss, and with ``gradient`` that of the hidden states: without one no chunks are planned, see choose_path."""
    arguments = {k: x.detach() for k, x in arguments.items()}
    arguments["student_hidden"].requires_grad_(gradient)
    loss = fused_linear_caad_loss(**arguments, **options)
    return [loss.detach(), *(torch.autograd.grad(loss, arguments["student_hidden"]) if gradient else ())]


@pytest.mark.parametrize("gradient", [True, False])
def test_the_chunk_loop_takes_the_default_plan_of_a_gpu(gradient, plans, monkeypatch):
    """What the next test captures on a GPU, here with the plan of an H100 that has room for 8 tokens."""
    pytest.importorskip("triton", reason="needs Triton")
    arguments = on_device(hidden(23, 64, 12, 20), "triton")
    monkeypatch.setattr(chunking, "_share_of_free", lambda free: 8 * 2 * 4 * 64)
    planned = linear.plan_chunks
    monkeypatch.setattr(linear, "plan_chunks", lambda **x: planned(**{**x, "device": None, "device_name": "H100"}))
    found = step_of_default_chunks(arguments, gradient=gradient, impl="triton")
    assert plans == ([(None, 3)] if gradient else [])
    for got, wanted in zip(found, step_of_default_chunks(arguments, gradient=gradient, impl="reference"), strict=True):
        assert relative_error(got, wanted) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", [True, False])
def test_gpu_default_chunks_can_be_captured(gradient, plans, monkeypatch):
    """The plan asks the driver for the free memory, which is no synchronisation; captured it stays as it was."""
    monkeypatch.setattr(chunking, "CUDA_WORKSPACE_BYTES", 1 << 26)  # 262 tokens of 600
    arguments = {k: x.detach().cuda() for k, x in hidden(600, 32000, 256, 384).items()}
    expected = step_of_default_chunks(arguments, gradient=gradient)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_of_default_chunks(arguments, gradient=gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plans.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step_of_default_chunks(arguments, gradient=gradient)
    assert [given for given, chunks in plans if chunks > 1] == ([None] if gradient else [])
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        assert relative_error(got, wanted) <= 1e-6  # cuBLAS may take another kernel while capturing
