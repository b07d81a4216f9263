"""Ask a speech LM every question of a benchmark or manifest and score the answers.

    python -m models evaluate CHECKPOINT MANIFEST [--mode choice|generate] [--decoding greedy|contrastive --alpha 1]
                              [--controls no_audio swapped_audio] [--out predictions.jsonl] [--json scores.json]
    python -m models evaluate --benchmark builtin|dynamic-superb|mcr|MANIFEST CHECKPOINT [--audio-root FOLDER]
    python -m models evaluate --rescore predictions.jsonl [--compare other.jsonl] [--scorer strict] [--priors priors.json]

Mode "choice" ranks the given choices by the likelihood of the tokens that spell them in the answer's sentence: fast, and it
always answers. Mode "generate" lets the model write freely; the answer counts when the label's words stand in it. The published
benchmarks (models/evaluation/benchmarks.py) are asked by "generate" unless told otherwise.

Predictions are appended to a JSONL file batch by batch. A killed evaluation goes on where it was; a finished file can be scored
again without any model. Controls repeat the questions with no audio, or with the audio of a clip that has another answer: what a
system still gets right then, it did not get from the sound.

The figures are those of models/evaluation/scoring.py (accuracies, ALL, Shift) and models/evaluation/diagnostics.py
(calibration, the text prior, the difference to another system); --json writes all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kdkernels.teacher import MarkAbsent
from models.data.manifest import Example, parse_object
from models.data.prompts import target_template
from models.evaluation import text_priors
from models.evaluation.benchmarks import TASKS_IN_ALL, Suite, load_suite
from models.evaluation.choice_scores import choice_scores
from models.evaluation.commands import CONTROLS, evaluate_parser
from models.evaluation.diagnostics import calibration, compare, control_priors, hint_priors, prior_confusion
from models.evaluation.predictions import (
    EvaluationError,
    Prediction,
    append_predictions,
    claimed_choice,
    context_kind,
    read_predictions,
    write_header,
)
from models.evaluation.score_tables import print_comparison, print_summary, to_json
from models.evaluation.scorers import Scorer, load_scorer
from models.evaluation.scoring import AUDIO_CATEGORY, judged, metrics
from models.io_utils import atomic_write_json, fingerprint, sha256_file
from models.speech_lm.features import FeatureError, FeatureStore, clip_key, extract_features

_SKIPPED_SHOWN = 20


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    examples: Sequence[Example],
    features: torch.Tensor,
    *,
    collate: Callable[..., Any],
    alpha: float | None = None,
    hears: bool = True,
    max_new_tokens: int = 16,
) -> list[str]:
    """Free answers, greedy; with `alpha` by contrastive decoding of the two paths."""
    batch = collate(examples, features, with_target=False).to(model.get_output_embeddings().weight.device)
    if not hears:
        batch = dataclasses.replace(batch, audio_present=torch.zeros_like(batch.audio_present))
    if alpha is None:
        return model.generate(batch, max_new_tokens=max_new_tokens)
    from kdkernels.decoding import contrastive_generate

    tokens = contrastive_generate(
        model,
        batch.model_inputs(),
        negative=MarkAbsent(),
        alpha=alpha,
        max_new_tokens=max_new_tokens,
        eos_token_id=model.tokenizer.eos_token_id,
    )
    return [text.strip() for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def evaluate(
    model: torch.nn.Module,
    examples: Sequence[Example],
    store: FeatureStore,
    *,
    collate: Callable[..., Any],
    mode: str = "choice",
    alphas: Sequence[float | None] = (None,),
    controls: Sequence[str] = (),
    plain: bool = True,
    batch_examples: int = 32,
    max_new_tokens: int = 16,
    extra_inputs: dict[str, Any] | None = None,
    done: Iterable[Prediction] = (),
    on_batch: Callable[[float | None, list[Prediction]], None] | None = None,
    progress_bar: bool = True,
) -> dict[float | None, list[Prediction]]:
    """Predictions for every example, with and without the controls.

    Args:
        mode: "choice" or "generate".
        alphas: None is plain (greedy) decoding; a number is contrastive decoding with that strength. In mode "choice" all
            come from the same forward passes.
        controls: any of "no_audio", "swapped_audio"; their predictions have `control` set and "#control" in the id.
        plain: False asks for the controls alone.
        done: predictions made before, which are not made again (only with a single alpha).
        on_batch: called with (alpha, new predictions) after each batch, to save them.

    Returns:
        predictions by alpha, those of `done` first.

    Raises:
        ValueError: an argument outside its range, or an example without an answer to score against.
    """
    if mode not in ("choice", "generate"):
        raise ValueError(f"mode: expected 'choice' or 'generate', got {mode!r}")
    for control in controls:
        if control not in CONTROLS:
            raise ValueError(f"controls: expected some of {CONTROLS}, got {control!r}")
    if batch_examples < 1:
        raise ValueError(f"batch_examples: expected at least 1, got {batch_examples}")
    for alpha in alphas:
        if alpha is not None and not 0 <= alpha < math.inf:
            raise ValueError(f"alpha: expected a finite number >= 0, got {alpha}")
    for example in examples:
        if example.answer is None:
            raise ValueError(f"example {example.id}: expected an answer to score against, got none")
    made = {p.id for p in done}
    result: dict[float | None, list[Prediction]] = {alpha: list(done) if len(alphas) == 1 else [] for alpha in alphas}
    model.eval()
    # Rows of like length together: padding is most of the work otherwise.
    work = sorted(examples, key=lambda e: (len(e.choices), len(e.transcription) + len(e.context)))
    todo = []
    for control in ("", *controls) if plain else controls:
        heard = swapped(work) if control == "swapped_audio" else work
        todo += [(control, e, h) for e, h in zip(work, heard, strict=True) if _control_id(e.id, control) not in made]
    for control, group in _batches(todo, batch_examples, done=len(made), progress_bar=progress_bar):
        asked = [e for e, _ in group]
        features = store.rows([h for _, h in group])
        hears = control != "no_audio"
        if mode == "choice":
            all_scores = choice_scores(
                model, asked, features, collate=collate, alphas=[a or 0.0 for a in alphas], hears=hears, extra_inputs=extra_inputs
            )
        for i, alpha in enumerate(alphas):
            if mode == "choice":
                scores = all_scores[i]
                texts = [target_template(e, max(s, key=s.get)) for e, s in zip(asked, scores, strict=True)]
            else:
                scores = [{} for _ in asked]
                texts = generate_answers(
                    model, asked, features, collate=collate, alpha=alpha, hears=hears, max_new_tokens=max_new_tokens
                )
            new = [
                Prediction(
                    id=_control_id(e.id, control), task=e.task, kind=context_kind(e), answer=e.answer, choices=e.choices,
                    prediction=text, pair_id=e.pair_id, control=control, scores=s, question=e.question,
                    category=str(e.metadata.get("category", "")), claim=claimed_choice(e), clip=clip_key(h),
                )
                for (e, h), text, s in zip(group, texts, scores, strict=True)
            ]  # fmt: skip
            result[alpha] += new
            if on_batch is not None:
                on_batch(alpha, new)
    return result


def swapped(examples: Sequence[Example]) -> list[Example]:
    """For each example another one of its task with another answer, whose audio it is given: the next such in order.

    An example without such a partner keeps its own audio; it is then no control and is left as it is.
    """
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    place = {e.id: i for group in by_task.values() for i, e in enumerate(group)}
    result = []
    for example in examples:
        group, at = by_task[example.task], place[example.id]
        others = (group[(at + step) % len(group)] for step in range(1, len(group)))
        result.append(next((o for o in others if o.answer != example.answer and o.audio is not None), example))
    return result


def summarize(
    predictions: Sequence[Prediction], *, scorer: str | Scorer = "lenient", priors: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Every figure of the plain predictions under "plain", and of each control under its name.

    Args:
        scorer: "lenient", "strict" or an object (models/evaluation/scorers.py).
        priors: id -> answer of a text prior, beside what the predictions themselves hold.

    Returns:
        {control: `scoring.metrics` and "calibration" (None without choice scores)}; "plain" has "confusion" too: for each of
        "no_audio", "hint" and "priors" that is known, `diagnostics.prior_confusion`.
    """
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        groups[p.control or "plain"].append(p)
    summary = {}
    for name, group in groups.items():
        j = judged(group, scorer=scorer)
        summary[name] = metrics(j) | {"calibration": calibration(j)}
        if name == "plain":
            known = {"no_audio": control_priors(predictions), "hint": hint_priors(group), "priors": priors or {}}
            tables = {source: prior_confusion(j, answers) for source, answers in known.items()}
            summary[name]["confusion"] = {source: table for source, table in tables.items() if table is not None}
    return summary


def read_priors(path: str | Path, predictions: Iterable[Prediction]) -> dict[str, str]:
    """id -> answer from a JSON object, or from a file of models/evaluation/text_priors.py, for the predictions that it knows.

    Raises:
        EvaluationError: not readable, no such object, or none of the ids is among the predictions.
    """
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
    asked = {p.id for p in predictions if not p.control}
    known = {name: answer for name, answer in priors.items() if name in asked}
    if not known:
        raise EvaluationError(f"--priors {path}: none of its {len(priors)} ids is among the {len(asked)} predictions")
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = evaluate_parser()
    arguments = parser.parse_args(argv)
    try:
        scorer = load_scorer(arguments.scorer)  # before any work that a wrong name would waste
        other = _nonempty_predictions(arguments.compare)[1] if arguments.compare else None
        if arguments.rescore:
            settings, predictions = _nonempty_predictions(arguments.rescore)
        elif not arguments.checkpoint or not (arguments.manifest or arguments.benchmark):
            parser.error("expected CHECKPOINT and MANIFEST, --benchmark NAME and CHECKPOINT, or --rescore FILE")
        else:
            settings, predictions = _evaluate_files(arguments)
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
        print(f"mean_of_tasks is over {counted} tasks, the published ALL over {expected}: the two are not to be compared")


def _evaluate_files(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Prediction]]:
    from models.backbones.device import pick_device
    from models.speech_lm.model import SpeechLM

    if not Path(arguments.checkpoint).is_dir():
        raise EvaluationError(f"checkpoint: no folder {arguments.checkpoint!r}")
    device = pick_device(arguments.device)
    suite = load_suite(
        arguments.benchmark or arguments.manifest,
        manifest=arguments.manifest if arguments.benchmark else None,
        audio_root=arguments.audio_root,
        check_audio=arguments.features is None,
        max_bad_fraction=arguments.max_bad_fraction,
    )
    _print_skipped(suite.problems)
    examples = _questions(suite, arguments)
    names = ("checkpoint", "manifest", "benchmark", "decoding", "alpha", "controls", "split", "tasks", "max_new_tokens")
    settings = {name: getattr(arguments, name) for name in names} | {"mode": arguments.mode or suite.mode}
    settings["left_out"] = suite.left_out
    # Trained again or written again under the same name, they are others: their old answers must not stand for the new.
    settings["questions_sha256"] = fingerprint([e.to_row() for e in examples])
    settings["checkpoint_sha256"] = [sha256_file(p) for p in sorted(Path(arguments.checkpoint).rglob("*")) if p.is_file()]
    done: list[Prediction] = []
    if Path(arguments.out).exists():
        header, done = read_predictions(arguments.out, repair=True)
        if header.get("fingerprint") != fingerprint(settings):
            raise EvaluationError(
                f"{arguments.out}: holds predictions of other settings, of another model or of another manifest; "
                "choose another --out or remove it"
            )
        print(f"going on from {arguments.out}: {len(done)} answers are there")
        if {_control_id(e.id, control) for e in examples for control in ("", *arguments.controls)} <= {p.id for p in done}:
            return settings, done  # nothing is left to ask: neither the model nor the clips are needed
    try:
        model = SpeechLM.from_pretrained(arguments.checkpoint).to(device)
    except RuntimeError as error:  # BackboneError and SpeechLMError both are
        raise EvaluationError(f"checkpoint: {error}") from error
    if not Path(arguments.out).exists():
        write_header(arguments.out, settings)
    usable, store = _heard(model, examples, suite, arguments)
    alpha = arguments.alpha if arguments.decoding == "contrastive" else None
    return settings, evaluate(
        model,
        usable,
        store,
        collate=model.make_collator(),
        mode=settings["mode"],
        alphas=(alpha,),
        controls=arguments.controls,
        batch_examples=arguments.batch_examples,
        max_new_tokens=arguments.max_new_tokens,
        done=done,
        on_batch=lambda _, new: append_predictions(arguments.out, new),
    )[alpha]


def _questions(suite: Suite, arguments: argparse.Namespace) -> list[Example]:
    """The examples that are asked about; those without an answer are named."""
    chosen = [e for e in suite.examples if e.split == arguments.split]
    chosen = [e for e in chosen if not arguments.tasks or e.task in arguments.tasks]
    where = f"split {arguments.split!r}, tasks {', '.join(arguments.tasks) or 'all'}"
    if not chosen:
        there = sorted({(e.split, e.task) for e in suite.examples})
        held = ", ".join(f"{split} {task or '(no task)'}" for split, task in there)
        raise EvaluationError(f"{suite.name}: no example in {where}; it holds {held or 'none at all'}")
    unanswered = [e for e in chosen if e.answer is None]
    if len(unanswered) == len(chosen):
        raise EvaluationError(f"{suite.name}: none of the {len(chosen)} examples in {where} has an answer to score against")
    _print_skipped(f"{e.id}: no answer to score against" for e in unanswered)
    return [e for e in chosen if e.answer is not None]


def _heard(
    model: Any, examples: list[Example], suite: Suite, arguments: argparse.Namespace
) -> tuple[list[Example], FeatureStore]:
    """The examples whose clips could be encoded, and the features; those whose could not are named."""
    limit = arguments.max_bad_fraction
    if arguments.features:
        store, reasons = FeatureStore.load(arguments.features), {}
    else:
        store, problems = extract_features(examples, model.encode_audio, audio_root=suite.audio_root, max_bad_fraction=limit)
        clips = {e.id: clip_key(e) for e in examples}
        reasons = {clips[example_id]: reason for example_id, reason in problems}
    usable = [e for e in examples if e.audio is None or e in store]
    lacking = [e for e in examples if e.audio is not None and e not in store]
    if len(lacking) > limit * len(examples):
        source = arguments.features or suite.name
        raise EvaluationError(f"{source}: lacks the clips of {len(lacking)} of {len(examples)} questions")
    _print_skipped(f"{e.id}: {reasons.get(clip_key(e), f'{arguments.features} lacks its clip')}" for e in lacking)
    return usable, store


def _print_skipped(reasons: Iterable[object]) -> None:
    lines = [f"skipped {reason}" for reason in reasons]
    if len(lines) > _SKIPPED_SHOWN:
        lines[_SKIPPED_SHOWN:] = [f"skipped {len(lines) - _SKIPPED_SHOWN} more"]
    print(*lines, sep="\n", end="\n" if lines else "")


def _control_id(example_id: str, control: str) -> str:
    return f"{example_id}#{control}" if control else example_id


def _batches(
    todo: Sequence[tuple[str, Example, Example]], size: int, *, done: int, progress_bar: bool
) -> Iterator[tuple[str, list[tuple[Example, Example]]]]:
    with tqdm(total=done + len(todo), initial=done, desc="evaluate", unit="answer", disable=not progress_bar) as bar:
        start = 0
        while start < len(todo):
            control = todo[start][0]
            group = [(e, h) for c, e, h in todo[start : start + size] if c == control]
            yield control, group
            start += len(group)
            bar.update(len(group))
