"""What the text backbone reads: a clip in words, worked examples before it, and the end of the prompt.

Every character here is data. A change of the wording changes what the backbone writes; then WORDING_VERSION has to change too.
"""

from __future__ import annotations

import re
from typing import Any

from models.data.manifest import Example
from models.data.prompts import CATEGORIES, TASKS, target_template
from models.data.readers import holds_times, parse_description

# Changes whenever the backbone would read other words for the same example.
WORDING_VERSION = 1
# How the known kinds of metadata are told. Other names are told as they are: "Speaking style: sarcastic".
_WORDING = {
    "gender": "Gender: {}",
    "language": "Language: {}",
    "accent": "Accent: {}",
    "emotion": "Emotion: {}",
    "speaking_rate": "Speaking rate: {}",
    "noise": "Recording: {}",
    "bandwidth": "Bandwidth: {}",
    "reverberation": "Room: {}",
    "delivery": "Delivery: {}",
    "cry": "Voice: {}",
    "sentence_type": "Sentence: {}",
    "keyword": "Word in question: {}",
    "content": "Spoken word: {}",
    "age": "Age: {}",
}
# Names that have a place of their own: the words, the times, the ratio of speech to noise.
_ELSEWHERE = frozenset(("text", "duration_seconds", "snr_db"))
# Names that say nothing about the sound. They are compared in lower case with "_" between words: speakerID is speaker_id.
NOT_TOLD = frozenset(
    (
        # who and where from
        "speaker", "spk", "actor", "source", "corpus", "dataset", "data_source", "licence", "license", "copyright", "annotator",
        # parts of a data set
        "pool", "draw", "split", "subset", "partition", "fold", "context_type", "claimed_by_words", "asked_word", "reasoning",
        # files
        "path", "file", "filename", "file_name", "filepath", "file_path", "audio_path", "audio_file", "audio_filepath", "wav",
        "url", "uri", "key",
        # bookkeeping
        "index", "idx", "row", "number", "line", "version", "seed", "date", "timestamp", "created", "start_seconds",
        "end_seconds", "sample_rate", "sampling_rate", "sample_rate_hz", "num_samples", "num_frames", "num_channels",
        "bit_depth", "bit_rate", "size_bytes",
    )
)  # fmt: skip
# Last words of such names: speaker_id, audio_sha256, video_url.
_NOT_TOLD_ENDS = frozenset(("id", "ids", "uid", "uuid", "sha256", "sha1", "md5", "crc32", "hash", "checksum", "url", "path"))
_CAPITAL_AFTER_SMALL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# The synthesiser's settings. For a recorded clip these names mean something else.
_ESPEAK_SETTINGS = frozenset(("voice", "rate_wpm", "pitch", "pitch_range", "volume"))


def describe(example: Example) -> str:
    """What is known about a clip, in words: `[00:00-00:03] text (Gender: man, SNR: -3 dB, Speaking style: calm)`.

    The times are those of the span, in minutes and seconds. The text is the whole transcript. The context is left out,
    because it may be false. Metadata under NOT_TOLD, and what `not_told` lists besides, are left out too.

    A published description with times (`seed_description`) that fits the transcript is told as it is, without anything else.
    """
    if (published := published_description(example)) is not None:
        return published
    start = example.start_seconds
    duration = example.metadata.get("duration_seconds")
    end = example.end_seconds
    if end is None and isinstance(duration, (int, float)):
        end = start + duration
    times = f"[{_clock(start)}-{_clock(end)}] " if end is not None else ""
    facts = [form.format(example.metadata[key]) for key, form in _WORDING.items() if key in example.metadata]
    snr = example.metadata.get("snr_db")
    if isinstance(snr, (int, float)):
        facts.append(f"SNR: {snr:.0f} dB")
    facts += [f"{_in_words(name)}: {_value(value)}" for name, value in _others(example).items()]
    return f"{times}{_spoken(example)}" + (f" ({', '.join(facts)})" if facts else "")


def _spoken(example: Example) -> str:
    return " ".join(str(example.metadata.get("text", example.transcription)).split())


def published_description(example: Example) -> str | None:
    """The `seed_description` of a row in one line, where it is told as it is: one with times, in one segment or several.

    One that says other words than the transcript belongs to another clip: then its parts are told.
    """
    text = " ".join(str(example.metadata.get("seed_description", "")).split())
    if not holds_times(text):
        return None
    parsed = parse_description(text)
    return text if parsed is None or _spoken(example) in ("", parsed[0]) else None


def told_by_name(example: Example) -> list[str]:
    """The names of metadata that have no wording of their own and are told as they are."""
    return [] if published_description(example) is not None else list(_others(example))


def not_told(example: Example) -> list[str]:
    """The names of metadata that `describe` leaves out."""
    published = published_description(example)
    if published is not None:
        parts = parse_description(published)
        return [name for name in example.metadata if name != "seed_description" and not (parts and name in parts[1])]
    told = {*_WORDING, *_ELSEWHERE, *_others(example)}
    left_out = [name for name in example.metadata if name not in told]
    numbers = [name for name in ("duration_seconds", "snr_db") if name in example.metadata]
    return left_out + [name for name in numbers if not isinstance(example.metadata[name], (int, float))]


def _others(example: Example) -> dict[str, Any]:
    """The metadata that are told under their own name."""
    return {
        name: value
        for name, value in example.metadata.items()
        if name not in _WORDING and name not in _ELSEWHERE and _value(value) and _is_of_the_sound(example, name, value)
    }


def _is_of_the_sound(example: Example, name: str, value: Any) -> bool:
    words = _name_words(name)
    plain = "_".join(words)
    if not words or plain in NOT_TOLD or words[-1] in _NOT_TOLD_ENDS:
        return False
    if plain in _ESPEAK_SETTINGS and example.metadata.get("source") == "espeak":
        return False
    if name == example.task and name in TASKS:  # a task about the meaning, which the words tell
        return False
    if plain == "category" and value in CATEGORIES:  # Dynamic-SUPERB's, of the question
        return False
    # The parts of a published description are told instead of the whole.
    return plain != "seed_description" or parse_description(str(value)) is None


def _value(value: Any) -> str:
    """A value in words; empty for one that has none: null, blanks, an object."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        words = [_value(item) for item in value]
        return ", ".join(words) if all(words) else ""
    return " ".join(str(value).split()) if isinstance(value, (str, int)) else ""


def _name_words(name: str) -> list[str]:
    """The words of a name in lower case: `speakingStyle`, `speaking_style` and `Speaking style` have the same."""
    return re.findall(r"[^\W_]+", _CAPITAL_AFTER_SMALL.sub(" ", name).lower())


def _in_words(name: str) -> str:
    """`speaking_style` as "Speaking style". A word in capitals stays as it is."""
    words = re.split(r"[\s_]+", _CAPITAL_AFTER_SMALL.sub(" ", name).strip("_ \t\n"))
    plain = " ".join(word if word.isupper() else word.lower() for word in words)
    return plain[:1].upper() + plain[1:]


def worked_examples(example: Example, *, own_line: bool = False) -> str:
    """The beginning of the prompt: answered clips. All examples of a task share them if they ask the task's own question.

    With `own_line` each answer stands on a line of its own, instead of behind a space.

    The labels come in a palindrome (man, woman, woman, man), because small models follow the order of the labels and
    the last answer more than the metadata. Another form of the prompt had the question before each clip and "Answer:" after
    it. With SmolLM2-135M it gave 0.33 acceptable answers in the gender task. This order, and an arrow between metadata and
    answer, gave 1.00. More examples gave fewer.
    """
    if _asks_the_same(example):
        task = TASKS[example.task]
        labels = (task.choices or _WORKED_LABELS[task.name])[:3]
        blocks = [f"Question: {task.question}"]
        shown = [(task, label, describe) for label in (*labels, *reversed(labels))]
    else:
        blocks = []
        shown = [(TASKS[name], label, _asked) for name, label in _MIXED_EXAMPLES]
    space = "\n" if own_line else " "
    for number, (kind, label, in_words) in enumerate(shown):
        clip = Example(
            id="worked",
            audio=None,
            task=kind.name,
            question=_MIXED_QUESTIONS.get(label, kind.question),
            end_seconds=2.0 + number % 3,
            metadata={kind.name: label, "text": _worked_text(kind.name, label, number), "snr_db": 3 * number - 5},
        )
        blocks.append(f"{in_words(clip)} ->{space}{target_template(clip, label)}")
    return "\n\n".join(blocks) + "\n\n"


def _worked_text(task: str, label: str, number: int) -> str:
    """The words of a worked example's clip: any sentence, or for some tasks a sentence with the label's meaning."""
    texts = _WORKED_TEXTS.get(task, {}).get(label, _FILLERS)
    return texts[number // 2 % len(texts)] if task in _WORKED_TEXTS else texts[number % len(texts)]


_WORKED_TEXTS = {
    "place": {
        "indoors": ("We sat down in the waiting room.", "He slept on the couch."),
        "outdoors": ("They walked through the jungle.", "She swam in the sea."),
    },
    "mood": {
        "good": ("We won the game.", "It is my birthday today."),
        "bad": ("My dog is ill.", "Our house burned down."),
    },
}
_WORKED_LABELS = {"language": ("Danish", "Hindi"), "content": ("table", "chair")}
_MIXED_EXAMPLES = (("content", "table"), ("gender", "woman"), ("content", "horse"), ("language", "Danish"))
_MIXED_QUESTIONS = {"table": "Which word is spoken, chair or table?", "horse": "Which word is spoken, horse or door?"}
_FILLERS = ("I will be there soon.", "What happened to the old house?", "Bring me the table, please.", "We never knew.")


def prompt_end(example: Example, reasoning: str | None = None, *, own_line: bool = False) -> str:
    """The end of the prompt, after `worked_examples(example)`: the clip in words, with its question if that differs.

    Args:
        reasoning: a reasoning trace about the clip. It stands between the clip's words and the answer.
        own_line: for an answer that does not begin with a space; without it the prompt ends in front of that space.
    """
    words = describe(example) if _asks_the_same(example) else _asked(example)
    words = f"{words}\nReasoning: {' '.join(reasoning.split())}" if reasoning else words
    return f"{words} ->\n" if own_line else f"{words} ->"


def _asks_the_same(example: Example) -> bool:
    task = TASKS.get(example.task)
    return task is not None and example.question == task.question


def _asked(example: Example) -> str:
    question = f"Question: {' '.join(example.question.split())}\n{describe(example)}"
    return f"{' '.join(example.system.split())}\n{question}" if example.system.strip() else question


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
