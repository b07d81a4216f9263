"""Settings every test shares. Triton runs in its interpreter where there is no GPU; that is decided before it is imported."""

import contextlib
import functools
import importlib.metadata
import os
import pickle
import signal
import traceback

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

with contextlib.suppress(ImportError):  # a GPU machine may have torch, Triton and pytest alone
    from hypothesis import settings

    # The same examples on every run: a test that fails on CI fails at home.
    settings.register_profile("kdkernels", deadline=None, derandomize=True, database=None)
    settings.load_profile("kdkernels")


def pytest_configure():
    """Hundreds of tests would fail at a pair of versions that CONTRIBUTING.md excludes: say so once."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
        new = tuple(map(int, numpy.split(".")[:2])) >= (2, 4)
        if os.environ.get("TRITON_INTERPRET") == "1" and triton.startswith("3.6.") and new:
            raise pytest.UsageError(
                f"Triton {triton}'s interpreter fails with NumPy 2.4 and newer, got {numpy}: pip install 'numpy<2.4'"
            )
        if os.environ.get("TRITON_INTERPRET") == "1" and triton.startswith("3.6."):
            _minima_as_on_the_hardware()
        if os.environ.get("TRITON_INTERPRET") == "1":
            _patches_once_a_launch()


def _minima_as_on_the_hardware():
    """Of a number and NaN the hardware's minimum is the number, and so is that of newer interpreters. That of 3.6 is NaN."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder

    for name, operation in (("create_minnumf", numpy.fmin), ("create_maxnumf", numpy.fmax)):
        setattr(InterpreterBuilder, name, lambda self, lhs, rhs, operation=operation: self.binary_op(lhs, rhs, operation))


def _patches_once_a_launch():
    """Triton's interpreter replaces the functions of triton.language for a launch, and looks for them again at each call of a
    device function. That took half of its time. It finds nothing new where the module was looked through in the same launch."""
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    @functools.cache
    def modules_of(fn):
        return {id(x) for x in fn.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core}

    def patch_lang(fn):
        if modules_of(fn) <= done:
            return interpreter._LangPatchScope()
        is_launch, scope = not done, patch(fn)
        done.update(modules_of(fn))
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (restore(), done.clear())
        return scope

    interpreter._patch_lang = patch_lang


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def poisoned_memory():
    """Every torch.empty is full of NaN, so whatever a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def in_child():
    """Calls a function in a forked process with limits of its own, and returns what it returned.

    in_child(call, *, memory_mib=None, file_bytes=None, unprivileged=False, seconds=120): at most `memory_mib` more address space
    than now, no file longer than `file_bytes`, without root's right to write everywhere. An exception there is a RuntimeError
    here with its traceback, and so is a process that dies or takes longer.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    import resource

    def run(call, *, memory_mib=None, file_bytes=None, unprivileged=False, seconds=120):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            message = (False, "no answer")
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(seconds)
                torch.set_num_threads(1)  # a forked process has none of its parent's
                if memory_mib is not None:
                    with open("/proc/self/statm") as file:
                        limit = int(file.read().split()[0]) * resource.getpagesize() + (memory_mib << 20)
                    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                if file_bytes is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
                if unprivileged and os.geteuid() == 0:
                    os.setgroups([])
                    os.setegid(65534)
                    os.seteuid(65534)
                message = (True, call())
            except BaseException:
                message = (False, traceback.format_exc())
            finally:
                os.write(writing, pickle.dumps(message))
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            data = file.read()
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            raise RuntimeError(f"the process died of signal {os.WTERMSIG(status)} (14: it took more than {seconds} s)")
        good, value = pickle.loads(data)
        if not good:
            raise RuntimeError(value)
        return value

    return run
