"""What all plans share: the settings and sizes of a corpus, recordings with their labels, each split's characters and voices."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from models.corpora.degrade import Channel
from models.corpora.sources.espeak import Utterance
from models.corpora.sources.queen import read_actors, voices_of
from models.io_utils import fingerprint

SOURCES = ("queen", "espeak", "tux", "asterisk", "ktuberling", "drascula", "hedgewars", "fillets")
MAKER = "models.corpora.build"  # in the header of every manifest that it writes
# Changes whenever the same settings would give other bytes. The second one counts for the benchmark's sizes
# only, and the third one for those of recordings alone.
BUILDER_VERSION = 6
BENCHMARK_VERSION = 2
RECORDED_VERSION = 1
SPLITS = ("train", "dev", "test")

# Test and dev actors of each fold; the others train. Every actor is in the test of exactly one fold, and each part has women and
# men. "a04+a12" share a character (sources/queen.py). LOLA is left out: her two actresses both have other characters, and would
# count as one. MAN is left out because the credits do not name him, and DOG because it barks.
ACTOR_FOLDS = (
    {"test": ("a03", "a08", "a10"), "dev": ("a06", "a05")},
    {"test": ("a02", "a11"), "dev": ("a06", "a07")},
    {"test": ("a04+a12", "a06", "a09"), "dev": ("a08", "a05")},
    {"test": ("a01", "a05", "a07"), "dev": ("a08", "a11")},
)
DEFAULT_FOLD = 2  # its test actors have enough lines for all tasks of the benchmark
_LEFT_OUT = ("LOLA", "DOG")
# The split of the demo, the six systems and the ablation, as they were measured: by character, not by actor. One actor voices JIM
# and SPARKY, one HENRY, DEATH and partly KLUNK, and one LARIS (dev), BUD and FRANK. Nothing new should use it.
CHARACTER_SPLIT = {
    **dict.fromkeys(("FAYE", "TAM", "JOE", "BOB", "SPARKY", "DEATH", "BUD", "FRANK"), "train"),
    **dict.fromkeys(("NAOMI", "LARIS", "IAN"), "dev"),
    **dict.fromkeys(("PRIN", "LOLA", "JIM", "HENRY", "KLUNK"), "test"),
}


def queen_split(fold: int | None) -> dict[str, str]:
    """Character -> split, of all characters that the credits name. None is the split by character."""
    if fold is None:
        return dict(CHARACTER_SPLIT)
    parts = {actor: split for split, actors in ACTOR_FOLDS[fold].items() for actor in actors}
    voices = queen_voices(fold)
    return {code: parts.get(actor, "train") for code, actor in voices.items()}


def queen_voices(fold: int | None) -> dict[str, str]:
    """Character -> actor, of the characters of that split."""
    codes = CHARACTER_SPLIT if fold is None else [code for code in read_actors() if code not in _LEFT_OUT]
    return voices_of(codes)


ESPEAK_VOICES = {
    "train": {
        "woman": ("f1", "f2", "f3", "Annie", "belinda", "steph"),
        "man": ("m1", "m2", "m3", "m4", "adam", "Michael"),
    },
    "dev": {"woman": ("f4", "Alicia"), "man": ("m5", "max")},
    "test": {"woman": ("f5", "Andrea", "linda"), "man": ("m6", "m7", "m8")},
}
ACCENT_VOICES = {
    "American": "en-us",
    "British": "en-gb-x-rp",
    "Scottish": "en-gb-scotland",
    "Caribbean": "en-029",
}
RATES_WPM = {"slowly": (95, 130), "quickly": (260, 340)}
RATE_CLAIMS = {
    "slowly": ("I am talking very slowly today.", "Be patient, I always speak slowly.", "There is no hurry at all."),
    "quickly": ("I am talking very quickly today.", "Sorry, I have to say this fast.", "Hurry up, we have no time!"),
}
SUBJECTS = ("teacher", "sailor", "painter", "farmer", "doctor", "baker", "singer", "pilot", "lawyer", "tailor")
VERBS = ("found", "carried", "painted", "sold", "borrowed", "dropped", "wanted", "repaired")
OBJECTS = ("window", "basket", "ladder", "mirror", "carpet", "bottle", "hammer", "blanket", "camera", "candle")
PLACES = ("in the garden", "near the river", "behind the church", "on the train", "at the market", "under the bridge")
MILD_SNR_DB = (5.0, 20.0)
PLAIN_CHANNEL = Channel()
BENCHMARK_CHANNEL = Channel(trim=True, noise_in_band=True)


@dataclass(frozen=True)
class HintedSize:
    """How much of each task: recordings, before the two draws of training. `gender` counts are for each sex."""

    gender_train: int
    gender_espeak: int
    gender_dev: int
    gender_test: int
    test_draws: int
    other_train: int
    other_dev: int
    other_test: int
    stamps: int
    four_contexts: bool = False  # an irrelevant text too, and MCR-BENCH's names of the contexts

    sources = ("queen", "espeak")
    tasks = ("gender", "speaking_rate", "accent", "noise", "content", "language", "place", "mood")


@dataclass(frozen=True)
class BenchmarkSize:
    """How much of each task in train, dev and test: recordings, before the two draws of training.

    Args:
        gender: recordings of each sex.
        words: lines; both tasks about words ask about each of them.
        others: recordings of every other task, all labels together.
        keywords: how many different words the questions ask for.
    """

    gender: tuple[int, int, int]
    words: tuple[int, int, int]
    others: tuple[int, int, int]
    keywords: int

    sources = ("queen", "espeak", "tux", "asterisk", "ktuberling")
    tasks = ("content", "keyword", "sentence_type", "place", "mood", "speaking_rate", "delivery", "noise", "bandwidth",
             "reverberation", "gender", "accent", "language")  # fmt: skip


@dataclass(frozen=True)
class RecordedSize(BenchmarkSize):
    """The tasks that recordings alone can give, each split by speaker: language and speaking rate have other clips than in the
    benchmark, and there are cries (plans/recorded.py)."""

    sources = ("queen", "drascula", "hedgewars")
    tasks = ("content", "keyword", "sentence_type", "noise", "bandwidth", "reverberation", "gender", "language",
             "speaking_rate", "cry")  # fmt: skip


@dataclass(frozen=True)
class ExternalSize:
    """Test questions alone, about games that no training of E1 has heard. `gender` counts are for each sex and game."""

    gender: int

    four_contexts = True
    sources = ("fillets", "drascula")
    tasks = ("gender",)


SIZES: dict[str, HintedSize | BenchmarkSize | ExternalSize] = {
    "tiny": HintedSize(4, 4, 2, 3, 1, 8, 4, 4, 10),
    "demo": HintedSize(1000, 120, 40, 1000, 1, 40, 12, 40, 40),
    "sources": HintedSize(200, 0, 20, 60, 1, 120, 12, 60, 40),  # models/experiments/ablation.py
    "full": HintedSize(1000, 300, 1000, 1000, 3, 400, 40, 200, 400),
    "study": HintedSize(240, 160, 40, 90, 1, 0, 0, 0, 0, four_contexts=True),  # models/experiments/study.py
    "study_tasks": RecordedSize((220, 40, 90), (20, 8, 8), (240, 40, 100), 10),
    "study_sources": BenchmarkSize((220, 40, 90), (130, 30, 64), (240, 40, 100), 10),  # models/experiments/ablation.py, E4
    "external": ExternalSize(100),
    "benchmark_tiny": BenchmarkSize((3, 2, 3), (6, 4, 4), (10, 5, 5), 4),
    "benchmark": BenchmarkSize((110, 20, 88), (130, 20, 64), (60, 20, 60), 10),
}


@runtime_checkable
class Decodable(Protocol):
    """A recording that decodes itself, since libsndfile cannot read it as a file."""

    def decode(self) -> tuple[np.ndarray, int]:
        """float32 (samples,) and the rate in Hz; raises AudioError."""


class SoundFile(Protocol):
    """A recording in a file."""

    path: Path


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One clip of a recording: its channel and noise, and in training its pool."""

    name: str
    snr_db: float | None
    pool: str | None = None
    channel: Channel = PLAIN_CHANNEL


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A dry recording with its labels, and the clips to be made of it. `sound` is decoded or synthesised on use.

    Args:
        claim: the label that the words themselves claim.
        group: recordings of different tasks with the same group and key share their clips; "" is the task's own group.
        actor: who speaks, where one actor has several characters; "" is the speaker itself.
    """

    key: str
    task: str
    label: str
    split: str
    speaker: str
    text: str
    source: str
    sound: Decodable | Utterance | SoundFile
    draws: tuple[Draw, ...] = ()
    choices: tuple[str, ...] = ()
    question: str = ""
    shown_text: str | None = None
    claim: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    actor: str = ""

    @property
    def folder(self) -> str:
        """The folder of its clips, which the draws of their noise depend on too."""
        return self.group or self.task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a corpus: the arguments of `build_corpus`, checked."""

    sources: tuple[str, ...]
    size: str
    seed: int
    tasks: tuple[str, ...] | None
    hint_correlation: float
    min_snr_db: float
    max_snr_db: float
    max_seconds: float
    fold: int | None = DEFAULT_FOLD

    def __post_init__(self) -> None:
        if not self.sources or not set(self.sources) <= set(SOURCES):
            raise ValueError(f"sources: expected some of {list(SOURCES)}, got {list(self.sources)}")
        if self.size not in SIZES:
            raise ValueError(f"size: expected one of {list(SIZES)}, got {self.size!r}")
        known = SIZES[self.size].tasks
        if self.tasks is not None and (not self.tasks or not set(self.tasks) <= set(known)):
            raise ValueError(f"tasks: expected some of {list(known)} in size {self.size!r}, got {list(self.tasks)}")
        if self.seed < 0:
            raise ValueError(f"seed: expected a number from 0, got {self.seed}")
        if not 0.0 <= self.hint_correlation <= 1.0:
            raise ValueError(f"hint_correlation: expected a number from 0 to 1, got {self.hint_correlation}")
        if not self.min_snr_db <= self.max_snr_db:
            raise ValueError(f"min_snr_db: expected at most max_snr_db {self.max_snr_db:g}, got {self.min_snr_db:g}")
        if self.fold is not None and not 0 <= self.fold < len(ACTOR_FOLDS):
            raise ValueError(f"fold: expected None or a number from 0 to {len(ACTOR_FOLDS) - 1}, got {self.fold}")
        if self.fold is None and isinstance(SIZES[self.size], BenchmarkSize):
            raise ValueError(f"fold: expected a number in size {self.size!r}, which is split by actor, got None")
        if not 1.0 <= self.max_seconds <= 30.0:
            raise ValueError(f"max_seconds: expected 1 to 30, got {self.max_seconds:g}")

    def fingerprint(self) -> str:
        """Equal settings have equal fingerprints, as long as the builder's version is the same."""
        version = {"builder": BUILDER_VERSION}
        if isinstance(SIZES[self.size], BenchmarkSize):
            version["benchmark"] = BENCHMARK_VERSION
        if isinstance(SIZES[self.size], RecordedSize | ExternalSize):
            version["recorded"] = RECORDED_VERSION
        return fingerprint({**version, **dataclasses.asdict(self)})

    def wants(self, task: str) -> bool:
        """Whether `task` is to be built."""
        return self.tasks is None or task in self.tasks

    def rng(self, *names: str) -> np.random.Generator:
        """A generator for one purpose and clip. Each has its own, so that adding a clip changes no other."""
        digest = hashlib.sha256("\0".join([str(self.seed), *names]).encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, np.uint32))


def text_key(text: str) -> str:
    """Lower case without punctuation: texts that differ only in these count as one text."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


class HasText(Protocol):
    """An object with a text and its split."""

    split: str
    text: str


_Said = TypeVar("_Said", bound=HasText)
_Item = TypeVar("_Item")


def without_leaks(recordings: list[_Said]) -> list[_Said]:
    """Without the texts in dev that test has too, and without those in train that dev or test has."""
    test = {text_key(recording.text) for recording in recordings if recording.split == "test"}
    dev = {text_key(recording.text) for recording in recordings if recording.split == "dev"}
    forbidden: dict[str, set[str]] = {"test": set(), "dev": test, "train": test | dev}
    return [recording for recording in recordings if text_key(recording.text) not in forbidden[recording.split]]


def too_few(settings: Settings, things: str) -> ValueError:
    """The error for a size that needs more `things` than there are."""
    return ValueError(
        f"size: expected a smaller one than {settings.size!r}, or other sources than {', '.join(settings.sources)}: "
        f"there are too few {things}"
    )


class SentenceDeck:
    """Made-up sentences for the synthetic clips. Each is dealt once, so no two splits have the same sentence."""

    def __init__(self, settings: Settings):
        words = [(s, v, o, p) for s in SUBJECTS for v in VERBS for o in OBJECTS for p in PLACES]
        order = settings.rng("sentences").permutation(len(words))
        self._deck = iter([words[index] for index in order])
        self._settings = settings

    def deal(self) -> tuple[str, str]:
        """The next sentence, and the object that it names. Raises ValueError where none is left."""
        dealt = next(self._deck, None)
        if dealt is None:
            raise too_few(self._settings, "made-up sentences")
        subject, verb, thing, place = dealt
        return f"The {subject} {verb} the {thing} {place}.", thing


def balanced(recordings: Iterable[Recording], limits: dict[str, int]) -> list[Recording]:
    """The first recordings of each split: equally many of each label, at most the split's limit for one label."""
    groups: dict[tuple[str, str], list[Recording]] = defaultdict(list)
    for recording in recordings:
        groups[recording.split, recording.label].append(recording)
    kept = []
    for split, limit in limits.items():
        labels = [groups[key] for key in sorted(groups) if key[0] == split]
        count = min([limit, *map(len, labels)]) if len(labels) > 1 else 0
        kept += [recording for group in labels for recording in group[:count]]
    return kept


def take_turns(decks: Sequence[Sequence[_Item]]) -> Iterator[_Item]:
    """The first item of each deck, then the second of each, and so on. An empty deck is skipped."""
    for position in range(max(map(len, decks), default=0)):
        for deck in decks:
            if position < len(deck):
                yield deck[position]


def espeak_recording(
    task: str, label: str, split: str, key: str, variant: str, text: str, voice: str, **settings: int
) -> Recording:
    """A synthetic recording of `voice` in the variant `variant`. The variant counts as the speaker."""
    return Recording(
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


def with_draws(
    recording: Recording,
    settings: Settings,
    snr: tuple[float, float] | None,
    *,
    test_draws: int = 1,
    channel: Channel = PLAIN_CHANNEL,
) -> Recording:
    """The recording with its clips; in training there are two, one for each pool. `snr` is the range in dB; None is no noise."""
    names = {"train": ("teacher", "distill"), "dev": ("0",), "test": tuple(map(str, range(test_draws)))}[
        recording.split
    ]
    draws = []
    for name in names:
        rng = settings.rng("snr", recording.folder, recording.key, name)
        snr_db = None if snr is None else round(float(rng.uniform(*snr)), 2)
        pool = name if recording.split == "train" else None
        draws.append(Draw(name=name, snr_db=snr_db, pool=pool, channel=channel))
    return dataclasses.replace(recording, draws=tuple(draws))


def any_voice(split: str) -> tuple[str, ...]:
    """The espeak variants of a split."""
    return ESPEAK_VOICES[split]["woman"] + ESPEAK_VOICES[split]["man"]


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """One of `items`, each with the same probability."""
    return items[int(rng.integers(len(items)))]
