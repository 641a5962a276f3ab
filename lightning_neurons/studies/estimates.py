"""Means of a finite population from some of its samples, and what they decide."""

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor


class Estimates:
    """Running estimates of means over a finite population, with control variates of known mean.

    Args:
        controls: By neuron, the population means of the control variates.
        population: How many samples there are in all.
    """

    def __init__(self, controls: Float[Tensor, "neuron control"], population: int) -> None:
        self.population = population
        self._known = controls.double()
        neurons, size = controls.shape
        self.seen = torch.zeros(neurons, dtype=torch.float64)
        self._sums = torch.zeros(neurons, size + 1, dtype=torch.float64)
        self._products = torch.zeros(neurons, size + 1, size + 1, dtype=torch.float64)

    def add(self, neuron: int, values: Float[Tensor, " value"], controls: Float[Tensor, "value control"]) -> None:
        """Add samples of one neuron."""
        rows = torch.cat([values.double()[:, None], controls.double()], 1).cpu()
        rows[:, 1:] -= self._known[neuron]
        self.seen[neuron] += len(rows)
        self._sums[neuron] += rows.sum(0)
        self._products[neuron] += rows.t() @ rows

    def interval(self, confidence: float) -> tuple[Tensor, Tensor]:
        """Means, and the half widths of their two-sided confidence intervals."""
        n = self.seen.clamp_min(1)[:, None]
        mean = self._sums / n
        spread = self._products / n[:, :, None] - mean[:, :, None] * mean[:, None, :]
        size = (spread.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt() + 1e-300)[:, :, None]
        spread = spread / size / size.transpose(1, 2)
        controls = spread[:, 1:, 1:] + 1e-6 * torch.eye(spread.shape[1] - 1, dtype=torch.float64)
        slope = torch.linalg.solve(controls, spread[:, 1:, :1])[..., 0]
        unit = size[:, :1, 0]
        middle = mean[:, 0] - (slope * unit / size[:, 1:, 0] * mean[:, 1:]).sum(1)
        unexplained = (spread[:, 0, 0] - (slope * spread[:, 1:, 0]).sum(1)).clamp_min(0) * unit[:, 0].square()
        freedom = (self.seen - spread.shape[1]).clamp_min(1)
        left = (1 - self.seen / self.population).clamp_min(0)
        # What the samples lack of the population's controls is extrapolated, and errs with the slope.
        lacking = mean[:, 1:] / size[:, 1:, 0]
        leverage = (lacking * torch.linalg.solve(controls, lacking[..., None])[..., 0]).sum(1)
        error = (unexplained / freedom * (left + leverage * (left > 0))).sqrt()
        wide = torch.from_numpy(stats.t.ppf((1 + confidence) / 2, freedom.numpy()))
        return middle, error * wide


def decided(
    low: Float[Tensor, " neuron"], high: Float[Tensor, " neuron"], bottom: int
) -> tuple[Bool[Tensor, " neuron"], Bool[Tensor, " neuron"]]:
    """Which neurons are surely among the ``bottom`` lowest, and which surely are not.

    Args:
        low: Lower ends of intervals.
        high: Upper ends.
        bottom: How many neurons are looked for.

    Example:
        >>> low, high = torch.tensor([0.0, 1.0, 1.5, 4.0]), torch.tensor([0.5, 2.0, 3.0, 5.0])
        >>> [found.tolist() for found in decided(low, high, 2)]
        [[True, False, False, False], [False, False, False, True]]
    """
    own = (low >= high).long()  # an interval without width lies beyond itself
    above = len(low) - torch.searchsorted(low.sort().values, high) - own
    below = torch.searchsorted(high.sort().values, low, right=True) - own
    return above >= len(low) - bottom, below >= bottom
