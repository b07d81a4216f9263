"""Tasks of the benchmark about English lines: those of Amazon Queen, or lines that espeak speaks if these are not available.

A line is dealt once, so that tasks do not share clips. Gender uses lines of other tasks too, but its clips have other noise.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from models.corpora.degrade import TRIM_MARGIN_SECONDS, Channel, trim_silence
from models.corpora.plans.base import (
    BENCHMARK_CHANNEL,
    ESPEAK_VOICES,
    MILD_SNR_DB,
    SIZES,
    SPLITS,
    Recording,
    SentenceDeck,
    Settings,
    balanced,
    queen_split,
    queen_voices,
    take_turns,
    with_draws,
    without_leaks,
)
from models.corpora.plans.lengths import OfLength, seconds_of
from models.corpora.recordings import Material
from models.corpora.sources.espeak import Utterance
from models.corpora.sources.queen import SPEAKER_GENDER, QueenLine
from models.data.audio import AudioError
from models.data.prompts import TASKS

_SECONDS = (1.0, 6.0)
_MIN_CHARACTERS = 9
_MIN_KEYWORD_LETTERS = 5
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
# With these values a linear probe on Whisper tiny.en's features is right on most clips of the degradation tasks, not on all.
_NOISE_SNR_DB = {"clean": (24.0, 36.0), "noisy": (12.0, 24.0)}  # no recording is free of noise
_BANDWIDTH_SNR_DB = (-4.0, 8.0)
_REVERBERATION_SECONDS = (0.15, 0.45)
_REVERBERATION_SNR_DB = (0.0, 12.0)
# Syllables a second: the outer thirds of the 2,263 lines of the game that `spoken_rate` can tell the rate of.
SLOW_RATE, QUICK_RATE = 3.36, 4.14
_MIN_SYLLABLES = 5
_RATE_CLASS_SYLLABLES = 2


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of one voice. `gender` is "" if the voice has no clear one; `seconds` is 0 if the length is not known."""

    key: str
    speaker: str
    gender: str
    split: str
    text: str
    source: str
    sound: QueenLine | OfLength | Utterance
    seconds: float
    actor: str = ""

    def words(self) -> set[str]:
        return set(_words(self.text))

    def ask(self, task: str, label: str, *, key: str = "", **fields: object) -> Recording:
        """The recording that asks `task` about this line."""
        return Recording(
            key=key or self.key, task=task, label=label, split=self.split, speaker=self.speaker, text=self.text,
            source=self.source, sound=self.sound, actor=self.actor, **fields,
        )  # fmt: skip


class LineDeck:
    """All usable lines by split; the voices take turns.

    Args:
        sentences: what espeak says if there are no recorded lines.
    """

    def __init__(self, settings: Settings, material: Material, sentences: SentenceDeck) -> None:
        if material.lines:
            lines = list(_queen_lines(material.lines, settings))
        elif material.espeak:
            lines = list(_spoken_lines(settings, sentences))
        else:
            lines = []
        by_speaker: dict[str, list[Line]] = defaultdict(list)
        for line in without_leaks(sorted(lines, key=lambda line: line.key)):
            by_speaker[line.speaker].append(line)
        decks = []
        for speaker in sorted(by_speaker):
            order = settings.rng("lines", speaker).permutation(len(by_speaker[speaker]))
            decks.append([by_speaker[speaker][index] for index in order])
        self.all = list(take_turns(decks))
        self._left = [line for line in self.all if line.seconds <= settings.max_seconds]

    def left(self, split: str) -> list[Line]:
        """Lines of a split that are not dealt yet and fit into a clip."""
        return [line for line in self._left if line.split == split]

    def deal(self, lines: Sequence[Line]) -> Sequence[Line]:
        """Take `lines` from the deck and return them."""
        taken = {line.key for line in lines}
        self._left = [line for line in self._left if line.key not in taken]
        return lines


def plan_words(settings: Settings, lines: LineDeck) -> list[Recording]:
    """content and keyword: pairs of lines. Both are asked which of two words they hold, and whether they hold the first."""
    size = SIZES[settings.size]
    counts = dict(zip(SPLITS, size.words, strict=True))
    keywords = _choose_keywords(lines, counts, size.keywords)
    planned = []
    for split, count in counts.items():
        for (one, its_word), (other, other_word) in _pairs(lines, split, count, keywords):
            for line, word in ((one, its_word), (other, other_word)):
                choices = (its_word, other_word)
                asked = [
                    line.ask(
                        "content", word, choices=choices, question=f"Which word is spoken, {its_word} or {other_word}?",
                        shown_text="", group="words",
                    ),
                    line.ask(
                        "keyword", "present" if line is one else "absent",
                        question=f'Is the word "{its_word}" present or absent?', shown_text="", group="words",
                        metadata={"asked_word": its_word},
                    ),
                ]  # fmt: skip
                planned += [with_draws(r, settings, MILD_SNR_DB, channel=BENCHMARK_CHANNEL) for r in asked]
    return planned


def _choose_keywords(lines: LineDeck, counts: dict[str, int], number: int) -> list[str]:
    """The words of five letters or more that are most frequent; the split with the scarcest supply counts."""
    found: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        for line in lines.left(split):
            found[split].update(w for w in line.words() if len(w) >= _MIN_KEYWORD_LETTERS and "'" not in w)

    def supply(word: str) -> float:
        return min(found[split][word] / counts[split] for split in SPLITS)

    return sorted(found["test"], key=lambda word: (-supply(word), word))[:number]


def _pairs(
    lines: LineDeck, split: str, count: int, keywords: Sequence[str]
) -> Iterator[tuple[tuple[Line, str], tuple[Line, str]]]:
    """Up to count / 2 pairs of (line, its word). No line holds the other's word; all words are used about equally often."""
    left = lines.left(split)
    by_word = {word: [line for line in left if word in line.words()] for word in keywords}
    used: Counter[str] = Counter()
    taken: set[str] = set()
    chosen: list[tuple[Line, str]] = []
    while len(chosen) < count:
        free = [word for word in keywords if any(line.key not in taken for line in by_word[word])]
        if not free:
            break
        word = min(free, key=lambda word: (used[word], word))
        line = next(line for line in by_word[word] if line.key not in taken)
        used[word] += 1
        taken.add(line.key)
        chosen.append((line, word))
    lines.deal([line for line, _ in chosen])
    while chosen:
        line, word = chosen.pop(0)
        for other, other_word in chosen:
            if other_word not in line.words() and word not in other.words():
                chosen.remove((other, other_word))
                yield (line, word), (other, other_word)
                break


def plan_sentence_type(settings: Settings, lines: LineDeck) -> list[Recording]:
    """Lines that are one question or one statement; each voice has equally many of both."""
    planned = []
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        by_speaker: dict[str, dict[str, list[Line]]] = defaultdict(lambda: {"question": [], "statement": []})
        for line in lines.left(split):
            if label := _sentence_type(line.text):
                by_speaker[line.speaker][label].append(line)
        pairs = [list(zip(labels["question"], labels["statement"], strict=False)) for labels in by_speaker.values()]
        for pair in list(take_turns(pairs))[: count // 2]:
            for line, label in zip(lines.deal(pair), ("question", "statement"), strict=True):
                recording = line.ask("sentence_type", label, shown_text="")
                planned.append(with_draws(recording, settings, MILD_SNR_DB, channel=BENCHMARK_CHANNEL))
    return planned


def _sentence_type(text: str) -> str:
    """"question", "statement", or "" for a line of several sentences, an exclamation, or one that trails off."""
    ends = re.findall(r"[.!?]+", text)
    if len(ends) != 1 or not text.endswith(ends[0]):
        return ""
    return {"?": "question", ".": "statement"}.get(ends[0], "")


def plan_noise(settings: Settings, lines: LineDeck) -> list[Recording]:
    """Every line with very little noise and with more."""
    made = {label: (BENCHMARK_CHANNEL, snr) for label, snr in _NOISE_SNR_DB.items()}
    return _plan_degradation(settings, lines, "noise", lambda _: made)


def plan_bandwidth(settings: Settings, lines: LineDeck) -> list[Recording]:
    """Every line in a telephone's band and in the recordings' own. The noise has all frequencies."""
    made = {band: (Channel(band=band, trim=True), _BANDWIDTH_SNR_DB) for band in ("narrow", "wide")}
    return _plan_degradation(settings, lines, "bandwidth", lambda _: made)


def plan_reverberation(settings: Settings, lines: LineDeck) -> list[Recording]:
    """Every line as it is and in a room."""

    def made(line: Line) -> dict[str, _Degradation]:
        seconds = round(float(settings.rng("reverberation", line.key).uniform(*_REVERBERATION_SECONDS)), 2)
        room = dataclasses.replace(BENCHMARK_CHANNEL, reverberation_seconds=seconds)
        return {"dry": (BENCHMARK_CHANNEL, _REVERBERATION_SNR_DB), "echoing": (room, _REVERBERATION_SNR_DB)}

    return _plan_degradation(settings, lines, "reverberation", made)


_Degradation = tuple[Channel, tuple[float, float]]  # and the range of the SNR, in dB


def _plan_degradation(
    settings: Settings, lines: LineDeck, task: str, made: Callable[[Line], dict[str, _Degradation]]
) -> list[Recording]:
    """Each line under each label."""
    planned = []
    labels = TASKS[task].choices
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        for line in lines.deal(lines.left(split)[: count // len(labels)]):
            for label, (channel, snr) in made(line).items():
                recording = line.ask(task, label, key=f"{line.key}-{label}")
                planned.append(with_draws(recording, settings, snr, channel=channel))
    return planned


def plan_spoken_rate(settings: Settings, lines: LineDeck) -> list[Recording]:
    """Lines that are spoken slowly or quickly, as they were recorded: the outer thirds by syllables a second.

    They come in pairs of one voice and of nearly equal numbers of syllables, so that neither the voice nor the words tell the
    rate. Both clips of a pair have the length of the shorter one: the whole lengths would tell it. Lines of other tasks are used
    too, but their clips have other noise.
    """
    planned = []
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        by_voice: dict[str, dict[int, dict[str, list[Line]]]] = defaultdict(dict)
        for line in lines.all:
            if line.split != split or line.seconds > settings.max_seconds:
                continue
            rate, label = spoken_rate(line), ""
            if rate is not None:
                label = "slowly" if rate < SLOW_RATE else "quickly" if rate > QUICK_RATE else ""
            if label:
                length = sum(map(syllables, _words(line.text))) // _RATE_CLASS_SYLLABLES
                by_voice[line.speaker].setdefault(length, {"slowly": [], "quickly": []})[label].append(line)
        pairs = [
            [pair for of_length in lengths.values() for pair in zip(of_length["slowly"], of_length["quickly"], strict=False)]
            for lengths in by_voice.values()
        ]
        for pair in list(take_turns(pairs))[: count // 2]:
            seconds = min(seconds_of(line.sound) for line in pair)
            for line, label in zip(pair, ("slowly", "quickly"), strict=True):
                cut = dataclasses.replace(line, sound=OfLength(line.sound, seconds))
                recording = cut.ask("speaking_rate", label, shown_text="")
                planned.append(with_draws(recording, settings, MILD_SNR_DB, channel=BENCHMARK_CHANNEL))
    return planned


def spoken_rate(line: Line) -> float | None:
    """Syllables a second between the first and the last sound; None for a line with figures, of less than five syllables, or
    that cannot be decoded."""
    count = sum(map(syllables, _words(line.text)))
    if count < _MIN_SYLLABLES or any(c.isdigit() for c in line.text) or isinstance(line.sound, Utterance):
        return None
    try:
        samples, rate_hz = line.sound.decode()
    except AudioError:
        return None
    seconds = len(trim_silence(samples, rate_hz)) / rate_hz - 2 * TRIM_MARGIN_SECONDS
    return count / seconds if seconds > 0 else None


def syllables(word: str) -> int:
    """Syllables of an English word, by its spelling: groups of vowels, without a silent ending, and at least one.

    Silent are a last -e ("voice", but not "table"), -es after other letters than c, g, h, s, x, z ("makes"), and -ed after
    other letters than d and t ("walked"). It is wrong for some words ("idea" has three).
    """
    letters = word.casefold().replace("'", "")
    silent = re.search(r"[^aeiouy]e$|[^aeiouycghsxz]es$|[^aeiouydt]ed$", letters)
    if re.search(r"[^aeiouy]les?$", letters):
        silent = None
    return max(1, len(re.findall(r"[aeiouy]+", letters)) - (silent is not None))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def plan_gender(settings: Settings, lines: LineDeck) -> list[Recording]:
    """Men and women in strong noise."""
    asked = [line.ask("gender", line.gender) for line in lines.all if line.gender]
    planned = balanced(asked, dict(zip(SPLITS, SIZES[settings.size].gender, strict=True)))
    snr = (settings.min_snr_db, settings.max_snr_db)
    return [with_draws(recording, settings, snr, channel=BENCHMARK_CHANNEL) for recording in planned]


def _queen_lines(lines: Sequence[QueenLine], settings: Settings) -> Iterator[Line]:
    splits, voices = queen_split(settings.fold), queen_voices(settings.fold)
    low, high = _SECONDS
    for line in lines:
        # "<gulp>" and "(sigh)" are not words.
        if line.speaker not in splits or len(line.text) < _MIN_CHARACTERS or set("<>()") & set(line.text):
            continue
        seconds = line.duration_seconds()
        if low < seconds < high:
            yield Line(
                key=f"queen-{line.clip_id}", speaker=f"queen-{line.speaker}",
                gender=SPEAKER_GENDER.get(line.speaker, ""), split=splits[line.speaker], text=line.text,
                source="queen", sound=line, seconds=seconds, actor=f"queen-{voices[line.speaker]}",
            )  # fmt: skip


def _spoken_lines(settings: Settings, sentences: SentenceDeck) -> Iterator[Line]:
    """As many lines as the tasks need; every second one is a question."""
    size = SIZES[settings.size]
    for split, gender, words, others in zip(SPLITS, size.gender, size.words, size.others, strict=True):
        voices = [(variant, sex) for sex, variants in ESPEAK_VOICES[split].items() for variant in variants]
        for number in range(max(2 * gender, words + 3 * others) // len(voices) + 1):
            for variant, sex in voices:
                text, _ = sentences.deal()
                text = text if number % 2 else f"{text[:-1]}?"
                yield Line(
                    key=f"espeak-{split}-{variant}-{number}", speaker=f"espeak-{variant}", gender=sex, split=split,
                    text=text, source="espeak", sound=Utterance(text=text, voice=f"en-us+{variant}"), seconds=0.0,
                )  # fmt: skip
