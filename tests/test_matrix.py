"""The matrix of processors: a leg's settings reach its tests, and a failure has a name and an exit status."""

import textwrap

import matrix
import pytest


@pytest.fixture
def some_tests(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(
        textwrap.dedent(
            """
            import os
            import pytest

            def test_kernels():
                assert os.environ.get("KDKERNELS_CPU_ISA") is None

            def test_products():
                assert os.environ.get("ONEDNN_MAX_CPU_ISA") in (None, "AVX2")

            @pytest.mark.slow
            def test_slow():
                raise AssertionError
            """
        )
    )
    return str(path)


@pytest.mark.slow
def test_a_leg_that_fails_names_its_tests(some_tests, capsys, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CPU_ISA", "avx512")  # not handed on to a leg without it
    legs = ["--legs", "generic-kernels", "old-products", "--workers", "0"]
    assert matrix.main([*legs, "--", some_tests]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("generic-kernels (KDKERNELS_CPU_ISA=generic): FAILED; 1 passed, 1 failed, 0 skipped in ")
    assert lines[1].endswith("test_some::test_kernels")
    assert lines[2].startswith("old-products (ONEDNN_MAX_CPU_ISA=AVX2): passed; 2 passed, 0 failed")
    assert len(lines) == 3


@pytest.mark.slow
def test_the_load_and_the_tier(some_tests, capsys):
    assert matrix.main(["--only", "slow", "--legs", "loaded", "--workers", "0", "--", some_tests]) == 1
    assert "beside busy processes): FAILED; 0 passed, 1 failed" in capsys.readouterr().out


def test_a_processor_without_the_instructions_leaves_the_leg_out(some_tests, capsys, monkeypatch):
    monkeypatch.setattr(matrix, "best_cpu_isa", lambda: "avx2")
    assert matrix.main(["--legs", "avx512", "--", some_tests]) == 0
    assert "left out, this processor has no avx512" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_without_tests_is_a_failure(tmp_path, capsys):
    assert matrix.main(["--legs", "this-processor", "--workers", "0", "--", str(tmp_path)]) == 1
    assert "pytest ended with status 5" in capsys.readouterr().out
