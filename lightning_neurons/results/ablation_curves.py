"""Results of ablations of sets of neurons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class JointAblation:
    """The measured effect of switching sets of neurons off.

    Attributes:
        loss: Mean loss of the unchanged model.
        samples: Number of samples it was measured on.
        delta_loss: For each set, the mean loss without it, minus the mean loss.
        standard_error: Of ``delta_loss`` over samples.
        neurons: The sets, by layer.
    """

    loss: float
    samples: int
    delta_loss: Float[Tensor, " set"]
    standard_error: Float[Tensor, " set"]
    neurons: tuple[Mapping[str, Sequence[int]], ...]


@dataclass(frozen=True)
class AblationCurves:
    """Mean loss by the share of neurons that are off.

    Attributes:
        shares: The shares, from 0 to 1.
        least_first: Losses when the least important go first.
        most_first: Losses when the most important go first.
        random: Losses in random orders.

    Example:
        >>> flat = torch.ones(3)
        >>> AblationCurves(torch.tensor([0.0, 0.5, 1.0]), flat, 2 * flat, flat[None]).areas["most_first"]
        2.0
    """

    shares: Float[Tensor, " point"]
    least_first: Float[Tensor, " point"]
    most_first: Float[Tensor, " point"]
    random: Float[Tensor, "order point"]

    @property
    def areas(self) -> dict[str, float]:
        """The area under each curve, by the trapezoidal rule; of the random orders, the mean."""
        curves = {"least_first": self.least_first, "most_first": self.most_first, "random": self.random.mean(0)}
        return {name: float(torch.trapezoid(curve, self.shares)) for name, curve in curves.items()}
