"""What only a GPU shows: updates on side streams, all-reduces of device memory, no waiting."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from lars_fused import LARS
from lars_fused._engine.launch_schedule import forced_kernel
from lars_fused.distributed import NoiseScale, overlap_with_backward
from tests import internals
from tests.distributed import networks as nets
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpus():
    """A rank for every GPU, at most four. One is enough for side streams."""
    group = Ranks(min(4, torch.cuda.device_count()), "nccl")
    yield group
    group.stop()


def deep():
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(12)]
    return nn.Sequential(nn.Linear(6, 1024), *layers, nn.Linear(1024, 3)).cuda()


def beside_plain_steps(rank, size, fold):
    with forced_kernel("lars_step"):  # which overlapped steps take, whatever the list
        compare_with_plain_steps(rank, size, fold)


def compare_with_plain_steps(rank, size, fold):
    models = [DDP(deep(), bucket_cap_mb=8, gradient_as_bucket_view=True) for _ in range(2)]
    optimizers = [LARS(m.parameters(), 0.1, weight_decay=0.1, backend="triton") for m in models]
    options = {"noise_scale": NoiseScale(64)} if size > 1 else {}
    overlap_with_backward(models[1], optimizers[1], fold_mean=fold, **options)
    for batch in nets.batches(50, 64 * size, torch.float32):
        x, y = (t.cuda() for t in nets.share(batch, rank, size))
        for model, optimizer in zip(models, optimizers, strict=True):
            nets.loss_of(model, x, y).backward()
            if options and model is models[1]:
                options["noise_scale"].update()
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert optimizers[0].layer_stats() == optimizers[1].layer_stats()
    assert internals.remembered_steps(optimizers[1]) > 1


@pytest.mark.parametrize("fold", [False, True])
def test_side_streams_equal_plain_steps_bitwise(gpus, fold):
    gpus.run(beside_plain_steps, fold, limit=120)


def sharded(rank, size):
    from torch.distributed.fsdp import fully_shard

    alone, model = deep(), deep()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    mine, theirs = (LARS(m.parameters(), 0.1, backend="triton") for m in (alone, model))
    for batch in nets.batches(5, 64 * size, torch.float32):
        x, y = (t.cuda() for t in batch)
        nets.loss_of(alone, x, y).backward()
        nets.loss_of(model, *nets.share((x, y), rank, size)).backward()
        mine.step()
        theirs.step()
        mine.zero_grad()
        theirs.zero_grad()
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor().detach(), p.detach(), rtol=1e-4, atol=1e-5)


def test_fully_sharded_equals_unsharded(gpus):
    gpus.run(sharded, limit=120)
