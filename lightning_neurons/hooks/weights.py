"""Weights of a layer, neuron axis first, and of the downstream layers that read it, for the criteria."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_neurons.criteria.contract import LayerTraits
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.layer import Layer, public_name
from lightning_neurons.layers.width_handlers import handler_of, weight_name


def traits_of(layer: Layer, modules: Mapping[str, nn.Module]) -> LayerTraits:
    """Return all that criteria may know of ``layer``; ``modules`` are those of the model, by path."""
    readers = [outgoing_weight(modules[name], spread) for name, spread in layer.readers or ()]
    outgoing = None
    if readers and all(r is not None and len(r) == layer.neurons for r in readers):
        outgoing = torch.cat([r for r in readers if r is not None], 1)
    return LayerTraits(
        name=layer.name,
        activation=layer.activation,
        rectified=layer.rectified,
        bounds=layer.bounds,
        incoming=incoming_weight(modules[layer.name], layer.neurons),
        outgoing=outgoing,
        norm_scale=_norm_scale(layer, modules),
    )


def incoming_weight(module: nn.Module, neurons: int) -> Tensor | None:
    """Return the incoming weights, ``(neuron, weight)``; None if the module has no such tensor."""
    weight = _weight_of(module)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    axis, blocks = _blocks(module, weight.detach())
    rows = [block.movedim(axis, 0).flatten(1) for block in blocks]
    matrix = rows[0] if len(rows) == 1 else torch.cat(rows)
    return matrix if len(matrix) == neurons else None


def neuron_weights(module: nn.Module) -> list[Tensor]:
    """Return each neuron's incoming weights as a view into the layer's own; empty if the layer has no such tensor.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> _ = neuron_weights(layer)[1].zero_()
        >>> layer.weight[1].tolist()
        [0.0, 0.0]
    """
    weight = _weight_of(module)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return []
    axis, blocks = _blocks(module, weight.detach())
    return [neuron for block in blocks for neuron in block.unbind(axis)]


def outgoing_weight(module: Any, spread: int = 1) -> Tensor | None:
    """Return the weights by which a module reads each of its inputs.

    Args:
        module: A layer that reads others.
        spread: Number of neighbouring inputs that belong to one neuron (a flattened image before a linear layer).

    Returns:
        The weights, ``(neuron, weight)``, or None if no record says where the module's weights lie.
    """
    weight, handler = _weight_of(module), handler_of(module)
    if not isinstance(weight, Tensor) or handler is None:
        return None
    weight, axis = weight.detach(), handler.reads.get(weight_name(module))
    if axis is None and getattr(module, "groups", 1) > 1:
        # (groups, outputs, inputs, taps) of each group: an input is read by the outputs of its own group only.
        grouped = weight.reshape(module.groups, -1, *weight.shape[1:]).flatten(3)
        return grouped.transpose(1, 2).reshape(module.in_channels, -1)
    if axis is None:
        return None
    inputs = weight.movedim(axis, 0)
    return inputs.reshape(len(inputs) // spread, -1)


def _blocks(module: Any, weight: Tensor) -> tuple[int, tuple[Tensor, ...]]:
    """Split a weight into the parts that make neurons independently of one another.

    Returns:
        The axis of the weight on which its neurons lie, and the parts, as views, in the order of their neurons.
    """
    handler = handler_of(module)
    name = weight_name(module)
    # In a transposed convolution, the inputs of a group make the neurons of that group.
    axis = 0 if handler is None else handler.makes.get(name, int(handler.reads.get(name) == 0))
    return axis, weight.chunk(getattr(module, "groups", 1) if axis else 1)


def _weight_of(module: nn.Module | None) -> Any:
    """Return a module's weight; a parametrized one is computed in evaluation mode, which changes no state."""
    name = weight_name(module)
    if module is None or not is_parametrized(module, name):
        return getattr(module, name, None)
    with isolated(module), torch.no_grad():
        return getattr(module.eval(), name)


def _norm_scale(layer: Layer, modules: Mapping[str, nn.Module]) -> Tensor | None:
    for link in layer.chain:
        if link.kind == "norm" and link.module:
            scale = _weight_of(modules.get(public_name(link.module)))
            if isinstance(scale, Tensor) and scale.shape == (layer.neurons,):
                return scale.detach()
    return None
