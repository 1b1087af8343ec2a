"""Tensors without memory of their own: wrapper subclasses, whose elements lie in other tensors.

Kernels need an address, so these use torch operations. Each subclass defines what those do, and not
all support what a step needs: the step is rehearsed on copies, before anything is written or
launched, and compared with the same step of plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..options import Options
from .tensors import Scaling, StepTensors
from .torch_part import TorchPart


def rehearse(tensors: StepTensors, i: int, options: Options, label: Callable[[int], str]) -> None:
    """Raise unless torch operations update the i-th tensor of a step as they update plain ones.

    Raises:
        RuntimeError: naming the tensor.
    """
    one = tensors.select([i])
    kinds = {type(t).__name__ for (t,) in one[:4] if t is not None} - {"Tensor", "Parameter"}
    say = f"{label(i)}: torch operations cannot update it as a {' and '.join(sorted(kinds))}"
    remedy = "give LARS plain tensors"
    try:
        # Far enough that what is lost would be seen: as far as the weights are from 0.
        norms = [float(_plain(t).float().norm()) for t in (one.weights[0], one.grads[0])]
        probe = options._replace(adapt=False, lr=norms[0] / norms[1] if all(norms) else 1.0)
        plain, own = (_step_of_copies(one, copied, probe) for copied in (_plain, _clone))
    except Exception as error:  # whatever a subclass raises
        raise RuntimeError(f"{say} ({type(error).__name__}: {error}); {remedy}") from error
    # The same arithmetic; but a subclass may round what it holds to fewer bits.
    near = torch.allclose(
        own.float(), plain.float(), rtol=1e-2, atol=1e-2 * float(plain.abs().max())
    )
    if plain.numel() and not near:
        raise RuntimeError(f"{say}: the result differs from that of plain tensors; {remedy}")


def _step_of_copies(
    one: StepTensors, copied: Callable[[Tensor], Tensor], options: Options
) -> Tensor:
    """The parameter after a step of copies."""

    def each(column: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else copied(t) for t in column]

    tensors = StepTensors(
        [copied(t) for t in one.weights], [copied(t) for t in one.grads], each(one.buffers),
        each(one.copies), one.masters,
    )  # fmt: skip
    weight = tensors.weights[0]
    part = TorchPart([0], tensors, [0], [options], [True], {})
    part.run(tensors, [0], [options], Scaling(), None, None)
    return _plain(weight)


def _plain(t: Tensor) -> Tensor:
    plain = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    plain.copy_(t.detach())  # what a subclass gives back may be of its own kind
    return plain


def _clone(t: Tensor) -> Tensor:
    return t.detach().clone()
