"""The plots of a results folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from bench.cases import DTYPES, SWEEP_CASE
from bench.models import MODELS
from bench.peers import CACHED, FLOOR, ONE, PORTABLE, TWO
from bench.raw import COPY, Raw, case_of, copy_us, rows_of, runs
from bench.report import FIRST_SCREEN, VARIANTS, against_sgd, device

FP32 = next(iter(DTYPES))
# Ours in one hue, the floor dark, the peers in others; the same for every folder.
COLOURS = {
    ONE: "#0b6e99", PORTABLE: "#0b6e99", CACHED: "#3d9cc2", TWO: "#7cc4e0", FLOOR: "#333333",
    "SGD(foreach=True)": "#8a8a8a", "foreach LARS": "#d98c21", "eager LARS": "#b3441e",
    "compiled foreach LARS": "#e8c468", "compiled eager LARS": "#c9a227", "timm Lars": "#6a4c93",
    "pytorch_optimizer LARS": "#9a6fb0", "pytorch_optimizer LARS, foreach": "#c3a5d1",
    "torch_optimizer LARS": "#4f7f52", "optax lars, jit": "#3a8f5c",
    "apex LARC": "#c2185b", "apex FusedLARS": "#e57ba8",
}  # fmt: skip
Run = dict[str, Raw]
_ON_A_GPU = (*FIRST_SCREEN, "AlexNet", "BERT-large")
_CUT = 12.0  # times SGD, where a bar ends and only its number goes on


def _timed(folder: Path) -> list[Run]:
    """One run of each case: the first, plus variants added by later runs of the same case."""
    found: dict[tuple[str, str, str], Run] = {}
    for (case, n_params, dtype, _), kinds in runs(rows_of(folder)).items():
        timed = kinds.get("gpu") or kinds["host"]
        if case_of(next(iter(timed.values()))) is None:
            continue
        run = found.setdefault((case, n_params, dtype), {})
        for name, row in timed.items():
            run.setdefault(name, row)
    return list(found.values())


def _variants(found: list[Run]) -> list[str]:
    return [name for name in COLOURS if any(name in run for run in found)]


def _label(run: Run) -> str:
    first = next(iter(run.values()))
    return first["case"] if first["case"] in MODELS else f"{int(first['n_params']):,}"


def _bars(
    found: list[Run], value: Callable[[Run, str], float | None], label: str, path: Path, log: bool
) -> None:
    """Groups of bars: one group per case, one bar per variant, each with its value."""
    names = _variants(found)
    figure, axes = plt.subplots(figsize=(min(18.0, max(8.0, 0.22 * len(found) * len(names))), 4.8))
    width = 0.84 / len(names)
    for j, name in enumerate(names):
        places, heights = [], []
        for i, run in enumerate(found):
            height = value(run, name) if name in run else None
            if height is not None:
                places.append(i + (j - (len(names) - 1) / 2) * width)
                heights.append(height)
        bars = axes.bar(places, heights, width, label=name, color=COLOURS[name])
        texts = [f"{h:.2f}" if h < 10 else f"{h:,.0f}" for h in heights]
        axes.bar_label(bars, texts, fontsize=6, rotation=90, padding=2)
    axes.set_xticks(range(len(found)), [_label(run) for run in found])
    if not any(_label(run) in MODELS for run in found):
        axes.set_xlabel("parameters")
    if log:
        axes.set_yscale("log")
    axes.margins(y=0.18)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _share(run: Run, name: str) -> float | None:
    case = case_of(run[name])
    least = copy_us(run, case.least_bytes) if case else None
    return None if least is None else least / float(run[name]["p50"])


def _sweep(found: list[Run], path: Path, kind: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.8))
    points = sorted(found, key=lambda run: int(next(iter(run.values()))["n_params"]))
    for name in _variants(points):
        runs_with = [run for run in points if name in run]
        x = [int(run[name]["n_params"]) for run in runs_with]
        y = [[float(run[name][k]) for run in runs_with] for k in ("p25", "p50", "p75")]
        axes.plot(x, y[1], marker="o", markersize=4, color=COLOURS[name], label=name)
        axes.fill_between(x, y[0], y[2], color=COLOURS[name], alpha=0.15, linewidth=0)
    floor = [(run, case_of(next(iter(run.values())))) for run in points if COPY in run]
    x = [case.n_params for _, case in floor if case]
    y0 = [copy_us(run, case.least_bytes) for run, case in floor if case]
    label = "floor: each byte once, over copy bandwidth"
    axes.plot(x, y0, color="#333333", linestyle=":", label=label)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=f"{kind} time of a step, µs")
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _against_sgd(folder: Path, path: Path) -> list[Path]:
    """Horizontal bars, a panel a model: how many times as long as SGD(fused=True) each takes."""
    where = device(rows_of(folder))
    every = against_sgd(rows_of(folder))
    if where == "GPU":  # what the README's table shows, and the largest
        every = {title: column for title, column in every.items() if title in _ON_A_GPU}
    found = {title: column for title, column in every.items() if title in MODELS} or every
    if not found:
        return []
    tall = max(map(len, found.values()))
    figure, panels = plt.subplots(
        1, len(found), figsize=(2.2 + 2.1 * len(found), 0.9 + 0.3 * tall), sharey=True,
        squeeze=False,
    )  # fmt: skip
    names = [n for n in VARIANTS if any(n in column for column in found.values())][::-1]
    longest = _CUT if where == "GPU" else math.inf
    for axes, (title, column) in zip(panels[0], found.items(), strict=True):
        lengths = [column.get(n, 0.0) for n in names]
        bars = axes.barh(
            names, [min(x, longest) for x in lengths],
            color=[COLOURS.get(n, "#8a8a8a") for n in names],
        )  # fmt: skip
        digits = 2 if where == "GPU" else 1
        texts = [
            " not run" if not x else f" » {x:.0f}" if x > longest else f" {x:.{digits}f}"
            for x in lengths
        ]
        axes.bar_label(bars, texts, fontsize=9)
        axes.axvline(1.0, color=COLOURS[FLOOR], linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.22)
        axes.tick_params(labelsize=9)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    cut = "" if longest == math.inf else f"; »: cut off at {longest:.0f}"
    figure.suptitle(
        f"Time of a step on a {where}, {FLOOR} = 1 (shorter is faster){cut}", fontsize=11
    )
    _save(figure, path)
    return [path]


def write(folder: Path) -> list[Path]:
    """steps, sweep, bandwidth and cpu.png or gpu.png, as far as the folder has figures for them."""
    found = [run for run in _timed(folder) if next(iter(run.values()))["dtype"] == FP32]
    if not found:
        return []
    kind = {"gpu": "GPU"}.get(next(iter(found[0].values()))["kind"], "host")
    models = [run for run in found if _label(run) in MODELS]
    sweep = [run for run in found if next(iter(run.values()))["case"] == SWEEP_CASE]
    shown = models or sweep
    paths = [folder / "steps.png", folder / "bandwidth.png"]
    _bars(
        shown, lambda run, name: float(run[name]["p50"]), f"{kind} time of a step, µs, fp32",
        paths[0], log=True,
    )  # fmt: skip
    _bars(shown, _share, "achieved share of copy bandwidth, fp32", paths[1], log=False)
    if sweep:
        paths.append(folder / "sweep.png")
        _sweep(sweep, paths[-1], kind)
    return paths + _against_sgd(folder, folder / f"{device(rows_of(folder)).lower()}.png")
