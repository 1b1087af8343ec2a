"""What `LARS.layer_stats()` and `Monitor` say of one parameter."""

from typing import NamedTuple


class LayerStats(NamedTuple):
    """The last step's measurements for one parameter. Norms are of the whole tensor.

    For a parameter that is sharded across ranks (DTensor) only the norm used by the denominator is
    known: `decayed_norm` is NaN, or `gradient_norm` with denominator="decayed".
    """

    weight_norm: float
    """N(w) before the step."""
    gradient_norm: float
    """N(g), unscaled."""
    decayed_norm: float
    """N(g + βw). A step on a CPU measures it only if the denominator uses it; otherwise it is
    computed on demand from what the step left, to within a hundredth. It is NaN where the norms of
    gradient, weight or momentum show that one was written since: what keeps them (`p.grad.neg_()`),
    or changes them by no more than rounding, goes unseen, and the number may then be wrong. It is
    NaN too where the step left too little of the weights: with momentum 0 or nesterov where γqβ is
    near 1, which takes w away whole; and where steps are so large that rounding hides weights whose
    decay counts.
    """
    trust_ratio: float
    """q; 1 where the tensor is not adapted."""
    effective_lr: float
    """γq."""
