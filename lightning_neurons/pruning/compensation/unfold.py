"""What a reader reads, as a matrix of inputs and positions: of channels, or of whole receptive patches."""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def batched(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a convolution or linear layer was given, with a batch axis."""
    given: Tensor = (args[0] if args else kwargs["input"]).detach()
    axes = 2 + len(module.kernel_size) if isinstance(module, _ConvNd) else 2
    return given.unsqueeze(0) if given.ndim < axes else given


def channels(module: nn.Module, inputs: Tensor) -> Float[Tensor, "input position"]:
    """Inputs by channel, or by feature; everything else is a position.

    Args:
        module: The reader.
        inputs: ``(batch, channel, *space)``, of a linear layer ``(*batch, feature)``.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]).T
    return inputs.transpose(0, 1).flatten(1)


def has_patches(module: nn.Module) -> bool:
    """Whether a layer multiplies patches by its weight: a plain convolution."""
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)


def patches(module: nn.Module, inputs: Tensor) -> Float[Tensor, "input position"]:
    """The receptive patches of a convolution: channels times taps, at each position of its output.

    Args:
        module: A convolution for which ``has_patches``.
        inputs: ``(batch, channel, *space)``; channels may be fewer than the layer's.
    """
    assert isinstance(module, _ConvNd), "asked before"
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
