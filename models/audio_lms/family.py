"""What one family of audio LMs has of its own, and how a question and its clips become the model's inputs.

A `Family` is data: names of classes, inputs and modules. The functions that read it work for every family whose processor takes
`text` with audio placeholders and `audio`, which is nearly every one of transformers; the others replace `encode`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels.paths import MaskFeatures


class AudioLMError(RuntimeError):
    """An audio LM is missing, unusable, or of a kind that this project cannot run; the message says what is missing."""


@dataclass(frozen=True)
class Turn:
    """What a user says: words, and clips that are heard with them, each (samples,) float32 at the processor's rate.

    system: what a system turn says before it.
    """

    text: str
    clips: tuple[np.ndarray, ...] = ()
    system: str = ""

    @property
    def whole_text(self) -> str:
        """The words with those of the system turn before them, for a chat that has no such turn."""
        return f"{self.system}\n{self.text}" if self.system else self.text


@dataclass(frozen=True)
class Encoded:
    """Turns as model inputs.

    Attributes:
        rows: token ids of each prompt, placeholders expanded, without padding.
        features: the model's audio inputs, for all clips of all turns in their order; empty without a clip.
        entries: how many entries of each input belong to each row. It is one a clip, or one a window of a long clip.
    """

    rows: list[list[int]]
    features: dict[str, Tensor]
    entries: list[int]


@dataclass(frozen=True)
class Family:
    """One family of audio LMs.

    Attributes:
        name: for messages.
        model_types: `config.model_type` of its checkpoints.
        model_class: the class of transformers that answers in text.
        features: names of the inputs that hold the sound.
        negative_value: what they hold on the path without the audio. Zero is what CAAD's authors fill log-mel features with. The
            length, the placeholders and the words stay, so both paths are rows of one batch.
        language_model: modules of the language model, a regular expression for the beginning of their names.
        lora: modules that a LoRA goes on, a regular expression for their whole names.
        connector: modules between encoder and language model, as `language_model`.
        mask: the input that says which frames of the features are there, (E, T), if the processor omits it for a single clip.
        tokens_per_second: placeholders in the prompt for a second of sound, with the settings of the published checkpoints.
        window_seconds: the encoder reads clips in whole windows of this length; 0 = as long as they are.
        hears_seconds: of a clip; the processors of the published checkpoints cut off the rest. None = all of it. What a loaded
            processor cuts off is in `heard_seconds`.
        max_clips: clips that one turn may have; None = any number.
        audio_first: the clips stand before the words.
        plain_tokenizer: its tokenizer never reads special tokens out of text, and has no option that says so.
        load_processor: folder -> processor; None = AutoProcessor.
        encode: (family, processor, turn) -> token ids and audio inputs; None = `encode_turn`.
        check: called with the folder of a checkpoint before it is loaded; raises AudioLMError where it cannot be used.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    features: tuple[str, ...] = ("input_features",)
    negative_value: float = 0.0
    language_model: str = r"(model\.language_model|lm_head)\b"
    lora: str = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    connector: str = r"model\.multi_modal_projector\b"
    mask: str | None = None
    tokens_per_second: float = 25.0
    window_seconds: float = 0.0
    hears_seconds: float | None = None
    max_clips: int | None = None
    audio_first: bool = True
    plain_tokenizer: bool = False
    load_processor: Callable[[str], Any] | None = None
    encode: Callable[[Family, Any, Turn], tuple[list[int], dict[str, Tensor]]] | None = None
    check: Callable[[Any], None] | None = None

    @property
    def negative(self) -> MaskFeatures:
        """The inputs of the path without the audio, from those of the path with it."""
        return MaskFeatures(*self.features, value=self.negative_value)

    def heard_seconds(self, processor: Any) -> float | None:
        """Seconds of a clip that this processor lets through; None = all of it. `hears_seconds`, where it does not say."""
        if self.hears_seconds is None:
            return None
        extractor = getattr(processor, "feature_extractor", None)
        window, longest = getattr(extractor, "chunk_length", None), getattr(processor, "max_audio_len", None)
        if not window:
            return self.hears_seconds
        return float(longest // window * window if longest else window)  # of several windows only whole ones are read

    def check_clips(self, count: int, row: str = "") -> None:
        """ValueError for more clips than the family hears in a turn; `row` names the turn's row in the message."""
        if self.max_clips is not None and count > self.max_clips:
            raise ValueError(f"{row}clips: expected at most {self.max_clips} a turn with {self.name}, got {count}")

    def encoded(self, processor: Any, turns: Sequence[Turn]) -> Encoded:
        """Turns as model inputs. Each turn goes through the processor by itself, so it does not depend on its neighbours.

        Raises:
            ValueError: more clips in a turn than the family can hear, or a processor that does not make the family's features.
        """
        rows, made, entries = [], [], []
        known: dict[Any, Any] = {}  # the choices of a question are rows with one prompt and one clip
        for turn in turns:
            self.check_clips(len(turn.clips))
            key = (turn.system, turn.text, *map(id, turn.clips))
            if key not in known:
                known[key] = (self.encode or encode_turn)(self, processor, turn)
            ids, features = known[key]
            missing = [name for name in self.features if name not in features] if turn.clips else []
            if missing:
                raise ValueError(f"processor: expected it to make {missing} for {self.name}, got {sorted(features)}")
            rows.append(ids)
            made += [features] if turn.clips else []
            entries.append(len(features[self.features[0]]) if turn.clips else 0)
        names = made[0] if made else ()
        return Encoded(rows, {name: _padded_cat([features[name] for features in made]) for name in names}, entries)


def encode_turn(family: Family, processor: Any, turn: Turn) -> tuple[list[int], dict[str, Tensor]]:
    """Token ids and audio inputs of one turn: the processor's chat template, its tokenizer and its feature extractor."""
    text = prompt_text(family, processor, turn)
    if not turn.clips:
        return list(tokenizer_of(processor)(text, add_special_tokens=False).input_ids), {}
    made = processor(
        text=[text],
        audio=list(turn.clips),
        text_kwargs={"add_special_tokens": False},
        audio_kwargs={"sampling_rate": sampling_rate(processor)},
        return_tensors="pt",
    )
    ids = made.pop("input_ids")
    features = {name: torch.as_tensor(x) for name, x in made.items() if name != "attention_mask"}
    if family.mask is not None and family.mask not in features:
        features[family.mask] = torch.ones(features[family.features[0]].shape[:2], dtype=torch.bool)
    return ids[0].tolist(), features


def _padded_cat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after another along their first dimension, the others padded at their ends with zeros."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    made = parts[0].new_zeros(sum(map(len, parts)), *shape)
    start = 0
    for part in parts:
        made[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return made


def prompt_text(family: Family, processor: Any, turn: Turn) -> str:
    """The turn in the words of the chat template, up to where the answer begins; one placeholder a clip.

    The system turn's words stand before the user's where the template has no such turn: it raises an error, or leaves them out.
    """
    clips = [{"type": "audio", "audio": "clip"} for _ in turn.clips]

    def user(text: str) -> dict[str, Any]:
        words = [{"type": "text", "text": plain_text(tokenizer_of(processor), text)}]
        return {"role": "user", "content": clips + words if family.audio_first else words + clips}

    def rendered(*chat: dict[str, Any]) -> str:
        return processor.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)

    system = plain_text(tokenizer_of(processor), turn.system).strip()
    # Text first: a template that wants parts loses it, but one that wants text would write the parts as Python does.
    for content in (system, [{"type": "text", "text": system}]) if system else ():
        try:
            made = rendered({"role": "system", "content": content}, user(turn.text))
        except Exception:  # a template may refuse such a chat, each with an exception of its own
            continue
        if made.count(system) > rendered(user(turn.text)).count(system):  # the user may say the same
            return made
    return rendered(user(turn.whole_text))


def plain_text(tokenizer: Any, text: str) -> str:
    """`text` with a space inside whatever the tokenizer would read as a special token, so that data cannot end a turn."""
    for token in tokenizer.get_added_vocab():
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def answer_end(processor: Any) -> int:
    """The id that ends an answer: the first special token that the chat template puts behind one, or the end of text."""
    tokenizer = tokenizer_of(processor)
    say = "answer"
    chat = [{"role": who, "content": [{"type": "text", "text": say}]} for who in ("user", "assistant")]
    try:
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        _, _, behind = processor.apply_chat_template(chat, tokenize=False).rpartition(say)
        found = [token for token in tokenizer(behind, add_special_tokens=False).input_ids if token in special]
    except Exception:  # a template may refuse such a chat, each with an exception of its own
        found = []
    end = found[0] if found else tokenizer.eos_token_id
    if end is None:
        raise AudioLMError("tokenizer: expected a token that ends an answer, got neither one in the chat template nor eos_token")
    return end


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor."""
    return processor.tokenizer


def sampling_rate(processor: Any) -> int:
    """Samples a second that the processor's feature extractor expects."""
    for name in ("feature_extractor", "audio_processor"):
        if hasattr(processor, name):
            return getattr(getattr(processor, name), "sampling_rate", 16_000)
    raise AudioLMError(f"processor: expected a feature extractor in {type(processor).__name__}, got none; it hears no audio")


def matches(pattern: str, name: str) -> bool:
    """Whether a module's name begins as `pattern` says; the prefix that PEFT puts before names does not count."""
    return re.match(pattern, name.removeprefix("base_model.model.").replace(".base_layer", "")) is not None
