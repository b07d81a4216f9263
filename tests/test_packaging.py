"""What pyproject.toml promises: versions that work together, an sdist whose tests pass, types that a user's mypy accepts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def lower_bounds(extra: str) -> dict[str, tuple[int, ...]]:
    """Package -> the lowest version that the extra accepts."""
    found = (re.match(r"([\w-]+)(?:\[[\w,-]+\])?>=([\d.]+)", each) for each in EXTRAS[extra])
    return {match[1]: tuple(map(int, match[2].split("."))) for match in found if match}


def test_the_build_backend_reads_the_license():
    """An SPDX expression as the license is an error in scikit-build-core 0.10."""
    assert isinstance(PYPROJECT["project"]["license"], str)
    (required,) = (each for each in PYPROJECT["build-system"]["requires"] if each.startswith("scikit-build-core"))
    lowest = PYPROJECT["tool"]["scikit-build"]["minimum-version"]
    assert required == f"scikit-build-core>={lowest}" and tuple(map(int, lowest.split("."))) >= (0, 11)


def test_torch_and_transformers_are_no_older_than_what_works():
    """The fast tests of kdkernels have passed with torch 2.9, those of the Trainer and of audio LMs with transformers 5.22."""
    assert PYPROJECT["project"]["dependencies"] == ["torch>=2.9"] and lower_bounds("audio-lms")["torchaudio"] == (2, 9)
    assert lower_bounds("train")["transformers"] == lower_bounds("audio-lms")["transformers"] == (5, 22)


def test_the_trainer_gets_the_accelerate_that_it_asks_for():
    """It stands in transformers' own extra, so each version of transformers brings its own bound."""
    assert any(each.startswith("transformers[torch]") for each in EXTRAS["train"])
    if "transformers" in {each.metadata["Name"] for each in metadata.distributions()}:
        of_torch = [each for each in metadata.requires("transformers") or [] if 'extra == "torch"' in each]
        assert any(each.startswith("accelerate") for each in of_torch)
    assert lower_bounds("train")["accelerate"] >= (1, 3)  # its Trainer fails with 1.2


def test_peft_is_of_transformers_5():
    """peft 0.17 imports a cache class that transformers 5 has not."""
    assert lower_bounds("audio-lms")["peft"] == lower_bounds("test")["peft"] >= (0, 18)


def test_the_sdist_leaves_out_no_file_of_the_tests():
    """The tests read benchmarks/results, and the documents show its plots."""
    excluded = PYPROJECT["tool"]["scikit-build"].get("sdist", {}).get("exclude", [])
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for each in [*excluded, *(line.strip("/") for line in ignored if "*" not in line)]:
        if (folder := ROOT / each).is_dir() and (ROOT / ".git").exists():
            tracked = subprocess.run(["git", "ls-files", each], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            assert not tracked, f"{folder}: in git, but not in an sdist"


CLIENT = """
import torch
from kdkernels import (
    CAADStats, DualPathTeacher, TeacherSource, fused_caad_loss, fused_linear_caad_loss, fused_linear_multi_teacher_loss,
    fused_linear_projected_loss, project_teacher,
)

def losses(h: torch.Tensor, w: torch.Tensor, a: torch.Tensor, t: torch.Tensor, wt: torch.Tensor, y: torch.Tensor) -> float:
    fused_linear_caad_loss(h, w, a, t, wt, y, alpha=2.0).backward()
    fused_caad_loss(h, a, t, y).backward()
    fused_linear_multi_teacher_loss(h, w, [TeacherSource(a, wt, t)], y).backward()
    total: torch.Tensor = fused_linear_projected_loss(h, w, project_teacher(a, t, wt, w, alpha=1.0, temperature=2.0), y)
    loss, found = fused_caad_loss(h, a, t, y, return_stats=True)
    stats: CAADStats = found
    return float(total + loss + stats.student_entropy.mean())

number: int = fused_caad_loss(torch.ones(1), None, None)  # wrong
fused_caad_loss(torch.ones(1), None, None, alfa=2.0)  # wrong
"""


@pytest.mark.slow
def test_a_users_strict_mypy_accepts_the_losses(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "client.py").write_text(CLIENT)
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path / 'cache'}", "client.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "mypy", *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    wrong = [number for number, line in enumerate(CLIENT.splitlines(), 1) if line.endswith("# wrong")]
    errors = [int(match[1]) for match in re.finditer(r"^client\.py:(\d+): error", done.stdout, re.MULTILINE)]
    assert errors == wrong, done.stdout + done.stderr
