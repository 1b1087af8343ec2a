"""`make test`: what a job printed and what it counted outlive the limit that ends it."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu


@pytest.fixture
def ci():
    path = Path(__file__).parents[2] / "ci" / "test.py"
    spec = importlib.util.spec_from_file_location("ci_test", path)
    module = sys.modules["ci_test"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ci_test"]


PRINTS = """
import time
print("tests/a.py::test_one PASSED                       [ 10%]")
print("[gw1] [ 20%] FAILED tests/a.py::test_two")
print("tests/a.py::test_three SKIPPED (no GPU)           [ 30%]", flush=True)
time.sleep(60)
"""


def test_a_limit_loses_neither_output_nor_counts(ci, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ci, "TIME_LIMIT", 3)
    job = ci.Job("gpu", [sys.executable, "-c", PRINTS], report=tmp_path / "none", streamed=True)
    outcome = ci.run(job, needs_tests=True)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (1, 1, 1)
    assert "test_one PASSED" in capsys.readouterr().out
    assert "ended after 3 s" in outcome.output


def test_only_the_gpu_tier_is_shown_as_it_comes(ci, tmp_path):
    args = ci.parse([])
    jobs = {tier: ci.tier_job(tier, tmp_path, args, 1) for tier in ("gpu", "ptx")}
    assert jobs["gpu"].streamed
    assert "gpu and not slow" in jobs["gpu"].command
    assert {"-v", "--maxfail=10", "faulthandler_timeout=40"} <= set(jobs["gpu"].command)
    assert not jobs["ptx"].streamed
    assert "-q" in jobs["ptx"].command
