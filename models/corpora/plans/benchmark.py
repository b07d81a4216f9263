"""The benchmark: thirteen tasks in the five categories of Dynamic-SUPERB, each question under the four contexts of MCR-BENCH.

    content         content        which of two words is said       Amazon Queen
                    keyword        is this word said                the same clips
    semantic        sentence_type  question or statement            Amazon Queen
                    place, mood    what the words mean              espeak
    paralinguistic  speaking_rate  slow or quick                    espeak
                    delivery       lively or flat intonation        espeak
    degradation     noise, bandwidth, reverberation                 Amazon Queen
    speaker         gender         in strong noise                  Amazon Queen
                    accent         four accents of English          espeak
                    language       five languages                   Asterisk, Tux Paint, KTuberling

The prompt does not tell the answer unless the context names it:

- each task and split has equally many of each label; in sentence_type each voice has too;
- content, keyword: lines come in pairs; both are asked which of the same two words they hold, and whether they hold the first;
- speaking_rate, delivery, accent and the degradations: each text occurs once with each label, by the same voice;
- language: no transcript is shown, and the same things are said in all languages as far as the sources allow;
- content, keyword, sentence_type, place and mood: no transcript is shown, since it would be the answer.

No text, no synthetic voice and no actor of one split occurs in another, in any task. Only language is split by text alone.

Every clip has the band of an 8 kHz recording (except in the bandwidth task), one level, no silence at its ends, and noise. So
the channel does not tell the source.

The size study_tasks has recordings alone. Its tasks language, speaking_rate and cry come from recorded.py and lines.py, and
language is split by speaker as well.
"""

from __future__ import annotations

from models.corpora.plans.base import SIZES, RecordedSize, Recording, SentenceDeck, Settings, without_leaks
from models.corpora.plans.languages import plan_language
from models.corpora.plans.lines import (
    LineDeck,
    plan_bandwidth,
    plan_gender,
    plan_noise,
    plan_reverberation,
    plan_sentence_type,
    plan_spoken_rate,
    plan_words,
)
from models.corpora.plans.recorded import plan_cry, plan_spoken_language
from models.corpora.plans.synthetic import plan_accent, plan_delivery, plan_mood, plan_place, plan_speaking_rate
from models.corpora.recordings import Material

NOTES = (
    "queen: split by actor, by the game's voice credits; the lines are 11 kHz mp3",
    "gender: known from the characters' names and lines; the test has three actors at most of each sex",
    "content, keyword: ten frequent words, the same in training and test; lines and voices differ",
    "sentence_type: the label is read from the punctuation of the script",
    "place, mood: the phrases are those of training, in other sentences and by other voices",
    "place, mood, speaking_rate, delivery, accent: synthetic speech; delivery is the range of the pitch, not an emotion",
    "noise, bandwidth, reverberation: simulated, on recordings that have some of each themselves",
    "language: split by text, not by speaker: each language has one to three voices, so the voices tell the languages; one woman "
    "speaks the English and the Spanish prompts",
    "contexts: one wording for each task; irrelevant sentences do not occur in training",
)
RECORDED_NOTES = (
    *NOTES[:4],
    NOTES[6],
    NOTES[-1],
    "language: split by the actors of the Spanish credits; the English credits name no voices, so an English actor may speak for "
    "characters of two parts",
    "speaking_rate: the outer thirds of the lines by syllables a second; the syllables are counted by the spelling",
    "cry: the same names of cries in all voice sets; who speaks a set is not known; sets that share a file count as one voice",
)
EXTERNAL_NOTES = (
    "fillets: one woman and one man, in Czech; the gender is what both the file's name and the game's script say",
    "drascula: one woman; nine actors by the Spanish credits, and an unknown number of English ones",
)


def plan_benchmark(settings: Settings, material: Material) -> list[Recording]:
    """All recordings of all tasks."""
    sentences = SentenceDeck(settings)
    lines = LineDeck(settings, material, sentences)
    planned: list[Recording] = []
    # Every task takes its share even if it is not wanted, so that the plans of the others stay the same.
    planned += plan_words(settings, lines)
    for plan in (plan_sentence_type, plan_noise, plan_bandwidth, plan_reverberation, plan_gender):
        planned += plan(settings, lines)
    if isinstance(SIZES[settings.size], RecordedSize):
        if settings.wants("speaking_rate"):  # it decodes all lines
            planned += plan_spoken_rate(settings, lines)
        planned += plan_spoken_language(settings, material) + plan_cry(settings, material)
        return _wanted(planned, settings)
    if material.espeak:
        for plan in (plan_place, plan_mood, plan_speaking_rate, plan_delivery, plan_accent):
            planned += plan(settings, sentences)
    planned += plan_language(settings, material)
    return _wanted(planned, settings)


def _wanted(planned: list[Recording], settings: Settings) -> list[Recording]:
    assert without_leaks(planned) == planned, "a text is said in two splits"
    return [recording for recording in planned if settings.wants(recording.task)]
