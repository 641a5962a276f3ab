"""Activation maps and Grad-CAM: maps of a layer's activations, laid over the inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.attribution.objective import layer_of, neuron_of
from lightning_neurons.attribution.readout import Readout, require_samples
from lightning_neurons.attribution.request import AttributionRequest
from lightning_neurons.data.batches import rows_of
from lightning_neurons.errors import ArgumentError, MeasurementError
from lightning_neurons.layers.layer import Layer
from lightning_neurons.measurement.arguments import given_model
from lightning_neurons.measurement.outcomes import Forward

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_PART = 64


def activation_map(
    model: nn.Module, inputs: Any, layer: str, neuron: int | None = None, *, forward: Forward | None = None
) -> Float[Tensor, "batch ..."]:
    """Return the activation of a neuron at each position, resized to its inputs: to be laid over them.

    Args:
        model: Any module; it is as it was afterwards.
        inputs: A batch that the model takes.
        layer: A layer with positions: a convolution.
        neuron: One of its neurons; None takes the mean over all.
        forward: Runs the model: ``(model, inputs) -> logits``; None calls it.

    Returns:
        Activations, one map per sample.

    Raises:
        UnknownNameError: If there is no such layer.
        ArgumentError: If it has no such neuron, or no positions.
        MeasurementError: If the model refuses the inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
        >>> activation_map(net, torch.rand(5, 1, 8, 8), "0", neuron=1).shape
        torch.Size([5, 8, 8])
    """
    given_model(model)
    layer = layer_of(model, layer)
    chosen = slice(None) if neuron is None else slice(index := neuron_of(model, layer, neuron), index + 1)
    readout = Readout(model, [layer], forward, stop=True)
    images = images_in(inputs)
    size, maps = require_samples(inputs), []
    with readout.open(), torch.no_grad():
        for rows in torch.arange(size).split(_PART):
            activation = readout(rows_of(inputs, rows, size))[1][layer]
            require_positions(readout.layers[layer], activation)
            maps.append(resized(activation[:, chosen].mean(1, keepdim=True), images.shape[2:])[:, 0])
    return torch.cat(maps)


def grad_cam(request: AttributionRequest, layer: str) -> Float[Tensor, "batch 1 *space"]:
    """Compute Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): channels times their mean gradient, above zero.

    Args:
        request: The request; its readout has to read ``layer``.
        layer: A layer with positions.

    Returns:
        One map per sample, resized to the inputs.
    """
    maps = []
    for rows in request.parts():
        values = request.explained.values[rows].detach().requires_grad_()
        total = request.value(values, rows).sum()
        capture = request.readout.capture
        assert capture is not None, "the layer has been read"
        activation = capture.activations[layer]
        require_positions(request.readout.layers[layer], activation)
        gradient = torch.autograd.grad(total, activation, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise MeasurementError(
                f"layer: {request.objective.name} does not depend on {layer}; take one in front of it"
            )
        weights = gradient.flatten(2).mean(2).view(*gradient.shape[:2], *[1] * (gradient.ndim - 2))
        cam = (weights * activation).sum(1, keepdim=True).relu()
        maps.append(resized(cam.detach(), request.explained.shape[2:]))
    return torch.cat(maps)


def require_positions(layer: Layer, activation: Tensor) -> None:
    """Refuse activations that cannot be laid over an image.

    Raises:
        ArgumentError: If the layer has no positions.
    """
    if layer.axis != 1 or activation.ndim < 3:
        raise ArgumentError.of("layer", layer.name, "a layer with positions: a convolution")


def images_in(inputs: Any) -> Tensor:
    """Return the tensor among inputs that has positions, by which maps are resized.

    Raises:
        ArgumentError: If there is none.
    """
    tensors = inputs.values() if isinstance(inputs, dict) else [inputs] if isinstance(inputs, Tensor) else inputs
    for tensor in tensors if isinstance(tensors, list | tuple) or hasattr(tensors, "__iter__") else ():
        if isinstance(tensor, Tensor) and tensor.ndim > 2:
            return tensor
    raise ArgumentError.of("inputs", type(inputs).__name__, "images (batch, channel, height, width), or signals")


def resized(maps: Float[Tensor, "batch channel *space"], space: Sequence[int]) -> Tensor:
    """Resize maps by linear interpolation (bilinear for images).

    Returns:
        The maps with the axes of positions ``space``, ``(batch, channel, *space)``, corners not aligned.

    Raises:
        ArgumentError: If the two differ in their number of axes.
    """
    if maps.ndim - 2 != len(space):
        got = f"{len(space)} axes of positions"
        raise ArgumentError.of("inputs", got, f"{maps.ndim - 2}, as the layer's activations have")
    return nn.functional.interpolate(maps, tuple(space), mode=_MODES[len(space)], align_corners=False)
