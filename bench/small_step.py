"""Small steps compared with the portable path: `python -m bench.small_step`.

Sizes around a chunk, tensors of several chunks, misaligned ones, one launch and two, by each kernel
that the device has: every wait and every bound occurs once. A GPU run starts with it, and
compute-sanitizer runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lars_fused import LARS
from lars_fused._engine import launch, launch_schedule, launch_tables
from lars_fused.kernels import tuning

STEPS = 3  # a slot of `lars_resident` is tagged as in the first step once more


def sizes(target: launch.Target) -> list[int]:
    """And for `lars_resident` a tensor that goes round every ring, more than all of them hold."""
    chunk = target.row.chunk
    found = [1, 3, chunk - 1, chunk, chunk + 1, 2 * chunk + 6, 3 * chunk + 5, 6 * chunk]
    if target.kernel == "lars_resident":
        found.append(target.workers * (tuning.slots(target.row, 8) + 1) * chunk)
    return found


def after_steps(device: str, backend: str, launches: int, target: launch.Target) -> Tensor:
    """All weights, the first sizes adapted, the same once more as plain SGD with momentum."""
    random = torch.Generator().manual_seed(0)

    def made(n: int) -> Tensor:
        # A view one element into its memory: not aligned to 16 bytes where n is odd.
        return torch.randn(n + 1, generator=random).to(device)[n % 2 :][:n]

    groups = []
    for adapt in (True, False):
        params = [torch.nn.Parameter(made(n)) for n in sizes(target)]
        for p in params:
            p.grad = made(p.numel())
        groups.append({"params": params, "adapt": adapt})
    optimizer = LARS(groups, lr=0.1, weight_decay=0.1, trust_coefficient=0.1, backend=backend)
    forced = launch_schedule.forced_kernel(target.kernel)
    with launch_tables.forced_launches(launches), forced:
        for _ in range(STEPS):
            optimizer.step()
    return torch.cat([p.detach().double() for group in groups for p in group["params"]])


def main(device: str = "cuda", backend: str = "triton") -> None:
    where = torch.device(device)
    for target in (launch.target(where), launch.resident_target(where)):
        if target is None:
            continue
        right = after_steps(device, "torch", 1, target)
        one, two = (after_steps(device, backend, n, target) for n in (1, 2))
        # Weights up to about 8, whose fp32 ulp is 5e-7, are rounded three times; a wrong term is
        # off by 1e-5 or more.
        torch.testing.assert_close(one, right, rtol=0, atol=4e-6)
        torch.testing.assert_close(two, one, rtol=0, atol=0)
        print(f"small steps of {target.kernel} agree with the portable path, and with two launches")


if __name__ == "__main__":
    main()
