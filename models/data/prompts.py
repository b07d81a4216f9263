"""What the model reads: the prompt of an example, and the fixed sentences of the built-in tasks.

The text stands BEFORE the audio in every prompt. So the KV cache of the text does not depend on the clip or on the
connector's weights, and a frozen language model computes it once for the whole training run.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.data.manifest import AUDIO_PLACEHOLDER, Example

CATEGORIES = ("content", "semantic", "paralinguistic", "degradation", "speaker")


@dataclass(frozen=True, kw_only=True)
class Task:
    """The wording of one built-in task; the label takes the place of `{}` in a sentence.

    Args:
        name: value of `Example.task`.
        question: the same words for every clip, so that only sound and context can decide the answer.
        statement: the answer as a sentence.
        hint: the context that names a label, which may agree with the sound or contradict it.
        category: one of CATEGORIES, which are Dynamic-SUPERB's.
        choices: the labels.
    """

    name: str
    question: str
    statement: str
    hint: str
    category: str
    choices: tuple[str, ...] = ()


_TASKS = (
    Task(
        name="gender",
        question="Is the speaker a man or a woman?",
        statement="The speaker is a {}.",
        hint="Note: the speaker is a {}.",
        category="speaker",
        choices=("man", "woman"),
    ),
    Task(
        name="speaking_rate",
        question="Does the speaker talk slowly or quickly?",
        statement="The speaker talks {}.",
        hint="Note: the speaker talks {}.",
        category="paralinguistic",
        choices=("slowly", "quickly"),
    ),
    Task(
        name="accent",
        question="Is the accent American, British, Scottish or Caribbean?",
        statement="The accent is {}.",
        hint="Note: the accent is {}.",
        category="speaker",
        choices=("American", "British", "Scottish", "Caribbean"),
    ),
    Task(
        name="language",
        question="Which language is spoken?",
        statement="The language is {}.",
        hint="Note: the language is {}.",
        category="speaker",
    ),
    Task(
        name="noise",
        question="Is the recording clean or noisy?",
        statement="The recording is {}.",
        hint="Note: the recording is {}.",
        category="degradation",
        choices=("clean", "noisy"),
    ),
    Task(
        name="content",
        question="Which word is spoken?",
        statement="The word is {}.",
        hint="Note: the word is {}.",
        category="content",
    ),
    Task(
        name="place",
        question="Does it happen indoors or outdoors?",
        statement="It happens {}.",
        hint="Note: it happens {}.",
        category="semantic",
        choices=("indoors", "outdoors"),
    ),
    Task(
        name="mood",
        question="Is the news good or bad?",
        statement="The news is {}.",
        hint="Note: the news is {}.",
        category="semantic",
        choices=("good", "bad"),
    ),
    Task(
        name="keyword",
        question="Is the word present or absent?",
        statement="The word is {}.",
        hint="Note: the word is {}.",
        category="content",
        choices=("present", "absent"),
    ),
    Task(
        name="sentence_type",
        question="Is it a question or a statement?",
        statement="It is a {}.",
        hint="Note: it is a {}.",
        category="semantic",
        choices=("question", "statement"),
    ),
    Task(
        name="delivery",
        question="Is the delivery lively or flat?",
        statement="The delivery is {}.",
        hint="Note: the delivery is {}.",
        category="paralinguistic",
        choices=("lively", "flat"),
    ),
    Task(
        name="bandwidth",
        question="Is the bandwidth narrow or wide?",
        statement="The bandwidth is {}.",
        hint="Note: the bandwidth is {}.",
        category="degradation",
        choices=("narrow", "wide"),
    ),
    Task(
        name="cry",
        question="Is the voice spoken or wordless?",
        statement="The voice is {}.",
        hint="Note: the voice is {}.",
        category="paralinguistic",
        choices=("spoken", "wordless"),
    ),
    Task(
        name="reverberation",
        question="Is the recording dry or echoing?",
        statement="The recording is {}.",
        hint="Note: the recording is {}.",
        category="degradation",
        choices=("dry", "echoing"),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def render_prompt(example: Example) -> str:
    """The prompt of `example`, up to and including "Answer:", with exactly one AUDIO_PLACEHOLDER.

    Every field stands on one line: white space and line breaks inside it become single spaces, so that no field can look
    like another. A system turn stands before the context, on its line; without both there is no such line. A target follows as
    `" " + target`.
    """
    lines = [f"Transcript: {_one_line(example.transcription)}".rstrip()]
    if context := _one_line(f"{example.system} {example.context}"):
        lines.append(context)
    lines += [f"Question: {_one_line(example.question)}", AUDIO_PLACEHOLDER, "Answer:"]
    return "\n".join(lines)


def chat_text(example: Example) -> str:
    """What a user of a chat says beside the clip: the transcript and the context, if there are any, and the question.

    Every field stands on one line, as in `render_prompt`. The clip, the roles and the system turn are the chat template's.
    """
    transcript, context = _one_line(example.transcription), _one_line(example.context)
    lines = [f"Transcript: {transcript}"] if transcript else []
    lines += [context] if context else []
    return "\n".join([*lines, _one_line(example.question)])


def target_template(example: Example, answer: str) -> str:
    """`answer` as a full sentence, in the wording of the example's task ("The speaker is a woman.").

    For a task that is not built in it is "The answer is {answer}.". No full stop follows an answer that ends in one, or in
    another end of a sentence.

    Raises:
        ValueError: `answer` is empty, or not one of the example's choices.
    """
    answer = _one_line(answer)
    if not answer:
        raise ValueError("answer: expected a label, got an empty string")
    if example.choices and answer not in map(_one_line, example.choices):
        raise ValueError(f"answer: expected one of {list(example.choices)}, got {answer!r}")
    task = TASKS.get(example.task)
    sentence = (task.statement if task else "The answer is {}.").format(answer)
    return sentence.removesuffix(".") if answer.endswith((".", "!", "?", "。", "！", "？")) else sentence


def hint_for(task: str, label: str) -> str:
    """The context sentence that claims `label` ("Note: the speaker is a man.").

    Raises:
        ValueError: `task` is not built in.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {sorted(TASKS)}, got {task!r}")
    return TASKS[task].hint.format(label)


def shorten_transcript(text: str, *, max_words: int = 12, max_characters: int = 48) -> str:
    """The first words of `text`, at most `max_words` and `max_characters`, so that prompts stay short.

    The first word is always kept; it is cut to `max_characters`.
    """
    kept: list[str] = []
    length = 0
    for word in text.split()[:max_words]:
        length += len(word) + bool(kept)
        if kept and length > max_characters:
            break
        kept.append(word[:max_characters])
    return " ".join(kept)


def _one_line(text: str) -> str:
    return " ".join(text.split())
