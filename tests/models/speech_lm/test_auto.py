"""AutoConfig and AutoModel of transformers load a saved SpeechLM once its class is registered."""

from __future__ import annotations

import json
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from tiny_speech import make_examples, make_features, make_speech_lm
from transformers import AutoConfig, AutoModel

import models.speech_lm.auto
from models.speech_lm.model import SpeechLM
from models.speech_lm.saving import SpeechLMError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A SpeechLM and its folder, with the backbones inside."""
    model = make_speech_lm()
    return model, model.save_pretrained(tmp_path_factory.mktemp("saved") / "model", include_frozen=True)


def states(model):
    batch = model.make_collator()(make_examples(), make_features(model, 4))
    return model.hidden_states_at(batch.target_index, **batch.model_inputs())


def test_auto_model_gives_the_speech_lm(saved):
    model, folder = saved
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert config.speech_lm_config() == model.config and config.model_type == "kdkernels_speech_lm"
    again = AutoModel.from_pretrained(folder, trust_remote_code=False)
    assert type(again) is SpeechLM and not again.training
    torch.testing.assert_close(states(again), states(model), rtol=0, atol=0)


def test_auto_model_by_hub_id(saved, monkeypatch):
    model, folder = saved
    asked = {}

    def fetched(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    again = models.speech_lm.auto.SpeechLMAutoModel.from_pretrained("me/student", config=config, revision="v1", _from_auto=True)
    torch.testing.assert_close(states(again), states(model), rtol=0, atol=0)
    assert asked["repo_id"] == "me/student" and asked["revision"] == "v1" and "*.safetensors" in asked["allow_patterns"]


def test_what_does_not_fit_is_named(saved, tmp_path):
    model, _ = saved
    folder = model.save_pretrained(tmp_path / "model", include_frozen=True)
    for options, message in (
        ({"dtype": torch.bfloat16}, "dtype: expected None, as a SpeechLM has it in its settings"),
        ({"device_map": "cpu"}, "device_map: expected no such loading option with a SpeechLM"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(folder, trust_remote_code=False, **options)
    record = json.loads((folder / "config.json").read_text())
    record["settings"]["num_queries"] = 5
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(SpeechLMError, match="expected the same settings in config"):
        AutoModel.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.slow
def test_without_the_import_transformers_does_not_know_it(saved):
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(saved[1])!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0 and "kdkernels_speech_lm" in found.stderr
