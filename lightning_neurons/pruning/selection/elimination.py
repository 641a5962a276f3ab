"""Elimination by least squares: one by one, the unit goes whose loss downstream layers make up for best.

With the covariance ``S`` of what a reader reads and its weights ``W``, ``(input, output)``, both for the inputs that
are left, the error that remains when the inputs ``P`` go and the others are solved again is
``tr(W_P' [S^-1]_PP^-1 W_P)`` (Hassibi and Stork 1993, on blocks). Removing them updates both in closed form, so nothing
is inverted twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """The weights and inputs of one layer that reads a group.

    Attributes:
        weight: ``(input, output)``, all taps of an output as outputs of their own.
        covariance: ``(input, input)`` of everything that it reads, positive definite.
        places: By unit, its inputs.
        scale: Variance of its output, by which errors are divided.
    """

    weight: Float[Tensor, "input output"]
    covariance: Float[Tensor, "input input"]
    places: tuple[tuple[int, ...], ...]
    scale: float


class _State:
    """The state of one layer that reads a group: inverse covariance of the inputs left, products of their weights.

    Errors depend on the weights by ``W W'`` alone, so it does not matter how many outputs there are.
    """

    def __init__(self, reading: Reading) -> None:
        self.places, self.scale = reading.places, reading.scale
        self.products = reading.weight @ reading.weight.T
        self.inverse = torch.linalg.inv(reading.covariance)
        widths = {len(places) for places in self.places}
        self.index = torch.tensor(self.places) if len(widths) == 1 else None

    def errors(self, units: Sequence[int]) -> Tensor:
        """Return the error of removing each of some units alone."""
        if self.index is None:
            return torch.stack([self._errors(torch.tensor([self.places[unit]]).long())[0] for unit in units])
        return self._errors(self.index[list(units)])

    def remove(self, unit: int) -> None:
        """Remove a unit: the others take over what they can."""
        gone = list(self.places[unit])
        if len(gone) == 1:
            self._remove_one(gone[0])
        elif gone:
            rows, products = self.inverse[gone], self.products[gone]
            across = torch.linalg.solve(rows[:, gone], rows).T  # (input, place); W becomes W - across W_P
            mixed = across @ (0.5 * products[:, gone]) @ across.T - across @ products
            self.products.add_(mixed).add_(mixed.T)
            self.inverse.addmm_(across, rows, alpha=-1)
        for matrix in (self.products, self.inverse):
            matrix[gone] = 0
            matrix[:, gone] = 0
        self.inverse[gone, gone] = 1

    def _remove_one(self, place: int) -> None:
        """Remove a single input, in place: most units have one, and there may be thousands."""
        row, products = self.inverse[place].clone(), self.products[place].clone()
        across = row / row[place]
        mixed = 0.5 * products[place] * across - products
        self.products.addr_(across, mixed).addr_(mixed, across)
        self.inverse.addr_(across, row, alpha=-1)

    def _errors(self, index: Int[Tensor, "unit place"]) -> Float[Tensor, " unit"]:
        if not index.shape[1]:
            return self.products.new_zeros(len(index))
        if index.shape[1] == 1:
            found: Tensor = (self.products[index, index] / self.inverse[index, index])[:, 0]
        else:
            pairs = index[:, :, None], index[:, None, :]
            solved = torch.linalg.solve(self.inverse[pairs], self.products[pairs])
            found = solved.diagonal(dim1=1, dim2=2).sum(1)
        return found / self.scale


def eliminate(readings: Sequence[Reading], units: int) -> tuple[list[int], list[float]]:
    """Return the order in which units go, and the error of each when those before it have gone.

    Args:
        readings: All layers that read the units.
        units: Number of units.

    Returns:
        All units, the first to go first, and for each the error that it adds, relative and summed over the layers.
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
