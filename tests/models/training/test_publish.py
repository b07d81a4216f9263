"""The model card of a result, and the push to the model hub; the hub is a fake that keeps what it is given."""

from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import train_fakes as fakes
from huggingface_hub import ModelCard
from tiny_speech import make_speech_lm

from models.cli import main as models
from models.training.model_card import write_card
from models.training.publish import PATTERNS, PublishError, check_recipe, open_repository, publish
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.train import _push

CAAD = ["student.model=Qwen/Qwen2.5-Omni-3B", "teacher.model=Qwen/Qwen2.5-Omni-7B", "data.manifest=/data/secret/pool.jsonl"]


class FakeHub:
    """huggingface_hub.HfApi: repositories by name, and what was pushed."""

    def __init__(self, **public):
        self.private = {name: False for name in public.get("public", ())}
        self.pushed = []
        self.breaks = None

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        if "/" not in name:
            raise OSError("You don't have the rights\nto create a model")
        self.private.setdefault(name, private)

    def repo_info(self, name):
        return SimpleNamespace(private=self.private[name])

    def upload_folder(self, *, folder_path, repo_id, allow_patterns, commit_message):
        if self.breaks:
            raise self.breaks
        self.pushed.append((folder_path, repo_id))
        assert allow_patterns == PATTERNS and commit_message
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture()
def hub(monkeypatch):
    fake = FakeHub(public=["me/public"])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return fake


def adapter(folder, base="Qwen/Qwen2.5-Omni-3B"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_a_result_is_pushed_to_a_private_repository(hub, tmp_path, capsys):
    folder = adapter(tmp_path / "final")
    assert models(["push", str(folder), "me/new"]) == 0
    assert hub.pushed == [(folder, "me/new")] and hub.private["me/new"] is True
    assert capsys.readouterr().out == "https://hub/me/new/commit/1\n"
    assert models(["push", str(folder), "me/public"]) == 1
    assert "expected a private repository, found a public one" in capsys.readouterr().err
    assert models(["push", str(folder), "me/public", "--public"]) == 0 and len(hub.pushed) == 2
    assert models(["push", str(folder), "x"]) == 1
    assert capsys.readouterr().err == "error: x: You don't have the rights to create a model\n"


def test_no_token_and_no_model_are_found_before_the_hub_is_asked(hub, tmp_path, monkeypatch):
    with pytest.raises(PublishError, match="expected a saved model, found none"):
        publish(tmp_path, "me/new")
    with pytest.raises(PublishError, match=r"expected an adapter on a model of the hub, got one on /x; train with student.merge"):
        publish(adapter(tmp_path / "a", base="/x"), "me/new")
    tiny = make_speech_lm()
    publish(tiny.save_pretrained(tmp_path / "named"), "me/new")  # tiny/lm has the form of a hub id
    assert len(hub.pushed) == 1
    record = json.loads((tmp_path / "named" / "speech_lm.json").read_text())
    record["config"]["encoder"] = "/models/encoder"
    (tmp_path / "named" / "speech_lm.json").write_text(json.dumps(record))
    with pytest.raises(PublishError, match="expected the encoder to be a hub id, or inside the folder"):
        publish(tmp_path / "named", "me/new")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(PublishError, match="expected a token of the model hub in HF_TOKEN"):
        open_repository("me/new")
    assert len(hub.pushed) == 1


def test_a_recipe_whose_result_no_other_machine_could_load_is_refused(tmp_path):
    def recipe(*words):
        return load_recipe("caad", ["run.push_to_hub=me/new", *CAAD, *words])

    check_recipe(recipe())
    (tmp_path / "student").mkdir()
    with pytest.raises(ConfigError, match=r"student\.merge: expected true with run.push_to_hub"):
        check_recipe(recipe(f"student.model={tmp_path / 'student'}"))
    check_recipe(recipe(f"student.model={tmp_path / 'student'}", "student.merge=true"))
    with pytest.raises(ConfigError, match=r"run\.push_to_hub: "):
        check_recipe(recipe("run.push_to_hub=me//new"))
    with pytest.raises(ConfigError, match=r"run\.hub_private: expected True, the default, without run.push_to_hub"):
        load_recipe("caad", [*CAAD, "run.hub_private=false"])
    with pytest.raises(ConfigError, match="expected the lm to be a hub id"):
        check_recipe(load_recipe("sft", ["run.push_to_hub=me/new", "model.settings.lm=/models/lm", "data.manifest=m"]))


def test_a_push_that_fails_leaves_the_result_and_says_how_to_repeat_it(hub, tmp_path, capsys):
    recipe = load_recipe("caad", ["run.push_to_hub=me/new", *CAAD])
    hub.breaks = ConnectionError("gone")
    assert _push(recipe, adapter(tmp_path / "final")) == 1
    assert f"python -m models push {tmp_path / 'final'} me/new\n" in capsys.readouterr().err
    hub.breaks = None
    assert _push(recipe, tmp_path / "final") == 0 and len(hub.pushed) == 1


def test_the_card_says_what_the_run_was_and_names_no_path(tmp_path):
    recipe = load_recipe("caad", [*CAAD, "loss.alpha=1.5", "loss.impl=cpu", "student.lora.r=8"])
    folder = adapter(tmp_path / "run" / "final")
    (folder / "README.md").write_text("---\nbase_model: /models/x\n---\n[More Information Needed]")
    card = ModelCard.load(write_card(folder, recipe))
    assert card.data.base_model == ["Qwen/Qwen2.5-Omni-3B"]
    described = card.data.to_dict()
    assert described["library_name"] == "peft" and "distillation" in described["tags"]
    text = card.content
    assert "# run\n" in text and "`Qwen/Qwen2.5-Omni-7B`" in text and "`pool.jsonl`" in text and "2606.23052" in text
    assert "teacher.folder" not in text and "loss.impl" not in text
    assert "| loss.alpha | 1.5 |" in text and "| student.lora.r | 8 |" in text
    assert "/data" not in text and "More Information" not in text and str(tmp_path) not in text

    saved = make_speech_lm().save_pretrained(tmp_path / "speech")
    text = write_card(saved, load_recipe("sft", ["data.manifest=m.jsonl"])).read_text()
    assert "import models.speech_lm.auto" in text and "library_name: kdkernels" in text and "- tiny/encoder" in text
    assert "## Papers" not in text


def test_the_loop_writes_the_card(tmp_path):
    fakes.run(tmp_path, "kd", "optim.steps=2")
    assert "Objective: `kd`" in (tmp_path / "final" / "README.md").read_text()
