"""Tensors whose memory is replaced, moved, freed or reshaped between two steps."""

import pytest
import torch

from lars_fused import LARS
from tests.oracle import Truth, assert_true
from tests.tools import (
    COMPILED,
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

SHAPES = [(3, 4), (5,)]


def freed_and_restored(p):
    saved, storage = p.detach().clone(), p.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    p.data.copy_(saved)


CHANGES = {
    "data replaced": lambda p: setattr(p, "data", p.detach().clone()),
    "storage freed and restored": freed_and_restored,
    "storage set": lambda p: p.data.set_(p.detach().clone()),
    "layout changed": lambda p: setattr(p, "data", p.detach().t().contiguous().t()),
    "transposed view": lambda p: setattr(p, "data", torch.stack([p.detach()] * 2, -1)[..., 0]),
}


@pytest.mark.row(33)
@pytest.mark.parametrize("change", CHANGES)
def test_parameter_memory_replaced(change, any_backend, device):
    (changed, a), (kept, b) = twins(SHAPES, device, any_backend, **STRONG)
    run(a, changed, 2)
    run(b, kept, 2)
    former = [p.data for p in changed]
    for p in changed:
        CHANGES[change](p)
    moved = [f.data_ptr() != p.data_ptr() for f, p in zip(former, changed, strict=True)]
    before = [f.clone() for f in former]
    for p in changed:
        p.grad = None
    run(a, changed, 2, first=2)
    run(b, kept, 2, first=2)
    assert_close_or_same(changed, kept)
    for f, was, elsewhere in zip(former, before, moved, strict=True):
        if elsewhere:
            assert torch.equal(f, was), "the former memory was written"


def assert_close_or_same(a, b):
    """Bitwise where the layout stayed; a changed layout may be summed in another order."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=3e-7, atol=3e-7)


@pytest.mark.interpret
@pytest.mark.row(33)
@pytest.mark.skipif(not hasattr(torch.utils, "swap_tensors"), reason="no swap_tensors")
def test_swap_tensors_swaps_the_values_only(backend, device, tier):
    if tier == "ptx":
        pytest.skip("the PTX machine has weak references to tensors, with which torch swaps none")
    (changed, a), (kept, b) = twins(SHAPES, device, backend, **STRONG)
    run(a, changed, 1)
    run(b, kept, 1)
    a.zero_grad()
    # The optimizer's table refers to gradients that must not keep the tensors from swapping.
    for p in changed:
        other = torch.nn.Parameter(p.detach().clone())
        torch.utils.swap_tensors(p, other)
    run(a, changed, 2, first=1)
    run(b, kept, 2, first=1)
    assert same_bits(copies(changed), copies(kept))


@pytest.mark.row(33)
def test_share_memory(backend, device):
    (changed, a), (kept, b) = twins(SHAPES, device, backend, **STRONG)
    run(a, changed, 1)
    run(b, kept, 1)
    for p in changed:
        p.share_memory_()
    run(a, changed, 1, first=1)
    run(b, kept, 1, first=1)
    assert same_bits(copies(changed), copies(kept))


@pytest.mark.row(33)
@pytest.mark.parametrize("masters", [False, True])
def test_model_converted_to_another_dtype(masters, any_backend, device):
    model = torch.nn.Linear(4, 3).to(device, torch.bfloat16)
    params = list(model.parameters())
    optimizer = LARS(params, **STRONG, master_weights=masters, backend=any_backend)
    run(optimizer, params, 2)
    model.to(torch.float32)
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    for p in params:
        p.grad = None
    truth = Truth(params, **STRONG)
    truth.buffers = [v.double().cpu() for v in momenta(optimizer, params)]
    for step in range(2, 4):
        set_grads(params, step)
        truth.step([p.grad for p in params])
        optimizer.step()
    assert_true(params, truth, steps=2)


@pytest.mark.row(33)
def test_master_weights_with_the_parameter_memory_replaced(any_backend, device):
    (changed, a), (kept, b) = twins(
        SHAPES, device, any_backend, torch.bfloat16, **STRONG, master_weights=True
    )
    run(a, changed, 1)
    run(b, kept, 1)
    surroundings = torch.full((3, 8), 7.0, dtype=torch.bfloat16, device=device)
    surroundings[:, :4] = changed[0].detach()
    changed[0].data = surroundings[:, :4]  # not dense: its rows lie 8 apart
    run(a, changed, 1, first=1)
    run(b, kept, 1, first=1)
    assert same_bits(copies(changed), copies(kept))
    assert bool((surroundings[:, 4:] == 7).all())


@pytest.mark.row(33)
def test_freed_memory_is_refused_before_anything_is_written(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    for kind in ("parameter", "gradient", "momentum"):
        run(optimizer, params, 1)
        set_grads(params, 1)
        victim = {"parameter": params[1].data, "gradient": params[1].grad,
                  "momentum": optimizer.state[params[1]]["momentum_buffer"]}[kind]  # fmt: skip
        saved, size = victim.clone(), victim.untyped_storage().nbytes()
        victim.untyped_storage().resize_(0)
        before = copies(params[:1])
        with pytest.raises(RuntimeError, match=r"\[1\].*storage was freed"):
            optimizer.step()
        assert same_bits(copies(params[:1]), before)
        victim.untyped_storage().resize_(size)
        victim.copy_(saved)
        optimizer.step()
    fresh = make_params(SHAPES, device=device)
    optimizer = LARS(fresh, **STRONG, backend=backend)
    set_grads(fresh)
    fresh[1].data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage was freed"):
        optimizer.step()
    assert not optimizer.state


# ------------------------------------------------------------------ row 35: state tensors


@pytest.mark.row(35)
def test_state_replaced_is_followed(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer, truth = LARS(params, **STRONG, backend=backend), Truth(params, **STRONG)
    for step, change in enumerate((None, "replaced", "data", "in place", "cleared", "cast")):
        held = optimizer.state
        for i, p in enumerate(params):
            if change is None:
                continue
            new = torch.full_like(p, 0.01 * (step + i)).detach()
            if change == "replaced":
                held[p]["momentum_buffer"] = new
            elif change == "data":
                held[p]["momentum_buffer"].data = new
            elif change == "in place":
                held[p]["momentum_buffer"].copy_(new)
            elif change == "cast":
                held[p]["momentum_buffer"] = new.double()
            truth.buffers[i] = new.double().cpu()
        if change == "cleared":
            held.clear()
            truth.buffers = [None] * len(params)
        grads = make_grads(params, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        truth.step(grads)
    assert_true(params, truth, steps=6)
    assert all(v.dtype == torch.float32 for v in momenta(optimizer, params))


@pytest.mark.row(35)
def test_state_whose_data_was_replaced_by_another_shape(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    run(optimizer, params, 2)
    optimizer.state[params[1]]["momentum_buffer"].data = torch.zeros(1, device=device)
    before = copies(params)
    with pytest.raises(RuntimeError, match=r"\[1\].*momentum_buffer.*has shape \(1,\)"):
        optimizer.step()
    assert same_bits(copies(params), before)


# ------------------------------------------------------------------ row 36: gradient buffers


@pytest.mark.interpret
@pytest.mark.row(36)
@pytest.mark.parametrize("kind", ["new", "in place", "alternating", "bucket view"])
def test_gradient_buffers(kind, backend, device):
    params = make_params(SHAPES, device=device)
    optimizer, truth = LARS(params, **STRONG, backend=backend), Truth(params, **STRONG)
    flat = torch.zeros(sum(p.numel() for p in params) + 1, device=device)
    views = [flat[1:13].view(3, 4), flat[13:18]]
    buffers = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(4):
        values = make_grads(params, step)
        if kind == "new":
            grads = values
        else:
            grads = {"in place": buffers[0], "alternating": buffers[step % 2], "bucket view": views}
            grads = grads[kind]
            for g, value in zip(grads, values, strict=True):
                g.copy_(value)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        truth.step(values)
        assert same_bits([p.grad for p in params], values)
        optimizer.zero_grad(set_to_none=kind == "new")
    assert_true(params, truth, steps=4)


# ------------------------------------------------------------------ row 37: lists edited


@pytest.mark.row(37)
def test_groups_edited_between_steps(backend, device):
    a, b, c, d = params = make_params([(3,), (4,), (2, 2), (5,)], device=device)
    optimizer, truth = LARS([a, b], **STRONG, backend=backend), Truth(params, **STRONG)

    def step(number, present):
        grads = [g if i in present else None for i, g in enumerate(make_grads(params, number))]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        truth.step(grads)

    step(0, {0, 1})
    optimizer.add_param_group({"params": [c]})
    step(1, {0, 1, 2})
    optimizer.param_groups[0]["params"].append(d)
    step(2, {0, 1, 2, 3})
    del optimizer.param_groups[0]["params"][1]
    step(3, {0, 2, 3})
    optimizer.param_groups.append({**optimizer.param_groups[1], "params": [b]})
    step(4, {0, 1, 2, 3})
    optimizer.param_groups[1]["params"][0] = c  # the same again
    step(5, {1, 2})
    assert_true(params, truth, steps=6)


@pytest.mark.row(37)
def test_duplicates_are_refused(backend, device):
    a, b = make_params([(3,), (4,)], device=device)
    optimizer = LARS([a], **STRONG, backend=backend)
    with pytest.raises(ValueError, match=r"duplicate|more than one parameter group"):
        optimizer.add_param_group({"params": [a]})
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [b, a]})
    set_grads([a, b])
    before = copies([a, b])
    with pytest.raises(ValueError, match="duplicate"):
        optimizer.step()
    assert same_bits(copies([a, b]), before)
