"""Whether this process may choose a backend alone.

Replicas (DDP) stay equal as long as every rank does the same arithmetic. A rank that left the
kernels alone would round otherwise from then on and drift away from the others, unseen.
"""

from __future__ import annotations

import torch.distributed as dist


def exist() -> bool:
    """Whether other processes train along with this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refusal(caller: str, error: Exception) -> RuntimeError:
    """What stops the training where falling back alone would not be seen."""
    return RuntimeError(
        f"{caller}: the kernel could not be launched on rank {dist.get_rank()}, twice "
        f"({type(error).__name__}: {error}); this rank alone would go on with torch operations, "
        "and its replica would drift from the others by rounding; "
        "start again, or with backend='torch' on all ranks"
    )
