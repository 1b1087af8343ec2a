"""The oracle that other tests trust: numbers worked by hand, and nothing of the package in it."""

import ast
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.test_reference import CASES, HAND, close, f64

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_worked_by_hand(case):
    w, v = f64(*case.start), None
    for lr in case.lrs:
        options = {**oracle.DEFAULTS, **HAND, **case.options, "lr": lr}
        w, v = oracle.update(w, f64(*case.gradient), v, options)
    close(w, case.w)
    assert (v is None) == (case.v is None)
    if v is not None:
        close(v, case.v)


def test_norms_of_any_size():
    for dtype, sizes in ((torch.float64, (1e-300, 1.0, 1e300)), (torch.float32, (1e-40, 1e30))):
        for size in sizes:
            t = torch.tensor([3.0, -4.0], dtype=torch.float64).mul(size).to(dtype)
            assert oracle.norm(t).item() == pytest.approx(5 * size, rel=1e-4)
    assert oracle.norm(torch.zeros(3)) == 0
    assert oracle.norm(torch.tensor([1.0, torch.inf])) == torch.inf
    assert oracle.norm(torch.tensor([1.0, torch.nan])).isnan()


def test_the_bound_of_an_error_has_teeth():
    truth = torch.ones(3, dtype=torch.float64)
    eager = truth.float() + 3e-7
    oracle.assert_close("within", truth.float() + 6e-7, truth, eager, eager)
    with pytest.raises(AssertionError, match=r"beyond, element \(1,\) of \(3,\)"):
        oracle.assert_close(
            "beyond", truth.float() + torch.tensor([0, 2e-6, 0]), truth, eager, eager
        )


def test_it_shares_nothing_with_the_package():
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {
        "__future__",
        "collections",
        "typing",
        "torch",
    }
