"""Compiled kernels without a GPU: their PTX, executed on CPU memory.

    driver.py        stands in for Triton's CUDA driver: every launch goes to the machine
    machine.py       memory with bounds; threads that diverge and meet; programs in turns
    instructions.py  what each PTX instruction does to the registers of a group of threads

The interpreter runs the kernels' Python; this runs what the compiler made of it: layouts, masks,
vector accesses, shared memory and its barriers, atomics. Every access is checked for alignment and
for lying within a live tensor. What it cannot show: times, weak memory ordering, ptxas.
"""
