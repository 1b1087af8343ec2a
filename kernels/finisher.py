"""What a program of `lars_resident` does that has no chunks: sums become ratios.

    slots of a tensor      stored by all programs, in their own time
    finisher               waits for each slot, adds them up, publishes the ratio; the next tensor

If the last program to arrive did this, as in `lars_step.py`, a program that is late would be last
for one tensor after the other, do all of this work, and be later still: there are no tickets that
would give it fewer chunks. On an H200 that took 40 us of a step of ResNet-50.
"""

import triton
import triton.language as tl

from . import layout
from .lars_rule import (
    learning_rate,
    load_switches,
    rate_words,
    ratio_options,
    store_stats,
    trust_ratio,
    uses_decayed_norm,
)
from .queue import as_published, publish, unpack_item
from .sums import store_triple, sum_tagged, tag_of

_NUMEL = tl.constexpr(layout.NUMEL)
_SLOT = tl.constexpr(layout.SLOT)
_TENSOR_WORDS = tl.constexpr(layout.TENSOR_WORDS)
_GROUP_WORDS = tl.constexpr(layout.GROUP_WORDS)


@triton.jit
def finish_sums(tensor, w2, g2, d2, options, switches, epoch, flags, sums, ratios):
    """Publish the trust ratio of a tensor, and keep it and its three sums for layer_stats()."""
    loaded = ratio_options(options)
    lr = learning_rate(rate_words(options), switches)
    norm2 = tl.where(uses_decayed_norm(switches), d2, g2)
    ratio = as_published(trust_ratio(w2, norm2, loaded, switches, lr))
    publish(flags + tensor, epoch, ratio)
    store_triple(sums, tensor, w2, g2, d2)
    store_stats(ratios, tensor, ratio, lr)


@triton.jit
def finish_tensors(
    finishes, first, stride, lane, epoch, tensors, groups, flags, partials, sums, ratios,
    CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Finish every `stride`-th tensor of a list of items that ends with as many zeros.

    `lane`: 0 to LANES - 1, in the layout in which sums are added.
    """
    tag = tag_of(epoch)
    at = first
    item = tl.load(finishes + at)
    while item != 0:
        _, tensor, group, _ = unpack_item(item)
        row, options = tensors + tensor * _TENSOR_WORDS, groups + group * _GROUP_WORDS
        numel, first_slot = tl.load(row + _NUMEL), tl.load(row + _SLOT)
        switches = load_switches(options)
        at += stride
        item = tl.load(finishes + at)
        chunks = (numel + CHUNK - 1) // CHUNK
        w2, g2, d2 = sum_tagged(partials, lane, first_slot, chunks, tag, LANES)
        finish_sums(tensor, w2, g2, d2, options, switches, epoch, flags, sums, ratios)
