"""Ask a model every question of a benchmark or manifest and score the answers.

    python -m models evaluate CHECKPOINT MANIFEST [--mode choice|generate] [--decoding greedy|contrastive --alpha 1]
                              [--formula authors] [--temperature 0.7 --top-k 50 --top-p 0.9 --seed 1]
                              [--controls no_audio swapped_audio] [--out predictions.jsonl] [--json scores.json]
    python -m models evaluate --benchmark builtin|dynamic-superb|mcr|mmau|mmar|listen|MANIFEST CHECKPOINT [--audio-root FOLDER]
    python -m models evaluate --rescore predictions.jsonl [--compare other.jsonl] [--scorer strict] [--priors priors.json]

CHECKPOINT is the folder of a SpeechLM; or hub id, folder or adapter of an audio LM of transformers. A model that was trained on
other audio or words than those of the manifest (the recipe's student.hears) is asked likewise; --hears changes that.

Mode "choice" ranks the given choices by the likelihood of the tokens that spell them in the answer's sentence. It is fast and
always gives an answer. In mode "generate" the model writes freely, and an answer counts if the label's words are in it. The
published benchmarks (benchmarks.py) use "generate" unless --mode says otherwise.

Predictions are appended to a JSONL file batch by batch (ask.py). A killed evaluation goes on where it was, and a finished file
can be scored again without a model. The file's first line says how many answers a finished one has; fewer are not scored.
Controls (controls.py) repeat the questions with no audio, or with the audio of a clip that has another answer to the same
question. What a system still gets right then does not come from the sound.

The figures are those of scoring.py (accuracies, ALL, Shift) and diagnostics.py (calibration, the text prior, the difference to
another system). --json writes all of them.
"""

from __future__ import annotations

import argparse
import glob
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.audio_lms.model import is_hub_id
from models.corpora.hearing import Hearing, parse_hearing, read_hears
from models.data.audio import MAX_SECONDS
from models.data.json_rows import parse_object
from models.data.manifest import Example
from models.data.problems import print_skipped
from models.evaluation import text_priors
from models.evaluation.ask import Decoding, evaluate, has_answer
from models.evaluation.benchmarks import TASKS_IN_ALL, Suite, load_suite
from models.evaluation.commands import evaluate_parser
from models.evaluation.controls import control_id, with_controls
from models.evaluation.diagnostics import compare
from models.evaluation.predictions import (
    EvaluationError,
    Prediction,
    append_predictions,
    header_line,
    read_predictions,
)
from models.evaluation.published_scores import OF_BENCHMARK
from models.evaluation.score_tables import print_comparison, print_summary, to_json
from models.evaluation.scorers import load_scorer
from models.evaluation.scoring import AUDIO_CATEGORY
from models.evaluation.summary import summarize
from models.io_utils import append_bytes, atomic_write_json, fingerprint, locked, same_file, sha256_file
from models.speech_lm.clip_keys import FeatureError, file_hashes
from models.speech_lm.feature_files import features_sha256
from models.speech_lm.listeners import find_listener, is_speech_lm, load_listener, open_clips

if TYPE_CHECKING:
    import torch

_SETTINGS = ("checkpoint", "manifest", "benchmark", "decoding", "alpha", "controls", "split", "tasks", "max_new_tokens")
_DECODING = ("formula", "temperature", "top_k", "top_p", "seed")


def read_priors(path: str | Path, predictions: Iterable[Prediction]) -> dict[str, str]:
    """id -> answer, of a JSON object or of a file that text_priors.py wrote; only of the ids that the predictions have.

    Raises:
        EvaluationError: the file cannot be read, is not such an object, or has none of the predictions' ids.
    """
    priors = _prior_answers(path)
    asked = {p.id for p in predictions if not p.control}
    known = {name: answer for name, answer in priors.items() if name in asked}
    if not known:
        raise EvaluationError(f"--priors {path}: none of its {len(priors)} ids is among the {len(asked)} predictions")
    return known


def _prior_answers(path: str | Path) -> dict[str, str]:
    try:
        priors = parse_object(Path(path).read_bytes())
        if text_priors.FILE_KEY in priors:
            priors = {name: prior.answer for name, prior in text_priors.read_priors(path).items()}
    except OSError as error:
        raise EvaluationError(f"--priors {path}: not readable: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"--priors {path}: {error}") from error
    for name, answer in priors.items():
        if not isinstance(answer, str):
            raise EvaluationError(f"--priors {path}: expected a string for {name!r}, got {type(answer).__name__}")
    return priors


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = evaluate_parser()
    arguments = parser.parse_args(argv)
    try:
        chosen = load_scorer(arguments.scorer) if arguments.scorer else None  # checked first: then a wrong name costs no work
        _check_arguments(arguments)
        other = _nonempty_predictions(arguments.compare)[1] if arguments.compare else None
        if arguments.rescore:
            settings, predictions = _nonempty_predictions(arguments.rescore)
        elif not arguments.checkpoint or not (arguments.manifest or arguments.benchmark):
            parser.error("expected CHECKPOINT and MANIFEST, --benchmark NAME and CHECKPOINT, or --rescore FILE")
        else:
            _check_checkpoint(arguments)
            _check_earlier(arguments)
            settings, predictions = _evaluate_files(arguments)
        scorer = chosen or OF_BENCHMARK.get(settings.get("benchmark") or "", "lenient")
        priors = read_priors(arguments.priors, predictions) if arguments.priors else None
        summary = summarize(predictions, scorer=scorer, priors=priors)
        print_summary(summary)
        _print_left_out(settings, predictions)
        comparison = None
        if other is not None:
            comparison = compare(predictions, other, scorer=scorer)
            print_comparison(comparison, arguments.rescore or arguments.out, arguments.compare)
        if arguments.json:
            figures = {"predictions": str(arguments.rescore or arguments.out), "settings": settings, "summary": summary}
            if comparison is not None:
                figures |= {"compared_with": arguments.compare, "comparison": comparison}
            print(atomic_write_json(arguments.json, to_json(figures)))
    except (EvaluationError, FeatureError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped. The same command goes on from {arguments.out}", file=sys.stderr)
        return 130
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Find what cannot work, or contradicts itself, before anything is built, loaded or asked."""
    if arguments.rescore and (arguments.checkpoint or arguments.manifest or arguments.benchmark):
        raise EvaluationError("--rescore: expected no CHECKPOINT, MANIFEST or --benchmark beside it, since nothing is asked")
    if arguments.alpha is not None and arguments.decoding != "contrastive" and not arguments.rescore:
        raise EvaluationError("--alpha: expected --decoding contrastive beside it; greedy decoding has no strength")
    if arguments.decoding != "contrastive":
        for name in ("formula", "temperature", "top_k", "top_p"):
            if getattr(arguments, name) != evaluate_parser().get_default(name):
                raise EvaluationError(f"--{name.replace('_', '-')}: expected --decoding contrastive beside it")
    _check_sampling(arguments)
    arguments.alpha = 1.0 if arguments.alpha is None else arguments.alpha
    for name in ("batch_examples", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise EvaluationError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if not 0.0 <= arguments.max_bad_fraction <= 1.0:
        raise EvaluationError(f"--max-bad-fraction: expected a number from 0 to 1, got {arguments.max_bad_fraction}")
    if arguments.features and not Path(arguments.features).exists():
        raise EvaluationError(f"--features: no file or folder {arguments.features!r}")
    if arguments.priors:
        _prior_answers(arguments.priors)
    if arguments.json and not arguments.rescore and same_file(arguments.json, arguments.out):
        raise EvaluationError(f"--json: expected another file than --out, got {arguments.json!r}")
    if not arguments.rescore and Path(arguments.out).suffix == ".gz":
        raise EvaluationError(f"--out: expected a name without .gz, since lines are added one by one, got {arguments.out!r}")
    written = {"--out": None if arguments.rescore else arguments.out, "--json": arguments.json}
    for name in ("rescore", "compare", "priors", "features", "manifest", "benchmark"):
        path = getattr(arguments, name)
        for option, target in written.items():
            if path and target and same_file(path, target):
                raise EvaluationError(f"{option}: expected another file than {name.upper()} {path!r}, which is read")


def _check_sampling(arguments: argparse.Namespace) -> None:
    if arguments.temperature is None and (arguments.top_k, arguments.top_p) != (None, None):
        arguments.temperature = 1.0
    for name, ok, expected in (
        ("temperature", lambda x: 0 < x < math.inf, "a positive number"),
        ("top_k", lambda x: x >= 1, "at least 1"),
        ("top_p", lambda x: 0 < x <= 1, "a number in (0, 1]"),
    ):
        value = getattr(arguments, name)
        if value is not None and not ok(value):
            raise EvaluationError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")
    if arguments.temperature is None and arguments.seed:
        raise EvaluationError(f"--seed: expected --temperature, --top-k or --top-p beside it, got {arguments.seed}")


def _check_checkpoint(arguments: argparse.Namespace) -> None:
    """Look at the model before the questions, which may have to be built. A finished evaluation needs no backbone."""
    from models.speech_lm.saving import check_folder

    try:
        if not is_speech_lm(arguments.checkpoint):
            if not Path(arguments.checkpoint).is_dir() and not is_hub_id(arguments.checkpoint):
                raise EvaluationError(f"checkpoint: no folder {arguments.checkpoint!r}")
            find_listener(arguments.checkpoint)
            if arguments.features:
                raise EvaluationError("--features: expected none with an audio LM of transformers, which hears the clips")
            return
        check_folder(arguments.checkpoint, backbones=not Path(arguments.out).exists(), encoder=not arguments.features)
    except EvaluationError:
        raise
    except RuntimeError as error:  # BackboneError, SpeechLMError and AudioLMError are
        raise EvaluationError(f"checkpoint: {error}") from error


def _nonempty_predictions(path: str) -> tuple[dict[str, Any], list[Prediction]]:
    header, predictions = read_predictions(path)
    if not predictions:
        raise EvaluationError(f"{path}: no prediction in it")
    return header.get("settings", {}), predictions


def _print_left_out(settings: Mapping[str, Any], predictions: Sequence[Prediction]) -> None:
    for task, reason in settings.get("left_out", {}).items():
        print(f"left out: task {task}: {reason}")
    expected = TASKS_IN_ALL.get(settings.get("benchmark", ""))
    counted = len({p.task for p in predictions if p.category != AUDIO_CATEGORY})
    if expected and counted != expected:
        print(f"mean_of_tasks is over {counted} tasks, the published ALL over {expected}: do not compare the two")


def _evaluate_files(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Prediction]]:
    """Load benchmark and model and ask what an unfinished predictions file lacks. Returns settings and predictions."""
    from models.backbones.device import pick_device

    device = pick_device(arguments.device)
    suite = load_suite(
        arguments.benchmark or arguments.manifest,
        manifest=arguments.manifest if arguments.benchmark else None,
        audio_root=arguments.audio_root,
        check_audio=arguments.features is None,
        allow_links=arguments.allow_links,
        max_bad_fraction=arguments.max_bad_fraction,
        several_clips=not is_speech_lm(arguments.checkpoint),
    )
    print_skipped(suite.problems)
    examples = _questions(suite, arguments)
    hears = parse_hearing(arguments.hears) if arguments.hears else read_hears(find_listener(arguments.checkpoint)[0])
    settings = _settings(suite, examples, arguments, hears)
    if settings["mode"] == "choice" and arguments.temperature is not None:
        raise EvaluationError("--temperature, --top-k, --top-p: expected --mode generate; mode choice samples nothing")
    with locked(arguments.out, f"--out {arguments.out}: another evaluation is writing there"):
        return settings, _ask_what_is_missing(suite, examples, arguments, settings, device=device, hears=hears)


def _ask_what_is_missing(
    suite: Suite,
    examples: Sequence[Example],
    arguments: argparse.Namespace,
    settings: Mapping[str, Any],
    *,
    device: torch.device,
    hears: Hearing,
) -> list[Prediction]:
    """Ask what the predictions file lacks, which this process has locked. Returns all predictions."""
    out = Path(arguments.out).absolute()
    for left in out.parent.glob(f".{glob.escape(out.name)}.features.????????"):  # by an evaluation that was killed
        shutil.rmtree(left, ignore_errors=True)
    expected, done = _begun(arguments.out, settings)
    wanted = [(control, e.id) for control, e, _ in with_controls(examples, arguments.controls)]
    if "swapped_audio" in arguments.controls and (alone := len(examples) - sum(c == "swapped_audio" for c, _ in wanted)):
        print(f"left out of swapped_audio: {alone} of {len(examples)} questions; no other clip has another answer to them")
    if {control_id(name, control) for control, name in wanted} <= {p.id for p in done}:
        return done  # nothing is left to ask: neither the model nor the clips are needed
    try:
        model = load_listener(arguments.checkpoint, device)
    except RuntimeError as error:  # BackboneError, SpeechLMError and AudioLMError are
        raise EvaluationError(f"checkpoint: {error}") from error
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.features.", dir=out.parent) as folder:  # not in memory
        store, usable = open_clips(
            model,
            examples,
            audio_root=suite.audio_root,
            max_seconds=MAX_SECONDS,
            features=arguments.features,
            folder=folder,
            max_bad_fraction=arguments.max_bad_fraction,
            max_cut_fraction=arguments.max_cut_fraction,
            say=print,
            hears=hears,
        )
        questions = len(with_controls(usable, arguments.controls))  # only now it is known which clips can be heard
        if not done:
            os.truncate(out, 0)
            append_bytes(out, header_line(settings, questions=questions).encode())
        elif expected not in (None, questions):
            raise EvaluationError(
                f"{arguments.out}: expected {expected} questions as in its first line, got {questions} with a clip that can be "
                "heard; choose another --out or remove it"
            )
        alpha = arguments.alpha if arguments.decoding == "contrastive" else None
        return evaluate(
            model,
            usable,
            store,
            collate=model.make_collator(),
            mode=settings["mode"],
            alphas=(alpha,),
            controls=arguments.controls,
            batch_examples=arguments.batch_examples,
            max_new_tokens=arguments.max_new_tokens,
            decoding=Decoding(**{name: getattr(arguments, name) for name in _DECODING}),
            done=done,
            hears=hears,
            on_batch=lambda _, new: append_predictions(arguments.out, new),
        )[alpha]


def _settings(
    suite: Suite, examples: Sequence[Example], arguments: argparse.Namespace, hears: Hearing
) -> dict[str, Any]:
    """What decides the predictions; it stands in the first line of their file."""
    folders = find_listener(arguments.checkpoint)
    checkpoint = [sha256_file(p) for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()]
    if arguments.features:  # they are what is heard; the clips may not be there
        heard = {"features_sha256": features_sha256(arguments.features)}
    else:
        heard = {"clips_sha256": fingerprint(file_hashes(examples, suite.audio_root))}
    return {
        **{name: getattr(arguments, name) for name in _SETTINGS},
        **_decoding_settings(arguments),
        "mode": arguments.mode or suite.mode,
        "left_out": suite.left_out,
        **({"hears": hears.settings()} if hears.settings() else {}),
        # Checkpoint, manifest or audio may change under the same name; the old answers are not those of the new one.
        "questions_sha256": fingerprint([e.to_row() for e in examples]),
        "checkpoint_sha256": checkpoint,
        **heard,
    }


def _decoding_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that differ from their defaults, so that files without them can be continued."""
    defaults = evaluate_parser()
    return {name: x for name in _DECODING if (x := getattr(arguments, name)) != defaults.get_default(name)}


def _begun(out: str, settings: Mapping[str, Any]) -> tuple[int | None, list[Prediction]]:
    """How many answers an earlier run of these settings expected, if its file says so, and its predictions."""
    header, done = _earlier(out, repair=True)
    if not done:
        return None, []
    if header.get("fingerprint") != fingerprint(settings):
        earlier = header.get("settings", {})
        names = [n for n in sorted({*earlier, *settings}) if fingerprint([earlier.get(n)]) != fingerprint([settings.get(n)])]
        raise _other_settings(out, names)
    print(f"going on from {out}: {len(done)} answers are there")
    return header.get("questions"), done


def _earlier(out: str, *, repair: bool = False) -> tuple[dict[str, Any], list[Prediction]]:
    """Header and predictions of a file that may not be there, or may be empty: made by an evaluation that was killed at once."""
    if not Path(out).exists() or not Path(out).stat().st_size:
        return {}, []
    return read_predictions(out, unfinished=True, repair=repair)


def _check_earlier(arguments: argparse.Namespace) -> None:
    """Compare an earlier predictions file with the arguments, before the questions are there to compare as well."""
    header, done = _earlier(arguments.out)
    earlier = header.get("settings", {}) if done else {}
    decoding = _decoding_settings(arguments)
    differs = [name for name in _SETTINGS if name in earlier and earlier[name] != getattr(arguments, name)]
    if earlier:
        differs += [name for name in _DECODING if decoding.get(name) != earlier.get(name)]
    if differs:
        raise _other_settings(arguments.out, differs)


def _other_settings(out: str, differs: Sequence[str]) -> EvaluationError:
    return EvaluationError(
        f"{out}: holds predictions of other settings, of another model, of another manifest or of other audio (not the same: "
        f"{', '.join(differs)}); choose another --out or remove it"
    )


def _questions(suite: Suite, arguments: argparse.Namespace) -> list[Example]:
    """The examples that are asked about. The names of those without an answer are printed."""
    chosen = [e for e in suite.examples if e.split == arguments.split]
    chosen = [e for e in chosen if not arguments.tasks or e.task in arguments.tasks]
    where = f"split {arguments.split!r}, tasks {', '.join(arguments.tasks) or 'all'}"
    if not chosen:
        there = sorted({(e.split, e.task) for e in suite.examples})
        held = ", ".join(f"{split} {task or '(no task)'}" for split, task in there)
        raise EvaluationError(f"{suite.name}: no example in {where}; it holds {held or 'none at all'}")
    lacking = sorted(set(arguments.tasks) - {e.task for e in chosen})
    if lacking:
        raise EvaluationError(f"{suite.name}: no example in split {arguments.split!r} of task {', '.join(lacking)}")
    unanswered = [e for e in chosen if not has_answer(e)]
    if len(unanswered) == len(chosen):
        raise EvaluationError(
            f"{suite.name}: none of the {len(chosen)} examples in {where} has an answer to score against"
        )
    print_skipped(f"{e.id}: no answer to score against" for e in unanswered)
    return [e for e in chosen if has_answer(e)]
