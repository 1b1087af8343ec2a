"""Every refusal and warning with its text: `refusals.txt` has it, `contract/bad_*.py` cause it.

python -m tests.refusals    writes the texts anew; look at what changed before you commit it
python -m tests.readme      makes the README's table of them
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.contract import bad_arguments, bad_input, bad_situations
from tests.contract.bad_input import Prepare, World, calling

REFUSED = (ValueError, TypeError, RuntimeError, AttributeError, ImportError)
WARNED = (RuntimeWarning, UserWarning)
FILE = Path(__file__).with_name("refusals.txt")
# Only where the kernels cannot run: elsewhere another reason comes first, or none.
WITHOUT_KERNELS = {*bad_input.WITHOUT_KERNELS, "multi_tensor_l2norm: forced kernels"}
# Neither optimizer nor backend of a `World` takes part.
ALONE = {**bad_arguments.CASES, **bad_situations.REFUSALS, **bad_situations.WARNINGS}
CASES: dict[str, Prepare] = {
    **bad_input.CASES,
    **bad_input.WITHOUT_KERNELS,
    **{what: calling(lambda _, call=call: call()) for what, call in ALONE.items()},
}


def read() -> dict[str, str]:
    """By what is refused: the class of the error and the whole of its text."""
    blocks = [block.splitlines() for block in FILE.read_text(encoding="utf-8").split("\n\n")]
    return {what: "\n".join(line[4:] for line in lines) for what, *lines in blocks}


def text_of(error: BaseException) -> str:
    """How an error stands in the file."""
    return f"{type(error).__name__}: {error}"


def error_of(call: Callable[[], Any]) -> Exception:
    """What a call raises, of the classes that refuse; a warning of the package is raised too."""
    with warnings.catch_warnings():
        for kind in WARNED:
            warnings.filterwarnings("error", "(LARS|lars_step|param_groups): ", kind)
        try:
            call()
        except (*REFUSED, *WARNED) as error:
            return error
    raise AssertionError("nothing was refused")


def write() -> None:
    """Run every case and keep what it says. Without the interpreter."""
    blocks = []
    for what, prepare in CASES.items():
        lines = text_of(error_of(prepare(World()))).splitlines()
        blocks.append("\n".join([what, *("    " + line for line in lines)]))
    FILE.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
