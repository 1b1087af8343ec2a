"""Optimizers and learning rates, from a run's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lars_fused import LARS, WarmupPolynomialLR, conventions, param_groups
from lars_fused.study.settings import Settings


def optimizer_for(
    settings: Settings, model: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer at the learning rate that belongs to the batch."""
    decay, lr = settings.weight_decay, settings.peak_lr
    if settings.adapt_all:
        groups: list[dict[str, Any]] = [
            {"params": list(model.named_parameters()), "weight_decay": decay}
        ]
    else:
        groups = param_groups(model, decay)
    if settings.optimizer == "lars":
        options = dict(getattr(conventions, settings.convention))
        if settings.trust_coefficient:
            options["trust_coefficient"] = settings.trust_coefficient
        # On a CPU the portable backend is named, so that TRITON_INTERPRET=1 in the user's shell
        # does not send every training step through the interpreter.
        backend = "auto" if device.type == "cuda" else "torch"
        return LARS(groups, lr, momentum=settings.momentum, backend=backend, **options)
    for group in groups:
        group.pop("adapt", None)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, settings.momentum)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr, alpha=settings.beta2)
    return torch.optim.Adam(groups, lr, betas=(settings.beta1, settings.beta2))


def decayed(settings: Settings, done: float) -> float:
    """The share of γ when `done` of the steps after warm-up, in [0, 1], have been taken."""
    if settings.decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if settings.decay == "step":
        passed = sum(done >= milestone for milestone in settings.milestones)
        return settings.step_factor**passed
    if settings.decay == "constant":
        return 1.0
    raise ValueError(f"{settings.decay} is WarmupPolynomialLR's")


def _share(settings: Settings, warmup: int, total: int, step: int) -> float:
    """The share of γ at a step, counted from 0; warm-up as `WarmupPolynomialLR` has it."""
    if step < warmup:
        return settings.warmup_start + (1.0 - settings.warmup_start) * step / warmup
    # Milestones are shares of the whole run, the cosine begins where warm-up ends.
    whole = settings.decay == "step"
    done = step / total if whole else (step - warmup) / (total - warmup)
    return decayed(settings, min(1.0, done))


def schedule_for(
    settings: Settings, optimizer: torch.optim.Optimizer, warmup: int, total: int
) -> LRScheduler:
    """γ by step: linear warm-up, then the decay that the settings name."""
    if settings.decay == "poly":
        return WarmupPolynomialLR(
            optimizer,
            warmup_steps=warmup,
            total_steps=total,
            power=settings.power,
            warmup_start_factor=settings.warmup_start,
        )
    return LambdaLR(optimizer, partial(_share, settings, warmup, total))


class MomentumCorrection:
    """Lets the momentum buffer follow changes of γ, or not (Goyal et al., 2017, remark 2).

    With γ inside the buffer, v ← μv + γd, a change of γ leaves old steps at the old rate unless v
    is multiplied by γₜ / γₜ₋₁. With γ outside, v ← μv + d and w ← w − γv, the buffer always
    follows; to keep it from doing so it is multiplied by γₜ₋₁ / γₜ.
    """

    def __init__(self, wanted: bool | None, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        inside = bool(optimizer.param_groups[0].get("lr_in_momentum", False))
        self.factor: Callable[[float, float], float] | None = None
        if wanted is not None and wanted == inside:
            self.factor = (lambda old, new: new / old) if wanted else (lambda old, new: old / new)
        self.previous = [float(group["lr"]) for group in optimizer.param_groups]

    def before_step(self, first: bool) -> None:
        """To be called before every step, with γ already set."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        for group, old, new in zip(self.optimizer.param_groups, self.previous, rates, strict=True):
            if self.factor is None or first or old == new or old == 0 or new == 0:
                continue
            for parameter in group["params"]:
                buffer = self.optimizer.state[parameter].get("momentum_buffer")
                if buffer is not None:
                    buffer.mul_(self.factor(old, new))
        self.previous = rates
