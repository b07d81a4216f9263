"""Students of one pipeline, trained one after another in one process. What is frozen for all of them is computed once.

`python -m models train` loads the models, computes the text prefixes of its prompts and the states of the teachers, and trains
for a minute. For a table of many students all of this but the training is the same each time. A `StudentGroup` keeps the
features, each frozen language model with its prefix cache, and the states of each teacher from one run to the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.backbones.device import pick_device
from models.experiments.pipeline import Context
from models.experiments.shared_steps import ask_model, load_model, read_items, recipe_words
from models.io_utils import atomic_write_json
from models.speech_lm.features import FeatureStore
from models.training.build_sources import build_sources
from models.training.check_folders import check_folders
from models.training.checkpoint import load_checkpoint, restore_model
from models.training.recipe import Recipe
from models.training.recipe_files import load_recipe
from models.training.student import build_model
from models.training.teachers import Source
from models.training.train import seed_everything, train
from models.training.training_data import build_data, read_examples


class StudentGroup:
    """Trains and asks students; see the module's docstring.

    Args:
        context: of a stage that needs "corpus" and "features" (models/experiments/shared_steps.py).
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = FeatureStore.load(context.folders["features"] / "features.safetensors")
        self._lms: dict[str, Any] = {}
        self._prefixes: dict[str, Any] = {}  # by language model
        self._sources: dict[str, Source] = {}  # see build_sources
        self._questions: dict[str, list[Any]] = {}

    def run(
        self, folder: Path, recipe: str, *, manifest: Path, start: Path, words: Sequence[str], **asked: Any
    ) -> dict[str, Any]:
        """Train one student and ask it. A student that was asked before is not trained again; a stopped one continues.

        Args:
            folder: folder of the run, with checkpoints, "final" and the predictions.
            recipe: name in models/training/recipes.
            manifest: the training examples.
            start: SpeechLM folder that the student starts from.
            words: further `key=value` words.
            asked: options of `models.experiments.shared_steps.ask_model`.

        Returns:
            what `ask_model` returns.
        """
        return self._once(folder, lambda: self.train(folder, recipe, manifest=manifest, start=start, words=words), asked)

    def train(self, folder: Path, recipe: str, *, manifest: Path, start: Path, words: Sequence[str]) -> Any:
        """The trained student, as in `run`. A student that is trained already is read from its folder."""
        all_words = recipe_words(self._context, manifest=manifest, folder=start, out_dir=folder, words=words)
        settings = load_recipe(recipe, all_words)
        trained = (folder / "final").exists()
        return load_model(self._context, folder / "final") if trained else self._train(settings)

    def ask(self, folder: Path, trained: Path, **asked: Any) -> dict[str, Any]:
        """Ask the SpeechLM in `trained` once and keep the answers in `folder`; see `run`."""
        return self._once(folder, lambda: load_model(self._context, trained), asked)

    def ask_at(self, folder: Path, trained: Path, step: int, **asked: Any) -> dict[str, Any]:
        """Ask the student of the run `trained` as it was after `step`, by its checkpoint of that step; see `ask`."""

        def make() -> Any:
            model = load_model(self._context, trained / "final")
            restore_model(model, load_checkpoint(trained / "checkpoints" / f"step-{step:08d}"))
            return model

        return self._once(folder, make, asked)

    def _once(self, folder: Path, make: Callable[[], Any], asked: dict[str, Any]) -> dict[str, Any]:
        noted = folder / "asked.json"
        if noted.exists():
            return json.loads(noted.read_text(encoding="utf-8"))
        folder.mkdir(parents=True, exist_ok=True)
        result = self._ask(folder, make(), **asked)
        atomic_write_json(noted, result)
        return result

    def _ask(self, folder: Path, model: Any, *, part: str = "test", **asked: Any) -> dict[str, Any]:
        """`ask_model` with what the group keeps. `part` is a manifest of the stage "corpus"."""
        if part not in self._questions:
            self._questions[part] = [e for e in read_items(self._context, part) if e in self._store]
        extra = {"prefix_cache": self._prefix_cache(model)}
        return ask_model(folder, model, self._questions[part], self._store, extra, part=part, **asked)

    def _train(self, recipe: Recipe) -> Any:
        check_folders(recipe)
        examples, audio_root = read_examples(recipe)
        seed_everything(recipe.run.seed)
        model = build_model(recipe)
        data = build_data(recipe, model, examples, audio_root, store=self._store)
        data.extra_inputs = {"prefix_cache": self._prefix_cache(model)}
        sources = build_sources(recipe, data, model, device=pick_device(recipe.run.device, name="run.device"), kept=self._sources)
        seed_everything(recipe.run.seed)  # a run must not depend on what was kept and what was built now
        result = train(recipe, model=model, data=data, sources=sources)
        if result.stopped_by is not None:
            raise SystemExit(128 + result.stopped_by)
        return model

    def _prefix_cache(self, model: Any) -> Any:
        """The prefix cache of the model's language model, which is replaced by the equal one of earlier students."""
        if model.config.train_lm:
            raise ValueError("model: expected a frozen language model, got train_lm true")
        key = str(model.config.lm)
        model.lm = self._lms.setdefault(key, model.lm)
        if key not in self._prefixes:
            self._prefixes[key] = model.prefix_inputs().get("prefix_cache")
        return self._prefixes[key]
