"""Small random movements of an image, so that it excites a neuron not at one exact place only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.errors import ArgumentError, is_number
from lightning_neurons.feature_visualization.parametrization import Latent

_AXES, _DRAWS = 3, 5  # jitter along up to three axes, scale, rotation
_LEAST_SIDE = 16  # of images that bear to be interpolated


@dataclass(frozen=True)
class Robustness:
    """Largest movements of images, which are moved at each step by another random amount.

    Attributes:
        jitter: By at most so many positions along each axis.
        scale: Grown or shrunk by at most this share.
        rotation: Turned by at most so many degrees.
    """

    jitter: float
    scale: float
    rotation: float

    @classmethod
    def checked(
        cls, space: Sequence[int], jitter: float | None, scale: float | None, rotation: float | None
    ) -> "Robustness":
        """Return the amounts, checked; None takes what suits the size of the images.

        Raises:
            ArgumentError: If one is negative or too large, or needs two axes of positions.
        """
        plane = len(space) == 2
        turned = plane and min(space) >= _LEAST_SIDE
        largest = min(space, default=0) // 2
        defaults = {
            "jitter": (jitter, largest, min(space, default=0) // 16),
            "scale": (scale, 0.9, 0.05 if turned else 0.0),
            "rotation": (rotation, 180, 5.0 if turned else 0.0),
        }
        for name, (amount, most, _) in defaults.items():
            if amount is not None and (not is_number(amount) or not 0 <= amount <= most):
                raise ArgumentError.of(name, amount, f"a number in [0, {most}]")
            if amount and name != "jitter" and not plane:
                raise ArgumentError.of(name, amount, "0 or None for inputs without two axes of positions")
        return cls(*(float(default if amount is None else amount) for amount, _, default in defaults.values()))

    def draws(self, generators: Sequence[torch.Generator], steps: int) -> Float[Tensor, "step row amount"]:
        """Draw random amounts for all steps; those of a row are the same whatever the other rows are.

        Returns:
            Amounts in [-1, 1], float32, as shares of the largest jitter, scale and rotation.
        """
        return torch.stack([2 * torch.rand(steps, _DRAWS, generator=g, dtype=torch.float32) - 1 for g in generators], 1)

    def applied(self, images: Latent, draws: Float[Tensor, "row amount"]) -> Latent:
        """Move images by random amounts.

        Returns:
            Images of the same shape; the very same ones where nothing is to be moved.
        """
        space = images.shape[2:]
        if len(space) == 2 and (self.jitter or self.scale or self.rotation):
            return self._moved(images, draws.to(images))
        if space and self.jitter:
            shifts = (self.jitter * draws).round().int().tolist()
            axes = tuple(range(1, 1 + min(len(space), _AXES)))
            rows = zip(images, shifts, strict=True)
            return torch.stack([image.roll(shift[: len(axes)], axes) for image, shift in rows])
        return images

    def _moved(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[2:]
        shift = 2 * self.jitter * draws[:, :2] / draws.new_tensor([width, height])
        angle = math.radians(self.rotation) * draws[:, _AXES + 1]
        zoom = 1 / (1 + self.scale * draws[:, _AXES])
        # Places are in halves of the sides, which need not be equal.
        across, down = -angle.sin() * height / width, angle.sin() * width / height
        turn = torch.stack([angle.cos(), across, down, angle.cos()], 1).view(-1, 2, 2)
        transform = torch.cat([zoom[:, None, None] * turn, shift[:, :, None]], 2)
        grid = nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
