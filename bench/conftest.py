"""Shared by the suites: where rows go, how long a run may take, a clock for pytest-benchmark.

The harness takes the samples, interleaved, and feeds them to pytest-benchmark through a fake clock,
so that its statistics, its JSON and `--benchmark-compare` report the same figures.
`python -m bench` sets the variables below; without them only pytest-benchmark's own output is
written and there is no time limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench.harness import Recorder
from bench.supervise import Pieces
from bench.timers import CLOCK, Budget

# jax would take most of the memory at its first call.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)  # what else runs on the machine then decides less
    return torch.device("cpu")


def _folder() -> Path | None:
    folder = os.environ.get("LARS_FUSED_BENCH_FOLDER")
    return Path(folder) if folder else None


@pytest.fixture(scope="session")
def recorder() -> Recorder:
    return Recorder(_folder())


@pytest.fixture(scope="session")
def pieces() -> Pieces:
    """What this run has measured, and what it lost."""
    return Pieces(_folder())


@pytest.fixture(scope="session")
def budget() -> Budget:
    """Counted from the start of `python -m bench`, imports and all."""
    return Budget.inherited()


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
