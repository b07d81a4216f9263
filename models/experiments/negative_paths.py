"""Other sounds on the teacher's two paths: what it says of another sound is taken away, or it hears better than its student.

The contrast takes away what the teacher says of

    swapped     the clip of another question of the same task, to which the teacher gave another answer
    reversed    the same clip backwards
    narrow      the same clip in a telephone's band
    flat        the same words, spoken by espeak without any melody, in as much noise

Without any sound the teacher prefers some answers, and the contrast turns that preference around. A swapped clip has a sound of
its own. So it may cancel the preference, and leave true hints alone where nothing can be heard.

The flat voice keeps the words and the noise, and has another melody, rate and voice. espeak knows no voice without a sex. So each
clip gets a voice of a man or a woman at random: in the mean neither is taken away, but each clip has an offset of its own.

On the first path the teacher hears the clip that its student hears, or the clip of the same name in another folder: the same
recording without the noise, say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.corpora.hearing import Hearing

NEGATIVE_PATHS = ("swapped", "reversed", "narrow", "flat")
Rows = Callable[[Sequence[Any]], torch.Tensor]
_BATCH_EXAMPLES = 32


class Backwards(Hearing):
    """Every clip backwards."""

    def sound(self, samples: np.ndarray, clip: str, **_: Any) -> np.ndarray:
        return np.ascontiguousarray(samples[::-1])


def other_clips(examples: Sequence[Any], seed: int) -> dict[str, Any]:
    """Id -> a random example of the same task with another target, whose clip is heard in its place.

    If the teacher gave one answer to a whole task, it is any other clip of the task.

    Raises:
        ValueError: a task has one clip.
    """
    draw, chosen = random.Random(seed), {}
    for example in examples:
        same_task = [e for e in examples if e.task == example.task and e.audio != example.audio]
        others = [e for e in same_task if e.target != example.target] or same_task
        if not others:
            raise ValueError(f"examples: expected two clips of the task {example.task!r} or more, got one")
        chosen[example.id] = draw.choice(others)
    return chosen


def speak_flat(examples: Sequence[Any], folder: Path, *, seed: int, max_seconds: float) -> None:
    """Write each clip's words, spoken flat, into `folder`, under the name of the clip and with noise of the same level.

    A clip that is there already is made again with the same bytes.

    Args:
        examples: with the words in their metadata "text", or else in their transcription.
        seed: of voices and noises.
        max_seconds: longer speech is cut, as the clips are.

    Raises:
        EspeakError: espeak-ng is missing, or cannot speak a text.
    """
    from models.corpora.degrade import prepare_clip
    from models.corpora.plans.base import any_voice
    from models.corpora.sources.espeak import Utterance, synthesise_all
    from models.data.audio import encode_audio

    clips = {e.audio: e for e in examples}
    draws = {name: np.random.default_rng([seed, number]) for number, name in enumerate(sorted(clips))}
    voices = any_voice("train")
    words = [
        Utterance(
            text=e.metadata.get("text") or e.transcription, voice=f"en-us+{voices[int(draws[name].integers(len(voices)))]}",
            pitch_range=0,
        )
        for name, e in clips.items()
    ]  # fmt: skip
    for (name, e), (samples, rate_hz) in zip(clips.items(), synthesise_all(words), strict=True):
        sound = prepare_clip(samples, rate_hz, snr_db=e.metadata.get("snr_db"), rng=draws[name], max_seconds=max_seconds)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_audio(sound))


def rows_in(folder: Path, model: Any, examples: Sequence[Any], *, hears: Hearing | None = None) -> Rows:
    """What the teacher hears of the clips of the same names in `folder`: a function like `store.rows`.

    Raises:
        FeatureError: a clip is not there or cannot be read.
    """
    from models.speech_lm.features import extract_features

    options: dict[str, Any] = {} if hears is None else {"hears": hears}
    return extract_features(examples, model.encode_audio, audio_root=folder, max_bad_fraction=0.0, **options)[0].rows


def negative_rows(
    kind: str, model: Any, store: Any, examples: Sequence[Any], *, audio_root: Path, seed: int, made: Path,
    max_seconds: float = 4.0,
) -> Rows:  # fmt: skip
    """What the teacher hears on the negative path of `examples`: a function like `store.rows`.

    Args:
        kind: one of NEGATIVE_PATHS.
        store: the features of the clips as they are.
        made: folder for clips that are made for the path.
        max_seconds: of such a clip.
    """
    if kind == "swapped":
        others = other_clips(examples, seed)
        return lambda chosen: store.rows([others[e.id] for e in chosen])
    if kind not in NEGATIVE_PATHS:
        raise ValueError(f"kind: expected one of {', '.join(NEGATIVE_PATHS)}, got {kind!r}")
    if kind == "flat":
        speak_flat(examples, made, seed=seed, max_seconds=max_seconds)
        return rows_in(made, model, examples)
    return rows_in(audio_root, model, examples, hears=Backwards() if kind == "reversed" else Hearing(band="narrow"))


@torch.no_grad()
def write_contrast_cache(
    folder: Path, teacher: Path, model: Any, store: Any, extra: dict[str, Any], examples: Sequence[Any],
    negative: Rows | None = None, *, positive: Rows | None = None,
) -> None:  # fmt: skip
    """Like `models.experiments.shared_steps.write_cache`, with other sounds than the student's.

    A training cannot tell this cache from one with the student's sound and silence. So it stays in the folder of its stage.

    Args:
        store: what the student hears.
        negative: the sound on the path that is subtracted; None = silence.
        positive: the sound on the other path; None = that of the student.
    """
    from kdkernels.contrast_cache import ContrastCache
    from kdkernels.teacher import DualPathTeacher, MarkAbsent
    from models.backbones.causal_lm import read_head
    from models.speech_lm.collation import crop_to_targets
    from models.training.cache_identity import sample_content, teacher_fingerprint

    head = read_head(model.requires_grad_(False))
    silence = MarkAbsent() if negative is None else None
    listener, collate = DualPathTeacher(model, negative=silence, head=head), model.make_collator()
    writer = ContrastCache.writer(
        folder, fingerprint=teacher_fingerprint(teacher), hidden_size=head.weight.shape[1], dtype=torch.float32
    )  # fmt: skip
    with writer:
        for start in range(0, len(examples), _BATCH_EXAMPLES):
            chosen = examples[start : start + _BATCH_EXAMPLES]
            states = []
            for rows in (positive or store.rows, *([] if negative is None else [negative])):
                batch = crop_to_targets(collate(chosen, rows(chosen))).to(model.device)
                said = listener({**batch.model_inputs(), **extra}, batch.target_index)
                states += [said.audio_hidden, *([said.text_hidden] if negative is None else [])]
            for row, (example, heard) in enumerate(zip(chosen, store.rows(chosen), strict=True)):
                here = (batch.target_row == row).nonzero()[:, 0]
                if example.id not in writer:
                    own = [hidden[here] for hidden in states]
                    writer.add(example.id, *own, batch.target[here], content=sample_content(example, heard))
