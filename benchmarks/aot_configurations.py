"""The kernels and configurations that `benchmarks.aot` compiles, each with its limits. A new kernel gets a line in `REGISTRY`.

The row kernel's options (5 dtypes, 3 divergences, 3 temperatures, 3 choices of terms, 6 switches) make 8,640 configurations.
A covering array of them is compiled: every combination of values that any three options can take is in some configuration.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .aot_compiler import MACHINES, Configuration, Limits


def covering_array(factors: dict[str, Sequence], legal: Callable[[dict], bool], strength: int = 3) -> list[dict]:
    """Few settings in which any `strength` factors take every legal combination of their values. The result is always the same.

    The search is greedy. A setting starts from the first combination that is not covered yet. Each other factor, in order, then
    takes the value that covers most of the combinations that are left.
    """
    names = list(factors)

    def combinations(setting: dict) -> set:
        return set(itertools.combinations([(n, setting[n]) for n in names if n in setting], strength))

    left = dict.fromkeys(
        tuple(zip(chosen, values, strict=True))
        for chosen in itertools.combinations(names, strength)
        for values in itertools.product(*(factors[name] for name in chosen))
        if legal(dict(zip(chosen, values, strict=True)))
    )
    out = []
    while left:
        setting = dict(next(iter(left)))
        for name in names:
            if name not in setting:
                options = [{**setting, name: v} for v in factors[name] if legal({**setting, name: v})]
                setting = max(options, key=lambda x: len(combinations(x) & left.keys()))
        for combination in combinations(setting):
            left.pop(combination, None)
        out.append({name: setting[name] for name in names})
    return out


# The row kernel. Dtypes: student's logits, teacher's logits, gradient.
ROW_DTYPES = {
    "bf16": ("bfloat16", "bfloat16", "bfloat16"),
    "fp16": ("float16", "float16", "float16"),
    "fp32": ("float32", "float32", "float32"),
    "bf16 over fp32": ("float32", "float32", "bfloat16"),  # what the linear loss asks for
    "bf16, teacher fp32": ("bfloat16", "float32", "bfloat16"),
}
ROW_FACTORS: dict[str, Sequence] = {
    "dtypes": list(ROW_DTYPES),
    "divergence": ["forward_kl", "reverse_kl", "jsd"],
    "temperature": [2.0, 1.0, 3.0],
    "terms": ["kd + ce", "kd", "ce"],
    "text": [True, False],
    "grad": [True, False],
    "stats": [False, True],
    "softcap": [None, 30.0],
    "plausibility": [None, 0.1],
    "vocab": [128256, 50257],  # the second has no 16-byte alignment and a masked tail
}
# A vocabulary whose rows are padded, as the linear losses pad their scratch. Rows of the others end with their last id.
PADDED_VOCAB = 128257
ROW_MAIN = {name: values[0] for name, values in ROW_FACTORS.items()}
# The settings that training and evaluation use in practice. The rest of the grid comes after these.
ROW_QUICK = [
    {},
    {"dtypes": "fp32"},
    {"dtypes": "bf16 over fp32"},
    {"dtypes": "bf16 over fp32", "text": False},
    {"dtypes": "bf16 over fp32", "text": False, "terms": "kd"},
    {"divergence": "reverse_kl", "temperature": 1.0},
    {"divergence": "jsd", "temperature": 3.0},
    {"stats": True, "softcap": 30.0},
    {"grad": False},
    {"plausibility": 0.1},
    {"vocab": 50257},
    {"dtypes": "bf16 over fp32", "text": False, "vocab": PADDED_VOCAB},
    {"vocab": PADDED_VOCAB},
    {"dtypes": "bf16 over fp32", "plausibility": 0.1, "softcap": 30.0, "vocab": PADDED_VOCAB},
    {"dtypes": "bf16 over fp32", "divergence": "jsd", "text": False, "vocab": PADDED_VOCAB},
]


def row_width(vocab: int) -> int:
    """Items of a row of logits."""
    from kdkernels.ops.chunking import row_items

    return row_items(vocab, torch.device("cuda")) if vocab == PADDED_VOCAB else vocab


def _legal_rows(setting: dict) -> bool:
    """Whether the public function takes the setting. Reverse KL to a distribution with holes is infinite and raises an error."""
    return not (setting.get("divergence") == "reverse_kl" and setting.get("plausibility") is not None)


class _Recorder(triton.JITFunction):
    """Stands in for a kernel: it writes a launch down instead of running it."""

    def __init__(self, kernel: triton.JITFunction, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    @property
    def arg_names(self) -> list[str]:
        return self.kernel.arg_names

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*positional: object, **keywords: object) -> None:
            arguments = dict(zip(self.kernel.arg_names, positional, strict=False))
            self.launches.append((self.kernel, {**arguments, **keywords}))

        return launch


@contextlib.contextmanager
def recorded(module: ModuleType, **replaced: object) -> Iterator[list[tuple[triton.JITFunction, dict]]]:
    """Collects, in order, the launches of `module`'s kernels (its names that end in _kernel). No kernel runs.

    So a launcher that is called on meta tensors says what it would launch. `replaced` gives other names of the module another
    value.
    """
    launches: list[tuple[triton.JITFunction, dict]] = []
    kernels = {k: v for k, v in vars(module).items() if k.endswith("_kernel") and isinstance(v, triton.JITFunction)}
    stand_ins = {k: _Recorder(v, launches) for k, v in kernels.items()}
    stand_ins |= {"_device_of": lambda tensor, kernel: contextlib.nullcontext(), **replaced}
    before = {name: getattr(module, name) for name in stand_ins}
    try:
        for name, value in stand_ins.items():
            setattr(module, name, value)
        yield launches
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _meta(*shape: int, dtype: str = "float32") -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _spec(setting: dict):
    from kdkernels.ops.rows import RowSpec

    return RowSpec(
        vocab=setting["vocab"],
        temperature=setting["temperature"],
        divergence=setting["divergence"],
        plausibility=setting["plausibility"],
        with_kd="kd" in setting["terms"],
        with_ce="ce" in setting["terms"],
        student_softcap=setting["softcap"],
        teacher_softcap=setting["softcap"],
    )


def _label(setting: dict, main: dict) -> str:
    """The dtypes, and the options that differ from the main setting."""
    words = ("dtypes", "divergence", "terms", "teacher")
    return ", ".join(str(v) if k in words else f"{k} {v}" for k, v in setting.items() if v != main[k] or k == "dtypes")


def row_launch(setting: dict, *, batch: int = 8, seq: int = 1024) -> tuple[triton.JITFunction, dict]:
    """The row kernel's launch over (batch, seq, vocab) logits."""
    from kdkernels.ops import triton_caad

    student, teacher, grad = ROW_DTYPES[setting["dtypes"]]
    shape, n = (batch, seq, row_width(setting["vocab"])), batch * seq
    with recorded(triton_caad) as launches:
        triton_caad.caad_rows(
            _meta(*shape, dtype=student),
            _meta(*shape, dtype=teacher),
            _meta(*shape, dtype=teacher) if setting["text"] else None,
            _meta(n, dtype="int64"),
            _meta(n),
            _meta(n),
            _meta(n),
            _spec(setting),
            grad=_meta(*shape, dtype=grad) if setting["grad"] else None,
            want_stats=setting["stats"],
        )
    return launches[0]


def row_limits(setting: dict) -> Limits:
    """Each pass reads each tensor at least once, 16 bytes in each thread. Only the row's scalars need narrower loads."""
    reads_teacher = "kd" in setting["terms"] or setting["stats"]
    tensors = ["student"] + ["audio"] * reads_teacher + ["text"] * (reads_teacher and setting["text"])
    aligned = row_width(setting["vocab"]) % 16 == 0
    passes = 1 + setting["grad"] + (setting["divergence"] == "jsd" and "kd" in setting["terms"])
    heavy = setting["divergence"] == "jsd" or setting["softcap"] is not None
    # 128 registers leave room for 16 warps on a multiprocessor, 168 for 12.
    registers = 168 if setting["stats"] or heavy or not aligned else 128
    # A thread's group is 16 bytes of the narrowest logits. bf16 gradients of float32 logits take half of that.
    wide_grad = aligned and setting["grad"] and setting["dtypes"] != "bf16 over fp32"
    return Limits(
        registers=registers,
        shared=2048,  # for merging alone: no part of a row is kept there
        wide_loads=passes * len(tensors) if aligned else 0,
        narrow_loads=5 if aligned else None,  # target, alpha, two coefficients, the label's logit
        wide_stores=1 if wide_grad else 0,
        rows=(*tensors, *(["grad"] if setting["grad"] else [])),
    )


def row_configurations(sm: int) -> Iterator[Configuration]:
    settings = [{**ROW_MAIN, **changes} for changes in ROW_QUICK]
    settings += [x for x in covering_array(ROW_FACTORS, _legal_rows) if x not in settings]
    for i, setting in enumerate(settings):
        quick = i < 3 or (sm == 90 and i < len(ROW_QUICK))
        yield Configuration(_label(setting, ROW_MAIN), *row_launch(setting), row_limits(setting), quick)


def scale_configurations(sm: int) -> Iterator[Configuration]:
    from kdkernels.ops import triton_caad

    limits = Limits(registers=64, shared=0, wide_loads=1, narrow_loads=1, wide_stores=1, rows=("source", "out"))
    for dtype, in_place in itertools.product(("bfloat16", "float16", "float32"), (True, False)):
        source = _meta(8, 1024, 128256, dtype=dtype)
        with recorded(triton_caad) as launches:
            triton_caad.scale_rows(source, _meta(8 * 1024), out=source if in_place else None)
        yield Configuration(f"{dtype}{', in place' if in_place else ''}", *launches[0], limits, quick=sm == 90)


# The loss without logits. Dtypes: hidden states, weights.
NO_LOGITS_DTYPES = {
    "bf16": ("bfloat16", "bfloat16"),
    "fp16": ("float16", "float16"),
    "fp32": ("float32", "float32"),
    "fp32 by bf16": ("float32", "bfloat16"),
}
NO_LOGITS_FACTORS: dict[str, Sequence] = {
    "dtypes": list(NO_LOGITS_DTYPES),
    "divergence": ["forward_kl", "reverse_kl"],
    "temperature": [2.0, 1.0, 3.0],
    "terms": ["kd + ce", "kd", "ce"],
    "text": [True, False],
    "softcap": [None, 30.0],
    "plausibility": [None, 0.1],
    "bias": [False, True],
    "vocab": [128256, 50257],
}
NO_LOGITS_MAIN = {name: values[0] for name, values in NO_LOGITS_FACTORS.items()}
NO_LOGITS_QUICK = [{}, {"plausibility": 0.1}, {"dtypes": "fp32", "divergence": "reverse_kl"}]


def _device_limits(sm: int):
    """The properties that the launchers would read from the device that stands for `sm`."""
    from kdkernels.ops import triton_no_logits

    processors, shared = MACHINES[sm]
    return triton_no_logits._Limits(processors, shared, sm // 10)


def no_logits_launches(setting: dict, sm: int, *, tokens: int = 4096) -> dict[str, tuple[triton.JITFunction, dict]]:
    """kernel's name -> its launch by the loss that stores no logits, on the device that stands for `sm`."""
    from kdkernels.ops import triton_no_logits

    hidden, weight = NO_LOGITS_DTYPES[setting["dtypes"]]
    vocab = setting["vocab"]
    bias = _meta(vocab, dtype=weight) if setting["bias"] else None
    with recorded(triton_no_logits, _device_limits=lambda device: _device_limits(sm)) as launches:
        triton_no_logits.linear_caad_no_logits(
            _meta(tokens, 3072, dtype=hidden),
            _meta(vocab, 3072, dtype=weight),
            bias,
            _meta(tokens, 4096, dtype=hidden),
            _meta(tokens, 4096, dtype=hidden) if setting["text"] else None,
            _meta(vocab, 4096, dtype=weight),
            bias,
            _meta(tokens, dtype="int64"),
            _meta(tokens),
            _spec(setting),
        )
    return {kernel.__name__: (kernel, arguments) for kernel, arguments in launches}


def no_logits_configurations(sm: int) -> Iterator[Configuration]:
    """Every distinct kernel that the loss without logits launches, once."""
    settings = [{**NO_LOGITS_MAIN, **changes} for changes in NO_LOGITS_QUICK]
    settings += [x for x in covering_array(NO_LOGITS_FACTORS, _legal_rows, strength=2) if x not in settings]
    _, shared = MACHINES[sm]
    heads = ("student", "student_weight")
    limits = {
        "_no_logits_kernel": Limits(registers=255, shared=shared, wide_loads=2, rows=heads),
        "_audio_max_kernel": Limits(registers=255, shared=shared, wide_loads=2, rows=("audio", "weight")),
        "_contrast_kernel": Limits(registers=128, shared=0, wide_loads=2, rows=("audio", "text", "high")),
        "_merge_kernel": Limits(registers=128, shared=0, rows=("partial",)),
    }
    seen = set()
    for i, setting in enumerate(settings):
        for name, (kernel, arguments) in no_logits_launches(setting, sm).items():
            # Of a pointer the compiler sees the dtype, of a size only whether 16 divides it.
            identity = (name, *((k, v.dtype if isinstance(v, torch.Tensor) else v) for k, v in sorted(arguments.items())))
            if identity not in seen:
                seen.add(identity)
                label = f"{name.strip('_').removesuffix('_kernel')}: {_label(setting, NO_LOGITS_MAIN)}"
                quick = sm == 90 and i < len(NO_LOGITS_QUICK)
                yield Configuration(label, kernel, arguments, limits[name], quick)


SURVIVORS_FACTORS: dict[str, Sequence] = {
    "dtypes": list(NO_LOGITS_DTYPES),
    "logits": ["float32", "bfloat16"],
    "softcap": [None, 30.0],
    "bias": [False, True],
    "vocab": [128256, 50257],
}
SURVIVORS_MAIN = {name: values[0] for name, values in SURVIVORS_FACTORS.items()}


def survivors_configurations(sm: int) -> Iterator[Configuration]:
    """z_text under the plausibility mask, computed only where a token survives."""
    from kdkernels.ops import triton_survivors
    from kdkernels.ops.rows import RowSpec

    settings = [SURVIVORS_MAIN]
    settings += [x for x in covering_array(SURVIVORS_FACTORS, lambda _: True, strength=2) if x not in settings]
    limits = Limits(registers=255, shared=MACHINES[sm][1], wide_loads=2, rows=("text", "weight", "logits"))
    for i, setting in enumerate(settings):
        hidden, weight = NO_LOGITS_DTYPES[setting["dtypes"]]
        vocab = setting["vocab"]
        with recorded(triton_survivors, _device_limits=lambda device: _device_limits(sm)) as launches:
            triton_survivors.contrast_at_survivors(
                _meta(1408, vocab, dtype=setting["logits"]),
                _meta(1408, 4096, dtype=hidden),
                _meta(vocab, 4096, dtype=weight),
                _meta(vocab, dtype=weight) if setting["bias"] else None,
                _meta(1408, dtype="int64"),
                _meta(1408),
                RowSpec(vocab=vocab, plausibility=0.1, teacher_softcap=setting["softcap"]),
            )
        yield Configuration(_label(setting, SURVIVORS_MAIN), *launches[0], limits, quick=sm == 90 and i == 0)


LAYER_FACTORS: dict[str, Sequence] = {
    "dtypes": ["bfloat16", "float16", "float32"],
    "width": [4096, 576, 3584, 16384],
    "text": [True, False],
    "normalize": [False, True],
    "grads": ["u", "v", "both", "none"],
}
LAYER_MAIN = {name: values[0] for name, values in LAYER_FACTORS.items()}


def layer_configurations(sm: int) -> Iterator[Configuration]:
    """The layer MSE. A program keeps its row in registers."""
    from kdkernels.ops import triton_layers

    settings = [LAYER_MAIN]
    settings += [x for x in covering_array(LAYER_FACTORS, lambda _: True, strength=2) if x not in settings]
    for i, setting in enumerate(settings):
        u, v, text, grad_u, grad_v = (_meta(8192, setting["width"], dtype=setting["dtypes"]) for _ in range(5))
        with recorded(triton_layers) as launches:
            triton_layers.layer_rows(
                u,
                v,
                text if setting["text"] else None,
                _meta(8192, dtype="bool"),
                _meta(8192),
                _meta(8192),
                normalize=setting["normalize"],
                grad_u=grad_u if setting["grads"] in ("u", "both") else None,
                grad_v=grad_v if setting["grads"] in ("v", "both") else None,
            )
        rows = ["u", "v", *(["text"] if setting["text"] else [])]
        rows += [f"grad_{x}" for x in "uv" if setting["grads"] in (x, "both")]
        limits = Limits(
            registers=128 if setting["width"] < 8192 else 255,
            shared=4096,
            wide_loads=2 + setting["text"],
            narrow_loads=3,  # valid, alpha, the coefficient
            wide_stores=len([x for x in rows if x.startswith("grad")]),
            rows=tuple(rows),
        )
        yield Configuration(_label(setting, LAYER_MAIN), *launches[0], limits, quick=sm == 90 and i == 0)


MIX_FACTORS: dict[str, Sequence] = {
    "dtypes": ["float32", "bfloat16", "float16"],
    "divergence": ["forward_kl", "reverse_kl"],
    "teacher": ["last", "first", "between"],
    "text": [False, True],
    "softcap": [None, 30.0],
    "plausibility": [None, 0.1],
    "vocab": [128256, 50257],
}
MIX_MAIN = {name: values[0] for name, values in MIX_FACTORS.items()}
MIX_QUICK = [{}, {"teacher": "first"}, {"divergence": "reverse_kl"}, {"vocab": PADDED_VOCAB}]


def mix_configurations(sm: int) -> Iterator[Configuration]:
    """Adds one of several teachers to the mixture."""
    from kdkernels.ops import triton_mixture
    from kdkernels.ops.rows import RowSpec

    settings = [{**MIX_MAIN, **changes} for changes in MIX_QUICK]
    settings += [x for x in covering_array(MIX_FACTORS, _legal_rows, strength=2) if x not in settings]
    for i, setting in enumerate(settings):
        shape, n = (1, 1408, row_width(setting["vocab"])), 1408
        spec = RowSpec(
            vocab=setting["vocab"],
            divergence=setting["divergence"],
            plausibility=setting["plausibility"],
            teacher_softcap=setting["softcap"],
        )
        with recorded(triton_mixture) as launches:
            triton_mixture.mix_rows(
                _meta(*shape, dtype=setting["dtypes"]),
                _meta(*shape, dtype=setting["dtypes"]) if setting["text"] else None,
                _meta(n, dtype="int64"),
                _meta(n),
                _meta(n),
                spec,
                _meta(*shape),
                None if setting["teacher"] == "first" else _meta(2, n),
                last=setting["teacher"] == "last",
            )
        aligned = row_width(setting["vocab"]) % 16 == 0
        rows = ("audio", "total", *(["text"] if setting["text"] else []))
        reads = 2 * (1 + setting["text"]) + (setting["teacher"] != "first")
        limits = Limits(
            registers=128,
            shared=4096,  # a group of 8 16-bit logits is stored as float32 in two steps, through shared memory
            wide_loads=reads if aligned else 0,
            narrow_loads=5 if aligned else None,  # target, alpha, share, two sums
            wide_stores=1 if aligned else 0,
            rows=rows,
        )
        yield Configuration(_label(setting, MIX_MAIN), *launches[0], limits, quick=sm == 90 and i < len(MIX_QUICK))


PROJECTED_FACTORS: dict[str, Sequence] = {
    "dtypes": ["bf16 over fp32", "bf16", "fp32"],
    "temperature": [2.0, 1.0, 3.0],
    "terms": ["kd + ce", "kd", "ce"],
    "top_k": [64, 16, 256],
    "grad": [True, False],
    "stats": [False, True],
    "vocab": [128256, 50257],
}
PROJECTED_MAIN = {name: values[0] for name, values in PROJECTED_FACTORS.items()}
PROJECTED_QUICK = [{}, {"dtypes": "bf16"}, {"stats": True}, {"vocab": PADDED_VOCAB}]


def projected_configurations(sm: int) -> Iterator[Configuration]:
    """The student's rows against a projected teacher."""
    from kdkernels.ops import triton_projection
    from kdkernels.ops.projected import Projected
    from kdkernels.ops.rows import RowSpec

    settings = [{**PROJECTED_MAIN, **changes} for changes in PROJECTED_QUICK]
    settings += [x for x in covering_array(PROJECTED_FACTORS, lambda _: True, strength=2) if x not in settings]
    for i, setting in enumerate(settings):
        student, _, grad = ROW_DTYPES[setting["dtypes"]]
        n, k, vocab = 1408, setting["top_k"], setting["vocab"]
        width = row_width(vocab)
        spec = RowSpec(
            vocab=vocab, temperature=setting["temperature"], with_kd="kd" in setting["terms"], with_ce="ce" in setting["terms"]
        )
        of_token = [_meta(n) for _ in range(3)]
        with recorded(triton_projection) as launches:
            triton_projection.projected_rows(
                _meta(1, n, width, dtype=student),
                Projected(_meta(n, k, dtype="int32"), _meta(n, k), _meta(n, 576), *of_token),
                _meta(n),
                _meta(n, dtype="int64"),
                _meta(n),
                _meta(n),
                spec,
                grad=_meta(1, n, width, dtype=grad) if setting["grad"] else None,
                want_stats=setting["stats"],
            )
        aligned = width % 16 == 0
        limits = Limits(
            registers=168 if setting["stats"] or not aligned else 128,
            shared=4096,
            wide_loads=1 + setting["grad"] if aligned else 0,
            narrow_loads=None,  # the likeliest ids, their probabilities and logits
            wide_stores=1 if aligned and setting["grad"] and setting["dtypes"] != "bf16 over fp32" else 0,
            rows=("student", *(["grad"] if setting["grad"] else [])),
        )
        yield Configuration(_label(setting, PROJECTED_MAIN), *launches[0], limits, quick=sm == 90 and i < len(PROJECTED_QUICK))


SHARD_FACTORS: dict[str, Sequence] = {
    "dtypes": ["bf16 over fp32", "bf16", "fp32"],
    "divergence": ["forward_kl", "reverse_kl", "jsd"],
    "temperature": [2.0, 1.0, 3.0],
    "terms": ["kd + ce", "kd", "ce"],
    "text": [False, True],
    "stats": [False, True],
    "softcap": [None, 30.0],
    "plausibility": [None, 0.1],
    "vocab": [64128, 50257],
}
SHARD_MAIN = {name: values[0] for name, values in SHARD_FACTORS.items()}
SHARD_QUICK = [{}, {"dtypes": "bf16"}, {"divergence": "jsd", "text": True}]


def shard_configurations(sm: int) -> Iterator[Configuration]:
    """One rank's slice of rows over several ranks: every kernel that a call launches."""
    from kdkernels.ops import triton_shards
    from kdkernels.ops.rows import RowProblem

    settings = [{**SHARD_MAIN, **changes} for changes in SHARD_QUICK]
    settings += [x for x in covering_array(SHARD_FACTORS, _legal_rows, strength=2) if x not in settings]
    for i, setting in enumerate(settings):
        student, teacher, grad = ROW_DTYPES[setting["dtypes"]]
        n, shape = 1024, (1, 1024, setting["vocab"])
        text = _meta(*shape, dtype=teacher) if setting["text"] else None
        tensors = (_meta(*shape, dtype=student), _meta(*shape, dtype=teacher), text, _meta(n, dtype="int64"))
        own = (*(_meta(n) for _ in range(3)), _spec(setting), _meta(*shape, dtype=grad), setting["stats"])
        with recorded(triton_shards) as launches:
            shard = triton_shards.TritonShard(RowProblem(*tensors, *own), setting["vocab"])
            shard.sums(shard.audio_max() if setting["plausibility"] is not None else None)
            if setting["divergence"] == "jsd":
                shard.jsd_sums(_meta(2, n))
            shard.gradient(_meta(7, n))
        aligned = setting["vocab"] % 16 == 0
        heavy = setting["divergence"] == "jsd" or setting["softcap"] is not None or setting["stats"]
        for kernel, arguments in launches:
            name = kernel.__name__.removeprefix("_shard_").removesuffix("_kernel")
            reads = {"audio": name == "max" or setting["terms"] != "ce" or (name == "sums" and setting["stats"])}
            reads |= {"student": name != "max", "text": reads["audio"] and setting["text"] and name != "max"}
            rows = tuple(x for x, read in reads.items() if read)
            limits = Limits(
                registers=168 if heavy or not aligned else 128,
                shared=2048,
                wide_loads=len(rows) if aligned else 0,
                rows=(*rows, *(["grad"] if name == "gradient" else [])),
            )
            quick = sm == 90 and i < len(SHARD_QUICK)
            yield Configuration(f"{name}: {_label(setting, SHARD_MAIN)}", kernel, arguments, limits, quick)


SUMMED_FACTORS: dict[str, Sequence] = {
    "dtypes": ["bf16", "bf16 over fp32"],
    "temperature": [2.0, 1.0, 3.0],
    "terms": ["kd + ce", "kd", "ce"],
    "text": [True, False],
    "softcap": [None, 30.0],
    "bias": [False, True],
    "vocab": [128256, 50257],
}
SUMMED_MAIN = {name: values[0] for name, values in SUMMED_FACTORS.items()}
SUMMED_QUICK = [{}, {"dtypes": "bf16 over fp32"}, {"temperature": 1.0}]


def summed_launches(setting: dict, sm: int, *, tokens: int = 1408) -> list[tuple[triton.JITFunction, dict]]:
    """The launches of a chunk whose GEMMs leave the rows' sums, on the device that stands for `sm`."""
    from kdkernels.ops import triton_gemm_sums
    from kdkernels.ops.gemm import gradient_view
    from kdkernels.ops.rows import LinearTensors, RowSpec

    vocab, logits = setting["vocab"], ROW_DTYPES[setting["dtypes"]][0]
    dtype = getattr(torch, logits)
    spec = RowSpec(
        vocab=vocab,
        temperature=setting["temperature"],
        with_kd="kd" in setting["terms"],
        with_ce="ce" in setting["terms"],
        student_softcap=setting["softcap"],
        teacher_softcap=None if setting["text"] else setting["softcap"],
    )
    hidden, teacher = (_meta(tokens, width, dtype="bfloat16") for width in (3072, 4096))
    weight, teacher_weight = (_meta(vocab, width, dtype="bfloat16") for width in (3072, 4096))
    bias, n = _meta(vocab, dtype="bfloat16") if setting["bias"] else None, _meta(tokens)
    heads = LinearTensors(hidden, weight, bias, teacher, teacher if setting["text"] else None, teacher_weight, bias)
    with recorded(triton_gemm_sums, _device_limits=lambda device: _device_limits(sm)) as launches:
        sums = triton_gemm_sums.summed_rows(heads, spec, dtype, with_ce=spec.with_ce, want_stats=False)
        student, audio = (_meta(tokens, vocab, dtype=logits) for _ in range(2))
        sums.student(hidden, weight, bias, student)
        if spec.with_kd:
            summands = 1 + (setting["text"] and dtype == torch.float32)
            sums.teacher(*(teacher, teacher_weight, bias, audio), *[teacher] * (summands - 1))
        grad = gradient_view(student, torch.bfloat16)
        rows = (student[None], audio[None], None, _meta(tokens, dtype="int64"), n, n, n, spec)
        sums.rows(*rows, grad=grad[None])
    return launches


def summed_configurations(sm: int) -> Iterator[Configuration]:
    """GEMMs that leave the rows' sums, and the row kernel that reads once: each distinct one that a chunk launches."""
    settings = [{**SUMMED_MAIN, **changes} for changes in SUMMED_QUICK]
    settings += [x for x in covering_array(SUMMED_FACTORS, lambda _: True, strength=2) if x not in settings]
    seen = set()
    for i, setting in enumerate(settings):
        aligned = setting["vocab"] % 16 == 0
        for kernel, arguments in summed_launches(setting, sm):
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            if name == "one_read":
                label, teacher = name, setting["terms"] != "ce"
                limits = Limits(
                    registers=128 if aligned and setting["softcap"] is None else 168,
                    shared=2048,
                    wide_loads=1 + teacher if aligned else 0,
                    wide_stores=1 if aligned and setting["dtypes"] == "bf16" else 0,
                    rows=("student", *(["teacher"] if teacher else []), "grad", "student_sums"),
                )
            else:
                label = f"gemm of {'student' if arguments['WITH_UNIT'] or setting['terms'] == 'ce' else 'teacher'}"
                bulk = arguments["BULK"]
                limits = Limits(
                    registers=255,
                    shared=MACHINES[sm][1],
                    wide_loads=2,
                    rows=("sums", *(() if bulk else ("hidden", "weight", "logits"))),
                )
            values = {k: v.base if isinstance(v, TensorDescriptor) else v for k, v in arguments.items()}
            identity = (name, *((k, v.dtype if isinstance(v, torch.Tensor) else v) for k, v in sorted(values.items())))
            if identity not in seen:
                seen.add(identity)
                quick = sm == 90 and i < len(SUMMED_QUICK)
                yield Configuration(f"{label}: {_label(setting, SUMMED_MAIN)}", kernel, arguments, limits, quick)


# kernel's name in the table -> its configurations on a compute capability. A new kernel gets a line here.
Registry = dict[str, Callable[[int], Iterable[Configuration]]]
REGISTRY: Registry = {
    "caad_rows": row_configurations,
    "scale_rows": scale_configurations,
    "no_logits": no_logits_configurations,
    "survivors": survivors_configurations,
    "layer_rows": layer_configurations,
    "mix_rows": mix_configurations,
    "projected_rows": projected_configurations,
    "shard_rows": shard_configurations,
    "gemm_sums": summed_configurations,
}
