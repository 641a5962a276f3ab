"""Gradients of a network in which neurons are zero, and of the one without them: the same, but for rounding?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-2
"""Least scale of a parameter's gradients, as a share of the largest of all: far below it there is mostly rounding."""

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class Comparison:
    """Pairs of gradients of the same parameters.

    Attributes:
        steps: The pairs of each step; None if the two runs are not alike at all.
    """

    steps: Sequence[Sequence[tuple[Tensor, Tensor]]] | None

    def is_within(self, tolerance: float) -> bool:
        """Return True if they differ by no more than a share of the largest gradient of their parameter."""
        return self.steps is not None and all(_are_close(pairs, tolerance) for pairs in self.steps)

    def resembles(self, other: "Comparison") -> bool:
        """Return True if they differ as they do in a run of another precision: rounding would differ there.

        Example:
            >>> zero = torch.zeros(2)
            >>> one, two = (Comparison([[(zero, torch.tensor(d))]]) for d in ([1.0, 2.0], [1.0, 2.1]))
            >>> other = Comparison([[(zero, torch.tensor([2.0, -1.0]))]])
            >>> one.resembles(two), one.resembles(other)
            (True, False)
        """
        if self.steps is None or other.steps is None:
            return True
        mine, others = self._differences(), other._differences()
        return len(mine) == len(others) and float((mine - others).norm()) <= float(mine.norm()) / 2

    def _differences(self) -> Tensor:
        differences = [(a - b).flatten() for pairs in self.steps or () for a, b in pairs]
        return torch.cat(differences).nan_to_num() if differences else torch.zeros(0)


NOTHING, UNLIKE = Comparison([]), Comparison(None)


def compared(
    expected: Sequence[Gradients], got: Sequence[Gradients], stays: Mapping[str, Mapping[int, Tensor]]
) -> Comparison:
    """Compare the gradients of all that stays.

    Args:
        expected: At each step, those of the network in which neurons are zero.
        got: Those of the network without them.
        stays: By name of a parameter and by axis, the places that stay.

    Returns:
        The comparison, in double precision.
    """
    if len(expected) != len(got):
        return UNLIKE
    steps = [_pairs(a, b, stays) for a, b in zip(expected, got, strict=True)]
    return UNLIKE if any(pairs is None for pairs in steps) else Comparison([pairs or [] for pairs in steps])


def _pairs(
    expected: Gradients, got: Gradients, stays: Mapping[str, Mapping[int, Tensor]]
) -> list[tuple[Tensor, Tensor]] | None:
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, wide in expected.items():
        narrow = got.get(name)
        if (wide is None) != (narrow is None):
            return None
        if wide is None or narrow is None:
            continue
        for axis, index in stays.get(name, {}).items():
            if wide.shape[axis] > len(index):  # else it belongs to a norm that runs on what stays in both networks
                wide = wide.index_select(axis, index.to(wide.device))
        if wide.shape != narrow.shape:
            return None
        pairs.append((wide.double(), narrow.double()))
    return pairs


def _are_close(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> bool:
    sizes = [float(a.abs().max()) if a.numel() else 0.0 for a, _ in pairs]
    bounds = [tolerance * max(size, _LEAST * max(sizes, default=0.0)) for size in sizes]
    return all(
        torch.allclose(a, b, rtol=0, atol=bound, equal_nan=True) for (a, b), bound in zip(pairs, bounds, strict=True)
    )
