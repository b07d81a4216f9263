"""The layer loss against float64, its projections, and the maps from layer to layer."""

import itertools

import pytest
import torch
from cases import BF16, FP16, FP32, device_of, on_device, relative_error
from torch import library

from kdkernels import LayerProjections, fused_layer_mse_loss, layer_map
from kdkernels.layer_mse import DIRECTIONS
from kdkernels.ops import dispatch, native
from kdkernels.ops import layers as layer_ops

WIDTHS = (24, 40)
# Of the gradient: float32 products of width 40, and roundings to the low precisions. Triton's interpreter cuts off what bf16
# cannot hold instead of rounding it.
GRADIENT_ERROR = {FP32: 1e-6, BF16: 4e-3, FP16: 6e-4}
CUT_OFF_ERROR = 8e-3


def case(dtype=FP32, *, direction="student_to_teacher", equal=False, pairs=2, leading=(3, 5), seed=0, scale=1.0):
    """Arguments of fused_layer_mse_loss; student and projections require grad."""
    g = torch.Generator().manual_seed(seed)
    h_s, h_t = (WIDTHS[0], WIDTHS[0]) if equal else WIDTHS

    def normal(*shape, by=scale):
        return (torch.randn(*shape, generator=g) * by).to(dtype)

    shape = (h_t, h_s) if direction == "student_to_teacher" else (h_s, h_t)
    return {
        "student_hidden": [normal(*leading, h_s).requires_grad_() for _ in range(pairs)],
        "teacher_hidden": [normal(*leading, h_t) for _ in range(pairs)],
        "projections": None if equal else [normal(*shape, by=0.2).requires_grad_() for _ in range(pairs)],
        "teacher_text_hidden": [normal(*leading, h_t) for _ in range(pairs)],
        "direction": direction,
    }


def doubled(arguments):
    def double(x):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        return [double(y) for y in x] if isinstance(x, list) else x

    return {k: double(v) for k, v in arguments.items()}


def gradients(arguments):
    leaves = [*arguments["student_hidden"], *(arguments["projections"] or [])]
    return [x.grad for x in leaves]


def compare(arguments, dtype, *, factor=None, **options):
    """Loss and gradients of both, in the arguments' precision and by the formula in float64."""
    impl = options.get("impl")
    arguments, options = on_device(arguments, impl), on_device(options, impl)
    exact = doubled(arguments)
    loss = fused_layer_mse_loss(**arguments, **options)
    options["impl"] = "reference"
    expected = fused_layer_mse_loss(**exact, **options)
    factor = on_device(torch.tensor(1.0) if factor is None else factor, impl)
    (loss * factor).sum().backward()
    (expected * factor).sum().backward()
    assert relative_error(loss, expected) < 2e-6
    for got, want in zip(gradients(arguments), gradients(exact), strict=True):
        cut_off = (impl, dtype) == ("triton", BF16) and not torch.cuda.is_available()
        assert relative_error(got, want) < (CUT_OFF_ERROR if cut_off else GRADIENT_ERROR[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("direction", [*DIRECTIONS, "equal"])
@pytest.mark.parametrize("normalize", [False, True])
def test_matches_fp64(impl, dtype, direction, normalize):
    if impl == "reference" and dtype != FP32:
        pytest.skip("the formula itself")
    equal = direction == "equal"
    arguments = case(dtype, direction=DIRECTIONS[0] if equal else direction, equal=equal)
    g = torch.Generator().manual_seed(9)
    mask = torch.rand(3, 5, generator=g) > 0.3
    alpha = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0]).repeat(3, 1)
    compare(arguments, dtype, impl=impl, normalize=normalize, mask=mask, alpha=alpha, layer_weight=[1.0, 0.25])


def test_where_the_cuda_part_is_wanted_layers_take_triton(monkeypatch):
    """It has no kernel for layers. The native kernel would read a device's memory from the host."""
    pytest.importorskip("triton")
    arguments = on_device(case(), "triton")
    expected = fused_layer_mse_loss(**arguments, impl="reference")
    monkeypatch.setenv("KDKERNELS_CUDA_ROWS", "1")
    monkeypatch.setattr(dispatch.cuda_caad, "unavailable", lambda index: None)
    gpu, choose = torch.device("cuda:0"), dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda impl, device, dtypes, **options: choose(impl, gpu, dtypes, **options))
    monkeypatch.setattr(native, "layer_rows", lambda *_, **__: pytest.fail("the native kernel was called"))
    assert relative_error(fused_layer_mse_loss(**arguments), expected) < 1e-6
    with pytest.raises(KeyError):
        layer_ops.layer_rows_of("cuda_or_triton")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("width", [1, 15, 16, 1023, 1024, 1025])
def test_every_instruction_set(isa, width, monkeypatch):
    order = ["generic", "avx2", "avx512", "avx512_bf16"]
    if order.index(isa) > order.index(native.load_library().best_isa()):
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("KDKERNELS_CPU_ISA", isa)
    g = torch.Generator().manual_seed(width)
    for dtype, normalize in itertools.product((FP32, BF16, FP16), (False, True)):
        if width == 1 and normalize:
            continue  # signs: the difference is 0 or 2, its gradient nothing but rounding
        states = [torch.randn(7, width, generator=g).to(dtype) for _ in range(3)]
        arguments = {
            "student_hidden": [states[0].requires_grad_()],
            "teacher_hidden": [states[1]],
            "teacher_text_hidden": [states[2]],
            "projections": None,
        }
        # The factor of a gradient scaler: a mean over wide rows lies among float16's subnormals.
        compare(arguments, dtype, impl="cpu", normalize=normalize, alpha=1.5, factor=torch.tensor(2.0**12))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trains", [True, False])
def test_reduction_none_carries_each_tokens_own_factor(impl, direction, trains):
    arguments = on_device(case(direction=direction), impl)
    for p in arguments["projections"]:
        p.requires_grad_(trains)
    factor = torch.rand(3, 5, generator=torch.Generator().manual_seed(3)).to(device_of(impl))
    exact = doubled(arguments)
    (fused_layer_mse_loss(**arguments, alpha=1.0, reduction="none", impl=impl) * factor).sum().backward()
    (fused_layer_mse_loss(**exact, alpha=1.0, reduction="none", impl="reference") * factor).sum().backward()
    for got, want in zip(gradients(arguments), gradients(exact), strict=True):
        assert (got is None) == (want is None)
        assert got is None or relative_error(got, want) < 1e-6


def test_reductions_fit_together():
    arguments, mask = case(), torch.tensor([True, False, True, True, False]).repeat(3, 1)
    each = fused_layer_mse_loss(**arguments, mask=mask, reduction="none")
    assert (each[~mask] == 0).all() and (each[mask] > 0).all()
    total = fused_layer_mse_loss(**arguments, mask=mask, reduction="sum")
    assert torch.allclose(each.sum(), total) and torch.allclose(
        total / mask.sum(), fused_layer_mse_loss(**arguments, mask=mask)
    )


def test_equals_torchs_mse_loss():
    arguments = case(pairs=1)
    [student], [teacher], [weight] = (arguments[k] for k in ("student_hidden", "teacher_hidden", "projections"))
    expected = torch.nn.functional.mse_loss(student @ weight.T, teacher)
    assert torch.allclose(fused_layer_mse_loss([student], [teacher], [weight]), expected, rtol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("direction", [*DIRECTIONS, "equal"])
def test_what_does_not_count_is_not_read(impl, direction):
    equal = direction == "equal"
    arguments = on_device(case(direction=DIRECTIONS[0] if equal else direction, equal=equal), impl)
    clean = doubled(arguments)
    mask, alpha = on_device([torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 5)], impl)
    mask[1, 2], alpha[2, 4] = False, 0.0
    for name in ("student_hidden", "teacher_hidden", "teacher_text_hidden"):
        for x in arguments[name]:
            x.data[1, 2] = float("nan")
    for x in arguments["teacher_text_hidden"]:
        x.data[2, 4] = float("nan")
    loss = fused_layer_mse_loss(**arguments, mask=mask, alpha=alpha, impl=impl)
    expected = fused_layer_mse_loss(**clean, mask=mask, alpha=alpha, impl="reference")
    loss.backward()
    expected.backward()
    assert relative_error(loss, expected) < 1e-6
    assert (arguments["student_hidden"][0].grad[1, 2] == 0).all()
    if impl != "reference":  # whose autograd multiplies the masked NaN by 0
        for got, want in zip(gradients(arguments), gradients(clean), strict=True):
            assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("leading", [(3, 5), (0,), ()])
def test_no_valid_token_gives_zero(impl, leading):
    arguments = on_device(case(leading=leading), impl)
    mask = torch.zeros(leading, dtype=torch.bool, device=device_of(impl))
    loss = fused_layer_mse_loss(**arguments, mask=mask, impl=impl)
    loss.backward()
    assert loss == 0 and all((g == 0).all() for g in gradients(arguments))


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_zero_vectors_have_no_direction(impl):
    student, teacher = on_device([torch.randn(4, 8).requires_grad_(), torch.randn(4, 8)], impl)
    student.data[0], teacher[1] = 0, 0
    each = fused_layer_mse_loss([student], [teacher], normalize=True, reduction="none", impl=impl)
    each.sum().backward()
    assert torch.allclose(each[:2], torch.full_like(each[:2], 1 / 8))
    assert (student.grad[:2] == 0).all() and (student.grad[2:] != 0).all()


def test_normalised_gradient_near_agreement():
    """1 - cos of nearly parallel vectors cancels; the squared difference of the unit vectors does not."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 64, generator=g)
    student = (teacher * 3 + 1e-4 * torch.randn(4, 64, generator=g)).requires_grad_()
    arguments = {"student_hidden": [student], "teacher_hidden": [teacher], "projections": None}
    exact = doubled(arguments)
    fused_layer_mse_loss(**arguments, normalize=True).backward()
    fused_layer_mse_loss(**exact, normalize=True).backward()
    # The inputs' own rounding, 6e-8 of 1, over a distance of 3e-5.
    assert relative_error(student.grad, exact["student_hidden"][0].grad) < 1e-2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float16_gradients_do_not_underflow(direction):
    """A mean over many tokens and a wide layer leaves 1e-8 a gradient, below float16's smallest number."""
    arguments = case(FP16, direction=direction, leading=(4096,), pairs=1)
    exact = doubled(arguments)
    (fused_layer_mse_loss(**arguments) * 2.0**12).backward()  # as a gradient scaler does
    (fused_layer_mse_loss(**exact) * 2.0**12).backward()
    for got, want in zip(gradients(arguments), gradients(exact), strict=True):
        assert relative_error(got, want) < 2e-3


def test_mixed_dtypes():
    arguments = case(BF16)
    arguments["projections"] = [p.detach().float().requires_grad_() for p in arguments["projections"]]
    arguments["teacher_hidden"] = [t.half() for t in arguments["teacher_hidden"]]
    arguments["teacher_text_hidden"] = [t.half() for t in arguments["teacher_text_hidden"]]
    compare(arguments, BF16, alpha=1.0)
    assert [g.dtype for g in gradients(arguments)] == [BF16, BF16, FP32, FP32]


def test_strided_states():
    arguments = case()
    whole = [torch.randn(5, 3, 2 * WIDTHS[0]) for _ in range(2)]
    arguments["student_hidden"] = [x[..., ::2].transpose(0, 1).detach().requires_grad_() for x in whole]
    compare(arguments, FP32, alpha=0.5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chunks_do_not_change_the_result(direction, monkeypatch):
    results = []
    for size in (256, 4):
        monkeypatch.setattr(layer_ops, "_CPU_SCRATCH_BYTES", 4 * size * WIDTHS[direction == DIRECTIONS[0]])
        arguments = case(direction=direction)
        loss = fused_layer_mse_loss(**arguments, alpha=1.0)
        loss.backward()
        results.append([loss, *gradients(arguments)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-6


def test_scratch_does_not_grow_with_the_tokens(monkeypatch):
    sizes = []
    take = layer_ops.take_scratch
    monkeypatch.setattr(layer_ops, "take_scratch", lambda size, device: sizes.append(size) or take(size, device))
    monkeypatch.setattr(layer_ops, "_CPU_SCRATCH_BYTES", 1 << 16)
    for n in (1000, 4000):
        fused_layer_mse_loss(**case(leading=(n,), pairs=1)).backward()
    assert sizes[0] == sizes[1] and (1 << 16) - 4 * WIDTHS[1] < sizes[0] <= 1 << 16


def test_nothing_is_computed_for_nothing(monkeypatch):
    calls = []
    for name in ("hidden_gradient", "add_weight_gradient"):
        monkeypatch.setattr(layer_ops, name, lambda *_, name=name, **__: calls.append(name))
    arguments = case(pairs=1)
    with torch.no_grad():
        fused_layer_mse_loss(**arguments)
    assert calls == []
    arguments["projections"][0].requires_grad_(False)
    fused_layer_mse_loss(**arguments)
    assert calls == ["hidden_gradient"]
    arguments["projections"][0].requires_grad_(True)
    arguments["student_hidden"][0].requires_grad_(False)
    fused_layer_mse_loss(**arguments)
    assert calls == ["hidden_gradient", "add_weight_gradient"]


def test_the_teacher_gets_no_gradient():
    arguments = case()
    for x in (*arguments["teacher_hidden"], *arguments["teacher_text_hidden"]):
        x.requires_grad_()
    fused_layer_mse_loss(**arguments, alpha=1.0).backward()
    assert all(x.grad is None for x in (*arguments["teacher_hidden"], *arguments["teacher_text_hidden"]))


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(direction, normalize):
    arguments = doubled(case(direction=direction, pairs=1, leading=(3,)))
    student, weight = arguments.pop("student_hidden")[0], arguments.pop("projections")[0]
    teacher = arguments.pop("teacher_hidden")
    assert torch.autograd.gradcheck(
        lambda s, p: fused_layer_mse_loss([s], teacher, [p], alpha=0.5, normalize=normalize, **arguments), (student, weight)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduced", [True, False])
def test_opcheck(direction, reduced):
    arguments = case(direction=direction, pairs=1, leading=(6,))
    student, audio, weight = (arguments[k][0] for k in ("student_hidden", "teacher_hidden", "projections"))
    valid = torch.tensor([True, True, False, True, True, True])
    grads = (True, True) if reduced else (False, False)
    tensors = (student, audio, None, weight, valid, torch.ones(1), torch.full((6,), 0.1))
    library.opcheck(layer_ops.layer_mse, (*tensors, direction == DIRECTIONS[1], False, reduced, *grads, "cpu"))


@pytest.mark.slow
def test_compiled_whole():
    arguments = case()
    eager = fused_layer_mse_loss(**arguments, alpha=1.0)
    compiled = torch.compile(lambda: fused_layer_mse_loss(**arguments, alpha=1.0), fullgraph=True)()
    assert torch.equal(eager, compiled)


WRONG = [
    ({"student_hidden": torch.zeros(2, 24)}, TypeError, "student_hidden: expected a list of tensors"),
    ({"student_hidden": []}, ValueError, "student_hidden: expected at least one layer"),
    ({"teacher_hidden": [torch.zeros(3, 5, 40)]}, ValueError, "teacher_hidden: expected 2 layers"),
    ({"teacher_hidden": [torch.zeros(3, 4, 40)] * 2}, ValueError, r"teacher_hidden\[0\]: expected leading shape \(3, 5\)"),
    ({"teacher_hidden": [torch.zeros(3, 5, 40).int()] * 2}, TypeError, r"teacher_hidden\[0\]: expected a floating"),
    ({"teacher_text_hidden": [torch.zeros(3, 5, 24)] * 2}, ValueError, r"teacher_text_hidden\[0\]: expected shape \(3, 5, 40\)"),
    ({"projections": None}, ValueError, r"projections\[0\]: expected a weight for widths 24 \(student\) and 40"),
    ({"projections": [torch.zeros(40, 24)]}, ValueError, "projections: expected 2"),
    ({"projections": [torch.zeros(24, 40)] * 2}, ValueError, r"projections\[0\]: expected shape \(40, 24\), got \(24, 40\)"),
    ({"alpha": -1.0}, ValueError, "alpha: expected a finite number >= 0"),
    ({"alpha": torch.full((3, 5), -1.0)}, ValueError, "alpha: expected finite values"),
    ({"alpha": torch.ones(5)}, ValueError, r"alpha: expected a number or a tensor \(3, 5\)"),
    ({"direction": "up"}, ValueError, "direction: expected one of student_to_teacher"),
    ({"normalize": 1}, TypeError, "normalize: expected a bool"),
    ({"mask": torch.ones(3, 5)}, TypeError, "mask: expected bool"),
    ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask: expected shape \(3, 5\)"),
    ({"layer_weight": [1.0]}, ValueError, "layer_weight: expected 2"),
    ({"layer_weight": [1.0, -1.0]}, ValueError, "layer_weight: expected finite numbers >= 0"),
    ({"layer_weight": torch.tensor([1.0, -1.0])}, ValueError, "layer_weight: expected finite numbers >= 0, got -1.0"),
    ({"layer_weight": torch.ones(2, device="meta")}, ValueError, "layer_weight: expected a tensor with values, got one on the"),
    ({"layer_weight": 0.5}, TypeError, "layer_weight: expected 2 numbers, one a layer, or a tensor, got float"),
    ({"projections": 3}, TypeError, "projections: expected a list of weights, one a layer, or None, got int"),
    ({"reduction": "average"}, ValueError, "reduction: expected one of mean"),
    ({"impl": "cuda"}, ValueError, "impl: expected 'auto'"),
    ({"impl": "fast"}, ValueError, "impl: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        fused_layer_mse_loss(**{**case(), **change})


def test_a_second_derivative_is_refused_and_not_0():
    arguments = case()
    states = [x.requires_grad_() for x in arguments["student_hidden"]]
    loss = fused_layer_mse_loss(**{**arguments, "student_hidden": states})
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, states, create_graph=True)


class TestLayerMap:
    def test_kinds(self):
        assert layer_map(28, 36, "top") == [(28, 36)]
        assert layer_map(28, 36, "skip", every=7) == [(7, 9), (14, 18), (21, 27), (28, 36)]
        assert layer_map(4, 2, "all") == [(1, 1), (2, 1), (3, 2), (4, 2)]
        assert layer_map(10, 30, "skip", every=4, embeddings=True) == [(0, 0), (2, 6), (6, 18), (10, 30)]
        assert layer_map(10, 30, [(0, 0), [3, 7]]) == [(0, 0), (3, 7)]

    @pytest.mark.parametrize(("s", "t"), [(1, 1), (3, 30), (30, 3), (28, 36)])
    def test_all_keeps_order_and_ends_at_the_top(self, s, t):
        pairs = layer_map(s, t)
        assert [a for a, _ in pairs] == list(range(1, s + 1)) and pairs[-1] == (s, t)
        teacher = [b for _, b in pairs]
        assert teacher == sorted(teacher) and min(teacher) >= 1

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((0, 3), ValueError, "student_layers: expected at least 1"),
            ((3, 3.5), TypeError, "teacher_layers: expected an int"),
            ((3, 3, "most"), ValueError, "kind: expected one of top, skip, all"),
            ((3, 3, [(4, 1)]), ValueError, r"kind: expected pairs in 0..3 and 0..3, got \(4, 1\)"),
            ((3, 3, [1, 2]), TypeError, "kind: expected pairs"),
            ((3, 3, []), ValueError, "at least one pair"),
        ],
    )
    def test_errors(self, arguments, error, message):
        with pytest.raises(error, match=message):
            layer_map(*arguments)


class TestLayerProjections:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_they_move(self, direction):
        """They are parameters from construction on: an optimiser made before the first step trains them."""
        torch.manual_seed(0)
        projections = LayerProjections(*WIDTHS, 2, direction=direction)
        optimizer = torch.optim.Adam(projections.parameters(), lr=1e-2)
        before = [w.detach().clone() for w in projections.weights]
        arguments = case(direction=direction)
        losses = []
        for _ in range(20):
            loss = projections([s.detach() for s in arguments["student_hidden"]], arguments["teacher_hidden"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(not torch.equal(a, b) for a, b in zip(before, projections.weights, strict=True))
        assert losses[-1] < 0.8 * losses[0]

    def test_saved_and_restored(self):
        one, other = (LayerProjections([8, 8], [8, 12], layer_map(2, 2), identity_where_equal=True) for _ in range(2))
        assert [w is None for w in one.weights] == [True, False] and one.pairs == [(1, 1), (2, 2)]
        assert list(one.state_dict()) == ["weight_1"]
        other.load_state_dict(one.state_dict())
        assert torch.equal(one.weights[1], other.weights[1])

    def test_initialisation(self):
        assert torch.equal(LayerProjections(6, 6, 1).weights[0], torch.eye(6))
        up, down = LayerProjections(6, 9, 1).weights[0], LayerProjections(9, 6, 1, dtype=torch.bfloat16).weights[0]
        assert torch.allclose(up.T @ up, torch.eye(6), atol=1e-6)
        assert torch.allclose((down @ down.T).float(), torch.eye(6), atol=2e-2)
        same = [LayerProjections(6, 9, 1, generator=torch.Generator().manual_seed(1)).weights[0] for _ in range(2)]
        assert torch.equal(*same)

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_fit_finds_a_linear_relation(self, direction):
        g = torch.Generator().manual_seed(0)
        projections = LayerProjections(*WIDTHS, 1, direction=direction)
        relation = torch.randn(projections.weights[0].shape, generator=g)
        x = torch.randn(200, relation.shape[1], generator=g)
        y = x @ relation.T
        student, teacher = (x, y) if direction == DIRECTIONS[0] else (y, x)
        projections.fit([student], [teacher], ridge=0.0)
        assert relative_error(projections.weights[0], relation) < 1e-5
        assert projections([student], [teacher]) < 1e-8

    def test_fit_with_fewer_tokens_than_dimensions(self):
        g = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(5, WIDTHS[0], generator=g), torch.randn(5, WIDTHS[1], generator=g)
        projections = LayerProjections(*WIDTHS, 1)
        before = projections([student], [teacher]).item()
        projections.fit([student], [teacher])
        assert all(w.isfinite().all() for w in projections.weights) and projections([student], [teacher]) < 0.1 * before

    @pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("normalize", [False, True])
    def test_bias(self, impl, direction, normalize):
        """P h + b, and the gradients of P, b and h, by the formula in float64; a pair of equal widths has neither."""
        device = device_of(impl)
        g = torch.Generator().manual_seed(3)
        projections = LayerProjections([24, 24], [40, 24], 2, direction=direction, identity_where_equal=True, bias=True)
        assert sorted(projections.state_dict()) == ["bias_0", "weight_0"]
        assert projections.biases[1] is None and not projections.biases[0].any()
        with torch.no_grad():
            projections.bias_0.normal_(generator=g)
        student, audio, text = ([torch.randn(7, w, generator=g) for w in widths] for widths in ((24, 24), (40, 24), (40, 24)))
        for hidden in student:
            hidden.requires_grad_()
        wanted = [x.detach().double().requires_grad_() for x in (projections.weight_0, projections.bias_0, *student)]
        weight, bias, *states = wanted
        expected = 0.0
        for i in range(2):
            target, hidden = 1.5 * audio[i].double() - 0.5 * text[i].double(), states[i]
            if i == 0 and direction == "student_to_teacher":
                hidden = hidden @ weight.T + bias
            elif i == 0:
                target = target @ weight.T + bias
            if normalize:
                target, hidden = (x / x.norm(dim=-1, keepdim=True) for x in (target, hidden))
            expected = expected + (hidden - target).square().mean()
        expected.backward()
        projections = projections.to(device)
        moved = [x.detach().to(device).requires_grad_() for x in student]
        audio, text = ([x.to(device) for x in each] for each in (audio, text))
        loss = projections(moved, audio, teacher_text_hidden=text, alpha=0.5, normalize=normalize, impl=impl)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for found, other in zip((projections.weight_0, projections.bias_0, *moved), wanted, strict=True):
            assert relative_error(found.grad.cpu(), other.grad) < 1e-5

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_fit_finds_a_bias(self, direction):
        g = torch.Generator().manual_seed(0)
        projections = LayerProjections(*WIDTHS, 1, direction=direction, bias=True)
        relation, shift = (torch.randn(x.shape, generator=g) for x in (projections.weights[0], projections.biases[0]))
        x = torch.randn(200, relation.shape[1], generator=g) + 3
        y = x @ relation.T + 5 * shift
        student, teacher = (x, y) if direction == DIRECTIONS[0] else (y, x)
        projections.fit([student], [teacher], ridge=0.0)
        assert relative_error(projections.weights[0], relation) < 1e-4
        assert relative_error(projections.biases[0], 5 * shift) < 1e-4

    def test_errors(self):
        with pytest.raises(ValueError, match="student_width: expected one number or 2, got 3"):
            LayerProjections([1, 2, 3], 4, 2)
        with pytest.raises(ValueError, match="pairs: expected at least one"):
            LayerProjections(4, 4, 0)
        with pytest.raises(ValueError, match="direction: expected one of"):
            LayerProjections(4, 4, 1, direction="down")
        projections = LayerProjections(4, 6, 1)
        with pytest.raises(TypeError, match="direction: expected at construction"):
            projections([torch.zeros(1, 4)], [torch.zeros(1, 6)], direction=DIRECTIONS[1])
        with pytest.raises(ValueError, match="expected finite states"):
            projections.fit([torch.full((2, 4), float("nan"))], [torch.zeros(2, 6)])


def test_the_backward_makes_no_tensors_of_zeros():
    """Autograd fills in zeros for outputs that are not differentiated, here as large as the gradients, unless told not to."""
    from kdkernels import fused_caad_loss, fused_linear_caad_loss

    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    hidden, weight, student, projection = leaf(40, 24), leaf(60, 24), leaf(40, 60), leaf(32, 24)
    states, target = torch.randn(40, 32), torch.randint(60, (40,))
    losses = {
        "rows": lambda: fused_caad_loss(student, torch.randn(40, 60), None, target),
        "linear": lambda: fused_linear_caad_loss(hidden, weight, states, None, torch.randn(60, 32), target),
        "layers": lambda: fused_layer_mse_loss([hidden], [states], [projection]),
    }
    large = {tuple(x.shape) for x in (hidden, weight, student, projection)}
    for name, make in losses.items():
        loss = make()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            loss.backward()
        filled = {tuple(e.input_shapes[0]) for e in profile.events() if e.name in ("aten::fill_", "aten::zero_")}
        assert not large & filled, name
