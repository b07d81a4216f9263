"""The command `check`: says what rows of any form hold, and lists what is wrong with them.

    python -m models check MANIFEST [--form messages] [--audio-root FOLDER] [--all]

Nothing is decoded: the headers of the clips say how long they are. (An mp3 has no such count; its packets are added up.)
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from models.data.audio import AudioError, AudioInfo
from models.data.commands import check_parser
from models.data.example import Example
from models.data.manifest import Manifest
from models.data.problems import Problem, list_problems
from models.data.readers import read_data

_SPLITS_SHOWN = 3
# The words that open the reasons of models/data/audio.py and rows.py.
_KINDS = {
    "missing": re.compile(r"audio: missing file"),
    "too long": re.compile(r"audio: too long"),
    "too short": re.compile(r"audio: too short"),
    "link that leaves the audio root": re.compile(r"audio: path leaves the audio root"),
    "unreadable": re.compile(r"audio: (?!expected)"),
    "row": re.compile(r""),
}


def describe(manifest: Manifest, infos: dict[str, AudioInfo | AudioError], *, rows: int) -> list[str]:
    """What the rows hold, as lines for the terminal.

    Args:
        infos: of the clips, as `read_data` fills it.
        rows: of the file, the bad ones too.
    """
    examples = manifest.examples
    lines = [f"form: {manifest.header.get('form', 'manifest')}"]
    lines += [f"rows: {rows}, {len(manifest.problems)} of them bad" + _counted(_kind(p) for p in manifest.problems)]
    spans = {clip for e in examples for clip in e.clips}
    files = {audio for audio, _, _ in spans}
    seconds = [_seconds(infos.get(audio), start, end) for audio, start, end in spans]
    clips = f"clips: {len(spans)} in {len(files)} files, {sum(seconds) / 3600:.2f} hours"
    if seconds:
        clips += f"; the shortest {min(seconds):.1f} s, the longest {max(seconds):.1f} s"
    texts = sum(e.audio is None for e in examples)
    lines += [clips + (f"; {texts} examples without a clip" if texts else "")]
    if without := sum(not e.question.strip() for e in examples):
        lines += [f"questions: {without} examples have none, so a model reads the rest of the prompt alone"]
    lines += _answers(examples)
    lines += _repeated(examples)
    return [*lines, manifest.summary(problems=False)]


def script_of(text: str) -> str:
    """The script of most letters of `text` (Latin, Han, Hangul ...), by the first word of their Unicode names; - without any."""
    found = Counter(unicodedata.name(c, "?").split(" ")[0].removesuffix("-UNIFIED") for c in text if c.isalpha())
    if not found:
        return "-"
    script = found.most_common(1)[0][0]
    return {"CJK": "Han"}.get(script, script.capitalize())


def main(argv: Sequence[str] | None = None) -> int:
    """The command `check`: status 1 if the rows cannot be read or more of them are bad than allowed."""
    arguments = check_parser().parse_args(argv)
    infos: dict[str, AudioInfo | AudioError] = {}
    try:
        if not 0.0 <= arguments.max_bad_fraction <= 1.0:
            raise ValueError(f"--max-bad-fraction: expected a number from 0 to 1, got {arguments.max_bad_fraction}")
        if not arguments.max_seconds > 0:
            raise ValueError(f"--max-seconds: expected a positive number, got {arguments.max_seconds}")
        manifest = read_data(
            arguments.manifest,
            form=arguments.form,
            audio_root=arguments.audio_root,
            max_bad_fraction=1.0,
            max_seconds=arguments.max_seconds,
            allow_links=arguments.allow_links,
            infos=infos,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    problems = manifest.problems
    rows = manifest.rows
    print("\n".join(describe(manifest, infos, rows=rows)))
    shown = {"limit": None} if arguments.all else {"how": "; --all lists them"}
    listed = list_problems(problems, **shown)
    refused = len(problems) > arguments.max_bad_fraction * rows
    if refused:
        listed = [f"error: {arguments.manifest}: {len(problems)} of {rows} rows are bad", *listed]
    if listed:
        print("\n".join(listed), file=sys.stderr if refused else sys.stdout)
    return int(refused)


def _kind(problem: Problem) -> str:
    return next(kind for kind, pattern in _KINDS.items() if pattern.match(problem.reason))


def _counted(kinds: Iterable[str]) -> str:
    counts = Counter(kinds)
    named = {"row": "other reasons"}
    return (
        f" ({', '.join(f'{named.get(kind, kind)} {count}' for kind, count in counts.most_common())})" if counts else ""
    )


def _seconds(info: AudioInfo | AudioError | None, start: float, end: float | None) -> float:
    whole = info.duration_seconds if isinstance(info, AudioInfo) else 0.0
    return (whole if end is None else min(end, whole)) - start


def _answers(examples: Sequence[Example]) -> list[str]:
    """Lengths of the targets (of the answers where there is no target), by script."""
    by_script: dict[str, list[int]] = defaultdict(list)
    for example in examples:
        if text := (example.target or example.answer or "").strip():
            by_script[script_of(text)].append(len(text))
    without = sum(not (e.target or "").strip() for e in examples)
    lines = [f"answers: {len(examples) - without} examples have a target, {without} have none"]
    for script, lengths in sorted(by_script.items(), key=lambda item: -len(item[1])):
        median, high = np.percentile(lengths, [50, 95])
        lines.append(
            f"  {script:12} {len(lengths):6}; characters: median {median:.0f}, 95% {high:.0f}, longest {max(lengths)}"
        )
    return lines


def _repeated(examples: Sequence[Example]) -> list[str]:
    """Questions that stand twice, and clips that stand in several splits."""
    asked = Counter((e.clips, e.question, e.context, e.choices) for e in examples)
    again = sum(count - 1 for count in asked.values())
    splits: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        for audio, _, _ in example.clips:
            splits[audio].add(example.split)
    shared = sorted(audio for audio, names in splits.items() if len(names) > 1)
    lines = [f"duplicates: {again} examples ask the same question about the same clip again"]
    if shared:
        named = ", ".join(f"{audio} ({'+'.join(sorted(splits[audio]))})" for audio in shared[:_SPLITS_SHOWN])
        lines.append(f"  {len(shared)} files stand in several splits: {named}")
    return lines
