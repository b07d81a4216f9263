"""The command line: the map of the flow, light help, and errors of use in one line."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.arguments import Collect, Parser
from models.cli import COMMANDS, main, parser_of

ROOT = Path(__file__).parents[2]
FLOW = ["corpus", "pseudo-gt", "features", "cache", "train", "evaluate", "report", "demo"]


def test_the_list_has_one_line_a_command_in_the_order_of_the_flow(capsys):
    assert main(["--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    names = [words[0] for words in lines]
    assert names == list(COMMANDS) and all(len(words) > 2 for words in lines)
    assert [name for name in names if name in FLOW] == FLOW


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and shown.startswith(f"usage: python -m models {name}")
    assert all(action.help for action in parser_of(name)._actions if action.option_strings and action.dest in ("out", "device"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_default_is_in_the_help_once(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # no help is broken at a hyphen
    parser = parser_of(name)
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.option_strings and "==SUPPRESS==" not in (action.help, action.default):
            helped = " ".join((action.help or "").split())
            assert helped.replace("%%", "%") in shown and helped.count("default") <= 1, action.option_strings
            if action.default not in (None, "", []) and action.default is not False:
                assert "default" in helped, action.option_strings


def test_a_default_is_shown_as_it_is_typed():
    parser = Parser(prog="test")
    parser.add_argument("--rate", default=0, help="a rate")
    parser.add_argument("--share", default="5%", help="a share")
    parser.add_argument("--form", default="auto", help="a form (default: found)")
    parser.add_argument("--quick", action="store_true", help="be quick")
    parser.add_argument("--name", default="", help="a name")
    parser.add_argument("--hidden", default=1, help=argparse.SUPPRESS)
    parser.add_list("--folds", default=(0, 1), help="folds")
    parser.add_list("--tasks", help="tasks")
    parser.add_comma_list("--splits", default="train,dev", help="splits")
    shown = " ".join(parser.format_help().split())
    for helped in ("a rate (default: 0)", "a share (default: 5%)", "folds (default: 0 1)", "splits (default: train,dev)"):
        assert helped in shown
    assert shown.count("(default: ") == 5 and "a form (default: found) --quick be quick --name NAME a name --folds" in shown


def test_help_imports_nothing_heavy():
    code = (
        "import contextlib, io, sys\n"
        "from models.cli import COMMANDS, main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        "    for name in COMMANDS:\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main([name, '--help'])\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'kdkernels'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: there is no command 'trian'; did you mean train? (python -m models --help)"),
        (["xyz"], "error: there is no command 'xyz' (python -m models --help)"),
        (["evaluate", "--contrl", "no_audio"], "did you mean --controls? (python -m models evaluate --help)"),
        (["corpus", "--out", "x", "--size", "dmo"], "did you mean demo? (python -m models corpus --help)"),
        (["cache"], "the following arguments are required: teacher, --out"),
        (["cache", "teacher", "--out", "x"], "the following arguments are required: manifest, or --project"),
        (["train"], "error: expected the name or the file of a recipe, got none"),
        (["backbones", "ftch"], "did you mean fetch?"),
    ],
)
def test_an_error_of_use_is_one_line_with_status_2(words, message, capsys):
    try:
        status = main(words)
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1


def test_no_command_shows_the_list(capsys):
    assert main([]) == 2
    assert "train" in capsys.readouterr().out


def test_a_repeated_option_holds_the_words_of_both():
    parser = parser_of("report")
    assert parser.parse_args(["--predictions", "A=a", "--predictions", "B=b", "C=c"]).predictions == ["A=a", "B=b", "C=c"]
    assert parser.parse_args([]).predictions == [] == parser.parse_args([]).predictions
    priors = parser_of("priors")
    words = ["m.jsonl", "--lm", "x", "--out", "y"]
    assert priors.parse_args(words).splits == ["test"]
    assert priors.parse_args([*words, "--splits", "dev", "--splits", "train"]).splits == ["dev", "train"]


@pytest.mark.parametrize(
    ("name", "words", "option", "value"),
    [
        ("corpus", ["--out", "x", "--sources", "queen", "--sources", "tux,espeak"], "sources", "queen,tux,espeak"),
        ("corpus", ["--out", "x", "--tasks", "gender", "--tasks", "accent"], "tasks", "gender,accent"),
        ("corpus", ["--out", "x"], "tasks", None),
        ("pseudo-gt", ["m", "--out", "x", "--splits", "train,dev", "--splits", "test"], "splits", "train,dev,test"),
        ("pseudo-gt", ["m", "--out", "x", "--splits", "dev"], "splits", "dev"),
        ("pseudo-gt", ["m", "--out", "x"], "splits", "train,dev"),
        ("pseudo-gt", ["m", "--out", "x", "--task", "gender", "--task", "accent"], "task", ["gender", "accent"]),
        ("pseudo-gt", ["m", "--out", "x", "--pool", "teacher", "--pool", "distill"], "pool", ["teacher", "distill"]),
        ("heal", ["m", "t", "--keep-layers", "0-6", "--keep-layers", "27-29"], "keep_layers", "0-6,27-29"),
        ("cache", ["t", "m", "--out", "x", "--layers", "6", "--layers", "12,30"], "layers", "6,12,30"),
    ],
)
def test_lists_between_commas_given_twice_hold_both(name, words, option, value):
    assert getattr(parser_of(name).parse_args(words), option) == value


def test_no_option_of_several_words_keeps_only_its_last_use():
    for name in COMMANDS:
        for action in parser_of(name)._actions:
            if action.option_strings and action.nargs in ("+", "*"):
                assert isinstance(action, Collect), (name, action.option_strings)
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for call in re.findall(r'add_argument\(\s*"--[^)]*nargs="[+*]"[^)]*', path.read_text(encoding="utf-8")):
            assert "action=Collect" in call, (path.name, call)
