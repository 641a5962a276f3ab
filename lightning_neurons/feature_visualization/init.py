"""The start of an optimisation: the shape of an image, its parametrization and its first values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.errors import ArgumentError, check_choice, check_count
from lightning_neurons.feature_visualization.parametrization import Fourier, Kind, Maco, Parametrization, Pixel
from lightning_neurons.feature_visualization.reference import colours_of, spectrum_of
from lightning_neurons.feature_visualization.value_range import Range

STARTS = ("noise", "grey")


def shape_of(input_shape: Any, pictures: Tensor | None) -> tuple[int, ...]:
    """Return the shape of one input.

    Raises:
        ArgumentError: If neither it nor images are given, or the two differ.
    """
    if input_shape is None:
        if pictures is None:
            raise ArgumentError.of("input_shape", None, "the shape of one input, such as (3, 32, 32), or images=")
        return tuple(pictures.shape[1:])
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str) or not input_shape:
        raise ArgumentError.of("input_shape", input_shape, "the shape of one input, such as (3, 32, 32)")
    shape = tuple(check_count("input_shape", length) for length in input_shape)
    if pictures is not None and shape != tuple(pictures.shape[1:]):
        raise ArgumentError.of("input_shape", shape, f"{tuple(pictures.shape[1:])}, as images have, or None")
    return shape


def parametrization_of(kind: Kind, shape: tuple[int, ...], latent: Tensor | None) -> Parametrization:
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
            raise ArgumentError.of("start", tuple(start.shape), f"a picture of shape {shape}")
        low, high = float(start.min()), float(start.max())
        if not valid.low <= low <= high <= valid.high:
            allowed = f"a picture with values from {valid.low:.3g} to {valid.high:.3g}, before normalisation"
            raise ArgumentError.of("start", f"values from {low:.3g} to {high:.3g}", allowed)
        latent = valid.latent(start.detach().cpu().float()[None])
        return described.encode(latent).expand_as(noise).clone()
    if not isinstance(start, str):
        raise ArgumentError.of("start", start, '"noise", "grey" or a picture')
    check_choice("start", start, STARTS)
    if start == "noise":
        return noise
    if isinstance(described, Maco):
        raise ArgumentError.of("start", start, '"noise" or a picture with parametrization="maco", which has no grey')
    return torch.zeros_like(noise)
