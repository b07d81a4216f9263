"""Arguments of `demo`, `six-systems`, `ablation` and `study`."""

from __future__ import annotations

import argparse

from models.arguments import Parser


def demo_parser() -> Parser:
    parser = Parser(prog="python -m models demo", description="Run the whole path once, from recorded speech to a report.")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and of every draw")
    return _with_stages(parser, out="runs/demo")


def six_systems_parser() -> Parser:
    parser = Parser(prog="python -m models six-systems", description="Make the table of the CAAD paper's six systems.")
    parser.add_argument("--seeds", type=int, help="students to train for each system (default: 5)")
    parser.add_argument("--split", default="test", choices=("test", "dev"), help="the questions to ask")
    parser.add_argument("--no-sweeps", action="store_true", help="make the table without the sweeps")
    parser.add_argument("--write", action="store_true", help="write the tables into models/experiments/results")
    return _with_stages(parser, out="runs/six_systems")


def ablation_parser() -> Parser:
    parser = Parser(prog="python -m models ablation", description="Make the table of teacher sources and layers.")
    parser.add_argument("--study", action="store_true", help="make the table E4 of docs/protocol.md: five seeds, unheard actors")
    parser.add_argument("--write", action="store_true", help="write the table into models/experiments/results")
    return _with_stages(parser, out="runs/ablation")


def study_parser() -> Parser:
    description = "Run the experiments of docs/protocol.md. Stop it and start it again at will."
    parser = Parser(prog="python -m models study", description=description)
    known = "E1, E1B, E2, E3, E5, axes, external, probes"
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {known} (default: E1)")
    parser.add_argument("--teachers", type=int, default=2, help="teachers of each fold")
    parser.add_list("--folds", type=int, default=(0, 1, 2, 3), help="folds of actors")
    parser.add_argument("--cache-dir", help="folder of the stages (default: study in the cache folder)")
    parser.add_argument("--collect", action="store_true", help="run nothing, only gather what is finished")
    parser.add_argument("--write", action="store_true", help="write the tables into models/experiments/results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return _with_stages(parser, out="runs/study")


def _with_stages(parser: Parser, *, out: str) -> Parser:
    """The arguments of every pipeline, and --run-stage, with which the process of a stage is started."""
    help = "synthetic clips and tiny random models: a minute, for CI"
    parser.add_argument("--fast-smoke", "--smoke", action="store_true", help=help)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--out", default=out, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="make every stage again, but keep the downloads")
    parser.add_argument(
        "--workers", type=int, help="stages at a time, each in a process (default: 2); 0 = all in this process"
    )
    parser.add_argument("--run-stage", help=argparse.SUPPRESS)
    return parser
