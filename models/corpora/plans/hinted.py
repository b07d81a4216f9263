"""The plan of the sizes tiny, demo, sources and full: eight tasks. The context of a clip is a hint or empty.

    gender         Amazon Queen characters and espeak variants in noise; training has none of the test's characters and variants
    speaking_rate  espeak at two rates; some of the test's sentences claim a rate ("I am talking very slowly.")
    accent         four espeak accents of English
    noise          is there noise
    content        which of two words is said; the transcript is missing, right or wrong
    place, mood    what the words mean: is it indoors or outdoors, is the news good or bad; training never mentions the
                   test's places and events
    language       Tux Paint recordings in eight languages (source "tux": 154 MiB); the transcript is the English name

Splits go by speaker AND by text: no actor, no synthetic voice and no sentence of dev or test occurs in training. With fold None
the game's lines are split by character, as the published tables have them; some actors then voice characters of two parts. The
language task is an exception: one voice speaks a language, so this task is split by text alone.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from models.corpora.plans.base import (
    ACCENT_VOICES,
    ESPEAK_VOICES,
    MILD_SNR_DB,
    OBJECTS,
    RATE_CLAIMS,
    RATES_WPM,
    SIZES,
    SUBJECTS,
    VERBS,
    Recording,
    SentenceDeck,
    Settings,
    any_voice,
    balanced,
    espeak_recording,
    pick,
    queen_split,
    queen_voices,
    take_turns,
    with_draws,
    without_leaks,
)
from models.corpora.recordings import Material
from models.corpora.sources.queen import SPEAKER_GENDER, QueenLine
from models.corpora.sources.tuxpaint import LANGUAGES, StampRecording
from models.data.prompts import TASKS

CHARACTER_NOTE = (
    "queen: split by character, not by actor; by the game's voice credits some actors voice characters of the training and of "
    "the test: for each man of the test they name an actor of the training set"
)
ACTOR_NOTE = "queen: split by actor, by the game's voice credits; an actor may voice several characters of one part"
NOTES = (
    "language: one voice speaks a language, so this task is split by text, not by speaker",
)
_RECORDED_TASKS = ("gender", "language")  # the others need espeak
_QUEEN_SECONDS = (1.0, 6.0)
_QUEEN_MIN_CHARACTERS = 9
# What the words of the place and mood tasks mean, by split and label. The splits have different ones.
_MEANT_PLACES = {
    "train": {
        "indoors": ("in the kitchen", "in the office", "in the bathroom", "in the library", "in the hall", "in the cellar",
                    "in the elevator", "in the museum"),
        "outdoors": ("in the garden", "near the river", "in the forest", "on the beach", "in the field", "on the mountain",
                     "on the road", "in the desert"),
    },
    "dev": {"indoors": ("in the attic", "in the pantry"), "outdoors": ("on the hill", "in the orchard")},
    "test": {
        "indoors": ("in the bedroom", "in the classroom", "in the living room", "in the shop", "in the theatre", "on the sofa"),
        "outdoors": ("by the lake", "in the meadow", "in the swamp", "on the cliff", "under the stars", "in the park"),
    },
}  # fmt: skip
_MEANT_EVENTS = {
    "train": {
        "good": ("won a prize", "found a treasure", "got a new job", "passed the exam", "made a good friend", "had a great day",
                 "sold every painting", "was praised by everyone", "got well again", "saved a child", "paid all the debts",
                 "became a father"),
        "bad": ("lost a wallet", "missed the train", "broke a leg", "failed the exam", "crashed the car", "had a terrible day",
                "lost the case", "was blamed by everyone", "fell ill", "was bitten by a dog", "owes a lot of money",
                "is in prison"),
    },
    "dev": {"good": ("won the race", "was promoted"), "bad": ("lost the race", "was fired")},
    "test": {
        "good": ("enjoyed the party", "received a lovely gift", "fell in love", "was rescued", "got a pay rise",
                 "found the lost dog"),
        "bad": ("caught a bad cold", "was robbed", "burned the dinner", "was injured", "lost the house",
                "drowned in the river"),
    },
}  # fmt: skip
_PEOPLE = (*(f"the {name}" for name in SUBJECTS), *(f"my {name}" for name in (
    "brother", "sister", "uncle", "aunt", "neighbour", "boss", "cousin", "teacher", "best friend", "landlord")))  # fmt: skip


def plan_hinted(settings: Settings, material: Material) -> list[Recording]:
    """All recordings of all tasks, without those whose text would leak from one split into another."""
    sentences = SentenceDeck(settings)
    planned: list[Recording] = []
    for task, plan in (
        ("gender", _plan_gender),
        ("speaking_rate", _plan_speaking_rate),
        ("accent", _plan_accent),
        ("noise", _plan_noise),
        ("content", _plan_content),
        ("language", _plan_language),
        ("place", _plan_place),
        ("mood", _plan_mood),
    ):
        if settings.wants(task) and (material.espeak or task in _RECORDED_TASKS):
            planned += plan(settings, material, sentences)
    return without_leaks(planned)


def _plan_gender(settings: Settings, material: Material, sentences: SentenceDeck) -> list[Recording]:
    size = SIZES[settings.size]
    limits = {"train": size.gender_train, "dev": size.gender_dev, "test": size.gender_test}
    # Leaking texts are removed before balancing: removing them later would unbalance the labels.
    planned = balanced(without_leaks(list(_queen_recordings(settings, material.lines))), limits)
    if material.espeak:
        # Beside recorded speech the synthetic voices only add to the training set. Without it they have to give all splits.
        counts = {"train": size.gender_espeak}
        if not planned:
            counts = {"train": max(size.gender_espeak, 200 if settings.size != "tiny" else 0)}
            counts |= {"dev": min(size.gender_dev, 40), "test": min(size.gender_test, 90)}
        for split, count in counts.items():
            for label in TASKS["gender"].choices:
                for number in range(count):
                    rng = settings.rng("gender", split, label, str(number))
                    text, _ = sentences.deal()
                    variant = pick(rng, ESPEAK_VOICES[split][label])
                    planned.append(
                        espeak_recording(
                            "gender",
                            label,
                            split,
                            f"{split}-{label}-{number}",
                            variant,
                            text,
                            "en-us",
                            rate_wpm=int(rng.integers(140, 211)),
                            pitch=int(rng.integers(35, 66)),
                        )
                    )
    snr = (settings.min_snr_db, settings.max_snr_db)
    return [with_draws(recording, settings, snr, test_draws=size.test_draws) for recording in planned]


def _queen_recordings(settings: Settings, lines: Sequence[QueenLine]) -> Iterator[Recording]:
    """Usable lines of the characters of known gender; the characters take turns."""
    by_speaker: dict[str, list[QueenLine]] = defaultdict(list)
    splits, voices = queen_split(settings.fold), queen_voices(settings.fold)
    low, high = _QUEEN_SECONDS
    for line in lines:
        # "<gulp>" and "(sigh)" are not words.
        if (
            line.speaker in splits
            and line.speaker in SPEAKER_GENDER
            and len(line.text) >= _QUEEN_MIN_CHARACTERS
            and not set("<>()") & set(line.text)
        ):
            by_speaker[line.speaker].append(line)
    decks = []
    for speaker in sorted(by_speaker):
        deck = sorted(by_speaker[speaker], key=lambda line: line.clip_id)
        order = settings.rng("queen", speaker).permutation(len(deck))
        decks.append([deck[index] for index in order])
    for line in take_turns(decks):
        if low < line.duration_seconds() < high:
            yield Recording(
                key=f"queen-{line.clip_id}",
                task="gender",
                label=SPEAKER_GENDER[line.speaker],
                split=splits[line.speaker],
                speaker=f"queen-{line.speaker}",
                actor=f"queen-{voices[line.speaker]}",
                text=line.text,
                source="queen",
                sound=line,
            )


def _plan_speaking_rate(settings: Settings, material: Material, sentences: SentenceDeck) -> list[Recording]:
    planned = []
    for split, label, number, rng in _slots(settings, "speaking_rate", TASKS["speaking_rate"].choices):
        text, _ = sentences.deal()
        planned.append(_rate_recording(split, label, f"{split}-{label}-{number}", text, rng))
    for claim, texts in RATE_CLAIMS.items():
        for number, text in enumerate(texts):
            for label in RATES_WPM:
                rng = settings.rng("speaking_rate", "claims", claim, str(number), label)
                recording = _rate_recording("test", label, f"claim-{claim}-{number}-{label}", text, rng)
                planned.append(dataclasses.replace(recording, claim=claim))
    return [with_draws(recording, settings, MILD_SNR_DB) for recording in planned]


def _rate_recording(split: str, label: str, key: str, text: str, rng: np.random.Generator) -> Recording:
    variant = pick(rng, any_voice(split))
    low, high = RATES_WPM[label]
    rate_wpm = int(rng.integers(low, high + 1))
    return espeak_recording("speaking_rate", label, split, key, variant, text, "en-us", rate_wpm=rate_wpm)


def _plan_accent(settings: Settings, material: Material, sentences: SentenceDeck) -> list[Recording]:
    planned = []
    for split, label, number, rng in _slots(settings, "accent", TASKS["accent"].choices):
        text, _ = sentences.deal()
        variant = pick(rng, any_voice(split))
        key = f"{split}-{label}-{number}"
        planned.append(espeak_recording("accent", label, split, key, variant, text, ACCENT_VOICES[label]))
    return [with_draws(recording, settings, MILD_SNR_DB) for recording in planned]


def _plan_noise(settings: Settings, material: Material, sentences: SentenceDeck) -> list[Recording]:
    planned = []
    for split, label, number, rng in _slots(settings, "noise", TASKS["noise"].choices):
        text, _ = sentences.deal()
        key = f"{split}-{label}-{number}"
        recording = espeak_recording("noise", label, split, key, pick(rng, any_voice(split)), text, "en-us")
        planned.append(with_draws(recording, settings, MILD_SNR_DB if label == "noisy" else None))
    return planned


def _plan_content(settings: Settings, material: Material, sentences: SentenceDeck) -> list[Recording]:
    planned = []
    for split, first, number, rng in _slots(settings, "content", (True, False)):
        text, said = sentences.deal()
        other = pick(rng, [word for word in OBJECTS if word != said])
        # The said word is offered first in half of the questions, so that its place tells nothing.
        choices = (said, other) if first else (other, said)
        key = f"{split}-{'first' if first else 'second'}-{number}"
        recording = dataclasses.replace(
            espeak_recording("content", said, split, key, pick(rng, any_voice(split)), text, "en-us"),
            choices=choices,
            question=f"Which word is spoken, {choices[0]} or {choices[1]}?",
            shown_text="",
        )
        planned.append(with_draws(recording, settings, MILD_SNR_DB))
    return planned


def _plan_language(settings: Settings, material: Material, _sentences: SentenceDeck) -> list[Recording]:
    """Stamps that all languages have. An English name stays in one split, in all its languages."""
    by_name: dict[str, dict[str, StampRecording]] = defaultdict(dict)
    for stamp in material.stamps:
        by_name[stamp.english.casefold()].setdefault(stamp.code, stamp)
    complete = [by_name[name] for name in sorted(by_name) if len(by_name[name]) == len(LANGUAGES)]
    order = settings.rng("language").permutation(len(complete))[: SIZES[settings.size].stamps]
    planned = []
    for position, index in enumerate(order):
        split = ("train", "train", "train", "train", "train", "train", "dev", "test", "test", "test")[position % 10]
        for code, stamp in sorted(complete[index].items()):
            planned.append(
                Recording(
                    key=f"tux-{stamp.stamp.replace('/', '-')}-{code}",
                    task="language",
                    label=LANGUAGES[code],
                    split=split,
                    speaker=f"tux-{code}",
                    text=stamp.english,
                    source="tux",
                    sound=stamp,
                    choices=tuple(LANGUAGES.values()),
                )
            )
    return [with_draws(recording, settings, MILD_SNR_DB) for recording in planned]


def _plan_place(settings: Settings, material: Material, _sentences: SentenceDeck) -> list[Recording]:
    def sentences(split: str, label: str) -> list[str]:
        told = [(s, v, o) for s in _PEOPLE for v in VERBS for o in OBJECTS]
        return [f"{s.capitalize()} {v} the {o} {p}." for s, v, o in told for p in _MEANT_PLACES[split][label]]

    return _plan_meaning("place", sentences, settings, material)


def _plan_mood(settings: Settings, material: Material, _sentences: SentenceDeck) -> list[Recording]:
    def sentences(split: str, label: str) -> list[str]:
        return [f"{person.capitalize()} {event}." for person in _PEOPLE for event in _MEANT_EVENTS[split][label]]

    return _plan_meaning("mood", sentences, settings, material)


def _plan_meaning(
    task: str, sentences: Callable[[str, str], list[str]], settings: Settings, material: Material
) -> list[Recording]:
    """Sentences whose meaning is asked for, each spoken once."""
    planned = []
    decks: dict[tuple[str, str], Iterator[str]] = {}
    for split, label, number, rng in _slots(settings, task, TASKS[task].choices):
        if (split, label) not in decks:
            texts = sentences(split, label)
            order = settings.rng(task, "deck", split, label).permutation(len(texts))
            decks[split, label] = iter([texts[index] for index in order])
        text = next(decks[split, label], None)
        if text is None:
            continue  # no sentence is left
        variant = pick(rng, any_voice(split))
        planned.append(espeak_recording(task, label, split, f"{split}-{label}-{number}", variant, text, "en-us"))
    return [with_draws(recording, settings, MILD_SNR_DB) for recording in planned]


def _slots(
    settings: Settings, task: str, labels: Sequence[Any]
) -> Iterator[tuple[str, Any, int, np.random.Generator]]:
    """(split, label, number, generator) of the task's recordings; there are equally many of each label."""
    size = SIZES[settings.size]
    for split, count in (("train", size.other_train), ("dev", size.other_dev), ("test", size.other_test)):
        for number in range(count // len(labels)):
            for label in labels:
                yield split, label, number, settings.rng(task, split, str(label), str(number))
