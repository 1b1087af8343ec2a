"""The gradient noise scale: how large a batch is still worth its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def register_hook(
    caller: str,
    ddp_model: DistributedDataParallel,
    hook: Callable[[Any], torch.futures.Future[Tensor]],
) -> None:
    """Give a DDP model its communication hook, a function of a bucket.

    Raises:
        RuntimeError: it has had one before: torch takes one, once.
    """
    try:
        # DDP compares annotations, which are strings here: a lambda has none.
        ddp_model.register_comm_hook(None, lambda _, bucket: hook(bucket))
    except RuntimeError as error:
        if "once" not in str(error):
            raise
        raise RuntimeError(
            f"{caller}: ddp_model has a communication hook already, and DDP takes one, once; what "
            "overlap_with_backward or NoiseScale.attach put there stays, also after remove(): wrap "
            "the module in a new DistributedDataParallel"
        ) from error


class NoiseScale:
    """A running estimate of B = tr(Σ) / |G|², the batch size where doubling stops paying off.

    With G the true gradient, Σ the covariance of one sample's gradient, and g_B the mean gradient
    of a batch of B samples, E|g_B|² = |G|² + tr(Σ)/B. Two batch sizes b < B give both unknowns::

        |G|²  ≈ (B |g_B|² - b |g_b|²) / (B - b)
        tr(Σ) ≈ (|g_b|² - |g_B|²) / (1/b - 1/B)

    Data-parallel training provides both: a rank's gradient before averaging and after. Each norm
    is one number; |g_b|² is averaged over the ranks in an all-reduce of one number. The two
    right-hand sides are unbiased but noisy, and their ratio would be biased, so each is averaged
    over steps first: m ← βm + (1-β)x, divided by 1-βᵗ after t steps.

    Source: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training",
    arXiv:1812.06162 (2018), equation 2.9 and appendix A.1.

    The host does not synchronise until `value`, `covariance_trace` or `gradient_square` is read.
    A step with non-finite gradients is ignored.

    Args:
        batch_size: samples that one rank contributes to a step, including all micro-batches under
            `no_sync()`. With `micro_batch()`: samples of one micro-batch.
        decay: β, in [0, 1).
        group: the ranks that average their gradients; None for all.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> noise = NoiseScale(batch_size=32)  # doctest: +SKIP
        >>> noise.attach(ddp_model)  # doctest: +SKIP
        >>> loss(ddp_model(images), labels).backward()  # doctest: +SKIP
        >>> noise.update()  # doctest: +SKIP
        >>> noise.value  # doctest: +SKIP
    """

    def __init__(self, batch_size: int, *, decay: float = 0.99, group: Any = None):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"NoiseScale: batch_size={batch_size!r} is not allowed; must be an int >= 1"
            )
        number = isinstance(decay, Real) and not isinstance(decay, bool)
        if not number or not 0.0 <= decay < 1.0:
            raise ValueError(f"NoiseScale: decay={decay!r} is not allowed; must be in [0, 1)")
        self.batch_size, self.decay, self._group = batch_size, decay, group
        self._mean = torch.zeros(3, dtype=torch.float64)  # of tr(Σ), |G|² and 1
        self._forget()

    def _forget(self) -> None:
        self._small: list[Tensor] = []  # parts of |g_b|² of this step
        self._big: list[Tensor] = []  # of |g_B|²
        self._micro_batches = 0
        self._parameters: list[Tensor] = []

    # ---------------------------------------------------------------------- measurement

    def attach(self, ddp_model: DistributedDataParallel) -> None:
        """Measure the gradients of a DDP model, or of a compiled one, as they are averaged.

        Occupies DDP's only communication hook, and averages as DDP itself does. For a model whose
        steps are overlapped use `overlap_with_backward(..., noise_scale=noise)` instead.

        Raises:
            TypeError: `ddp_model` is no DistributedDataParallel.
            RuntimeError: it has had a communication hook before.
        """
        ddp_model = getattr(ddp_model, "_orig_mod", ddp_model)  # what torch.compile wrapped
        if not isinstance(ddp_model, DistributedDataParallel):
            raise TypeError(
                f"NoiseScale: ddp_model is a {type(ddp_model).__name__}; must be a "
                "DistributedDataParallel; without one use micro_batch()"
            )
        group = ddp_model.process_group
        ranks = dist.get_world_size(group)

        def average(bucket: Any) -> torch.futures.Future[Tensor]:
            buffer = bucket.buffer()
            self._before(buffer)
            buffer.mul_(1.0 / ranks)
            future = dist.all_reduce(buffer, group=group, async_op=True).get_future()

            def reduced(done: torch.futures.Future[list[Tensor]]) -> Tensor:
                total = done.value()[0]
                self._after(total, 1.0)
                return total

            then: torch.futures.Future[Tensor] = future.then(reduced)
            return then

        register_hook("NoiseScale", ddp_model, average)
        self._group = group

    def _before(self, gradients: Tensor) -> None:
        self._small.append(_square(gradients))

    def _after(self, gradients: Tensor, factor: float) -> None:
        self._big.append(_square(gradients) * factor**2)

    def micro_batch(self, parameters: Iterable[Tensor]) -> None:
        """Measure accumulated gradients instead of those that DDP averages.

        Divide each micro-batch's loss by their number, call this after each backward pass, and call
        `update()` after the last one. The first micro-batch gives g_b, all of them together g_B.
        Works without a process group.
        """
        if self._small and not self._micro_batches:
            raise RuntimeError("NoiseScale: use either attach() or micro_batch(), not both")
        if not isinstance(parameters, Iterable):
            raise TypeError(
                f"NoiseScale: parameters is a {type(parameters).__name__}; must be several "
                "tensors, such as model.parameters()"
            )
        self._parameters = list(parameters)
        self._micro_batches += 1
        if self._micro_batches == 1:
            self._small = [_norm_square(self._parameters)]

    # ----------------------------------------------------------------------- estimation

    @torch.no_grad()
    def update(self, loss_scale: float = 1.0) -> None:
        """Add this step to the estimate; call it after the backward pass, before `zero_grad()`.

        A collective call if there is more than one rank.

        Args:
            loss_scale: the factor in the gradients, such as GradScaler's `get_scale()`.

        Raises:
            RuntimeError: if nothing was measured, or only one batch size (a single rank with a
                single micro-batch).
        """
        ranks = dist.get_world_size(self._group) if _distributed() else 1
        pieces = max(1, self._micro_batches)
        if self._micro_batches:
            self._big = [_norm_square(self._parameters)]
        if not self._small or not self._big:
            raise RuntimeError(
                "NoiseScale: nothing was measured since the last update(); call attach() before "
                "training, or micro_batch() after every backward pass"
            )
        if ranks * pieces == 1:
            raise RuntimeError(
                "NoiseScale: one rank with one micro-batch gives one batch size; two are needed"
            )
        for part in self._big:
            if part.is_cuda:  # from a side stream: keep its memory until this stream has read it
                part.record_stream(torch.cuda.current_stream(part.device))
        # A micro-batch's gradient is its share of the mean.
        small = torch.stack(self._small).sum() * (pieces / loss_scale) ** 2
        big = torch.stack(self._big).sum() / loss_scale**2
        self._forget()
        if ranks > 1:
            dist.all_reduce(small, group=self._group)
            small = small / ranks
        self.add(small, big, self.batch_size, self.batch_size * ranks * pieces)

    def add(self, small: Tensor, big: Tensor, small_batch: int, big_batch: int) -> None:
        """Add one pair of squared gradient norms to the estimate.

        Args:
            small: |g_b|², averaged over all batches of that size.
            big: |g_B|².
            small_batch: b.
            big_batch: B > b.
        """
        square = (big_batch * big - small_batch * small) / (big_batch - small_batch)
        trace = (small - big) / (1.0 / small_batch - 1.0 / big_batch)
        self._mean = self._mean.to(square.device)
        new = torch.stack([trace, square, torch.ones_like(square)]).to(self._mean)
        mixed = self.decay * self._mean + (1.0 - self.decay) * new
        self._mean = torch.where(torch.isfinite(new).all(), mixed, self._mean)

    def _read(self) -> tuple[float, float]:
        trace, square, weight = self._mean.tolist()
        # The weights so far add up to 1 - decay**t: dividing corrects for the start at zero.
        return (trace / weight, square / weight) if weight else (float("nan"), float("nan"))

    @property
    def covariance_trace(self) -> float:
        """tr(Σ); NaN before the first update."""
        return self._read()[0]

    @property
    def gradient_square(self) -> float:
        """|G|²; NaN before the first update. Noise may make it negative."""
        return self._read()[1]

    @property
    def value(self) -> float:
        """tr(Σ) / |G|², in samples; NaN before the first update, infinite where |G|² ≤ 0."""
        trace, square = self._read()
        return float("inf") if square <= 0 else trace / square

    def state_dict(self) -> dict[str, Any]:
        """The running averages, for a checkpoint."""
        return {"mean": self._mean.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the running averages from a checkpoint."""
        self._mean = state["mean"].clone()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _square(t: Tensor) -> Tensor:
    """|t|² as float64, summed in at least fp32: fp16 buckets would overflow when squared."""
    wide = t.dtype if t.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(t.detach(), dtype=wide)
    return norm.double().square()


def _norm_square(parameters: list[Tensor]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.stack([_square(g) for g in grads]).sum()
