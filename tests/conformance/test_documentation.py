"""Every call in docs/implementations.md can be made, and every convention is in it."""

import re
from pathlib import Path

import pytest
import torch

from lars_fused import LARS, conventions, convert, param_groups

pytestmark = pytest.mark.cpu

TEXT = (Path(__file__).parents[2] / "docs" / "implementations.md").read_text(encoding="utf-8")
CALLS = re.findall(r"`(LARS\(.*?\))`", TEXT)


@pytest.mark.parametrize("call", sorted(set(CALLS)))
def test_the_call_can_be_made(call):
    model = torch.nn.Linear(3, 2)
    names = {
        "LARS": LARS, "conventions": conventions, "params": model.parameters(),
        "groups": param_groups(model, 0.1), "γ": 0.5, "μ": 0.9, "β": 0.1, "η": 0.01, "ε": 1e-6,
        "τ": 0.2,
    }  # fmt: skip
    optimizer = eval(call.replace(r"\|", "|"), names)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_every_convention_and_every_source_of_a_checkpoint_is_in_it():
    assert len(CALLS) > 15
    for name in set(conventions.__all__) - {"PAPER"}:
        assert f"conventions.{name}" in TEXT
    for source in convert._SOURCES:
        assert f'`"{source}"`' in TEXT
