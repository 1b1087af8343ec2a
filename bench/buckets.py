"""How often DDP's bucket views are misaligned: `python -m bench buckets`.

With `gradient_as_bucket_view=True` a gradient is a slice of a flat bucket that starts wherever the
previous gradient ends. The kernels' 128-bit path needs 16-byte alignment; other gradients are read
element by element. The assignment to buckets is DDP's own; nothing is allocated or timed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from bench.models import MODELS, Shapes, resnet50

ALIGNMENT = 16  # bytes that a 128-bit access needs
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # DDP's defaults: 1 MiB, then 25 MiB


def misaligned(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[bool]:
    """For each tensor, as given, whether its bucket view starts off a 16-byte boundary."""
    grads = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    order = list(reversed(range(len(grads))))  # buckets fill as the backward pass goes
    assigned, _ = dist._compute_bucket_assignment_by_size(
        [grads[i] for i in order], [FIRST_BUCKET, BUCKET]
    )
    off = [False] * len(grads)
    for bucket in assigned:
        at = 0
        for k in bucket:
            grad = grads[order[k]]
            off[order[k]] = at % ALIGNMENT != 0
            at += grad.numel() * dtype.itemsize
    return off


def resnet50_of_10_classes() -> Shapes:
    """Published heads have 1,000 classes, a multiple of every alignment; this one does not."""
    return [(n, (10, *shape[1:]) if n.startswith("fc.") else shape) for n, shape in resnet50()]


def main() -> None:
    """Print the table."""
    print("gradient_as_bucket_view=True: gradients that start off a 16-byte boundary")
    print(f"{'model':<22} {'dtype':<9} {'tensors':>8} {'off':>6} {'of params':>10}")
    for name, build in {**MODELS, "ResNet-50, 10 classes": resnet50_of_10_classes}.items():
        shapes = [shape for _, shape in build()]
        numels = [torch.Size(shape).numel() for shape in shapes]
        for dtype in (torch.float32, torch.bfloat16):
            off = misaligned(shapes, dtype)
            share = sum(n for n, o in zip(numels, off, strict=True) if o) / sum(numels)
            kind = str(dtype).removeprefix("torch.")
            print(f"{name:<22} {kind:<9} {len(off):>8} {sum(off):>6} {share:>10.1%}")


if __name__ == "__main__":
    main()
