"""How a model hears a clip, and what its prompt says beside it; teacher and student may differ in both.

A `Hearing` adds noise to a clip, limits its band and sends it through a codec, in this order: as a call from a noisy street.
What it draws depends on its seed and on the clip (file and span). So a clip sounds the same in every epoch, on every rank and
under every question. The codecs are libsndfile's: another release of it may differ in the last bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from models.corpora.degrade import BANDS, band_limited, make_noise
from models.data.audio import SAMPLE_RATE_HZ, resample
from models.data.example import Example
from models.io_utils import atomic_write_json

_TELEPHONE_RATE_HZ = 8_000
# Name -> (format, subtype, rate in Hz) of libsndfile.
_CODECS = {
    "ulaw": ("WAV", "ULAW", _TELEPHONE_RATE_HZ),
    "gsm": ("WAV", "GSM610", _TELEPHONE_RATE_HZ),
    "mp3": ("MP3", "MPEG_LAYER_III", SAMPLE_RATE_HZ),
    "opus": ("OGG", "OPUS", SAMPLE_RATE_HZ),
    "vorbis": ("OGG", "VORBIS", SAMPLE_RATE_HZ),
}
CODECS = ("none", *_CODECS)
_COMPRESSION = 0.9  # of 1: low rates, at which a codec is heard
_BLOCK_SAMPLES = 1 << 14  # libsndfile's Vorbis encoder runs out of stack on long writes
_MIN_RMS = 1e-6
HEARS_FILE = "hears.json"  # beside a trained model: what it heard in training


@dataclass(frozen=True)
class Hearing:
    """How a model hears a clip, and what its prompt says beside it. The default leaves the clip and the prompt as they are.

    Raises:
        ValueError: a value outside its range; the message starts with its name.
    """

    snr_db: tuple[float, ...] = ()  # noise in dB: [] = none, one level, or the lowest and the highest: each clip has its own
    band: str = "full"  # full | common (of an 8 kHz recording) | wide (of an 11 kHz one) | narrow (a telephone's, 300 to 3400 Hz)
    codec: str = "none"  # none | ulaw and gsm (telephones, at 8 kHz) | mp3 | opus | vorbis
    seed: int = 0  # seed of the noise
    transcript: bool = True  # the prompt shows the transcript
    context: bool = True  # the prompt shows the context
    context_from: str = ""  # name of the metadata that the prompt shows as the context, in place of the example's own; "" = none
    # The question in the prompt: {question}, {transcription} and {context} are the example's, {NAME} is its metadata["NAME"].
    question: str = "{question}"

    def __post_init__(self) -> None:
        object.__setattr__(self, "snr_db", tuple(self.snr_db))
        if len(self.snr_db) > 2 or not all(map(math.isfinite, self.snr_db)) or list(self.snr_db) != sorted(self.snr_db):
            raise ValueError(f"snr_db: expected none, one, or a lowest and a highest level in dB, got {list(self.snr_db)}")
        if self.band not in ("full", *BANDS):
            raise ValueError(f"band: expected one of full, {', '.join(BANDS)}, got {self.band!r}")
        if self.codec not in CODECS:
            raise ValueError(f"codec: expected one of {', '.join(CODECS)}, got {self.codec!r}")
        if self.seed < 0:
            raise ValueError(f"seed: expected >= 0, got {self.seed}")
        if self.context_from and not self.context:
            raise ValueError(f"context_from: expected '' with context false, got {self.context_from!r}")
        if not self.question.strip():
            raise ValueError("question: expected words, such as '{question}', got none")

    def settings(self) -> dict[str, Any]:
        """What differs from the default, as JSON; empty for a clip and a prompt as they are. A seed without noise is left out."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        if not self.snr_db:
            found.pop("seed", None)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def of_the_sound(self) -> dict[str, Any]:
        """The settings that change the sound."""
        return {name: value for name, value in self.settings().items() if name in ("snr_db", "band", "codec", "seed")}

    def sound(self, samples: np.ndarray, clip: str, *, sample_rate: int = SAMPLE_RATE_HZ) -> np.ndarray:
        """The clip as it is heard.

        Args:
            samples: float32 (samples,) at `sample_rate`.
            clip: its name, which the noise depends on beside the seed.

        Returns:
            float32 (samples,), of the same length and level.
        """
        if not self.of_the_sound():
            return samples
        count, heard = len(samples), samples
        if self.snr_db:
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{self.seed} {clip}".encode()).digest()[:8], "big"))
            snr_db = rng.uniform(self.snr_db[0], self.snr_db[-1])
            noise = make_noise(count, rng=rng)
            heard = heard + noise * np.float32(max(_rms(heard), _MIN_RMS) * 10.0 ** (-snr_db / 20.0))
        if self.band != "full":
            narrowed = band_limited(heard, sample_rate, self.band)
            heard = _of_length(resample(narrowed, SAMPLE_RATE_HZ, sample_rate), count)
        if self.codec != "none":
            heard = _of_length(_coded(heard, sample_rate, *_CODECS[self.codec]), count)
        return heard.astype(np.float32, copy=False)

    def shown(self, example: Example) -> Example:
        """The example with the words that its prompt shows.

        Raises:
            ValueError: `question` or `context_from` names metadata that the example does not have; the message names the example.
        """
        if self.transcript and self.context and not self.context_from and self.question == "{question}":
            return example
        if self.context_from and self.context_from not in example.metadata:
            raise ValueError(f"example {example.id!r}: context_from needs its metadata {self.context_from!r}")
        context = str(example.metadata[self.context_from]) if self.context_from else example.context
        known = {**example.metadata, **{name: getattr(example, name) for name in ("question", "transcription", "context")}}

        def value(match: re.Match[str]) -> str:
            if match[1] not in known:
                raise ValueError(f"example {example.id!r}: the question {self.question!r} needs its metadata {match[1]!r}")
            return str(known[match[1]])

        return dataclasses.replace(
            example,
            transcription=example.transcription if self.transcript else "",
            context=context if self.context else "",
            question=re.sub(r"\{(\w+)\}", value, self.question),
        )


PLAIN = Hearing()


def clip_key(example: Example) -> str:
    """Name of an example's clip: file and span, e.g. "queen/joe.wav@0.0-None". Empty for a text-only example.

    Several clips have one name with all of them, between "+".
    """
    return "+".join(map(span_key, example.clips))


def span_key(clip: tuple[str, float, float | None]) -> str:
    """Name of one clip, (file, start, end)."""
    return "{}@{}-{}".format(*clip)


def parse_hearing(words: Sequence[str]) -> Hearing:
    """From the words of --hears, such as snr_db=0,10 band=narrow; the one word "clean" is the default.

    Raises:
        ValueError: an unknown name, or a value of a wrong kind or out of range; the message starts with --hears.
    """
    if list(words) == ["clean"]:
        return PLAIN
    fields = {f.name: f for f in dataclasses.fields(Hearing)}
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"--hears: expected clean, or NAME=VALUE with a name of {', '.join(fields)}, got {word!r}")
        default = fields[name].default
        try:
            if isinstance(default, bool):
                given[name] = {"true": True, "false": False}[text.lower()]
            elif isinstance(default, tuple):
                given[name] = tuple(float(x) for x in text.strip("[]").split(",") if x.strip())
            else:
                given[name] = type(default)(text)
        except (ValueError, KeyError):
            kind = {bool: "true or false", tuple: "numbers between commas", int: "a whole number"}[type(default)]
            raise ValueError(f"--hears {name}: expected {kind}, got {text!r}") from None
    try:
        return Hearing(**given)
    except ValueError as error:
        raise ValueError(f"--hears {error}") from None


def write_hears(folder: str | os.PathLike[str], hears: Hearing) -> None:
    """Write what a model heard in training into its folder; nothing for clips and prompts as they are."""
    if hears.settings():
        atomic_write_json(Path(folder) / HEARS_FILE, hears.settings())


def read_hears(folder: str | os.PathLike[str]) -> Hearing:
    """What the model in `folder` heard in training; the default where its folder does not say, or is not here.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / HEARS_FILE
    if not path.is_file():
        return PLAIN
    try:
        return Hearing(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if samples.size else 0.0


def _of_length(samples: np.ndarray, count: int) -> np.ndarray:
    return np.pad(samples[:count], (0, max(0, count - len(samples))))


def _coded(samples: np.ndarray, rate_hz: int, form: str, subtype: str, coded_hz: int) -> np.ndarray:
    """`samples` after the codec and back; what lies beyond [-1, 1] is clipped, as a recorder does."""
    sent = np.clip(resample(samples, rate_hz, coded_hz), -1.0, 1.0)
    buffer = io.BytesIO()
    level = {} if form == "WAV" else {"compression_level": _COMPRESSION}
    with sf.SoundFile(buffer, "w", coded_hz, 1, subtype, format=form, **level) as file:
        for start in range(0, len(sent), _BLOCK_SAMPLES):
            file.write(sent[start : start + _BLOCK_SAMPLES])
    buffer.seek(0)
    received, _ = sf.read(buffer, dtype="float32")
    return resample(received, coded_hz, rate_hz)
