"""A report as one HTML file, and the same as Markdown: tables, figures, clips to listen to. The HTML file needs no other file.

It begins with its headline: verdicts, one table, one plot (models/reporting/headline.py). In the HTML file all else is folded.

    python -m models report --results models/experiments/results --out report.html --markdown report.md
        [--predictions "KD=runs/kd/test.jsonl" "CAAD=runs/caad/test.jsonl" --manifest corpus/manifest.jsonl]
        [--metrics "CAAD=runs/caad/metrics.jsonl"]

Without arguments the report shows the committed results (models/experiments/results). Everything in it is computed from stored
results, saved predictions and metrics, so it can be made again at any time. It lists what it looked for and did not find.

A Markdown file cannot hold figures and sound. They go into a folder beside it: report_files for report.md.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from models.data.audio import AudioError, encode_audio, load_audio
from models.data.manifest import Example, read_manifest
from models.data.rows import link_problem
from models.evaluation.predictions import KINDS, EvaluationError, Prediction, context_kind, read_predictions
from models.evaluation.scoring import judge
from models.io_utils import atomic_write_bytes, atomic_write_text, same_file
from models.reporting.commands import report_parser
from models.reporting.figures import draw_curves
from models.reporting.prediction_sections import prediction_sections
from models.reporting.results_csv import ResultsError
from models.reporting.sections import Stored, stored_sections
from models.reporting.systems import CONTEXTS, STORED_MARK, Palette
from models.reporting.tables import NOTHING, Cell, Column, Section, Table
from models.training.curves import read_metrics

TEMPLATES = Path(__file__).parent / "templates"
RESULTS = Path(__file__).parents[1] / "experiments" / "results"
_MAX_CLIP_SECONDS = 30.0


@dataclass
class Report:
    """What a report shows.

    Args:
        title: heading of the page.
        findings: sentences below it, before the verdicts.
        systems: label -> predictions, in the order of the tables.
        curves: label -> lines of a metrics file.
        examples: examples of the manifest, for the clips. Their audio paths are relative to `audio_root`.
        audio_root: None = no clips.
        allow_links: clips may be links that leave `audio_root`.
        facts: tables of settings, data and times: (heading, rows of (name, value)).
        max_clips: clips to embed.
        results: folder of stored results (models/reporting/sections.py knows the files); None = the report shows none.
        reference: label of the system in `systems` that the others are compared with; None = the first.
        missing: sentences about what was not found. The report adds what it does not find itself.
    """

    title: str
    findings: Sequence[str] = ()
    systems: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    audio_root: Path | None = None
    allow_links: bool = False
    facts: Sequence[tuple[str, Sequence[tuple[str, Any]]]] = ()
    max_clips: int = 8
    results: Path | None = None
    reference: str | None = None
    missing: Sequence[str] = ()


def write_report(path: str | Path, report: Report, *, markdown: str | Path | None = None) -> Path:
    """Write `report` as one self-contained HTML file, atomically, and as Markdown where a path for it is given.

    Everything that comes from data is escaped. Figures and clips are embedded in the HTML. A content security policy forbids
    requests, and any script or style except those of the page.

    Args:
        markdown: path of the Markdown file. Its figures and clips go into the folder "<stem>_files" beside it, where they replace
            files of the same name.

    Returns:
        the path of the HTML.

    Raises:
        ResultsError: stored results cannot be used.
        ValueError: no system has the label `report.reference`.
    """
    shown = (*report.systems, *report.curves)
    stored = Stored(palette=Palette(shown)) if report.results is None else stored_sections(report.results, others=shown)
    clips, unreadable = choose_clips(report)
    # A run may have a stored curve and given metrics. Both are shown; the given ones keep the label.
    curves = {label + STORED_MARK if label in report.curves else label: lines for label, lines in stored.curves.items()}
    curves |= report.curves
    training = draw_curves(curves, stored.palette)
    headline, of_predictions = prediction_sections(
        report.systems, reference=report.reference, palette=stored.palette
    )
    sections = [*of_predictions, *stored.sections]
    if training:
        note = ("Stored curves are means over seeds.",) if stored.curves else ()
        sections.append(Section("Training", note, (training,)))
    values = {
        "report": report,
        "headline": headline or stored.headline,
        "missing": [
            *report.missing,
            *stored.missing,
            *(f"{label}: no predictions in its file." for label, predictions in report.systems.items() if not predictions),
            *(f"{label}: no training curve in its metrics." for label, lines in report.curves.items() if not lines),
            *(f"{name}: its clip could not be read." for name in unreadable),
        ],
        "sections": sections,
        "clips": clips,
        "facts": [_fact_section(heading, rows) for heading, rows in report.facts],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    html = _environment(autoescape=True).get_template("report.html.j2")
    page = html.render(
        **values, style=Markup(style), script=Markup(script), style_hash=_csp_hash(style), script_hash=_csp_hash(script)
    )  # fmt: skip
    if markdown is not None:
        _write_markdown(Path(markdown), values)
    return atomic_write_text(path, page)


def _write_markdown(path: Path, values: Mapping[str, Any]) -> None:
    files = path.parent / f"{path.stem}_files"
    headline = values["headline"]
    blocks = [headline.figure] if headline and headline.figure else []
    blocks += [block for section in values["sections"] for block in section.blocks]
    for block in blocks:
        if not isinstance(block, Table):
            atomic_write_text(files / f"{block.name}.svg", block.file_text)
    for number, clip in enumerate(values["clips"], start=1):
        atomic_write_bytes(files / f"clip-{number}.flac", clip.flac)
    environment = _environment(autoescape=False, finalize=_markdown)
    text = environment.get_template("report.md.j2").render(**values, files=_Plain(quote(files.name)))
    atomic_write_text(path, re.sub(r"\n{3,}", "\n\n", text))


class _Plain(str):
    """Text that is Markdown already and is not escaped again."""


def _markdown(value: Any) -> str:
    """Any value as one line that Markdown shows unchanged: nothing in it is a tag, a link, a formula or the end of a cell."""
    if isinstance(value, _Plain):
        return value
    text = " ".join(str(value).split())
    text = re.sub(r"([\\`*_{}\[\]#!|~$@])", r"\\\1", text)
    text = re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text, flags=re.IGNORECASE)  # GitHub makes links of these
    # A number or a sign at the start of a line would begin a list.
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([-+=>])", r"\\\1", text))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _environment(**options: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.globals["nothing"] = NOTHING
    environment.filters["plain"] = _Plain
    environment.tests["table"] = lambda block: isinstance(block, Table)
    return environment


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _fact_section(heading: str, rows: Sequence[tuple[str, Any]]) -> Section:
    cells = tuple((str(name), (Cell(str(value)),)) for name, value in rows)
    return Section(heading, (), (Table(f"{heading}.", (Column("name"), Column("value")), cells),))


@dataclass(frozen=True)
class Clip:
    """One clip, its question, and what each system answered in each context."""

    title: str
    flac: bytes
    transcription: str
    question: str
    answer: str
    table: Table  # a row for each system, a column for each context

    @property
    def audio(self) -> str:
        """The clip as a data URI."""
        return f"data:audio/flac;base64,{base64.b64encode(self.flac).decode('ascii')}"


def choose_clips(report: Report) -> tuple[list[Clip], list[str]]:
    """The clips on which the systems disagree most come first. The labels take turns.

    Returns:
        the clips, and the names of clips before them that could not be read.
    """
    if report.audio_root is None or not report.systems:
        return [], []
    by_id = {label: {p.id: p for p in predictions if not p.control} for label, predictions in report.systems.items()}
    verdicts = {
        label: dict(zip(answers, judge(answers.values()).tolist(), strict=True)) for label, answers in by_id.items() if answers
    }
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in report.examples:
        if example.audio is not None and any(example.id in answers for answers in by_id.values()):
            groups[example.pair_id or example.id].append(example)

    def disagreement(group: Sequence[Example]) -> float:
        spread = 0.0
        for e in group:
            seen = [v[e.id] for v in verdicts.values() if e.id in v]
            share = sum(seen) / len(seen) if seen else 0.0
            spread += share * (1 - share)
        return spread

    ordered = sorted(groups.values(), key=lambda g: (-disagreement(g), g[0].id))
    queues: dict[str, list[list[Example]]] = defaultdict(list)
    for group in ordered:
        queues[group[0].answer or ""].append(group)
    turns = [queue[i] for i in range(max(map(len, queues.values()), default=0)) for queue in queues.values() if i < len(queue)]
    clips: list[Clip] = []
    unreadable = []
    for group in turns:
        if len(clips) == report.max_clips:
            break
        first = group[0]
        title = first.pair_id or first.id
        problem = link_problem(report.audio_root, first.audio, allow_links=report.allow_links)
        flac = None if problem else _read_clip(report.audio_root, first)
        if flac is None:
            unreadable.append(f"{title} ({problem})" if problem else title)
            continue
        by_kind = {context_kind(e): e for e in group}
        kinds = [k for k in KINDS if k in by_kind]
        rows = []
        for label, predictions in by_id.items():
            answers = [predictions.get(by_kind[kind].id) for kind in kinds]
            cells = (
                Cell(NOTHING) if p is None else Cell(p.prediction, mark="right" if verdicts[label][p.id] else "wrong")
                for p in answers
            )
            rows.append((label, tuple(cells)))
        columns = (Column("system"), *(Column(CONTEXTS[k], by_kind[k].context) for k in kinds))
        table = Table("Answers of the systems by context.", columns, tuple(rows))
        clips.append(Clip(title, flac, first.transcription, first.question, first.answer or "", table))
    return clips, unreadable


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    arguments = report_parser().parse_args(argv)
    try:
        _check_arguments(arguments)
        systems, curves = _labelled(arguments.predictions), _labelled(arguments.metrics)
        if arguments.reference is not None and arguments.reference not in systems:
            raise ValueError(f"--reference: expected one of {list(systems)}, got {arguments.reference!r}")
        for path in curves.values():
            if not Path(path).is_file():
                raise ValueError(f"--metrics: no file {path!r}")
        report = Report(
            title=arguments.title,
            systems={label: read_predictions(path)[1] for label, path in systems.items()},
            curves={label: read_metrics(path) for label, path in curves.items()},
            max_clips=arguments.max_clips,
            reference=arguments.reference,
        )
        if arguments.results or not systems:
            report.results = Path(arguments.results or RESULTS)
        if arguments.manifest:
            manifest = read_manifest(arguments.manifest, audio_root=arguments.audio_root, check_audio=False)
            report.examples, report.audio_root = manifest.examples, manifest.audio_root
            report.allow_links = arguments.allow_links
        if not systems or not arguments.manifest:
            report.missing = ["Clips to listen to need --predictions and --manifest."]
        path = write_report(arguments.out, report, markdown=arguments.markdown)
    except (EvaluationError, ResultsError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    if arguments.markdown:
        print(arguments.markdown)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Find what contradicts itself before anything is read."""
    if arguments.audio_root and not arguments.manifest:
        raise ValueError("--audio-root: expected --manifest beside it, whose clips lie there")
    if arguments.max_clips < 0:
        raise ValueError(f"--max-clips: expected at least 0, got {arguments.max_clips}")
    if arguments.markdown and same_file(arguments.markdown, arguments.out):
        raise ValueError(f"--markdown: expected another file than --out, got {arguments.markdown!r}")


def _labelled(words: Sequence[str]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for word in words:
        label, equals, path = word.partition("=")
        if not equals or not label or not path:
            raise ValueError(f"expected LABEL=FILE, got {word!r}")
        if label in paths:
            raise ValueError(f"expected each label once, got {label!r} twice")
        paths[label] = path
    return paths


def _read_clip(root: Path, example: Example) -> bytes | None:
    """The span of an example as FLAC; None if it cannot be read or is longer than `_MAX_CLIP_SECONDS`.

    The span is decoded, and the file is not copied: it may hold an hour around the span, or no audio at all.
    """
    try:
        samples = load_audio(
            root / example.audio,
            start_seconds=example.start_seconds,
            end_seconds=example.end_seconds,
            max_seconds=_MAX_CLIP_SECONDS,
        )
    except AudioError:
        return None
    return encode_audio(samples)
