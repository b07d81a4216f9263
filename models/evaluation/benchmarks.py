"""The benchmarks that `python -m models evaluate --benchmark` knows by name, and where their questions come from.

builtin         this project's own corpus (models/corpora/build.py), built or found in the cache folder
dynamic-superb  Dynamic-SUPERB phase 1 as published: under --audio-root a folder for each task with metadata.json and clips
mcr             MCR-BENCH as published: under --audio-root AQA/AQA.json, SER/SER.json and VSC/VSC.json with their clips
mmau, mmar, listen   MMAU test-mini, MMAR and LISTEN as published (models/evaluation/published.py)
PATH            a manifest of ours (models/data/manifest.py)

The published benchmarks but LISTEN can also come as one file of rows (models/data/readers.py) with its clips under --audio-root.

Without category "audio" Dynamic-SUPERB's tables count 51 tasks: the 48 of phase 1, and a second time the three that have two
clips. A SpeechLM hears one. For it these six are left out, and the output names them. The other 45 are scored; an ALL over them
is not the ALL of the published tables. An audio LM hears both clips, where the second ones ("audio2" or "file2") are there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.data.audio import AudioError
from models.data.json_rows import read_rows
from models.data.manifest import Example, Manifest, Problem
from models.data.problems import refuse_if_too_bad
from models.data.readers import read_data, read_foreign
from models.data.rows import AudioChecker, collect_examples
from models.evaluation import published
from models.io_utils import cache_dir

NAMES = ("builtin", "dynamic-superb", "mcr", "mmau", "mmar", "listen")
TASKS_IN_ALL = {"dynamic-superb": 51}
_FORMS = {"dynamic-superb": "dynamic_superb", "mcr": "mcr_bench"}
_LAYOUTS = {
    "dynamic-superb": (
        "the folder that Dynamic-SUPERB's preprocessing script (github.com/dynamic-superb/dynamic-superb, api/preprocess) makes "
        "of the data sets DynamicSuperb/* of the Hugging Face hub:\n"
        "    FOLDER/AccentClassification_AccentdbExtended/metadata.json   {\"clip.wav\": {\"instruction\", \"label\"}}\n"
        "    FOLDER/AccentClassification_AccentdbExtended/clip.wav\n"
        "    FOLDER/BirdSoundDetection_Warblrb10k/metadata.json ..."
    ),
    **published.LAYOUTS,
    "mcr": (
        "MCR-BENCH unpacked (the download link is in the README of github.com/WangCheng0116/MCR-BENCH):\n"
        "    FOLDER/AQA/AQA.json   [{\"audio\", \"gt\", \"neutral\", \"faithful\", \"adversarial\", \"irrelevant\"}, ...]\n"
        "    FOLDER/AQA/audio/...\n"
        "    FOLDER/SER/SER.json, FOLDER/VSC/VSC.json likewise"
    ),
}  # fmt: skip
_MCR_TASKS = ("AQA", "SER", "VSC")
_MCR_CLOSED = ("SER", "VSC")  # classification: the choices are all labels that occur
# Phase 1's tasks, by the first word of their names ("NoiseDetection_VCTK_MUSAN-Music").
_CATEGORY_BY_TASK = {
    **dict.fromkeys(
        ("SpeechCommandRecognition", "SpokenTermDetection", "SpeechTextMatching", "LanguageIdentification", "SpeechDetection"),
        "content",
    ),
    **dict.fromkeys(
        ("IntentClassification", "Intent_Classification", "DialogueActClassification", "DialogueActPairing", "SarcasmDetection"),
        "semantic",
    ),
    **dict.fromkeys(
        ("DialogueEmotionClassification", "EmotionRecognition", "AccentClassification", "StressDetection", "HowFarAreYou",
         "SpoofDetection"),
        "paralinguistic",
    ),
    **dict.fromkeys(
        ("NoiseDetection", "NoiseSNRLevelPrediction", "ReverberationDetection", "EnhancementDetection"), "degradation"
    ),
    **dict.fromkeys(("SpeakerVerification", "MultiSpeakerDetection", "SpeakerCounting"), "speaker"),
    **dict.fromkeys(("EnvironmentalSoundClassification", "ChordClassification", "BirdSoundDetection"), "audio"),
}  # fmt: skip


class SuiteError(ValueError):
    """A benchmark is missing, or its folder has another layout; the message says what to get and where to put it."""


@dataclass(frozen=True)
class Suite:
    """Questions of a benchmark.

    Args:
        name: one of NAMES, or the manifest's path.
        examples: those of every split. Audio paths are relative to `audio_root`.
        problems: rows that were skipped.
        left_out: tasks of which no question is scored, and why.
        mode: the default way to ask: "choice" or "generate".
    """

    name: str
    examples: list[Example]
    audio_root: Path
    problems: list[Problem] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    mode: str = "choice"


def load_suite(
    name: str,
    *,
    manifest: str | Path | None = None,
    audio_root: str | Path | None = None,
    check_audio: bool = True,
    max_bad_fraction: float = 0.05,
    allow_links: bool = False,
    several_clips: bool = False,
) -> Suite:
    """The questions of a benchmark.

    Args:
        name: one of NAMES, or a path to a manifest of ours.
        manifest: for a published benchmark that is one file of rows; else None.
        audio_root: folder of the clips of a published benchmark or of a manifest. The built-in one brings its own.
        check_audio: read each clip's header. A clip that cannot be used is a problem.
        max_bad_fraction: more bad rows than this fraction raise ManifestError.
        allow_links: clips may be links that leave the folder of the audio.
        several_clips: Dynamic-SUPERB's questions about two clips are asked; otherwise they are left out.

    Raises:
        SuiteError: the benchmark or its folder is missing; the message says how to get it.
        ManifestError: a file cannot be read, or has too many bad rows.
    """
    if name == "builtin":
        if manifest is not None or audio_root is not None:
            raise SuiteError("--benchmark builtin: expected neither MANIFEST nor --audio-root, since it has its own")
        return _suite_of(name, _build(), max_bad_fraction=max_bad_fraction, check_audio=check_audio)
    options = {"check_audio": check_audio, "max_bad_fraction": max_bad_fraction, "allow_links": allow_links}
    if name not in _LAYOUTS:
        if manifest is not None:
            raise SuiteError(f"--benchmark: expected one of {', '.join(NAMES)} beside MANIFEST {str(manifest)!r}, got {name!r}")
        return _suite_of(name, name, audio_root=audio_root, **options)
    if audio_root is not None and not Path(audio_root).is_dir():
        raise SuiteError(f"--audio-root: no folder {str(audio_root)!r}; expected {_LAYOUTS[name]}")
    if manifest is not None and (name == "listen" or not Path(manifest).is_file()):
        got = "it has no single file" if name == "listen" else f"no file {str(manifest)!r}"
        raise SuiteError(f"--benchmark {name}: {got}; leave MANIFEST out to read {_LAYOUTS[name]}")
    if audio_root is None and manifest is None:
        raise SuiteError(f"--benchmark {name}: expected --audio-root FOLDER, {_LAYOUTS[name]}")
    if name not in _FORMS:
        return _read_published(name, manifest, audio_root, **options)
    if manifest is not None:
        read = read_foreign(manifest, form=_FORMS[name], audio_root=audio_root, several_clips=several_clips, **options)
        suite = Suite(name, read.examples, read.audio_root, read.problems)
    else:
        assert audio_root is not None  # checked above
        suite = _read_folder(name, Path(audio_root), several_clips=several_clips, **options)
    finished = [_with_category(e) for e in suite.examples] if name == "dynamic-superb" else list(_with_choices(suite.examples))
    return dataclasses.replace(suite, examples=finished, mode="generate")


def _read_published(
    name: str,
    manifest: str | Path | None,
    audio_root: str | Path | None,
    *,
    check_audio: bool,
    max_bad_fraction: float,
    allow_links: bool,
) -> Suite:
    """MMAU, MMAR or LISTEN, from the folder of its files, or from one file of rows and the folder of their clips."""
    if name == "listen":
        path, root = Path(str(audio_root)), published.listen_clips_folder()
        rows: Iterable[tuple[int, Any]] = enumerate(published.listen_rows(path), 1)
    else:
        root = Path(audio_root) if audio_root is not None else Path(str(manifest)).parent
        path = Path(manifest) if manifest is not None else root / published.FILES[name]
        if not path.is_file():
            raise SuiteError(f"--audio-root {root}: no {path.name} in it; expected {_LAYOUTS[name]}")
        rows = read_rows(path)

    def convert(_: int, row: dict[str, Any]) -> list[Example]:
        return published.listen_examples(row, root) if name == "listen" else [published.question_example(name, row)]

    checker = AudioChecker(root, allow_links=allow_links) if check_audio else None
    examples, problems = collect_examples(path, rows, convert, checker=checker, max_bad_fraction=max_bad_fraction)
    return Suite(name, examples, root, problems, mode="generate")


def category_of(task: str) -> str:
    """The category of a task of Dynamic-SUPERB phase 1, by its name; empty for other tasks."""
    return next((category for first, category in _CATEGORY_BY_TASK.items() if task.startswith(first)), "")


def _build() -> Path:
    """The built-in benchmark's manifest, from the cache or built now."""
    from models.corpora import build
    from models.corpora.sources.debian import PackageCorrupt, PackageUnavailable
    from models.corpora.sources.espeak import EspeakError

    size = "benchmark" if "benchmark" in build.SIZES else "demo"
    try:
        return build.build_corpus(cache_dir() / "corpora" / size, size=size)
    except (PackageUnavailable, PackageCorrupt, EspeakError) as error:
        raise SuiteError(f"--benchmark builtin: cannot be built: {error}") from error


def _suite_of(name: str, path: str | Path, *, audio_root: str | Path | None = None, **options: object) -> Suite:
    read: Manifest = read_data(path, audio_root=audio_root, **options)
    return Suite(name, read.examples, read.audio_root, read.problems)


def _read_folder(
    name: str, root: Path, *, several_clips: bool, check_audio: bool, max_bad_fraction: float, allow_links: bool
) -> Suite:
    checker = AudioChecker(root, allow_links=allow_links) if check_audio else None
    examples: list[Example] = []
    problems: list[Problem] = []
    left_out: dict[str, str] = {}
    rows = 0
    files = _task_files(name, root)
    if not files:
        raise SuiteError(f"--audio-root {root}: no task in it; expected {_LAYOUTS[name]}")
    if name == "mcr":
        left_out |= {task: f"no {task}/{task}.json" for task in _MCR_TASKS if task not in files}
    for task, path in files.items():
        # The share of bad rows counts over all tasks, so no single file raises for it.
        read = read_foreign(
            path, form=_FORMS[name], audio_root=root, check_audio=False, max_bad_fraction=1.0, several_clips=several_clips
        )
        two_clips = [p for p in read.problems if p.reason.startswith("audio2:")]
        if two_clips and len(two_clips) == len(read.problems) and not read.examples:
            left_out[task] = "its questions have two clips each; a row here has one"
            continue
        placed = list(_placed(read.examples, task, path, root))
        second = [clip for e in placed for clip in e.more_audio]
        if second and not any((root / clip).exists() for clip in second):
            left_out[task] = "its questions have two clips each, and the second ones are not in the folder"
            continue
        rows += len(read.examples) + len(read.problems)
        problems += [dataclasses.replace(p, id=f"{task}: {p.id}" if p.id else task) for p in read.problems]
        for number, example in enumerate(placed, 1):
            try:
                if checker is not None:
                    checker.check(example)
            except AudioError as error:
                problems.append(Problem(number, example.id, f"audio: {error.reason}", str(path)))
            else:
                examples.append(example)
    refuse_if_too_bad(root, problems, rows, max_bad_fraction)
    return Suite(name, examples, root, problems, left_out)


def _task_files(name: str, root: Path) -> dict[str, Path]:
    """Task -> its file of rows."""
    if name == "mcr":
        return {task: path for task in _MCR_TASKS if (path := root / task / f"{task}.json").is_file()}
    found = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        path = next((p for p in (folder / "metadata.json", folder / "test" / "metadata.json") if p.is_file()), None)
        if path is not None:
            found[folder.name] = path
    return found


def _placed(examples: Iterable[Example], task: str, path: Path, root: Path) -> Iterator[Example]:
    """Examples of one task's file with ids of their task. Audio paths become relative to `root`."""
    folder = path.parent.relative_to(root).as_posix()
    for e in examples:
        if e.audio is not None:
            audio, *more = (_nearest(root, folder, clip) for clip in (e.audio, *e.more_audio))
            e = dataclasses.replace(e, audio=audio, more_audio=tuple(more))
        if not e.task:
            pair_id = None if e.pair_id is None else f"{task}/{e.pair_id}"
            e = dataclasses.replace(e, id=f"{task}/{e.id}", task=task, pair_id=pair_id)
        yield e


def _nearest(root: Path, folder: str, clip: str) -> str:
    """A clip's path from `root`: below its task's folder, unless it is there only without that."""
    near = f"{folder}/{clip}"
    return clip if (root / clip).exists() and not (root / near).exists() else near


def _with_category(example: Example) -> Example:
    category = example.metadata.get("category") or category_of(example.task)
    return dataclasses.replace(example, metadata={**example.metadata, "category": category})


def _with_choices(examples: list[Example]) -> Iterator[Example]:
    """MCR-BENCH's rows have no choices. In its two classification tasks they are all labels that occur."""
    labels = {task: tuple(sorted({e.answer for e in examples if e.task == task and e.answer})) for task in _MCR_CLOSED}
    for e in examples:
        closed = not e.choices and e.task in labels
        yield dataclasses.replace(e, choices=labels[e.task]) if closed else e
