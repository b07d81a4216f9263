"""Models whose weights somebody else has placed: several devices, or elsewhere between forwards."""

from __future__ import annotations

from torch import nn

__all__ = ["is_placed"]


def is_placed(model: nn.Module) -> bool:
    """Whether `.to()` has to leave the model alone: a device_map, hooks of accelerate, or weights on the meta device."""
    if any(hasattr(m, "_hf_hook") or getattr(m, "hf_device_map", None) is not None for m in model.modules()):
        return True
    return any(p.is_meta for p in model.parameters())
