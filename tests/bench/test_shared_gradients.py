"""Peers that write into gradients: the variants of a case share theirs, so each gets its own."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import projects, variants
from bench.cases import Case
from bench.harness import Truth, disagreement

pytestmark = pytest.mark.cpu

CASE = Case("small", "fp32", [("a", (7, 5)), ("a.bias", (7,)), ("b", (130, 9))])


class WritesIntoGradients(torch.optim.Optimizer):
    """The step of timm's Lars up to 1.0.30: decay and ratio are taken into `p.grad` itself."""

    def __init__(self, params, lr, momentum, weight_decay, trust_coeff, eps):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, options | {"trust": trust_coeff, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in group["params"]:
                w, g = p.norm(), p.grad.norm()
                if decay:
                    q = group["trust"] * w / (g + decay * w + group["eps"])
                    p.grad.add_(p, alpha=decay).mul_(q)
                v = self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                p.sub_(v, alpha=group["lr"])


@pytest.fixture
def timm(monkeypatch):
    for name in ("timm", "timm.optim", "timm.optim.lars"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["timm.optim.lars"].Lars = WritesIntoGradients


def test_timm_leaves_the_gradients_of_a_case(timm):
    inputs = CASE.inputs(torch.device("cpu"))
    given = [g.clone() for g in inputs.g]
    variant = projects.timm_lars(inputs)
    assert disagreement(variant, Truth(inputs)) <= 5
    for _ in range(3):  # as the timers do
        variant.prepare()
        variant.step()
    assert all(map(torch.equal, inputs.g, given))


def test_each_step_of_timm_is_given_the_same_gradients(timm):
    """Else a second step adds decay and ratio to what the first one left."""
    inputs = CASE.inputs(torch.device("cpu"))
    variant = projects.timm_lars(inputs)
    for _ in range(2):
        variant.prepare()
        variant.step()
    own = SimpleNamespace(w=[w.clone() for w in inputs.w], v=[v.clone() for v in inputs.v])
    fresh = projects.timm_lars(variants.Inputs(own.w, inputs.g, own.v, inputs.adapt))
    for _ in range(2):
        for p, g in zip(fresh.weights(), inputs.g, strict=True):
            p.grad = g.clone()
        fresh.step()
    assert all(map(torch.equal, variant.weights(), fresh.weights()))
