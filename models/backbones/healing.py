"""A smaller student: layers of the teacher's language model are dropped, then text distillation from the full model heals it.

    path = healed_student("HuggingFaceTB/SmolLM2-135M-Instruct", healing_texts(examples))      # cached on disk
    model = SpeechLM.from_config(SpeechLMConfig(lm=str(path)))

    python -m models heal MODEL manifest.jsonl --keep-layers 0-6,27-29      # the same; prints the folder

Dropping layers destroys a model: its KL to the full one rises to about 8 nats. A hundred steps on text of the kind that
it will read bring back what matters (Men et al., "ShortGPT", 2024; Gromov et al., 2024). Embeddings and head stay
frozen, so the fused loss takes its frozen-head path: it gets hidden states and stores no logits.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.backbones import resolve
from models.backbones.causal_lm import pad_rows, read_head
from models.backbones.commands import heal_parser
from models.backbones.device import has_fast_bfloat16
from models.backbones.healing_config import KEEP_LAYERS, HealingConfig
from models.data.manifest import AUDIO_PLACEHOLDER
from models.data.prompts import render_prompt, target_template
from models.io_utils import atomic_dir, atomic_write_json, cache_dir, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdkernels.teacher import LMHead
    from models.data.manifest import Example

_RECORD_FILE = "healing.json"
_CACHE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class HealingReport:
    """What a healing run did: held-out KL(teacher || student) in nats a token before and after, and its time."""

    kl_before: float
    kl_after: float
    seconds: float
    steps: int
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, training KL), every tenth step


def build_student(lm: nn.Module, keep_layers: Sequence[int] = KEEP_LAYERS) -> nn.Module:
    """A copy of `lm` with only the given decoder layers, in that order. `lm` itself does not change.

    Args:
        lm: a causal language model of transformers whose decoder has `.layers`.
        keep_layers: increasing layer numbers. The default keeps 10 of SmolLM2-135M's 30: the first seven, which do most
            of the reading, and the last three, whose states the head can read.

    Raises:
        ValueError: a number out of range, or not increasing.
    """
    decoder = lm.get_decoder()
    kept = list(keep_layers)
    depth = len(decoder.layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depth:
        raise ValueError(f"keep_layers: expected increasing numbers in [0, {depth}), got {tuple(keep_layers)}")
    layers = decoder.layers
    # The other layers are taken out during the copy, so only the kept ones are copied.
    decoder.layers = nn.ModuleList(layers[number] for number in kept)
    try:
        student = copy.deepcopy(lm)
    finally:
        decoder.layers = layers
    for number, layer in enumerate(student.get_decoder().layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # the slot in the KV cache
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None):  # one entry a layer, in families that mix attention types
        student.config.layer_types = [lm.config.layer_types[number] for number in kept]
    return student


def heal(
    student: nn.Module,
    teacher: nn.Module,
    texts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: HealingConfig | None = None,
    progress: bool = True,
) -> HealingReport:
    """Train `student` in place to predict text as `teacher` does.

        loss = mean over tokens of KL(softmax(W_t h_t) || softmax(W_s h_s))

    Args:
        student, teacher: causal language models with one vocabulary. The student's embeddings and head are not trained.
        texts: at least `config.held_out + config.batch_size`; the seed decides their order.
        tokenizer: of both models.
        config: settings.
        progress: show a bar.

    Returns:
        the held-out KL before and after.

    Raises:
        ValueError: too few texts.
        FloatingPointError: the loss of a step is not finite; the student is then of no use.
    """
    config = config if config is not None else HealingConfig()
    order = random.Random(config.seed)
    held_out, training = _split_texts(_tokenize(texts, tokenizer, config.max_tokens), config, order)
    started = time.monotonic()
    with _set_up(student, teacher) as parameters:
        text_kl = _TextKL(student, teacher, config)
        kl_before = text_kl.held_out(held_out)
        curve = _train(text_kl, parameters, training, order, config, progress=progress)
        kl_after = text_kl.held_out(held_out)
    return HealingReport(
        kl_before=kl_before, kl_after=kl_after, seconds=time.monotonic() - started, steps=config.steps, curve=curve
    )


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[list[int]]:
    if not len(texts):
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids
    return [row[:max_tokens] for row in ids if len(row) > 1]


def _split_texts(
    tokens: list[list[int]], config: HealingConfig, order: random.Random
) -> tuple[list[list[int]], list[list[int]]]:
    """Shuffle the texts and divide them: held out, training."""
    needed = config.held_out + config.batch_size
    if len(tokens) < needed:
        raise ValueError(f"texts: expected at least {needed} of two tokens or more, got {len(tokens)}")
    order.shuffle(tokens)
    return tokens[: config.held_out], tokens[config.held_out :]


@contextlib.contextmanager
def _set_up(student: nn.Module, teacher: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Make the student's body trainable and set the teacher to evaluation; afterwards both are as they were.

    Yields:
        the parameters to train.
    """
    trained_before = [parameter.requires_grad for parameter in student.parameters()]
    modes = student.training, teacher.training
    student.requires_grad_(True)
    for frozen in (student.get_input_embeddings(), student.get_output_embeddings()):
        frozen.requires_grad_(False)
    teacher.eval()
    try:
        yield [parameter for parameter in student.parameters() if parameter.requires_grad]
    finally:
        student.train(modes[0])
        teacher.train(modes[1])
        for parameter, flag in zip(student.parameters(), trained_before, strict=True):
            parameter.requires_grad_(flag)


class _TextKL:
    """KL(teacher || student) of the next token, in nats; mean over the tokens of a batch of texts."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: HealingConfig) -> None:
        self.student, self.teacher = student, teacher
        self._batch_size = config.batch_size
        self._student_head, self._teacher_head = read_head(student), read_head(teacher)
        self._device = self._student_head.weight.device
        fast = config.precision == "auto" and has_fast_bfloat16(self._device)
        self._bfloat16 = config.precision == "bfloat16" or fast
        if self._bfloat16:
            self._student_head, self._teacher_head = map(_in_bfloat16, (self._student_head, self._teacher_head))

    def __call__(self, batch: list[list[int]]) -> Tensor:
        from kdkernels import fused_linear_caad_loss

        ids, mask, predicts = _pad(batch, self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            with torch.no_grad():
                target = _hidden_states(self.teacher, ids, mask)[predicts]  # (N, H_t)
            hidden = _hidden_states(self.student, ids, mask)[predicts]  # (N, H_s)
        return fused_linear_caad_loss(
            student_hidden=hidden.to(self._student_head.weight.dtype),
            teacher_audio_hidden=target.to(self._teacher_head.weight.dtype),
            teacher_text_hidden=None,
            **self._student_head.keywords("student"),
            **self._teacher_head.keywords("teacher"),
            alpha=0.0,
            temperature=1.0,
            kd_weight=1.0,
        )

    @torch.no_grad()
    def held_out(self, rows: list[list[int]]) -> float:
        """Mean over all tokens of `rows`, however they are batched."""
        self.student.eval()
        total = count = 0.0
        ordered = sorted(rows, key=len)
        for start in range(0, len(ordered), self._batch_size):
            batch = ordered[start : start + self._batch_size]
            tokens = sum(len(row) - 1 for row in batch)
            total += self(batch).item() * tokens
            count += tokens
        return total / count


def _train(
    text_kl: _TextKL,
    parameters: list[nn.Parameter],
    training: list[list[int]],
    order: random.Random,
    config: HealingConfig,
    *,
    progress: bool,
) -> list[tuple[int, float]]:
    """`config.steps` steps of AdamW. Returns (step, KL) of every tenth step and of the last."""
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    text_kl.student.train()
    queue: list[list[int]] = []
    curve: list[tuple[int, float]] = []
    with tqdm(total=config.steps, desc="healing", unit="step", disable=not progress) as bar:
        for step in range(1, config.steps + 1):
            if len(queue) < config.batch_size:
                queue += order.sample(training, len(training))
            batch, queue = queue[: config.batch_size], queue[config.batch_size :]
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _learning_rate_factor(step, config)
            loss = text_kl(batch)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"healing: the loss of step {step} is {value}; lower lr ({config.lr})")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0 or step == config.steps:
                curve.append((step, round(value, 4)))
                bar.set_postfix(kl=f"{value:.3f}")
            bar.update()
    return curve


def _in_bfloat16(head: LMHead) -> LMHead:
    return dataclasses.replace(head, weight=head.weight.bfloat16())


def _hidden_states(lm: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return lm.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask (B, L), padded on the right, and the positions that predict a token of the text."""
    ids, mask = pad_rows(rows)
    predicts = torch.cat([mask[:, 1:], mask.new_zeros(len(rows), 1)], dim=1).bool()
    return ids.to(device), mask.to(device), predicts.to(device)


def _learning_rate_factor(step: int, config: HealingConfig) -> float:
    warmup = min(1.0, step / max(1, config.warmup_steps))
    return warmup * max(0.05, 1.0 - step / (config.steps + 1))


def healed_student(
    teacher: str,
    texts: Sequence[str],
    *,
    keep_layers: Sequence[int] = KEEP_LAYERS,
    config: HealingConfig | None = None,
    cache: str | Path | None = None,
    resolver: Any = None,
    progress: bool = True,
) -> Path:
    """The folder of a healed student. It is made once for each teacher, choice of layers, settings and texts.

    Args:
        teacher: hub id or folder of the full language model.
        texts: see `heal`.
        keep_layers: see `build_student`.
        config: see `heal`.
        cache: folder of the students; default `cache_dir()/students`.
        resolver: where the teacher comes from; default models.backbones.resolve.
        progress: show a bar.

    Returns:
        a folder that `SpeechLMConfig(lm=...)` takes: model, tokenizer, and healing.json with the held-out KL.
    """
    config = config if config is not None else HealingConfig()
    source = resolver if resolver is not None else resolve
    ours = source is resolve
    identity = resolve.resolve_backbone(teacher, kind="causal_lm").sha256() if ours else teacher
    settings = {
        "version": _CACHE_VERSION,
        "teacher_sha256": identity,
        "keep_layers": list(keep_layers),
        "config": asdict(config),
        "texts": fingerprint(list(texts)),
    }
    root = Path(cache).expanduser() if cache is not None else cache_dir() / "students"
    folder = root / fingerprint(settings)[:16]
    if (folder / _RECORD_FILE).is_file():
        return folder
    lm, tokenizer = source.load_causal_lm(teacher, dtype=torch.float32)
    student = build_student(lm, keep_layers)
    report = heal(student, lm, texts, tokenizer=tokenizer, config=config, progress=progress)
    with atomic_dir(folder) as target:
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)
        atomic_write_json(target / _RECORD_FILE, {**settings, "teacher": str(teacher), "report": asdict(report)})
    return folder


def healing_texts(examples: Sequence[Example], *, seed: int = 0) -> list[str]:
    """Texts of the kind that the student will read: each distinct prompt without its audio, then an answer.

    If an example has choices, the answer is one of them at random, so that the texts say nothing about the clips.
    """
    draw = random.Random(seed)
    texts: dict[str, None] = {}
    for example in examples:
        prompt = render_prompt(example).replace(AUDIO_PLACEHOLDER + "\n", "\n").replace(AUDIO_PLACEHOLDER, "")
        if example.choices:
            answer = target_template(example, draw.choice(example.choices))
        else:
            answer = example.target or (target_template(example, example.answer) if example.answer else "")
        texts[f"{prompt} {answer}".rstrip()] = None
    return list(texts)


def parse_layers(text: str) -> tuple[int, ...]:
    """ "0-6,27-29" as numbers.

    Raises:
        ValueError: `text` has other parts than numbers and ranges.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"keep_layers: expected numbers and ranges such as 0-6,27-29, got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def read_texts(path: str | Path, *, seed: int = 0) -> list[str]:
    """Healing texts of a manifest (.jsonl), whose bad rows are left out and listed, or the lines of a text file.

    Raises:
        ValueError, OSError: the file cannot be read; the message names it.
    """
    from models.data.manifest import read_manifest
    from models.data.problems import print_skipped

    path = Path(path)
    if path.suffix == ".jsonl":
        manifest = read_manifest(path, check_audio=False)
        print_skipped(manifest.problems)
        return healing_texts(manifest.examples, seed=seed)
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, one text a line: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring. Returns the exit status."""
    arguments = heal_parser().parse_args(argv)
    names = ("steps", "batch_size", "max_tokens", "held_out", "seed", "lr")
    try:
        config = HealingConfig(**{name: getattr(arguments, name) for name in names})
        folder = healed_student(
            arguments.model,
            read_texts(arguments.texts, seed=arguments.seed),
            keep_layers=parse_layers(arguments.keep_layers),
            config=config,
            cache=arguments.out,
        )
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = json.loads((folder / _RECORD_FILE).read_text(encoding="utf-8"))["report"]
    print(f"KL to the full model, held-out texts: {report['kl_before']:.3f} -> {report['kl_after']:.3f} nats a token")
    print(folder)
    return 0
