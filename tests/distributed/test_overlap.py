"""Steps taken inside the backward pass: the same weights, and a refusal of what cannot be."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from lars_fused import LARS, WarmupPolynomialLR, clip_grad_norm_
from lars_fused.distributed import overlap_with_backward
from tests import internals
from tests.distributed import networks as nets
from tests.distributed.ranks import group_of_one, raised, same_bits

pytestmark = pytest.mark.cpu

SMALL_BUCKETS = {"bucket_cap_mb": 0.0001}
VARIANTS = {
    "plain": ({}, {}),
    "bucket_view": ({"gradient_as_bucket_view": True}, {}),
    "static_graph_unused": ({"static_graph": True}, {}),
    "no_sync": ({}, {}),
    "folded": ({}, {"fold_mean": True}),
    "channels_last": ({}, {}),
}
MAKERS = {"static_graph_unused": nets.Unused, "channels_last": nets.channels_last}


def measured(optimizer):
    """The layer statistics that do not need a gradient: those are gone by now."""
    stats = optimizer.layer_stats().items()
    return {name: row._replace(decayed_norm=0.0) for name, row in stats}


def beside_plain_steps(rank, size, backend, variant, steps):
    """The same training twice, plain and overlapped, compared bitwise after every backward."""
    ddp_options, options = VARIANTS[variant]
    make = MAKERS.get(variant, nets.network)
    models = [DDP(make(), **SMALL_BUCKETS, **ddp_options) for _ in range(2)]
    optimizers = [nets.optimizer_for(model, backend, nesterov=True) for model in models]
    schedules = [
        WarmupPolynomialLR(o, warmup_steps=3, total_steps=steps + 1, warmup_start_factor=0.1)
        for o in optimizers
    ]
    overlap_with_backward(models[1], optimizers[1], **options)
    pieces = 2 if variant == "no_sync" else 1
    for step, batch in enumerate(nets.batches(steps, 2 * size * pieces, torch.float32)):
        for model in models:
            for at, piece in enumerate(zip(*(t.chunk(pieces) for t in batch), strict=True)):
                model.require_backward_grad_sync = at == pieces - 1
                before = [p.detach().clone() for p in model.parameters()]
                nets.loss_of(model, *nets.share(piece, rank, size)).backward()
                changed = not all(map(torch.equal, before, model.parameters()))
                last = model.require_backward_grad_sync
                assert changed == (model is models[1] and last and step > 0)
        optimizers[0].step()
        # The plain one after step(), the other before: its step has been taken.
        same = all(map(torch.equal, models[0].parameters(), models[1].parameters()))
        assert same == (step > 0), step
        optimizers[1].step()
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters())), step
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            schedule.step()
            optimizer.zero_grad()
    assert measured(optimizers[0]) == measured(optimizers[1])
    assert same_bits(models[1].parameters())
    return internals.remembered_steps(optimizers[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_plain_steps_bitwise(ranks, backend, variant):
    for buckets in ranks.run(beside_plain_steps, backend, variant, nets.STEPS):
        assert 1 < buckets <= 8


@pytest.mark.interpret
def test_the_kernels_equal_plain_steps_bitwise(two, backend):
    assert min(two.run(beside_plain_steps, backend, "folded", 3)) > 1


def overlapped(rehearse, size, rank, **options):
    model = DDP(nets.network(), **SMALL_BUCKETS)
    optimizer = nets.optimizer_for(model, "torch")
    handle = overlap_with_backward(model, optimizer, **options)
    batch = nets.share(next(nets.batches(1, 2 * size, torch.float32)), rank, size)
    if rehearse:
        nets.loss_of(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, batch, handle


def refused_in_step(rank, size, kind, rehearse):
    model, optimizer, batch, _ = overlapped(rehearse, size, rank)
    before = [p.detach().clone() for p in model.parameters()]
    model.require_backward_grad_sync = kind != "no_sync"
    loss = nets.loss_of(model, *batch)
    if kind == "scaler":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss).backward()
        text = raised(RuntimeError, lambda: scaler.step(optimizer))
    else:
        loss.backward()
        call = optimizer.step
        if kind == "clipping":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        elif kind == "own clipping":
            clip_grad_norm_(model.parameters(), 1e9, backend="torch")
        elif kind == "closure":
            call = partial(optimizer.step, lambda: loss)
        elif kind == "twice":
            call = nets.loss_of(model, *batch).backward
        text = raised(RuntimeError, call)
    changed = not all(map(torch.equal, before, model.parameters()))
    # In the rehearsal nothing has been changed when the refusal comes.
    assert changed == (rehearse and kind != "no_sync")
    return text


REFUSED = {
    "scaler": "GradScaler",
    "clipping": "clipping by the global norm",
    "own clipping": "clipping by the global norm",
    "closure": "closure",
    "no_sync": "outside of no_sync()",
    "twice": "accumulate under ddp_model.no_sync()",
}


@pytest.mark.parametrize("rehearse", [False, True], ids=["first_step", "later"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_what_needs_all_layers(two, kind, rehearse):
    for text in two.run(refused_in_step, kind, rehearse):
        assert REFUSED[kind] in text


def gradient_of_an_unused_layer(rank, size):
    model = DDP(nets.Unused(), static_graph=True, **SMALL_BUCKETS)
    optimizer = nets.optimizer_for(model, "torch")
    overlap_with_backward(model, optimizer)
    for step in range(2):
        if step == 1:
            model.module.unused.weight.grad = torch.ones(3, 3)
        nets.loss_of(model, torch.ones(2, 6), torch.ones(2, 3)).backward()
        if step == 0:
            optimizer.step()
    return raised(RuntimeError, optimizer.step)


def test_nothing_with_a_gradient_is_passed_over(two):
    for text in two.run(gradient_of_an_unused_layer):
        assert "(shape (3, 3)) has a gradient that the backward pass did not reduce" in text


def refused_at_once(rank, size):
    network = nets.network()
    other = torch.nn.Parameter(torch.ones(3))
    finding = DDP(nets.network(), find_unused_parameters=True)
    model = DDP(network)
    good = nets.optimizer_for(model, "torch")
    texts = [
        raised(TypeError, lambda: overlap_with_backward(network, good)),
        raised(
            TypeError,
            lambda: overlap_with_backward(model, torch.optim.SGD(model.parameters(), 0.1)),
        ),
        raised(
            ValueError,
            lambda: overlap_with_backward(finding, nets.optimizer_for(finding, "torch")),
        ),
        raised(
            ValueError, lambda: overlap_with_backward(model, LARS([*model.parameters(), other]))
        ),
    ]
    overlap_with_backward(model, good)
    texts.append(raised(ValueError, lambda: overlap_with_backward(model, good)))
    with model.join():
        loss = nets.loss_of(model, torch.ones(2, 6), torch.ones(2, 3))
        texts.append(raised(RuntimeError, loss.backward))
    return texts


def test_refuses_what_cannot_be_overlapped(two):
    expected = [
        "must be a DistributedDataParallel",
        "must be a LARS",
        "find_unused_parameters=True",
        "param_groups[0]['params'][8] (shape (3,)) is not a parameter of ddp_model",
        "already overlapped",
        "inside join()",
    ]
    for text, part in zip(two.run(refused_at_once)[0], expected, strict=True):
        assert part in text


def ranks_disagree(rank, size):
    model = DDP(nets.network())
    named = [*model.module.named_parameters()]
    optimizer = LARS(named[::-1] if rank else named, backend="torch")
    overlap_with_backward(model, optimizer)
    nets.loss_of(model, torch.ones(2, 6), torch.ones(2, 3)).backward()
    text = raised(RuntimeError, optimizer.step)
    assert not optimizer.state
    return text


def test_compares_the_ranks_parameters_on_the_first_step(two):
    assert "['params'][0] is '0.weight', (5, 6) float32 on rank 0" in two.run(ranks_disagree)[0]


def folded_gradients(rank, size):
    """With fold_mean the bucket is never divided: the gradients are sums."""
    sums = []
    for fold in (False, True):
        model, _, batch, _ = overlapped(True, size, rank, fold_mean=fold)
        nets.loss_of(model, *batch).backward()
        sums.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close([g * size for g in sums[0]], sums[1])


def test_folding_leaves_the_division_out(two):
    two.run(folded_gradients)


def steps_alone(optimizer):
    """Of each prepared step, whether its launches may take the whole device."""
    return {ready.step.terms.alone for ready in optimizer._engine.prepared.values()}


def removed(rank, size):
    model, optimizer, batch, handle = overlapped(True, size, rank)
    assert steps_alone(optimizer) == {False}
    handle.remove()
    before = [p.detach().clone() for p in model.parameters()]
    nets.loss_of(model, *batch).backward()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    assert same_bits(model.parameters())
    assert steps_alone(optimizer) == {True}


def test_remove_returns_to_plain_steps(two):
    two.run(removed)


def test_after_remove_a_new_wrapper_can_be_overlapped():
    """DDP keeps its one hook, so the old wrapper cannot."""
    with group_of_one():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        alone = copy.deepcopy(model)
        optimizer, plain = LARS(model.parameters(), 0.1), LARS(alone.parameters(), 0.1)
        ddp = DDP(model)
        for step in range(6):
            if step % 3 == 0:
                handle = overlap_with_backward(ddp, optimizer)
            for net, takes in ((ddp, optimizer), (alone, plain)):
                net(torch.ones(4, 3)).square().sum().backward()
                takes.step()
                takes.zero_grad()
            if step == 2:
                handle.remove()
                with pytest.raises(RuntimeError, match=r"wrap the module in a new Distributed"):
                    overlap_with_backward(ddp, optimizer)
                assert optimizer._overlap is None
                ddp = DDP(model)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(p, q)
