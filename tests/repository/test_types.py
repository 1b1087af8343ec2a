"""What type checkers see: the real modules of kernels/."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "typings" / "lars_fused" / "kernels"


def test_type_checkers_are_led_to_every_module_of_kernels():
    """Or they would take all that comes from it for Any."""
    modules = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    stubs = {path.stem: path.read_text(encoding="utf-8") for path in STUBS.glob("*.pyi")}
    assert len(modules) > 8
    assert set(stubs) == modules
    for name, text in stubs.items():
        if name != "__init__":
            assert text == f"from kernels.{name} import *\n", "repeats what the module says"
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.mypy]")[1]
    assert "lars_fused.kernels" not in settings.split("\n[tool.")[1]  # may not be missing
