"""kdkernels: fused losses for distilling large speech language models into small ones.

``from kdkernels import fused_caad_loss`` needs torch alone; Triton, the native CPU library and transformers load when first
needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .caad import CAADLoss, CAADStats, fused_caad_loss, fused_linear_caad_loss
from .ops.explain import explain

if TYPE_CHECKING:
    from .alpha import adaptive_alpha
    from .contrast_cache import ContrastCache, ContrastCacheWriter
    from .decoding import contrast_logits, contrastive_generate
    from .head_loss import HeadLoss
    from .integrations import CAADOptions, CAADTrainer, OnPolicy
    from .layer_attention import LayerAttention
    from .layer_mse import LayerProjections, fused_layer_mse_loss, layer_map
    from .lm_head import LMHead
    from .multi_teacher import MultiTeacherStats, TeacherSource, fused_linear_multi_teacher_loss
    from .paths import DropKey, MarkAbsent, MaskFeatures
    from .projection import TeacherProjection, fused_linear_projected_loss, project_teacher
    from .projection_cache import ProjectionCache, ProjectionCacheWriter, ProjectionSettings, project_cache
    from .sampling import Sampling
    from .teacher import DualPathTeacher, answer_index

__version__ = "0.2.0"

_LAZY = {
    "CAADOptions": ".integrations",
    "CAADTrainer": ".integrations",
    "ContrastCache": ".contrast_cache",
    "ContrastCacheWriter": ".contrast_cache",
    "DropKey": ".paths",
    "DualPathTeacher": ".teacher",
    "HeadLoss": ".head_loss",
    "LMHead": ".lm_head",
    "LayerAttention": ".layer_attention",
    "LayerProjections": ".layer_mse",
    "MarkAbsent": ".paths",
    "MaskFeatures": ".paths",
    "MultiTeacherStats": ".multi_teacher",
    "OnPolicy": ".integrations",
    "ProjectionCache": ".projection_cache",
    "ProjectionCacheWriter": ".projection_cache",
    "ProjectionSettings": ".projection_cache",
    "Sampling": ".sampling",
    "TeacherProjection": ".projection",
    "TeacherSource": ".multi_teacher",
    "adaptive_alpha": ".alpha",
    "answer_index": ".teacher",
    "contrast_logits": ".decoding",
    "contrastive_generate": ".decoding",
    "fused_layer_mse_loss": ".layer_mse",
    "fused_linear_multi_teacher_loss": ".multi_teacher",
    "fused_linear_projected_loss": ".projection",
    "layer_map": ".layer_mse",
    "project_cache": ".projection_cache",
    "project_teacher": ".projection",
}

__all__ = [
    "CAADLoss",
    "CAADOptions",
    "CAADStats",
    "CAADTrainer",
    "ContrastCache",
    "ContrastCacheWriter",
    "DropKey",
    "DualPathTeacher",
    "HeadLoss",
    "LMHead",
    "LayerAttention",
    "LayerProjections",
    "MarkAbsent",
    "MaskFeatures",
    "MultiTeacherStats",
    "OnPolicy",
    "ProjectionCache",
    "ProjectionCacheWriter",
    "ProjectionSettings",
    "Sampling",
    "TeacherProjection",
    "TeacherSource",
    "adaptive_alpha",
    "answer_index",
    "contrast_logits",
    "contrastive_generate",
    "explain",
    "fused_caad_loss",
    "fused_layer_mse_loss",
    "fused_linear_caad_loss",
    "fused_linear_multi_teacher_loss",
    "fused_linear_projected_loss",
    "layer_map",
    "project_cache",
    "project_teacher",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
