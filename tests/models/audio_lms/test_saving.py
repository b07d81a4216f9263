"""What is saved is transformers' own form: its from_pretrained and AutoProcessor load it, and it computes the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from models.audio_lms import model as audio_lm
from models.audio_lms.family import AudioLMError
from models.audio_lms.model import AudioLM, Lora
from models.backbones.model_folder import weights_sha256
from models.speech_lm.listeners import load_listener
from tests.kdkernels.tiny_lms import any_peft
from tests.models.audio_lms import tiny_audio_lms as tiny
from tests.models.audio_lms.test_families import CLIPS, EXAMPLES


@torch.no_grad()
def trained(folder, **options) -> AudioLM:
    """A student whose trained weights have moved."""
    student = AudioLM.from_pretrained(folder, **options)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student


@torch.no_grad()
def states(model: AudioLM) -> torch.Tensor:
    batch = model.make_collator()(EXAMPLES, CLIPS)
    return model.hidden_states_at(batch.target_index, **batch.model_inputs())


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_audio", {"trains": "lora", "lora": Lora(r=2)}),
        ("qwen2_audio", {"trains": "lora", "lora": Lora(r=2), "merge": True}),
        ("qwen2_audio", {"trains": "connector"}),
        ("qwen2_5_omni", {"trains": "lora", "lora": Lora(r=2)}),
        ("qwen2_5_omni", {"trains": "full"}),
        ("glm_asr", {"trains": "full"}),
    ],
)
def test_transformers_loads_the_result(family, options, tmp_path):
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    base = tiny.FAMILIES[family](tmp_path / "base")
    student = trained(base, **options)
    expected = states(student)
    assert not torch.allclose(expected, states(AudioLM.from_pretrained(base)), atol=1e-3)
    folder = student.save_pretrained(tmp_path / "final")
    again = AudioLM.from_pretrained(folder)
    torch.testing.assert_close(states(again), expected, rtol=1e-4, atol=1e-4)

    adapter = options["trains"] == "lora" and not options.get("merge")
    assert (folder / "adapter_config.json").is_file() == adapter
    if adapter:
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        assert not list(folder.glob("model*.safetensors"))
    with any_peft():
        lm = AutoModelForMultimodalLM.from_pretrained(folder).eval()
    assert type(lm) is type(again.lm)
    batch = student.make_collator()(EXAMPLES, CLIPS)
    logits = lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.features).logits
    got = logits.flatten(0, 1)[batch.target_index]
    torch.testing.assert_close(got, student.get_output_embeddings()(expected), rtol=1e-3, atol=1e-3)
    if family != "qwen2_5_omni":  # whose processor wants torchvision
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor) is type(student.processor)
        assert processor.tokenizer.get_vocab() == student.tokenizer.get_vocab()
        chat = [{"role": "user", "content": [{"type": "audio", "audio": "x"}, {"type": "text", "text": "High?"}]}]
        assert "<|AUDIO|>" in processor.apply_chat_template(chat, tokenize=False)


def test_an_adapter_is_trained_further_only_into_whole_weights(tmp_path):
    """A second adapter would name the first one's base, which lacks what the first has learned."""
    first = trained(tiny.qwen2_audio(tmp_path / "base"), trains="lora", lora=Lora(r=2)).save_pretrained(tmp_path / "first")
    with pytest.raises(AudioLMError, match="expected merge with trains='lora'"):
        AudioLM.from_pretrained(first, trains="lora")
    for options in ({"trains": "lora", "merge": True}, {"trains": "connector"}):
        student = trained(first, **options)
        expected = states(student)
        again = AudioLM.from_pretrained(student.save_pretrained(tmp_path / options["trains"]))
        torch.testing.assert_close(states(again), expected, rtol=1e-4, atol=1e-4)


def test_a_save_replaces_the_folder_whole(tmp_path):
    student = trained(tiny.qwen2_audio(tmp_path / "base"), trains="lora", lora=Lora(r=2))
    student.save_pretrained(tmp_path / "final")
    (tmp_path / "final" / "left").write_text("of an older run")
    student.save_pretrained(tmp_path / "final")
    assert not (tmp_path / "final" / "left").exists()


def test_an_adapter_refuses_other_weights_of_its_base(tmp_path):
    base = tiny.qwen2_audio(tmp_path / "base")
    student = trained(base, trains="lora", lora=Lora(r=2))
    was = weights_sha256(base)
    other = tiny.qwen2_audio(tmp_path / "other", seed=7)
    shutil.copy(other / "model.safetensors", base)  # while it was training
    folder = student.save_pretrained(tmp_path / "final")
    assert json.loads((folder / "base.json").read_text()) == {"weights_sha256": was}
    message = rf"final: its adapter was trained with {base} of SHA-256 {was}, got {weights_sha256(other)}"
    with pytest.raises(AudioLMError, match=message):
        AudioLM.from_pretrained(folder)
    with pytest.raises(AudioLMError, match=message):
        load_listener(folder, torch.device("cpu"))
    (folder / "base.json").write_text("{}")
    with pytest.raises(AudioLMError, match=r"base\.json: expected the SHA-256 of the adapter's base: 'weights_sha256'"):
        AudioLM.from_pretrained(folder)
    (folder / "base.json").unlink()  # as an adapter of an older release
    AudioLM.from_pretrained(folder)


def test_only_an_adapter_on_a_folder_holds_the_hash_of_its_base(tmp_path, monkeypatch):
    base = tiny.qwen2_audio(tmp_path / "base")
    for name, options in {"merged": {"trains": "lora", "merge": True}, "full": {"trains": "full"}}.items():
        assert not (AudioLM.from_pretrained(base, **options).save_pretrained(tmp_path / name) / "base.json").exists()
    monkeypatch.setattr(audio_lm, "from_hub", lambda *_: base)
    folder = AudioLM.from_pretrained("someone/base", trains="lora").save_pretrained(tmp_path / "adapter")
    assert not (folder / "base.json").exists()
    AudioLM.from_pretrained(folder)
