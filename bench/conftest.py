"""What the suites share: where rows go, how long a run may take, a clock for pytest-benchmark.

The harness takes the samples, interleaved; pytest-benchmark is handed them by a clock that only
they move, so that its statistics, its JSON and `--benchmark-compare` speak of the same figures.
`python -m bench` sets the variables below; without them nothing but pytest-benchmark's own output
is written and no time limit holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench.harness import Recorder
from bench.timers import CLOCK, Budget

# jax would take most of the memory at its first call.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)  # what else runs on the machine then decides less
    return torch.device("cpu")


@pytest.fixture(scope="session")
def recorder() -> Recorder:
    folder = os.environ.get("LARS_FUSED_BENCH_FOLDER")
    return Recorder(Path(folder) if folder else None)


@pytest.fixture(scope="session")
def budget() -> Budget:
    return Budget(float(os.environ.get("LARS_FUSED_BENCH_SECONDS", math.inf)))


@pytest.fixture
def replay(benchmark) -> Callable[[Sequence[float]], None]:
    """Hand samples, in microseconds, to pytest-benchmark."""

    def hand_over(samples: Sequence[float]) -> None:
        left = iter(samples)
        benchmark.pedantic(lambda: CLOCK.advance(next(left) / 1e6), rounds=len(samples))

    return hand_over


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info.pop("node", None)  # a machine's name is nobody's business
