"""Hidden states that a server has dumped, as the cache of a teacher.

    python -m models cache TEACHER MANIFEST --out FOLDER --served REQUESTS.jsonl

The server (vLLM or SGLang) reads a sample's prompt and its answer as one prompt, once with the audio and once without. Each
line of REQUESTS.jsonl is one such request, both paths of a sample near each other:

    {"id": SAMPLE, "path": "audio", "response": {...}}     the server's JSON as it came
    {"id": SAMPLE, "path": "text", "file": "7.safetensors", "prompt_logprobs": [null, {"42": -0.5, ...}, ...]}

vLLM    a file that ExampleHiddenStatesConnector wrote, or speculators: hidden_states (L, K, H), token_ids (L,). It is named by
        "file", or by kv_transfer_params.hidden_states_path of a response. The K layers are those that the server was told to
        keep. The last one has to be the model's depth: it comes before the final norm, which is applied here. A response has its
        log-probabilities in choices[0].prompt_logprobs; a line with "file" brings them itself.
SGLang  a response of /generate with return_hidden_states: meta_info.hidden_states, after the final norm, and
        meta_info.input_token_logprobs with input_top_logprobs.

The last tokens of a request have to be the sample's target. Every state is checked before it is stored: the LM head on it has
to give the server's log-probabilities. States of a wrong norm, of another layer, or shifted by one token may name the same best
token nearly always, and have another distribution.

Legend: L tokens of a request, K layers, H hidden width, n target tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from kdkernels.contrast_cache import ContrastCache
from kdkernels.layer_states import decoder_layers, final_norm
from models.backbones.causal_lm import read_head
from models.training.cache_identity import CacheError, sample_content

PATHS = ("audio", "text")
TOLERANCE_NATS = 0.1
_LEAST_LOGPROB = -15.0  # a bfloat16 head's rounding is as large as such tokens' differences
_MAX_PENDING = 1_000


@dataclass(frozen=True)
class Request:
    """What a server said about one path of a sample.

    Attributes:
        tokens: (L,) ids that it read.
        states: (P, K, H) of the last P positions that it kept, in their order.
        logprobs: of each position the log-probabilities of some tokens there, given those before; None where there are none.
        normed: the last layer's states come after the final norm.
    """

    tokens: list[int]
    states: Tensor
    logprobs: list[dict[int, float] | None]
    normed: bool

    def predicting(self, count: int, shift: int = 0) -> Tensor | None:
        """(count, K, H): the states before the last `count` tokens; with `shift` those of other positions, None if not kept."""
        end = len(self.states) - 1 + shift
        return self.states[end - count : end] if count <= end <= len(self.states) else None


def read_requests(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered lines of a file of requests. A last line without an end is left out: the file is still being written.

    Raises:
        CacheError: no such file, or a damaged line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"expected an object, got {type(row).__name__}")
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n"):
                        return
                    raise CacheError(f"{path}: line {number} is damaged: {error}") from error
                yield number, row
    except OSError as error:
        raise CacheError(f"{path}: not readable: {error.strerror}") from error


def read_request(row: Mapping[str, Any], folder: Path) -> Request:
    """One line of a file of requests in `folder`; see the module's docstring.

    Raises:
        ValueError: a field is missing or of another form.
        OSError: the file of the states cannot be read.
    """
    response = row.get("response")
    if isinstance(response, list) and len(response) == 1:
        response = response[0]
    try:
        if isinstance(response, Mapping) and "meta_info" in response:
            return _of_sglang(response["meta_info"])
        if isinstance(response, Mapping):
            file = response["kv_transfer_params"]["hidden_states_path"]
            return _of_vllm(file, folder, response["choices"][0]["prompt_logprobs"])
        return _of_vllm(row["file"], folder, row["prompt_logprobs"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a response of vLLM or SGLang, or file and prompt_logprobs: {error!r}") from None


def _of_vllm(file: str, folder: Path, prompt_logprobs: Sequence[Any]) -> Request:
    path = folder / file  # an absolute path stays as it is
    path = path if path.is_file() else folder / Path(file).name  # the server's folder may have been copied here
    with _written(path):
        try:
            with safe_open(str(path), framework="pt", device="cpu") as tensors:
                states, tokens = tensors.get_tensor("hidden_states"), tensors.get_tensor("token_ids")
        except Exception as error:  # safetensors raises several unrelated types
            raise OSError(f"{path}: {error}") from error
    if states.dim() == 2:
        states = states[:, None]
    if states.dim() != 3 or not states.is_floating_point() or tokens.shape != states.shape[:1]:
        raise ValueError(
            f"{path}: expected hidden_states (L, K, H) and token_ids (L,), got {tuple(states.shape)} and {tuple(tokens.shape)}"
        )
    return _checked(tokens.tolist(), states, [_as_logprobs(entry) for entry in prompt_logprobs], normed=False)


def _of_sglang(info: Mapping[str, Any]) -> Request:
    given = info["input_token_logprobs"]  # one (log-probability, id, text) a token
    top = info.get("input_top_logprobs") or [None] * len(given)
    tokens = [int(token) for _, token, *_ in given]
    logprobs: list[dict[int, float] | None] = []
    for (own, token, *_), others in zip(given, top, strict=True):
        entry = {int(other): float(value) for value, other, *_ in others or () if value is not None}
        entry |= {} if own is None else {int(token): float(own)}
        logprobs.append(entry or None)
    blocks = [torch.tensor(block, dtype=torch.float32) for block in info["hidden_states"]]
    prompt = [block for block in blocks if block.dim() == 2]  # the others are states of tokens that the server made itself
    if not prompt:
        raise ValueError("meta_info.hidden_states: expected the states of the prompt, got none")
    return _checked(tokens, torch.cat(prompt)[:, None], logprobs, normed=True)


def _checked(tokens: list[int], states: Tensor, logprobs: list[dict[int, float] | None], *, normed: bool) -> Request:
    if len(logprobs) != len(tokens):
        raise ValueError(f"log-probabilities: expected {len(tokens)}, one a token, got {len(logprobs)}")
    if not 1 <= len(states) <= len(tokens):
        raise ValueError(f"hidden_states: expected at most {len(tokens)}, one a token, got {len(states)}")
    return Request(tokens, states, logprobs, normed)


def _as_logprobs(entry: Any) -> dict[int, float] | None:
    if entry is None:
        return None
    return {int(token): float(x["logprob"] if isinstance(x, Mapping) else x) for token, x in entry.items()}


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Inside, vLLM has finished the file: it holds a lock beside it while it writes."""
    lock = Path(f"{path}.lock")
    if not lock.is_file():
        yield
        return
    import fcntl

    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield


class StateCheck:
    """Turns a request's states into those that the LM head reads, and compares what the head makes of them with the server.

    Args:
        model: the teacher, an `AudioLM`. Only its final norm and its LM head run.
        layers: numbers of the K layers of each request, in their order.
        tolerance_nats: largest mean difference of the log-probabilities of a path of a sample.
    """

    def __init__(self, model: Any, layers: Sequence[int], *, tolerance_nats: float = TOLERANCE_NATS) -> None:
        self.depth = len(decoder_layers(model.lm))
        if not layers or layers[-1] != self.depth:
            raise CacheError(
                f"--served-layers: expected the last one to be {self.depth}, which the LM head reads, got {list(layers)}"
            )
        self.layers = tuple(layers)
        self.head = read_head(model)
        self._norm = final_norm(model.lm)
        self.tolerance_nats = tolerance_nats
        self.compared, self.total, self.largest = 0, 0.0, 0.0

    @torch.no_grad()
    def states_of(self, request: Request, target: Sequence[int]) -> Tensor:
        """(n, K, H) in the head's dtype: the states that predict the target, the last layer's as the head reads them.

        Raises:
            ValueError: the request ends with other tokens, has other layers or widths, or its states do not give the server's
                log-probabilities; the message says which other states would.
        """
        count = len(target)
        if request.tokens[-count:] != list(target):
            raise ValueError(
                f"expected the request to end with the target's tokens {list(target)}, got {request.tokens[-count:]}"
            )
        width = self.head.weight.shape[1]
        if request.states.shape[1:] != (len(self.layers), width):
            got = tuple(request.states.shape[1:])
            raise ValueError(f"expected the states of {len(self.layers)} layers of width {width}, got {got} (--served-layers)")
        chosen = request.predicting(count)
        if chosen is None:
            got = len(request.states)
            raise ValueError(f"expected states before {count} target tokens, got {got}; turn the server's prefix cache off")
        read = self._as_read(chosen[:, -1], normed=request.normed)
        wanted = request.logprobs[-count:]
        differences = self._differences(read, wanted)
        if not len(differences):
            raise ValueError("expected log-probabilities of the target's tokens, got none")
        mean = float(differences.mean())
        if not mean <= self.tolerance_nats:  # NaN too
            raise ValueError(
                f"the LM head gives other log-probabilities than the server, by {mean:.3g} nats on average (at most "
                f"{self.tolerance_nats:g} are allowed){self._diagnosis(request, count, wanted)}"
            )
        self.compared += len(differences)
        self.total += float(differences.sum())
        self.largest = max(self.largest, float(differences.max()))
        return torch.cat([chosen[:, :-1].to(read), read[:, None]], dim=1)

    def report(self) -> str:
        """How well the states agree with the server so far."""
        mean = self.total / max(1, self.compared)
        differ = f"{mean:.2g} nats on average, {self.largest:.2g} at most"
        return f"{self.compared} log-probabilities of the server differ from those of its states by {differ}"

    def _as_read(self, states: Tensor, *, normed: bool) -> Tensor:
        states = states.to(self.head.weight.device, self.head.weight.dtype)
        return states if normed or self._norm is None else self._norm(states)

    def _differences(self, states: Tensor, wanted: Sequence[dict[int, float] | None]) -> Tensor:
        """(pairs,) float64: |ours - the server's| for each log-probability that the server gave."""
        ours = self.head.logits(states).double().log_softmax(-1).cpu()
        given = [(n, token, x) for n, entry in enumerate(wanted) for token, x in (entry or {}).items()]
        given = [(n, token, x) for n, token, x in given if x > _LEAST_LOGPROB and 0 <= token < ours.shape[1]]
        rows, tokens, logprobs = zip(*given, strict=True) if given else ((), (), ())
        return (ours[list(rows), list(tokens)] - torch.tensor(logprobs, dtype=torch.float64)).abs()

    def _diagnosis(self, request: Request, count: int, wanted: Sequence[dict[int, float] | None]) -> str:
        """Which other states of the request would give the server's log-probabilities."""
        tried: dict[str, Tensor] = {}
        for shift, where in ((0, ""), (-1, " of one token earlier"), (1, " of one token later")):
            states = request.predicting(count, shift)
            for normed in (request.normed, not request.normed) if states is not None else ():
                norm = "" if normed == request.normed else " without the final norm" if normed else " with the final norm"
                for number, layer in enumerate(self.layers):
                    of = "" if number == len(self.layers) - 1 else f" of layer {layer}"
                    read = self._as_read(states[:, number], normed=normed)
                    tried[f"{of}{where}{norm}"] = self._differences(read, wanted).mean()
        fits = [name for name, mean in tried.items() if name and mean <= self.tolerance_nats]
        return f"; states{fits[0]} would fit" if fits else ""


def fill_from_server(
    folder: str | Path,
    model: Any,
    store: Any,
    examples: Sequence[Any],
    requests: Path,
    *,
    made_from: dict[str, Any],
    check: StateCheck,
    dtype: torch.dtype = torch.bfloat16,
    layers: Sequence[int] = (),
    part: str = "0",
    shard_mib: float = 64.0,
    progress_bar: bool = True,
) -> tuple[int, list[str]]:
    """Write what is not in the cache yet and what `requests` holds.

    Args:
        model: the teacher, an `AudioLM`.
        store: its clips, for the fingerprint of each sample's content.
        examples: with targets.
        made_from, dtype, layers, part, shard_mib: as in `fill_cache`.

    Returns:
        samples written now, and the ids of `examples` that are not in the cache afterwards.

    Raises:
        CacheError: a request that cannot be read or does not fit.
    """
    missing_layers = sorted(set(layers) - set(check.layers))
    if missing_layers:
        raise CacheError(f"--layers: expected some of --served-layers {list(check.layers)}, got {missing_layers[0]}")
    columns = [check.layers.index(layer) for layer in layers]
    collate = model.make_collator()
    wanted = {e.id: e for e in examples}
    waiting: dict[str, dict[str, Request]] = {}
    written = 0
    writer = ContrastCache.writer(
        folder, fingerprint=made_from, hidden_size=check.head.weight.shape[1], teacher_head=check.head, dtype=dtype,
        layers=layers, part=part, shard_mib=shard_mib,
    )  # fmt: skip
    with writer, tqdm(total=len(examples), desc="cache from a server", unit="example", disable=not progress_bar) as bar:
        bar.update(sum(e.id in writer for e in examples))
        for number, row in read_requests(requests):
            where = f"{requests}: line {number} (sample {row.get('id')!r})"
            example = wanted.get(row["id"]) if isinstance(row.get("id"), str) else None
            if row.get("path") not in PATHS or not isinstance(row.get("id"), str):
                raise CacheError(f"{where}: expected id, a string, and path, audio or text, got {row.get('path')!r}")
            if example is None or example.id in writer:
                continue
            try:
                waiting.setdefault(example.id, {})[row["path"]] = read_request(row, requests.parent)
                if len(waiting[example.id]) < len(PATHS):
                    if len(waiting) > _MAX_PENDING:
                        raise ValueError(f"expected both paths of a sample near each other; {len(waiting)} samples lack one")
                    continue
                both, target = waiting.pop(example.id), collate.target_ids(example)
                audio, text = (check.states_of(both[path], target) for path in PATHS)
            except (ValueError, OSError) as error:
                raise CacheError(f"{where}: {error}") from error
            by_layer = {"audio_layers": audio[:, columns], "text_layers": text[:, columns]} if columns else {}
            content = sample_content(example, store.rows([example])[0])
            writer.add(example.id, audio[:, -1], text[:, -1], torch.tensor(target), content=content, **by_layer)
            written += 1
            bar.update()
        return written, [e.id for e in examples if e.id not in writer]


def parse_served_layers(text: str | None, depth: int) -> tuple[int, ...]:
    """The layers that a server kept: numbers in their order, such as "2,14,25,28"; None = the last one alone."""
    if text is None:
        return (depth,)
    try:
        layers = tuple(int(word) for word in text.split(","))
    except ValueError:
        layers = (-1,)
    if min(layers) < 0 or max(layers) > depth or len(set(layers)) != len(layers):
        raise CacheError(f"--served-layers: expected different numbers from 0 to {depth}, got {text!r}")
    return layers


def check_tolerance(tolerance_nats: float) -> None:
    """CacheError unless it is a positive number."""
    if not 0 < tolerance_nats < math.inf:
        raise CacheError(f"--served-tolerance: expected a positive number of nats, got {tolerance_nats}")
