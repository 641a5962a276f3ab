"""Moments of the inputs of layers: counts, sums and sums of products, never the values themselves.

Everything is a sum in float64, so batches and processes are merged by adding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.errors import PruningError
from lightning_neurons.layers.width_handlers import axes
from lightning_neurons.pruning.compensation.unfold import by_feature

Reduce = Callable[[Tensor], Tensor]
"""A function that sums a tensor over processes."""


BLOCK = 256
"""Inputs whose products with all that follow are computed at once."""


def alone(tensor: Tensor) -> Tensor:
    """Return the sum over processes where there is only one: the tensor itself."""
    return tensor


def wide(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(eq=False)
class Moments:
    """First and second moments of inputs, and of targets with inputs.

    Attributes:
        count: Number of samples (or of samples and positions).
        sum_x: ``(input,)``.
        sum_y: ``(target,)``.
        xx: ``(input, input)``, the sum of products.
        yx: ``(target, input)``, the sum of products.

    Example:
        >>> moments = Moments.empty(2, 1)
        >>> moments.add(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 6.0]]))
        >>> moments.covariance_xx.tolist(), moments.covariance_yx.tolist()
        ([[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0]])
    """

    count: Tensor
    sum_x: Float[Tensor, " input"]
    sum_y: Float[Tensor, " target"]
    xx: Float[Tensor, "input input"]
    yx: Float[Tensor, "target input"]

    @classmethod
    def empty(cls, inputs: int, targets: int, device: torch.device | None = None) -> "Moments":
        """Return the moments of no samples."""
        device = device or torch.device("cpu")

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=wide(device), device=device)

        return cls(zeros(), zeros(inputs), zeros(targets), zeros(inputs, inputs), zeros(targets, inputs))

    def add(self, x: Float[Tensor, "input position"], y: Float[Tensor, "target position"] | None = None) -> None:
        """Add values at some positions.

        Args:
            x: The inputs.
            y: The targets; None if there are none.
        """
        x = x.to(self.xx.dtype)
        self.count += x.shape[1]
        self.sum_x += x.sum(1)
        for begin in range(0, len(x), BLOCK):  # each product of two inputs is needed once
            end = begin + BLOCK
            self.xx[begin:end, begin:].addmm_(x[begin:end], x[begin:].T)
            self.xx[end:, begin:end] = self.xx[begin:end, end:].T
        if y is not None:
            y = y.to(self.xx.dtype)
            self.sum_y += y.sum(1)
            self.yx.addmm_(y, x.T)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of two sets of positions together."""
        mine = self.count, self.sum_x, self.sum_y, self.xx, self.yx
        theirs = other.count, other.sum_x, other.sum_y, other.xx, other.yx
        return Moments(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def reduced(self, reduce: Reduce) -> "Moments":
        """Return the moments of all processes together."""
        return Moments(*(reduce(t) for t in (self.count, self.sum_x, self.sum_y, self.xx, self.yx)))

    def check(self, path: str) -> None:
        """Refuse NaN and infinite values.

        Args:
            path: The layer that reads them, for the error.

        Raises:
            PruningError: If there are any.
        """
        if not all(bool(t.isfinite().all()) for t in (self.sum_x, self.sum_y, self.xx, self.yx)):
            raise PruningError(f"{path} reads NaN or infinite values on the calibration data; nothing can be solved")

    @property
    def mean_x(self) -> Float[Tensor, " input"]:
        """Mean of the inputs."""
        return self.sum_x / self.count.clamp(min=1)

    @property
    def mean_y(self) -> Float[Tensor, " target"]:
        """Mean of the targets."""
        return self.sum_y / self.count.clamp(min=1)

    @property
    def covariance_xx(self) -> Float[Tensor, "input input"]:
        """Covariance of the inputs, divided by the count."""
        return self.xx / self.count.clamp(min=1) - torch.outer(self.mean_x, self.mean_x)

    @property
    def covariance_yx(self) -> Float[Tensor, "target input"]:
        """Covariance of targets with inputs, divided by the count."""
        return self.yx / self.count.clamp(min=1) - torch.outer(self.mean_y, self.mean_x)


class OutputMean:
    """The mean output of a linear or convolutional layer, for any weights, padded borders included.

    A layer is linear, so the mean of its outputs is its output for the mean of its inputs: only one mean input is
    kept (for each size of inputs).

    Args:
        module: The layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.sums: dict[tuple[int, ...], Tensor] = {}
        self.samples: dict[tuple[int, ...], int] = {}

    def add(self, inputs: Tensor) -> None:
        """Add inputs of the layer, ``(batch, channel, *space)`` or ``(*batch, feature)``."""
        if by_feature(self.module):
            inputs = inputs.reshape(-1, inputs.shape[-1])
        key = tuple(inputs.shape[1:])
        self.sums[key] = self.sums.get(key, 0) + inputs.sum(0, dtype=wide(inputs.device))
        self.samples[key] = self.samples.get(key, 0) + len(inputs)

    @property
    def largest(self) -> float:
        """The largest magnitude of a mean input."""
        return max((float(s.abs().max()) / self.samples[key] for key, s in self.sums.items()), default=0.0)

    def total(self, weight: Tensor) -> tuple[Float[Tensor, " output"], Tensor]:
        """Return the outputs for a weight without bias, summed over samples and positions, and the positions' number.

        Args:
            weight: In the shape of the layer's own.

        Returns:
            The sum in units of the outputs, and the number of samples times positions, both of the weight's type.
        """
        outputs = weight.shape[axes(self.module, "makes")["weight"]]
        total = torch.zeros(outputs, dtype=weight.dtype, device=weight.device)
        count = torch.zeros((), dtype=weight.dtype, device=weight.device)
        for key, picture in self.sums.items():
            out = applied(self.module, weight, picture[None])[0].reshape(outputs, -1)
            total += out.sum(1)
            count += self.samples[key] * out.shape[1]
        return total, count


def applied(module: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the output of a layer for some inputs with another weight and without its bias."""
    given = {"weight": weight.to(inputs.dtype)}
    if getattr(module, "bias", None) is not None:
        given["bias"] = torch.zeros_like(module.get_parameter("bias"), dtype=inputs.dtype)
    out: Tensor = torch.func.functional_call(module, given, (inputs,))
    return out
