"""What the documents for contributors say about the tree, held against the tree."""

import re
from pathlib import Path

import kdkernels

ROOT = Path(__file__).parents[1]


def code_spans(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", path.read_text())


def test_one_version():
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert kdkernels.__version__ == project[1] == newest[1]


def test_the_paths_in_contributing_exist():
    paths = [x for x in code_spans(ROOT / "CONTRIBUTING.md") if re.fullmatch(r"[\w./-]+", x) and "/" in x]
    assert len(paths) > 40
    built = ("build/", "results/")  # relative to something else
    assert not [x for x in paths if not (ROOT / x).exists() and x not in built]


def test_the_names_in_contributing_exist():
    """`NAMES_OF_CONSTANTS`, `_private_names` and `CamelCase` stand in the code."""
    names = {x for x in code_spans(ROOT / "CONTRIBUTING.md") if re.fullmatch(r"[A-Z_]{4,}|_?[a-z]+(_[a-z]+)+|([A-Z]\w+){2,}", x)}
    code = "\n".join(path.read_text() for folder in ("kdkernels", "models", "tests") for path in (ROOT / folder).rglob("*.py"))
    words = set(re.findall(r"\w+", code))
    assert len(names) > 15 and not names - words


def test_the_make_targets_in_contributing_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {match[1] for x in code_spans(ROOT / "CONTRIBUTING.md") if (match := re.search(r"\bmake ([a-z]+)", x))}
    assert {"check", "fast", "lint", "test", "matrix", "aot"} <= targets
    assert not [x for x in targets if not re.search(rf"^{x}:", makefile, re.MULTILINE)]


def test_the_hooks_call_what_the_makefile_has():
    hooks = re.findall(r"entry: make (\w+)", (ROOT / ".pre-commit-config.yaml").read_text())
    lint = re.search(r"^lint: (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert hooks == lint[1].split()
