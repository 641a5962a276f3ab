"""Seeds, frames, starts, shapes, and what happens at values that are not finite."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_neurons import maximize_activation
from tests.attribution.trained import trained_digits
from tests.models import ConvNet, seeded
from tests.tables import for_each

SMALL = {"input_shape": (3, 8, 8), "value_range": (0.0, 1.0)}
STILL = {"jitter": 0, "scale": 0, "rotation": 0}
MOVED = {"jitter": 1, "scale": 0.05, "rotation": 5}


def maximized(target=1, *, model=None, **options):
    return maximize_activation(seeded(ConvNet) if model is None else model, target, **(SMALL | options))


@for_each("kind", ["fourier", "pixel", "maco"])
def test_a_seed_decides_everything(kind):
    options = {"parametrization": kind, "images": torch.rand(5, 3, 8, 8), "steps": 6, **MOVED}
    one = maximized(1, seed=3, **options)
    torch.manual_seed(99)
    np.random.seed(99)
    again, other = maximized(1, seed=3, **options), maximized(1, seed=4, **options)
    for name in ("images", "activations", "trajectory"):
        assert torch.equal(getattr(one, name), getattr(again, name)), name
    assert not torch.equal(one.images, other.images)


@for_each("kind", ["fourier", "pixel", "maco"])
def test_a_row_of_a_batch_is_the_same_as_alone(kind):
    options = {"parametrization": kind, "images": torch.rand(5, 3, 8, 8), "steps": 20, **MOVED}
    targets, seeds = [("conv2", 1), 3, "conv1"], [5, 0]
    found = maximized(targets, seed=seeds, **options)
    for row, (target, seed) in enumerate((target, seed) for target in targets for seed in seeds):
        alone = maximized(target, seed=seed, **options)
        torch.testing.assert_close(found.images[row], alone.images[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(found.activations[row], alone.activations[0], atol=1e-3, rtol=1e-3)


@for_each("steps, frames, kept", [(5, 0, 0), (5, 1, 1), (5, 2, 2), (5, 6, 6), (5, 99, 6), (8, 5, 5)])
def test_as_many_frames_as_are_asked_for(steps, frames, kept):
    found = maximized(steps=steps, frames=frames)
    assert found.frames.shape == (kept, 1, 3, 8, 8)
    if kept:
        assert torch.equal(found.frames[-1], found.images)
    if kept > 1:
        every = maximized(steps=steps, frames=steps + 1).frames
        assert torch.equal(found.frames, every[[i * steps // (kept - 1) for i in range(kept)]])


def test_grey_is_the_middle_of_the_range():
    found = maximized(start="grey", frames=2, steps=1, value_range=(-1.0, 3.0))
    torch.testing.assert_close(found.frames[0], torch.ones(1, 3, 8, 8))


@for_each("validity", ["sigmoid", "clip"])
@for_each("kind", ["fourier", "pixel"])
def test_the_first_frame_is_the_picture_to_start_from(kind, validity):
    picture = 4 * torch.rand(3, 8, 8) - 1
    picture[0, 0, :2] = torch.tensor([-1.0, 3.0])
    kept = picture.clone()
    found = maximized(
        [0, 1], start=picture, frames=2, steps=1, value_range=(-1.0, 3.0), parametrization=kind, validity=validity,
        images=4 * torch.rand(5, 3, 8, 8) - 1,
    )  # fmt: skip
    torch.testing.assert_close(found.frames[0], picture.expand(2, 3, 8, 8), atol=1e-2, rtol=0)
    assert torch.equal(picture, kept)


def test_nothing_moves_without_a_learning_rate():
    picture = torch.rand(3, 8, 8)
    found = maximized(start=picture, learning_rate=0, steps=3)
    torch.testing.assert_close(found.image, picture, atol=1e-2, rtol=0)


SHAPES = [(2, 12), (2, 7), (1, 1), (5,), (1, 4, 6, 5), (1, 3, 3, 3), (2, 5, 9), (1, 1, 1)]


@for_each("shape, validity", zip(SHAPES, ["sigmoid", "clip"] * 4, strict=True))
def test_pictures_of_any_number_of_axes(shape, validity):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    class Product(nn.Module):
        def forward(self, x):
            return torch.stack([(x * weights).flatten(1).sum(1), x.flatten(1).sum(1)], 1)

    found = maximize_activation(
        Product(), 0, input_shape=shape, value_range=(0.0, 1.0), validity=validity, learning_rate=0.3, **STILL
    )
    least, best = weights.clamp_max(0).sum().item(), weights.clamp_min(0).sum().item()
    assert found.image.shape == shape
    assert best - 0.25 * (best - least) <= found.activation <= best + 1e-5
    images = torch.rand(6, *shape)
    moved = maximize_activation(Product(), [0, 1], images=images, value_range=(0.0, 1.0), validity=validity, steps=4)
    torch.testing.assert_close(moved.data_activations[0], (images * weights).flatten(1).sum(1))


def test_the_trajectory_ends_near_the_activation():
    found = maximized([0, 1, 2], model=trained_digits(), input_shape=(1, 8, 8), steps=64, **STILL)
    assert found.trajectory.shape == (64, 3)
    torch.testing.assert_close(found.trajectory[-1], found.activations, atol=0.3, rtol=0.02)
    assert (found.trajectory[-1] > found.trajectory[0]).all()


def test_a_float_range_of_numpy_and_whole_numbers_will_do():
    found = maximized(np.int64(1), value_range=[np.float32(0), 1], input_shape=torch.Size([3, 8, 8]), steps=np.int64(2))
    assert torch.equal(found.images, maximized(1, steps=2).images)
    assert torch.equal(found.images, maximized(torch.tensor(1), steps=2).images)


class TooBright(nn.Module):
    """The mean value and its negative; NaN, or infinite, once a picture is brighter than 0.6."""

    def __init__(self, value=torch.nan):
        super().__init__()
        self.value = value

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([torch.where(mean > 0.6, self.value, mean), -mean], 1)


class Counting(nn.Module):
    """The same without the limit, NaN for the first class from a call on."""

    def __init__(self, good):
        super().__init__()
        self.left = [good]

    def forward(self, x):
        self.left[0] -= 1
        mean = x.flatten(1).mean(1)
        return torch.stack([torch.full_like(mean, torch.nan) if self.left[0] < 0 else mean, -mean], 1)


def excited(model, targets=(0, 1), *, steps=64, **options):
    return maximize_activation(model, targets, input_shape=(1, 8, 8), value_range=(0.0, 1.0), steps=steps, **options)


EACH_PAIR = [
    ("sigmoid", "fourier", MOVED),
    ("clip", "fourier", STILL),
    ("sigmoid", "pixel", STILL),
    ("clip", "pixel", MOVED),
]


@for_each("validity, kind, options", EACH_PAIR)
def test_a_row_that_is_not_finite_stops_and_the_others_go_on(validity, kind, options):
    options = options | {"validity": validity, "parametrization": kind}
    with pytest.warns(UserWarning, match=r"^class 0 \(seed 0\) was NaN or infinite.*last good image"):
        found = excited(TooBright(), **options)
    assert len(found.notes) == 1
    assert 0 <= found.images.min() <= found.images.max() <= 1
    assert 0.5 < found.images[0].mean() < 0.65
    alone = excited(TooBright(), 1, **options)
    assert found.activations[1].item() == pytest.approx(alone.activation, abs=0.02)
    assert found.activations[1] > -0.4
    assert found.trajectory.shape == (64, 2)


@for_each("value, kind", [(torch.nan, "fourier"), (torch.inf, "pixel"), (-torch.inf, "fourier")])
def test_the_picture_that_is_kept_was_still_good(value, kind):
    with pytest.warns(UserWarning, match="last good image"):
        found = excited(TooBright(value), 0, parametrization=kind, **STILL)
    assert found.images.mean() <= 0.6
    assert found.activations.isfinite().all()


@for_each("good", [1, 2, 9])
def test_the_note_says_which_and_when_and_the_picture_is_that_before(good):
    with pytest.warns(UserWarning, match=f"^class 0 .seed 7. .* at step {good}:"):
        found = excited(Counting(good), seed=7, frames=65)
    assert torch.equal(found.frames[good - 1, 0], found.images[0])
    assert (found.frames[good + 1 :, 0] == found.images[0]).all()
    assert not torch.equal(found.frames[good, 0], found.images[0]), "the one that was not"
    assert len(found.frames[:, 1].unique(dim=0)) == 65


def test_all_rows_stop_at_the_first_step():
    with pytest.warns(UserWarning, match="step 0") as warned:
        found = excited(Counting(0), 0, seed=[1, 2], frames=3)
    assert len(warned) == len(found.notes) == 2
    assert found.images.isfinite().all()
    assert torch.equal(found.frames[0], found.images)
    assert found.activations.isnan().all()
    assert found.image.shape == (1, 8, 8)


def test_a_model_that_is_always_nan_still_leaves_valid_pictures():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1) * torch.nan

    with pytest.warns(UserWarning, match="NaN or infinite"):
        found = excited(Broken(), 3)
    assert 0 <= found.images.min() <= found.images.max() <= 1


def test_a_gradient_that_is_not_finite_stops_as_well():
    class Steep(nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.cat([(mean[:1] - mean[:1].detach()).square().sqrt(), mean[1:]])

    with pytest.warns(UserWarning, match="its gradient was, at step 0"):
        found = excited(Steep(), 0, seed=[3, 4], frames=2)
    assert torch.equal(found.frames[0, 0], found.images[0])
    assert found.images[1].mean() > 0.6


@for_each("steps", [20, 24, 26, 27, 28, 29, 30, 40])
def test_what_is_reached_is_finite_or_a_note_says_otherwise(steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = excited(TooBright(), 0, steps=steps, **STILL)
    assert found.activations.isfinite().all() or found.notes


def test_the_best_seed_is_one_that_is_finite():
    class Uneven(nn.Module):
        def forward(self, x):
            rows = torch.arange(len(x)) == 0
            mean = x.flatten(1).mean(1)
            return torch.stack([torch.where(rows, torch.nan, mean), -mean], 1)

    with pytest.warns(UserWarning, match="seed 3"):
        found = excited(Uneven(), 0, seed=[3, 4])
    assert found.best == 1


@for_each("validity", ["sigmoid", "clip"])
@for_each("kind", ["fourier", "pixel"])
def test_the_maximum_of_a_linear_model_is_found(kind, validity):
    weights = torch.randn(24, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 1, bias=False)).requires_grad_(False)
    net[1].weight.copy_(weights)
    found = maximize_activation(
        net, 0, input_shape=(2, 12), value_range=(0.0, 1.0), parametrization=kind, validity=validity,
        learning_rate=0.3, **STILL,
    )  # fmt: skip
    share = 0.75 if (kind, validity) == ("fourier", "clip") else 0.95  # clipped between coefficients: may end short
    assert found.activation > share * weights.clamp_min(0).sum()
