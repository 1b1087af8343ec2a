"""The Triton kernels of lars_fused: triton and nothing else.

Read `tile.py` first (memory layout and arithmetic of one chunk), then `lars_step.py` (one launch),
then `l2norm.py` and `lars_update.py` (the same step in two launches).
`README.md` beside this file derives the design.
"""
