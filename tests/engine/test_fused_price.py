"""What a step on a CPU costs: bytes and calls, counted; time beside SGD's; memory that is kept."""

from functools import partial

import pytest
import torch

from bench.cases import Case, model_case, sweep_case
from lars_fused import LARS, multi_tensor_l2norm
from lars_fused._engine import small_batch
from lars_fused.reference import Options
from tests.cases import TERMS
from tests.engine.test_fused import prepare
from tests.engine.test_torch_step import lists
from tests.prices import Dispatches, best_of, least_ratio, thread_time

pytestmark = pytest.mark.cpu


def optimizers(case):
    built = []
    for make in (
        lambda groups: LARS(groups, lr=0.1, weight_decay=1e-4, backend="torch"),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True),
    ):
        params = [torch.nn.Parameter(w.clone()) for w in case.inputs(torch.device("cpu")).w]
        for p in params:
            p.grad = torch.full_like(p, 0.01)
        optimizer = make(params)
        for _ in range(3):
            optimizer.step()
        built.append(optimizer.step)
    return built


LARGE = Case("large", "fp32", [(str(i), (1024, 1024)) for i in range(4)])


@pytest.mark.parametrize(
    ("case", "per_element", "operations"),
    [(sweep_case(10_000), 75.0, 7), (LARGE, 20.1, 14)],
    ids=["small", "large"],
)
def test_a_step_passes_over_memory_twice(case, per_element, operations):
    """Bytes are counted, not timed. SGD has w, g and v once, 12 bytes; the norms read w and g once
    more. Small tensors are first copied into the rows of a matrix, which stays in the cache.
    """
    ours, sgd = optimizers(case)
    found = []
    for step in (ours, sgd):
        with Dispatches() as mode:
            step()
        found.append(mode)
    assert found[1].bytes == 12 * case.n_params
    assert found[0].bytes <= per_element * case.n_params
    assert len(found[0].names) <= operations


@pytest.mark.parametrize(
    ("case", "samples", "bound"),
    [(sweep_case(10_000), 300, 3.2), (LARGE, 60, 2.2)],
    ids=["small", "large"],
)
def test_a_step_costs_little_more_than_sgd(case, samples, bound):
    """On one thread 2.7 to 3.2 by machine, and 1.8; the reference 30. The bench is more exact."""
    steps = [partial(thread_time, step) for step in optimizers(case)]
    assert least_ratio(bound, partial(best_of, samples, *steps)) <= bound


def test_norms_cost_little_more_than_torch():
    tensors = model_case("GoogLeNet").inputs(torch.device("cpu")).w
    calls = (
        partial(multi_tensor_l2norm, tensors, backend="torch"),
        partial(torch._foreach_norm, tensors),
    )
    round_of = partial(best_of, 40, *(partial(thread_time, call) for call in calls))
    assert least_ratio(2.1, round_of) <= 2.1  # measured 1.7 on one thread; the reference 11


def test_what_is_kept_between_steps_is_small():
    """Scratch of two small matrices, and of large tensors a few bytes per 4,096 elements."""
    w, g, v = lists([(100, 100)] * 40)
    plan = prepare(w, g, v, Options(**TERMS)).plans["fused"]
    scratch = {id(b._scratch): b._scratch for b in plan.batches}
    assert len(scratch) == 1
    held = next(iter(scratch.values()))._held
    assert sum(t.numel() for t in held.values()) == 2 * small_batch.ROOM
    w, g, v = lists([(300, 1000)] * 3)
    plan = prepare(w, g, v, Options(**TERMS)).plans["fused"]
    kept = sum(window._table.numel() for window in plan.windows)
    assert 0 < kept <= 2 * 3 * (300_000 // 1000)
