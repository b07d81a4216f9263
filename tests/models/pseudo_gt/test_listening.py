"""Stage 1 by free answers of a model that hears: an audio LM of transformers, or a SpeechLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdkernels.decoding import contrastive_generate
from kdkernels.teacher import MarkAbsent
from models.audio_lms.clips import ClipReader
from models.audio_lms.model import AudioLM
from models.cli import main as models
from models.data.audio import load_audio, write_audio
from models.data.manifest import Example, read_manifest, write_manifest
from models.pseudo_gt import listening
from models.pseudo_gt.listening import Listening, ListeningWriter
from models.pseudo_gt.stage1 import Stage1Error, run_stage1
from models.speech_lm.features import FeatureError
from tests.models.audio_lms import tiny_audio_lms as tiny
from tests.models.tiny_speech import make_speech_lm


def _questions(folder: Path, count: int = 5) -> list[Example]:
    examples = []
    for number in range(count):
        write_audio(folder / f"{number}.wav", tiny.tone(300.0 + 250 * number, seconds=0.4 + 0.05 * number, seed=number))
        examples.append(
            Example(id=f"q{number}", audio=f"{number}.wav", question="What do you hear?", metadata={"duration_seconds": 0.4})
        )
    return examples


def _audio_lm(folder: Path, examples: list[Example]) -> Path:
    """A random Qwen2-Audio that ends its answers, each at its own length: one of its favourite tokens is the end."""
    made = tiny.FAMILIES["qwen2_audio"](folder / "audio-lm", seed=1)
    model = AudioLM.from_pretrained(made)
    batch = model.make_collator()(examples, ClipReader(folder, sampling_rate=16_000).rows(examples), with_target=False)
    rows = model.answer_ids(batch, max_new_tokens=12)
    later = [token for row in rows for token in row[3:]]
    favourite = max(set(later), key=later.count)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[model.end_ids[-1]] = 1.01 * head[favourite]
    model.save_pretrained(made)
    return made


def _written(out: Path) -> list[str]:
    """The answers of a run as they are, whether accepted or not."""
    files = [path for path in (out, out.with_name(f"{out.name}.rejects.jsonl")) if path.exists()]
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return [row.get("target", row.get("text")) for row in sorted(rows, key=lambda row: row.get("id", "")) if "id" in row]


@pytest.mark.slow
def test_an_audio_lm_answers_freely_and_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    examples = _questions(tmp_path)
    write_manifest(tmp_path / "in.jsonl", examples)
    model = _audio_lm(tmp_path, examples)
    words = ["pseudo-gt", str(tmp_path / "in.jsonl"), "--source", "audio_lm", "--audio-lm", str(model), "--device", "cpu"]
    words += ["--dtype", "float32", "--batch-examples", "2", "--max-reject-fraction", "1", "--max-new-tokens", "12"]
    assert models([*words, "--out", str(tmp_path / "whole.jsonl")]) == 0

    # The answers are those of the model, batch by batch; one that did not end within 12 tokens is rejected.
    lm = AudioLM.from_pretrained(model)
    reader = ClipReader(tmp_path, sampling_rate=16_000)
    expected = {}
    for start in range(0, 5, 2):
        group = examples[start : start + 2]
        batch = lm.make_collator()(group, reader.rows(group), with_target=False)
        for example, row in zip(group, lm.answer_ids(batch, max_new_tokens=12), strict=True):
            text = lm.tokenizer.decode(row, skip_special_tokens=True).strip()
            expected[example.id] = (text, row[-1] in lm.end_ids)
    read = read_manifest(tmp_path / "whole.jsonl")
    accepted = {e.id: e.target for e in read}
    rejects = tmp_path / "whole.jsonl.rejects.jsonl"
    reasons = {row["id"]: row["reason"] for row in map(json.loads, rejects.read_text().splitlines())}
    assert accepted and "cut off" in reasons.values() and accepted.keys() | reasons.keys() == expected.keys()
    for name, (text, ended) in expected.items():
        if name in accepted:
            assert ended and accepted[name] == " ".join(text.split())
        else:
            assert reasons[name] == ("empty" if not text else "cut off" if not ended else reasons[name])
    assert {e.target_source for e in read} == {"audio_lm"} and read.header["stage1"]["listening"]["model"] == str(model)

    # Killed at the second batch, it goes on with the same answers; when it is finished, nothing is asked again.
    call, asked = ListeningWriter.__call__, []

    def dies(self, group):
        asked.append([e.id for e in group])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return call(self, group)

    monkeypatch.setattr(ListeningWriter, "__call__", dies)
    again = [*words, "--out", str(tmp_path / "again.jsonl")]
    assert models(again) == 130 and models(again) == 0
    assert asked == [["q0", "q1"], ["q2", "q3"], ["q2", "q3"], ["q4"]]
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert models(again) == 0 and len(asked) == 4
    monkeypatch.undo()

    # Another model under the same name, or another decoding, is another run.
    capsys.readouterr()
    assert models([*words, "--out", str(tmp_path / "contrast.jsonl"), "--alpha", "1", "--plausibility", "0.1"]) in (0, 1)
    contrast = _written(tmp_path / "contrast.jsonl")  # with the status 1 all of these answers are rejected
    assert len(contrast) == 5 and contrast != _written(tmp_path / "whole.jsonl")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "other": 1}))
    with monkeypatch.context() as patched:
        patched.setattr(ListeningWriter, "__call__", lambda self, group: ["Heard."] * len(group))
        assert models(again) == 1
        assert "which rows get targets, the model or the wording); choose another --out" in capsys.readouterr().err
        assert models([*again, "--restart"]) == 0
    assert {e.target for e in read_manifest(tmp_path / "again.jsonl")} == {"Heard."}


def test_answers_about_a_clip_that_has_changed_are_asked_again(tmp_path):
    write_manifest(tmp_path / "in.jsonl", [*_questions(tmp_path, 4), Example(id="text", audio=None, question="Who are you?")])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "speech_lm.json").write_text("{}")
    asked = []

    def write(group):
        asked.append([e.id for e in group])
        if group[0].id == "q3" and not (tmp_path / "go").exists():
            raise KeyboardInterrupt
        return [f"Heard {len(asked)}." for _ in group]

    def run(**restart):
        asked.clear()
        options = {"source": "audio_lm", "listening": Listening(str(tmp_path / "model")), "writer": write, "batch_examples": 1}
        report = run_stage1(read_manifest(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", progress=False, **options, **restart)
        return report.resumed, sorted(id for group in asked for id in group)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert asked == [["text"], ["q0"], ["q1"], ["q2"], ["q3"]]
    write_audio(tmp_path / "1.wav", tiny.tone(2000.0, seconds=0.4))
    (tmp_path / "0.wav").touch()  # the same sound
    (tmp_path / "go").touch()
    assert run() == (3, ["q1", "q3"])
    assert run() == (5, [])
    write_audio(tmp_path / "2.wav", tiny.tone(2500.0, seconds=0.4))
    with pytest.raises(Stage1Error, match=r"of other audio \(not the same: clips\); choose another --out or --restart"):
        run()
    assert run(restart=True) == (0, ["q0", "q1", "q2", "q3", "text"])  # the result of other clips is no result of these


def test_a_speech_lm_answers_and_encodes_each_clip_once(tmp_path, monkeypatch):
    examples = _questions(tmp_path, 2)
    other = Example(id="other", audio="0.wav", question="Who speaks?", context="A note.")
    text = Example(id="text", audio=None, question="Who are you?")
    model, encoded = make_speech_lm(), []
    features = model.encode_audio([load_audio(tmp_path / f"{n}.wav") for n in (0, 1)])
    monkeypatch.setattr(type(model), "encode_audio", lambda self, waves: encoded.append(len(waves)) or features)

    def written(asked, **decoding):
        writer = ListeningWriter(model, tmp_path, listening=Listening("unused", **decoding), max_new_tokens=5)
        answers = writer(asked)
        assert not any(answer.ended for answer in answers)  # random weights find no end
        return writer, answers

    asked = [*examples, other, text]
    batch = model.make_collator()(asked, torch.cat([features, features[:1], features[:1]]), with_target=False)
    writer, answers = written(asked)
    assert answers == model.generate(batch, max_new_tokens=5)
    tokens = contrastive_generate(
        model, batch.model_inputs(), negative=MarkAbsent(), alpha=1.0, plausibility=0.1, max_new_tokens=5, eos_token_id=[]
    )
    _, contrasted = written(asked, alpha=1.0, plausibility=0.1)
    assert contrasted == [t.strip() for t in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)] != answers
    assert encoded == [2, 2]
    assert len(writer([text])) == 1 and encoded == [2, 2]  # without a clip nothing is encoded
    with pytest.raises(ValueError, match=r"example 'two': clips: expected one with a SpeechLM, got 2"):
        writer.check([Example(id="two", audio="0.wav", more_audio=("1.wav",))])


def test_clips_that_are_longer_than_the_models_window_are_counted(tmp_path, capsys):
    examples = _questions(tmp_path, 3)
    for name in ("1.wav", "3.wav"):
        write_audio(tmp_path / name, tiny.tone(300.0, seconds=3.0))
    examples += [Example(id="span", audio="3.wav", start_seconds=1.0, end_seconds=1.5), Example(id="again", audio="1.wav")]
    examples += [Example(id="gone", audio="gone.wav"), Example(id="text", audio=None)]
    ListeningWriter(make_speech_lm(), tmp_path, listening=Listening("unused"), max_new_tokens=2).check(examples)  # it hears 1 s
    assert "1 of 5 clips are longer than the 1 s that the model hears" in capsys.readouterr().err
    strict = Listening("unused", max_cut_fraction=0.1)
    assert strict.settings() == Listening("unused").settings()
    with pytest.raises(FeatureError, match=r"1 of 5 clips are longer .* that is more than max_cut_fraction 0.1"):
        ListeningWriter(make_speech_lm(), tmp_path, listening=strict, max_new_tokens=2).check(examples)
    with pytest.raises(ValueError, match=r"max_cut_fraction: expected a number in \[0, 1\], got 1.5"):
        Listening("unused", max_cut_fraction=1.5)
    short = AudioLM.from_pretrained(tiny.FAMILIES["qwen2_audio"](tmp_path / "lm"))
    short.processor.feature_extractor.chunk_length = 1
    with pytest.raises(FeatureError, match=r"1 of 5 clips are longer than the 1 s .* that is more than max_cut_fraction 0.1"):
        ListeningWriter(short, tmp_path, listening=strict, max_new_tokens=2).check(examples)


def test_a_model_of_nan_has_no_answer(tmp_path):
    examples = _questions(tmp_path, 2)
    model = make_speech_lm()
    model.connector.output_scale.data.fill_(torch.nan)
    writer = ListeningWriter(model, tmp_path, listening=Listening("unused"), max_new_tokens=2)
    with pytest.raises(ValueError, match="example 'q0': the model's logits are NaN"):
        writer(examples)


def test_what_the_listener_hears_and_reads_can_be_chosen(tmp_path):
    seen = []
    (example,) = _questions(tmp_path, 1)

    class Model:
        device, tokenizer = "cpu", None

        def make_collator(self):
            def collate(examples, features, *, with_target):
                seen.extend(examples)
                raise InterruptedError

            return collate

        def encode_audio(self, waves):
            seen.append(waves[0])
            return torch.zeros(1, 1, 1, 1)

    hears = listening.Hearing(band="narrow", question="Please answer: {question}")
    writer = ListeningWriter(Model(), tmp_path, listening=Listening("m", hears=hears), max_new_tokens=1)
    with pytest.raises(InterruptedError):
        writer([example])
    assert seen[1].question == "Please answer: What do you hear?"
    assert abs(seen[0] - load_audio(tmp_path / "0.wav")).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--audio-lm: expected a model with --source audio_lm, got none"),
        (["--audio-lm", "gone/model"], "gone/model: expected a hub id or a folder of an audio LM"),
        (["--audio-lm", "m", "--backbone", "x"], "--backbone: expected --source text_backbone beside it, got audio_lm"),
        (["--audio-lm", "m", "--alpha", "-1"], "--alpha: expected a finite number >= 0, got -1.0"),
        (["--audio-lm", "m", "--plausibility", "0.1"], "--plausibility: expected None without alpha, got 0.1"),
        (["--audio-lm", "m", "--alpha", "1", "--plausibility", "2"], "--plausibility: expected a number in (0, 1], got 2.0"),
        (["--audio-lm", "m", "--hears", "band=huge"], "--hears band: expected one of full"),
        (["--source", "template", "--alpha", "1"], "--alpha: expected --source audio_lm beside it, got template"),
        (["--source", "text_backbone", "--audio-lm", "m"], "--audio-lm: expected --source audio_lm beside it, got text_backbone"),
    ],
)
def test_settings_that_cannot_work_are_found_before_the_rows_are_read(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.pseudo_gt.stage1.read_data", lambda *_, **__: pytest.fail("the rows were read"))
    source = [] if "--source" in words else ["--source", "audio_lm"]
    assert models(["pseudo-gt", "in.jsonl", "--out", "out.jsonl", *source, *words]) == 1
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []
