"""Which tensors are updated, and how exactly: sizes, strides, dtypes, missing gradients."""

import pytest
import torch

from lars_fused import LARS
from lars_fused._engine import validate
from lars_fused.options import MOMENTUM_DTYPES
from tests.cases import leave_to_the_interpreter
from tests.oracle import Truth, assert_true
from tests.tools import (
    COMPILED,
    DTYPES,
    STRONG,
    copies,
    make_grads,
    make_params,
    momenta,
    run,
    same_bits,
    set_grads,
    twins,
)

pytestmark = COMPILED


def step_both(optimizer, params, truth, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    truth.step(grads)


# ------------------------------------------------------------------ row 7: missing gradients


@pytest.mark.row(7)
def test_no_gradient_anywhere_changes_nothing(backend, device):
    params = make_params([(3, 2), (4,)], device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    before = copies(params)
    optimizer.step()
    assert same_bits(copies(params), before)
    assert not optimizer.state
    run(optimizer, params, 2)
    before, moments = copies(params), [v.clone() for v in momenta(optimizer, params)]
    optimizer.zero_grad()
    optimizer.step()
    assert same_bits(copies(params), before)
    assert same_bits(momenta(optimizer, params), moments)


@pytest.mark.interpret
@pytest.mark.row(7)
def test_frozen_late_and_unused_parameters_have_their_own_history(backend, device):
    # A dampening makes a second "first step" visible: that one alone is not dampened.
    options = {**STRONG, "dampening": 0.4}
    params = make_params([(3, 2), (4,), (5,), (2,)], device=device)
    optimizer = LARS(params, **options, backend=backend)
    truth = Truth(params, **options)
    patterns = ["1000", "1100", "0110", "1100", "1111", "0001", "1111"]
    for step, pattern in enumerate(patterns):
        grads = [
            g if on == "1" else None
            for g, on in zip(make_grads(params, step), pattern, strict=True)
        ]
        step_both(optimizer, params, truth, grads)
        held = [p in optimizer.state for p in params]
        assert held == [any(p[i] == "1" for p in patterns[: step + 1]) for i in range(4)]
    assert_true(params, truth, steps=len(patterns))


@pytest.mark.row(7)
def test_more_patterns_of_missing_gradients_than_are_remembered(backend, device):
    options = {**STRONG, "dampening": 0.4}
    params = make_params([(3,)] * 4, device=device)
    optimizer, truth = LARS(params, **options, backend=backend), Truth(params, **options)
    for step in range(1, 16):
        grads = [g if step >> i & 1 else None for i, g in enumerate(make_grads(params, step))]
        step_both(optimizer, params, truth, grads)
    assert_true(params, truth, steps=15)


# ------------------------------------------------------------------ rows 8 to 10: sizes


@pytest.mark.row(8)
@pytest.mark.parametrize("empty", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_empty_parameters_beside_others(empty, at, backend, device):
    shapes = [(3, 2), (4,)]
    shapes.insert(at, empty)
    params = make_params(shapes, device=device)
    truth = Truth(params, **STRONG)
    optimizer = LARS(params, **STRONG, backend=backend)
    for step in range(2):
        step_both(optimizer, params, truth, make_grads(params, step))
    assert_true(params, truth, steps=2)
    stats = optimizer.layer_stats()
    assert stats[at][:4] == (0.0, 0.0, 0.0, 1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.layer_stats().keys() == stats.keys()


@pytest.mark.row(8)
def test_nothing_but_empty_parameters_and_empty_groups(backend, device):
    only = make_params([(0,), (2, 0)], device=device)
    run(LARS(only, backend=backend), only, 2)
    params = make_params([(0,), (3,)], device=device)
    groups = [{"params": []}, {"params": params[:1]}, {"params": params[1:]}]
    truth = Truth(params, **STRONG)
    optimizer = LARS(groups, **STRONG, backend=backend)
    step_both(optimizer, params, truth, make_grads(params))
    assert_true(params, truth)


@pytest.mark.interpret
@pytest.mark.row(9)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_dimensions_and_one_element(dtype, any_backend, device):
    params = make_params([(), (1,), (1, 1, 1)], dtype, device)
    truth = Truth(params, **STRONG)
    optimizer = LARS(params, **STRONG, backend=any_backend)
    for step in range(2):
        step_both(optimizer, params, truth, make_grads(params, step))
    assert_true(params, truth, steps=2)


@pytest.mark.row(10)
def test_sizes_around_powers_of_two_move_every_element(any_backend, device):
    powers = {2**k + d for k in range(14) for d in (-1, 0, 1)} - {0}
    params = [
        torch.nn.Parameter(torch.full((n,), 0.75, dtype=dtype, device=device))
        for dtype in DTYPES
        for n in sorted(powers | {8192 * 2 + 1})
    ]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    truth = Truth(params, **STRONG)
    LARS(params, **STRONG, backend=any_backend).step()
    truth.step([p.grad for p in params])
    for p in params:
        assert bool((p == p[0]).all()), f"{p.numel()} elements of {p.dtype}: not all alike"
        assert p[0] != 0.75
    assert_true(params, truth)


@pytest.mark.interpret
@pytest.mark.row(10)
def test_sizes_around_chunks_and_blocks(any_backend, device, small_chunks):
    sizes = [127, 128, 129, 255, 256, 257, 385, 511, 512, 513, 1025]
    params = make_params([(n,) for n in sizes], device=device)
    params += make_params([(n,) for n in sizes[3:8]], torch.bfloat16, device)
    truth, optimizer = Truth(params, **STRONG), LARS(params, **STRONG, backend=any_backend)
    for step in range(2):
        step_both(optimizer, params, truth, make_grads(params, step))
    assert_true(params, truth, steps=2)


# ------------------------------------------------------------------ rows 13 to 16: memory layout

CANARY = 7.25


@pytest.mark.row(13)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_misaligned_views_leave_their_surroundings_alone(offset, dtype, backend, device):
    n = 4097  # one whole block and a tail
    flats, views = [], []
    for seed in (3, 4):
        flat = torch.full((n + 16,), CANARY, dtype=dtype, device=device)
        draw = torch.Generator().manual_seed(seed)
        flat[offset : offset + n] = torch.randn(n, generator=draw).to(device, dtype)
        flats.append(flat)
        views.append(flat[offset : offset + n])
    p = torch.nn.Parameter(views[0])
    truth = Truth([p], **STRONG)
    optimizer = LARS([p], **STRONG, backend=backend)
    gradient = flats[1].clone()
    for _ in range(2):
        step_both(optimizer, [p], truth, [views[1]])
    assert p.data_ptr() == views[0].data_ptr()
    assert_true([p], truth, steps=2)
    assert bool((flats[0][:offset] == CANARY).all())
    assert bool((flats[0][offset + n :] == CANARY).all())
    assert torch.equal(flats[1], gradient)


@pytest.mark.interpret
@pytest.mark.row(13)
def test_slices_of_one_flat_buffer(backend, device):
    sizes = [5, 1, 7, 64, 3]
    flat = make_params([(sum(sizes) + 2 * len(sizes),)], device=device)[0].detach()
    params, at, gaps = [], 0, []
    for n in sizes:
        params.append(torch.nn.Parameter(flat[at : at + n]))
        gaps += [at + n, at + n + 1]
        at += n + 2
    flat[gaps] = CANARY
    truth, optimizer = Truth(params, **STRONG), LARS(params, **STRONG, backend=backend)
    for step in range(2):
        step_both(optimizer, params, truth, make_grads(params, step))
    assert_true(params, truth, steps=2)
    assert bool((flat[gaps] == CANARY).all())


LAYOUTS = {
    "column": lambda b: b[..., 0],
    "every other": lambda b: b[:, ::2],
    "narrowed": lambda b: b[:, 1:3],
    "permuted": lambda b: b.permute(2, 0, 1),
    "transposed": lambda b: b.transpose(0, 1),
    "size 1": lambda b: b.as_strided((4, 1, 6), (6, 999, 1)),
    "one row": lambda b: b[0, 0],
    "diagonal": lambda b: b.diagonal(dim1=1, dim2=2),
}


@pytest.mark.row(14)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_parameters_leave_their_siblings_alone(layout, dtype, any_backend, device):
    base = make_params([(4, 6, 5)], dtype, device)[0].detach()
    p = torch.nn.Parameter(LAYOUTS[layout](base))
    mine = torch.zeros(base.shape, dtype=torch.bool, device=device)
    LAYOUTS[layout](mine).fill_(True)
    before = base.clone()
    truth, optimizer = Truth([p], **STRONG), LARS([p], **STRONG, backend=any_backend)
    for step in range(2):
        step_both(optimizer, [p], truth, make_grads([p], step))
    assert_true([p], truth, steps=2)
    assert torch.equal(base[~mine], before[~mine])
    assert not torch.equal(base[mine], before[mine])


@pytest.mark.row(14)
@pytest.mark.parametrize("dims", [4, 5])
def test_channels_last(dims, backend, device):
    memory = torch.channels_last if dims == 4 else torch.channels_last_3d
    p = make_params([(3, 4, *[2] * (dims - 2))], device=device)[0]
    p = torch.nn.Parameter(p.detach().to(memory_format=memory))
    assert not p.is_contiguous()
    truth, optimizer = Truth([p], **STRONG), LARS([p], **STRONG, backend=backend)
    for step in range(2):
        step_both(optimizer, [p], truth, make_grads([p], step))
    assert_true([p], truth, steps=2)
    assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


def reversed_strides(t):
    return torch.empty(t.shape[::-1], dtype=t.dtype, device=t.device).permute(
        *range(t.dim() - 1, -1, -1)
    )


@pytest.mark.row(15)
@pytest.mark.parametrize("weight", ["contiguous", "reversed"])
@pytest.mark.parametrize("gradient", ["contiguous", "reversed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_strides(weight, gradient, dtype, any_backend, device):
    p = make_params([(3, 4, 2)], dtype, device)[0]
    if weight == "reversed":
        p = torch.nn.Parameter(reversed_strides(p).copy_(p.detach()))
    truth, optimizer = Truth([p], **STRONG), LARS([p], **STRONG, backend=any_backend)
    for step in range(3):
        g = make_grads([p], step)[0]
        if step > 0:  # the first step has made tables for the parameter's own strides
            g = {
                "contiguous": g.contiguous,
                "reversed": lambda g=g: reversed_strides(g).copy_(g),
                "expanded": lambda g=g: g[:1].expand_as(g),
            }[gradient]()
        step_both(optimizer, [p], truth, [g])
    assert_true([p], truth, steps=3)


# ------------------------------------------------------------------ rows 21 and 23: dtypes


@pytest.mark.interpret
@pytest.mark.row(21)
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("gradient", DTYPES)
def test_gradient_of_another_dtype_is_widened(weight, gradient, any_backend, device, tier):
    leave_to_the_interpreter(tier, weight, gradient, torch.float32)
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    p = make_params([(3, 5)], weight, device)[0]
    p.grad_dtype = None
    truth, optimizer = Truth([p], **STRONG), LARS([p], **STRONG, backend=any_backend)
    for step in range(2):
        step_both(optimizer, [p], truth, [make_grads([p], step)[0].to(gradient)])
    assert_true([p], truth, steps=2)


@pytest.mark.row(23)
def test_mixed_dtypes_equal_separate_optimizers(any_backend, device):
    shapes = [(3, 2), (5,)]
    apart, together = ([make_params(shapes, d, device) for d in DTYPES] for _ in range(2))
    mixed = LARS([p for ps in together for p in ps], **STRONG, backend=any_backend)
    for ps in apart:
        run(LARS(ps, **STRONG, backend=any_backend), ps, 2)
    for step in range(2):
        for ps in together:
            set_grads(ps, step)
        mixed.step()
    for ps, qs in zip(apart, together, strict=True):
        assert same_bits(copies(ps), copies(qs))


def test_every_dtype_of_parameters_is_tried():
    assert {*DTYPES} == {*validate.PARAMETER_DTYPES}, "tests/tools.py: DTYPES"


@pytest.mark.row(23)
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", MOMENTUM_DTYPES)
def test_momentum_dtype_is_what_was_asked_for(dtype, any_backend, device, tier):
    leave_to_the_interpreter(tier, torch.bfloat16, torch.bfloat16, dtype)
    params = make_params([(3, 2), (4,)], torch.bfloat16, device)
    truth = Truth(params, momentum_dtype=dtype, **STRONG)
    optimizer = LARS(params, **STRONG, momentum_dtype=dtype, backend=any_backend)
    for step in range(3):
        step_both(optimizer, params, truth, make_grads(params, step))
    assert {v.dtype for v in momenta(optimizer, params)} == {dtype}
    for v, true in zip(momenta(optimizer, params), truth.buffers, strict=True):
        torch.testing.assert_close(v.double().cpu(), true, rtol=0.02, atol=0.002)
    assert_true(params, truth, steps=3)


@pytest.mark.row(23)
def test_groups_of_one_dtype_with_and_without_momentum(backend, device):
    options = {**STRONG, "dampening": 0.2}
    (a, apart), (b, _) = twins([(3,), (4,)], device, backend, **options)
    groups = [{"params": b[:1], "momentum": 0.0}, {"params": b[1:]}]
    optimizer = LARS(groups, **options, backend=backend)
    apart = [
        LARS(a[:1], **{**options, "momentum": 0.0}, backend=backend),
        LARS(a[1:], **options, backend=backend),
    ]
    for step in range(3):
        set_grads(a, step)
        set_grads(b, step)
        optimizer.step()
        for o in apart:
            o.step()
    assert same_bits(copies(a), copies(b))
    assert momenta(optimizer, b)[0] is None
