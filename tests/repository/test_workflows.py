"""The workflows of a fork's CI: valid, pinned, and in agreement with what the package promises."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import lars_fused

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")


def need(module):
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed: it comes with the extra `test`")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=["workflows", "issue forms", "citation"],
)
def test_files_follow_their_schema(schema, files):
    need("check_jsonschema")
    assert files
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        schema,
        *map(str, files),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_of_workflows_finds_nothing():
    """Among other things: actions pinned by hash, few permissions, no input inside a script."""
    beside = Path(sys.executable).with_name("zizmor")  # a program, not a module
    program = str(beside) if beside.exists() else shutil.which("zizmor")
    if program is None:
        pytest.skip("zizmor is not installed: it comes with the extra `test`")
    command = [program, "--offline", "--no-progress", "--persona=pedantic"]
    done = subprocess.run([*command, ".github"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_make_target_of_the_workflows_exists():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    called = {
        target
        for path in WORKFLOWS
        for target in re.findall(r"\bmake ([a-z-]+)", re.sub(r"#.*", "", path.read_text()))
    }
    assert {"lint", "test", "docs", "gpu"} <= called <= targets


def matrix(name):
    line = re.search(rf"^        {name}: \[(.*)\]$", read(".github/workflows/ci.yml"), re.MULTILINE)
    return re.findall(r'"([\d.]+)"', line[1])


def test_the_matrix_is_what_the_package_says_it_supports():
    setup = read("setup.py")
    stated = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', setup)
    assert matrix("python") == stated
    assert f'python_requires=">={stated[0]}"' in setup
    floor = re.search(r'"torch>=([\d.]+)"', setup)[1]
    newest = re.search(r"^torch==(\S+)$", read("constraints.txt"), re.MULTILINE)[1]
    oldest, last = matrix("torch")
    assert oldest.startswith(f"{floor}.")
    assert last == newest
    assert f"if: matrix.torch == '{oldest}'" in read(".github/workflows/ci.yml")


def test_the_citation_names_this_version():
    assert f"\nversion: {lars_fused.__version__}\n" in read("CITATION.cff")


def test_every_torch_load_is_restricted_to_weights():
    """What SECURITY.md promises of checkpoints, for the code and the examples."""
    calls = []
    for folder in ("lars_fused", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = re.sub(r'"""(?:.*?)"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            calls += [(path.name, c) for c in re.findall(r"torch\.load\((.*)\)", text)]
    assert len(calls) >= 3
    assert [c for c in calls if "weights_only=True" not in c[1]] == []
