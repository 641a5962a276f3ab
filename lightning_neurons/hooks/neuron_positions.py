"""Position of a layer's neurons in the result of a call, if each value there belongs to one neuron."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.hooks.chain_functions import COPIES, ELEMENTWISE, GET, MOVES, SET
from lightning_neurons.layers.registry import LINKS


@dataclass(frozen=True)
class Place:
    """The position of a layer's neurons in a tensor, and the stage of the chain that the tensor has reached.

    Attributes:
        axis: Axis of the neurons; None where a mask has picked values out of their places.
        stage: 0 for the layer's output, 1 after a norm, 2 after an activation function or a part of one.
    """

    axis: int | None
    stage: int = 0


def place_behind(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[tuple[Tensor, Place | None]],
    made: Tensor,
    affine: bool,
) -> Place | None:
    """Find where the neurons lie in the result of a call.

    Args:
        function: The function that was called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        inputs: The tensors that it read, with the places of those that are the layer's values.
        made: Its result.
        affine: Whether it only scales and shifts.

    Returns:
        Axis and stage of the result, or None if the call is no step of a chain.
    """
    own = [(tensor, place) for tensor, place in inputs if place is not None]
    first = inputs[0][1]
    stage = max(place.stage for _, place in own)
    kind = LINKS.get(function)
    if kind == "norm":
        is_next = first is not None and len(own) == 1 and first.axis is not None and stage == 0
        return Place(first.axis, 1) if is_next and first is not None else None
    if function is SET:
        return _set(args, inputs)
    if function in MOVES or function is GET:
        if first is None or first.axis is None or len(own) > 1:
            return Place(None, 2) if function is GET and _picks(args, inputs) else None
        axis = axis_behind(function, args, kwargs, first.axis, made)
        return None if axis is None else Place(axis, stage)
    if function not in ELEMENTWISE and function not in COPIES:
        return None
    axes = {None if place.axis is None else place.axis % tensor.ndim for tensor, place in own if tensor.ndim}
    if len(axes) != 1 or any(tensor.shape != made.shape for tensor, _ in own):
        return None
    return Place(own[0][1].axis, stage if affine or kind == "dropout" else 2)


def _picks(args: Sequence[Any], inputs: Sequence[tuple[Tensor, Place | None]]) -> bool:
    """Return whether ``x[mask]`` picks values by a mask of the same layer."""
    places = [place for _, place in inputs]
    return len(inputs) == 2 and None not in places and _is_mask(args[1], args[0])


def _is_mask(mask: Any, tensor: Tensor) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == tensor.shape


def _set(args: Sequence[Any], inputs: Sequence[tuple[Tensor, Place | None]]) -> Place | None:
    """Return the place behind ``x[mask] = ...`` if the mask, and the values if they vary, are of the same layer."""
    mask = inputs[1][1] if len(inputs) > 1 else None
    if mask is None or mask.axis is None or not _is_mask(args[1], args[0]):
        return None
    value = inputs[2] if len(inputs) > 2 else None
    if value is not None and value[0].ndim and (value[1] is None or value[1].axis is not None):
        return None
    return Place(mask.axis, 2)


def axis_behind(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], axis: int, made: Tensor
) -> int | None:
    """Return the neuron axis after a change of layout; None if the neurons have no axis of their own there.

    Example:
        >>> x = torch.zeros(2, 3, 4)
        >>> axis_behind(Tensor.transpose, (x, 1, 2), {}, -1, x.transpose(1, 2))
        1
        >>> axis_behind(Tensor.flatten, (x, 1), {}, -1, x.flatten(1)) is None
        True
    """
    source = args[0] if args else kwargs["input"]
    neurons = source.shape[axis]
    if neurons < 2 or made.numel() != source.numel():
        return None
    # The same function runs on a tensor that has memory along the neuron axis alone.
    strides = [0] * source.ndim
    strides[axis] = 1
    form = torch.empty(neurons, dtype=torch.int8, device="cpu").as_strided(source.shape, strides)
    rest = args[1:] if args else ()
    try:
        moved = function(form, *rest, **{name: value for name, value in kwargs.items() if name != "input"})
    except (RuntimeError, TypeError, ValueError, IndexError):  # a view that lays neurons and something else as one
        return None
    if moved.untyped_storage().data_ptr() != form.untyped_storage().data_ptr():
        return None
    axes = [d for d in range(moved.ndim) if moved.shape[d] > 1 and moved.stride(d) != 0]
    if len(axes) != 1 or moved.shape[axes[0]] != neurons:
        return None
    if axes[0] == axis % source.ndim and source.ndim == moved.ndim:
        return axis
    return -1 if axes[0] == moved.ndim - 1 else axes[0]
