"""Regularisers that keep optimised images smooth and near grey."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.feature_visualization.parametrization import Latent


def total_variation(shown: Latent) -> Float[Tensor, " row"]:
    """Return the mean magnitude of the difference between neighbours, summed over axes.

    Args:
        shown: Images in [0, 1].

    Returns:
        One value per image, in units of the range.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
        tensor([1.])
    """
    axes = [axis for axis in range(2, shown.ndim) if shown.shape[axis] > 1]
    parts = [shown.diff(dim=axis).abs().flatten(1).mean(1) for axis in axes]
    return torch.stack(parts).sum(0) if parts else shown.new_zeros(len(shown))


def distance_from_grey(shown: Latent) -> Float[Tensor, " row"]:
    """Return the mean square of the distance from the middle of the range.

    Args:
        shown: Images in [0, 1].

    Returns:
        One value per image, in units of the squared range.

    Example:
        >>> distance_from_grey(torch.tensor([[[0.5, 1.0]]]))
        tensor([0.1250])
    """
    return (shown - 0.5).square().flatten(1).mean(1)
