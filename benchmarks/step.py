"""Times a training step for each set of teachers: each teacher's forward, and the rest of the step. `python -m benchmarks.step`

The loop of models/training/loop.py runs on SmolLM2-135M's shapes with random weights: a student of ten layers and a teacher of
thirty. It takes 16 prompts of the built-in form, and only the connector trains. One forward of each teacher is timed by itself.
The rest of the step is timed for each set of sources: the student's forward, the loss over all sources, layers, backward,
AdamW. `overhead` is how much longer the rest takes than with one teacher. Every teacher's LM head is part of that teacher's
forward, but the loss multiplies it, so it counts in the rest. `heads_ms` is what these products take by themselves, and
`overhead_beyond_heads` leaves them out.

First the losses are checked: with several sources the loss must be the sum of the losses of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from models.arguments import Collect

from .common import benchmark_parser, finish, time_calls, time_columns

# label -> objective, sources, layers compared
SYSTEMS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "KD, one teacher": ("kd", (), False),
    "CAAD, one teacher": ("caad", (), False),
    "text": ("sources", ("text",), False),
    "text, all layers": ("sources", ("text",), True),
    "text + acoustic": ("sources", ("text", "acoustic"), False),
    "text + acoustic, all layers": ("sources", ("text", "acoustic"), True),
    "CAAD + text + acoustic": ("caad", ("text", "acoustic"), False),
    "CAAD + text + acoustic, all layers": ("caad", ("text", "acoustic"), True),
}
BASELINE = "KD, one teacher"


class Store:
    """Random features instead of an encoder's."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape

    def rows(self, examples: Sequence[Any]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(examples), *self.shape, generator=generator)


class StepCase:
    """Models, a batch, and every teacher's states for it.

    Args:
        layers: of the student and of the teachers.
        config: changes to SmolLM2-135M's LlamaConfig (tests make it tiny).
        teacher_config: more changes to the teachers' own; only for steps with the objective's own teacher alone.
        answer: the text of each answer; None = a short sentence.
        bf16_products: bodies on the CPU multiply in bfloat16, as with model.bf16_products. The heads stay in float32.
    """

    def __init__(
        self,
        examples: int,
        device: torch.device,
        *,
        layers: tuple[int, int] = (10, 30),
        config: dict[str, int] | None = None,
        teacher_config: dict[str, int] | None = None,
        answer: str | None = None,
        bf16_products: bool = False,
    ) -> None:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        from models.data.manifest import Example
        from models.data.prompts import TASKS
        from models.experiments.shared_steps import make_tiny_backbones
        from models.io_utils import cache_dir
        from models.speech_lm.frozen_linear import use_bf16_products
        from models.speech_lm.model import SpeechLM, SpeechLMConfig
        from models.training.training_data import make_training_data

        self.device = device
        # The smoke run's byte-level tokenizer needs no download and gives prompts of about 120 tokens.
        folder = make_tiny_backbones(cache_dir() / "demo" / "tiny-backbones") / "lm"
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        sizes = {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048, **(config or {}),
        }  # fmt: skip

        def causal_lm(depth: int, more: dict[str, int] | None = None) -> torch.nn.Module:
            torch.manual_seed(depth)
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **{**sizes, **(more or {})})).eval()

        settings = SpeechLMConfig(lm="random", encoder="random", encoder_dim=384)
        bodies = (causal_lm(layers[0]), causal_lm(layers[1], teacher_config))
        self.student, self.teacher = (SpeechLM(settings, lm=lm, tokenizer=tokenizer).to(device) for lm in bodies)
        self.text_lm = causal_lm(layers[1]).to(device)
        task = TASKS["gender"]
        made = [
            Example(
                id=f"e{i}", audio=f"{i}.wav", task="gender", transcription="Where are you going so late?", question=task.question,
                choices=task.choices, answer=task.choices[i % 2],
                target=answer or task.statement.format(task.choices[i % 2]),
                metadata={"gender": task.choices[i % 2], "text": "Where are you going so late?"},
            )
            for i in range(examples)
        ]  # fmt: skip
        shape = self.student.connector.config
        store = Store((shape.num_feature_layers, shape.num_frames, shape.feature_dim))
        for model in (self.student, self.teacher):
            model.fit_feature_statistics(store.rows(made))
            if bf16_products:
                use_bf16_products(model.lm.get_decoder())
        self.examples = made
        self.data = make_training_data(self.student, made, store)
        self.teacher_data = make_training_data(self.teacher.requires_grad_(False), made, store)
        self.store = store
        self.batch = self.data.make_batch(made)

    def tokens_run(self, model: Any, *, cached: bool) -> int:
        """How many tokens of the batch `model` runs through its layers. Padding and cached text before the audio do not count."""
        from models.speech_lm.collation import crop_to_targets

        collator = model.make_collator()
        batch = crop_to_targets(collator(self.examples, self.store.rows(self.examples)))
        prefixes = sum(len(collator.prefix_ids(example)) for example in self.examples) if cached else 0
        return int(batch.attention_mask.sum()) - prefixes

    def sources(self, objective: str, names: Sequence[str], layers: bool) -> tuple[Any, list[Any]]:
        """The recipe and its sources, built as in models/training/build_sources.py, but without loading models."""
        from models.training.build_sources import OWN_TEACHER
        from models.training.layer_distillation import LayerDistillation
        from models.training.recipe_files import load_recipe
        from models.training.recipe_sections import LayersConfig, SourceConfig
        from models.training.teachers import ListeningTeacher, LiveTeacher, Source, snapshot
        from models.training.text_teacher import TextTeacher
        from models.training.training_data import make_training_data

        compared = {"weight": 0.3, "normalize": True} if layers else {}
        words = [f"objective={objective}", "loss.ce_background_weight=0"]
        words += ["teacher.folder=x"] if objective != "sources" else []
        words += [f"sources.{name}.role={name}" for name in names]
        words += [f"sources.{name}.folder=x" for name in names if name == "text"]
        keys = ["layers"] * (objective != "sources") + [f"sources.{name}.layers" for name in names]
        words += [f"{key}.{k}={str(v).lower()}" for key in keys for k, v in compared.items()]
        recipe = load_recipe("sft", words)
        depths = {role: len(lm.model.layers) for role, lm in (("student", self.student.lm), ("teacher", self.teacher.lm))}
        depths["acoustic"] = depths["student"]
        width = self.student.get_output_embeddings().weight.shape[1]
        made = []
        for name in [OWN_TEACHER] * recipe.needs_teacher + list(names):
            chosen = None
            if layers:
                pair = (depths["student"], depths["acoustic" if name == "acoustic" else "teacher"])
                settings = LayersConfig(**compared)
                chosen = LayerDistillation.build(settings, depths=pair, widths=(width, width)).to(self.device)
            options = {"device": self.device, "layers": chosen.teacher_layers if chosen else ()}
            if name == OWN_TEACHER:
                kind = LiveTeacher if objective == "caad" else ListeningTeacher
                teacher: Any = kind(self.teacher, self.teacher_data, **options)
            elif name == "text":
                collator = self.student.make_collator()
                options |= {"target_ids": collator.target_ids, "end_ids": self.student.end_ids}
                teacher = TextTeacher(self.text_lm, collator.tokenizer, **options)
            else:
                lm = snapshot(self.student)
                teacher = ListeningTeacher(lm, make_training_data(lm, self.examples, self.store), **options)
            own = SourceConfig(role="audio", folder="x", alpha=recipe.loss.alpha)
            made.append(Source(name, recipe.sources.get(name, own), teacher, chosen))
        return recipe, made

    def head_product(self, recipe: Any, source: Any) -> Any:
        """A call that multiplies the states that the loss reads with this teacher's LM head."""
        from models.training.objective import counted_positions

        states = source.teacher(self.batch, self.examples)
        positions = counted_positions(recipe, self.batch)
        hidden = (states if positions is None else states.at(positions)).audio_hidden  # both paths take one product
        weight, scratch = states.head.weight, hidden.new_empty(len(hidden), len(states.head.weight))
        return lambda: torch.mm(hidden, weight.T, out=scratch)

    def rest(self, recipe: Any, sources: Sequence[Any]) -> Any:
        """A call that does the part of a step after the teachers' forwards. It returns the loss."""
        from models.training.objective import counted_positions, objective_loss, select_positions, token_weights

        states = {source.name: source.teacher(self.batch, self.examples) for source in sources}
        batch, states = select_positions(self.batch, states, counted_positions(recipe, self.batch))
        batch = self.data.crop(batch).to(self.device)
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        compared = {source.name: source.layers for source in sources if source.layers is not None}
        layers = sorted({layer for each in compared.values() for layer in each.student_layers})

        def run() -> torch.Tensor:
            weights = token_weights(recipe.loss, batch, states.get("teacher"))
            inputs = self.data.model_inputs(batch)
            optimizer.zero_grad(set_to_none=True)
            taken = self.student.hidden_states_at(batch.target_index, **inputs, **({"layers": layers} if layers else {}))
            hidden, *by_layer = taken.unbind(1) if layers else (taken,)
            loss, _ = objective_loss(
                recipe, 1, self.student, hidden, batch.target, states, weights, weights.kd.sum(), weights.ce.sum(), False
            )
            for name, each in compared.items():
                found = dict(zip(layers, by_layer, strict=True))
                counts = weights.kd > 0
                loss = loss + each.settings.weight * each.loss(found, states[name], counts, counts.sum())
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run


def check_sum(case: StepCase) -> float:
    """Relative difference between the KD of several sources and the sum of the KD of each. CE is left out."""
    together = None
    parts = 0.0
    for names in (("text", "acoustic"), ("text",), ("acoustic",)):
        recipe, sources = case.sources("sources", names, False)
        recipe = dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, kd_weight=1.0))
        loss = float(case.rest(recipe, sources)())
        if together is None:
            together = loss
        else:
            parts += loss
    return abs(together - parts) / abs(parts)


def measure(case: StepCase, repeats: int, systems: Sequence[str] = tuple(SYSTEMS)) -> list[dict]:
    """A row for each system. The BASELINE comes first."""
    if (difference := check_sum(case)) > 1e-4:
        raise SystemExit(f"several sources: expected the sum of their losses, got a relative difference of {difference:.1e}")
    built = {label: case.sources(*system) for label, system in SYSTEMS.items() if label in (BASELINE, *systems)}
    rests = {label: case.rest(recipe, sources) for label, (recipe, sources) in built.items()}
    forwards = {
        f"{label}: {source.name}": (lambda source=source: source.teacher(case.batch, case.examples))
        for label, (_, sources) in built.items()
        for source in sources
    }
    heads = {
        f"{label}: {source.name} head": case.head_product(recipe, source)
        for label, (recipe, sources) in built.items()
        for source in sources
    }
    timings = time_calls({**rests, **forwards, **heads}, repeats=repeats, device=case.device, warmup=1)

    def beyond_heads(label: str) -> float:
        products = sum(timings[f"{label}: {source.name} head"].median for source in built[label][1])
        return timings[label].median - products

    rows = []
    for label, (_, sources) in built.items():
        teachers = {source.name: timings[f"{label}: {source.name}"].median for source in sources}
        rest = timings[label].median
        rows.append(
            {
                "system": label,
                "teachers": len(sources),
                "examples": len(case.examples),
                **time_columns(timings[label]),
                "own_teacher_ms": 1e3 * teachers.get("teacher", float("nan")),
                "text_teacher_ms": 1e3 * teachers.get("text", float("nan")),
                "acoustic_teacher_ms": 1e3 * teachers.get("acoustic", float("nan")),
                "step_ms": 1e3 * (rest + sum(teachers.values())),
                "heads_ms": 1e3 * (rest - beyond_heads(label)),
                "overhead": rest / timings[BASELINE].median - 1,
                "overhead_beyond_heads": beyond_heads(label) / beyond_heads(BASELINE) - 1,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("step", __doc__, repeats=7)
    parser.add_argument("--examples", type=int, default=16, help="examples in a batch")
    parser.add_argument(
        "--systems", nargs="+", action=Collect, choices=list(SYSTEMS), default=list(SYSTEMS), help="systems beside the baseline"
    )
    args = parser.parse_args(argv)
    case = StepCase(args.examples, torch.device(args.device))
    title = "a training step; time_ms has all of it but the teachers' forwards"
    finish(args, "step", title, measure(case, args.repeats, args.systems))


if __name__ == "__main__":
    main()
