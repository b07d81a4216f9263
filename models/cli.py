"""The command line: `python -m models COMMAND ...`.

COMMANDS is the map of the flow. Arguments are checked before a command's module is imported: help and errors of use come at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from models.arguments import Parser, nearest


class Command(NamedTuple):
    """One command: the module whose `main(argv)` runs it, and its line in the list."""

    module: str
    summary: str


COMMANDS = {
    "corpus": Command("corpora.build", "build one of the built-in corpora: clips and a manifest of questions"),
    "card": Command("corpora.card", "describe a built-in corpus: what it holds, licences, known weaknesses"),
    "convert": Command("data.convert", "turn rows of another layout into a manifest"),
    "check": Command("data.check", "read rows of any form, say what they hold and what is wrong with them"),
    "backbones": Command("backbones.resolve", "fetch language models and audio encoders ahead of a run, or list them"),
    "heal": Command("backbones.healing", "make a smaller language model: drop layers, then train it on text"),
    "pseudo-gt": Command("pseudo_gt.stage1", "Stage 1: write the answers that the student learns from"),
    "features": Command("speech_lm.features", "run every clip through the frozen audio encoder once"),
    "cache": Command("training.fill_cache", "run the teacher once and store its hidden states"),
    "train": Command("training.train", "train a speech LM or an audio LM of transformers by a recipe"),
    "push": Command("training.publish", "push a result to the model hub"),
    "plan": Command("training.plan", "estimate memory and time of a recipe before it runs"),
    "priors": Command("evaluation.text_priors", "answer every question from its text alone"),
    "ask": Command("evaluation.ask_one", "ask a model one question about a clip"),
    "evaluate": Command("evaluation.evaluate", "ask a model every question and score the answers"),
    "report": Command("reporting.report", "write stored results as one HTML or Markdown page"),
    "demo": Command("experiments.demo", "run the whole path once, from recorded speech to a report"),
    "six-systems": Command("experiments.six_systems", "make the table of the CAAD paper's six systems"),
    "ablation": Command("experiments.ablation", "make the table of teacher sources and layers"),
    "study": Command("experiments.study", "run the study of several teachers and unheard actors, docs/protocol.md"),
}


def usage() -> str:
    """The list of commands, one line each, in the order of the flow."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m models COMMAND [arguments]", "", *lines, "", "python -m models COMMAND --help lists its arguments."]
    )


def parser_of(name: str) -> Parser:
    """The parser of a command: `NAME_parser` of its room's commands.py."""
    room = COMMANDS[name].module.split(".")[0]
    return getattr(importlib.import_module(f"models.{room}.commands"), f"{name.replace('-', '_')}_parser")()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; 2 where the command line is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = nearest(name, list(COMMANDS))
        hint = f"; did you mean {near}?" if near else ""
        print(f"error: there is no command {name!r}{hint} (python -m models --help)", file=sys.stderr)
        return 2
    parser_of(name).parse_args(rest)
    return importlib.import_module(f"models.{COMMANDS[name].module}").main(rest)
