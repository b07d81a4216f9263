"""Recipes on a real SpeechLM with tiny random backbones: the command line, the live teacher and its cache."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from kdkernels.contrast_cache import ContrastCache, ContrastCacheWriter
from models.data.audio import write_audio
from models.data.manifest import Example, read_manifest, write_manifest
from models.experiments.shared_steps import make_tiny_backbones
from models.io_utils import exclusive
from models.speech_lm.collation import crop_to_targets
from models.speech_lm.features import FeatureStore, clip_features
from models.speech_lm.model import SpeechLM, SpeechLMConfig
from models.training.build_sources import build_sources
from models.training.cache_identity import teacher_fingerprint
from models.training.check_folders import check_folders
from models.training.curves import read_metrics
from models.training.distributed import Ranks
from models.training.fill_cache import main as cache_main
from models.training.loop import TrainResult
from models.training.recipe_files import load_recipe
from models.training.student import build_model
from models.training.teacher_states import SourceError
from models.training.train import main
from models.training.training_data import TrainingData, build_data, read_examples


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve clips of two pitches, their features, an untrained model, a trained teacher."""
    root = tmp_path_factory.mktemp("world")
    backbones = make_tiny_backbones(root / "backbones")
    examples = []
    for i in range(12):
        label = ("man", "woman")[i % 2]
        pitch = 0.05 if label == "man" else 0.3
        write_audio(root / f"{i}.wav", np.sin(np.arange(16000) * pitch + i).astype(np.float32) * 0.1)
        examples.append(
            Example(
                id=f"c{i}", audio=f"{i}.wav", transcription=f"line {i}", task="gender", question="Man or woman?",
                choices=("man", "woman"), answer=label, target=f"The speaker is a {label}.", target_source="template",
            )
        )  # fmt: skip
    write_manifest(root / "m.jsonl", examples)
    torch.manual_seed(0)
    config = SpeechLMConfig(
        lm=str(backbones / "lm"), encoder=str(backbones / "encoder"), encoder_layers=(1, 2), connector_width=32, audio_frames=10
    )
    model = SpeechLM.from_config(config)
    store, _ = clip_features(model, examples, audio_root=root, progress_bar=False)
    store.save(root / "f.safetensors")
    model.fit_feature_statistics(store.features.float())
    model.save_pretrained(root / "untrained")
    assert train(root, "sft_teacher", "teacher", "optim.steps=12") == 0
    return root


def train(root, recipe, out, *words):
    return main(
        [
            recipe, f"data.manifest={root / 'm.jsonl'}", f"model.folder={root / 'untrained'}", f"run.out_dir={root / out}",
            f"data.features={root / 'f.safetensors'}", "optim.batch_examples=4", "optim.warmup_steps=2",
            "optim.learning_rate=0.01", "run.tensorboard=false", "run.progress_bar=false", "run.log_every_steps=3",
            "run.device=cpu", *words,
        ]
    )  # fmt: skip


def weights(root, out):
    return load_file(root / out / "final" / "connector.safetensors")


def test_the_teacher_learns_and_is_a_speech_lm(world):
    losses = [line["loss"] for line in read_metrics(world / "teacher" / "metrics.jsonl")]
    assert losses[-1] < losses[0]  # a random language model says little, so it falls little
    assert isinstance(SpeechLM.from_pretrained(world / "teacher" / "final"), SpeechLM)


def test_cached_states_train_the_very_same_student_as_the_live_teacher(world):
    words = ["optim.steps=4", f"teacher.folder={world / 'teacher' / 'final'}"]
    assert train(world, "caad", "live", *words) == 0

    assert cache_main(cache_words(world, world / "cache", "--dtype", "float32")) == 0
    assert train(world, "caad", "cached", *words, f"teacher.cache={world / 'cache'}") == 0
    live, cached = weights(world, "live"), weights(world, "cached")
    for name in live:
        assert torch.allclose(live[name], cached[name], rtol=1e-3, atol=1e-4), name  # other batch shapes, other rounding
    losses = [[line["kd"] for line in read_metrics(world / out / "metrics.jsonl")] for out in ("live", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_cache_without_some_samples_is_refused_before_the_first_step(world, tmp_path, capsys):
    rows = (world / "m.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(rows[:-2]), encoding="utf-8")
    words = [str(world / "teacher" / "final"), str(short), "--out", str(tmp_path / "c"), "--audio-root", str(world)]
    assert cache_main([*words, "--dtype", "float32", "--device", "cpu"]) == 0
    told = [f"teacher.folder={world / 'teacher' / 'final'}", f"teacher.cache={tmp_path / 'c'}", "optim.steps=1"]
    assert train(world, "caad", "short", *told) == 1
    said = capsys.readouterr().err
    assert "teacher.cache: expected all of the 12 samples asked for, got the cache" in said
    assert "without 2 of them: " in said and not (world / "short" / "metrics.jsonl").exists()


def test_a_run_does_not_replace_what_it_reads(world, tmp_path, capsys):
    """The result of a first stage is the start of a second one, and a recipe has one folder for both."""
    assert train(world, "sft_teacher", "first", "optim.steps=1") == 0
    before = weights(world, "first")
    teacher = f"teacher.folder={world / 'teacher' / 'final'}"
    link = tmp_path / "link"
    link.symlink_to(world / "first" / "final")
    for words, key in (
        (["sft_teacher", f"model.folder={world / 'first' / 'final'}"], "model.folder"),
        (["caad", f"teacher.folder={link}"], "teacher.folder"),
        (["caad", teacher, "sources.more.role=audio", f"sources.more.folder={world / 'first' / 'final'}"], "sources.more.folder"),
    ):
        assert train(world, words[0], "first", "optim.steps=1", *words[1:]) == 1
        says = f"error: {key}: expected nothing of {world / 'first' / 'final'}, which this run replaces"
        assert says in capsys.readouterr().err
    assert all(torch.equal(x, before[name]) for name, x in weights(world, "first").items())
    assert train(world, "sft_teacher", "second", "optim.steps=1", f"model.folder={world / 'first' / 'final'}") == 0


def test_a_run_does_not_replace_the_base_of_an_adapter(tmp_path):
    final, adapter = tmp_path / "out" / "final", tmp_path / "adapter"
    for folder, name, text in ((final, "config.json", "{}"), (adapter, "adapter_config.json", json.dumps({
        "base_model_name_or_path": str(final)
    }))):  # fmt: skip
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
    words = [f"run.out_dir={tmp_path / 'out'}", f"student.model={adapter}", f"teacher.model={tmp_path / 'teacher'}"]
    recipe = load_recipe("qwen_omni", [*words, "data.manifest=m.jsonl"])
    with pytest.raises(SourceError, match=f"student.model: expected nothing of {final}.* got {adapter}, which needs {final}"):
        check_folders(recipe)


def cache_words(root, out, *more):
    features = str(root / "f.safetensors")
    return [str(root / "teacher" / "final"), str(root / "m.jsonl"), "--out", str(out), "--features", features, *more]


def test_layers_from_a_cache_train_the_student_of_the_live_teacher(world, capsys):
    words = ["optim.steps=3", f"teacher.folder={world / 'teacher' / 'final'}"]
    assert train(world, "caad_layers", "live_layers", *words) == 0
    assert cache_main(cache_words(world, world / "layers", "--dtype", "float32", "--layers", "all")) == 0
    assert train(world, "caad_layers", "cached_layers", *words, f"teacher.cache={world / 'layers'}") == 0
    # The losses, not the weights: a key's bias has only rounding as gradient, and AdamW makes whole steps of that.
    live, cached = (read_metrics(world / out / "metrics.jsonl") for out in ("live_layers", "cached_layers"))
    for name in ("layers", "kd", "ce", "loss"):
        assert [line[name] for line in live] == pytest.approx([line[name] for line in cached], rel=1e-4), name
    assert cache_main(cache_words(world, world / "one", "--layers", "1", "--measure", "3")) == 0
    said = capsys.readouterr().out
    assert 0 <= float(said.split("at alpha 2: ")[1].split(" nats")[0]) < 1e-2
    assert train(world, "caad_layers", "never", *words, f"teacher.cache={world / 'one'}") == 1
    assert "teacher.cache: expected the states of layers" in capsys.readouterr().err


@pytest.mark.slow
def test_the_teacher_hears_the_clips_and_the_student_a_telephone(world, capsys):
    """The teacher's states are those of its own features, live and from a cache; the student's features are others."""
    teacher = str(world / "teacher" / "final")
    common = [f"data.manifest={world / 'm.jsonl'}", f"model.folder={world / 'untrained'}", f"teacher.folder={teacher}"]
    phone = [*common, "student.hears.snr_db=[0]", "student.hears.codec=gsm", "run.device=cpu", "run.progress_bar=false"]
    phone += [f"run.out_dir={world / 'phone'}"]
    recipe = load_recipe("caad", phone)
    model = build_model(recipe)
    examples, root = read_examples(recipe)
    data = build_data(recipe, model, examples, root)
    clean = FeatureStore.load(world / "f.safetensors")
    batch = data.make_batch(data.examples[:3])
    assert not torch.allclose(batch.audio_features, clean.rows(data.examples[:3]), atol=0.05)
    (live,) = build_sources(recipe, data, model, device=torch.device("cpu"))
    expected = build_sources(  # the teacher's states where both hear the clips
        load_recipe("caad", common), build_data(load_recipe("caad", common), model, examples, root, store=clean), model,
        device=torch.device("cpu"),
    )[0].teacher(batch, data.examples[:3])  # fmt: skip
    states = live.teacher(batch, data.examples[:3])
    assert {path.parent.name for path in (world / "phone").rglob("features-*.safetensors")} == {"features", "teacher"}
    torch.testing.assert_close(states.audio_hidden, expected.audio_hidden, rtol=1e-4, atol=1e-4)

    assert cache_main(cache_words(world, world / "clean", "--dtype", "float32")) == 0
    from_cache = load_recipe("caad", [*phone, f"teacher.cache={world / 'clean'}"])
    cached = build_sources(from_cache, data, model, device=torch.device("cpu"))
    held = cached[0].teacher(batch, data.examples[:3])
    torch.testing.assert_close(held.audio_hidden, states.audio_hidden, rtol=1e-4, atol=1e-4)
    noisy = load_recipe("caad", [*phone, f"teacher.cache={world / 'clean'}", "teacher.hears.snr_db=[0]"])
    with pytest.raises(SourceError, match=r"teacher\.cache: .*hears"):
        build_sources(noisy, data, model, device=torch.device("cpu"))
    capsys.readouterr()
    assert train(world, "caad", "never", f"teacher.folder={teacher}", "student.hears.snr_db=[0]") == 1
    assert "features were made with hears None, the model hears with {'snr_db': [0.0]}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["caad", "caad_layers"])
def test_one_by_one_the_cache_is_the_live_teacher_bit_for_bit(world, recipe):
    words = ["optim.steps=4", "run.log_every_steps=1", f"teacher.folder={world / 'teacher' / 'final'}"]
    assert train(world, recipe, f"{recipe}_singly", *words, "teacher.batch_examples=1") == 0
    cache = world / f"{recipe}_of_ones"
    assert cache_main(cache_words(world, cache, "--dtype", "float32", "--layers", "all", "--batch-examples", "1")) == 0
    assert train(world, recipe, f"{recipe}_of_cache", *words, f"teacher.cache={cache}") == 0
    live, cached = (read_metrics(world / f"{recipe}_{out}" / "metrics.jsonl") for out in ("singly", "of_cache"))
    for line in live + cached:
        line.pop("seconds")
    assert live == cached and len(live) == 4
    live, cached = weights(world, f"{recipe}_singly"), weights(world, f"{recipe}_of_cache")
    assert all(torch.equal(live[name], cached[name]) for name in live)


@pytest.fixture(scope="module")
def of_many_lengths(world):
    """A manifest of the same clips, each with a prompt of its own, no two of one length."""
    examples = read_manifest(world / "m.jsonl").examples
    told = [dataclasses.replace(e, transcription="so " * (7 * i % 12) + str(i)) for i, e in enumerate(examples)]
    write_manifest(world / "lengths.jsonl", told)
    return world / "lengths.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft_teacher", "caad", "caad_layers"])
def test_stopped_and_resumed_is_the_undisturbed_run_bit_for_bit(world, of_many_lengths, recipe, monkeypatch):
    """With its teacher live and its prefix caches, which a resumed run fills in another order."""
    words = [f"data.manifest={of_many_lengths}", "optim.steps=6", "run.log_every_steps=1"]
    words += [f"teacher.folder={world / 'teacher' / 'final'}"] if recipe != "sft_teacher" else []
    assert train(world, recipe, f"{recipe}_whole", *words) == 0
    draw = TrainingData.draw

    def interrupted(data, cursor, count, *, seed):
        if cursor == 2 * 4:  # the third step, an epoch's last, which is still finished
            os.kill(os.getpid(), signal.SIGINT)
        return draw(data, cursor, count, seed=seed)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingData, "draw", interrupted)
        assert train(world, recipe, f"{recipe}_cut", *words) == 128 + signal.SIGINT
    assert train(world, recipe, f"{recipe}_cut", *words, "run.resume=auto") == 0
    whole, cut = (read_metrics(world / f"{recipe}_{out}" / "metrics.jsonl") for out in ("whole", "cut"))
    for line in whole + cut:
        line.pop("seconds")
    assert whole == cut and len(whole) == 6
    whole, cut = weights(world, f"{recipe}_whole"), weights(world, f"{recipe}_cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_that_was_stopped_is_the_undisturbed_one_bit_for_bit(world, of_many_lengths, tmp_path, dtype, monkeypatch):
    words = [*cache_words(world, tmp_path / "whole", "--dtype", dtype, "--batch-examples", "5"), "--layers", "1,3"]
    words[1] = str(of_many_lengths)
    assert cache_main(words) == 0
    words[words.index("--out") + 1] = str(tmp_path / "cut")
    add, stops = ContrastCacheWriter.add, ["c3", "c9"]  # each in the middle of a batch

    def interrupted(writer, sample_id, *states, **options):
        if sample_id in stops:
            stops.remove(sample_id)
            raise KeyboardInterrupt
        add(writer, sample_id, *states, **options)

    monkeypatch.setattr(ContrastCacheWriter, "add", interrupted)
    assert [cache_main(words) for _ in range(3)] == [130, 130, 0] and not stops
    whole, cut = (ContrastCache(tmp_path / name) for name in ("whole", "cut"))
    assert len(whole) == len(cut) == 12
    for name in whole:
        for field in ("audio_hidden", "text_hidden", "target", "audio_layers", "text_layers"):
            assert torch.equal(getattr(whole[name], field), getattr(cut[name], field)), (name, field)


def test_a_cache_goes_on_and_its_parts_are_one(world, tmp_path, capsys):
    for part in ("0/2", "1/2", "1/2"):
        assert cache_main(cache_words(world, tmp_path / "c", "--part", part)) == 0
    said = capsys.readouterr().out
    assert "12 samples," in said and "6 samples written, 12 in" in said and "0 samples written, 12 in" in said
    assert cache_main(cache_words(world, tmp_path / "c")) == 0  # one process in the place of two writes no sample twice
    assert "0 samples written, 12 in" in capsys.readouterr().out
    assert len(ContrastCache(tmp_path / "c")) == 12


def test_a_cache_of_another_teacher_prompt_or_room_is_refused(world, tmp_path, capsys, monkeypatch):
    assert cache_main(cache_words(world, tmp_path / "c")) == 0
    words = cache_words(world, tmp_path / "c")
    assert cache_main([str(world / "untrained"), *words[1:]]) == 1
    assert "fingerprint: the cache" in capsys.readouterr().err
    examples = read_manifest(world / "m.jsonl").examples
    write_manifest(world / "asked.jsonl", [dataclasses.replace(e, question="Woman or man?") for e in examples])
    assert cache_main([words[0], str(world / "asked.jsonl"), *words[2:]]) == 1
    assert "sample 'c0' is there with another prompt, clip or target" in capsys.readouterr().err
    told = [f"teacher.folder={world / 'teacher' / 'final'}", f"teacher.cache={tmp_path / 'c'}"]
    assert train(world, "caad", "never", *told, f"data.manifest={world / 'asked.jsonl'}") == 1
    assert "was cached with another prompt, clip or target" in capsys.readouterr().err
    told[0] = f"teacher.folder={world / 'untrained'}"
    assert train(world, "caad", "never", *told) == 1
    assert "teacher.cache: fingerprint: the cache" in capsys.readouterr().err
    for more, message in (
        (["--part", "2/2"], "--part: expected I/N"), (["--layers", "99"], "--layers: expected none, all or numbers from 0 to 3"),
        (["--batch-examples", "0"], "--batch-examples: expected at least 1"),
    ):  # fmt: skip
        assert cache_main(cache_words(world, tmp_path / "d", *more)) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    assert cache_main(cache_words(world, tmp_path / "d")) == 1
    assert "has room for 100 bytes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_language_model_that_trains_goes_through_every_stage(world, tmp_path):
    old = SpeechLM.from_pretrained(world / "untrained")
    model = SpeechLM.from_config(dataclasses.replace(old.config, train_lm=True))
    model.connector.load_state_dict(old.connector.state_dict())
    model.save_pretrained(tmp_path / "all")
    words = ["optim.steps=2", f"model.folder={tmp_path / 'all'}"]
    assert train(world, "sft_teacher", "all", *words) == 0
    assert train(world, "sft_teacher", "all", *words, "run.resume=auto") == 0
    trained = SpeechLM.from_pretrained(world / "all" / "final")
    assert not torch.equal(trained.get_input_embeddings().weight, model.get_input_embeddings().weight)
    words = ["optim.steps=2", f"teacher.folder={world / 'all' / 'final'}"]
    assert train(world, "caad", "of-all", *words, "teacher.batch_examples=1") == 0
    cached = cache_words(world, tmp_path / "c", "--dtype", "float32", "--batch-examples", "1")
    assert cache_main([str(world / "all" / "final"), *cached[1:]]) == 0
    assert train(world, "caad", "of-all-cached", *words, f"teacher.cache={tmp_path / 'c'}") == 0
    live, cached = weights(world, "of-all"), weights(world, "of-all-cached")
    assert all(torch.equal(live[name], cached[name]) for name in live)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("run.gradient_checkpointing=true",), ("model.prefix_cache_mib=0",)])
def test_memory_options_change_nothing_but_rounding(world, words):
    base = ["optim.steps=3", f"teacher.folder={world / 'teacher' / 'final'}"]
    assert train(world, "kd", "base", *base) == 0
    assert train(world, "kd", "option", *base, *words) == 0
    losses = [[line["loss"] for line in read_metrics(world / out / "metrics.jsonl")] for out in ("base", "option")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_fresh_connector_keeps_the_statistics(world):
    assert train(world, "ce_only", "fresh", "optim.steps=1", "model.fresh_connector=true", "optim.learning_rate=1e-9") == 0
    old, new = load_file(world / "untrained" / "connector.safetensors"), weights(world, "fresh")
    assert torch.equal(old["feature_mean"], new["feature_mean"]) and torch.equal(old["feature_std"], new["feature_std"])
    assert not torch.allclose(old["input_projection.weight"], new["input_projection.weight"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.manifest=none.jsonl"], "error: data.manifest: none.jsonl"),
        (["data.features=none.safetensors"], "error: data.features: expected a file or a folder, got none.safetensors"),
        (["data.features=README.md"], "error: data: README.md: not a feature file"),
        (["model.folder=none"], "error: model.folder: expected a folder with speech_lm.json, got none"),
        (["data.splits=[dev]"], "error: data: no example with a target"),
        (["model.feature_statistics=none"], "error: model.feature_statistics: expected a folder with speech_lm.json"),
        (["objective=kd", "teacher.folder=none"], "error: teacher.folder: expected a folder with speech_lm.json, got none"),
        (["objective=kd", "teacher.folder=x", "loss.impl=cuda"], "error: loss.impl: impl='cuda': expected tensors on"),
        (["run.device=gpu"], "error: run.device: expected auto, cpu"),
        (["run.resume=atuo"], "error: run.resume: expected never, auto, fallback or a checkpoint's folder, got 'atuo'"),
    ],
)
def test_mistakes_are_one_line(world, capsys, monkeypatch, words, message):
    monkeypatch.chdir(Path(__file__).parents[3])
    assert train(world, "sft_teacher", "never", *words) == 1
    assert message in capsys.readouterr().err


def test_a_missing_manifest_is_found_before_any_backbone_is_looked_for(world, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a backbone was looked for")

    monkeypatch.setattr("models.backbones.resolve.resolve_backbone", refuse)
    assert train(world, "sft_teacher", "never", "data.manifest=none.jsonl") == 1
    assert "error: data.manifest: none.jsonl" in capsys.readouterr().err


def test_conflicts_are_found_before_a_backbone_is_loaded(world, capsys, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a backbone was loaded")

    made_from = teacher_fingerprint(world / "teacher" / "final")
    with ContrastCache.writer(tmp_path / "c", fingerprint=made_from, hidden_size=64, dtype=torch.float32):
        pass
    with ContrastCache.writer(tmp_path / "s", fingerprint=made_from, hidden_size=64, dtype=torch.float32, layers=[1]):
        pass
    other = tmp_path / "other"
    shutil.copytree(world / "teacher" / "final", other)
    record = json.loads((other / "speech_lm.json").read_text())
    record["config"]["audio_frames"] += 1
    (other / "speech_lm.json").write_text(json.dumps(record))
    teacher = f"teacher.folder={world / 'teacher' / 'final'}"
    cache = [teacher, f"teacher.cache={tmp_path / 'c'}", "layers.weight=1"]
    some = [teacher, f"teacher.cache={tmp_path / 's'}", "layers.weight=1"]
    monkeypatch.setattr("models.backbones.resolve.load_causal_lm", refuse)
    monkeypatch.setattr("models.speech_lm.model.SpeechLM.from_pretrained", refuse)
    for objective, words, message in (
        ("caad", cache, "teacher.cache: expected the states of layers that layers.weight compares, got a cache without any"),
        ("caad", [*cache, "layers.pairs=[1-2]"], "layers that layers.pairs compares, got a cache without those of [2]"),
        ("caad", [*some, "layers.pairs=[1-2]"], "layers that layers.pairs compares, got a cache without those of [2]"),
        ("caad", some, "layers that layers.map compares, got a cache without those of [2"),
        ("caad", [f"teacher.folder={other}"], "teacher.folder: expected audio_frames"),
        ("sources", ["sources.a.role=audio", f"sources.a.folder={other}"], "sources.a.folder: expected audio_frames"),
        ("sft", ["run.parallel=ddp"], "run.parallel: expected none in a process that torchrun did not start, got 'ddp'"),
        ("sft", ["data.packing=varlen", "run.device=auto"], "data.packing: varlen needs"),
        ("sft", ["run.resume=none"], "run.resume: expected never, auto, fallback or a checkpoint's folder, got 'none'"),
    ):
        assert train(world, "sft", "never", f"objective={objective}", *words) in (1, 2)
        assert message in capsys.readouterr().err
    words = cache_words(world, tmp_path / "c", "--dtype", "bfloat16")
    assert cache_main([str(world / "teacher" / "final"), *words[1:]]) == 1
    assert "--dtype: expected float32, as the cache in" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train(world, "sft", "never", "run.parallel=ddp", "optim.batch_examples=4", "optim.micro_batch_examples=null") == 1
    assert "optim.batch_examples: expected a multiple of the 3 processes of run.parallel=ddp, got 4" in capsys.readouterr().err


def test_model_options_reach_a_new_model_too(world):
    """model.feature_statistics and model.bf16_products, without model.folder."""
    config = SpeechLM.from_pretrained(world / "untrained").config
    words = [f"model.settings.{k}={getattr(config, k)}" for k in ("lm", "encoder", "connector_width", "audio_frames")]
    words += ["model.settings.encoder_layers=[1,2]", "model.bf16_products=true"]
    words += [f"model.feature_statistics={world / 'untrained'}"]
    model = build_model(load_recipe("sft", words))
    saved = load_file(world / "untrained" / "connector.safetensors")
    assert torch.equal(model.connector.state_dict()["feature_mean"], saved["feature_mean"])
    assert any(type(module).__name__ == "_FrozenLinear" for module in model.lm.modules())


def test_a_new_model_is_fitted_to_its_training_features(world):
    words = [f"run.out_dir={world / 'new'}", f"data.manifest={world / 'm.jsonl'}", f"data.features={world / 'f.safetensors'}"]
    config = SpeechLM.from_pretrained(world / "untrained").config
    words += [f"model.settings.{k}={getattr(config, k)}" for k in ("lm", "encoder", "connector_width", "audio_frames")]
    words += ["model.settings.encoder_layers=[1,2]", "optim.steps=1", "optim.batch_examples=2", "run.device=cpu"]
    assert main(["sft_teacher", *words, "run.tensorboard=false", "run.progress_bar=false"]) == 0
    old, new = load_file(world / "untrained" / "connector.safetensors"), weights(world, "new")
    assert torch.allclose(old["feature_mean"], new["feature_mean"]) and torch.allclose(old["feature_std"], new["feature_std"])


def test_a_cache_of_other_targets_is_refused(world, capsys, tmp_path):
    hidden, made_from = torch.zeros(3, 64), teacher_fingerprint(world / "teacher" / "final")
    with ContrastCache.writer(tmp_path / "c", fingerprint=made_from, hidden_size=64, dtype=torch.float32) as writer:
        for i in range(12):
            writer.add(f"c{i}", hidden, hidden, torch.tensor([1, 2, 3]))
    words = [f"teacher.folder={world / 'teacher' / 'final'}", f"teacher.cache={tmp_path / 'c'}"]
    assert train(world, "caad", "never", *words) == 1
    assert "made for other targets" in capsys.readouterr().err


def test_missing_features_are_counted(world, capsys, tmp_path):
    examples = read_manifest(world / "m.jsonl").examples
    more = [dataclasses.replace(examples[0], id=f"x{i}", start_seconds=0.1 * i) for i in range(1, 4)]
    write_manifest(world / "more.jsonl", [*examples, *more])
    assert train(world, "sft_teacher", "never", f"data.manifest={world / 'more.jsonl'}") == 1
    assert "3 of 15 examples have no features, more than 5%" in capsys.readouterr().err


def test_cropping_takes_only_what_no_target_depends_on(world):
    model = SpeechLM.from_pretrained(world / "untrained").eval()
    read = read_manifest(world / "m.jsonl").examples[:4]
    examples = [dataclasses.replace(e, transcription=e.transcription * (1 + i)) for i, e in enumerate(read)]
    store = FeatureStore.load(world / "f.safetensors")
    collate = model.make_collator()
    whole = collate(examples, store.rows(examples))
    firsts = torch.cat([torch.ones(1, dtype=torch.bool), whole.target_row.diff() > 0])
    few = dataclasses.replace(whole, target_index=whole.target_index[firsts])
    for batch, dropped in ((whole, 1), (few, 15)):
        cropped = crop_to_targets(batch)
        # The last token of every row goes, and all of the target where only its first token is to be predicted.
        assert (batch.attention_mask.sum(1) - cropped.attention_mask.sum(1)).min() >= dropped
        for extra in ({}, {"prefix_cache": model.make_prefix_cache(dtype=torch.float32)}):
            with torch.no_grad():
                expected = model.hidden_states_at(batch.target_index, **batch.model_inputs(), **extra)
                got = model.hidden_states_at(cropped.target_index, **cropped.model_inputs(), **extra)
            assert torch.allclose(got, expected, atol=1e-5)


def test_a_second_run_into_a_folder_writes_nothing_there(world, capsys):
    with exclusive(world / "taken", "a training"):
        assert train(world, "sft_teacher", "taken", "data.features=null") == 1
    assert "taken: a training is at work there already, in another process" in capsys.readouterr().err
    assert [path.name for path in (world / "taken").iterdir()] == [".lock"]


def test_the_first_rank_alone_names_the_rows_that_are_skipped(world, tmp_path, monkeypatch, capsys):
    """After that the ranks go apart here: this process stands for each of them in turn."""
    rows = (world / "m.jsonl").read_text().splitlines()
    (world / "bad.jsonl").write_text("\n".join([rows[0], "{}", *rows[1:]]))
    printed = []
    for rank in (0, 1):
        ranks = Ranks(torch.device("cpu"), rank, 2)
        monkeypatch.setattr(Ranks, "started_by_torchrun", lambda *_, ranks=ranks: contextlib.nullcontext(ranks))
        monkeypatch.setattr("models.training.train._train_on", lambda *_: TrainResult(1, tmp_path, stopped_by=15))
        words = ("run.parallel=none", f"data.manifest={world / 'bad.jsonl'}", "data.max_bad_fraction=0.5")
        assert train(world, "sft_teacher", f"rank{rank}", *words) == 128 + 15
        printed.append(capsys.readouterr().out)
    assert "skipped" in printed[0] and "2" in printed[0] and printed[1] == ""


def _on_a_rank(failures, recipe):
    import torch.distributed as dist

    from models.training.train import _train_on

    ranks = Ranks(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    _train_on(ranks, recipe, *read_examples(recipe), ["caad"])


@pytest.mark.slow
def test_ranks_write_the_features_of_student_and_teacher_together(world, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = [
        f"data.manifest={world / 'm.jsonl'}", f"model.folder={world / 'untrained'}", "student.hears.snr_db=[0]",
        f"teacher.folder={world / 'teacher' / 'final'}", "optim.batch_examples=4", "optim.steps=3", "run.tensorboard=false",
        "run.device=cpu", "run.progress_bar=false", "run.log_every_steps=1", "run.parallel=ddp",
    ]  # fmt: skip
    for size in (1, 2):
        run_ranks(_on_a_rank, size, load_recipe("caad", [*words, f"run.out_dir={world / f'ranks-{size}'}"]))
    one, two = (read_metrics(world / f"ranks-{size}" / "metrics.jsonl") for size in (1, 2))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    for folder in ("features", "features/teacher"):
        alone, together = (sorted((world / f"ranks-{size}" / folder).glob("*.safetensors")) for size in (1, 2))
        assert (len(alone), len(together)) == (1, 2)  # each rank wrote its share
        assert sum(len(FeatureStore.load(path)) for path in together) == len(FeatureStore.load(alone[0])) == 12


@pytest.mark.slow
def test_training_writes_features_that_the_same_run_reads_again(world, monkeypatch):
    """Without data.features the clips are encoded into run.out_dir/features; the run is that of a feature file, bit for bit."""
    words = ["optim.steps=3", "model.fresh_connector=true"]
    assert train(world, "sft_teacher", "from_file", *words) == 0
    assert train(world, "sft_teacher", "from_shards", *words, "data.features=null") == 0
    assert all(torch.equal(x, weights(world, "from_shards")[name]) for name, x in weights(world, "from_file").items())
    assert list((world / "from_shards" / "features").glob("features-*.safetensors"))

    def refuse(*args, **options):
        raise AssertionError("a clip is encoded again")

    monkeypatch.setattr(SpeechLM, "encode_audio", refuse)
    more = ["optim.steps=5", "data.features=null", f"features.folder={world / 'from_shards' / 'features'}"]
    assert train(world, "sft_teacher", "again", *words[1:], *more) == 0
    assert train(world, "sft_teacher", "folder", *words, f"data.features={world / 'from_shards' / 'features'}") == 0
    assert torch.equal(weights(world, "folder")["queries"], weights(world, "from_file")["queries"])


@pytest.mark.slow
def test_the_cache_encodes_into_shards_and_leaves_none_behind(world):
    given, alone = world / "given_cache", world / "alone_cache"
    features = ("--features", str(world / "f.safetensors"))
    assert cache_main(cache_words(world, given, "--dtype", "float32")) == 0
    assert cache_main([word for word in cache_words(world, alone, "--dtype", "float32") if word not in features]) == 0
    assert not list(world.glob("alone_cache*features*"))
    one, other = (ContrastCache(folder) for folder in (given, alone))
    ids = [f"c{i}" for i in range(12)]
    assert torch.equal(one.get(ids).audio_hidden, other.get(ids).audio_hidden)
