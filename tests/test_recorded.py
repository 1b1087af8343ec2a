"""The trajectories that were recorded before the engine was rewritten, bit for bit."""

import json

import pytest

from tests import recorded

pytestmark = [pytest.mark.interpret, pytest.mark.slow]
KEPT = json.loads(recorded.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "options", "kinds"), recorded.cases(), ids=lambda x: str(x)[:60])
def test_the_same_bits_as_before(name, options, kinds):
    if KEPT["environment"] != recorded.environment():
        pytest.skip(f"recorded with {KEPT['environment']}; other versions may round otherwise")
    assert recorded.digest(options, kinds, "triton") == KEPT["triton"][name]
