"""Packages for a GPU machine without a network: `python -m benchmarks.gpu.wheels` fills .whl/ on a machine that has one.

Copy .whl/ into the checkout there; `python -m benchmarks.gpu.first_pass` installs it for its own processes. Needs pip alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PINNED = Path(__file__).with_name("wheels.txt")
FOLDER = Path(".whl")
# glibc versions that wheels of these packages are built for: pip takes each by its exact name.
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux2010", "manylinux1")
# The other packages that the items of both passes import.
NEEDED = (
    "torch", "triton", "numpy", "pytest", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "hypothesis", "pybind11",
    "scikit-build-core", "transformers", "accelerate", "peft", "safetensors", "jinja2", "matplotlib", "pillow", "rich",
    "tensorboard", "tqdm", "markdown-it-py",
)  # fmt: skip


def pinned() -> dict[str, str]:
    """name -> version, of wheels.txt."""
    lines = [line.strip() for line in PINNED.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def missing(names: Sequence[str]) -> list[str]:
    """Those of the packages that this Python does not have."""

    def absent(name: str) -> bool:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return True
        return False

    return [name for name in names if absent(name)]


def what_to_do(absent: Sequence[str]) -> str:
    """One or two lines about missing packages: their names, and the command that gets them."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    fetched = [x for x in absent if x in pinned()]
    others = [x for x in absent if x not in fetched]
    lines = []
    if fetched:
        command = f"python -m benchmarks.gpu.wheels --python {here}"
        lines.append(f"missing: {', '.join(fetched)}. `{command}` on a machine with a network fills {FOLDER}/; copy it here")
    if others:
        lines.append(f"missing, and not in wheels.txt: {', '.join(others)}. `pip install {' '.join(others)}` gets them")
    return "\n".join(lines)


def download_command(folder: Path, python: str, machine: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp", *(f"--platform={glibc}_{machine}" for glibc in GLIBC)]
    return [*command, "--dest", str(folder), "--requirement", str(PINNED)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("--python", default="3.12", help="version of Python on the other machine (default: 3.12)")
    parser.add_argument("--machine", default="x86_64", help="its processor, as `uname -m` prints it (default: x86_64)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the wheels go (default: {FOLDER})")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    names = {name.lower().replace("-", "_") for name in pinned()}
    for wheel in args.folder.glob("*.whl"):  # two versions of one package would stop the whole installation
        if wheel.name.split("-")[0].lower() in names:
            wheel.unlink()
    done = subprocess.run(download_command(args.folder, args.python, args.machine), check=False)
    if done.returncode != 0:
        raise SystemExit("pip could not fetch all wheels: see above")
    wheels = sorted(args.folder.glob("*.whl"))
    size = sum(x.stat().st_size for x in wheels) / 2**20
    print(f"{args.folder}: {len(wheels)} wheels, {size:.1f} MiB, for Python {args.python} on {args.machine}")


if __name__ == "__main__":
    main()
