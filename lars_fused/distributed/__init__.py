"""Tools for training with `torch.distributed`: what `LARS` cannot do inside `step()`.

DDP and ZeroRedundancyOptimizer need nothing from here, and neither do sharded parameters (FSDP2's
`fully_shard`, tensor parallelism): `LARS` computes whole-layer norms of DTensors by itself.
"""

from .._engine.rank_check import check_same_on_all_ranks
from .noise import NoiseScale
from .overlap import Overlap, overlap_with_backward

__all__ = ["NoiseScale", "Overlap", "check_same_on_all_ranks", "overlap_with_backward"]
