"""Push a result to the model hub.

    python -m models push runs/qwen_omni/final OWNER/NAME [--public]
    python -m models train qwen_omni run.push_to_hub=OWNER/NAME ...      # the same at the end of a run

The repository is private unless you say otherwise. The token comes from the environment (HF_TOKEN) or from `hf auth login`. What
the folder names has to be on the hub too: a result that needs a folder of this machine is refused. huggingface_hub repeats
requests that fail, and leaves out files that are there already, so the same command can be given again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from models.speech_lm.config import SpeechLMConfig
from models.speech_lm.saving import SpeechLMError, read_record
from models.training.commands import push_parser
from models.training.model_card import is_hub_name
from models.training.recipe import Recipe
from models.training.recipe_checks import ConfigError

# What a model's folder holds. Anything else that lies beside it stays here.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


class PublishError(RuntimeError):
    """A result cannot be pushed; the message says why."""


def open_repository(name: str, *, private: bool = True) -> None:
    """Make the repository if there is none. So a wrong token or name is found before a training and not after it.

    Raises:
        PublishError: no token, no right to write, no connection, or a public repository where a private one was asked for.
    """
    if huggingface_hub.get_token() is None:
        raise PublishError(f"{name}: expected a token of the model hub in HF_TOKEN or from `hf auth login`, found none")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        is_private = bool(api.repo_info(name).private)
    except Exception as error:  # the hub library raises many kinds: no right, no such owner, offline
        raise PublishError(f"{name}: {_one_line(error)}") from error
    if private and not is_private:
        raise PublishError(f"{name}: expected a private repository, found a public one; say that the result may be public")


def publish(folder: str | Path, name: str, *, private: bool = True) -> str:
    """Push a model's folder to the repository `name` ("owner/name") of the model hub.

    Args:
        folder: of `save_pretrained`: a SpeechLM, an audio LM, or an adapter.
        private: make the repository private if it is new, and refuse a public one.

    Returns:
        the address of the commit.

    Raises:
        PublishError: no model in the folder, one that needs a folder of this machine, or an answer of the hub.
    """
    folder = Path(folder)
    check_portable(folder)
    open_repository(name, private=private)
    try:
        commit = huggingface_hub.HfApi().upload_folder(
            folder_path=folder, repo_id=name, allow_patterns=PATTERNS, commit_message="Result of a training with kdkernels"
        )
    except Exception as error:  # as above, and a connection that broke for longer than the library repeats
        raise PublishError(f"{name}: {_one_line(error)}") from error
    return str(commit.commit_url)


def check_portable(folder: Path) -> None:
    """PublishError where there is no model in `folder`, or where it can be loaded on this machine alone."""
    if (folder / "speech_lm.json").is_file():
        try:
            config, _ = read_record(folder)
        except SpeechLMError as error:
            raise PublishError(str(error)) from error
        _check_backbones(config, {part for part in ("lm", "encoder") if (folder / part).is_dir()}, str(folder))
    elif (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors")):
        try:
            base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PublishError(f"{folder / 'adapter_config.json'}: expected the name of the base model: {error}") from error
        if not is_hub_name(str(base)):
            raise PublishError(
                f"{folder}: expected an adapter on a model of the hub, got one on {base}; train with student.merge=true"
            )
    elif not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        raise PublishError(f"{folder}: expected a saved model, found none")


def check_recipe(recipe: Recipe) -> None:
    """ConfigError where the result of `recipe` could not be loaded from the hub on another machine: asked before the training."""
    name = recipe.run.push_to_hub
    if name is None:
        return
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise ConfigError(f"run.push_to_hub: {_one_line(error)}") from None
    student = recipe.student
    if student.model is not None:
        if student.trains == "lora" and not student.merge and not is_hub_name(student.model):
            raise ConfigError(
                f"student.merge: expected true with run.push_to_hub, as {student.model} is not on the hub and an adapter needs it"
            )
        return
    try:
        if recipe.model.folder is None:
            _check_backbones(SpeechLMConfig.from_dict(recipe.model.settings), set(), "model.settings")
        else:
            check_portable(Path(recipe.model.folder))
    except PublishError as error:
        raise ConfigError(f"run.push_to_hub: {error}") from None


def _check_backbones(config: SpeechLMConfig, stored: set[str], where: str) -> None:
    stored = stored | {"lm"} if config.train_lm else stored
    for part in ("lm", "encoder"):
        spec = getattr(config, part)
        if part not in stored and not is_hub_name(spec):
            raise PublishError(
                f"{where}: expected the {part} to be a hub id, or inside the folder by save_pretrained(include_frozen=True), "
                f"got {spec}"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """The command `push`; see the module's docstring."""
    arguments = push_parser().parse_args(argv)
    try:
        print(publish(arguments.folder, arguments.repository, private=not arguments.public))
    except PublishError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
