"""GradScaler: skipped steps change nothing at all, and everything else is as without it."""

import copy
import pickle

import pytest
import torch

from tests import internals
from tests.tools import (
    COMPILED,
    STRONG,
    copies,
    make_grads,
    make_params,
    momenta,
    same_bits,
    twins,
)

pytestmark = COMPILED

SHAPES = [(3, 2), (5,)]
SCALE = 8.0  # a power of two: scaling and unscaling round nothing
OPTIONS = {**STRONG, "dampening": 0.4}  # a second "first step" would show


def scaled_run(scaler, optimizer, params, bad_steps, bad, steps=5):
    """Steps with the gradients of a scaled loss; those in `bad_steps` have one bad element."""
    for step in range(steps):
        for p, g in zip(params, make_grads(params, step), strict=True):
            p.grad = g * scaler.get_scale()
        if step in bad_steps:
            params[1].grad[2] = bad
        before, moments = copies(params), momenta(optimizer, params)
        moments = [v if v is None else v.clone() for v in moments]
        scaler.step(optimizer)
        if step in bad_steps:
            assert same_bits(copies(params), before)
            for v, held in zip(momenta(optimizer, params), moments, strict=True):
                if held is None:  # on a GPU the host never learns that its first step was skipped
                    assert v is None or not v.any()
                else:
                    assert same_bits([v], [held])
        scaler.update(SCALE)


def scaler_for(device):
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=10**6)
    scaler.scale(torch.zeros(1, device=device))  # it makes its scale at the first call
    return scaler


@pytest.mark.interpret
@pytest.mark.row(28)
def test_a_scaler_that_is_skipped_then_dropped(backend, device):
    (skipping, a), (clean, b) = twins(SHAPES, device, backend, **OPTIONS)
    scaled_run(scaler_for(device), a, skipping, {0}, float("inf"), steps=1)
    assert not hasattr(a, "found_inf") or a.found_inf is None
    for step in range(2):
        for params, optimizer in ((skipping, a), (clean, b)):
            for p, g in zip(params, make_grads(params, step), strict=True):
                p.grad = g
            optimizer.step()
    assert same_bits(copies(skipping), copies(clean))


@pytest.mark.row(28)
@pytest.mark.parametrize(
    "then", ["nothing", "deepcopy", "pickle", "a new group", "other gradients"]
)
@pytest.mark.parametrize("masters", [False, True])
def test_a_first_step_that_only_the_device_knows_was_skipped(
    then, masters, backend, device, monkeypatch
):
    """What the skipped step made must not count as momentum, whatever comes next."""
    options = {**OPTIONS, "master_weights": masters}
    dtype = torch.bfloat16 if masters else torch.float32
    (skipping, a), (clean, b) = twins(SHAPES, device, backend, dtype, **options)
    # The host does not look at a found_inf that lies on a GPU.
    internals.keep_found_inf_from_the_host(monkeypatch)
    for p, g in zip(skipping, make_grads(skipping), strict=True):
        p.grad = g
    before = copies(skipping)
    a.grad_scale, a.found_inf = (torch.ones(1, device=device) for _ in range(2))
    a.step()
    del a.grad_scale, a.found_inf
    assert same_bits(copies(skipping), before)
    if then == "deepcopy":
        skipping, a = copy.deepcopy((skipping, a))
    elif then == "pickle":
        skipping, a = pickle.loads(pickle.dumps((skipping, a)))
    elif then == "a new group":
        a.add_param_group({"params": make_params([(2,)], device=device)})
    for step in range(3):
        for params, optimizer in ((skipping, a), (clean, b)):
            for p, g in zip(params, make_grads(params, step), strict=True):
                p.grad = g
            if then == "other gradients" and step == 0:
                params[0].grad = None
            optimizer.step()
    assert same_bits(copies(skipping), copies(clean))
    assert same_bits(momenta(a, skipping), momenta(b, clean))
