"""Other negative paths than silence: what the contrast takes away is what the teacher says of another sound.

    swapped     the clip of another question of the same task, to which the teacher gave another answer
    reversed    the same clip backwards
    narrow      the same clip in a telephone's band

Without any sound the teacher prefers some answers, and the contrast turns that preference around. A swapped clip has a sound of
its own. So it may cancel the preference, and leave true hints alone where nothing can be heard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.corpora.hearing import Hearing

NEGATIVE_PATHS = ("swapped", "reversed", "narrow")
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


def negative_rows(
    kind: str, model: Any, store: Any, examples: Sequence[Any], *, audio_root: Path, seed: int
) -> Callable[[Sequence[Any]], torch.Tensor]:
    """What the teacher hears on the negative path of `examples`: a function like `store.rows`.

    Args:
        kind: one of NEGATIVE_PATHS.
        store: the features of the clips as they are.
    """
    if kind == "swapped":
        others = other_clips(examples, seed)
        return lambda chosen: store.rows([others[e.id] for e in chosen])
    if kind not in NEGATIVE_PATHS:
        raise ValueError(f"kind: expected one of {', '.join(NEGATIVE_PATHS)}, got {kind!r}")
    from models.speech_lm.features import extract_features

    hears = Backwards() if kind == "reversed" else Hearing(band="narrow")
    return extract_features(examples, model.encode_audio, audio_root=audio_root, hears=hears)[0].rows


@torch.no_grad()
def write_contrast_cache(
    folder: Path, teacher: Path, model: Any, store: Any, extra: dict[str, Any], examples: Sequence[Any],
    negative: Callable[[Sequence[Any]], torch.Tensor],
) -> None:  # fmt: skip
    """Like `models.experiments.shared_steps.write_cache`, with the sound of `negative` on the path that is subtracted.

    A training cannot tell this cache from one with silence. So it stays in the folder of its stage.
    """
    from kdkernels.contrast_cache import ContrastCache
    from kdkernels.teacher import DualPathTeacher
    from models.backbones.causal_lm import read_head
    from models.speech_lm.collation import crop_to_targets
    from models.training.cache_identity import sample_content, teacher_fingerprint

    head = read_head(model.requires_grad_(False))
    one_path, collate = DualPathTeacher(model, negative=None, head=head), model.make_collator()
    writer = ContrastCache.writer(
        folder, fingerprint=teacher_fingerprint(teacher), hidden_size=head.weight.shape[1], dtype=torch.float32
    )  # fmt: skip
    with writer:
        for start in range(0, len(examples), _BATCH_EXAMPLES):
            chosen = examples[start : start + _BATCH_EXAMPLES]
            states = []
            for features in (store.rows(chosen), negative(chosen)):
                batch = crop_to_targets(collate(chosen, features)).to(model.device)
                states.append(one_path({**batch.model_inputs(), **extra}, batch.target_index).audio_hidden)
            for row, (example, heard) in enumerate(zip(chosen, store.rows(chosen), strict=True)):
                here = (batch.target_row == row).nonzero()[:, 0]
                if example.id not in writer:
                    own = [hidden[here] for hidden in states]
                    writer.add(example.id, *own, batch.target[here], content=sample_content(example, heard))
