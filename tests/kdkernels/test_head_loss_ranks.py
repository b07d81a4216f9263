"""HeadLoss and CAADTrainer on two ranks: DDP, FSDP2 with the head in its own group or the root's, against one device."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers", reason="the student is tested on transformers' own model classes")
import tiny_lms
from cases import relative_error
from ranks import run_ranks

from kdkernels import DualPathTeacher, LMHead, MaskFeatures, answer_index, fused_linear_caad_loss
from kdkernels.head_loss import HeadLoss

ROWS = 8
STEPS = 2


def speech_lm(seed):
    torch.manual_seed(seed)
    return tiny_lms.voxtral()[0]


def batch_of(rows):
    """Some rows of one fixed batch, whose answers differ in length."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 80, (ROWS, tiny_lms.LENGTH), generator=generator)
    ids[:, 2:6] = tiny_lms.AUDIO_TOKEN
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : 12 + row % 5] = -100
    features = torch.randn(ROWS, 8, 32, generator=generator)
    inputs = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "input_features": features[rows]}
    return inputs, labels[rows]


def train(model, wrapped, rows_by_part, *, scale, total):
    """STEPS of SGD on the fused loss; (losses, gradients of the last step)."""
    teacher = DualPathTeacher(speech_lm(1), negative=MaskFeatures("input_features"))
    at_head = HeadLoss(model)
    # Not AdamW: its first step is the gradient's sign, which magnifies rounding wherever that is nearly 0.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        step_loss = torch.zeros(())
        for part, rows in enumerate(rows_by_part):
            inputs, labels = batch_of(rows)
            index, target = answer_index(labels)
            states = teacher(inputs, index)

            def loss(hidden, weight, bias, states=states, target=target):
                return fused_linear_caad_loss(
                    hidden,
                    weight,
                    states.audio_hidden,
                    states.text_hidden,
                    target=target,
                    student_bias=bias,
                    kd_normalizer=total,
                    ce_normalizer=total,
                    **teacher.head.keywords("teacher"),
                )

            with sync(wrapped, part == len(rows_by_part) - 1):
                value = at_head(wrapped, inputs, index, loss) * scale
                value.backward()
            step_loss += value.detach() / scale
        optimizer.step()
        losses.append(step_loss)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sync(wrapped, last):
    ddp = isinstance(wrapped, nn.parallel.DistributedDataParallel)
    return wrapped.no_sync() if ddp and not last else contextlib.nullcontext()


def shard(model, how):
    from torch.distributed.fsdp import fully_shard

    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    if how == "fsdp2_head_apart":
        fully_shard(model.get_output_embeddings(), reshard_after_forward=True)
    return fully_shard(model)


def ranks_against_one_device(failures):
    rank, size = dist.get_rank(), dist.get_world_size()
    everything = list(range(ROWS))
    total = sum(int((batch_of([row])[1][:, 1:] != -100).sum()) for row in everything)

    def student(trains_head):
        model = speech_lm(0)
        model.get_output_embeddings().requires_grad_(trains_head)
        return model.train()

    for trains_head in (False, True):
        expected_losses, expected = train(one := student(trains_head), one, [everything], scale=1, total=total)
        for how in ("ddp", "fsdp2", "fsdp2_head_apart"):
            model = student(trains_head)
            wrapped = shard(model, how)
            mine = everything[rank::size]
            losses, gradients = train(model, wrapped, [mine[:3], mine[3:]], scale=size, total=total)
            for value in losses:
                dist.all_reduce(value)
            errors = {f"loss {n}": relative_error(a, b) for n, (a, b) in enumerate(zip(losses, expected_losses, strict=True))}
            if gradients.keys() != expected.keys():
                failures.put(f"{how}: gradients of {sorted(gradients.keys() ^ expected.keys())}")
                continue
            if how != "ddp" and not all(hasattr(gradient, "placements") for gradient in gradients.values()):
                failures.put(f"{how}: a gradient that is not sharded")
            largest = max(float(g.norm()) for g in expected.values())
            for name, gradient in gradients.items():
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                errors[name] = float((whole - expected[name]).norm()) / largest
            bad = {name: error for name, error in errors.items() if not error < 2e-5}
            if bad:
                failures.put(f"rank {rank} {how} trains_head={trains_head}: {bad}")


@pytest.mark.slow
def test_loss_and_gradients_of_one_device():
    run_ranks(ranks_against_one_device, 2)


def gathered_teacher(failures):
    """A sharded teacher: its body runs by FSDP's hooks, its head is gathered once."""
    from torch.distributed.fsdp import fully_shard

    inputs, labels = batch_of(range(4))
    index, _ = answer_index(labels)
    expected = DualPathTeacher(speech_lm(1), negative=MaskFeatures("input_features"))(inputs, index)
    model = speech_lm(1).requires_grad_(False)
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    try:
        DualPathTeacher(model, negative=None)
        failures.put("a sharded head was taken for a whole one")
    except TypeError as error:
        if "its weight is a DTensor sharded" not in str(error):
            failures.put(str(error))
    head = LMHead.from_model(model, gather=True)
    states = DualPathTeacher(model, negative=MaskFeatures("input_features"), head=head)(inputs, index)
    whole = speech_lm(1).get_output_embeddings().weight
    if not torch.equal(head.weight, whole) or relative_error(states.text_hidden, expected.text_hidden) > 1e-6:
        failures.put("the sharded teacher says something else")


@pytest.mark.slow
def test_sharded_teacher():
    run_ranks(gathered_teacher, 2)


def partitioned(model):
    """A teacher as transformers leaves it that loads it after TrainingArguments with ZeRO-3: its weights are in parts."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path={"train_batch_size": dist.get_world_size()})
    head = LMHead.from_model(model, gather=True)
    return DualPathTeacher(model, negative=MaskFeatures("input_features"), head=head)


def trainer_on_ranks(failures, folder, options, lora=()):
    from tests.kdkernels.integrations import test_trainer as cases

    # Made first: what is made after TrainingArguments with ZeRO-3 is drawn otherwise.
    students, teachers = [cases.speech_lm() for _ in range(2)], [cases.dual_path() for _ in range(2)]
    if lora:
        import peft

        config = peft.LoraConfig(r=2, target_modules=list(lora), task_type="CAUSAL_LM", init_lora_weights=False)
        for i in range(2):
            torch.manual_seed(0)
            students[i] = peft.get_peft_model(students[i], config)
    if "deepspeed" in options:
        teachers = [partitioned(teacher.model) for teacher in teachers]

    def trainer():
        parts = 4 // dist.get_world_size()
        args = cases.arguments(
            Path(folder), per_device_train_batch_size=1, gradient_accumulation_steps=parts, optim="sgd", **options
        )
        if "fsdp" in options:
            shard_on_a_cpu()
        made = cases.CAADTrainer(
            students.pop(),
            args,
            teacher=teachers.pop(),
            data_collator=cases.Recorder(),
            train_dataset=cases.examples(),
            eval_dataset=cases.examples(7),  # not a multiple: the last batch is filled up with duplicates
        )
        if made.is_fsdp_enabled != ("fsdp" in options):
            failures.put(f"FSDP: {made.accelerator.distributed_type}")
        return made

    if "fsdp" in options:  # accelerate shards a model together with its optimiser: not before train()
        options = {**options, "eval_on_start": True}
        (training := trainer()).train()
        evaluated = next(line for line in training.state.log_history if "eval_loss" in line)
    else:
        evaluated = (evaluating := trainer()).evaluate()
        (training := trainer()).train()
    if dist.get_world_size() > 1 and not options:
        try:
            evaluating.train()
            failures.put("a model that DDP does not wrap was trained")
        except RuntimeError as error:
            if "expected it in DistributedDataParallel" not in str(error):
                failures.put(str(error))
    kd = [line["kd"] for line in training.state.log_history if "loss" in line]
    return [evaluated["eval_loss"], evaluated["eval_kd"], *cases.logged(training), *kd]


def a_rank_with_a_bad_row(failures, folder, options):
    """All ranks stop before the step and name the same samples."""
    from tests.kdkernels.integrations import test_trainer as cases

    rows = cases.examples(8)
    rows[6]["input_features"] = rows[6]["input_features"] * float("nan")
    model = cases.speech_lm()
    args = cases.arguments(Path(folder), train_sampling_strategy="sequential", gradient_accumulation_steps=1, **options)
    if "fsdp" in options:
        shard_on_a_cpu()
    trainer = cases.CAADTrainer(
        model,
        args,
        teacher=cases.dual_path(),
        data_collator=cases.Recorder(),
        train_dataset=rows,
    )
    if trainer.is_fsdp_enabled != ("fsdp" in options):
        failures.put(f"FSDP: {trainer.accelerator.distributed_type}")
    try:
        trainer.train()
    except FloatingPointError as error:
        return [trainer.state.global_step, str(error).split("; ")[0], str(error).split("Samples: ")[1]]
    failures.put("a loss of NaN was trained on")


def shard_on_a_cpu():
    """accelerate ignores FSDP on CPUs and goes on with DDP; told that there are several GPUs, it shards on the CPU's mesh."""
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


FSDP2 = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


@pytest.mark.slow
def test_trainer_on_two_ranks_is_the_trainer_on_one(tmp_path):
    (whole,) = run_ranks(trainer_on_ranks, 1, str(tmp_path), {})
    assert len(set(whole)) == 10
    for options in ({}, FSDP2):
        for found in run_ranks(trainer_on_ranks, 2, str(tmp_path), options):
            assert found == pytest.approx(whole, rel=1e-4), options


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path):
    # Two rows a rank and step: row 6 is in the second step, on the second rank.
    for options, samples in (({}, "clip-6"), (FSDP2, "clip-6, clip-7")):
        found = run_ranks(a_rank_with_a_bad_row, 2, str(tmp_path), options)
        assert found == [[1, "optimiser step 2: expected a finite loss and gradient, got loss nan", samples]] * 2


ZERO3 = {
    "deepspeed": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",  # accelerate would clip at 1
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
}


def trainer_by_deepspeed(failures, folder, lora):
    os.environ["DS_ACCELERATOR"] = "cpu"
    return trainer_on_ranks(failures, folder, ZERO3, lora)


@pytest.mark.parametrize("lora", [(), ("q_proj", "v_proj")])
def test_trainer_by_deepspeed_zero3_is_the_trainer_on_one(tmp_path, lora):
    """DeepSpeed's own engine has the weights of body and head in parts: of a student that trains, or of a LoRA's frozen base."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    (whole,) = run_ranks(trainer_on_ranks, 1, str(tmp_path), {}, lora)
    assert len(set(whole)) == 10
    for found in run_ranks(trainer_by_deepspeed, 2, str(tmp_path), lora):
        assert found == pytest.approx(whole, rel=1e-4)


def test_a_lora_that_trains_on_the_head_is_refused_under_zero3(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    with pytest.raises(Exception, match="its weights train and ZeRO-3 has them partitioned"):
        run_ranks(trainer_by_deepspeed, 2, str(tmp_path), ("lm_head",))


def on_policy_on_ranks(failures, folder, options, lora=()):
    """Losses and lengths of the student's answers. In the first step it answers no row of the second rank."""
    from kdkernels import CAADOptions, OnPolicy, Sampling
    from tests.kdkernels.integrations import test_trainer as cases

    if "deepspeed" in options:
        os.environ["DS_ACCELERATOR"] = "cpu"
    model, teacher = cases.speech_lm(), cases.dual_path()
    if lora:
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=list(lora), task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    args = cases.arguments(
        Path(folder), per_device_train_batch_size=1, gradient_accumulation_steps=4 // dist.get_world_size(), optim="sgd",
        train_sampling_strategy="sequential", learning_rate=0.3, **options,
    )  # fmt: skip
    if "fsdp" in options:
        shard_on_a_cpu()
    trainer = cases.CAADTrainer(
        model,
        args,
        teacher=teacher,
        options=CAADOptions(kd_weight=0.6),
        on_policy=OnPolicy(fraction=0.5, end_token_ids=tuple(range(9, 40)), sampling=Sampling(temperature=0, max_new_tokens=5)),
        data_collator=cases.Recorder(),
        train_dataset=cases.examples(16),
    )
    answers, counts = trainer._own_answers, []
    put_into, draws = answers.put_into, answers._draws

    def counting(step, batches):
        made = put_into(step, batches)
        counts.append(answers.counts[0])
        return made

    def of_whole_step(step, first, rows, count, what):
        numbers = (first + torch.arange(rows)) * dist.get_world_size() + dist.get_rank()  # the same on any number of ranks
        return (numbers % 2 * (step == 1)).double()[:, None] if what == "row" else draws(step, first, rows, count, what)

    answers.put_into, answers._draws = counting, of_whole_step
    trainer.train()
    if dist.get_world_size() > 1 and counts != ([2, 2, 2, 2] if dist.get_rank() == 0 else [0, 2, 2, 2]):
        failures.put(f"{options}: {counts} answers")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [value for line in lines for value in (line["loss"], line["answer_tokens"], line["answer_ends"])]


def zero(stage):
    return {"deepspeed": {**ZERO3["deepspeed"], "zero_optimization": {**ZERO3["deepspeed"]["zero_optimization"], "stage": stage}}}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("q_proj", "v_proj")])
def test_on_policy_on_two_ranks_is_that_on_one(tmp_path, lora):
    (whole,) = run_ranks(on_policy_on_ranks, 1, str(tmp_path), {}, lora)
    assert len(set(whole[::3])) == 4 and len(set(whole[1::3])) > 1
    for options in ({}, FSDP2):
        for found in run_ranks(on_policy_on_ranks, 2, str(tmp_path), options, lora):
            assert found == pytest.approx(whole, rel=1e-4), options


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lora", [(), ("q_proj", "v_proj")])
def test_on_policy_by_deepspeed_is_that_on_one(tmp_path, stage, lora):
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    (whole,) = run_ranks(on_policy_on_ranks, 1, str(tmp_path), {}, lora)
    for found in run_ranks(on_policy_on_ranks, 2, str(tmp_path), zero(stage), lora):
        assert found == pytest.approx(whole, rel=1e-4)
