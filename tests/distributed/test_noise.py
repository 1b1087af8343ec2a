"""The gradient noise scale: its equations by hand, and what DDP and accumulation measure."""

import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from lars_fused.distributed import NoiseScale, overlap_with_backward
from tests.distributed import networks as nets
from tests.distributed.ranks import group_of_one

pytestmark = pytest.mark.cpu


def square(grads):
    return sum(float(g.double().square().sum()) for g in grads)


def test_one_pair_by_hand():
    # |G|² = (8·3 - 2·6) / (8 - 2) = 2, tr(Σ) = (6 - 3) / (1/2 - 1/8) = 8
    noise = NoiseScale(2)
    noise.add(torch.tensor(6.0), torch.tensor(3.0), 2, 8)
    assert noise.gradient_square == pytest.approx(2)
    assert noise.covariance_trace == pytest.approx(8)
    assert noise.value == pytest.approx(4)


def test_running_average_is_corrected_for_its_start():
    noise = NoiseScale(2, decay=0.75)
    noise.add(torch.tensor(6.0), torch.tensor(3.0), 2, 8)  # |G|² 2, tr(Σ) 8
    noise.add(torch.tensor(12.0), torch.tensor(9.0), 2, 8)  # |G|² 8, tr(Σ) 8
    weights = 0.25 * 0.75, 0.25
    assert noise.gradient_square == pytest.approx((2 * weights[0] + 8 * weights[1]) / sum(weights))
    assert noise.covariance_trace == pytest.approx(8)


def test_a_step_that_is_not_finite_is_left_out():
    noise = NoiseScale(2)
    assert math.isnan(noise.value)
    noise.add(torch.tensor(6.0), torch.tensor(3.0), 2, 8)
    noise.add(torch.tensor(math.inf), torch.tensor(3.0), 2, 8)
    noise.add(torch.tensor(6.0), torch.tensor(math.nan), 2, 8)
    assert noise.value == pytest.approx(4)


def test_a_signal_below_the_noise_is_infinite_noise():
    noise = NoiseScale(1)
    noise.add(torch.tensor(4.0), torch.tensor(1.0), 1, 2)
    assert noise.gradient_square < 0
    assert noise.value == math.inf


def test_state_survives_a_checkpoint():
    noise, other = NoiseScale(2), NoiseScale(2)
    noise.add(torch.tensor(6.0), torch.tensor(3.0), 2, 8)
    other.load_state_dict(noise.state_dict())
    for each in (noise, other):
        each.add(torch.tensor(12.0), torch.tensor(9.0), 2, 8)
    assert other.value == noise.value


def test_accumulation_finds_the_true_noise_scale():
    """Samples whose gradients have a known mean and covariance: |G|² = 4·0.25, tr(Σ) = 4·9."""
    generator = torch.Generator().manual_seed(3)
    w = torch.nn.Parameter(torch.zeros(4))
    noise = NoiseScale(8, decay=0.999)
    for _ in range(2000):
        w.grad = None
        for _ in range(4):
            samples = 0.5 + 3.0 * torch.randn(8, 4, generator=generator)
            ((samples * w).sum(1).mean() / 4).backward()
            noise.micro_batch([w])
        noise.update()
    assert noise.value == pytest.approx(36, rel=0.1)
    assert noise.covariance_trace == pytest.approx(36, rel=0.05)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "decay": 1.0}])
def test_refuses_bad_arguments(options):
    with pytest.raises(ValueError, match="must be"):
        NoiseScale(**options)


def test_refuses_to_estimate_from_one_batch_size():
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    noise = NoiseScale(2)
    with pytest.raises(RuntimeError, match="nothing was measured"):
        noise.update()
    noise.micro_batch([w])
    with pytest.raises(RuntimeError, match="two are needed"):
        noise.update()


def test_a_compiled_model_is_measured_as_the_model_in_it():
    with group_of_one():
        noise, model = NoiseScale(2), DDP(torch.nn.Linear(3, 2))
        noise.attach(torch.compile(model, backend="eager"))
        model(torch.ones(4, 3)).sum().backward()
        assert len(noise._small) == len(noise._big) == 1


def measured_by_ddp(rank, size, how):
    """The estimate of one step, against norms taken of whole gradients on every rank."""
    model, alone = DDP(nets.network(), bucket_cap_mb=0.0001), nets.network()
    optimizer = nets.optimizer_for(model, "torch")
    noise = NoiseScale(4, decay=0.0)
    if how == "attached":
        noise.attach(model)
    else:
        overlap_with_backward(model, optimizer, fold_mean=how == "folded", noise_scale=noise)
    # The second step of an overlapped optimizer is the first that is taken in the backward pass.
    for x, y in nets.batches(2, 4 * size, torch.float32):
        with torch.no_grad():
            for p, q in zip(alone.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        smalls, grads = [], []
        for other in range(size):
            loss = nets.loss_of(alone, *nets.share((x, y), other, size))
            grads.append(torch.autograd.grad(loss, [*alone.parameters()]))
            smalls.append(square(grads[-1]))
        big = square([sum(each) / size for each in zip(*grads, strict=True)])
        small = sum(smalls) / size
        nets.loss_of(model, *nets.share((x, y), rank, size)).backward()
        noise.update()
        optimizer.step()
        optimizer.zero_grad()
    trace = (small - big) / (1 / 4 - 1 / (4 * size))
    mean = (4 * size * big - 4 * small) / (4 * size - 4)
    assert noise.covariance_trace == pytest.approx(trace, rel=1e-4)
    assert noise.gradient_square == pytest.approx(mean, rel=1e-4)
    return noise.value


@pytest.mark.parametrize("how", ["attached", "overlapped", "folded"])
def test_ddp_measures_before_and_after_averaging(ranks, how):
    assert len(set(ranks.run(measured_by_ddp, how))) == 1
