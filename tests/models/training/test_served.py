"""A cache from states that a server has dumped: files made here to the layouts of vLLM and SGLang."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kdkernels.contrast_cache import ContrastCache
from kdkernels.layer_states import decoder_layers, final_norm
from models.audio_lms.clips import ClipReader
from models.audio_lms.model import AudioLM
from models.cli import main as models
from models.data.manifest import read_manifest
from models.training.cache_identity import CacheError, sample_content
from models.training.served import Request, StateCheck, fill_from_server, parse_served_layers, read_requests
from tests.models.audio_lms.audio_world import make_world

pytestmark = pytest.mark.slow
TOP = 8  # log-probabilities that the server gives of each token


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a teacher and its manifest, and what a server says about each sample and path."""
    folder = make_world(tmp_path_factory.mktemp("world"), "qwen2_audio", examples=3)
    model = AudioLM.from_pretrained(folder / "teacher")
    with torch.no_grad():  # as in a trained model: a norm that is no identity on its own output, and sure tokens
        final_norm(model.lm).weight.uniform_(0.3, 3.0, generator=torch.Generator().manual_seed(0))
        model.get_output_embeddings().weight.mul_(2.0)
    model.save_pretrained(folder / "teacher")
    examples = read_manifest(folder / "manifest.jsonl").examples
    clips = ClipReader(folder, sampling_rate=model.sampling_rate)
    said = {}
    for example in examples:
        for path in ("audio", "text"):
            heard = clips.rows([example]) if path == "audio" else [None]
            said[example.id, path] = serve(model, model.make_collator()([example], heard))
    return folder, model, examples, clips, said


@torch.no_grad()
def serve(model, batch):
    """One request: token ids (L,), each layer's output (L, layers, H), the head's input (L, H), log-probabilities (L,)."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder_layers(model.lm)
    ]
    inputs = model._masked({k: v for k, v in batch.model_inputs().items() if k not in ("entries", "audio_present")}, None, None)
    logits = model.lm(**inputs).logits[0]
    for handle in handles:
        handle.remove()
    raw = torch.cat([x[0][:, None] for x in outputs], dim=1)
    logprobs: list = [None]
    for row, token in zip(logits.log_softmax(-1)[:-1], batch.input_ids[0, 1:].tolist(), strict=True):
        ids = {*row.topk(TOP).indices.tolist(), token}
        logprobs.append({id: float(row[id]) for id in ids})
    return {"tokens": batch.input_ids[0], "raw": raw, "normed": final_norm(model.lm)(raw[:, -1]), "logprobs": logprobs}


def vllm_line(folder, sample, path, one, *, states=None, response=True):
    """The connector's file, and the line that names it."""
    file = folder / "states" / f"{sample}-{path}.safetensors"
    file.parent.mkdir(exist_ok=True)
    states = one["raw"][:, -1:] if states is None else states
    save_file({"hidden_states": states.contiguous(), "token_ids": one["tokens"].clone()}, file)
    as_json = {"rank": 1, "decoded_token": "?"}
    logprobs = [entry and {str(t): {"logprob": x, **as_json} for t, x in entry.items()} for entry in one["logprobs"]]
    if not response:
        return {"id": sample, "path": path, "file": f"states/{file.name}", "prompt_logprobs": logprobs}
    answer = {"choices": [{"text": "x", "prompt_logprobs": logprobs}]}
    answer["kv_transfer_params"] = {"hidden_states_path": f"/srv/{file.name}"}
    file.rename(folder / file.name)  # copied from the server's own folder
    return {"id": sample, "path": path, "response": answer}


def sglang_line(sample, path, one, *, cached=0):
    """A response of /generate; the server had `cached` tokens in its prefix cache and made one token itself."""
    tokens = one["tokens"].tolist()
    own = [[None, tokens[0], None]]
    own += [[entry[t], t, None] for entry, t in zip(one["logprobs"][1:], tokens[1:], strict=True)]
    top = [entry and [[x, t, None] for t, x in entry.items()] for entry in one["logprobs"]]
    states = [one["normed"][cached:].tolist(), one["normed"][-1].tolist()]
    info = {"hidden_states": states, "input_token_logprobs": own, "input_top_logprobs": top, "prompt_tokens": len(tokens)}
    return {"id": sample, "path": path, "response": {"text": "x", "meta_info": info}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(folder, out, requests, *more):
    words = ["cache", str(folder / "teacher"), str(folder / "manifest.jsonl"), "--out", str(out), "--dtype", "float32"]
    return [*words, "--teacher-dtype", "float32", "--device", "cpu", "--served", str(requests), *more]


@pytest.mark.parametrize("form", ["vllm", "vllm file", "sglang"])
def test_the_cache_holds_what_the_head_reads(world, tmp_path, form, capsys):
    folder, model, examples, clips, said = world
    rows = []
    for (sample, path), one in said.items():
        if form == "sglang":
            rows.append(sglang_line(sample, path, one, cached=5 if path == "audio" else 0))
        else:
            rows.append(vllm_line(tmp_path, sample, path, one, response=form == "vllm"))
    for part in ("0/2", "1/2"):
        assert models(command(folder, tmp_path / "cache", write(tmp_path / "r.jsonl", rows), "--part", part)) == 0
        assert "3 samples written" in capsys.readouterr().out
    cache = ContrastCache(tmp_path / "cache")
    for example in examples:
        states, target = cache[example.id], model.make_collator().target_ids(example)
        assert states.target.tolist() == target
        for path, got in (("audio", states.audio_hidden), ("text", states.text_hidden)):
            wanted = said[example.id, path]["normed"][-len(target) - 1 : -1]
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
        assert cache.content(example.id) == sample_content(example, clips.rows([example])[0])  # as `cache` without a server


def test_layers_and_resume_after_a_kill(world, tmp_path, capsys):
    folder, _, examples, _, said = world
    rows = [vllm_line(tmp_path, s, p, one, states=one["raw"][:, [0, 2]], response=False) for (s, p), one in said.items()]
    options = ["--layers", "1", "--served-layers", "1,3"]
    requests = write(tmp_path / "r.jsonl", rows[:5])  # two samples, and half of one
    with requests.open("a") as file:
        file.write('{"id": "test-1", "path": "te')  # what the server was writing
    assert models(command(folder, tmp_path / "cache", requests, *options)) == 1
    shown = capsys.readouterr()
    assert "2 samples written" in shown.out and "4 of 6 samples are not in it: train-1, " in shown.err
    assert len(ContrastCache(tmp_path / "cache")) == 2
    assert models(command(folder, tmp_path / "cache", write(requests, rows), *options)) == 0
    assert "4 samples written" in capsys.readouterr().out
    cache = ContrastCache(tmp_path / "cache")
    assert cache.layers == (1,) and len(cache) == len(examples)
    count = cache.rows("train-0")
    got = cache["train-0"].text_layers[:, 0]
    torch.testing.assert_close(got, said["train-0", "text"]["raw"][-count - 1 : -1, 0], rtol=0, atol=0)
    assert models(command(folder, tmp_path / "cache", requests, "--layers", "2", "--served-layers", "1,3")) == 1
    assert "--layers: expected some of --served-layers [1, 3], got 2" in capsys.readouterr().err


def check_of(world, layers=(3,)):
    return StateCheck(world[1], layers)


def request_of(one, states, *, normed):
    return Request(one["tokens"].tolist(), states, one["logprobs"], normed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda one: request_of(one, one["normed"][:, None], normed=False), "; states without the final norm would fit"),
        (lambda one: request_of(one, one["raw"][:, -1:], normed=True), "; states with the final norm would fit"),
        (lambda one: request_of(one, one["raw"][:, -1:].roll(1, 0), normed=False), "; states of one token later would fit"),
        (lambda one: request_of(one, one["raw"][:, -1:].roll(-1, 0), normed=False), "; states of one token earlier would fit"),
        (lambda one: request_of(one, one["raw"][:, 1:2], normed=False), r"on average \(at most 0.1 are allowed\)$"),
        (lambda one: request_of(one, 1.3 * one["normed"][:, None], normed=True), r"on average \(at most 0.1 are allowed\)$"),
        (lambda one: request_of(one, torch.full_like(one["raw"][:, -1:], torch.nan), normed=False), "nan nats"),
    ],
)
def test_wrong_states_are_found(world, wrong, message):
    _, model, examples, _, said = world
    target = model.make_collator().target_ids(examples[0])
    one = said[examples[0].id, "audio"]
    check_of(world).states_of(request_of(one, one["raw"][:, -1:], normed=False), target)
    with pytest.raises(ValueError, match="the LM head gives other log-probabilities than the server, by .*?" + message):
        check_of(world).states_of(wrong(one), target)


def test_another_layer_of_the_request_is_named(world):
    _, model, examples, _, said = world
    one = said[examples[0].id, "text"]
    target = model.make_collator().target_ids(examples[0])
    swapped = request_of(one, one["raw"][:, [2, 0]], normed=False)
    with pytest.raises(ValueError, match="; states of layer 1 would fit"):
        check_of(world, (1, 3)).states_of(swapped, target)


def test_states_with_the_same_best_tokens_are_found(world):
    """Scaled states name the best token of every position as the right ones do: agreement alone would see nothing."""
    check = check_of(world)
    for one in world[4].values():
        right, wrong = check.head.logits(one["normed"]), check.head.logits(1.3 * one["normed"])
        assert torch.equal(right.argmax(-1), wrong.argmax(-1))


def test_a_report_says_how_well_they_agree(world):
    _, model, examples, _, said = world
    check = check_of(world)
    one = said[examples[0].id, "audio"]
    check.states_of(request_of(one, one["raw"][:, -1:], normed=False), model.make_collator().target_ids(examples[0]))
    rounded = request_of(one, one["raw"][:, -1:].bfloat16(), normed=False)  # as a server in bfloat16 keeps them
    check_of(world).states_of(rounded, model.make_collator().target_ids(examples[0]))
    assert check.compared >= TOP * 2 and check.largest < 1e-4 and "log-probabilities of the server differ from" in check.report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(path="sound"), "expected id, a string, and path, audio or text, got 'sound'"),
        (lambda row: row.pop("file"), "expected a response of vLLM or SGLang, or file and prompt_logprobs"),
        (lambda row: row.update(file="none.safetensors"), "none.safetensors"),
        (lambda row: row["prompt_logprobs"].pop(), r"log-probabilities: expected \d+, one a token, got \d+"),
        (lambda row: row.update(prompt_logprobs=[None] * len(row["prompt_logprobs"])), "expected log-probabilities of"),
        (lambda row: row.update(response={"meta_info": {}}), "expected a response of vLLM or SGLang"),
    ],
)
def test_a_request_that_does_not_fit_is_named(world, tmp_path, change, message):
    _, model, examples, clips, said = world
    rows = [vllm_line(tmp_path, s, p, one, response=False) for (s, p), one in said.items()][:2]
    change(rows[1])
    with pytest.raises(CacheError, match=rf"line 2 \(sample '{rows[1]['id']}'\): .*{message}"):
        fill_from_server(
            tmp_path / "cache", model, clips, examples, write(tmp_path / "r.jsonl", rows), made_from={}, check=check_of(world),
            progress_bar=False,
        )  # fmt: skip


def test_other_tokens_than_the_targets_are_refused(world):
    _, model, examples, _, said = world
    one = said[examples[0].id, "audio"]
    request = request_of(one, one["raw"][:, -1:], normed=False)
    with pytest.raises(ValueError, match="expected the request to end with the target's tokens"):
        check_of(world).states_of(request, [5, *model.make_collator().target_ids(examples[0])[1:]])
    with pytest.raises(ValueError, match=r"expected the states of 2 layers of width 48, got \(1, 48\)"):
        check_of(world, (1, 3)).states_of(request, model.make_collator().target_ids(examples[0]))
    short = request_of(one, one["raw"][-2:, -1:], normed=False)
    with pytest.raises(ValueError, match="got 2; turn the server's prefix cache off"):
        check_of(world).states_of(short, model.make_collator().target_ids(examples[0]))


def test_options(world, tmp_path, capsys):
    folder = world[0]
    assert parse_served_layers(None, 3) == (3,) and parse_served_layers("1,3", 3) == (1, 3)
    for text in ("4", "1,1", "a"):
        with pytest.raises(CacheError, match="--served-layers: expected different numbers from 0 to 3"):
            parse_served_layers(text, 3)
    with pytest.raises(CacheError, match="expected the last one to be 3"):
        check_of(world, (3, 1))
    assert models(command(folder, tmp_path / "c", tmp_path / "none.jsonl")) == 1
    assert "none.jsonl: not readable" in capsys.readouterr().err
    assert models(command(folder, tmp_path / "c", "r", "--served-tolerance", "0")) == 1
    assert "--served-tolerance: expected a positive number of nats" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(CacheError, match="line 1 is damaged: expected an object, got list"):
        list(read_requests(tmp_path / "bad.jsonl"))
