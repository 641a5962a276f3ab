"""What a model costs, and what it would cost with fewer neurons: parameters and multiply-accumulate operations (MACs).

MACs are those of convolutional and linear layers for one sample: the number of positions at which a layer computes,
times its weights. Both follow from the sizes of tensors, so the cost of a plan is known exactly before anything is cut.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_neurons.network.batches import batch_size_of, tensors_of
from lightning_neurons.network.coupling import Group
from lightning_neurons.network.layer import modules_by_name, public_name
from lightning_neurons.network.widths import axes
from lightning_neurons.pruning.example import Example

Removed = Mapping[tuple[str, int], int]
"""By tensor and axis, how many places go."""

Effects = list[tuple[str, int, tuple[int, ...]]]
"""Tensor, axis, and how many places go with each unit of a group."""


@dataclass(frozen=True)
class Costs:
    """The sizes of a model's tensors.

    Attributes:
        shapes: By parameter.
        positions: By weight, at how many positions it is applied per sample.
        uncounted: Modules whose MACs are not counted, as they compute inside of a function.
    """

    shapes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, float]
    uncounted: tuple[str, ...] = ()

    def parameters(self, removed: Removed | None = None) -> int:
        """How many parameters there are, when something has been removed."""
        return sum(self._size(name, removed or {}) for name in self.shapes)

    def macs(self, removed: Removed | None = None) -> int:
        """How many multiply-accumulate operations one sample takes, when something has been removed."""
        return round(sum(count * self._size(name, removed or {}) for name, count in self.positions.items()))

    def macs_of(self, weight: str) -> int:
        """How many of them one layer's weight takes."""
        return round(self.positions[weight] * self._size(weight, {})) if weight in self.positions else 0

    def _size(self, name: str, removed: Removed) -> int:
        shape = self.shapes[name]
        return math.prod(size - removed.get((name, axis), 0) for axis, size in enumerate(shape))


def costs_of(model: nn.Module, example: Example) -> Costs:
    """Run a model once, on a copy of the example, and count.

    Args:
        model: In evaluation mode; it may be a copy.
        example: What to run it on.
    """
    positions: dict[str, float] = {}
    samples = batch_size_of(example.inputs) if tensors_of(example.inputs) else 1
    names = {id(p): public_name(name) for name, p in model.named_parameters()}  # one name for what is shared
    hooks = [
        module.register_forward_hook(_counter(names[id(module.weight)], positions, samples), with_kwargs=True)
        for module in modules_by_name(model).values()
        if isinstance(module, _ConvNd | nn.Linear) and id(module.weight) in names
    ]
    try:
        example.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    shapes = {public_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    inside = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
    uncounted = tuple(path for path, module in modules_by_name(model).items() if isinstance(module, inside))
    return Costs(shapes, {name: count for name, count in positions.items() if name in shapes}, uncounted)


def _counter(name: str, positions: dict[str, float], samples: int) -> Any:
    def count(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if isinstance(module, _ConvTransposeNd):
            applied = (args[0] if args else kwargs["input"]).numel() / module.in_channels
        else:
            applied = output.numel() / module.weight.shape[0]
        positions[name] = positions.get(name, 0.0) + applied / samples

    return count


def effects(group: Group, modules: Mapping[str, nn.Module]) -> Effects:
    """What each unit of a group takes from the model's parameters."""
    found: Effects = []
    for part in group.parts:
        taken = tuple(len(places) for places in part.indices)
        if part.axis is not None:
            found.append((part.path, part.axis, taken))
            continue
        module = modules[part.path]
        for leaf, axis in axes(module, part.role).items():
            tensor = module._parameters.get(leaf)
            if tensor is not None:
                found.append((f"{part.path}.{leaf}", axis % tensor.ndim, taken))
    return found


def removed_by(effects_of: Mapping[str, Effects], units: Mapping[str, Iterable[int]]) -> dict[tuple[str, int], int]:
    """How many places go, by tensor and axis, when units go."""
    removed: dict[tuple[str, int], int] = {}
    for root, gone in units.items():
        gone = list(gone)
        for tensor, axis, taken in effects_of[root]:
            removed[tensor, axis] = removed.get((tensor, axis), 0) + sum(taken[u] for u in gone)
    return removed
