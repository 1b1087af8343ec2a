"""How a training loop uses the optimizer: closures, hooks, autograd, tied weights, accumulation."""

import copy

import pytest
import torch

from lars_fused import LARS
from tests.tools import (
    COMPILED,
    STRONG,
    copies,
    make_params,
    momenta,
    run,
    same_bits,
    set_grads,
    twins,
)

pytestmark = COMPILED

SHAPES = [(3, 2), (4,)]


def quadratic(params):
    return sum((p.double() ** 2).sum() for p in params)


# ------------------------------------------------------------------ row 30: closures


@pytest.mark.row(30)
def test_closure_runs_once_with_gradients_and_its_value_comes_back(backend, device):
    (closed, a), (plain, b) = twins(SHAPES, device, backend, **STRONG)
    set_grads(closed, 9)  # stale gradients, which the closure replaces
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        a.zero_grad()
        loss = quadratic(closed)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = a.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert loss.item() == pytest.approx(quadratic(plain).item())
    quadratic(plain).backward()
    assert b.step() is None
    assert same_bits(copies(closed), copies(plain))
    assert a.step(lambda: None) is None
    assert a.step(lambda: 3) == 3


@pytest.mark.row(30)
def test_an_exception_in_the_closure_changes_nothing(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    run(optimizer, params, 1)
    before, moments = copies(params), [v.clone() for v in momenta(optimizer, params)]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 // 0)
    assert torch.is_grad_enabled()
    assert same_bits(copies(params), before)
    assert same_bits(momenta(optimizer, params), moments)


# ------------------------------------------------------------------ rows 31 and 32: autograd


@pytest.mark.row(31)
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"nesterov": True}], ids=str)
def test_gradients_are_never_written(options, any_backend, device):
    params = make_params(SHAPES, device=device)
    params += make_params(SHAPES, torch.float64, device) + make_params([(0,)], device=device)
    optimizer = LARS(params, **STRONG, **options, backend=any_backend)
    set_grads(params)
    grads = [p.grad for p in params]
    before, versions = copies(grads), [g._version for g in grads]
    optimizer.step()
    optimizer.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert same_bits(grads, before)
    assert [g._version for g in grads] == versions


@pytest.mark.row(31)
def test_one_gradient_shared_by_two_parameters(backend, device):
    (shared, a), (own, b) = twins([(4,), (4,)], device, backend, **STRONG)
    g = torch.arange(1.0, 5.0, device=device)
    for p, q in zip(shared, own, strict=True):
        p.grad, q.grad = g, g.clone()
    for _ in range(2):
        a.step()
        b.step()
    assert same_bits(copies(shared), copies(own))


@pytest.mark.interpret
@pytest.mark.row(32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masters", [False, True])
def test_version_counters_rise_and_a_stale_graph_is_refused(dtype, masters, backend, device):
    params = make_params(SHAPES, dtype, device)
    optimizer = LARS(params, **STRONG, master_weights=masters, backend=backend)
    loss = quadratic(params)
    set_grads(params)
    before = [p._version for p in params]
    optimizer.step()
    assert all(p._version > v for p, v in zip(params, before, strict=True))
    product = (params[1] * params[1]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    del loss


@pytest.mark.row(32)
def test_parameters_without_a_gradient_keep_their_version(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert params[1]._version == 0


# ------------------------------------------------------------------ row 43: hooks


@pytest.mark.row(43)
def test_hooks_run_in_torchs_order_and_can_be_removed(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    set_grads(params)
    calls = []

    def note(name):
        return lambda *_: calls.append((name, same_bits(copies(params), before)))

    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    before = copies(params)
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    expected = [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    assert calls == expected
    optimizer.step()
    assert len(calls) == 4


@pytest.mark.row(43)
def test_hooks_edit_gradients_and_arguments(backend, device):
    (hooked, a), (plain, b) = twins(SHAPES, device, backend, **STRONG)

    def halve(optimizer, args, kwargs):
        for p in hooked:
            p.grad *= 0.5
        return (optimizer, lambda: 7), {}

    a.register_step_pre_hook(halve)
    for params in (hooked, plain):
        set_grads(params)
    for p in plain:
        p.grad *= 0.5
    assert a.step() == 7
    b.step()
    assert same_bits(copies(hooked), copies(plain))


@pytest.mark.row(43)
def test_hooks_of_a_copy_are_its_own(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("original"))
    twin = copy.deepcopy(optimizer)
    twin.register_step_post_hook(lambda *_: calls.append("copy"))
    twin.step()
    assert calls == ["copy"]
    optimizer.step()
    assert calls == ["copy", "original"]


@pytest.mark.row(43)
def test_state_dict_hooks(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **STRONG, backend=backend)
    run(optimizer, params, 1)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre"))

    def mark(_, state):
        calls.append("post")
        return {**state, "mark": 1}

    optimizer.register_state_dict_post_hook(mark)
    saved = optimizer.state_dict()
    assert calls == ["pre", "post"]
    assert saved["mark"] == 1

    def edit(_, state):
        state = copy.deepcopy(state)
        state["state"][0]["momentum_buffer"].fill_(2.0)
        return state

    optimizer.register_load_state_dict_pre_hook(edit)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.load_state_dict(saved)
    assert calls[-1] == "loaded"
    assert bool((optimizer.state[params[0]]["momentum_buffer"] == 2).all())
    assert not bool((saved["state"][0]["momentum_buffer"] == 2).any())


# ------------------------------------------------------------------ row 53: ways of training


@pytest.mark.row(53)
def test_optimizer_in_backward(backend, device):
    together, apart = (make_params(SHAPES, device=device) for _ in range(2))
    whole = LARS(together, **STRONG, backend=backend)
    single = {p: LARS([p], **STRONG, backend=backend) for p in apart}

    def step(p):
        single[p].step()
        single[p].zero_grad()

    for p in apart:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        quadratic(together).backward()
        whole.step()
        whole.zero_grad()
        quadratic(apart).backward()
        assert all(p.grad is None for p in apart)
    assert same_bits(copies(together), copies(apart))


@pytest.mark.row(53)
def test_tied_weights_are_updated_once_a_step(backend, device):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inward, self.outward = (torch.nn.Linear(3, 3, bias=False) for _ in range(2))
            self.outward.weight = self.inward.weight

        def forward(self, x):
            return self.outward(self.inward(x))

    model = Tied().to(device)
    params = list(model.parameters())
    assert len(params) == 1
    alone = [torch.nn.Parameter(params[0].detach().clone())]
    tied, free = (LARS(ps, **STRONG, backend=backend) for ps in (params, alone))
    for _ in range(2):
        x = torch.ones(2, 3, device=device)
        tied.zero_grad()
        model(x).sum().backward()
        alone[0].grad = params[0].grad.clone()
        tied.step()
        free.step()
    assert same_bits(copies(params), copies(alone))


@pytest.mark.row(53)
def test_accumulated_and_clipped_gradients(backend, device):
    (accumulated, a), (whole, b) = twins(SHAPES, device, backend, **STRONG)
    for _ in range(2):
        for params, parts in ((accumulated, 2), (whole, 1)):
            for _ in range(parts):
                (quadratic(params) / parts).backward()
            torch.nn.utils.clip_grad_norm_(params, 0.25)
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert same_bits(copies(accumulated), copies(whole))


# ------------------------------------------------------------------ rows 57 and 58: modes


@pytest.mark.interpret
@pytest.mark.row(57)
def test_inference_mode_around_a_step(backend, device):
    (inside, a), (outside, b) = twins(SHAPES, device, backend, **STRONG)
    for step in range(4):  # in it, out of it, in it again
        set_grads(inside, step)
        set_grads(outside, step)
        with torch.inference_mode(step % 2 == 0):
            a.step()
        b.step()
    assert same_bits(copies(inside), copies(outside))
    quadratic(inside).backward()


@pytest.mark.row(57)
def test_parameters_made_in_inference_mode(backend, device):
    with torch.inference_mode():
        params = make_params(SHAPES, device=device)
        set_grads(params)
        before = copies(params)
    optimizer = LARS(params, **STRONG, backend=backend)
    with pytest.raises(RuntimeError, match="inference mode"):
        optimizer.step()
    assert same_bits(copies(params), before)
    with torch.inference_mode():
        optimizer.step()
    assert not same_bits(copies(params), before)


@pytest.mark.row(58)
def test_deterministic_algorithms(backend, device):
    (strict, a), (plain, b) = twins(SHAPES, device, backend, **STRONG)
    torch.use_deterministic_algorithms(True)
    try:
        run(a, strict, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    run(b, plain, 2)
    assert same_bits(copies(strict), copies(plain))


@pytest.mark.interpret
@pytest.mark.row(58)
def test_the_order_of_the_parameters_changes_no_bit(backend, device, small_chunks):
    shapes = [(3, 2), (600,), (5,), (300,)]
    (forwards, a), (backwards, _) = twins(shapes, device, backend, **STRONG)
    b = LARS(backwards[::-1], **STRONG, backend=backend)
    for step in range(2):
        set_grads(forwards, step)
        set_grads(backwards, step)
        a.step()
        b.step()
    assert same_bits(copies(forwards), copies(backwards))


@pytest.mark.interpret
@pytest.mark.row(58)
def test_block_sizes_change_only_the_rounding(tier, backend, device, monkeypatch):
    if tier != "interpret":
        pytest.skip("chooses the interpreter's launch constants")
    from lars_fused.kernels import tuning

    results = []
    for chunk, block in ((256, 128), (1024, 256)):
        row = tuning.ROWS["interpreter"]._replace(chunk=chunk, block=block, threads=block // 2)
        monkeypatch.setitem(tuning.ROWS, "interpreter", row)
        ((params, optimizer),) = twins([(700,)], device, backend, count=1, **STRONG)
        run(optimizer, params, 2)
        results.append(params[0].detach())
    torch.testing.assert_close(*results, rtol=3e-7, atol=1e-8)
