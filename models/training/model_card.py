"""The model card of a result: README.md with the metadata that the model hub reads, and what the run was.

A card names hub ids as they are. Of folders and files of this machine it names the last part of the path only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from models.audio_lms.model import is_hub_id
from models.io_utils import atomic_write_text
from models.speech_lm.saving import SpeechLMError, read_record
from models.training.recipe import Recipe

_PAPERS = {
    "caad": "Contrastive audio-aware distillation: [arXiv 2606.23052](https://arxiv.org/abs/2606.23052)",
    "kd": "Distilling the knowledge in a neural network: [arXiv 1503.02531](https://arxiv.org/abs/1503.02531)",
    "sources": "Distillation from text and acoustic teachers: [arXiv 2509.18579](https://arxiv.org/abs/2509.18579)",
}
_SECTIONS = ("student", "teacher", "loss", "layers", "optim")  # what decides the weights
# How the run was computed, not what it was.
_OF_THE_MACHINE = {"impl", "chunk_tokens", "keep_mib", "cache", "attention", "batch_examples"}
_LOAD = {
    "kdkernels": """\
import models.speech_lm.auto  # of kdkernels: it makes the class known to transformers
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER")
""",
    "peft": """\
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("FOLDER")  # the adapter on its base; it needs peft
processor = AutoProcessor.from_pretrained("FOLDER")
""",
    "transformers": """\
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
""",
}


def write_card(folder: Path, recipe: Recipe) -> Path:
    """Write the README.md of the result in `folder`, in place of an older one (PEFT leaves one with empty sections)."""
    library, bases = _kind(folder, recipe)
    hub_ids = [base for base in bases if is_hub_name(base)]
    metadata = ModelCardData(
        base_model=hub_ids or None, library_name=library, tags=["audio", "distillation" if recipe.distils else "sft", "kdkernels"]
    )
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {folder.resolve().parent.name if folder.name == 'final' else folder.name}",
        f"Trained with kdkernels {_version()} from {' and '.join(f'`{_shown(base)}`' for base in bases)}.",
        *_made_by(recipe),
        "## Load it",
        f"```python\n{_LOAD[library]}```",
        "## Settings",
        "\n".join(["| setting | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in _settings(recipe))]),
    ]
    papers = [paper for name, paper in _PAPERS.items() if name in _methods(recipe)]
    if papers:
        lines += ["## Papers", "\n".join(f"- {paper}" for paper in papers)]
    return atomic_write_text(folder / "README.md", "\n\n".join(lines) + "\n")


def is_hub_name(spec: str) -> bool:
    """Whether `spec` is a hub id, and no folder of this machine."""
    return is_hub_id(spec) and not Path(spec).is_dir()


def _kind(folder: Path, recipe: Recipe) -> tuple[str, list[str]]:
    """The library that loads `folder`, and the models that it was made from."""
    if recipe.student.model is not None:
        adapter = (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors"))
        return "peft" if adapter else "transformers", [recipe.student.model]
    try:
        config, _ = read_record(folder)
    except SpeechLMError:  # a model of the caller's own
        return "kdkernels", [recipe.model.folder or "a new model"]
    return "kdkernels", [config.lm, config.encoder]


def _made_by(recipe: Recipe) -> Iterator[str]:
    steps = f"{recipe.optim.steps} steps of {recipe.optim.batch_examples} examples"
    teachers = [recipe.teacher_spec] if recipe.needs_teacher else []
    named = [f"`{_shown(teacher)}`" for teacher in teachers if teacher]
    named += [f"a {s.role} teacher (`{_shown(s.folder or 'a snapshot of the student')}`)" for s in recipe.sources.values()]
    of = f", from {', '.join(named)}" if named else ""
    yield f"Objective: `{recipe.objective}`{of}. Data: `{_shown(recipe.data.manifest)}`, {steps}."


def _methods(recipe: Recipe) -> set[str]:
    found = {"sources"} if recipe.sources else set()
    found |= {"kd"} if recipe.distils else set()
    return found | ({"caad"} if recipe.objective.startswith("caad") else set())


def _settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """The settings that differ from their defaults, by their keys in the recipe."""
    sections = {name: getattr(recipe, name) for name in _SECTIONS}
    sections |= {f"sources.{name}": source for name, source in recipe.sources.items()}
    yield "objective", recipe.objective
    yield "run.seed", recipe.run.seed
    for name, section in sections.items():
        for key, value in _differing(name, section):
            if key != "teacher.folder" or recipe.student.model is None:  # it has no effect beside student.model
                yield key, value


def _differing(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(section):
        value, key = getattr(section, f.name), f"{prefix}.{f.name}"
        if f.name in _OF_THE_MACHINE and prefix in ("loss", "student", "teacher"):
            continue
        if dataclasses.is_dataclass(value):
            yield from _differing(key, value)
        elif value != (f.default if f.default is not dataclasses.MISSING else f.default_factory()):
            yield key, _shown(value) if isinstance(value, str) else value


def _shown(text: str) -> str:
    """`text`, but of a path of this machine its last part only; on one line, and without what would end a cell of a table."""
    if "/" in text and not is_hub_name(text):
        text = Path(text).name
    return re.sub(r"[|`\s]+", " ", text)


def _version() -> str:
    try:
        return version("kdkernels")
    except PackageNotFoundError:
        return "(not installed)"
