"""What a wheel holds, and that the files that repeat a version agree."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `python -m build` makes: a source archive first, the wheel from that."""
    pytest.importorskip("build", reason="the extra `test` is not installed")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("lars_fused", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"lars_fused/py.typed"}
    for folder, inside in (("lars_fused", "lars_fused"), ("kernels", "lars_fused/kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"{inside}/{path.relative_to(ROOT / folder).as_posix()}")
    assert "lars_fused/kernels/lars_step.py" in expected
    assert held == expected


def test_the_wheel_states_its_floors(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    text = archive.read(metadata).decode()
    for line in (
        "Requires-Python: >=3.10",
        "Requires-Dist: torch>=2.11",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
        "License-File: LICENSE",
    ):
        assert line in text.splitlines()
    assert not re.search(r"^Requires-Dist: [^;]*==", text, re.MULTILINE)  # floors, not pins


def test_an_unpacked_wheel_finds_its_kernels(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import importlib.util as u, lars_fused\n"
        "print(lars_fused.__file__, u.find_spec('lars_fused.kernels').origin, sep='\\n')"
    )
    # Nothing of the checkout is on this path; the editable installation comes after it.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [Path(line).resolve() for line in done.stdout.splitlines()]
    package = (tmp_path / "lars_fused").resolve()
    assert found == [package / "__init__.py", package / "kernels" / "__init__.py"]


def test_pre_commit_and_constraints_name_one_ruff():
    hook = re.search(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    pin = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert hook[1] == pin[1]


def test_the_floors_agree():
    floor = re.search(
        r"^triton==(\S+)$", (ROOT / "constraints-floor.txt").read_text(), re.MULTILINE
    )
    stated = re.search(r"triton>=([\d.]+)", (ROOT / "setup.py").read_text())
    assert floor[1].startswith(f"{stated[1]}.")


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text()
    assert ci.splitlines()[-1] == "exec make test"
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
