"""Arguments of `check` and `convert`."""

from __future__ import annotations

from pathlib import Path

from models.arguments import Parser
from models.data.audio import MAX_SECONDS
from models.data.example import SPLITS

FORMS = ("desta", "messages", "columns", "nemo", "lhotse", "kaldi", "dynamic_superb", "mcr_bench")


def check_parser() -> Parser:
    parser = Parser(
        prog="python -m models check",
        description="Read rows of any form, say what they hold, and list what is wrong with them.",
    )
    parser.add_argument("manifest", type=Path, help="manifest, or rows of another form (file or folder)")
    parser.add_argument(
        "--form", choices=("auto", "manifest", *FORMS), default="auto", help="layout of the rows (default: found)"
    )
    parser.add_argument("--audio-root", type=Path, help="folder of the audio (default: the manifest's)")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.0, help="share of bad rows above which the status is 1"
    )
    parser.add_argument("--max-seconds", type=float, default=MAX_SECONDS, help="a longer clip makes its row bad")
    parser.add_argument("--all", action="store_true", help="list all bad rows (default: the first 20)")
    parser.add_allow_links()
    return parser


def convert_parser() -> Parser:
    parser = Parser(prog="python -m models convert", description="Turn rows of another layout into a manifest.")
    parser.add_argument(
        "rows", type=Path, help="JSON or JSONL file, Kaldi's folder, or a data set of the package datasets"
    )
    parser.add_argument("--form", choices=("auto", *FORMS), default="auto", help="layout of the rows (default: found)")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write; it names the folder of the audio")
    parser.add_argument("--audio-root", type=Path, help="folder of the audio (default: the rows')")
    parser.add_argument(
        "--split", choices=SPLITS, help="split of rows that name none (default: test for the benchmarks, else train)"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.05, help="share of bad rows above which nothing is written"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an OUT that holds something else")
    parser.add_allow_links()
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="write while reading, with one row in memory; a run that was stopped goes on where it was",
    )
    return parser
