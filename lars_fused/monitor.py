"""What LARS does to each layer, over training: logged, drawn, and watched.

    from lars_fused.monitor import Monitor

    monitor = Monitor(optimizer, SummaryWriter(), every=100)
    ...                       # training, as it is
    monitor.close()
    monitor.picture("layers.png")

Every `every` steps the norms and ratios that the step left on the device are set aside there, by
one small copy on the device. They come to the host together, `keep` records in one copy: only then
does anything wait.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from lars_fused import LARS, LayerStats

__all__ = ["Monitor"]

Layer: TypeAlias = str | int
Receiver: TypeAlias = Callable[[int, Mapping[Layer, LayerStats]], object]
_SHOWN = ("weight_norm", "gradient_norm", "trust_ratio", "effective_lr")
_TITLES = ("N(w)", "N(g)", "trust ratio q", "effective lr γq")
_NAMED_IN_LEGEND = 12


class ScalarWriter(Protocol):
    """What `torch.utils.tensorboard.SummaryWriter` can do."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Write one number."""


class _Kept(NamedTuple):
    """A record in device memory."""

    step: int
    layers: list[Layer]
    adapted: list[bool]
    clips: list[bool]
    gradient_norm_known: list[bool]
    """Otherwise its NaN says nothing."""
    rows: Tensor
    """Of each layer: what `LayerStats` has, and whether the device skipped the step."""


class Monitor:
    """Watches an optimizer through its step hook; the training loop stays as it is.

    Args:
        optimizer: a `LARS`, or a wrapper that holds one as `.optimizer` (accelerate, Lightning).
        writer: a TensorBoard `SummaryWriter` (tags `lars/trust_ratio/NAME` and so on), or a
            function of (step, {layer: `LayerStats`}); None only keeps the history.
        every: steps between two records, ≥ 1. Calls of `step()` are counted; one that did nothing,
            because `GradScaler` found an overflow or there was no gradient, has no record.
        keep: records that are kept on the device until they are copied and written together, ≥ 1.
        warn: whether to warn, once for each of these: a NaN or infinite norm or ratio; an adapted
            layer whose weight or gradient has had a zero norm in every record for `patience` steps,
            so that it has not been adapted; a layer whose ratio `trust_clip` has clipped as long.
        patience: steps, ≥ 0.
        tag: begins the tags of a `SummaryWriter`.
        step: number of steps taken before, for a resumed run.

    Attributes:
        history: the records that were written: (step, {layer: `LayerStats`}). It grows by about
            300 bytes per layer and record; `history.clear()` frees them.

    Raises:
        TypeError, ValueError: for an argument that is not allowed.

    A CUDA graph's replay calls no hook: call `record()` after it. Of a layer that is split over
    ranks, a rank without a part of it has no record.
    """

    def __init__(
        self,
        optimizer: Any,
        writer: ScalarWriter | Receiver | None = None,
        *,
        every: int = 100,
        keep: int = 10,
        warn: bool = True,
        patience: int = 2000,
        tag: str = "lars",
        step: int = 0,
    ):
        self._optimizer = _unwrapped(optimizer)
        for name, value, least in (
            ("every", every, 1), ("keep", keep, 1), ("patience", patience, 0), ("step", step, 0),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Monitor: {name}={value!r} is not allowed; must be an int >= {least}"
                )
        if writer is not None and not hasattr(writer, "add_scalar") and not callable(writer):
            raise TypeError(
                "Monitor: writer must be a SummaryWriter or a function of "
                f"(step, {{layer: LayerStats}}), not {type(writer).__name__}"
            )
        self.history: list[tuple[int, dict[Layer, LayerStats]]] = []
        self._writer, self._every, self._keep, self._tag = writer, every, keep, tag
        self._step = step
        self._kept: list[_Kept] = []
        self._taken = self._optimizer._parts_taken
        self._watch = _Watch(patience) if warn else None
        self._handle = self._optimizer.register_step_post_hook(self._after_step)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is kept, and watch no longer."""
        self._handle.remove()
        self.flush()

    def _after_step(self, *_: object) -> None:
        self._step += 1
        before, self._taken = self._taken, self._optimizer._parts_taken
        if self._step % self._every == 0 and self._taken != before:
            # GradScaler's, if there is one. Where it is on a device, the host does not know it.
            self._record(getattr(self._optimizer, "found_inf", None))

    def record(self) -> None:
        """Set the last step's numbers aside, on the device."""
        self._record(None)

    @torch.no_grad()
    def _record(self, found_inf: Tensor | None) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        for layers, adapted, clips, known, rows in self._optimizer._rows_on_device():
            flag = rows.new_zeros(1) if found_inf is None else found_inf.to(rows)
            flagged = torch.cat([rows, flag.reshape(1, 1).expand(len(rows), 1)], 1)
            self._kept.append(_Kept(self._step, layers, adapted, clips, known, flagged))
        if len({kept.step for kept in self._kept}) >= self._keep:
            self.flush()

    def flush(self) -> None:
        """Copy all records to the host, in one copy for each device, and write them."""
        kept, self._kept = self._kept, []
        found: dict[int, dict[Layer, LayerStats]] = {}
        for device in {k.rows.device for k in kept}:
            mine = [k for k in kept if k.rows.device == device]
            numbers = iter(torch.cat([k.rows for k in mine]).cpu().tolist())
            for k in mine:
                stats = {}
                for layer in k.layers:
                    *row, skipped = next(numbers)
                    if not skipped:
                        stats[layer] = LayerStats(*row)
                if not stats:
                    continue
                found.setdefault(k.step, {}).update(stats)
                if self._watch is not None:
                    self._watch.look(k, stats)
        for step in sorted(found):
            self.history.append((step, found[step]))
            self._write(step, found[step])
        if self._watch is not None:
            self._watch.speak()

    def _write(self, step: int, stats: dict[Layer, LayerStats]) -> None:
        writer: Any = self._writer
        if hasattr(writer, "add_scalar"):
            for layer, row in stats.items():
                for name in _SHOWN:
                    writer.add_scalar(f"{self._tag}/{name}/{layer}", getattr(row, name), step)
        elif writer is not None:
            writer(step, stats)

    def picture(self, path: Any = None, layers: Sequence[Layer] | None = None) -> Any:
        """Draw the history: norms, ratios and rates of each layer over the steps.

        Args:
            path: a file to save it to, in the format of its ending; None saves nothing.
            layers: which ones, in this order; None draws all. Colours go from the first to the
                last; up to 12 are named.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed; the message says how to install it.
            ValueError: there is no record, or none of a layer.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Monitor: picture() needs matplotlib, which is not installed; "
                "`pip install matplotlib`"
            ) from error
        self.flush()
        seen = list(dict.fromkeys(layer for _, stats in self.history for layer in stats))
        chosen = seen if layers is None else list(layers)
        for layer in chosen:
            if layer not in seen:
                raise ValueError(f"Monitor: no record of layer {layer!r}; there are {seen[:5]} ...")
        if not chosen:
            raise ValueError("Monitor: there is no record to draw yet")
        figure = Figure(figsize=(11, 7), layout="constrained")
        colours = colormaps["viridis"]
        for axes, name, title in zip(figure.subplots(2, 2).flat, _SHOWN, _TITLES, strict=True):
            for i, layer in enumerate(chosen):
                points = [(t, getattr(s[layer], name)) for t, s in self.history if layer in s]
                colour = colours(i / max(1, len(chosen) - 1))
                axes.plot(*zip(*points, strict=True), color=colour, lw=1, label=str(layer))
            axes.set(title=title, xlabel="step")
            axes.set_yscale("symlog", linthresh=1e-6)
        if len(chosen) <= _NAMED_IN_LEGEND:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _unwrapped(optimizer: Any) -> LARS:
    found = optimizer
    while not isinstance(found, LARS) and hasattr(found, "optimizer"):
        found = found.optimizer
    if not isinstance(found, LARS):
        raise TypeError(f"Monitor: optimizer must be a LARS, not {type(optimizer).__name__}")
    return found


class _Watch:
    """Looks for layers whose numbers say that something is off; says so once a kind."""

    _TEXTS = {  # noqa: RUF012
        "infinite": "a norm or trust ratio is NaN or infinite",
        "zero weight": "the weights have had a zero norm all along, so that they are not adapted",
        "zero gradient": "the gradients have had a zero norm all along, so that nothing is learnt",
        "clipped": "trust_clip has clipped the ratio all along, so that they move as under SGD; "
        "a lower trust_coefficient adapts them",
    }

    def __init__(self, patience: int):
        self._patience = patience
        self._since: dict[tuple[str, Layer], int] = {}
        self._found: dict[str, list[Layer]] = {}
        self._said: set[str] = set()

    def look(self, kept: _Kept, stats: Mapping[Layer, LayerStats]) -> None:
        """Take one record in."""
        columns = kept.layers, kept.adapted, kept.clips, kept.gradient_norm_known
        for layer, adapted, clips, known in zip(*columns, strict=True):
            s = stats[layer]
            shown = [s.weight_norm, s.trust_ratio, s.effective_lr]
            shown += [s.gradient_norm] if known else []
            now = {
                "infinite": not all(map(math.isfinite, shown)),
                "zero weight": adapted and s.weight_norm == 0,
                "zero gradient": adapted and s.gradient_norm == 0,
                "clipped": adapted and clips and s.trust_ratio == 1 and s.weight_norm > 0
                and s.gradient_norm != 0,
            }  # fmt: skip
            for kind, holds in now.items():
                if not holds:
                    self._since.pop((kind, layer), None)
                    continue
                since = self._since.setdefault((kind, layer), kept.step)
                if kind == "infinite" or kept.step - since >= self._patience:
                    self._found.setdefault(kind, []).append(layer)

    def speak(self) -> None:
        """Warn of what was found and has not been said."""
        found, self._found = self._found, {}
        for kind, layers in found.items():
            if kind in self._said:
                continue
            self._said.add(kind)
            some = list(dict.fromkeys(layers))
            more = f" and {len(some) - 3} more" if len(some) > 3 else ""
            warnings.warn(
                f"LARS: layers {', '.join(map(repr, some[:3]))}{more}: {self._TEXTS[kind]} "
                f"(Monitor(..., warn=False) is silent)",
                RuntimeWarning,
                stacklevel=4,
            )
