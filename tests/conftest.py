"""What every test shares: the tier that is running, its backend and device, fixed seeds.

A tier is chosen as `make test` does it: `-m cpu`, `-m interpret` with TRITON_INTERPRET=1 in the
environment, `-m codegen`, `-m gpu`. A test that holds for both backends carries several of the
markers and takes the fixtures `backend` and `device`.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from tests import tools

try:
    from hypothesis import settings
except ImportError:  # an environment for the gpu tier may have pytest alone
    pass
else:
    # The same examples in every run of `make test`; new ones in every `make fuzz`.
    settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
    settings.register_profile("fuzz", deadline=None, max_examples=1000, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

TIERS = {"cpu", "interpret", "codegen", "ptx", "gpu"}
LISTS = {name: {mark.name for mark in getattr(tools, name)} for name in ("BOTH", "COMPILED")}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

torch.set_num_threads(1)

if INTERPRETED:
    from tests.interpreter import quicken

    quicken()


def running_tier(config: pytest.Config) -> str:
    """`interpret`, `gpu`, `ptx`, or `cpu` for everything else."""
    if INTERPRETED:
        return "interpret"
    chosen = re.search(r"(?<!not )\b(gpu|ptx)\b", config.getoption("markexpr"))
    return chosen[1] if chosen else "cpu"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without a test of the tier: importing all of them takes ten seconds.

    Such a file has neither the marker nor a list of `tools.py` that holds it. In the tier `cpu`, as
    without `-m`, every file is collected, so that a test without a tier is found there.
    """
    tier = re.match(r"\w+", config.getoption("markexpr"))
    if tier is None or tier[0] not in {*TIERS, "floor"} - {"cpu"} or collection_path.is_dir():
        return None
    words = [f"pytest.mark.{tier[0]}", *(n for n, marks in LISTS.items() if tier[0] in marks)]
    text = collection_path.read_text(encoding="utf-8")
    return None if any(re.search(rf"\b{word}\b", text) for word in words) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = running_tier(config)
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if not marks & TIERS:
            raise pytest.UsageError(
                f"{item.nodeid} has no tier: mark it with one of {', '.join(sorted(TIERS))}"
            )
        if tier == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda finds none"))
        elif tier == "interpret" and "interpret" not in marks:
            item.add_marker(
                pytest.mark.skip(reason="not for the interpreter: unset TRITON_INTERPRET")
            )
        elif tier == "cpu" and not marks & {"cpu", "codegen"}:
            remedy = "TRITON_INTERPRET=1" if "interpret" in marks else "-m gpu, on a GPU"
            item.add_marker(pytest.mark.skip(reason=f"runs with {remedy}"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def machine(pytestconfig: pytest.Config):
    """In the tier `ptx`, the GPU that is not there, with small chunks.

    All tests of the tier then share few compiled kernels; `kernels/test_compiled.py` runs those
    with the constants that are launched.
    """
    if running_tier(pytestconfig) != "ptx":
        yield None
        return
    from tests.cases import small_row
    from tests.ptx.driver import pretended_gpu

    with pretended_gpu() as driver, pytest.MonkeyPatch.context() as patch:
        small_row(patch, "cpu")
        yield driver


@pytest.fixture
def tier(pytestconfig: pytest.Config) -> str:
    return running_tier(pytestconfig)


@pytest.fixture
def backend(tier: str) -> str:
    """The backend that a contract test has to ask for: "torch" in the cpu tier, else "triton"."""
    return "torch" if tier == "cpu" else "triton"


@pytest.fixture
def device(tier: str) -> str:
    return "cuda" if tier == "gpu" else "cpu"


@pytest.fixture
def launched(monkeypatch):
    """Every launch as (kernel, its compile-time constants), by way of the one function for it."""
    from tests.internals import launch, replace_launch

    calls = []

    def record(name, grid, args, dtypes, row, device):
        calls.append((name, str(launch.constants(dtypes, row, name, True))))
        run(name, grid, args, dtypes, row, device)

    run = replace_launch(monkeypatch, record)
    return calls


@pytest.fixture
def row(monkeypatch):
    """Small chunks, so that small tensors have several."""
    from tests.cases import small_row

    return small_row(monkeypatch, "cpu")
