"""Saving, loading, copying and sending elsewhere: training goes on as if nothing had happened."""

import copy
import io
import pickle

import pytest
import torch

from lars_fused import LARS, convert_state_dict
from tests.distributed.ranks import group_of_one
from tests.oracle import Truth, assert_true
from tests.tools import (
    BOTH,
    STRONG,
    copies,
    make_params,
    momenta,
    run,
    same_bits,
    set_grads,
    twins,
)

pytestmark = BOTH

SHAPES = [(3, 2), (4,)]
OPTIONS = {**STRONG, "dampening": 0.4}


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------ rows 38 and 41: loading


@pytest.mark.row(38, 41)
@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize("carry", [lambda s: s, copy.deepcopy, through_file],
                         ids=["dict", "deepcopy", "weights_only file"])  # fmt: skip
def test_a_round_trip_is_bitwise_invisible(when, carry, backend, device):
    (saved, a), (kept, b) = twins(SHAPES, device, backend, **OPTIONS)
    run(a, saved, when)
    run(b, kept, when)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved]
    optimizer = LARS(resumed, lr=9.0, backend=backend)
    optimizer.load_state_dict(carry(a.state_dict()))
    run(optimizer, resumed, 2, first=when)
    run(b, kept, 2, first=when)
    assert same_bits(copies(resumed), copies(kept))
    assert same_bits(momenta(optimizer, resumed), momenta(b, kept))


@pytest.mark.row(38)
def test_the_loaded_state_aliases_nothing(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    run(optimizer, params, 2)
    saved = optimizer.state_dict()
    before = {i: s["momentum_buffer"].clone() for i, s in saved["state"].items()}
    other = make_params(SHAPES, device=device)
    loaded = [LARS(other, **OPTIONS, backend=backend) for _ in range(2)]
    for o in loaded:
        o.load_state_dict(saved)
    pointers = [
        v.data_ptr()
        for o in (optimizer, *loaded)
        for v in momenta(o, params if o is optimizer else other)
    ]
    assert len(set(pointers)) == len(pointers)
    run(loaded[0], other, 1)
    assert all(torch.equal(saved["state"][i]["momentum_buffer"], v) for i, v in before.items())
    assert same_bits(momenta(loaded[1], other), list(before.values()))


@pytest.mark.row(38)
def test_loading_into_a_running_optimizer_is_followed(backend, device):
    (rewound, a), (straight, b) = twins(SHAPES, device, backend, **OPTIONS)
    run(a, rewound, 1)
    checkpoint = copy.deepcopy((a.state_dict(), copies(rewound)))
    run(a, rewound, 3, first=7)
    for _ in range(2):
        a.load_state_dict(checkpoint[0])
        with torch.no_grad():
            for p, value in zip(rewound, checkpoint[1], strict=True):
                p.copy_(value)
        run(a, rewound, 2, first=1)
    run(b, straight, 3)
    assert same_bits(copies(rewound), copies(straight))


def misfits(saved):
    yield "fewer groups", {**saved, "param_groups": []}
    group = saved["param_groups"][0]
    yield "fewer parameters", {**saved, "param_groups": [{**group, "params": [0]}]}
    bad = copy.deepcopy(saved)
    bad["state"][1]["momentum_buffer"] = torch.zeros(7)
    yield "another shape", bad
    for key, value in (("lr", -1.0), ("momentum", "0.9"), ("denominator", "other")):
        yield f"{key}={value}", {**saved, "param_groups": [{**group, key: value}]}


@pytest.mark.row(38)
@pytest.mark.parametrize("case", range(6))
def test_a_misfit_is_refused_and_the_optimizer_unchanged(case, backend, device):
    (hit, a), (kept, b) = twins(SHAPES, device, backend, **OPTIONS)
    run(a, hit, 1)
    run(b, kept, 1)
    name, bad = list(misfits(a.state_dict()))[case]
    with pytest.raises((ValueError, TypeError)):
        a.load_state_dict(bad)
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"], name
    run(a, hit, 2, first=1)
    run(b, kept, 2, first=1)
    assert same_bits(copies(hit), copies(kept)), name


# ------------------------------------------------------------------ row 39: other people's


@pytest.mark.row(39)
def test_checkpoint_of_torch_sgd(backend, device):
    params = make_params(SHAPES, device=device)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.7, weight_decay=0.01, dampening=0.2)
    run(sgd, params, 2)
    optimizer = LARS(params, trust_coefficient=0.03, lr_in_momentum=False, backend=backend)
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["dampening"]) == (0.1, 0.7, 0.2)
    assert group["trust_coefficient"] == 0.03
    assert "foreach" in group  # what LARS does not know stays for who does
    truth = Truth(params, **{k: group[k] for k in group if k not in ("params", "foreach")})
    truth.buffers = [sgd.state[p]["momentum_buffer"].double().cpu() for p in params]
    set_grads(params, 2)
    truth.step([p.grad for p in params])
    optimizer.step()
    assert_true(params, truth)


@pytest.mark.row(39)
@pytest.mark.parametrize("options", [{"lr_in_momentum": True}, {"lr_in_momentum": False}])
@pytest.mark.parametrize("source", ["sgd", "rocm"])
def test_momentum_that_means_something_else_is_refused(options, source, backend, device):
    """It is 1 / lr too large: 10 times at lr 0.1."""
    params = make_params(SHAPES, device=device)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.7)
    run(sgd, params, 2)
    saved = copy.deepcopy(sgd.state_dict())
    optimizer = LARS(params, **options, backend=backend)
    if source == "rocm":
        saved["param_groups"][0].update(is_skipped=False, trust_coefficient=0.001)
    elif not options["lr_in_momentum"]:
        optimizer.load_state_dict(saved)  # means the same
        return
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"params'\]\[0\] .*momentum_buffer.*convert_state_dict"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before
    optimizer.load_state_dict(convert_state_dict(sgd.state_dict(), "sgd"))
    assert optimizer.state[params[0]]["momentum_buffer"].any()


@pytest.mark.row(39)
def test_sgd_without_momentum_and_the_way_back(backend, device):
    params = make_params(SHAPES, device=device)
    sgd = torch.optim.SGD(params, lr=0.1)
    run(sgd, params, 1)
    optimizer = LARS(params, backend=backend)
    optimizer.load_state_dict(sgd.state_dict())
    run(optimizer, params, 2)
    sgd.load_state_dict(optimizer.state_dict())
    run(sgd, params, 1)


@pytest.mark.row(39)
def test_missing_and_extra_keys(backend, device):
    params = make_params(SHAPES, device=device)
    optimizer = LARS(params, **OPTIONS, backend=backend)
    run(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("trust_clip", "eps", "decay_zero_norm", "denominator", "maximize"):
        del saved["param_groups"][0][name]  # as a version would have it that did not know them
    saved["param_groups"][0]["initial_lr"] = 0.3
    saved["state"][0]["step"] = 5
    del saved["state"][1]["momentum_buffer"]
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = LARS(fresh, eps=1e-3, backend=backend)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["eps"] == 1e-3
    run(loaded, fresh, 2)
    assert loaded.param_groups[0]["initial_lr"] == 0.3
    assert loaded.state[fresh[0]]["step"] == 5
    assert loaded.state_dict()["param_groups"][0]["initial_lr"] == 0.3


@pytest.mark.row(39)
def test_named_and_unnamed_parameters_exchange_checkpoints(backend, device):
    model = torch.nn.Linear(3, 2, device=device)
    params = list(model.parameters())
    unnamed = LARS(params, **OPTIONS, backend=backend)
    run(unnamed, params, 1)
    named = LARS(model.named_parameters(), backend=backend)
    named.load_state_dict(unnamed.state_dict())
    assert same_bits(momenta(named, params), momenta(unnamed, params))
    unnamed.load_state_dict(named.state_dict())
    run(unnamed, params, 1)
    assert list(named.layer_stats()) == []
    run(named, params, 1)
    assert list(named.layer_stats()) == ["weight", "bias"]


# ------------------------------------------------------------------ row 40: precision


@pytest.mark.row(40)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_state_of_low_precision_parameters_survives(masters, dtype, backend, device):
    options = {**OPTIONS, "master_weights": masters}
    (saved, a), (kept, b) = twins(SHAPES, device, backend, dtype, **options)
    run(a, saved, 2)
    run(b, kept, 2)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved]
    optimizer = LARS(resumed, **options, backend=backend)
    optimizer.load_state_dict(through_file(a.state_dict()))
    assert same_bits(momenta(optimizer, resumed), momenta(a, saved))
    assert all(v.dtype == torch.float32 for v in momenta(optimizer, resumed))
    run(optimizer, resumed, 2, first=2)
    run(b, kept, 2, first=2)
    assert same_bits(copies(resumed), copies(kept))


@pytest.mark.row(40)
@pytest.mark.parametrize("old", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("new", [torch.float32, torch.bfloat16, torch.float64])
def test_resuming_in_another_dtype(old, new, any_backend, device):
    params = make_params(SHAPES, old, device)
    optimizer = LARS(params, **STRONG, backend=any_backend)
    run(optimizer, params, 2)
    resumed = [torch.nn.Parameter(p.detach().to(new)) for p in params]
    other = LARS(resumed, **STRONG, backend=any_backend)
    other.load_state_dict(optimizer.state_dict())
    truth = Truth(resumed, **STRONG)
    truth.buffers = [v.double().cpu() for v in momenta(optimizer, params)]
    set_grads(resumed, 2)
    truth.step([p.grad for p in resumed])
    other.step()
    assert_true(resumed, truth)
    expected = torch.float64 if new == torch.float64 else torch.float32
    assert all(v.dtype == expected for v in momenta(other, resumed))


# ------------------------------------------------------------------ row 42: copies


@pytest.mark.row(42)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("carry", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_model_and_optimizer_trains_on_alike(steps, carry, backend, device):
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = LARS(model.parameters(), **OPTIONS, backend=backend)
    run(optimizer, list(model.parameters()), steps)
    pair = (model, optimizer)
    if carry == "deepcopy":
        twin, other = copy.deepcopy(pair)
    elif carry == "pickle":
        twin, other = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert other._step_supports_amp_scaling is True
    assert repr(other) == repr(optimizer)
    ours, theirs = list(model.parameters()), list(twin.parameters())
    before = copies(ours)
    run(other, theirs, 2, first=steps)
    assert same_bits(copies(ours), before)
    run(optimizer, ours, 2, first=steps)
    assert same_bits(copies(theirs), copies(ours))
    calls = []
    other.register_step_post_hook(lambda *_: calls.append(1))
    other.add_param_group({"params": make_params([(2,)], device=device)})
    other.step()
    assert calls == [1]


def step_in_child(queue, pair):
    model, optimizer = pair
    run(optimizer, list(model.parameters()), 2)
    queue.put([p.tolist() for p in model.parameters()])


@pytest.mark.row(42)
def test_spawned_process(backend, device):
    if device != "cpu":
        pytest.skip("sends CPU tensors to the process")
    model = torch.nn.Linear(3, 2)
    optimizer = LARS(model.parameters(), **OPTIONS, backend=backend)
    run(optimizer, list(model.parameters()), 1)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    twin = copy.deepcopy((model, optimizer))
    child = context.Process(target=step_in_child, args=(queue, twin))
    child.start()
    result = queue.get()
    child.join(60)
    assert child.exitcode == 0
    run(optimizer, list(model.parameters()), 2)
    assert result == [p.tolist() for p in model.parameters()]


# ------------------------------------------------------------------ rows 41 and 50: distributed


@pytest.fixture
def one_process_group(device):
    if device != "cpu":
        pytest.skip("a gloo group of CPU tensors")
    with group_of_one():
        yield


@pytest.mark.row(41)
def test_distributed_checkpoint_priming_moves_nothing(backend, one_process_group):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = torch.nn.Linear(3, 2)
    params = list(model.parameters())
    before = copies(params)
    fresh = LARS(params, **STRONG, backend=backend)
    get_optimizer_state_dict(model, fresh)  # steps with lr 0 and zero gradients
    assert same_bits(copies(params), before)
    optimizer = LARS(params, **STRONG, backend=backend)
    run(optimizer, params, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    after, moments = copies(params), momenta(optimizer, params)
    resumed = LARS(params, lr=9.0, backend=backend)
    set_optimizer_state_dict(model, resumed, saved)
    assert same_bits(copies(params), after)
    assert same_bits(momenta(resumed, params), moments)
    assert resumed.param_groups[0]["lr"] == STRONG["lr"]


@pytest.mark.row(50)
@pytest.mark.parametrize("static", [False, True])
def test_ddp_with_gradients_as_bucket_views(static, backend, one_process_group):
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model = copy.deepcopy(plain)
    ddp = torch.nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, static_graph=static
    )
    a = LARS(ddp.parameters(), **STRONG, backend=backend)
    b = LARS(plain.parameters(), **STRONG, backend=backend)
    for step in range(3):
        x = torch.arange(6.0).reshape(2, 3) + step
        for network, optimizer in ((ddp, a), (plain, b)):
            optimizer.zero_grad()
            network(x).pow(2).mean().backward()
            optimizer.step()
    assert same_bits(copies(model.parameters()), copies(plain.parameters()))


@pytest.mark.row(50)
def test_zero_redundancy_optimizer(backend, one_process_group):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    (sharded, _), (plain, b) = twins(SHAPES, "cpu", backend, **STRONG)
    a = ZeroRedundancyOptimizer(sharded, optimizer_class=LARS, **STRONG, backend=backend)
    run(a, sharded, 3)
    run(b, plain, 3)
    assert same_bits(copies(sharded), copies(plain))
