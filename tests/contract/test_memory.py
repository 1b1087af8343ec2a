"""Many tensors, huge tensors, and what is left in memory afterwards."""

import gc
import weakref

import pytest
import torch

from lars_fused import LARS
from tests import internals
from tests.oracle import Truth, assert_true
from tests.tools import BOTH, STRONG, copies, make_params, run, set_grads

pytestmark = BOTH


# ------------------------------------------------------------------ row 11: many


@pytest.mark.row(11)
def test_ten_thousand_tensors(tier, backend, device):
    count = 100 if tier == "interpret" else 10_000  # the interpreter takes 10 ms for each
    # A prime number of different ones, over and over: equal tensors must come out equal.
    different = make_params([(i % 5 + 1,) for i in range(499)], device=device)
    set_grads(different)
    params = [torch.nn.Parameter(different[i % 499].detach().clone()) for i in range(count)]
    for i, p in enumerate(params):
        p.grad = different[i % 499].grad.clone()
    truth = Truth(params[:499], **STRONG)
    optimizer = LARS(params, **STRONG, backend=backend)
    optimizer.step()
    truth.step([p.grad for p in params[:499]])
    assert_true(params[:499], truth)
    assert all(torch.equal(p, params[i % 499]) for i, p in enumerate(params))
    if backend == "triton":
        assert len(internals.launches(optimizer)) == 1  # one launch


@pytest.mark.row(11)
def test_four_thousand_groups(tier, backend, device):
    count = 50 if tier == "interpret" else 4097
    params = make_params([(2,)] * count, device=device)
    rates = [0.1 + i / count for i in range(count)]
    start = copies(params)
    optimizer = LARS(params[:1], adapt=False, momentum=0.0, backend=backend)
    first = optimizer.param_groups[0]
    # Not by add_param_group: torch's own takes time by the square of the groups.
    optimizer.param_groups = [
        {**first, "params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    expected = torch.stack([s.double() - r for s, r in zip(start, rates, strict=True)])
    torch.testing.assert_close(torch.stack(copies(params)).double(), expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ row 12: huge

HUGE = (2**31 - 1, 2**31, 2**31 + 1, 2**32 + 5)


@pytest.mark.row(12)
@pytest.mark.parametrize("numel", HUGE)
def test_chunks_of_huge_tensors_lie_where_they_should(numel, tier):
    """The real kernel on single chunks of a tensor whose other chunks do not exist.

    The table holds an address so far before a small buffer that the chunk falls into it.
    """
    if tier != "interpret":
        pytest.skip("chooses chunks for the interpreter; test_gpu has the tensors themselves")
    from lars_fused.kernels.layout import BOTH, pack_item
    from lars_fused.reference import Options

    size, dtype = 1 << 13, torch.bfloat16
    chunks = -(-numel // size)
    work = internals.lone_tables(
        torch.device("cpu"), internals.Dtypes(dtype, dtype, torch.float32), numel,
        Options(lr=0.5, momentum=0.0, adapt=False),
    )  # fmt: skip
    for chunk in (0, 2**31 // size - 1, 2**31 // size, chunks - 1):
        if chunk >= chunks:
            continue
        first = chunk * size
        count = min(size, numel - first)
        w, g = (torch.full((size + 32,), 3.0, dtype=dtype) for _ in range(2))
        g.fill_(2.0)
        internals.single_chunk(work, pack_item(BOTH, 0, chunk))
        internals.point_at(work, *(t.data_ptr() + 16 * 2 - 2 * first for t in (w, g)))
        internals.run(work)
        assert bool((w[16 : 16 + count] == 2.0).all()), f"chunk {chunk} of {chunks}"
        assert bool((w[:16] == 3.0).all())
        assert bool((w[16 + count :] == 3.0).all())


# ------------------------------------------------------------------ row 60: what stays


def allocations(function):
    """Most memory that lives at one time during a call, and what is left after it, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most, held


@pytest.mark.row(60)
def test_a_portable_step_takes_less_than_one_percent_of_the_parameters(tier):
    if tier != "cpu":
        pytest.skip("of the portable path")
    shapes = [(1000, 2048), (2048, 2048), (512, 512, 3, 3), (16_000_000,)]
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = LARS(params, **STRONG, backend="torch")
    optimizer.step()  # makes the state
    optimizer.step()  # prepares for steps that are not the first
    most, held = allocations(optimizer.step)
    bytes_of_parameters = sum(4 * p.numel() for p in params)
    assert 0 < most < bytes_of_parameters / 100, f"{most / bytes_of_parameters:.2%}"
    assert held < 1024


@pytest.mark.row(60)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tensors_of_middling_size_are_widened_one_at_a_time(tier, dtype):
    """With a denominator that needs N(g + βw): not the memory of all of them at once."""
    if tier != "cpu":
        pytest.skip("of the portable path")
    params = [torch.nn.Parameter(torch.ones(200, 300, dtype=dtype)) for _ in range(100)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = LARS(params, **STRONG, denominator="decayed", backend="torch")
    optimizer.step()
    optimizer.step()
    most, held = allocations(optimizer.step)
    assert 0 < most < 4 * 4 * 60_000  # two blocks of fp32, and as much again
    assert held < 1024


@pytest.mark.row(60)
def test_thousands_of_steps_leave_nothing_behind(tier, backend, device, monkeypatch):
    if tier != "cpu":  # the host side of a launch alone: the interpreter takes 10 ms a step
        internals.replace_launch(monkeypatch, lambda *_: None)
    steps = 10_000 if tier == "cpu" else 1000
    params = make_params([(2,), (3,)], device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    set_grads(params)

    def several(count):
        for step in range(count):
            optimizer.param_groups[0]["lr"] = 0.1 + step % 7
            for p in params:
                p.grad = torch.ones_like(p) if step % 2 else p.grad
            params[1].requires_grad_(True)
            optimizer.step()

    several(50)
    gc.collect()
    before = len(gc.get_objects())
    several(steps)
    gc.collect()
    assert len(gc.get_objects()) - before < 50


@pytest.mark.row(60)
@pytest.mark.parametrize("use", ["unused", "stepped", "saved and loaded", "failed", "grown"])
def test_the_optimizer_and_its_parameters_are_freed_without_the_collector(use, backend, device):
    params = make_params([(3,), (4,)], device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    gc.collect()
    gc.disable()
    try:
        if use != "unused":
            run(optimizer, params, 2)
            optimizer.layer_stats()
        if use == "saved and loaded":
            optimizer.load_state_dict(optimizer.state_dict())
            run(optimizer, params, 1)
        if use == "failed":
            params[0].grad = params[0].grad.to_sparse()
            with pytest.raises(RuntimeError):
                optimizer.step()
        if use == "grown":
            optimizer.add_param_group({"params": make_params([(2,)], device=device)})
            run(optimizer, params, 1)
        watched = [weakref.ref(optimizer), *map(weakref.ref, params)]
        watched += [weakref.ref(v) for s in optimizer.state.values() for v in s.values()]
        del optimizer, params
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()
