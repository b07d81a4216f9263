"""Stage 1: the text backbone writes the pseudo ground truth Y from what is known about each clip.

    python -m models pseudo-gt data/demo/manifest.jsonl --out data/demo/stage1.jsonl

A clip's metadata is put into words, "[00:00-00:03] Good luck. (Gender: man, SNR: -3 dB)", without the hint of the
prompt; a frozen language model continues a few worked examples with the answer, greedily and in batches. What it
writes is checked before it becomes a target: an answer that is empty, too long, names no choice, several, or the wrong
one is rejected, and its row left out of the manifest and written with its reason to OUT.rejects.jsonl. `--source
template` fills in the task's sentence instead; the manifest names the source of each target.

Every answer goes to a journal beside OUT and is flushed to the disk before the next batch, so a killed run goes on
where it was: no line is lost, and none is written twice.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from tqdm import tqdm

from models.data.answers import named_choices
from models.data.manifest import SPLITS, TARGET_SOURCES, Example, Manifest, ManifestError, read_manifest, write_manifest
from models.data.prompts import TASKS, target_template
from models.io_utils import append_bytes, atomic_write_text, fingerprint, fsync_dir
from models.pseudo_gt.commands import DEFAULT_BACKBONE, SOURCES, pseudo_gt_parser

if TYPE_CHECKING:
    import torch

# Changes whenever the same example would be put to the backbone in other words.
WORDING_VERSION = 1
_MAX_ANSWER_CHARACTERS = 160
# Names under which metadata is told; what is not listed (file hashes, pools, speakers' names) is not told.
_WORDING = {
    "gender": "Gender: {}",
    "language": "Language: {}",
    "accent": "Accent: {}",
    "emotion": "Emotion: {}",
    "speaking_rate": "Speaking rate: {}",
    "noise": "Recording: {}",
    "bandwidth": "Bandwidth: {}",
    "reverberation": "Room: {}",
    "delivery": "Delivery: {}",
    "sentence_type": "Sentence: {}",
    "keyword": "Word in question: {}",
    "content": "Spoken word: {}",
    "age": "Age: {}",
}


class Stage1Error(RuntimeError):
    """Stage 1 cannot go on; the message says why and what to do."""


class Writer(Protocol):
    """Writes an answer to each prompt."""

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        """One answer an example, in order."""
        ...


@dataclass
class Stage1Report:
    """What a run did: rows accepted, passed through, rejected (by reason), and how many were there already."""

    accepted: int = 0
    passed_through: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    seconds: float = 0.0

    def acceptance(self) -> float:
        """Accepted part of what was written; 1.0 where nothing had to be."""
        written = self.accepted + sum(self.rejected.values())
        return self.accepted / written if written else 1.0

    def summary(self) -> str:
        lines = [
            f"{self.accepted} targets accepted ({self.acceptance():.1%}), {sum(self.rejected.values())} rejected, "
            f"{self.passed_through} rows passed through, {self.resumed} taken from an earlier run, {self.seconds:.0f} s"
        ]
        return "\n".join(lines + [f"  {count:6} {reason}" for reason, count in self.rejected.most_common()])


def describe(example: Example) -> str:
    """What is known about a clip, in words: `[00:00-00:03] text (Gender: man, SNR: -3 dB)`.

    The times are the span's, in minutes and seconds; the words are the whole transcript; the context, which may lie, is
    left out. Metadata without a place in the wording is left out too.
    """
    start = example.start_seconds
    duration = example.metadata.get("duration_seconds")
    end = example.end_seconds
    if end is None and isinstance(duration, (int, float)):
        end = start + duration
    times = f"[{_clock(start)}-{_clock(end)}] " if end is not None else ""
    facts = [form.format(example.metadata[key]) for key, form in _WORDING.items() if key in example.metadata]
    snr = example.metadata.get("snr_db")
    if isinstance(snr, (int, float)):
        facts.append(f"SNR: {snr:.0f} dB")
    words = " ".join(str(example.metadata.get("text", example.transcription)).split())
    return f"{times}{words}" + (f" ({', '.join(facts)})" if facts else "")


def check_answer(text: str, example: Example, *, max_characters: int = _MAX_ANSWER_CHARACTERS) -> str | None:
    """Why `text` cannot be the target of `example`; None if it can.

    Choices are looked for as whole words, whatever their case and the punctuation around them; where one choice's words
    are part of another's ("fast" in "very fast"), the longer one counts.
    """
    if not text.strip():
        return "empty"
    if len(text) > max_characters:
        return "too long"
    if not example.choices:
        return None
    named = named_choices(text, example.choices, normalizer=_normal)
    if not named:
        return "no choice named"
    if len(named) > 1:
        return "several choices named"
    if example.answer is not None and named != [example.answer]:
        return "wrong choice named"
    return None


def set_targets(
    examples: Iterable[Example], targets: Mapping[str, str], *, target_source: str = "teacher"
) -> list[Example]:
    """Examples with the target given for their id; those without one keep theirs.

    Raises:
        ValueError: `target_source` is unknown, a target is empty, or an id belongs to no example.
    """
    if target_source not in TARGET_SOURCES:
        raise ValueError(f"target_source: expected one of {list(TARGET_SOURCES)}, got {target_source!r}")
    examples = list(examples)
    unknown = set(targets) - {example.id for example in examples}
    if unknown:
        raise ValueError(f"targets: expected ids of the examples, got {len(unknown)} others, such as {min(unknown)!r}")
    for name, text in targets.items():
        if not text.strip():
            raise ValueError(f"targets: expected text, got an empty one for {name!r}")
    return [
        dataclasses.replace(example, target=" ".join(targets[example.id].split()), target_source=target_source)
        if example.id in targets
        else example
        for example in examples
    ]


def run_stage1(
    manifest: Manifest,
    out: str | os.PathLike[str],
    *,
    source: str = "text_backbone",
    writer: Writer | None = None,
    backbone: str = DEFAULT_BACKBONE,
    splits: Sequence[str] = ("train", "dev"),
    pool: str | None = None,
    task: str | None = None,
    batch_examples: int = 64,
    max_reject_fraction: float = 0.5,
    progress: bool = True,
) -> Stage1Report:
    """Give the manifest's examples their targets and write the result to `out`.

    Args:
        manifest: what `read_manifest` returned.
        out: the manifest to write, in the audio root or above it, so that the audio stays within reach. Beside it lie
            OUT.journal while the run lasts, and the rejected rows in OUT.rejects.jsonl. If it is there already, made
            from the same examples in the same way, nothing is done.
        source: "text_backbone" or "template".
        writer: writes the answers; None is `source`'s own, made of `backbone` only when something is left to write.
        backbone: id or folder of a causal language model.
        splits, pool, task: which examples get targets; None is all. The others pass through as they are.
        batch_examples: how many are put to the backbone at once.
        max_reject_fraction: above this nothing is written but the rejects: the wording does not suit the backbone.
        progress: show a bar on stderr.

    Returns:
        Stage1Report.

    Raises:
        ValueError: an argument outside its range.
        Stage1Error: no such row, too much was rejected, another run is writing, or the journal is of other settings.
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {list(SOURCES)}, got {source!r}")
    if batch_examples < 1:
        raise ValueError(f"batch_examples: expected at least 1, got {batch_examples}")
    if not 0.0 <= max_reject_fraction <= 1.0:
        raise ValueError(f"max_reject_fraction: expected a number from 0 to 1, got {max_reject_fraction}")
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"splits: expected some of {list(SPLITS)}, got {split!r}")
    out = Path(out)
    started = time.monotonic()
    selected = [
        example
        for example in manifest
        if example.split in splits
        and (pool is None or example.metadata.get("pool") == pool)
        and (task is None or example.task == task)
    ]
    if not selected:
        raise Stage1Error(f"no row to write a target for (splits {list(splits)}, pool {pool}, task {task})")
    identity = fingerprint(
        {
            "wording": WORDING_VERSION,
            "source": source,
            "backbone": backbone if source == "text_backbone" else None,
            "examples": [example.to_row() for example in selected],
        }
    )
    rows = fingerprint([example.to_row() for example in manifest])  # those that pass through stand in `out` too
    report = Stage1Report(passed_through=len(manifest) - len(selected))
    prefix = _audio_prefix(manifest.audio_root, out)
    with _Journal(out.with_name(out.name + ".journal"), identity) as journal:
        if _is_finished(out, identity, rows, report):
            journal.discard()
            return report
        answers = journal.read({example.id for example in selected})
        report.resumed = len(answers)
        # Batches of equal lengths need little padding. They are those of an undisturbed run, and one that a kill has cut is asked
        # again, whole: in another batch a row may round to another answer.
        order = sorted(selected, key=lambda example: len(describe(example)))
        batches = [order[start : start + batch_examples] for start in range(0, len(order), batch_examples)]
        left = [batch for batch in batches if any(example.id not in answers for example in batch)]
        if left and writer is None:
            writer = _template_writer if source == "template" else BackboneWriter.load(backbone)
        with tqdm(total=len(selected), initial=len(answers), desc="stage 1", unit="row", disable=not progress) as bar:
            for batch in left:
                texts = writer(batch) if writer is not None else []
                if len(texts) != len(batch):
                    raise Stage1Error(f"writer: expected {len(batch)} answers, got {len(texts)}")
                written = {e.id: text for e, text in zip(batch, texts, strict=True) if e.id not in answers}
                journal.append(written)
                answers.update(written)
                bar.update(len(written))
        targets: dict[str, str] = {}
        rejects: list[dict[str, str]] = []
        for example in selected:
            reason = check_answer(answers[example.id], example)
            if reason is None:
                targets[example.id] = answers[example.id]
            else:
                report.rejected[reason] += 1
                rejects.append({"id": example.id, "reason": reason, "text": answers[example.id]})
        report.accepted = len(targets)
        report.seconds = time.monotonic() - started
        _write_rejects(out, rejects)
        if 1.0 - report.acceptance() > max_reject_fraction:
            raise Stage1Error(f"more than {max_reject_fraction:.0%} of the answers were rejected; {report.summary()}")
        rejected = {row["id"] for row in rejects}
        kept = [example for example in manifest if example.id not in rejected]
        finished = [_rebase(example, prefix) for example in set_targets(kept, targets, target_source=source)]
        header = {
            **{key: value for key, value in manifest.header.items() if key != "kdkernels_manifest"},
            "stage1": {
                "source": source,
                "backbone": backbone if source == "text_backbone" else None,
                "fingerprint": identity,
                "rows": rows,
                "accepted": report.accepted,
                "rejected": dict(report.rejected),
                "passed_through": report.passed_through,
            },
        }
        write_manifest(out, finished, header=header)
        journal.discard()
    return report


class BackboneWriter:
    """Answers by a causal language model that continues a few worked examples.

    The worked examples of a task are the same for all its clips: their keys and values are computed once and shared by
    the batch, which leaves some forty tokens a clip to be read.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int = 24):
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._prefixes = WorkedPrefixes(model, tokenizer)
        newline = tokenizer.encode("\n", add_special_tokens=False)
        # An answer ends with its line; where that has no token of its own, the text is cut below.
        self._stop = [
            token for token in [tokenizer.eos_token_id, *(newline if len(newline) == 1 else [])] if token is not None
        ]

    @classmethod
    def load(cls, backbone: str, **options: Any) -> BackboneWriter:
        """From an id or folder, in the precision that is fast here. Raises BackboneError where it cannot be had."""
        from models.backbones.device import inference_dtype
        from models.backbones.resolve import load_causal_lm

        return cls(*load_causal_lm(backbone, dtype=inference_dtype()), **options)

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        answers: dict[int, str] = {}
        by_prefix: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            by_prefix.setdefault(worked_examples(example), []).append(index)
        for prefix, indices in by_prefix.items():
            texts = self._continue(prefix, [prompt_end(examples[index]) for index in indices])
            answers.update(zip(indices, texts, strict=True))
        return [answers[index] for index in range(len(examples))]

    def _continue(self, prefix: str, questions: list[str]) -> list[str]:
        import torch

        from models.backbones.causal_lm import cache_keyword

        rows = [self._tokenizer.encode(question, add_special_tokens=False) for question in questions]
        prefix_ids, cache = self._prefixes.expanded(prefix, len(rows))
        device = prefix_ids.device
        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        # Padding stands between the shared prefix and each question; the mask takes it out of attention and positions.
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        input_ids = torch.cat([prefix_ids.expand(len(rows), -1), tokens], 1)  # (B, P + width)
        attention_mask = torch.cat([torch.ones_like(prefix_ids).expand(len(rows), -1), mask], 1)
        with torch.no_grad():
            output = self._model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **{cache_keyword(self._model): cache},
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._stop,
                pad_token_id=pad,
            )
        texts = self._tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip().split("\n")[0].strip() for text in texts]


class WorkedPrefixes:
    """Keys and values of the worked examples: computed once a text by a frozen causal LM, shared by a batch."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model = model
        self._tokenizer = tokenizer
        self._states: dict[str, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def expanded(self, prefix: str, rows: int) -> tuple[torch.Tensor, Any]:
        """Its token ids (1, P), and a new KV cache of `rows` rows that has read it."""
        import torch
        from transformers import DynamicCache

        from models.backbones.causal_lm import cache_keyword

        if prefix not in self._states:
            ids = torch.tensor([self._tokenizer.encode(prefix)], device=self._model.device)
            read = DynamicCache()
            with torch.no_grad():
                self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(self._model): read})
            self._states[prefix] = ids, [(layer.keys, layer.values) for layer in read.layers]
        ids, states = self._states[prefix]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return ids, cache


def worked_examples(example: Example) -> str:
    """The beginning of the prompt: answered clips, the same for all examples of a task that share the task's question.

    The labels come in a palindrome (man, woman, woman, man): small models follow the order of labels and the last
    answer more than the metadata. With SmolLM2-135M this order, and an arrow between metadata and answer, took the
    accepted part of the gender task from 0.33 (question before each clip, "Answer:" after it) to 1.00; more examples
    made it worse.
    """
    if _asks_the_same(example):
        task = TASKS[example.task]
        labels = (task.choices or _WORKED_LABELS[task.name])[:3]
        blocks = [f"Question: {task.question}"]
        shown = [(task, label, describe) for label in (*labels, *reversed(labels))]
    else:
        blocks = []
        shown = [(TASKS[name], label, _asked) for name, label in _MIXED_EXAMPLES]
    for number, (kind, label, in_words) in enumerate(shown):
        clip = Example(
            id="worked",
            audio=None,
            task=kind.name,
            question=_MIXED_QUESTIONS.get(label, kind.question),
            end_seconds=2.0 + number % 3,
            metadata={kind.name: label, "text": _worked_text(kind.name, label, number), "snr_db": 3 * number - 5},
        )
        blocks.append(f"{in_words(clip)} -> {target_template(clip, label)}")
    return "\n\n".join(blocks) + "\n\n"


def _worked_text(task: str, label: str, number: int) -> str:
    """What the clip of a worked example says: anything where the metadata decide, or else what the label is about."""
    texts = _WORKED_TEXTS.get(task, {}).get(label, _FILLERS)
    return texts[number // 2 % len(texts)] if task in _WORKED_TEXTS else texts[number % len(texts)]


_WORKED_TEXTS = {
    "place": {
        "indoors": ("We sat down in the waiting room.", "He slept on the couch."),
        "outdoors": ("They walked through the jungle.", "She swam in the sea."),
    },
    "mood": {
        "good": ("We won the game.", "It is my birthday today."),
        "bad": ("My dog is ill.", "Our house burned down."),
    },
}
_WORKED_LABELS = {"language": ("Danish", "Hindi"), "content": ("table", "chair")}
_MIXED_EXAMPLES = (("content", "table"), ("gender", "woman"), ("content", "horse"), ("language", "Danish"))
_MIXED_QUESTIONS = {"table": "Which word is spoken, chair or table?", "horse": "Which word is spoken, horse or door?"}
_FILLERS = ("I will be there soon.", "What happened to the old house?", "Bring me the table, please.", "We never knew.")


def _asks_the_same(example: Example) -> bool:
    task = TASKS.get(example.task)
    return task is not None and example.question == task.question


def _asked(example: Example) -> str:
    return f"Question: {' '.join(example.question.split())}\n{describe(example)}"


def prompt_end(example: Example, reasoning: str | None = None) -> str:
    """The end of the prompt, behind `worked_examples(example)`: the clip in words, and what is asked where that differs.

    Args:
        reasoning: a reasoning trace about the clip, put between its words and the answer.
    """
    words = describe(example) if _asks_the_same(example) else _asked(example)
    return f"{words}\nReasoning: {' '.join(reasoning.split())} ->" if reasoning else f"{words} ->"


def _template_writer(examples: Sequence[Example]) -> list[str]:
    return [target_template(example, example.answer) if example.answer else "" for example in examples]


class _Journal:
    """Answers on disk as they come: one JSON line each after a line that names the settings; one writer at a time."""

    def __init__(self, path: Path, identity: str):
        self._path = path
        self._identity = identity
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Journal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+b")  # closed in __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Stage1Error(f"{self._path}: another run is writing here") from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()  # lets go of the lock

    def read(self, known: set[str]) -> dict[str, str]:
        """The answers so far. A last line torn by a kill is cut off the file."""
        assert self._file is not None
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        header = {"stage1_journal": 1, "fingerprint": self._identity}
        answers: dict[str, str] = {}
        try:
            begun = json.loads(lines[0]) if lines else None
            if len(lines) < 2 and (begun is None or begun["stage1_journal"] == 1):
                self._file.truncate(0)  # begun with whatever settings, it holds no answer
                self._write([header])
                fsync_dir(self._path.parent)
                return {}
            if begun != header:
                raise Stage1Error(
                    f"{self._path}: an unfinished run of other settings or rows; finish it or delete the file"
                )
            for line in lines[1:]:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError
                if row["id"] in known:
                    answers[row["id"]] = row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Stage1Error(f"{self._path}: damaged, not only at its end; delete the file to begin anew") from None
        return answers

    def append(self, answers: Mapping[str, str]) -> None:
        self._write([{"id": name, "text": text} for name, text in answers.items()])

    def discard(self) -> None:
        """The run is complete and its result written."""
        self._path.unlink()
        fsync_dir(self._path.parent)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_bytes(self._path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def _is_finished(out: Path, identity: str, rows: str, report: Stage1Report) -> bool:
    """Whether `out` is the complete result of these settings and rows; fills the report from its header."""
    if not out.exists():
        return False
    try:
        stage1 = read_manifest(out, check_audio=False).header["stage1"]
        if (stage1["fingerprint"], stage1["rows"]) != (identity, rows):
            return False
        report.accepted = report.resumed = stage1["accepted"]
        report.rejected = Counter(stage1["rejected"])
        report.resumed += sum(report.rejected.values())
    except (ManifestError, KeyError, TypeError):
        return False
    return True


def _audio_prefix(audio_root: Path, out: Path) -> str:
    """What to put before audio paths so that they are relative to the folder of `out`."""
    root, folder = audio_root.resolve(), out.parent.resolve()
    if not root.is_relative_to(folder):
        raise ValueError(
            f"out: expected a file in {audio_root} or above it, where the audio is within reach, got {out}"
        )
    prefix = root.relative_to(folder).as_posix()
    return "" if prefix == "." else f"{prefix}/"


def _rebase(example: Example, prefix: str) -> Example:
    if example.audio is None or not prefix:
        return example
    return dataclasses.replace(example, audio=prefix + example.audio)


def _write_rejects(out: Path, rejects: list[dict[str, str]]) -> None:
    path = out.with_name(out.name + ".rejects.jsonl")
    if rejects:
        atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejects))
    else:
        path.unlink(missing_ok=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _normal(text: str) -> str:
    """Lower case, letters and digits only, single spaces."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; one message and status 1 where Stage 1 cannot be done, 130 after Ctrl-C (run again to go on)."""
    arguments = pseudo_gt_parser().parse_args(argv)
    try:
        manifest = read_manifest(arguments.manifest, audio_root=arguments.audio_root)
        for problem in manifest.problems:
            print(f"skipped {problem}", file=sys.stderr)
        report = run_stage1(
            manifest,
            arguments.out,
            source=arguments.source,
            backbone=arguments.backbone,
            splits=tuple(filter(None, arguments.splits.split(","))),
            pool=arguments.pool,
            task=arguments.task,
            batch_examples=arguments.batch_examples,
            max_reject_fraction=arguments.max_reject_fraction,
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:  # BackboneError and Stage1Error are RuntimeErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.summary())
    print(arguments.out)
    return 0
