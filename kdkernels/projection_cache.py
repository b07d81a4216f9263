"""A teacher's projections on disk: what one frozen student head needs of it, for one alpha and one temperature.

A cache of states (kdkernels/contrast_cache.py) serves every alpha and every head, and a step multiplies by the teacher's head. A
cache of projections serves one alpha, temperature and student head, and a step needs nothing else of the teacher. It is a folder
of shards (kdkernels/shards.py):

    cache.json                     format version, fingerprint, hidden size, ids, dtype of the tail, what it was made for
    shard-PART-00000.safetensors   ids and probabilities (R, K), tail (R, H_s); tail_bias, negentropy and mass (R,); target (R,);
                                   position (R,): which of the sample's target tokens it is; divergence (R,), where asked for
    index-PART.jsonl               one line a finished shard

Several pairs (alpha, temperature) are several folders. `beside` finds those in the folder of a cache of states.

Legend: R rows of a shard, n rows of a sample, N rows asked for, B samples asked for, K likeliest ids, H_s width of the student.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_not_negative, is_whole, plain_numbers
from .contrast_cache import ContrastCache
from .lm_head import LMHead
from .projection import TeacherProjection, head_fingerprint, project_teacher
from .shards import (
    Header,
    Kind,
    Layout,
    ShardReader,
    ShardWriter,
    canonical,
    check_text,
    is_count,
    row_bytes,
)

__all__ = ["CachedProjections", "ProjectionCache", "ProjectionCacheWriter", "ProjectionSettings", "project_cache"]

FORMAT_VERSION = 1
_MARK = "kdkernels_projection_cache"
_TAILS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_GROUP_TOKENS = 4096  # that are projected by one call
CONTRASTS = ("paths", "none", "zeros")


@dataclass(frozen=True)
class ProjectionSettings:
    """What projections were made for. A run that uses them must have the same.

    Attributes:
        student_fingerprint: of the student's head: its shape, its dtype and 64 rows of weight and bias.
        vocab_size: valid ids.
        alpha, temperature, plausibility, student_logit_scale: as in :func:`kdkernels.project_teacher`.
        contrast: "paths" = the teacher's two paths; "none" = the audio path alone, alpha is 0; "zeros" = logits 0 in the place
            of the text path, so (1 + alpha) z_audio.
        teacher_fingerprint: of the teacher's head.
    """

    student_fingerprint: str
    vocab_size: int
    alpha: float = 2.0
    temperature: float = 2.0
    plausibility: float | None = None
    student_logit_scale: float = 1.0
    contrast: str = "paths"
    teacher_fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in ("student_fingerprint", "contrast", "teacher_fingerprint"):
            check_text(name, getattr(self, name))
        if self.contrast not in CONTRASTS:
            raise ValueError(f"contrast: expected one of {', '.join(CONTRASTS)}, got {self.contrast!r}")
        if not is_whole(self.vocab_size) or self.vocab_size < 1:
            raise ValueError(f"vocab_size: expected an int >= 1, got {self.vocab_size!r}")
        for name in ("alpha", "temperature", "plausibility", "student_logit_scale"):
            value = getattr(self, name)
            if value is None and name == "plausibility":
                continue
            check_not_negative(name, value)
            object.__setattr__(self, name, float(value))  # so that 2 and 2.0 are one setting
        plain_numbers(self)

    def differences(self, other: ProjectionSettings) -> list[str]:
        """In words, what `other` has otherwise. A teacher's head that one of them does not know is no difference."""
        found = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs and (field.name != "teacher_fingerprint" or (mine and theirs)):
                found.append(f"{_WORDS.get(field.name, field.name)} {_short(mine)}, not {_short(theirs)}")
        return found


def _check_settings(folder: Path, found: ProjectionSettings | None, wanted: ProjectionSettings) -> None:
    if found is not None and (differing := found.differences(wanted)):
        raise ValueError(
            f"settings: the projections in {folder} were made for {'; '.join(differing)}. Project the states into a folder of "
            "their own, or train from the states"
        )


_WORDS = {"student_fingerprint": "the student head", "teacher_fingerprint": "the teacher head"}


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _layout(header: Header) -> Layout | None:
    dtype, width, ids, divergence = (header.get(key) for key in ("dtype", "hidden_size", "top_k", "divergence"))
    if not (
        is_count(width, least=1)
        and is_count(ids, least=1)
        and isinstance(dtype, str)
        and dtype in _TAILS
        and isinstance(divergence, bool)
        and _settings(header) is not None
    ):
        return None
    numbers = {name: ((), torch.float32) for name in ("tail_bias", "negentropy", "mass", *(["divergence"] if divergence else []))}
    return {
        "ids": ((ids,), torch.int32),
        "probabilities": ((ids,), torch.float32),
        "tail": ((width,), _TAILS[dtype]),
        **numbers,
        "target": ((), torch.int64),
        "position": ((), torch.int32),
    }


def _settings(header: Header) -> ProjectionSettings | None:
    given = header.get("settings")
    try:
        return ProjectionSettings(**given) if isinstance(given, dict) else None
    except (TypeError, ValueError):
        return None


PROJECTIONS = Kind(
    _MARK, (FORMAT_VERSION,), "projection cache",
    f"hidden_size, top_k, divergence, one of {', '.join(_TAILS)} as dtype, and settings", _layout,
    ("hidden_size", "top_k", "dtype", "divergence"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class CachedProjections:
    """What the cache holds of B samples, concatenated in the order asked for, on the CPU.

    Attributes:
        projection: of N target tokens.
        target: (N,) int64, these tokens.
        position: (N,) int64, which of its sample's target tokens each is.
        lengths: (B,) int64, rows of each sample; N is their sum.
        divergence: (N,) float32, nats, between the teacher's two paths; None in a cache without.
    """

    projection: TeacherProjection
    target: Tensor
    position: Tensor
    lengths: Tensor
    divergence: Tensor | None = None

    def spread(self, target: Tensor, lengths: Tensor) -> CachedProjections:
        """The same for all target tokens of the samples, in the order of a batch: mass 0 where the cache holds none.

        Args:
            target: (N,) int64, the batch's target tokens, on any device.
            lengths: (B,) int64, how many each sample has.

        Raises:
            ValueError: what is held belongs to other target tokens.
        """
        target, lengths = target.cpu(), lengths.cpu()
        fits = len(lengths) == len(self.lengths) and int(lengths.sum()) == len(target)
        if fits:
            own = lengths.repeat_interleave(self.lengths)
            where = (lengths.cumsum(0) - lengths).repeat_interleave(self.lengths) + self.position
            fits = bool((self.position < own).all()) and torch.equal(self.target, target[where])
        if not fits:
            raise ValueError(f"target: expected the {len(self.target)} tokens that were projected, got {len(target)} or others")
        if len(where) == len(target):
            return self
        apart = self.divergence
        if apart is not None:
            apart = torch.zeros(len(target)).index_copy_(0, where, apart)
        position = torch.cat([torch.arange(int(n)) for n in lengths])
        return CachedProjections(self.projection.spread(where, len(target)), target, position, lengths, apart)


class ProjectionCache(ShardReader):
    """Reader of a folder of projections, memory-mapped: only the rows asked for are read.

    Args:
        folder: a folder that a `ProjectionCacheWriter` has written. If a writer is still at work, its finished shards can be
            read.
        fingerprint: the dict that the writer has to have got, or None to accept any.
        verify_checksums: read every shard once and compare its sha256 (about 1 s a GB); otherwise sizes alone.

    Attributes:
        fingerprint (dict), settings (ProjectionSettings), hidden_size (int, H_s), top_k (int, K), dtype (torch.dtype, of the
        tail), bytes (int, of all shards).

    Raises:
        ValueError: no such cache in the folder, another format version, or another fingerprint (differing keys are listed).
        CorruptCacheError: a ValueError of kdkernels.shards; names the shard that is missing, truncated or altered.
        ImportError: safetensors is not installed.
    """

    kind = PROJECTIONS

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        verify_checksums: bool = True,
    ):
        super().__init__(folder, fingerprint=fingerprint, verify_checksums=verify_checksums)
        settings = _settings(self._header)
        assert settings is not None  # read_header has looked
        self.settings = settings
        self.hidden_size: int = self._header["hidden_size"]
        self.top_k: int = self._header["top_k"]
        self.dtype: torch.dtype = _TAILS[self._header["dtype"]]

    @staticmethod
    def writer(folder: str | os.PathLike[str], **options: Any) -> ProjectionCacheWriter:
        """`ProjectionCacheWriter(folder, **options)`."""
        return ProjectionCacheWriter(folder, **options)

    @staticmethod
    def estimate_bytes(*, tokens: int, hidden_size: int, top_k: int = 64, dtype: torch.dtype = torch.float32) -> int:
        """Bytes on disk of `tokens` target tokens, without the shards' headers."""
        layout = _layout(_header({}, _ANY, hidden_size, top_k, dtype, False))
        assert layout is not None
        return tokens * row_bytes(layout)

    @staticmethod
    def beside(folder: str | os.PathLike[str]) -> list[Path]:
        """The folders of projections in `folder`, such as that of a cache of states; `folder` itself where it is one."""
        found = []
        for path in (Path(folder), *sorted(p for p in Path(folder).glob("*") if p.is_dir())):
            try:
                if _MARK in (path / "cache.json").read_text(encoding="utf-8", errors="replace")[:4096]:
                    found.append(path)
            except OSError:
                continue
        return found

    def check(self, settings: ProjectionSettings) -> None:
        """ValueError, with all that differs, unless the projections were made for these settings."""
        _check_settings(self.folder, self.settings, settings)

    def __getitem__(self, sample_id: str) -> CachedProjections:
        return self.get([sample_id])

    def get(self, sample_ids: Sequence[str]) -> CachedProjections:
        """The projections of some samples, in the order given; an id may be asked for more than once.

        Returns:
            CachedProjections: fresh tensors.

        Raises:
            KeyError: an id the cache does not hold.
            TypeError: sample_ids is a single string.
        """
        places, lengths = self._places(sample_ids)
        total = int(lengths.sum())
        found = {name: torch.empty(total, *shape, dtype=dtype) for name, (shape, dtype) in self._layout.items()}
        filled = 0
        for shard, first, rows in places:
            for name, stored in self._shard(shard).items():
                found[name][filled : filled + rows] = stored[first : first + rows]
            filled += rows
        target, divergence, position = found.pop("target"), found.pop("divergence", None), found.pop("position").long()
        return CachedProjections(_projection(self.settings, found), target, position, lengths, divergence)


def _projection(settings: ProjectionSettings, tensors: Mapping[str, Tensor]) -> TeacherProjection:
    return TeacherProjection(
        **tensors,
        temperature=settings.temperature,
        student_logit_scale=settings.student_logit_scale,
        vocab_size=settings.vocab_size,
        student_fingerprint=settings.student_fingerprint,
        made_with=f"alpha {settings.alpha:g}, plausibility {settings.plausibility}",
    )


class ProjectionCacheWriter(ShardWriter):
    """Writes projections, shard by shard; started again on the same folder it goes on after the last finished shard.

    Args:
        folder: made if missing.
        fingerprint: what determines the teacher's states, JSON values by name. A folder with another one raises ValueError.
        settings: what the projections are made for. A folder with others raises ValueError.
        hidden_size: H_s, the student's width.
        top_k: K, the largest number of ids of a token.
        dtype: of the tail, torch.float32 or torch.bfloat16 (see :func:`kdkernels.project_teacher`).
        divergence: each sample also brings the divergence of the teacher's two paths.
        shard_mib, part, verify_checksums: as for `ContrastCacheWriter`.

    Raises:
        ValueError: another fingerprint, settings, size, dtype or format version than the folder's.
        RuntimeError: another writer of this part is at work in the folder.
        ImportError: safetensors is not installed.
    """

    kind = PROJECTIONS

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any],
        settings: ProjectionSettings,
        hidden_size: int,
        top_k: int = 64,
        dtype: torch.dtype = torch.float32,
        divergence: bool = False,
        shard_mib: float = 64.0,
        part: str = "0",
        verify_checksums: bool = True,
    ):
        for name, value in (("hidden_size", hidden_size), ("top_k", top_k)):
            if not is_count(value, least=1):
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        if not isinstance(settings, ProjectionSettings):
            raise TypeError(f"settings: expected ProjectionSettings, got {type(settings).__name__}")
        if not isinstance(divergence, bool):
            raise TypeError(f"divergence: expected a bool, got {type(divergence).__name__}")
        self.settings, self.hidden_size, self.top_k, self.dtype = settings, hidden_size, top_k, dtype
        header = _header(canonical(fingerprint), settings, hidden_size, top_k, dtype, divergence)
        super().__init__(folder, header=header, shard_mib=shard_mib, part=part, verify_checksums=verify_checksums)

    def _match_header(self, header: Header) -> Header:
        found = super()._match_header(header)
        _check_settings(self.folder, _settings(found), self.settings)
        return found

    def add(
        self,
        sample_id: str,
        projection: TeacherProjection,
        target: Tensor,
        *,
        position: Tensor | None = None,
        divergence: Tensor | None = None,
        content: str = "",
    ) -> None:
        """Takes a sample; it is on disk when its shard is full, or after `flush()`.

        Args:
            sample_id: not in the cache yet.
            projection: of n of the sample's target tokens, for the writer's settings.
            target: (n,) int64, these tokens.
            position: (n,) which of the sample's target tokens they are; None = the first n.
            divergence: (n,) float32, where the cache has one.
            content: a fingerprint of what the projection depends on, to be compared later.

        Raises:
            TypeError, ValueError: for a bad argument, with its name. A projection that is not finite raises ValueError.
        """
        self._check_sample(sample_id, content)
        if not isinstance(projection, TeacherProjection):
            raise TypeError(f"projection: expected a TeacherProjection, got {type(projection).__name__}")
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            raise TypeError(f"target: expected a tensor of torch.int64, got {getattr(target, 'dtype', type(target))}")
        shape = tuple(projection.leading)
        if tuple(target.shape) != shape or len(shape) != 1:
            raise ValueError(f"target: expected shape (n,) as the projection's tokens {shape}, got {tuple(target.shape)}")
        for name in ("temperature", "student_logit_scale", "vocab_size", "student_fingerprint"):
            if getattr(projection, name) != getattr(self.settings, name):
                raise ValueError(
                    f"projection.{name}: expected {getattr(self.settings, name)!r}, as the cache has, got "
                    f"{getattr(projection, name)!r}"
                )
        position = torch.arange(len(target)) if position is None else position
        given = {**projection.tensors(), "target": target, "position": position, "divergence": divergence}
        missing = self.top_k - projection.ids.shape[-1]
        if missing < 0:
            raise ValueError(f"projection.ids: expected at most {self.top_k} a token, got {projection.ids.shape[-1]}")
        for name, filler in (("ids", -1), ("probabilities", 0)) if missing else ():
            given[name] = F.pad(getattr(projection, name), (0, missing), value=filler)
        tensors = {}
        for name, (row, dtype) in self._layout.items():
            x = given.pop(name)
            if not isinstance(x, Tensor) or x.shape != (len(target), *row):
                got = tuple(x.shape) if isinstance(x, Tensor) else x
                raise ValueError(f"{name}: expected shape {(len(target), *row)}, got {got}")
            tensors[name] = x.detach().to("cpu", dtype, copy=True)
            if dtype.is_floating_point and not torch.isfinite(tensors[name]).all():
                raise ValueError(f"{name}: expected finite values, got inf or NaN in sample {sample_id!r}")
        if given.get("divergence") is not None:
            raise ValueError("divergence: expected None, in a cache without, got a tensor")
        self._take(sample_id, content, tensors)


_ANY = ProjectionSettings("", 1)


def _header(
    fingerprint: dict[str, Any], settings: ProjectionSettings, width: int, ids: int, dtype: torch.dtype, divergence: bool
) -> Header:
    names = [name for name, known in _TAILS.items() if known == dtype]
    if not names:
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    return {
        _MARK: FORMAT_VERSION,
        "fingerprint": fingerprint,
        "hidden_size": width,
        "top_k": ids,
        "dtype": names[0],
        "divergence": divergence,
        "settings": dataclasses.asdict(settings),
    }


def project_cache(
    states: ContrastCache,
    folder: str | os.PathLike[str],
    *,
    teacher_head: LMHead,
    student_head: LMHead,
    alpha: float = 2.0,
    temperature: float = 2.0,
    contrast: str = "paths",
    plausibility: float | None = None,
    vocab_size: int | None = None,
    top_k: int = 64,
    tail_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    impl: str = "auto",
    part: int = 0,
    parts: int = 1,
    shard_mib: float = 64.0,
    on_group: Callable[[int], None] = lambda samples: None,
) -> int:
    """Makes a cache of projections from a cache of states, in groups of samples; a part that is there already is left out.

    Args:
        states: an open cache.
        folder: of the projections, new or begun.
        teacher_head: that of the states' teacher. student_head: the frozen head that the student will have; its device computes.
        alpha, temperature, plausibility, vocab_size, top_k, tail_dtype, chunk_tokens, impl: as in
            :func:`kdkernels.project_teacher`.
        contrast: see :class:`ProjectionSettings`. A cache of one path needs "none".
        part, parts: this process makes every `parts`-th group, beginning with number `part`. Together they make one cache.
        shard_mib: as for the writer.
        on_group: called with the number of samples after each group.

    Returns:
        samples written now.

    After a kill the same call goes on. A group that was written in part is computed again as a whole, so the rest has the bits
    that it would have had.

    Raises:
        ValueError: the student has a softcap; the folder holds projections of another teacher, for other settings or of a sample
            whose content has changed; or a bad argument, with its name.
    """
    settings = settings_of(
        teacher_head, student_head, alpha=alpha, temperature=temperature, contrast=contrast, plausibility=plausibility,
        vocab_size=vocab_size,
    )  # fmt: skip
    states.check_head(teacher_head)
    if contrast == "paths" and not states.text_path:
        raise ValueError(f"contrast: expected 'none' or 'zeros' with the one path of {states.folder}, got 'paths'")
    if not (is_whole(part) and is_whole(parts) and 0 <= part < parts):
        raise ValueError(f"part: expected a number from 0 to parts - 1, got {part} of {parts}")
    weight = teacher_head.weight
    writer = ProjectionCache.writer(
        folder, fingerprint=states.fingerprint, settings=settings, hidden_size=student_head.weight.shape[1],
        top_k=min(top_k, settings.vocab_size), dtype=tail_dtype, shard_mib=shard_mib, part=str(part),
    )  # fmt: skip
    written = 0
    with writer:
        for group in itertools.islice(_groups(states), part, None, parts):
            missing = []
            for row, name in enumerate(group):
                before, now = writer.content(name), states.content(name)
                if before is None:
                    missing.append(row)
                elif before and now and before != now:
                    raise ValueError(
                        f"folder: expected projections of what {states.folder} holds, got another {name!r} in {folder} (content "
                        f"{before!r}, now {now!r}); write into a new folder"
                    )
            if missing:
                held = states.get(group)
                audio, text = (None if x is None else x.to(weight) for x in (held.audio_hidden, held.text_hidden))
                assert audio is not None
                projection = project_teacher(
                    audio,
                    {"paths": text, "none": None, "zeros": torch.zeros_like(audio)}[contrast],
                    student_weight=student_head.weight,
                    student_bias=student_head.bias,
                    student_logit_scale=student_head.logit_scale,
                    alpha=settings.alpha,
                    temperature=temperature,
                    plausibility=plausibility,
                    vocab_size=vocab_size,
                    top_k=top_k,
                    tail_dtype=tail_dtype,
                    chunk_tokens=chunk_tokens,
                    impl=impl,
                    **teacher_head.keywords("teacher"),
                )
                ends = held.lengths.cumsum(0).tolist()
                for row in missing:
                    here = slice(ends[row] - int(held.lengths[row]), ends[row])
                    name = group[row]
                    writer.add(name, projection[here], held.target[here], content=states.content(name))
                written += len(missing)
            on_group(len(group))
    return written


def settings_of(
    teacher_head: LMHead,
    student_head: LMHead,
    *,
    alpha: float,
    temperature: float,
    contrast: str = "paths",
    plausibility: float | None = None,
    vocab_size: int | None = None,
) -> ProjectionSettings:
    """The settings of projections between these heads. ValueError for a student with a softcap."""
    if student_head.softcap is not None:
        raise ValueError(f"student_head.softcap: expected None, as projections fit no softcap, got {student_head.softcap}")
    heads = (student_head, teacher_head)
    student, teacher = (head_fingerprint(head.weight, head.bias) for head in heads)
    return ProjectionSettings(
        student_fingerprint=student,
        vocab_size=min(len(head.weight) for head in heads) if vocab_size is None else vocab_size,
        alpha=0.0 if contrast == "none" else alpha,
        temperature=temperature,
        plausibility=plausibility,
        student_logit_scale=student_head.logit_scale,
        contrast=contrast,
        teacher_fingerprint=teacher,
    )


def _groups(states: ContrastCache) -> Iterator[list[str]]:
    """The samples in their order, as many as have about `_GROUP_TOKENS` tokens."""
    group: list[str] = []
    tokens = 0
    for name in states:
        group.append(name)
        tokens += states.rows(name)
        if tokens >= _GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group
