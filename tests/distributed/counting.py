"""Counting the collectives that a block of code runs."""

import contextlib

import torch
import torch.distributed as dist

COLLECTIVES = [
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single",
]  # fmt: skip


@contextlib.contextmanager
def counted():
    """The collectives that are run within the block, as (name, elements)."""
    from torch.distributed.tensor.debug import CommDebugMode

    seen, real = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        def call(*args, **kwargs):
            size = args[0].numel() if isinstance(args[0], torch.Tensor) else None
            seen.append((name, size))
            return real[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        with CommDebugMode() as mode:  # sees those that DTensor operations run
            yield seen
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, real[name])
    seen += [("by DTensor", None)] * (mode.get_total_counts() - len(seen))
