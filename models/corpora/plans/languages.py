"""The language task of the benchmark: five languages with one to three recorded voices each.

Half of a language's clips are Asterisk prompts, the same ones in all languages. The others come from a second voice: Tux Paint
for Spanish, French and Russian, KTuberling for English, French and Russian, the Menardi prompts for Italian. Only the English
name tells what a clip says; a name stays in one split. No transcript is shown, because only some sources have one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import soundfile as sf

from models.corpora.plans.base import (
    BENCHMARK_CHANNEL,
    MILD_SNR_DB,
    SIZES,
    SPLITS,
    Recording,
    Settings,
    text_key,
    with_draws,
)
from models.corpora.recordings import Material
from models.corpora.sources.asterisk import PromptRecording
from models.corpora.sources.ktuberling import WordRecording
from models.corpora.sources.tuxpaint import StampRecording

LANGUAGES = ("English", "Spanish", "French", "Italian", "Russian")
_TUX_CODES = {"es", "fr", "ru"}
_SECONDS = (0.7, 6.0)
_SECOND_ITALIAN = "it_IT_f_Menardi"

_Spoken = PromptRecording | StampRecording | WordRecording


def plan_language(settings: Settings, material: Material) -> list[Recording]:
    """Which language is spoken; empty without the Asterisk prompts of all languages."""
    prompts = _Deck(settings, "prompts", (p for p in material.prompts if p.voice != _SECOND_ITALIAN))
    if set(prompts.languages) != set(LANGUAGES):
        return []
    menardi = _Deck(settings, "menardi", (p for p in material.prompts if p.voice == _SECOND_ITALIAN))
    tux = _Deck(settings, "tux", (s for s in material.stamps if s.code in _TUX_CODES))
    ktuberling = _Deck(settings, "ktuberling", material.words)
    said_in: dict[str, str] = {}
    planned = []
    for split, count in zip(SPLITS, SIZES[settings.size].others, strict=True):
        for number in range(count // len(LANGUAGES)):
            files = dict(prompts.deal(split, said_in))
            if number % 2:
                # If no second voice has anything left, the prompt stays.
                for deck in (ktuberling, tux, menardi) if number % 4 == 1 else (tux, ktuberling, menardi):
                    files |= deck.deal(split, said_in)
            for language in LANGUAGES:
                if language in files:
                    planned.append(_recording(settings, split, number, language, files[language]))
    return planned


class _Deck:
    """Recordings that say the same in several languages, by their English name. Each name is dealt once."""

    def __init__(self, settings: Settings, name: str, recordings: Iterable[_Spoken]) -> None:
        by_language: dict[str, dict[str, _Spoken]] = defaultdict(dict)
        for recording in recordings:
            by_language[recording.language].setdefault(_gloss(recording), recording)
        self.languages = sorted(by_language)
        self._found = by_language
        glosses = sorted(set.intersection(*map(set, by_language.values()))) if by_language else []
        order = settings.rng("language", name).permutation(len(glosses))
        self._left = [glosses[index] for index in order]

    def deal(self, split: str, said_in: dict[str, str]) -> dict[str, _Spoken]:
        """The recordings by language of the next name that no other split has; {} if there is no such name."""
        while self._left:
            gloss = self._left.pop()
            files = {language: by_gloss[gloss] for language, by_gloss in self._found.items()}
            if said_in.setdefault(text_key(gloss), split) == split and all(map(_usable, files.values())):
                return files
        return {}


def _recording(settings: Settings, split: str, number: int, language: str, spoken: _Spoken) -> Recording:
    source, speaker = _voice(spoken)
    return with_draws(
        Recording(
            key=f"{split}-{number}-{language}",
            task="language",
            label=language,
            split=split,
            speaker=speaker,
            text=_gloss(spoken),
            source=source,
            sound=spoken,
            choices=LANGUAGES,
            shown_text="",
        ),
        settings,
        MILD_SNR_DB,
        channel=BENCHMARK_CHANNEL,
    )


def _gloss(spoken: _Spoken) -> str:
    return spoken.english if isinstance(spoken, StampRecording) else spoken.gloss


def _voice(spoken: _Spoken) -> tuple[str, str]:
    """(source, speaker)."""
    if isinstance(spoken, PromptRecording):
        return "asterisk", f"asterisk-{spoken.voice.rpartition('_')[2]}"
    source = "tux" if isinstance(spoken, StampRecording) else "ktuberling"
    return source, f"{source}-{spoken.code}"


def _usable(spoken: _Spoken) -> bool:
    low, high = _SECONDS
    try:
        return low < sf.info(str(spoken.path)).duration < high
    except Exception:  # libsndfile raises several unrelated types; a damaged file is not chosen
        return False
