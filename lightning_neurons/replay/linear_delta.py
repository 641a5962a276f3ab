"""Shortcut for a linear downstream layer: only the difference in the changed neurons goes through it.

From the activation on, as long as functions treat each channel by itself (normalisation, activation function, pooling,
a residual sum), only the changed neurons differ from the recorded run. A convolution or linear layer that reads such a
value gives the recorded output plus its output for the difference in those few channels. Equal up to rounding.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that the field uses)
from torch import Tensor

from lightning_neurons.isolation.tensors import tensors_in
from lightning_neurons.isolation.writes import share_memory
from lightning_neurons.layers.registry import LINKS

READERS: dict[Callable[..., Any], tuple[str, ...]] = {
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d), ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    ),
    F.linear: ("input", "weight", "bias"),
}
"""Linear functions and the names of their arguments."""

_SUMS: frozenset[Callable[..., Any]] = frozenset({
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__,
})  # fmt: skip
_POOLS: frozenset[Callable[..., Any]] = frozenset({
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
})  # fmt: skip
_CHANNELWISE = frozenset(f for f, kind in LINKS.items() if kind == "activation") | _SUMS | _POOLS


@dataclass
class Narrow:
    """The calls, for every activation, whose results differ from the recorded ones in its changed neurons alone.

    Attributes:
        twins: By the call of an activation and a later call, the call whose result is that call's input.
    """

    twins: dict[int, dict[int, int]] = field(default_factory=dict)
    _narrow: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    _touched: dict[int, set[int]] = field(default_factory=dict)

    def begin(self, value: Tensor, call: int, axis: int) -> None:
        """Record that a call has made an activation."""
        self._narrow.setdefault(id(value), {})[call] = call, axis % value.ndim

    def see(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, call: int
    ) -> None:
        """Record a call and its result."""
        inputs = list(tensors_in((args, kwargs)))
        touched = set().union(*(self._touched.get(id(t), ()) for t in inputs))
        narrow = {
            point: (id(t), *place)
            for t in inputs
            for point, place in self._narrow.get(id(t), {}).items()
            if point != call  # an activation that is made in place is both
        }
        for point, (source, twin, axis) in narrow.items():
            reads = func in READERS and args and id(args[0]) == source and point not in touched
            is_same_channels = (
                isinstance(out, Tensor) and out.ndim > axis and out.shape[axis] == _shape_of(inputs, source)[axis]
            )
            if reads and _is_dense(func, args, kwargs, axis):
                self.twins.setdefault(point, {})[call] = twin
            elif point not in touched and is_same_channels and _is_channelwise(func, args, kwargs, inputs, out):
                self._narrow.setdefault(id(out), {})[point] = call, axis
                continue
            touched.add(point)
        if touched:
            for tensor in (*tensors_in(out), *(t for t in inputs if any(t is o for o in tensors_in(out)))):
                self._touched.setdefault(id(tensor), set()).update(touched)


def through_reader(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    index: Tensor,
    before: Tensor,
    output: Tensor,
) -> Tensor:
    """Return the output of a linear function for a changed input.

    Args:
        func: The linear function.
        args: Its arguments, with the changed input.
        kwargs: Its keyword arguments.
        index: Indices of the input channels that have changed.
        before: Their values before the change.
        output: The output for the unchanged input.

    Returns:
        A new tensor of the shape of ``output``, equal to the full computation up to rounding.
    """
    arguments = dict(zip(READERS[func], args, strict=False)) | dict(kwargs)
    axis = arguments["input"].ndim - 1 if func is F.linear else 1
    change = arguments["input"].index_select(axis, index) - before
    few = {"input": change, "weight": arguments["weight"].index_select(1, index), "bias": None}
    return func(**{**arguments, **few}).add_(output)  # type: ignore[no-any-return]  # memory that is in the cache


def _is_dense(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], axis: int) -> bool:
    arguments = dict(zip(READERS[func], args, strict=False)) | dict(kwargs)
    wanted = arguments["input"].ndim - 1 if func is F.linear else 1
    return (
        axis == wanted and arguments.get("groups", 1) == 1 and arguments["input"].ndim == arguments["weight"].ndim
    ) or (func is F.linear and axis == wanted)


def _is_channelwise(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor], out: Tensor
) -> bool:
    if any(share_memory(t, out) for t in inputs):
        return False  # in place, or a view
    if func is F.batch_norm:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        return not training
    return func in _CHANNELWISE


def _shape_of(tensors: Iterable[Tensor], wanted: int) -> torch.Size:
    return next(t.shape for t in tensors if id(t) == wanted)
