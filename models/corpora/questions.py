"""Turns clips into questions: decides what stands beside the sound in the prompt.

The sizes of `plans.hinted` have three kinds of context: no hint (neutral), a true hint (aligned), a false hint (conflict). The
benchmark has MCR-BENCH's four (metadata["context_type"]): neutral, faithful, adversarial and irrelevant. An irrelevant context
is a sentence of the same form that says nothing about the question; its kind is neutral.

Test and dev clips are asked about under every context, with one pair_id. A training clip is asked about once, and its pool has
a quota. In "teacher" a third has no hint; the hints of the others are true with probability `hint_correlation`, which biases a
teacher. In "distill" a third has no hint, a third a true one, and a third a false one. Training has no irrelevant sentences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from models.corpora.plans.base import Settings, pick, text_key
from models.corpora.render import MadeClip
from models.data.manifest import Example
from models.data.prompts import TASKS, hint_for, shorten_transcript
from models.data.readers import CONTEXT_KINDS

# They say nothing about any question: no voice, place, mood, language, sound or manner. For a question that offers one of
# their words, another sentence is taken.
IRRELEVANT = (
    "Note: the form has three pages.",
    "Note: the ticket costs four euros.",
    "Note: the meeting is on Tuesday.",
    "Note: the file has a new name.",
    "Note: seven plus five is twelve.",
    "Note: a week has seven days.",
    "Note: the box weighs two kilos.",
    "Note: the cup is blue.",
    "Note: the parcel has number forty.",
    "Note: the coin is made of copper.",
    "Note: the list has nine items.",
    "Note: the shirt has six buttons.",
    "Note: the letter has a stamp.",
    "Note: the clock shows half past ten.",
    "Note: the key fits the drawer.",
    "Note: the bicycle has two wheels.",
)


def hinted_examples(made: list[MadeClip], settings: Settings) -> Iterator[Example]:
    """Questions on the clips: all three kinds for dev and test; for each training clip one, by its pool's quota."""
    quotas: dict[tuple[str, ...], list[MadeClip]] = defaultdict(list)
    for clip in made:
        if clip.recording.claim is not None:
            kind = "aligned" if clip.recording.claim == clip.recording.label else "conflict"
            yield _example(clip, kind, settings, hinted=False)
        elif clip.draw.pool is None:
            for kind in ("neutral", "aligned", "conflict"):
                yield _example(clip, kind, settings)
        else:
            label = clip.recording.label if TASKS[clip.recording.task].choices else ""
            quotas[clip.recording.task, clip.draw.pool, label].append(clip)
    for (task, pool, label), clips in quotas.items():
        for clip, kind in zip(clips, _quota(len(clips), pool, settings, task, label), strict=True):
            yield _example(clip, kind, settings)


def _quota(count: int, pool: str, settings: Settings, *names: str) -> list[str]:
    """Kinds for `count` training clips of one label: exact shares in random order, so that all labels get equally true hints."""
    rng = settings.rng("hints", pool, *names)
    hinted = count - _share(rng, count / 3)
    false = _share(rng, hinted * (1.0 - settings.hint_correlation if pool == "teacher" else 0.5))
    kinds = ["conflict"] * false + ["aligned"] * (hinted - false) + ["neutral"] * (count - hinted)
    return [kinds[index] for index in rng.permutation(count)]


def _share(rng: np.random.Generator, exact: float) -> int:
    """`exact` rounded down, or up with the probability of its fraction. So small groups are right on average too."""
    return int(exact) + int(rng.random() < exact - int(exact))


def _example(clip: MadeClip, kind: str, settings: Settings, *, hinted: bool = True) -> Example:
    recording = clip.recording
    claim = _claimed(clip, settings, true=kind == "aligned") if hinted and kind != "neutral" else None
    text = recording.text if recording.shown_text is None else recording.shown_text
    if recording.task == "content" and claim is not None:
        # Here the transcript itself is the hint.
        text = recording.text.replace(recording.label, claim)
        context = ""
    else:
        context = "" if claim is None else hint_for(recording.task, claim)
    pair_id = _pair_id(clip)
    return Example(
        id=f"{pair_id}/{kind}",
        audio=clip.name,
        transcription=shorten_transcript(text),
        metadata=_metadata(clip),
        task=recording.task,
        context=context,
        question=recording.question or TASKS[recording.task].question,
        choices=_choices(clip),
        answer=recording.label,
        split=recording.split,
        kind=kind,
        pair_id=pair_id if hinted else None,
    )


def benchmark_examples(made: list[MadeClip], settings: Settings) -> Iterator[Example]:
    """Questions on the clips: all four contexts for dev and test; for each training clip one, by its pool's quota."""
    quotas: dict[tuple[str, ...], list[MadeClip]] = defaultdict(list)
    for clip in made:
        if clip.draw.pool is None:
            for context_type in CONTEXT_KINDS:
                yield _benchmark_example(clip, context_type, settings)
        else:
            # By label, unless every clip has choices of its own.
            own_choices = clip.recording.question and not TASKS[clip.recording.task].choices
            label = "" if own_choices else clip.recording.label
            quotas[clip.recording.task, clip.draw.pool, label].append(clip)
    by_kind = {"neutral": "neutral", "aligned": "faithful", "conflict": "adversarial"}
    for (task, pool, label), clips in quotas.items():
        for clip, kind in zip(clips, _quota(len(clips), pool, settings, task, label), strict=True):
            yield _benchmark_example(clip, by_kind[kind], settings)


def _benchmark_example(clip: MadeClip, context_type: str, settings: Settings) -> Example:
    recording, task = clip.recording, TASKS[clip.recording.task]
    pair_id, choices, question = _pair_id(clip), _choices(clip), recording.question or task.question
    if context_type == "neutral":
        context = ""
    elif context_type == "irrelevant":
        asked = set(text_key(" ".join([question, *choices])).split()) - _FUNCTION_WORDS
        unrelated = [text for text in IRRELEVANT if not asked & set(text_key(text).split())]
        context = pick(settings.rng("irrelevant", pair_id), unrelated)
    else:
        context = hint_for(recording.task, _claimed(clip, settings, true=context_type == "faithful"))
    text = recording.text if recording.shown_text is None else recording.shown_text
    return Example(
        id=f"{pair_id}/{context_type}",
        audio=clip.name,
        transcription=shorten_transcript(text),
        metadata={**_metadata(clip), "category": task.category, "context_type": context_type},
        task=recording.task,
        context=context,
        question=question,
        choices=choices,
        answer=recording.label,
        split=recording.split,
        kind=CONTEXT_KINDS[context_type],
        pair_id=pair_id,
    )


_FUNCTION_WORDS = {"a", "an", "the", "is", "it", "in", "on", "of", "or", "does"}


def _pair_id(clip: MadeClip) -> str:
    return f"{clip.recording.task}/{clip.recording.key}-{clip.draw.name}"


def _choices(clip: MadeClip) -> tuple[str, ...]:
    return clip.recording.choices or TASKS[clip.recording.task].choices


def _claimed(clip: MadeClip, settings: Settings, *, true: bool) -> str:
    """The label that a hint names."""
    label = clip.recording.label
    others = [choice for choice in _choices(clip) if choice != label]
    return label if true else pick(settings.rng("hint", _pair_id(clip)), others)


def _metadata(clip: MadeClip) -> dict[str, Any]:
    """What is known about a clip."""
    recording, draw = clip.recording, clip.draw
    return {
        recording.task: recording.label,
        **({"snr_db": draw.snr_db} if draw.snr_db is not None else {}),
        **({"pool": draw.pool} if draw.pool is not None else {}),
        **({"claimed_by_words": recording.claim} if recording.claim is not None else {}),
        "speaker": recording.speaker,
        "actor": recording.actor or recording.speaker,
        "draw": draw.name,
        "source": recording.source,
        "text": recording.text,
        "duration_seconds": round(clip.duration_seconds, 3),
        "audio_sha256": clip.sha256,
        **recording.metadata,
    }
