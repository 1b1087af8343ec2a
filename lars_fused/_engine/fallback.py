"""What the user is told when torch operations replace kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from . import launch
from .partition import Partition

Label = Callable[[int], str]
"""The prefix of a message about the i-th parameter of a step."""
_warned: set[str] = set()


def warn_once(caller: str, reason: str) -> None:
    """Warn that the kernels do not run where expected, once per reason and process."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"{caller}: falling back to the portable path: {reason}; backend='torch' "
            "selects it without this warning",
            RuntimeWarning,
            stacklevel=6,
        )


def report(divided: Partition, backend: str, label: Label, caller: str) -> None:
    """Raise or warn if the kernels cannot update a tensor that they were expected to.

    Raises:
        RuntimeError: with backend="triton", for the first such tensor.
    """
    if backend == "triton":
        for i, reason in divided.reasons.items():
            raise RuntimeError(
                f"{label(i)}: backend='triton' cannot update it: {reason}; or use backend='auto'"
            )
    if backend == "auto":
        for device in divided.rest:
            if launch.expected(device) and (missing := launch.why_not(device)):
                warn_once(caller, missing)
