"""Reading or preparing the state before the first step changes nothing that follows."""

import copy
import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lars_fused import LARS, conventions
from tests import internals
from tests.tools import BOTH

pytestmark = BOTH

OPTIONS = {
    "paper": {}, "mae": conventions.MAE, "timm": conventions.TIMM, "dampening": {"dampening": 0.5},
    "dampened timm": {**conventions.TIMM, "dampening": 0.3}, "no momentum": {"momentum": 0.0},
    "nesterov": {"nesterov": True, "lr_in_momentum": False}, "tensor lr": {},
}  # fmt: skip


def network(device, name, backend, **options):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(device)
    lr = torch.tensor(2.0) if name == "tensor lr" else 2.0
    chosen = {"lr": lr, "weight_decay": 0.1, **OPTIONS[name], **options}
    return model, LARS(model.parameters(), **chosen, backend=backend)


def read(model, optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_optimizer_state_dict(model, optimizer)


def train(model, optimizer, partly=False):
    for step in range(2):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.5 + step + i)
            if partly and step == 0 and i % 2:
                p.grad = None
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


# Where gradients are missing, only the first step of each tensor may tell runs apart.
RUNS = [*((name, False) for name in OPTIONS), ("dampening", True), ("dampened timm", True)]


@pytest.mark.parametrize(("name", "partly"), RUNS)
def test_reading_the_state_changes_nothing(name, partly, backend, device):
    expected = train(*network(device, name, backend), partly)
    model, optimizer = network(device, name, backend)
    weights = [p.detach().clone() for p in model.parameters()]
    saved = read(model, optimizer)
    assert all(map(torch.equal, model.parameters(), weights))
    assert optimizer.layer_stats() == {}
    buffers = [v for held in saved["state"].values() for v in held.values()]
    assert len(buffers) == (0 if name == "no momentum" else 4)
    assert not any(torch.any(v) for v in buffers)
    assert all(map(torch.equal, train(model, optimizer, partly), expected))


def test_masters_that_were_made_by_reading_follow_a_model_loaded_after_it(backend, device):
    found = []
    for reads in (False, True):
        model, optimizer = network(device, "mae", backend, master_weights=True)
        model.bfloat16()
        if reads:
            read(model, optimizer)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.75)
        found.append(train(model, optimizer))
    assert all(map(torch.equal, *found))


def test_a_copy_of_it_and_what_is_loaded_into_it(backend, device):
    expected = train(*network(device, "dampening", backend))
    model, optimizer = network(device, "dampening", backend)
    read(model, optimizer)
    assert all(map(torch.equal, train(*copy.deepcopy((model, optimizer))), expected))

    trained, other = network(device, "dampening", backend)
    train(trained, other)
    model.load_state_dict(trained.state_dict())
    set_optimizer_state_dict(model, optimizer, read(trained, other))
    assert all(map(torch.equal, train(model, optimizer), train(trained, other)))


def test_a_first_step_at_a_rate_of_0_with_gradients_is_a_step(backend, device):
    """Warm-up from 0: MAE's buffer takes the gradients in."""
    model, optimizer = network(device, "mae", backend, lr=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.any(held["momentum_buffer"]) for held in optimizer.state.values())
    assert len(optimizer.layer_stats()) == 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_are_read_at_most_once(momentum, backend, device, monkeypatch):
    """It waits for the device; without momentum there never is a state that says it was done."""
    model, optimizer = network(device, "paper", backend, lr=0.0, momentum=momentum)
    reads = internals.count_reads_of_gradients(monkeypatch)
    for value in (1.0, 0.0, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()
    assert len(reads) == 1
    saved = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "state": {}})
    optimizer.zero_grad()
    read(model, optimizer)  # asks of new state
    assert len(reads) == 2


def test_a_rate_that_ends_at_0_without_momentum_reads_no_gradients(backend, device, monkeypatch):
    """There is no state that says that training began long ago."""
    _, optimizer = network(device, "no momentum", backend)
    reads = internals.count_reads_of_gradients(monkeypatch)
    for lr in (0.1, 0.1, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert reads == []


def test_state_that_was_cleared_is_asked_for_anew(backend, device):
    """With momentum, missing state says that a step is the first, whatever was run before."""
    model, optimizer = network(device, "mae", backend)
    train(model, optimizer)
    optimizer.state.clear()
    optimizer.zero_grad()
    read(model, optimizer)
    assert not any(torch.any(held["momentum_buffer"]) for held in optimizer.state.values())
