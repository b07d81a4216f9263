"""The plan of a recipe: sizes as the models have them, memory as the loop holds it, time by hand, and words for people."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdkernels.ops.chunking import DEVICES, DeviceModel
from models.audio_lms.families import FAMILIES
from models.audio_lms.family import Turn
from models.audio_lms.model import AudioLM
from models.audio_lms.settings import Lora
from models.cli import main as models
from models.training import model_sizes, plan
from models.training.commands import plan_parser
from models.training.layer_distillation import LayerDistillation
from models.training.plan import Clips, _projection_weights, count_clips, duration, make_plan, quantity, size
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import LayersConfig
from models.training.student import build_model
from models.training.teacher_states import SourceError
from models.training.training_data import build_data, read_examples
from tests.models.audio_lms import tiny_audio_lms as tiny
from tests.models.audio_lms.audio_world import make_world, words
from tests.models.training.test_run_setup import world as speech_world  # noqa: F401  (a fixture)

DEVICE = DeviceModel(132, 80 << 30, (9, 0), 3e12, 1e15, "made up")
DATA = Clips(examples=1000, clips=500, seconds=2.0, prompt_tokens=40, answer_tokens=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), "qwen2_audio")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2-Audio-7B-Instruct", 8.397), ("Qwen/Qwen2.5-Omni-7B", 8.93), ("Qwen/Qwen3-8B", 8.19),
        ("meta-llama/Llama-3.2-3B-Instruct", 3.21), ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("google/gemma-3-1b-it", 1.0), ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345),
    ],
)  # fmt: skip
def test_the_table_gives_the_published_sizes(name, billions):
    kind = model_sizes.KNOWN[name]["model_type"]
    hears = kind in ("qwen2_audio", "qwen2_5_omni_thinker")
    lm = model_sizes.audio_lm_on_meta(name)[0] if hears else model_sizes.text_lm_on_meta(name)[0]
    assert sum(p.numel() for p in lm.parameters()) / 1e9 == pytest.approx(billions, rel=3e-3)


def test_sizes_are_those_of_the_loaded_model(world):
    lm, family, known_from = model_sizes.audio_lm_on_meta(str(world / "student"))
    sizes = model_sizes.sizes_of("student", lm, family, known_from)
    loaded = AudioLM.from_pretrained(world / "student")
    assert known_from == "config" and (sizes.width, sizes.layers, sizes.vocabulary) == (32, 2, tiny.VOCABULARY)
    assert sizes.total == sum(p.numel() for p in loaded.parameters())
    parts = {"encoder": "audio_tower|multi_modal_projector", "body": r"language_model\.layers"}
    for part, pattern in parts.items():
        assert getattr(sizes, part) == sum(p.numel() for n, p in loaded.named_parameters() if re.search(pattern, n)), part
    for trains, lora in (("full", Lora()), ("connector", Lora()), ("lora", Lora(r=4)), ("lora", Lora(r=3, targets=("q_proj",)))):
        student = AudioLM.from_pretrained(world / "student", trains=trains, lora=lora)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        assert model_sizes.trained_weights(lm, family, trains, lora) == trained, (trains, lora)


def test_memory_and_time_by_hand(world, monkeypatch):
    monkeypatch.setitem(DEVICES, "H100", DEVICE)
    recipe = load_recipe("caad", words(world, "x", f"teacher.model={world / 'teacher'}", "student.lora.r=4", "optim.steps=10"))
    recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, dtype="bfloat16"))
    found = make_plan(recipe, DATA, utilisation=0.5)
    student, teacher = (AudioLM.from_pretrained(world / name) for name in ("student", "teacher"))
    trained = AudioLM.from_pretrained(world / "student", trains="lora", lora=Lora(r=4))
    lora = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert found.memory["student's weights"] == 2 * sum(p.numel() for p in student.parameters())
    assert found.memory["student's LoRA"] == 4 * lora and found.memory["gradients and AdamW's moments"] == 12 * lora
    assert found.memory[plan.TEACHER_WEIGHTS] == 4 * sum(p.numel() for p in teacher.parameters())

    def part(model, pattern):
        return sum(p.numel() for n, p in model.named_parameters() if re.search(pattern, n))

    row = 40 + 2 * 25 + 10  # 25 placeholders a second
    assert found.row_tokens == row
    encoder = {m: 2 * part(m, "audio_tower|multi_modal_projector") * 50 * 30 for m in (student, teacher)}  # a window of 30 s
    once = 4 * (2 * 2 * part(student, r"language_model\.layers") * row + encoder[student])  # 4 examples, forward and backward
    assert found.seconds["student"] == pytest.approx((once + 4 * 6 * lora * row) / 5e14)
    both = 4 * 2 * (2 * part(teacher, r"language_model\.layers") * row + encoder[teacher])
    assert found.seconds["teacher, both paths"] == pytest.approx(both / 5e14)
    assert found.total_seconds == pytest.approx(10 * sum(found.seconds.values()))
    assert found.cache_bytes == 1000 * 10 * (2 * 48 * 2 + 8)

    checkpointed = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, gradient_checkpointing=True))
    more = make_plan(checkpointed, DATA, utilisation=0.5)
    extra = 4 * 2 * part(student, r"language_model\.layers") * row / 5e14
    assert more.seconds["student"] - found.seconds["student"] == pytest.approx(extra)
    assert more.memory["activations and logits of a part"] < found.memory["activations and logits of a part"]
    cached = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, cache="cache"))
    held = make_plan(cached, DATA, utilisation=0.5)
    assert "teacher, both paths" not in held.seconds and held.memory["teacher's LM head"] == 2 * tiny.VOCABULARY * 48


def test_the_student_s_own_answers_cost_time_and_whole_weights(world, monkeypatch):
    monkeypatch.setitem(DEVICES, "made up", DEVICE)
    shared = words(world, "plan", f"teacher.model={world / 'teacher'}", "optim.batch_examples=8", "run.parallel=fsdp2")
    own = ["data.on_policy_fraction=1", "data.on_policy_max_new_tokens=50", "data.on_policy_batch_examples=2"]
    options = {"device_name": "made up", "gpus": 2}
    without = make_plan(load_recipe("kd", shared), DATA, **options)
    every = {n: load_recipe("kd", [*shared, *own, f"data.on_policy_every_steps={n}"]) for n in (1, 2)}
    plan_of = {n: make_plan(recipe, DATA, **options) for n, recipe in every.items()}
    student = plan._student(load_recipe("kd", shared))
    read = student.weight_bytes * (student.sizes.stored_body + student.sizes.vocabulary * student.sizes.width)
    made = plan_of[1].seconds["student's answers"]
    assert 2 * 50 * read / 3e12 < made < 2 * 50 * read / 3e12 + 1e-3  # four answers of each GPU in two batches
    assert plan_of[2].seconds["student's answers"] == made / 2
    assert "student's answers" not in without.seconds
    assert plan_of[1].seconds["exchange between GPUs"] > plan_of[2].seconds["exchange between GPUs"]
    assert plan_of[1].memory_bytes >= without.memory_bytes


def test_clips_and_words_are_counted(world):
    recipe = load_recipe("caad", words(world, "x", f"teacher.model={world / 'teacher'}"))
    found = count_clips(recipe, assumed=Clips())
    assert (found.examples, found.clips) == (6, 6)  # each clip stands in the split "test" as well
    assert found.seconds == pytest.approx(0.5 + 0.05 * 2.5)
    assert found.answer_tokens == pytest.approx(1 + 1.4 * 4)  # "The tone is high."
    assert found.prompt_tokens == pytest.approx(20 + 1.4 * (6 + 2 / 6))  # a transcript stands in one of six prompts
    assert count_clips(load_recipe("qwen_omni"), assumed=Clips()) == Clips()


@pytest.mark.slow
def test_a_speech_lms_features_are_counted_as_its_loader_holds_them(speech_world):  # noqa: F811
    words = [
        f"data.manifest={speech_world / 'm.jsonl'}", f"model.folder={speech_world / 'untrained'}", "run.device=cpu",
        f"teacher.folder={speech_world / 'teacher' / 'final'}", "run.progress_bar=false",
        f"run.out_dir={speech_world / 'planned'}",
    ]  # fmt: skip
    recipe = load_recipe("caad", words)
    found = make_plan(recipe, count_clips(recipe, assumed=Clips()))
    model = build_model(recipe)
    data = build_data(recipe, model, *read_examples(recipe))
    rows = data.store.rows(data.examples)
    assert found.disk["features of 12 clips"] == rows.numel() * 2 and "features of 12 clips" not in found.host
    assert found.memory["gradients and AdamW's moments"] == 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in model.parameters())
    assert found.memory["student's weights"] == 4 * weights


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni", "qwen3_omni", "voxtral", "phi4_multimodal", "audio_flamingo"])
def test_placeholders_of_a_second_are_those_of_the_processor(family, tmp_path):
    lm = AudioLM.from_pretrained(tiny.FAMILIES[family](tmp_path / "lm"))
    placeholder = 24 if family == "voxtral" else tiny.ID["<|AUDIO|>"]

    def count(seconds: float) -> int:
        return lm.family.encoded(lm.processor, [Turn("?", (tiny.tone(300, seconds=seconds),))]).rows[0].count(placeholder)

    rate = lm.family.tokens_per_second
    if family == "voxtral":  # always whole windows
        assert count(1.0) == rate * lm.family.window_seconds
    else:
        assert count(1.0) == pytest.approx(rate, abs=1.01)


@pytest.mark.parametrize("form", ["projection", "attention"])
@pytest.mark.parametrize("width", [8, 12])
def test_weights_between_layers_are_those_that_are_built(form, width):
    layers = LayersConfig(weight=1.0, form=form)
    built = LayerDistillation.build(layers, depths=(3, 6), widths=(8, width))
    sizes = (SimpleNamespace(layers=3, width=8), SimpleNamespace(layers=6, width=width))
    assert _projection_weights(layers, *sizes) == sum(p.numel() for p in built.parameters())


def test_words_for_people():
    assert [size(x) for x in (5000, 300 << 20, 1.5 * 2**30)] == ["5 KiB", "300 MiB", "1.5 GiB"]
    assert [duration(x) for x in (0.0042, 42, 700, 11_100, 300_000)] == ["0.0042 s", "42 s", "12 min", "3 h 5 min", "3 days 11 h"]
    assert [quantity(x) for x in (950, 59_900_000, 8_397_094_912)] == ["950", "59.9 million", "8.4 billion"]
    assert plan_parser().format_help().count("H100, H200") == 1 and all(name in plan_parser().format_help() for name in DEVICES)
    assert all(family.tokens_per_second > 0 for family in FAMILIES)


def test_the_connector_of_the_desta2_pair_has_the_papers_size():
    settings = plan._speech_settings(None, load_recipe("caad_desta2").model.settings)[0]
    student = plan._speech_model("model.settings", settings)
    assert student.connector / 1e6 == pytest.approx(32, abs=1)
    assert student.sizes.name == "meta-llama/Llama-3.2-3B-Instruct" and student.sizes.encoder / 1e6 == pytest.approx(307, abs=1)


@pytest.mark.slow
def test_a_teacher_that_is_not_trained_yet(capsys):
    assert models(["plan", "caad_desta2", "--teacher", "sft_desta2", "--clips", "1000"]) == 0
    said = capsys.readouterr().out
    assert "student: meta-llama/Llama-3.2-3B-Instruct" in said and "teacher: meta-llama/Llama-3.1-8B-Instruct" in said
    assert models(["plan", "caad_desta2"]) == 1
    assert "--teacher names the recipe that will make it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_key_may_stand_behind_an_option(capsys):
    assert models(["plan", "qwen_omni", "--gpus", "8", "run.parallel=ddp", "optim.steps=7"]) == 0
    assert "data: 7 steps of 32 examples" in capsys.readouterr().out


def test_the_command(world, capsys):
    assert models(["plan", "qwen_omni", "--clips", "50000"]) == 0
    said = capsys.readouterr().out
    assert "student: Qwen/Qwen2.5-Omni-3B, 4.7 billion weights, 36 layers, 59.9 million train, sizes from the table" in said
    assert "3,000 steps of 32 examples, 1.92 passes over 50,000 examples" in said and "a cache of the teacher: 21.4 GiB" in said
    assert models(["plan", "qwen_omni", "--gpu", "RTX 4090"]) == 0
    assert "MORE THAN IT HAS" in (said := capsys.readouterr().out) and "optim.micro_batch_examples=2" in said
    for more, message in {
        ("--gpu", "T4"): "error: --gpu: expected a name",
        ("--gpus", "4"): "error: --gpus: expected 1 with run.parallel=none, got 4",
        ("student.model=nobody/nothing",): "error: student.model: nobody/nothing: expected a folder with config.json",
        ("--utilisation", "2"): "error: --utilisation: expected a number in (0, 1], got 2",
        ("--clips", "0"): "error: --clips: expected a number above 0, got 0",
    }.items():
        assert models(["plan", "qwen_omni", *more]) in (1, 2)
        assert message in capsys.readouterr().err
    with pytest.raises(SourceError, match=r"teacher\.folder: expected a folder with speech_lm\.json"):
        make_plan(load_recipe("caad_llama"), DATA)


@pytest.mark.slow
def test_the_pages_table_is_what_the_command_says():
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == ["qwen_omni", "qwen_omni_sources", "qwen2_audio"]
    for name, *said in rows:
        found = make_plan(load_recipe(name), dataclasses.replace(Clips(), examples=50_000, clips=50_000))
        cache = f"{size(found.cache_bytes)}, {duration(found.cache_seconds)}" if found.cache_bytes else "none"
        wanted = [size(found.memory_bytes), duration(found.step_seconds), duration(found.total_seconds), cache]
        assert [cell.strip() for cell in said] == wanted, name
    assert torch.get_default_dtype() == torch.float32
