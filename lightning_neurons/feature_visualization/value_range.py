"""The range of the data: latent images brought into it, and the model's inputs made of those."""

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from lightning_neurons.feature_visualization.parametrization import Latent, Parametrization

Validity = Literal["sigmoid", "clip"]
VALIDITIES: tuple[Validity, ...] = get_args(Validity)

_LARGEST = 0.5 - 1e-3
"""Largest distance of a given image from the middle, in units of the range: a sigmoid never gets to the bounds."""


@dataclass(frozen=True, eq=False)
class Range:
    """The values that images may have, and how the model's inputs are made of them.

    Attributes:
        low: The least value.
        high: The largest value.
        mean: Of the normalisation, by channel: inputs are (image - mean) / std.
        std: The standard deviation of the same, likewise.
        validity: The way in which latent values are brought between the two: ``"sigmoid"`` or ``"clip"``.
    """

    low: float
    high: float
    mean: Float[Tensor, " channel"]
    std: Float[Tensor, " channel"]
    validity: Validity

    def valid(self, latent: Latent) -> Latent:
        """Bring latent images into the range; the slope in its middle, where latent is 0, is a quarter of the range.

        Returns:
            Images of the same shape, in the units of the inputs of the model, with no value outside ``low`` to
            ``high``.
        """
        share = latent.sigmoid() if self.validity == "sigmoid" else 0.5 + latent / 4
        return (self.low + (self.high - self.low) * share).clamp(self.low, self.high)

    def latent(self, images: Latent) -> Latent:
        """Return the latent images that become these, as far as there are any."""
        share = ((images - self.low) / (self.high - self.low) - 0.5).clamp(-0.5, 0.5)
        return (share.clamp(-_LARGEST, _LARGEST) + 0.5).logit() if self.validity == "sigmoid" else 4 * share

    def projected(self, raw: Tensor, parametrization: Parametrization) -> Tensor:
        """Return the parameters of the nearest valid images, after a step of the optimizer."""
        return parametrization.encode(parametrization.decode(raw).clamp(-2, 2))

    def inputs(self, images: Latent) -> Latent:
        """Return the model's inputs for images, normalised."""
        return (images - _by_channel(self.mean, images)) / _by_channel(self.std, images)

    def pictures(self, inputs: Latent) -> Latent:
        """Return the images of the model's inputs, without the normalisation."""
        return inputs * _by_channel(self.std, inputs) + _by_channel(self.mean, inputs)

    def shown(self, images: Latent) -> Latent:
        """Return the images in [0, 1]."""
        return (images - self.low) / (self.high - self.low)


def _by_channel(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images) if images.ndim < 3 else values.to(images).view(-1, *[1] * (images.ndim - 2))
