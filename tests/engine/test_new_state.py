"""First steps that only the device knows were skipped, and masters of edited parameters."""

from collections import defaultdict

import pytest
import torch

from lars_fused import LARS
from lars_fused._engine.new_state import FirstSteps, NewTensor, StepState
from tests import internals
from tests.tools import make_grads, make_params

pytestmark = pytest.mark.cpu


class Counted:
    """Stands in for a prepared step: which of its parameters were never stepped."""

    def __init__(self, params, created=True):
        nothing = [None] * len(params)
        buffers = [torch.zeros_like(p) for p in params]
        new = [NewTensor(i, "momentum_buffer", b, False) for i, b in enumerate(buffers)]
        self.state = StepState(
            params, params, buffers, nothing, [created] * len(params), new if created else ()
        )
        self.skipped, self.asked = {id(p) for p in params}, 0

    def untaken(self):
        self.asked += 1
        return self.skipped


def keys(*params):
    return {(id(p), "momentum_buffer") for p in params}


def test_a_step_that_was_taken_for_certain_leaves_no_doubt():
    a, b = torch.ones(2), torch.ones(3)
    steps, step = FirstSteps(), Counted([a, b])
    steps.note(step, certain=True)
    assert steps.untaken() == set()
    assert step.asked == 0  # so that no checkpoint waits for the device in vain


def test_a_flag_on_the_device_leaves_it_to_the_device():
    a, b = torch.ones(2), torch.ones(3)
    steps, step = FirstSteps(), Counted([a, b])
    steps.note(step, certain=False)
    assert steps.untaken() == keys(a, b)
    step.skipped = {id(b)}
    assert steps.untaken() == keys(b)
    step.skipped = set()
    assert steps.untaken() == set()
    asked = step.asked
    assert steps.untaken() == set()
    assert step.asked == asked


def test_any_step_that_was_taken_settles_it():
    """A first step skipped with both parameters, then one of the first alone that was taken."""
    a, b = torch.ones(2), torch.ones(3)
    steps, both, first = FirstSteps(), Counted([a, b]), Counted([a], created=False)
    steps.note(both, certain=False)
    first.skipped = set()
    steps.note(first, certain=False)
    assert steps.untaken() == keys(b)
    steps.note(Counted([b], created=False), certain=True)
    assert steps.untaken() == set()


def test_state_is_the_optimizers_once_it_is_committed():
    a = torch.ones(2)
    step, state = Counted([a]), defaultdict(dict)
    assert state == {}
    step.state.commit(state)
    assert state[a]["momentum_buffer"] is step.state.buffers[0]
    mine = torch.ones(2)
    state[a]["momentum_buffer"] = mine
    step.state.commit(state)  # nothing is pending any more
    assert state[a]["momentum_buffer"] is mine


@pytest.mark.interpret
@pytest.mark.parametrize("skipped_first", [False, True])
@pytest.mark.parametrize("others", [False, True], ids=["same gradients", "fewer gradients"])
def test_masters_follow_parameters_that_were_edited(skipped_first, others, backend, monkeypatch):
    """Edited elements are taken over, in whatever pattern of gradients comes next; the others keep
    the bits that their low-precision copy does not show.
    """
    internals.keep_found_inf_from_the_host(monkeypatch)
    params = make_params([(4,), (3,)], torch.bfloat16)
    optimizer = LARS(params, 1e-3, master_weights=True, backend=backend)
    for p, g in zip(params, make_grads(params), strict=True):
        p.grad = g
    if skipped_first:
        optimizer.found_inf = torch.ones(1)
        optimizer.step()
        del optimizer.found_inf
    else:
        optimizer.step()
    p = params[0]
    before, v = (optimizer.state[p][k].clone() for k in ("master_param", "momentum_buffer"))
    with torch.no_grad():
        p[0] = 100.0
    if others:
        params[1].grad = None
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    after = optimizer.state[p]["master_param"]
    assert after[0] == 100.0
    # At a rate of 0, momentum alone; a tensor whose first step was skipped has none.
    moved = 0.0 if skipped_first else 0.9 * v[1:]
    torch.testing.assert_close(after[1:], before[1:] - moved, rtol=1e-6, atol=0)


def test_a_checkpoint_leaves_out_what_no_step_was_taken_of(backend, monkeypatch):
    internals.keep_found_inf_from_the_host(monkeypatch)
    params = make_params([(4,), (3,)])
    optimizer = LARS(params, dampening=0.5, backend=backend)
    optimizer.found_inf = torch.ones(1)
    params[0].grad = torch.ones(4)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    params[1].grad = torch.ones(3)
    optimizer.found_inf = torch.zeros(1)
    optimizer.step()
    del optimizer.found_inf
    assert set(optimizer.state_dict()["state"]) == {0, 1}
    for p in params:  # undampened: each one's own first step
        gamma_q = optimizer.layer_stats()[0 if p is params[0] else 1].effective_lr
        torch.testing.assert_close(
            optimizer.state[p]["momentum_buffer"], gamma_q * p.grad, rtol=1e-6, atol=0
        )
