"""Pictures in one style: matplotlib without a display, colours told apart by everybody."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lars_fused.study.files import write_bytes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, for colour-blind readers too."""

MARKERS = "osD^vPX"


@contextmanager
def figure(
    file: Path,
    title: str,
    panels: int = 1,
    *,
    rows: int = 1,
    width: float = 5.6,
    height: float = 4.4,
    dpi: int = 130,
) -> Iterator[list[Any]]:
    """Panels side by side, in `rows` rows, saved to `file` as a PNG when the block is done."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(
        rows,
        panels,
        figsize=(width * panels, height * rows),
        layout="constrained",
        squeeze=False,
    )
    try:
        yield list(axes.flat)
        for one in axes.flat:
            one.grid(alpha=0.25)
            one.spines[["top", "right"]].set_visible(False)
        drawn.suptitle(title, fontsize=11)
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=dpi)
        write_bytes(file, buffer.getvalue())
    finally:
        plt.close(drawn)


def line(
    axes: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], label: str, number: int
) -> None:
    """The seeds' mean as a line over x, their range as a band; `seeds` holds a list for each x."""
    colour = COLOURS[number % len(COLOURS)]
    mean = [statistics.mean(values) for values in seeds]
    low, high = [min(values) for values in seeds], [max(values) for values in seeds]
    marker = MARKERS[number % len(MARKERS)] if len(x) < 25 else None
    axes.plot(x, mean, color=colour, label=label, marker=marker, markersize=4.5)
    axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def legend_below(panels: Sequence[Any]) -> None:
    """One legend for all panels, under them."""
    lines: dict[str, Any] = {}
    for axes in panels:
        for line_, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line_)
    panels[0].figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )


def batch_axis(axes: Any, batches: Sequence[int]) -> None:
    """A logarithmic axis that is marked at the batches themselves."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(batches), [f"{b:,}" for b in batches])
    axes.minorticks_off()
    axes.set_xlabel("batch size (images a step)")


def shade(place: float) -> Any:
    """A colour for the place in [0, 1] of a layer: dark for the first, light for the last."""
    import matplotlib as mpl

    return mpl.colormaps["viridis"](0.92 * place)
