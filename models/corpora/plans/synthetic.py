"""Tasks of the benchmark that need exactly known attributes: spoken by espeak, the test's voices never heard in training."""

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
    with_draws,
)

# Nearer to each other than those of the other sizes.
_RATES_WPM = {"slowly": (125, 155), "quickly": (185, 215)}
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
    """Sentences that end with a phrase of known meaning: the phrases in turn, every sentence once."""
    order = iter(settings.rng(task, "carriers").permutation(len(carriers)))
    planned = []
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        for number in range(count // len(phrases)):
            carrier = carriers[next(order)]  # with every label, so that it tells nothing
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
    """Every sentence slowly and quickly; some of the test's claim a rate themselves."""
    planned = []
    for split, number, text, claim, rng in _texts(settings, "speaking_rate", sentences, RATE_CLAIMS):
        variant = pick(rng, any_voice(split))
        for label, (low, high) in _RATES_WPM.items():
            recording = espeak_recording(
                "speaking_rate", label, split, f"{split}-{number}-{label}", variant, text, "en-us",
                rate_wpm=int(rng.integers(low, high + 1)),
            )  # fmt: skip
            planned.append(_finished(dataclasses.replace(recording, claim=claim), settings))
    return planned


def plan_delivery(settings: Settings, sentences: SentenceDeck) -> list[Recording]:
    """Every sentence with a wide and with hardly any range of pitch; some of the test's words sound like one of them."""
    planned = []
    for split, number, text, claim, rng in _texts(settings, "delivery", sentences, _DELIVERY_CLAIMS):
        variant, rate_wpm = pick(rng, any_voice(split)), int(rng.integers(150, 201))
        for label, (low, high) in _PITCH_RANGES.items():
            recording = espeak_recording(
                "delivery", label, split, f"{split}-{number}-{label}", variant, text, "en-us", rate_wpm=rate_wpm,
                pitch_range=int(rng.integers(low, high + 1)),
            )  # fmt: skip
            planned.append(_finished(dataclasses.replace(recording, claim=claim), settings))
    return planned


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
    """(split, number, text, what it claims, generator): texts for `labels` recordings each; in test those that claim first."""
    claiming = [(text, label) for label, texts in claims.items() for text in texts]
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        for number in range(count // labels):
            text, claim = sentences.deal()[0], None
            if split == "test" and number < len(claiming):
                text, claim = claiming[number]
            yield split, number, text, claim, settings.rng(task, split, str(number))


def _finished(recording: Recording, settings: Settings) -> Recording:
    return with_draws(recording, settings, MILD_SNR_DB, channel=BENCHMARK_CHANNEL)
