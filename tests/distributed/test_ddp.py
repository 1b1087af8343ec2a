"""LARS in a script written for DDP: nothing of lars_fused.distributed is needed."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from lars_fused import LARS, WarmupPolynomialLR
from lars_fused.distributed import check_same_on_all_ranks
from tests.distributed import networks as nets
from tests.distributed.ranks import raised, same_bits

pytestmark = pytest.mark.cpu

VARIANTS = {
    "plain": {},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "no_sync": {},
}


def joined_batch(rank, size, backend, variant, steps):
    """Train with DDP, and alone on the joined batch; both networks' weights."""
    dtype = nets.precision(backend)
    make = nets.Unused if variant == "unused" else nets.network
    alone, model = make().to(dtype), make().to(dtype)
    # Small buckets: several, and gradients that are misaligned views of them.
    ddp = DDP(model, bucket_cap_mb=0.0001, **VARIANTS[variant])
    mine, theirs = nets.optimizer_for(alone, backend), nets.optimizer_for(ddp, backend)
    schedules = [
        WarmupPolynomialLR(o, warmup_steps=3, total_steps=steps + 3, warmup_start_factor=0.1)
        for o in (mine, theirs)
    ]
    pieces = 2 if variant == "no_sync" else 1
    for batch in nets.batches(steps, 2 * size * pieces, dtype):
        nets.loss_of(alone, *batch).backward()
        for at, piece in enumerate(zip(*(t.chunk(pieces) for t in batch), strict=True)):
            ddp.require_backward_grad_sync = at == pieces - 1
            (nets.loss_of(ddp, *nets.share(piece, rank, size)) / pieces).backward()
        for optimizer, schedule in zip((mine, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert same_bits(model.parameters())
    return [[p.tolist() for p in net.parameters()] for net in (alone, model)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_one_process_on_the_joined_batch(ranks, backend, variant):
    for alone, shared in ranks.run(joined_batch, backend, variant, nets.STEPS):
        for a, b in zip(alone, shared, strict=True):
            torch.testing.assert_close(
                torch.tensor(a, dtype=torch.float64),
                torch.tensor(b, dtype=torch.float64),
                **nets.tolerances(backend),
            )


@pytest.mark.interpret
def test_the_kernels_equal_one_process_on_the_joined_batch(two, backend):
    for alone, shared in two.run(joined_batch, backend, "bucket_view", 2):
        for a, b in zip(alone, shared, strict=True):
            torch.testing.assert_close(
                torch.tensor(a), torch.tensor(b), **nets.tolerances("triton")
            )


def uneven_inputs(rank, size):
    """Rank r has r + 2 batches; the same averages taken by hand on every rank."""
    alone, model = nets.network().double(), nets.network().double()
    ddp = DDP(model)
    mine, theirs = nets.optimizer_for(alone, "torch"), nets.optimizer_for(ddp, "torch")
    steps = size + 1
    own = [nets.share(batch, rank, size) for batch in nets.batches(steps, 2 * size, torch.float64)]
    with ddp.join():
        for batch in own[: rank + 2]:
            theirs.zero_grad()
            nets.loss_of(ddp, *batch).backward()
            theirs.step()
    for step, batch in enumerate(nets.batches(steps, 2 * size, torch.float64)):
        mine.zero_grad()
        for other in range(size):
            if step < other + 2:
                (nets.loss_of(alone, *nets.share(batch, other, size)) / size).backward()
        mine.step()
    torch.testing.assert_close([*model.parameters()], [*alone.parameters()], rtol=1e-11, atol=1e-13)
    assert same_bits(model.parameters())


def test_join_with_uneven_inputs(ranks):
    ranks.run(uneven_inputs)


def one_bad_rank(rank, size):
    model = nets.network()
    ddp = DDP(model)
    optimizer = nets.optimizer_for(ddp, "torch")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, scales = [p.detach().clone() for p in model.parameters()], []
    for step, batch in enumerate(nets.batches(2, 2 * size, torch.float32)):
        x, y = nets.share(batch, rank, size)
        if step == 0 and rank == size - 1:
            x = x * torch.nan
        optimizer.zero_grad()
        scaler.scale(nets.loss_of(ddp, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        changed = not all(map(torch.equal, before, model.parameters()))
        assert changed == (step == 1)
    assert scales == [512.0, 512.0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert same_bits(model.parameters())


def test_a_nan_on_one_rank_skips_the_step_on_all(ranks):
    ranks.run(one_bad_rank)


def zero_redundancy(rank, size):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    plain, sharded = nets.network(), nets.network()
    one, other = DDP(plain), DDP(sharded)
    options = {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.02, "backend": "torch"}
    mine = LARS(one.parameters(), **options)
    theirs = ZeroRedundancyOptimizer(other.parameters(), optimizer_class=LARS, **options)
    schedules = [
        WarmupPolynomialLR(o, warmup_steps=3, total_steps=20, warmup_start_factor=0.1)
        for o in (mine, theirs)
    ]
    for batch in nets.batches(10, 2 * size, torch.float32):
        for model, optimizer, schedule in zip((one, other), (mine, theirs), schedules, strict=True):
            nets.loss_of(model, *nets.share(batch, rank, size)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, plain.parameters(), sharded.parameters()))
    return len(theirs.optim.state)


def test_zero_redundancy_optimizer_has_the_same_trajectory(ranks):
    held = ranks.run(zero_redundancy)
    assert sum(held) == len([*nets.network().parameters()])
    assert max(held) < sum(held)  # it was divided


def disagreement(rank, size, kind):
    named = [*nets.network().named_parameters()]
    options = {"weight_decay": 0.1}
    last = rank == size - 1
    if last and kind == "order":
        named[2], named[0] = named[0], named[2]
    if last and kind == "shape":
        named[4] = ("4.weight", torch.nn.Parameter(torch.ones(7, 2)))
    if last and kind == "count":
        named = named[:-1]
    if last and kind == "option":
        options = {"weight_decay": 0.2}
    return raised(RuntimeError, lambda: check_same_on_all_ranks(LARS(named, **options)))


@pytest.mark.parametrize(
    ("kind", "first_difference"),
    [
        ("order", "['params'][0] is '0.weight', (5, 6) float32 on rank"),
        ("shape", "['params'][4] is '4.weight', (7, 2) float32 on rank"),
        ("count", "there is no such parameter on rank"),
        ("option", "'weight_decay': 0.2"),
    ],
)
def test_ranks_that_disagree_are_told_the_first_difference(ranks, kind, first_difference):
    messages = ranks.run(disagreement, kind)
    assert len(set(messages)) == 1
    assert first_difference in messages[0]
    assert "the ranks disagree" in messages[0]


def only_one_rank_steps(rank, size):
    """A plain LARS takes part in no collective: another rank need not step, nor have it."""
    if rank == 0:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        LARS([p], backend="torch").step()
        assert not torch.equal(p, torch.ones(3))
    dist.barrier()


def test_a_plain_step_waits_for_nobody(ranks):
    ranks.run(only_one_rank_steps, limit=10)


def running_on(backend):
    """A class of optimizers that say so, as after a fallback on one rank."""
    return type("Told", (LARS,), {"backend": property(lambda _: backend)})


def another_backend(rank, size, backend):
    kind = running_on("torch" if rank == 1 else "triton")
    optimizer = kind([torch.nn.Parameter(torch.ones(2, 3))])
    error = raised(RuntimeError, lambda: check_same_on_all_ranks(optimizer))
    assert "backend 'triton'" in error, error
    assert "backend 'torch'" in error, error


def test_what_runs_is_compared(two):
    two.run(another_backend, "torch")
