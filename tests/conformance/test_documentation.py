"""Every call in docs/implementations.md can be made, and every convention is in it."""

import re
from pathlib import Path

import pytest
import torch

from lars_fused import LARS, conventions, param_groups
from lars_fused.checkpoints import convert

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "implementations.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("name", conventions.__all__)
def test_the_readme_has_a_row_for_every_convention(name):
    rows = re.findall(rf"^\| [^|]+ \| `{name}`[^|]*\|(.*)\|$", README, re.MULTILINE)
    assert len(rows) == 1, f"one row of the README's table is to have `{name}`"
    (row,) = rows
    denominator, inside, trust, eps, *_ = (cell.strip() for cell in row.split("|"))
    convention = getattr(conventions, name)
    assert denominator == convention["denominator"]
    assert inside == ("yes" if convention["lr_in_momentum"] else "no")
    assert float(trust) == convention["trust_coefficient"]
    assert float(eps.split()[0]) == convention["eps"]


def test_every_convention_and_every_source_of_a_checkpoint_is_in_it():
    assert len(CALLS) > 15
    for name in set(conventions.__all__) - {"PAPER"}:
        assert f"conventions.{name}" in TEXT, f"docs/implementations.md: a call with {name}"
    for source in convert._SOURCES:
        assert f'`"{source}"`' in TEXT, f"docs/implementations.md: the source {source}"
        assert f'"{source}"' in convert.convert_state_dict.__doc__, f"docstring: {source}"
