"""What the tests of every `lars-study` command do: merge shares, interrupt, refuse."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lars_fused.study.cli import main


def done_in_shares(command: Sequence[str], folder: Path, shares: int = 2) -> Path:
    """All of a study, merged from shares in folders of their own as on several machines."""
    merged = folder / "merged"
    for part in range(1, shares + 1):
        out = folder / str(part)
        assert main([*command, f"--only={part}/{shares}", f"--out={out}"]) == 0
        shutil.copytree(out, merged, dirs_exist_ok=True)
    return merged


def interrupted(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> list[Any]:
    """Ctrl-C, once, in place of the `at`-th call of a function of `owner`.

    Returns what grows by the arguments of every call, the interrupted one's too.
    """
    real, calls, pressed = getattr(owner, name), [], []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == at and not pressed:
            pressed.append(at)
            raise KeyboardInterrupt
        return real(*arguments, **options)

    patch.setattr(owner, name, stopped)
    return calls


def finished(out: Path) -> dict[Path, int]:
    """The results of a folder, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.json") if path.parent != out}


def refused(
    arguments: Sequence[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong input is told in one line, before anything is written."""
    assert main([*arguments, f"--out={out}"]) != 0
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert not out.exists()
