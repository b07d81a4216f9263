"""The figure of docs/results.md, from the table of the study.

    python -m docs.figures    # writes docs/plots/results.svg

The drawing has its numbers in words too, in its <desc>. tests/docs compares them with the table, since another matplotlib draws
other bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from docs.tables import CLAIMED, FIRST, NATURAL, SEVERAL, study_rows
from models.reporting.figures import Figure, draw_trade_off, percent
from models.reporting.headline import LongScores
from models.reporting.systems import system_name

PATH = Path(__file__).parent / "plots" / "results.svg"
SHOWN = ("kd", "kd_tuned", "caad2", "hint_stripped", "ce_true")


def results_figure() -> Figure:
    """Accuracy under adversarial against accuracy under faithful text, five systems, a panel for each study."""
    panels = {}
    for title, prefix in zip(CLAIMED, (FIRST, SEVERAL, NATURAL), strict=True):
        scores = LongScores(study_rows(prefix))
        points = {}
        for system in SHOWN:
            x, y = scores.score(system, "aligned"), scores.score(system, "conflict")
            assert x is not None and y is not None
            points[system_name(system)] = (percent(*x[:3]), percent(*y[:3]))
        panels[title] = points
    return draw_trade_off(
        "results", panels, xlabel="accuracy under faithful text, %", ylabel="accuracy under adversarial text, %",
        caption="Means over eight teachers, with 95% t intervals.",
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="python -m docs.figures", description="Draws docs/plots/results.svg.")


def main(argv: Sequence[str] | None = None) -> int:
    build_parser().parse_args(argv)
    PATH.write_text(results_figure().file_text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
