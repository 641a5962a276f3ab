"""Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): they divide up a difference completely.

The gradient along the straight line from a baseline jumps wherever a rectifier opens, so equal steps converge slowly.
But completeness holds on every piece of the line: what the midpoint's gradient misses there is known. Pieces that miss
much are halved; the value at the midpoint, which came with its gradient, is where the halves meet.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_neurons.pictures.question import Question, Values

COMPLETENESS = 1e-3
"""How far integrated gradients may miss the difference that they divide up, as a share of it."""

MOST_POINTS = 2048
_ROUNDING = 1e-6  # of float32, as a share of what is looked at
_FIRST_PIECES = 32
_SHARE_OF_TOLERANCE = 1 / 16  # that one piece may miss; misses partly cancel
_AT_ONCE = 32


class Integrated(NamedTuple):
    """Integrated gradients, and how complete they are.

    Attributes:
        attributions: Shaped like what is explained.
        difference: Of each sample: what is looked at, minus the same on the baseline.
        gap: Of each sample: sum of the attributions, minus ``difference``; 0 if they are complete.
        tolerance: Of each sample: 0.1 % of ``difference``, and what float32 cannot tell.
        points: Of each sample: how many gradients were taken.
    """

    attributions: Values
    difference: Float[Tensor, " batch"]
    gap: Float[Tensor, " batch"]
    tolerance: Float[Tensor, " batch"]
    points: Int[Tensor, " batch"]

    @property
    def complete(self) -> Bool[Tensor, " batch"]:
        """Whether a sample's attributions miss its difference by no more than its tolerance."""
        return self.gap.abs() <= self.tolerance


class _Pieces(NamedTuple):
    """Pieces of the lines: whose, from where, how long, and what is looked at on both ends."""

    row: Int[Tensor, " piece"]
    begin: Float[Tensor, " piece"]
    length: Float[Tensor, " piece"]
    low: Float[Tensor, " piece"]
    high: Float[Tensor, " piece"]

    def at(self, chosen: Tensor | slice) -> "_Pieces":
        return _Pieces(*(column[chosen] for column in self))

    def halves(self, middle: Tensor) -> "_Pieces":
        half = self.length / 2
        first = _Pieces(self.row, self.begin, half, self.low, middle)
        second = _Pieces(self.row, self.begin + half, half, middle, self.high)
        return _Pieces(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def integrated(question: Question, baseline: Values, steps: int | None) -> Integrated:
    """Integrate the gradient on the straight line from a baseline.

    Args:
        question: What is asked.
        baseline: Where the line begins; the shape of the inputs, or of one sample.
        steps: How many equal pieces; None halves pieces until a sample is complete, or has taken 2,048 gradients.
    """
    everywhere = baseline.expand_as(question.entrance.values)
    parts = [_one_part(question, everywhere, rows, steps) for rows in question.parts()]
    return Integrated(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _one_part(question: Question, baseline: Tensor, rows: Tensor, steps: int | None) -> Integrated:
    start = baseline[rows]
    line = question.entrance.values[rows] - start
    pieces = _equal_pieces(question, start, line, rows, _FIRST_PIECES if steps is None else steps)
    count = len(pieces.row) // len(rows)
    low, high = pieces.low[::count], pieces.high[count - 1 :: count]
    difference = high - low
    tolerance = COMPLETENESS * difference.abs() + _ROUNDING * (high.abs() + low.abs())
    total = torch.zeros(line.shape, dtype=torch.float64, device=line.device)
    points, gap = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.float64)
    while len(pieces.row):
        now, pieces = pieces.at(slice(_AT_ONCE)), pieces.at(slice(_AT_ONCE, None))
        on = now.row.to(line.device)
        place = _stretched((now.begin + now.length / 2).to(line), line)
        middle, gradient = question.gradient(start[on] + place * line[on], rows[on])
        shares = gradient.double() * _stretched(now.length.to(line.device), line)
        missed = (shares * line[on].double()).flatten(1).sum(1).cpu() - (now.high - now.low)
        points += torch.bincount(now.row, minlength=len(rows))
        far = (missed.abs() > _SHARE_OF_TOLERANCE * tolerance[now.row]) & (points[now.row] < MOST_POINTS)
        far &= torch.tensor(steps is None)
        near = ~far
        total.index_add_(0, on[near.to(on.device)], shares[near.to(on.device)])
        gap.index_add_(0, now.row[near], missed[near])
        halves = now.at(far).halves(middle.double().cpu()[far])
        pieces = _Pieces(*(torch.cat(pair) for pair in zip(halves, pieces, strict=True)))
    return Integrated((total * line).to(line), difference, gap, tolerance, points)


def _equal_pieces(question: Question, start: Tensor, line: Tensor, rows: Tensor, count: int) -> _Pieces:
    places = torch.arange(count + 1, dtype=torch.float64) / count
    with torch.no_grad():
        values = [question.value(start + float(place) * line, rows).double().cpu() for place in places]
    at = torch.stack(values, 1)
    return _Pieces(
        row=torch.arange(len(rows)).repeat_interleave(count),
        begin=places[:-1].repeat(len(rows)),
        length=torch.full((count * len(rows),), 1 / count, dtype=torch.float64),
        low=at[:, :-1].flatten(),
        high=at[:, 1:].flatten(),
    )


def _stretched(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
