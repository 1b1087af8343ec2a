"""A step checked tensor by tensor: ours, the float64 truth, and eager torch side by side.

The bound: our error against the float64 reference is at most twice the error of the same equations
in eager torch (fp32 arithmetic, each stored value rounded once), plus a few ulp of what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.peers import set_gradient
from lars_fused import LARS, portable, tables
from lars_fused.reference import Options
from tests.cases import TERMS, Memory, Spec, bits

ULPS = 2


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at |x|, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.double().abs().clamp(min=info.tiny)).exponent - 1
    return info.eps * torch.exp2(exponent.double())


def assert_close(
    name: str, ours: Tensor, truth: Tensor, eager: Tensor, before: Tensor, ulps: float = ULPS
) -> None:
    """The bound of the module's docstring, for one tensor."""
    if ours.numel() == 0:
        return
    ours_, eager_, before_ = (t.detach().double().cpu() for t in (ours, eager, before))
    scale = torch.maximum(truth.abs(), before_.abs())
    bound = 2 * (eager_ - truth).abs().max() + ulps * ulp(scale, ours.dtype)
    excess = (ours_ - truth).abs() - bound
    if bool((excess <= 0).all()):
        return
    worst = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    raise AssertionError(
        f"{name}, element {at} of {tuple(truth.shape)}: ours {ours_[at].item():.17g}, "
        f"truth {truth[at].item():.17g}, eager {eager_[at].item():.17g}, "
        f"before {before_[at].item():.17g}; bound {bound[at].item():.3g}; "
        f"{int((~(excess <= 0)).sum())} of {truth.numel()} elements are beyond it"
    )


def eager_step(
    w: Tensor, g: Tensor, v: Tensor | None, first: bool, o: Options, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The equations as one would write them in torch: fp32 arithmetic, stored values rounded."""
    w32, g32 = w.float(), (-g if o.maximize else g).float() / scale
    d = g32 + o.weight_decay * w32
    q = 1.0
    norm = (d if o.denominator == "decayed" else g32).norm()
    if o.adapt:
        if w32.norm() != 0 and norm != 0:
            below = norm + o.eps
            if o.denominator == "sum":
                below = below + o.weight_decay * w32.norm()
            q = o.trust_coefficient * w32.norm() / below
            if o.trust_clip:
                q = min(q / o.lr, 1.0) if o.lr else 1.0
        elif not o.decay_zero_norm:
            d = g32
    u = (o.lr * q if o.lr_in_momentum else q) * d
    if v is None:
        return (w32 - (u if o.lr_in_momentum else o.lr * u)).to(w.dtype), None
    v32 = u if first else o.momentum * v.float() + (1 - o.dampening) * u
    move = u + o.momentum * v32 if o.nesterov else v32
    return (w32 - (move if o.lr_in_momentum else o.lr * move)).to(w.dtype), v32.to(v.dtype)


@dataclass
class _One:
    """One tensor with its float64 truth and its eager twin."""

    name: str
    p: torch.nn.Parameter
    group: int
    start: Tensor
    truth: Tensor
    eager: Tensor
    v_truth: Tensor | None = None
    v_eager: Tensor | None = None
    stepped: bool = False


@dataclass
class Trial:
    """An optimizer over guarded tensors, with its truth and its eager baseline beside it.

    `groups`: options of each parameter group; `specs[i]` goes to group `group_of(i)`.
    `seeded`: every other tensor starts with a momentum of its own, the rest with none.
    """

    specs: Sequence[Spec]
    backend: str
    device: str = "cpu"
    groups: Sequence[dict[str, Any]] = ({},)
    group_of: Callable[[int], int] = lambda i: 0
    w_dtype: torch.dtype = torch.float32
    g_dtype: torch.dtype | None = None
    v_dtype: torch.dtype = torch.float32
    master: bool = False
    seeded: bool = False
    magnitudes: Sequence[tuple[float, float]] | None = None
    ones: list[_One] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = Memory(self.device)
        self.generator = torch.Generator().manual_seed(len(self.specs))
        self.options = [Options(**{**TERMS, **g}) for g in self.groups]
        rows: list[dict[str, Any]] = [{"params": [], **TERMS, **g} for g in self.groups]
        for i, spec in enumerate(self.specs):
            w = self.memory.place(
                self._random(i, 0), self.w_dtype, spec.name, spec.w_offset, spec.order, spec.gap
            )
            p = torch.nn.Parameter(w)
            self.group = self.group_of(i)
            rows[self.group]["params"].append(p)
            start = w.detach().double().cpu()
            # A master weight is fp32 from the start, and is what the equations see.
            eager = w.detach().cpu().to(torch.float32 if self.master else w.dtype, copy=True)
            self.ones.append(_One(spec.name, p, self.group, start, start.clone(), eager))
        self.optimizer = LARS(
            [row for row in rows if row["params"]],
            momentum_dtype=self.v_dtype, master_weights=self.master, backend=self.backend,
        )  # fmt: skip
        for i, (one, spec) in enumerate(zip(self.ones, self.specs, strict=True)):
            if self.options[one.group].momentum == 0:
                continue
            one.v_truth = torch.zeros_like(one.truth)
            if self.seeded and i % 2:
                v = self.memory.place(
                    self._random(i, 0) * 0.3, self.v_dtype, f"{spec.name}, momentum",
                    spec.w_offset, spec.order, spec.gap,
                )  # fmt: skip
                self.optimizer.state[one.p]["momentum_buffer"] = v
                one.v_truth, one.stepped = v.double().cpu(), True
            one.v_eager = one.v_truth.to(self.v_dtype)

    def _random(self, i: int, which: int) -> Tensor:
        values = torch.randn(self.specs[i].shape, generator=self.generator, dtype=torch.float64)
        # Away from zero, so that a relative error means something.
        values = values + torch.where(values < 0, -0.2, 0.2)
        return values * (self.magnitudes[i][which] if self.magnitudes else 1.0)

    def gradients(self) -> None:
        """New gradients for every tensor, in guarded memory."""
        for i, (one, spec) in enumerate(zip(self.ones, self.specs, strict=True)):
            g = self.memory.place(
                self._random(i, 1), self.g_dtype or self.w_dtype, f"{spec.name}, gradient",
                spec.g_offset, spec.g_order, spec.gap,
            )  # fmt: skip
            set_gradient(one.p, g)

    def step(self, **changes: Any) -> None:
        """One step of all three; `changes`: hyper-parameters from now on, of every group."""
        for group in self.optimizer.param_groups:
            group.update(changes)
        self.options = [o._replace(**changes) for o in self.options]
        self.gradients()
        kept = [one.p.grad.detach().clone() for one in self.ones]
        self.optimizer.step()
        for one, g in zip(self.ones, kept, strict=True):
            assert bits([one.p.grad]) == bits([g]), f"{one.name}: the gradient was written"
            self._advance(one, g.cpu())

    def _advance(self, one: _One, g: Tensor) -> None:
        o, first = self.options[one.group], not one.stepped
        v = None if one.v_truth is None else [one.v_truth]
        portable.step_([one.truth], [g.double()], v or [None], [None], [o], [first])
        one.eager, one.v_eager = eager_step(one.eager, g, one.v_eager, first, o)
        one.stepped = True

    def check(self, ulps: float = ULPS) -> None:
        """Weights and momenta within the bound, and nothing else written."""
        self.memory.check()
        for one in self.ones:
            held = self.optimizer.state.get(one.p, {})
            ours = held.get("master_param", one.p)
            assert_close(one.name, ours, one.truth, one.eager, one.start, ulps)
            if ours is not one.p:
                rounded = ours.to(one.p.dtype)
                assert torch.equal(one.p, rounded), f"{one.name}: not its master, rounded"
            assert ("momentum_buffer" in held) == (one.v_truth is not None), one.name
            if one.v_truth is not None:
                v = held["momentum_buffer"]
                name = f"{one.name}, momentum"
                assert_close(name, v, one.v_truth, one.v_eager, one.v_truth, ulps)

    def works(self) -> list[tables.Work]:
        """What the last step launched."""
        return works(self.optimizer)

    def poison(self) -> None:
        """Fill what a step must not read before writing it with NaN."""
        for work in self.works():
            for scratch in (work.partials, work.sums, work.ratios):
                scratch.fill_(torch.nan)


def works(optimizer: LARS) -> list[tables.Work]:
    """The launches of the optimizer's last step."""
    assert optimizer._last is not None
    return [work for _, work in optimizer._last.stepper.parts]
