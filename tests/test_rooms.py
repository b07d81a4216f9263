"""The house: in models/ an import goes down or stays in its room, no imports run in a circle, kdkernels stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top floor down. A module that stands beside the rooms is a floor of its own.
ROOMS = (
    "cli", "experiments", "reporting", "evaluation", "training", "pseudo_gt", "speech_lm", "audio_lms", "corpora", "backbones",
    "data", "arguments", "io_utils",
)  # fmt: skip


def modules(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """Module name -> file, of every Python file under `packages`."""
    files = [file for package in packages for file in sorted((root / package).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The known modules that a file imports, those inside functions and under TYPE_CHECKING included."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names} & known.keys()
            found |= submodules or {module}
    return {module for module in found if module in known and module != name}


def upward(edges: dict[str, set[str]], rooms: tuple[str, ...]) -> list[str]:
    """Imports from a lower room into a higher one."""
    floor = {room: number for number, room in enumerate(rooms)}
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if name.count(".") and other.count(".") and floor[other.split(".")[1]] < floor[name.split(".")[1]]
    ]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in edges[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    reached = {name: reach(name) for name in edges}
    groups = {tuple(sorted(o for o in reached[name] if name in reached[o])) for name in edges if name in reached[name]}
    return [list(group) for group in sorted(groups)]


def edges_of(root: Path, *packages: str) -> dict[str, set[str]]:
    known = modules(root, packages)
    return {name: imports(name, file, known) for name, file in known.items()}


def test_every_file_of_models_is_in_a_room():
    names = {name.split(".")[1] for name in modules(ROOT, ("models",)) if "." in name}
    assert names - {"__main__", "examples"} <= set(ROOMS)


def test_imports_go_down_or_stay():
    edges = {n: o for n, o in edges_of(ROOT, "models").items() if n.split(".")[-1] != "__main__" and "examples" not in n}
    assert upward(edges, ROOMS) == []


def test_no_imports_run_in_a_circle():
    # A package's __init__ hands on the names of its modules, which ties it to each of them.
    edges = edges_of(ROOT, "kdkernels", "models", "benchmarks")
    inits = {name for name, file in modules(ROOT, ("kdkernels", "models", "benchmarks")).items() if file.name == "__init__.py"}
    assert circles({name: others - inits for name, others in edges.items() if name not in inits}) == []


def test_kdkernels_reaches_nothing_outside_itself():
    edges = edges_of(ROOT, "kdkernels", "models", "benchmarks", "tests")
    reached = {other for name, others in edges.items() if name.startswith("kdkernels") for other in others}
    assert {other for other in reached if not other.startswith("kdkernels")} == set()


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"low/a.py": "from p.top import b", "top/b.py": ""}, "upward"),
        ({"low/a.py": "def f():\n    import p.top.b", "top/b.py": ""}, "upward"),
        ({"low/a.py": "from ..top.b import x", "top/b.py": "x = 1"}, "upward"),
        ({"low/a.py": "from p.low.b import x", "low/b.py": "def f():\n    from p.low import a"}, "circle"),
        ({"top/b.py": "from p.low import a", "low/a.py": ""}, ""),
    ],
)
def test_the_check_sees_what_it_forbids(tmp_path, files, wrong):
    for name, text in files.items():
        file = tmp_path / "p" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    edges = edges_of(tmp_path, "p")
    assert bool(upward(edges, ("top", "low"))) == (wrong == "upward")
    assert bool(circles(edges)) == (wrong == "circle")
