"""The gradients of an epoch's mini-batches on disk, none of which is believed without a check.

There is one file for each mini-batch, used again in the next epoch. It begins with a header of
`HEADER` bytes: JSON with the checksum of what follows, and a stamp that stands for everything the
gradient depends on. What follows are the gradients in float32, tensor after tensor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lars_fused.study.errors import StudyError
from lars_fused.study.files import write_bytes

HEADER = 256
VERSION = 1


def megabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def stamp(**facts: Any) -> str:
    """A digest of everything that a gradient depends on; `facts` is plain data."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(tensors: Sequence[Tensor]) -> str:
    """A digest of the bits of many tensors, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        # Bits, not numbers: numpy has no bfloat16.
        bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(bits.numpy().tobytes())
    return found.hexdigest()


class GradientCache:
    """Gradients of `batches` mini-batches in a folder, all of tensors of the same shapes.

    Args:
        folder: of the files; made when the first one is written.
        shapes: of the gradients of one mini-batch.
        batches: how many mini-batches there are.
    """

    def __init__(self, folder: Path, shapes: Sequence[torch.Size], batches: int):
        self.folder, self.shapes, self.batches = folder, list(shapes), batches
        self.numbers = sum(shape.numel() for shape in self.shapes)
        self.damaged = 0

    @property
    def size(self) -> int:
        """Bytes on disk when all mini-batches are there."""
        return self.batches * (HEADER + 4 * self.numbers)

    def file(self, number: int) -> Path:
        """Of a mini-batch, counted from 0."""
        return self.folder / f"{number:06}.gradient"

    def check_space(self) -> int:
        """Free bytes on the disk, for which the cache must not be too large.

        A file is written beside the one that it replaces: there must be room for one more.

        Raises:
            StudyError: there is not enough room.
        """
        files = [self.file(k) for k in range(self.batches)]
        held = sum(file.stat().st_size for file in files if file.exists())
        place = self.folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        needed = self.size - held + HEADER + 4 * self.numbers
        if needed > free:
            raise StudyError(
                f"the gradient cache in {self.folder} takes {megabytes(self.size)} "
                f"({self.batches:,} mini-batches of {self.numbers:,} numbers), and "
                f"{megabytes(free)} are free: choose a larger --batch, a smaller --width, or an "
                "--out on another disk"
            )
        return free

    def write(self, number: int, gradients: Sequence[Tensor], stamped: str) -> None:
        """Store the gradients of a mini-batch under their stamp."""
        flat = torch.cat([g.detach().float().cpu().flatten() for g in gradients])
        content = flat.numpy().tobytes()
        checksum = hashlib.sha256(content).hexdigest()
        header = json.dumps({"stamp": stamped, "checksum": checksum}).encode().ljust(HEADER)
        # Not waited for: what a crash leaves half written fails its checksum.
        write_bytes(self.file(number), header + content, durable=False)

    def read(self, number: int, stamped: str) -> list[Tensor] | None:
        """The gradients of a mini-batch; None if they are missing, of another stamp, or damaged."""
        try:
            content = self.file(number).read_bytes()
        except OSError:
            return None
        try:
            header = json.loads(content[:HEADER])
            held, checksum = str(header["stamp"]), str(header["checksum"])
        except (ValueError, KeyError, TypeError):
            held, checksum = stamped, ""
        if held != stamped:
            return None  # of an earlier epoch, or of other settings
        body = memoryview(content)[HEADER:]
        if len(body) != 4 * self.numbers or hashlib.sha256(body).hexdigest() != checksum:
            self.damaged += 1
            return None
        flat = torch.from_numpy(np.frombuffer(body, np.float32).copy())
        parts = torch.split(flat, [shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def clear(self) -> None:
        """Remove the files; what else lies in the folder stays."""
        for number in range(self.batches):
            self.file(number).unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()
