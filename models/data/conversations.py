"""Rows of a conversation about one clip, as ms-swift and LLaMA-Factory share them.

    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<audio>Who speaks?"},
                  {"role": "assistant", "content": "A woman."}], "audios": ["clips/a.wav"]}

Every answer becomes an example. The system turn stays one, its context holds the earlier turns, and its target and answer are the
assistant's words. Other spellings of the same are read too:

- "conversations" with "from" and "value" (human, gpt); NeMo's conversations, where a turn of type "audio" is the clip.
- content as a list of parts: {"type": "text", "text": ...}, {"type": "audio", "audio": path}.
- "query" and "response", or "instruction", "input" and "output"; "history" as pairs; "system" beside them.
- "audios" or "audio": a path, an object with a path, or a list of one.

An answer with "loss": false is part of the context only. The place of a clip in its turn is lost: clips stand before the words,
in their order. Of several clips each belongs to its <audio>, and a question is about those of its turn and of earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from models.data.example import Example
from models.data.row_values import Defaults, attributes, split_name, without_clips

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_MARKER = re.compile(r"<audio>", re.IGNORECASE)
_CLIP_KEYS = ("path", "audio", "audio_filepath", "audio_url", "url")


@dataclass
class _Turn:
    role: str
    text: str
    clips: list[Any]
    taught: bool = True  # an answer whose "loss" is not false


def from_messages(row: Mapping[str, Any], defaults: Defaults) -> Iterator[Example]:
    """The examples of a row, one for each answer; see the module's docstring."""
    turns = _joined(_turns(row))
    clips, bringers = _clips(row, turns, defaults)
    system = "\n".join(turn.text for turn in turns if turn.role == "system" and turn.text)
    context: list[str] = []
    asked = [turn for turn in turns if turn.role != "system"]
    if not asked or asked[0].role != "user":
        raise ValueError("messages: expected a turn of the user first")
    if asked[-1].role == "user":
        asked.append(_Turn("assistant", str(row.get("response", row.get("target")) or ""), []))
        unanswered = not asked[-1].text
    else:
        unanswered = False
    pairs = list(zip(asked[::2], asked[1::2], strict=True))
    base = defaults.name(row, clips[0] if clips else None)
    heard: list[str | None] = []
    for number, (question, answer) in enumerate(pairs, 1):
        heard += [clip for clip, bringer in zip(clips, bringers, strict=True) if bringer is question]
        words = without_clips(question.text, clips) if clips else question.text
        words = _MARKER.sub(" ", words).strip()
        open_end = unanswered and number == len(pairs)
        if not answer.text.strip() and not open_end:
            raise ValueError(f"messages: expected an answer in turn {2 * number}, got an empty one")
        if answer.taught:
            target = None if open_end else answer.text
            yield Example(
                id=base if len(pairs) == 1 else f"{base}/turn-{number}",
                audio=heard[0] if heard else None,
                more_audio=tuple(heard[1:]),
                transcription=str(row.get("transcription") or ""),
                metadata=attributes(row),
                task=str(row.get("task", row.get("dataset", ""))),
                system=system,
                context="\n".join(context),
                question=words,
                answer=target,
                target=target,
                target_source=None if target is None else "human",
                split=split_name(row.get("split", defaults.split)),
            )
        context += [f"User: {words}", f"Assistant: {answer.text}"]


def _turns(row: Mapping[str, Any]) -> list[_Turn]:
    messages = row.get("messages", row.get("conversations"))
    turns = [_Turn("system", str(row["system"]), [])] if row.get("system") else []
    if messages is None:
        for old in row.get("history") or []:
            turns += [_Turn("user", str(old[0]), []), _Turn("assistant", str(old[1]), [])]
        question = row.get("query")
        if question is None:
            question = "\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        turns.append(_Turn("user", str(question), []))
        if answer := row.get("output"):
            turns.append(_Turn("assistant", str(answer), []))
        return turns
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError("messages: expected a list of objects")
    for message in messages:
        given = message.get("role", message.get("from"))
        role = _ROLES.get(str(given).lower())
        if role is None:
            raise ValueError(f"messages: expected the role system, user or assistant, got {given!r}")
        content = message.get("content", message.get("value"))
        parts = content if isinstance(content, list) else [content]
        if message.get("type") == "audio":  # NeMo's conversations
            parts = [{"type": "audio", "audio": content}]
        texts, clips = [], []
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, Mapping) and part.get("type") == "text":
                texts.append(str(part["text"]))
            elif isinstance(part, Mapping) and str(part.get("type")) in ("audio", "audio_url"):
                clips.append(_path_in(part))
            else:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise TypeError(f"messages: expected text or audio in a turn, got {kind}")
        for other in ("images", "videos", "image", "video"):
            if row.get(other):
                raise ValueError(f"{other}: expected none, got some; only text and audio are read")
        turns.append(_Turn(role, "\n".join(texts), clips, message.get("loss") is not False))
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


def _clips(
    row: Mapping[str, Any], turns: list[_Turn], defaults: Defaults
) -> tuple[list[str | None], list[_Turn | None]]:
    """The row's clips, and the turn that brings each of them."""
    named = row.get("audios", row.get("audio")) or []
    named = named if isinstance(named, list) else [named]
    inside = [(turn, clip) for turn in turns for clip in turn.clips]
    if named and inside:
        raise ValueError(f"audios: expected clips there or inside the turns, got {len(named)} and {len(inside)}")
    marked = [turn for turn in turns for _ in _MARKER.findall(turn.text)]
    if inside:
        clips = [defaults.audio(clip) for _, clip in inside]
        if len(clips) > 1 and None in clips:
            raise ValueError("messages: expected a path in each part of type audio, got none in one")
        return clips, [turn for turn, _ in inside]
    if len(marked) not in (len(named), 0):
        raise ValueError(f"audios: expected one clip for each <audio>, got {len(named)} for {len(marked)}")
    users = [turn for turn in turns if turn.role == "user"]
    first = users[0] if users else None
    bringers: list[_Turn | None] = [*marked] or [first] * len(named)
    for number, bringer in enumerate(bringers):
        if bringer is not None and bringer.role == "assistant":
            raise ValueError("messages: expected <audio> in a turn of the user, got it in an answer")
        if bringer is not None and bringer.role == "system":  # heard from the first question on
            bringer.text, bringers[number] = _MARKER.sub(" ", bringer.text).strip(), first
    return [defaults.audio(_path_in(clip)) for clip in named], bringers


def _path_in(value: Any) -> Any:
    """The path in an entry of "audios": itself, or under one of the names that it goes by."""
    if not isinstance(value, Mapping):
        return value
    if value.get("bytes") is not None:
        raise ValueError("audios: expected a path, got a clip's bytes")
    found = next((value[key] for key in _CLIP_KEYS if value.get(key) is not None), None)
    return _path_in(found) if isinstance(found, Mapping) else found
