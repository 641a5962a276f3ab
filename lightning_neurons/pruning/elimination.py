"""Which units least squares can do without: one by one, the one goes whose loss the readers can make up for best.

With the covariance ``S`` of what a reader reads and its weights ``W``, ``(input, output)``, both for the inputs that
are left, the error that remains when the inputs ``P`` go and the others are solved again is
``tr(W_P' [S^-1]_PP^-1 W_P)`` (Hassibi and Stork 1993, on blocks). Removing them updates both in closed form, so nothing
is inverted twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """What one reader reads of a group.

    Attributes:
        weight: ``(input, output)``, all taps of an output as outputs of their own.
        covariance: ``(input, input)`` of everything that it reads, positive definite.
        places: By unit, its inputs.
        scale: What errors are divided by, the variance of what it puts out.
    """

    weight: Float[Tensor, "input output"]
    covariance: Float[Tensor, "input input"]
    places: tuple[tuple[int, ...], ...]
    scale: float


class _State:
    """The weights and the inverse covariance of one reader, for the inputs that are left."""

    def __init__(self, reading: Reading) -> None:
        self.places, self.scale = reading.places, reading.scale
        self.weight = reading.weight.clone()
        self.inverse = torch.linalg.inv(reading.covariance)
        widths = {len(places) for places in self.places}
        self.index = torch.tensor(self.places) if len(widths) == 1 else None

    def errors(self, units: Sequence[int]) -> Tensor:
        """What each of some units would cost, were it to go alone."""
        if self.index is None:
            return torch.stack([self._error(torch.tensor(self.places[unit])) for unit in units])
        index = self.index[list(units)]
        rows = self.weight[index]  # (unit, place, output)
        if index.shape[1] == 1:
            found: Tensor = rows.square().sum((1, 2)) / self.inverse[index, index][:, 0]
        else:
            blocks = self.inverse[index[:, :, None], index[:, None, :]]
            found = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
        return found / self.scale

    def remove(self, unit: int) -> None:
        """Let a unit go: the others take over what they can."""
        gone = torch.tensor(self.places[unit], dtype=torch.long)
        if not len(gone):
            return
        block = self.inverse[gone][:, gone]
        across = torch.linalg.solve(block, self.inverse[gone]).T  # (input, place)
        self.weight -= across @ self.weight[gone]
        self.inverse -= across @ self.inverse[gone]
        self.weight[gone] = 0
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1

    def _error(self, places: Tensor) -> Tensor:
        if not len(places):
            return self.weight.new_zeros(())
        rows = self.weight[places]
        found: Tensor = (rows * torch.linalg.solve(self.inverse[places][:, places], rows)).sum()
        return found / self.scale


def eliminate(readings: Sequence[Reading], units: int) -> tuple[list[int], list[float]]:
    """The order in which units go, and what each costs when those before it have gone.

    Args:
        readings: All readers of the units.
        units: How many there are.

    Returns:
        All units, the first to go first, and for each the error that it adds, relative and summed over the readers.
    """
    states = [_State(reading) for reading in readings]
    left, order, errors = list(range(units)), [], []
    while left:
        cost = torch.stack([state.errors(left) for state in states]).sum(0)
        best = int(cost.argmin())
        order.append(left.pop(best))
        errors.append(float(cost[best]))
        for state in states:
            state.remove(order[-1])
    return order, errors
