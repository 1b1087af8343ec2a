"""What the optimizer answers differently depending on who calls it, and how."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

_Arguments = ParamSpec("_Arguments")
_UNSCALE_THEMSELVES = ("lightning", "pytorch_lightning", "lightning_fabric")


def keyword_only(init: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Reject positional hyper-parameters, whose order differs between optimizers."""

    @functools.wraps(init)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        extra = args[3:]  # after self, params and lr
        if extra:
            values = ", ".join(map(repr, extra))
            plural = "s" if len(extra) > 1 else ""
            raise TypeError(
                f"LARS: {len(extra)} positional argument{plural} after lr ({values}); the order "
                "differs between optimizers, so pass by keyword: "
                "LARS(params, lr, momentum=0.9, weight_decay=1e-4)"
            )
        init(*args, **kwargs)

    return checked


class ReadsScale:
    """`_step_supports_amp_scaling`: whether step() reads GradScaler's scale and flag by itself.

    It does, and takes gradients that were unscaled before just as well. Lightning reads True as
    "gradients cannot be unscaled and clipped", so the answer is False; it then unscales and clips,
    and GradScaler hands over its flag alone. An attribute that a user sets on an optimizer or the
    class takes precedence.
    """

    def __get__(self, optimizer: object, owner: type | None = None) -> bool:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        return asking.partition(".")[0] not in _UNSCALE_THEMSELVES
