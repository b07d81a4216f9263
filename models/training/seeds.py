"""Seeds of random generators that a step needs again when the run continues."""

from __future__ import annotations

import random


def seed_of(*parts: int | str) -> int:
    """A seed below 2^63 that depends on `parts` alone."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)
