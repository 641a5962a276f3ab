"""Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365), which add up to a difference completely.

The gradient along the straight line from a baseline jumps wherever a rectifier opens, so equal steps converge slowly.
But completeness holds on every piece of the line: what the midpoint's gradient misses there is known. Pieces that miss
much are halved; the value at the midpoint, which came with its gradient, is where the halves meet.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_neurons.attribution.request import AttributionRequest, Values

COMPLETENESS = 1e-3
"""Share of the difference by which the sum of integrated gradients may miss it."""

MOST_POINTS = 2048
_ROUNDING = 8  # in units of the last place of the objective
_FIRST_PIECES = 32
_SHARES = (1 / 16, 1 / 64, 1 / 256)  # of the tolerance, that one piece may miss; the next where that is not enough
_AT_ONCE = 32


class Integrated(NamedTuple):
    """Integrated gradients, and how complete they are.

    Attributes:
        attributions: Shaped like what is explained.
        difference: Of each sample: the objective, minus that of the baseline.
        gap: Of each sample: sum of the attributions, minus ``difference``; 0 if they are complete.
        tolerance: Of each sample: 0.1 % of ``difference``, and the rounding error of its type of numbers.
        spread: Of each sample: range of the objective along the line.
        points: Of each sample: number of gradients that were taken.
    """

    attributions: Values
    difference: Float[Tensor, " batch"]
    gap: Float[Tensor, " batch"]
    tolerance: Float[Tensor, " batch"]
    spread: Float[Tensor, " batch"]
    points: Int[Tensor, " batch"]

    @property
    def complete(self) -> Bool[Tensor, " batch"]:
        """True where a sample's attributions miss its difference by no more than its tolerance."""
        return self.gap.abs() <= self.tolerance


class _Pieces(NamedTuple):
    """Pieces of the lines: sample, begin, length, and the objective at both ends."""

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


def integrated(request: AttributionRequest, baseline: Values, steps: int | None) -> Integrated:
    """Integrate the gradient on the straight line from a baseline.

    Args:
        request: The model, its inputs and the objective.
        baseline: The start of the line; the shape of the inputs, or of one sample.
        steps: Number of equal pieces; None halves pieces until a sample is complete, or has taken 2,048 gradients.

    Returns:
        Attributions in the unit of the objective, and how complete they are for each sample.
    """
    everywhere = baseline.expand_as(request.explained.values)
    parts = [_one_part(request, everywhere, rows, steps) for rows in request.parts()]
    return Integrated(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _one_part(request: AttributionRequest, baseline: Tensor, rows: Tensor, steps: int | None) -> Integrated:
    lines = _Lines(request, baseline[rows], request.explained.values[rows] - baseline[rows], rows)
    ends, rounding = lines.values_at(_FIRST_PIECES if steps is None else steps)
    low, high = ends[:, 0], ends[:, -1]
    tolerance = COMPLETENESS * (high - low).abs() + rounding * (high.abs() + low.abs())
    if steps is not None:
        lines.integrate(_equal_pieces(ends, torch.arange(len(rows))), tolerance, halving=False)
    for share in _SHARES if steps is None else ():
        far = (lines.gap.isnan() | (lines.gap.abs() > tolerance)) & (lines.points + _FIRST_PIECES <= MOST_POINTS)
        lines.integrate(_equal_pieces(ends, far.nonzero().flatten()), share * tolerance)
    spread = ends.amax(1) - ends.amin(1)
    attributions = (lines.total * lines.line).to(lines.line)
    return Integrated(attributions, high - low, lines.gap, tolerance, spread, lines.points)


class _Lines:
    """The lines from the baseline to some samples, and the integrals along them so far."""

    def __init__(self, request: AttributionRequest, start: Tensor, line: Tensor, rows: Tensor) -> None:
        self._request, self._start, self._rows = request, start, rows
        self.line = line
        self.total = torch.zeros(line.shape, dtype=torch.float64, device=line.device)
        self.gap = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        self.points = torch.zeros(len(rows), dtype=torch.int64)

    def values_at(self, count: int) -> tuple[Float[Tensor, "row place"], float]:
        """Return the objective between ``count`` equal pieces, and the relative rounding error of its type."""
        with torch.no_grad():
            values = [self._request.value(self._start + i / count * self.line, self._rows) for i in range(count + 1)]
        return torch.stack(values, 1).double().cpu(), _ROUNDING * torch.finfo(values[0].dtype).eps

    def integrate(self, pieces: _Pieces, allowed: Float[Tensor, " row"], *, halving: bool = True) -> None:
        """Integrate pieces, anew for the samples that they belong to.

        Args:
            pieces: All pieces of some samples.
            allowed: Error of one piece above which it is halved, by sample.
            halving: Whether pieces are halved at all.
        """
        again = pieces.row.unique()
        self.total[again.to(self.line.device)], self.gap[again] = 0.0, 0.0
        planned = self.points + torch.bincount(pieces.row, minlength=len(self.points))
        while len(pieces.row):
            now, pieces = pieces.at(slice(_AT_ONCE)), pieces.at(slice(_AT_ONCE, None))
            on = now.row.to(self.line.device)
            middle, shares = self._gradients(now, on)
            missed = (shares * self.line[on].double()).flatten(1).sum(1).cpu() - (now.high - now.low)
            self.points += torch.bincount(now.row, minlength=len(self.points))
            far = missed.abs() > allowed[now.row] if halving else torch.zeros_like(missed, dtype=torch.bool)
            for place in far.nonzero().flatten().tolist():
                row = now.row[place]
                far[place] = planned[row] + 2 <= MOST_POINTS
                planned[row] += 2 * int(far[place])
            near = (~far).to(on.device)
            self.total.index_add_(0, on[near], shares[near])
            self.gap.index_add_(0, now.row[~far], missed[~far])
            halves = now.at(far).halves(middle[far])
            pieces = _Pieces(*(torch.cat(pair) for pair in zip(halves, pieces, strict=True)))

    def _gradients(self, now: _Pieces, on: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective in the middle of each piece, and the gradient there times the length of the piece."""
        place = _stretched((now.begin + now.length / 2).to(self.line), self.line)
        middle, gradient = self._request.gradient(self._start[on] + place * self.line[on], self._rows[on])
        length = _stretched(now.length.to(self.line.device), self.line)
        return middle.double().cpu(), gradient.double() * length


def _equal_pieces(ends: Float[Tensor, "row place"], rows: Int[Tensor, " chosen"]) -> _Pieces:
    count = ends.shape[1] - 1
    return _Pieces(
        row=rows.repeat_interleave(count),
        begin=(torch.arange(count, dtype=torch.float64) / count).repeat(len(rows)),
        length=torch.full((count * len(rows),), 1 / count, dtype=torch.float64),
        low=ends[rows, :-1].flatten(),
        high=ends[rows, 1:].flatten(),
    )


def _stretched(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
