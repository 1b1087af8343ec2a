"""Imports run one way: a table of who may import whom, held against the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
OWN = "lars_fused"

# Beside the standard library. A name stands for itself, with a trailing dot also for what lies
# below it.
BASE = {"torch."}
LOWER = {
    f"lars_fused.{name}"
    for name in ("checks", "reference", "portable", "launch", "tables", "sharding", "batch")
}
ALLOWED = {
    "kernels": {"triton.", "lars_fused.kernels."},
    "plan": BASE,
    "checks": BASE,
    "reference": BASE,
    "conventions": BASE,
    "portable": BASE | {"lars_fused.reference"},
    "schedule": BASE | {"lars_fused.checks"},
    "groups": BASE | {"lars_fused.checks"},
    "launch": BASE | {"triton.", "lars_fused.kernels."},
    "tables": BASE | {"lars_fused.plan", "lars_fused.launch"},
    "sharding": BASE,
    "agreement": BASE | {"lars_fused.sharding"},
    "batch": BASE | {"lars_fused.checks"},
    # Each may import the layers below it, down to the ones above; never the kernels.
    "stepper": BASE | LOWER,
    "functional": BASE | LOWER | {"lars_fused.stepper"},
    "norms": BASE | LOWER,
    "checkpoint": BASE | {"lars_fused.checks", "lars_fused.sharding"},
    "convert": BASE | {"lars_fused.checks", "lars_fused.conventions"},
    "active": BASE | LOWER | {"lars_fused.stepper", "lars_fused.functional"},
    "optimizer": BASE
    | LOWER
    | {
        "lars_fused.active",
        "lars_fused.agreement",
        "lars_fused.checkpoint",
        "lars_fused.functional",
    },
}
PUBLIC = {"lars_fused", "lars_fused.conventions"}
NEVER = {"bench", "tests", "ci", "examples"}


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = [OWN, *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("lars_fused", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

# What may be imported from the package as a module, whether or not it has been written yet.
MODULES = {*SOURCES, *(f"{OWN}.{part}" for part in ALLOWED)}


def imports_of(tree, name, is_package, modules=MODULES):
    """The full names of the modules that the source of `name` imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if is_package else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield full if full in modules else origin


def is_allowed(imported, allowed):
    return imported.split(".")[0] in sys.stdlib_module_names or any(
        imported == entry.rstrip(".") or (entry.endswith(".") and imported.startswith(entry))
        for entry in allowed
    )


def violations(name, tree, is_package=False):
    """What module `name` imports and must not."""
    found = set(imports_of(tree, name, is_package))
    part = name.removeprefix(OWN).strip(".").split(".")[0]
    if part in ALLOWED:
        return sorted(x for x in found if not is_allowed(x, ALLOWED[part]))
    if part == "":  # the package itself gathers the public names
        allowed = BASE | {f"{OWN}.{x}" for x in ALLOWED if x != "kernels"}
        return sorted(x for x in found if not is_allowed(x, allowed))
    # study and distributed: any third party, and of this package the public names alone.
    own = PUBLIC | {f"{OWN}.{part}", f"{OWN}.{part}.", f"{OWN}.distributed"}
    if part == "distributed":
        own |= {f"{OWN}.agreement"}
    return sorted(
        x
        for x in found
        if x.split(".")[0] in NEVER or (x.split(".")[0] == OWN and not is_allowed(x, own))
    )


@pytest.mark.parametrize("name", SOURCES)
def test_imports_only_what_the_table_allows(name):
    path = SOURCES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert violations(name, tree, path.name == "__init__.py") == []


def test_the_table_knows_every_module():
    parts = {name.removeprefix(OWN).strip(".").split(".")[0] for name in SOURCES}
    assert parts <= {"", "study", "distributed", *ALLOWED}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lars_fused.plan", "import numpy"),
        ("lars_fused.plan", "from . import kernels"),
        ("lars_fused.reference", "from lars_fused.checks import check"),
        ("lars_fused.functional", "from .kernels import lars_step"),
        ("lars_fused.functional", "def f():\n    import triton.language as tl"),
        ("lars_fused.kernels.tile", "import torch"),
        ("lars_fused.kernels.tile", "from ..plan import make_plan"),
        ("lars_fused.optimizer", "from lars_fused.kernels import tuning"),
        ("lars_fused.launch", "from lars_fused import functional"),
        ("lars_fused.launch", "import tests.conftest"),
        ("lars_fused.study.demo", "from lars_fused import launch"),
        ("lars_fused.study.demo", "from ..reference import reference_step"),
        ("lars_fused.study.demo", "import bench"),
        ("lars_fused", "from . import study"),
    ],
)
def test_the_table_refuses(name, source):
    assert violations(name, ast.parse(source), is_package=name == OWN)


def test_imports_without_triton_and_without_the_extras():
    """Nothing beyond torch is needed to import the package, and that starts no GPU."""
    code = """
import sys

# None makes every import of the name fail.
for name in ("triton", "sklearn", "matplotlib", "tqdm", "scipy", "skimage"):
    sys.modules[name] = None

import torch
import lars_fused

p = torch.nn.Parameter(torch.ones(3, 3))
p.grad = torch.ones(3, 3)
lars_fused.LARS([p], lr=0.1).step()
assert not torch.equal(p.detach(), torch.ones(3, 3))
assert not torch.cuda.is_initialized()
print("imported", lars_fused.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")
