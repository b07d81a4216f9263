"""The two kinds of models that hear: this project's SpeechLM, and any audio LM of transformers (models/audio_lms).

A folder with speech_lm.json is a SpeechLM. Everything else is an audio LM: a hub id, a checkpoint's folder, or an adapter's.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from models.audio_lms.clips import ClipReader
from models.audio_lms.model import AudioLM, checkpoint_folders
from models.backbones.device import inference_dtype
from models.corpora.hearing import PLAIN, Hearing
from models.data.audio import AudioError, check_span, probe_audio
from models.io_utils import sha256_file
from models.speech_lm.collation import crop_to_targets

if TYPE_CHECKING:
    from models.data.manifest import Example


def is_speech_lm(spec: str | os.PathLike[str]) -> bool:
    """Whether `spec` is the folder of a SpeechLM, also of a damaged one without its speech_lm.json."""
    return any((Path(spec) / name).is_file() for name in ("speech_lm.json", "connector.safetensors"))


def load_listener(
    spec: str | os.PathLike[str],
    device: torch.device,
    *,
    dtype: str = "auto",
    attention: str | None = None,
    negative: str = "zeros",
) -> Any:
    """A SpeechLM or an `AudioLM`, frozen, in evaluation mode, on `device`.

    Args:
        dtype: one of models.audio_lms.settings.DTYPES, of an audio LM's weights; auto = bfloat16 where that is fast on
            `device`, else float32.
        attention, negative: of an audio LM, see `AudioLM.from_pretrained`.

    Raises:
        SpeechLMError, BackboneError, AudioLMError: it is not found or cannot be used; all are RuntimeErrors.
    """
    from models.speech_lm.model import SpeechLM

    if is_speech_lm(spec):
        model: Any = SpeechLM.from_pretrained(spec)
    else:
        model = AudioLM.from_pretrained(spec, dtype=torch_dtype(dtype, device), attention=attention, negative=negative)
    return model.requires_grad_(False).to(device).eval()


def find_listener(spec: str | os.PathLike[str]) -> list[Path]:
    """The folder of a model, fetched from the hub if need be; of an adapter its own and that of its base.

    Raises:
        AudioLMError: an audio LM is not found.
    """
    return [Path(spec)] if is_speech_lm(spec) else checkpoint_folders(spec)


def listener_hashes(spec: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of the settings, weights, tokenizer and chat template in a model's folder, by file; of an adapter its base's too.

    Raises:
        AudioLMError: an audio LM is not found.
    """
    found: dict[str, str] = {}
    for number, folder in enumerate(find_listener(spec)):
        parts = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".jinja"))
        found |= {("base/" * number) + str(p.relative_to(folder)): sha256_file(p) for p in parts}
    return found


def torch_dtype(name: str, device: torch.device, *, trains: bool = False) -> torch.dtype:
    """The dtype of that name; "auto" is float32 for weights that train, and else what is fast on `device`."""
    if name == "auto":
        return torch.float32 if trains else inference_dtype(device)
    return getattr(torch, name)


def open_clips(
    model: Any,
    examples: Sequence[Example],
    *,
    audio_root: str | Path,
    max_seconds: float,
    hears: Hearing = PLAIN,
    **options: Any,
) -> tuple[Any, list[Example]]:
    """What `model` hears of the examples, with `rows(examples)`; and the examples whose clips it can hear.

    For a SpeechLM it is a store of features, made now or read from disk: `options` are those of `clip_features`. An audio LM's
    clips are decoded batch by batch; of `options` it takes `max_cut_fraction` and `say`. `hears`: what is done to a clip before.

    Raises:
        FeatureError: see `clip_features`; an audio LM hears only the beginning of more clips than `max_cut_fraction`.
        ValueError: features for an audio LM, which has an encoder of its own in each forward; an example with more clips than the
            model can hear in a turn.
    """
    from models.speech_lm.features import check_window, clip_features

    if not isinstance(model, AudioLM):
        return clip_features(model, examples, audio_root=audio_root, max_seconds=max_seconds, hears=hears, **options)
    if options.get("features") is not None:
        raise ValueError(f"features: expected none with an audio LM of transformers, got {options['features']}")
    for example in examples:
        model.family.check_clips(len(example.clips), f"example {example.id!r}: ")
    window = model.family.heard_seconds(model.processor)
    if window is not None and max_seconds > window:
        lengths = clip_lengths(examples, audio_root)
        check_window(
            lengths, window, max_cut_fraction=options.get("max_cut_fraction", 1.0), say=options.get("say", tqdm.write)
        )
    reader = ClipReader(audio_root, sampling_rate=model.sampling_rate, max_seconds=max_seconds, hears=hears)
    return reader, list(examples)


def clip_lengths(examples: Sequence[Example], audio_root: str | Path) -> list[float]:
    """Seconds of each distinct clip, by its header; 0 for one that cannot be read, which is named where it is heard."""
    lengths = []
    for audio, start, end in dict.fromkeys(clip for example in examples for clip in example.clips):
        try:
            begin, stop = check_span(
                probe_audio(Path(audio_root) / audio), start_seconds=start, end_seconds=end, max_seconds=math.inf
            )
        except AudioError:
            begin = stop = 0.0
        lengths.append(stop - begin)
    return lengths


def unheard_batch(model: Any, examples: Sequence[Example]) -> Any:
    """The path without the audio as a batch of its own, where it has other tokens than the path with it; else None."""
    if not getattr(model, "is_absent", False):
        return None
    return crop_to_targets(model.make_collator()(examples, [None] * len(examples)))


def text_path(unheard: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of `kdkernels.DualPathTeacher` for such a batch; none for None."""
    if unheard is None:
        return {}
    unheard = unheard.to(device)
    return {"text_inputs": unheard.model_inputs(), "text_index": unheard.target_index}


@torch.no_grad()
def answer_ids(
    model: Any, batch: Any, *, max_new_tokens: int, alpha: float | None = None, **contrast: Any
) -> tuple[list[list[int]], set[int]]:
    """Free answers to a batch of prompts: greedy, or with `alpha` by the contrast of the paths with and without the audio.

    Args:
        model: a SpeechLM or an `AudioLM`.
        batch: of its collator, with rows that end with their prompt.
        contrast: other keywords of `kdkernels.contrastive_generate`; only with alpha.

    Returns:
        the new ids of each row, its end included; and the ids that end an answer. A row without one of these at its end was cut
        off after `max_new_tokens`.

    Raises:
        ValueError: a token would be chosen from logits that are NaN; the message names the example.
    """
    with _refusing_nan(model, batch.ids):
        return model.answer_ids(batch, max_new_tokens=max_new_tokens, alpha=alpha, **contrast), set(model.end_ids)


@contextlib.contextmanager
def _refusing_nan(model: Any, ids: Sequence[str]) -> Iterator[None]:
    """Inside, NaN in the LM head's output for the next token is a ValueError; the best of such logits would be any token."""

    def check(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> None:
        last = logits[:, -1] if logits.dim() == 3 else logits  # columns before may be padding
        bad = last.amax(-1).isnan()
        if bool(bad.any()):
            name = ids[int(bad.nonzero()[0]) % len(ids)]  # the rows without the audio stand behind those with it
            raise ValueError(f"example {name!r}: the model's logits are NaN; expected weights and features that are finite")

    handle = model.get_output_embeddings().register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
