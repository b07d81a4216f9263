"""benchmarks/packing.py on a tiny model: its rows, its token counts, and that a wrong layout is refused."""

import csv

import pytest
import torch

from benchmarks import packing
from benchmarks.common import write_csv

TINY = {
    "vocab_size": 1024, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "num_key_value_heads": 3,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    return packing.PackingCase(6, CPU, pack_tokens=400, layers=(1, 2), config=TINY)


@pytest.mark.slow
def test_rows(case, tmp_path):
    rows = {row["layout"]: row for row in packing.measure(case, 1)}
    assert list(rows) == list(packing.LAYOUTS)
    real = case.real_tokens(cached=False)
    for name, cached in (("padded", False), ("packed", False), ("padded, prefix cache", True), ("packed, prefix cache", True)):
        row = rows[name]
        assert row["tokens"] * (1 - row["padding"]) == pytest.approx(case.real_tokens(cached=cached))
    assert rows["packed"]["tokens"] < rows["padded"]["tokens"] and rows["packed"]["padding"] < rows["padded"]["padding"]
    assert rows["packed, prefix cache"]["tokens"] < real
    assert rows["padded"]["speedup"] == 1 and all(row["speedup"] > 0 for row in rows.values())
    with write_csv("packing", CPU, list(rows.values()), folder=tmp_path).open() as f:
        assert len(list(csv.DictReader(f))) == len(rows)


def test_a_layout_in_which_samples_see_each_other_is_refused(case, monkeypatch):
    body = type(case.teacher)._body

    def one_sample_a_row(self, embeddings, mask, position_ids, past, use_cache, **varlen):
        counted = torch.arange(embeddings.shape[1]).expand_as(position_ids)
        return body(self, embeddings, mask, counted, past, use_cache, **varlen)

    monkeypatch.setattr(type(case.teacher), "_body", one_sample_a_row)
    with pytest.raises(SystemExit, match=r"not timed: .* of at most 0.0001 against float64, got \{'packed: states"):
        packing.measure(case, 1, ["packed"])


def test_lengths_spread():
    words = packing.transcript_words(400)
    assert words == packing.transcript_words(400) and min(words) == 1 and max(words) == 40
    assert 7 <= sorted(words)[200] <= 9
