"""What a training step is fed with: examples as batches, and the teacher's hidden states, live or from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kdkernels.teacher import DualPathTeacher, LMHead, MarkAbsent
from models.config import Recipe


class SourceError(RuntimeError):
    """Data or a model of the recipe is missing or unusable; the message says which and what was expected."""


@dataclass(frozen=True)
class TeacherStates:
    """What the frozen teacher says about the N target tokens of a batch, before its LM head.

    audio_hidden: (N, H_t); text_hidden: (N, H_t) or None; head: weight, bias, softcap, logit_scale of the LM head.
    """

    audio_hidden: torch.Tensor
    text_hidden: torch.Tensor | None
    head: Any


@dataclass
class TrainingData:
    """Examples, the recipe of a batch, and the order in which they are drawn.

    Args:
        examples: manifest examples that have a target.
        make_batch: examples -> a batch with `ids`, `target_index`, `target`, `target_row`, `choice_mask`,
            `model_inputs()` and `to(device)` (models/batching.py).
        extra_inputs: added to every batch's model inputs, such as the prefix cache.
    """

    examples: Sequence[Any]
    make_batch: Callable[[Sequence[Any]], Any]
    extra_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, cursor: int, count: int, *, seed: int) -> list[int]:
        """Rows `cursor` to `cursor + count` of the endless shuffled stream: every epoch is its own permutation.

        A function of its arguments alone, so the position in the data is one number.
        """
        n = len(self.examples)
        rows: list[int] = []
        while len(rows) < count:
            epoch, start = divmod(cursor + len(rows), n)
            order = np.random.default_rng([seed, epoch]).permutation(n)
            rows += order[start : start + count - len(rows)].tolist()
        return rows

    def model_inputs(self, batch: Any) -> dict[str, Any]:
        """The keyword arguments of the model for `batch`."""
        return {**batch.model_inputs(), **self.extra_inputs}


class LiveTeacher:
    """Runs the frozen teacher on each batch: both paths in one pass (kdkernels.DualPathTeacher).

    Args:
        lm: the teacher's SpeechLM.
        data: how its batches are made; its prompt may use another number of audio tokens than the student's.
        device: where it runs.
    """

    def __init__(self, lm: torch.nn.Module, data: TrainingData, *, device: torch.device) -> None:
        self._teacher = DualPathTeacher(lm.to(device).eval(), negative=MarkAbsent("audio_present"))
        self._data = data
        self._device = device

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        own = self._data.make_batch(examples).to(self._device)
        _same_targets(own, batch)
        states = self._teacher(self._data.model_inputs(own), own.target_index)
        return TeacherStates(states.audio_hidden, states.text_hidden, self._teacher.head)


class CachedTeacher:
    """Reads the teacher's hidden states from a ContrastCache; the teacher's body is never run.

    Args:
        cache: an open kdkernels.ContrastCache.
        head: the teacher's LM head, on the device of the loss.
    """

    def __init__(self, cache: Any, head: Any, *, device: torch.device) -> None:
        self._cache = cache
        self._head = head
        self._device = device

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        audio, text = [], []
        counts = torch.bincount(batch.target_row, minlength=len(batch.ids)).tolist()
        for example_id, count in zip(batch.ids, counts, strict=True):
            entry = self._cache[example_id]
            if len(entry.audio_hidden) != count:
                raise SourceError(
                    f"teacher cache: example {example_id} has {len(entry.audio_hidden)} positions, its target has {count} "
                    "tokens; the cache was made for other targets"
                )
            audio.append(entry.audio_hidden)
            text.append(entry.text_hidden)
        return TeacherStates(torch.cat(audio).to(self._device), torch.cat(text).to(self._device), self._head)


@torch.no_grad()
def path_divergence(states: TeacherStates, *, chunk_tokens: int = 256) -> torch.Tensor:
    """KL(softmax z_audio || softmax z_text) of each token, (N,) float32, in chunks of `chunk_tokens` rows of logits."""
    if states.text_hidden is None:
        raise ValueError("states: expected both paths, got no text_hidden")
    out = []
    for start in range(0, len(states.audio_hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        audio, text = (
            F.log_softmax(head_logits(states.head, hidden[rows]), dim=-1)
            for hidden in (states.audio_hidden, states.text_hidden)
        )
        out.append((audio.exp() * (audio - text)).sum(-1).clamp(min=0))
    return torch.cat(out) if out else states.audio_hidden.new_zeros(0)


def head_logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits (N, V) of an LM head with optional bias, logit scale and softcap."""
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float() * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def build_model(recipe: Recipe) -> torch.nn.Module:
    """The SpeechLM of `recipe.model`, its connector the only part that requires grad."""
    from models.speech_lm import SpeechLM, SpeechLMConfig

    settings = recipe.model
    if settings.folder is None:
        try:
            return SpeechLM.from_config(SpeechLMConfig(**settings.settings))
        except (TypeError, ValueError) as error:
            raise SourceError(f"model.settings: {error}") from error
    if not Path(settings.folder).is_dir():
        raise SourceError(f"model.folder: no folder {settings.folder!r}")
    model = SpeechLM.from_pretrained(settings.folder)
    if settings.fresh_connector:
        reset_connector(model)
    return model


def reset_connector(model: torch.nn.Module) -> None:
    """New random connector weights from torch's generator; the feature statistics (buffers) stay."""
    raise NotImplementedError  # settled when models/connector.py stands


def build_data(recipe: Recipe, model: torch.nn.Module) -> TrainingData:
    """The examples of `recipe.data` that have a target, batched for `model`, with their features and prefix cache."""
    from models.data.manifest import read_manifest
    from models.features import FeatureStore, extract_features

    settings = recipe.data
    if not settings.manifest:
        raise SourceError("data.manifest: expected a file, got none")
    manifest = read_manifest(
        settings.manifest,
        audio_root=settings.audio_root,
        max_bad_fraction=settings.max_bad_fraction,
        check_audio=settings.features is None,
        max_seconds=settings.max_clip_seconds,
    )
    examples = [e for e in manifest.examples if e.split in settings.splits and (not settings.tasks or e.task in settings.tasks)]
    examples = [e for e in examples if e.target]
    if not examples:
        raise SourceError(
            f"data: no example with a target in {settings.manifest} (splits {list(settings.splits)}, tasks "
            f"{list(settings.tasks) or 'all'}); targets are written by python -m models.pseudo_gt"
        )
    if settings.features is not None:
        store = FeatureStore.load(settings.features)
    else:
        store, problems = extract_features(
            examples,
            model.encode_audio,
            audio_root=manifest.audio_root,
            max_seconds=settings.max_clip_seconds,
            max_bad_fraction=settings.max_bad_fraction,
            progress_bar=recipe.run.progress_bar,
        )
        for example_id, reason in problems:
            tqdm.write(f"skipped {example_id}: {reason}")
    return make_training_data(model, [e for e in examples if e.audio is None or e in store], store)


def make_training_data(model: torch.nn.Module, examples: Sequence[Any], store: Any) -> TrainingData:
    """Batches of `examples` for `model` (a SpeechLM), their features taken from `store`."""
    from models.batching import Collator

    collator = Collator(model.tokenizer, model.config.num_queries)

    def make_batch(chosen: Sequence[Any]) -> Any:
        return collator(chosen, store.rows(chosen))

    return TrainingData(examples, make_batch)


def build_teacher(recipe: Recipe, data: TrainingData, *, device: torch.device) -> Callable[[Any, Sequence[Any]], TeacherStates] | None:
    """The teacher's side of `recipe`: None, a live model, or its cache."""
    from models.speech_lm import SpeechLM

    if not recipe.needs_teacher:
        return None
    settings = recipe.teacher
    if not Path(settings.folder).is_dir():
        raise SourceError(f"teacher.folder: no folder {settings.folder!r}")
    lm = SpeechLM.from_pretrained(settings.folder)
    if settings.cache is None:
        return LiveTeacher(lm, data, device=device)
    from kdkernels.contrast_cache import ContrastCache

    return CachedTeacher(ContrastCache(settings.cache), LMHead.from_model(lm), device=device)


def _same_targets(own: Any, batch: Any) -> None:
    if own.target.shape != batch.target.shape:
        raise SourceError(
            f"teacher and student: the batch of {batch.ids[0]} ... has {len(own.target)} and {len(batch.target)} target "
            "tokens; distillation by token needs one tokenizer"
        )
