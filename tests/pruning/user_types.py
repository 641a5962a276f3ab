"""Layers as users write them: subclasses with tensors of their own, and types that no library knows."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Conv1D(nn.Module):
    """A linear layer as in GPT-2: its weight is transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


class WrittenOut(nn.Module):
    """A linear layer without a bias, of two axes only."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight.t())


class Frozen(nn.Module):
    """A batch norm whose parameters are buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.eps = channels, 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, self.channels, 1, 1) for t in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class FrozenFeatures(nn.Module):
    """A parameter and a buffer with an entry for each feature, on the last axis."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(features))
        self.register_buffer("mean", torch.rand(1, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


class StandardizedConv(nn.Conv2d):
    """A convolution whose filters are standardised and then scaled, as in NFNets."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size)
        self.gain = nn.Parameter(0.5 + torch.rand(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * (var + 1e-4).rsqrt() * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Smoothed(nn.Linear):
    """A linear layer that scales what it reads and what it makes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.smooth, self.scale = (nn.Parameter(0.5 + torch.rand(n)) for n in (inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.smooth) * self.scale


class Adapted(nn.Linear):
    """A linear layer with an adaption of low rank."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class CountingNorm(nn.BatchNorm2d):
    """A batch norm with a further buffer."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("seen", 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.seen[:, None, None]
