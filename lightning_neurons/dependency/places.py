"""Places of neurons in the modules and tensors of a model, and which of them can only be removed together.

A place is one index of a tensor on the axis that holds neurons, such as a row of a weight, or a channel that a layer
reads. Each has a number. A tensor of a forward is described by the numbers of its values, on as few axes as tell them
apart: (1, channels, 1, 1) for a map, (1, heads, 1, head size) for the queries of an attention. Operations that move
values move the numbers; those that combine values join the places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Port = tuple[Any, Literal["in", "out"]]
"""A module or parameter, and the side of it on which places lie: what it reads, or what it makes or hands on."""


@dataclass
class Places:
    """All places of a model.

    Attributes:
        ports: By port, the numbers of its places, in order.
        lost: Numbers of places that cannot be followed, with the reasons, in the order in which they are met.
    """

    ports: dict[Port, Tensor] = field(default_factory=dict)
    lost: list[tuple[Tensor, str]] = field(default_factory=list)
    _count: int = 0
    _joined: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def new(self, count: int) -> Tensor:
        """Return the numbers of new places.

        Args:
            count: How many.

        Returns:
            Numbers (count,).
        """
        self._count += count
        return torch.arange(self._count - count, self._count)

    def at(self, port: Port, count: int) -> Tensor:
        """Return the numbers of a port's places, new ones if it has none yet.

        Args:
            port: The port.
            count: Its width.

        Returns:
            Numbers (count,).
        """
        if port not in self.ports:
            self.ports[port] = self.new(count)
        return self.ports[port]

    def join(self, first: Tensor, second: Tensor) -> None:
        """Note that places can only be removed together: those that broadcasting puts side by side."""
        pairs = torch.stack(torch.broadcast_tensors(first, second)).flatten(1).unique(dim=1)
        self._joined.append((pairs[0], pairs[1]))

    def lose(self, numbers: Tensor, reason: str) -> None:
        """Note that places cannot be followed any further."""
        self.lost.append((numbers.flatten(), reason))

    def collapse(self, numbers: Tensor, axis: int) -> Tensor:
        """Join all places along an axis.

        Args:
            numbers: Numbers of values.
            axis: The axis.

        Returns:
            Numbers with that axis of size 1.
        """
        first = numbers.narrow(axis, 0, 1)
        self.join(first, numbers)
        return first

    def components(self) -> Tensor:
        """Find what can only be removed together.

        Returns:
            For each place (places,), the lowest number of the places that go with it.
        """
        label = torch.arange(self._count)
        if not self._joined:
            return label
        a, b = (torch.cat(side) for side in zip(*self._joined, strict=True))
        while True:
            before, low = label, torch.minimum(label[a], label[b])
            label = label.clone()
            for side in (before[a], before[b], a, b):
                label.scatter_reduce_(0, side, low, "amin")
            label = label[label]
            if torch.equal(label, before):
                return label


def varying(numbers: Tensor) -> frozenset[int]:
    """Return the axes on which the numbers of a tensor differ: those of size above 1."""
    return frozenset(axis for axis, size in enumerate(numbers.shape) if size > 1)


def compressed(numbers: Tensor) -> Tensor:
    """Shrink axes along which all numbers are the same to size 1.

    Args:
        numbers: The number of each value, with -1 for values that are no neuron's.

    Returns:
        Numbers with as many axes; where only some values along an axis are -1, the others count.

    Example:
        >>> compressed(torch.tensor([[3, 4], [3, 4]]))
        tensor([[3, 4]])
    """
    for axis, size in enumerate(numbers.shape):
        if size > 1:
            high = numbers.amax(axis, keepdim=True)
            if bool(((numbers == high) | (numbers < 0)).all()):
                numbers = high
    return numbers


def aligned(numbers: Tensor, ndim: int) -> Tensor:
    """Add leading axes, as broadcasting does.

    Args:
        numbers: Numbers of values.
        ndim: The number of axes to have.

    Returns:
        A view with at least so many axes.
    """
    return numbers.view((1,) * (ndim - numbers.ndim) + tuple(numbers.shape)) if ndim > numbers.ndim else numbers


def combined(places: Places, operands: Sequence[Tensor], reason: str) -> Tensor | None:
    """Join the places of values that an operation combines one by one.

    Args:
        places: All places.
        operands: Numbers of the operands' values, aligned.
        reason: Why places on other axes than most cannot be followed.

    Returns:
        Numbers of the result's values; None if there are none.
    """
    # One number for all scales or shifts all alike.
    wide = [numbers for numbers in operands if varying(numbers)]
    if not wide:
        return operands[0] if operands else None
    axes = [varying(numbers) for numbers in wide]
    most = max(dict.fromkeys(axes), key=axes.count)
    for numbers, own in zip(wide, axes, strict=True):
        if not own & most:
            places.lose(numbers, reason)
    wide = [numbers for numbers, own in zip(wide, axes, strict=True) if own & most]
    most = max(map(varying, wide), key=len)
    if any(not varying(numbers) <= most for numbers in wide):
        # Such as both sizes of a head, in a product of keys with values over positions: what they share is the head.
        common = frozenset.intersection(*map(varying, wide))
        wide = [_collapsed(places, numbers, varying(numbers) - common) for numbers in wide]
    result = max(wide, key=Tensor.numel)
    for numbers in wide:
        if numbers is not result:
            places.join(numbers, result)
    return result if varying(result) else None


def _collapsed(places: Places, numbers: Tensor, axes: frozenset[int]) -> Tensor:
    for axis in axes:
        numbers = places.collapse(numbers, axis)
    return numbers
