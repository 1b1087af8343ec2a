"""One training run: the two recipes compared by the demonstration, and what a run leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lars_fused import LARS, WarmupPolynomialLR, param_groups, scaled_lr
from lars_fused.study.digits import Digits, batches, small_alexnet_bn, steps_for

WEIGHT_DECAY = 5e-4
"""The paper's, for both optimizers; norms and biases are not decayed in either."""

MOMENTUM = 0.9
WARMUP = 0.2
"""Share of the steps spent warming up: both optimizers, to the same schedule."""

WARMUP_START = 0.1
"""The first step's share of the full rate: at 0, one of the few steps would do nothing."""

# `python -m lars_fused.study.tune` chose these (40 epochs, 3 seeds, 250 held-out training images;
# mean ± standard deviation of the accuracy in percent). The test images had no part in it.
#
#   SGD, lr at batch 32   batch 32        batch 1,024, lr 32 times that
#   0.003125              98.80 ± 0.40     0.1: 98.00 ± 1.06
#   0.00625               98.67 ± 0.23     0.2: 98.53 ± 0.23
#   0.0125                99.33 ± 0.23     0.4: 98.27 ± 0.61
#   0.025                 99.20 ± 0.40     0.8: 92.93 ± 9.14
#   0.05                  98.93 ± 0.61     1.6: 82.13 ± 12.27
#   0.1                   99.33 ± 0.23     3.2: 66.93 ± 13.00
#   0.2                   98.40 ± 0.40     6.4: 40.27 ± 22.76
#   0.4                   98.53 ± 1.01    12.8: 15.73 ± 4.41
#   LARS, trust coefficient, batch 1,024
#   0.001                                       96.53 ± 0.83
#   0.002                                       97.73 ± 0.61
#   0.005                                       98.40 ± 0.40
#   0.01                                        97.87 ± 0.46
#   0.02                                        97.33 ± 1.15
#   0.05                                        94.80 ± 3.67
#
# At batch 32 rates 0.0125 and 0.1 tie; 0.1 leaves the lower training loss (0.003 against 0.012).
SGD_BATCH, SGD_LR = 32, 0.1
SGD_TUNED_LR = 0.2
LARS_LR, TRUST_COEFFICIENT = 1.0, 0.005


@dataclass(frozen=True)
class Recipe:
    """An optimizer with the settings that it is compared at."""

    name: str
    settings: str
    build: Callable[[nn.Module], torch.optim.Optimizer]


def sgd(batch: int, lr: float = SGD_LR) -> Recipe:
    """SGD with momentum; `lr` belongs to batch 32 and is scaled to `batch` by the linear rule."""
    scaled = scaled_lr(lr, batch, SGD_BATCH)

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(param_groups(model, WEIGHT_DECAY), lr=scaled, momentum=MOMENTUM)

    settings = f"lr {scaled:g}: {lr:g} at batch {SGD_BATCH}, scaled by the linear rule"
    return Recipe("SGD", settings, build)


def sgd_tuned(lr: float = SGD_TUNED_LR) -> Recipe:
    """SGD with a rate searched for at the large batch itself, as LARS's trust coefficient was."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(param_groups(model, WEIGHT_DECAY), lr=lr, momentum=MOMENTUM)

    return Recipe("SGD, tuned", f"lr {lr:g}, found at batch 1024 itself: no rule", build)


def lars(backend: str, lr: float = LARS_LR, trust: float = TRUST_COEFFICIENT) -> Recipe:
    """LARS with what the paper (section 5) offers: lr 1, and a scaled trust coefficient."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        groups = param_groups(model, WEIGHT_DECAY)
        return LARS(groups, lr, MOMENTUM, trust_coefficient=trust, backend=backend)

    return Recipe("LARS", f"lr {lr:g}, trust coefficient {trust:g}", build)


@dataclass
class Run:
    """What one run measured: losses by step, accuracies in percent at the `evaluated` steps."""

    recipe: str
    seed: int
    losses: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last step, in percent."""
        return self.accuracies[-1]


def warmup_steps(steps: int) -> int:
    """Steps of warm-up among `steps`: at least one is left to train at the full rate."""
    return min(math.ceil(WARMUP * steps), steps - 1)


def snapshot(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


@dataclass
class Recorder:
    """Keeps the first steps of a run: enough to take them again with another backend.

    Tensors are in the order of the optimizer's groups; `members` says which belong to which group.
    """

    steps: int
    layer_stats: dict[str, Any] = field(default_factory=dict)
    options: list[dict[str, Any]] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    start: list[Tensor] = field(default_factory=list)
    lrs: list[list[float]] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called when gradients are ready and the step is not yet taken."""
        if len(self.lrs) == self.steps:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not self.lrs:
            self.start = snapshot(params)
            index = {id(p): i for i, p in enumerate(params)}
            for group in optimizer.param_groups:
                self.members.append([index[id(p)] for p in group["params"]])
                hidden = ("params", "param_names", "lr", "initial_lr")
                self.options.append({k: v for k, v in group.items() if k not in hidden})
        self.lrs.append([float(group["lr"]) for group in optimizer.param_groups])
        self.gradients.append(snapshot([p.grad for p in params if p.grad is not None]))

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called when the step is taken."""
        if len(self.weights) == self.steps:
            return
        if not self.weights and isinstance(optimizer, LARS):
            self.layer_stats = {str(name): stats for name, stats in optimizer.layer_stats().items()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.weights.append(snapshot(params))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model, in evaluation mode, gets right; in percent."""
    model.eval()
    correct = float((model(images).argmax(1) == labels).float().mean())
    model.train()
    return 100.0 * correct


def train(
    data: Digits,
    recipe: Recipe,
    *,
    seed: int,
    epochs: float,
    batch: int,
    evaluations: int = 40,
    recorder: Recorder | None = None,
    progress: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Trains one network; the seed alone fixes its initial weights, the batches and the dropout.

    Args:
        data: on the device to train on.
        recipe: the optimizer.
        seed: of everything random.
        epochs: how often an image is seen on average.
        batch: images a step.
        evaluations: about how many times the test accuracy is taken.
        recorder: keeps the first steps.
        progress: called after every step.
    """
    device = data.train_images.device
    images = len(data.train_labels)
    steps = steps_for(epochs, batch, images)
    torch.manual_seed(seed)
    model = small_alexnet_bn().to(device)
    optimizer = recipe.build(model)
    scheduler = WarmupPolynomialLR(
        optimizer,
        warmup_steps=warmup_steps(steps),
        total_steps=steps,
        warmup_start_factor=WARMUP_START,
    )
    every = max(1, steps // evaluations)
    run = Run(recipe.name, seed)
    began = time.perf_counter()
    for step, chosen in enumerate(
        batches(images, batch, steps, torch.Generator().manual_seed(seed)), 1
    ):
        chosen = chosen.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        if recorder is not None:
            recorder.before(optimizer)
        optimizer.step()
        if recorder is not None:
            recorder.after(optimizer)
        scheduler.step()
        run.losses.append(loss.item())
        if step % every == 0 or step == steps:
            run.evaluated.append(step)
            run.accuracies.append(accuracy(model, data.test_images, data.test_labels))
        progress(run)
    run.seconds = time.perf_counter() - began
    return run
