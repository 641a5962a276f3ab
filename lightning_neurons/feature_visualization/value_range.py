"""From a latent picture to one in the range of the data, and what the model sees of it."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from lightning_neurons.feature_visualization.parametrization import Latent, Parametrization

Validity = Literal["sigmoid", "clip"]
VALIDITIES: tuple[Validity, ...] = get_args(Validity)

_LARGEST = 0.5 - 1e-3
"""How near to the bounds a given picture may lie, in units of the range: a sigmoid would need infinity to get there."""


@dataclass(frozen=True, eq=False)
class Range:
    """The values that pictures may have, and how the model's inputs are made of them.

    Attributes:
        low: The least value.
        high: The largest value.
        mean: Of the normalisation, by channel: inputs are (picture - mean) / std.
        std: The same.
        validity: How latent values are brought between the two: a ``"sigmoid"``, or ``"clip"``.
    """

    low: float
    high: float
    mean: Float[Tensor, " channel"]
    std: Float[Tensor, " channel"]
    validity: Validity

    def valid(self, latent: Latent) -> Latent:
        """Pictures in the range. Both kinds have a slope of a quarter of the range in the middle, where latent is 0."""
        share = latent.sigmoid() if self.validity == "sigmoid" else 0.5 + latent / 4
        return (self.low + (self.high - self.low) * share).clamp(self.low, self.high)

    def latent(self, pictures: Latent) -> Latent:
        """The latent pictures that become these, as far as there are any."""
        share = ((pictures - self.low) / (self.high - self.low) - 0.5).clamp(-0.5, 0.5)
        return (share.clamp(-_LARGEST, _LARGEST) + 0.5).logit() if self.validity == "sigmoid" else 4 * share

    def projected(self, raw: Tensor, parametrization: Parametrization) -> Tensor:
        """What describes the nearest valid pictures, after a step of the optimizer."""
        return parametrization.encode(parametrization.decode(raw).clamp(-2, 2))

    def inputs(self, pictures: Latent) -> Latent:
        """What the model sees of pictures."""
        return (pictures - _by_channel(self.mean, pictures)) / _by_channel(self.std, pictures)

    def pictures(self, inputs: Latent) -> Latent:
        """The pictures that the model has seen as ``inputs``."""
        return inputs * _by_channel(self.std, inputs) + _by_channel(self.mean, inputs)

    def shown(self, pictures: Latent) -> Latent:
        """Pictures in [0, 1]."""
        return (pictures - self.low) / (self.high - self.low)


def _by_channel(values: Tensor, pictures: Tensor) -> Tensor:
    return values.to(pictures) if pictures.ndim < 3 else values.to(pictures).view(-1, *[1] * (pictures.ndim - 2))
