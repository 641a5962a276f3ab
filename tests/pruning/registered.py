"""Layer types of one's own: fewer than 15 lines make one known and prunable."""

import torch
from torch import Tensor, nn

from lightning_neurons import register_layer, register_prunable


class Scaled(nn.Module):
    """Linear, with its weight the other way round, and a scale for each neuron."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.inputs, self.units = inputs, units
        self.weight, self.scale = nn.Parameter(torch.rand(inputs, units) - 0.5), nn.Parameter(torch.rand(units) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.scale


register_layer(Scaled, neurons=lambda module: module.units, axis=-1)
register_prunable(
    Scaled,
    axis=-1,
    makes={"weight": 1, "scale": 0},
    reads={"weight": 0},
    sizes={"inputs": "reads", "units": "makes"},
)


class Centred(nn.Module):
    """Shifts every channel by a buffer, and scales it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.gain = width, nn.Parameter(torch.rand(width) + 0.5)
        self.register_buffer("centre", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.centre[:, None, None]) * self.gain[:, None, None]


register_prunable(Centred, axis=1, passes={"gain": 0, "centre": 0}, sizes={"width": "passes"})


class Doubled(nn.Linear):
    """A linear layer with a forward of its own that is not linear, and a module inside of it."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__(inputs, units)
        self.inner = nn.Tanh()

    def forward(self, input: Tensor) -> Tensor:
        return (self.inner(input) @ self.weight.T + self.bias) * 2


register_prunable(
    Doubled,
    axis=-1,
    makes={"weight": 0, "bias": 0},
    reads={"weight": 1},
    sizes={"in_features": "reads", "out_features": lambda module: len(module.bias)},
)


class Kernel(nn.Module):
    """A convolution whose weight has another name, and its axes in another order."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.channels = (inputs, outputs)
        self.kernel = nn.Parameter(torch.rand(inputs, 3, 3, outputs) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel.permute(3, 0, 1, 2), padding=1)


register_layer(Kernel, neurons=lambda module: module.channels[1], axis=1)
register_prunable(
    Kernel,
    axis=1,
    makes={"kernel": 3},
    reads={"kernel": 0},
    sizes={"channels": lambda module: (module.kernel.shape[0], module.kernel.shape[3])},
)


class Kernels(nn.Module):
    """Two such convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Kernel(3, 6), Kernel(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))).mean((2, 3))


class OfOneself(nn.Module):
    """Such types between others, behind one another, in a sum, and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), Centred(6)
        self.first, self.square = Scaled(6, 8), Scaled(8, 8)
        self.aside, self.last, self.head = nn.Linear(6, 8), Doubled(8, 5), Scaled(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        x = torch.relu(self.square(torch.relu(self.first(x))) + self.aside(x))
        return self.head(torch.relu(self.last(x)))
