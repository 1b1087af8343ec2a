"""Small work items for the interpreter, and the backend that takes any tensor."""

import pytest


@pytest.fixture
def any_backend(backend):
    """Kernels where they can run and the portable path for the rest: "torch" or "auto"."""
    return "torch" if backend == "torch" else "auto"


@pytest.fixture
def small_chunks(monkeypatch, tier):
    """Chunks of 256 elements in the interpreter, so that a small tensor has several."""
    if tier == "interpret":
        from lars_fused.kernels import tuning

        row = tuning.ROWS["interpreter"]._replace(chunk=256, block=128, threads=32, window=4096)
        monkeypatch.setitem(tuning.ROWS, "interpreter", row)
