"""Small seeded networks and their reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons import NeuronReport, measure

LAYERS = ["0", "3", "5"]


def flat(by_layer: Mapping[str, Tensor]) -> list[tuple[str, int, float]]:
    """One entry per neuron."""
    return [(layer, i, s) for layer, scores in by_layer.items() for i, s in enumerate(scores.tolist())]


def network(width: int = 5) -> nn.Sequential:
    """A convolution with a dead neuron (1), then a GELU layer, then the output."""
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, width), nn.GELU(), nn.Linear(width, 3)
    )  # fmt: skip
    with torch.no_grad():
        net[0].bias[1] = -1e6
    return net


def batches(samples: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, 1, 3, 3, generator=generator)
    return list(zip(inputs.split(10), (torch.arange(samples) % 3).split(10), strict=True))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def report_of(criteria: Sequence[Any] | None = None, net: nn.Module | None = None, **options: Any) -> NeuronReport:
    return measure(net or network(), batches(), loss_fn=loss, criteria=criteria, **options)


def activations(net: nn.Sequential, layer: int) -> Tensor:
    """What the readers of a layer see: ``(sample, neuron, space)``."""
    inputs = torch.cat([batch[0] for batch in batches()])
    values = net[: layer + 2](inputs).detach()
    return values.flatten(2) if values.ndim > 2 else values.unsqueeze(-1)
