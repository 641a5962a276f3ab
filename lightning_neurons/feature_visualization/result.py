"""The result of ``maximize_activation``: images, and the activations that they reach."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.feature_visualization.value_range import Range


@dataclass(frozen=True, eq=False)
class MaximizedActivation:
    """Images, one row for each target and seed: the seeds of the first target, then those of the next.

    Attributes:
        targets: The target of each row, in words.
        seeds: The seed of each row.
        images: The images, in the range of the data.
        activations: The activation on each, unmoved: logit, probability or mean activation over positions.
        trajectory: The same at every step, on the moved images; a neuron that is still silent shows what is in front
            of its activation function, below zero.
        frames: Images along the way, the start first and the result last; none unless asked for.
        data_maximum: The largest activation on any of the images that were given, by row; NaN without any.
        data_p99: The 99th percentile over them, by row.
        data_activations: Activations on all of them, by row and image.
        range: The values that images may have.
        notes: The rows that stopped early, and why.
    """

    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    images: Float[Tensor, "row ..."]
    activations: Float[Tensor, " row"]
    trajectory: Float[Tensor, "step row"]
    frames: Float[Tensor, "frame row ..."]
    data_maximum: Float[Tensor, " row"]
    data_p99: Float[Tensor, " row"]
    data_activations: Float[Tensor, "row image"]
    range: Range
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        reached = ", ".join(f"{t}: {a:.4g}" for t, a in zip(self.targets, self.activations.tolist(), strict=True))
        return f"MaximizedActivation({reached})"

    @cached_property
    def best(self) -> int:
        """The index of the row of the first target that reaches most."""
        rows = [row for row, target in enumerate(self.targets) if target == self.targets[0]]
        reached = self.activations[rows].nan_to_num(-torch.inf)
        return rows[int(reached.argmax())]

    @property
    def image(self) -> Float[Tensor, "..."]:
        """The best image for the first target, ``(channel, *space)``, in the range of the data."""
        return self.images[self.best]

    @property
    def activation(self) -> float:
        """The activation on ``image``."""
        return float(self.activations[self.best])

    @property
    def inputs(self) -> Float[Tensor, "row ..."]:
        """The images as the model takes them: normalised."""
        return self.range.inputs(self.images)

    @property
    def shown(self) -> Float[Tensor, "row ..."]:
        """The images in [0, 1]."""
        return self.range.shown(self.images)
