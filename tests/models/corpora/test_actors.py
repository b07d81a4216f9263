"""Who voices whom in the game, and that no actor is in two parts of a corpus."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict

import pytest

from models.corpora import recordings
from models.corpora.build import build_corpus
from models.corpora.plans.base import ACTOR_FOLDS, CHARACTER_SPLIT, queen_split, queen_voices
from models.corpora.sources.packages import AMAZON_QUEEN
from models.corpora.sources.queen import ACTORS_FILE, SPEAKER_GENDER, QueenLine, read_actors, read_credits, voices_of
from models.data.manifest import read_manifest
from models.io_utils import cache_dir
from tests.models.corpora.test_recordings import _mp3, archive

CREDITS = b""".1
.i 15
Script
.i 30
 A Writer
.i 15
Voice Artists

.i 30
One Actor
.i 222
    Hero
     Ghost
.1
.p 5

.i 15
Voice Artists
.i 30
Another Actor
.i 222
    Ghost
.i 15
Quality Assurance
.i 30
 A Tester
END
"""


def test_no_actor_is_in_two_parts_of_a_fold_and_each_is_tested_once():
    tested = Counter()
    for fold in range(len(ACTOR_FOLDS)):
        split, voices = queen_split(fold), queen_voices(fold)
        credited = read_actors()
        # By the credits themselves: nobody who is credited for a character of one part is credited in another.
        people = defaultdict(set)
        for code, part in split.items():
            people[part] |= set(credited[code])
        assert people.keys() == {"train", "dev", "test"}
        assert len(set().union(*people.values())) == sum(map(len, people.values()))
        for part in people:
            assert {SPEAKER_GENDER.get(code) for code in split if split[code] == part} >= {"man", "woman"}
        tested.update({voices[code] for code in split if split[code] == "test"})
    everyone = {voices[code] for code in split}
    assert tested == dict.fromkeys(everyone, 1) and len(everyone) == 11
    sexes = defaultdict(set)
    for code in split.keys() & SPEAKER_GENDER.keys():
        sexes[voices[code]].add(SPEAKER_GENDER[code])
    assert all(len(of_one) == 1 for of_one in sexes.values())


def test_the_split_by_character_does_have_actors_on_two_sides():
    """What the documents say of the published tables."""
    split, voices = queen_split(None), queen_voices(None)
    assert split == CHARACTER_SPLIT
    parts = defaultdict(set)
    for code, actor in voices.items():
        parts[actor].add(split[code])
    assert {actor: seen for actor, seen in parts.items() if len(seen) > 1} == {
        "a02": {"train", "test"}, "a03": {"train", "dev"}, "a04+a12": {"train", "test"}, "a07+a11": {"train", "test"},
    }  # fmt: skip


def test_actors_who_share_a_character_count_as_one():
    assert voices_of(["KLUNK", "DEATH", "JOE"]) == {"KLUNK": "a04+a12", "DEATH": "a04+a12", "JOE": "a01"}
    assert voices_of(["PRIN", "TAM"]) == {"PRIN": "a07", "TAM": "a11"}
    assert set(voices_of(["PRIN", "TAM", "LOLA"]).values()) == {"a07+a11"}
    with pytest.raises(ValueError, match=r"codes: expected characters of queen_actors\.csv, got MAN as well"):
        voices_of(["JOE", "MAN"])


def test_the_credits_are_read_without_names(tmp_path):
    (tmp_path / "queen.1c").write_bytes(archive({"CREDIT2.CRD": CREDITS}))
    assert read_credits(tmp_path / "queen.1c") == [["Hero", "Ghost"], ["Ghost"]]
    (tmp_path / "queen.1c").write_bytes(archive({"A.CRD": CREDITS}))
    with pytest.raises(ValueError, match=r"expected the entry CREDIT2\.CRD"):
        read_credits(tmp_path / "queen.1c")


def test_the_table_is_what_the_game_says():
    game = cache_dir() / "debian" / AMAZON_QUEEN.name / AMAZON_QUEEN.payload
    if not game.is_file():
        pytest.skip("the game's package is not unpacked here")
    with open(ACTORS_FILE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    told = [(f"a{number:02}", character) for number, of_one in enumerate(read_credits(game), 1) for character in of_one]
    assert [(row["actor"], row["character"]) for row in rows] == told


def test_a_corpus_is_split_by_actor_and_its_rows_name_them(tmp_path, monkeypatch):
    mp3 = _mp3(1.2)
    codes = ("NAOMI", "SEC", "BUD", "ORACLE", "BOB", "FAYE", "JOE", "LOLA", "WITCH", "MAN")
    lines = [QueenLine(f"{code}{n}", code, f"This is line {n} of {code}.", mp3) for code in codes for n in range(4)]
    monkeypatch.setattr(recordings, "fetch_package", lambda package: tmp_path)
    monkeypatch.setattr(recordings, "read_lines", lambda path: lines)
    manifest = read_manifest(build_corpus(tmp_path / "c", sources=("queen",), size="tiny", fold=0, progress=False))
    sides = defaultdict(set)
    for example in manifest:
        sides[example.metadata["actor"]].add(example.split)
    assert sides == {
        "queen-a10": {"test"}, "queen-a03": {"test"}, "queen-a05": {"dev"}, "queen-a06": {"dev"}, "queen-a09": {"train"},
        "queen-a01": {"train"},
    }  # fmt: skip
    assert {e.metadata["draw"] for e in manifest} == {"teacher", "distill", "0"}
    assert any("split by actor" in note for note in manifest.header["notes"])
