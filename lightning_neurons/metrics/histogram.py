"""A histogram of magnitudes with a bounded relative error, integer counts, and merging by addition.

Bins grow by a constant factor ``(1 + error) / (1 - error)``, as in DDSketch (Masson et al. 2019, arXiv:1908.10693), over
a fixed range, so that histograms of any two streams have the same bins. Two further bins hold exact zeros and values
below the range; one holds values above it.
"""

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

RELATIVE_ERROR = 0.01
LOWEST, HIGHEST = 1e-6, 1e4
POSITIONS = 16
"""Positions of a sample that are counted; all of them where there are no more."""

GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
INNER_BINS = math.ceil(math.log(HIGHEST / LOWEST) / math.log(GROWTH))
BINS = INNER_BINS + 3
"""Zero, (0, LOWEST], the inner bins, and above."""

_BEYOND = 1e30
_LOG2_GROWTH = math.log2(GROWTH)


@cache
def positions(space: int) -> tuple[int, ...]:
    """Which positions are counted: the same in every sample, so that the result does not depend on how a stream is cut.

    A golden-ratio sequence spreads them evenly over rows *and* columns of a flattened picture.

    Example:
        >>> positions(4)
        (0, 1, 2, 3)
        >>> len(positions(1024))
        16
    """
    if space <= POSITIONS:
        return tuple(range(space))
    golden = (math.sqrt(5) - 1) / 2
    chosen: dict[int, None] = {}
    step = 0
    while len(chosen) < POSITIONS:
        chosen[int((0.5 + step * golden) % 1 * space)] = None
        step += 1
    return tuple(sorted(chosen))


def bin_index(values: Tensor) -> Tensor:
    """The bin of each value's magnitude, int64. NaN and infinity land in the last bin: leave them out by weight.

    Example:
        >>> bin_index(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [0, 1, BINS - 1]
        True
    """
    size = torch.fmin(values.abs(), values.new_tensor(_BEYOND))
    steps = size.log2().sub_(math.log2(LOWEST)).div_(_LOG2_GROWTH).ceil_().clamp_(0, INNER_BINS + 1)
    return steps.add_(1).mul_(size.sign()).long()


def representatives() -> Float[Tensor, " bin"]:
    """One magnitude per bin, within 1 % of every value in an inner bin; 0, ``LOWEST`` and infinity outside."""
    upper = LOWEST * GROWTH ** torch.arange(1, INNER_BINS + 1, dtype=torch.float64)
    inner = 2 * upper / (GROWTH + 1)
    ends = torch.tensor([0.0, LOWEST, math.inf], dtype=torch.float64)
    return torch.cat([ends[:2], inner, ends[2:]])


def share_at_most(counts: Int[Tensor, "neuron bin"], limit: float) -> Float[Tensor, " neuron"]:
    """The share of counted values whose magnitude is at most ``limit``; NaN where nothing was counted.

    Values within 1 % of ``limit`` may fall on either side. Below ``LOWEST`` only exact zeros are told apart.
    """
    inside = representatives().to(counts.device) <= limit
    return counts[:, inside].sum(1) / counts.sum(1)


def quantile(counts: Int[Tensor, "neuron bin"], q: float) -> Float[Tensor, " neuron"]:
    """The magnitude that a share ``q`` of the counted values does not exceed, within 1 %.

    Example:
        >>> counts = torch.bincount(bin_index(torch.tensor([1.0, 2.0, 3.0])), minlength=BINS)[None]
        >>> round(quantile(counts, 0.5).item(), 1)
        2.0
    """
    running = counts.cumsum(1)
    wanted = (q * counts.sum(1, keepdim=True)).ceil().clamp_min(1)
    index = (running < wanted).sum(1).clamp_max(BINS - 1)
    value = representatives().to(counts.device)[index]
    return torch.where(running[:, -1] > 0, value, torch.full_like(value, math.nan))
