"""How pictures are moved, and what keeps them plain."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_neurons import ArgumentError, maximize_activation
from lightning_neurons.feature_visualization.optimize import distance_from_grey, total_variation
from lightning_neurons.feature_visualization.transforms import Robustness
from tests.attribution.trained import trained_digits
from tests.tables import for_each


def moved(pictures, *, jitter=0.0, scale=0.0, rotation=0.0, draws):
    return Robustness(jitter, scale, rotation).applied(pictures, torch.tensor([draws] * len(pictures)))


def dot(height, width, *, down=0, right=0):
    """One bright position, so many from the middle."""
    picture = torch.zeros(1, 1, height, width)
    picture[0, 0, height // 2 + down, width // 2 + right] = 1
    return picture


@for_each("shape", [(2, 3), (2, 3, 7), (2, 3, 6, 5), (2, 1, 3, 4, 5)])
def test_amounts_of_zero_change_nothing(shape):
    pictures = torch.rand(shape)
    assert torch.equal(moved(pictures, draws=[1.0, -1.0, 1.0, -1.0, 1.0]), pictures)


@for_each("options", [{"jitter": 2.0}, {"scale": 0.5}, {"rotation": 90.0}])
def test_draws_of_zero_change_nothing(options):
    pictures = torch.rand(2, 3, 7, 6)
    torch.testing.assert_close(moved(pictures, draws=[0.0] * 5, **options), pictures, atol=1e-5, rtol=1e-5)


@for_each("across, down", [(2, 0), (0, 1), (-1, 2), (1, -2)])
@for_each("size", [(9, 9), (8, 12), (7, 10)])
def test_whole_positions_are_a_roll_but_for_the_edges(across, down, size):
    pictures = torch.rand(2, 3, *size)
    found = moved(pictures, jitter=2.0, draws=[across / 2, down / 2, 0.0, 0.0, 0.0])
    rolled = pictures.roll((-down, -across), (2, 3))
    torch.testing.assert_close(found[..., 2:-2, 2:-2], rolled[..., 2:-2, 2:-2], atol=1e-4, rtol=1e-4)


@for_each("axis, draws", [(2, [1.0, 0.0, 0.0, 0.0, 0.0]), (2, [-0.5, 1.0, 1.0, 1.0, 1.0])])
def test_signals_are_rolled(axis, draws):
    pictures = torch.rand(2, 3, 11)
    found = moved(pictures, jitter=4.0, draws=draws)
    assert torch.equal(found, pictures.roll(int(4 * draws[0]), axis))


def test_volumes_are_rolled_along_every_axis():
    pictures, still = torch.rand(1, 1, 5, 6, 7), set(range(2, 5))
    for seed in range(20):
        robustness = Robustness(2.0, 0.0, 0.0)
        draws = robustness.draws([torch.Generator().manual_seed(seed)], 1)[0]
        found = robustness.applied(pictures, draws)
        assert sorted(found.flatten().tolist()) == sorted(pictures.flatten().tolist())
        for axis in range(2, 5):
            others = [a for a in range(1, 5) if a != axis]
            if not torch.allclose(found.sum(others), pictures.sum(others)):
                still.discard(axis)
    assert still == set(), "jitter moves along each axis"


@for_each("size", [(5, 5), (9, 9), (8, 8), (5, 9), (9, 5)])
def test_a_quarter_turn_is_that_of_rot90(size):
    size = torch.Size(size)
    if size[0] == size[1]:
        picture = torch.rand(2, 3, *size)
        found = moved(picture, rotation=90.0, draws=[0.0, 0.0, 0.0, 0.0, 1.0])
        torch.testing.assert_close(found, picture.rot90(1, (2, 3)), atol=1e-4, rtol=1e-4)
        return
    found = moved(dot(*size, right=2), rotation=90.0, draws=[0.0, 0.0, 0.0, 0.0, 1.0])
    high, wide = (slice(n // 2 - 2, n // 2 + 3) for n in size)  # further out are reflections
    torch.testing.assert_close(found[..., high, wide], dot(5, 5, down=-2), atol=1e-4, rtol=1e-4)


@for_each("angle", [-180, -90, 90, 180])
def test_angles_of_either_sign(angle):
    found = moved(dot(9, 9, right=3), rotation=180.0, draws=[0.0, 0.0, 0.0, 0.0, angle / 180])
    turned = dot(9, 9, right=3).rot90(angle // 90, (2, 3))
    torch.testing.assert_close(found, turned, atol=1e-4, rtol=1e-4)


@for_each("size", [(33, 33), (33, 65), (65, 33)])
@for_each("degrees", [5.0, 30.0])
def test_distances_from_the_middle_stay_when_turned(size, degrees):
    down, right = torch.meshgrid(*(torch.arange(n) - n // 2 for n in size), indexing="ij")
    blob = (-((down**2 + (right - 8) ** 2) / 8.0)).exp()
    found = moved(blob[None, None], rotation=degrees, draws=[0.0, 0.0, 0.0, 0.0, 1.0])[0, 0]
    middle = [float((found * place).sum() / found.sum()) for place in (down, right)]
    expected = [-8 * math.sin(math.radians(degrees)), 8 * math.cos(math.radians(degrees))]
    assert middle == pytest.approx(expected, abs=0.05)


@for_each("draw, factor", [(1.0, 1.5), (-1.0, 0.5), (0.5, 1.25)])
@for_each("size", [(41, 41), (31, 61)])
def test_pictures_grow_and_shrink_by_their_share(draw, factor, size):
    down, right = torch.meshgrid(*(torch.arange(n) - n // 2 for n in size), indexing="ij")
    for distance, axis in ((down, 0), (right, 1)):
        blob = (-((distance - 6) ** 2 + (distance * 0 + (right if axis == 0 else down)) ** 2) / 6.0).exp()
        found = moved(blob[None, None], scale=0.5, draws=[0.0, 0.0, 0.0, draw, 0.0])[0, 0]
        if draw < 0:  # what lay beyond the edges is a reflection
            found = found * (down.abs() <= 7) * (right.abs() <= 7)
        assert float((found * distance).sum() / found.sum()) == pytest.approx(6 * factor, abs=0.1)


def test_draws_lie_between_minus_one_and_one_and_do_not_depend_on_the_other_rows():
    robustness = Robustness(1.0, 0.1, 5.0)
    draws = robustness.draws([torch.Generator().manual_seed(seed) for seed in (3, 4, 5)], 200)
    assert draws.shape == (200, 3, 5)
    assert -1 <= draws.min() < -0.98
    assert 0.98 < draws.max() <= 1
    alone = robustness.draws([torch.Generator().manual_seed(4)], 200)
    assert torch.equal(draws[:, 1:2], alone)


def test_rows_are_moved_by_their_own_amounts():
    pictures, draws = torch.rand(3, 2, 8, 8), 2 * torch.rand(3, 5) - 1
    robustness = Robustness(1.5, 0.3, 40.0)
    together = robustness.applied(pictures, draws)
    for row in range(3):
        alone = robustness.applied(pictures[[row]], draws[[row]])
        torch.testing.assert_close(together[[row]], alone, atol=1e-5, rtol=1e-5)
    assert pictures.min() - 1e-5 <= together.min() <= together.max() <= pictures.max() + 1e-5


@for_each(
    "space, amounts",
    [
        ((32, 48), (2, 0.05, 5)),
        ((48, 16), (1, 0.05, 5)),
        ((15, 48), (0, 0, 0)),
        ((8, 8), (0, 0, 0)),
        ((32,), (2, 0, 0)),
        ((16, 32, 48), (1, 0, 0)),
        ((), (0, 0, 0)),
    ],
)
def test_defaults_suit_the_size(space, amounts):
    robustness = Robustness.checked(space, None, None, None)
    assert (robustness.jitter, robustness.scale, robustness.rotation) == amounts


@for_each("name, given", [("jitter", 5), ("scale", 0.91), ("rotation", 181), ("rotation", -1)])
def test_amounts_are_bounded(name, given):
    amounts = {"jitter": None, "scale": None, "rotation": None} | {name: given}
    with pytest.raises(ArgumentError, match=f"^{name}={given} is not allowed: expected a number in"):
        Robustness.checked((8, 10), **amounts)


def differences(picture):
    """The mean magnitude of every difference along an axis, summed over axes, of one picture ``[channel][y][x]``."""
    across = [abs(row[i + 1] - row[i]) for channel in picture for row in channel for i in range(len(row) - 1)]
    down = [
        abs(low - high)
        for channel in picture
        for one, next_ in pairwise(channel)
        for high, low in zip(one, next_, strict=True)
    ]
    return sum(sum(found) / len(found) for found in (across, down) if found)


@for_each("shape", [(2, 3, 4, 5), (3, 1, 1, 6), (2, 2, 1, 1)])
def test_regularisers_against_loops(shape):
    shown = torch.rand(shape, dtype=torch.float64)
    expected = [differences(picture) for picture in shown.tolist()]
    torch.testing.assert_close(total_variation(shown), torch.tensor(expected, dtype=torch.float64))
    squares = [[(v - 0.5) ** 2 for v in picture.flatten().tolist()] for picture in shown]
    expected = torch.tensor([sum(row) / len(row) for row in squares], dtype=torch.float64)
    torch.testing.assert_close(distance_from_grey(shown), expected)


def maximized(target, **options):
    return maximize_activation(trained_digits(), target, input_shape=(1, 8, 8), value_range=(0.0, 1.0), **options)


def roughness(picture):
    return sum(picture.diff(dim=axis).abs().mean().item() for axis in (-1, -2))


@for_each("kind", ["fourier", "pixel"])
@for_each("option", [{"total_variation": 10.0}, {"blur": 1.0}])
def test_penalties_make_pictures_smoother(kind, option):
    plain = maximized(3, parametrization=kind, steps=96)
    smooth = maximized(3, parametrization=kind, steps=96, **option)
    assert roughness(smooth.image) < 0.8 * roughness(plain.image)


def test_l2_keeps_pictures_near_grey():
    away = [(maximized(3, l2=weight, steps=96).image - 0.5).square().mean().item() for weight in (0.0, 30.0, 1000.0)]
    assert away[0] > away[1] > 2 * away[2]
