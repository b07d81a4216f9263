"""Encoder features: the audio encoder is frozen, so each clip goes through it once.

    python -m models features MANIFEST --model SPEECH_LM_FOLDER --out FOLDER [--part 0/4]
    python -m models features MANIFEST --model SPEECH_LM_FOLDER --out features.safetensors

The result is a folder of shards, or one safetensors file: `features` (n, K, T, D) float16. Its metadata say what made them:
encoder, layers, frames and window. They also have each clip's key, its length and the SHA-256 of its file. A key is file and
span, so a clip that stands in three prompts is stored once. All commands go through `clip_features`. It reads such files row by
row, or encodes the clips now, and it refuses features of another encoder or of other sound.

A folder is filled by several processes together, and after a kill the same command continues. Features in a folder never are
in memory as a whole; those for one file are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models.corpora.hearing import PLAIN, Hearing, parse_hearing
from models.data.audio import MAX_SECONDS, SAMPLE_RATE_HZ
from models.data.manifest import Example
from models.data.problems import print_skipped
from models.data.readers import read_data
from models.speech_lm.clip_encoding import SHARD_MIB, extract_features, refuse_if_too_many, write_features
from models.speech_lm.clip_keys import Clip, FeatureError, clip_key
from models.speech_lm.collation import check_one_clip
from models.speech_lm.commands import features_parser
from models.speech_lm.feature_files import SHARD_PATTERN
from models.speech_lm.feature_store import ClipFeatures, FeatureStore, MappedFeatures, made_by
from models.speech_lm.resampling import resample_batch

__all__ = [
    "Clip",
    "ClipFeatures",
    "FeatureError",
    "FeatureStore",
    "MappedFeatures",
    "clip_features",
    "clip_key",
    "extract_features",
    "made_by",
    "write_features",
]

_LINES_SHOWN = 20
_CUT_TOLERANCE_SECONDS = 0.1  # an encoder's padding


def clip_features(
    model: Any,
    examples: Sequence[Example],
    *,
    audio_root: str | Path,
    features: str | Path | None = None,
    folder: str | Path | None = None,
    ranks: Any = None,
    batch_clips: int = 8,
    shard_mib: float = SHARD_MIB,
    max_seconds: float = MAX_SECONDS,
    max_bad_fraction: float = 0.05,
    max_cut_fraction: float = 1.0,
    progress_bar: bool = True,
    say: Callable[[str], None] = tqdm.write,
    hears: Hearing = PLAIN,
) -> tuple[ClipFeatures, list[Example]]:
    """The features of the examples' clips, read from disk or encoded now.

    Args:
        model: the SpeechLM that hears.
        audio_root: folder of the audio.
        features: file or folder of `python -m models features`; None encodes the clips.
        folder: where clips that are encoded now are written, in shards; what is there already is not encoded again. None keeps
            them in memory.
        ranks: with `folder`: the processes that share the work (`rank`, `size` and `gather(value)`). All of them make the call
            and see the folder. None = this process alone.
        batch_clips: clips that are read and encoded together.
        shard_mib: size of a shard.
        max_seconds: a longer clip cannot be read.
        max_bad_fraction: of the examples; more without features is an error.
        max_cut_fraction: of the clips; more that are longer than the model's window (`max_audio_seconds`) is an error.
        say: is told each example that is left out, and how many clips are cut.
        hears: what is done to a clip before the encoder hears it.

    Returns:
        the store, and the examples that have features or no clip.

    Raises:
        FeatureError: too many clips are missing or cut, or the features are of another encoder or of other sound.
        ValueError: an example has several clips.
    """
    check_one_clip(examples)
    reasons: dict[str, str] = {}
    store: ClipFeatures
    if features is not None:
        store = MappedFeatures(features)
        _check_held(store, model, examples, audio_root, features, ranks, say, hears)
    else:
        options: dict[str, Any] = {
            "audio_root": audio_root,
            "batch_clips": batch_clips,
            "max_seconds": max_seconds,
            "max_bad_fraction": max_bad_fraction,
            "hears": hears,
            "progress_bar": progress_bar,
        }
        if getattr(model, "resampler", "soxr") == "torchaudio":
            device = next(model.encoder.parameters()).device
            options["resample_together"] = functools.partial(resample_batch, to_hz=SAMPLE_RATE_HZ, device=device)
        if folder is None:
            store, problems = extract_features(examples, model.encode_audio, made_by=made_by(model, hears), **options)
        else:
            store, problems = _features_in(Path(folder), model, examples, ranks, shard_mib=shard_mib, say=say, **options)
        key_of = {example.id: clip_key(example) for example in examples}
        reasons = {key_of[example_id]: reason for example_id, reason in problems}
    usable = [e for e in examples if e.audio is None or e in store]
    left_out = [e for e in examples if e.audio is not None and e not in store]
    lines = [f"skipped {e.id}: {reasons.get(clip_key(e), f'{features} has no features of its clip')}" for e in left_out]
    for line in lines[:_LINES_SHOWN]:
        say(line)
    if len(lines) > _LINES_SHOWN:
        say(f"skipped {len(lines) - _LINES_SHOWN} more")
    if len(left_out) > max_bad_fraction * len(examples):
        share = f"{len(left_out)} of {len(examples)} examples have no features, more than {max_bad_fraction:.0%}"
        raise FeatureError(f"{features or 'audio'}: {share}")
    clips = {clip_key(e): store.clip(e) for e in usable if e.audio is not None}
    seconds = [0.0 if clip is None else clip.seconds for clip in clips.values()]
    check_window(seconds, model.config.max_audio_seconds, max_cut_fraction=max_cut_fraction, say=say)
    return store, usable


def check_window(
    seconds: Sequence[float], window_seconds: float, *, max_cut_fraction: float = 1.0, say: Callable[[str], None]
) -> None:
    """Say how many clips of these lengths the model hears only the beginning of.

    Raises:
        FeatureError: they are more than `max_cut_fraction`.
    """
    cut = [length for length in seconds if length > window_seconds + _CUT_TOLERANCE_SECONDS]
    if not cut:
        return
    line = (
        f"{len(cut)} of {len(seconds)} clips are longer than the {window_seconds:g} s that the model hears, "
        f"up to {max(cut):.1f} s: the rest of each is cut off"
    )
    if len(cut) > max_cut_fraction * len(seconds):
        raise FeatureError(f"{line}; that is more than max_cut_fraction {max_cut_fraction:g}")
    say(line)


def _check_held(
    store: ClipFeatures,
    model: Any,
    examples: Sequence[Example],
    audio_root: str | Path,
    name: str | Path,
    ranks: Any,
    say: Any,
    hears: Hearing,
) -> None:
    """Whether stored features are those that `model` would make now; each rank compares its share of the clips' files."""
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    failed, unseen = None, 0
    try:
        store.check_origin(model, hears)
        unseen = store.check_sound(examples[rank::size], audio_root)
    except FeatureError as error:
        failed = str(error)
    found = [(failed, unseen)] if ranks is None else ranks.gather((failed, unseen))
    if failed := next((reason for reason, _ in found if reason), None):
        raise FeatureError(f"{name}: {failed}")
    if unseen := sum(count for _, count in found):
        say(f"{name}: the files of {unseen} clips are not in {audio_root}, so their sound was not compared")


def _features_in(
    folder: Path,
    model: Any,
    examples: Sequence[Example],
    ranks: Any,
    *,
    audio_root: str | Path,
    max_bad_fraction: float,
    shard_mib: float,
    say: Callable[[str], None],
    hears: Hearing,
    **options: Any,
) -> tuple[ClipFeatures, list[tuple[str, str]]]:
    """The features in `folder`, where those that are missing are written first, by all ranks together."""
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    folder.mkdir(parents=True, exist_ok=True)
    clips = {clip_key(e): e for e in examples if e.audio is not None}
    filled = any(folder.glob(SHARD_PATTERN))
    seen = [filled] if ranks is None else ranks.gather(filled)
    if len(set(seen)) > 1:
        raise FeatureError(f"{folder}: expected a folder that all ranks see, but rank {seen.index(False)} sees no shard in it")
    held = MappedFeatures(folder) if filled else None
    if held is not None:
        name = f"{folder} (remove it, or name another by features.folder)"
        _check_held(held, model, [e for e in clips.values() if e in held], audio_root, name, ranks, say, hears)
    wanted = [e for e in clips.values() if held is None or e not in held]
    if ranks is not None:
        ranks.gather(None)  # no rank writes before all have read what is there: they must share out the same clips
    own, origin = wanted[rank::size], made_by(model, hears)
    problems = write_features(
        folder, own, model.encode_audio, audio_root=audio_root, made_by=origin, shard_mib=shard_mib, hears=hears, **options
    )
    if ranks is not None:
        problems = [problem for of_rank in ranks.gather(problems) for problem in of_rank]
    refuse_if_too_many(problems, len(clips), max_bad_fraction)
    if not any(folder.glob(SHARD_PATTERN)):
        raise FeatureError("examples: expected at least one clip that can be encoded, got none")
    store = MappedFeatures(folder)
    bad = {example_id for example_id, _ in problems}
    missing = [e for e in wanted if e not in store and e.id not in bad]
    lacking = [len(missing)] if ranks is None else ranks.gather(len(missing))
    if any(lacking):
        blind = next(number for number, count in enumerate(lacking) if count)
        raise FeatureError(
            f"{folder}: expected a folder that all ranks see, but rank {blind} does not see what the others wrote there"
        )
    return store, problems


def parse_part(text: str) -> tuple[int, int]:
    """I and N of "I/N"; ValueError unless 0 <= I < N."""
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise ValueError(f"--part: expected I/N with I from 0 to N - 1, got {text!r}")
    return int(number), int(parts)


def part_of_clips(examples: Sequence[Example], number: int, parts: int) -> list[Example]:
    """The examples of every `parts`-th clip, from `number` on: all questions about a clip are in one part."""
    clips = {key: n for n, key in enumerate(dict.fromkeys(clip_key(e) for e in examples if e.audio is not None))}
    return [e for e in examples if e.audio is not None and clips[clip_key(e)] % parts == number]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    from models.backbones.device import pick_device
    from models.backbones.resolve import BackboneError
    from models.speech_lm.model import SpeechLM, SpeechLMError

    arguments = features_parser().parse_args(argv)
    try:
        manifest = read_data(
            arguments.manifest, audio_root=arguments.audio_root, allow_links=arguments.allow_links
        )
        print_skipped(manifest.problems)
        one_file = Path(arguments.out).suffix == ".safetensors"
        number, parts = parse_part(arguments.part)
        if one_file and parts > 1:
            raise FeatureError(f"--part: expected a folder as --out, got the file {arguments.out}")
        model = SpeechLM.from_pretrained(arguments.model)
        model.encoder.to(pick_device(arguments.device))
        model.use_log_mel(arguments.backend)
        model.use_resampler(arguments.resampler)
        store, _ = clip_features(
            model,
            part_of_clips(manifest.examples, number, parts),
            audio_root=manifest.audio_root,
            folder=None if one_file else arguments.out,
            batch_clips=arguments.batch_clips,
            max_cut_fraction=arguments.max_cut_fraction,
            say=print,
            hears=parse_hearing(arguments.hears),
        )
        if isinstance(store, FeatureStore):
            store.save(arguments.out)
    except (FeatureError, BackboneError, SpeechLMError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(store)} clips, {store.row_shape} each -> {arguments.out}")
    return 0
