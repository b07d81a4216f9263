"""What benchmarks/gpu reads out of compute-sanitizer and Nsight Compute."""

import pytest

from benchmarks.gpu import ncu, sanitizer


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 1 error", 1),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
        ("========= RACECHECK SUMMARY: 12 hazards displayed (10 errors, 2 warnings)", 12),
        ("========= Error: process didn't terminate successfully", None),
    ],
)
def test_sanitizer_summary(output, errors):
    assert sanitizer.errors_of(output) == errors


def test_ncu_metrics():
    output = """==PROF== Connected to process 12
one read: 787000000 bytes
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","12","caad_rows_kernel","dram__bytes_read.sum","Mbyte","788.50"
"0","12","caad_rows_kernel","gpu__time_duration.sum","us","1,345.25"
"0","12","caad_rows_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.5"
"""
    values = ncu.read_metrics(output)
    assert values["dram__bytes_read.sum"] == pytest.approx(788.5e6)
    assert values["gpu__time_duration.sum"] == pytest.approx(1345.25e-6)
    assert values["dram__throughput.avg.pct_of_peak_sustained_elapsed"] == 91.5
    assert ncu.read_metrics("==ERROR== nothing") == {}
