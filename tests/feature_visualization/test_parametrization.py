"""How pictures are described: there and back, and what stays fixed."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_neurons import maximize_activation
from lightning_neurons.feature_visualization.init import colours_of, spectrum_of
from lightning_neurons.feature_visualization.parametrization import Colours, Fourier, Maco, Pixel, frequencies
from tests.models import ConvNet, seeded
from tests.tables import for_each

SPACES = [(8,), (7,), (1,), (6, 8), (5, 7), (8, 5), (1, 4), (4, 4, 4), (3, 5, 7), (2, 3, 4)]
SHAPES = [(channels, *space) for channels in (1, 3, 5) for space in SPACES]
with_shapes = for_each("shape", SHAPES)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def some_colours(channels):
    """An invertible mixture that is not orthogonal."""
    return Colours(torch.eye(channels) + 0.2 * torch.rand(channels, channels))


def whitened(shape, count=9):
    """Latent pictures with correlated channels, and their colours."""
    latent = torch.randn(count, *shape).cumsum(1) + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    return latent, colours_of(latent, shape[0])


@with_shapes
@for_each("kind", ["pixel", "fourier"])
def test_pictures_survive_the_way_there_and_back(kind, shape):
    described = Pixel(shape) if kind == "pixel" else Fourier(shape, some_colours(shape[0]))
    latent = torch.randn(4, *shape)
    raw = described.encode(latent)
    torch.testing.assert_close(described.decode(raw), latent, atol=1e-4, rtol=1e-4)
    assert raw.shape == described.noise(generators(1, 2, 3, 4)).shape
    assert raw.data_ptr() != latent.data_ptr()


@with_shapes
def test_noise_of_a_row_depends_on_its_seed_alone_and_is_faint(shape):
    colours = Colours(torch.eye(shape[0]))
    for described in (Pixel(shape), Fourier(shape, colours)):
        both, one = described.noise(generators(5, 6)), described.noise(generators(6))
        assert torch.equal(both[1:], one)
        assert not torch.equal(both[0], both[1])
        assert described.decode(both).shape == (2, *shape)
        assert described.decode(both).abs().max() < 1


def by_numpy(space):
    axes = [np.fft.fftfreq(n) for n in space[:-1]] + [np.fft.rfftfreq(space[-1])]
    found = np.zeros([len(axis) for axis in axes])
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        found[place] = math.sqrt(sum(axis[i] ** 2 for axis, i in zip(axes, place, strict=True)))
    return torch.tensor(found).float()


@for_each("space", SPACES)
def test_frequencies_are_those_of_numpy(space):
    torch.testing.assert_close(frequencies(space), by_numpy(space))


@for_each("space", [(8,), (7,), (6, 8), (5, 7), (3, 4, 5)])
def test_fourier_coefficients_are_scaled_by_one_over_frequency(space):
    described = Fourier((1, *space), Colours(torch.eye(1)))
    raw = torch.zeros(1, 1, *frequencies(space).shape, 2)
    raw[..., 0] = 1
    pictures = described.decode(raw)
    found = torch.fft.rfftn(pictures, dim=tuple(range(2, pictures.ndim)), norm="ortho").abs()[0, 0]
    scaled = found * by_numpy(space).clamp_min(1 / max(space))
    torch.testing.assert_close(scaled, scaled.mean().expand_as(scaled), atol=1e-4, rtol=1e-4)


@for_each("size", [8, 16, 32, 64])
def test_the_contrast_of_noise_is_about_the_same_at_every_size(size):
    described = Fourier((3, size, size), Colours(torch.eye(3)))
    pictures = described.decode(described.noise(generators(*range(20))))
    assert 0.005 < pictures.std() < 0.03


@for_each("shape", [(3, 6, 6), (5, 4, 7), (3, 20), (2, 3, 4, 5)])
def test_colours_are_not_correlated_in_the_pictures_they_come_from(shape):
    latent, colours = whitened(shape)
    plain = colours.plain(latent).movedim(1, -1).reshape(-1, shape[0]).double()
    plain = plain - plain.mean(0)
    covariance = plain.T @ plain / (len(plain) - 1)
    spread = covariance.diagonal().sqrt()
    correlation = covariance / spread[:, None] / spread
    torch.testing.assert_close(correlation, torch.eye(shape[0], dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(spread, spread.mean().expand_as(spread), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(colours.mixed(colours.plain(latent)), latent, atol=1e-3, rtol=1e-3)
    assert colours.mix.norm(dim=0).max().item() == pytest.approx(1)


@for_each("latent", [None, torch.rand(4, 3)])
def test_colours_are_plain_channels_where_nothing_is_known(latent):
    assert torch.equal(colours_of(latent, 3).mix, torch.eye(3))


def test_mixed_colours_against_a_loop():
    colours, plain = some_colours(3), torch.randn(2, 3, 4, 5)
    mixed = colours.mixed(plain)
    for i in range(3):
        torch.testing.assert_close(mixed[:, i], sum(colours.mix[i, j] * plain[:, j] for j in range(3)))


@for_each("latent", [torch.zeros(4, 3, 5, 5), torch.rand(4, 1, 5, 5).expand(4, 3, 5, 5)])
def test_colours_of_pictures_without_any_can_still_be_inverted(latent):
    colours = colours_of(latent, 3)
    assert colours.mix.isfinite().all()
    back = colours.mixed(colours.plain(torch.ones(1, 3, 2, 2)))
    torch.testing.assert_close(back, torch.ones(1, 3, 2, 2), atol=1e-2, rtol=0)


def free(space):
    """Which coefficients of a real picture stand for two: the others are real, whatever phase is asked for."""
    found = torch.ones(frequencies(space).shape, dtype=torch.bool)
    last = [0] + ([space[-1] // 2] if space[-1] % 2 == 0 else [])
    for edge in last:
        found[..., edge] = False
    return found


@for_each("shape", [(3, 8, 8), (3, 7, 9), (1, 8, 5), (2, 16), (1, 4, 6, 6)])
def test_maco_keeps_the_magnitudes(shape):
    latent, colours = whitened(shape)
    spectrum = spectrum_of(latent, colours)
    described = Maco(shape, colours, spectrum.magnitudes, spectrum.mean)
    pictures = described.decode(described.noise(generators(0, 1, 2)))
    assert pictures.shape == (3, *shape)
    plain = colours.plain(pictures - spectrum.mean.view(-1, *[1] * (len(shape) - 1)))
    found = torch.fft.rfftn(plain, dim=tuple(range(2, plain.ndim)), norm="ortho").abs()
    mask = free(shape[1:])
    expected = spectrum.magnitudes.expand_as(found)
    torch.testing.assert_close(found[..., mask], expected[..., mask], atol=1e-3, rtol=1e-3)
    assert (found <= expected.amax() + 1e-3).all()


@for_each("shape", [(3, 8, 8), (3, 7, 9), (2, 16)])
def test_maco_describes_a_picture_with_those_magnitudes_exactly(shape):
    latent, colours = whitened(shape, count=1)
    spectrum = spectrum_of(latent, colours)
    described = Maco(shape, colours, spectrum.magnitudes, spectrum.mean)
    torch.testing.assert_close(described.decode(described.encode(latent)), latent, atol=1e-3, rtol=1e-3)


def test_maco_keeps_the_magnitudes_to_the_end():
    images = torch.rand(9, 3, 8, 8)
    found = maximize_activation(
        seeded(ConvNet), [0, 1], images=images, value_range=(-9.0, 9.0), parametrization="maco", steps=40
    )
    valid = found.range
    latent, made = valid.latent(images), valid.latent(found.images)
    colours = colours_of(latent, 3)
    spectrum = spectrum_of(latent, colours)
    reached = torch.fft.rfftn(colours.plain(made - spectrum.mean.view(3, 1, 1)), dim=(2, 3), norm="ortho").abs()
    mask = free((8, 8))
    torch.testing.assert_close(
        reached[..., mask], spectrum.magnitudes.expand_as(reached)[..., mask], atol=1e-2, rtol=1e-2
    )
