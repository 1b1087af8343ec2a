"""Every snippet of README.md and docs/ runs.

Per file, the ```python blocks and the new side of ```diff blocks are executed in order in one
namespace, beside the stand-ins below. A block that needs more than that says so on the line before:

    <!-- snippet: skip: needs a process group -->
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lars_fused import LARS, conventions, param_groups, scaled_lr

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- snippet: skip: (?P<reason>.+) -->\n)?"
    r"^```(?P<language>python|diff)\b.*\n(?P<code>(?:.*\n)*?)^```$",
    re.MULTILINE,
)


class Snippet(NamedTuple):
    """One block: its first line in the file, its code, and why it cannot run here."""

    line: int
    code: str
    reason: str | None


def snippets(text: str) -> list[Snippet]:
    found = []
    for match in BLOCK.finditer(text):
        code = match["code"]
        if match["language"] == "diff":
            kept = [line for line in code.splitlines() if not line.startswith("-")]
            code = "".join(f"{line[1:]}\n" for line in kept)
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Snippet(line, code, match["reason"]))
    return found


def stand_ins() -> dict[str, Any]:
    """What the documents leave to the reader: a model with a gradient, and a few numbers."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    )  # fmt: skip
    images, labels = torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    return {
        "LARS": LARS, "conventions": conventions, "param_groups": param_groups,
        "scaled_lr": scaled_lr, "torch": torch, "model": model, "lr": 0.1, "wd": 1e-4,
        "params": list(model.parameters()), "loader": [(images, labels)],
    }  # fmt: skip


def run(text: str, name: str) -> tuple[int, list[str]]:
    """How many blocks ran, and why the others did not."""
    namespace, ran, reasons = stand_ins(), 0, []
    for snippet in snippets(text):
        if snippet.reason:
            reasons.append(f"line {snippet.line}: {snippet.reason}")
            compile(snippet.code, name, "exec")
            continue
        code = "\n" * (snippet.line - 1) + snippet.code  # so that an error names the line
        exec(compile(code, name, "exec"), namespace)
        ran += 1
    return ran, reasons


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_snippet_runs(path):
    text = path.read_text(encoding="utf-8")
    ran, reasons = run(text, str(path))
    assert ran + len(reasons) == len(re.findall(r"^\s*```(?:python|diff)\b", text, re.MULTILINE))
    if reasons and not ran:
        pytest.skip("; ".join(reasons))


def test_the_readme_shows_how_to_switch():
    ran, _ = run((ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
    assert ran >= 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nLARS(params, 0.1, 0.9)\n```\n", TypeError),
        ("```python\nundefined\n```\n", NameError),
        ("```diff\n-LARS(params, lr)\n+LARS(params, rate=lr)\n```\n", TypeError),
        ("<!-- snippet: skip: needs a GPU -->\n```python\nfor\n```\n", SyntaxError),
    ],
)
def test_a_snippet_that_cannot_run_fails(text, error):
    with pytest.raises(error):
        run(text, "text")


def test_a_skipped_snippet_gives_its_reason():
    text = "<!-- snippet: skip: needs a GPU -->\n```python\nundefined\n```\n"
    assert run(text, "text") == (0, ["line 3: needs a GPU"])
