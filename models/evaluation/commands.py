"""Arguments of `ask`, `evaluate` and `priors`."""

from __future__ import annotations

from pathlib import Path

from models.arguments import Parser
from models.audio_lms.settings import DTYPES, FORMULAS
from models.data.manifest import SPLITS
from models.evaluation.benchmarks import NAMES
from models.evaluation.predictions import KINDS

CONTROLS = ("no_audio", "swapped_audio")


def evaluate_parser() -> Parser:
    parser = Parser(prog="python -m models evaluate", description="Ask a model every question and score the answers.")
    parser.add_argument("checkpoint", nargs="?", help="SpeechLM folder, or hub id or folder of an audio LM of transformers")
    parser.add_argument("manifest", nargs="?", help="manifest, or rows of another form (docs/data.md)")
    parser.add_argument("--benchmark", metavar="NAME|MANIFEST", help=f"{', '.join(NAMES)}, or a manifest")
    parser.add_argument("--rescore", metavar="FILE", help="score a predictions file again; no model is needed")
    parser.add_argument(
        "--mode",
        choices=("choice", "generate"),
        help="rank the choices by likelihood, or write freely (default: choice; generate for the published benchmarks)",
    )
    parser.add_argument(
        "--decoding", choices=("greedy", "contrastive"), default="greedy", help="contrastive runs a second path without audio"
    )
    parser.add_argument("--alpha", type=float, help="strength of contrastive decoding (default: 1)")
    parser.add_argument(
        "--formula",
        default="extrapolate",
        choices=FORMULAS,
        help="of contrastive decoding: (1 + alpha) z_audio - alpha z_text, or the CAAD authors' z_audio - alpha z_text",
    )
    parser.add_argument("--temperature", type=float, help="contrastive decoding samples at this (default: the best token)")
    parser.add_argument("--top-k", type=int, help="it samples from this many best tokens (temperature 1, if none is given)")
    parser.add_argument("--top-p", type=float, help="it samples from the fewest tokens that together have this probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_list("--controls", nargs="*", choices=CONTROLS, help="ask again without the audio, or with another clip's")
    parser.add_argument("--split", default="test", choices=SPLITS, help="which split is asked about")
    parser.add_list("--tasks", nargs="*", help="only these tasks")
    parser.add_argument(
        "--features", help="file or folder of the clips' features (python -m models features; default: encode now)"
    )
    parser.add_argument("--audio-root", help="folder of the audio (default: the manifest's), or of a published benchmark")
    parser.add_allow_links()
    parser.add_hears("the model hears and reads other things than in training (the default is what its folder says)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.05, help="share of bad rows or clips above which it stops")
    parser.add_argument(
        "--max-cut-fraction", type=float, default=1.0, help="share of clips longer than the model's window above which it stops"
    )
    parser.add_argument("--batch-examples", type=int, default=32, help="questions in a forward pass")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer in mode generate, in tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default="predictions.jsonl", help="predictions file to write; an unfinished one is continued")
    parser.add_argument(
        "--scorer",
        metavar="lenient|strict|mmau|listen|MODULE:FUNCTION",
        help="what counts as right (default: lenient; the published rule for mmau, mmar and listen)",
    )
    parser.add_argument("--priors", metavar="FILE", help="JSON object id -> answer of a text-only model, for the confusion table")
    parser.add_argument("--compare", metavar="FILE", help="predictions of another system, to compare with by paired bootstrap")
    parser.add_argument("--json", metavar="FILE", help="file to write every figure to")
    return parser


def ask_parser() -> Parser:
    parser = Parser(prog="python -m models ask", description="Ask a model one question about a clip, or about several.")
    parser.add_argument("model", help="SpeechLM folder, or hub id or folder of an audio LM of transformers")
    parser.add_argument("clips", nargs="+", metavar="clip", help="audio file; several for a model that hears several in a turn")
    parser.add_argument("question", help="what is asked")
    parser.add_argument("--alpha", type=float, help="contrastive decoding with this strength (default: greedy)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of an audio LM's weights")
    parser.add_argument("--attention", help="of an audio LM: transformers' attn_implementation, such as flash_attention_2")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def priors_parser() -> Parser:
    parser = Parser(prog="python -m models priors", description="Answer every question from its text alone.")
    parser.add_argument("manifest", type=Path, help="manifest, or rows of another form (docs/data.md)")
    parser.add_argument("--lm", required=True, help="id or folder of a causal language model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_list("--splits", default=["test"], choices=SPLITS, help="which splits are asked about")
    parser.add_list("--contexts", default=["neutral"], choices=KINDS, help="which contexts are asked about")
    parser.add_argument("--batch-examples", type=int, default=32, help="prompts in a forward pass")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    return parser
