"""What stands in the groups: names and no names, parameters whose model has replaced them."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

from lars_fused import LARS, param_groups
from lars_fused.monitor import Monitor
from tests.tools import BOTH

pytestmark = BOTH


def network(device):
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)


def replace(model):
    """New parameters under the old names, as `fully_shard` and tensor parallelism make them."""
    for layer in model:
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(p.detach().clone()))


def step(model, optimizer, device):
    optimizer.zero_grad()
    model(torch.ones(2, 3, device=device)).square().sum().backward()
    optimizer.step()


def test_groups_made_before_the_model_replaced_its_parameters_follow_it(backend, device):
    model = network(device)
    groups = param_groups(model, 1e-4)
    replace(model)
    optimizer = LARS(groups, backend=backend)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == set(map(id, model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, device)
    assert not any(map(torch.equal, before, model.parameters()))
    assert set(optimizer.layer_stats()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("which", ["all", "one"])
def test_a_model_that_replaces_parameters_after_the_optimizer_is_refused(which, backend, device):
    """Until now nothing was said, and nothing was trained."""
    model = network(device)
    optimizer = LARS(param_groups(model, 1e-4), backend=backend)
    step(model, optimizer, device)
    replace(model if which == "all" else model[:1])
    with pytest.raises(RuntimeError, match=r"'0.weight'.*gets no gradient, because the model hol"):
        step(model, optimizer, device)


def test_a_layer_of_another_shape_and_layers_that_are_gone(backend, device):
    model = network(device)
    groups = param_groups(model, 1e-4)
    model[1] = nn.Linear(4, 5).to(device)
    with pytest.raises(ValueError, match=r"'1.weight'.*replaced in the model.*shape \(5, 4\)"):
        LARS(groups, backend=backend)
    optimizer = LARS(param_groups(model, 1e-4), backend=backend)
    model[1] = nn.Identity()  # pruned: nothing took its place
    step(model, optimizer, device)
    head = nn.Linear(4, 2).to(device)
    model[1] = head
    optimizer.add_param_group({"params": head.parameters()})  # replaced, and given to it
    step(model, optimizer, device)


def test_parameters_that_nobody_gives_a_gradient_are_told_of_once(backend, device):
    model = network(device)
    optimizer = LARS(model.parameters(), backend=backend)
    replace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # as one does to please a scheduler
        with pytest.raises(RuntimeWarning, match="none of the 4 parameters has had a gradient"):
            optimizer.step()
        optimizer.step()
        optimizer = LARS(model.parameters(), backend=backend)
        step(model, optimizer, device)
        optimizer.zero_grad()
        for _ in range(3):
            optimizer.step()


def test_what_is_set_on_a_pair_is_set_on_its_parameter(backend, device):
    model = network(device)
    _, left_out = (group["params"] for group in param_groups(model, 1e-4))
    left_out[0].requires_grad = False  # frozen as one freezes a parameter
    assert not model[0].bias.requires_grad
    left_out[1].grad = torch.ones(2, device=device)
    assert torch.equal(model[1].bias.grad, left_out[1].grad)
    left_out[1].mine = 3
    assert model[1].bias.mine == 3
    del left_out[1].mine
    assert not hasattr(model[1].bias, "mine")


def test_the_pairs_answer_as_their_parameters_and_copies_are_plain(backend, device):
    model = network(device)
    (pair, *_), _ = (group["params"] for group in param_groups(model, 1e-4))
    weight = model[0].weight
    assert pair == ("0.weight", weight)
    assert (pair.device, pair.numel(), pair.requires_grad) == (weight.device, 12, True)
    assert torch.equal(torch.mul(pair, 2), weight * 2)
    assert torch.equal(torch.stack([pair, pair])[0], weight)
    for copied in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert type(copied) is tuple
        assert (copied[0], copied[1].shape) == ("0.weight", weight.shape)
    groups = param_groups(model, 1e-4)
    del model, pair, weight
    gc.collect()
    LARS(groups, backend=backend)  # a model that is gone is not asked


def test_a_group_without_names_joins_one_with_and_the_other_way_round(backend, device):
    model = network(device)
    head = param_groups(list(model.named_parameters())[2:], 1e-4)
    optimizer = LARS(head, backend=backend)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
    assert optimizer.param_groups[-1]["param_names"] == ["param_groups[2].0", "param_groups[2].1"]
    step(model, optimizer, device)
    assert len(optimizer.layer_stats()) == 4

    known = LARS(param_groups(model, 1e-4)[:1], backend=backend)
    known.add_param_group({"params": [model[0].bias]})
    assert known.param_groups[1]["param_names"] == ["0.bias"]

    bare = LARS(model[1].parameters(), backend=backend)
    bare.add_param_group({"params": model[0].named_parameters()})
    step(model, bare, device)
    assert set(bare.layer_stats()) == {0, 1, 2, 3}


def test_a_name_that_two_parameters_have_hides_neither(backend, device):
    """Two models in one optimizer, or one name twice; who comes first keeps the name."""
    nets = [nn.Linear(3, 2).to(device) for _ in range(3)]
    optimizer = LARS([*param_groups(nets[0], 1e-4), *param_groups(nets[1], 1e-4)], backend=backend)
    optimizer.add_param_group(param_groups(nets[2], 1e-4)[0])
    expected = ["weight", "bias", *(f"param_groups[{i}].{n}" for i, n in
                                    ((2, "weight"), (3, "bias"), (4, "weight")))]  # fmt: skip
    with Monitor(optimizer, every=1) as monitor:
        for net in nets:
            step(net, optimizer, device)
    assert list(optimizer.layer_stats()) == expected[-1:]
    sum(net(torch.ones(2, 3, device=device)).sum() for net in nets).backward()
    optimizer.step()
    stats = optimizer.layer_stats()
    assert list(stats) == expected
    assert stats["weight"].weight_norm != stats["param_groups[2].weight"].weight_norm
    assert [list(layers) for _, layers in monitor.history] == [
        expected[:2], expected[2:4], expected[4:]
    ]  # fmt: skip

    bad = [nn.Parameter(torch.ones(2, dtype=torch.float64, device=device)) for _ in range(5)]
    names = ["w", "w", "w", "param_groups[0].w", "b"]
    optimizer = LARS(zip(names, bad, strict=True), exclude_ndim=1, backend="torch")
    for p in bad:
        p.grad = torch.ones_like(p)
    optimizer.step()
    again = "param_groups[0]."
    expected = ["w", 2 * again + "w", 3 * again + "w", again + "w", "b"]
    assert list(optimizer.layer_stats()) == expected
    assert all(name in optimizer.backend_report() for name in expected[:3])


def test_names_beside_bare_parameters_are_not_believed(backend, device):
    """ZeroRedundancyOptimizer gives each rank a part of a group, with the names of all of it."""
    model = network(device)
    (whole, _) = LARS(param_groups(model, 1e-4)).param_groups
    part = {**whole, "params": whole["params"][::-1]}
    optimizer = LARS([part], backend=backend)
    step(model, optimizer, device)
    assert set(optimizer.layer_stats()) == {0, 1}


def test_two_networks_renamed_reordered_and_many_small_layers(backend, device, tier):
    """Ordinary cases, each against the same tensors in the plainest of optimizers."""
    nets = [network(device), network(device)]
    named = [(f"{side}.{n}", p) for side, net in zip("ab", nets, strict=True)
             for n, p in net.named_parameters()]  # fmt: skip
    small = [(f"layer{i}.scale", nn.Parameter(torch.full((2, 2), 1.0 + i, device=device)))
             for i in range(12 if tier == "interpret" else 2000)]  # fmt: skip
    pairs = named + small
    twins = [nn.Parameter(p.detach().clone()) for _, p in pairs]
    for i, ((_, p), q) in enumerate(zip(pairs, twins, strict=True)):
        p.grad = torch.full_like(p, 0.5 + i % 7)
        q.grad = p.grad.clone()
    options = {"lr": 2.0, "weight_decay": 0.1, "trust_coefficient": 0.05, "backend": backend}
    one, other = LARS(pairs[::-1], **options), LARS(twins, **options)
    for _ in range(2):
        one.step()
        other.step()
    for (_, p), q in zip(pairs, twins, strict=True):
        assert torch.equal(p, q)
    stats = one.layer_stats()
    assert stats["b.1.weight"] == other.layer_stats()[6]
    assert len(stats) == len(pairs)


def flat(params):
    """What ZeRO of DeepSpeed puts into a group: one partition of all its parameters."""
    return torch.cat([p.detach().flatten() for p in params]).requires_grad_()


@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_flat_partitions_in_the_place_of_layers_are_refused(named, backend, device):
    model = network(device)
    groups = param_groups(model, 1e-4) if named else model.parameters()
    optimizer = LARS(groups, backend=backend)
    group = optimizer.param_groups[0]
    group["params"] = [flat(group["params"])]
    for g in optimizer.param_groups:
        for p in g["params"]:
            p.grad = torch.ones_like(p)
    before = group["params"][0].detach().clone()
    with pytest.raises(RuntimeError, match=r"param_groups\[0\].*Partitions of flat buffers"):
        optimizer.step()
    assert torch.equal(group["params"][0], before)


def test_each_layer_as_a_flat_piece_is_refused_too(backend, device):
    """Stage 3 partitions layer by layer: as many parameters as there were layers."""
    model = network(device)
    optimizer = LARS(model.parameters(), backend=backend)
    group = optimizer.param_groups[0]
    group["params"] = [flat([p])[: p.numel() // 2].detach() for p in group["params"]]
    group["params"][0].grad = torch.ones_like(group["params"][0])
    with pytest.raises(RuntimeError, match="4 parameters were exchanged for 4 of one dimension"):
        optimizer.step()


def test_copies_in_the_place_of_layers_are_none_of_it(backend, device):
    """As apex's masters are: other tensors of the same shapes."""
    model = network(device)
    optimizer = LARS(model.parameters(), backend=backend)
    group = optimizer.param_groups[0]
    group["params"] = [p.detach().clone().requires_grad_() for p in group["params"]]
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(optimizer.layer_stats()) == 4


@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_one_switch_leaves_out_what_param_groups_would(named, backend, device):
    """For frameworks that make the groups: theirs stay as they are."""
    options = {"lr": 2.0, "trust_coefficient": 0.05, "backend": backend}
    mine, theirs = network(device), network(device)
    for model in (mine, theirs):
        model[0].token_bias = nn.Parameter(torch.ones(2, 3, device=device))
    theirs.load_state_dict(mine.state_dict())
    # Without names, a bias is known by its dimensions alone.
    groups = param_groups(theirs, 0.1) if named else param_groups(
        [(f"p{i}", p) for i, p in enumerate(theirs.parameters())], 0.1
    )  # fmt: skip
    expected = LARS(groups, **options)
    handed = mine.named_parameters() if named else mine.parameters()
    optimizer = LARS(handed, weight_decay=0.1, exclude_ndim=1, **options)
    for step in range(2):
        for i, (p, q) in enumerate(zip(mine.parameters(), theirs.parameters(), strict=True)):
            p.grad = torch.full_like(p, 0.5 + step + i)
            q.grad = p.grad.clone()
        optimizer.step()
        expected.step()
        optimizer.param_groups[0]["lr"] = 1.0
        for group in expected.param_groups:
            group["lr"] = 1.0
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    assert len(optimizer.param_groups) == 1
    assert optimizer.exclude_ndim == 1
    bare = LARS([nn.Parameter(torch.ones(3, device=device))], exclude_ndim=0, backend=backend)
    bare.param_groups[0]["params"][0].grad = torch.ones(3, device=device)
    bare.step()
    assert bare.layer_stats()[0].trust_ratio != 1
