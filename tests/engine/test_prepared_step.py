"""`matches` is a predicate: what it answers, and that asking changes nothing."""

import gc
import weakref

import pytest
import torch

from lars_fused import LARS
from lars_fused._engine.prepared_step import plan_facts
from lars_fused._engine.tensors import Scaling
from tests import internals
from tests.tools import make_grads, make_params

pytestmark = [pytest.mark.cpu, pytest.mark.interpret]

SHAPES = [(3, 2), (5,), (4,)]


def stepped(backend, **options):
    """An optimizer after one step, its prepared step, and the options that it ran with."""
    params = make_params(SHAPES)
    optimizer = LARS(params, 0.1, momentum=0.9, **options, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    engine = optimizer._engine
    ((step, *_),) = engine.last
    return params, optimizer, step, engine._hyper.options


def set_grads(params, seed):
    for p, g in zip(params, make_grads(params, seed), strict=True):
        p.grad = g


def fits(step, params, options):
    seen = step.see([p.grad for p in params], step.addresses)
    return seen is not None and step.matches(seen, plan_facts(options))


def test_new_gradients_and_rates_match(backend):
    params, _, step, options = stepped(backend)
    set_grads(params, 1)
    assert fits(step, params, options)
    assert fits(step, params, [options[0]._replace(lr=7.0, weight_decay=0.3)])


@pytest.mark.parametrize("change", ["adapt", "momentum", "dampening"])
def test_an_option_that_the_plan_depends_on_does_not_match(change, backend):
    params, _, step, options = stepped(backend)
    value = {"adapt": False, "momentum": 0.0, "dampening": 0.5}[change]
    assert not fits(step, params, [options[0]._replace(**{change: value})])


def test_options_that_decide_between_backends_do_not_match(backend):
    """With both, whether a tensor decays depends on N(g + βw), which foreach does not express."""
    params, _, step, (o,) = stepped(backend)
    assert fits(step, params, [o._replace(denominator="decayed")])
    assert fits(step, params, [o._replace(decay_zero_norm=False)])
    both = o._replace(denominator="decayed", decay_zero_norm=False)
    assert not fits(step, params, [both])


@pytest.mark.parametrize("what", ["missing", "strides", "dtype", "sparse", "memory"])
def test_what_the_checks_relied_on_does_not_match(what, backend):
    params, _, step, options = stepped(backend)
    p = params[0]
    if what == "missing":
        p.grad = None
    elif what == "strides":
        p.grad = torch.ones(2, 3).T
    elif what == "dtype":
        p.grad_dtype = None
        p.grad = torch.ones(3, 2, dtype=torch.float64)
    elif what == "sparse":
        p.grad = torch.ones(3, 2).to_sparse()
    else:
        p.data = torch.ones(4, 2)
        p.grad = torch.ones(4, 2)
    assert not fits(step, params, options)


def test_asking_changes_nothing(backend):
    """Two questions about different tensors, then the step of the first: it runs those."""
    params, _, step, options = stepped(backend)
    others = make_params(SHAPES)
    set_grads(params, 1)
    set_grads(others, 2)
    mine, theirs = ([p.grad for p in ps] for ps in (params, others))
    seen = step.see(mine, step.addresses)
    assert step.matches(seen, plan_facts(options))
    step.matches(step.see(theirs, step.addresses), plan_facts(options))
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        step.run(seen, options, Scaling())
    twins, optimizer, _, _ = stepped(backend)
    for twin, grad in zip(twins, mine, strict=True):
        twin.grad = grad
    optimizer.step()
    assert all(map(torch.equal, params, twins))
    assert not any(map(torch.equal, before, params))


def test_a_step_leaves_what_was_prepared_as_it_was(backend):
    """Nothing is remembered from the last call: other gradients, another rate, another scale."""
    params, optimizer, step, _ = stepped(backend)
    parts = [step, *step._torch_parts]
    before = [dict(vars(part)) for part in parts]
    set_grads(params, 1)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    assert optimizer._engine.last[0].step is step
    assert (backend == "torch") == (len(parts) == 2)
    for part, held in zip(parts, before, strict=True):
        assert vars(part).keys() == held.keys()
        assert [name for name, value in vars(part).items() if value is not held[name]] == []


def test_what_a_skipped_step_measured_is_what_the_step_before_did(backend, monkeypatch):
    """Also where another pattern of gradients was stepped between them."""
    internals.keep_found_inf_from_the_host(monkeypatch)
    params, optimizer, _, _ = stepped(backend)
    before = optimizer.layer_stats()
    params[0].grad = None
    optimizer.step()
    set_grads(params, 3)
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    after = optimizer.layer_stats()
    assert [row[:2] for row in after.values()] == [row[:2] for row in before.values()]


def test_no_gradient_is_kept_alive(backend):
    params, optimizer, _, _ = stepped(backend)
    grads = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert [g() for g in grads] == [None] * len(grads)
    assert optimizer.layer_stats()


def test_a_state_tensor_put_in_place_of_ours_is_stepped(backend):
    """Its dict is the same, or is not; the prepared step notices both. The dict is no matter."""
    params, optimizer, step, _ = stepped(backend)
    assert step.state.is_held_by(optimizer.state)
    held = optimizer.state[params[0]]["momentum_buffer"]
    optimizer.state[params[0]]["momentum_buffer"] = held.clone()
    assert not step.state.is_held_by(optimizer.state)
    optimizer.state[params[0]]["momentum_buffer"] = held
    assert step.state.is_held_by(optimizer.state)
    optimizer.state[params[1]] = dict(optimizer.state[params[1]])
    assert step.state.is_held_by(optimizer.state)
    optimizer.state[params[1]]["momentum_buffer"] = held
    assert not step.state.is_held_by(optimizer.state)
    del optimizer.state[params[1]]["momentum_buffer"]
    assert not step.state.is_held_by(optimizer.state)
