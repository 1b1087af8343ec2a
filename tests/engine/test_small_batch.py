"""Batches of small tensors: their rows, and those that are updated where they are."""

import pytest
import torch

from lars_fused._engine import torch_step
from lars_fused.reference import Options
from tests.cases import TERMS, bits
from tests.engine.test_fused import prepare, step
from tests.engine.test_torch_step import check, clones, lists, truth_of

pytestmark = pytest.mark.cpu


def test_padding_does_not_carry_a_nan_over():
    """A row's padding holds factor times zero: NaN, once a gradient was infinite."""
    w, g, v = lists([(3, 2), (5,)])
    o = Options(**TERMS)
    prepared = prepare(w, g, v, o)
    spoilt = [torch.full((3, 2), torch.inf), g[1]]
    step(w, spoilt, v, o, prepared=prepared)
    w[0], v[0] = torch.ones(3, 2), torch.ones(3, 2)
    step(w, g, v, o, prepared=prepared)
    assert all(bool(t.isfinite().all()) for t in (*w, *v))


def test_padding_does_not_carry_over_to_another_batch():
    """Batches share one scratch memory; the last row of a tensor is padded with zeros."""
    shapes = [(4000,)] * 30 + [(3,), (5,), (17,), (33,), (65,), (513,)]
    w, g, v = lists(shapes)
    o = Options(**TERMS)
    prepared = prepare(w, g, v, o)
    assert len(prepared.plans["fused"].batches) > 2
    for _ in range(2):
        n = len(w)
        _, _, (true_sums, _) = truth_of(w, g, v, [None] * n, [o] * n, [False] * n)
        sums, _ = step(w, g, v, o, prepared=prepared).tables()
        torch.testing.assert_close(sums[:, :2], true_sums[:, :2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("long", [0, 1, 2])
def test_one_tensor_of_two_rows_among_others_of_one(long):
    """Where each has one row, rows and tensors are not told apart."""
    sizes = [500, 400, 300]
    sizes[long] = 1000
    w, g, v = lists([(size,) for size in sizes])
    o = Options(**TERMS)
    true_w, true_v, (true_sums, _) = truth_of(w, g, v, [None] * 3, [o] * 3, [False] * 3)
    old = clones(w)
    sums, _ = step(w, g, v, o).tables()
    check(w, true_w, old)
    check(v, true_v, old)
    torch.testing.assert_close(sums[:, :2], true_sums[:, :2], rtol=1e-6, atol=0)


def test_many_small_tensors_are_few_calls(calls):
    w, g, v = lists([(18, 17)] * 32)
    o = Options(**TERMS)
    step(w, g, v, o)
    assert len(calls) == 1
    w, g, v = lists([(4, 1 + i % 9) for i in range(2000)])
    del calls[:]
    step(w, g, v, o)
    assert len(calls) <= 4


@pytest.mark.parametrize(
    ("options", "in_place"),
    [({}, True), ({"maximize": True}, True), ({"dampening": 0.5}, True), ({"momentum": 0.0}, True),
     ({"nesterov": True}, False), ({"lr": 1e-12}, False)],
    ids=str,
)  # fmt: skip
def test_tensors_that_are_not_adapted_are_updated_where_they_are(calls, options, in_place):
    """Biases and normalisation weights: one call for a group, except where only rows will do."""
    shapes = [(64,), (2048,), (7,), (1000,), (4096,)]
    w, g, v = lists(shapes)
    o = Options(**TERMS | {"adapt": False, "weight_decay": 0.1, **options})
    v = v if o.momentum else [None] * len(v)
    none = [None] * len(w)
    true_w, true_v, (true_sums, _) = truth_of(w, g, v, none, [o] * len(w), [False] * len(w))
    old, before = clones(w), bits(g)
    sums, ratios = step(w, g, v, o).tables()
    check(w, true_w, old)
    if o.momentum:
        check(v, true_v, old)
    torch.testing.assert_close(sums[:, :2], true_sums[:, :2], rtol=1e-6, atol=0)
    assert ratios.tolist() == [1.0] * len(w)
    assert bits(g) == before
    assert len(calls) == 1
    weights, grads, *_ = calls[0]
    assert {t.data_ptr() for t in weights} == {t.data_ptr() for t in w}
    assert ({t.data_ptr() for t in grads} == {t.data_ptr() for t in g}) is in_place


def test_first_and_later_steps_of_one_group_with_dampening(calls):
    """Those that start take their whole gradient: a call of their own."""
    w, g, v = lists([(64,), (2048,), (7,)])
    o, first = Options(**TERMS | {"adapt": False, "dampening": 0.5}), [True, False, True]
    for t, new in zip(v, first, strict=True):
        t.mul_(not new)
    true_w, true_v, _ = truth_of(w, g, v, [None] * 3, [o] * 3, first)
    old = clones(w)
    step(w, g, v, o, first)
    check(w, true_w, old)
    check(v, true_v, old)
    assert sorted(len(weights) for weights, *_ in calls) == [1, 2]


def test_a_group_whose_tensors_are_all_left_to_the_reference():
    """Beside another group in one batch: nothing of it is left for torch's kernel."""
    ordinary, extreme = Options(**TERMS), Options(**TERMS, lr_in_momentum=False)
    w, g, v = lists([(3,), (3,)])
    g[1].fill_(1e-30)
    before = w[1].clone()
    found = torch_step.step_(w, g, v, [None, None], [ordinary, extreme], [False, False])
    sums, ratios = found.tables()
    assert torch.isfinite(w[0]).all()
    assert torch.isfinite(w[1]).all()
    torch.testing.assert_close(w[1], before, rtol=1, atol=1)
    assert sums.shape == (2, 3)
    assert ratios.shape == (2,)
