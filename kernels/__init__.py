"""The Triton kernels of lars_fused: triton and nothing else.

Read `tile.py` (memory layout, trust ratio, update of a chunk) and `sums.py` (norms), then
`lars_step.py` (one launch), then `l2norm.py` and `lars_update.py` (the same step in two launches).
`README.md` beside this file derives the design.
"""
