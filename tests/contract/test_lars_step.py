"""What `lars_step` takes in the place of lists, and when it looks at the buffers."""

from fractions import Fraction

import pytest
import torch

from lars_fused import lars_step, param_groups
from tests import internals
from tests.tools import BOTH

pytestmark = BOTH


def ones(device, count=2):
    return [torch.ones(10, device=device) for _ in range(count)]


def test_pairs_of_param_groups_are_their_parameters(backend, device):
    model = torch.nn.Linear(3, 2).to(device)
    pairs = [p for group in param_groups(model, 0.1) for p in group["params"]]
    params = [p.detach().clone() for p in model.parameters()]
    grads = [torch.ones_like(p) for p in params]
    with torch.no_grad():
        lars_step(pairs, grads, [None, None], backend=backend)
    lars_step(params, grads, [None, None], backend=backend)
    assert all(map(torch.equal, model.parameters(), params))


@pytest.mark.parametrize("kind", [list, tuple])
def test_without_momentum_the_buffers_are_not_looked_at(kind, backend, device):
    """They are neither read nor written: that they share memory is no harm."""
    params, twin, shared = ones(device), ones(device), torch.ones(10, device=device)
    grads = ones(device)
    lars_step(params, grads, kind([shared, shared]), momentum=0.0, backend=backend)
    lars_step(twin, grads, [None, None], momentum=0.0, backend=backend)
    assert all(map(torch.equal, params, twin))
    assert torch.equal(shared, torch.ones(10, device=device))


def test_parts_of_one_buffer_are_memory_of_their_own(backend, device):
    flat, separate = torch.zeros(60, device=device), [None, None]
    w0, w1, g0, g1, v0, v1 = flat.split(10)
    for t in (w0, w1, g0, g1):
        t.fill_(1.0)
    twin = ones(device)
    for buffers, params in (([v0, v1], [w0, w1]), (separate, twin)):
        lars_step(params, [g0, g1], buffers, backend=backend)
    assert all(map(torch.equal, (w0, w1, v0, v1), (*twin, *separate)))


@pytest.mark.parametrize("buffers", ["none", "own"])
def test_ordinary_buffers_are_told_apart_by_their_addresses_alone(
    buffers, backend, device, monkeypatch
):
    """To ask each tensor where it lies took a tenth of the time of a step on the host."""
    asked = internals.count_places_of_buffers(monkeypatch)
    held = [None, None] if buffers == "none" else ones(device)
    lars_step(ones(device), ones(device), held, backend=backend)
    assert asked == []


def test_empty_tensors_share_no_memory(backend, device):
    params, grads, buffers = ([torch.ones(0, device=device) for _ in range(2)] for _ in range(3))
    lars_step(params, grads, buffers, backend=backend)


def test_a_message_does_not_print_the_whole_of_a_value(device):
    nested = [[0.0] * 1000] * 100
    with pytest.raises(TypeError, match=r"params\[0\]=\[\[0.0, .* is a list; must be") as caught:
        lars_step([nested, *ones(device, 1)], ones(device), [None, None])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_message_about_a_fraction_beyond_the_floats(digits, device):
    """More digits than Python prints at once, too."""
    with pytest.raises(ValueError, match=r"lr=.* is not allowed; must be a finite") as caught:
        lars_step(ones(device), ones(device), [None, None], lr=Fraction(10**digits))
    assert len(str(caught.value)) < 400
    with pytest.raises(TypeError, match=r"lr=.* is a list") as caught:
        lars_step(ones(device), ones(device), [None, None], lr=[10**digits])
    assert len(str(caught.value)) < 600
