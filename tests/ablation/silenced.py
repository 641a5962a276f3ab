"""A small classifier whose neurons are switched off by plain forward hooks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.models import pictures, seeded

STUDIED = ["0", "3"]
"""The layers of ``net_of`` before the one that makes the logits."""

FINAL = {"0": "1", "3": "4", "6": "6"}
"""By layer of ``net_of``, the module whose output is its activation."""

WIDTHS = {"0": 4, "3": 5, "6": 4}


def net_of(seed: int = 0) -> nn.Sequential:
    """conv > relu, linear > tanh > dropout, linear: pictures of 8 x 8 pixels, four classes."""

    def make():
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Tanh(), nn.Dropout()
        return nn.Sequential(*layers, nn.Linear(5, 4))

    net = seeded(make, seed=seed)
    for layer in ("0", "3", "6"):  # so that answers differ from picture to picture
        net.get_submodule(layer).weight.data.mul_(3)
        net.get_submodule(layer).bias.data.zero_()
    return net


def batches_of(*sizes: int, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    x, y = pictures(sum(sizes), classes=classes)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def each(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@contextmanager
def without(net: nn.Module, neurons: Mapping[str, Sequence[int]], means: Any = None) -> Iterator[nn.Module]:
    """Meanwhile some channels or features are 0, or what ``means`` has for their layer."""
    handles = []
    for layer, indices in neurons.items():

        def hook(module, inputs, output, layer=layer, indices=indices):
            output = output.clone()
            for i in indices:
                output[:, i] = 0 if means is None else means[layer][i]
            return output

        handles.append(net.get_submodule(FINAL[layer]).register_forward_hook(hook))
    try:
        with torch.no_grad():
            yield net
    finally:
        for handle in handles:
            handle.remove()


def activations_of(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By layer, ``(sample, neuron, position)``."""
    found, kept = x, {}
    with torch.no_grad():
        for name, module in net.named_children():
            found = module(found)
            kept[name] = found
    return {layer: kept[final].flatten(2) if kept[final].ndim > 2 else kept[final][..., None]
            for layer, final in FINAL.items()}  # fmt: skip


def means_of(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The mean of each neuron over samples and positions."""
    found = activations_of(net, torch.cat([x for x, _ in batches]))
    return {layer: values.double().mean((0, 2)).float() for layer, values in found.items()}


def class_means(
    net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], classes: Sequence[int], *, magnitude: bool = False
) -> dict[str, Tensor]:
    """By layer, ``(class, neuron)``: the mean over the samples of a class and over positions."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    values = {layer: v.abs() if magnitude else v for layer, v in activations_of(net, x).items()}
    return {layer: torch.stack([values[layer][y == k].double().mean((0, 2)) for k in classes]) for layer in STUDIED}


def accuracies_without(
    net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], off: Mapping[str, Sequence[int]], klass: int, means: Any
) -> list[float]:
    """On all samples, on those of a class, on all others, and the mean of the last two."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    with without(net, off, means):
        right = (net(x).argmax(1) == y).double()
    own, others = right[y == klass].mean().item(), right[y != klass].mean().item()
    return [right.mean().item(), own, others, (own + others) / 2]


def losses_without(
    net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], off: Mapping[str, Sequence[int]], means: Any
) -> list[float]:
    """The mean loss of each class."""
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    with without(net, off, means):
        losses = F.cross_entropy(net(x).double(), y, reduction="none")
    return [losses[y == k].mean().item() for k in sorted({*y.tolist()})]


def selectivity_of(values: Sequence[float]) -> float:
    """Of one neuron, from its mean magnitude for each class."""
    high, rest = max(values), (sum(values) - max(values)) / (len(values) - 1)
    return (high - rest) / (high + rest) if high > 0 else math.nan


def entropy_of(values: Sequence[float]) -> float:
    """Of one neuron, from its importance for each class."""
    total = sum(max(v, 0.0) for v in values)
    shares = [max(v, 0.0) / total for v in values] if total > 0 else []
    return -sum(p * math.log(p, len(values)) for p in shares if p) if shares else math.nan
