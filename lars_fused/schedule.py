"""Learning rates for large batches: warm-up, polynomial decay, batch-size scaling."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import options as table

__all__ = ["WarmupPolynomialLR", "scaled_lr"]


class WarmupPolynomialLR(LRScheduler):
    """Linear warm-up, then polynomial decay, stepped once per iteration.

    With t the number of steps taken, W = warmup_steps, T = total_steps, γ₀ the group's own learning
    rate, f the start factor, γₑ = end_lr and p = power:

        t < W:      γ = γ₀ (f + (1 − f) t / W)
        W ≤ t < T:  γ = γₑ + (γ₀ − γₑ) (1 − (t − W) / (T − W))ᵖ
        T ≤ t:      γ = γₑ

    The paper trains with p = 2 and warm-up (You, Gitman, Ginsburg, "Large Batch Training of
    Convolutional Networks", 2017); warm-up is from Goyal et al., "Accurate, Large Minibatch SGD",
    2017.

    Groups keep learning rates of their own; one held in a tensor is changed in place, so a captured
    CUDA graph sees the new value. A group that is added on the way (`add_param_group`) goes on from
    its own learning rate: γ₀ is then the one whose schedule passes through it at that step, or the
    group's `initial_lr` where it has one. `state_dict` and `load_state_dict` carry the position,
    whether the scheduler was made before the optimizer's state was loaded or after it. A resumed
    run may give `last_epoch` instead: t − 1 after t steps; the groups then need the `initial_lr`
    that the optimizer's saved state holds.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        warmup_steps: W, the iterations of warm-up; 0 for none.
        total_steps: T, all iterations including warm-up; more than warmup_steps.
        power: p, finite and > 0.
        warmup_start_factor: f, in [0, 1]. With 0 the first step is taken with a learning rate of 0.
        end_lr: γₑ, finite and ≥ 0.
        last_epoch: as in torch; −1 starts from the beginning.

    Raises:
        ValueError: an argument is out of range.
        TypeError: `optimizer` is not a torch optimizer.
        KeyError: `last_epoch` is given and a group has no `initial_lr`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        total_steps: int,
        power: float = 2.0,
        warmup_start_factor: float = 0.0,
        end_lr: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        where = "WarmupPolynomialLR: "
        self.warmup_steps = table.integer("warmup_steps", warmup_steps, 0, where)
        self.total_steps = table.integer("total_steps", total_steps, self.warmup_steps + 1, where)
        self.power = _real("WarmupPolynomialLR", "power", power, above=0.0)
        self.warmup_start_factor = _real(
            "WarmupPolynomialLR", "warmup_start_factor", warmup_start_factor, at_most=1.0
        )
        self.end_lr = _real("WarmupPolynomialLR", "end_lr", end_lr)
        super().__init__(optimizer, table.integer("last_epoch", last_epoch, -1, where))

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of every group at the current step."""
        factor, end = self._line(self.last_epoch)
        return [end + (base - end) * factor for base in self.base_lrs]

    def _line(self, done: int) -> tuple[float, float]:
        """(f, e) of the schedule after `done` steps: γ = e + (γ₀ - e) f."""
        if done < self.warmup_steps:
            start = self.warmup_start_factor
            return start + (1.0 - start) * done / self.warmup_steps, 0.0
        decaying = self.total_steps - self.warmup_steps
        return max(0.0, 1.0 - (done - self.warmup_steps) / decaying) ** self.power, self.end_lr

    def step(self, epoch: int | None = None) -> None:
        """Set the next learning rate of every group, new groups too."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            now = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            factor, end = self._line(self.last_epoch)
            base = end + (now - end) / factor if factor > 0 else now
            self.base_lrs.append(group.setdefault("initial_lr", base))
        super().step(epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a position, and set its learning rates if they are still those of the construction.

        Those that something else has set since, such as the optimizer's own `load_state_dict`, are
        left as they are.
        """
        groups, mine = self.optimizer.param_groups, self._last_lr
        super().load_state_dict(state_dict)
        for group, before, loaded in zip(groups, mine, self._last_lr, strict=False):
            if float(group["lr"]) != float(before):
                continue
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(loaded))
            else:
                group["lr"] = loaded


def scaled_lr(
    base_lr: float, batch_size: int, base_batch_size: int = 256, rule: str = "linear"
) -> float:
    """Scale a learning rate that was tuned at one batch size to another.

        linear:  γ = γ_base · B / B_base
        sqrt:    γ = γ_base · √(B / B_base)

    Linear: Goyal et al., "Accurate, Large Minibatch SGD", 2017. Square root: Krizhevsky, "One weird
    trick for parallelizing convolutional neural networks", 2014; Hoffer et al., "Train longer,
    generalize better", 2017.

    Args:
        base_lr: γ_base, finite and ≥ 0.
        batch_size: B, summed over all processes and accumulated micro-batches; ≥ 1.
        base_batch_size: B_base, the batch size that base_lr was tuned for; ≥ 1.
        rule: "linear" or "sqrt".

    Returns:
        The scaled learning rate.

    Raises:
        ValueError: an argument or the result is out of range, or the rule is unknown.
    """
    base = _real("scaled_lr", "base_lr", base_lr)
    batch = table.integer("batch_size", batch_size, 1, "scaled_lr: ")
    tuned_for = table.integer("base_batch_size", base_batch_size, 1, "scaled_lr: ")
    if rule not in ("linear", "sqrt"):
        raise ValueError(f"scaled_lr: rule={rule!r} is not allowed; must be 'linear' or 'sqrt'")
    scaled = math.inf
    with contextlib.suppress(OverflowError):
        ratio = batch / tuned_for
        scaled = base * (ratio if rule == "linear" else math.sqrt(ratio))
    if scaled == math.inf:
        raise ValueError(
            f"scaled_lr: base_lr={base!r} scaled from base_batch_size={table.shown(tuned_for)} to "
            f"batch_size={table.shown(batch)} is beyond the floating-point numbers; must be finite"
        )
    return scaled


def _real(
    owner: str, name: str, value: Any, *, above: float | None = None, at_most: float = math.inf
) -> float:
    """A finite number ≥ 0, or > `above`, and ≤ `at_most`."""
    number = table.finite(value)
    if number is None or number > at_most or (number < 0 if above is None else number <= above):
        lower = ">= 0" if above is None else f"> {above:g}"
        upper = "" if at_most == math.inf else f" and <= {at_most:g}"
        raise ValueError(
            f"{owner}: {name}={table.shown(value)} is not allowed; "
            f"must be a finite number {lower}{upper}"
        )
    return number
