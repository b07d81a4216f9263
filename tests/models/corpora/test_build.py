"""The corpus: no leaks between splits, hints as promised, equal bytes for equal settings, missing sources named."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from models.corpora import build, questions, recordings, render
from models.corpora.build import build_corpus, main
from models.corpora.plans.base import Settings
from models.corpora.plans.hinted import _MEANT_EVENTS, _MEANT_PLACES, plan_hinted
from models.corpora.recordings import Material
from models.corpora.sources.debian import PackageUnavailable, fetch_package
from models.corpora.sources.packages import AMAZON_QUEEN
from models.corpora.sources.queen import QueenLine
from models.data.audio import AudioError
from models.data.manifest import ManifestError, read_manifest
from models.data.prompts import hint_for, render_prompt
from models.io_utils import fingerprint, sha256_file
from tests.models.corpora.test_recordings import _mp3

pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return read_manifest(
        build_corpus(tmp_path_factory.mktemp("tiny"), sources=("espeak",), size="tiny", progress=False)
    )


def make_settings(**changes) -> Settings:
    told = {"sources": ("espeak",), "size": "tiny", "seed": 0, "tasks": None, "hint_correlation": 0.95}
    return Settings(**{**told, "min_snr_db": -18.0, "max_snr_db": 2.0, "max_seconds": 4.0, "fold": None, **changes})


def _text_key(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def assert_no_leak(manifest, *, tasks=None):
    """No speaker and no text of one split in another."""
    for key in ("speaker", "text"):
        seen = defaultdict(set)
        for example in manifest:
            if tasks is None or example.task in tasks:
                seen[_text_key(example.metadata[key])].add(example.split)
        assert seen and all(len(splits) == 1 for splits in seen.values()), key


def assert_pairs_are_whole(manifest):
    """Each dev and test clip under the three kinds, hints that claim what their kind says."""
    pairs = defaultdict(list)
    for example in manifest:
        if example.split != "train" and example.pair_id is not None:
            pairs[example.pair_id].append(example)
        if example.task != "content" and "claimed_by_words" not in example.metadata:
            true_hint = hint_for(example.task, example.answer)
            assert {"neutral": not example.context, "aligned": example.context == true_hint,
                    "conflict": example.context not in ("", true_hint)}[example.kind]  # fmt: skip
    for examples in pairs.values():
        assert sorted(e.kind for e in examples) == ["aligned", "conflict", "neutral"]
        assert len({(e.audio, e.question, e.answer, e.choices) for e in examples}) == 1


@pytest.mark.slow
def test_all_tasks_of_espeak_are_there_and_every_clip_can_be_read(tiny):
    assert {e.task for e in tiny} == {"gender", "speaking_rate", "accent", "noise", "content", "place", "mood"}
    assert tiny.problems == []
    assert sum(tiny.header["counts"].values()) == len(tiny)
    for example in tiny:
        assert example.answer in example.choices and example.metadata["duration_seconds"] <= 4.0
        assert sha256_file(tiny.audio_path(example)) == example.metadata["audio_sha256"]
        assert render_prompt(example)


def test_no_voice_and_no_text_crosses_from_one_split_to_another(tiny):
    assert_no_leak(tiny)


def test_what_is_meant_in_the_test_is_never_mentioned_in_training(tiny):
    for task, meant in (("place", _MEANT_PLACES), ("mood", _MEANT_EVENTS)):
        for split in ("train", "dev", "test"):
            told = tiny.select(task=task, split=split)
            assert told
            for example in told:
                words = [w for w in meant[split][example.answer] if example.metadata["text"].endswith(f" {w}.")]
                assert len(words) == 1, example.id
        for split, others in (("train", ("dev", "test")), ("dev", ("train", "test")), ("test", ("train", "dev"))):
            here = {w for words in meant[split].values() for w in words}
            assert not here & {w for other in others for words in meant[other].values() for w in words}
            assert not set.intersection(*map(set, meant[split].values()))


def test_pairs_are_whole_and_hints_claim_what_their_kind_says(tiny):
    assert_pairs_are_whole(tiny)


def test_the_transcript_is_the_hint_of_the_content_task(tiny):
    for example in tiny.select(task="content"):
        words = example.transcription.rstrip(".").split()
        other = next(choice for choice in example.choices if choice != example.answer)
        assert {"neutral": words == [], "aligned": example.answer in words and other not in words,
                "conflict": example.answer not in words}[example.kind]  # fmt: skip
        assert example.context == "" and example.answer in example.metadata["text"]


def test_words_that_claim_a_rate_are_aligned_or_in_conflict_and_only_in_test(tiny):
    claims = [e for e in tiny if "claimed_by_words" in e.metadata]
    assert {e.kind for e in claims} == {"aligned", "conflict"} and {e.split for e in claims} == {"test"}
    for example in claims:
        assert (example.metadata["claimed_by_words"] == example.answer) == (example.kind == "aligned")
        assert example.pair_id is None and example.context == ""


def test_labels_are_in_balance_in_each_split(tiny):
    for task in ("gender", "accent", "noise"):
        for split in ("train", "dev", "test"):
            counts = Counter(
                e.answer for e in tiny.select(split=split, task=task) if e.kind == "neutral" or split == "train"
            )
            assert len(set(counts.values())) == 1, (task, split, counts)


@pytest.mark.parametrize(("correlation", "false_share"), [(0.95, 0.05), (1.0, 0.0), (0.5, 0.5)])
def test_hints_are_true_as_often_as_asked_in_the_teachers_pool(correlation, false_share):
    settings = make_settings(hint_correlation=correlation)
    kinds = Counter(questions._quota(600, "teacher", settings, "gender", "man"))
    assert kinds["neutral"] == 400 - 200 and abs(kinds["conflict"] - 400 * false_share) <= 1
    assert set(Counter(questions._quota(600, "distill", settings, "gender", "man")).values()) == {200}
    small = sum(questions._quota(4, "teacher", settings, str(n)).count("conflict") for n in range(600))
    assert small == pytest.approx(600 * 4 * 2 / 3 * false_share, abs=35)  # small groups are right on average


@pytest.mark.slow
def test_equal_settings_give_equal_bytes_and_another_seed_other_ones(tiny, tmp_path):
    options = {"sources": ("espeak",), "size": "tiny", "progress": False}
    again = build_corpus(tmp_path / "again", **options)
    assert again.read_bytes() == tiny.path.read_bytes()
    other = read_manifest(build_corpus(tmp_path / "other", seed=1, tasks=("gender",), **options))
    assert other.header["content_sha256"] != tiny.header["content_sha256"]
    assert {e.task for e in other} == {"gender"}


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        ("tiny", "8c6956001442be62af8f87a37b25bbad52125d554d963a96ade80e11dede9869"),
        ("sources", "c852f42f22dccc3777b94f277c386f79a2a066017b6dd6507865c18e37d611a9"),
    ],
)
def test_the_plans_that_published_results_stand_on_have_not_changed(size, digest):
    planned = [
        [r.key, r.task, r.label, r.split, r.speaker, r.text, r.sound.voice, [[d.name, d.snr_db] for d in r.draws]]
        for r in plan_hinted(make_settings(size=size), Material(espeak=True))
    ]
    assert fingerprint(planned) == digest
    demo = make_settings(sources=("queen", "espeak"), size="demo", tasks=("gender",))
    assert demo.fingerprint() == "157ce915b00be9ecd0df0b70f1ec1f7104f8f1ec491bed6011778110ca7e6ca6"


@pytest.mark.slow
def test_a_corpus_is_built_once_repaired_and_cleared_of_old_clips(tmp_path, monkeypatch):
    options = {"sources": ("espeak",), "size": "tiny", "progress": False}
    path = build_corpus(tmp_path, tasks=("noise",), **options)
    content = path.read_bytes()
    calls = []
    real = build.render_all
    monkeypatch.setattr(build, "render_all", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    build_corpus(tmp_path, tasks=("noise",), **options)
    assert calls == []
    clip = next((tmp_path / "audio").rglob("*.flac"))
    clip.write_bytes(clip.read_bytes()[:-1])
    build_corpus(tmp_path, tasks=("noise",), **options)
    assert calls == [1] and path.read_bytes() == content
    manifest = read_manifest(build_corpus(tmp_path, tasks=("accent",), **options))
    assert {p for p in (tmp_path / "audio").rglob("*.flac")} == {manifest.audio_path(e) for e in manifest}


def test_without_apt_espeak_goes_on_alone_and_says_so(tmp_path, monkeypatch, capsys):
    def unavailable(package):
        raise PackageUnavailable(f"{package.name}: apt-get not found")

    monkeypatch.setattr(recordings, "fetch_package", unavailable)
    path = build_corpus(tmp_path, sources=("queen", "espeak"), size="tiny", tasks=("gender",), progress=False)
    manifest = read_manifest(path)
    assert "going on without queen" in capsys.readouterr().err
    assert "apt-get not found" in manifest.header["unavailable"]["queen"]
    assert {e.split for e in manifest} == {"train", "dev", "test"}
    with pytest.raises(PackageUnavailable):
        build_corpus(tmp_path / "b", sources=("queen",), size="tiny", progress=False)
    assert main(["--out", str(tmp_path / "b"), "--sources", "queen", "--size", "tiny"]) == 1
    assert capsys.readouterr().err.endswith("error: flight-of-the-amazon-queen: apt-get not found\n")


def _lines(broken: int = 0) -> list[QueenLine]:
    mp3 = _mp3(1.5)
    lines = []
    for speaker in ("FAYE", "JOE", "NAOMI", "IAN", "PRIN", "JIM", "DOG"):
        for number in range(8):
            text = "Same words for all." if number == 0 else f"This is line {number} of {speaker}."
            lines.append(QueenLine(f"{speaker}{number}", speaker, text, mp3))
    lines.append(QueenLine("FAYE98", "FAYE", "<a long, loud gulp>", mp3))
    lines.append(QueenLine("FAYE99", "FAYE", "Short.", mp3))
    return lines


def test_queen_lines_are_split_by_character_and_text(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "fetch_package", lambda package: tmp_path)
    monkeypatch.setattr(recordings, "read_lines", lambda path: _lines())
    manifest = read_manifest(build_corpus(tmp_path / "c", sources=("queen",), size="tiny", fold=None, progress=False))
    assert_no_leak(manifest)
    assert_pairs_are_whole(manifest)
    assert {e.metadata["speaker"] for e in manifest.select(split="test")} == {"queen-PRIN", "queen-JIM"}
    assert {e.metadata["speaker"] for e in manifest.select(split="train")} == {"queen-FAYE", "queen-JOE"}
    assert Counter(e.metadata["pool"] for e in manifest.select(split="train")) == {"teacher": 8, "distill": 8}
    texts = {e.metadata["text"] for e in manifest}
    assert not texts & {"<a long, loud gulp>", "Short.", "This is line 1 of DOG."}
    assert all(-18.0 <= e.metadata["snr_db"] <= 2.0 for e in manifest)
    assert manifest.header["sources"][0]["payload_sha256"] == AMAZON_QUEEN.payload_sha256


def test_recordings_that_cannot_be_decoded_are_listed_and_too_many_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "fetch_package", lambda package: tmp_path)
    monkeypatch.setattr(recordings, "read_lines", lambda path: _lines())

    def decode(line):
        raise AudioError("corrupt mp3")

    monkeypatch.setattr(QueenLine, "decode", decode)
    with pytest.raises(
        ManifestError, match=r"18 of 18 recordings cannot be used\n  row 1 \(queen-.*corrupt mp3"
    ):
        build_corpus(tmp_path / "c", sources=("queen",), size="tiny", fold=None, progress=False)
    assert not (tmp_path / "c" / "manifest.jsonl").exists()
    monkeypatch.setattr(render, "_MAX_BAD_FRACTION", 1.0)
    spoilt = np.random.default_rng(0)
    monkeypatch.setattr(
        QueenLine,
        "decode",
        lambda line: (spoilt.standard_normal(9000), 9000) if line.speaker != "JOE" else decode(line),
    )
    manifest = read_manifest(build_corpus(tmp_path / "c", sources=("queen",), size="tiny", fold=None, progress=False))
    assert len(manifest.header["problems"]) > 0 and "corrupt mp3" in manifest.header["problems"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "sources: expected some of"),
        ({"sources": ("librispeech",)}, "sources: expected some of"),
        ({"size": "huge"}, "size: expected one of"),
        ({"tasks": ("emotion",)}, "tasks: expected some of"),
        ({"tasks": ("keyword",)}, "tasks: expected some of .* in size 'tiny'"),
        ({"fold": 4}, "fold: expected None or a number from 0 to 3, got 4"),
        ({"fold": None, "size": "benchmark_tiny"}, "fold: expected a number in size 'benchmark_tiny'"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"hint_correlation": 1.5}, "hint_correlation: expected a number from 0 to 1"),
        ({"min_snr_db": 5.0}, "min_snr_db: expected at most max_snr_db 2"),
        ({"max_seconds": 100.0}, "max_seconds: expected 1 to 30"),
        ({"sources": ("espeak",), "tasks": ("language",)}, "tasks: expected some that the sources"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_corpus(tmp_path, **{"size": "tiny", "progress": False, **options})


def test_command_line_prints_the_counts(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--sources", "espeak", "--size", "tiny", "--tasks", "noise"]) == 0
    out = capsys.readouterr().out
    assert "noise/test/conflict" in out and str(tmp_path / "manifest.jsonl") in out
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--size", "enormous"])
    assert "error: argument --size: invalid choice: 'enormous'" in capsys.readouterr().err


@pytest.mark.network
@pytest.mark.slow
def test_the_real_recordings(tmp_path):
    try:
        fetch_package(AMAZON_QUEEN)
    except PackageUnavailable as error:
        pytest.skip(str(error))
    path = build_corpus(tmp_path, sources=("queen", "espeak"), size="demo", tasks=("gender",), fold=None, progress=False)
    manifest = read_manifest(path)
    assert_no_leak(manifest)
    assert_pairs_are_whole(manifest)
    assert manifest.header["problems"] == []
    tests = manifest.select(split="test", task="gender")
    assert len(tests) == 3 * 176 and len({e.metadata["speaker"] for e in tests}) == 5
    assert len(manifest.select(split="train", pool="teacher")) >= 700
