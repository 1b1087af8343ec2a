"""Two small steps compared with the portable path: `python -m bench.small_step`.

Sizes around a chunk, tensors of several chunks, misaligned ones, one launch and two: every wait and
every bound of the kernels occurs once. A GPU run starts with it, and compute-sanitizer runs it.
``--candidate``: with the row of this GPU that waits to be measured.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bench.peers import used
from lars_fused import LARS
from lars_fused._engine import launch, launch_tables
from lars_fused.kernels import tuning


def sizes(chunk: int) -> list[int]:
    return [1, 3, chunk - 1, chunk, chunk + 1, 2 * chunk + 6, 3 * chunk + 5, 6 * chunk]


def after_two_steps(device: str, backend: str, launches: int, chunk: int) -> Tensor:
    """All weights, the first sizes adapted, the same once more as plain SGD with momentum."""
    random = torch.Generator().manual_seed(0)

    def made(n: int) -> Tensor:
        # A view one element into its memory: not aligned to 16 bytes where n is odd.
        return torch.randn(n + 1, generator=random).to(device)[n % 2 :][:n]

    groups = []
    for adapt in (True, False):
        params = [torch.nn.Parameter(made(n)) for n in sizes(chunk)]
        for p in params:
            p.grad = made(p.numel())
        groups.append({"params": params, "adapt": adapt})
    optimizer = LARS(groups, weight_decay=0.1, trust_coefficient=0.1, backend=backend)
    with launch_tables.forced_launches(launches):
        for _ in range(2):
            optimizer.step()
    return torch.cat([p.detach().double() for group in groups for p in group["params"]])


def main(device: str = "cuda", backend: str = "triton", candidate: bool = False) -> None:
    architecture = launch.architecture(torch.device(device))[0]
    row = tuning.candidate_for(architecture) if candidate else tuning.row_for(architecture)
    if row is None:
        raise SystemExit(f"no row for {architecture} waits to be measured")
    right = after_two_steps(device, "torch", 1, row.chunk)
    with used(row, architecture):
        one, two = (after_two_steps(device, backend, n, row.chunk) for n in (1, 2))
    # Sums of terms up to about 5, whose fp32 ulp is 5e-7; a wrong term is off by 1e-3 or more.
    torch.testing.assert_close(one, right, rtol=0, atol=2e-6)
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    print("two small steps agree with the portable path, in one launch and in two")


if __name__ == "__main__":
    main(candidate="--candidate" in sys.argv[1:])
