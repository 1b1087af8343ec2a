"""The Triton kernels of lars_fused: triton and nothing else.

Read `layout.py` (the tables), `memory.py`, `queue.py` (tickets), `sums.py` (norms) and
`lars_rule.py` (trust ratio and update), then `lars_step.py` (one launch) with `last_chunk.py`, then
`l2norm.py` and `lars_update.py` (the same step in two launches). `lars_resident.py` with `ring.py`
(one launch, w and g held on chip) waits to be measured. `README.md` beside this file derives the
design.
"""
