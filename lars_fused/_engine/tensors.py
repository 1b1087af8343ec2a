"""The tensors of one step as pure data: the lists, and their fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPE = attrgetter("dtype")


class StepTensors(NamedTuple):
    """The tensors of one step, by index. Of a sharded tensor: this rank's part."""

    weights: list[Tensor]
    """Parameters, or their fp32 master weights."""
    grads: Sequence[Tensor]
    buffers: list[Tensor | None]
    """Momentum buffers; None where the group has no momentum."""
    copies: list[Tensor | None]
    """The low-precision parameters that have master weights; None elsewhere."""
    masters: bool
    """Whether there is any copy: most steps have none and can skip the search."""

    def written(self) -> list[Tensor]:
        """The parameters themselves."""
        return [w if c is None else c for w, c in zip(self.weights, self.copies, strict=True)]

    def select(self, index: Sequence[int]) -> StepTensors:
        """The subset with these indices."""
        weights, grads, buffers, copies, masters = self
        return StepTensors(
            [weights[i] for i in index], [grads[i] for i in index],
            [buffers[i] for i in index], [copies[i] for i in index], masters,
        )  # fmt: skip


class Addresses(NamedTuple):
    """The addresses of a step's tensors; 0 for none. No copies at all: an empty list."""

    weights: list[int]
    grads: list[int]
    buffers: list[int]
    copies: list[int]

    def select(self, index: Sequence[int]) -> Addresses:
        """The subset for these tensors."""
        if len(index) == len(self.weights):
            return self
        return Addresses(*([column[i] for i in index] if column else [] for column in self))


class Fingerprint(NamedTuple):
    """What a prepared step relies on; the host reads it at every step, in microseconds.

    Reading it takes most of the host's time, a twentieth of a microsecond per entry. So strides are
    read only if "contiguous" does not determine them. A shape cannot change without the address:
    PyTorch holds `p.grad` to the shape of `p`.
    """

    addresses: Addresses
    contiguous: list[bool]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]


class Scaling(NamedTuple):
    """What `torch.amp.GradScaler` passes to a step."""

    grad_scale: Tensor | None = None
    """Divisor of the gradients: one element, any floating-point dtype."""
    found_inf: Tensor | None = None
    """One element; a non-zero value skips the step."""

    def on(self, device: torch.device) -> Scaling:
        """The same, as float32 on `device`."""
        if self.grad_scale is None and self.found_inf is None:
            return self
        return Scaling(
            None if self.grad_scale is None else self.grad_scale.to(device, torch.float32),
            None if self.found_inf is None else self.found_inf.to(device, torch.float32),
        )

    def skips_for_certain(self) -> bool:
        """Whether the step is skipped, as far as the host knows without synchronising."""
        flag = self.found_inf
        return flag is not None and on_host(flag) and bool(flag != 0)


def on_host(flag: Tensor) -> bool:
    """Whether the host can read it without synchronising."""
    return flag.device.type == "cpu"


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    try:
        # A None among them raises TypeError, which is faster than testing each one.
        return list(map(torch.Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:
        return [0 if t is None else t.data_ptr() for t in tensors]


def fingerprint(tensors: StepTensors) -> Fingerprint | None:
    """The fingerprint of a step's tensors; None if a gradient is missing or not strided."""
    weights, grads, buffers, copies, masters = tensors
    try:
        contiguous = list(map(torch.Tensor.is_contiguous, grads))
        strides = (
            []
            if all(contiguous)
            else [g.stride() for g, dense in zip(grads, contiguous, strict=True) if not dense]
        )
        dtypes = list(map(_DTYPE, grads))
        addresses = Addresses(
            _addresses(weights), _addresses(grads), _addresses(buffers),
            _addresses(copies) if masters else [],
        )  # fmt: skip
    except (RuntimeError, TypeError):  # a sparse gradient has no strides; None has no attributes
        return None
    return Fingerprint(addresses, contiguous, strides, dtypes)


Place = tuple[type[Tensor], torch.device, torch.dtype | None, torch.Size, tuple[int, ...], bool]


def places(tensors: StepTensors) -> list[Place | None]:
    """What else must not change; read only after an address has changed.

    Class (a wrapper of other tensors has no memory), device, dtype, shape, strides, and whether the
    memory was freed. Gradients' dtypes and strides are in the fingerprint.
    """
    found: list[Place | None] = []
    for column in (tensors.weights, tensors.buffers, tensors.copies):
        for t in column:
            if t is None:
                found.append(None)
            else:
                freed = t.untyped_storage().nbytes() == 0
                found.append((type(t), t.device, t.dtype, t.shape, t.stride(), freed))
    for g in tensors.grads:
        found.append((type(g), g.device, None, g.shape, (), g.untyped_storage().nbytes() == 0))
    return found


class Seen(NamedTuple):
    """The tensors of one call of `step()` and their fingerprint."""

    tensors: StepTensors
    fingerprint: Fingerprint
    unmoved: bool
    """Whether each is where it was known to be."""


def see(tensors: StepTensors, known: Addresses) -> Seen | None:
    """Read the fingerprint of a step's tensors; None if a gradient is missing or not strided.

    `known`: where they were when they were last found to fit.
    """
    read = fingerprint(tensors)
    if read is None:
        return None
    unmoved = read.addresses == known
    if unmoved:  # comparing the same object is then immediate
        read = Fingerprint(known, *read[1:])
    return Seen(tensors, read, unmoved)


class Basis(NamedTuple):
    """What of its tensors a step was prepared for."""

    fingerprint: Fingerprint
    places: list[Place | None]

    def fits(self, seen: Seen) -> bool:
        """Whether tensors are like those: at new addresses, or at those where they were known."""
        if seen.fingerprint[1:] != self.fingerprint[1:]:
            return False
        return seen.unmoved or places(seen.tensors) == self.places


def basis(tensors: StepTensors) -> Basis:
    """The basis of a step of tensors that were checked."""
    read = fingerprint(tensors)
    assert read is not None, "every gradient was checked"
    return Basis(read, places(tensors))
