"""What a step asks of the host: no waiting, no compiling, no growing memory; and huge tensors."""

import gc

import pytest
import torch

from lars_fused import LARS, clip_grad_norm_
from tests import internals
from tests.tools import (
    STRONG,
    copies,
    make_params,
    run,
    same_bits,
    set_grads,
    twins,
)

pytestmark = pytest.mark.gpu

SHAPES = [(300, 40), (5,), (20_000,)]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_a_step_never_waits_for_the_device(scaled, lr):
    params = make_params(SHAPES, device="cuda")
    optimizer = LARS(params, **STRONG, backend="triton")
    if lr == "tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="cuda")
    set_grads(params)
    optimizer.step()
    if scaled:
        optimizer.grad_scale = torch.ones(1, device="cuda")
        optimizer.found_inf = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            for p in params:
                p.grad = torch.ones_like(p)  # new addresses: the tables are uploaded again
            if lr == "float":
                optimizer.param_groups[0]["lr"] = 0.1 * (1 + step)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_first_step_does_not_wait_either():
    params = make_params(SHAPES, device="cuda")
    optimizer = LARS(params, **STRONG, backend="triton")
    set_grads(params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        norm = clip_grad_norm_(params, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm > 0


def test_norms_within_a_capture_take_the_portable_path():
    params = make_params(SHAPES, device="cuda")
    set_grads(params)
    clip_grad_norm_(params, 1e9)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip_grad_norm_(params, 1e9)
    graph.replay()
    true = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt()
    torch.testing.assert_close(norm, true, rtol=1e-6, atol=0)
    with (
        pytest.raises(RuntimeError, match=r"cannot be captured into a CUDA graph.*backend='torch'"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        clip_grad_norm_(params, 1e9, backend="triton")
    torch.cuda.synchronize()


def test_no_step_compiles_again():
    """New rates, decays, sizes, alignments and counts of tensors: one binary for each dtype."""
    ((warm, optimizer),) = twins(SHAPES, "cuda", "triton", count=1, **STRONG)
    run(optimizer, warm, 1)
    compiled = internals.compiled_kernels()
    caches = [len(c) for c in device_caches()]
    for count in (1, 2, 16, 17):
        flat = torch.zeros(count * 1000 + 64, device="cuda")
        params = [
            torch.nn.Parameter(flat[i * 1000 + i % 7 : i * 1000 + i % 7 + 16 * (i + 1)])
            for i in range(count)
        ]
        other = LARS(params, lr=0.1 * count, weight_decay=1e-3 * count, backend="triton")
        for step in range(3):
            other.param_groups[0].update(lr=1.0 + step, momentum=0.1 * step, nesterov=step == 2)
            set_grads(params, step)
            other.step()
    assert internals.compiled_kernels() == compiled
    assert [len(c) for c in device_caches()] == caches


def device_caches():
    """Triton's own caches of compiled variants, where this version has them in this form."""
    kernels = internals.kernels()
    jitted = (kernels.lars_step.lars_step, kernels.l2norm.l2norm, kernels.lars_update.lars_update)
    entries = [e for k in jitted for e in getattr(k, "device_caches", {}).values()]
    return [e[0] if isinstance(e, tuple) else e for e in entries]


@pytest.mark.row(58)
@pytest.mark.parametrize("repeat", range(3))
def test_two_runs_give_the_same_bits(repeat):
    (a, first), (b, second) = twins([*SHAPES, (1_000_003,)], "cuda", "triton", **STRONG)
    run(first, a, 5)
    run(second, b, 5)
    assert same_bits(copies(a), copies(b))


@pytest.mark.row(60)
def test_memory_of_a_step_and_of_a_thousand():
    params = make_params([(2048, 2048), (1000, 2048), (512, 512, 3, 3)], device="cuda")
    optimizer = LARS(params, **STRONG, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.1 + step % 5
        optimizer.step()
    torch.cuda.synchronize()
    of_parameters = sum(4 * p.numel() for p in params)
    assert torch.cuda.max_memory_allocated() - held < of_parameters / 100
    assert torch.cuda.memory_allocated() == held


@pytest.mark.row(60)
def test_the_tables_are_freed_with_the_optimizer():
    params = make_params(SHAPES, device="cuda")
    set_grads(params)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        optimizer = LARS(params, **STRONG, capturable=True, backend="triton")
        optimizer.step()
        assert torch.cuda.memory_allocated() > before
        del optimizer
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@pytest.mark.row(11)
def test_a_hundred_thousand_tensors_in_one_launch():
    flat = torch.zeros(400_000, device="cuda")
    params = [torch.nn.Parameter(flat[4 * i : 4 * i + 3]) for i in range(100_000)]
    gradient = torch.ones(3, device="cuda")
    for p in params:
        p.grad = gradient
    optimizer = LARS(params, lr=0.5, momentum=0.0, adapt=False, backend="triton")
    optimizer.step()
    assert len(internals.launches(optimizer)) == 1
    table = flat.view(-1, 4)
    assert bool((table[:, :3] == -0.5).all())
    assert bool((table[:, 3] == 0).all())


@pytest.mark.row(12)
@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**31 + 1, 2**32 + 5])
def test_huge_tensors(numel):
    """Ends, middle and every multiple of 2^31 of one tensor of bf16."""
    if torch.cuda.mem_get_info()[0] < 6 * numel + (4 << 30):
        pytest.skip("needs free GPU memory of 6 bytes an element")
    w = torch.full((numel,), 3.0, dtype=torch.bfloat16, device="cuda")
    p = torch.nn.Parameter(w)
    p.grad = torch.full_like(w, 2.0)
    optimizer = LARS([p], lr=0.5, momentum=0.0, trust_coefficient=1.0, eps=0.0, backend="triton")
    optimizer.step()
    # q = N(w) / N(g) = 1.5, so that w becomes 3 - 0.5 * 1.5 * 2.
    edges = {0, numel - 1, numel // 2, *(k * 2**31 + d for k in (1, 2) for d in (-1, 0, 1))}
    for at in sorted(e for e in edges if 0 <= e < numel):
        assert w[at].item() == 1.5, f"element {at}"
    for first in range(0, numel, 1 << 28):
        assert bool((w[first : first + (1 << 28)] == 1.5).all()), f"from element {first}"


@pytest.mark.row(12)
def test_many_tensors_of_more_than_2_to_31_elements_together():
    count, each = 5, 2**29
    if torch.cuda.mem_get_info()[0] < 6 * count * each:
        pytest.skip("needs free GPU memory of 6 bytes an element")
    params = [
        torch.nn.Parameter(torch.full((each,), 3.0, dtype=torch.bfloat16, device="cuda"))
        for _ in range(count)
    ]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    LARS(params, lr=0.5, momentum=0.0, adapt=False, backend="triton").step()
    assert all(bool((p == 2.0).all()) for p in params)
