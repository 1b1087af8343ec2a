"""What tests of whole optimizers share: small parameters, their gradients, and twins to compare."""

import pytest
import torch

from lars_fused import LARS

BOTH = [pytest.mark.cpu, pytest.mark.interpret, pytest.mark.gpu]
# The kernels as they were compiled. What the interpreter runs of such a file as well carries its
# marker: a few tests of each subject, and what PTX cannot show (README, "Which tier").
COMPILED = [pytest.mark.cpu, pytest.mark.ptx, pytest.mark.gpu]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Every term of the equations moves the result by more than the tolerance.
STRONG = {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.05}


def make_params(shapes, dtype=torch.float32, device="cpu", seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(device, dtype))
        for s in shapes
    ]


def make_grads(params, step=0, scale=1.0):
    """Gradients that differ from step to step and are laid out as their parameters."""
    grads = []
    for i, p in enumerate(params):
        draw = torch.Generator().manual_seed(1000 * step + i)
        values = torch.randn(p.shape, generator=draw, dtype=torch.float64) * scale
        grads.append(torch.empty_like(p).copy_(values).detach())
    return grads


def set_grads(params, step=0, scale=1.0):
    for p, g in zip(params, make_grads(params, step, scale), strict=True):
        p.grad = g


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def copies(params):
    """The values alone, to compare with later."""
    return [p.detach().clone() for p in params]


def momenta(optimizer, params):
    return [optimizer.state[p].get("momentum_buffer") for p in params]


def same_bits(a, b):
    """Whether two lists of tensors hold the same bits (NaN equals itself)."""
    return len(a) == len(b) and all(
        (x is None and y is None)
        or (
            x is not None and y is not None and x.dtype == y.dtype and torch.equal(bits(x), bits(y))
        )
        for x, y in zip(a, b, strict=True)
    )


def bits(t):
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().cpu().contiguous().view(word)


def twins(shapes, device, backend, dtype=torch.float32, count=2, **options):
    """`count` equal lists of parameters, each with an optimizer of the same options."""
    pairs = []
    for _ in range(count):
        params = make_params(shapes, dtype, device)
        pairs.append((params, LARS(params, backend=backend, **options)))
    return pairs
