"""What a language model answers from the prompt alone: the prior that the sound has to overcome.

    python -m models priors MANIFEST --lm ID_OR_FOLDER --out priors.json

The language model reads the prompt without its audio line, and each choice is scored as in `python -m models evaluate`. For each
question the file holds the likeliest choice and its probability among the choices. If that choice is wrong although the text
says nothing about the answer, words and sound disagree without any misleading context: `natural_conflicts`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.data.manifest import Example, ManifestError
from models.data.problems import print_skipped
from models.data.prompts import render_prompt
from models.data.readers import read_data, row_files
from models.evaluation.choice_scores import choice_scores
from models.evaluation.commands import priors_parser
from models.evaluation.predictions import EvaluationError, context_kind, likeliest
from models.io_utils import atomic_write_json, fingerprint, same_file, sha256_file
from models.speech_lm.collation import Collator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_KEY = "kdkernels_priors"
FILE_VERSION = 1


@dataclass(frozen=True)
class Prior:
    """The likeliest choice without the sound, its probability among the choices, and each choice's log-likelihood."""

    answer: str
    probability: float
    scores: dict[str, float]


def text_priors(
    examples: Sequence[Example],
    lm: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_examples: int = 32,
    progress_bar: bool = True,
) -> dict[str, Prior]:
    """The prior of each example, by id. Each distinct prompt is asked once.

    Args:
        examples: with choices.
        lm, tokenizer: a causal language model of transformers, in evaluation mode.
        batch_examples: prompts in a forward pass. A prompt whose choices differ in several tokens has a row for each choice.

    Raises:
        ValueError: an example without choices, or `batch_examples` below 1.
        EvaluationError: the likelihoods of an example's choices are no numbers.
    """
    if batch_examples < 1:
        raise ValueError(f"batch_examples: expected at least 1, got {batch_examples}")
    asked: dict[tuple[str, str, tuple[str, ...]], list[Example]] = defaultdict(list)
    for example in examples:
        asked[example.task, render_prompt(example), example.choices].append(example)
    questions = sorted(asked.values(), key=lambda group: (len(group[0].choices), len(render_prompt(group[0]))))
    model, collate = _TextModel(lm), _TextCollator(tokenizer)
    priors: dict[str, Prior] = {}
    with tqdm(total=len(questions), desc="priors", unit="prompt", disable=not progress_bar) as bar:
        for start in range(0, len(questions), batch_examples):
            groups = questions[start : start + batch_examples]
            silence = torch.zeros(len(groups), 1, 1, 1)
            scores = choice_scores(model, [group[0] for group in groups], silence, collate=collate, hears=False)[0]
            for group, of_choice in zip(groups, scores, strict=True):
                prior = _prior(of_choice, group[0].id)
                priors.update((example.id, prior) for example in group)
            bar.update(len(groups))
    return priors


def natural_conflicts(
    examples: Sequence[Example], priors: Mapping[str, Prior], *, min_probability: float = 0.0
) -> set[str]:
    """Ids of the questions with a wrong prior under the neutral context, and of their pairs' other contexts.

    Args:
        examples: those that were asked about, with the neutral ones among them.
        priors: by id.
        min_probability: the least probability of the wrong answer.

    Raises:
        ValueError: a question has no neutral example, or that example has no prior or no answer.
    """
    neutral = {e.pair_id or e.id: e for e in examples if context_kind(e) == "neutral"}
    conflicts = set()
    for example in examples:
        plain = neutral.get(example.pair_id or example.id)
        if plain is None or plain.id not in priors or plain.answer is None:
            raise ValueError(f"example {example.id}: expected a neutral example of its pair with answer and prior, got none")
        prior = priors[plain.id]
        if prior.answer != plain.answer and prior.probability >= min_probability:
            conflicts.add(example.id)
    return conflicts


def summarize_priors(examples: Sequence[Example], priors: Mapping[str, Prior]) -> dict[str, dict[str, Any]]:
    """For each task and context: count, accuracy and mean probability of the priors, and how often each answer is one.

    The accuracy is over the examples whose answer is known; it is missing where none is.
    """
    groups: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.task, context_kind(example)].append(example)
    summary: dict[str, dict[str, Any]] = defaultdict(dict)
    for (task, kind), group in sorted(groups.items()):
        told = [priors[e.id] for e in group]
        right = [p.answer == e.answer for p, e in zip(told, group, strict=True) if e.answer is not None]
        summary[task][kind] = {
            "count": len(group),
            **({"accuracy": round(sum(right) / len(right), 4)} if right else {}),
            "probability": round(sum(p.probability for p in told) / len(told), 4),
            "answers": dict(sorted(Counter(p.answer for p in told).items())),
        }
    return dict(summary)


def write_priors(
    path: str | os.PathLike[str], priors: Mapping[str, Prior], *, header: Mapping[str, Any] | None = None
) -> Path:
    """Write priors atomically, with `header`'s entries beside them."""
    rows = {name: asdict(prior) for name, prior in priors.items()}
    return atomic_write_json(path, {FILE_KEY: FILE_VERSION, **(header or {}), "priors": rows})


def read_priors(path: str | os.PathLike[str]) -> dict[str, Prior]:
    """Priors by example id. Raises ValueError if `write_priors` did not write the file."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        version = record[FILE_KEY]
        if version == FILE_VERSION:
            return {name: Prior(**row) for name, row in record["priors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a file of priors, got {type(error).__name__}: {error}") from None
    raise ValueError(f"{path}: expected {FILE_KEY} {FILE_VERSION}, got {version!r}")


class _TextModel(torch.nn.Module):
    """A language model with the methods of a speech LM; it hears nothing."""

    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm.get_output_embeddings()

    def hidden_states_at(self, index: Tensor, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        hidden = self.lm.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden.flatten(0, 1)[index]


class _TextCollator(Collator):
    """Prompts without the line of the audio."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, 1, placeholder_token_id=-1)

    def prompt_ids(self, example: Example) -> list[int]:
        before, after = self._split_prompt(example)
        return self._start_ids + self._tokenize(before.rstrip("\n") + after)


def _prior(scores: dict[str, float], example_id: str) -> Prior:
    answer = likeliest(scores, example_id)
    total = sum(math.exp(score - scores[answer]) for score in scores.values())
    return Prior(answer, round(1.0 / total, 6), {choice: round(score, 6) for choice, score in scores.items()})


def _rows_sha256(path: Path) -> str:
    """The hash of the file of rows; of a folder, that of the names and hashes of the files that hold its rows."""
    if path.is_file():
        return sha256_file(path)
    return fingerprint([[file.relative_to(path).as_posix(), sha256_file(file)] for file in row_files(path, "auto")])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the priors of a manifest's questions and print a line for each task; one message and status 1 if that fails."""
    arguments = priors_parser().parse_args(argv)
    from models.backbones.device import inference_dtype, pick_device
    from models.backbones.resolve import BackboneError, load_causal_lm, resolve_backbone

    try:
        if arguments.batch_examples < 1:
            raise ValueError(f"--batch-examples: expected at least 1, got {arguments.batch_examples}")
        if same_file(arguments.out, arguments.manifest):
            raise ValueError(f"--out: expected another file than the manifest, got {str(arguments.out)!r}")
        device = pick_device(arguments.device)
        manifest = read_data(arguments.manifest, check_audio=False)
        print_skipped(manifest.problems)
        asked = [e for e in manifest if e.split in arguments.splits and context_kind(e) in arguments.contexts]
        examples = [e for e in asked if e.choices]
        print_skipped(f"{e.id}: no choices to rank" for e in asked if not e.choices)
        if not examples:
            chosen = f"splits {arguments.splits} and contexts {arguments.contexts}"
            raise ManifestError(f"{arguments.manifest}: no question with choices in {chosen}")
        rows_sha256 = _rows_sha256(arguments.manifest)
        lm, tokenizer = load_causal_lm(arguments.lm, dtype=inference_dtype(device))
        priors = text_priors(
            examples, lm.to(device), tokenizer, batch_examples=arguments.batch_examples
        )
        by_task = summarize_priors(examples, priors)
        header = {
            "lm": arguments.lm,
            "lm_sha256": resolve_backbone(arguments.lm, kind="causal_lm").sha256(),
            "manifest_sha256": rows_sha256,
            "splits": arguments.splits,
            "contexts": arguments.contexts,
            "by_task": by_task,
        }
        write_priors(arguments.out, priors, header=header)
    except (BackboneError, EvaluationError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for task, by_kind in by_task.items():
        told = ", ".join(f"{k} {r['accuracy']:.2f}" if "accuracy" in r else f"{k} unknown" for k, r in by_kind.items())
        print(f"{task:14} right from the text alone: {told}")
    print(arguments.out)
    return 0
