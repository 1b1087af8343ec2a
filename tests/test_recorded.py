"""Trajectories of every convention and dtype combination: bit for bit, and near the truth.

The bits are those of one machine and its versions (`recorded.environment`): torch's CPU kernels sum
in the order of its vector width, AVX2 or AVX-512, and numpy's do. Elsewhere the bits are not
compared; the bound of the accuracy tests holds for the torch operations everywhere, and for the
kernels in `kernels/test_accuracy.py`.
"""

import json

import pytest
import torch

from tests import recorded
from tests.cases import Spec, small_row
from tests.trial import Trial

KEPT = json.loads(recorded.FILE.read_text(encoding="utf-8"))


def same_environment():
    if KEPT["environment"] != recorded.environment():
        pytest.skip(f"recorded with {KEPT['environment']}; other versions may round otherwise")


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "kinds"), [*recorded.cases()], ids=lambda x: str(x)[:60]
)
def test_the_same_bits_as_before(name, options, kinds):
    """Written before the engine was rebuilt, and not written since."""
    same_environment()
    assert recorded.digest(options, kinds, "triton") == KEPT["triton"][name]


@pytest.mark.interpret
@pytest.mark.parametrize("name", recorded.combinations(recorded.STORAGE))
def test_the_kernels_give_the_bits_that_are_kept(name, monkeypatch):
    same_environment()
    small_row(monkeypatch, "cpu")
    kinds = recorded.combinations(recorded.STORAGE)[name]
    assert recorded.together(kinds, "triton") == KEPT["triton, small"][name]


@pytest.mark.cpu
@pytest.mark.parametrize("name", recorded.combinations(recorded.WIDE))
@pytest.mark.parametrize("backend", recorded.TORCH_BACKENDS)
def test_torch_operations_give_the_bits_that_are_kept(backend, name):
    same_environment()
    kinds = recorded.combinations(recorded.WIDE)[name]
    with recorded.torch_operations(backend):
        assert recorded.together(kinds, "torch") == KEPT[backend][name]


@pytest.mark.cpu
@pytest.mark.parametrize("name", recorded.combinations(recorded.WIDE))
@pytest.mark.parametrize("backend", recorded.TORCH_BACKENDS)
def test_torch_operations_stay_within_the_bound(backend, name):
    """Three steps of every options as a group of one optimizer, on every machine."""
    kinds = recorded.combinations(recorded.WIDE)[name]
    groups = list(recorded.OPTIONS.values())
    trial = Trial(
        [Spec(f"{o} {s}", s) for o in recorded.OPTIONS for s in recorded.SMALL], "torch",
        groups=groups, group_of=lambda i: i // len(recorded.SMALL), w_dtype=kinds["dtype"],
        v_dtype=kinds["momentum_dtype"], master=kinds["master_weights"],
    )  # fmt: skip
    with recorded.torch_operations(backend):
        trial.step()
        trial.step()
        trial.step(lr=0.25)
    trial.check()
    if kinds["dtype"] == kinds["momentum_dtype"] == torch.float64:  # fp32 is no baseline for it
        for one in trial.ones:
            torch.testing.assert_close(one.p.detach(), one.truth, rtol=1e-12, atol=1e-14)
