"""The start of an optimisation: the shape of an image, its parametrization and its first values.

Colours, spectrum and the objectives' values of the user's own images may set them.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from lightning_neurons.attribution.objective import Objective
from lightning_neurons.attribution.readout import Readout
from lightning_neurons.data.batches import inputs_of
from lightning_neurons.errors import ArgumentError, check_choice, check_count
from lightning_neurons.feature_visualization.parametrization import (
    Colours,
    Fourier,
    Latent,
    Maco,
    Parametrization,
    ParametrizationKind,
    Pixel,
)
from lightning_neurons.feature_visualization.value_range import Range

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
        raise ArgumentError.of("images", type(images).__name__, "a tensor (image, ...), or an iterable of batches")
    shape: torch.Size | None = None
    for batch in images:
        inputs = inputs_of(batch)
        if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not inputs.is_floating_point():
            got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ArgumentError.of("images", got, "images of floating point, (image, ...), or batches of them")
        shape = inputs.shape[1:] if shape is None else shape
        if inputs.shape[1:] != shape:
            raise ArgumentError.of("images", tuple(inputs.shape[1:]), f"images of one shape, {tuple(shape)}")
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


def activations_on(
    readout: Readout, objectives: Sequence[Objective], batches: Iterable[Tensor]
) -> Float[Tensor, "objective image"]:
    """Return every objective on every image. Open the readout around it.

    Args:
        readout: The model.
        objectives: The objectives.
        batches: Inputs, as the model takes them.

    Returns:
        Values in the units of the objectives, on the CPU.
    """
    columns = []
    parameter = next((p for p in readout.model.parameters() if p.is_floating_point()), torch.zeros(0))
    with torch.no_grad():
        for batch in batches:
            outputs, activations = readout(batch.to(parameter.device, parameter.dtype))
            read = [objective.read(outputs, activations, readout.layers, len(batch)) for objective in objectives]
            columns.append(torch.stack(read).float().cpu())
    return torch.cat(columns, 1)


STARTS = ("noise", "grey")


def shape_of(input_shape: Any, images: Tensor | None) -> tuple[int, ...]:
    """Return the shape of one input.

    Raises:
        ArgumentError: If neither it nor images are given, or the two differ.
    """
    if input_shape is None:
        if images is None:
            raise ArgumentError.of("input_shape", None, "the shape of one input, such as (3, 32, 32), or images=")
        return tuple(images.shape[1:])
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str) or not input_shape:
        raise ArgumentError.of("input_shape", input_shape, "the shape of one input, such as (3, 32, 32)")
    shape = tuple(check_count("input_shape", length) for length in input_shape)
    if images is not None and shape != tuple(images.shape[1:]):
        raise ArgumentError.of("input_shape", shape, f"{tuple(images.shape[1:])}, as images have, or None")
    return shape


def parametrization_of(kind: ParametrizationKind, shape: tuple[int, ...], latent: Tensor | None) -> Parametrization:
    """Return a parametrization of images; ``latent`` are the user's own."""
    if kind == "pixel":
        return Pixel(shape)
    colours = colours_of(latent, shape[0])
    if kind == "fourier":
        return Fourier(shape, colours)
    assert latent is not None, "checked by the settings"
    spectrum = spectrum_of(latent, colours)
    return Maco(shape, colours, spectrum.magnitudes, spectrum.mean)


def start_of(
    start: Any, described: Parametrization, valid: Range, shape: tuple[int, ...], generators: Sequence[torch.Generator]
) -> Tensor:
    """Return the values that are optimised, before the first step, one row for each generator.

    Raises:
        ArgumentError: If it is no start, or an image of another shape or range.
    """
    noise = described.noise(generators)
    if isinstance(start, Tensor):
        if tuple(start.shape) != shape:
            raise ArgumentError.of("start", tuple(start.shape), f"an image of shape {shape}")
        low, high = float(start.min()), float(start.max())
        if not valid.low <= low <= high <= valid.high:
            allowed = f"an image with values from {valid.low:.3g} to {valid.high:.3g}, before normalisation"
            raise ArgumentError.of("start", f"values from {low:.3g} to {high:.3g}", allowed)
        latent = valid.latent(start.detach().cpu().float()[None])
        return described.encode(latent).expand_as(noise).clone()
    if not isinstance(start, str):
        raise ArgumentError.of("start", start, '"noise", "grey" or an image')
    check_choice("start", start, STARTS)
    if start == "noise":
        return noise
    if isinstance(described, Maco):
        raise ArgumentError.of("start", start, '"noise" or an image with parametrization="maco", which has no grey')
    return torch.zeros_like(noise)
