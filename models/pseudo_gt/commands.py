"""Arguments of `pseudo-gt`."""

from __future__ import annotations

from pathlib import Path

from models.arguments import Parser

DEFAULT_BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCES = ("text_backbone", "template")
DEFAULT_MAX_NEW_TOKENS = 24
DEFAULT_MAX_CHARACTERS = 160


def pseudo_gt_parser() -> Parser:
    parser = Parser(
        prog="python -m models pseudo-gt", description="Stage 1: write the answers that the student learns from."
    )
    parser.add_argument("manifest", type=Path, help="JSONL manifest")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write")
    parser.add_argument("--source", default="text_backbone", choices=SOURCES, help="who writes the answers")
    parser.add_argument("--backbone", help=f"id or folder of a causal language model (default: {DEFAULT_BACKBONE})")
    parser.add_comma_list(
        "--splits", default="train,dev", help="comma-separated splits that get answers; the others are copied"
    )
    parser.add_list("--pool", nargs=1, help='only rows with this metadata["pool"]; may be repeated; the others are copied')
    parser.add_list("--task", nargs=1, help="only rows of this task; may be repeated; the others are copied")
    parser.add_argument("--batch-examples", type=int, default=64, help="rows that the backbone reads at once")
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=0.5,
        help="share of rejected answers above which no manifest is written",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="longest answer of the backbone; one that does not end within these tokens is rejected "
        f"(default: {DEFAULT_MAX_NEW_TOKENS})",
    )
    parser.add_argument(
        "--max-characters", type=int, default=DEFAULT_MAX_CHARACTERS, help="a longer answer is rejected"
    )
    parser.add_argument("--restart", action="store_true", help="discard the answers of an unfinished run and begin again")
    parser.add_argument("--audio-root", type=Path, help="folder of the audio (default: the manifest's)")
    parser.add_allow_links()
    return parser
