"""The gpu tier is collected on machines that have torch, triton and pytest, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("hypothesis", "sklearn", "skimage", "scipy", "matplotlib", "tqdm", "expecttest", "xdist")
BLOCKER = f"""
import importlib.util, sys

EXTRAS = {EXTRAS!r}
find_spec = importlib.util.find_spec


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Blocker())
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in EXTRAS else find_spec(name, package)
)
"""


def test_the_gpu_tier_is_collected_without_the_extras(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "test_gpu_graphs.py::" in done.stdout
