"""What SECURITY.md promises of the code: nothing runs what it reads, and every dependency is named with what it is given."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("kdkernels", "models", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
# Modules whose reading runs code, and calls by name.
REFUSED_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
REFUSED_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load"}


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def complaints(source: str) -> list[str]:
    """"line: what" of everything in a module that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: import {m}" for m in modules if m.split(".")[0] in REFUSED_MODULES]
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            found += [f"{node.lineno}: {name}()"] if name in REFUSED_CALLS else []
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            found += [f"{node.lineno}: {key}=True" for key in ("shell", "trust_remote_code", "allow_pickle") if given.get(key)]
            if name.startswith("Auto") and name.endswith(".from_pretrained") and given.get("trust_remote_code") is not False:
                found.append(f"{node.lineno}: {name}() without trust_remote_code=False")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "x = eval('1')", "torch.load(path)", "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path)", "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_what_is_refused_is_seen(source):
    assert complaints(source)


def test_nothing_runs_what_it_reads():
    assert len(SOURCES) > 100
    found = [f"{path.relative_to(ROOT)}:{what}" for path in SOURCES for what in complaints(path.read_text(encoding="utf-8"))]
    assert found == []


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    return modules


def test_every_dependency_is_named_with_what_it_is_given():
    """SECURITY.md's table is pyproject's list, and what kdkernels and models import is in it."""
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    of_users = ("train", "triton", "audio-lms", "datasets", "deepspeed", "gpu", "trl")  # not of tests, benchmarks and documents
    listed = [*project["dependencies"], *(each for name in of_users for each in extras[name])]
    declared = {re.split(r"[<>=;\[ ]", each)[0] for each in listed} - {"kdkernels"}
    declared |= {"mistral-common"} if any(each.startswith("transformers[mistral-common]") for each in listed) else set()
    section = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## Dependencies")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ") and not line.startswith("| ---")][1:]
    named = {name for row in rows for name in re.findall(r"[\w-]+", row)}
    assert named == declared
    optional = {"flash_attn", "liger_kernel", "pyarrow"}  # used where the user has them
    used = set().union(*(imported(p) for p in SOURCES if not p.is_relative_to(ROOT / "benchmarks")))
    examples = {path.stem for path in (ROOT / "models" / "examples").glob("*.py")}  # scripts import each other by name
    foreign = used - sys.stdlib_module_names - {"kdkernels", "models", "benchmarks", *examples} - optional
    of_these = {"huggingface-hub", "tokenizers", "markupsafe", "typing-extensions"}  # transformers', jinja2's and torch's own
    assert {name.replace("_", "-") for name in foreign} <= declared | of_these
