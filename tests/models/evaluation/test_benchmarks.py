"""The published benchmarks, laid out as they are published; what is not there is named with what to get."""

import json

import numpy as np
import pytest

from models.corpora import build
from models.corpora.sources.debian import PackageUnavailable
from models.data.audio import write_audio
from models.data.manifest import Example, ManifestError, write_manifest
from models.evaluation.benchmarks import SuiteError, category_of, load_suite

PUBLISHED = {  # phase 1, in both spellings that are about
    "content": "SpeechDetection_LJSpeech SpeechDetection_LibriSpeech-TestClean SpeechDetection_LibriSpeechTestOther "
    "SpeechTextMatching_LJSpeech SpeechTextMatching_LibriSpeech-TestClean SpeechTextMatching_LibriSpeechTestOther "
    "SpokenTermDetection_LJSpeech SpokenTermDetection_LibriSpeech-TestClean SpokenTermDetection_LibriSpeechTestOther "
    "SpeechCommandRecognition_GoogleSpeechCommandsV1 LanguageIdentification_VoxForge",
    "semantic": "IntentClassification_FluentSpeechCommands-Action Intent_Classification_FluentSpeechCommands_Location "
    "Intent_Classification_FluentSpeechCommands_Object DialogueActClassification_DailyTalk SarcasmDetection_Mustard "
    "DialogueActPairing_DailyTalk",
    "paralinguistic": "AccentClassification_AccentdbExtended DialogueEmotionClassification_DailyTalk HowFarAreYou_3DSpeaker "
    "EmotionRecognition_MultimodalEmotionlinesDataset StressDetection_MIRSD SpoofDetection_ASVspoof2015 "
    "SpoofDetection_ASVspoof2017",
    "degradation": "EnhancementDetection_LibrittsTestCleanWham "
    + " ".join(f"NoiseDetection{n}_{d}Musan" for n in ("gaussian", "music", "noise", "speech") for d in ("LJSpeech", "VCTK"))
    + " "
    + " ".join(f"NoiseSNRLevelPrediction_VCTK_MUSAN-{n}" for n in ("Gaussian", "Music", "Noise", "Speech"))
    + " "
    + " ".join(f"ReverberationDetection{r}_{d}RirsNoises" for r in ("large", "medium", "small") for d in ("LJSpeech", "VCTK")),
    "speaker": "SpeakerVerification_LibriSpeech-TestClean SpeakerVerification_VCTK MultiSpeakerDetection_LibriSpeechTestClean "
    "MultiSpeakerDetection_VCTK SpeakerCounting_LibriTTS-TestClean",
    "audio": "BirdSoundDetection_Warblrb10k ChordClassification_AcousticGuitarAndPiano "
    + " ".join(f"EnvironmentalSoundClassification_ESC50-{n}" for n in ("Animals", "Exterior", "Human", "Interior", "Natural")),
}  # fmt: skip


def clip(path):
    return write_audio(path, np.full(1600, 0.1, np.float32))


def superb_task(root, task, rows, *, indent=4):
    """A task's folder as Dynamic-SUPERB's script writes it: metadata.json over the clips' names."""
    for name in rows:
        clip(root / task / name)
    (root / task / "metadata.json").write_text(json.dumps(rows, indent=indent))


def superb_row(label, **more):
    return {"file": "x/y.flac", "instruction": "Is it speech? The answer could be yes or no.", "label": label, **more}


@pytest.mark.parametrize("published", [True, False])
def test_clips_that_are_links_may_be_allowed(tmp_path, tmp_path_factory, published):
    superb_task(tmp_path, "SpeechDetection_LJSpeech", {"a.wav": superb_row("yes")})
    clip_path = tmp_path / "SpeechDetection_LJSpeech" / "a.wav"
    blob = tmp_path_factory.mktemp("blobs") / "0f"
    clip_path.rename(blob)
    clip_path.symlink_to(blob)
    name, options = "dynamic-superb", {"audio_root": tmp_path}
    if not published:
        rows = [Example(id="a", audio="SpeechDetection_LJSpeech/a.wav")]
        name, options = str(write_manifest(tmp_path / "m.jsonl", rows)), {}
    with pytest.raises(ManifestError, match="--allow-links"):
        load_suite(name, **options)
    assert len(load_suite(name, allow_links=True, **options).examples) == 1


@pytest.fixture()
def superb(tmp_path):
    superb_task(tmp_path, "SpeechDetection_LJSpeech", {"a.wav": superb_row("yes"), "b.wav": superb_row("no")})
    superb_task(tmp_path, "SpeechTextMatching_LJSpeech", {"a.wav": superb_row("Yes", text="a good day")}, indent=None)
    superb_task(tmp_path, "SpeakerVerification_VCTK", {"a.wav": superb_row("yes", file2="x/z.flac")})
    superb_task(tmp_path / "BirdSoundDetection_Warblrb10k", "test", {"a.wav": superb_row("no")})
    return tmp_path


@pytest.fixture()
def mcr(tmp_path):
    texts = {"neutral": "Which emotion?", "faithful": "She laughs.", "adversarial": "She cries.", "irrelevant": "Rain."}
    for task, audio in (("AQA", "AQA/audio/1.wav"), ("SER", "audio/1.wav")):  # paths from the root, or from the task
        clip(tmp_path / task / "audio" / "1.wav")
        rows = [{"audio": audio, "gt": gt, **texts} for gt in ("happy", "sad")]
        (tmp_path / task / f"{task}.json").write_text(json.dumps(rows, indent=1))
    return tmp_path


def test_phase_1_has_its_categories():
    counts = {category: len(names.split()) for category, names in PUBLISHED.items()}
    assert sum(counts.values()) == 55
    assert counts == {"content": 11, "semantic": 6, "paralinguistic": 7, "degradation": 19, "speaker": 5, "audio": 7}
    for category, names in PUBLISHED.items():
        assert {category_of(name) for name in names.split()} == {category}
    assert category_of("HeartbeatDetection_X") == ""


def test_dynamic_superb_as_published(superb):
    suite = load_suite("dynamic-superb", audio_root=superb)
    by_id = {e.id: e for e in suite.examples}
    assert sorted(by_id) == [
        "BirdSoundDetection_Warblrb10k/a.wav", "SpeechDetection_LJSpeech/a.wav", "SpeechDetection_LJSpeech/b.wav",
        "SpeechTextMatching_LJSpeech/a.wav",
    ]  # fmt: skip
    plain = by_id["SpeechDetection_LJSpeech/b.wav"]
    assert (plain.task, plain.answer, plain.choices) == ("SpeechDetection_LJSpeech", "no", ("yes", "no"))
    assert (plain.audio, plain.metadata["category"], plain.split) == ("SpeechDetection_LJSpeech/b.wav", "content", "test")
    assert (suite.audio_root / plain.audio).is_file()
    matching = by_id["SpeechTextMatching_LJSpeech/a.wav"]
    assert (matching.context, matching.transcription, matching.answer) == ("a good day", "", "Yes")
    bird = by_id["BirdSoundDetection_Warblrb10k/a.wav"]
    assert (bird.audio, bird.metadata["category"]) == ("BirdSoundDetection_Warblrb10k/test/a.wav", "audio")
    assert suite.left_out == {"SpeakerVerification_VCTK": "its questions have two clips each; a row here has one"}
    assert suite.mode == "generate" and not suite.problems


def test_questions_about_two_clips(superb):
    """An audio LM hears both, where the second ones are there; the published rows may name files of another machine."""
    suite = load_suite("dynamic-superb", audio_root=superb, several_clips=True)
    reason = "its questions have two clips each, and the second ones are not in the folder"
    assert suite.left_out == {"SpeakerVerification_VCTK": reason}
    superb_task(superb, "SpeakerVerification_VCTK", {"a.wav": superb_row("yes", audio2="b.wav"), "b.wav": superb_row("no")})
    suite = load_suite("dynamic-superb", audio_root=superb, several_clips=True)
    (both,) = [e for e in suite.examples if e.more_audio]
    assert [clip for clip, _, _ in both.clips] == ["SpeakerVerification_VCTK/a.wav", "SpeakerVerification_VCTK/b.wav"]
    assert not suite.left_out and not suite.problems and both.metadata["category"] == "speaker"
    assert [p.reason for p in load_suite("dynamic-superb", audio_root=superb, max_bad_fraction=0.5).problems] == [
        "audio2: expected one clip, got two"
    ]


def test_bad_rows_of_a_published_benchmark_are_named_or_refuse_it(superb):
    (superb / "SpeechDetection_LJSpeech" / "b.wav").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"1 of 4 rows are bad.*\n.*SpeechDetection_LJSpeech/b.wav\): audio: empty file"):
        load_suite("dynamic-superb", audio_root=superb)
    suite = load_suite("dynamic-superb", audio_root=superb, max_bad_fraction=0.5)
    assert len(suite.examples) == 3 and len(suite.problems) == 1
    assert len(load_suite("dynamic-superb", audio_root=superb, check_audio=False).examples) == 4


def test_dynamic_superb_as_one_file(tmp_path):
    clip(tmp_path / "a.wav")
    row = {"audio": "a.wav", "task": "SpoofDetection_X", "instruction": "The answer could be yes or no.", "label": "yes"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (example,) = load_suite("dynamic-superb", manifest=tmp_path / "rows.jsonl", audio_root=tmp_path).examples
    assert example.metadata["category"] == "paralinguistic"
    with pytest.raises(SuiteError, match=r"no file '.*none.jsonl'; leave MANIFEST out to read the folder that"):
        load_suite("dynamic-superb", manifest=tmp_path / "none.jsonl")


def test_mcr_as_published(mcr):
    suite = load_suite("mcr", audio_root=mcr)
    assert suite.left_out == {"VSC": "no VSC/VSC.json"}
    assert len(suite.examples) == 2 * 2 * 4 and len({e.id for e in suite.examples}) == 16
    ser = [e for e in suite.examples if e.task == "SER" and e.answer == "sad"]
    assert [e.metadata["context_type"] for e in ser] == ["neutral", "faithful", "adversarial", "irrelevant"]
    assert [e.kind for e in ser] == ["neutral", "aligned", "conflict", "neutral"]
    assert [e.context for e in ser] == ["", "She laughs.", "She cries.", "Rain."]
    assert {e.question for e in ser} == {"Which emotion?"} and len({e.pair_id for e in ser}) == 1
    assert ser[0].choices == ("happy", "sad")  # classification: the labels in use
    aqa = [e for e in suite.examples if e.task == "AQA"]
    assert {e.choices for e in aqa} == {()} and {e.audio for e in aqa} == {"AQA/audio/1.wav"}
    assert {e.audio for e in ser} == {"SER/audio/1.wav"}


def test_what_is_not_there_is_named_with_what_to_get(tmp_path):
    hints = {
        "dynamic-superb": "FOLDER/AccentClassification_AccentdbExtended/metadata.json",
        "mcr": "FOLDER/AQA/AQA.json",
        "mmau": "FOLDER/mmau-test-mini.json",
        "mmar": "FOLDER/MMAR-meta.jsonl",
    }
    for name, hint in hints.items():
        with pytest.raises(SuiteError, match=f"--benchmark {name}: expected --audio-root FOLDER") as raised:
            load_suite(name)
        assert hint in str(raised.value) and "github.com" in str(raised.value)
        with pytest.raises(SuiteError, match=r"--audio-root: no folder '.*none'; expected") as raised:
            load_suite(name, audio_root=tmp_path / "none")
        assert hint in str(raised.value)
        with pytest.raises(SuiteError, match=r"no (task|mmau-test-mini\.json|MMAR-meta\.jsonl) in it; expected") as raised:
            load_suite(name, audio_root=tmp_path)
        assert hint in str(raised.value)
    known = "builtin, dynamic-superb, mcr, mmau, mmar, listen"
    with pytest.raises(SuiteError, match=f"expected one of {known} beside MANIFEST 'm', got 'superb'"):
        load_suite("superb", manifest="m")
    with pytest.raises(SuiteError, match="builtin: expected neither MANIFEST nor --audio-root"):
        load_suite("builtin", audio_root=tmp_path)


def test_builtin_is_built_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    calls = []

    def build_corpus(folder, **options):
        calls.append((folder, options))
        clip(folder / "a.wav")
        return write_manifest(folder / "manifest.jsonl", [Example(id="1", audio="a.wav", answer="yes", split="test")])

    monkeypatch.setattr(build, "build_corpus", build_corpus)
    suite = load_suite("builtin")
    size = "benchmark" if "benchmark" in build.SIZES else "demo"
    assert calls == [(tmp_path / "corpora" / size, {"size": size})]
    assert [e.id for e in suite.examples] == ["1"] and suite.mode == "choice" and suite.audio_root == calls[0][0]

    def fail(folder, **options):
        raise PackageUnavailable("no package of that name")

    monkeypatch.setattr(build, "build_corpus", fail)
    with pytest.raises(SuiteError, match="builtin: cannot be built: no package of that name"):
        load_suite("builtin")
