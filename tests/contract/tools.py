"""What the contract tests share: small parameters and gradients, and the truth in float64.

`Truth` is written from the equations of the README, tensor by tensor, and shares no code with the
package, so that a fault in `reference.py` shows too.
"""

import pytest
import torch

from lars_fused import LARS

BOTH = [pytest.mark.cpu, pytest.mark.interpret, pytest.mark.gpu]
COMPILED = [*BOTH, pytest.mark.ptx]  # also the PTX, by tests/ptx
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEFAULTS = {
    "lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001, "eps": 1e-8,
    "dampening": 0.0, "nesterov": False, "denominator": "sum", "lr_in_momentum": True,
    "trust_clip": False, "decay_zero_norm": True, "adapt": True, "maximize": False,
}  # fmt: skip
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


class Truth:
    """LARS in float64 on its own copies, each stored value rounded to its storage dtype.

    `momentum_dtype` None: as the optimizer's default, fp32 but float64 for float64 parameters.
    """

    def __init__(self, params, momentum_dtype=None, **options):
        self.options = {**DEFAULTS, **options}
        self.weights = [p.detach().double().cpu().clone() for p in params]
        self.dtypes = [p.dtype for p in params]
        self.buffer_dtypes = [
            momentum_dtype or (torch.float64 if d == torch.float64 else torch.float32)
            for d in self.dtypes
        ]
        self.buffers = [None] * len(params)
        # The largest number met in each tensor's arithmetic: its errors are of that scale, also
        # where the result is smaller (1.5 - 1.4).
        self.sizes = [0.0] * len(params)

    def step(self, grads, **options):
        o = {**self.options, **options}
        for i, g in enumerate(grads):
            if g is None or g.numel() == 0:
                continue
            g = g.detach().double().cpu()
            old = self.weights[i]
            w, v = truth_of_one(old, g, self.buffers[i], o)
            self.sizes[i] = max(self.sizes[i], *(t.abs().max().item() for t in (old, w, w - old)))
            if v is not None:
                out = 1.0 if o["lr_in_momentum"] else float(o["lr"])
                self.sizes[i] = max(self.sizes[i], out * v.abs().max().item())
            self.weights[i] = w.to(self.dtypes[i]).double()
            self.buffers[i] = None if v is None else v.to(self.buffer_dtypes[i]).double()


def truth_of_one(w, g, v, o):
    """One tensor's step: new w and v."""
    g = -g if o["maximize"] else g
    lr, momentum, decay = float(o["lr"]), o["momentum"], o["weight_decay"]
    d = g + decay * w
    q = 1.0
    if o["adapt"]:
        w_norm, norm = norm_of(w), norm_of(d if o["denominator"] == "decayed" else g)
        if w_norm != 0 and norm != 0:
            extra = decay * w_norm if o["denominator"] == "sum" else 0.0
            q = o["trust_coefficient"] * w_norm / (norm + extra + o["eps"])
            if o["trust_clip"]:
                q = min(q / lr, 1.0) if lr else 1.0
        elif not o["decay_zero_norm"]:
            d = g
    u = (lr * q if o["lr_in_momentum"] else q) * d
    out = 1.0 if o["lr_in_momentum"] else lr
    if momentum == 0:
        return w - out * u, None
    v = u if v is None else momentum * v + (1 - o["dampening"]) * u
    return w - out * (u + momentum * v if o["nesterov"] else v), v


def norm_of(t):
    largest = t.abs().max().item()
    if largest == 0 or largest != largest or largest == float("inf"):
        return largest
    return largest * (t / largest).pow(2).sum().sqrt().item()


def assert_true(params, truth, steps=1, units=2.0):
    """Each parameter equals the truth within `units` roundings of its storage a step."""
    for i, (p, w) in enumerate(zip(params, truth.weights, strict=True)):
        if w.numel() == 0:
            continue
        info = torch.finfo(p.dtype)
        arithmetic = 2.0**-53 if p.dtype == torch.float64 else 2.0**-24
        size = max(truth.sizes[i], w.abs().max().item())
        bound = info.eps / 2 * w.abs() + arithmetic * size + info.tiny * info.eps
        bound = units * steps * bound
        error = (p.detach().double().cpu() - w).abs()
        assert torch.isfinite(p).all(), f"parameter {i} is not finite"
        assert (error <= bound).all(), (
            f"parameter {i} {tuple(p.shape)} {p.dtype}: off by {error.max():.3g}, "
            f"{(error / bound).max():.3g} times the bound"
        )
