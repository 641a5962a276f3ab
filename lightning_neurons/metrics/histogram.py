"""A histogram of magnitudes with a bounded relative error, integer counts, and merging by addition.

Bins are fixed, so that histograms of any two streams fit together: 64 equal parts of every power of two between 2^-20
and 2^12, which are the leading bits of a float32. This is the log-linear form of DDSketch (Masson et al. 2019,
arXiv:1908.10693); reading a bin off the bits costs a tenth of a logarithm. One more bin on each side holds zeros and
magnitudes below, and magnitudes above.
"""

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

PARTS = 64
"""Bins per power of two."""

RELATIVE_ERROR = 1 / (2 * PARTS + 1)
"""Largest relative distance of a value from the representative of its bin: 0.78 %."""

_LOWEST_POWER, _HIGHEST_POWER = -20, 12
LOWEST, HIGHEST = 2.0**_LOWEST_POWER, 2.0**_HIGHEST_POWER
"""Magnitudes below ``LOWEST``, about 1e-6, count as zero."""

INNER_BINS = PARTS * (_HIGHEST_POWER - _LOWEST_POWER)
BINS = INNER_BINS + 2

POSITIONS = 8
"""Positions of a sample that are counted; all of them where there are no more."""

_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127
_SHIFT = _MANTISSA_BITS - int(math.log2(PARTS))
_FIRST = (_LOWEST_POWER + _EXPONENT_BIAS) * PARTS
_MAGNITUDE_MASK = 0x7FFFFFFF


@cache
def positions(space: int) -> Int[Tensor, " position"]:
    """Return the positions that are counted: the same in every sample, so that the result does not depend on batches.

    Rows (of a square image) are spread evenly, columns by a golden-ratio sequence.

    Example:
        >>> positions(4).tolist(), positions(64).tolist()
        ([0, 1, 2, 3], [4, 8, 21, 26, 39, 44, 49, 62])
    """
    with torch.inference_mode(False):
        if space <= POSITIONS:
            return torch.arange(space)
        golden, side = (math.sqrt(5) - 1) / 2, math.isqrt(space)
        chosen: set[int] = set()
        step = 0
        while len(chosen) < POSITIONS:
            row = int((step % POSITIONS + 0.5) / POSITIONS * (space // side))
            chosen.add(row * side + int((0.5 + step * golden) % 1 * side))
            step += 1
        return torch.tensor(sorted(chosen))


def sampled(values: Float[Tensor, "batch neuron space"]) -> Float[Tensor, "batch neuron position"]:
    """Return a copy of the values at the positions that are counted."""
    chosen = positions(values.shape[-1])
    whole = chosen.shape[0] == values.shape[-1]
    return values.clone() if whole else values.index_select(-1, chosen.to(values.device))


def bin_index(values: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Return the bin of each value's magnitude, int32. NaN and infinity get the last bin: leave them out by weight.

    Example:
        >>> bin_index(torch.tensor([0.0, -1e-9, 1e9])).tolist() == [0, 0, BINS - 1]
        True
    """
    bits = values.float().view(torch.int32) & _MAGNITUDE_MASK
    return (bits >> _SHIFT).sub_(_FIRST - 1).clamp_(0, BINS - 1)


def representatives() -> Float[Tensor, " bin"]:
    """Return one magnitude per bin, within 0.78 % of every value in an inner bin; 0 and infinity outside."""
    power = torch.arange(_LOWEST_POWER, _HIGHEST_POWER, dtype=torch.float64).exp2()
    edges = power[:, None] * (1 + torch.arange(PARTS + 1, dtype=torch.float64) / PARTS)
    low, high = edges[:, :-1], edges[:, 1:]
    inner = (2 * low * high / (low + high)).flatten()
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), math.inf)])


def share_at_most(counts: Int[Tensor, "neuron bin"], limit: float) -> Float[Tensor, " neuron"]:
    """Return the share of counted values whose magnitude is at most ``limit``; NaN where nothing was counted.

    Values within 1 % of ``limit`` may fall on either side.
    """
    inside = int((representatives() <= limit).sum())
    return counts[:, :inside].sum(1).double() / counts.sum(1)


def folded(counts: Int[Tensor, "neuron bin"], parts: int) -> Int[Tensor, " bar"]:
    """Sum all neurons' counts in coarser bars.

    Returns:
        Counts of the zeros, of ``parts`` bars to a power of two, and of all above.

    Example:
        >>> folded(torch.ones(2, BINS, dtype=torch.int64), parts=1)[:3].tolist()
        [2, 128, 128]
    """
    total = counts.sum(0)
    return torch.cat([total[:1], total[1:-1].view(-1, PARTS // parts).sum(1), total[-1:]])


def folded_edges(parts: int) -> Float[Tensor, " edge"]:
    """Return the edges of the inner bars of ``folded``: one more than there are inner bars.

    Example:
        >>> folded_edges(1)[[0, 20, -1]].tolist() == [LOWEST, 1.0, HIGHEST]
        True
    """
    place = torch.arange((_HIGHEST_POWER - _LOWEST_POWER) * parts + 1, dtype=torch.float64)
    return (_LOWEST_POWER + place.div(parts, rounding_mode="floor")).exp2() * (1 + place % parts / parts)
