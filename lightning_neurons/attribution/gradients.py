"""Attributions that are gradients with respect to the inputs.

Gradient: Simonyan et al. 2013, arXiv:1312.6034. SmoothGrad: Smilkov et al. 2017, arXiv:1706.03825.
"""

import torch

from lightning_neurons.attribution.request import Question, Values


def vanilla(question: Question) -> Values:
    """Return the gradient itself."""
    values = question.entrance.values
    return torch.cat([question.gradient(values[rows], rows)[1] for rows in question.parts()])


def smoothgrad(question: Question, samples: int, noise: float, seed: int) -> Values:
    """Return the mean gradient over noisy copies of each sample.

    Args:
        question: The question.
        samples: Number of copies.
        noise: Standard deviation of the noise, as a share of each sample's range of values.
        seed: Of the noise.

    Returns:
        Shaped like what is explained.
    """
    if noise == 0:
        return vanilla(question)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows in question.parts():
        values = question.entrance.values[rows]
        flat = values.flatten(1)
        deviation = (noise * (flat.amax(1) - flat.amin(1))).view(-1, *[1] * (values.ndim - 1))
        total = torch.zeros_like(values)
        for _ in range(samples):
            drawn = torch.randn(values.shape, generator=generator).to(values)
            total += question.gradient(values + deviation * drawn, rows)[1]
        found.append(total / samples)
    return torch.cat(found)
