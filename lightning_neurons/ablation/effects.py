"""Sums over samples from which the mean effect of an intervention, and its standard error, are read off.

Sums merge over batches and processes. A value is the loss of one sample, or, where single samples cannot be told apart,
the mean over a batch, weighted by its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Effects:
    """Sums of the effects of some interventions on a quantity, by class.

    Attributes:
        sums: For each intervention and class: the number of values, and the sums of w, wx, w^2, w^2 x and w^2 x^2 over
            values x with weights w.
    """

    sums: Float[Tensor, "intervention klass moment"]

    @classmethod
    def of(cls, interventions: int, classes: int = 1) -> "Effects":
        """Return sums without any value."""
        return cls(torch.zeros(interventions, classes, 6, dtype=torch.float64))

    def add(
        self,
        rows: Sequence[int],
        values: Float[Tensor, "row value"],
        weights: Float[Tensor, " value"],
        classes: Int[Tensor, " value"] | None = None,
    ) -> None:
        """Add values of some interventions.

        Args:
            rows: The interventions, each once.
            values: The values of each.
            weights: Number of samples that each value stands for.
            classes: The class of each value; None puts all into the first.
        """
        x, w = values.detach().double().cpu(), weights.double().cpu().expand(values.shape)
        moments = torch.stack([torch.ones_like(w), w, w * x, w * w, w * w * x, w * w * x * x], -1)
        if classes is None:
            self.sums[list(rows), 0] += moments.sum(1)
            return
        place = classes.cpu()
        self.sums = self.with_classes(int(place.max()) + 1 if len(place) else 0).sums
        by_class = moments.new_zeros(len(moments), self.sums.shape[1], 6).index_add_(1, place, moments)
        self.sums[list(rows)] += by_class

    def with_classes(self, classes: int) -> "Effects":
        """Return the sums with room for at least so many classes."""
        missing = max(classes - self.sums.shape[1], 0)
        return Effects(torch.cat([self.sums, self.sums.new_zeros(len(self.sums), missing, 6)], 1))

    def __add__(self, other: "Effects") -> "Effects":
        classes = max(self.sums.shape[1], other.sums.shape[1])
        return Effects(self.with_classes(classes).sums + other.with_classes(classes).sums)

    @property
    def samples(self) -> Float[Tensor, " intervention"]:
        """The number of samples that each intervention was measured on."""
        return self.sums[..., 1].sum(1)

    @property
    def mean(self) -> Float[Tensor, " intervention"]:
        """The mean over samples; NaN where there was none."""
        whole = self.sums.sum(1)
        return whole[:, 2] / whole[:, 1]

    @property
    def mean_by_class(self) -> Float[Tensor, "klass intervention"]:
        """The mean over the samples of each class; NaN where there was none."""
        return (self.sums[..., 2] / self.sums[..., 1]).t()

    @property
    def standard_error(self) -> Float[Tensor, " intervention"]:
        """The standard error of ``mean``; NaN with fewer than two values."""
        return _standard_error(self.sums.sum(1))

    @property
    def standard_error_by_class(self) -> Float[Tensor, "klass intervention"]:
        """The standard error of ``mean_by_class``."""
        return _standard_error(self.sums).t()


def _standard_error(sums: Tensor) -> Tensor:
    """Return that of a weighted mean: sum of w^2 (x - mean)^2 over (sum of w)^2, times n / (n - 1)."""
    n, w, wx, ww, wwx, wwxx = sums.unbind(-1)
    mean = wx / w
    spread = (wwxx - 2 * mean * wwx + mean * mean * ww).clamp_min(0)
    return torch.where(n > 1, (spread / (w * w) * n / (n - 1)).sqrt(), torch.nan)
