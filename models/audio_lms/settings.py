"""How an audio LM is loaded and what trains of it: the words that recipes and commands share."""

from __future__ import annotations

from dataclasses import dataclass

TRAINS = ("full", "lora", "connector")
# The path without the audio: features of zeros, features of a silent clip, or a prompt without the clip.
NEGATIVES = ("zeros", "silence", "absent")
FORMULAS = ("extrapolate", "authors")  # of contrastive decoding, see kdkernels.contrast_logits
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Lora:
    """Settings of a LoRA; see PEFT's LoraConfig."""

    r: int = 16  # rank of the LoRA
    alpha: float = 32.0  # its product is scaled by alpha / r
    dropout: float = 0.0  # probability of dropout on its input
    targets: tuple[str, ...] = ()  # ends of module names, such as [q_proj,v_proj]; [] = attention and MLP of the language model

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r: expected at least 1, got {self.r}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha: expected a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout: expected a number in [0, 1), got {self.dropout}")
