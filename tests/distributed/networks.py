"""Small models and their data, the same on every rank."""

import torch
from torch import nn

from lars_fused import LARS, param_groups

STEPS = 50


class Unused(nn.Module):
    """A network with a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)


def channels_last():
    """A convolution whose weight lies in memory in another order than its dimensions."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 3, (2, 1)), nn.Flatten(), nn.Linear(6, 3)
    )
    model[1].to(memory_format=torch.channels_last)
    assert not model[1].weight.is_contiguous()
    return model


def network():
    """Layers of uneven sizes: 5 rows split badly over 2 and 4 ranks, 1 row leaves some without."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 7), nn.Linear(7, 3)
    )


def wide():
    """Two layers whose inner width is divided by tensor parallelism."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def optimizer_for(model, backend, exclude=(), **options):
    """A rate and a decay at which every term of the update matters."""
    options = {"trust_coefficient": 0.02, "backend": backend, **options}
    return LARS(param_groups(model, 0.1, exclude=exclude), 0.5, **options)


def precision(backend):
    """float64 where the backend takes it, so that rounding cannot hide an error."""
    return torch.float64 if backend == "torch" else torch.float32


def tolerances(backend):
    return {"rtol": 1e-11, "atol": 1e-13} if backend == "torch" else {"rtol": 2e-5, "atol": 1e-6}


def batches(steps, size, dtype):
    """(inputs, targets) of every step, for all ranks together."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield (
            torch.randn(size, 6, generator=generator).to(dtype),
            torch.randn(size, 3, generator=generator).to(dtype),
        )


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def share(batch, rank, size):
    """A rank's part of a batch."""
    return tuple(part.chunk(size)[rank] for part in batch)
