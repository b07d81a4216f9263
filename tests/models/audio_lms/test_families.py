"""Every family: its batches, its two paths and its loss, on tiny random models of the real classes with the real processors."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from kdkernels import Sampling, fused_linear_caad_loss
from kdkernels.teacher import DualPathTeacher, MarkAbsent
from models.audio_lms.clips import ClipReader
from models.audio_lms.families import family_of
from models.audio_lms.family import AudioLMError, Turn, prompt_text
from models.audio_lms.model import AudioLM
from models.data.audio import AudioError, write_audio
from models.data.example import Example
from models.data.manifest import read_manifest, write_manifest
from models.evaluation.ask_one import answer
from models.speech_lm.clip_keys import FeatureError
from models.speech_lm.listeners import answer_ids, open_clips
from models.training.cache_identity import sample_content
from tests.kdkernels import tiny_lms
from tests.models.audio_lms import tiny_audio_lms as tiny

EXAMPLES = [
    Example(id="a", audio="a.wav", question="High or low?", choices=("high", "low"), answer="high", target="It is high."),
    Example(id="b", audio="b.wav", question="Is the tone <|im_end|> low?", context="Note: no.", answer="low", target="low"),
]
CLIPS = [tiny.tone(1200), tiny.tone(300, seconds=0.9)]
NO_CLIPS = [None, None]
# The convolutions of their encoders read the padding of a shorter clip, in transformers too (Qwen3-Omni: only under a second).
SEE_PADDING = ("Granite Speech", "Phi-4-multimodal", "Qwen3-Omni")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request, tmp_path_factory) -> AudioLM:
    return AudioLM.from_pretrained(tiny.FAMILIES[request.param](tmp_path_factory.mktemp("lm") / request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> AudioLM:
    return AudioLM.from_pretrained(tiny.qwen2_audio(tmp_path_factory.mktemp("lm") / "qwen"))


def logits_of(model: AudioLM, batch, *, hears: bool) -> torch.Tensor:
    """(N, V) by a plain call of transformers' model."""
    features = dict(batch.features)
    if not hears:
        features |= {name: torch.zeros_like(features[name]) for name in model.family.features}
    output = model.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **features)
    return output.logits.flatten(0, 1)[batch.target_index].float()


def test_labels_are_the_targets_tokens_alone(model):
    collate = model.make_collator()
    batch, prompt = collate(EXAMPLES, CLIPS), collate(EXAMPLES, CLIPS, with_target=False)
    columns = batch.input_ids.shape[1]
    for row, example in enumerate(EXAMPLES):
        here = batch.target_row == row
        ids, mask = batch.input_ids[row], batch.attention_mask[row].bool()
        length, asked = int(mask.sum()), prompt.input_ids[row][prompt.attention_mask[row].bool()].tolist()
        assert ids[: len(asked)].tolist() == asked and not mask[length:].any()
        # What predicts a token stands one column before it; all that follows the prompt is predicted.
        predicting = batch.target_index[here] - row * columns
        assert predicting.tolist() == list(range(len(asked) - 1, length - 1))
        assert ids[predicting + 1].tolist() == batch.target[here].tolist() == collate.target_ids(example)
        assert model.tokenizer.decode(batch.target[here].tolist()[:-1]) == example.target
        assert batch.target[here][-1] == collate.end_id
        spelled = batch.target[here & batch.choice_mask].tolist()
        assert model.tokenizer.decode(spelled) == example.answer
    ends = (prompt.input_ids[1] == collate.end_id).sum()
    assert ends <= 1 + (prompt.input_ids[0] == collate.end_id).sum()  # the one in the question is plain text


def test_both_paths_and_the_loss_are_those_of_an_eager_loop(model):
    batch = model.make_collator()(EXAMPLES, CLIPS)
    teacher = DualPathTeacher(model, negative=MarkAbsent())
    states = teacher(batch.model_inputs(), batch.target_index)
    with torch.no_grad():
        audio, text = (logits_of(model, batch, hears=hears) for hears in (True, False))
    torch.testing.assert_close(teacher.head.logits(states.audio_hidden), audio, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.head.logits(states.text_hidden), text, rtol=1e-4, atol=1e-4)
    assert (audio - text).abs().max() > 1e-2  # the sound matters

    student = model  # distilled into itself: the tokens are the same, and its own gradient is what is asked for
    hidden = student.hidden_states_at(batch.target_index, **batch.model_inputs())
    loss = fused_linear_caad_loss(
        hidden, student.get_output_embeddings().weight, states.audio_hidden, states.text_hidden, target=batch.target,
        alpha=1.0, temperature=2.0, kd_weight=0.7, **teacher.head.keywords("teacher"),
    )  # fmt: skip
    log_p, log_q = ((z / 2).log_softmax(-1) for z in (2 * audio - text, audio))
    kd = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = 0.7 * kd + 0.3 * F.cross_entropy(audio, batch.target)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_do_not_depend_on_their_neighbours(model):
    collate = model.make_collator()
    together = collate(EXAMPLES, CLIPS)
    hidden = model.hidden_states_at(together.target_index, **together.model_inputs())
    silent = model.hidden_states_at(
        together.target_index, **together.model_inputs() | {"audio_present": torch.tensor([True, False])}
    )
    for row in (0, 1):
        alone = collate(EXAMPLES[row : row + 1], CLIPS[row : row + 1])
        states = model.hidden_states_at(alone.target_index, **alone.model_inputs())
        here = together.target_row == row
        if model.family.name not in SEE_PADDING:
            torch.testing.assert_close(hidden[here], states, rtol=1e-3, atol=1e-3)
        assert torch.equal(silent[here], hidden[here]) == (row == 0)


@torch.no_grad()
def test_a_row_without_a_clip_stands_beside_one_with_a_clip(model):
    collate = model.make_collator()
    batch = collate(EXAMPLES, [CLIPS[0], None])
    assert batch.entries.tolist() == [1, 0] and batch.audio_present.tolist() == [True, False]
    hidden = model.hidden_states_at(batch.target_index, **batch.model_inputs())
    alone = collate(EXAMPLES[:1], CLIPS[:1])
    states = model.hidden_states_at(alone.target_index, **alone.model_inputs())
    torch.testing.assert_close(hidden[batch.target_row == 0], states, rtol=1e-3, atol=1e-3)
    only_text = collate(EXAMPLES, NO_CLIPS)
    assert only_text.features == {}
    states = model.hidden_states_at(only_text.target_index, **only_text.model_inputs())
    torch.testing.assert_close(hidden[batch.target_row == 1], states[only_text.target_row == 1], rtol=1e-3, atol=1e-3)


def test_a_system_turn_stands_before_the_words(model):
    rows = [dataclasses.replace(e, system="Be <|im_end|> brief.\n\nListen.") for e in EXAMPLES]
    collate = model.make_collator()
    with_turn, without = (collate(each, CLIPS, with_target=False) for each in (rows, EXAMPLES))
    for row, example in enumerate(EXAMPLES):
        ids, plain = (b.input_ids[row][b.attention_mask[row].bool()].tolist() for b in (with_turn, without))
        text = model.tokenizer.decode(ids)
        assert text.count("brief.\n\nListen.") == 1 and text.index("Listen.") < text.index(example.question[:8])
        audio = max(set(plain), key=plain.count)  # the placeholder of its clip
        assert ids.count(audio) == plain.count(audio)
        ended = [each.count(collate.end_id) for each in (ids, plain)]
        assert ended[0] - ended[1] <= 1  # by the template alone: the one in the words is plain text


SYSTEM_REFUSED = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.TEMPLATE
SYSTEM_DROPPED = tiny.TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
SYSTEM_TEXT = "{% if messages[0]['role'] == 'system' %}[{{ messages[0]['content'] }}]{% endif %}" + SYSTEM_DROPPED


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (tiny.TEMPLATE, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"),
        (SYSTEM_TEXT, "[Be brief.]<|im_start|>user\nWho?<|im_end|>\n"),
        (SYSTEM_REFUSED, "<|im_start|>user\nBe brief.\nWho?<|im_end|>\n"),
        (SYSTEM_DROPPED, "<|im_start|>user\nBe brief.\nWho?<|im_end|>\n"),
    ],
)
def test_templates_without_a_system_turn_get_its_words_before_the_users(qwen, monkeypatch, template, expected):
    monkeypatch.setattr(qwen.processor, "chat_template", template)
    made = prompt_text(qwen.family, qwen.processor, Turn("Who?", system="Be brief."))
    assert made == expected + "<|im_start|>assistant\n"
    same = prompt_text(qwen.family, qwen.processor, Turn("Be brief.", system="Be brief."))
    assert same.count("Be brief.") == 2


def test_the_system_turn_is_part_of_what_a_cache_depends_on():
    plain, system, context = (dataclasses.replace(EXAMPLES[0], **more) for more in ({}, {"system": "Hm"}, {"context": "Hm"}))
    assert len({sample_content(example, None) for example in (plain, system, context)}) == 3


@pytest.mark.parametrize("trains", ["full", "lora", "connector"])
def test_what_trains_gets_a_gradient_and_nothing_else_does(model, trains):
    source = model._folder
    student = AudioLM.from_pretrained(source, trains=trains).train()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    batch = student.make_collator()(EXAMPLES, CLIPS)
    hidden = student.hidden_states_at(batch.target_index, **batch.model_inputs())
    F.cross_entropy(student.get_output_embeddings()(hidden), batch.target).backward()
    assert trained and all(p.grad is not None for p in trained.values())
    assert not any("audio_tower.layers" in name or "visual" in name or "encoder.layers" in name for name in trained)
    if trains == "lora":
        assert all("lora_" in name for name in trained)
    assert not any(module.training for module in student.modules() if isinstance(module, torch.nn.BatchNorm1d))


def test_answers(model):
    """Greedy and contrastive; both are those of one row at a time."""
    collate = model.make_collator()
    batch = collate(EXAMPLES, CLIPS, with_target=False)
    answers = model.generate(batch, max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(text, str) for text in answers)
    assert model.generate(batch, max_new_tokens=3, alpha=0.0) == answers
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(batch, max_new_tokens=0)


def test_logits_of_nan_are_no_answer(model):
    batch = model.make_collator()(EXAMPLES, CLIPS, with_target=False)
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(0, torch.tensor([1]), torch.nan))
    try:
        for alpha in (None, 1.0):
            with pytest.raises(ValueError, match=f"example '{EXAMPLES[1].id}': the model's logits are NaN"):
                answer_ids(model, batch, max_new_tokens=2, alpha=alpha)
    finally:
        hook.remove()


def test_several_clips_in_a_turn(model):
    collate = model.make_collator()
    turns = [Turn("Which is higher?", tuple(CLIPS)), Turn("High?", (CLIPS[0],))]
    if model.family.max_clips == 1:
        with pytest.raises(ValueError, match="at most 1 a turn"):
            collate.ask(turns)
        return
    batch = collate.ask(turns)
    assert batch.entries.tolist() == [2, 1] and all(len(x) == 3 for x in batch.features.values())
    hears = model.hidden_states_at(torch.tensor([batch.input_ids.shape[1] - 1]), **batch.model_inputs())
    inputs = batch.model_inputs() | {"audio_present": torch.tensor([False, True])}
    assert not torch.equal(hears, model.hidden_states_at(torch.tensor([batch.input_ids.shape[1] - 1]), **inputs))


def test_the_thinker_out_of_the_full_checkpoint(tmp_path):
    """Qwen2.5-Omni's own layout: `thinker.` before the names, beside a talker that is not loaded."""
    from transformers import Qwen2_5OmniConfig

    thinker = tiny.qwen2_5_omni(tmp_path / "thinker")
    config = Qwen2_5OmniConfig(thinker_config=json.loads((thinker / "config.json").read_text()))
    weights = load_file(thinker / "model.safetensors")
    for file in thinker.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()) if file.name != "config.json" else None
    config.save_pretrained(tmp_path)
    full = {f"thinker.{name.removeprefix('thinker.')}": x for name, x in weights.items()}
    save_file({**full, "talker.codec_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    batches = [AudioLM.from_pretrained(folder) for folder in (thinker, tmp_path)]
    states = []
    for model in batches:
        batch = model.make_collator()(EXAMPLES, CLIPS)
        states.append(model.hidden_states_at(batch.target_index, **batch.model_inputs()))
    assert torch.equal(*states)


def test_a_row_with_several_clips(model, tmp_path):
    """From the manifest to the batch: the row of a turn with these clips, or a refusal that names family and row."""
    for name, clip in (("a", CLIPS[0]), ("b", CLIPS[1])):
        write_audio(tmp_path / f"{name}.wav", clip)
    asked = {"question": "Which is higher?", "target": "The first."}
    rows = [
        Example(id="two", audio="a.wav", more_audio=("b.wav",), **asked), Example(id="one", audio="b.wav", **asked),
        Example(id="none", audio=None, **asked),
    ]  # fmt: skip
    write_manifest(tmp_path / "m.jsonl", rows)
    rows = read_manifest(tmp_path / "m.jsonl").examples
    assert rows[0].clips == (("a.wav", 0.0, None), ("b.wav", 0.0, None)) and rows[2].clips == ()
    if model.family.max_clips == 1:
        for call in (
            lambda: model.make_collator()(rows, ClipReader(tmp_path, sampling_rate=tiny.RATE).rows(rows)),
            lambda: open_clips(model, rows, audio_root=tmp_path, max_seconds=30),
        ):
            message = f"example 'two': clips: expected at most 1 a turn with {model.family.name}, got 2"
            with pytest.raises(ValueError, match=message):
                call()
        return
    store, _ = open_clips(model, rows, audio_root=tmp_path, max_seconds=30)
    heard = store.rows(rows)
    batch = model.make_collator()(rows, heard, with_target=False)
    by_hand = model.make_collator().ask([Turn("Which is higher?", heard[0]), Turn("Which is higher?", (heard[1],))])
    for row in range(2):
        kept = by_hand.attention_mask[row].bool()
        assert torch.equal(batch.input_ids[row][batch.attention_mask[row].bool()], by_hand.input_ids[row][kept])
    assert batch.entries.tolist() == [*by_hand.entries.tolist(), 0]
    assert sample_content(rows[0], heard[0]) != sample_content(rows[0], heard[0][::-1])


def test_a_family_that_is_not_listed(qwen):
    from transformers import LlamaConfig, VoxtralRealtimeConfig

    with pytest.raises(AudioLMError, match="model type 'llama': expected an audio LM"):
        family_of(LlamaConfig())
    assert family_of(VoxtralRealtimeConfig()).model_class == "VoxtralRealtimeForConditionalGeneration"


def test_random_weights_from_a_config(qwen, tmp_path):
    made = AudioLM.from_config(qwen.lm.config, qwen.processor, trains="lora")
    batch = made.make_collator()(EXAMPLES, CLIPS)
    assert made.hidden_states_at(batch.target_index, **batch.model_inputs()).requires_grad
    assert (made.save_pretrained(tmp_path / "final") / "processor_config.json").is_file()


def test_errors_name_what_is_missing(qwen, tmp_path):
    (tmp_path / "desta").mkdir()
    (tmp_path / "desta" / "config.json").write_text('{"model_type": "DestaModel"}')
    with pytest.raises(AudioLMError, match=r"got DeSTA2, which needs code of its own repository.*caad_desta2"):
        AudioLM.from_pretrained(tmp_path / "desta")
    with pytest.raises(AudioLMError, match="no such folder"):
        AudioLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(AudioLMError, match=r"lora\.targets"):
        AudioLM.from_pretrained(qwen._folder, trains="lora", lora=tiny_lora("nowhere_proj"))
    with pytest.raises(AudioLMError, match=r"lora\.targets: expected ends of names .*, got also \['nope'\]"):
        AudioLM.from_pretrained(qwen._folder, trains="lora", lora=tiny_lora("q_proj", "nope"))
    with pytest.raises(ValueError, match="trains: expected one of full, lora, connector or None, got 'all'"):
        AudioLM.from_pretrained(qwen._folder, trains="all")
    collate = qwen.make_collator(max_tokens=30)
    with pytest.raises(ValueError, match=r"example 'b': .* expected at most 30"):
        collate(EXAMPLES, CLIPS)
    with pytest.raises(ValueError, match="clips: expected 2"):
        collate(EXAMPLES, CLIPS[:1])


def tiny_lora(*targets: str):
    from models.audio_lms.model import Lora

    return Lora(r=2, targets=targets)


def test_clips_are_read_when_they_are_asked_for(tmp_path):
    write_audio(tmp_path / "a.wav", CLIPS[0])
    reader = ClipReader(tmp_path, sampling_rate=8_000)
    rows = reader.rows([EXAMPLES[0], Example(id="t", audio=None), EXAMPLES[0]])
    assert rows[1] is None and rows[0].dtype == np.float32 and len(rows[0]) == len(CLIPS[0]) // 2
    assert np.array_equal(rows[0], rows[2]) and reader._ahead == {}
    kept = {"audio_root", "sampling_rate", "max_seconds", "hears", "_pool", "_ahead"}
    assert vars(reader).keys() == kept  # it keeps no clip
    with pytest.raises(AudioError, match="example 'b': missing file"):
        reader.rows(EXAMPLES)


def test_clips_that_are_read_ahead_are_the_same_and_are_forgotten(tmp_path, monkeypatch):
    from models.audio_lms import clips

    for name, clip in (("a.wav", CLIPS[0]), ("b.wav", CLIPS[1])):
        write_audio(tmp_path / name, clip)
    a, b = (Example(id=name, audio=name) for name in ("a.wav", "b.wav"))
    alone = ClipReader(tmp_path, sampling_rate=8_000).rows([a, b])
    decoded = []
    real = clips.load_audio
    monkeypatch.setattr(clips, "load_audio", lambda path, **options: decoded.append(path.name) or real(path, **options))
    reader = ClipReader(tmp_path, sampling_rate=8_000)
    reader.prefetch([a, b, a])
    for _ in range(2):  # the student's batch, then the teacher's
        assert all(np.array_equal(x, y) for x, y in zip(reader.rows([a, b]), alone, strict=True))
    assert sorted(decoded) == ["a.wav", "b.wav"]
    reader.prefetch([b, Example(id="t", audio=None)])
    assert len(reader._ahead) == 2 and reader.rows([a, b])[0] is not None
    assert sorted(decoded) == ["a.wav", "a.wav", "b.wav"]


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """transformers would make them at random, and every load would be another model."""
    folder = tiny.qwen2_audio(tmp_path / "lm")
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if "multi_modal_projector" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AudioLMError, match=rf"files lack {len(weights) - len(kept)}, the first is .*multi_modal_projector"):
        AudioLM.from_pretrained(folder)


def test_an_adapter_that_lacks_weights_is_refused(tmp_path):
    pytest.importorskip("peft")
    base = tiny.qwen2_audio(tmp_path / "lm")
    folder = AudioLM.from_pretrained(base, trains="lora").save_pretrained(tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    AudioLM.from_pretrained(folder)
    save_file(dict(list(weights.items())[2:]), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AudioLMError, match="expected all weights of the adapter"):
        AudioLM.from_pretrained(folder)


def test_the_ends_of_an_answer_are_those_of_the_checkpoint_too(tmp_path):
    model = AudioLM.from_pretrained(tiny.qwen2_audio(tmp_path / "lm"))
    model.lm.generation_config.eos_token_id = [tiny.ID["<|endoftext|>"], tiny.ID["<|im_start|>"]]
    assert model.end_ids == sorted(tiny.ID[name] for name in ("<|endoftext|>", "<|im_end|>", "<|im_start|>"))
    prompt = model.make_collator()(EXAMPLES, CLIPS, with_target=False)
    said = F.one_hot(torch.tensor(tiny.ID["<|im_start|>"]), model.lm.lm_head.out_features) * 1e3
    model.lm.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits + said)  # it says nothing but this end
    draws = torch.full((2, 5), 0.5, dtype=torch.float64)
    own = model.own_answers(prompt, draws, sampling=Sampling(0.0, max_new_tokens=5))
    assert all(answer == [tiny.ID["<|im_start|>"]] for answer in (*own, *model.answer_ids(prompt, max_new_tokens=5)))


def test_what_a_loaded_processor_cuts_off_is_known(model, monkeypatch):
    """Sound behind `heard_seconds` changes no feature, and sound just before it does."""
    if hasattr(model.processor, "max_audio_len"):
        monkeypatch.setattr(model.processor, "max_audio_len", 5)
    heard = model.family.heard_seconds(model.processor)
    whole_windows = {"Qwen2-Audio": 1.0, "Qwen2.5-Omni": 1.0, "Audio Flamingo 3": 5.0, "GLM-ASR": 4.0}  # of 2 s in GLM-ASR
    assert heard == whole_windows.get(model.family.name)
    clip = tiny.tone(300.0, seconds=7.0)

    def features(loud_from: float) -> torch.Tensor:
        other = clip.copy()
        other[round(loud_from * tiny.RATE) : round((loud_from + 0.5) * tiny.RATE)] *= -0.2
        return model.family.encoded(model.processor, [Turn("Hm", (other,))]).features[model.family.features[0]]

    ends = 7.0 if heard is None else heard
    assert not torch.equal(features(ends - 0.6), features(7.0))
    if heard is not None:
        torch.testing.assert_close(features(heard + 0.1), features(7.0), rtol=0, atol=0)


def test_without_a_window_of_its_own_the_familys_counts():
    from types import SimpleNamespace

    family = family_of(SimpleNamespace(model_type="qwen2_audio"))
    assert family.heard_seconds(SimpleNamespace(feature_extractor=SimpleNamespace())) == 30.0


def test_clips_that_a_processor_would_cut_are_counted(tmp_path):
    model = AudioLM.from_pretrained(tiny.qwen2_audio(tmp_path / "lm"))
    assert model.family.hears_seconds == 30.0  # of the published checkpoints; this one's processor reads 1 s
    for name, seconds in (("a", 2.5), ("b", 0.5)):
        write_audio(tmp_path / f"{name}.wav", tiny.tone(300.0, seconds=seconds))
    said: list[str] = []
    options = {"audio_root": tmp_path, "max_seconds": 30.0, "say": said.append}
    open_clips(model, EXAMPLES, **options)
    assert said == [
        "1 of 2 clips are longer than the 1 s that the model hears, up to 2.5 s: the rest of each is cut off"
    ]
    with pytest.raises(FeatureError, match=r"more than max_cut_fraction 0.1"):
        open_clips(model, EXAMPLES, max_cut_fraction=0.1, **options)


def test_ask_mentions_a_clip_that_a_processor_would_cut(qwen, tmp_path, capsys):
    for seconds, mentioned in ((0.9, False), (2.5, True)):
        clip = write_audio(tmp_path / f"{seconds}.wav", tiny.tone(300.0, seconds=seconds))
        answer(qwen, [clip], "High?", max_new_tokens=2)
        line = "1 of 1 clips are longer than the 1 s that the model hears, up to 2.5 s"
        assert (line in capsys.readouterr().err) == mentioned


def test_a_checkpoint_with_a_lora_of_its_own_hears_by_it_and_is_not_trained():
    """Granite Speech's generate turns it off where there is no clip, and leaves it off."""
    from types import SimpleNamespace

    lm, inputs = tiny_lms.granite_speech_with_adapter(target_modules=["q_proj", "v_proj"])
    processor = SimpleNamespace(tokenizer=tiny.tokenizer(), feature_extractor=SimpleNamespace(sampling_rate=tiny.RATE))
    model = AudioLM(lm, processor)
    index = torch.tensor([inputs["input_ids"].shape[1] - 1])
    hears = model.hidden_states_at(index, **inputs)
    tiny_lms.text_only_generate(lm, inputs)
    torch.testing.assert_close(model.hidden_states_at(index, **inputs), hears)
    for trains in ("lora", "connector", "full"):
        with pytest.raises(AudioLMError, match="expected weights without a LoRA of their own to train"):
            AudioLM(lm, processor, trains=trains)
