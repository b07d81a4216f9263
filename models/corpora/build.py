"""Builds a corpus: recorded and synthetic speech, degraded and split, with questions, answers and misleading texts.

    python -m models corpus --out data/demo --size demo
    python -m models corpus --out data/benchmark --size benchmark

The project contains no recordings: they come from Debian packages pinned by hash (sources/), and the synthetic clips come
from espeak-ng. Equal settings give equal bytes. plans/hinted.py (tiny, demo, sources, full) and plans/benchmark.py (benchmark,
benchmark_tiny) say what is in a size, and how its splits keep voices and texts apart. questions.py says what stands beside the
sound, and what the two pools of training are. `python -m models card MANIFEST` describes a corpus.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from models.corpora.commands import corpus_parser
from models.corpora.plans.base import (
    DEFAULT_FOLD,
    MAKER,
    SIZES,
    BenchmarkSize,
    ExternalSize,
    RecordedSize,
    Recording,
    Settings,
)
from models.corpora.plans.benchmark import EXTERNAL_NOTES, RECORDED_NOTES, plan_benchmark
from models.corpora.plans.benchmark import NOTES as BENCHMARK_NOTES
from models.corpora.plans.hinted import ACTOR_NOTE, CHARACTER_NOTE, plan_hinted
from models.corpora.plans.hinted import NOTES as HINTED_NOTES
from models.corpora.plans.recorded import plan_external
from models.corpora.questions import benchmark_examples, hinted_examples
from models.corpora.recordings import Material
from models.corpora.render import render_all
from models.corpora.sources.debian import PackageCorrupt, PackageUnavailable
from models.corpora.sources.espeak import EspeakError
from models.data.manifest import Example, ManifestError, read_manifest, write_manifest
from models.io_utils import fingerprint, sha256_file

_MANIFEST_NAME = "manifest.jsonl"


def build_corpus(
    out_dir: str | Path,
    *,
    sources: Sequence[str] | None = None,
    size: str = "demo",
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    hint_correlation: float = 0.95,
    min_snr_db: float = -18.0,
    max_snr_db: float = 2.0,
    max_seconds: float = 4.0,
    fold: int | None = DEFAULT_FOLD,
    progress: bool = True,
) -> Path:
    """Build the corpus in `out_dir`, unless it is there: clips in audio/, then manifest.jsonl.

    Args:
        sources: of SOURCES. None is those of the size: most often "queen" and "espeak". A Debian source
            that cannot be fetched is left out if espeak is among the others; the header's "unavailable" and a line on
            stderr name it.
        size: a name in SIZES: "tiny" (tests), "demo", "sources" (models.experiments.ablation), "full", "study" and "study_tasks"
            (models.experiments.study), "study_sources" (models.experiments.ablation), "external" (test questions about other
            games), "benchmark" or "benchmark_tiny" (tests).
        seed: of the draws of sentences, noises and hints.
        tasks: which of the size's tasks to build; None is all that the sources allow.
        hint_correlation: probability that a hint in the teacher's training set is true.
        min_snr_db, max_snr_db: SNR of the gender task over the whole clip, in dB (with little noise the task is too easy).
        max_seconds: clips are cut to this length.
        fold: which actors of Amazon Queen are in dev and test (plans/base.py, ACTOR_FOLDS). None splits by character, as in the
            published tables.
        progress: show a bar on stderr.

    Returns:
        path of the manifest.

    Raises:
        ValueError: an argument outside its range, or the sources cannot give the tasks.
        PackageUnavailable, PackageCorrupt, EspeakError: a source is missing or damaged.
        ManifestError: more than 2% of the clips could not be made.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {list(SIZES)}, got {size!r}")
    settings = Settings(
        sources=SIZES[size].sources if sources is None else tuple(sources),
        size=size,
        seed=seed,
        tasks=None if tasks is None else tuple(tasks),
        hint_correlation=hint_correlation,
        min_snr_db=min_snr_db,
        max_snr_db=max_snr_db,
        max_seconds=max_seconds,
        fold=fold,
    )
    out_dir = Path(out_dir)
    manifest_path = out_dir / _MANIFEST_NAME
    if _is_current(manifest_path, settings):
        return manifest_path
    material = Material.gather(settings)
    plan, notes, four_contexts = _kind_of(size, fold)
    recordings = plan(settings, material)
    if not recordings:
        raise ValueError(
            f"tasks: expected some that the sources {list(settings.sources)} can give, got {settings.tasks}"
        )
    made, problems = render_all(out_dir, recordings, settings, progress=progress)
    examples = list((benchmark_examples if four_contexts else hinted_examples)(made, settings))
    header = {
        "maker": MAKER,
        "fingerprint": settings.fingerprint(),
        "settings": dataclasses.asdict(settings),
        "sources": material.described,
        "unavailable": material.unavailable,
        "problems": [str(problem) for problem in problems],
        "notes": list(notes),
        "content_sha256": fingerprint(sorted({f"{clip.name} {clip.sha256}" for clip in made})),
        "counts": _counts(examples),
    }
    write_manifest(manifest_path, examples, header=header)
    _remove_stale(out_dir, {out_dir / clip.name for clip in made})
    return manifest_path


def _kind_of(size: str, fold: int | None) -> tuple[Callable[[Settings, Material], list[Recording]], tuple[str, ...], bool]:
    """How a size is planned, its notes, and whether its questions have four contexts."""
    kind = SIZES[size]
    if isinstance(kind, ExternalSize):
        return plan_external, EXTERNAL_NOTES, kind.four_contexts
    if isinstance(kind, BenchmarkSize):
        return plan_benchmark, RECORDED_NOTES if isinstance(kind, RecordedSize) else BENCHMARK_NOTES, True
    return plan_hinted, (CHARACTER_NOTE if fold is None else ACTOR_NOTE, *HINTED_NOTES), kind.four_contexts


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    def name(example: Example) -> str:
        context = example.metadata.get("context_type", example.kind)
        return "/".join(filter(None, [example.task, example.split, example.metadata.get("pool"), context]))

    return dict(sorted(Counter(map(name, examples)).items()))


def _is_current(manifest_path: Path, settings: Settings) -> bool:
    """Whether a complete corpus of these settings is there, and no source was missing when it was made."""
    if not manifest_path.exists():
        return False
    try:
        manifest = read_manifest(manifest_path, check_audio=False, max_bad_fraction=0.0)
        if manifest.header.get("fingerprint") != settings.fingerprint() or manifest.header.get("unavailable"):
            return False
        hashes = {example.audio: example.metadata.get("audio_sha256") for example in manifest}
        return all(sha256_file(manifest.audio_root / str(name)) == digest for name, digest in hashes.items())
    except (ManifestError, OSError):
        return False


def _remove_stale(out_dir: Path, kept: set[Path]) -> None:
    """Remove clips of earlier settings: only .flac files in the corpus' audio folder."""
    for path in (out_dir / "audio").rglob("*.flac"):
        if path not in kept:
            path.unlink()


def main(argv: list[str] | None = None) -> int:
    """The command `corpus`: build, then print the counts; one message and status 1 if that cannot be done."""
    arguments = corpus_parser().parse_args(argv)
    started = time.monotonic()
    try:
        path = build_corpus(
            arguments.out,
            sources=tuple(filter(None, arguments.sources.split(","))) if arguments.sources is not None else None,
            size=arguments.size,
            seed=arguments.seed,
            tasks=tuple(filter(None, arguments.tasks.split(","))) if arguments.tasks is not None else None,
            hint_correlation=arguments.hint_correlation,
            min_snr_db=arguments.min_snr_db,
            max_snr_db=arguments.max_snr_db,
            max_seconds=arguments.max_seconds,
            fold=None if arguments.fold == "characters" else int(arguments.fold),
        )
        manifest = read_manifest(path)
    except (ValueError, OSError, PackageUnavailable, PackageCorrupt, EspeakError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; there are clips without a manifest, and the next run makes them again", file=sys.stderr)
        return 130
    clips = len({example.audio for example in manifest})
    for name, count in manifest.header["counts"].items():
        print(f"{count:6}  {name}")
    print(f"{clips} clips, {len(manifest)} questions in {time.monotonic() - started:.0f} s: {path}")
    return 0
