"""`torch.amp.GradScaler`: its scale and its overflow flag are read where the step is computed."""

import copy
import itertools

import pytest
import torch

from lars_fused import LARS, lars_step
from tests import internals
from tests.tools import COMPILED

pytestmark = COMPILED

# The dampening tells a first step from a second one.
OPTIONS = {"lr": 2.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.05,
           "dampening": 0.5}  # fmt: skip
STEPS = 5


@pytest.fixture(params=["flag_on_host", "flag_on_device"])
def flag(request, monkeypatch):
    """Where the overflow flag lies. A host that may not look at it launches all the same."""
    if request.param == "flag_on_device":
        internals.keep_found_inf_from_the_host(monkeypatch)
    return request.param


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype))
            for s in ((3, 5), (7,))]  # fmt: skip


def coefficients(t, params):
    generator = torch.Generator().manual_seed(100 + t)
    return [torch.randn(p.shape, generator=generator).to(p) for p in params]


def backward(scaler, params, t, bad=None):
    """Gradients of step t, scaled; one element spoilt if the step is to overflow."""
    for p in params:
        p.grad = None
    loss = sum((p * c).sum() for p, c in zip(params, coefficients(t, params), strict=True))
    scaler.scale(loss).backward()
    if bad is not None:
        params[0].grad[1, 2] = bad


def new_scaler(device, **options):
    return torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=3, **options)


def snapshot(params, state):
    values = {f"p{i}": p.detach() for i, p in enumerate(params)}
    values |= {f"s{i}.{k}": v for i, held in state.items() for k, v in held.items()}
    return {name: value.clone() for name, value in values.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def plain_run(device, backend, steps, dtype=torch.float32):
    """The same steps without a scaler."""
    params = parameters(device, dtype)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    for t in steps:
        for p, c in zip(params, coefficients(t, params), strict=True):
            p.grad = c
        optimizer.step()
    return snapshot(params, optimizer.state_dict()["state"])


PATTERNS = [((), None), ((0,), "nan"), ((0, 1), "inf"), ((2,), "-inf"), ((0, 3), "nan"),
            ((1, 2, 3), "inf"), ((0, 1, 2, 3, 4), "nan")]  # fmt: skip


@pytest.mark.row(28)
@pytest.mark.parametrize(("overflows", "bad"), PATTERNS, ids=str)
def test_the_run_is_that_without_the_overflowed_steps(overflows, bad, flag, backend, device):
    # Whatever a skipped first step allocates must not be read later.
    for _ in range(8):
        torch.full((64,), float("nan"), device=device)
    params = parameters(device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    scaler = new_scaler(device)
    for t in range(STEPS):
        backward(scaler, params, t, float(bad) if t in overflows else None)
        grads = [p.grad.clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        for p, g in zip(params, grads, strict=True):
            assert torch.equal(p.grad, g) or p.grad.isnan().any()
            assert torch.equal(p.grad.nan_to_num(), g.nan_to_num())
    expected = plain_run(device, backend, [t for t in range(STEPS) if t not in overflows])
    assert_same(snapshot(params, optimizer.state_dict()["state"]), expected)


@pytest.mark.row(28)
def test_an_overflow_beside_float64_parameters(flag, any_backend, device):
    """They take the portable path, also beside kernels."""
    params = parameters(device, torch.float64)
    optimizer = LARS(params, **OPTIONS, backend=any_backend)
    scaler = new_scaler(device)
    for t in range(STEPS):
        backward(scaler, params, t, float("nan") if t in (0, 3) else None)
        scaler.step(optimizer)
        scaler.update()
    expected = plain_run(device, any_backend, [1, 2, 4], torch.float64)
    assert_same(snapshot(params, optimizer.state_dict()["state"]), expected)


@pytest.mark.row(28)
def test_a_skipped_step_changes_nothing_at_all(flag, backend, device):
    """Parameters and state bitwise, before the first step and later; nothing is made for it."""
    params = parameters(device, torch.float16)
    optimizer = LARS(params, **OPTIONS, master_weights=True, backend=backend)
    scaler = new_scaler(device)
    for t, bad in enumerate((float("nan"), None, float("inf"))):
        before = snapshot(params, optimizer.state_dict()["state"])
        backward(scaler, params, t, bad)
        scaler.step(optimizer)
        scaler.update()
        after = snapshot(params, optimizer.state_dict()["state"])
        if bad is not None:
            assert_same(after, before)
        assert set(optimizer.state_dict()["state"]) == (set() if t == 0 else {0, 1})


@pytest.mark.interpret
def test_a_first_step_stays_first_where_other_parameters_join(flag, backend, device):
    """A is skipped alone; the step after has A and B; each has its own first step then."""
    params = parameters(device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    scaler = new_scaler(device)
    params[1].requires_grad_(False)
    backward(scaler, params, 9, float("nan"))
    scaler.step(optimizer)
    scaler.update()
    params[1].requires_grad_(True)
    for t in range(2):
        backward(scaler, params, t)
        scaler.step(optimizer)
        scaler.update()
    assert_same(snapshot(params, optimizer.state_dict()["state"]),
                plain_run(device, backend, range(2)))  # fmt: skip


def test_a_skipped_step_keeps_state_that_was_there_before(flag, backend, device):
    """Loaded masters stay, although without momentum every step looks like a first one."""
    params = parameters(device, torch.float16)
    options = {**OPTIONS, "momentum": 0.0, "dampening": 0.0, "master_weights": True}
    optimizer = LARS(params, **options, backend=backend)
    for p, c in zip(params, coefficients(0, params), strict=True):
        p.grad = c
    optimizer.step()
    resumed = LARS(params, **options, backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    before = snapshot(params, optimizer.state_dict()["state"])
    assert any(name.endswith("master_param") for name in before)
    scaler = new_scaler(device)
    backward(scaler, params, 1, float("nan"))
    scaler.step(resumed)
    assert_same(snapshot(params, resumed.state_dict()["state"]), before)


def test_masters_are_taken_after_a_skipped_first_step(flag, backend, device):
    """The parameters may be loaded anew in between; the masters must be those."""
    params = parameters(device, torch.float16)
    optimizer = LARS(params, **OPTIONS, master_weights=True, backend=backend)
    scaler = new_scaler(device)
    backward(scaler, params, 0, float("nan"))
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        for p in params:
            p.mul_(2)
    expected = [p.detach().float().abs().sum().item() for p in params]
    backward(scaler, params, 1)
    scaler.step(optimizer)
    for p, size in zip(params, expected, strict=True):
        assert p.detach().float().abs().sum().item() == pytest.approx(size, rel=0.3)


def test_a_state_dict_taken_between_steps_changes_no_step(flag, backend, device):
    params, twin = parameters(device), parameters(device)
    one, two = (LARS(ps, **OPTIONS, backend=backend) for ps in (params, twin))
    scalers = [new_scaler(device) for _ in range(2)]
    for t in range(4):
        for optimizer, ps, scaler in zip((one, two), (params, twin), scalers, strict=True):
            backward(scaler, ps, t, float("nan") if t == 1 else None)
            scaler.step(optimizer)
            scaler.update()
        two.state_dict()
        assert list(two.layer_stats()) == [0, 1]
    assert_same(snapshot(params, one.state_dict()["state"]),
                snapshot(twin, two.state_dict()["state"]))  # fmt: skip


@pytest.mark.row(28)
def test_the_step_writes_no_gradient_and_runs_no_unscaling(backend, device):
    params = parameters(device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    for p, c in zip(params, coefficients(0, params), strict=True):
        p.grad = c * 8
    versions = [p.grad._version for p in params]
    optimizer.grad_scale = torch.tensor(8.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert [p.grad._version for p in params] == versions
    assert_same(snapshot(params, optimizer.state_dict()["state"]),
                plain_run(device, backend, [0]))  # fmt: skip


@pytest.mark.parametrize("scale", [3.0, 1e5])
def test_a_scale_that_is_no_power_of_two(scale, backend, device):
    params = parameters(device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    for p, c in zip(params, coefficients(0, params), strict=True):
        p.grad = c * scale
    optimizer.grad_scale = torch.tensor(scale, device=device)
    optimizer.step()
    expected = plain_run(device, backend, [0])
    for name, value in snapshot(params, optimizer.state_dict()["state"]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.row(29)
def test_unscaled_and_clipped_gradients(backend, device):
    params, twin = parameters(device), parameters(device)
    optimizer, plain = (LARS(ps, **OPTIONS, backend=backend) for ps in (params, twin))
    scaler = new_scaler(device)
    for t, bad in enumerate((None, float("inf"), None)):
        backward(scaler, params, t, bad)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        if bad is None:
            for p, c in zip(twin, coefficients(t, twin), strict=True):
                p.grad = c
            torch.nn.utils.clip_grad_norm_(twin, 0.5)
            plain.step()
    assert_same(snapshot(params, optimizer.state_dict()["state"]),
                snapshot(twin, plain.state_dict()["state"]))  # fmt: skip


@pytest.mark.row(29)
def test_two_optimizers_of_one_scaler(backend, device):
    """An overflow in one skips that one alone, as GradScaler means it."""
    one, two = parameters(device), parameters(device)
    optimizers = [LARS(ps, **OPTIONS, backend=backend) for ps in (one, two)]
    scaler = new_scaler(device)
    for t, bad in enumerate((float("nan"), None)):
        for ps, spoilt in ((one, bad), (two, None)):
            backward(scaler, ps, t, spoilt)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
    for ps, optimizer, steps in ((one, optimizers[0], [1]), (two, optimizers[1], [0, 1])):
        assert_same(snapshot(ps, optimizer.state_dict()["state"]),
                    plain_run(device, backend, steps))  # fmt: skip


@pytest.mark.row(29)
def test_a_disabled_scaler_is_none(backend, device):
    params = parameters(device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    scaler = new_scaler(device, enabled=False)
    for t in range(2):
        backward(scaler, params, t)
        scaler.step(optimizer)
        scaler.update()
    assert_same(snapshot(params, optimizer.state_dict()["state"]),
                plain_run(device, backend, range(2)))  # fmt: skip


def test_a_copy_still_takes_the_scale_itself(backend, device):
    """Deepcopy of torch's fused optimizers forgets it, and GradScaler then unscales gradients."""
    params = parameters(device)
    copied = copy.deepcopy(LARS(params, **OPTIONS, backend=backend))
    assert copied._step_supports_amp_scaling
    assert not hasattr(copied, "grad_scale")
    ps = list(itertools.chain(*(group["params"] for group in copied.param_groups)))
    scaler = new_scaler(device)
    backward(scaler, ps, 0)
    scaler.step(copied)
    assert_same(snapshot(ps, copied.state_dict()["state"]), plain_run(device, backend, [0]))


def test_lars_step_reads_scale_and_flag(backend, device):
    params = [p.detach() for p in parameters(device)]
    grads = [c * 8 for c in coefficients(0, params)]
    buffers = [None, None]
    scale = torch.tensor(8.0, device=device)
    before = [p.clone() for p in params]
    lars_step(params, grads, buffers, **OPTIONS, backend=backend, grad_scale=scale,
              found_inf=torch.tensor(1.0, device=device))  # fmt: skip
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert buffers == [None, None] or device == "cuda"
    buffers = [None, None]
    lars_step(params, grads, buffers, **OPTIONS, backend=backend, grad_scale=scale,
              found_inf=torch.tensor(0.0, device=device))  # fmt: skip
    state = {i: {"momentum_buffer": v} for i, v in enumerate(buffers)}
    assert_same(snapshot(params, state), plain_run(device, backend, [0]))


def asked_by(module, optimizer):
    """The answer that a module of this name gets to Lightning's question."""
    scope = {"__name__": module}
    exec("def ask(o): return getattr(o, '_step_supports_amp_scaling', False)", scope)
    return scope["ask"](optimizer)


def test_lightning_may_unscale_and_clip(device, backend):
    """It refuses to clip where step() unscales, though a step of unscaled gradients works, too."""
    optimizer = LARS(parameters(device), backend=backend)
    assert asked_by("torch.amp.grad_scaler", optimizer) is True
    assert asked_by("lightning.pytorch.plugins.precision.amp", optimizer) is False
    assert asked_by("pytorch_lightning.plugins.precision.amp", optimizer) is False
    assert asked_by("lightning_fabric.plugins.precision.amp", optimizer) is False
    optimizer._step_supports_amp_scaling = False
    assert asked_by("torch.amp.grad_scaler", optimizer) is False
