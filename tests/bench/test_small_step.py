"""What a GPU run begins with sees a wrong step."""

from __future__ import annotations

import pytest

from bench import small_step
from lars_fused import LARS

pytestmark = pytest.mark.interpret


@pytest.fixture(autouse=True)
def small(row):
    """The small chunks of the other tests."""


def test_it_agrees_with_the_portable_path(capsys):
    small_step.main("cpu")
    assert "agree" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.1001}, {"trust_coefficient": 0.1001}])
def test_a_step_that_is_a_thousandth_off_is_seen(monkeypatch, wrong):
    def made(groups, *, backend, **options):
        return LARS(groups, backend=backend, **options | (wrong if backend == "triton" else {}))

    monkeypatch.setattr(small_step, "LARS", made)
    monkeypatch.setattr(small_step, "sizes", lambda chunk: [chunk + 1])
    with pytest.raises(AssertionError, match="not close"):
        small_step.main("cpu")


def test_it_has_tensors_of_one_chunk_of_several_and_off_a_boundary(row):
    sizes = small_step.sizes(row.chunk)
    assert min(sizes) == 1
    assert max(sizes) >= 4 * row.chunk
    assert {row.chunk - 1, row.chunk, row.chunk + 1} <= set(sizes)
    assert any(n % 2 == 0 and n % row.chunk for n in sizes)  # aligned, with a tail
    assert any(n % 2 == 1 and n > 2 * row.chunk for n in sizes)  # misaligned, several chunks
