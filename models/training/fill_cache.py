"""Run both paths of a teacher once over the targets of a manifest, so that no training has to run it again.

    python -m models cache TEACHER MANIFEST --out FOLDER [--features F] [--dtype bfloat16] [--layers all] [--part 0/4]
                          [--hears snr_db=5 band=narrow] [--negative absent]
    python -m models cache TEACHER MANIFEST --out FOLDER --served REQUESTS.jsonl     # from states that a server has dumped
    python -m models cache TEACHER [MANIFEST] --out FOLDER --project caad model.folder=STUDENT
    python -m models train caad teacher.folder=TEACHER teacher.cache=FOLDER ...

kdkernels/contrast_cache.py describes the format, and what a kill leaves of it. Start the command again, and it continues. It
prints the size before the first sample, and stops if the disk has no room for it. A cache belongs to one teacher: training
stops with an error if the teacher is another, or if the prompt, clip or target of a sample has changed. `--part I/N` writes
every N-th sample, so that N processes can share the work; together they make one cache.

`--project` takes the recipe of a run to come and projects the states in FOLDER for the frozen LM head of its student
(models/training/project_states.py). Without MANIFEST the states stay as they are.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kdkernels import ContrastCache, ProjectionCache
from kdkernels.contrast_cache import CorruptCacheError
from kdkernels.layer_states import decoder_layers
from kdkernels.teacher import DualPathTeacher, MarkAbsent
from models.audio_lms.model import AudioLM
from models.backbones.causal_lm import read_head
from models.backbones.device import pick_device
from models.corpora.hearing import PLAIN, Hearing, parse_hearing
from models.speech_lm.collation import crop_to_targets
from models.speech_lm.listeners import is_speech_lm, load_listener, open_clips, text_path, unheard_batch
from models.training import project_states, served
from models.training.cache_identity import CacheError, sample_content, teacher_fingerprint
from models.training.commands import CACHE_DTYPES, cache_parser

DTYPES = dict(zip(CACHE_DTYPES, (torch.bfloat16, torch.float32, torch.float8_e4m3fn), strict=True))


def fill_cache(
    folder: str | Path,
    model: Any,
    store: Any,
    examples: Sequence[Any],
    *,
    made_from: dict[str, Any],
    extra_inputs: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    layers: Sequence[int] = (),
    part: str = "0",
    batch_examples: int = 32,
    shard_mib: float = 64.0,
    progress_bar: bool = True,
    hears: Hearing = PLAIN,
) -> int:
    """Write what is not in the cache yet.

    Args:
        model: the teacher, a SpeechLM or an `AudioLM`, in evaluation mode. It is frozen here (`requires_grad_(False)`), as a live
            teacher is.
        store: what the teacher hears (models/speech_lm/listeners.py).
        examples: with targets.
        made_from: the teacher's identity, `teacher_fingerprint`.
        hears: what the teacher reads beside the clip; `store` hears accordingly.
        extra_inputs: added to every batch's inputs, such as the prefix cache.
        batch_examples: read at a time. The states of a padded row differ by rounding from those of the row alone. If a stopped
            run has written a part of a batch, the whole batch is read again. So the rest has the bits that it would have had.
        dtype, layers, part, shard_mib: as in kdkernels.ContrastCacheWriter.

    Returns:
        samples written now.

    Raises:
        CacheError: a sample is in the cache with another prompt, clip or target.
        ValueError: the folder holds a cache of another teacher, dtype or layers.
    """
    # torch multiplies other shapes where a weight requires grad (at::matmul folds a batch), and these round otherwise.
    head = read_head(model.requires_grad_(False))
    teacher = DualPathTeacher(model, negative=MarkAbsent(), layers=layers, head=head)
    collate = model.make_collator()
    writer = ContrastCache.writer(
        folder, fingerprint=made_from, hidden_size=head.weight.shape[1], teacher_head=head, dtype=dtype, layers=layers,
        part=part, shard_mib=shard_mib,
    )  # fmt: skip
    written = 0
    with writer, tqdm(total=len(examples), desc="cache both paths", unit="example", disable=not progress_bar) as bar:
        for start in range(0, len(examples), batch_examples):
            chosen = [hears.shown(e) for e in examples[start : start + batch_examples]]
            features = store.rows(chosen)
            contents = [sample_content(e, row) for e, row in zip(chosen, features, strict=True)]
            for example, content in zip(chosen, contents, strict=True):
                if (held := writer.content(example.id)) not in (None, content):
                    raise CacheError(
                        f"{folder}: sample {example.id!r} is there with another prompt, clip or target ({held}, now {content}); "
                        "write into a new folder"
                    )
            missing = [row for row, e in enumerate(chosen) if e.id not in writer]
            if missing:
                batch = crop_to_targets(collate(chosen, features)).to(model.device)
                unheard = unheard_batch(model, chosen)
                states = teacher(
                    {**batch.model_inputs(), **(extra_inputs or {})}, batch.target_index, **text_path(unheard, model.device)
                )
                for row in missing:
                    here = (batch.target_row == row).nonzero()[:, 0]
                    by_layer = {}
                    if layers:
                        by_layer = {"audio_layers": states.audio_layers[here], "text_layers": states.text_layers[here]}
                    writer.add(
                        chosen[row].id, states.audio_hidden[here], states.text_hidden[here], batch.target[here],
                        content=contents[row], **by_layer,
                    )  # fmt: skip
                written += len(missing)
            bar.update(len(chosen))
    return written


def estimate(model: Any, examples: Sequence[Any], *, dtype: torch.dtype, layers: int = 0) -> tuple[int, int]:
    """Target tokens and bytes of a whole cache of `examples`."""
    collate = model.make_collator()
    tokens = sum(len(collate.target_ids(example)) for example in examples)
    hidden_size = model.get_output_embeddings().weight.shape[1]
    return tokens, ContrastCache.estimate_bytes(tokens=tokens, hidden_size=hidden_size, dtype=dtype, layers=layers)


@torch.no_grad()
def rounding_error(
    cache: ContrastCache, model: Any, store: Any, examples: Sequence[Any], *, alpha: float = 2.0, hears: Hearing = PLAIN
) -> float:
    """Mean KL, in nats, from the target distribution of live states to that of cached states, at contrast `alpha`."""
    teacher, collate = DualPathTeacher(model, negative=MarkAbsent(), head=read_head(model)), model.make_collator()
    examples = [hears.shown(e) for e in examples]
    batch = collate(examples, store.rows(examples)).to(model.device)
    unheard = text_path(unheard_batch(model, examples), model.device)
    live, held = teacher(batch.model_inputs(), batch.target_index, **unheard), cache.get([e.id for e in examples])

    def log_p(audio: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        dtype, device = teacher.head.weight.dtype, teacher.head.weight.device
        z_audio, z_text = (teacher.head.logits(h.to(device, dtype)).double() for h in (audio, text))
        return ((1 + alpha) * z_audio - alpha * z_text).log_softmax(-1)

    p, q = log_p(live.audio_hidden, live.text_hidden), log_p(held.audio_hidden, held.text_hidden)
    return float((p.exp() * (p - q)).sum(-1).mean())


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """"none", "all", or numbers from 0 (the embeddings) to `depth`, such as "6,12,30"."""
    if text in ("none", "all"):
        return tuple(range(1, depth + 1)) if text == "all" else ()
    try:
        layers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        layers = (-1,)
    if layers[0] < 0 or layers[-1] > depth:
        raise CacheError(f"--layers: expected none, all or numbers from 0 to {depth} such as 6,12, got {text!r}")
    return layers


def _check_out(folder: Path, made_from: dict[str, Any], dtype: torch.dtype) -> None:
    """Whether a cache that is there already can be continued: asked before the teacher is loaded."""
    if not (folder / "cache.json").is_file():
        return
    try:
        held = ContrastCache(folder, fingerprint=made_from, verify_checksums=False).dtype
    except CorruptCacheError:
        return  # its writer keeps the good shards
    if held != dtype:
        names = {one: name for name, one in DTYPES.items()}
        raise CacheError(f"--dtype: expected {names[held]}, as the cache in {folder} has, got {names[dtype]}")


def _store_served(
    arguments: Any, model: Any, store: Any, examples: Sequence[Any], made_from: dict[str, Any], dtype: torch.dtype,
    layers: Sequence[int], part: str,
) -> None:  # fmt: skip
    """The command with --served: CacheError where the requests lack samples."""
    check = served.StateCheck(
        model,
        served.parse_served_layers(arguments.served_layers, len(decoder_layers(model.lm))),
        tolerance_nats=arguments.served_tolerance,
    )
    written, missing = served.fill_from_server(
        arguments.out, model, store, examples, Path(arguments.served), made_from=made_from, check=check, dtype=dtype,
        layers=layers, part=part,
    )  # fmt: skip
    print(f"{written} samples written to {arguments.out}. {check.report()}")
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CacheError(f"{arguments.served}: {len(missing)} of {len(examples)} samples are not in it: {shown}")


def _project(arguments: Any, part: int, parts: int) -> None:
    """The command's --project, when the states are there."""
    recipe = project_states.projected_recipe(arguments.project, arguments.teacher, Path(arguments.out))
    asked = {"--hears": parse_hearing(arguments.hears) == recipe.teacher.hears}
    asked["--negative"] = arguments.negative == recipe.teacher.negative
    for option in (option for option, same in asked.items() if not same):
        raise CacheError(f"{option}: expected the recipe's teacher.{option.removeprefix('--')} with --project, got another")
    device = pick_device(arguments.device)
    tail = getattr(torch, arguments.tail_dtype)
    out, written = project_states.project_states(recipe, device=device, tail_dtype=tail, part=part, parts=parts)
    print(f"{written} samples projected, {len(ProjectionCache(out, verify_checksums=False))} in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    from models.data.manifest import ManifestError
    from models.speech_lm.features import FeatureError

    parser = cache_parser()
    arguments = parser.parse_args(argv)
    if arguments.manifest is None and not arguments.project:
        parser.error("the following arguments are required: manifest, or --project")
    try:
        number, parts = _part(arguments.part)
        if arguments.project:  # a wrong recipe is found before the teacher runs
            project_states.projected_recipe(arguments.project, arguments.teacher, Path(arguments.out))
            if arguments.manifest is not None and parts > 1:
                raise CacheError("--project: expected no MANIFEST with --part, so that the states of all parts are there first")
        if arguments.manifest is not None:
            _write_part(arguments, number, parts)
        if arguments.project:
            _project(arguments, number, parts)
    except (CacheError, ManifestError, FeatureError, ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the same command continues from here.", file=sys.stderr)
        return 130
    return 0


def _part(word: str) -> tuple[int, int]:
    """(I, N) of --part I/N."""
    number, _, parts = word.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise CacheError(f"--part: expected I/N with I from 0 to N - 1, got {word!r}")
    return int(number), int(parts)


def _write_part(arguments: Any, number: int, parts: int) -> None:
    """The teacher's states of part `number` of the manifest, into the cache."""
    from models.data.audio import MAX_SECONDS

    _check_options(arguments)
    hears = parse_hearing(arguments.hears)
    made_from = teacher_fingerprint(arguments.teacher, hears=hears, negative=arguments.negative)
    dtype = DTYPES[arguments.dtype]
    if is_speech_lm(arguments.teacher) and arguments.negative != "zeros":
        raise CacheError(f"--negative: expected zeros with a SpeechLM, got {arguments.negative!r}")
    _check_out(Path(arguments.out), made_from, dtype)
    examples, audio_root = _read_examples(arguments)
    model = load_listener(
        arguments.teacher,
        pick_device(arguments.device),
        dtype=arguments.teacher_dtype,
        attention=arguments.attention,
        negative=arguments.negative,
    )
    layers = parse_layers(arguments.layers, len(decoder_layers(model.lm)))
    _check_room(arguments.out, model, examples, dtype=dtype, layers=layers)
    folder = Path(f"{arguments.out}.features-{number}")  # of the clips' features while this runs
    store, held = open_clips(
        model,
        examples[number::parts],
        audio_root=audio_root,
        max_seconds=MAX_SECONDS,
        features=arguments.features,
        folder=folder,
        max_cut_fraction=arguments.max_cut_fraction,
        say=print,
        hears=hears,
    )
    if arguments.served:
        _store_served(arguments, model, store, [hears.shown(e) for e in held], made_from, dtype, layers, str(number))
        return
    written = fill_cache(
        arguments.out, model, store, held, made_from=made_from,
        extra_inputs=None if isinstance(model, AudioLM) else model.prefix_inputs(), dtype=dtype, layers=layers,
        part=str(number), batch_examples=arguments.batch_examples, hears=hears,
    )  # fmt: skip
    cache = ContrastCache(arguments.out, fingerprint=made_from)
    print(f"{written} samples written, {len(cache)} in {arguments.out}, {cache.bytes / 2**20:.1f} MiB")
    if arguments.measure:
        some = [e for e in held if e.id in cache][: arguments.measure]
        divergence = rounding_error(cache, model, store, some, hears=hears)
        print(f"KL of the cached target distribution at alpha 2: {divergence:.3g} nats")
    shutil.rmtree(folder, ignore_errors=True)


def _check_options(arguments: Any) -> None:
    if arguments.batch_examples < 1:
        raise CacheError(f"--batch-examples: expected at least 1, got {arguments.batch_examples}")
    if arguments.served is None and arguments.served_layers is not None:
        raise CacheError("--served-layers: expected --served beside it")
    if arguments.served and is_speech_lm(arguments.teacher):
        raise CacheError("--served: expected an audio LM of transformers as the teacher, got a SpeechLM")
    served.check_tolerance(arguments.served_tolerance)


def _read_examples(arguments: Any) -> tuple[list[Any], Path]:
    """The manifest's examples with a target, and the root of their audio; it prints the rows that it skips."""
    from models.data.problems import print_skipped
    from models.data.readers import read_data

    manifest = read_data(
        arguments.manifest,
        audio_root=arguments.audio_root,
        check_audio=arguments.features is None,
        allow_links=arguments.allow_links,
    )
    print_skipped(manifest.problems)
    examples = [e for e in manifest.examples if (e.target or "").strip()]
    if not examples:
        raise CacheError(f"{arguments.manifest}: no example with a target; they are written by python -m models pseudo-gt")
    return examples, manifest.audio_root


def _check_room(out: str, model: Any, examples: Sequence[Any], *, dtype: torch.dtype, layers: Sequence[int]) -> None:
    """Print what the cache of `examples` needs; CacheError where the disk has less."""
    tokens, needed = estimate(model, examples, dtype=dtype, layers=len(layers))
    Path(out).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    print(f"{len(examples)} samples, {tokens} tokens: {needed / 2**20:.1f} MiB; {free / 2**20:.0f} MiB are free")
    if needed > free:
        raise CacheError(f"--out: {out} has room for {free} bytes, the cache needs {needed}")
