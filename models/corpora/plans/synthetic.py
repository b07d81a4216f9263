"""Tasks of the benchmark that need exactly known attributes: espeak speaks them. Training has none of the test's voices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from models.corpora.plans.base import (
    ACCENT_VOICES,
    BENCHMARK_CHANNEL,
    MILD_SNR_DB,
    RATE_CLAIMS,
    SIZES,
    SPLITS,
    SUBJECTS,
    Recording,
    SentenceDeck,
    Settings,
    any_voice,
    espeak_recording,
    pick,
    too_few,
    with_draws,
)

# The rates are nearer to each other than in the other sizes.
_RATES_WPM = {"slowly": (125, 155), "quickly": (185, 215)}
_DELIVERY_WPM = (150, 200)
_PITCH_RANGES = {"lively": (60, 80), "flat": (10, 30)}
_DELIVERY_CLAIMS = {
    "lively": ("I am so excited about this!", "What a wonderful surprise!", "I can hardly wait any longer!"),
    "flat": ("This is so dull and boring.", "I have nothing more to say.", "Every day is the same to me."),
}
_PLACES = {
    "indoors": ("in the kitchen", "in the office", "in the bathroom", "in the library", "in the cellar", "in the bedroom"),
    "outdoors": ("in the garden", "in the forest", "on the beach", "in the field", "on the mountain", "in the desert"),
}  # fmt: skip
_ACTIONS = ("waited", "slept", "sang", "laughed", "stood", "worked", "talked", "ate")
_EVENTS = {
    "good": ("won a prize", "found a treasure", "passed the exam", "had a great day", "fell in love", "got a new job"),
    "bad": ("lost a wallet", "missed the train", "broke a leg", "had a terrible day", "crashed the car", "was robbed"),
}
_WHEN = ("", "today ", "yesterday ", "again ")
_PEOPLE = (*(f"the {name}" for name in SUBJECTS), *(f"my {name}" for name in (
    "brother", "sister", "uncle", "aunt", "neighbour", "boss", "cousin", "friend")))  # fmt: skip


def plan_place(settings: Settings, _sentences: SentenceDeck) -> list[Recording]:
    """Is it indoors or outdoors."""
    carriers = [f"{person} {action}" for person in _PEOPLE for action in _ACTIONS]
    return _plan_meaning(settings, "place", carriers, _PLACES)


def plan_mood(settings: Settings, _sentences: SentenceDeck) -> list[Recording]:
    """Is the news good or bad."""
    carriers = [f"{when}{person}" for person in _PEOPLE for when in _WHEN]
    return _plan_meaning(settings, "mood", carriers, _EVENTS)


def _plan_meaning(
    settings: Settings, task: str, carriers: Sequence[str], phrases: dict[str, tuple[str, ...]]
) -> list[Recording]:
    """Sentences that end with a phrase of known meaning. The phrases take turns; every sentence occurs once."""
    order = iter(settings.rng(task, "carriers").permutation(len(carriers)))
    planned = []
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        for number in range(count // len(phrases)):
            index = next(order, None)
            if index is None:
                raise too_few(settings, f"made-up sentences for the task {task}")
            carrier = carriers[index]  # every label has it, so it tells nothing
            for label, ends in phrases.items():
                rng = settings.rng(task, split, label, str(number))
                text = f"{carrier} {ends[number % len(ends)]}."
                recording = espeak_recording(
                    task, label, split, f"{split}-{label}-{number}", pick(rng, any_voice(split)),
                    text[0].upper() + text[1:], "en-us",
                )  # fmt: skip
                planned.append(_finished(dataclasses.replace(recording, shown_text=""), settings))
    return planned


def plan_speaking_rate(settings: Settings, sentences: SentenceDeck) -> list[Recording]:
    """Every sentence slowly and quickly. Some of the test's sentences claim a rate themselves."""
    return _plan_ranges(settings, "speaking_rate", sentences, RATE_CLAIMS, "rate_wpm", _RATES_WPM)


def plan_delivery(settings: Settings, sentences: SentenceDeck) -> list[Recording]:
    """Every sentence with a wide and with a very small range of pitch. Some of the test's sentences sound like one of them."""
    return _plan_ranges(
        settings, "delivery", sentences, _DELIVERY_CLAIMS, "pitch_range", _PITCH_RANGES, rate_wpm=_DELIVERY_WPM
    )


def _plan_ranges(
    settings: Settings,
    task: str,
    sentences: SentenceDeck,
    claims: dict[str, tuple[str, ...]],
    parameter: str,
    ranges: dict[str, tuple[int, int]],
    *,
    rate_wpm: tuple[int, int] | None = None,
) -> list[Recording]:
    """Every sentence once for each label, by one voice; `parameter` of espeak is drawn from the label's range.

    Args:
        rate_wpm: the range of the speaking rate; all labels of a sentence have the same. None is espeak's own rate.
    """
    planned = []
    for split, number, text, claim, rng in _texts(settings, task, sentences, claims):
        variant = pick(rng, any_voice(split))
        same = {} if rate_wpm is None else {"rate_wpm": _draw(rng, rate_wpm)}
        for label, limits in ranges.items():
            recording = espeak_recording(
                task, label, split, f"{split}-{number}-{label}", variant, text, "en-us", **same,
                **{parameter: _draw(rng, limits)},
            )  # fmt: skip
            planned.append(_finished(dataclasses.replace(recording, claim=claim), settings))
    return planned


def _draw(rng: np.random.Generator, limits: tuple[int, int]) -> int:
    low, high = limits
    return int(rng.integers(low, high + 1))


def plan_accent(settings: Settings, sentences: SentenceDeck) -> list[Recording]:
    """Every sentence in every accent."""
    planned = []
    for split, number, text, _, rng in _texts(settings, "accent", sentences, {}, labels=len(ACCENT_VOICES)):
        variant = pick(rng, any_voice(split))
        for label, voice in ACCENT_VOICES.items():
            recording = espeak_recording("accent", label, split, f"{split}-{number}-{label}", variant, text, voice)
            planned.append(_finished(recording, settings))
    return planned


def _texts(
    settings: Settings, task: str, sentences: SentenceDeck, claims: dict[str, tuple[str, ...]], *, labels: int = 2
) -> Iterator[tuple[str, int, str, str | None, np.random.Generator]]:
    """(split, number, text, what it claims, generator) for every `labels` recordings; in test, texts with a claim come first."""
    claiming = [(text, label) for label, texts in claims.items() for text in texts]
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        for number in range(count // labels):
            text, claim = sentences.deal()[0], None
            if split == "test" and number < len(claiming):
                text, claim = claiming[number]
            yield split, number, text, claim, settings.rng(task, split, str(number))


def _finished(recording: Recording, settings: Settings) -> Recording:
    return with_draws(recording, settings, MILD_SNR_DB, channel=BENCHMARK_CHANNEL)
