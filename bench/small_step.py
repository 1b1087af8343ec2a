"""A few small steps compared with the portable path: `python -m bench.small_step`.

Sizes around a chunk, tensors of several chunks, misaligned ones, one launch and two, by each kernel
that the GPU has: every wait and every bound of the kernels occurs once. A GPU run starts with it,
and compute-sanitizer runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lars_fused import LARS
from lars_fused._engine import launch, launch_schedule, launch_tables

STEPS = 2  # partial sums of the second have another tag
MORE = 300  # chunks of one tensor: more than there are workers of `lars_resident`


def sizes(chunk: int) -> list[int]:
    return [1, 3, chunk - 1, chunk, chunk + 1, 2 * chunk + 6, 3 * chunk + 5, 6 * chunk]


def after_steps(device: str, backend: str, launches: int, numels: list[int]) -> Tensor:
    """All weights, the first sizes adapted, the same once more as plain SGD with momentum."""
    random = torch.Generator().manual_seed(0)

    def made(n: int) -> Tensor:
        # A view one element into its memory: not aligned to 16 bytes where n is odd.
        return torch.randn(n + 1, generator=random).to(device)[n % 2 :][:n]

    groups = []
    for adapt in (True, False):
        params = [torch.nn.Parameter(made(n)) for n in numels]
        for p in params:
            p.grad = made(p.numel())
        groups.append({"params": params, "adapt": adapt})
    optimizer = LARS(groups, weight_decay=0.1, trust_coefficient=0.1, backend=backend)
    with launch_tables.forced_launches(launches):
        for _ in range(STEPS):
            optimizer.step()
    return torch.cat([p.detach().double() for group in groups for p in group["params"]])


def targets(device: str) -> list[launch.Target]:
    """Of each kernel that takes a step in one launch there."""
    resident = launch.resident_target(torch.device(device))
    return [launch.target(torch.device(device)), *([resident] if resident else [])]


def main(device: str = "cuda", backend: str = "triton") -> None:
    for target in targets(device):
        numels = sizes(target.row.chunk)
        if target.kernel == "lars_resident":
            numels.append(MORE * target.row.chunk)
        right = after_steps(device, "torch", 1, numels)
        with launch_schedule.forced_kernel(target.kernel):
            one, two = (after_steps(device, backend, n, numels) for n in (1, 2))
        # Sums of terms up to about 5, whose fp32 ulp is 5e-7, and a few ulps of a large sum. A
        # wrong term is off by 1e-3 or more.
        torch.testing.assert_close(one, right, rtol=5e-7, atol=2e-6)
        torch.testing.assert_close(two, one, rtol=0, atol=0)
        print(f"small steps by {target.kernel} agree with the portable path, in one launch and two")


if __name__ == "__main__":
    main()
