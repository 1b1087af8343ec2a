"""Trust ratios in plain Python floats: the equations of `reference.trust_ratios`.

For norms that are already on the host a ratio costs a third of a microsecond; with 0-dim tensors it
would cost a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..options import Options


class Rates(NamedTuple):
    """The factors in the updates of tensors that share options.

    v ← μv + factor·(±g + decay·w), w ← w − out·v. Without a buffer (μ = 0) `out` is 1.
    """

    ratios: list[float]
    decays: list[float]
    factors: list[float]
    out: float


def trust_ratios(
    w_norms: Sequence[float], norms: Sequence[float], o: Options, lr: float
) -> tuple[list[float], list[float]]:
    """The trust ratios q of tensors, and the decay left in their d.

    Args:
        w_norms: N(w) of each.
        norms: N(g) of each, or N(d) with denominator="decayed".
        o: their shared options.
        lr: γ as a number.
    """
    n, decay = len(w_norms), o.weight_decay
    if not o.adapt:
        return [1.0] * n, [decay] * n
    trust, eps, share = o.trust_coefficient, o.eps, decay if o.denominator == "sum" else 0.0
    pairs = list(zip(w_norms, norms, strict=True))
    if 0.0 not in w_norms and 0.0 not in norms:
        ratios = [trust * w / (x + share * w + eps) for w, x in pairs]
        decays = [decay] * n
    else:
        ratios = [trust * w / (x + share * w + eps) if w and x else 1.0 for w, x in pairs]
        raw = decay if o.decay_zero_norm else 0.0
        decays = [decay if w and x else raw for w, x in pairs]
    if o.trust_clip:
        # The limit as lr goes to 0 is 1. Where the tensor is not adapted, q is not clipped.
        ratios = [
            q if not (w and x) else 1.0 if not lr or q / lr > 1 else q / lr
            for q, (w, x) in zip(ratios, pairs, strict=True)
        ]
    return ratios, decays


def rates_of(
    w_norms: Sequence[float], norms: Sequence[float], o: Options, lr: float,
    first: Sequence[bool], has_buffer: bool,
) -> Rates:  # fmt: skip
    """The factors of updates that share options. `first`: whether it is the tensor's first step."""
    ratios, decays = trust_ratios(w_norms, norms, o, lr)
    inside = o.lr_in_momentum or not has_buffer
    whole = lr if inside else 1.0
    kept = whole * (1.0 - o.dampening) if has_buffer else whole
    if kept == whole:
        factors = [q * whole for q in ratios]
    else:
        factors = [q * (whole if f else kept) for q, f in zip(ratios, first, strict=True)]
    return Rates(ratios, decays, factors, 1.0 if inside else lr)
