import dataclasses
import json

import pytest
import torch
from tiny_speech import TinyBackbones, make_examples, make_lm, make_tokenizer

from models.backbones.healing import build_student, heal, healed_student, healing_texts, main, parse_layers
from models.backbones.healing_config import HealingConfig
from models.backbones.resolve import load_causal_lm
from models.experiments.shared_steps import make_tiny_backbones

QUICK = HealingConfig(steps=30, batch_size=4, lr=3e-3, warmup_steps=3, held_out=8, max_tokens=32, precision="float32")
TEXTS = [
    f"Transcript: {who} {verb} {where}.\nQuestion: Is the speaker a man?\n\nAnswer: The speaker is a {answer}."
    for who in ("Where", "They", "You", "Nobody")
    for verb in ("are", "talks", "note")
    for where in ("late", "so going", "answers")
    for answer in ("man", "woman")
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_student_keeps_the_chosen_layers(tokenizer):
    lm = make_lm(tokenizer)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    student = build_student(lm, (0, 1, 3))
    assert student.config.num_hidden_layers == len(student.model.layers) == 3
    assert lm.config.num_hidden_layers == len(lm.model.layers) == 4
    for number, kept in enumerate((0, 1, 3)):
        for name, value in student.model.layers[number].state_dict().items():
            assert torch.equal(value, lm.model.layers[kept].state_dict()[name])
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


def test_student_with_all_layers_is_the_model(tokenizer):
    lm = make_lm(tokenizer)
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(build_student(lm, range(4))(ids).logits, lm(ids).logits)


def test_student_generates_with_its_own_cache_slots(tokenizer):
    student = build_student(make_lm(tokenizer), (0, 3))
    ids = torch.arange(6)[None]
    cached = student(ids[:, 4:], past_key_values=student(ids[:, :4], use_cache=True).past_key_values).logits
    torch.testing.assert_close(cached, student(ids).logits[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [(), (0, 4), (-1, 2), (2, 1), (1, 1)])
def test_bad_layers_are_named(tokenizer, layers):
    with pytest.raises(ValueError, match=r"keep_layers: expected increasing numbers in \[0, 4\)"):
        build_student(make_lm(tokenizer), layers)


def test_healing_brings_the_student_closer(tokenizer):
    teacher = make_lm(tokenizer)
    student = build_student(teacher, (0, 3))
    embeddings = student.model.embed_tokens.weight.clone()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    report = heal(student, teacher, TEXTS, tokenizer=tokenizer, config=QUICK, progress=False)
    assert report.kl_after < 0.5 * report.kl_before
    assert report.steps == 30 and report.curve[-1][0] == 30
    assert torch.equal(student.model.embed_tokens.weight, embeddings)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.grad is not None for p in teacher.parameters())


def test_reported_kl_is_the_definition(tokenizer):
    teacher = make_lm(tokenizer)
    student = build_student(teacher, (0, 3))
    config = dataclasses.replace(QUICK, steps=1, lr=1e-12, held_out=len(TEXTS) - 4)
    report = heal(student, teacher, TEXTS, tokenizer=tokenizer, config=config, progress=False)
    total = count = 0.0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids[:32]])
        with torch.no_grad():
            log_p, log_q = (lm(ids).logits.double().log_softmax(-1)[0, :-1] for lm in (teacher, student))
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += ids.shape[1] - 1
    # Four of the texts are not held out; the mean over all is close to the mean over the others.
    assert report.kl_before == pytest.approx(total / count, rel=0.02)
    assert report.kl_after == pytest.approx(report.kl_before, rel=1e-4)


def test_healing_is_repeatable(tokenizer):
    teacher = make_lm(tokenizer)
    config = dataclasses.replace(QUICK, steps=4)
    students = [build_student(teacher, (0, 3)) for _ in range(2)]
    for student in students:
        heal(student, teacher, TEXTS, tokenizer=tokenizer, config=config, progress=False)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_healing_leaves_flags_as_they_were(tokenizer):
    teacher = make_lm(tokenizer).requires_grad_(False)
    student = build_student(teacher, (0, 3))
    heal(student, teacher, TEXTS, tokenizer=tokenizer, config=dataclasses.replace(QUICK, steps=1), progress=False)
    assert not any(p.requires_grad for p in student.parameters())
    assert not student.training and not teacher.training


def test_too_few_texts(tokenizer):
    teacher = make_lm(tokenizer)
    for texts, count in ((TEXTS[:5], 5), ([], 0), (["", "a"] * 20, 0)):
        with pytest.raises(ValueError, match=f"texts: expected at least 12 of two tokens or more, got {count}"):
            heal(teacher, teacher, texts, tokenizer=tokenizer, config=QUICK, progress=False)


def test_diverged_healing_stops(tokenizer):
    teacher = make_lm(tokenizer)
    student = build_student(teacher, (0, 3))
    config = dataclasses.replace(QUICK, lr=1e30, warmup_steps=1)
    with pytest.raises(FloatingPointError, match=r"the loss of step .* is nan; lower lr"):
        heal(student, teacher, TEXTS, tokenizer=tokenizer, config=config, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected >= 1"),
        ({"max_tokens": 1}, "max_tokens: expected >= 2"),
        ({"lr": 0.0}, "lr: expected > 0"),
        ({"precision": "int8"}, "precision: expected"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        HealingConfig(**changes)


def test_healed_student_is_made_once(tmp_path):
    source = TinyBackbones()
    options = {"config": dataclasses.replace(QUICK, steps=2), "cache": tmp_path, "resolver": source, "progress": False}
    folder = healed_student("tiny/lm", TEXTS, keep_layers=(0, 3), **options)
    again = healed_student("tiny/lm", TEXTS, keep_layers=[0, 3], **options)
    assert again == folder and source.loaded == ["tiny/lm"]
    other = healed_student("tiny/lm", TEXTS[1:], keep_layers=(0, 3), **options)
    assert other != folder and len(source.loaded) == 2
    record = json.loads((folder / "healing.json").read_text())
    assert record["keep_layers"] == [0, 3] and record["report"]["steps"] == 2
    student, tokenizer = load_causal_lm(folder)
    assert student.config.num_hidden_layers == 2 and len(tokenizer) == student.config.vocab_size


def test_interrupted_healing_leaves_nothing_behind(tmp_path):
    options = {"cache": tmp_path / "students", "resolver": TinyBackbones(), "progress": False}
    config = dataclasses.replace(QUICK, lr=1e30, warmup_steps=1)
    with pytest.raises(FloatingPointError):
        healed_student("tiny/lm", TEXTS, keep_layers=(0, 3), config=config, **options)
    assert not (tmp_path / "students").exists() or not list((tmp_path / "students").iterdir())


def test_texts_hold_the_prompt_without_audio_and_an_answer():
    examples = make_examples(12)
    texts = healing_texts(examples)
    assert len(texts) == len(set(texts)) and texts == healing_texts(examples)
    assert not any("<|audio|>" in text for text in texts)
    assert texts[0].startswith(
        "Transcript: Where are you going?\nQuestion: Is the speaker a man or a woman?\n\nAnswer: "
    )
    answers = {text.rsplit("Answer: ", 1)[1] for text in texts}
    assert answers == {"The speaker is a man.", "The speaker is a woman."}


def test_layers_as_words():
    assert parse_layers("0-2,5, 7-8") == (0, 1, 2, 5, 7, 8)
    for wrong in ("", "a", "1-", "-3", "1--2", "1;2"):
        with pytest.raises(ValueError, match="keep_layers: expected numbers and ranges such as 0-6,27-29"):
            parse_layers(wrong)


def test_command_line(tmp_path, capsys):
    lm = make_tiny_backbones(tmp_path / "backbones") / "lm"
    (tmp_path / "texts.txt").write_text("\n".join(t.replace("\n", " ") for t in TEXTS), encoding="utf-8")
    words = [str(lm), str(tmp_path / "texts.txt"), "--out", str(tmp_path / "students"), "--steps", "2", "--held-out", "8"]
    assert main([*words, "--keep-layers", "0,2"]) == 0
    printed, folder = capsys.readouterr().out.strip().splitlines()
    assert printed.startswith("KL to the full model") and " nats a token" in printed
    student, _ = load_causal_lm(folder)
    assert len(student.get_decoder().layers) == 2
    assert main([*words, "--keep-layers", "0-9"]) == 1
    assert "keep_layers: expected increasing numbers in [0, 3)" in capsys.readouterr().err
    assert main([str(lm), str(tmp_path / "absent.txt"), "--keep-layers", "0"]) == 1
    assert "absent.txt" in capsys.readouterr().err


def test_the_command_line_takes_a_manifest(tmp_path, capsys):
    from models.data.manifest import write_manifest

    lm = make_tiny_backbones(tmp_path / "backbones") / "lm"
    write_manifest(tmp_path / "m.jsonl", make_examples(24))
    words = [str(lm), str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "s"), "--steps", "1", "--held-out", "2"]
    with open(tmp_path / "m.jsonl", "a") as file:
        file.write('{"id": "bad"}\n')
    assert main([*words, "--batch-size", "2", "--keep-layers", "0,2"]) == 0, capsys.readouterr().err
    assert f"skipped {tmp_path / 'm.jsonl'}: row 26 (bad): " in capsys.readouterr().out
