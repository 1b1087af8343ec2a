"""What the project promised to show, and what its results folders hold of it.

Nothing is estimated: a figure that no quotable folder holds is "not measured".
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench import environment
from bench.cases import DTYPES, model_case
from bench.peers import COMPILED, EAGER, FLOOR, ONE, PROJECTS, TWO
from bench.profiler import COUNTS, DRAM
from bench.raw import COPY, rows_of, runs
from bench.report import table

NOT_MEASURED = "not measured"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- python -m bench report --readme -->", "<!-- end -->"
FP32 = next(iter(DTYPES))
LARGE = "one 100M tensor"
STUBBED, FOREACH = "lars_fused, launch stubbed", "SGD(foreach=True)"


class Line(NamedTuple):
    measure: str
    must: str
    measured: str = NOT_MEASURED
    folder: str = "–"


class Folders:
    """The folders that may be quoted, the latest first."""

    def __init__(self, folders: Iterable[Path]) -> None:
        usable = [f for f in folders if rows_of(f) and not environment.reportable(f)]
        usable.sort(key=lambda f: environment.read(f)["utc"], reverse=True)
        self.rows = {folder: rows_of(folder) for folder in usable}

    def find(
        self, case: str, *names: str, kind: str = "gpu", unit: str = "us"
    ) -> tuple[list[float], str] | None:
        """Medians of variants that were interleaved in one run, and its folder's name.

        The copy's is the time of one byte.
        """
        for folder, rows in self.rows.items():
            for (found, _, dtype, _), kinds in reversed(runs(rows, unit).items()):
                timed = kinds.get(kind, {})
                if found == case and dtype == FP32 and all(name in timed for name in names):
                    each = [timed[name] for name in names]
                    return [
                        float(r["p50"]) / (float(r["bytes"]) if r["variant"] == COPY else 1)
                        for r in each
                    ], folder.name
        return None


def _over(folders: Folders, what: str, must: str, case: str, *pair: str, **kind: str) -> Line:
    found = folders.find(case, *pair, **kind)
    if found is None:
        return Line(what, must)
    return Line(what, must, f"{found[0][0] / found[0][1]:.3f}", found[1])


def _of_bandwidth(folders: Folders, must: str, case: str, per_parameter: int) -> Line:
    model = model_case(case)
    moved = model.least_bytes if per_parameter == 20 else model.two_pass_bytes
    what = f"{per_parameter} B/param over copy bandwidth / our GPU time, {case}"
    found = folders.find(case, COPY, ONE)
    if found is None:
        return Line(what, must)
    return Line(what, must, f"{moved * found[0][0] / found[0][1]:.3f}", found[1])


def _counted(folders: Folders, what: str, must: str, unit: str, form: str) -> Line:
    found = folders.find("ResNet-50", ONE, unit=unit)
    return (
        Line(what, must) if found is None else Line(what, must, f"{found[0][0]:{form}}", found[1])
    )


def _growth(folders: Folders) -> Line:
    what, must = "host time, 10,000 tensors / 1,000 tensors", "≤ 12"
    many, few = (folders.find(f"host, {n} tensors", STUBBED, kind="host") for n in (10_000, 1000))
    if many is None or few is None or many[1] != few[1]:
        return Line(what, must)
    return Line(what, must, f"{many[0][0] / few[0][0]:.1f}", few[1])


def _predictions() -> list[Line]:
    """Bytes that the traffic model gives for the present order and constants on an H200."""
    bounds = {"ResNet-50": "≤ 20.5", "ViT-B/16": "≤ 20.5", "AlexNet": "≤ 26.5"}
    path = environment.RESULTS / "traffic" / "prediction.csv"
    text = path.read_text().splitlines() if path.exists() else []
    found: dict[str, str] = {}
    for row in csv.DictReader(line for line in text if not line.startswith("#")):
        if row["gpu"] == "H200":  # the present choice stands before the sweeps
            found.setdefault(row["model"], f"{float(row['bytes_per_parameter']):.2f} (prediction)")
    return [
        Line(f"predicted DRAM bytes a parameter, {model}, H200", must, found[model], "traffic")
        if model in found
        else Line(f"predicted DRAM bytes a parameter, {model}, H200", must)
        for model, must in bounds.items()
    ]


def lines(parents: Iterable[Path]) -> list[Line]:
    folders = Folders(parents)
    ours = f"ours / {FLOOR}"
    found = [
        _over(folders, f"GPU time, {case}, {ours}", "≤ 1.15", case, ONE, FLOOR)
        for case in ("ResNet-50", "ViT-B/16")
    ]
    found.append(_of_bandwidth(folders, "≥ 0.85", "ViT-B/16", 20))
    found.append(_of_bandwidth(folders, "≥ 0.90", LARGE, 28))
    what = "DRAM bytes a parameter, ResNet-50"
    found.append(_counted(folders, what, "≤ 21.5", DRAM, ".2f"))
    for case in ("ResNet-50", "ViT-B/16", LARGE):
        what = f"GPU time, {case}, one launch / two launches"
        found.append(_over(folders, what, "reported", case, ONE, TWO))
    for peer in (*EAGER, *COMPILED, *PROJECTS):
        what = f"GPU time, ResNet-50, {peer} / ours"
        found.append(_over(folders, what, "> 1", "ResNet-50", peer, ONE))
    for unit, must in zip(COUNTS, ("1", "0", "0"), strict=True):
        found.append(_counted(folders, f"{unit}, steady state", must, unit, "g"))
    what = f"host time, 161 tensors, launch stubbed / {FOREACH}"
    found.append(_over(folders, what, "≤ 0.25", "host, ResNet-50", STUBBED, FOREACH, kind="host"))
    return [*found, _growth(folders), *_predictions()]


def readme_table(results: Path = environment.RESULTS) -> str:
    folders = [path.parent for path in results.glob("*/raw.csv")]
    return table(["measure, fp32", "must reach", "measured", "bench/results/"], lines(folders))


def section(text: str) -> str:
    """The README's text with its table made anew."""
    inner = f"{BEGIN}\n\n{readme_table()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: inner, text, flags=re.DOTALL)


def write() -> None:
    README.write_text(section(README.read_text()))
    print(f"written: {README}")
