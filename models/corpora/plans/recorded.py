"""Tasks that recordings of other games give: language, and words or cries. Their speakers are split as the game's actors are.

    language    the same lines in English and in Spanish       Drascula
    cry         words, or a cry without words                  Hedgewars
    gender      test questions alone: see `plan_external`      Fish Fillets, Drascula

A fold has speakers in its test and in its dev, and the others train. Every speaker is in the test of exactly one fold. A line of
Drascula has one side in both languages, because its character has. No transcript is shown.

The speaking rate of real lines is planned with the other tasks about lines (lines.py).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from models.corpora.plans.base import (
    BENCHMARK_CHANNEL,
    MILD_SNR_DB,
    SIZES,
    SPLITS,
    Recording,
    Settings,
    balanced,
    take_turns,
    with_draws,
)
from models.corpora.plans.lengths import OfLength, seconds_of
from models.corpora.recordings import Material
from models.corpora.sources.drascula import DrasculaLine, drascula_voices, read_genders
from models.corpora.sources.hedgewars import Cry

LANGUAGES = ("English", "Spanish")
# Actors by the Spanish credits (sources/drascula.py), and voices of Hedgewars (sources/hedgewars.py).
DRASCULA_FOLDS: tuple[Mapping[str, Sequence[str]], ...] = (
    {"test": ("a02+a08+a09", "a06"), "dev": ("a07",)},
    {"test": ("a03", "a04"), "dev": ("a06",)},
    {"test": ("a01",), "dev": ("a04",)},
    {"test": ("a05", "a07"), "dev": ("a04",)},
)
HEDGEWARS_FOLDS: tuple[Mapping[str, Sequence[str]], ...] = (
    {"test": ("British", "Pirate", "Default_ru"), "dev": ("Singer", "Mobster")},
    {"test": ("Mobster", "Singer", "Default_es"), "dev": ("British", "Surfer")},
    {"test": ("Classic+Default+Default_uk+HillBilly",), "dev": ("Pirate", "Russian")},
    {"test": ("Russian", "Surfer", "Default_pl+Russian_pl"), "dev": ("British", "Mobster")},
)
_SECONDS = (0.7, 20.0)  # longer lines are cut
_MIN_CRY_SECONDS = 0.15
_MIN_PAIR_SECONDS = 0.5
_CRY_CHANNEL = dataclasses.replace(BENCHMARK_CHANNEL, trim=False)  # the silence behind a short cry stays


def split_of(voice: str, fold: Mapping[str, Sequence[str]]) -> str:
    """The split of a voice in one fold of DRASCULA_FOLDS or HEDGEWARS_FOLDS."""
    return next((split for split, voices in fold.items() if voice in voices), "train")


def plan_spoken_language(settings: Settings, material: Material) -> list[Recording]:
    """English or Spanish. Every line is there in both; the characters of a split take turns.

    English takes longer in two thirds of the lines, so both clips of a line are cut to the length of the shorter one.
    """
    by_name: dict[str, dict[str, DrasculaLine]] = defaultdict(dict)
    for line in material.drascula:
        by_name[line.name][line.language] = line
    seconds: dict[str, float] = {}
    by_split: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    voices = drascula_voices(read_genders())
    for name in sorted(by_name):
        lines = by_name[name]
        if set(lines) != set(LANGUAGES):
            continue
        lengths = [seconds_of(line) for line in lines.values()]
        if _SECONDS[0] < min(lengths) and max(lengths) < _SECONDS[1]:
            seconds[name] = min(*lengths, settings.max_seconds)
            code = lines[LANGUAGES[0]].code
            by_split[split_of(voices[code], DRASCULA_FOLDS[settings.fold or 0])][code].append(name)
    planned = []
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        decks = [_shuffled(by_split[split][code], settings, "language", code) for code in sorted(by_split[split])]
        for name in list(take_turns(decks))[: count // len(LANGUAGES)]:
            for language in LANGUAGES:
                line = by_name[name][language]
                recording = Recording(
                    key=f"drascula-{name}-{language}", task="language", label=language, split=split,
                    speaker=f"drascula-{language}-{line.code}", actor=f"drascula-{voices[line.code]}",
                    text=f"Drascula line {name}", source="drascula", sound=OfLength(line, seconds[name]), choices=LANGUAGES,
                    shown_text="",
                )  # fmt: skip
                planned.append(with_draws(recording, settings, MILD_SNR_DB, channel=BENCHMARK_CHANNEL))
    return planned


def plan_cry(settings: Settings, material: Material) -> list[Recording]:
    """Words or a cry without words. Each cry is paired with the words of the same set that are the nearest in length.

    Both clips of a pair are as long as the cry, and at least half a second: words are cut, and a short cry has silence behind it.
    """
    by_set: dict[str, list[tuple[float, Cry]]] = defaultdict(list)
    for cry in material.cries:
        seconds = seconds_of(cry)
        if _MIN_CRY_SECONDS < seconds < settings.max_seconds:
            by_set[cry.voice_set].append((seconds, cry))
    pairs: dict[str, list[list[tuple[float, Cry, Cry]]]] = defaultdict(list)
    for name in sorted(by_set):
        split = split_of(by_set[name][0][1].voice, HEDGEWARS_FOLDS[settings.fold or 0])
        pairs[split].append(_shuffled(list(_pairs_by_length(by_set[name])), settings, "cry", name))
    planned = []
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        for seconds, *pair in list(take_turns(pairs[split]))[: count // 2]:
            for cry in pair:
                recording = Recording(
                    key=f"hedgewars-{cry.voice_set}-{cry.name}", task="cry", label=cry.kind, split=split,
                    speaker=f"hedgewars-{cry.voice_set}", actor=f"hedgewars-{cry.voice}",
                    text=f"{cry.voice_set} {cry.name}", source="hedgewars", sound=OfLength(cry, seconds), shown_text="",
                )  # fmt: skip
                planned.append(with_draws(recording, settings, MILD_SNR_DB, channel=_CRY_CHANNEL))
    return planned


def plan_external(settings: Settings, material: Material) -> list[Recording]:
    """Is it a man or a woman, in the noise of the gender task: Czech lines, and lines of Drascula. All are test questions.

    Czech verbs tell the speaker's gender, so no transcript is shown. Drascula has one woman.
    """
    genders = read_genders()
    voices = drascula_voices(genders)
    spoken = [
        Recording(
            key=f"fillets-{clip.level.replace('/', '-')}-{clip.name}", task="gender", label=clip.gender, split="test",
            speaker=f"fillets-{clip.voice}", text=clip.text, source="fillets", sound=clip, shown_text="",
        )
        for clip in material.fillets
        if _SECONDS[0] < seconds_of(clip) < _SECONDS[1]
    ]  # fmt: skip
    acted = [
        Recording(
            key=f"drascula-{line.name}-{line.language}", task="gender", label=genders[line.code], split="test",
            speaker=f"drascula-{line.language}-{line.code}", actor=f"drascula-{voices[line.code]}",
            text=f"Drascula line {line.name}", source="drascula", sound=line, shown_text="",
        )
        for line in material.drascula
        if _SECONDS[0] < seconds_of(line) < _SECONDS[1]
    ]  # fmt: skip
    planned = []
    for recordings in (spoken, acted):
        by_speaker: dict[str, list[Recording]] = defaultdict(list)
        for recording in recordings:
            by_speaker[recording.speaker].append(recording)
        decks = [_shuffled(by_speaker[speaker], settings, "external", speaker) for speaker in sorted(by_speaker)]
        planned += balanced(take_turns(decks), {"test": SIZES[settings.size].gender})
    snr = (settings.min_snr_db, settings.max_snr_db)
    return [with_draws(recording, settings, snr) for recording in planned]


def _shuffled(items: Sequence, settings: Settings, *names: str) -> list:
    return [items[index] for index in settings.rng("recorded", *names).permutation(len(items))]


def _pairs_by_length(cries: Sequence[tuple[float, Cry]]) -> Iterator[tuple[float, Cry, Cry]]:
    """(seconds, wordless, spoken), each recording once. The shortest cry chooses first, since few words are as short."""
    words = [item for item in cries if item[1].kind == "spoken"]
    for seconds, cry in sorted((item for item in cries if item[1].kind == "wordless"), key=lambda item: item[0]):
        if words:
            nearest = min(words, key=lambda item: abs(item[0] - seconds))
            words.remove(nearest)
            yield max(seconds, _MIN_PAIR_SECONDS), cry, nearest[1]
