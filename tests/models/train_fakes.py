"""A speech LM of a few hundred weights, its teacher and its data: what the loop is tested with, in milliseconds a step.

Run as a program it is a training run that a test can kill: `python train_fakes.py OUT_DIR OBJECTIVE [key=value ...]`.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from kdkernels.teacher import LMHead
from models.training.build_sources import OWN_TEACHER
from models.training.distributed import Ranks
from models.training.recipe import Recipe
from models.training.recipe_files import load_recipe
from models.training.recipe_sections import SourceConfig
from models.training.teacher_states import TeacherStates
from models.training.teachers import Source
from models.training.train import seed_everything, train
from models.training.training_data import TrainingData

VOCABULARY, WIDTH, FEATURES, TOKENS, EXAMPLES = 23, 8, 5, 4, 40


@dataclass
class FakeBatch:
    ids: list[str]
    audio: torch.Tensor  # (B, F)
    target: torch.Tensor  # (N,)
    target_index: torch.Tensor  # (N,)
    target_row: torch.Tensor  # (N,)
    choice_mask: torch.Tensor  # (N,)

    def to(self, device):
        return self

    def model_inputs(self):
        return {"audio": self.audio, "audio_present": torch.ones(len(self.audio), dtype=torch.bool)}


class FakeLM(torch.nn.Module):
    """Frozen token table and head; one trained linear layer from the features. Position n of row b sees token n - 1."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(TOKENS, WIDTH, generator=generator), requires_grad=False)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
        self.head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.connector = torch.nn.Linear(FEATURES, WIDTH)
        with torch.no_grad():
            self.connector.weight.copy_(torch.randn(WIDTH, FEATURES, generator=generator) * 0.3)
            self.connector.bias.zero_()
        self.dropout = torch.nn.Dropout(0.1)  # draws from torch's generator: resuming has to restore it

    def hidden_states_at(self, index, *, audio, audio_present):
        sound = self.dropout(self.connector(audio * audio_present[:, None]))  # (B, H)
        hidden = torch.tanh(sound[:, None] + self.table)  # (B, TOKENS, H)
        return hidden.reshape(-1, WIDTH)[index]

    def get_output_embeddings(self):
        return self.head

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")


def make_data() -> TrainingData:
    generator = torch.Generator().manual_seed(7)
    examples = [
        SimpleNamespace(
            id=f"clip{i}",
            audio=torch.randn(FEATURES, generator=generator),
            # Targets of unequal length, so that dividing by a part's own count would be wrong.
            target=torch.randint(0, VOCABULARY, (2 + i % 3,), generator=generator),
        )
        for i in range(EXAMPLES)
    ]

    def make_batch(chosen):
        index = [row * TOKENS + n for row, e in enumerate(chosen) for n in range(len(e.target))]
        rows = [row for row, e in enumerate(chosen) for _ in e.target]
        last = [n == len(e.target) - 1 for e in chosen for n in range(len(e.target))]
        return FakeBatch(
            ids=[e.id for e in chosen],
            audio=torch.stack([e.audio for e in chosen]),
            target=torch.cat([e.target for e in chosen]),
            target_index=torch.tensor(index),
            target_row=torch.tensor(rows),
            choice_mask=torch.tensor(last),
        )

    return TrainingData(examples, make_batch)


def make_teacher(data: TrainingData, seed: int = 3):
    lm = FakeLM(seed=seed).eval()
    head = LMHead(lm.head.weight)

    @torch.no_grad()
    def teacher(batch, examples):
        present = torch.ones(len(examples), dtype=torch.bool)
        audio = lm.hidden_states_at(batch.target_index, audio=batch.audio, audio_present=present)
        text = lm.hidden_states_at(batch.target_index, audio=batch.audio, audio_present=~present)
        return TeacherStates(audio, text, head)

    return teacher


def make_sources(recipe: Recipe, data: TrainingData) -> list[Source]:
    """The teachers that `recipe` names, each its own fake."""
    own = {OWN_TEACHER: SourceConfig(role="audio", folder="fake")} if recipe.needs_teacher else {}
    named = {**own, **recipe.sources}
    return [Source(name, each, make_teacher(data, seed=3 + k)) for k, (name, each) in enumerate(named.items())]


def fake_recipe(out_dir, objective: str, *overrides: str) -> Recipe:
    words = [
        f"objective={objective}", f"run.out_dir={out_dir}", "teacher.folder=fake", "optim.steps=20", "optim.warmup_steps=3",
        "optim.learning_rate=0.05", "optim.audio_dropout=0.2", "run.log_every_steps=4", "run.save_every_steps=1000",
        "run.tensorboard=false", "run.progress_bar=false", "run.device=cpu", "loss.impl=reference", *overrides,
        *(["sources.other.role=acoustic"] if objective == "sources" else []),
    ]
    return load_recipe("ce_only", words)


def run(
    out_dir,
    objective: str,
    *overrides: str,
    data: TrainingData | None = None,
    model: FakeLM | None = None,
    ranks: Ranks | None = None,
    identity: dict[str, str] | None = None,
):
    recipe = fake_recipe(out_dir, objective, *overrides)
    seed_everything(recipe.run.seed)
    model, data = model or FakeLM(seed=1), data or make_data()
    sources = make_sources(recipe, data)
    result = train(
        recipe, model=model, data=data, sources=sources, resume_command="RESUME", ranks=ranks, identity=identity
    )
    return result, model


def main() -> int:
    out_dir, objective, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    data = make_data()
    kill_at, number = int(os.environ.get("KILL_AT", 0)), getattr(signal, os.environ.get("KILL_BY", "SIGINT"))
    drawn = [0]

    class Killing(TrainingData):
        def draw(self, cursor, count, *, seed):
            drawn[0] += 1
            mine = os.environ.get("KILL_RANK") in (None, os.environ.get("RANK"))
            if drawn[0] == kill_at and mine:  # in the middle of this step, as a user's Ctrl-C would come
                os.kill(os.getpid(), number)
            return super().draw(cursor, count, seed=seed)

    parallel = next((word.split("=")[1] for word in overrides if word.startswith("run.parallel=")), "none")
    with Ranks.started_by_torchrun(torch.device("cpu"), parallel) as ranks:
        result, _ = run(out_dir, objective, *overrides, data=Killing(data.examples, data.make_batch), ranks=ranks)
    print("threads:", *(name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")))
    return 0 if result.stopped_by is None else 128 + result.stopped_by


if __name__ == "__main__":
    sys.exit(main())
