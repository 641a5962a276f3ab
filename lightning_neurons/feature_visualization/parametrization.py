"""Parametrizations of the image that is optimised, which decide how it looks.

A *latent* image has no bounds; ``value_range.py`` brings it into the data's range. Fourier coefficients scaled by
1 / frequency make all frequencies change at the same pace, and decorrelated colours do the same for colours (Olah et
al. 2017, "Feature Visualization", distill.pub). MACO (Fel et al. 2023, arXiv:2306.06805) optimises phases alone:
magnitudes are those of real images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

ParametrizationKind = Literal["pixel", "fourier", "maco"]
KINDS: tuple[ParametrizationKind, ...] = get_args(ParametrizationKind)

Latent = Float[Tensor, "row channel ..."]

_START = 0.01
"""Standard deviation of the noise that Fourier coefficients and pixels start from."""


class Parametrization(Protocol):
    """A map between the values that are optimised and a latent image."""

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw a random start for each row."""

    def encode(self, latent: Latent) -> Tensor:
        """Return the parameters that describe given images."""

    def decode(self, raw: Tensor) -> Latent:
        """Return the images that parameters describe."""


@dataclass(frozen=True, eq=False)
class Colours:
    """A change of channels to axes that are not correlated in real images.

    Attributes:
        mix: From decorrelated channels to those of the model, ``(channel, channel)``.
    """

    mix: Float[Tensor, "channel _"]

    def mixed(self, plain: Latent) -> Latent:
        """Turn decorrelated channels into real ones.

        Returns:
            Images of the same shape, in correlated colours.
        """
        return torch.einsum("ij,nj...->ni...", self.mix.to(plain), plain)

    def plain(self, mixed: Latent) -> Latent:
        """Turn real channels into decorrelated ones.

        Returns:
            Images of the same shape, in decorrelated colours; the inverse of ``mixed``.
        """
        return torch.einsum("ij,nj...->ni...", torch.linalg.inv(self.mix).to(mixed), mixed)


@dataclass(frozen=True, eq=False)
class Pixel:
    """A parametrization by each value itself.

    Attributes:
        shape: Of one sample.
    """

    shape: tuple[int, ...]

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw a random start for each row.

        Returns:
            Latent pixels ``(row, channel, *space)``, normal and small.
        """
        return _START * torch.stack([torch.randn(self.shape, generator=g, dtype=torch.float32) for g in generators])

    def encode(self, latent: Latent) -> Tensor:
        """Return the parameters that describe given images."""
        return latent.clone()

    def decode(self, raw: Tensor) -> Latent:
        """Return the images that parameters describe."""
        return raw


class Fourier:
    """A parametrization by Fourier coefficients of decorrelated colours, scaled by 1 / frequency.

    Args:
        shape: Of one sample: channels and positions.
        colours: Of the images.
    """

    def __init__(self, shape: tuple[int, ...], colours: Colours) -> None:
        self.shape, self.colours = shape, colours
        self._axes = tuple(range(-len(shape) + 1, 0))
        frequency = frequencies(shape[1:])
        self._scale = _contrast(shape) / frequency.clamp_min(1 / max(shape[1:]))

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw a random start for each row.

        Returns:
            Coefficients ``(row, channel, *frequency, 2)``: real and imaginary parts along the last axis.
        """
        shape = (self.shape[0], *self._scale.shape, 2)
        return _START * torch.stack([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])

    def encode(self, latent: Latent) -> Tensor:
        """Return the parameters that describe given images."""
        spectrum = torch.fft.rfftn(self.colours.plain(latent), dim=self._axes, norm="ortho")
        return torch.view_as_real(spectrum / self._scale.to(latent.device)).clone()

    def decode(self, raw: Tensor) -> Latent:
        """Return the images that parameters describe."""
        spectrum = torch.view_as_complex(raw) * self._scale.to(raw.device)
        return self.colours.mixed(torch.fft.irfftn(spectrum, s=self.shape[1:], dim=self._axes, norm="ortho"))


class Maco:
    """A parametrization by phases; the magnitudes are those of real images.

    Args:
        shape: Of one sample: channels and positions.
        colours: Of the images.
        magnitudes: Mean magnitude of the images' spectrum, in decorrelated colours, ``(channel, *frequency)``.
        mean: Mean latent value of each channel.
    """

    def __init__(self, shape: tuple[int, ...], colours: Colours, magnitudes: Tensor, mean: Tensor) -> None:
        self.shape, self.colours, self.magnitudes = shape, colours, magnitudes
        self._mean = mean.view(-1, *[1] * (len(shape) - 1))
        self._axes = tuple(range(-len(shape) + 1, 0))

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw random phases for each row.

        Returns:
            Phases ``(row, *magnitudes)`` in radians, uniform from -pi to pi.
        """
        shape = self.magnitudes.shape
        drawn = [torch.rand(shape, generator=g, dtype=torch.float32) for g in generators]
        return torch.pi * (2 * torch.stack(drawn) - 1)

    def encode(self, latent: Latent) -> Tensor:
        """Return the phases of given images."""
        plain = self.colours.plain(latent - self._mean.to(latent))
        spectrum: Tensor = torch.fft.rfftn(plain, dim=self._axes, norm="ortho")
        return spectrum.angle()

    def decode(self, raw: Tensor) -> Latent:
        """Return the images that parameters describe."""
        spectrum = torch.polar(self.magnitudes.to(raw).expand_as(raw), raw)
        plain = torch.fft.irfftn(spectrum, s=self.shape[1:], dim=self._axes, norm="ortho")
        return self.colours.mixed(plain) + self._mean.to(raw)


def frequencies(space: Sequence[int]) -> Float[Tensor, "..."]:
    """Return the frequency of each coefficient of a real image, in cycles per position.

    Example:
        >>> frequencies((4,)), frequencies((4, 4)).shape
        (tensor([0.0000, 0.2500, 0.5000]), torch.Size([4, 3]))
    """
    squares = torch.fft.rfftfreq(space[-1], dtype=torch.float32).square()
    for length in reversed(space[:-1]):
        squares = torch.fft.fftfreq(length, dtype=torch.float32).square().view(-1, *[1] * squares.ndim) + squares
    root: Tensor = squares.sqrt()
    return root


def _contrast(shape: tuple[int, ...]) -> float:
    """Return the factor by which a step of the optimizer changes images of any size by the same amount."""
    count = frequencies(shape[1:]).clamp_min(1 / max(shape[1:])).pow(-2).mean().sqrt()
    return float(1 / count)
