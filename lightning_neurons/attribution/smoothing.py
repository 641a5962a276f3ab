"""Gaussian smoothing over positions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def gaussian_blur(values: Float[Tensor, "batch channel *space"], sigma: float) -> Float[Tensor, "batch channel *space"]:
    """Convolve each channel with a Gaussian along every axis of space; edges are repeated.

    Args:
        values: Images, signals or volumes.
        sigma: Standard deviation in positions; 0 changes nothing.

    Returns:
        Values of the same shape.

    Example:
        >>> gaussian_blur(torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]), 0.5)
        tensor([[[2.6387e-04, 1.0645e-01, 7.8657e-01, 1.0645e-01, 2.6387e-04]]])
    """
    if sigma <= 0:
        return values
    reach = max(1, round(3 * sigma))
    place = torch.arange(-reach, reach + 1, dtype=values.dtype, device=values.device)
    weights = (-0.5 * (place / sigma).square()).exp()
    weights = (weights / weights.sum()).view(1, 1, -1)
    for axis in range(2, values.ndim):
        lines = values.movedim(axis, -1)
        shape = lines.shape
        padded = nn.functional.pad(lines.reshape(-1, 1, shape[-1]), (reach, reach), mode="replicate")
        values = nn.functional.conv1d(padded, weights).view(shape).movedim(-1, axis)
    return values
