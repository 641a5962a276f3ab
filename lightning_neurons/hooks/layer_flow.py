"""Flow of values between layers: layers that no other layer reads, and layers summed into one residual stream.

Fed by ``trace.py`` with every call of one forward. A tensor remembers the layers that it comes from with no other layer
in between, and, as long as each neuron stays a channel of its own, the stream that it is part of. Tensors are held
weakly: nothing lives longer for being followed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_neurons.isolation.tensors import tensors_in
from lightning_neurons.layers.registry import LINKS, PASSING

_MEANS = {torch.mean, Tensor.mean}


def spread_behind(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Tensor,
    axis: int,
    spread: int,
) -> int:
    """Return the number of neighbouring entries on the neuron axis of ``out`` that belong to one neuron.

    Args:
        function: A function that hands neurons on (``registry.PASSING``).
        args: Its arguments, the tensor that it reads first.
        kwargs: Its keyword arguments.
        out: Its result.
        axis: Neuron axis of the tensor that it read: 1 for channels, -1 for features.
        spread: Number of entries per neuron in the tensor that it read.

    Returns:
        Entries per neuron; 0 if that is unknown.
    """
    source: Tensor = args[0] if args else kwargs["input"]
    if source.ndim < 2 or out.ndim < 2 or source.shape[0] != out.shape[0]:
        return 0
    if function in _MEANS:
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = [dim] if isinstance(dim, int) else list(dim or range(source.ndim))
        return 0 if {d % source.ndim for d in dims} & {0, axis % source.ndim} else spread
    if axis % source.ndim != 1:  # features behind tokens: only what leaves the shape alone is sure
        return spread if out.shape == source.shape else 0
    if out.shape[1] == source.shape[1]:
        return spread
    space = source[0, 0].numel()
    return spread * space if out.ndim == 2 and out.shape[1] == source.shape[1] * space else 0


Call = tuple[str, int]
"""A layer and the number of its call."""

_WEIGHTS: Call = "", 0
"""The origin of weight matrices: a product with one is a linear map that is no module."""

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_JOINS = _ADDITIONS | {"cat", "concat", "concatenate"}
_ELEMENTWISE = _ADDITIONS | frozenset({
    "sub", "sub_", "__sub__", "__rsub__", "__isub__", "rsub", "mul", "mul_", "__mul__", "__rmul__", "__imul__",
    "multiply", "div", "div_", "__truediv__", "__itruediv__", "true_divide", "clone", "contiguous", "to", "float",
    "half", "double", "bfloat16", "type_as", "type", "detach", "cpu", "cuda",
})  # fmt: skip
_RESHAPES = frozenset({"flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"})


class _Stream(NamedTuple):
    """The residual stream of a tensor's channels, named by one of its layers, and the axis of the channels."""

    layer: str
    axis: int


class Flow:
    """The flow of values through one forward; ask ``outputs`` and ``twins`` afterwards."""

    def __init__(self) -> None:
        self._nearest: Any = WeakIdKeyDictionary()
        self._streams: Any = WeakIdKeyDictionary()
        self._root: dict[str, str] = {}  # layer -> another one of its stream, or itself
        self._calls: dict[str, int] = {}
        self._read: set[Call] = set()
        self._arrived: set[Call] = set()  # in a result or a single number, such as the loss

    def enters(self, layer: str, inputs: Any) -> None:
        """Record that a layer is about to read its inputs."""
        self._read |= {call for t in tensors_in(inputs) for call in self._nearest.get(t, ()) if call[0] != layer}

    def leaves(self, layer: str, output: Any, axis: int) -> None:
        """Record the output of a layer, whose neurons lie on ``axis``."""
        self._root.setdefault(layer, layer)
        call = layer, self._calls.get(layer, 0)
        self._calls[layer] = call[1] + 1
        for tensor in tensors_in(output):
            self._nearest[tensor] = frozenset({call})
            self._streams.pop(tensor, None)
        if isinstance(output, Tensor) and -output.ndim <= axis < output.ndim:
            self._streams[output] = _Stream(layer, axis % output.ndim)

    def arrives(self, result: Any) -> None:
        """Record the result of an outermost module that has submodules."""
        self._arrived |= {call for tensor in tensors_in(result) for call in self._nearest.get(tensor, ())}

    def goes_on_as(self, seen: Tensor, output: Tensor) -> None:
        """Record that the model goes on with another tensor of the same values."""
        for record in (self._nearest, self._streams):
            if seen in record:
                record[output] = record[seen]

    def passes(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, target: Tensor | None
    ) -> None:
        """Record a call of a function outside of the layers; ``target`` is the tensor that it wrote into, if any."""
        keeps = getattr(func, "__name__", "") in _ELEMENTWISE or func in LINKS
        inputs = [t for t in tensors_in((args, kwargs)) if not (keeps and isinstance(t, nn.Parameter))]
        origins = [self._origin(tensor) for tensor in inputs]
        nearest = frozenset[Call]().union(*origins)
        if not nearest:
            return
        made = [*tensors_in(out), *([] if target is None else [target])]
        stream = self._stream_behind(func, args, kwargs, inputs, made[0]) if made else None
        if _WEIGHTS in nearest and any(_WEIGHTS not in origin for origin in origins):  # a linear map without a module
            self._read |= nearest
            nearest, stream = frozenset(), None
        if isinstance(out, Tensor) and not out.ndim:
            self._arrived |= nearest
        for tensor in made:
            self._nearest[tensor] = nearest
            self._streams.pop(tensor, None)
            if stream is not None:
                self._streams[tensor] = stream

    def outputs(self) -> frozenset[str]:
        """Return the layers of the model's output: those that no other layer reads, and whose values reach its result.

        If every layer is read, as when predictions are fed back, those whose last call is not; none if that is all.
        """
        unread = {call for call in self._last_calls() if call in self._arrived - self._read}
        never = {name for name, _ in unread if all((name, i) not in self._read for i in range(self._calls[name]))}
        layers = never or {name for name, _ in unread}
        return frozenset(layers if len(layers) < len(self._calls) else ())

    def is_lost(self, layer: str) -> bool:
        """Return whether the values of some call of a layer reach neither another layer nor the model's result."""
        calls = {(layer, number) for number in range(self._calls.get(layer, 0))}
        return not calls <= self._read | self._arrived

    def twins(self, layer: str) -> tuple[str, ...]:
        """Return the other layers whose values are added to this one's, neuron by neuron, in the order of their run."""
        root = self._find(layer) if layer in self._root else None
        return tuple(other for other in self._root if other != layer and self._find(other) == root)

    def _last_calls(self) -> list[Call]:
        return [(name, count - 1) for name, count in self._calls.items()]

    def _origin(self, tensor: Tensor) -> frozenset[Call]:
        if isinstance(tensor, nn.Parameter):
            return frozenset({_WEIGHTS}) if sum(size > 1 for size in tensor.shape) > 1 else frozenset()
        origin: frozenset[Call] = self._nearest.get(tensor, frozenset())
        return origin

    def _stream_behind(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        out: Tensor,
    ) -> _Stream | None:
        carried = [(t, s) for t in inputs if (s := self._streams.get(t)) is not None]
        name = getattr(func, "__name__", "")
        if name in _ELEMENTWISE:  # what is broadcast, such as a gate, only scales
            carried = [(t, s) for t, s in carried if t.shape == out.shape]
        if not carried or len({s.axis for _, s in carried}) > 1:
            return None
        tensor, stream = carried[0]
        axis = axis_behind(func, args, kwargs, tensor, out, stream.axis)
        several = len({self._find(s.layer) for _, s in carried}) > 1
        if axis is None or (several and name not in _JOINS):
            return None
        self._join([s.layer for _, s in carried])
        return _Stream(stream.layer, axis)

    def _find(self, layer: str) -> str:
        while self._root[layer] != layer:
            layer = self._root[layer]
        return layer

    def _join(self, layers: Sequence[str]) -> None:
        first = self._find(layers[0])
        for layer in layers[1:]:
            self._root[self._find(layer)] = first


def axis_behind(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    source: Tensor,
    out: Tensor,
    axis: int,
) -> int | None:
    """Return the axis on which the neurons of ``source`` lie in the result of a call.

    Args:
        func: The function that was called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        source: The tensor that it read.
        out: Its result.
        axis: Axis of the neurons in ``source``.

    Returns:
        The axis of ``out``, or None if each neuron is not a channel of its own there.

    Example:
        >>> x = torch.zeros(2, 5, 3, 3)
        >>> axis_behind(torch.permute, (x, (0, 2, 3, 1)), {}, x, x.permute(0, 2, 3, 1), 1)
        3
        >>> axis_behind(torch.flatten, (x, 2), {}, x, x.flatten(2), 1)
        1
        >>> axis_behind(torch.flatten, (x, 1), {}, x, x.flatten(1), 1)
    """
    name, sizes = getattr(func, "__name__", ""), source.shape
    if name in ("permute", "transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis"):
        # The strides of a probe say where each axis has gone, whatever form the arguments have.
        probe = torch.empty(0).as_strided((0,) * source.ndim, tuple(range(1, source.ndim + 1)))
        named = {name: probe if value is source else value for name, value in kwargs.items()}
        moved: Tensor = func(*(probe if value is source else value for value in args), **named)
        return list(moved.stride()).index(axis + 1)
    if name in _JOINS - _ADDITIONS:  # tokens behind tokens
        return axis if out.shape[axis] == sizes[axis] else None
    if name in _RESHAPES:
        before = math.prod(sizes[:axis])
        places = [i for i, n in enumerate(out.shape) if n == sizes[axis] and math.prod(out.shape[:i]) == before]
        return places[0] if places else None
    same = out.ndim == source.ndim and out.shape[axis] == sizes[axis]
    return axis if same and (name in _ELEMENTWISE or func in LINKS or func in PASSING) else None
