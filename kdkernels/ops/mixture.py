"""The mixture problem: several teachers' rows become one row of logits that the row kernel distils from.

With omega_k >= 0 a teacher's weight at a token, W their sum, share_k = omega_k / W:

    forward_kl   sum_k omega_k KL(p_k || q) = W (KL(p || q) + H(p) - sum_k share_k H(p_k)),      p = sum_k share_k p_k
    reverse_kl   sum_k omega_k KL(q || p_k) = W (KL(q || g) + sum_k share_k lse(z_k / tau) - lse(z / tau)),
                                              z = sum_k share_k z_k,  g = softmax(z / tau)

So K teachers need one gradient, and only the mixture is stored: z itself, or tau log p. The Jensen-Shannon divergence has no such
form.

Legend: C tokens of a chunk, V = ``spec.vocab`` valid ids.

Each backend (``native``, ``triton_mixture``) offers one function, called for one teacher after the other::

    mix_rows(audio, text, target, alpha, share, spec, total, sums, *, last) -> sums

    audio, text, target, alpha   a teacher's rows (1, C, V) as in :mod:`kdkernels.ops.rows`
    share     (C,) float32. Where it is 0 the teacher is not read. A row that is masked throughout counts as share 0.
    spec      RowSpec: how the logits are read, the temperature, and the divergence (forward_kl or reverse_kl) that is mixed for
    total     (1, C, V) float32: the sum so far; with ``last`` it becomes the mixture's logits, -inf where the probability is 0
    sums      None at the first teacher (``total`` is written, not read), then what the call before returned: (2, C)
              [0]  mass: the shares that counted, 1 but for masked rows, or 0
              [1]  with ``last`` the rest of the divergence: sum_k share_k D(p_k, q) = mass D(mixture, q) + rest

Rows whose target is ``ignore_index`` are not read; of theirs, ``total`` is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from . import native
from .dispatch import load_triton

MERGEABLE = ("forward_kl", "reverse_kl")


def mix_launcher(impl: str) -> Callable:
    """The ``mix_rows`` function of a kernel implementation. The CUDA C++ part has none and uses Triton's."""
    if impl == "cpu":
        return native.mix_rows
    return load_triton("triton_mixture", "mix_rows", "a loss of several teachers on a CUDA device")


def gradient_passes(divergences: Sequence[str]) -> list[list[int]]:
    """Indices of the teachers that share a gradient, in the order in which they are computed: the mixtures first."""
    merged = [[i for i, d in enumerate(divergences) if d == kind] for kind in MERGEABLE]
    mixtures = [group for group in merged if len(group) > 1]
    mixed = set(chain(*mixtures))
    return mixtures + [[i] for i in range(len(divergences)) if i not in mixed]
