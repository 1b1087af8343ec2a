"""The backend for devices without kernels, forced on a CPU: results, and what it asks of a device.

`test_torch_step.py` holds every option and dtype; here is what only this backend promises.
"""

import math

import pytest
import torch

from lars_fused._engine import foreach, torch_step
from lars_fused.reference import Options
from tests.cases import TERMS, bits
from tests.engine.test_torch_step import BF16, F32, F64, SHAPES, check, clones, lists, truth_of
from tests.prices import Dispatches

pytestmark = pytest.mark.cpu

# What would wait for the device.
READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal"})


def step(w, g, v, options, first=None, **more):
    n = len(w)
    options = options if isinstance(options, list) else [options] * n
    first = first or [False] * n
    return torch_step.step_(w, g, v, [None] * n, options, first, backend="foreach", **more).tables()


def counted(count, options, **more):
    w, g, v = lists([(3, 1 + i % 5) for i in range(count)])
    n = len(w)
    prepared = torch_step.prepare(w, g, v, [None] * n, [options] * n, backend="foreach")
    step(w, g, v, options, prepared=prepared, **more)
    with Dispatches(READS) as mode:
        step(w, g, v, options, prepared=prepared, **more)
    return mode.names


@pytest.mark.parametrize(
    ("options", "more", "most"),
    [
        ({}, {}, 25),
        ({"denominator": "decayed"}, {}, 27),
        ({"nesterov": True}, {}, 30),
        ({"lr_in_momentum": False}, {}, 30),
        ({"lr": torch.tensor(0.5)}, {}, 30),
        ({"trust_clip": True, "dampening": 0.2, "maximize": True}, {}, 34),
        ({}, {"scale": torch.tensor(4.0, dtype=F64)}, 28),
        ({}, {"scale": torch.tensor(4.0, dtype=F64), "found_inf": torch.zeros(1)}, 36),
    ],
    ids=str,
)
def test_operations_do_not_grow_with_the_tensors_and_none_waits(options, more, most):
    o = Options(**TERMS | options)
    few, many = counted(3, o, **more), counted(300, o, **more)
    if not o.nesterov:  # which keeps a copy of each u
        assert len(many) == len(few), sorted(set(many))
        assert len(many) <= most, many


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("w_dtype", [F32, BF16])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"lr_in_momentum": False}], ids=str)
def test_found_inf_on_the_device_leaves_every_bit(found, first, w_dtype, options):
    o = Options(**TERMS | options)
    w, g, v = lists(SHAPES, w_dtype)
    w[0][0, 0] = -0.0
    v[1][0] = -0.0
    if found:
        g[2].fill_(math.inf)
        g[3][5] = math.nan
    n = len(w)
    before, old, flags = (bits(w), bits(v)), clones(w), [first] * n
    true_w, true_v, _ = truth_of(w, g, v, [None] * n, [o] * n, flags)
    step(w, g, v, o, flags, found_inf=torch.tensor([found]))
    if found:
        assert (bits(w), bits(v)) == before
    else:
        check(w, true_w, old)
        check(v, true_v, old)


@pytest.mark.parametrize("mixed", ["options", "first"])
def test_groups_of_different_options_in_one_list(mixed):
    w, g, v = lists(SHAPES)
    kinds = [
        Options(**TERMS),
        Options(**TERMS | {"adapt": False, "weight_decay": 0.0, "momentum": 0.5}),
        Options(**TERMS | {"denominator": "gradient", "lr_in_momentum": False, "lr": 0.25}),
        Options(**TERMS | {"nesterov": True, "maximize": True, "lr": torch.tensor(0.75)}),
        Options(**TERMS | {"dampening": 0.4, "trust_clip": True}),
        Options(**TERMS | {"denominator": "decayed"}),
    ]
    n = len(w)
    options = [kinds[i % len(kinds) if mixed == "options" else 0] for i in range(n)]
    first = [mixed == "first" and i % 2 == 0 for i in range(n)]
    old_w, old_v = clones(w), clones(v)
    true_w, true_v, (_, ratios) = truth_of(w, g, v, [None] * n, options, first)
    found = step(w, g, v, options, first)
    check(w, true_w, old_w)
    check(v, true_v, old_v)
    torch.testing.assert_close(found[1], ratios, rtol=1e-6, atol=0)


@pytest.mark.parametrize("zero", ["w", "g", "both"])
@pytest.mark.parametrize("decay_zero_norm", [True, False])
@pytest.mark.parametrize("denominator", ["sum", "gradient"])
def test_zero_norms(zero, decay_zero_norm, denominator):
    o = Options(**TERMS | {"decay_zero_norm": decay_zero_norm, "denominator": denominator})
    w, g, v = lists([(5,), (300,)])
    for name, tensors in (("w", w), ("g", g)):
        if zero in (name, "both"):
            tensors[0].zero_()
    old = clones(w)
    true_w, true_v, _ = truth_of(w, g, v, [None] * 2, [o] * 2, [False] * 2)
    step(w, g, v, o)
    check(w, true_w, old)
    check(v, true_v, old)


def test_a_buffer_of_a_first_step_is_not_read():
    w, g, v = lists(SHAPES)
    for t in v:
        t.fill_(math.nan)
    n, o = len(w), Options(**TERMS)
    zeros = [torch.zeros_like(t) for t in v]
    true_w, true_v, _ = truth_of(w, g, zeros, [None] * n, [o] * n, [True] * n)
    old = clones(w)
    step(w, g, v, o, [True] * n)
    check(w, true_w, old)
    check(v, true_v, old)


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1.0, 1e25, 3e36])
@pytest.mark.parametrize("wide", [F64, F32])
def test_norms_over_the_whole_range(monkeypatch, scale, wide):
    """Where there is no float64, in units of the largest element."""
    monkeypatch.setattr(foreach, "_wide", lambda device: wide)
    tensors = [torch.randn(1000) * scale, torch.zeros(7)]
    exact = torch.stack([t.double().norm() for t in tensors])
    found = foreach.norms(tensors).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_a_bad_element_stays_in_its_tensor():
    w, g, v = lists(SHAPES)
    clean_w, clean_v = clones(w), clones(v)
    step(clean_w, g, clean_v, Options(**TERMS))
    g[4][0, 0] = math.nan
    step(w, g, v, Options(**TERMS))
    assert bool(w[4].isnan().any())
    keep = [i for i in range(len(w)) if i != 4]
    assert bits([w[i] for i in keep]) == bits([clean_w[i] for i in keep])


def test_what_it_objects_to():
    w, g, v = lists([(4, 3)])
    o = Options(**TERMS)

    def why(w=w[0], g=g[0], v=v[0], o=o):
        return foreach.objection(w, g, v, None, o)

    assert why() is None
    assert why(w=w[0].double()) == "the tensor is torch.float64"
    assert why(v=v[0].double()) == "its momentum is torch.float64"
    assert why(w=torch.empty(0), g=torch.empty(0), v=torch.empty(0)) == "it is empty"
    assert "no momentum" in why(o=o._replace(momentum=0.0))
    assert "N(g + βw)" in why(o=o._replace(denominator="decayed", decay_zero_norm=False))


def test_the_default_device_has_no_influence():
    """Constants are made on the host: on the default device, here meta, they have no value."""
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        w, g, v = ([torch.randn(4, 3)] for _ in range(3))
        rates = [torch.tensor(0.5), 0.5]
        with torch.device(device):
            for lr in rates:
                options = Options(lr=lr, weight_decay=0.1, trust_clip=True, decay_zero_norm=False)
                step(w, g, v, options)
        found.append([*w, *v])
    assert all(map(torch.equal, *found))
