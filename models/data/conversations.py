"""Rows of a conversation about one clip, as ms-swift and LLaMA-Factory share them.

    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<audio>Who speaks?"},
                  {"role": "assistant", "content": "A woman."}], "audios": ["clips/a.wav"]}

Every answer becomes an example. The system turn stays one, its context holds the earlier turns, and its target and answer are the
assistant's words. Other spellings of the same are read too:

- "conversations" with "from" and "value" (human, gpt); NeMo's conversations, where a turn of type "audio" is the clip.
- content as a list of parts: {"type": "text", "text": ...}, {"type": "audio", "audio": path}.
- "query" and "response", or "instruction", "input" and "output"; "history" as pairs; "system" beside them.
- "audios" or "audio": a path, an object with a path, or a list of one.

Beside one answer to learn may stand "choices" (or "options"), and "answer", which is the label then. Without "answer" the label
is the choice that the assistant's words name.

An answer with "loss": false is part of the context only. The place of a clip in its turn is lost: clips stand before the words,
in their order. Of several clips each belongs to its <audio>, and a question is about those of its turn and of earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.data.answers import named_choices
from models.data.example import Example
from models.data.row_values import (
    MARK,
    Defaults,
    as_list,
    as_text,
    attributes,
    first_of,
    listed_choices,
    split_name,
    text_of,
    text_or_none,
    without_clips,
)

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass
class _Turn:
    role: str
    text: str
    clips: list[tuple[Any, str]]  # each with its key, for messages
    taught: bool = True  # an answer whose "loss" is not false
    paths: list[str] = field(default_factory=list)


def from_messages(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    """The examples of a row, one for each answer; see the module's docstring."""
    turns = _turns(row)
    asked = [turn for turn in turns if turn.role != "system"]
    if not asked or asked[0].role != "user":
        raise ValueError("messages: expected a turn of the user first")
    _bring_clips(row, turns, asked[0])
    asked = _joined(asked)
    for turn in asked:
        turn.paths = [defaults.clip(clip, name) for clip, name in turn.clips]
    clips = [path for turn in asked for path in turn.paths]
    system = "\n".join(filter(None, (MARK.sub(" ", turn.text).strip() for turn in turns if turn.role == "system")))
    context: list[str] = []
    if asked[-1].role == "user":
        asked.append(_Turn("assistant", text_of(row, "response", "target"), []))
        unanswered = not asked[-1].text
    else:
        unanswered = False
    pairs = list(zip(asked[::2], asked[1::2], strict=True))
    taught = sum(answer.taught for _, answer in pairs)
    if not taught:
        raise ValueError('messages: expected an answer to learn, got "loss": false in each')
    offered = first_of(row, ("choices", "options")) or ()
    choices, given = listed_choices(offered, text_of(row, "answer") or None)
    if taught > 1 and (choices or given is not None):
        name = "choices" if choices else "answer"
        raise ValueError(f"{name}: expected one answer to learn in messages beside it, got {taught}")
    base = defaults.name(row, clips[0] if clips else None)
    heard: list[str] = []
    for number, (question, answer) in enumerate(pairs, 1):
        heard += question.paths
        words = without_clips(question.text, clips) if clips else question.text
        words = MARK.sub(" ", words).strip()
        open_end = unanswered and number == len(pairs)
        if not answer.text.strip() and not open_end:
            raise ValueError(f"messages: expected an answer in turn {2 * number}, got an empty one")
        if answer.taught:
            target = given if open_end else answer.text
            label = target if given is None else given
            if choices and given is None and target is not None:
                label = _label(listed_choices(offered, target)[1], choices)
            yield Example(
                id=base if len(pairs) == 1 else f"{base}/turn-{number}",
                audio=heard[0] if heard else None,
                more_audio=tuple(heard[1:]),
                transcription=text_of(row, "transcription"),
                metadata=attributes(row),
                task=text_of(row, "task", "dataset"),
                system=system,
                context="\n".join(context),
                question=words,
                choices=choices,
                answer=label,
                target=target,
                target_source=None if target is None else "human",
                split=split_name(row.get("split", defaults.split)),
            )
        context += [f"User: {words}", f"Assistant: {answer.text}"]


def _label(text: str, choices: tuple[str, ...]) -> str:
    """The choice that an answer is, or the only one that its words name."""
    if text in choices:
        return text
    named = named_choices(text, tuple(dict.fromkeys(choices)))
    if len(named) != 1:
        got = f"{text[:80]!r}, which names {' and '.join(map(repr, named)) or 'none'}"
        raise ValueError(f"choices: expected an answer that names one of {list(choices)}, or answer beside them, got {got}")
    return named[0]


def _turns(row: Mapping[str, Any]) -> list[_Turn]:
    messages = row.get("messages", row.get("conversations"))
    turns = [_Turn("system", text_of(row, "system"), [])]
    for other in ("images", "videos", "image", "video"):
        if row.get(other):
            raise ValueError(f"{other}: expected none, got some; only text and audio are read")
    if messages is None:
        history = row.get("history", [])
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise TypeError("history: expected a list of pairs, each of a question and an answer")
        for pair in history:
            turns += [_Turn(role, as_text(text, "history"), []) for role, text in zip(("user", "assistant"), pair, strict=True)]
        question = text_or_none(row, "query")
        if question is None and first_of(row, ("instruction", "input")) is None:
            raise ValueError("messages: expected these, or conversations, query or instruction, got none")
        if question is None:
            question = "\n".join(filter(None, (text_of(row, key) for key in ("instruction", "input"))))
        turns.append(_Turn("user", question, []))
        if answer := text_of(row, "output"):
            turns.append(_Turn("assistant", answer, []))
        return turns
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError("messages: expected a list of objects")
    for message in messages:
        given = first_of(message, ("role", "from"))
        role = _ROLES.get(str(given).lower())
        if role is None:
            raise ValueError(f"messages: expected the role system, user or assistant, got {given!r}")
        content = first_of(message, ("content", "value"))
        parts = content if isinstance(content, list) else [content]
        if message.get("type") == "audio":  # NeMo's conversations
            parts = [{"type": "audio", "audio": content}]
        texts, clips = [], []
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, Mapping) and part.get("type") == "text":
                texts.append(as_text(part.get("text"), "messages: text"))
            elif isinstance(part, Mapping) and str(part.get("type")) in ("audio", "audio_url"):
                clips.append((part, "messages"))
            else:
                kind = part.get("type") if isinstance(part, Mapping) else "null" if part is None else type(part).__name__
                raise TypeError(f"messages: expected text or audio in a turn, got {kind}")
        taught = True if message.get("loss") is None else message["loss"]
        if taught not in (0, 1):
            raise ValueError(f"messages: expected loss to be true or false, got {taught!r}")
        turns.append(_Turn(role, "\n".join(texts), clips, bool(taught)))
    return turns


def _joined(turns: list[_Turn]) -> list[_Turn]:
    """Turns of one role that follow each other, as one."""
    joined: list[_Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role:
            last = joined[-1]
            last.text = "\n".join(filter(None, (last.text, turn.text)))
            last.clips += turn.clips
            last.taught = last.taught and turn.taught
        else:
            joined.append(turn)
    return joined


def _bring_clips(row: Mapping[str, Any], turns: list[_Turn], first: _Turn) -> None:
    """Gives the row's clips to the turns that bring them. Those of a system turn are heard from the `first` question on."""
    key = next((key for key in ("audios", "audio") if as_list(row.get(key))), "audios")
    named = as_list(row.get(key))
    inside = sum(len(turn.clips) for turn in turns)
    if named and inside:
        raise ValueError(f"{key}: expected clips there or inside the turns, got {len(named)} and {inside}")
    marked = [turn for turn in turns for _ in MARK.findall(turn.text)]
    if len(marked) not in (len(named) + inside, 0):
        raise ValueError(f"{key}: expected one clip for each <audio>, got {len(named) + inside} for {len(marked)}")
    if named:
        for turn, clip in zip(marked or [first] * len(named), named, strict=True):
            turn.clips.append((clip, key))
    if any(turn.clips for turn in turns if turn.role == "assistant"):
        raise ValueError("messages: expected <audio> in a turn of the user, got it in an answer")
    first.clips[:0] = [clip for turn in turns if turn.role == "system" for clip in turn.clips]
