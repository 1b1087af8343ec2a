"""Which gradients are misaligned as views into DDP's buckets."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from bench.buckets import misaligned, resnet50_of_10_classes
from bench.models import resnet50
from tests.distributed.ranks import group_of_one

pytestmark = pytest.mark.cpu


def test_a_tensor_after_one_of_ten_elements_is_off():
    # The backward pass fills the bucket from the last tensor on: 10 floats are 40 bytes.
    assert misaligned([(8,), (4,), (10,)], torch.float32) == [True, True, False]
    assert misaligned([(8,), (2,), (10,)], torch.float32) == [False, True, False]  # 40 + 8 = 48
    assert misaligned([(8,), (4,), (8,)], torch.float32) == [False, False, False]


def test_published_heads_are_aligned_and_a_small_one_is_not():
    assert not any(misaligned([s for _, s in resnet50()], torch.float32))
    assert sum(misaligned([s for _, s in resnet50_of_10_classes()], torch.float32)) > 1


def test_ddp_does_the_same():
    """The prediction against the views that DDP really makes."""
    with group_of_one():
        model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 10))
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        ddp(torch.ones(2, 6)).sum().backward()
        ddp.zero_grad()
        ddp(torch.ones(2, 6)).sum().backward()
        base = min(p.grad.data_ptr() for p in model.parameters())
        real = [(p.grad.data_ptr() - base) % 16 != 0 for p in model.parameters()]
        assert real == misaligned([tuple(p.shape) for p in model.parameters()], torch.float32)
