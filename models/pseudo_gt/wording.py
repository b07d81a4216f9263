"""What the text backbone reads: a clip in words, worked examples before it, and the end of the prompt.

Every character here is data. A change of the wording changes what the backbone writes; then WORDING_VERSION has to change too.
"""

from __future__ import annotations

from models.data.manifest import Example
from models.data.prompts import TASKS, target_template

# Changes whenever the backbone would read other words for the same example.
WORDING_VERSION = 1
# How each kind of metadata is told. What is not listed (file hashes, pools, names of speakers) is not told.
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
    "sentence_type": "Sentence: {}",
    "keyword": "Word in question: {}",
    "content": "Spoken word: {}",
    "age": "Age: {}",
}


def describe(example: Example) -> str:
    """What is known about a clip, in words: `[00:00-00:03] text (Gender: man, SNR: -3 dB)`.

    The times are those of the span, in minutes and seconds. The text is the whole transcript. The context is left out,
    because it may be false. Metadata that the wording does not name are left out too.
    """
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
    words = " ".join(str(example.metadata.get("text", example.transcription)).split())
    return f"{times}{words}" + (f" ({', '.join(facts)})" if facts else "")


def worked_examples(example: Example) -> str:
    """The beginning of the prompt: answered clips. All examples of a task share them if they ask the task's own question.

    The labels come in a palindrome (man, woman, woman, man), because small models follow the order of the labels and
    the last answer more than the metadata. With SmolLM2-135M this order and an arrow between metadata and answer raised
    the accepted part of the gender task from 0.33 (question before each clip, "Answer:" after it) to 1.00. With more
    examples it fell.
    """
    if _asks_the_same(example):
        task = TASKS[example.task]
        labels = (task.choices or _WORKED_LABELS[task.name])[:3]
        blocks = [f"Question: {task.question}"]
        shown = [(task, label, describe) for label in (*labels, *reversed(labels))]
    else:
        blocks = []
        shown = [(TASKS[name], label, _asked) for name, label in _MIXED_EXAMPLES]
    for number, (kind, label, in_words) in enumerate(shown):
        clip = Example(
            id="worked",
            audio=None,
            task=kind.name,
            question=_MIXED_QUESTIONS.get(label, kind.question),
            end_seconds=2.0 + number % 3,
            metadata={kind.name: label, "text": _worked_text(kind.name, label, number), "snr_db": 3 * number - 5},
        )
        blocks.append(f"{in_words(clip)} -> {target_template(clip, label)}")
    return "\n\n".join(blocks) + "\n\n"


def _worked_text(task: str, label: str, number: int) -> str:
    """What the clip of a worked example says: any sentence, or for some tasks one whose words have the label's meaning."""
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


def prompt_end(example: Example, reasoning: str | None = None) -> str:
    """The end of the prompt, after `worked_examples(example)`: the clip in words, with its question if that differs.

    Args:
        reasoning: a reasoning trace about the clip. It stands between the clip's words and the answer.
    """
    words = describe(example) if _asks_the_same(example) else _asked(example)
    return f"{words}\nReasoning: {' '.join(reasoning.split())} ->" if reasoning else f"{words} ->"


def _asks_the_same(example: Example) -> bool:
    task = TASKS.get(example.task)
    return task is not None and example.question == task.question


def _asked(example: Example) -> str:
    return f"Question: {' '.join(example.question.split())}\n{describe(example)}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
