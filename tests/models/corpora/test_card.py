"""The data card: counted from the manifest, the same wherever it lies."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest

from models.corpora.build import build_corpus
from models.corpora.card import main, make_card
from models.data.manifest import Example, Manifest, read_manifest, write_manifest

pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    return build_corpus(folder, size="benchmark_tiny", sources=("espeak",), tasks=("accent", "keyword"), progress=False)


def _cells(card: str, title: str) -> list[list[str]]:
    """The rows of a section's table."""
    section = card.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [rows[0], *rows[2:]]


def test_counts_are_those_of_the_manifest(built):
    manifest = read_manifest(built)
    card = make_card(manifest)
    columns, *rows = _cells(card, "Questions")
    assert columns == ["category", "task", "train teacher", "train distill", "dev", "test"]
    assert [row[:2] for row in rows[:-1]] == [["content", "keyword"], ["speaker", "accent"]]
    told = sum(int(n) for row in rows[:-1] for cell in row[2:] for n in cell.split(" / "))
    assert told == len(manifest) and sum(int(n) for c in rows[-1][2:] for n in c.split(" / ")) == len(manifest)
    assert rows[1][5] == "4 / 4 / 4 / 4"
    assert ["keyword", "absent 2, present 2", "0.50", "0.50"] in _cells(card, "Labels of the test")
    seconds = sum({e.audio: e.metadata["duration_seconds"] for e in manifest}.values())
    assert f"{len({e.audio for e in manifest})} clips, {seconds / 60:.1f} minutes, 2 tasks." in card
    assert _cells(card, "Sources and licences")[1][:2] == ["espeak", "espeakng-loader"]
    command = "python -m models corpus --out DIR --size benchmark_tiny --sources espeak --tasks accent,keyword"
    assert f"built by `{command}`" in card
    assert f"`{manifest.header['content_sha256']}`" in card
    assert all(f"- {note}" in card for note in manifest.header["notes"])
    assert "adversarial: Note: the word is" in card


def test_the_card_does_not_depend_on_where_the_corpus_lies(built, tmp_path, capsys):
    shutil.copytree(built.parent, tmp_path / "moved")
    for path, out in ((built, tmp_path / "a.md"), (tmp_path / "moved" / built.name, tmp_path / "b.md")):
        assert main([str(path), "--out", str(out)]) == 0
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()
    assert str(tmp_path) not in (tmp_path / "b.md").read_text()
    capsys.readouterr()
    assert main([str(built)]) == 0
    assert capsys.readouterr().out == (tmp_path / "a.md").read_text()
    assert main([str(tmp_path / "none.jsonl")]) == 1
    assert "error: " in capsys.readouterr().err


def test_what_is_missing_or_was_skipped_is_said(built):
    manifest = read_manifest(built)
    header = {**manifest.header, "unavailable": {"queen": "no | apt"}, "problems": ["row 3 (x): corrupt mp3"]}
    card = make_card(dataclasses.replace(manifest, header=header))
    assert "- queen: no | apt" in card and "- row 3 (x): corrupt mp3" in card
    assert "could not be" not in make_card(manifest)


def test_manifests_of_others_get_a_card_too(tmp_path):
    rows = [Example(id=f"{n}", audio=None, task="birds", question="Crow | rook?", choices=("crow", "rook"), answer="crow",
                    split="test") for n in range(3)]  # fmt: skip
    card = make_card(read_manifest(write_manifest(tmp_path / "m.jsonl", rows)))
    assert card.startswith("# Data card\n\n3 questions on 0 clips")
    assert "Crow \\| rook?" in card and "Sources" not in card and "Known weaknesses" not in card
    assert make_card(Manifest(rows, [], tmp_path, {})).startswith("# Data card")


def test_what_others_put_under_the_names_of_a_corpus_makes_no_card_fail(tmp_path):
    seconds = (None, "2 s", 6.0)
    rows = [Example(id=f"{n}", audio=f"{n}.wav", metadata={"duration_seconds": seconds[n]}) for n in range(3)]
    for header in ({"settings": {"lr": 1}, "notes": []}, {"settings": "mine", "sources": ["home"]}):
        assert "3 questions on 3 clips, 0.1 minutes, 1 tasks." in make_card(Manifest(rows, [], tmp_path, header))
    unknown = make_card(Manifest(rows[:2], [], tmp_path, {}))  # lengths that nobody knows are not 0
    assert "2 questions on 2 clips, 1 tasks." in unknown and "0.0 min" not in unknown and "| - | 2 |" in unknown
