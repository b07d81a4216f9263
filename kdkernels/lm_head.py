"""The LM head: what turns hidden states into logits, and how to take its input without running it.

Legend: B rows, L columns, N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head_capture import logit_post
from .head_checks import check_linear, refuse_hooks
from .head_layers import gathered, head_module, head_parameters
from .model_modes import hearing


@dataclass(frozen=True, eq=False)
class LMHead:
    """What turns a hidden state into logits, as `fused_linear_caad_loss` takes it.

        z = logit_scale * (hidden @ weight^T + bias);   z = softcap * tanh(z / softcap)   where softcap is given

    Attributes:
        weight: (V, H), detached; shares the model's memory (except a merged LoRA, which is a copy).
        bias: (V,) or None.
        softcap: Gemma's final_logit_softcapping, or None.
        logit_scale: Cohere's logit_scale, 1 / logits_scaling for Granite; 1.0 for most models.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight: expected shape (V, H), got {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({self.weight.shape[0]},), got {tuple(self.bias.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: expected a positive number or None, got {self.softcap}")
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale: expected a positive number, got {self.logit_scale}")

    @classmethod
    def from_model(
        cls, model: nn.Module, *, merge_lora: bool = False, gather: bool = False, probe: bool = True
    ) -> LMHead:
        """Reads weight, bias, soft cap and scale from a model.

        The numbers in a config do not always say what the model does: Granite divides by `logits_scaling`, HyperCLOVA X
        multiplies by it, Granite Speech ignores it.  So if the config has a soft cap or a scale, the model runs one forward of
        a single token whose head returns known numbers. Its output shows what it does to logits.  If that forward cannot run,
        the config counts, with the meaning that transformers usually gives it.

        Args:
            model: any module with `get_output_embeddings()`.
            merge_lora: True merges a LoRA on the head into a copy of its weight; False raises TypeError for it.
            gather: True gathers a sharded head (DTensor of FSDP2 or tensor parallelism, DeepSpeed ZeRO-3) into a whole copy on
                every rank. Then every rank has to make the call. False raises an error for a sharded head.
            probe: False reads the config alone and runs nothing.

        Raises:
            TypeError: the head is no plain linear layer in floating point: it is quantised, sharded, adapted or absent, or its
                forward computes something else. Or a hook on it would get logits.
            ValueError: its weight is not in this process (FSDP / ZeRO-3 shards, offloaded to the meta device).
        """
        head = head_module(model)
        refuse_hooks(head)
        with hearing(model):
            with gathered(*head.parameters(), enabled=gather) as copies:
                weight, bias = head_parameters(head, merge_lora=merge_lora, gather=gather)
                check_linear(head, weight, bias, partitioned=bool(copies))
                if copies:
                    weight, bias = weight.clone(), None if bias is None else bias.clone()
            softcap, scale = logit_post(model, device=weight.device, probe=probe)
        return cls(weight, bias, softcap, scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V), in the weight's dtype.  For checks and small decoders: it builds the logits."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self.post(logits)

    def post(self, logits: Tensor) -> Tensor:
        """Scale and soft cap, applied to the head's raw output of any shape."""
        return apply_post(logits, self.softcap, self.logit_scale)

    def to(self, device: torch.device | str) -> LMHead:
        """The same head on another device. If it is there already, it shares memory."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)

    def keywords(self, side: str) -> dict[str, Any]:
        """The keywords of `fused_linear_caad_loss` for this head; side is "teacher" or "student"."""
        if side not in ("teacher", "student"):
            raise ValueError(f"side: expected 'teacher' or 'student', got {side!r}")
        return {
            f"{side}_weight": self.weight,
            f"{side}_bias": self.bias,
            f"{side}_softcap": self.softcap,
            f"{side}_logit_scale": self.logit_scale,
        }


def apply_post(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Scale and soft cap of raw logits."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
