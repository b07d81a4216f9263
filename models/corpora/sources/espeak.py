"""Synthetic speech with exactly known attributes, by espeak-ng through ctypes. The wheel espeakng-loader has its library.

The library keeps the phase of its oscillators and the index of its pitch jitter from one utterance to the next, and it
exports nothing to reset them. So the samples of an utterance depend on everything that was said before. `synthesise_all`
therefore runs in a process of its own, where equal requests give equal bytes. `synthesise` is for single utterances.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RATE_RANGE_WPM = (80, 450)
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_VOLUME, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 2, 3, 4
_BUFFER_MILLISECONDS = 200
_MAX_TEXT_CHARACTERS = 2000
_RANDOM_SEED = 1
_GENDERS = {1: "man", 2: "woman"}
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_INSTALL = "pip install espeakng-loader"


class EspeakError(RuntimeError):
    """espeak-ng is missing, or cannot speak what was asked."""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """What to say and how.

    Args:
        text: at most 2,000 characters.
        voice: a language ("en-us", "en-gb-scotland") and, after "+", a variant ("f2", "m3", "Annie").
        rate_wpm: words a minute, 80 to 450.
        pitch, pitch_range, volume: 0 to 100 (pitch 50 is the voice's own).

    Raises:
        ValueError: a value outside its range.
    """

    text: str
    voice: str = "en-us"
    rate_wpm: int = 175
    pitch: int = 50
    pitch_range: int = 50
    volume: int = 100

    def __post_init__(self) -> None:
        if not self.text.strip() or len(self.text) > _MAX_TEXT_CHARACTERS or "\0" in self.text:
            raise ValueError(f"text: expected 1 to {_MAX_TEXT_CHARACTERS} characters, got {len(self.text)}")
        low, high = RATE_RANGE_WPM
        if not low <= self.rate_wpm <= high:
            raise ValueError(f"rate_wpm: expected {low} to {high}, got {self.rate_wpm}")
        for name in ("pitch", "pitch_range", "volume"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name}: expected 0 to 100, got {getattr(self, name)}")


@dataclass(frozen=True)
class Variant:
    """A variant of espeak's voices, used as `language+name`, and the gender it is meant to have."""

    name: str
    gender: str


def synthesise(utterance: Utterance) -> tuple[np.ndarray, int]:
    """Speak one utterance. Several threads may call it; they take turns.

    Returns:
        float32 (samples,) in [-1, 1] and the rate in Hz.

    Raises:
        EspeakError: the library is missing, the voice is unknown, or there was no sound.
    """
    samples, rate_hz = _Library.instance().speak(utterance)
    return samples.astype(np.float32) / 32768.0, rate_hz


def synthesise_all(utterances: Sequence[Utterance]) -> list[tuple[np.ndarray, int]]:
    """Speak all utterances in a new process: equal requests give equal samples, whatever was said before.

    Returns:
        for each utterance float32 (samples,) and the rate in Hz.

    Raises:
        EspeakError: as `synthesise`, or the process died.
    """
    if not utterances:
        return []
    repository = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    requests = json.dumps([dataclasses.asdict(utterance) for utterance in utterances])
    result = subprocess.run(
        [sys.executable, "-m", "models.corpora.sources.espeak"],
        input=requests.encode(),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    if result.returncode != 0:
        reason = result.stderr.decode(errors="replace").strip().splitlines()
        raise EspeakError(reason[-1] if reason else f"the espeak process ended with status {result.returncode}")
    return _unpack(result.stdout, len(utterances))


def list_variants() -> list[Variant]:
    """The voice variants of the library, sorted by name. Raises EspeakError if it is missing."""
    return _Library.instance().variants()


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


class _Library:
    """The loaded library. A process has one of it, since its state is global, and a lock is held during each use."""

    _instance: _Library | None = None
    _instance_lock = threading.Lock()

    @classmethod
    def instance(cls) -> _Library:
        with cls._instance_lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def __init__(self) -> None:
        try:
            import espeakng_loader

            self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
            data_path = espeakng_loader.get_data_path()
        except ImportError:
            raise EspeakError(f"espeak-ng is missing: package espeakng-loader is not installed ({_INSTALL})") from None
        except (OSError, RuntimeError) as error:
            raise EspeakError(f"espeak-ng cannot be loaded ({error}); reinstall it: {_INSTALL}") from None
        self._lock = threading.Lock()
        self._blocks: list[np.ndarray] = []
        library = self._library
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_SetParameter.argtypes = [ctypes.c_int] * 3
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        library.espeak_ListVoices.argtypes = [ctypes.c_void_p]
        library.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        self._rate_hz = library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MILLISECONDS, os.fsencode(data_path), 0
        )
        if self._rate_hz <= 0:
            raise EspeakError(f"espeak-ng cannot start with the data in {data_path}; reinstall it: {_INSTALL}")
        # Without this the library seeds the C generator with the time of day, and the jitter of voices depends on it.
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_ng_SetRandSeed(_RANDOM_SEED)
        self._callback = _CALLBACK(self._collect)  # kept, because ctypes holds no reference to it
        library.espeak_SetSynthCallback(self._callback)

    def speak(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """int16 (samples,) and the rate in Hz."""
        with self._lock:
            self._blocks.clear()
            # The library ignores an unknown variant, but not an unknown language.
            if self._library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
                raise EspeakError(f"voice: espeak-ng has no voice {utterance.voice!r}")
            for parameter, value in (
                (_PARAMETER_RATE, utterance.rate_wpm),
                (_PARAMETER_VOLUME, utterance.volume),
                (_PARAMETER_PITCH, utterance.pitch),
                (_PARAMETER_RANGE, utterance.pitch_range),
            ):
                self._library.espeak_SetParameter(parameter, value, 0)
            text = utterance.text.encode("utf-8", errors="replace")
            status = self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _CHARS_UTF8, None, None)
            self._library.espeak_Synchronize()
            samples = np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.int16)
            self._blocks.clear()
        if status != 0 or not samples.size:
            raise EspeakError(f"text: espeak-ng said nothing for {utterance.text[:40]!r} (status {status})")
        return samples, self._rate_hz

    def variants(self) -> list[Variant]:
        with self._lock:
            wanted = _Voice(languages=b"variant")
            listed = self._library.espeak_ListVoices(ctypes.byref(wanted))
            found = []
            index = 0
            while listed[index]:
                voice = listed[index].contents
                name = voice.identifier.decode().rpartition("/")[2]
                found.append(Variant(name, _GENDERS.get(voice.gender, "")))
                index += 1
        return sorted(found, key=lambda variant: variant.name)

    def _collect(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def _unpack(data: bytes, count: int) -> list[tuple[np.ndarray, int]]:
    results = []
    at = 0
    for _ in range(count):
        if at + 8 > len(data):
            raise EspeakError(f"the espeak process gave {len(results)} of {count} utterances")
        rate_hz, size = struct.unpack_from("<II", data, at)
        samples = np.frombuffer(data, "<i2", size, at + 8)
        results.append((samples.astype(np.float32) / 32768.0, rate_hz))
        at += 8 + 2 * size
    return results


def _worker() -> int:
    """Requests as JSON on stdin; on stdout for each the rate and number of samples (uint32) and the samples (int16)."""
    try:
        for request in json.loads(sys.stdin.buffer.read()):
            samples, rate_hz = _Library.instance().speak(Utterance(**request))
            sys.stdout.buffer.write(struct.pack("<II", rate_hz, len(samples)) + samples.astype("<i2").tobytes())
    except EspeakError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_worker())
