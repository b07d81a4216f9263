"""Stage 1: what the text backbone reads."""

from __future__ import annotations

import pytest

from models.data.manifest import Example
from models.data.prompts import TASKS
from models.pseudo_gt.wording import describe, not_told, told_by_name, worked_examples
from tests.models.pseudo_gt.test_stage1 import gender


def test_wording_tells_the_facts_and_neither_the_hint_nor_the_speaker():
    assert describe(gender(1)) == "[00:00-00:02] Line 1. (Gender: man, SNR: -3 dB)"
    timed = gender(1, start_seconds=61.0, end_seconds=65.5, metadata={"text": "All of it.", "language": "Danish"})
    assert describe(timed) == "[01:01-01:05] All of it. (Language: Danish)"
    assert describe(Example(id="a", audio=None, transcription="Hm")) == "Hm"


def test_wording_has_a_place_for_every_task_that_is_not_about_the_meaning():
    for task in TASKS.values():
        if task.name not in ("place", "mood"):  # which the words tell
            label = (task.choices or ("German",))[0]
            example = Example(id="a", audio="a.flac", task=task.name, metadata={task.name: label, "text": "Go home."})
            assert label in describe(example), task.name


def test_worked_examples_are_shared_by_a_task_and_end_with_the_first_label():
    shared = worked_examples(gender(1))
    assert shared == worked_examples(gender(2, "woman"))
    assert shared.startswith("Question: Is the speaker a man or a woman?\n\n")
    answers = [block.rpartition(" -> ")[2] for block in shared.strip().split("\n\n")[1:]]
    assert answers == [f"The speaker is a {label}." for label in ("man", "woman", "woman", "man")]
    own = worked_examples(gender(1, task="content", question="Which word is spoken, cat or dog?", choices=()))
    assert own.startswith("Question: Which word") and own == worked_examples(gender(1, task="new", choices=()))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("speaking_style", "sarcastic", "Speaking style: sarcastic"),
        ("speakingStyle", "sarcastic", "Speaking style: sarcastic"),
        ("Background Noise", "a dog barks", "Background noise: a dog barks"),
        ("pitch", "high", "Pitch: high"),
        ("mood", "cheerful", "Mood: cheerful"),
        ("DRR", 3.25, "DRR: 3.25"),
        ("num_speakers", 2, "Num speakers: 2"),
        ("whispered", True, "Whispered: yes"),
        ("instruments", ["flute", "harp"], "Instruments: flute, harp"),
        ("category", "dog", "Category: dog"),
        ("voice", "hoarse\nand deep", "Voice: hoarse and deep"),
        ("seed_description", "A man laughs.", "Seed description: A man laughs."),
    ],
)
def test_metadata_without_a_wording_are_told_by_name(name, value, told):
    example = gender(1, metadata={"gender": "man", name: value, "snr_db": 3})
    assert describe(example) == f"Line 1. (Gender: man, SNR: 3 dB, {told})"
    assert (told_by_name(example), not_told(example)) == ([name], [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speaker", "JOE"), ("speaker_id", 7), ("speakerID", "p225"), ("spk_id", "1"), ("audio_sha256", "0f"), ("md5", "0f"),
        ("pool", "teacher"), ("split", "train"), ("path", "/data/a.wav"), ("video_url", "https"), ("category", "paralinguistic"),
        ("seed_description", "[00:00-00:05] Good luck. (Gender: man)"), ("dataset", "X"), ("index", 3), ("sample_rate", 16000),
        ("accent_details", None), ("accent_details", ""), ("accent_details", {"a": 1}), ("reasoning", "He sounds"), ("_", "x"),
        ("context_type", "neutral"), ("snr_db", "high"),
    ],
)  # fmt: skip
def test_what_is_no_attribute_of_the_sound_is_listed_and_not_told(name, value):
    example = gender(1, metadata={"gender": "man", name: value})
    assert describe(example) == "Line 1. (Gender: man)"
    assert (told_by_name(example), not_told(example)) == ([], [name])


@pytest.mark.parametrize(
    ("transcription", "text", "told"),
    [
        ("Good luck.", "[00:00-00:05] Good luck. (Gender: man)", None),
        ("", "[00:00-00:05] Good luck. (Gender: man)", None),
        ("Hi. Hello.", "[00:00-00:05] Hi. (Gender: woman)\n[00:05-00:09] Hello. (Gender: man)", None),
        ("Bad luck.", "[00:00-00:05] Good luck. (Gender: man)", "Bad luck. (Gender: man)"),  # of another clip
        ("Good luck.", "A man laughs.", "Good luck. (Gender: man, Seed description: A man laughs.)"),  # without times
    ],
)
def test_a_published_description_is_told_as_it_is(transcription, text, told):
    """Names that stand beside it are listed as not told, but for those of its parts."""
    metadata = {"seed_description": text, "gender": "man", "speaker": "JOE", "index": 3}
    example = Example(id="a", audio=None, transcription=transcription, metadata=metadata)
    assert describe(example) == (told or " ".join(text.split()))
    if told is None:
        parts = ["gender"] if "Good" in text else []
        assert not_told(example) == [name for name in ("gender", "speaker", "index") if name not in parts]
        assert told_by_name(example) == []


def test_the_built_in_corpora_are_told_as_before():
    """Their results stand in the tables: the label of a task about the meaning and the synthesiser's settings are not told."""
    common = {
        "pool": "teacher", "claimed_by_words": "man", "speaker": "espeak-f1", "source": "espeak", "text": "Go home.",
        "duration_seconds": 1.5, "audio_sha256": "0f", "voice": "en-us+f1", "rate_wpm": 140, "pitch": 50, "pitch_range": 10,
        "volume": 80, "asked_word": "horse", "category": "speaker", "context_type": "neutral",
    }  # fmt: skip
    for task, label in (("place", "indoors"), ("mood", "good")):
        example = Example(id="a", audio="a.flac", task=task, metadata={task: label, "snr_db": 2.0, **common})
        assert describe(example) == "[00:00-00:01] Go home. (SNR: 2 dB)" and told_by_name(example) == []
