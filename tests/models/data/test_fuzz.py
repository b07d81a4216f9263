"""Whatever bytes a manifest, a clip or a packaged model holds: a clean read or the module's own error, in bounded memory."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from models.backbones.ct2_whisper import Ct2FormatError, load_ct2_whisper, read_ct2_model
from models.data.audio import AudioError, load_audio
from models.data.manifest import ManifestError, read_manifest, write_manifest
from models.data.readers import FORMS, parse_description, read_foreign
from tests.models.backbones.test_ct2_whisper import ct2_variables, pack_model, tiny_whisper

MEMORY_MIB = 512


def damaged(whole: bytes, rng: random.Random, *, head: int = 1 << 30) -> bytes:
    """`whole` cut off, or with a few bytes of its first `head` changed, or both."""
    data = bytearray(whole)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            at = rng.randrange(min(len(data), head))
            data[at : at + rng.choice((1, 1, 4))] = rng.choice((b"\xff" * 4, b"\0" * 4, os.urandom(4), b"../", b"9e9", b"\x7f"))
    return bytes(data)


ROWS = [
    {"id": "a", "audio": "a.wav", "start_seconds": 0.5, "metadata": {"snr_db": -3.5, "x": [1, {"y": None}]}},
    {"id": "b", "audio": None, "choices": ["man", "woman"], "answer": "man", "transcription": "Où\u2028?"},
]
FOREIGN = {
    "desta": [
        {
            "id": "d",
            "audios": [{"audio": "a.wav", "text": "hi"}],
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "<start_audio>x<end_audio> What?"}],
            "seed_description": "[00:00-00:05] hi (Gender: man)",
            "target": "A man.",
        }
    ],
    "dynamic_superb": [
        {"file": "a.wav", "instruction": "Which? The answer could be yes, no or maybe.", "label": "Yes", "text": "t"}
    ],
    "mcr_bench": [
        {"audio": "a.wav", "gt": "A", "neutral": "Q?", "faithful": "f", "adversarial": "a", "irrelevant": "i"},
        {"id": 1, "audio": "a.wav", "question": "?", "options": {"A": "x", "B": "y"}, "answer": "A", "contexts": {"neutral": ""}},
    ],
    "messages": [
        {"messages": [{"role": "user", "content": "<audio>Q?"}, {"role": "assistant", "content": "A."}], "audios": ["a.wav"]},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}], "audio": {"path": "a.wav"}},
        {"query": "<audio>Q?", "response": "A.", "history": [["Q?", "A."]], "audios": "a.wav", "system": "s"},
    ],
    "columns": [{"path": "a.wav", "question": "Q?", "choices": {"A": "x", "B": "y"}, "answer": "A", "sentence": "t"}],
    "nemo": [{"audio_filepath": "a.wav", "offset": 0.25, "duration": 0.5, "text": "t", "answer": "x"}],
    "lhotse": [
        {
            "id": "c",
            "start": 0.25,
            "duration": 0.5,
            "supervisions": [{"start": 0.0, "text": "t", "speaker": "s", "custom": {"answer": "x"}}],
            "recording": {"sources": [{"type": "file", "source": "a.wav"}], "duration": 1.0},
        }
    ],
}


@pytest.mark.slow
def test_manifests_and_foreign_rows(tmp_path, in_child):
    from models.data.manifest import Example

    sf.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    path = write_manifest(tmp_path / "m.jsonl", [Example(**row) for row in ROWS])
    wholes = {"manifest": path.read_bytes()}
    for form, rows in FOREIGN.items():
        wholes[form] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        wholes[f"{form} array"] = json.dumps(rows).encode()
        assert not read_as(tmp_path, form, wholes[form]).problems
    wholes["kaldi"] = b"u1 a.wav\nu2 a.wav\n"

    def fuzz():
        rng = random.Random(1)
        read = refused = 0
        for number in range(2400):
            name = list(wholes)[number % len(wholes)]
            try:
                manifest = read_as(tmp_path, name, damaged(wholes[name], rng))
                json.dumps([example.to_row() for example in manifest], allow_nan=False)
                outside = [e.audio for e in manifest if e.audio and not (tmp_path / e.audio).resolve().is_relative_to(tmp_path)]
                assert not outside
                read += 1
            except ManifestError:
                refused += 1
        return read, refused

    read, refused = in_child(fuzz, memory_mib=MEMORY_MIB)
    assert read > 200 and refused > 200


def read_as(folder, name, data):
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    options = {"max_bad_fraction": 1.0}
    return read_manifest(path, **options) if name == "manifest" else read_foreign(path, form=name.split()[0], **options)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "x", "audio": null, "metadata": ' + '{"a":' * 900 + "1" + "}" * 901,
        '{"id": "x", "audio": null, "metadata": {"a": ' + "[" * 100 + "]" * 100 + "}}",
        '{"id": "x", "audio": null, "metadata": {"a": -Infinity}}',
        '{"id": "x", "audio": null, "metadata": {"a": NaN}}',
        '{"id": "x", "audio": "../../etc/passwd"}',
        '{"' + "k" * 900_000 + '": 1}',
        '{"id": "x", "audio": null, "split": "' + "s" * 900_000 + '"}',
    ],
    ids=lambda line: line[:60],
)
def test_rows_that_would_cost_memory_or_break_what_comes_after(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kdkernels_manifest": 1}\n{"id": "good", "audio": null}\n' + line + "\n")
    manifest = read_manifest(path, max_bad_fraction=0.5)
    (problem,) = manifest.problems
    assert [e.id for e in manifest] == ["good"] and problem.row == 3 and len(str(problem)) < 800


def test_metadata_as_deep_as_they_may_be_can_be_written_and_fingerprinted(tmp_path):
    from models.io_utils import fingerprint

    path = tmp_path / "m.jsonl"
    row = '{"id": "x", "audio": null, "metadata": ' + '{"a":' * 62 + "1" + "}" * 63
    path.write_text('{"kdkernels_manifest": 1}\n' + row + "\n")
    (example,) = read_manifest(path)
    assert fingerprint(example.to_row()) and read_manifest(write_manifest(path, [example])).examples == [example]


ROW = '"file": "a.wav", "instruction": "?", "label": "x"'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{" + ROW + "}", None),
        ("{" + ROW + ', "speaker": NaN}', "NaN is not a number"),
        ("{" + ROW + ', "speaker": 1e999}', "too large a number"),
        ("{" + ROW + ', "label": "y"}', "key 'label' twice"),
        ("{" + ROW + ', "speaker": ' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        ("[" * 50_000, "nested too deeply"),
        ('"\xff', "bad JSON|not UTF-8"),
        ("1", "expected an object, got int"),
    ],
)
@pytest.mark.parametrize(("name", "form"), [("rows.json", "[%s]"), ("metadata.json", '{"a.wav": %s}')])
def test_arrays_are_read_as_strictly_as_lines(tmp_path, row, message, name, form):
    path = tmp_path / name
    path.write_text(form % row)
    if message is None:
        assert len(read_foreign(path, form="dynamic_superb", check_audio=False)) == 1
        return
    with pytest.raises(ManifestError, match=rf"(?s){name}: .*row 1: .*({message})"):
        read_foreign(path, form="dynamic_superb", check_audio=False)


def test_an_array_too_large_to_be_taken_into_memory(tmp_path, monkeypatch):
    from models.data import json_rows

    monkeypatch.setattr(json_rows, "_MAX_ARRAY_BYTES", 100)
    (tmp_path / "rows.json").write_text(json.dumps(FOREIGN["mcr_bench"]))
    with pytest.raises(ManifestError, match="more than 100 bytes in one JSON value"):
        read_foreign(tmp_path / "rows.json", form="mcr_bench")


def test_no_text_takes_the_readers_long(tmp_path):
    """Each of these took a pattern the square of its length, or more."""
    blanks, marks = " " * 400_000, "<start_audio>" * 40_000
    rows = [
        {**FOREIGN["desta"][0], "id": "1", "seed_description": f"[00:00-00:01] a{blanks}b"},
        {**FOREIGN["desta"][0], "id": "2", "messages": [{"role": "user", "content": marks}]},
        {**FOREIGN["desta"][0], "id": "3", "seed_description": "[" + "9" * 400 + ":00-00:01] a (b: c)"},
    ]
    sf.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    started = time.monotonic()
    manifest = read_as(tmp_path, "desta", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert [e.id for e in manifest] == ["1", "2", "3"]
    row = {"file": "a.wav", "instruction": f"The answer could be yes{blanks}x.", "label": "Yes"}
    read_as(tmp_path, "dynamic_superb", json.dumps(row).encode())
    assert time.monotonic() - started < 20  # minutes, before
    assert parse_description("[00:00-00:05] hi (Gender: man)")[1] == {"gender": "man"}
    assert parse_description("[00:00-00:05] " + "x" * 4096 + " (Gender: man)") is None


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au", ".w64", ".caf", ".rf64"])
def test_damaged_audio(tmp_path, in_child, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"a{suffix}"
    sf.write(path, 0.1 * rng.standard_normal((8_000, 2)), 16_000)
    whole = path.read_bytes()

    def fuzz():
        rng = random.Random(2)
        read = refused = 0
        for number in range(60):
            path.write_bytes(damaged(whole, rng, head=(64, 400, 1 << 30)[number % 3]))
            try:
                samples = load_audio(path)
                assert samples.dtype == np.float32 and 0 < samples.size <= 30 * 16_000 and np.isfinite(samples).all()
                read += 1
            except AudioError as error:
                assert "\n" not in str(error)
                refused += 1
        return read, refused

    read, refused = in_child(fuzz, memory_mib=MEMORY_MIB)
    assert read + refused == 60 and refused > 0


def test_damaged_ct2_models(tmp_path, in_child):
    whole = pack_model(ct2_variables(tiny_whisper()), [("decoder/projection/weight", "decoder/embeddings/weight")])
    path = tmp_path / "model.bin"

    def fuzz():
        rng = random.Random(3)
        read = refused = 0
        for number in range(150):
            path.write_bytes(damaged(whole, rng, head=(100, 3000, 1 << 30)[number % 3]))
            try:
                read_ct2_model(path)
                read += 1
            except Ct2FormatError as error:
                assert "model.bin" in str(error)
                refused += 1
        return read, refused

    read, refused = in_child(fuzz, memory_mib=MEMORY_MIB)
    assert read > 5 and refused > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder/embeddings/weight": np.zeros((4_000_000, 1), np.float32)}, "do not fit a Whisper"),
        ({"encoder/layer_norm/gamma": np.zeros(1_000_000, np.float32)}, "do not fit a Whisper|not those of a Whisper"),
        ({"encoder/conv1/weight": np.zeros(3, np.float32)}, "not those of a Whisper|do not fit"),
        ({"encoder/layer_0/ffn/linear_0/weight": np.zeros((), np.float32)}, "not those of a Whisper|do not fit"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_shapes_of_a_ct2_model_that_would_make_a_huge_one(tmp_path, in_child, change, message):
    """Four million words of width a million: 16 MB and 4 MB of file, 16 TB of model."""
    path = tmp_path / "model.bin"
    path.write_bytes(pack_model({**ct2_variables(tiny_whisper()), **change}))

    def load():
        with pytest.raises(Ct2FormatError, match=message):
            load_ct2_whisper(path)

    in_child(load, memory_mib=1024)


def test_ct2_headers_that_claim_what_costs_nothing(tmp_path):
    data = pack_model({"a": np.arange(3, dtype=np.float32)})
    at = data.index(struct.pack("<BI", 0, 12))
    path = tmp_path / "model.bin"
    path.write_bytes(data[: at - 5] + b"\x02" + struct.pack("<IIBI", 2**32 - 1, 0, 0, 0) + data[at + 17 :])
    with pytest.raises(Ct2FormatError, match=r"'a' of shape \[4294967295, 0\] is empty"):
        read_ct2_model(path)
    path.write_bytes(data[: at - 5] + b"\xff" + struct.pack("<I", 1) * 254 + data[at - 4 :])
    with pytest.raises(Ct2FormatError, match="'a' has 255 dimensions, expected at most 8"):
        read_ct2_model(path)


def tiny_gguf(path: Path, *, architecture: str = "llama", pre: str | None = None, **changes) -> bytes:
    """A model of one layer, eight wide, six tokens."""
    gguf = pytest.importorskip("gguf", reason="the package reads GGUF files")
    numbers = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 12, "head_count": 2, **changes}
    made = gguf.GGUFWriter(path, architecture)
    made.add_context_length(32)
    made.add_embedding_length(numbers["embedding_length"])
    made.add_block_count(numbers["block_count"])
    made.add_feed_forward_length(numbers["feed_forward_length"])
    made.add_head_count(numbers["head_count"])
    made.add_layer_norm_rms_eps(1e-5)
    made.add_tokenizer_model("gpt2")
    if pre is not None:
        made.add_tokenizer_pre(pre)
    made.add_token_list(["<s>", "a", "b", "c", "ab", "bc"])
    made.add_token_types([3, 1, 1, 1, 1, 1])
    made.add_token_merges(["a b", "b c"])
    made.add_bos_token_id(0)
    shapes = {"token_embd": (6, 8), "output_norm": (8,)}
    shapes |= {f"blk.0.{name}": (8, 8) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
    shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        made.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
    for name in ("attn_q", "attn_k", "attn_v") if architecture == "qwen2" else ():
        made.add_tensor(f"blk.0.{name}.bias", generator.standard_normal(8).astype(np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return path.read_bytes()


def test_gguf_files_damaged_or_claiming_too_much(tmp_path, in_child):
    from models.backbones.gguf_llama import GgufFormatError, load_gguf_llama

    path = tmp_path / "m.gguf"
    whole = tiny_gguf(path)
    model, tokenizer = load_gguf_llama(path)
    assert model(input_ids=torch.arange(6)[None]).logits.isfinite().all() and tokenizer.encode("ab") == [4]

    def fuzz():
        rng = random.Random(4)
        read = refused = 0
        for number in range(120):
            path.write_bytes(damaged(whole, rng, head=(40, 700, 2000)[number % 3]))
            try:
                load_gguf_llama(path)
                read += 1
            except GgufFormatError as error:
                assert "m.gguf" in str(error)
                refused += 1
        return read, refused

    assert in_child(fuzz, memory_mib=MEMORY_MIB)[1] > 60
    for change, message in (
        ({"block_count": 2**31 - 1}, "the header says 2147483647 layers, the tensors are those of 1"),
        ({"embedding_length": 2**30}, "do not fit the file's own configuration|damaged"),
        ({"feed_forward_length": 2**31 - 1}, "do not fit the file's own configuration"),
        ({"head_count": 0}, "damaged"),
    ):
        tiny_gguf(path, **change)

        def load(message=message):
            with pytest.raises(GgufFormatError, match=message):
                load_gguf_llama(path)

        in_child(load, memory_mib=MEMORY_MIB)
    with pytest.raises(FileNotFoundError):
        load_gguf_llama(tmp_path / "no.gguf")


def test_a_gguf_of_qwen2_is_the_model_with_its_biases_and_its_order_of_rotary_pairs(tmp_path):
    from gguf import GGUFReader

    from models.backbones.gguf_llama import GgufFormatError, load_gguf_llama

    path = tmp_path / "q.gguf"
    tiny_gguf(path, architecture="qwen2", pre="qwen2")
    model, tokenizer = load_gguf_llama(path)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.model_type == "qwen2"
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(path).tensors}
    layer = model.model.layers[0].self_attn
    assert torch.equal(layer.q_proj.weight, stored["blk.0.attn_q.weight"])  # a Llama's rows would be in another order
    assert torch.equal(layer.k_proj.bias, stored["blk.0.attn_k.bias"]) and layer.o_proj.bias is None
    said = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12 I'LL\n\nGo!")
    assert [word for word, _ in said] == ["It", "'s", "Ġ", "1", "2", "ĠI", "'LL", "ĊĊ", "Go", "!"]
    tiny_gguf(path, architecture="mamba")
    with pytest.raises(GgufFormatError, match="expected the architecture llama or qwen2, got 'mamba'"):
        load_gguf_llama(path)


def test_only_formats_that_cannot_run_code_are_read():
    """No pickle: in the sources of models/ and kdkernels/ nothing loads one."""
    root = Path(__file__).parents[3]
    pattern = r"torch\.load\(|pickle\.load|allow_pickle=True|yaml\.(unsafe_)?load\(|joblib"
    command = ["git", "-C", str(root), "grep", "-nE", pattern, "--", "models/*.py", "kdkernels/*.py"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1 and not found.stdout, found.stdout + found.stderr


assert {*FOREIGN, "kaldi"} == set(FORMS)
