"""Pictures in tests: coarse, or none. Layout and dots take most of a report's time."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest

from lars_fused.study import pictures


def coarsely_drawn(patch: pytest.MonkeyPatch) -> None:
    """Real pictures with few dots and no layout, which takes most of a picture's time."""

    @contextmanager
    def figure(file, title, panels=1, *, rows=1, **size):
        drawn, axes = plt.subplots(rows, panels, squeeze=False)
        yield list(axes.flat)
        file.parent.mkdir(exist_ok=True)
        drawn.savefig(file, dpi=10)
        plt.close(drawn)

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    patch.setattr(pictures, "figure", figure)


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """No pictures at all: one test has looked at them."""

    @contextmanager
    def figure(file, title, panels=1, *, rows=1, **size):
        yield [MagicMock() for _ in range(rows * panels)]

    patch.setattr(pictures, "figure", figure)
