"""A step checked tensor by tensor: ours, the float64 truth, and eager torch side by side.

The bound is that of `oracle.assert_close`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.variants import set_gradient
from lars_fused import LARS
from tests import internals, oracle
from tests.cases import TERMS, Memory, Spec, bits


@dataclass
class _One:
    """One tensor with its float64 truth and its eager twin."""

    name: str
    p: torch.nn.Parameter
    group: int
    start: Tensor
    truth: Tensor
    eager: Tensor
    v_truth: Tensor | None = None  # until the first step there is none
    v_eager: Tensor | None = None
    v_terms: Tensor | None = None  # what the last step summed to it


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
        self.options = [{**oracle.DEFAULTS, **TERMS, **g} for g in self.groups]
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
            if self.seeded and i % 2 and self.options[one.group]["momentum"]:
                v = self.memory.place(
                    self._random(i, 0) * 0.3, self.v_dtype, f"{spec.name}, momentum",
                    spec.w_offset, spec.order, spec.gap,
                )  # fmt: skip
                self.optimizer.state[one.p]["momentum_buffer"] = v
                one.v_truth, one.v_eager = v.double().cpu(), v.cpu()

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
        self.options = [{**o, **changes} for o in self.options]
        self.gradients()
        kept = [one.p.grad.detach().clone() for one in self.ones]
        self.optimizer.step()
        for one, g in zip(self.ones, kept, strict=True):
            assert bits([one.p.grad]) == bits([g]), f"{one.name}: the gradient was written"
            self._advance(one, g.cpu())

    def _advance(self, one: _One, g: Tensor) -> None:
        if g.numel() == 0:
            return
        o = self.options[one.group]
        w, v = one.truth, one.v_truth
        one.truth, one.v_truth = oracle.in_float64(w, g, v, o)
        if one.v_truth is not None:
            one.v_terms = oracle.momentum_terms(w, g, v, one.v_truth, o)
        one.eager, one.v_eager = oracle.in_eager_fp32(one.eager, g, one.v_eager, o, self.v_dtype)

    def check(self, ulps: float = oracle.ULPS) -> None:
        """Weights and momenta within the bound, and nothing else written."""
        self.memory.check()
        for one in self.ones:
            held = self.optimizer.state.get(one.p, {})
            ours = held.get("master_param", one.p)
            oracle.assert_close(one.name, ours, one.truth, one.eager, one.start, ulps)
            if ours is not one.p:
                rounded = ours.to(one.p.dtype)
                assert torch.equal(one.p, rounded), f"{one.name}: not its master, rounded"
            has_momentum = self.options[one.group]["momentum"] != 0
            assert ("momentum_buffer" in held) == has_momentum, one.name
            if one.v_truth is not None:
                v = held["momentum_buffer"]
                name = f"{one.name}, momentum"
                terms = one.v_truth if one.v_terms is None else one.v_terms
                oracle.assert_close(name, v, one.v_truth, one.v_eager, terms, ulps)

    def works(self) -> list[internals.LaunchTables]:
        """What the last step launched."""
        return internals.launches(self.optimizer)

    def poison(self) -> None:
        """Fill what a step must not read before writing it with NaN."""
        for work in self.works():
            for scratch in (work.memory.partials, work.memory.sums, work.memory.ratios):
                scratch.fill_(torch.nan)


def assert_skipped_steps_do_not_count(device: str) -> None:
    """A launch that found_inf skips writes nothing; the next one is the second step."""
    params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in (5000, 3)]
    optimizer = LARS(params, backend="triton", **TERMS)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    (work,) = internals.launches(optimizer)
    before = bits(params)
    internals.run(work, torch.ones(1, device=device))
    assert (bits(params), work.steps_taken()) == (before, 1)
    internals.run(work, torch.zeros(1, device=device))
    assert bits(params) != before
    assert work.steps_taken() == 2
    work.check_queue()
