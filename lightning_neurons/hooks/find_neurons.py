"""Find the neurons of a model with one forward; the callbacks find them while they watch the training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.hooks.trace import Trace
from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.layers.layer import Layer, Pattern, candidates, require_materialized


def find_neurons(model: nn.Module, example_inputs: Any, *, layers: Sequence[Pattern] | None = None) -> list[Layer]:
    """Find the layers of a model and the point where each one's neurons get their final value.

    Runs one forward in evaluation mode, without gradients, and leaves no trace in the model. The projections inside
    ``nn.MultiheadAttention`` and functional calls with weights of their own (``F.linear(x, w)``) make no layer.

    Args:
        model: Any module.
        example_inputs: One batch: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        layers: None for all, or patterns of paths (``"net.layer1.*"``), names of classes or module types.

    Returns:
        The layers in the order of the model. Layers that did not run have ``calls == 0`` and a note.

    Raises:
        ArgumentError: If a pattern matches no layer or a layer is lazy and has not been materialised.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> for layer in find_neurons(net, torch.zeros(1, 1, 4, 4)):
        ...     print(layer.neurons, layer.activation_point, layer.readers)
        4 0 > batch_norm (1) > relu (2) (('4', 4),)
        2 4 None
    """
    chosen = candidates(model, layers)
    require_materialized(model)
    with isolated(model), torch.no_grad(), eager():
        model.eval()
        trace = Trace(model, candidates(model))
        try:
            with trace:
                call(model, example_inputs)
            traced = trace.traced_layers()
            return [traced[name] for name in chosen]
        finally:
            trace.close()


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        What the model returns.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, Tensor | str):
        return model(*inputs)
    return model(inputs)
