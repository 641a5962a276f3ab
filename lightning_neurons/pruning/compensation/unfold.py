"""Inputs of a layer as a matrix of inputs and positions: of channels, or of whole receptive patches."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.layers.width_handlers import axis_of, handler_of


def batched(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a convolution or linear layer, with a batch axis."""
    given: Tensor = (args or tuple(kwargs.values()))[0].detach()
    if given.is_nested:  # sequences without their padding, as inside of an encoder of torch
        return torch.cat(given.unbind())
    axis = axis_of(module)
    return given.unsqueeze(0) if axis is not None and given.ndim == -axis else given


def by_feature(module: nn.Module) -> bool:
    """Return whether neurons lie on the last axis of what a layer reads, rather than on the first behind the batch."""
    return axis_of(module) == -1


def channels(module: nn.Module, inputs: Tensor) -> Float[Tensor, "input position"]:
    """Return inputs by channel, or by feature; everything else is a position.

    Args:
        module: The layer.
        inputs: ``(batch, channel, *space)``, of a linear layer ``(*batch, feature)``.

    Returns:
        A matrix; its positions are those of all samples.
    """
    if by_feature(module):
        return inputs.reshape(-1, inputs.shape[-1]).T
    return inputs.transpose(0, 1).flatten(1)


def has_patches(module: nn.Module) -> bool:
    """Return whether a layer multiplies patches by its weight: a plain convolution."""
    handler = handler_of(module)
    return handler is not None and handler.unfolds


def patches(module: Any, inputs: Tensor) -> Float[Tensor, "input position"]:
    """Return the receptive patches of a convolution: channels times taps, at each position of its output.

    Args:
        module: A convolution for which ``has_patches``.
        inputs: ``(batch, channel, *space)``; channels may be fewer than the layer's.

    Returns:
        A matrix; its positions are those of all samples.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    view = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), 2
    ):
        view = view.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    space = len(module.kernel_size)
    # (batch, channel, *space, *taps) -> (channel, *taps, batch, *space)
    order = [1, *range(2 + space, 2 + 2 * space), 0, *range(2, 2 + space)]
    return view.permute(order).flatten(space + 1).flatten(0, space)
