"""The teachers of a training step: what they say about the target tokens, computed live, kept in memory or read from a cache.

A teacher is a callable (batch, its examples) -> `TeacherStates`: hidden states at the N positions that predict the target,
and the LM head that reads them; never logits.

    LiveTeacher      a speech LM on both paths, with the audio and without (kdkernels.DualPathTeacher)
    CachedTeacher    the same, read from a ContrastCache on the disk
    ListeningTeacher a speech LM on the path with the audio only, such as a frozen snapshot of the student
    TextTeacher      a language model that reads in words what is known about the clip (text_teacher.py)
    KeptTeacher      any of them; it computes each example once
    CenteredTeacher  one with both paths; the text path is moved by its mean distance from the audio path

Legend: N target tokens of a batch, H_s / H_t hidden widths of student and teacher, K layers.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from kdkernels.model_modes import evaluating
from kdkernels.teacher import DualPathTeacher, MarkAbsent
from models.backbones.causal_lm import CurrentHead, read_head
from models.speech_lm.listeners import text_path
from models.training.layer_distillation import LayerDistillation
from models.training.recipe_sections import SourceConfig
from models.training.teacher_states import SourceError, Teacher, TeacherStates

_KEPT_BATCH_EXAMPLES = 32
# Relative: bfloat16 rounds to 2^-9 a layer, while examples that see each other are off by order 1.
_PACKING_TOLERANCE = 0.1


@dataclass
class Source:
    """One teacher of a run: the loop adds `settings.weight_at(step)` times its divergence, and the error of its layers.

    layers: the `LayerDistillation` of this teacher, or None.
    store: what a teacher that runs in every step hears of the clips, or None.
    """

    name: str
    settings: SourceConfig
    teacher: Teacher
    layers: LayerDistillation | None = None
    store: Any = None


@torch.no_grad()
def check_packing(lm: torch.nn.Module, data: Any, device: torch.device) -> None:
    """Checks, if `data` packs, that two examples side by side in a row get the states of padded rows from `lm`.

    Some families ignore the positions, or the masks, by which packed examples are kept apart.

    Raises:
        SourceError: it does not; the message names the family and the option.
    """
    if "pack_tokens" not in data.extra_inputs or not len(data.examples):
        return
    batch = _own_batch(data, [data.examples[0], data.examples[min(1, len(data.examples) - 1)]], device)
    inputs = data.model_inputs(batch)
    with evaluating(lm):
        packed, padded = (
            lm.hidden_states_at(batch.target_index, **{**inputs, "pack_tokens": tokens}).double()
            for tokens in (batch.input_ids.numel(), None)
        )
    for row in range(2):  # row by row, because the first one in a packed row has no other before it
        here = (batch.target_row == row).to(packed.device)
        difference = (packed - padded)[here].norm() / padded[here].norm().clamp_min(1e-12)
        if not difference < _PACKING_TOLERANCE:
            raise SourceError(
                f"data.packing: expected none with {type(lm.lm).__name__}, which does not keep packed examples apart: their "
                f"states are {float(difference):.2g} off those of padded rows"
            )


class LiveTeacher:
    """Runs the frozen teacher on each batch: both paths in one pass (kdkernels.DualPathTeacher).

    Args:
        lm: the teacher's SpeechLM.
        data: a TrainingData that makes its batches; its prompt may have another number of audio tokens than the student's.
        device: where it runs.
        layers: layers whose states are returned as well.
        batch_examples: how many examples it reads at a time; 0 = all of a batch. With `data.make_unheard` the path without the
            audio is a batch of its own.
    """

    def __init__(
        self,
        lm: torch.nn.Module,
        data: Any,
        *,
        device: torch.device,
        layers: Sequence[int] = (),
        batch_examples: int = 0,
    ) -> None:
        lm = lm.to(device).eval()
        check_packing(lm, data, device)
        self._teacher = DualPathTeacher(lm, negative=MarkAbsent("audio_present"), layers=layers, head=read_head(lm))
        self._data = data
        self._device = device
        self._batch_examples = batch_examples

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        at_once = self._batch_examples or len(examples)
        parts = [self._read(examples[start : start + at_once]) for start in range(0, len(examples), at_once)]
        _check_same_targets(batch, sum(len(part.audio_hidden) for part in parts))
        if len(parts) == 1:
            return parts[0]
        return TeacherStates(head=parts[0].head, **_joined([part.tensors() for part in parts]))

    def _read(self, examples: Sequence[Any]) -> TeacherStates:
        own = _own_batch(self._data, examples, self._device)
        make_unheard = getattr(self._data, "make_unheard", None)
        unheard = text_path(make_unheard(examples) if make_unheard else None, self._device)
        states = self._teacher(self._data.model_inputs(own), own.target_index, **unheard)
        # A device_map may have placed the head elsewhere than the loss.
        found = (states.audio_hidden, states.text_hidden, states.audio_layers, states.text_layers)
        audio, text, *layers = (x if x is None else x.to(self._device) for x in found)
        return TeacherStates(audio, text, self._teacher.head.to(self._device), *layers)


class ContentCheck:
    """Compares what a cache holds of examples with what they are now, once for each. SourceError where they differ.

    Args:
        held: id -> the fingerprint that the cache holds; "" is not compared.
        content: an example -> the fingerprint that it should be (models/training/cache_identity.py), or the beginning of that;
            None = nothing is compared.
    """

    def __init__(self, held: Callable[[str], str], content: Callable[[Any], str] | None) -> None:
        self._held = held
        self._content = content
        self._checked: set[str] = set()

    def __call__(self, examples: Sequence[Any]) -> None:
        for example in examples:
            if self._content is not None and example.id not in self._checked:
                held, now = self._held(example.id), self._content(example)
                if held and not held.startswith(now):
                    raise SourceError(
                        f"teacher.cache: sample {example.id!r} was cached with another prompt, clip or target ({held}, now {now})"
                    )
                self._checked.add(example.id)


class CachedTeacher:
    """Reads the teacher's hidden states from a ContrastCache; the teacher's body is never run.

    Args:
        cache: an open kdkernels.ContrastCache.
        head: the teacher's LM head, on the device of the loss.
        content: an example -> the fingerprint that the cache must hold for it (models/training/cache_identity.py), or the
            beginning of that; called once for each example.
        layers: layers whose states are returned as well; the cache must hold them.
    """

    def __init__(
        self,
        cache: Any,
        head: Any,
        *,
        device: torch.device,
        content: Callable[[Any], str] | None = None,
        layers: Sequence[int] = (),
    ) -> None:
        missing = sorted(set(layers) - set(cache.layers))
        if missing:
            raise ValueError(f"expected the states of layers {list(layers)}, got a cache without those of {missing}")
        self._cache = cache
        self._head = head
        self._device = device
        self._check = ContentCheck(cache.content, content)
        self._columns = [cache.layers.index(layer) for layer in layers]

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        try:
            self._check(examples)
            states = self._cache.get(batch.ids)
        except KeyError as error:
            raise SourceError(f"teacher.cache: {error.args[0] if error.args else error}") from error
        if not torch.equal(states.target, batch.target.cpu()):
            raise SourceError(f"teacher.cache: made for other targets than those of the batch {batch.ids[0]} ...")
        found = [states.audio_hidden, states.text_hidden]
        if self._columns:
            found += [layers[:, self._columns] for layers in (states.audio_layers, states.text_layers)]
        audio, text, *layers = (h.to(self._device, self._head.weight.dtype) for h in found)
        return TeacherStates(audio, text, self._head, *layers)


class ListeningTeacher:
    """A frozen speech LM that hears the clip, on one path; the acoustic teacher is one: a snapshot of the student.

    Args:
        lm: a SpeechLM; `snapshot(student)` makes one of the student as it is now.
        data, device, layers: as in `LiveTeacher`.
    """

    def __init__(self, lm: torch.nn.Module, data: Any, *, device: torch.device, layers: Sequence[int] = ()) -> None:
        self._lm = lm.to(device).eval()
        check_packing(self._lm, data, device)
        self._data = data
        self._device = device
        self._layers = tuple(layers)
        self._head = CurrentHead(self._lm)

    @torch.no_grad()
    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        own = _own_batch(self._data, examples, self._device)
        _check_same_targets(batch, len(own.target))
        layers = {"layers": self._layers} if self._layers else {}
        states = self._lm.hidden_states_at(own.target_index, **self._data.model_inputs(own), **layers)
        return TeacherStates.of_one_path(states, self._head())


class KeptTeacher:
    """A teacher's states of all examples, computed once, in the examples' order.

    They are computed before the first step, in batches that do not depend on the steps. So a continued run has the bits of an
    undisturbed one.

    Args:
        teacher: called once for every example.
        data: the TrainingData that the run draws from.
        title: of the progress bar.
    """

    def __init__(self, teacher: Teacher, data: Any, *, title: str, progress_bar: bool = True) -> None:
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        self._head: Any = None
        self._device: torch.device | None = None
        self.bytes = 0
        with tqdm(total=len(data), desc=title, unit="example", disable=not progress_bar) as bar:
            for start in range(0, len(data), _KEPT_BATCH_EXAMPLES):
                chosen = data.examples[start : start + _KEPT_BATCH_EXAMPLES]
                self._keep(data.make_batch(chosen), teacher, chosen)
                bar.update(len(chosen))

    def _keep(self, batch: Any, teacher: Teacher, examples: Sequence[Any]) -> None:
        states = teacher(batch, examples)
        self._head, self._device = states.head, states.audio_hidden.device
        for row, name in enumerate(batch.ids):
            here = (batch.target_row == row).nonzero()[:, 0].to(self._device)
            self._states[name] = {key: x[here].cpu() for key, x in states.tensors().items()}
            self.bytes += sum(x.nbytes for x in self._states[name].values())

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        rows = [self._states[name] for name in batch.ids]
        joined = {key: x.to(self._device, non_blocking=True) for key, x in _joined(rows).items()}
        return TeacherStates(**{"text_hidden": None, "head": self._head, **joined})


class CenteredTeacher:
    """A teacher whose text path is moved by its mean distance from the audio path, before any contrast.

        h_text' = h_text + mean over items of (h_audio - h_text)

    Without the audio the teacher prefers some answers, whatever the clip is: a constant in the logits of an answer's token. The
    contrast would enlarge it and turn it against these answers. Each task, and each of the tokens that spell the answer, has a
    mean of its own, over at most `max_examples` examples. Other tokens stay as they are.

    Args:
        teacher: with both paths, such as a `CachedTeacher`.
        data: the TrainingData that the run draws from; its labels are not used.
    """

    def __init__(self, teacher: Teacher, data: Any, *, max_examples: int = 1024) -> None:
        self._teacher = teacher
        stride = -(-len(data) // max_examples)
        chosen = data.examples[::stride]
        sums: dict[tuple[str, int], torch.Tensor] = {}
        counts: Counter[tuple[str, int]] = Counter()
        for start in range(0, len(chosen), _KEPT_BATCH_EXAMPLES):
            group = chosen[start : start + _KEPT_BATCH_EXAMPLES]
            batch = data.make_batch(group)
            states = teacher(batch, group)
            if states.text_hidden is None:
                raise ValueError("teacher: expected both paths, got no text_hidden")
            distance = (states.audio_hidden - states.text_hidden).double()
            for key, token in _spelling_tokens(batch, group):
                sums[key] = sums.get(key, 0) + distance[token]
                counts[key] += 1
        self._offsets = {key: total / counts[key] for key, total in sums.items()}

    def __call__(self, batch: Any, examples: Sequence[Any]) -> TeacherStates:
        states = self._teacher(batch, examples)
        text = states.text_hidden.clone()
        for key, token in _spelling_tokens(batch, examples):
            if key in self._offsets:
                text[token] += self._offsets[key].to(text.dtype)
        return dataclasses.replace(states, text_hidden=text)


def _spelling_tokens(batch: Any, examples: Sequence[Any]) -> Iterator[tuple[tuple[str, int], int]]:
    """For each token that spells an answer: ((task, its number among the answer's tokens), its number among the targets)."""
    seen: Counter[int] = Counter()
    rows = batch.target_row.tolist()
    for token in batch.choice_mask.nonzero()[:, 0].tolist():
        row = rows[token]
        yield (examples[row].task, seen[row]), token
        seen[row] += 1


def kept_bytes(teacher: Teacher, data: Any) -> int:
    """Bytes that `KeptTeacher` would hold for all of `data`, estimated from its first examples."""
    chosen = data.examples[:_KEPT_BATCH_EXAMPLES]
    states = teacher(data.make_batch(chosen), chosen)
    return sum(x.nbytes for x in states.tensors().values()) * len(data) // len(chosen)


def snapshot(model: torch.nn.Module, *, share: bool = True) -> torch.nn.Module:
    """A frozen copy of `model` as it is now. With `share` it shares the weights that do not train with `model`."""
    shared: dict[int, Any] = {}
    for part in model.modules() if share else ():
        if not any(p.requires_grad for p in part.parameters()):
            shared |= {id(b): b for b in part.buffers()}
    shared |= {id(p): p for p in model.parameters() if share and not p.requires_grad}
    shared |= {id(x): x for x in vars(model).values() if isinstance(x, types.ModuleType)}  # which cannot be copied
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def check_same_tokenizer(name: str, student: Any, teacher: Any, *, added: bool = True) -> None:
    """Distillation by token needs one tokenizer; heads that are padded differently are no obstacle.

    Args:
        added: compare also the tokens that stand beside the vocabulary, such as those of a chat. False where no target has them.

    Raises:
        SourceError: the two vocabularies differ; the message names a token.
    """
    ours, theirs = (dict(tokenizer.get_vocab()) for tokenizer in (student, teacher))
    if not added:  # an added token has another id in the other family, or none
        beside = {token for tokenizer in (student, teacher) for token in getattr(tokenizer, "get_added_vocab", dict)()}
        ours, theirs = ({token: n for token, n in each.items() if token not in beside} for each in (ours, theirs))
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if differing:
        token = differing[0]
        why = f"{token!r} is id {ours[token]} of the student and {theirs[token]} of the teacher"
    else:
        token = sorted(ours.keys() ^ theirs.keys())[0]
        why = f"only {'the student' if token in ours else 'the teacher'} has the token {token!r}"
    raise SourceError(
        f"{name}: expected the student's tokenizer, got another one ({why}); distillation by token needs the same ids"
    )


def _joined(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parts' tensors one after another, by name; all parts have the same names."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _own_batch(data: Any, examples: Sequence[Any], device: torch.device) -> Any:
    """The teacher's own batch of `examples`."""
    own = data.make_batch(examples)
    return (data.crop(own) if data.crop else own).to(device)


def _check_same_targets(batch: Any, count: int) -> None:
    """SourceError unless the teacher has states of `count` target tokens, as many as the student's batch has."""
    if count != len(batch.target):
        raise SourceError(
            f"teacher and student: the batch of {batch.ids[0]} ... has {count} and {len(batch.target)} target "
            "tokens; distillation by token needs one tokenizer"
        )
