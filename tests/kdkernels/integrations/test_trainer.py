"""CAADTrainer: the thin loop's loss to the last bit, evaluation by token, columns that are missing, ZeRO-3's gathering."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="CAADTrainer is transformers' Trainer")
pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
import tiny_lms
from transformers import TrainingArguments

import kdkernels.integrations.trainer
from kdkernels import (
    CAADOptions,
    CAADTrainer,
    ContrastCache,
    DualPathTeacher,
    LMHead,
    MaskFeatures,
    answer_index,
    fused_linear_caad_loss,
)
from kdkernels.head_capture import HeadCapture
from kdkernels.head_loss import HeadLoss
from models.training.build_sources import OWN_TEACHER
from models.training.objective import TokenWeights, objective_loss
from models.training.recipe_files import load_recipe
from models.training.teacher_states import TeacherStates

ROWS = 16
SMALL = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 2}


def speech_lm(seed: int = 0):
    torch.manual_seed(seed)
    model, _ = tiny_lms.voxtral()
    model.generation_config.repetition_penalty = None  # tiny_lms sets what save_pretrained refuses
    model.generation_config.do_sample = False
    return model


def examples(rows: int = ROWS) -> list[dict]:
    """Answers of 2 to 5 tokens, so that micro-batches and halves of a step differ in their numbers of positions."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for row in range(rows):
        ids = torch.randint(1, 80, (tiny_lms.LENGTH,), generator=generator)
        ids[2:6] = tiny_lms.AUDIO_TOKEN
        labels = ids.clone()
        labels[: 15 + row % 4] = -100
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "input_features": torch.randn(8, 32, generator=generator),
                "sample_id": f"clip-{row}",
            }
        )
    return made


class Recorder:
    """A collator that remembers the batches it made."""

    def __init__(self, *left_out: str):
        self.left_out = left_out
        self.batches: list[dict] = []

    def __call__(self, rows: list[dict]) -> dict:
        names = [name for name in rows[0] if name not in self.left_out]
        columns = {name: [row[name] for row in rows] for name in names}
        batch = {name: torch.stack(x) if isinstance(x[0], torch.Tensor) else x for name, x in columns.items()}
        self.batches.append(dict(batch))
        return batch


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**SMALL, **defaults, **options})


def dual_path(seed: int = 1) -> DualPathTeacher:
    return DualPathTeacher(speech_lm(seed), negative=MaskFeatures("input_features"))


def logged(trainer: CAADTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cross_entropy(target):
    return lambda hidden, weight, bias: torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), target
    )


def student_inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "input_features")}


def captured_hidden(model, batch: dict) -> torch.Tensor:
    with HeadCapture(model.get_output_embeddings()) as capture:
        model(**student_inputs(batch), use_cache=False)
    return capture.hidden().flatten(0, 1)


def thin_loop(student, teacher, batches, *, accumulate: int, recipe) -> list[float]:
    """What models/training/train.py does in a step, on the batches that the Trainer drew."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step, start in enumerate(range(0, len(batches), accumulate), 1):
        parts = []
        for batch in batches[start : start + accumulate]:
            index, target = answer_index(batch["labels"])
            states = teacher(student_inputs(batch), index)
            parts.append((batch, index, target, TeacherStates(states.audio_hidden, states.text_hidden, teacher.head)))
        normalizer = torch.tensor(float(sum(len(target) for _, _, target, _ in parts)))
        optimizer.zero_grad(set_to_none=True)
        total = torch.tensor(0.0)
        for batch, index, target, states in parts:
            ones = torch.ones(len(target))
            hidden = captured_hidden(student, batch).index_select(0, index)
            loss, _ = objective_loss(
                recipe, step, student, hidden, target, {OWN_TEACHER: states}, TokenWeights(ones, ones), normalizer,
                normalizer, with_stats=False,
            )  # fmt: skip
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen_head", "trained_head"])
def test_equals_the_thin_loop_to_the_last_bit(tmp_path, trains_head):
    options = CAADOptions(alpha=1.5, alpha_start=0.5, alpha_ramp_steps=3, kd_weight=0.6)
    recipe = load_recipe("caad", ["loss.alpha=1.5", "loss.alpha_start=0.5", "loss.alpha_ramp_steps=3", "loss.kd_weight=0.6"])
    students = [speech_lm(), speech_lm()]
    for student in students:
        student.get_output_embeddings().requires_grad_(trains_head)
        student.train()
    collator = Recorder()
    trainer = CAADTrainer(
        students[0],
        arguments(tmp_path, gradient_accumulation_steps=2),
        teacher=dual_path(),
        options=options,
        data_collator=collator,
        train_dataset=examples(),
    )
    trainer.train()
    counts = [int((batch["labels"] != -100).sum()) for batch in collator.batches]
    assert len(collator.batches) == 8 and len(set(counts)) > 1  # unequal parts: a mean of means would differ
    expected = thin_loop(students[1], dual_path(), collator.batches, accumulate=2, recipe=recipe)
    assert logged(trainer) == expected
    assert len(set(expected)) == 4
    for (name, mine), theirs in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    head = speech_lm().get_output_embeddings().weight
    assert torch.equal(students[0].get_output_embeddings().weight, head) != trains_head


def test_accumulated_parts_are_one_batch(tmp_path):
    """4 x 1 rows and 1 x 4: the same step, up to the order of summation."""
    losses = []
    for size, accumulate in ((4, 1), (1, 4)):
        trainer = CAADTrainer(
            speech_lm(),
            arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_steps=3),
            teacher=dual_path(),
            data_collator=Recorder(),
            train_dataset=examples(),
        )
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def cached(folder: Path, teacher: DualPathTeacher, rows: list[dict], fingerprint: dict) -> ContrastCache:
    """The rows' states and targets."""
    batch = Recorder()(rows)
    index, target = answer_index(batch["labels"])
    states = teacher(student_inputs(batch), index)
    with ContrastCache.writer(folder, fingerprint=fingerprint, hidden_size=32, dtype=torch.float32) as writer:
        for row, example in enumerate(rows):
            mine = index // tiny_lms.LENGTH == row
            writer.add(example["sample_id"], states.audio_hidden[mine], states.text_hidden[mine], target[mine])
    return ContrastCache(folder)


def test_contrast_cache_in_place_of_the_teacher(tmp_path):
    rows = examples()
    teacher = dual_path()
    cache = cached(tmp_path / "cache", teacher, rows, {"test": 1})
    losses = []
    for teacher_arguments in (
        {"teacher": teacher},
        {"teacher": cache, "teacher_head": teacher.head},
    ):
        trainer = CAADTrainer(
            speech_lm(), arguments(tmp_path), data_collator=Recorder(), train_dataset=rows, **teacher_arguments
        )
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the teacher's batches had other rows


def test_weights_and_alpha_by_token(tmp_path):
    rows = examples(4)
    generator = torch.Generator().manual_seed(5)
    for row in rows:
        row["kd_token_weight"], row["ce_token_weight"], row["alpha"] = torch.rand(
            3, tiny_lms.LENGTH, generator=generator
        )
    student, teacher = speech_lm(), dual_path()
    batch = Recorder()(rows)
    index, target = answer_index(batch["labels"])
    states = teacher(student_inputs(batch), index)
    picked = {
        name: batch[name][:, 1:][batch["labels"][:, 1:] != -100] for name in ("kd_token_weight", "ce_token_weight", "alpha")
    }
    expected = fused_linear_caad_loss(
        captured_hidden(student, batch)[index],
        student.get_output_embeddings().weight,
        states.audio_hidden,
        states.text_hidden,
        teacher.head.weight,
        target,
        **picked,
    )
    trainer = CAADTrainer(
        student,
        arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1),
        teacher=teacher,
        data_collator=Recorder(),
        train_dataset=rows,
        eval_dataset=rows,
    )
    evaluated = trainer.evaluate()
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert evaluated["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_with_inputs_of_its_own(tmp_path):
    """A text-only student, a teacher with audio, its negative path another and shorter text."""
    rows = examples(4)
    for row in rows:
        for name in ("input_ids", "attention_mask", "labels", "input_features"):
            row[f"teacher_{name}"] = row[name]
        row["negative_input_ids"], row["negative_labels"] = row["input_ids"][6:], row["labels"][6:]
        del row["input_features"]
    torch.manual_seed(0)
    student, _ = tiny_lms.llama()
    teacher = DualPathTeacher(speech_lm(1), negative=None)
    trainer = CAADTrainer(
        student, arguments(tmp_path, max_steps=1), teacher=teacher, data_collator=Recorder(), train_dataset=rows
    )
    batch = Recorder()(rows)
    loss = trainer.compute_loss(student, batch)
    index, target = answer_index(batch["labels"])
    text_index, _ = answer_index(batch["negative_labels"])
    states = teacher(
        {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "input_features")},
        index,
        text_inputs={"input_ids": batch["negative_input_ids"]},
        text_index=text_index,
    )
    hidden = student.model(input_ids=batch["input_ids"]).last_hidden_state.flatten(0, 1)[index]
    expected = fused_linear_caad_loss(
        hidden, student.lm_head.weight, states.audio_hidden, states.text_hidden, teacher.head.weight, target
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()


class TestEvaluation:
    def test_means_are_by_token_over_the_whole_dataset(self, tmp_path):
        rows = examples(8)  # batches of 3, 3 and 2
        student, teacher = speech_lm(), dual_path()
        trainer = CAADTrainer(
            student, arguments(tmp_path), teacher=teacher, data_collator=Recorder(), eval_dataset=rows
        )
        metrics = trainer.evaluate()
        batch = Recorder()(rows)
        index, target = answer_index(batch["labels"])
        states = teacher(student_inputs(batch), index)
        with torch.no_grad():
            loss, stats = fused_linear_caad_loss(
                captured_hidden(student, batch)[index],
                student.get_output_embeddings().weight,
                states.audio_hidden,
                states.text_hidden,
                teacher.head.weight,
                target,
                return_stats=True,
            )
        assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name in stats._fields:
            assert metrics[f"eval_{name}"] == pytest.approx(getattr(stats, name).mean().item(), rel=1e-4), name
        assert metrics["eval_kd"] > 0 and metrics["eval_path_divergence"] > 0

    def test_during_training_and_predict(self, tmp_path):
        trainer = CAADTrainer(
            speech_lm(),
            arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
            teacher=dual_path(),
            data_collator=Recorder(),
            train_dataset=examples(),
            eval_dataset=examples(4),
        )
        trainer.train()
        losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        assert len(losses) == 2 and losses[1] < losses[0]
        predicted = trainer.predict(examples(5))
        assert predicted.predictions.shape == (5, 6) and predicted.label_ids.shape == (5, 2)
        assert predicted.label_ids[0].tolist() == [5.0, 5.0] and predicted.metrics["test_kd"] > 0


class TestNotFinite:
    """transformers would log the last mean instead, or 0, and go on."""

    def spoiled(self, *rows):
        made = examples(8)
        for row in rows:
            made[row]["input_features"] = made[row]["input_features"] * float("nan")
        return made

    def trainer(self, folder, rows, student=None, **options):
        return CAADTrainer(
            student or speech_lm(),
            arguments(folder, train_sampling_strategy="sequential", **options),
            teacher=dual_path(),
            data_collator=Recorder(),
            train_dataset=rows,
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("logging_nan_inf_filter", [True, False])
    def test_step_and_samples_are_named(self, tmp_path, logging_nan_inf_filter):
        """2 x 2 rows a step: row 6 is in the second step's second part."""
        trainer = self.trainer(tmp_path, self.spoiled(6), logging_nan_inf_filter=logging_nan_inf_filter)
        with pytest.raises(FloatingPointError, match=r"optimiser step 2: .* got loss nan; nothing .* Samples: clip-6$"):
            trainer.train()
        assert trainer.state.global_step == 1 and len(logged(trainer)) == 1
        assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())

    def test_nothing_is_updated(self, tmp_path):
        trainer = self.trainer(tmp_path, self.spoiled(0, 3))
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        with pytest.raises(FloatingPointError, match=r"optimiser step 1: .* Samples: clip-0$"):
            trainer.train()
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))

    def test_rows_without_a_name(self, tmp_path):
        rows = self.spoiled(1)
        for row in rows:
            del row["sample_id"]
        with pytest.raises(FloatingPointError, match=r"Samples: row 1 of 2$"):
            self.trainer(tmp_path, rows).train()

    def test_gradient_that_is_not_finite(self, tmp_path):
        student = speech_lm()
        student.model.language_model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        trainer = self.trainer(tmp_path, examples(4), student=student)
        before = [parameter.clone() for parameter in student.parameters()]
        with pytest.raises(FloatingPointError, match=r"got gradient norm (nan|inf); .* Samples: clip-0, clip-1, clip-2, clip-3$"):
            trainer.train()
        assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))

    def test_step_without_labels_is_named(self, tmp_path, caplog):
        rows = examples(8)
        for row in rows[4:]:
            row["labels"].fill_(-100)
        self.trainer(tmp_path, rows, max_steps=2).train()
        (warning,) = [record.getMessage() for record in caplog.records if record.name == "kdkernels.integrations.trainer"]
        assert warning.startswith("optimiser step 2 has nothing to learn from") and warning.endswith("clip-6, clip-7")

    def test_evaluation_shows_it(self, tmp_path):
        trainer = CAADTrainer(
            speech_lm(), arguments(tmp_path), teacher=dual_path(), data_collator=Recorder(), eval_dataset=self.spoiled(2)
        )
        assert trainer.evaluate()["eval_loss"] != trainer.evaluate()["eval_loss"]  # NaN


def first_losses(folder, **options):
    """Of three steps and an evaluation, with what an argument asks for."""
    trainer = CAADTrainer(
        speech_lm(),
        arguments(folder, **{"max_steps": 3, **options}),
        teacher=dual_path(),
        data_collator=Recorder(),
        train_dataset=examples(),
        eval_dataset=examples(7),
    )
    trainer.train()
    return [*logged(trainer), trainer.evaluate()["eval_loss"]]


class TestArgumentsThatWork:
    """What TrainingArguments offers beside those that are refused, each against a run without it."""

    @pytest.fixture(scope="class")
    def plain(self, tmp_path_factory):
        return first_losses(tmp_path_factory.mktemp("plain"))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {"prediction_loss_only": True},
            {"include_for_metrics": ["inputs", "loss"]},
            {"include_num_input_tokens_seen": "non_padding"},
            {"eval_accumulation_steps": 1},
            {"average_tokens_across_devices": False},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"use_cache": True},
            {"auto_find_batch_size": True},
            {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
            {"torch_empty_cache_steps": 1},
            {"label_names": ["labels"]},
            {"remove_unused_columns": False},
            {"full_determinism": False, "data_seed": 3},
            {"eval_on_start": True},
            {"logging_nan_inf_filter": False},
            {
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_strategy": "best",
                "metric_for_best_model": "kd",
                "greater_is_better": False,
            },
        ],
        ids=lambda options: "+".join(options),
    )
    def test_same_losses(self, tmp_path, plain, options):
        assert first_losses(tmp_path, **options) == pytest.approx(plain, rel=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {"train_sampling_strategy": "group_by_length"},
            {"train_sampling_strategy": "batch_rebalance"},
            {"train_sampling_strategy": "sequential"},
            {"neftune_noise_alpha": 5.0},
        ],
        ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
    )
    def test_other_batches_or_noise(self, tmp_path, plain, options):
        found = first_losses(tmp_path, **options)
        assert len(found) == 4 and found[:3] != plain[:3] and found[3] == pytest.approx(plain[3], rel=0.3)

    def test_bf16(self, tmp_path, plain):
        """Autocast rounds the model's body; the loss itself is computed as without it."""
        found = first_losses(tmp_path, bf16=True)
        assert found != plain and found == pytest.approx(plain, rel=3e-2)

    @pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
    def test_evaluation_in_half_precision(self, tmp_path, plain, name):
        found = first_losses(tmp_path, **{name: True})
        assert found[:3] == plain[:3] and found[3] == pytest.approx(plain[3], rel=5e-2)

    def test_drop_last_leaves_the_last_rows_out(self, tmp_path, plain):
        found = first_losses(tmp_path, dataloader_drop_last=True)
        assert found[:3] == plain[:3] and found[3] != plain[3]

    @pytest.mark.slow
    @pytest.mark.parametrize("metric", ["loss", "kd"])
    def test_best_model(self, tmp_path, metric):
        trainer = CAADTrainer(
            speech_lm(),
            arguments(
                tmp_path,
                load_best_model_at_end=True,
                metric_for_best_model=metric,
                greater_is_better=False,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="steps",
                save_steps=1,
            ),
            teacher=dual_path(),
            data_collator=Recorder(),
            train_dataset=examples(),
            eval_dataset=examples(4),
        )
        trainer.train()
        name = f"eval_{metric}"
        values = [line[name] for line in trainer.state.log_history if name in line]
        assert trainer.state.best_metric == min(values)
        assert trainer.evaluate()[name] == pytest.approx(min(values), rel=1e-5)


class TestColumnsAndArguments:
    @pytest.mark.parametrize("column", ["labels", "input_features"])
    def test_missing_column_is_named(self, tmp_path, column):
        trainer = CAADTrainer(
            speech_lm(),
            arguments(tmp_path),
            teacher=dual_path(),
            data_collator=Recorder(column),
            train_dataset=examples(),
            eval_dataset=examples(3),
        )
        for run in (trainer.train, trainer.evaluate):
            with pytest.raises(ValueError, match=f"expected .*'{column}'"):
                run()

    @pytest.mark.parametrize("weight", [None, "kd_token_weight", "ce_token_weight"])
    def test_evaluation_without_labels(self, tmp_path, weight):
        """Nothing to measure: 0 would be the best loss there is."""
        rows = examples(4)
        for row in rows:
            if weight is None:
                row["labels"].fill_(-100)
            else:
                row[weight] = torch.zeros(tiny_lms.LENGTH)
        trainer = CAADTrainer(
            speech_lm(), arguments(tmp_path), teacher=dual_path(), data_collator=Recorder(), eval_dataset=rows
        )
        name = weight or "kd_token_weight"
        with pytest.raises(ValueError, match=f"labels: expected at least one position with a label and a {name} above 0"):
            trainer.evaluate()

    def test_a_term_that_does_not_count_needs_no_weight(self, tmp_path):
        rows = examples(4)
        for row in rows:
            row["kd_token_weight"] = torch.zeros(tiny_lms.LENGTH)
        trainer = CAADTrainer(
            speech_lm(),
            arguments(tmp_path),
            teacher=dual_path(),
            options=CAADOptions(kd_weight=0.0),
            data_collator=Recorder(),
            eval_dataset=rows,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == metrics["eval_ce"] > 0 and metrics["eval_kd"] != metrics["eval_kd"]

    def test_columns_of_a_teacher_with_its_own_states(self, tmp_path):
        class Speaking(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.lm_head = torch.nn.Linear(2, 3)

            def hidden_states_at(self, index, *, input_ids, spoken_words):
                raise NotImplementedError

        teacher = DualPathTeacher(Speaking(), negative=None)
        trainer = CAADTrainer(speech_lm(), arguments(tmp_path), teacher=teacher, train_dataset=examples())
        trainer._set_signature_columns_if_needed()
        assert {"teacher_spoken_words", "negative_spoken_words"} <= set(trainer._signature_columns)

    def test_cache_without_names_or_with_other_targets(self, tmp_path):
        with ContrastCache.writer(tmp_path / "cache", fingerprint={}, hidden_size=32) as writer:
            for row in range(ROWS):
                writer.add(f"clip-{row}", torch.zeros(2, 32), torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64))
        cached = {"teacher": ContrastCache(tmp_path / "cache"), "teacher_head": LMHead.from_model(speech_lm(1))}
        for left_out, message in (("sample_id", "column 'sample_id'"), ("none", "target tokens of the ContrastCache")):
            trainer = CAADTrainer(
                speech_lm(), arguments(tmp_path), data_collator=Recorder(left_out), train_dataset=examples(), **cached
            )
            with pytest.raises(ValueError, match=message):
                trainer.train()

    def test_samples_with_other_targets_are_named(self, tmp_path):
        """In a cache whose samples 1 and 2 have changed places, and in labels of the teacher's."""
        rows = examples(3)
        swapped = [{**row, "sample_id": f"clip-{name}"} for row, name in zip(rows, (0, 2, 1), strict=True)]
        cache = {"teacher": cached(tmp_path / "cache", dual_path(), swapped, {}), "teacher_head": dual_path().head}
        theirs = [{**row, "teacher_input_ids": row["input_ids"], "teacher_labels": row["labels"].clone()} for row in rows]
        for row in theirs[1:]:
            row["teacher_labels"][-1] += 1
        live = {"teacher": DualPathTeacher(speech_lm(1), negative=None)}
        for given, data, whose in ((cache, rows, "the ContrastCache"), (live, theirs, "teacher_labels")):
            trainer = CAADTrainer(speech_lm(), arguments(tmp_path), data_collator=Recorder(), eval_dataset=data, **given)
            with pytest.raises(ValueError, match=rf"target tokens of {whose}, got others in sample clip-1, clip-2; distill"):
                trainer.evaluate()

    def test_ids_that_a_model_does_not_have_are_named(self, tmp_path):
        wide = speech_lm()
        wide.resize_token_embeddings(120)
        rows = examples(3)
        rows[1]["labels"][-1] = 110
        for change, message in (
            ((), r"labels: expected ids in \[0, 97\) or -100, got 110 in sample clip-1"),
            (("input_ids",), r"inputs\['input_ids'\]: expected ids in \[0, 97\), which Voxtral.*, got 110 in sample clip-1"),
            (("teacher_input_ids",), r"inputs\['teacher_input_ids'\]: expected ids in \[0, 97\), .* got 110 in sample clip-1"),
        ):
            data = [dict(row) for row in rows]
            for name in change:
                data = [{**row, name: row["input_ids"].clone(), "teacher_labels": row["labels"]} for row in data]
                data[1][name][-1] = 110
            for row in data if change == ("input_ids",) else ():
                del row["teacher_labels"]
            trainer = CAADTrainer(
                wide, arguments(tmp_path), teacher=DualPathTeacher(speech_lm(1), negative=None), data_collator=Recorder(),
                eval_dataset=data,
            )  # fmt: skip
            with pytest.raises(ValueError, match=message):
                trainer.evaluate()

    def test_columns_that_trainer_must_not_drop(self, tmp_path):
        trainer = CAADTrainer(speech_lm(), arguments(tmp_path), teacher=dual_path(), train_dataset=examples())
        trainer._set_signature_columns_if_needed()
        wanted = {"sample_id", "kd_token_weight", "teacher_input_features", "negative_labels", "input_features"}
        assert wanted <= set(trainer._signature_columns)

    def test_refused_arguments_are_named(self, tmp_path):
        cases = [
            ({"teacher": "model"}, {}, TypeError, "teacher: expected a DualPathTeacher, a ContrastCache or a .*, got str"),
            ({"teacher_head": LMHead(torch.zeros(3, 2))}, {}, TypeError, "teacher_head: expected None"),
            ({}, {"label_smoothing_factor": 0.1}, ValueError, "args.label_smoothing_factor: expected 0"),
            ({}, {"torch_compile": True}, ValueError, "args.torch_compile: expected False"),
            ({}, {"batch_eval_metrics": True, "eval_do_concat_batches": True}, ValueError, "args.batch_eval_metrics"),
            ({}, {"eval_do_concat_batches": False}, ValueError, "args.eval_do_concat_batches: expected True"),
            ({}, {"eval_use_gather_object": True}, ValueError, "args.eval_use_gather_object: expected False"),
            ({}, {"use_liger_kernel": True}, ValueError, "args.use_liger_kernel: expected False"),
            ({}, {"debug": "underflow_overflow"}, ValueError, "args.debug: expected no 'underflow_overflow'"),
            ({}, {"metric_for_best_model": "kd"}, ValueError, "args.greater_is_better: expected False with .*'kd'"),
            ({}, {"metric_for_best_model": "eval_dev_ce"}, ValueError, "args.greater_is_better: expected False with .*_ce'"),
        ]
        for changed, options, error, message in cases:
            with pytest.raises(error, match=message):
                CAADTrainer(speech_lm(), arguments(tmp_path, **options), **{"teacher": dual_path(), **changed})

    def test_arguments_for_sequence_to_sequence(self, tmp_path):
        from transformers import Seq2SeqTrainingArguments

        args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), predict_with_generate=True, report_to=[], use_cpu=True)
        with pytest.raises(ValueError, match=r"args.predict_with_generate: expected False with CAADTrainer, got True"):
            CAADTrainer(speech_lm(), args, teacher=dual_path())

    @pytest.mark.parametrize(
        "options",
        [
            {"alpha": -1.0},
            {"alpha": float("nan")},
            {"alpha": "2"},
            {"temperature": 0},
            {"kd_weight": 1.5},
            {"divergence": "kl"},
            {"jsd_beta": 1.0},
            {"plausibility": 0.0},
            {"plausibility": 0.1, "divergence": "reverse_kl"},
            {"impl": "gpu"},
            {"chunk_tokens": 0},
            {"workspace_bytes": 0},
            {"chunk_tokens": 4, "workspace_bytes": 4},
            {"logits_dtype": torch.int8},
            {"logits_dtype": "float32"},
            {"round_contrast": 1},
        ],
        ids=str,
    )
    def test_options_are_checked_as_the_loss_checks_them(self, options):
        hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
        with pytest.raises((ValueError, TypeError)) as eager:
            fused_linear_caad_loss(hidden, weight, hidden, hidden, weight, torch.zeros(2, dtype=torch.int64), **options)
        with pytest.raises(type(eager.value)) as found:
            CAADOptions(**options)
        assert str(found.value) == str(eager.value)

    def test_options_are_checked(self):
        for options, error, message in (
            ({"vocab_size": 0}, ValueError, "vocab_size: expected 1 to the width of the logits, got 0"),
            ({"vocab_size": 2.5}, TypeError, "vocab_size: expected an int or None, got float"),
            ({"alpha": torch.ones(2)}, TypeError, "alpha: expected a number, got a tensor"),
            ({"alpha_start": "0"}, ValueError, "alpha_start: expected a finite number >= 0 or None, got '0'"),
            ({"alpha_ramp_steps": 2.5}, TypeError, "alpha_ramp_steps: expected an int, got float"),
            ({"alpha_start": 0.0}, ValueError, "alpha_ramp_steps: expected >= 1 with alpha_start=0, which has no effect alone"),
            ({"alpha_ramp_steps": 2}, ValueError, "alpha_start: expected a number with alpha_ramp_steps=2, got None"),
            ({"jsd_beta": 0.3}, ValueError, "jsd_beta: expected 0.5 with divergence='forward_kl', got 0.3"),
        ):
            with pytest.raises(error, match=message):
                CAADOptions(**options)
        with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
            CAADOptions(temperature=0)
        with pytest.raises(ValueError, match="alpha_ramp_steps: expected >= 0, got -1"):
            CAADOptions(alpha_ramp_steps=-1)
        ramp = CAADOptions(alpha=2.0, alpha_start=0.0, alpha_ramp_steps=4)
        assert [ramp.alpha_at(step) for step in (1, 3, 5, 9)] == [0.0, 1.0, 2.0, 2.0]


def zero3_partition(parameter: torch.nn.Parameter) -> None:
    """As DeepSpeed ZeRO-3 leaves a parameter outside of its module's forward: an empty tensor that knows its shape."""
    parameter.ds_id, parameter.ds_shape, parameter.whole = id(parameter), parameter.shape, parameter.data
    parameter.data = parameter.data.new_empty(0)


class FakeGatheredParameters:
    """deepspeed.zero.GatheredParameters, the part of its contract that is used here."""

    entered = 0

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        type(self).entered += 1
        for parameter in self.parameters:
            parameter.data = parameter.whole

    def __exit__(self, *exc_info):
        for parameter in self.parameters:
            parameter.data = parameter.data.new_empty(0)


@contextlib.contextmanager
def zero3_engine(model: torch.nn.Module):
    """What DeepSpeed's engine does around the forward of every module whose own parameters are partitioned."""

    def gather(module, _args):
        for parameter in module.parameters(recurse=False):
            parameter.data = getattr(parameter, "whole", parameter.data)

    def free(module, _args, _output):
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "whole"):
                parameter.data = parameter.data.new_empty(0)

    for hook in (gather, free):
        hook.__module__ = "deepspeed.runtime.zero.parameter_offload"  # hooks of an engine are told by where they come from
    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(gather), module.register_forward_hook(free)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TestZero3:
    @pytest.fixture(autouse=True)
    def _deepspeed(self, monkeypatch):
        self.fake = types.ModuleType("deepspeed")
        self.fake.zero = types.SimpleNamespace(GatheredParameters=FakeGatheredParameters)
        monkeypatch.setitem(sys.modules, "deepspeed", self.fake)
        FakeGatheredParameters.entered = 0

    def test_partitioned_heads_in_training_and_evaluation(self, tmp_path, monkeypatch):
        """A frozen head of the student, and the teacher's, are partitioned: same losses as whole."""
        results = []
        for partitioned in (False, True):
            student, teacher_model = speech_lm(), speech_lm(1)
            student.get_output_embeddings().requires_grad_(False)
            teacher_model.requires_grad_(False)
            if partitioned:
                for model in (student, teacher_model):
                    zero3_partition(model.get_output_embeddings().weight)
                with pytest.raises(ValueError, match="its weight is empty"):
                    LMHead.from_model(teacher_model)
            head = LMHead.from_model(teacher_model, gather=True)
            assert head.weight.shape == (tiny_lms.VOCAB, 32)
            teacher = DualPathTeacher(teacher_model, negative=MaskFeatures("input_features"), head=head)
            monkeypatch.delitem(sys.modules, "deepspeed")  # accelerate would take it for the real one
            monkeypatch.setattr(kdkernels.integrations.trainer, "zero3_engine", lambda model: None)  # zero3_engine, below
            with zero3_engine(student), zero3_engine(teacher_model):
                trainer = CAADTrainer(
                    student,
                    arguments(tmp_path, max_steps=2),
                    teacher=teacher,
                    data_collator=Recorder(),
                    train_dataset=examples(),
                    eval_dataset=examples(4),
                )
                trainer.train()
                results.append([*logged(trainer), trainer.evaluate()["eval_loss"]])
            monkeypatch.setitem(sys.modules, "deepspeed", self.fake)
        assert results[0] == results[1] and FakeGatheredParameters.entered == 1  # the teacher's head, whose copy is kept
        assert student.get_output_embeddings().weight.numel() == 0  # freed again

    def test_base_weight_under_a_lora(self):
        """Its own module's forward has not begun where the LoRA layer's has: gathered by the context manager."""
        peft = pytest.importorskip("peft")
        losses = []
        for partitioned in (False, True):
            config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
            torch.manual_seed(0)
            model = peft.get_peft_model(speech_lm(), config)
            if partitioned:
                zero3_partition(model.get_output_embeddings().base_layer.weight)
            batch = Recorder()(examples(2))
            index, target = answer_index(batch["labels"])
            with zero3_engine(model):
                losses.append(HeadLoss(model)(model, student_inputs(batch), index, cross_entropy(target)))
        assert torch.equal(*losses) and FakeGatheredParameters.entered == 1

    def test_trained_head_that_nobody_gathered_is_refused(self):
        student = speech_lm()
        zero3_partition(student.get_output_embeddings().weight)
        batch = Recorder()(examples(2))
        index, target = answer_index(batch["labels"])
        with pytest.raises(TypeError, match="its weights train and ZeRO-3 has them partitioned"):
            HeadLoss(student)(student, student_inputs(batch), index, cross_entropy(target))
