"""Kills work at random points (kill -9): is anything lost, doubled or different? `python -m benchmarks.stress`

There are four kinds of work. Each is written such that a second start goes on where the first was killed. They run on tiny
random models, or on a real language model (`--lm`). Settings have their defaults, except where a kill would then find no
intermediate state:

stage1      models/pseudo_gt/stage1.py: a random Llama writes the targets of 24 rows
cache       models/training/fill_cache.py, kdkernels/contrast_cache.py: both paths of a speech LM over 12 samples, with its prefix
            cache, in several shards
training    models/training/loop.py: ten steps of the CAAD loop with a live teacher and prefix caches, and a checkpoint after
            every second step
checkpoint  models/training/checkpoint.py: a loop that does little but save

A round starts the work in an empty folder, kills it one to three times (SIGKILL), and lets it run to its end. It then starts
the finished work once more, which should change nothing. Every other kill comes at a time that is drawn uniformly over the
work. The other kills come at a call that is drawn uniformly among those that change files (os.replace, fsync, unlink, mkdir, a
write, a safetensors file of shard or checkpoint). Such a kill comes before the call, after it, or when a part of the data is
written. Each process is forked from one that has imported everything.

kills          processes that died of SIGKILL; `at_calls` of them at a call
resumed        rounds whose last two processes ended by themselves, without an error
bitwise_equal  rounds whose result is that of an undisturbed run, bit for bit
lost           items that the work had reported as safely written and that were not there after a kill
doubled        items that were there twice, after a kill or at the end
left_behind    files and folders that an undisturbed run does not leave: temporary ones of killed processes, and parts of old
               checkpoints. Nothing reads them, but they take room

The exit status is 1 if anything was lost, doubled or different, or if a round did not end. It runs on CPUs only.
"""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import importlib
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from models.arguments import Collect

from .common import benchmark_parser, finish

Done = Callable[[Iterable[str]], None]
_LIMIT_SECONDS = 300.0  # a process that takes longer hangs
_CALLS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "truncate")
_TIMES_MISSED = 4


class Work(Protocol):
    """Something that can be killed and started again on the same folder."""

    name: str

    def run(self, folder: Path, done: Done) -> None:
        """Does all of the work, or what is left of it. It calls `done(items)` as soon as these items should survive a kill."""
        ...

    def held(self, folder: Path) -> list[str]:
        """The items that are safe in the folder now, each as often as it is there. An exception means that none is."""
        ...

    def result(self, folder: Path) -> dict[str, str]:
        """A digest of each part of a finished run."""
        ...


# -- one process -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """When a process dies: `after_seconds`, or at its `call`-th call that changes a file, `how` = before, within or after it."""

    after_seconds: float | None = None
    call: int | None = None
    how: str = "before"
    part: float = 0.5  # of the data, for a kill within a write


@dataclass
class Outcome:
    """How a process ended."""

    killed: bool
    promised: set[str] = field(default_factory=set)
    calls: int = 0
    seconds: float = 0.0
    error: str = ""


class CallCounter:
    """Counts this process's calls that change files, and kills it at one of them. It stays until the process ends."""

    def __init__(self, kill: Kill | None) -> None:
        self.calls = 0
        self._kill = kill if kill is not None and kill.call is not None else None

    def install(self) -> None:
        import safetensors.torch

        for name in _CALLS:
            setattr(os, name, self._around(getattr(os, name)))
        # open() is in two modules. Descriptors of mkstemp come through fdopen.
        builtins.open = io.open = self._opening(io.open)
        os.fdopen = self._opening(os.fdopen)
        safetensors.torch.serialize_file = self._serializing(safetensors.torch.serialize_file, safetensors.torch.serialize)

    def hit(self) -> Kill | None:
        """The kill if this call is the one."""
        self.calls += 1
        return self._kill if self._kill is not None and self.calls == self._kill.call else None

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            kill = self.hit()
            if kill is not None and kill.how != "after":
                _die()
            value = call(*args, **kwargs)
            if kill is not None:
                _die()
            return value

        return counted

    def _opening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*args: Any, **kwargs: Any) -> Any:
            file = call(*args, **kwargs)
            mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
            return _CountedFile(file, self) if set(mode) & set("wax+") else file

        return opened

    def _serializing(self, write_file: Callable[..., Any], to_bytes: Callable[..., bytes]) -> Callable[..., Any]:
        """safetensors writes from Rust. A kill within it leaves the beginning of the file."""

        def counted(tensors: Any, path: Any, metadata: Any = None) -> Any:
            kill = self.hit()
            if kill is not None and kill.how == "before":
                _die()
            if kill is not None and kill.how == "within":
                data = to_bytes(tensors, metadata)
                Path(path).write_bytes(data[: int(len(data) * kill.part)])
                _die()
            value = write_file(tensors, path, metadata)
            if kill is not None:
                _die()
            return value

        return counted


class _CountedFile:
    """A file that is open for writing. Its writes are counted."""

    def __init__(self, file: Any, counter: CallCounter) -> None:
        self._file, self._counter = file, counter

    def write(self, data: Any) -> int:
        kill = self._counter.hit()
        if kill is not None and kill.how != "before":
            self._file.write(data if kill.how == "after" else data[: int(len(data) * kill.part)])
            self._file.flush()
        if kill is not None:
            _die()
        return self._file.write(data)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_process(work: Work, folder: Path, kill: Kill | None = None) -> Outcome:
    """Runs the work in a forked process, to the given kill or to its end."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _in_child(work, folder, kill, reading, writing)
    os.close(writing)
    outcome, started, rest = Outcome(killed=False), time.monotonic(), b""
    deadline = started + _LIMIT_SECONDS
    hung = True
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        data = os.read(reading, 1 << 16)
        if not data:
            hung = False
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in map(json.loads, lines):
            if "ready" in line:
                started = time.monotonic()
                if kill is not None and kill.after_seconds is not None:
                    deadline = started + kill.after_seconds
            outcome.promised.update(line.get("done", ()))
            outcome.calls = line.get("calls", outcome.calls)
            outcome.error = line.get("error", outcome.error)
    if hung:
        os.kill(process, signal.SIGKILL)
        while data := os.read(reading, 1 << 16):  # what it reported before it was killed
            *lines, rest = (rest + data).split(b"\n")
            for line in map(json.loads, lines):
                outcome.promised.update(line.get("done", ()))
    os.close(reading)
    _, status = os.waitpid(process, 0)
    outcome.seconds = time.monotonic() - started
    outcome.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if hung and not (kill is not None and kill.after_seconds is not None):
        outcome.error = f"took more than {_LIMIT_SECONDS:g} s"
    elif status and not outcome.killed and not outcome.error:
        outcome.error = f"ended with status {status}"
    return outcome


def _in_child(work: Work, folder: Path, kill: Kill | None, reading: int, writing: int) -> None:
    status = 1
    try:
        os.close(reading)

        def say(**message: Any) -> None:
            os.write(writing, json.dumps(message).encode() + b"\n")

        try:
            torch.set_num_threads(1)
            counter = CallCounter(kill)
            counter.install()
            say(ready=True)
            work.run(folder, lambda items: say(done=sorted(items)))
            say(calls=counter.calls)
            status = 0
        except BaseException:
            say(error=traceback.format_exc(limit=-3))
    finally:
        os._exit(status)


# -- rounds ----------------------------------------------------------------------------------------------------------------


def stress(work: Work, rounds: int, *, seed: int = 0, progress_bar: bool = True) -> tuple[dict[str, Any], list[str]]:
    """A row of figures, which the module's docstring describes, and a line about each round that went wrong."""
    rng = random.Random(f"{work.name} {seed}")
    row: dict[str, Any] = {"what": work.name, "rounds": rounds}
    row |= dict.fromkeys(("kills", "at_calls", "resumed", "bitwise_equal", "lost", "doubled", "left_behind"), 0)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kdkernels-stress-") as root:
        whole = run_process(work, _fresh(root))
        if whole.error:
            raise SystemExit(f"{work.name}: the undisturbed run failed: {whole.error}")
        missing, twice = _compare(work, Path(root) / "work", whole.promised)
        if missing or twice or not whole.promised:
            raise SystemExit(
                f"{work.name}: the undisturbed run lost {missing} and doubled {twice} of {len(whole.promised)} items"
            )
        expected, folders = work.result(Path(root) / "work"), _folders(Path(root) / "work")
        for number in tqdm(range(rounds), desc=work.name, unit="round", disable=not progress_bar):
            found = _round(work, root, number, whole, expected, folders, rng)
            for key, value in found.items():
                if key != "problem":
                    row[key] += value
            if found["problem"]:
                problems.append(f"{work.name}, round {number}: {found['problem']}")
    return {**row, "calls_a_run": whole.calls, "seconds_a_run": whole.seconds, "seed": seed}, problems


def _round(
    work: Work, root: str, number: int, whole: Outcome, expected: dict[str, str], folders: set[Path], rng: random.Random
) -> dict[str, Any]:
    folder = _fresh(root)
    row: Counter[str] = Counter()
    promised: set[str] = set()
    problem = ""
    for attempt in range(rng.randint(1, 3)):
        by_call = (number + attempt) % 2 == 0
        kill = _draw(whole, rng, by_call)
        outcome = run_process(work, folder, kill)
        for _ in range(_TIMES_MISSED):  # the kill came too late: the process had ended
            if attempt or outcome.killed or outcome.error:
                break
            folder, promised = _fresh(root), set()
            outcome = run_process(work, folder, kill := _draw(whole, rng, by_call))
        promised |= outcome.promised
        row["kills"] += outcome.killed
        row["at_calls"] += outcome.killed and kill.call is not None
        missing, twice = _compare(work, folder, promised)
        row["lost"] += len(missing)
        row["doubled"] += len(twice)
        problem = problem or outcome.error or (f"{kill}: lost {missing}, doubled {twice}" if missing or twice else "")
        if not outcome.killed:
            break
    ends = [run_process(work, folder) for _ in range(2)]  # the second one finds finished work
    error = next((end.error or "killed" for end in ends if end.error or end.killed), "")
    row["resumed"] += not error
    problem = problem or error
    if not error:
        missing, twice = _compare(work, folder, promised | whole.promised)
        row["lost"] += len(missing)
        row["doubled"] += len(twice)
        got = work.result(folder)
        different = sorted(part for part in got.keys() | expected.keys() if got.get(part) != expected.get(part))
        row["bitwise_equal"] += not different
        problem = problem or (f"different: {', '.join(different)}" if different else "")
    unknown = {path for path in _folders(folder) - folders if path.parent in folders}
    row["left_behind"] += len(unknown) + sum(
        path.suffix in (".tmp", ".old") for name in folders for path in (folder / name).glob(".*") if path.is_file()
    )
    return {**dict.fromkeys(("kills", "at_calls", "resumed", "bitwise_equal", "lost", "doubled"), 0), **row, "problem": problem}


def _draw(whole: Outcome, rng: random.Random, by_call: bool) -> Kill:
    if not by_call:
        return Kill(after_seconds=rng.uniform(0.0, whole.seconds))
    return Kill(call=rng.randint(1, whole.calls), how=rng.choice(("before", "within", "after")), part=rng.random())


def _compare(work: Work, folder: Path, promised: set[str]) -> tuple[list[str], list[str]]:
    """Two lists: promised items that are not there, and items that are there twice."""
    try:
        held = Counter(work.held(folder))
    except Exception as error:
        print(f"{work.name}: {error}", file=sys.stderr)
        held = Counter()
    return sorted(promised - held.keys()), sorted(item for item, count in held.items() if count > 1)


def _fresh(root: str) -> Path:
    folder = Path(root) / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _folders(folder: Path) -> set[Path]:
    """All folders under it, and the folder itself as "."."""
    return {path.relative_to(folder) for path in (folder, *folder.rglob("*")) if path.is_dir()}


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, without a line that a kill has cut off."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


# -- the four kinds of work ------------------------------------------------------------------------------------------------


class Stage1:
    """An item is a row with its answer. Two of three answers are accepted, so the result has targets and rejects."""

    name = "stage1"

    def __init__(self, lm: str | None = None) -> None:
        from models.backbones.resolve import load_causal_lm
        from models.data.manifest import Example
        from models.experiments.shared_steps import make_tiny_backbones
        from models.io_utils import cache_dir
        from models.pseudo_gt.writers import BackboneWriter

        folder = make_tiny_backbones(cache_dir() / "demo" / "tiny-backbones") / "lm"
        model, tokenizer = load_causal_lm(lm or str(folder), dtype=torch.float32)
        torch.manual_seed(0)
        for matrix in model.parameters() if lm is None else ():
            if matrix.dim() > 1:
                torch.nn.init.normal_(matrix, std=0.2)  # wide enough for answers to differ
        self._writer = BackboneWriter(model, tokenizer, max_new_tokens=4)
        self._examples = [
            Example(id=f"row{i}", audio=None, transcription=f"Line {i * i}.", task="free", question="What is said?")
            for i in range(24)
        ]

    def run(self, folder: Path, done: Done) -> None:
        from models.data.manifest import Manifest
        from models.pseudo_gt.stage1 import run_stage1
        from models.pseudo_gt.writers import Answer

        asked: list[str] = []

        def write(batch: Sequence[Any]) -> list[str]:
            done(asked)  # when the next batch is asked for, the ones before it are in the journal
            asked.extend(example.id for example in batch)
            ended = [int(example.id.removeprefix("row")) % 3 > 0 for example in batch]  # few do within four tokens
            return [Answer(f"{text}.", ended=end) for text, end in zip(self._writer(batch), ended, strict=True)]

        manifest = Manifest(self._examples, [], folder, {})
        options = {"batch_examples": 4, "max_reject_fraction": 1.0, "progress": False}
        run_stage1(manifest, folder / "out.jsonl", writer=write, **options)
        done(example.id for example in self._examples)

    def held(self, folder: Path) -> list[str]:
        out = folder / "out.jsonl"
        rejects = [row["id"] for row in _whole_lines(folder / "out.jsonl.rejects.jsonl")]
        rows = _whole_lines(out)[1:] if out.exists() else _whole_lines(folder / "out.jsonl.journal")[1:]
        return [row["id"] for row in rows] + (rejects if out.exists() else [])

    def result(self, folder: Path) -> dict[str, str]:
        return {name: digest for name, digest in _digests(folder).items() if not name.startswith(".")}


class TinyCase:
    """A student, its teacher and 12 examples with features. No two prompts have the same length, so a batch is padded.

    Args:
        lm: language model of both, by id or folder; None = a few thousand random weights. The connectors are always random.
    """

    def __init__(self, lm: str | None = None) -> None:
        from models.data.manifest import Example
        from models.data.prompts import TASKS
        from models.experiments.shared_steps import make_tiny_backbones
        from models.io_utils import cache_dir
        from models.speech_lm.features import FeatureStore, clip_key
        from models.speech_lm.model import SpeechLM, SpeechLMConfig

        folder = make_tiny_backbones(cache_dir() / "demo" / "tiny-backbones")
        settings = SpeechLMConfig(
            lm=lm or str(folder / "lm"), encoder=str(folder / "encoder"), encoder_layers=(1, 2), encoder_dim=32,
            connector_width=16, connector_layers=1, connector_heads=2, audio_frames=5, num_queries=2,
        )  # fmt: skip
        task = TASKS["gender"]
        self.examples = [
            Example(
                id=f"e{i}", audio=f"{i}.wav", task="gender", transcription="So late? " * (7 * i % 12) + f"Line {i}.",
                question=task.question, choices=task.choices, answer=task.choices[i % 2],
                target=task.statement.format(task.choices[i % 2]),
            )
            for i in range(12)
        ]  # fmt: skip
        torch.manual_seed(0)
        self.student, self.teacher = (SpeechLM.from_config(settings) for _ in range(2))
        shape = self.student.connector.config
        features = torch.randn(len(self.examples), shape.num_feature_layers, shape.num_frames, shape.feature_dim)
        self.store = FeatureStore([clip_key(e) for e in self.examples], features)
        for model in (self.student, self.teacher.requires_grad_(False).eval()):
            model.fit_feature_statistics(features)


class Cache:
    """An item is a sample of the cache."""

    name = "cache"

    def __init__(self, lm: str | None = None) -> None:
        self._case = TinyCase(lm)

    def run(self, folder: Path, done: Done) -> None:
        from kdkernels.contrast_cache import ContrastCacheWriter
        from models.training.fill_cache import fill_cache

        flush, case = ContrastCacheWriter.flush, self._case

        def flush_and_say(writer: ContrastCacheWriter) -> None:
            flush(writer)
            done(e.id for e in case.examples if e.id in writer)

        ContrastCacheWriter.flush = flush_and_say
        prefixes = {"prefix_cache": case.teacher.make_prefix_cache()}
        options = {"extra_inputs": prefixes, "batch_examples": 8, "shard_mib": 0.01, "progress_bar": False}
        fill_cache(folder / "cache", case.teacher, case.store, case.examples, made_from={"teacher": "tiny"}, **options)

    def held(self, folder: Path) -> list[str]:
        from kdkernels.contrast_cache import ContrastCache

        if not (folder / "cache" / "cache.json").exists():
            return []
        records = [record for path in sorted((folder / "cache").glob("index-*")) for record in _whole_lines(path)]
        named = [sample[0] for record in records for sample in record["samples"]]
        return named if len(set(named)) < len(named) else list(ContrastCache(folder / "cache"))

    def result(self, folder: Path) -> dict[str, str]:
        from kdkernels.contrast_cache import ContrastCache

        cache = ContrastCache(folder / "cache")
        digests = {}
        for name in cache:  # after a kill shards are cut in other places, so only what they hold is compared
            states = cache[name]
            tensors = (states.audio_hidden.view(torch.int16), states.text_hidden.view(torch.int16), states.target)
            digests[name] = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
        return digests


class Training:
    """An item is a step that a checkpoint has, or a line of the curve."""

    name = "training"

    def __init__(self, lm: str | None = None) -> None:
        from models.training.build_sources import OWN_TEACHER
        from models.training.recipe_files import load_recipe
        from models.training.recipe_sections import SourceConfig
        from models.training.teachers import LiveTeacher, Source
        from models.training.training_data import make_training_data

        case = TinyCase(lm)
        self._student = case.student
        self._data, heard = (make_training_data(model, case.examples, case.store) for model in (case.student, case.teacher))
        teacher = LiveTeacher(case.teacher, heard, device=torch.device("cpu"))
        self._sources = [Source(OWN_TEACHER, SourceConfig(role="audio", folder="tiny"), teacher)]
        self._recipe = load_recipe(
            "caad",
            [
                "teacher.folder=tiny", "optim.steps=10", "optim.batch_examples=4", "optim.warmup_steps=2",
                "optim.audio_dropout=0.2", "run.resume=auto", "run.save_every_steps=2", "run.log_every_steps=2",
                "run.tensorboard=false", "run.progress_bar=false", "run.device=cpu",
            ],
        )  # fmt: skip

    def run(self, folder: Path, done: Done) -> None:
        from models.training.loop import TrainingLoop
        from models.training.train import seed_everything

        class Loop(TrainingLoop):
            def save(self, step: int) -> None:
                super().save(step)
                done([f"step {step}"])

        recipe = dataclasses.replace(self._recipe, run=dataclasses.replace(self._recipe.run, out_dir=str(folder)))
        seed_everything(recipe.run.seed)
        Loop(recipe, model=self._student, data=self._data, sources=self._sources).run()

    def held(self, folder: Path) -> list[str]:
        from models.training.curves import read_metrics

        return _steps(folder / "checkpoints") + [f"line {line['step']}" for line in read_metrics(folder / "metrics.jsonl")]

    def result(self, folder: Path) -> dict[str, str]:
        from models.training.curves import read_metrics

        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]
        digests = {f"final/{name}": digest for name, digest in _digests(folder / "final").items()}
        return {**digests, **_newest(folder / "checkpoints"), "metrics.jsonl": json.dumps(lines)}


class Checkpoint:
    """An item is a step that a checkpoint has."""

    name = "checkpoint"
    steps = 6

    def __init__(self, lm: str | None = None) -> None:
        # AdamW imports torch._dynamo at its first step, which takes seconds.
        for name in ("torch._dynamo", "models.training.train"):
            importlib.import_module(name)

    def run(self, folder: Path, done: Done) -> None:
        from models.training.checkpoint import (
            find_checkpoint,
            restore_model,
            restore_optimizer,
            restore_rng,
            save_checkpoint,
            trainable_state,
        )
        from models.training.train import seed_everything

        seed_everything(0)
        model = torch.nn.Linear(8, 8)
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW(names, lr=0.1)
        checkpoint = find_checkpoint(folder / "checkpoints", "auto")
        if checkpoint is not None:
            restore_model(model, checkpoint)
            restore_optimizer(optimizer, checkpoint, names)
            restore_rng(checkpoint)
        for step in range(1 if checkpoint is None else checkpoint.step + 1, self.steps + 1):
            for parameter in names:
                parameter.grad = torch.randn_like(parameter) * random.random()
            optimizer.step()
            save_checkpoint(
                folder / "checkpoints", step, model_state=trainable_state(model), optimizer=optimizer, parameter_names=names,
                trainer_state={"cursor": step},
            )  # fmt: skip
            done([f"step {step}"])

    def held(self, folder: Path) -> list[str]:
        return _steps(folder / "checkpoints")

    def result(self, folder: Path) -> dict[str, str]:
        return _newest(folder / "checkpoints")


def _newest(checkpoints: Path) -> dict[str, str]:
    """Digests of the files of the two newest checkpoints. The work keeps two."""
    from models.training.checkpoint import list_checkpoints

    return {f"{path.name}/{name}": d for path in list_checkpoints(checkpoints)[-2:] for name, d in _digests(path).items()}


def _steps(checkpoints: Path) -> list[str]:
    """The steps that the newest checkpoint holds. It must be intact."""
    from models.training.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(checkpoints, "auto")
    return [] if checkpoint is None else [f"step {step}" for step in range(1, checkpoint.step + 1)]


WORKS: dict[str, Callable[[str | None], Work]] = {work.name: work for work in (Stage1, Cache, Training, Checkpoint)}


def main(argv: list[str] | None = None) -> int:
    """The command line. The module's docstring describes it."""
    parser = benchmark_parser("stress", __doc__)
    parser.add_argument("--rounds", type=int, default=100, help="rounds of each kind of work")
    parser.add_argument(
        "--only", nargs="+", action=Collect, choices=list(WORKS), default=list(WORKS), help="only these kinds of work"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills")
    parser.add_argument("--lm", help="id or folder of a language model, instead of the tiny random one")
    args = parser.parse_args(argv)
    if args.device != "cpu":
        parser.error(f"--device: expected cpu (a forked process cannot use CUDA), got {args.device}")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    torch.set_num_threads(1)
    rows, problems = [], []
    for name in args.only:
        row, found = stress(WORKS[name](args.lm), args.rounds, seed=args.seed)
        rows.append(row | ({"what": f"{name}, {args.lm}"} if args.lm else {}))
        problems += found
    written = [row["what"] for row in rows]
    finish(args, "stress", "killed at random points", rows, keep=lambda row: row["what"] not in written)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(any(row["lost"] or row["doubled"] or min(row["resumed"], row["bitwise_equal"]) < args.rounds for row in rows))


if __name__ == "__main__":
    sys.exit(main())
