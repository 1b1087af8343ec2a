"""What the program that sums a tensor's last chunk does: the tensor's norms, its ratio, the rest.

The ratio is published as early as it can be: other programs may be waiting for it.
"""

import triton
import triton.language as tl

from .lars_rule import (
    learning_rate,
    rate_words,
    ratio_options,
    store_stats,
    trust_ratio,
    uses_decayed_norm,
)
from .queue import as_published, publish
from .sums import D2, G2, W2, store_triple, sum_partials


@triton.jit
def finish_tensor(
    lane, tensor, chunks, first_slot, w2, g2, d2, options, switches, epoch, published,
    arrivals, flags, partials, sums, ratios,
    LANES: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """The trust ratio of a tensor, from its only chunk's sums or from its slots.

    `lane`: 0 to LANES - 1. `published`: whether other programs wait for the ratio. It needs two
    sums; the third is for layer_stats() alone.
    """
    decayed = uses_decayed_norm(switches)
    loaded = ratio_options(options)
    rate = rate_words(options)
    used = G2 + (D2 - G2) * decayed.to(tl.int64)
    rest = G2 + D2 - used
    norm2 = tl.where(decayed, d2, g2)
    if chunks > 1:
        w2, norm2 = sum_partials(partials, lane, first_slot, chunks, W2, used, LANES, EMULATE_BF16)
    lr = learning_rate(rate, switches)
    ratio = as_published(trust_ratio(w2, norm2, loaded, switches, lr))
    if published:
        publish(flags + tensor, epoch, ratio)
    if chunks > 1:
        tl.store(arrivals + tensor, 0)
    rest2 = tl.where(decayed, g2, d2)
    if chunks > 1:
        rest2, _rest = sum_partials(
            partials, lane, first_slot, chunks, rest, rest, LANES, EMULATE_BF16
        )
    g2, d2 = tl.where(decayed, rest2, norm2), tl.where(decayed, norm2, rest2)
    store_triple(sums, tensor, w2, g2, d2)
    store_stats(ratios, tensor, ratio, lr)
    return ratio
