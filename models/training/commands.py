"""Arguments of `train`, `cache` and `push`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from models.arguments import MixedParser, Parser
from models.audio_lms.settings import DTYPES, NEGATIVES

RECIPES_DIR = Path(__file__).parent / "recipes"
CACHE_DTYPES = ("bfloat16", "float32", "float8")
PROJECTION_DTYPES = ("float32", "bfloat16")


def train_parser() -> Parser:
    parser = Parser(
        prog="python -m models train",
        description="Train a speech LM, or an audio LM of transformers, by a recipe. Ctrl-C or SIGTERM saves and stops; "
        "run.resume=auto continues.",
        epilog=describe_recipes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as loss.alpha=1 run.out_dir=runs/caad1")
    parser.add_argument("--keys", action="store_true", help="list every key of a recipe, its default and its meaning, and exit")
    return parser


def plan_parser() -> Parser:
    parser = MixedParser(
        prog="python -m models plan",
        description="Estimate memory and time of a recipe, before a weight is loaded.",
        epilog=describe_recipes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    parser.add_argument("--teacher", metavar="RECIPE", help="the recipe that will make teacher.folder, where it is not there yet")
    parser.add_argument("--gpu", default="H100", help="H100, H200, A100, B200, RTX 4090 or RTX 5090")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs; more than one needs run.parallel")
    parser.add_argument("--clips", type=int, help="clips, with one question each (default: those of data.manifest)")
    parser.add_argument("--clip-seconds", type=float, help="mean length of a clip (default: that of data.manifest, or 10)")
    parser.add_argument("--prompt-tokens", type=float, help="mean tokens of the prompt without the audio (default: 40)")
    parser.add_argument("--answer-tokens", type=float, help="mean tokens of the answer (default: 32)")
    parser.add_argument(
        "--utilisation", type=float, default=0.45, help="share of the GPU's GEMM rate that the models reach, in (0, 1]"
    )
    return parser


def describe_recipes() -> str:
    """The shipped recipes, each with the first words of its file."""
    lines = ["recipes:"]
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        lines.append(f"  {path.stem:17} {re.split(r'[.:;] ', comment)[0].rstrip('.')}")
    return "\n".join(lines)


def cache_parser() -> Parser:
    parser = Parser(
        prog="python -m models cache",
        description="Run the teacher once and store its hidden states; with --project also their projections for one LM head.",
    )
    parser.add_argument("teacher", help="folder of a SpeechLM, or hub id or folder of an audio LM of transformers")
    parser.add_argument(
        "manifest",
        nargs="?",
        help="manifest with targets (python -m models pseudo-gt), or rows of another form; none = --project what --out has",
    )
    parser.add_argument("--out", required=True, help="folder of the cache, new or begun")
    parser.add_argument("--audio-root", help="folder of the audio (default: the manifest's)")
    parser.add_allow_links()
    parser.add_argument(
        "--features", help="file or folder of the clips' features (python -m models features; default: encode now)"
    )
    parser.add_argument(
        "--max-cut-fraction", type=float, default=0.1, help="share of clips longer than the model's window above which it stops"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=CACHE_DTYPES, help="dtype of the stored states")
    parser.add_argument("--teacher-dtype", default="auto", choices=DTYPES, help="of an audio LM's weights")
    parser.add_argument("--attention", help="of an audio LM: transformers' attn_implementation, such as flash_attention_2")
    parser.add_hears("the teacher hears and reads other things than the clip and the prompt as they are")
    parser.add_argument(
        "--negative",
        default="zeros",
        choices=NEGATIVES,
        help="path without the audio, of an audio LM: features of zeros, features of silence, or a prompt without clip",
    )
    parser.add_comma_list("--layers", default="none", help="layers to store too: none, all, or numbers such as 6,12,30")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th sample, beginning with the I-th; I from 0")
    parser.add_argument("--batch-examples", type=int, default=32, help="samples in a forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="compare N samples with live ones at the end")
    parser.add_list(
        "--project",
        metavar="RECIPE KEY=VALUE",
        help="recipe of a run to come, as for train: project the states for its student's frozen LM head (teacher.projection)",
    )
    parser.add_argument(
        "--tail-dtype", default="float32", choices=PROJECTION_DTYPES, help="dtype of the tail of each projection"
    )
    parser.add_argument("--served", metavar="REQUESTS", help="JSONL file of a server's requests, whose states are stored")
    parser.add_argument("--served-layers", help="layers that the server kept, in their order: 2,14,28 (default: the last alone)")
    parser.add_argument(
        "--served-tolerance",
        type=float,
        default=0.1,
        metavar="NATS",
        help="largest mean difference between the server's log-probabilities of a sample and those of its states",
    )
    return parser


def push_parser() -> Parser:
    parser = Parser(
        prog="python -m models push", description="Push a saved model to the model hub; the token is that of HF_TOKEN."
    )
    parser.add_argument("folder", help="what a run left in run.out_dir/final, or another saved model")
    parser.add_argument("repository", metavar="OWNER/NAME", help="it is made if there is none")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    return parser
