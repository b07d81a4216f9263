"""Arguments of `corpus` and `card`."""

from __future__ import annotations

from pathlib import Path

from models.arguments import Parser
from models.corpora.plans.base import ACTOR_FOLDS, DEFAULT_FOLD, SIZES, SOURCES
from models.data.prompts import TASKS


def corpus_parser() -> Parser:
    parser = Parser(prog="python -m models corpus", description="Build one of the built-in corpora.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips and manifest.jsonl")
    parser.add_argument("--size", default="demo", choices=list(SIZES), help="which corpus, and how much of it")
    parser.add_comma_list("--sources", help=f"comma-separated, of {','.join(SOURCES)} (default: those of the size)")
    parser.add_comma_list("--tasks", help=f"comma-separated, of {','.join(TASKS)} (default: all that the sources allow)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of sentences, noises and hints")
    parser.add_argument("--hint-correlation", type=float, default=0.95, help="share of true hints in the teacher's set")
    parser.add_argument("--min-snr-db", type=float, default=-18.0, help="strongest noise of the gender task")
    parser.add_argument("--max-snr-db", type=float, default=2.0, help="weakest noise of the gender task")
    parser.add_argument("--max-seconds", type=float, default=4.0, help="clips are cut to this length")
    folds = (*map(str, range(len(ACTOR_FOLDS))), "characters")
    help = "the game's actors that are in dev and test; characters = as the published tables"
    parser.add_argument("--fold", choices=folds, default=str(DEFAULT_FOLD), help=help)
    return parser


def card_parser() -> Parser:
    parser = Parser(prog="python -m models card", description="Describe a built-in corpus in Markdown.")
    parser.add_argument("manifest", type=Path, help="JSONL manifest of a built-in corpus")
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: standard output)")
    return parser
