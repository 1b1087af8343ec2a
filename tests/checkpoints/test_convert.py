"""Other optimizers' checkpoints: ten steps there, converted, ten steps here, as twenty there."""

import copy

import pytest
import torch

from lars_fused import LARS, convert_state_dict
from lars_fused.checkpoints import convert
from tests.conformance import originals

pytestmark = pytest.mark.cpu

SHAPES = [(4, 3), (4,), (2, 3, 2), (3,)]
DECAY = 0.05
NESTEROV = {"momentum": 0.9, "nesterov": True}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def gradients(t):
    """Those of step t; the last tensor joins at step 4, and one gradient is zero at times."""
    grads = tensors(100 + t)
    if t < 4:
        grads[3] = None
    if t % 5 == 3:
        grads[2].zero_()
    return grads


def rate(t):
    return 0.5 * (1 + t % 4) / (1 + t)


def one_group(ps):
    return [{"params": ps}]


def two_groups(ps):
    """With decay and without, as timm's helper makes them."""
    return [{"params": [ps[0], ps[2]]}, {"params": [ps[1], ps[3]], "weight_decay": 0.0}]


def by_dimension(ps):
    """What `param_groups` makes of a model."""
    return [{"params": [ps[0], ps[2]]}, {"params": [ps[1], ps[3]]}]


def skipping(ps):
    """ROCm's mark for groups that it does not adapt; it decays them."""
    adapted, others = by_dimension(ps)
    return [adapted, {**others, "is_skipped": True}]


# source, the original, its options, its groups, the groups of LARS, options for the conversion
CASES = [
    ("sgd", originals.Sgd, {"momentum": 0.9, "dampening": 0.3}, one_group, one_group, {}),
    ("sgd", originals.Sgd, NESTEROV, two_groups, two_groups, {}),
    ("sgd", originals.Sgd, {}, one_group, one_group, {}),
    ("timm", originals.Timm, {"momentum": 0.9}, two_groups, two_groups, {}),
    ("timm", originals.Timm, {**NESTEROV, "trust_coeff": 0.05, "eps": 1e-3, "trust_clip": True},
     two_groups, two_groups, {}),
    ("timm", originals.Timm, {"momentum": 0.9, "always_adapt": True}, two_groups, two_groups, {}),
    ("apex_larc", originals.ApexLarc, NESTEROV, one_group, one_group, {}),
    ("apex_larc", originals.ApexLarc,
     {"momentum": 0.9, "clip": False, "trust_coefficient": 0.1, "eps": 1e-2},
     one_group, one_group, {"trust_clip": False, "trust_coefficient": 0.1, "eps": 1e-2}),
    ("torchlars", originals.TorchLars, {"momentum": 0.9, "dampening": 0.2}, one_group, one_group,
     {}),
    ("mae", originals.Mae, {"trust_coefficient": 0.02}, one_group, by_dimension, {}),
    ("mae", originals.Mae, {}, by_dimension, by_dimension, {}),
    ("barlow", originals.Barlow, {"eta": 0.02}, one_group, one_group, {}),
    ("barlow", originals.Barlow, {"weight_decay_filter": True, "lars_adaptation_filter": True},
     one_group, by_dimension, {}),
    ("barlow", originals.Barlow, {"weight_decay_filter": lambda p: p.ndim == 1,
                                  "lars_adaptation_filter": None},
     one_group, by_dimension, {}),
    ("mae", originals.Barlow, {"weight_decay_filter": True, "lars_adaptation_filter": True},
     one_group, by_dimension, {}),
    ("dino", originals.Dino, {"eta": 0.02}, one_group, by_dimension, {}),
    ("rocm_fused_lars", originals.RocmFusedLars, {"momentum": 0.9, "dampening": 0.4},
     one_group, one_group, {}),
    ("rocm_fused_lars", originals.RocmFusedLars, {"momentum": 0.9}, skipping, by_dimension, {}),
    ("rocm_fused_lars", originals.RocmFusedLars, {**NESTEROV, "eps": 0.1, "trust_coefficient": 0.2},
     one_group, one_group, {}),
]  # fmt: skip
IDS = [f"{source}-{i}" for i, (source, *_) in enumerate(CASES)]


def run_original(original, options, groups, steps):
    other = original(groups(tensors()), lr=rate(0), weight_decay=DECAY, **options)
    for t in range(steps):
        other.set_lr(rate(t))
        other.step(in_order(groups, gradients(t)))
    return other


def in_order(groups, items):
    """Items of the tensors of SHAPES in the order in which the groups hold them."""
    return [items[i] for group in groups(list(range(len(SHAPES)))) for i in group["params"]]


def continued(state, weights, source_groups, groups, steps):
    """LARS from a converted state, constructed with options that are all wrong for it."""
    ps = [None] * len(SHAPES)
    for at, w in zip(in_order(source_groups, range(len(SHAPES))), weights, strict=True):
        ps[at] = torch.nn.Parameter(w.clone())
    lars = LARS(
        groups(ps), 7.0, momentum=0.1, weight_decay=0.7, trust_coefficient=0.3, eps=0.5,
        denominator="gradient", trust_clip=True, decay_zero_norm=False, maximize=True,
        backend="torch",
    )  # fmt: skip
    lars.load_state_dict(state)
    for t in range(10, 10 + steps):
        for group in lars.param_groups:
            group["lr"] = rate(t)
        for p, g in zip(ps, gradients(t), strict=True):
            p.grad = g
        lars.step()
    return ps


def test_every_source_has_a_case():
    missing = set(convert._SOURCES) - {source for source, *_ in CASES}
    assert not missing, f"add a case of {missing}"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_trajectory_continues_as_the_original_would_have(case):
    source, original, options, source_groups, groups, converting = case
    half = run_original(original, options, source_groups, 10)
    whole = run_original(original, options, source_groups, 20)
    state = convert_state_dict(half.state_dict(), source, **converting)
    ps = continued(state, half.weights, source_groups, groups, 10)
    for w, p in zip(whole.weights, in_order(source_groups, ps), strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-13)


def test_a_checkpoint_of_torch_sgd_itself():
    ps = [torch.nn.Parameter(w) for w in tensors()]
    sgd = torch.optim.SGD(ps, 0.1, 0.9, weight_decay=DECAY, nesterov=True)
    twin = [torch.nn.Parameter(w) for w in tensors()]
    lars = LARS(twin, backend="torch")
    for t in range(20):
        for p, g in zip(ps, gradients(t), strict=True):
            p.grad = g
        sgd.step()
        if t == 9:
            lars.load_state_dict(convert_state_dict(sgd.state_dict(), "sgd"))
            for q, p in zip(twin, ps, strict=True):
                q.data.copy_(p.data)
        elif t > 9:
            for q, g in zip(twin, gradients(t), strict=True):
                q.grad = g
            lars.step()
    for q, p in zip(twin, ps, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14)


def test_moving_the_learning_rate_into_the_buffer_or_out_of_it():
    """v_in = γ v_out: with a constant γ both continue the same run."""
    for source, original, inside in (
        ("timm", originals.Timm, True),
        ("rocm_fused_lars", originals.RocmFusedLars, False),
    ):
        other = original([{"params": tensors()}], lr=0.3, momentum=0.9, weight_decay=DECAY)
        for t in range(10):
            other.step(gradients(t))
        state = convert_state_dict(other.state_dict(), source, 0.3, lr_in_momentum=inside)
        assert state["param_groups"][0]["lr_in_momentum"] is inside
        ps = [torch.nn.Parameter(w.clone()) for w in other.weights]
        lars = LARS(ps, backend="torch")
        lars.load_state_dict(state)
        for t in range(10, 20):
            other.step(gradients(t))
            for p, g in zip(ps, gradients(t), strict=True):
                p.grad = g
            lars.step()
        for w, p in zip(other.weights, ps, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-13)


def sgd_state(**extra):
    v = torch.ones(2, 2)
    group = {"params": [0], "lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.0,
             "nesterov": False, **extra}  # fmt: skip
    return {"state": {0: {"momentum_buffer": v}}, "param_groups": [group]}


def test_each_groups_learning_rate_is_kept_unless_one_is_given():
    groups = [{"params": [i], "lr": lr, "momentum": 0.9} for i, lr in enumerate((0.5, 2.0))]
    state = {"state": {i: {"momentum_buffer": torch.ones(2)} for i in range(2)},
             "param_groups": groups}  # fmt: skip
    for lr, rates in ((None, [0.5, 2.0]), (0.25, [0.25, 0.25])):
        new = convert_state_dict(state, "sgd", lr, lr_in_momentum=True)
        assert [g["lr"] for g in new["param_groups"]] == rates
        assert [new["state"][i]["momentum_buffer"][0].item() for i in range(2)] == rates


def test_names_and_the_users_own_keys_stay_and_the_sources_go():
    state = sgd_state(foreach=None, fused=True, differentiable=False, initial_lr=4.0,
                      param_names=["head.weight"])  # fmt: skip
    group = convert_state_dict(state, "sgd")["param_groups"][0]
    assert group["initial_lr"] == 4.0
    assert group["param_names"] == ["head.weight"]
    assert not {"foreach", "fused", "differentiable"} & set(group)


def test_a_divided_group_keeps_names_beside_their_parameters():
    ps = tensors()[::-1]  # the first is one that is left out
    other = originals.Mae([{"params": ps, "param_names": ["a", "b", "c", "d"]}], lr=0.1)
    other.step(tensors(1)[::-1])
    groups = convert_state_dict(other.state_dict(), "mae")["param_groups"]
    assert [(g["params"], g["param_names"], g["adapt"]) for g in groups] == [
        ([1, 3], ["b", "d"], True),
        ([0, 2], ["a", "c"], False),
    ]


def test_the_given_state_is_not_changed():
    state = sgd_state(foreach=None)
    before = copy.deepcopy(state)
    new = convert_state_dict(state, "sgd", 0.1, lr_in_momentum=True)
    new["param_groups"][0]["params"].append(9)
    assert state["param_groups"] == before["param_groups"]
    assert torch.equal(state["state"][0]["momentum_buffer"], torch.ones(2, 2))


def test_momentum_that_is_none_or_unused_is_left_out():
    state = sgd_state()
    state["state"][0]["momentum_buffer"] = None  # torch.optim.SGD once wrote this
    assert convert_state_dict(state, "sgd")["state"] == {}
    assert convert_state_dict(sgd_state(momentum=0.0), "sgd")["state"] == {}


def test_dimensions_that_no_state_tells_come_from_params():
    other = originals.Mae([{"params": tensors()}], lr=0.1)
    other.step(gradients(0))  # the last tensor, of one dimension, has no gradient yet
    with pytest.raises(ValueError, match="parameter 3 has no state"):
        convert_state_dict(other.state_dict(), "mae")
    groups = convert_state_dict(other.state_dict(), "mae", params=tensors())["param_groups"]
    assert [g["params"] for g in groups] == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="1 params for a checkpoint of 4"):
        convert_state_dict(other.state_dict(), "mae", params=tensors()[:1])
    fresh = originals.Mae([{"params": tensors()}], lr=0.1).state_dict()
    assert [g["params"] for g in convert_state_dict(fresh, "mae")["param_groups"]] == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((sgd_state(), "adam"), {}, r"source='adam' is not known; must be one of \['sgd', 'timm'"),
        (({}, "sgd"), {}, "state must be what state_dict"),
        ((sgd_state(), "mae"), {}, r"parameter 0 is \['momentum_buffer'\]; .* 'mae' has 'mu'"),
        ((sgd_state(), "timm"), {}, "has no 'trust_coeff'; checkpoints of 'timm' have one"),
        ((sgd_state(), "sgd", -1.0), {}, "lr=-1.0 is not allowed"),
        ((sgd_state(), "sgd"), {"trust": 1.0}, r"\['trust'\] are not options of LARS"),
        ((sgd_state(), "sgd"), {"momentum": 2.0}, "momentum=2.0 is not allowed"),
        ((sgd_state(trust_coefficient=0.1, eps=0.0), "rocm_fused_lars", 0.0),
         {"lr_in_momentum": False}, "lr=0: a buffer cannot be divided"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(*arguments, **options)
