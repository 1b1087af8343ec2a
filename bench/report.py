"""table.md and the plots of a results folder, from its raw files."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import environment
from bench.cases import DTYPES, model_case
from bench.models import MODELS
from bench.peers import (
    CACHED,
    COMPILED,
    CPU_LADDER,
    EAGER,
    FLOOR,
    LADDER,
    ONE,
    OURS,
    PORTABLE,
    PROJECTS,
)
from bench.profiler import COUNTS, DRAM
from bench.raw import COPY, Raw, case_of, copy_us, rows_of, runs

# In the order of tables and pictures: ours, the floor, LARS as written by hand, other projects.
VARIANTS = tuple(dict.fromkeys([
    PORTABLE, ONE, CACHED, *LADDER, *CPU_LADDER, *EAGER, *COMPILED, *PROJECTS,
]))  # fmt: skip
FIRST_SCREEN = ("ResNet-50", "ViT-B/16")
LAUNCHES = COUNTS[0]


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header)]
    lines += [["---"] * len(lines[0])]
    lines += [[str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _quartiles(row: Raw) -> str:
    low, middle, high = (float(row[k]) for k in ("p25", "p50", "p75"))
    digits = 1 if middle < 1000 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ladder(timed: dict[str, Raw], host: dict[str, Raw], absent: dict[str, str]) -> str:
    """One run of one case: the floors first, then every variant by its time."""
    first = next(iter(timed.values()))
    case = case_of(first)
    assert case is not None
    base = timed.get(FLOOR)
    lines: list[list[object]] = []

    def ratio(us: float, name: str) -> str:
        return f"{us / float(timed[name]['p50']):.2f}" if name in timed else "–"

    least = copy_us(timed, case.least_bytes)

    def share(us: float) -> str:
        return f"{least / us:.2f}" if least is not None else "–"

    mine = next((name for name in OURS if name in timed), "")
    for label, moved in (("each byte once", case.least_bytes), ("two passes", case.two_pass_bytes)):
        us = copy_us(timed, moved)
        if us is not None:
            text = f"floor, {label}: {moved / case.n_params:.2f} B/param over copy bandwidth"
            lines.append([text, f"{us:.1f}", ratio(us, FLOOR), ratio(us, mine), share(us), "–"])
    order = sorted((n for n in timed if n != COPY), key=lambda n: float(timed[n]["p50"]))
    for name in order:
        us = float(timed[name]["p50"])
        call = _quartiles(host[name]) if name in host else "–"
        shown = ratio(us, FLOOR) if base else "–"
        lines.append([name, _quartiles(timed[name]), shown, ratio(us, mine), share(us), call])
    head = f"{first['kind']} time, µs"
    text = table(
        [
            "step", head, f"× {FLOOR}", f"× {mine or 'ours'}", "floor / time",
            "host time of the call, µs",
        ],
        lines,
    )  # fmt: skip
    if COPY in timed:
        gbs = float(timed[COPY]["bytes"]) / float(timed[COPY]["p50"]) / 1e3
        text += f"\nCopy bandwidth of this run: {gbs:.0f} GB/s, bytes read plus written.\n"
    for name, reason in absent.items():
        text += f"\n{name}: absent ({reason})\n"
    return text


def _title(key: tuple[str, ...], first: Raw) -> str:
    case, n_params, dtype, _ = key
    return f"{case}, {dtype}, {int(first['n_tensors']):,} tensors, {int(n_params):,} parameters"


def _absent(facts: dict[str, Any], key: tuple[str, ...], timed: dict[str, Raw]) -> dict[str, str]:
    start = f"{key[0]}, {key[2]}, "  # and of no other dtype that begins alike
    others = tuple(f"{key[0]}, {dtype}, " for dtype in DTYPES if dtype.startswith(f"{key[2]}, "))
    names = {
        k.removeprefix(start): v
        for k, v in facts.get("absent", {}).items()
        if k.startswith(start) and not k.startswith(others)
    }
    return {k: v for k, v in names.items() if k not in timed}


def device(rows: list[Raw]) -> str:
    """Where the steps of a folder were timed, as a reader says it: "GPU" or "CPU"."""
    timed = [row for row in rows if row["variant"] == FLOOR and row["unit"] == "us"]
    return "GPU" if any(row["kind"] == "gpu" for row in timed) else "CPU"


def against_sgd(rows: list[Raw]) -> dict[str, dict[str, float]]:
    """Of each fp32 case: every variant's time over SGD(fused=True)'s in the same run."""
    kind, mine = ("gpu", ONE) if device(rows) == "GPU" else ("host", PORTABLE)
    found: dict[str, dict[str, float]] = {}
    for (name, _, dtype, _), kinds in runs(rows).items():
        timed = kinds.get(kind, {})
        if dtype == "fp32" and {FLOOR, mine} <= timed.keys():
            case = case_of(timed[FLOOR])
            if case is not None:
                title = name if name in MODELS else f"{len(case.shapes)} tensors, {case.n_params:,}"
                base, column = float(timed[FLOOR]["p50"]), found.setdefault(title, {})
                for n, r in timed.items():
                    if n != COPY:
                        column.setdefault(n, float(r["p50"]) / base)
    return found


def summary(rows: list[Raw]) -> str:
    """One line a variant, ours first; one column a case; SGD(fused=True) is 1."""
    found = against_sgd(rows)
    if not found:
        return ""
    lines = [
        [n, *(f"{column[n]:.2f}" if n in column else "–" for column in found.values())]
        for n in VARIANTS
        if any(n in column for column in found.values())
    ]
    return (
        f"## A step on this {device(rows)}, in units of {FLOOR}, which computes no norms\n\n"
        + table(["", *found], lines) + "\n"
    )  # fmt: skip


def first_screen(rows: list[Raw]) -> str:
    """The README's table of a GPU: ResNet-50 and ViT-B/16 in fp32, bytes and launches."""
    found = against_sgd(rows)
    timed = {
        (row["case"], row["variant"]): float(row["p50"])
        for row in reversed(rows)  # the first run counts, as in `against_sgd`
        if (row["kind"], row["unit"], row["dtype"]) == ("gpu", "us", "fp32")
    }
    counted = {
        (row["case"], row["variant"], row["unit"]): float(row["p50"])
        for row in rows
        if row["unit"] != "us"
    }
    least = {name: model_case(name).least_bytes for name in FIRST_SCREEN}
    copied = next(int(r["bytes"]) for r in rows if r["variant"] == COPY and r["kind"] == "gpu")

    def cell(name: str, variant: str) -> list[str]:
        if variant not in found[name]:
            return ["–", "–"]
        us = timed[name, variant]
        share = least[name] * timed[name, COPY] / copied / us
        return [f"{us:,.0f} ({found[name][variant]:.2f})", f"{share:.2f}"]

    def count(variant: str, unit: str, form: str) -> str:
        value = counted.get((FIRST_SCREEN[0], variant, unit))
        return "–" if value is None else f"{value:{form}}"

    lines = [
        [
            name, *(text for case in FIRST_SCREEN for text in cell(case, name)),
            count(name, DRAM, ".1f"), count(name, LAUNCHES, "g"),
        ]
        for name in VARIANTS
        if any(name in found[case] for case in FIRST_SCREEN)
    ]  # fmt: skip
    head = [text for case in FIRST_SCREEN for text in (f"{case}, µs (× SGD)", "of copy bandwidth")]
    return table(["fp32 step", *head, "DRAM B/param", "launches"], lines)


def markdown(folder: Path) -> str:
    """The text of table.md."""
    rows, facts = rows_of(folder), environment.read(folder)
    text = f"# {folder.name}\n\n"
    why = environment.reportable(folder)
    if why:
        text += f"**Not to be quoted: {why}.**\n\n"
    named = ("utc", "gpu", "driver", "processor", "cores", "python", "cuda", "command")
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("packages", {}).items())
    text += "".join(f"- {k}: {facts[k]}\n" for k in named if facts.get(k))
    text += f"- packages: {versions}\n- tests: {facts.get('tests', 'not run with it')}\n\n"
    text += (
        "Medians (quartiles) of interleaved samples, caches cold; ratios are within one run.\n\n"
    )
    if facts.get("gate"):
        reasons = "".join(f"- {k}: {v}\n" for k, v in facts["gate"].items())
        return text + f"The correctness gate failed, so nothing is reported:\n\n{reasons}"
    text += summary(rows)
    for key, kinds in runs(rows).items():
        timed = kinds.get("gpu") or kinds["host"]
        first = next(iter(timed.values()))
        text += f"## {_title(key, first)}\n\n"
        if case_of(first) is None:
            lines = [[n, _quartiles(r), _ratio(r, timed)] for n, r in timed.items()]
            text += table(["variant", f"{first['kind']} time, µs", "× first"], lines) + "\n"
        else:
            host = kinds.get("host", {}) if "gpu" in kinds else {}
            text += ladder(timed, host, _absent(facts, key, timed)) + "\n"
    counted = [r for r in rows if r["unit"] != "us"]
    if counted:
        text += "## Counted\n\n"
        lines = [[r["case"], r["variant"], f"{float(r['p50']):.2f}", r["unit"]] for r in counted]
        text += table(["case", "variant", "count", "unit"], lines) + "\n"
    bound = facts.get("host_bound", {})
    for case, names in bound.items():
        text += f"{case}: {', '.join(names)} wait for the GPU; their GPU time holds the host's.\n\n"
    for piece, reason in facts.get("lost", {}).items():
        text += f"{piece}: not measured ({reason}).\n\n"
    for tool, verdict in facts.get("sanitizer", {}).items():
        text += f"compute-sanitizer, {tool}: {verdict}.\n\n"
    if (folder / "traffic.csv").exists():
        text += "traffic.csv: predictions of the cache simulation, not measured.\n"
    return text


def _ratio(row: Raw, timed: dict[str, Raw]) -> str:
    return f"{float(row['p50']) / float(next(iter(timed.values()))['p50']):.2f}"


def write(folder: Path) -> int:
    """table.md and plots; the exit status says whether the gate held."""
    (folder / "table.md").write_text(markdown(folder))
    print(f"written: {folder / 'table.md'}")
    try:
        from bench import plots
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        for path in plots.write(folder):
            print(f"written: {path}")
    gate = environment.read(folder).get("gate", {})
    for case, text in gate.items():
        print(f"GATE FAILED: {case}: {text}", file=sys.stderr)
    return int(bool(gate))
