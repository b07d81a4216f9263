"""What CMake builds of csrc: the CUDA part only where it is of use or asked for, and nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cuda_build import NVCC

pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, which the extra 'test' brings")
CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
    pytest.mark.skipif(not (shutil.which("c++") or "CXX" in os.environ), reason="needs a C++ compiler"),
]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --list-gpu-code) echo sm_80; echo sm_90; echo sm_100 ;;
  *) exit 1 ;;
esac
"""
# Compiles an empty file instead, at once, and writes down that it was called.
FAKE_COMPILER_LAUNCHER = """#!/bin/sh
compiler="$1"
for argument; do
  if [ "$previous" = -o ]; then output="$argument"; fi
  previous="$argument"
done
echo "$output" >> "{log}"
exec "$compiler" -fPIC -x c++ -c /dev/null -o "$output"
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Build:
    """A build folder, on a machine whose tools the test decides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "build"
        self.source = CSRC
        self.pybind11 = pybind11.get_cmake_dir()
        self.tools = folder / "tools"
        self.defines = {}
        self.environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "CUDACXX")}
        self.environment["PATH"] = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        self.has_gpus()

    def has_gpus(self, *capabilities: str) -> None:
        lines = "".join(f"echo {x}\n" for x in capabilities)
        write_script(self.tools / "nvidia-smi", f"#!/bin/sh\n{lines or 'exit 9'}\n")

    def hide_nvcc(self) -> None:
        folders = {str(x) for x in (Path("/usr/local/cuda/bin"), *map(Path, os.environ["PATH"].split(os.pathsep)))}
        hidden = [x for x in folders if shutil.which("nvcc", path=x)]
        self.defines["CMAKE_IGNORE_PATH"] = ";".join(hidden)

    def configure(self, cuda: str = "AUTO", archs: str = "", *, fails: bool = False) -> str:
        """As pip does it: the choices are given every time. Returns what CMake says."""
        defines = {"pybind11_DIR": self.pybind11, "KDKERNELS_CUDA": cuda, "KDKERNELS_CUDA_ARCHS": archs, **self.defines}
        command = ["cmake", "-S", str(self.source), "-B", str(self.folder), *(f"-D{k}={v}" for k, v in defines.items())]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        text = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, text[-4000:]
        return " ".join(text.split())

    def build(self, *arguments: str) -> None:
        command = ["cmake", "--build", str(self.folder), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    def install(self) -> list[str]:
        prefix = self.folder.parent / "installed"
        shutil.rmtree(prefix, ignore_errors=True)
        subprocess.run(["cmake", "--install", self.folder, "--prefix", prefix], check=True, capture_output=True)
        return sorted(x.name.split(".")[0] for x in prefix.glob("kdkernels/*"))

    def forget_as_scikit_build_core_does(self) -> None:
        """Its reaction to a new temporary environment."""
        (self.folder / "CMakeCache.txt").unlink()
        shutil.rmtree(self.folder / "CMakeFiles")


@pytest.fixture
def build(tmp_path):
    return Build(tmp_path)


@pytest.mark.slow
def test_nvcc_is_looked_for_in_every_configure(build, tmp_path):
    build.hide_nvcc()
    text = build.configure()
    assert "CUDA part left out: nvcc was not found" in text and "-C cmake.define.KDKERNELS_CUDA=ON" in text
    for place in ("CUDA_HOME", "CUDA_PATH"):
        write_script(tmp_path / place / "bin" / "nvcc", FAKE_NVCC)
        build.environment[place] = str(tmp_path / place)
        assert "left out: no NVIDIA GPU is seen here. To build it: pip install ." in build.configure()
        del build.environment[place]
        assert "left out: nvcc was not found" in build.configure()
    write_script(build.tools / "nvcc", FAKE_NVCC)
    assert "left out: no NVIDIA GPU is seen here" in build.configure()


@pytest.mark.slow
def test_auto_leaves_out_what_nvcc_cannot_compile(build):
    build.hide_nvcc()
    nvcc = write_script(build.tools / "nvcc", FAKE_NVCC)
    build.has_gpus("12.1")
    assert "nvcc does not compile for 121" in build.configure()
    build.has_gpus("9.0")
    assert "does not compile with this C++ compiler" in build.configure()  # the fake fails at it
    write_script(nvcc, FAKE_NVCC.replace("13.0", "11.8"))
    assert "is not of CUDA 12.0 or newer" in build.configure()


@pytest.mark.slow
def test_on_without_nvcc_is_an_error(build):
    build.hide_nvcc()
    assert "KDKERNELS_CUDA=ON, but nvcc was not found" in build.configure("ON", fails=True)
    assert "left out" in build.configure()  # asked for before, but an extra is to be installed all the same
    assert "KDKERNELS_CUDA: expected AUTO, ON or OFF, got YES" in build.configure("YES", fails=True)


@pytest.mark.slow
@needs_nvcc
def test_auto_is_for_the_gpus_of_this_machine(build):
    build.has_gpus("9.0", "8.0", "9.0")
    assert "CUDA part for 90a;80 " in build.configure()


@pytest.mark.slow
@needs_nvcc
def test_what_was_asked_for_is_built_again(build):
    assert "CUDA part for 80-real;90a" in build.configure("ON")
    assert "CUDA part for 80 " in build.configure("ON", "80")
    assert "CUDA part for 80 " in build.configure()
    assert "CUDA part" not in build.configure("OFF")
    assert "no NVIDIA GPU is seen here" in build.configure()


@pytest.mark.slow
def test_an_unchanged_source_is_compiled_once(build, tmp_path):
    log = tmp_path / "compiled.txt"
    launcher = write_script(tmp_path / "launcher", FAKE_COMPILER_LAUNCHER.format(log=log))
    build.source = shutil.copytree(CSRC, tmp_path / "csrc")
    build.defines["CMAKE_CXX_COMPILER_LAUNCHER"] = str(launcher)

    def install_in_a_new_environment(name: str) -> int:
        if (build.folder / "CMakeCache.txt").exists():
            build.forget_as_scikit_build_core_does()
        package = shutil.copytree(Path(pybind11.__file__).parent, tmp_path / name / "pybind11")
        build.pybind11 = str(package / "share" / "cmake" / "pybind11")
        log.write_text("")
        build.configure("OFF")
        build.build()
        assert build.install() == ["_native"]
        return len(log.read_text().split())

    everything = install_in_a_new_environment("first")
    assert everything >= 3
    assert install_in_a_new_environment("second") == 0

    # In a folder that is configured, the build itself notices a change.
    rows = build.source / "cpu" / "rows.inl"
    rows.write_text(rows.read_text() + "// changed\n")
    log.write_text("")
    build.build()
    assert len(log.read_text().split()) == everything
    assert install_in_a_new_environment("third") == 0

    rows.write_text(rows.read_text() + "// changed again\n")
    assert install_in_a_new_environment("fourth") == everything
    build.environment["CXXFLAGS"] = "-g"
    assert install_in_a_new_environment("fifth") == everything


@pytest.mark.slow
@needs_nvcc
def test_the_cuda_part_that_was_asked_for_is_built_once(build):
    build.configure("ON", "80")
    build.build("--target", "_native_cuda")
    [library] = build.folder.glob("kept/_native_cuda-*/_native_cuda.*")
    assert library.stat().st_size > 100_000
    build.forget_as_scikit_build_core_does()
    assert "_native_cuda is built already" in build.configure("ON", "80")
