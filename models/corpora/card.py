"""A data card: what a corpus holds, where it comes from, its licences, and its known weaknesses.

    python -m models card MANIFEST --out card.md

All numbers are counted from the manifest. Equal manifests give equal cards, in whatever folder they are.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from models.corpora.commands import card_parser
from models.corpora.plans.base import DEFAULT_FOLD, MAKER, SIZES
from models.data.manifest import SPLITS, Example, Manifest, read_manifest
from models.data.prompts import CATEGORIES, TASKS
from models.data.readers import CONTEXT_KINDS
from models.io_utils import atomic_write_text, sha256_file

_TEXT_CHARACTERS = 60


def make_card(manifest: Manifest) -> str:
    """The card of a manifest as Markdown, without the sections that its header has nothing for (see `build_corpus`)."""
    header = manifest.header
    size = _settings(header).get("size")
    lines = [f"# Data card{f': {size}' if size else ''}", ""]
    clips = _clips(manifest)
    minutes = f", {sum(map(_seconds, clips.values())) / 60:.1f} minutes" if any(map(_seconds, clips.values())) else ""
    lines += [f"{len(manifest)} questions on {len(clips)} clips{minutes}, {len(_tasks(manifest))} tasks.", ""]
    lines += _identity(manifest)
    lines += _section("Questions", _question_table(manifest))
    lines += _section("Labels of the test", _label_table(manifest))
    lines += _section("Clips and minutes", _clip_table(clips.values()))
    lines += _section("Voices and texts", _voice_table(clips.values()))
    lines += _section("Sources and licences", _source_table(header))
    missing = [f"- {name}: {reason}" for name, reason in sorted(header.get("unavailable", {}).items())]
    lines += _section("Sources that were not available", missing)
    lines += _section("What stands beside the sound", _context_table(manifest))
    weak = [f"- {note}" for note in header.get("notes", [])]
    lines += _section("Known weaknesses", weak)
    bad = [str(dataclasses.replace(problem, file=None)) for problem in manifest.problems]  # a card names no path of a machine
    skipped = [f"- {problem}" for problem in [*header.get("problems", []), *bad]]
    lines += _section("Recordings that could not be used", skipped)
    return "\n".join(lines).rstrip() + "\n"


def _identity(manifest: Manifest) -> list[str]:
    lines = []
    if settings := _settings(manifest.header):
        lines.append(f"- built by `{_command(settings)}`")
    if manifest.path is not None:
        lines.append(f"- sha256 of {manifest.path.name}: `{sha256_file(manifest.path)}`")
    labels = {
        "content_sha256": "sha256 over the clips' names and hashes",
        "fingerprint": "fingerprint of settings and builder",
    }
    lines += [f"- {label}: `{manifest.header[key]}`" for key, label in labels.items() if key in manifest.header]
    return [*lines, ""] if lines else []


def _settings(header: dict[str, Any]) -> dict[str, Any]:
    """The settings of `build_corpus`; none of a header by another maker, which may hold anything under that name."""
    return header.get("settings", {}) if header.get("maker") == MAKER else {}


def _command(settings: dict[str, Any]) -> str:
    """The command that builds this corpus again, without the options that have the size's defaults."""
    words = ["python", "-m", "models", "corpus", "--out", "DIR", "--size", settings["size"]]
    if tuple(settings["sources"]) != tuple(SIZES[settings["size"]].sources):
        words += ["--sources", ",".join(settings["sources"])]
    if settings["tasks"] is not None:
        words += ["--tasks", ",".join(settings["tasks"])]
    options = (("seed", 0), ("hint_correlation", 0.95), ("min_snr_db", -18.0), ("max_snr_db", 2.0), ("max_seconds", 4.0))
    for name, default in options:
        if settings[name] != default:
            words += [f"--{name.replace('_', '-')}={settings[name]:g}"]
    if settings["fold"] != DEFAULT_FOLD:
        words += ["--fold", "characters" if settings["fold"] is None else str(settings["fold"])]
    return shlex.join(words)


def _question_table(manifest: Manifest) -> list[str]:
    """Questions by task, and by split, pool and context."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for example in manifest:
        counts[example.task, _part(example), _context(example)] += 1
    parts = [part for part in _parts(manifest) if any(key[1] == part for key in counts)]
    contexts = [c for c in (*CONTEXT_KINDS, "aligned", "conflict") if any(key[2] == c for key in counts)]
    rows = []
    for task in _tasks(manifest):
        row = [_category(task), task]
        row += [" / ".join(str(counts[task, part, context]) for context in contexts) for part in parts]
        rows.append(row)
    totals = [" / ".join(str(sum(counts[t, part, c] for t in _tasks(manifest))) for c in contexts) for part in parts]
    rows.append(["", "all", *totals])
    return [f"By context: {' / '.join(contexts)}.", "", *_table(["category", "task", *parts], rows)]


def _label_table(manifest: Manifest) -> list[str]:
    """How often each label is the answer of a test question; every clip counts once."""
    rows = []
    for task in _tasks(manifest):
        seen = {e.pair_id or e.id: e for e in manifest.select(split="test", task=task)}
        counts = Counter(e.answer or "" for e in seen.values())
        if counts:
            shares = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
            chance = sum(1 / len(e.choices) for e in seen.values() if e.choices) / len(seen)
            rows.append([task, shares, f"{max(counts.values()) / len(seen):.2f}", f"{chance:.2f}"])
    return _table(["task", "labels", "most frequent one", "guessing"], rows) if rows else []


def _clip_table(clips: Iterable[Example]) -> list[str]:
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for clip in clips:
        groups[str(clip.metadata.get("source", "-"))][clip.split].append(_seconds(clip))
    splits = [split for split in SPLITS if any(split in by_split for by_split in groups.values())]

    def told(seconds: list[float]) -> str:
        return f"{len(seconds)} ({sum(seconds) / 60:.1f} min)" if any(seconds) or not seconds else f"{len(seconds)}"

    rows = [[source, *(told(groups[source][split]) for split in splits)] for source in sorted(groups)]
    return _table(["source", *splits], rows)


def _voice_table(clips: Iterable[Example]) -> list[str]:
    # An actor of the game may voice several characters (models/corpora/sources/queen.py).
    voices: dict[tuple[str, str], set[str]] = defaultdict(set)
    texts: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        known = clip.metadata
        voices[clip.split, str(known.get("source", "-"))].add(str(known.get("actor", known.get("speaker", "-"))))
        texts[clip.split].add(str(clip.metadata.get("text", clip.transcription)))
    sources = sorted({source for _, source in voices})
    rows = [
        [split, str(len(texts[split])), *(str(len(voices[split, source])) for source in sources)]
        for split in SPLITS
        if split in texts
    ]
    kinds = [f"{'actors' if source == 'queen' else 'voices'} of {source}" for source in sources]
    return _table(["split", "texts", *kinds], rows)


def _source_table(header: dict[str, Any]) -> list[str]:
    rows = [
        [s.get("source", ""), s.get("package", ""), s.get("version", ""), s.get("licence", ""), _code(s.get("payload_sha256"))]
        for s in header.get("sources", [])
        if isinstance(s, dict)
    ]
    return _table(["source", "package", "version", "licence", "sha256 of what is used"], rows) if rows else []


def _context_table(manifest: Manifest) -> list[str]:
    """One test clip of each task: its question, and the texts beside the sound."""
    rows = []
    for task in _tasks(manifest):
        group: dict[str, Example] = {}
        for example in manifest.select(split="test", task=task):
            if not group or example.pair_id == next(iter(group.values())).pair_id:
                group.setdefault(_context(example), example)
        if not group:
            continue
        shown = next(iter(group.values()))
        texts = [f"{name}: {e.context}" for name, e in group.items() if e.context]
        rows.append([task, shown.question, _shortened(shown.transcription) or "(none)", "; ".join(texts), shown.answer or ""])
    return _table(["task", "question", "transcript shown", "context", "answer"], rows) if rows else []


def _tasks(manifest: Manifest) -> list[str]:
    """The tasks, sorted by category, then by name."""
    order = {category: number for number, category in enumerate(CATEGORIES)}
    return sorted({e.task for e in manifest}, key=lambda task: (order.get(_category(task), len(order)), task))


def _category(task: str) -> str:
    return TASKS[task].category if task in TASKS else "-"


def _parts(manifest: Manifest) -> list[str]:
    found = {_part(example): example for example in manifest}
    return sorted(found, key=lambda part: (SPLITS.index(found[part].split), part != "train teacher", part))


def _part(example: Example) -> str:
    return " ".join(filter(None, [example.split, example.metadata.get("pool")]))


def _context(example: Example) -> str:
    return str(example.metadata.get("context_type", example.kind))


def _clips(manifest: Manifest) -> dict[str, Example]:
    return {e.audio: e for e in manifest if e.audio is not None}


def _seconds(example: Example) -> float:
    """By the metadata; 0 where they do not say it."""
    seconds = example.metadata.get("duration_seconds")
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 1] + "…"


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in lines]


def main(argv: list[str] | None = None) -> int:
    """The command `card`: write the card; one message and status 1 if that cannot be done."""
    arguments = card_parser().parse_args(argv)
    try:
        card = make_card(read_manifest(arguments.manifest, check_audio=False))
        if arguments.out is None:
            print(card, end="")
        else:
            print(atomic_write_text(arguments.out, card))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
