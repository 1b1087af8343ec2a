"""What the project promised to show, and which of it the results folders contain.

Nothing is estimated: a figure that no quotable folder holds is "not measured".
"""

from __future__ import annotations

import csv
import operator
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench import environment
from bench.cases import DTYPES, SWEEP_CASE, model_case, sweep_case
from bench.peers import CACHED, COMPILED, CPU_PROJECTS, EAGER, FLOOR, ONE, PORTABLE, PROJECTS, TWO
from bench.profiler import COUNTS, DRAM
from bench.raw import COPY, rows_of, runs
from bench.report import table

NOT_MEASURED = "not measured"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- python -m bench report --readme -->", "<!-- end -->"
FP32 = next(iter(DTYPES))
LARGE = "one 100M tensor"
SMALL, SMALL_PARAMETERS = 10_000, sweep_case(10_000).n_params
NORMS, TORCH_NORMS = "multi_tensor_l2norm", "torch._foreach_norm"
MEMORY, NORM_ERROR = "% of parameters, gradients and state", "1e-9, relative error"
MIXED = "bf16, fp32 momentum"
STUBBED, FOREACH = "lars_fused, launch stubbed", "SGD(foreach=True)"


_HOLDS = {"≤": operator.le, "≥": operator.ge, "<": operator.lt, ">": operator.gt, "": operator.eq}


class Line(NamedTuple):
    measure: str
    must: str
    measured: str = NOT_MEASURED
    folder: str = "–"

    @property
    def missed(self) -> bool:
        """Whether there is a figure, and it breaks what must be reached."""
        bound = re.fullmatch(r"([≤≥<>]?) ?([\d.]+)", self.must)
        figure = re.match(r"[\d.]+", self.measured)
        if bound is None or figure is None:
            return False
        return not _HOLDS[bound[1]](float(figure[0]), float(bound[2]))


class Folders:
    """The quotable folders, latest first."""

    def __init__(self, folders: Iterable[Path]) -> None:
        usable = [f for f in folders if rows_of(f) and not environment.reportable(f)]
        usable.sort(key=lambda f: environment.read(f)["utc"], reverse=True)
        self.rows = {folder: rows_of(folder) for folder in usable}

    def find(
        self,
        case: str,
        *names: str,
        kind: str = "gpu",
        unit: str = "us",
        dtype: str = FP32,
        n_params: int | None = None,
    ) -> tuple[list[float], str] | None:
        """Medians of variants that were interleaved in one run, and its folder's name.

        For the copy, the time per byte.
        """
        for folder, rows in self.rows.items():
            for (found, size, stored, _), kinds in reversed(runs(rows, unit).items()):
                timed = kinds.get(kind, {})
                right = found == case and stored == dtype and n_params in (None, int(size))
                if right and all(name in timed for name in names):
                    each = [timed[name] for name in names]
                    return [
                        float(r["p50"]) / (float(r["bytes"]) if r["variant"] == COPY else 1)
                        for r in each
                    ], folder.name
        return None


def _over(folders: Folders, what: str, must: str, case: str, *pair: str, **kind: Any) -> Line:
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


def _one(folders: Folders, what: str, must: str, case: str, name: str, unit: str) -> Line:
    found = folders.find(case, name, kind="host", unit=unit)
    return Line(what, must) if found is None else Line(what, must, f"{found[0][0]:.3g}", found[1])


def _on_a_cpu(folders: Folders) -> list[Line]:
    ours = f"ours / {FLOOR}"
    host = {"kind": "host"}
    found = [
        _over(folders, f"CPU time, {case}, {ours}", must, case, PORTABLE, FLOOR, **host)
        for case, must in (("ResNet-50", "≤ 1.8"), ("ViT-B/16", "≤ 1.9"), ("AlexNet", "reported"))
    ]
    what = f"CPU time, 32 tensors, {SMALL:,} parameters in all, {ours}"
    pair = PORTABLE, FLOOR
    found.append(
        _over(folders, what, "≤ 2.0", SWEEP_CASE, *pair, kind="host", n_params=SMALL_PARAMETERS)
    )
    found += [
        _over(
            folders, f"CPU time, ResNet-50, {p} over ours", "≥ 2", "ResNet-50", p, PORTABLE, **host
        )
        for p in (*EAGER, "compiled foreach LARS", *CPU_PROJECTS)
    ]
    found += [
        _over(folders, f"CPU time, norms of ResNet-50, {NORMS} / {TORCH_NORMS}", "≤ 1.3",
              "norms, ResNet-50", NORMS, TORCH_NORMS, **host),
        _one(folders, "relative error of our norm, 100M elements, in 1e-9", "≤ 100",
             f"norms, {LARGE}", NORMS, NORM_ERROR),
        _one(folders, f"CPU, ResNet-50, extra memory of a step, {MEMORY}", "< 1",
             "ResNet-50", PORTABLE, MEMORY),
        _over(folders, f"CPU time, ResNet-50, {MIXED}, ours / eager LARS", "≤ 0.5", "ResNet-50",
              PORTABLE, "eager LARS", dtype=MIXED, **host),
    ]  # fmt: skip
    return found


def _predictions() -> list[Line]:
    """Bytes and times of the traffic model for the current order and constants.

    For the H200 as measured, and for the one whose published figures the bounds were made with.
    """
    path = environment.RESULTS / "traffic" / "prediction.csv"
    text = path.read_text().splitlines() if path.exists() else []
    rows = list(csv.DictReader(line for line in text if not line.startswith("#")))

    def line(
        what: str, must: str, model: str, gpu: str = "H200", kernel: str = "", hint: str = "1"
    ) -> Line:
        measure = ", ".join(filter(None, (f"predicted {what}", model, gpu, kernel)))
        order = "resident" if kernel else "ahead"
        wanted = {"model": model, "gpu": gpu, "order": order, "evict_first": hint}
        column, form = ("model_us", ".1f") if "µs" in what else ("bytes_per_parameter", ".2f")
        for row in rows:  # the current choice comes before the sweeps
            if wanted.items() <= row.items():
                return Line(measure, must, f"{float(row[column]):{form}} (prediction)", "traffic")
        return Line(measure, must)

    large, published = ("ResNet-50", "ViT-B/16"), "H200 as published"
    dram, held = "DRAM bytes a parameter", "lars_resident"
    found = [line(dram, "≤ 20.5", model) for model in large]
    found.append(line(dram, "≤ 26.5", "AlexNet"))
    found += [line(dram, "≤ 20.5", model, kernel=held) for model in large]
    found += [line(dram, "≤ 20.5", model, published) for model in large]
    for model, honoured, ignored in (("ResNet-50", 122, 150), ("ViT-B/16", 430, 550)):
        found += [
            line("time, µs", f"≤ {honoured}", model),
            line("time, µs", f"≤ {ignored}", model, kernel=held),
            line("time, µs", f"≤ {honoured}", model, published),
            line("time if evict_first is ignored, µs", f"≤ {ignored}", model, published, hint="0"),
        ]
    return found


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
    for case in ("ResNet-50", "ViT-B/16"):
        what = f"GPU time, {case}, lars_step / ours"
        found.append(_over(folders, what, "> 1", case, CACHED, ONE))
    for peer in (*EAGER, *COMPILED, *PROJECTS):
        what = f"GPU time, ResNet-50, {peer} / ours"
        found.append(_over(folders, what, "> 1", "ResNet-50", peer, ONE))
    for unit, must in zip(COUNTS, ("1", "0", "0"), strict=True):
        found.append(_counted(folders, f"{unit}, steady state", must, unit, "g"))
    what = f"host time, 161 tensors, launch stubbed / {FOREACH}"
    found.append(_over(folders, what, "≤ 0.25", "host, ResNet-50", STUBBED, FOREACH, kind="host"))
    return [*found, _growth(folders), *_on_a_cpu(folders), *_predictions()]


def readme_table(results: Path = environment.RESULTS) -> str:
    found = lines(path.parent for path in results.glob("*/raw.csv"))
    rows = [x._replace(measured=f"{x.measured}, **missed**") if x.missed else x for x in found]
    return table(["measure, fp32", "must reach", "measured", "bench/results/"], rows)


def section(text: str) -> str:
    """The README's text with its table regenerated."""
    inner = f"{BEGIN}\n\n{readme_table()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: inner, text, flags=re.DOTALL)


def write() -> None:
    README.write_text(section(README.read_text()))
    print(f"written: {README}")
