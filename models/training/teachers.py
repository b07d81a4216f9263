"""The teachers of a training step: what they say about the target tokens, computed live, kept in memory or read from a cache.

A teacher is a callable (batch, its examples) -> `TeacherStates`: hidden states at the N positions that predict the target,
and the LM head that reads them; never logits.

    LiveTeacher      a speech LM on both paths, with the audio and without (kdkernels.DualPathTeacher)
    CachedTeacher    the same, read from a ContrastCache on the disk
    ListeningTeacher a speech LM on the path with the audio only, such as a frozen snapshot of the student
    TextTeacher      a language model that reads in words what is known about the clip
    KeptTeacher      any of them; it computes each example once
    CenteredTeacher  one with both paths; the text path is moved by its mean distance from the audio path

Legend: N target tokens of a batch, H_s / H_t hidden widths of student and teacher, K layers.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kdkernels import TeacherProjection
from kdkernels.layer_attention import LayerAttention
from kdkernels.layer_mse import LayerProjections
from kdkernels.layer_states import LayerStates
from kdkernels.lm_head import evaluating
from kdkernels.teacher import DualPathTeacher, MarkAbsent
from models.backbones.causal_lm import CurrentHead, cache_keyword, check_token_ids, named_ends, pad_rows, read_head
from models.speech_lm.listeners import text_path
from models.training.recipe_checks import ConfigError
from models.training.recipe_sections import LayersConfig, SourceConfig

if TYPE_CHECKING:
    from models.data.manifest import Example

_KEPT_BATCH_EXAMPLES = 32
# Relative: bfloat16 rounds to 2^-9 a layer, while examples that see each other are off by order 1.
_PACKING_TOLERANCE = 0.1


class SourceError(RuntimeError):
    """Data or a model of the recipe is missing or unusable; the message names it and says what was expected."""


@dataclass(frozen=True)
class TeacherStates:
    """What a frozen teacher says about the N target tokens of a batch, before its LM head.

    Attributes:
        audio_hidden: (N, H_t), the path with the audio, or with what this teacher reads in its place.
        text_hidden: (N, H_t), the path without the audio, or None.
        head: weight, bias, softcap, logit_scale of the LM head.
        audio_layers, text_layers: (N, K, H_t), the layers that the recipe compares, or None.
        speaks: (N,) bool, False at tokens about which this teacher says nothing; None = it speaks about all.
        divergence: (N,) float32, nats, between the two paths; None where nothing needs it.
    """

    audio_hidden: torch.Tensor
    text_hidden: torch.Tensor | None
    head: Any
    audio_layers: torch.Tensor | None = None
    text_layers: torch.Tensor | None = None
    speaks: torch.Tensor | None = None
    divergence: torch.Tensor | None = None

    TENSORS = ("audio_hidden", "text_hidden", "audio_layers", "text_layers", "speaks", "divergence")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not None, by name; each has N rows."""
        return {name: getattr(self, name) for name in self.TENSORS if getattr(self, name) is not None}

    def at(self, positions: torch.Tensor) -> TeacherStates:
        """The states of the target tokens `positions`, (n,) int64."""
        positions = positions.to(self.audio_hidden.device, non_blocking=True)
        return dataclasses.replace(self, **{name: x[positions] for name, x in self.tensors().items()})

    def with_divergence(self) -> TeacherStates:
        """The same with `divergence`."""
        return dataclasses.replace(self, divergence=path_divergence(self))


@dataclass(frozen=True)
class ProjectedStates:
    """What a teacher says about the N target tokens of a batch, for one frozen LM head of the student.

    Attributes:
        projection: of the N tokens; mass 0 at those that have no weight in the KD term.
        divergence: as in `TeacherStates`.
    """

    projection: TeacherProjection
    divergence: torch.Tensor | None = None

    def at(self, positions: torch.Tensor) -> ProjectedStates:
        """The states of the target tokens `positions`, (n,) int64."""
        positions = positions.to(self.projection.mass.device, non_blocking=True)
        return ProjectedStates(self.projection[positions], None if self.divergence is None else self.divergence[positions])

    def with_divergence(self) -> ProjectedStates:
        return self


Teacher = Callable[[Any, Sequence[Any]], Any]  # -> TeacherStates, or ProjectedStates (models/training/projections.py)


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
        return _one_path(states, self._head())


class TextTeacher:
    """A language model that reads a description of the clip in words, and then the tokens of the student's answer.

    It reads Stage 1's prompt (models/pseudo_gt/wording.py): worked examples, then "[00:00-00:03] words (Gender: man, ...)", then
    with `reasoning` an example's metadata["reasoning"]; the answer's tokens follow. The worked examples of a task are read once.
    It says nothing about the tokens that end a text: in its prompt an answer ends with its line.

    Args:
        lm: a causal LM of transformers, frozen.
        tokenizer: its own.
        target_ids: an example -> the token ids of its target, as the student's collator makes them.
        end_ids: the ids that end an answer of the student. Those that the checkpoint of `lm` names count too.
        own_line: for targets that do not begin with a space, as in a chat: the answer then stands on a line of its own.
        device: where it runs.
        layers: layers whose states are returned as well.
        reasoning: see above.
    """

    def __init__(
        self,
        lm: torch.nn.Module,
        tokenizer: Any,
        *,
        target_ids: Callable[[Example], list[int]],
        end_ids: Iterable[int],
        device: torch.device,
        own_line: bool = False,
        layers: Sequence[int] = (),
        reasoning: bool = False,
    ) -> None:
        from models.pseudo_gt.writers import WorkedPrefixes
        from models.speech_lm.prefix_cache import why_not_cached

        self._lm = lm.to(device).eval()
        self._tokenizer = tokenizer
        self._target_ids = target_ids
        self._end_ids = torch.tensor(sorted({*end_ids, *named_ends(lm, tokenizer)}), device=device)
        self._own_line = own_line
        self._device = device
        self._layers = tuple(layers)
        self._reasoning = reasoning
        # None: its state after the worked examples cannot be kept, so it reads them in every row.
        self._prefixes = None if why_not_cached(self._lm) else WorkedPrefixes(self._lm, tokenizer)
        self._head = CurrentHead(self._lm)

    @torch.no_grad()
    def __call__(self, batch: Any, examples: Sequence[Example]) -> TeacherStates:
        from models.pseudo_gt.wording import worked_examples

        targets = [self._target_ids(example) for example in examples]
        if [token for target in targets for token in target] != batch.target.tolist():
            raise SourceError(f"text teacher: the batch of {batch.ids[0]} ... has other target tokens than its examples")
        by_prefix: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            by_prefix.setdefault(worked_examples(example, own_line=self._own_line), []).append(row)
        states: list[torch.Tensor | None] = [None] * len(examples)
        for prefix, rows in by_prefix.items():
            read = self._read(prefix, [self._prompt(examples[row]) for row in rows], [targets[row] for row in rows])
            for row, one in zip(rows, read, strict=True):
                states[row] = one
        speaks = torch.isin(batch.target.to(self._device), self._end_ids, invert=True)
        return dataclasses.replace(_one_path(torch.cat(states), self._head()), speaks=speaks)

    def _prompt(self, example: Example) -> list[int]:
        from models.pseudo_gt.wording import prompt_end

        reasoning = example.metadata.get("reasoning") if self._reasoning else None
        return self._tokenizer.encode(prompt_end(example, reasoning, own_line=self._own_line), add_special_tokens=False)

    def _read(self, prefix: str, prompts: list[list[int]], targets: list[list[int]]) -> list[torch.Tensor]:
        """(n, H) or (n, 1 + K, H) of each row's target tokens."""
        if self._prefixes is None:
            worked = self._tokenizer.encode(prefix)
            prompts = [worked + prompt for prompt in prompts]
        read = (token for row in (*prompts, *targets) for token in row)
        check_token_ids(read, self._lm, self._tokenizer, what="text teacher: ")
        # The last target token is left out, because its prediction is not needed.
        ids, mask = pad_rows([p + t[:-1] for p, t in zip(prompts, targets, strict=True)])
        columns = ids.shape[1]
        index = [
            row * columns + len(prompt) - 1 + n
            for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
            for n in range(len(target))
        ]
        ids, mask, at = (x.to(self._device) for x in (ids, mask, torch.tensor(index)))
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        decoder = self._lm.get_decoder()
        if self._prefixes is not None:
            prefix_ids, cache = self._prefixes.expanded(prefix, len(prompts))
            length = prefix_ids.shape[1]
            inputs |= {
                "attention_mask": torch.cat([mask.new_ones(len(prompts), length), mask], 1),
                "position_ids": length + torch.arange(columns, device=self._device).expand_as(ids),
                "use_cache": True,
                cache_keyword(decoder): cache,
            }
        if self._layers:
            with LayerStates(self._lm, self._layers, at) as layers:
                hidden = decoder(**inputs).last_hidden_state
            states = torch.cat([hidden.flatten(0, 1)[at][:, None], layers.stacked()], 1)
        else:
            states = decoder(**inputs).last_hidden_state.flatten(0, 1)[at]
        return list(states.split([len(target) for target in targets]))


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


@torch.no_grad()
def path_divergence(states: TeacherStates, *, chunk_tokens: int = 256) -> torch.Tensor:
    """KL(softmax z_audio || softmax z_text) of each token, (N,) float32, in chunks of `chunk_tokens` rows of logits."""
    if states.text_hidden is None:
        raise ValueError("states: expected both paths, got no text_hidden")
    out = []
    for start in range(0, len(states.audio_hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        audio, text = (
            F.log_softmax(states.head.logits(hidden[rows]).float(), dim=-1)
            for hidden in (states.audio_hidden, states.text_hidden)
        )
        out.append((audio.exp() * (audio - text)).sum(-1).clamp(min=0))
    return torch.cat(out) if out else states.audio_hidden.new_zeros(0)


@dataclass(frozen=True)
class Examples:
    """Which of a batch's N target tokens belong to which example.

    Attributes:
        target_row: (N,) int64, ascending.
        count: number of examples B.
        longest: the most target tokens of one of them, known without asking the device.
    """

    target_row: torch.Tensor
    count: int
    longest: int

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) as (B, longest, ...), with zeros behind an example's tokens."""
        rows = self.target_row
        lengths = rows.new_zeros(self.count).index_add(0, rows, torch.ones_like(rows))
        columns = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[rows]
        return x.new_zeros(self.count, self.longest, *x.shape[1:]).index_put((rows, columns), x)


class LayerDistillation(torch.nn.Module):
    """Which layers of student and teacher are compared, and the projections between their widths, which train.

    Args:
        settings: the recipe's `layers`.
        pairs: (student, teacher) layers; one layer may stand in several pairs.
        projections: of those pairs, or their attention with the form "attention".
    """

    def __init__(
        self, settings: LayersConfig, pairs: Sequence[tuple[int, int]], projections: LayerProjections | LayerAttention
    ) -> None:
        super().__init__()
        self.settings = settings
        self.pairs = list(pairs)
        self.projections = projections
        self.student_layers, self.teacher_layers = (sorted(set(side)) for side in zip(*pairs, strict=True))

    @classmethod
    def build(cls, settings: LayersConfig, *, depths: Sequence[int], widths: Sequence[int]) -> LayerDistillation:
        """For these `depths` and `widths`, each of (student, teacher).

        Raises:
            ConfigError: a pair out of range, or heads that do not divide the student's width.
        """
        pairs = settings.layer_pairs(*depths)
        if settings.form == "attention":
            try:
                return cls(settings, pairs, LayerAttention(*widths, pairs, heads=settings.heads, bias=settings.bias))
            except ValueError as error:
                raise ConfigError(f"layers.{error}") from None
        projections = LayerProjections(
            *widths, pairs, direction=settings.direction, identity_where_equal=True, bias=settings.bias
        )
        return cls(settings, pairs, projections)

    def loss(
        self,
        student: Mapping[int, torch.Tensor],
        states: TeacherStates,
        counts: torch.Tensor,
        normalizer: torch.Tensor,
        examples: Examples | None = None,
    ) -> torch.Tensor:
        """Mean over pairs of the squared errors of the tokens that count, divided by `normalizer`.

        With `normalize` a pair's error is 2 - 2 cos for any width: of order 1, like a divergence. Without it the error grows with
        the size of the states. In the middle of a language model they are tens of times as large as in its last layer.

        Args:
            student: its layers' states by number, (N, H_s) each; at least `student_layers`.
            counts: (N,) bool, True at the tokens that count.
            examples: which tokens belong together; the form "attention" needs it.
        """

        def take(stacked: torch.Tensor) -> list[torch.Tensor]:
            return [stacked[:, self.teacher_layers.index(pair[1])] for pair in self.pairs]

        text = self.settings.alpha > 0 and states.text_layers is not None
        students, teachers = [student[pair[0]] for pair in self.pairs], take(states.audio_layers)
        texts = take(states.text_layers) if text else None
        mask = counts if states.speaks is None else counts & states.speaks
        attends = self.settings.form == "attention"
        compared = teachers if self.settings.direction == "student_to_teacher" and not attends else students
        widths = [x.shape[-1] if self.settings.normalize else 1 for x in compared]  # the loss divides by them
        if attends:
            if examples is None:
                raise ValueError("examples: expected which tokens belong together with the form 'attention', got None")
            students, teachers = ([examples.padded(x) for x in side] for side in (students, teachers))
            texts = None if texts is None else [examples.padded(x) for x in texts]
            mask = examples.padded(mask)
        total = self.projections(
            students,
            teachers,
            teacher_text_hidden=texts,
            alpha=self.settings.alpha if text else 0.0,
            normalize=self.settings.normalize,
            mask=mask,
            layer_weight=[width / len(self.pairs) for width in widths],
            reduction="sum",
        )
        return total / normalizer.clamp_min(1)


def _one_path(states: torch.Tensor, head: Any) -> TeacherStates:
    """Made from (N, H) or, with layers, (N, 1 + K, H)."""
    if states.dim() == 2:
        return TeacherStates(states, None, head)
    return TeacherStates(states[:, 0], None, head, states[:, 1:])


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
