"""Every command line of README.md, csrc/README.md, docs/ and the list of GPU items is one that its own parser takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.tables import ROOT, pages
from models import cli
from models.training.recipe_files import load_recipe

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash")
INLINE = re.compile(r"`((?:python|torchrun|make|pip) [^`\n]+)`")
STARTS = ("python ", "torchrun ", "make ", "pip ", "srun ")
# Options of torchrun, and what their values look like; $NAME is a variable of Slurm.
TORCHRUN = {
    "--nnodes": r"\d+|\$SLURM_NNODES", "--nproc-per-node": r"\d+", "--rdzv-backend": "c10d", "--rdzv-id": r"\$SLURM_JOB_ID",
    "--rdzv-endpoint": r"\$?HOST:\d+",
}  # fmt: skip
# A name of a command, not a call of it.
NAMES_ONLY = {"python -m models COMMAND --help", "python -m models --help"}


class Parsed(Exception):
    """A parser has taken the words; nothing after that runs."""


def command_lines() -> Iterator[tuple[Path, str]]:
    for page in [*pages(), ROOT / "csrc" / "README.md", ROOT / "benchmarks" / "gpu" / "QUEUE.md"]:
        text = page.read_text(encoding="utf-8")
        fenced = [
            line for language, block in FENCED.findall(text) if language in SHELL
            for line in block.splitlines() if line.startswith(STARTS)
        ]  # fmt: skip
        for line in dict.fromkeys(fenced + INLINE.findall(FENCED.sub("", text))):
            yield page, line.split("  #")[0].split("     ")[0].strip()


LINES = [(page.name, line) for page, line in command_lines() if line not in NAMES_ONLY]


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def extras() -> set[str]:
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


def check_models(words: list[str]) -> None:
    name, *rest = words
    assert name in cli.COMMANDS, f"expected one of {', '.join(cli.COMMANDS)}, got {name!r}"
    parsed = cli.parser_of(name).parse_args(rest)
    if name in ("train", "plan") and parsed.recipe is not None:
        load_recipe(parsed.recipe, parsed.overrides)


def check_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By `main(words)` of a module, which is stopped as soon as its parser has taken them."""
    real = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given) -> None:
        real(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(words)


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises where a program, target, extra, argument or value is not known."""
    words = shlex.split(line)
    program = words.pop(0)
    if program == "srun":  # of Slurm: it starts the command on every node
        program = words.pop(0)
    if program == "bash":
        words = shlex.split(words[1])
        program = words.pop(0)
    if program == "torchrun":
        while words[0] in TORCHRUN:
            assert re.fullmatch(TORCHRUN[words.pop(0)], words.pop(0)), line
        program = "python"
    if program == "make":
        names = [word for word in words if "=" not in word]
        assert set(names) <= targets(), names
    elif program == "pip":
        assert words.pop(0) == "install"
        asked = {
            name.strip() for word in words for part in re.findall(r"\[([^]]+)\]", word) for name in part.split(",")
        }
        assert asked <= extras(), asked
        defined = [
            word.split("=")[0].removeprefix("cmake.define.") for word in words if word.startswith("cmake.define.")
        ]
        sources = [ROOT / "csrc" / "CMakeLists.txt", ROOT / "csrc" / "cuda" / "cuda_part.cmake"]
        known = "".join(path.read_text(encoding="utf-8") for path in sources)
        assert all(name in known or name.startswith("CMAKE_") for name in defined), defined
    else:
        assert program == "python" and words.pop(0) == "-m", line
        module, *rest = words
        if module == "models":
            check_models(rest)
        elif module == "pytest":
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), line
        else:
            assert module.startswith(("benchmarks.", "docs.")), line
            check_module(module, rest, monkeypatch)


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_command_is_known(page, line, monkeypatch):
    check(line, monkeypatch)


def test_blocks_behind_python_are_found():
    found = dict.fromkeys(page for page, line in LINES if line.startswith("python -m models train"))
    assert {"caches.md", "training.md"} <= set(found)
    assert ("README.md", 'python -m models ask runs/qwen_omni/final clip.wav "Who is speaking?"') in LINES


def test_every_command_of_the_flow_is_in_the_docs():
    shown = {line.split()[3] for _, line in LINES if line.startswith("python -m models ")}
    assert shown == set(cli.COMMANDS)


@pytest.mark.parametrize(
    "line",
    [
        "make nonsense",
        "pip install '.[nonsense]'",
        "pip install . -C cmake.define.NONSENSE=ON",
        "python -m models nonsense",
        "python -m models corpus --nonsense",
        "python -m models train caad loss.nonsense=1",
        "python -m benchmarks.linear --sweep nonsense",
    ],
)
def test_a_wrong_command_is_seen(line, monkeypatch, capsys):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(line, monkeypatch)
