"""LARS under FSDP2: norms of whole layers, one all-reduce a step, nothing gathered."""

import warnings

import pytest
import torch

from lars_fused import LARS, conventions, param_groups
from lars_fused.monitor import Monitor
from tests.distributed import networks as nets
from tests.distributed.counting import counted
from tests.distributed.ranks import raised, same_bits

pytestmark = pytest.mark.cpu


def fsdp(rank, size, backend, names, steps, replicas=1):
    """Every convention, sharded and not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dtype = nets.precision(backend)
    shape = (replicas, size // replicas) if replicas > 1 else (size,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    for name in names:
        alone, model = nets.network().to(dtype), nets.network().to(dtype)
        for layer in model:
            if [*layer.parameters()]:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        options = {**getattr(conventions, name)}
        # By name: a shard of a matrix may have any number of rows, also none.
        mine, theirs = (
            nets.optimizer_for(net, backend, exclude="5.weight", **options)
            for net in (alone, model)
        )
        monitor = Monitor(theirs, every=1, keep=1)
        empty = [p.to_local().numel() == 0 for p in model.parameters()]
        assert any(empty) == (rank % (size // replicas) > 0)
        for step, batch in enumerate(nets.batches(steps, 2 * size, dtype)):
            nets.loss_of(alone, *batch).backward()
            nets.loss_of(model, *nets.share(batch, rank, size)).backward()
            mine.step()
            with counted() as seen, warnings.catch_warnings():
                # A norm that is not known is NaN, and no reason for Monitor to warn.
                warnings.filterwarnings("error", "LARS: layers")
                theirs.step()
            if step > 0:  # the first also compares the ranks' parameters
                assert seen == [("all_reduce", 2 * len(empty))], seen
            for one, other in zip(mine.param_groups, theirs.param_groups, strict=True):
                one["lr"] = other["lr"] = one["lr"] * 0.9
            expected, found = mine.layer_stats(), theirs.layer_stats()
            mine.zero_grad()
            theirs.zero_grad()
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.full_tensor(), p.detach(), **nets.tolerances(backend))
        assert same_bits([q.full_tensor() for q in model.parameters()]), name
        assert isinstance(theirs.state[q]["momentum_buffer"], type(q.data)), name
        unsent = "gradient_norm" if options.get("denominator") == "decayed" else "decayed_norm"
        assert len(monitor.history) == steps
        assert expected.keys() == found.keys()
        for layer, figures in found.items():
            for key, value in figures._asdict().items():
                if key == unsent:
                    assert value != value, (name, layer, key)
                else:
                    want = getattr(expected[layer], key)
                    assert value == pytest.approx(want, rel=1e-5), (name, layer, key, value, want)


@pytest.mark.row(51)
def test_fully_sharded_equals_unsharded(ranks, backend):
    ranks.run(fsdp, backend, conventions.__all__, 5)


@pytest.mark.slow
def test_hybrid_sharded_equals_unsharded(groups, backend):
    groups(4).run(fsdp, backend, ["PAPER", "MAE"], 5, 2)


def tensor_parallel(rank, size, backend):
    """FSDP2 over tensor parallelism: shards of shards, of different dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    dtype = nets.precision(backend)
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
    alone, model = nets.wide().to(dtype), nets.wide().to(dtype)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    mine, theirs = (nets.optimizer_for(net, backend) for net in (alone, model))
    for step, batch in enumerate(nets.batches(4, 4, dtype)):
        nets.loss_of(alone, *batch).backward()
        nets.loss_of(model, *nets.share(batch, mesh.get_coordinate()[0], 2)).backward()
        mine.step()
        with counted() as seen:
            theirs.step()
        assert step == 0 or seen == [("all_reduce", 8)], seen
        mine.zero_grad()
        theirs.zero_grad()
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p.detach(), **nets.tolerances(backend))


@pytest.mark.slow
def test_sharded_tensor_parallel_equals_whole(groups, backend):
    groups(4).run(tensor_parallel, backend)


@pytest.mark.interpret
def test_the_kernels_fully_sharded_equal_unsharded(two, backend):
    two.run(fsdp, backend, ["MAE"], 2)


def one_bad_rank(rank, size):
    from torch.distributed.fsdp import fully_shard

    model = nets.network()
    fully_shard(model)
    optimizer = nets.optimizer_for(model, "torch")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, scales = [p.full_tensor().detach().clone() for p in model.parameters()], []
    for step, (x, y) in enumerate(nets.batches(2, 2, torch.float32)):
        if step == 0 and rank == size - 1:
            x = x * torch.nan
        optimizer.zero_grad()
        scaler.scale(nets.loss_of(model, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        now = [p.full_tensor() for p in model.parameters()]
        assert all(map(torch.equal, now, before)) == (step == 0)
    assert scales == [512.0, 512.0]
    assert all(torch.isfinite(p).all() for p in now)


def test_a_nan_on_one_rank_skips_the_step_on_all(ranks):
    ranks.run(one_bad_rank)


def flat(rank, size):
    """FSDP1, with flat parameters and with views of them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    texts = []
    for views in (False, True):
        model = FullyShardedDataParallel(
            nets.network(), use_orig_params=views, device_id=torch.device("cpu")
        )
        optimizer = LARS(model.parameters(), backend="torch")
        nets.loss_of(model, torch.ones(2, 6), torch.ones(2, 3)).backward()
        texts.append(raised(RuntimeError, optimizer.step))
    return texts


@pytest.mark.row(52)
@pytest.mark.filterwarnings("ignore")
def test_flat_parameters_are_refused(two):
    for text in two.run(flat)[0]:
        assert "fully_shard" in text


def groups_before_sharding(rank, size, backend):
    """The groups follow the model to its sharded parameters; an optimizer made too early raises."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    found = []
    for before in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        groups = param_groups(model, 0.1) if before else None
        early = LARS(param_groups(model, 0.1), backend=backend)
        fully_shard(model, mesh=mesh)
        optimizer = LARS(groups or param_groups(model, 0.1), 2.0, backend=backend)
        start = model[0].weight.full_tensor().clone()
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
        error = raised(RuntimeError, early.step)
        assert "'0.weight'" in error, error
        assert "holds another DTensor under this name" in error, error
        found.append([p.full_tensor().detach() for p in model.parameters()])
        assert not torch.equal(found[-1][0], start)
    assert all(map(torch.equal, *found))


def test_groups_made_before_sharding_follow_the_model(two):
    two.run(groups_before_sharding, "torch")
