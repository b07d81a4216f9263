"""The benchmark: no leaks, nothing told by text or majority, whole groups of contexts, equal bytes; sources may be missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from models.corpora import recordings
from models.corpora.build import build_corpus
from models.corpora.plans import lines as line_plans
from models.corpora.plans.base import (
    ACTOR_FOLDS,
    DEFAULT_FOLD,
    SIZES,
    SPLITS,
    SentenceDeck,
    take_turns,
    text_key,
    without_leaks,
)
from models.corpora.plans.benchmark import plan_benchmark
from models.corpora.plans.lines import LineDeck, _choose_keywords, _pairs, _sentence_type
from models.corpora.questions import IRRELEVANT
from models.corpora.recordings import Material
from models.corpora.sources.asterisk import read_prompts
from models.corpora.sources.debian import PackageUnavailable
from models.corpora.sources.ktuberling import read_words
from models.corpora.sources.packages import ASTERISK_PROMPTS, KTUBERLING, TUX_PAINT
from models.corpora.sources.queen import QueenLine
from models.data.manifest import read_manifest
from models.data.prompts import CATEGORIES, TASKS, hint_for
from models.data.readers import CONTEXT_KINDS
from models.evaluation.predictions import context_kind
from models.io_utils import sha256_file
from tests.models.corpora.test_build import assert_no_leak, make_settings
from tests.models.corpora.test_recordings import _mp3

pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")

HIDDEN = {"content", "keyword", "sentence_type", "place", "mood", "language"}
CROSSED = {"speaking_rate", "delivery", "accent", "noise", "bandwidth", "reverberation"}
WORDS = ("temple", "jungle", "rocket", "better", "never")


def _tone(path: Path, rate_hz: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.3 * np.sin(np.arange(round(1.2 * rate_hz)) / 5), rate_hz)


def make_packages(root: Path) -> None:
    """Folders of the forms of the packages, in each place of the payload."""
    names = ("vm-goodbye", "queue-thankyou", "conf-muted", "digits/14", "dir-first", "vm-sorry", "agent-loginok", "vm-repeat")
    for language, package in ASTERISK_PROMPTS:
        for name in (*names, "letters/a", "beep", f"only-{language.casefold()}"):
            _tone(root / package.name / package.payload / f"{name}.wav", 8000)
    stamps = root / TUX_PAINT.name / TUX_PAINT.payload
    words = root / KTUBERLING.name / KTUBERLING.payload
    for number in range(6):
        for code in ("es", "fr", "ru"):
            _tone(stamps / f"animals/bird{number}_desc_{code}.ogg", 22050)
        (stamps / f"animals/bird{number}.txt").write_text(f"Bird {number}.\n", "utf-8")
    for code in ("en", "fr", "ru"):
        sounds = []
        for number in range(6):
            _tone(words / code / f"w{number}.wav", 22050)
            sounds.append(f'<sound name="toy_{number}" file="{code}/w{number}.wav" />')
        sounds.append('<sound name="away" file="../away.wav" />')
        (words / f"{code}.soundtheme").write_text(f'<language code="{code}">\n' + "\n".join(sounds), "utf-8")


def make_lines() -> list[QueenLine]:
    """Ten lines of every kind for two voices or more a split; one text is said in training and in the test."""
    mp3 = _mp3(1.5)
    lines = [QueenLine(f"{s}-same", s, "The same words again.", mp3) for s in ("FAYE", "NAOMI")]
    for speaker in ("FAYE", "JOE", "WITCH", "BOB", "ORACLE", "NAOMI", "BUD", "CHIEF"):
        for number in range(20):
            word = WORDS[number % len(WORDS)]
            end = "?" if number % 3 == 0 else "."
            lines.append(QueenLine(f"{speaker}{number}", speaker, f"{speaker} said {word} {number}{end}", mp3))
    lines.append(QueenLine("DOG1", "DOG", "A voice of no split.", mp3))
    lines.append(QueenLine("JOE-gulp", "JOE", "<a long gulp>", mp3))
    return lines


def _build(folder: Path, packages: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordings, "fetch_package", lambda package: packages / package.name / package.payload)
        patch.setattr(recordings, "read_lines", lambda path: make_lines())
        return build_corpus(folder, size="benchmark_tiny", fold=0, progress=False)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    make_packages(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, packages):
    return read_manifest(_build(tmp_path_factory.mktemp("benchmark"), packages))


def assert_labels_in_balance(manifest):
    """No label of a task is more frequent than another in any split, whatever the pool."""
    for task in {e.task for e in manifest} - {"content"}:
        for split in SPLITS:
            counts = Counter(e.answer for e in manifest.select(split=split, task=task))
            assert len(set(counts.values())) == 1, (task, split, counts)
            assert set(counts) == set(manifest.select(task=task)[0].choices), (task, split)


def assert_text_tells_nothing(manifest):
    """Shown texts come under every label; where the text would be the answer, none is shown."""
    for example in manifest:
        if example.task in HIDDEN:
            assert example.transcription == ""
    for task in CROSSED:
        groups = defaultdict(Counter)
        for e in manifest.select(task=task):
            pool, context = e.metadata.get("pool"), e.metadata["context_type"] if e.split != "train" else ""
            groups[e.split, pool, context, e.metadata["speaker"], e.metadata["text"]][e.answer] += 1
        assert groups
        for key, counts in groups.items():
            assert set(counts) == set(TASKS[task].choices) and set(counts.values()) == {1}, (task, key, counts)
    for part in [{"split": "dev"}, {"split": "test"}, *({"split": "train", "pool": p} for p in ("teacher", "distill"))]:
        asked = [e for e in manifest.select(**part) if e.split == "train" or context_kind(e) == "neutral"]
        by_speaker = Counter((e.metadata["speaker"], e.answer) for e in asked if e.task == "sentence_type")
        assert by_speaker
        assert all(by_speaker[s, "question"] == by_speaker[s, "statement"] for s, _ in by_speaker)
        for task in ("content", "keyword"):
            answers = Counter((e.question, e.answer) for e in asked if e.task == task)
            assert answers
            for question in {question for question, _ in answers}:
                counts = [count for (q, _), count in answers.items() if q == question]
                assert len(counts) == 2 and len(set(counts)) == 1, (question, answers)


def assert_contexts_are_whole(manifest):
    """Every dev and test question under the four contexts, which say what their type says."""
    groups = defaultdict(dict)
    for e in manifest:
        kind, hint = e.metadata["context_type"], hint_for(e.task, e.answer)
        assert e.kind == CONTEXT_KINDS[kind] and e.metadata["category"] == TASKS[e.task].category
        wrong = {hint_for(e.task, choice) for choice in e.choices if choice != e.answer}
        right = {"neutral": {""}, "faithful": {hint}, "adversarial": wrong, "irrelevant": set(IRRELEVANT)}[kind]
        assert e.context in right, e.id
        if kind == "irrelevant":
            said = set(text_key(e.context).split())
            assert not said & set(text_key(" ".join(e.choices)).split()) and e.metadata.get("asked_word") not in said
        if e.split != "train":
            groups[e.pair_id][kind] = e
    for group in groups.values():
        assert list(group) == list(CONTEXT_KINDS)
        assert len({(e.audio, e.question, e.answer, e.choices, e.transcription) for e in group.values()}) == 1
        assert [context_kind(e) for e in group.values()] == ["neutral", "aligned", "conflict", "irrelevant"]


@pytest.mark.slow
def test_every_category_has_two_tasks_or_more_and_every_clip_is_as_recorded(tiny):
    tasks = {e.task for e in tiny}
    assert tasks == set(SIZES["benchmark_tiny"].tasks)
    assert set(Counter(TASKS[task].category for task in tasks)) == set(CATEGORIES)
    assert min(Counter(TASKS[task].category for task in tasks).values()) >= 2
    assert tiny.problems == [] and tiny.header["problems"] == [] and tiny.header["unavailable"] == {}
    for example in tiny:
        assert example.answer in example.choices
        assert sha256_file(tiny.audio_path(example)) == example.metadata["audio_sha256"]
    assert sum(tiny.header["counts"].values()) == len(tiny)


def test_no_voice_and_no_text_crosses_from_one_split_to_another_in_any_task(tiny):
    assert_no_leak(tiny, tasks={e.task for e in tiny} - {"language"})
    said = defaultdict(set)
    for example in tiny:  # language too, whose voices are the same in all splits
        said[text_key(example.metadata["text"])].add(example.split)
    assert len(said) > 60 and all(len(splits) == 1 for splits in said.values())
    assert "the same words again" not in {t for t, splits in said.items() if "train" in splits}


def test_labels_are_in_balance_and_texts_tell_nothing(tiny):
    assert_labels_in_balance(tiny)
    assert_text_tells_nothing(tiny)


def test_contexts_are_whole_and_say_what_their_type_says(tiny):
    assert_contexts_are_whole(tiny)


def test_words_are_in_the_line_or_not_as_the_answer_says(tiny):
    for example in tiny.select(task="content"):
        others = [choice for choice in example.choices if choice != example.answer]
        said = set(text_key(example.metadata["text"]).split())
        assert example.answer in said and not said & set(others)
    for example in tiny.select(task="keyword"):
        said = example.metadata["asked_word"] in text_key(example.metadata["text"]).split()
        assert said == (example.answer == "present") and f'"{example.metadata["asked_word"]}"' in example.question
    shared = {task: {e.audio for e in tiny.select(task=task)} for task in ("content", "keyword")}
    assert shared["content"] == shared["keyword"] and all(name.startswith("audio/words/") for name in shared["content"])


def test_languages_have_two_voices_and_say_the_same(tiny):
    speakers = defaultdict(set)
    for example in tiny.select(task="language", split="train"):
        speakers[example.answer].add(example.metadata["speaker"])
    assert {len(voices) for voices in speakers.values()} == {2}
    assert speakers["Italian"] == {"asterisk-Carlo", "asterisk-Menardi"} and "ktuberling-en" in speakers["English"]
    texts = {e.metadata["text"] for e in tiny.select(task="language")}
    assert not [t for t in texts if "only" in t or "beep" in t or "letters" in t]


def test_training_pools_share_recordings_but_no_clip(tiny):
    pools = {pool: tiny.select(split="train", pool=pool) for pool in ("teacher", "distill")}
    texts = [Counter((e.task, e.metadata["text"], e.answer) for e in pool) for pool in pools.values()]
    assert texts[0] == texts[1]
    assert not {e.audio for e in pools["teacher"]} & {e.audio for e in pools["distill"]}
    assert not [e for e in tiny.select(split="train") if e.metadata["context_type"] == "irrelevant"]


@pytest.mark.slow
def test_equal_settings_give_equal_bytes(tiny, packages, tmp_path):
    again = _build(tmp_path, packages)
    assert again.read_bytes() == tiny.path.read_bytes()


def test_without_recordings_espeak_speaks_the_lines_and_language_is_gone(monkeypatch, capsys):
    def unavailable(package):
        raise PackageUnavailable(f"{package.name}: apt-get not found")

    monkeypatch.setattr(recordings, "fetch_package", unavailable)
    settings = make_settings(fold=0, size="benchmark_tiny", sources=SIZES["benchmark"].sources)
    gathered = Material.gather(settings)
    missing = {"queen", "tux", "ktuberling", *(f"asterisk/{package.name}" for _, package in ASTERISK_PROMPTS)}
    assert set(gathered.unavailable) == missing
    assert "going on without asterisk/asterisk-core-sounds-fr-wav" in capsys.readouterr().err
    planned = plan_benchmark(settings, gathered)
    assert {r.task for r in planned} == set(SIZES["benchmark"].tasks) - {"language"}
    assert {r.source for r in planned} == {"espeak"} and without_leaks(planned) == planned
    voices = {split: {r.speaker for r in planned if r.split == split} for split in SPLITS}
    assert not voices["train"] & voices["test"] and not voices["dev"] & (voices["train"] | voices["test"])


def test_a_size_that_needs_more_sentences_than_there_are_says_so(tmp_path):
    expected = "size: expected a smaller one than 'study_sources', or other sources than espeak: there are too few made-up"
    with pytest.raises(ValueError, match=expected):
        build_corpus(tmp_path, size="study_sources", sources=("espeak",), progress=False)
    assert not list(tmp_path.iterdir())


def test_one_missing_prompt_package_takes_the_language_task_along(packages, monkeypatch):
    def fetch(package):
        if package.name.endswith("-fr-wav"):
            raise PackageUnavailable(f"{package.name}: gone")
        return packages / package.name / package.payload

    monkeypatch.setattr(recordings, "fetch_package", fetch)
    monkeypatch.setattr(recordings, "read_lines", lambda path: make_lines())
    settings = make_settings(fold=0, size="benchmark_tiny", sources=SIZES["benchmark"].sources)
    gathered = Material.gather(settings)
    assert list(gathered.unavailable) == ["asterisk/asterisk-core-sounds-fr-wav"]
    assert "language" not in {r.task for r in plan_benchmark(settings, gathered)}


def test_a_task_alone_is_made_of_the_same_recordings(packages, monkeypatch):
    monkeypatch.setattr(recordings, "fetch_package", lambda package: packages / package.name / package.payload)
    monkeypatch.setattr(recordings, "read_lines", lambda path: make_lines())
    settings = make_settings(fold=0, size="benchmark_tiny", sources=SIZES["benchmark"].sources)
    alone = make_settings(fold=0, size="benchmark_tiny", sources=SIZES["benchmark"].sources, tasks=("noise", "accent"))
    planned = plan_benchmark(settings, Material.gather(settings))
    assert plan_benchmark(alone, Material.gather(alone)) == [r for r in planned if r.task in ("noise", "accent")]


def test_keywords_are_frequent_in_every_split_and_used_about_equally():
    settings = make_settings(fold=0, size="benchmark_tiny")
    deck = LineDeck(settings, Material(lines=make_lines()), SentenceDeck(settings))
    assert not {line.key for line in deck.all} & {"queen-DOG1", "queen-JOE-gulp"}
    keywords = _choose_keywords(deck, dict.fromkeys(SPLITS, 4), 4)
    assert set(keywords) < set(WORDS)
    pairs = list(_pairs(deck, "test", 20, keywords))
    used = Counter(word for pair in pairs for _, word in pair)
    assert sum(used.values()) >= 18 and max(used.values()) - min(used.values()) <= 1
    dealt = {line.key for pair in pairs for line, _ in pair}
    assert not dealt & {line.key for line in deck.left("test")}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Where is it?", "question"),
        ("It is here.", "statement"),
        ("It is here...", ""),
        ("Stop!", ""),
        ("Oh. Where is it?", ""),
        ("What?!", ""),
        ("No end", ""),
    ],
)
def test_only_single_sentences_have_a_type(text, kind):
    assert _sentence_type(text) == kind


def test_lines_longer_than_a_clip_are_left_to_gender(monkeypatch):
    monkeypatch.setattr(line_plans, "_SECONDS", (0.1, 6.0))
    settings = make_settings(fold=0, size="benchmark_tiny", max_seconds=1.0)
    deck = LineDeck(settings, Material(lines=make_lines()), SentenceDeck(settings))
    assert deck.all and not deck.left("train")


def test_decks_take_turns_until_each_is_empty():
    assert list(take_turns([[1, 2, 3], [4], [], [5, 6]])) == [1, 4, 5, 2, 6, 3]


def test_prompts_and_words_are_read_from_their_packages(packages, tmp_path):
    language, package = ASTERISK_PROMPTS[-1]
    prompts = read_prompts(packages / package.name / package.payload, language)
    assert len(prompts) == 9 and {p.voice for p in prompts} == {"it_IT_f_Menardi"}
    assert "digits 14" in {p.gloss for p in prompts}
    words = read_words(packages / KTUBERLING.name / KTUBERLING.payload)
    assert len(words) == 18 and {w.language for w in words} == {"English", "French", "Russian"}
    assert words[0].gloss == "toy 0" and words[0].path.is_file()
    for read in (lambda: read_prompts(tmp_path, "English"), lambda: read_words(tmp_path)):
        with pytest.raises(ValueError, match="root: expected a folder with"):
            read()


@pytest.mark.network
@pytest.mark.slow
def test_the_plan_of_the_real_recordings():
    settings = make_settings(fold=DEFAULT_FOLD, size="benchmark", sources=SIZES["benchmark"].sources)
    gathered = Material.gather(settings)
    if gathered.unavailable:
        pytest.skip(str(gathered.unavailable))
    planned = plan_benchmark(settings, gathered)
    size = SIZES["benchmark"]
    clips = {(r.folder, r.split, r.key, d.name) for r in planned for d in r.draws}
    assert len(clips) <= 3000
    tests = Counter(r.task for r in planned if r.split == "test")
    assert tests == {
        **dict.fromkeys(size.tasks, size.others[2]), "content": 64, "keyword": 64, "gender": 2 * size.gender[2],
    }  # fmt: skip
    voices = defaultdict(set)
    for recording in planned:
        if recording.task != "language":
            voices[recording.actor or recording.speaker].add(recording.split)
    assert all(len(splits) == 1 for splits in voices.values())
    assert {r.actor for r in planned if r.source == "queen" and r.split == "test"} == {
        f"queen-{actor}" for actor in ACTOR_FOLDS[DEFAULT_FOLD]["test"]
    }
