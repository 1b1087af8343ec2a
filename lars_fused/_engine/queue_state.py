"""The ticket queue of a launch between launches: where it stands, and whether it lost work.

`counter` is one word, (epoch << TICKET_BITS) | next ticket; every launch leaves its ticket at 0 and
raises the epoch unless found_inf skipped the step. `watch` is what the kernels noted of it.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels import layout

START = 1 << layout.TICKET_BITS  # epoch 1, ticket 0


def steps_taken(counter: Tensor) -> int:
    """How many steps found_inf did not skip. Synchronises with the device, as all of these do."""
    taken: int = (int(counter.item()) >> layout.TICKET_BITS) - 1
    return taken


def count_step(counter: Tensor, watch: Tensor, found_inf: Tensor) -> None:
    """Count a step that had no work; this alone does not wait for the device."""
    passed = found_inf.eq(0).long()
    counter += passed << layout.TICKET_BITS
    watch[:1] += passed


def reset(counter: Tensor, arrivals: Tensor) -> bool:
    """Back to the start after a launch that failed; True if no ticket had been drawn."""
    untouched: bool = int(counter.item()) % START == 0
    counter.copy_((counter >> layout.TICKET_BITS) << layout.TICKET_BITS)
    arrivals.zero_()
    return untouched


def lost_epoch(counter: Tensor, watch: Tensor) -> int | None:
    """Step (from 1) whose launch skipped work because the queue was not at its start, if any.

    The kernels compare each launch with the one before; this adds the last one.
    """
    last, lost = (int(x) for x in watch.tolist())
    taken = steps_taken(counter)
    if lost or int(counter.item()) % START:
        return lost or taken + 1
    return None if last == taken else taken


def check(counter: Tensor, watch: Tensor) -> None:
    """Raise if a launch skipped work because the queue was not at its start."""
    lost = lost_epoch(counter, watch)
    if lost is not None:
        raise RuntimeError(
            f"LARS: step {lost} of {steps_taken(counter)} found its work queue not at the start "
            "and skipped updates; something wrote into found_inf or the optimizer's tables "
            "during a step, or a launch was aborted: restore parameters and optimizer from a "
            "checkpoint"
        )
