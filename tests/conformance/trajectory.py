"""One training run, stepped side by side by LARS and by another optimizer.

Both are fed the gradients that the network has at LARS's weights, so that what is compared is the
optimizers' arithmetic: a difference is not fed back through the network, where it would grow.
"""

import pytest
import torch
from torch import nn

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # one rounding, relative


class Net(nn.Module):
    """Two convolutions with batch normalisation and a linear layer; what starts at zero stays hard.

    The last scale of a residual branch and the head start at zero, as recipes for large batches do.
    """

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(width, affine=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)
        nn.init.zeros_(self.bn2.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(x))).relu()
        return self.head(x.mean((2, 3)))


def digits(device="cpu"):
    # A bare GPU machine has no scikit-learn.
    sklearn = pytest.importorskip("sklearn.datasets")
    data = sklearn.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device)[:, None] / 16
    return images, torch.tensor(data.target, device=device)


def learning_rate(t, steps, peak):
    """Warm-up from 0 over a fifth of the run, polynomial decay, and one sudden drop."""
    warm = steps // 5
    if t < warm:
        return peak * t / warm
    rate = peak * (1 - (t - warm) / steps) ** 2
    return rate * 0.3 if t >= steps // 2 else rate


def frozen(t, steps):
    """conv2 gets its first gradient late, is frozen once more, and comes back."""
    return t < steps // 10 or steps // 2 <= t < steps // 2 + 3


def zero_gradients(t, steps):
    """Steps whose gradients are all exactly zero."""
    return t in (steps // 4, steps - 2)


class Run:
    def __init__(self, *, width, steps, peak, device="cpu", dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        self.net = Net(width).to(device, dtype)
        self.steps, self.peak = steps, peak
        images, labels = digits(device)
        self.images, self.labels = images.to(dtype), labels

    def by_dimension(self):
        """(adapted, left out): tensors of two and more dimensions, and the others."""
        named = list(self.net.parameters())
        return [p for p in named if p.ndim > 1], [p for p in named if p.ndim <= 1]

    def gradients(self, params, t):
        """The gradients of step t, set on the network and given back."""
        batch = slice(64 * (t % 25), 64 * (t % 25) + 64)
        self.net.conv2.weight.requires_grad_(not frozen(t, self.steps))
        self.net.zero_grad(set_to_none=True)
        output = self.net(self.images[batch])
        loss = nn.functional.cross_entropy(output.float(), self.labels[batch])
        (loss * 0 if zero_gradients(t, self.steps) else loss).backward()
        return [p.grad for p in params]

    def side_by_side(self, ours, other):
        """Step `ours`, a LARS of the network, and `other`. Gives ours' parameters, and for each
        the largest weight and the largest single move that there was.
        """
        params = [p for group in ours.param_groups for p in group["params"]]
        weight, move = ([0.0] * len(params) for _ in range(2))
        for t in range(self.steps):
            lr = learning_rate(t, self.steps, self.peak)
            for group in ours.param_groups:
                group["lr"] = lr
            other.set_lr(lr)
            grads = self.gradients(params, t)
            before = [p.detach().clone() for p in params]
            other.step([None if g is None else g.detach().cpu() for g in grads])
            ours.step()
            for i, p in enumerate(params):
                weight[i] = max(weight[i], p.detach().abs().max().item())
                move[i] = max(move[i], (p.detach() - before[i]).abs().max().item())
        return params, weight, move


def check(run, ours, other, roundings):
    """Assert that both end on the same weights, to the rounding of what is stored.

    A step rounds the stored weight once (EPS·|w|) and the stored momentum once, which μ = 0.9 then
    hands on ten times over. `roundings` is how many of them the update itself may hold: 1 for
    arithmetic in float64, and for fp32 registers the operations between a gradient and a weight.
    The errors of all steps are added up as if none cancelled another.
    """
    eps = EPS[run.net.head.weight.dtype]
    params, weight, move = run.side_by_side(ours, other)
    for i, p in enumerate(params):
        bound = run.steps * eps * (weight[i] + 10 * roundings * move[i])
        error = (p.detach().cpu().double() - other.weights[i]).abs().max().item()
        assert error <= bound, f"tensor {i} {tuple(p.shape)}: {error:.3g} > {bound:.3g}"
        assert move[i] > 1e-5 * weight[i], f"tensor {i} {tuple(p.shape)} hardly moved: {move[i]}"
