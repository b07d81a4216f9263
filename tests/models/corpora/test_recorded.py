"""Drascula, Fish Fillets and Hedgewars: their labels, what is taken away from the recordings, and no speaker on two sides."""

from __future__ import annotations

import csv
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from models.corpora import recordings
from models.corpora.build import build_corpus
from models.corpora.card import make_card
from models.corpora.plans.base import SentenceDeck
from models.corpora.plans.lines import QUICK_RATE, SLOW_RATE, LineDeck, spoken_rate, syllables
from models.corpora.plans.recorded import DRASCULA_FOLDS, HEDGEWARS_FOLDS, split_of
from models.corpora.recordings import Material
from models.corpora.sources import debian
from models.corpora.sources.drascula import (
    CAST_FILE,
    COLOUR_DB,
    RATE_HZ,
    DrasculaLine,
    drascula_voices,
    mean_spectrum_db,
    read_genders,
)
from models.corpora.sources.drascula import read_lines as read_drascula
from models.corpora.sources.fillets import read_clips, read_dialogs
from models.corpora.sources.hedgewars import SHARED_VOICES, Cry, read_cries
from models.corpora.sources.packages import AMAZON_QUEEN, DRASCULA, FILLETS_SCRIPTS, FILLETS_SPEECH, HEDGEWARS
from models.corpora.sources.queen import QueenLine, read_lines
from models.data.audio import AudioError
from models.data.manifest import read_manifest
from models.io_utils import cache_dir, sha256_file
from tests.models.corpora.test_benchmark_corpus import assert_contexts_are_whole
from tests.models.corpora.test_build import make_settings
from tests.models.corpora.test_recordings import _mp3

CODES = ("", "I", "VB", "BJ", "B", "P", "T", "D", "L", "E")
SETS = ("British", "Classic", "Default", "Default_es", "Default_pl", "Default_ru", "Mobster", "Pirate", "Robot", "Russian",
        "Russian_pl", "Singer", "Surfer")  # fmt: skip


def _payload(root: Path, package) -> Path:
    folder = root / package.name / package.payload
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _noise(seconds: float, rate_hz: int, seed: int) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).standard_normal(round(seconds * rate_hz)).clip(-3, 3)


def make_recorded_packages(root: Path) -> None:
    """Folders of the forms of the packages. A Spanish line is shorter than the English one, lies lower, and ends with a rest."""
    for language, package in DRASCULA:
        folder, spanish = _payload(root, package), language == "Spanish"
        for number, code in enumerate(CODES):
            for line in range(1, 3):
                seed = 100 * number + 10 * line + spanish
                samples = 128 - 2 * spanish + 127 * _noise(1.0 + 0.1 * line - 0.2 * spanish, RATE_HZ, seed)
                rest = b"\0fact\x04\0\0\0FILT" if spanish and line % 2 else b"\0" if spanish else b""
                (folder / f"{code}{line}.ALS").write_bytes(samples.clip(1, 255).astype(np.uint8).tobytes() + rest)
        for name in ("S1", "F1", "D82", "X1", "SOUND"):
            (folder / f"{name}.ALS").write_bytes(b"\x80" * 20_000)
    (folder / "77.ALS").symlink_to("../en/77.ALS")  # in Spanish only, and leads nowhere
    speech, scripts = _payload(root, FILLETS_SPEECH), _payload(root, FILLETS_SCRIPTS)
    fonts = {"m": "font_small", "v": "font_big"}
    said = [f'dialogId("x-{v}-{n}", "{fonts[v]}", "Line \\"{n}\\".")\ndialogStr("Věta {n}.")' for v in fonts for n in range(6)]
    said.append('dialogId("x-m-other", "font_big", "Not her.")\ndialogStr("Ona ne.")')
    for path, text in ((scripts / "cave" / "dialogs_cs.lua", "\n\n".join(said)), (scripts / "cave" / "dialogs_en.lua", "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    for name in (*(f"x-{v}-{n}" for v in fonts for n in range(6)), "x-m-other", "x-v-unsaid", "x-hs-1"):
        path = speech / "cave" / "cs" / f"{name}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, _noise(1.2, 16_000, len(name)), 16_000, format="WAV")
    voices = _payload(root, HEDGEWARS)
    for number, name in enumerate(SETS):
        for at, cry in enumerate(("Ow1", "Ow2", "Laugh", "Hello", "Fire", "Stupid", "Jump1", "Nooo")):
            path = voices / name / f"{cry}.ogg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sf.write(path, _noise(0.3 + 0.1 * at, 22_050, 100 * number + at), 22_050, format="WAV")  # read by its content
    shutil.copy(voices / "Classic" / "Ow1.ogg", voices / "Default" / "Ow1.ogg")


def make_paced_lines() -> list[QueenLine]:
    """A slow and a quick line of each actor: the words are the same, the sounds are long or short."""
    slow, quick = _mp3(3.5), _mp3(1.4)
    return [
        QueenLine(f"{code}{pace}", code, f"Monkey {code} seven is {pace}.", mp3)
        for code in ("JOE", "SPARKY", "BUD", "HENRY", "ORACLE", "BOB", "PRIN", "IAN", "FAYE", "NAOMI", "TAM")
        for pace, mp3 in (("gentle", slow), ("nimble", quick))
    ]


def use_packages(monkeypatch, root: Path) -> None:
    """Let the corpora come from folders of `make_recorded_packages`."""
    monkeypatch.setattr(recordings, "fetch_package", lambda package: root / package.name / package.payload)
    monkeypatch.setattr(recordings, "read_lines", lambda path: make_paced_lines())


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    make_recorded_packages(folder)
    return folder


@pytest.mark.parametrize("folds", [DRASCULA_FOLDS, HEDGEWARS_FOLDS], ids=["drascula", "hedgewars"])
def test_every_voice_is_tested_once_and_is_on_one_side_of_a_fold(folds):
    tested = Counter(voice for fold in folds for voice in fold["test"])
    if folds is DRASCULA_FOLDS:
        everyone = set(drascula_voices(read_genders()).values())
    else:
        everyone = {Cry(name, "Ow1", Path()).voice for name in (*SETS, "Default_uk", "HillBilly") if name != "Robot"}
    assert tested == dict.fromkeys(everyone, 1)
    for fold in folds:
        assert set(fold["dev"]) <= everyone and not set(fold["dev"]) & set(fold["test"])
        assert {split_of(voice, fold) for voice in everyone} == {"train", "dev", "test"}
        people = defaultdict(set)  # each actor of a joined name by itself
        for voice in everyone:
            people[split_of(voice, fold)] |= set(voice.split("+"))
        assert len(set().union(*people.values())) == sum(map(len, people.values()))


def test_no_credited_actor_of_drascula_has_two_names():
    with open(CAST_FILE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    voices = drascula_voices(read_genders())
    for row in rows:
        assert row["actor"] in voices[row["code"]].split("+")
    assert {row["actor"] for row in rows} == {actor for voice in voices.values() for actor in voice.split("+")}
    assert voices["D"] == voices["I"] and voices["VB"] == voices["T"] and voices["B"] == voices["E"]


@pytest.mark.parametrize("fold", [0, *(pytest.param(fold, marks=pytest.mark.slow) for fold in (1, 2, 3))])
def test_no_speaker_and_no_line_is_on_two_sides(packages, tmp_path, monkeypatch, fold):
    use_packages(monkeypatch, packages)
    tasks = ("language", "speaking_rate", "cry")
    manifest = read_manifest(build_corpus(tmp_path, size="study_tasks", tasks=tasks, fold=fold, progress=False))
    assert_contexts_are_whole(manifest)
    for key in ("speaker", "actor", "text"):
        sides = defaultdict(set)
        for example in manifest:
            sides[example.metadata[key]].add(example.split)
        assert all(len(splits) == 1 for splits in sides.values()), key
    people = defaultdict(set)
    for example in manifest:
        source, _, actors = example.metadata["actor"].partition("-")
        people[example.split] |= {(source, actor) for actor in actors.split("+")}
    assert all(people[a].isdisjoint(people[b]) for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")))
    clips = {e.audio: e for e in manifest}.values()
    for task in tasks:
        for split in ("train", "dev", "test"):
            counts = Counter(e.answer for e in clips if (e.task, e.split) == (task, split))
            assert len(counts) == 2 and len(set(counts.values())) == 1, (task, split, counts)
    spoken = defaultdict(dict)
    for e in clips:
        if e.task == "language":
            spoken[e.metadata["text"], e.metadata["draw"]][e.answer] = e.metadata["duration_seconds"]
    assert spoken and all(set(of) == {"English", "Spanish"} and len(set(of.values())) == 1 for of in spoken.values())
    assert min(e.metadata["duration_seconds"] for e in clips if e.task == "cry") == 0.5
    for task in ("speaking_rate", "cry"):  # every length stands under both labels
        lengths = defaultdict(Counter)
        for e in clips:
            if e.task == task:
                lengths[e.answer][e.metadata["actor"], e.metadata["draw"], round(e.metadata["duration_seconds"], 1)] += 1
        assert len({frozenset(of.items()) for of in lengths.values()}) == 1, task
    assert {e.transcription for e in manifest} == {""}
    card = make_card(manifest)
    assert "Drascula licence" in card and "GFDL-1.3" in card and "split by the actors of the Spanish credits" in card


def test_what_is_not_speech_is_taken_away_from_drascula(packages):
    lines = {language: read_drascula(_payload(packages, package), language) for language, package in DRASCULA}
    names = {language: [line.name for line in of] for language, of in lines.items()}
    assert names["English"] == names["Spanish"] and len(names["English"]) == 20
    assert {line.code for line in lines["English"]} == set(read_genders())
    for line in lines["Spanish"]:
        samples = line.recorded()
        assert abs(samples.mean()) < 1e-5 and abs(samples).max() < 0.8
        assert len(samples) == round((1.0 + 0.1 * int(line.name[-1]) - 0.2) * RATE_HZ)
        assert line.decode()[1] == RATE_HZ and len(line.decode()[0]) == len(samples)
    empty = packages / "1.ALS"
    empty.write_bytes(b"\0")
    with pytest.raises(AudioError, match=r"1\.ALS: no samples"):
        type(lines["Spanish"][0])("1", "HERO", "Spanish", empty).decode()
    with pytest.raises(ValueError, match="root: expected a folder with the lines of Drascula"):
        read_drascula(packages / "none", "English")


def test_fillets_clips_are_those_whose_name_and_script_agree(packages):
    dialogs = read_dialogs(_payload(packages, FILLETS_SCRIPTS))
    clips = read_clips(_payload(packages, FILLETS_SPEECH), dialogs)
    assert Counter((clip.voice, clip.gender) for clip in clips) == {("m", "woman"): 6, ("v", "man"): 6}
    assert {clip.text for clip in clips} == {f"Věta {n}." for n in range(6)}
    assert not {clip.name for clip in clips} & {"x-m-other", "x-v-unsaid", "x-hs-1"}
    for read in (read_dialogs, lambda root: read_clips(root, dialogs)):
        with pytest.raises(ValueError, match=r"root: expected a folder with the .* of Fish Fillets"):
            read(packages / "none")


def test_cries_are_read_once_and_only_if_all_sets_mean_the_same(packages):
    cries = read_cries(_payload(packages, HEDGEWARS))
    assert {cry.voice_set for cry in cries} == set(SETS) - {"Robot"}
    assert {cry.name: cry.kind for cry in cries} == {
        "Ow1": "wordless", "Ow2": "wordless", "Laugh": "wordless", "Hello": "spoken", "Fire": "spoken", "Stupid": "spoken",
    }  # fmt: skip
    assert [cry.voice_set for cry in cries if cry.voice_set in ("Classic", "Default") and cry.name == "Ow1"] == ["Classic"]
    with pytest.raises(ValueError, match="root: expected a folder with the voices of Hedgewars"):
        read_cries(packages / "none")


def test_external_questions_are_test_questions_of_both_games(packages, tmp_path, monkeypatch):
    use_packages(monkeypatch, packages)
    manifest = read_manifest(build_corpus(tmp_path, size="external", progress=False))
    assert_contexts_are_whole(manifest)
    assert {(e.split, e.task, e.transcription) for e in manifest} == {("test", "gender", "")}
    clips = {e.audio: e for e in manifest}.values()
    counts = Counter((e.metadata["source"], e.answer) for e in clips)
    assert counts == {("fillets", "man"): 6, ("fillets", "woman"): 6, ("drascula", "man"): 4, ("drascula", "woman"): 4}
    assert {e.metadata["actor"] for e in clips if e.answer == "woman"} == {"fillets-m", "drascula-a04"}
    assert all(-18.0 <= e.metadata["snr_db"] <= 2.0 for e in clips)


@pytest.mark.parametrize(
    ("word", "count"),
    [("the", 1), ("voice", 1), ("table", 2), ("walked", 1), ("wanted", 2), ("makes", 1), ("horses", 2), ("coffee", 2),
     ("you're", 1), ("hmm", 1), ("apples", 2), ("Temple", 2)],
)  # fmt: skip
def test_syllables_are_counted_by_the_spelling(word, count):
    assert syllables(word) == count


def test_the_rate_is_that_of_the_sound_without_its_silence():
    settings = make_settings(size="study_tasks", sources=("queen",), fold=0)
    deck = LineDeck(settings, Material(lines=make_paced_lines()), SentenceDeck(settings))
    rates = defaultdict(set)
    for line in deck.all:
        rates[line.text.split()[-1]].add(round(spoken_rate(line), 1))
    assert max(rates["gentle."]) < SLOW_RATE < QUICK_RATE < min(rates["nimble."])


def test_links_out_of_a_package_are_not_kept(tmp_path):
    source = tmp_path / "source"
    (source / "kept").mkdir(parents=True)
    (source / "kept" / "a").write_bytes(b"a")
    (source / "kept" / "near").symlink_to("a")
    (source / "kept" / "far").symlink_to("../../elsewhere/b")
    debian._remove_dead_links(source)
    assert sorted(path.name for path in (source / "kept").iterdir()) == ["a", "near"]


def _unpacked(package) -> Path:
    path = cache_dir() / "debian" / package.name / package.payload
    if not path.exists():
        pytest.skip(f"{package.name} is not unpacked here")
    return path


def test_the_voices_of_hedgewars_are_joined_as_its_files_say():
    by_hash = defaultdict(set)
    for path in _unpacked(HEDGEWARS).glob("*/*.ogg"):
        by_hash[sha256_file(path)].add(path.parent.name)
    groups: list[set[str]] = []
    for sets in by_hash.values():
        joined = sets.union(*(group for group in groups if group & sets))
        groups = [group for group in groups if not group & sets] + [joined]
    assert sorted(tuple(sorted(group)) for group in groups if len(group) > 1) == sorted(SHARED_VOICES)
    assert Counter(cry.kind for cry in read_cries(_unpacked(HEDGEWARS)))["wordless"] == 119


def test_drascula_has_the_same_lines_in_both_languages():
    lines = {language: read_drascula(_unpacked(package), language) for language, package in DRASCULA}
    english, spanish = ({line.name: line.code for line in lines[language]} for language in ("English", "Spanish"))
    assert {name: english.get(name) for name in spanish} == spanish and set(english) - set(spanish) == {"366", "B61", "B62"}
    assert Counter(spanish.values()) == {
        "HERO": 462, "D": 67, "VB": 62, "I": 32, "L": 30, "BJ": 28, "T": 24, "E": 23, "P": 19, "B": 14,
    }  # fmt: skip
    assert not any(path.name.startswith(tuple("HJK")) for path in _unpacked(DRASCULA[0][1]).glob("*.ALS"))


@pytest.mark.slow
def test_both_languages_of_drascula_have_one_mean_spectrum_after_decoding(monkeypatch):
    lines = {language: read_drascula(_unpacked(package), language) for language, package in DRASCULA}
    shared = {line.name for line in lines["English"]} & {line.name for line in lines["Spanish"]}
    shared = set(sorted(shared)[::4])
    of = {language: [line for line in spoken if line.name in shared] for language, spoken in lines.items()}
    before = mean_spectrum_db(of["English"]) - mean_spectrum_db(of["Spanish"])
    assert np.abs(before - COLOUR_DB).max() < 1.0  # measured on all lines, here on every fourth
    heard = {line: line.decode()[0] for spoken in of.values() for line in spoken}
    monkeypatch.setattr(DrasculaLine, "recorded", lambda line: heard[line])
    after = mean_spectrum_db(of["English"]) - mean_spectrum_db(of["Spanish"])
    assert np.abs(before).max() > 4.0 and np.abs(after[1:]).max() < 1.0  # without 0 Hz, where nothing is left


def test_the_scripts_of_fillets_name_the_speakers_as_the_files_do():
    dialogs = read_dialogs(_unpacked(FILLETS_SCRIPTS))
    script = {(dialog.level, dialog.name): dialog.voice for dialog in dialogs}
    for path in _unpacked(FILLETS_SPEECH).rglob("*.ogg"):
        for letter in "mv":
            if f"-{letter}-" in path.stem:
                told = script.get((path.parent.parent.relative_to(_unpacked(FILLETS_SPEECH)).as_posix(), path.stem))
                assert told in (letter, None)  # None: another level's script has the line
    clips = read_clips(_unpacked(FILLETS_SPEECH), dialogs)
    assert Counter(clip.gender for clip in clips) == {"woman": 638, "man": 600}


@pytest.mark.slow
def test_the_rates_that_count_as_slow_and_quick_are_the_outer_thirds_of_the_game():
    settings = make_settings(size="study_tasks", sources=("queen",), fold=0)
    deck = LineDeck(settings, Material(lines=read_lines(_unpacked(AMAZON_QUEEN))), SentenceDeck(settings))
    rates = [rate for line in deck.all if line.seconds <= 4.0 and (rate := spoken_rate(line)) is not None]
    assert np.quantile(rates, [1 / 3, 2 / 3]) == pytest.approx([SLOW_RATE, QUICK_RATE], abs=0.05)
