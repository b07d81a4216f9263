"""The cross-attention form of the layer loss, against a loop over rows in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdkernels import LayerAttention

STUDENT, TEACHER, PAIRS = 8, 12, 2
ROWS, LENGTHS, SEEN = 3, (4, 1, 3), (2, 5, 3)  # valid positions of each row, of student and teacher


def make(dtype=torch.float64, **options) -> LayerAttention:
    layers = LayerAttention(STUDENT, TEACHER, PAIRS, generator=torch.Generator().manual_seed(0), dtype=dtype, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in layers.parameters():  # away from the initial values, so that every part counts
            weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    return layers


def states(width: int, length: int, seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(ROWS, length, width, generator=generator, dtype=torch.float64) for _ in range(PAIRS)]
    return [3 * x.to(dtype) for x in made]


def mask(lengths, length: int) -> torch.Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def reference(layers, students, teachers, texts, *, alpha, normalize, layer_weight, lengths=LENGTHS, seen=SEEN):
    """The formula of the class, one position at a time; the sum over the valid positions."""
    total = 0.0
    for i, weight in enumerate(layer_weight):
        w_q, w_k, w_v = (getattr(layers, f"{part}_{i}") for part in ("query", "key", "value"))
        bias = getattr(layers, f"bias_{i}")
        for row in range(ROWS):
            t = teachers[i][row, : seen[row]]
            t = t if texts is None else (1 + alpha) * t - alpha * texts[i][row, : seen[row]]
            for s in students[i][row, : lengths[row]]:
                found = []
                for head in range(layers.heads):
                    part = slice(head * STUDENT // layers.heads, (head + 1) * STUDENT // layers.heads)
                    q = w_q[part] @ s / (s.square().mean() + 1e-6).sqrt()
                    scores = [q @ (w_k[part] @ x) / (x.square().mean() + 1e-6).sqrt() for x in t]
                    chances = torch.softmax(torch.stack(scores) / math.sqrt(STUDENT / layers.heads), 0)
                    found.append(sum(c * (w_v[part] @ x) for c, x in zip(chances, t, strict=True)))
                a = torch.cat(found) + (0 if bias is None else bias)
                if normalize:
                    s, a = s / s.norm(), a / a.norm()
                total = total + weight * (s - a).square().sum() / STUDENT
    return total


@pytest.mark.parametrize(
    ("heads", "bias", "alpha", "normalize"), [(1, False, 0.0, False), (2, True, 1.5, False), (4, True, 0.5, True)]
)
def test_value_and_gradients_are_those_of_a_loop(heads, bias, alpha, normalize):
    layers = make(heads=heads, bias=bias)
    students = [x.requires_grad_() for x in states(STUDENT, 4, 2)]
    teachers, texts = states(TEACHER, 5, 3), states(TEACHER, 5, 4)
    options = {"alpha": alpha, "normalize": normalize, "layer_weight": [1.0, 0.25]}
    given = {"mask": mask(LENGTHS, 4), "teacher_mask": mask(SEEN, 5), **options}
    leaves = [*students, *layers.parameters()]
    loss = layers(students, teachers, teacher_text_hidden=texts, **given)
    expected = reference(layers, students, teachers, texts, **options) / sum(LENGTHS)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other)
        assert other.abs().max() > 0  # every part trains
    by_position = layers(students, teachers, teacher_text_hidden=texts, reduction="none", **given)
    assert by_position.shape == (ROWS, 4) and bool((by_position[~given["mask"]] == 0).all())
    summed = layers(students, teachers, teacher_text_hidden=texts, reduction="sum", **given)
    torch.testing.assert_close(by_position.sum(), summed)
    torch.testing.assert_close(summed, expected * sum(LENGTHS))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_padding_has_no_influence(alpha):
    """NaN behind the valid positions, more columns, and a row that has no teacher: nothing changes."""
    layers = make(heads=2)

    def run(columns: int, filling: float):
        students, teachers, texts = states(STUDENT, 4, 2), states(TEACHER, 5, 3), states(TEACHER, 5, 4)
        sides = []
        for side, lengths in ((students, LENGTHS), (teachers, SEEN), (texts, SEEN)):
            wide = [F.pad(x, (0, 0, 0, columns - x.shape[1])) for x in side]
            sides.append([x.masked_fill(~mask(lengths, columns)[..., None], filling) for x in wide])
        students = [x.requires_grad_() for x in sides[0]]
        loss = layers(
            students, sides[1], teacher_text_hidden=sides[2], alpha=alpha, mask=mask(LENGTHS, columns),
            teacher_mask=mask(SEEN, columns),
        )  # fmt: skip
        grads = torch.autograd.grad(loss, [*students, *(p for p in layers.parameters())])
        return [loss, *(g[:, :4] for g in grads[:PAIRS]), *grads[PAIRS:]], grads[:PAIRS]

    plain, _ = run(5, 0.0)
    padded, by_student = run(9, math.nan)
    for one, other in zip(plain, padded, strict=True):
        torch.testing.assert_close(one, other)
    for grad in by_student:
        assert bool((grad[~mask(LENGTHS, 9)] == 0).all())

    alone = layers(states(STUDENT, 4, 2), states(TEACHER, 5, 3), mask=mask((4, 0, 3), 4), teacher_mask=mask((2, 0, 3), 5))
    without = layers(states(STUDENT, 4, 2), states(TEACHER, 5, 3), mask=mask(LENGTHS, 4), teacher_mask=mask((2, 0, 3), 5))
    torch.testing.assert_close(alone, without)  # what has nothing to attend to does not count


def test_where_nothing_counts_the_loss_and_its_gradients_are_zero():
    layers = make(bias=True)
    students = [x.requires_grad_() for x in states(STUDENT, 4, 2)]
    nothing = torch.zeros(ROWS, 4, dtype=torch.bool)
    loss = layers(students, states(TEACHER, 4, 3), mask=nothing)
    loss.backward()
    assert loss == 0 and all(bool((x.grad == 0).all()) for x in (*students, *layers.parameters()))


def test_the_order_of_the_teachers_positions_does_not_matter_and_teachers_get_no_gradient():
    layers = make()
    teachers = [x.requires_grad_() for x in states(TEACHER, 5, 3)]
    loss = layers(states(STUDENT, 4, 2), teachers)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(layers(states(STUDENT, 4, 2), [x[:, order] for x in teachers]), loss)
    loss.backward()
    assert all(x.grad is None for x in teachers)


def test_a_zero_state_gets_no_gradient_from_its_direction():
    layers = make()
    students = [torch.zeros(ROWS, 4, STUDENT, dtype=torch.float64, requires_grad=True) for _ in range(PAIRS)]
    loss = layers(students, states(TEACHER, 4, 3), normalize=True)
    loss.backward()
    assert bool(loss.isfinite())
    for s in students:
        assert bool(s.grad.isfinite().all()) and s.grad.abs().max() < 1e3


def test_low_precision_is_no_worse_than_its_states():
    """bf16 states and weights: the error is that of rounding them, not of what the loss does with them."""
    exact = make()
    students, teachers = states(STUDENT, 4, 2), states(TEACHER, 5, 3)
    expected = exact(students, teachers)
    rounded = make(torch.bfloat16)
    low = rounded([x.bfloat16() for x in students], [x.bfloat16() for x in teachers])
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, rtol=0.03, atol=0)


def test_its_parts_train_from_the_first_step():
    layers = LayerAttention(STUDENT, TEACHER, [(1, 2), (3, 6)], bias=True, generator=torch.Generator().manual_seed(0))
    parts = ("query", "key", "value", "bias")
    assert [name for name, _ in layers.named_parameters()] == [f"{part}_{i}" for i in (0, 1) for part in parts]
    before = {name: p.detach().clone() for name, p in layers.named_parameters()}
    students, teachers = states(STUDENT, 4, 2, torch.float32), states(TEACHER, 5, 3, torch.float32)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = layers(students, teachers)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == 1:
            assert all(not torch.equal(p, before[name]) for name, p in layers.named_parameters())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"heads": 3}, {}, r"heads: expected a divisor of the student's width 8, got 3"),
        ({"heads": 0}, {}, r"heads: expected a divisor"),
        ({}, {"student_hidden": [torch.zeros(3, 4, 8)]}, r"student_hidden: expected 2 layers"),
        ({}, {"student_hidden": [torch.zeros(4, 8)] * 2}, r"student_hidden\[0\]: expected \(rows, positions, width\)"),
        ({}, {"student_hidden": [torch.zeros(3, 4, 8), torch.zeros(3, 4, 9)]}, r"student_hidden\[1\]: expected width 8, got 9"),
        ({}, {"teacher_hidden": [torch.zeros(2, 5, 12)] * 2}, r"teacher_hidden\[0\]: expected 3 rows as student_"),
        ({}, {"teacher_text_hidden": [torch.zeros(3, 4, 12)] * 2}, r"teacher_text_hidden\[0\]: expected shape \(3, 5, 12\)"),
        ({}, {"mask": torch.ones(3, 5, dtype=torch.bool)}, r"mask: expected shape \(3, 4\), got \(3, 5\)"),
        ({}, {"teacher_mask": torch.ones(3, 4, dtype=torch.bool)}, r"teacher_mask: expected shape \(3, 5\), got \(3, 4\)"),
        ({}, {"mask": torch.ones(3, 4)}, r"mask: expected bool, got torch.float32"),
        ({}, {"alpha": -1.0}, r"alpha: expected"),
        ({}, {"reduction": "max"}, r"reduction: expected one of"),
        ({}, {"normalize": 1}, r"normalize: expected a bool, got int"),
        ({}, {"layer_weight": [1.0]}, r"layer_weight: "),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options, changes, message):
    given = {"student_hidden": [torch.zeros(3, 4, 8)] * 2, "teacher_hidden": [torch.zeros(3, 5, 12)] * 2, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        LayerAttention(STUDENT, TEACHER, PAIRS, **options)(given.pop("student_hidden"), given.pop("teacher_hidden"), **given)
