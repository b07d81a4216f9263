"""Whether a cache of projections fits a student and the options of its loss: asked before a run, with all that differs."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..head_layers import head_module
from ..lm_head import LMHead
from ..projection import head_fingerprint
from ..projection_cache import ProjectionCache
from .options import CAADOptions

__all__ = ["OF_THE_PROJECTED_LOSS", "check_projections"]

OF_THE_PROJECTED_LOSS = ("kd_weight", "chunk_tokens", "workspace_bytes", "logits_dtype", "impl")


def check_projections(
    cache: ProjectionCache, student: nn.Module, options: CAADOptions, *, softcap: float | None, logit_scale: float
) -> None:
    """Raises ValueError unless the projections serve this student with these options, or TypeError for a head with a LoRA.

    Every rank calls it: it gathers a head that ZeRO-3 has partitioned.
    """
    if any(p.requires_grad for p in head_module(student).parameters()):
        raise ValueError("model: expected a frozen LM head with a ProjectionCache, got one that trains; use a ContrastCache")
    if softcap is not None:
        raise ValueError(f"model: expected no softcap of its logits with a ProjectionCache, got {softcap}")
    for name, wanted in (("divergence", "forward_kl"), ("alpha_ramp_steps", 0), ("round_contrast", False)):
        if (got := getattr(options, name)) != wanted:
            raise ValueError(f"options.{name}: expected {wanted!r} with a ProjectionCache, got {got!r}")
    made_for = cache.settings
    if made_for.contrast == "none":
        options.refuse_alpha()
    head = LMHead.from_model(student, gather=True, probe=False)
    cache.check(
        dataclasses.replace(
            made_for,
            student_fingerprint=head_fingerprint(head.weight, head.bias),
            vocab_size=options.vocab_size or made_for.vocab_size,
            alpha=0.0 if made_for.contrast == "none" else options.alpha_at(1),
            temperature=options.temperature,
            plausibility=options.plausibility,
            student_logit_scale=logit_scale,
            contrast="none" if made_for.contrast == "none" else "paths",
        )
    )
