"""The float64 truth, against numbers worked by hand, torch.optim.SGD, and Algorithm 1."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lars_fused import LARS, WarmupPolynomialLR, lars_step
from lars_fused._engine import portable
from lars_fused.reference import Options

pytestmark = pytest.mark.cpu

# One pair whose norms are whole numbers:
#
#     w = (3, 4)     N(w) = 5          γ = 0.5   β = 2   η = 0.8   ε = 4   μ = 0.5
#     g = (-6, 8)    N(g) = 10
#     d = g + βw = (-6 + 6, 8 + 8) = (0, 16)     N(d) = 16
W, G = (3.0, 4.0), (-6.0, 8.0)
HAND: dict[str, Any] = {
    "lr": 0.5, "weight_decay": 2.0, "trust_coefficient": 0.8, "eps": 4.0, "momentum": 0.5,
}  # fmt: skip
PLAIN = {"adapt": False, "weight_decay": 0.0}  # SGD with momentum


class Hand(NamedTuple):
    """One worked case: `v` None stands for no momentum buffer."""

    name: str
    options: dict[str, Any]
    w: tuple[float, float]  # after
    v: tuple[float, float] | None
    start: tuple[float, float] = W
    gradient: tuple[float, float] = G
    lrs: Sequence[float] = (0.5,)  # one a step


CASES = [
    # D = N(g) + βN(w) + ε = 10 + 10 + 4 = 24; q = 0.8·5/24 = 1/6; u = γqd = (0, 4/3); w = (3, 8/3).
    Hand("sum", {}, (3, 8 / 3), (0, 4 / 3)),
    # D = N(d) + ε = 16 + 4 = 20; q = 4/20 = 0.2; u = 0.5·0.2·(0, 16) = (0, 1.6).
    Hand("decayed", {"denominator": "decayed"}, (3, 2.4), (0, 1.6)),
    # D = N(g) + ε = 14; q = 4/14; u = 0.5·(2/7)·(0, 16) = (0, 16/7).
    Hand("gradient", {"denominator": "gradient"}, (3, 12 / 7), (0, 16 / 7)),
    # v = qd = (0, 3.2); w = w − γv = (3, 4 − 1.6).
    Hand(
        "lr outside", {"denominator": "decayed", "lr_in_momentum": False}, (3, 2.4), (0, 3.2)
    ),
    # v = u = (0, 1.6); w = w − (u + μv) = 4 − (1.6 + 0.8) = 1.6.
    Hand("nesterov", {"denominator": "decayed", "nesterov": True}, (3, 1.6), (0, 1.6)),
    # v = qd = (0, 3.2); w = w − γ(qd + μv) = 4 − 0.5·(3.2 + 1.6) = 1.6.
    Hand(
        "nesterov, lr outside",
        {"denominator": "decayed", "nesterov": True, "lr_in_momentum": False}, (3, 1.6), (0, 3.2),
    ),
    # Two steps of g alone. v1 = 0.5·g = (-3, 4); w1 = w − (v1 + 0.5·v1) = (7.5, -2).
    # v2 = 0.5·v1 + v1 = (-4.5, 6); w2 = w1 − (u + 0.5·v2) = (7.5 + 3 + 2.25, -2 − 4 − 3).
    Hand(
        "nesterov, two steps", {**PLAIN, "nesterov": True}, (12.75, -9), (-4.5, 6), lrs=(0.5, 0.5)
    ),
    # g is negated to (6, -8), then decays: d = (12, 0), N(d) = 12, D = 16, q = 0.25, u = (1.5, 0).
    Hand("maximize", {"denominator": "decayed", "maximize": True}, (1.5, 4), (1.5, 0)),
    # q/γ = 0.2/0.5 = 0.4, below 1; u = 0.5·0.4·(0, 16) = (0, 3.2).
    Hand("clip, not reached", {"denominator": "decayed", "trust_clip": True}, (3, 0.8), (0, 3.2)),
    # q/γ = 0.2/0.1 = 2, clipped to 1; u = 0.1·(0, 16) = (0, 1.6).
    Hand("clip", {"denominator": "decayed", "trust_clip": True}, (3, 2.4), (0, 1.6), lrs=(0.1,)),
    # q/γ grows without bound as γ goes to 0, so q = 1; u = 0.
    Hand("clip, lr 0", {"trust_clip": True}, W, (0, 0), lrs=(0.0,)),
    # q = 1, with decay: u = 0.5·(0, 16) = (0, 8).
    Hand("not adapted", {"adapt": False}, (3, -4), (0, 8)),
    # N(w) = 0: q = 1, d = g, u = (-3, 4).
    Hand("w = 0", {}, (3, -4), (-3, 4), start=(0, 0)),
    Hand("w = 0, decay off", {"decay_zero_norm": False}, (3, -4), (-3, 4), start=(0, 0)),
    # Not q = min(1/γ, 1) = 0.5: only an adapted ratio is clipped. u = 2·g.
    Hand("w = 0, clip", {"trust_clip": True}, (12, -16), (-12, 16), start=(0, 0), lrs=(2.0,)),
    # N(g) = 0: q = 1, d = βw = (6, 8), u = (3, 4).
    Hand("g = 0", {}, (0, 0), (3, 4), gradient=(0, 0)),
    Hand("g = 0, gradient", {"denominator": "gradient"}, (0, 0), (3, 4), gradient=(0, 0)),
    # d = g = 0.
    Hand("g = 0, decay off", {"decay_zero_norm": False}, W, (0, 0), gradient=(0, 0)),
    # N(d) = 10 is what counts: D = 14, q = 4/14, u = (1/7)·(6, 8).
    Hand(
        "g = 0, decayed", {"denominator": "decayed"}, (15 / 7, 20 / 7), (6 / 7, 8 / 7),
        gradient=(0, 0),
    ),
    # g = -βw: N(d) = 0, q = 1, d = 0; without the decay d = g = (-6, -8) and u = (-3, -4).
    Hand("d = 0", {"denominator": "decayed"}, W, (0, 0), gradient=(-6, -8)),
    Hand(
        "d = 0, decay off", {"denominator": "decayed", "decay_zero_norm": False}, (6, 8), (-3, -4),
        gradient=(-6, -8),
    ),
    # decay_zero_norm is about adapted tensors: here the decay stays, u = 0.5·(6, 8).
    Hand(
        "g = 0, not adapted, decay off", {"adapt": False, "decay_zero_norm": False}, (0, 0), (3, 4),
        gradient=(0, 0),
    ),
    # First step: v1 = γg = (-3, 4), undampened; w1 = (6, 0).
    Hand("dampening, first step", {**PLAIN, "dampening": 0.4}, (6, 0), (-3, 4)),
    # Second: v2 = 0.5·(-3, 4) + 0.6·(-3, 4) = (-3.3, 4.4); w2 = w1 − v2.
    Hand(
        "dampening, two steps", {**PLAIN, "dampening": 0.4}, (9.3, -4.4), (-3.3, 4.4),
        lrs=(0.5, 0.5),
    ),
    # γ falls to 0.1: v2 = 0.5·(-3, 4) + 0.6·0.1·(-6, 8) = (-1.86, 2.48); w2 = (6, 0) − v2.
    Hand(
        "lr changes inside", {**PLAIN, "dampening": 0.4}, (7.86, -2.48), (-1.86, 2.48),
        lrs=(0.5, 0.1),
    ),
    # v2 = 0.5·g + 0.6·g = 1.1·(-6, 8) = (-6.6, 8.8); w2 = (6, 0) − 0.1·v2.
    Hand(
        "lr changes outside", {**PLAIN, "dampening": 0.4, "lr_in_momentum": False}, (6.66, -0.88),
        (-6.6, 8.8), lrs=(0.5, 0.1),
    ),
    # No momentum, no buffer, nothing to dampen: w − 2·γg.
    Hand(
        "no momentum", {**PLAIN, "momentum": 0.0, "dampening": 0.4}, (9, -4), None, lrs=(0.5, 0.5)
    ),
]  # fmt: skip


def f64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(ours: Tensor, expected: Any, rtol: float = 1e-14) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_worked_by_hand(case):
    w, g = f64(*case.start), f64(*case.gradient)
    v = None if case.v is None else torch.full_like(w, 99.0)  # a first step does not read it
    for step, lr in enumerate(case.lrs):
        options = Options(**{**HAND, **case.options, "lr": lr})
        portable.step_([w], [g], [v], [None], [options], [step == 0])
    close(w, case.w)
    if case.v is not None:
        close(v, case.v)
    assert g.tolist() == list(case.gradient)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_worked_by_hand_through_the_optimizer(case):
    """The same through LARS and lars_step: their options reach the equations under their names."""
    p = torch.nn.Parameter(f64(*case.start))
    optimizer = LARS([p], backend="torch", **{**HAND, **case.options})
    w, buffers = f64(*case.start), [None]
    for lr in case.lrs:
        p.grad = f64(*case.gradient)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        options = {**HAND, **case.options, "lr": lr}
        lars_step([w], [p.grad], buffers, backend="torch", **options)
    for got in (p.detach(), w):
        close(got, case.w)
    for v in (optimizer.state[p].get("momentum_buffer"), buffers[0]):
        assert (v is None) == (case.v is None)
        if v is not None:
            close(v, case.v)


def test_gradients_are_divided_by_the_scale():
    w, scaled = f64(*W), f64(*G) * 1024
    portable.step_([w], [scaled], [f64(0, 0)], [None], [Options(**HAND)], [True], 1024.0)
    close(w, CASES[0].w)


def test_a_learning_rate_may_be_a_tensor():
    w = f64(*W)
    options = Options(**{**HAND, "lr": torch.tensor(0.5)})
    portable.step_([w], [f64(*G)], [f64(0, 0)], [None], [options], [True])
    close(w, CASES[0].w)


def test_ratios_and_sums_of_several_tensors():
    """Each tensor has its own options and its own norms."""
    w, g = [f64(*W), f64(0, 0), f64(*W)], [f64(*G)] * 3
    options = [Options(**HAND), Options(**HAND), Options(**{**HAND, "adapt": False})]
    sums, ratios = portable.step_(w, g, [None] * 3, [None] * 3, options, [True] * 3)
    close(sums, [[25, 100, 256], [0, 100, 100], [25, 100, 256]])
    close(ratios, [1 / 6, 1, 1])


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_piece_by_piece_is_the_same(size):
    """What bounds the portable path's memory does not change its result, in any layout."""
    w = torch.randn(5, 3, 4, dtype=torch.float64).permute(2, 0, 1)
    g = torch.randn(4, 5, 3, dtype=torch.float64)
    whole, cut = w.clone(), w.clone()
    options = [Options(**HAND)]
    portable.step_([whole], [g], [None], [None], options, [True])
    portable.step_([cut], [g], [None], [None], options, [True], size=size)
    close(cut, whole)


SGD = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"momentum": 0.9, "weight_decay": 0.1},
    "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "all": {"momentum": 0.7, "weight_decay": 0.1, "maximize": True, "nesterov": True},
}


@pytest.mark.parametrize("lr_in_momentum", [False, True])
@pytest.mark.parametrize("name", SGD)
def test_without_adaptation_it_is_torch_sgd(name, lr_in_momentum):
    """Six steps of a changing gradient. With γ outside of the momentum γ changes too: there the two
    are one algorithm. Inside, they agree as long as γ stays.
    """
    start = torch.randn(7, 5, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    sgd = torch.optim.SGD([theirs], lr=0.1, **SGD[name])
    options = {"adapt": False, "lr_in_momentum": lr_in_momentum, **SGD[name]}
    lars = LARS([ours], lr=0.1, backend="torch", **options)
    for step in range(6):
        gradient = torch.randn_like(start)
        for p, optimizer in ((ours, lars), (theirs, sgd)):
            p.grad = gradient.clone()
            if not lr_in_momentum:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
        close(ours.detach(), theirs.detach(), rtol=1e-13)
    if SGD[name]["momentum"] and not lr_in_momentum:
        theirs_v = sgd.state[theirs]["momentum_buffer"]
        close(lars.state[ours]["momentum_buffer"], theirs_v, rtol=1e-13)


def test_algorithm_1_of_the_paper():
    """Transcribed line by line from the paper (arXiv:1708.03888).

    Parameters: base LR γ0, momentum m, weight decay β, LARS coefficient η, number of steps T.
    """
    torch.manual_seed(3)
    gamma_0, m, beta, eta, T = 2.0, 0.9, 0.01, 0.1, 12
    data = [torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)]
    layers = [torch.randn(s, dtype=torch.float64) * 0.5 for s in ((8, 6), (3, 8))]

    def gradient(w):
        w = [x.clone().requires_grad_() for x in w]
        loss = ((torch.tanh(data[0] @ w[0].T) @ w[1].T - data[1]) ** 2).mean()
        return torch.autograd.grad(loss, w)

    w, v, t = [x.clone() for x in layers], [torch.zeros_like(x) for x in layers], 0
    while t < T:
        g = gradient(w)
        gamma_t = gamma_0 * (1 - t / T) ** 2
        for layer in range(len(w)):
            local = eta * w[layer].norm() / (g[layer].norm() + beta * w[layer].norm())
            v[layer] = m * v[layer] + gamma_t * local * (g[layer] + beta * w[layer])
            w[layer] = w[layer] - v[layer]
        t += 1

    ours = [torch.nn.Parameter(x.clone()) for x in layers]
    optimizer = LARS(
        ours,
        gamma_0,
        momentum=m,
        weight_decay=beta,
        trust_coefficient=eta,
        eps=0.0,
        backend="torch",
    )
    schedule = WarmupPolynomialLR(optimizer, total_steps=T, warmup_steps=0, power=2.0)
    for _ in range(T):
        for p, g in zip(ours, gradient([p.detach() for p in ours]), strict=True):
            p.grad = g
        optimizer.step()
        schedule.step()
    for mine, theirs, start in zip(ours, w, layers, strict=True):
        close(mine.detach(), theirs, rtol=1e-12)
        assert (theirs - start).norm() > 0.1 * start.norm()  # it went somewhere
