"""Statistics of the user's own images: colours, spectrum, and the objectives' values on them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from lightning_neurons.attribution.objective import Aim
from lightning_neurons.attribution.readout import Readout
from lightning_neurons.data.batches import inputs_of
from lightning_neurons.errors import ArgumentError
from lightning_neurons.feature_visualization.parametrization import Colours, Latent

_PART = 64
_MOST_FOR_STATISTICS = 512
_LEAST_VARIANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The mean spectrum of images.

    Attributes:
        magnitudes: In decorrelated colours, ``(channel, *frequency)``.
        mean: Mean latent value of each channel.
    """

    magnitudes: Float[Tensor, "channel ..."]
    mean: Float[Tensor, " channel"]


def batches_of(images: Any) -> Iterator[Tensor]:
    """Yield the inputs of a tensor of images, or of an iterable of batches.

    Raises:
        ArgumentError: If it is neither, or a batch has no tensor of inputs.
    """
    if isinstance(images, Tensor):
        images = [images]
    if isinstance(images, Dataset | str | dict) or not isinstance(images, Iterable):
        raise ArgumentError.of("images", type(images).__name__, "a tensor (picture, ...), or an iterable of batches")
    shape: torch.Size | None = None
    for batch in images:
        inputs = inputs_of(batch)
        if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not inputs.is_floating_point():
            got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ArgumentError.of("images", got, "pictures of floating point, (picture, ...), or batches of them")
        shape = inputs.shape[1:] if shape is None else shape
        if inputs.shape[1:] != shape:
            raise ArgumentError.of("images", tuple(inputs.shape[1:]), f"pictures of one shape, {tuple(shape)}")
        if not bool(inputs.isfinite().all()):
            raise ArgumentError.of("images", "NaN or infinite values", "finite values")
        yield from inputs.split(_PART) if len(inputs) else ()


def some_of(batches: Sequence[Tensor]) -> Tensor:
    """Return enough images for statistics: evenly spread, at most 512."""
    everything = sum(map(len, batches))
    step = -(-everything // _MOST_FOR_STATISTICS)
    starts = itertools.accumulate(map(len, batches), initial=0)
    return (
        torch.cat([batch[-start % step :: step] for batch, start in zip(batches, starts, strict=False)]).float().cpu()
    )


def colours_of(latent: Latent | None, channels: int) -> Colours:
    """Return the axes along which the colours of images are not correlated; plain channels without any.

    Scaled so that the longest axis has length 1 (Olah et al. 2017).
    """
    if latent is None or channels == 1 or latent.ndim < 3:
        return Colours(torch.eye(channels, dtype=torch.float32))
    values = latent.movedim(1, -1).reshape(-1, channels).double()
    variances, axes = torch.linalg.eigh(torch.cov(values.T))
    floor = _LEAST_VARIANCE * variances.max().clamp_min(torch.finfo(torch.float32).tiny)
    mix = axes * variances.clamp_min(floor).sqrt()
    return Colours((mix / mix.norm(dim=0).max()).float())


def spectrum_of(latent: Latent, colours: Colours) -> Spectrum:
    """Return the mean spectrum of images, and their mean colour."""
    mean = latent.movedim(1, -1).reshape(-1, latent.shape[1]).mean(0)
    centred = colours.plain(latent - mean.view(-1, *[1] * (latent.ndim - 2)))
    magnitudes = torch.fft.rfftn(centred, dim=tuple(range(2, latent.ndim)), norm="ortho").abs().mean(0)
    return Spectrum(magnitudes, mean)


def activations_on(readout: Readout, aims: Sequence[Aim], batches: Iterable[Tensor]) -> Float[Tensor, "aim picture"]:
    """Return every objective on every image. Open the readout around it.

    Args:
        readout: The model.
        aims: The objectives.
        batches: Inputs, as the model takes them.

    Returns:
        Values in the units of the objectives, on the CPU.
    """
    found = []
    parameter = next((p for p in readout.model.parameters() if p.is_floating_point()), torch.zeros(0))
    with torch.no_grad():
        for batch in batches:
            outputs, activations = readout(batch.to(parameter.device, parameter.dtype))
            read = [aim.read(outputs, activations, readout.layers, len(batch)) for aim in aims]
            found.append(torch.stack(read).float().cpu())
    return torch.cat(found, 1)
