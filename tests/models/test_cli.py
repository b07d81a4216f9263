"""The command line: the map of the flow, light help, and errors of use in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
        (["cache", "teacher"], "the following arguments are required: manifest, --out"),
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
