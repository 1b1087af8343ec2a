"""Processes that start at once: forks of a server that has imported already what tests need.

To import torch takes a process three seconds, and no test is about that. What must begin as a
user's process does (environment variables that are read at import, `python -m`) runs by
`subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Forked with torch loaded but unused: the server runs no operation and starts no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "lars_fused.study.cli"]
)


class Study:
    """`lars-study` in a process of its own, without pictures; two files hold what it prints.

    `prepare` is called there before the command; it must be importable.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, prepare: Callable[..., None], *given: Any
    ) -> None:
        number = len(list(folder.glob("*.out")))
        self._shown = [folder / f"{number}{end}" for end in (".out", ".err")]
        for path in self._shown:
            path.touch()
        process = CONTEXT.Process(
            target=_study, args=(list(arguments), list(map(str, self._shown)), prepare, given)
        )
        process.start()
        self._process = process

    def wait(self, seconds: float = 120) -> tuple[int, str, str]:
        """Its exit status, output and errors."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        out, err = (path.read_text() for path in self._shown)
        return self._process.exitcode, out, err


def _study(
    arguments: list[str], shown: list[str], prepare: Callable[..., None], given: Sequence[Any]
) -> None:
    for path, stream in zip(shown, (sys.stdout, sys.stderr), strict=True):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
    import pytest
    import torch

    from lars_fused.study.cli import main
    from tests.study.drawing import undrawn

    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    undrawn(pytest.MonkeyPatch())
    prepare(*given)
    sys.exit(main(arguments))
