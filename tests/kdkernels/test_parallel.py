"""Vocabulary-parallel loss over gloo: loss, gradients and statistics against one device in float64."""

import re

import pytest
import torch
import torch.distributed as dist
from cases import hidden, relative_error
from ranks import run_ranks

from kdkernels import fused_linear_caad_loss, parallel
from kdkernels.parallel import vocabulary_rows

VOCAB = 61
SIZES = {
    "two": [(31, 31), (30, 33)],
    "three_uneven": [(20, 20), (11, 11), (30, 33)],
    "four_one_empty": [(23, 23), (0, 0), (15, 15), (23, 26)],
}
CASES = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "alpha_per_token": {"alpha": torch.linspace(0, 3, 23), "temperature": 1.0},
    "plausibility": {"plausibility": 0.2},
    "reverse_kl_alpha_0": {"divergence": "reverse_kl", "alpha": 0.0, "temperature": 0.5},
    "jsd_plausibility": {"divergence": "jsd", "plausibility": 0.05, "return_stats": True},
    "softcaps": {"student_softcap": 4.0, "teacher_softcap": 6.0, "student_logit_scale": 0.7},
    "vocab_size": {"vocab_size": 40},
    "unreduced": {"reduction": "none"},
    "statistics": {"return_stats": True},
    "unreduced_jsd": {"reduction": "none", "divergence": "jsd"},
    "ce_only": {"kd_weight": 0.0},
    "eager": {"impl": "reference", "plausibility": 0.2},
}
if not torch.cuda.is_available():  # the ranks' tensors are on the CPU, where Triton runs in its interpreter alone
    CASES["ce_only_plausibility"] = {"kd_weight": 0.0, "plausibility": 0.2, "impl": "triton"}
    CASES["triton"] = {"impl": "triton", "plausibility": 0.2}


def arguments():
    out = hidden(teacher_vocab=64)
    out["target"] = out["target"].clamp(max=39)
    out["student_weight"].requires_grad_()
    out["student_bias"] = torch.linspace(-1, 1, VOCAB).requires_grad_()
    return out


def run(inputs, options, wanted=("student_hidden", "student_weight", "student_bias")):
    inputs = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in inputs.items()}
    loss = fused_linear_caad_loss(**inputs, **options)
    stats = None
    if isinstance(loss, tuple):
        loss, stats = loss
    loss.backward(torch.linspace(1, 2, 23).to(loss.dtype) if loss.dim() else torch.tensor(1.5, dtype=loss.dtype))
    return loss.detach(), [inputs[k].grad for k in wanted], stats


def agree(failures, sizes):
    rank = dist.get_rank()
    group = dist.group.WORLD
    first = sum(s for s, _ in sizes[:rank])
    rows_s, rows_t = sizes[rank]
    for name, options in CASES.items():
        whole = arguments()
        double = {k: x.double() if x.is_floating_point() else x for k, x in whole.items()}
        expected, expected_grads, expected_stats = run(double, {**options, "impl": "reference"})
        shard = dict(whole)
        shard["student_weight"] = whole["student_weight"].detach()[first : first + rows_s].requires_grad_()
        shard["student_bias"] = whole["student_bias"].detach()[first : first + rows_s].requires_grad_()
        shard["teacher_weight"] = whole["teacher_weight"][first : first + rows_t]
        loss, grads, stats = run(shard, {**options, "process_group": group, "chunk_tokens": 7})
        mine = slice(first, first + rows_s)
        expected_grads[1:] = [g[mine] for g in expected_grads[1:]]
        errors = [relative_error(loss, expected)]
        # A slice beyond vocab_size has no gradient at all.
        errors += [
            relative_error(g, e) if e.abs().sum() else float(g.abs().sum())
            for g, e in zip(grads, expected_grads, strict=True)
            if e.numel()
        ]
        if stats is not None:
            errors += [relative_error(x, e) for x, e in zip(stats, expected_stats, strict=True)]
        if not max(errors) < 1e-5:
            failures.put(f"rank {rank} {name}: {errors}")
    try:
        run({**shard, "teacher_weight": whole["teacher_weight"][: 10 + rank]}, {"process_group": group})
        failures.put("shards that do not line up were accepted")
    except ValueError as error:
        if "same id on every rank" not in str(error):
            failures.put(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ranks_agree_with_one_device(sizes):
    run_ranks(agree, len(sizes), sizes)


def far_apart(failures, sizes):
    """Student and teacher have their mass on different ranks, at logits that only a merge of maxima keeps finite."""
    rank, whole = dist.get_rank(), arguments()
    rows_s = sum(s for s, _ in sizes[:rank]), sum(s for s, _ in sizes[: rank + 1])
    rows_t = sum(t for _, t in sizes[:rank]), sum(t for _, t in sizes[: rank + 1])
    bias_s, bias_t = torch.zeros(VOCAB), torch.zeros(64)
    bias_s[40:] += 90.0
    bias_t[:20] += 60.0
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        options = {"divergence": divergence, "temperature": 1.0, "return_stats": True}
        double = {k: x.double() if x.is_floating_point() else x for k, x in whole.items()}
        double |= {"student_bias": bias_s.double(), "teacher_bias": bias_t.double()}
        expected, grads, stats = run(double, {**options, "impl": "reference"}, ("student_hidden", "student_weight"))
        shard = {**whole, "student_bias": bias_s[slice(*rows_s)], "teacher_bias": bias_t[slice(*rows_t)]}
        shard["student_weight"] = whole["student_weight"].detach()[slice(*rows_s)].requires_grad_()
        shard["teacher_weight"] = whole["teacher_weight"][slice(*rows_t)]
        loss, mine, mine_stats = run(
            shard, {**options, "process_group": dist.group.WORLD}, ("student_hidden", "student_weight")
        )
        errors = [relative_error(loss, expected), relative_error(mine[0], grads[0])]
        errors += [relative_error(x, e) for x, e in zip(mine_stats, stats, strict=True)]
        if grads[1][slice(*rows_s)].norm() > 1e-6:
            errors.append(relative_error(mine[1], grads[1][slice(*rows_s)]))
        if not max(errors) < 1e-5:
            failures.put(f"rank {rank} {divergence}: {errors}")


def test_mass_on_different_ranks():
    run_ranks(far_apart, 3, SIZES["three_uneven"])


def dtensors(failures):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = arguments()
    whole["teacher_weight"] = whole["teacher_weight"][:62]
    expected, expected_grads, _ = run(whole, {"impl": "reference"})
    shared = {k: whole[k] for k in ("student_hidden", "teacher_audio_hidden", "teacher_text_hidden", "target")}

    # DTensors, cut by DTensor itself: slices of 61 and of 62 ids start at the same ones on two and on four ranks.
    sharded = {
        k: distribute_tensor(whole[k].detach(), mesh, [Shard(0)]).requires_grad_(whole[k].requires_grad)
        for k in ("student_weight", "student_bias", "teacher_weight")
    }
    loss, grads, _ = run({**shared, **sharded}, {})
    if not all(isinstance(g, DTensor) and g.placements == (Shard(0),) for g in grads[1:]):
        failures.put(f"gradients of DTensors: {grads}")
    errors = [relative_error(loss, expected), relative_error(grads[0], expected_grads[0])]
    errors += [relative_error(g.full_tensor(), e) for g, e in zip(grads[1:], expected_grads[1:], strict=True)]

    # A mesh as the group; rows by vocabulary_rows, for a teacher whose padding would move DTensor's own cuts.
    mine = vocabulary_rows(VOCAB, mesh)
    padded = torch.cat([whole["teacher_weight"], torch.zeros(40, whole["teacher_weight"].shape[1])])
    cut = {k: whole[k].detach()[mine].requires_grad_() for k in ("student_weight", "student_bias")}
    cut["teacher_weight"] = padded[vocabulary_rows(VOCAB, mesh, rows=len(padded))]
    local, local_grads, _ = run({**shared, **cut}, {"process_group": mesh, "vocab_size": VOCAB})
    errors += [relative_error(local, expected), relative_error(local_grads[0], expected_grads[0])]
    errors += [relative_error(g, e[mine]) for g, e in zip(local_grads[1:], expected_grads[1:], strict=True)]
    if not max(errors) < 1e-5:
        failures.put(f"rank {dist.get_rank()}: {errors}")

    refused = [
        ({**sharded, "teacher_weight": whole["teacher_weight"]}, {}, "teacher_weight: expected a DTensor beside"),
        ({**sharded, "student_weight": distribute_tensor(whole["student_weight"].detach(), mesh, [Replicate()])}, {},
         "student_weight: expected a plain tensor, or a DTensor with placements"),
        ({**sharded, "student_hidden": distribute_tensor(whole["student_hidden"].detach(), mesh, [Replicate()])}, {},
         "student_hidden: expected a plain tensor, the same on every rank, got a DTensor"),
        (sharded, {"process_group": "tp"}, "process_group: expected a torch.distributed.ProcessGroup"),
    ]  # fmt: skip
    for changed, options, message in refused:
        try:
            run({**shared, **changed}, options)
            failures.put(f"accepted: {message}")
        except TypeError as error:
            if message not in str(error):
                failures.put(f"{message!r} expected, got {error}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_device_mesh_and_dtensors(ranks):
    run_ranks(dtensors, ranks)


def counted(failures):
    """Collectives of a call: sizes, chunks, one a chunk for the rows, one for dh; jsd and plausibility one more a chunk."""
    counts = dict.fromkeys(("all_reduce", "all_gather"), 0)

    def counting(name):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    for name in counts:
        setattr(dist, name, counting(name))
    whole = arguments()
    mine = vocabulary_rows(VOCAB, dist.group.WORLD)
    shard = {k: x[mine].detach() if k in ("student_weight", "student_bias") else x for k, x in whole.items()}
    shard["teacher_weight"] = whole["teacher_weight"][vocabulary_rows(VOCAB, dist.group.WORLD, rows=64)]
    for options, more in (({}, 0), ({"return_stats": True}, 0), ({"divergence": "jsd"}, 1), ({"plausibility": 0.1}, 1)):
        counts.update(dict.fromkeys(counts, 0))
        run(shard, {**options, "process_group": dist.group.WORLD, "chunk_tokens": 6}, ("student_hidden",))
        chunks = 4  # 22 valid tokens
        expected = {"all_gather": 1 + chunks, "all_reduce": 2 + more * chunks}
        if counts != expected:
            failures.put(f"{options}: {counts} calls, expected {expected}")


def test_one_collective_a_chunk():
    run_ranks(counted, 2)


def unlike(failures):
    """Ranks that would cut the tokens otherwise: another default workspace, another number of ids within it, none at all."""
    from kdkernels.ops import chunking

    rank, group, whole = dist.get_rank(), dist.group.WORLD, arguments()
    mine = vocabulary_rows(VOCAB, group)
    shard = {k: x[mine].detach() if k in ("student_weight", "student_bias") else x for k, x in whole.items()}
    shard["teacher_weight"] = whole["teacher_weight"][vocabulary_rows(VOCAB, group, rows=64)]
    one = {"process_group": group, "vocab_size": 40}
    expected, expected_grads, _ = run(whole, {"vocab_size": 40, "impl": "reference"}, ("student_hidden",))
    default = chunking.default_workspace_bytes
    for bytes_here, options in ((4000 + 4000 * rank, {}), (None, {"workspace_bytes": 4000})):
        chunking.default_workspace_bytes = default if bytes_here is None else lambda device, n=bytes_here: n
        loss, grads, _ = run(shard, {**one, **options}, ("student_hidden",))
        errors = [relative_error(loss, expected), relative_error(grads[0], expected_grads[0])]
        if not max(errors) < 1e-5:
            failures.put(f"rank {rank} {options}: {errors}")
    chunking.default_workspace_bytes = lambda device: 4000 * rank
    by_token = ("student_hidden", "teacher_audio_hidden", "teacher_text_hidden", "target")
    fewer = {k: x[: 9 + rank] if k in by_token else x for k, x in shard.items()}
    message = "workspace_bytes: expected room .* none on another" if rank else "out of memory: one token's logits"
    for wrong, expected_message in ((shard, message), (fewer, r"the same tokens on every rank of process_group, got \[9, 10\]")):
        try:
            run(wrong, one, ("student_hidden",))
            failures.put(f"rank {rank}: accepted")
        except ValueError as error:
            if not re.search(expected_message, str(error)):
                failures.put(f"rank {rank}: {error}")


def test_ranks_with_other_workspaces_make_the_same_chunks():
    run_ranks(unlike, 2)


def test_rows_of_a_rank(monkeypatch):
    monkeypatch.setattr(parallel, "as_group", lambda group: group)
    monkeypatch.setattr(dist, "get_world_size", lambda group: group[1])
    monkeypatch.setattr(dist, "get_rank", lambda group: group[0])

    def cut(vocab, ranks, rows=None):
        return [(x.start, x.stop) for x in (vocabulary_rows(vocab, (rank, ranks), rows=rows) for rank in range(ranks))]

    assert cut(10, 4) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert cut(10, 4, rows=14) == [(0, 3), (3, 6), (6, 9), (9, 14)]
    assert cut(10, 4, rows=7) == [(0, 3), (3, 6), (6, 7), (7, 7)]
    assert cut(5, 4) == [(0, 2), (2, 4), (4, 5), (5, 5)] and cut(5, 4, rows=9)[2:] == [(4, 9), (6, 6)]
    with pytest.raises(ValueError, match="vocab: expected at least 1, got 0"):
        cut(0, 2)


def compiled(failures):
    """One graph, collectives and all: what eager gives, also of a second shape, of changing numbers and of a head that trains."""
    whole = arguments()
    mine = vocabulary_rows(VOCAB, dist.group.WORLD)
    shard = {k: x[mine].detach() if k in ("student_weight", "student_bias") else x for k, x in whole.items()}
    shard["teacher_weight"] = whole["teacher_weight"][vocabulary_rows(VOCAB, dist.group.WORLD, rows=64)]
    shard["student_weight"].requires_grad_()

    def loss_of(inputs, temperature, reduction):
        return fused_linear_caad_loss(
            **inputs, temperature=temperature, reduction=reduction, process_group=dist.group.WORLD
        )

    def step(of, inputs, *options):
        inputs = {k: x.detach().requires_grad_(x.requires_grad) for k, x in inputs.items()}
        loss = of(inputs, *options)
        return loss, *torch.autograd.grad(loss.sum(), [inputs["student_hidden"], inputs["student_weight"]])

    graph = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    of_tokens = ("student_hidden", "teacher_audio_hidden", "teacher_text_hidden", "target")
    fewer = {k: x[:9].detach().requires_grad_(x.requires_grad) if k in of_tokens else x for k, x in shard.items()}
    for inputs, *options in ((shard, 2.0, "mean"), (fewer, 2.0, "mean"), (fewer, 3.0, "none")):
        expected, got = step(loss_of, inputs, *options), step(graph, inputs, *options)
        errors = [relative_error(x, e) for x, e in zip(got, expected, strict=True)]
        if not max(errors) < 1e-6:
            failures.put(f"rank {dist.get_rank()}, {len(inputs['target'])} tokens, {options}: {errors}")


@pytest.mark.slow
def test_a_compiled_call_on_two_ranks():
    run_ranks(compiled, 2)
