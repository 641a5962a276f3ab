"""The settings of an activation maximisation that do not depend on the model, checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.errors import ArgumentError, check_choice, check_count, check_seed, is_number
from lightning_neurons.feature_visualization.parametrization import KINDS, ParametrizationKind
from lightning_neurons.feature_visualization.transforms import Robustness
from lightning_neurons.feature_visualization.value_range import VALIDITIES, Range, Validity

LEARNING_RATES: dict[ParametrizationKind, float] = {"pixel": 0.05, "fourier": 0.05, "maco": 0.1}

_PAIR = "(least, largest) value of an image, such as (0.0, 1.0)"
_MOST_BLUR = 1000
_LARGEST = 1e30  # of values that float32 can still calculate with
_SLACK = 0.01
"""Share of the range by which given images may leave it, as after a resize."""


@dataclass(frozen=True)
class MaximizationSettings:
    """The settings of ``maximize_activation``, which explains its arguments.

    Raises:
        ArgumentError: If one is out of range.
    """

    parametrization: ParametrizationKind | None = None
    validity: Validity = "sigmoid"
    steps: int = 256
    learning_rate: float | None = None
    total_variation: float = 0.0
    l2: float = 0.0
    blur: float = 0.0
    jitter: float | None = None
    scale: float | None = None
    rotation: float | None = None
    frames: int = 0

    def __post_init__(self) -> None:
        if self.parametrization is not None:
            check_choice("parametrization", self.parametrization, KINDS)
        check_choice("validity", self.validity, VALIDITIES)
        check_count("steps", self.steps)
        check_count("frames", self.frames, least=0)
        for name in ("total_variation", "l2", "blur"):
            _at_least_zero(name, getattr(self, name), _MOST_BLUR if name == "blur" else math.inf)
        if self.learning_rate is not None:
            _at_least_zero("learning_rate", self.learning_rate)
        if self.blur and self.parametrization == "maco":
            raise ArgumentError.of("blur", self.blur, '0 with parametrization="maco", which keeps the spectrum fixed')

    def kind(self, shape: Sequence[int], *, has_images: bool) -> ParametrizationKind:
        """Return the parametrization: Fourier, or single values where there are no positions.

        Raises:
            ArgumentError: If the one that is asked for needs positions, or images.
        """
        if self.parametrization in ("fourier", "maco") and len(shape) < 2:
            raise ArgumentError.of("parametrization", self.parametrization, '"pixel" for inputs without positions')
        if self.parametrization == "maco" and not has_images:
            raise ArgumentError.of("images", None, 'images, whose spectrum parametrization="maco" keeps')
        return self.parametrization or ("fourier" if len(shape) > 1 else "pixel")

    def robustness(self, shape: Sequence[int]) -> Robustness:
        """Return the random movements of images of a shape."""
        return Robustness.checked(shape[1:], self.jitter, self.scale, self.rotation)


def range_of(
    value_range: Any, mean: Any, std: Any, validity: Validity, batches: Sequence[Tensor], channels: int
) -> Range:
    """Return the range of valid images.

    Args:
        value_range: Least and largest value of an image; None takes those of ``batches``.
        mean: Of the normalisation, a number or one per channel; None for none.
        std: The standard deviation of the same, likewise.
        validity: The way in which images are kept in the range: ``"sigmoid"`` or ``"clip"``.
        batches: The user's images, as the model takes them; may be none.
        channels: Number of channels of an image.

    Returns:
        The range, with the normalisation of the model's inputs.

    Raises:
        ArgumentError: If neither it nor images are given, or the images do not lie in it.
    """
    center, spread = _by_channel("mean", mean, 0.0, channels), _by_channel("std", std, 1.0, channels)
    if bool((spread <= 0).any()):
        raise ArgumentError.of("std", std, "numbers above 0")
    plain = Range(0.0, 1.0, center, spread, validity)
    ends = [end for batch in batches for end in plain.pictures(batch.float()).aminmax()]
    least, largest = float(min(ends, default=0.0)), float(max(ends, default=0.0))
    if value_range is None:
        if not ends:
            raise ArgumentError.of(
                "value_range", None, "(least, largest) value of an image, such as (0.0, 1.0), or images="
            )
        if not least < largest:
            raise ArgumentError.of("images", f"only {least}", "images that differ, or value_range=")
        return Range(least, largest, center, spread, validity)
    is_pair = isinstance(value_range, Sequence) and len(value_range) == 2 and all(map(is_number, value_range))
    if not is_pair or not -_LARGEST < value_range[0] < value_range[1] < _LARGEST:
        raise ArgumentError.of("value_range", value_range, _PAIR)
    low, high = float(value_range[0]), float(value_range[1])
    slack = _SLACK * (high - low)
    if ends and (least < low - slack or largest > high + slack):
        got = f"values from {least:.3g} to {largest:.3g}"
        raise ArgumentError.of(
            "images",
            got,
            f"images in value_range={(low, high)}; if they are normalised, pass mean= and std= of that normalisation",
        )
    return Range(low, high, center, spread, validity)


def check_normalization(mean: Any, std: Any) -> None:
    """Check that mean and standard deviation can be a normalisation of some image.

    Raises:
        ArgumentError: If there are no numbers, or of different length, or a deviation is not above 0.
    """
    lengths = [len(values) for values in (mean, std) if hasattr(values, "__len__") and not isinstance(values, str)]
    range_of((0.0, 1.0), mean, std, "clip", [], max(lengths, default=1))


def seeds_of(seed: Any) -> tuple[int, ...]:
    """Return one seed, or several, as a tuple.

    Raises:
        ArgumentError: If one cannot seed random numbers, or there are none.
    """
    seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]
    if not seeds:
        raise ArgumentError.of("seed", seed, "a whole number, or a list of them")
    return tuple(check_seed("seed", number) for number in seeds)


def _by_channel(name: str, value: Any, default: float, channels: int) -> Tensor:
    values = [default] if value is None else value.tolist() if isinstance(value, Tensor) else value
    values = list(values) if isinstance(values, Sequence) else [values]
    if len(values) not in (1, channels) or not all(is_number(v) and -torch.inf < v < torch.inf for v in values):
        raise ArgumentError.of(name, value, f"a number, or one for each of the {channels} channels")
    return torch.tensor([float(v) for v in values], dtype=torch.float32).expand(channels).clone()


def _at_least_zero(name: str, value: Any, most: float = math.inf) -> None:
    if not is_number(value) or not 0 <= value <= most or value == math.inf:
        raise ArgumentError.of(
            name, value, "a number of at least 0" + (f", at most {most:,}" if most < math.inf else "")
        )
