"""LARS on DTensors laid out by hand: all kinds of shards, what is refused, empty parts, loading."""

import pytest
import torch

from lars_fused import LARS, clip_grad_norm_, lars_step, multi_tensor_l2norm
from tests import internals
from tests.distributed import networks as nets
from tests.distributed.counting import counted
from tests.distributed.ranks import raised

pytestmark = pytest.mark.cpu


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def placed(rank, size, backend, mesh_shape, placements):
    """Parameters and gradients laid out by hand, against the same ones whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dtype = nets.precision(backend)
    mesh = init_device_mesh("cpu", mesh_shape)
    of = {"R": Replicate(), "0": Shard(0), "1": Shard(1)}
    shapes = [(5, 6), (7, 3), (3, 5), (1, 4)]
    starts = [torch.randn(shape, dtype=dtype) for shape in shapes]

    def parameter(i, where):
        whole = distribute_tensor(starts[i].clone(), mesh, [of[c] for c in where])
        return torch.nn.Parameter(whole)

    alone = [torch.nn.Parameter(start.clone()) for start in starts]
    alone.append(torch.nn.Parameter(torch.full((4,), 0.5, dtype=dtype)))
    split = [parameter(i, where) for i, where in enumerate(placements)]
    split.append(torch.nn.Parameter(alone[-1].detach().clone()))  # an ordinary one among them
    options = {"weight_decay": 0.1, "trust_coefficient": 0.1, "backend": backend}
    mine, theirs = LARS(alone, 0.5, **options), LARS(split, 0.5, **options)
    for step in range(3):
        for p, q in zip(alone, split, strict=True):
            p.grad = torch.randn(p.shape, dtype=dtype)
            q.grad = p.grad.clone()
            if hasattr(q, "placements"):
                q.grad = distribute_tensor(p.grad.clone(), mesh, q.placements)
        if step == 1 and hasattr(split[0], "placements"):
            # As FSDP2 does when a module is moved or loaded.
            split[0]._local_tensor = split[0]._local_tensor.detach().clone()
        mine.step()
        versions = [q._version for q in split]
        with counted() as seen:
            theirs.step()
        assert all(q._version > version for q, version in zip(split, versions, strict=True))
    for p, q in zip(alone, split, strict=True):
        torch.testing.assert_close(whole(q).detach(), p.detach(), **nets.tolerances(backend))
    grads = [q.grad for q in split]
    norms = multi_tensor_l2norm(grads, backend=backend)
    expected = multi_tensor_l2norm([p.grad for p in alone], backend=backend)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    clip_grad_norm_(split, 0.1, backend=backend)
    clip_grad_norm_(alone, 0.1, backend=backend)
    torch.testing.assert_close(whole(split[0].grad), alone[0].grad)
    left = multi_tensor_l2norm([q.grad for q in split], per_tensor=False, backend=backend)
    assert float(left) == pytest.approx(0.1, rel=1e-4)
    # The functional form, from the same start.
    again = [torch.nn.Parameter(q.detach().clone()) for q in split]
    buffers = [None] * len(split)
    lars_step(again, [q.grad for q in split], buffers, lr=0.5, weight_decay=0.1, backend=backend)
    buffers = [None] * len(split)
    lars_step(alone, [p.grad for p in alone], buffers, lr=0.5, weight_decay=0.1, backend=backend)
    for p, q in zip(alone, again, strict=True):
        torch.testing.assert_close(whole(q).detach(), p.detach(), **nets.tolerances(backend))
    return seen


LAYOUTS = {
    # mesh shapes by number of ranks; placements of four matrices; tensors that are split
    "sharded": ({2: (2,), 4: (4,)}, "0000", 4),
    "tensor_parallel": ({2: (2,), 4: (4,)}, "1110", 4),
    "some_replicated": ({2: (2,), 4: (4,)}, "0R1R", 2),
    "all_replicated": ({2: (2,), 4: (4,)}, "RRRR", 0),
}
MESHES = {
    # a 2 by 2 mesh of four ranks
    "hybrid": (["R0", "R0", "R0", "R0"], 4, 1),
    "hybrid_and_whole": (["R0", "RR", "R1", "R0"], 3, 1),
    "two_ways": (["01", "10", "01", "10"], 4, 1),
    "two_ways_and_one": (["01", "R0", "0R", "RR"], 3, 1),
}


@pytest.mark.row(51)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_laid_out_by_hand_equals_whole(ranks, backend, layout):
    meshes, placements, split = LAYOUTS[layout]
    expected = [("all_reduce", 2 * split)] if split else []
    for seen in ranks.run(placed, backend, meshes[ranks.size], [*placements]):
        assert seen == expected


@pytest.mark.interpret
def test_the_kernels_laid_out_by_hand_equal_whole(two, backend):
    for seen in two.run(placed, backend, (2,), ["0", "R", "1", "0"]):
        assert seen == [("all_reduce", 6)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", MESHES)
def test_two_dimensional_meshes_equal_whole(groups, backend, layout):
    placements, split, reductions = MESHES[layout]
    for seen in groups(4).run(placed, backend, (2, 2), placements):
        assert seen == [("all_reduce", 2 * split)] * reductions


def test_hybrid_mesh_of_one_replica(two, backend):
    """The mesh of a single node: the outer dimension has one place."""
    for seen in two.run(placed, backend, (1, 2), ["R0", "RR", "00", "R1"]):
        assert seen == [("all_reduce", 6)]


def refusals(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    texts = []
    for place, grad in [
        (Shard(0), DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])),
        (Shard(0), distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])),
        (Shard(0), distribute_tensor(torch.ones(4, 3), mesh, [Shard(1)])),
        (Partial(), DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])),
    ]:
        if place.is_partial():
            start = DTensor.from_local(torch.ones(4, 3), mesh, [place])
        else:
            start = distribute_tensor(torch.ones(4, 3), mesh, [place])
        p = torch.nn.Parameter(start)
        p.grad = grad
        optimizer = LARS([("layer.weight", p)], backend="torch")
        texts.append(raised(RuntimeError, optimizer.step))
        assert not optimizer.state
        assert torch.equal(p.to_local(), torch.ones_like(p.to_local()))
    # A gradient that lies elsewhere from the second step on; its local part looks the same.
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    p.grad = torch.ones_like(p)
    optimizer = LARS([("layer.weight", p)], backend="torch")
    optimizer.step()
    p.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    texts.append(raised(RuntimeError, optimizer.step))
    plain = torch.nn.Parameter(torch.ones(4, 3))
    sharded = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    texts.append(
        raised(RuntimeError, lambda: lars_step([plain], [sharded], [None], backend="torch"))
    )
    texts.append(
        raised(
            RuntimeError,
            lambda: lars_step([sharded], [torch.ones(4, 3)], [None], backend="torch"),
        )
    )
    return texts


def test_what_does_not_lie_where_the_parameter_does_is_refused(two):
    texts = two.run(refusals)[0]
    assert all("'layer.weight'" in text for text in texts[:5])
    assert all("redistribute the gradient" in text for text in [*texts[:3], texts[4]])
    assert "a pending reduction" in texts[3]
    assert "full_tensor" in texts[5]
    assert "make the gradient a DTensor" in texts[6]


def without_elements(rank, size):
    """All that rank 1 has is empty: it still takes part, and keeps the same state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)]))
    p.grad = torch.ones_like(p)
    optimizer = LARS([p], 0.5)
    # found_inf on the CPU would be read there; one that only the step reads, as on a GPU.
    with pytest.MonkeyPatch.context() as patched:
        internals.keep_found_inf_from_the_host(patched)
        for skipped in (True, False):
            optimizer.found_inf = torch.tensor([float(skipped)])
            optimizer.step()
            del optimizer.found_inf
            state = optimizer.state_dict()["state"]
            assert bool(state) == (not skipped)
    stats = optimizer.layer_stats()[0]
    assert state[0]["momentum_buffer"].shape == (1, 4)
    assert p.to_local().numel() == (4 if rank == 0 else 0)
    return stats.weight_norm, stats.gradient_norm, stats.trust_ratio, stats.effective_lr


@pytest.mark.interpret
def test_a_rank_without_elements_agrees(ranks):
    found = ranks.run(without_elements)
    for figures in found:
        assert figures == pytest.approx((2.0, 2.0, 0.001, 0.0005))


def loaded_whole(rank, size):
    """A checkpoint of unsharded training, which every rank has read in full."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    start, grad = torch.randn(5, 3), torch.randn(5, 3)
    alone = torch.nn.Parameter(start.clone())
    alone.grad = grad
    mine = LARS([alone], 0.5, weight_decay=0.1, backend="torch")
    mine.step()
    split = torch.nn.Parameter(distribute_tensor(alone.detach(), mesh, [Shard(0)]))
    split.grad = distribute_tensor(grad, mesh, [Shard(0)])
    theirs = LARS([split], 0.5, weight_decay=0.1, backend="torch")
    theirs.load_state_dict(mine.state_dict())
    momentum = theirs.state[split]["momentum_buffer"]
    assert torch.equal(momentum.full_tensor(), mine.state[alone]["momentum_buffer"])
    mine.step()
    theirs.step()
    torch.testing.assert_close(split.full_tensor().detach(), alone.detach())
    other = torch.nn.Parameter(distribute_tensor(start, mesh, [Replicate()]))
    state = theirs.state_dict()
    texts = []
    for p in (alone, other):
        texts.append(
            raised(ValueError, lambda p=p: LARS([p], backend="torch").load_state_dict(state))
        )
    return texts


def test_loads_a_checkpoint_of_unsharded_training(ranks):
    for text in ranks.run(loaded_whole)[0]:
        assert "momentum_buffer is laid out as" in text
        assert "torch.distributed.checkpoint" in text


def other_order(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    named = []
    for name in ("first", "second"):
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        p.grad = torch.ones_like(p)
        named.append((name, p))
    if rank == 0:
        named.reverse()
    optimizer = LARS(named, backend="torch")
    text = raised(RuntimeError, optimizer.step)
    assert not optimizer.state
    return text


def test_ranks_with_another_order_are_told_on_the_first_step(ranks):
    text = ranks.run(other_order)[0]
    assert "param_groups[0]['params'][0] is 'second', (4, 3) float32, (Shard(dim=0),)" in text
    assert "'first'" in text
