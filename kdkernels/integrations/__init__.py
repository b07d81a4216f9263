"""kdkernels inside training loops of other libraries. Each integration imports its library when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .options import CAADOptions

if TYPE_CHECKING:
    from .checkpoints import CheckpointLoading
    from .loss_hook import CAADLossMixin
    from .on_policy import OnPolicy
    from .trainer import CAADTrainer

__all__ = ["CAADLossMixin", "CAADOptions", "CAADTrainer", "CheckpointLoading", "OnPolicy"]

_LAZY = {
    "CAADTrainer": ".trainer",
    "CheckpointLoading": ".checkpoints",
    "CAADLossMixin": ".loss_hook",
    "OnPolicy": ".on_policy",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(importlib.import_module(_LAZY[name], __name__), name)
        except ImportError as error:
            raise ImportError(
                f"{name} needs transformers and accelerate, which could not be imported: {error}. Install them with "
                "`pip install '.[train]'` in the checkout of kdkernels, or with `pip install 'transformers>=5.22,<6' accelerate`."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
