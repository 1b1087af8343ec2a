"""Imports run one way: a table of who may import whom, held against the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
OWN = "lars_fused"

# A module imports only from lines above its own. `docs/architecture.md` draws it.
LAYERS = """
kernels.layout
options
reference conventions
_engine.tensors _engine.validate _engine.sharding _engine.plan _engine.launch _engine.queue_state
_engine.device_memory _engine.launch_schedule _engine.members
_engine.parameters
_engine.launch_tables _engine.partition _engine.new_state _engine.rank_check _engine.portable
_engine.graph_pool _engine.replicas _engine.callers
_engine.rates _engine.sgd_kernel _engine.square_norms _engine.decayed_norm
_engine.small_batch _engine.large_tensor _engine.foreach
_engine.fused
_engine.torch_step
_engine.torch_part
_engine.wrapped _engine.measured _engine.fallback
_engine.prepared_step
_engine.kept
_engine.engine
functional norms groups schedule layer_stats
checkpoints.convert checkpoints.load
checkpoints
optimizer
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
# Third parties, beside the standard library: torch everywhere, and triton in one module.
THIRD_PARTIES = {"_engine.launch": {"torch", "triton"}, "kernels.layout": set()}
# The modules of kernels/ import each other and triton. The public name of anything is enough for
# what stands beside the optimizer; of the engine it may use these.
BESIDE = {"distributed": {"_engine.rank_check"}, "study": {"distributed"}, "monitor": set()}
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
MODULES = {*SOURCES, *(f"{OWN}.{name}" for name in RANK)}


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


def violations(name, tree, is_package=False):
    """What module `name` imports and must not."""
    found = {
        x
        for x in imports_of(tree, name, is_package)
        if x.split(".")[0] not in sys.stdlib_module_names
    }
    own = name.removeprefix(OWN).strip(".")
    return sorted(x for x in found if not may_import(own, x))


def may_import(own, imported):
    """Whether a module of the package (without its prefix; "" for itself) may import another."""
    part, top = own.split(".")[0], imported.split(".")[0]
    inner = imported.removeprefix(OWN).strip(".")
    if part == "kernels" and own != "kernels.layout":
        return top == "triton" or inner.startswith("kernels")
    if own in RANK:
        if top != OWN:
            return top in THIRD_PARTIES.get(own, {"torch"})
        if own == "_engine.launch" and inner.startswith("kernels"):
            return True
        # A package is named where a name of it is meant: `from . import launch`.
        return inner in ("", "_engine", "kernels") or RANK.get(inner, 99) < RANK[own]
    if own == "":  # the package itself gathers the public names
        return top != "triton" and (inner in RANK and not inner.startswith("_"))
    if top != OWN:
        return top not in NEVER
    return (
        imported in PUBLIC
        or inner.split(".")[0] == part
        or any(inner.startswith(allowed) for allowed in BESIDE.get(part, ()))
    )


@pytest.mark.parametrize("name", SOURCES)
def test_imports_only_what_the_table_allows(name):
    path = SOURCES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert violations(name, tree, path.name == "__init__.py") == []


def test_the_table_knows_every_module():
    names = {name.removeprefix(OWN).strip(".") for name in SOURCES}
    known = {name for name in names if name.split(".")[0] not in ("", "kernels", *BESIDE)}
    assert known - {"_engine"} == set(RANK) - {"kernels.layout"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lars_fused._engine.plan", "import numpy"),
        ("lars_fused._engine.plan", "from . import launch_tables"),
        ("lars_fused.reference", "from lars_fused._engine.validate import dense"),
        ("lars_fused.functional", "from .kernels import lars_step"),
        ("lars_fused.functional", "def f():\n    import triton.language as tl"),
        ("lars_fused.kernels.memory", "import torch"),
        ("lars_fused.kernels.memory", "from ..plan import make_plan"),
        ("lars_fused.optimizer", "from lars_fused.kernels import tuning"),
        ("lars_fused._engine.launch", "from lars_fused import functional"),
        ("lars_fused._engine.launch", "import tests.conftest"),
        ("lars_fused._engine.partition", "from .prepared_step import PreparedStep"),
        ("lars_fused._engine.tensors", "import triton"),
        ("lars_fused.options", "from ._engine import validate"),
        ("lars_fused.kernels.layout", "import triton.language as tl"),
        ("lars_fused.study.demo", "from lars_fused._engine import launch"),
        ("lars_fused.study.demo", "from ..reference import reference_step"),
        ("lars_fused.study.demo", "import bench"),
        ("lars_fused", "from . import study"),
        ("lars_fused.monitor", "from ._engine import launch"),
        ("lars_fused", "from . import monitor"),
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
