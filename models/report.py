"""A report in one HTML file: tables, Shift, controls, training curves, clips to listen to. It loads nothing from anywhere.

    python -m models.report --out report.html --predictions "KD=runs/kd/test.jsonl" "CAAD=runs/caad/test.jsonl" \
                            [--metrics "CAAD=runs/caad/metrics.jsonl"] [--manifest corpus/manifest.jsonl]

Everything shown is computed from saved predictions and metrics, so a report can be made again at any time.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import io
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from models.data.audio import AudioError, encode_audio, load_audio
from models.data.manifest import Example, read_manifest
from models.evaluate import EvaluationError, read_predictions, summarize
from models.io_utils import atomic_write_text
from models.metrics import read_metrics
from models.scoring import KINDS, Estimate, Prediction, context_kind, judge

TEMPLATE_PATH = Path(__file__).parent / "report.html.j2"
CURVES = (
    ("loss", "loss"),
    ("kd", "KD term (nats x tau²)"),
    ("ce", "CE term (nats)"),
    ("top1_agreement", "top-1 agreement with the target distribution"),
    ("path_divergence", "divergence of the teacher's two paths (nats)"),
    ("student_entropy", "student's entropy (nats)"),
    ("grad_norm", "gradient norm before clipping"),
    ("learning_rate", "learning rate"),
)
_MAX_CLIP_SECONDS = 30.0


@dataclass
class Report:
    """What a report shows.

    Args:
        title: heading.
        findings: sentences under it.
        systems: label -> predictions, in the order of the tables.
        curves: label -> lines of a metrics file.
        examples: the manifest's examples, for the clips; audio paths relative to `audio_root`.
        audio_root: None = no clips.
        facts: (heading, rows of (name, value)) tables: settings, data, times.
        max_clips: clips to embed.
    """

    title: str
    findings: Sequence[str] = ()
    systems: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    audio_root: Path | None = None
    facts: Sequence[tuple[str, Sequence[tuple[str, Any]]]] = ()
    max_clips: int = 8


def write_report(path: str | Path, report: Report) -> Path:
    """Write `report` as one self-contained HTML file, atomically.

    Everything that comes from data is escaped; images and clips are embedded.

    Returns:
        the path.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["percent"] = _percent
    template = environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))
    summaries = {label: summarize(predictions) for label, predictions in report.systems.items() if predictions}
    plain = [s["plain"] for s in summaries.values() if "plain" in s]
    html = template.render(
        report=report,
        summaries=summaries,
        kinds=[k for k in KINDS if any(k in s["by_kind"] for s in plain)],
        controls=sorted({name for s in summaries.values() for name in s} - {"plain"}),
        classes=sorted({(task, label) for s in plain for task, labels in s["by_class"].items() for label in labels}),
        figures=draw_curves(report.curves),
        bars=draw_bars(summaries),
        clips=choose_clips(report),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return atomic_write_text(path, html)


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """(caption, data URI of an SVG) for each curve that some run has."""
    figures = []
    for name, caption in CURVES:
        drawn = {
            label: [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
            for label, lines in curves.items()
        }
        drawn = {label: points for label, points in drawn.items() if points}
        if not drawn:
            continue
        figure, axes = _figure(4.6, 2.7)
        for label, points in drawn.items():
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axes.set_xlabel("optimiser step")
        axes.set_title(caption, fontsize=9)
        axes.legend(fontsize=6)
        figures.append((caption, _svg(figure)))
    return figures


def draw_bars(summaries: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Accuracy by kind with its intervals, a group of bars a system, as the data URI of an SVG; None without systems."""
    plain = {label: s["plain"]["by_kind"] for label, s in summaries.items() if "plain" in s}
    if not plain:
        return None
    kinds = [k for k in KINDS if any(k in by_kind for by_kind in plain.values())]
    figure, axes = _figure(8.5, 0.5 + 0.42 * len(plain))
    height = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        estimates = [by_kind.get(kind) for by_kind in plain.values()]
        places = [n + i * height for n in range(len(plain))]
        values = [e.value if e and e.value is not None else 0.0 for e in estimates]
        below = [e.value - e.low if e and e.value is not None else 0.0 for e in estimates]
        above = [e.high - e.value if e and e.value is not None else 0.0 for e in estimates]
        # A percentile interval need not hold the estimate itself when nearly all items agree.
        errors = [[max(0.0, b) for b in below], [max(0.0, a) for a in above]]
        axes.barh(places, values, height=height, xerr=errors, label=kind, error_kw={"linewidth": 0.8})
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(plain))], list(plain), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy")
    axes.legend(fontsize=7, loc="lower right")
    return _svg(figure)


@dataclass(frozen=True)
class Clip:
    """One clip with its question under all contexts and what each system answered."""

    title: str
    audio: str  # data URI
    transcription: str
    question: str
    answer: str
    contexts: list[tuple[str, str]]  # kind, hint
    answers: list[tuple[str, list[tuple[str, bool] | None]]]  # system, by kind: (text, right)


def choose_clips(report: Report) -> list[Clip]:
    """Clips on which the systems disagree most come first: they are worth listening to. Labels take turns."""
    if report.audio_root is None or not report.systems:
        return []
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
    clips = []
    for group in turns:
        if len(clips) == report.max_clips:
            break
        first = group[0]
        audio = _embed_audio(report.audio_root, first)
        if audio is None:
            continue
        by_kind = {context_kind(e): e for e in group}
        kinds = [k for k in KINDS if k in by_kind]
        answers = []
        for label, predictions in by_id.items():
            cells = []
            for kind in kinds:
                p = predictions.get(by_kind[kind].id)
                cells.append(None if p is None else (p.prediction, verdicts[label][p.id]))
            answers.append((label, cells))
        clips.append(
            Clip(
                title=first.pair_id or first.id,
                audio=audio,
                transcription=first.transcription,
                question=first.question,
                answer=first.answer or "",
                contexts=[(k, by_kind[k].context or "-") for k in kinds],
                answers=answers,
            )
        )
    return clips


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m models.report", description="Make an HTML report of saved predictions.")
    parser.add_argument("--out", default="report.html", help="file to write")
    parser.add_argument("--title", default="Evaluation")
    parser.add_argument(
        "--predictions", nargs="+", required=True, metavar="LABEL=FILE", help="what models.evaluate wrote, a system each"
    )
    parser.add_argument("--metrics", nargs="*", default=[], metavar="LABEL=FILE", help="metrics.jsonl of training runs")
    parser.add_argument("--manifest", help="for clips to listen to")
    parser.add_argument("--audio-root", help="folder of the audio (default: the manifest's)")
    parser.add_argument("--max-clips", type=int, default=8, help="clips to embed, 30 s each at most")
    arguments = parser.parse_args(argv)
    try:
        systems, curves = _labelled(arguments.predictions), _labelled(arguments.metrics)
        for path in curves.values():
            if not Path(path).is_file():
                raise ValueError(f"--metrics: no file {path!r}")
        report = Report(
            title=arguments.title,
            systems={label: read_predictions(path)[1] for label, path in systems.items()},
            curves={label: read_metrics(path) for label, path in curves.items()},
            max_clips=arguments.max_clips,
        )
        if arguments.manifest:
            manifest = read_manifest(arguments.manifest, audio_root=arguments.audio_root, check_audio=False)
            report.examples, report.audio_root = manifest.examples, manifest.audio_root
        path = write_report(arguments.out, report)
    except (EvaluationError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


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


def _embed_audio(root: Path, example: Example) -> str | None:
    """Data URI of an example's span as FLAC; None if it cannot be read, or is more than `_MAX_CLIP_SECONDS` long.

    Decoded, not copied: a manifest's file may hold an hour around the span, or be no audio at all.
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
    return f"data:audio/flac;base64,{base64.b64encode(encode_audio(samples)).decode('ascii')}"


def _figure(width_inches: float, height_inches: float) -> tuple[Any, Any]:
    # The object interface: pyplot would keep every figure, and look for a display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a system's name is no formula, whatever dollar signs it has
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _number(value: Any) -> str:
    if isinstance(value, Estimate):
        value = value.value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _percent(estimate: Estimate | None) -> str:
    """The half line under an estimate: its interval and count."""
    if estimate is None or estimate.value is None:
        return ""
    return f"{estimate.low:.3f} to {estimate.high:.3f}, n {estimate.count}"


if __name__ == "__main__":
    sys.exit(main())
