"""Turns recordings into clips: decode or synthesise, degrade, write, hash."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.corpora.degrade import prepare_clip
from models.corpora.plans.base import Decodable, Draw, Recording, Settings, SoundFile
from models.corpora.sources.espeak import Utterance, synthesise_all
from models.data.audio import SAMPLE_RATE_HZ, AudioError, encode_audio, load_audio
from models.data.manifest import ManifestError, Problem
from models.data.problems import list_problems

_SYNTHESIS_BATCH = 256
_MAX_BAD_FRACTION = 0.02


@dataclass(frozen=True)
class MadeClip:
    """A clip that has been written, under the name `name` in the corpus' folder."""

    recording: Recording
    draw: Draw
    name: str
    sha256: str
    duration_seconds: float


def render_all(
    out_dir: Path, recordings: list[Recording], settings: Settings, *, progress: bool
) -> tuple[list[MadeClip], list[Problem]]:
    """Make and write all clips, a batch of recordings at a time; a clip that two tasks share is made once.

    Returns:
        the clips in the order of the recordings, and a Problem (its row counts recordings) for each unusable recording.

    Raises:
        ManifestError: more than 2% of the recordings are unusable.
    """
    made: list[MadeClip] = []
    problems: list[Problem] = []
    shared: dict[str, MadeClip] = {}
    total = sum(len(recording.draws) for recording in recordings)
    with tqdm(total=total, desc="corpus", unit="clip", disable=not progress) as bar:
        for start in range(0, len(recordings), _SYNTHESIS_BATCH):
            batch = recordings[start : start + _SYNTHESIS_BATCH]
            spoken = iter(synthesise_all([r.sound for r in batch if isinstance(r.sound, Utterance)]))
            for offset, recording in enumerate(batch):
                said = next(spoken) if isinstance(recording.sound, Utterance) else None
                try:
                    names = [clip_name(recording, draw) for draw in recording.draws]
                    if not shared.keys() >= set(names):
                        samples, rate_hz = said if said is not None else _decode(recording.sound)
                        for name, draw in zip(names, recording.draws, strict=True):
                            shared[name] = _render(out_dir, name, recording, draw, samples, rate_hz, settings)
                    made += [
                        dataclasses.replace(shared[name], recording=recording, draw=draw)
                        for name, draw in zip(names, recording.draws, strict=True)
                    ]
                except AudioError as error:
                    problems.append(Problem(start + offset + 1, recording.key, error.reason))
                bar.update(len(recording.draws))
    if len(problems) > _MAX_BAD_FRACTION * len(recordings):
        raise ManifestError(
            "\n".join([f"{len(problems)} of {len(recordings)} recordings cannot be used", *list_problems(problems)]),
            problems,
        )
    return made, problems


def clip_name(recording: Recording, draw: Draw) -> str:
    """A clip's path below the corpus' folder."""
    return f"audio/{recording.folder}/{recording.split}/{recording.key}-{draw.name}.flac"


def _decode(sound: Decodable | SoundFile) -> tuple[np.ndarray, int]:
    if isinstance(sound, Decodable):
        return sound.decode()
    return load_audio(sound.path), SAMPLE_RATE_HZ


def _render(
    out_dir: Path, name: str, recording: Recording, draw: Draw, samples: np.ndarray, rate_hz: int, settings: Settings
) -> MadeClip:
    rng = settings.rng("noise", recording.folder, recording.key, draw.name)
    clip = prepare_clip(
        samples, rate_hz, snr_db=draw.snr_db, rng=rng, max_seconds=settings.max_seconds, channel=draw.channel
    )
    content = encode_audio(clip)
    path = out_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Clips are not flushed to the disk one by one, which takes longer than all the rest. The manifest with the hashes is
    # written last, and the hash finds a clip that a crash has damaged.
    path.write_bytes(content)
    return MadeClip(recording, draw, name, hashlib.sha256(content).hexdigest(), len(clip) / SAMPLE_RATE_HZ)
