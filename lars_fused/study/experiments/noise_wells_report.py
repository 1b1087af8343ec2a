"""Tables and the picture of SGD on the made loss: equation 26."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lars_fused.study import files, pictures
from lars_fused.study.experiments.noise import Plan, WellCell
from lars_fused.study.experiments.noise_parts import well
from lars_fused.study.experiments.wells import same_share
from lars_fused.study.tables import table

SMALL_STEP = 0.25
"""γ times the sharp minimum's curvature up to which steps count as small; SGD leaves it at 2."""


@dataclass(frozen=True)
class Share:
    """How many runs of a cell ended on the flat side."""

    cell: WellCell
    lr: float
    steps: int
    flat: int
    chains: int

    @property
    def share(self) -> float:
        """Of the runs."""
        return self.flat / self.chains

    @property
    def error(self) -> float:
        """Binomial standard error."""
        return math.sqrt(self.share * (1 - self.share) / self.chains)


def found(plan: Plan, out: Path) -> list[Share]:
    """The cells that are finished."""
    shares = []
    for cell in plan.well_cells():
        held = well(plan, cell, out, make=False)
        if held is not None:
            shares.append(Share(cell, held["lr"], held["steps"], held["flat"], plan.chains))
    return shares


def groups(shares: list[Share]) -> dict[tuple[str, float], list[Share]]:
    """Cells of one γ/B and one kind of tilt."""
    grouped: dict[tuple[str, float], list[Share]] = {}
    for share in shares:
        grouped.setdefault((share.cell.tilt, share.cell.temperature), []).append(share)
    return grouped


def sentence(plan: Plan, tilt: str, temperature: float, shares: list[Share]) -> str:
    """Whether equal γ/B gave equal shares."""
    small = [s for s in shares if s.lr * plan.wells.sharp <= SMALL_STEP]
    wells = plan.wells
    parts = [
        f"{tilt}, lr/B = {2 * temperature / wells.sigma**2:.3g}: equation 25 gives "
        f"{wells.settled(temperature):.3f}, equation 26 with its factor of 2 "
        f"{wells.laplace(temperature):.3f}, as printed {wells.laplace(temperature, 1.0):.3f}."
    ]
    if len(small) > 1:
        p = same_share([s.flat for s in small], plan.chains)
        batches = f"B = {small[0].cell.batch} to {small[-1].cell.batch}"
        parts.append(f"{batches} (lr x curvature <= {SMALL_STEP}): equal shares have p = {p:.2g}.")
    return " ".join(parts)


def report(plan: Plan, out: Path) -> tuple[str, list[str], list[dict[str, Any]]]:
    """The text, the names of the pictures, and rows for the summary."""
    shares = found(plan, out)
    if not shares:
        return "No run on the made loss is finished.", [], []
    wells = plan.wells
    rows = [
        {
            "tilt": s.cell.tilt,
            "temperature": s.cell.temperature,
            "batch": s.cell.batch,
            "lr": s.lr,
            "lr_times_curvature": s.lr * wells.sharp,
            "steps": s.steps,
            "flat_share": s.share,
            "error": s.error,
            "equation_25": wells.settled(s.cell.temperature),
        }
        for s in shares
    ]
    files.write_csv(out / "wells.csv", list(rows[0]), [list(row.values()) for row in rows])
    lines = [
        [s.cell.tilt, f"{s.lr / s.cell.batch:.3g}", str(s.cell.batch), f"{s.lr:.4g}",
         f"{s.lr * wells.sharp:.2f}", f"{s.steps:,}", f"{s.share:.3f} ± {s.error:.3f}"]
        for s in shares
    ]  # fmt: skip
    header = ["noise", "lr/B", "B", "lr", "lr x curvature", "steps", "share in the flat minimum"]
    parts = [f"Where {plan.chains:,} runs of SGD end on the made loss (equation 26):"]
    parts.append(table(header, lines))
    parts += [sentence(plan, *key, group) for key, group in groups(shares).items()]
    return "\n".join(parts), [_draw(plan, shares, out), "wells.csv"], rows


def _draw(plan: Plan, shares: list[Share], out: Path) -> str:
    wells = plan.wells
    heading = f"SGD on a made loss with a flat and a sharp minimum, {plan.chains:,} runs each"
    with pictures.figure(out / "wells.png", heading, 2, width=5.4) as (left, right):
        w = torch.linspace(-2.2, 1.4, 400, dtype=torch.float64)
        left.plot(w, wells.loss(w), color="0.2")
        left.axvline(wells.barrier, color="0.7", linestyle=":")
        left.set(xlabel="w", ylabel="loss", ylim=(-wells.depth - 0.1, 1.6))
        left.set_title(f"Curvature {wells.flat:g} on the left, {wells.sharp:g} on the right")
        for number, ((tilt, temperature), group) in enumerate(groups(shares).items()):
            colour = pictures.COLOURS[number % len(pictures.COLOURS)]
            ratio = 2 * temperature / wells.sigma**2
            right.errorbar(
                [s.cell.batch for s in group], [s.share for s in group], [s.error for s in group],
                fmt="s--" if tilt == "signs" else "o-", color=colour, markersize=4.5, capsize=2,
                label=f"lr/B = {ratio:.2g}, {'±σ' if tilt == 'signs' else 'Gaussian'} noise",
            )  # fmt: skip
            if tilt == "gaussian":
                right.axhline(wells.settled(temperature), color=colour, linewidth=0.8, alpha=0.7)
        pictures.batch_axis(right, plan.well_batches)
        right.set(ylim=(0, 1), ylabel="share of runs in the flat minimum")
        right.set_title("At equal lr/B (thin lines: equation 25)")
        right.legend(frameon=False, fontsize=8)
    return "wells.png"
