"""Tables for the terminal, and the words that titles are made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from lars_fused.study.settings import Settings


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their contents: the first to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def counted(count: int, what: str) -> str:
    """So many of `what`, such as "1 seed" and "3 seeds"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def data_name(settings: Settings) -> str:
    """The kind of data, without the folder it lies in."""
    return settings.data.split(":")[0]


def network_name(settings: Settings) -> str:
    """The network, with its width where that is not 1."""
    width = f" (width {settings.width:g})" if settings.width != 1 else ""
    return f"{settings.network}{width}"


def spread(values: Sequence[float]) -> float:
    """Standard deviation between seeds; a single seed has none."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation between seeds."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {spread(values):.{digits}f}"
