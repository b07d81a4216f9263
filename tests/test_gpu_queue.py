"""The list of GPU items in benchmarks/gpu/QUEUE.md and the one that runs are the same, and a pass survives its items."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import measure, one_pass

QUEUE = Path(one_pass.__file__).with_name("QUEUE.md")


def test_every_item_is_written_down():
    text = QUEUE.read_text()
    for item in one_pass.QUEUE:
        assert f"| {item.name} | `python {item.command}` |" in text
    assert sum(x.command.startswith("-m benchmarks.gpu.measure") for x in one_pass.QUEUE) == len(measure.MEASURES)


@pytest.mark.parametrize(
    ("code", "outcome", "result"),
    [
        ("print('fine')", "met", "fine"),
        ("print('3 failed'); raise SystemExit(1)", "failed", "3 failed"),
        ("raise ImportError('no triton')", "failed", "ImportError: no triton"),
        ("import time; time.sleep(60)", "cut", "over 1 s"),
        ("""print('{"met": false, "result": "slow"}')""", "missed", "slow"),
    ],
)
def test_an_item_has_an_outcome_whatever_happens(code, outcome, result):
    limit = 1 if outcome == "cut" else 60
    item = one_pass.Item("x", f"-c {one_pass.shlex.quote(code)}", "", limit)
    answer = one_pass.run_item(item, limit)
    assert (answer["outcome"], answer["result"]) == (outcome, result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("run", [lambda: one_pass.main([]), lambda: measure.main(["rows"])])
def test_without_a_gpu_it_says_so(run):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        run()


def test_list(capsys):
    one_pass.main(["--list", "--only", "linear"])
    assert capsys.readouterr().out.startswith("linear: python -m benchmarks.gpu.measure linear")
