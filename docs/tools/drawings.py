"""The drawings of docs/kernel.md, as SVG files in docs/drawings/.

    python docs/tools/drawings.py

writes them anew; `tests/repository/test_docs.py` compares them with the files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "drawings"
INK, PAPER, WAIT = "#1f2937", "#ffffff", "#e5e7eb"
NORM, UPDATE, BOTH = "#93c5fd", "#fdba74", "#c4b5fd"  # kinds of items
READ, CACHED, WRITE = "#93c5fd", "#dbeafe", "#fdba74"  # kinds of bytes


class Drawing:
    """Boxes, texts and arrows on white paper, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            'font-family="sans-serif" font-size="13">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" '
            f'orient="auto"><path d="M0,1 L7,4 L0,7 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def text(self, x: float, y: float, text: str, *, middle: bool = False) -> None:
        """Text that begins at x, or has its middle there."""
        anchor = ' text-anchor="middle"' if middle else ""
        self._parts.append(f'<text x="{x:g}" y="{y:g}" fill="{INK}"{anchor}>{text}</text>')

    def box(self, x: float, y: float, w: float, h: float, color: str, text: str = "") -> None:
        """A box with a word in its middle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2" '
            f'fill="{color}" stroke="{INK}"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + 4.5, text, middle=True)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """From the first point to the second."""
        self._parts.append(
            f'<path d="M{x1:g},{y1:g} L{x2:g},{y2:g}" stroke="{INK}" marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self._parts, "</svg>", ""])


def memory() -> str:
    """Bytes of one fp32 parameter: two passes, one launch, SGD."""
    d = Drawing(690, 222, "Bytes a parameter that one step moves")
    rows = [
        (
            "two passes over memory",
            [("w", READ), ("g", READ), ("w", READ), ("g", READ), ("v", READ)],
            28,
        ),
        (
            "one launch, second read in L2",
            [("w", READ), ("g", READ), ("w", CACHED), ("g", CACHED), ("v", READ)],
            20,
        ),
        ("SGD(fused=True), no norms", [("w", READ), ("g", READ), ("v", READ)], 20),
    ]
    for i, (name, reads, total) in enumerate(rows):
        y = 20 + 50 * i
        d.text(10, y + 20, name)
        for k, (word, color) in enumerate([*reads, ("w", WRITE), ("v", WRITE)]):
            d.box(220 + 52 * k, y, 50, 30, color, word)
        d.text(600, y + 20, f"{total} bytes")
    legend = [("4 bytes read from DRAM", READ), ("read from L2", CACHED), ("written", WRITE)]
    for k, (word, color) in enumerate(legend):
        d.box(10 + 220 * k, 182, 20, 20, color)
        d.text(38 + 220 * k, 197, word)
    return d.svg()


def tickets() -> str:
    """Tensors, their chunks, the list of items, and the programs that draw tickets."""
    d = Drawing(690, 330, "From tensors to programs")
    d.text(10, 25, "tensors, in chunks")
    d.box(150, 8, 60, 26, WAIT, "conv1")
    for k in range(3):
        d.box(260 + 62 * k, 8, 60, 26, WAIT, f"layer {k}")
    d.box(500, 8, 60, 26, WAIT, "bias")
    d.text(10, 105, "items, one list")
    names = ["B", "N 0", "N 1", "N 2", "B", "U 0", "U 1", "U 2"]
    colors = {"B": BOTH, "N": NORM, "U": UPDATE}
    for k, name in enumerate(names):
        d.box(150 + 66 * k, 88, 60, 26, colors[name[0]], name)
        d.text(180 + 66 * k, 132, f"{k}", middle=True)
    d.text(10, 132, "tickets")
    d.arrow(180, 34, 180, 84)
    for k in range(3):
        d.arrow(290 + 62 * k, 34, 246 + 66 * k, 84)
    d.arrow(530, 34, 446, 84)
    held = {0: [0, 4, 7], 1: [1, 3, 6], 2: [2, 5]}
    for p, own in held.items():
        y = 165 + 38 * p
        d.text(10, y + 18, f"program {p}")
        for t in own:
            d.box(150 + 66 * t, y, 60, 26, colors[names[t][0]], names[t])
    for k, (word, color) in enumerate(
        [
            ("BOTH: norm and update", BOTH),
            ("NORM: sums of one chunk", NORM),
            ("UPDATE: waits for the ratio", UPDATE),
        ]
    ):
        d.box(10 + 220 * k, 295, 20, 20, color)
        d.text(38 + 220 * k, 310, word)
    return d.svg()


def ratio() -> str:
    """How the trust ratio of a tensor of three chunks comes to be, over time."""
    d = Drawing(690, 200, "One tensor of three chunks, three programs, over time")
    for p, end in enumerate((210, 300, 250)):
        y = 15 + 50 * p
        d.text(10, y + 20, f"program {p}")
        d.box(90, y, end - 90, 30, NORM, f"NORM {p}")
    d.text(308, 58, "last to arrive:")
    d.text(308, 74, "adds the 3 slots in order,")
    d.text(308, 90, "publishes q")
    for p in range(3):
        y = 15 + 50 * p
        d.box(520, y, 110, 30, UPDATE, f"UPDATE {p}")
        if p != 1:
            d.arrow(480, 76, 516, y + 15)
        else:
            d.arrow(480, 80, 516, 80)
    for p, end in ((0, 210), (2, 250)):
        d.text(end + 10, 35 + 50 * p, "draws other items ...")
    d.arrow(90, 175, 660, 175)
    d.text(620, 195, "time")
    return d.svg()


DRAWINGS: dict[str, Callable[[], str]] = {"memory": memory, "tickets": tickets, "ratio": ratio}


def main() -> None:
    """Write every drawing."""
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
