"""Positions of neurons on both sides of each connection in Torch-Pruning's graph.

Torch-Pruning guesses from the modules nearby, and gives up on a whole model where that fails. Here sizes are those of
the forward, and each operation is looked up by itself; only where neurons are spread over several axes, as in heads, is
its guess taken.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch_pruning
from torch_pruning import _helpers
from torch_pruning.dependency import index_mapping

from lightning_neurons.dependency.layout import Table, behind, contracts, joined, name_of, parts_of, reduces, shape_of
from lightning_neurons.layers.width_handlers import axis_of

_TYPES = torch_pruning.ops.OPTYPE
_GUESSES: dict[Any, Callable[[Any, Any], None]] = {
    _TYPES.CONCAT: index_mapping.update_concat_index_mapping,
    _TYPES.RESHAPE: index_mapping.update_reshape_index_mapping,
    _TYPES.UNBIND: index_mapping.update_unbind_index_mapping,
    _TYPES.EXPAND: index_mapping.update_expand_index_mapping,
    _TYPES.SLICE: index_mapping.update_slice_index_mapping,
}
_PRODUCTS = {"Mm", "Bmm", "Addmm", "Baddbmm", "Addbmm", "Mv", "Dot", "Convolution", "Cdist", "EuclideanDist"}
_PLAIN = (ArithmeticError, AttributeError, AssertionError, LookupError, RecursionError, TypeError, ValueError)
_Input = tuple[Any, Any, int, int]
"""A node, its entry in autograd's graph, the number of its output, and that of the reading node's input."""

_Mapping = Callable[[Sequence[Any]], list[Any]]


class LostError(Exception):
    """An error where neurons cannot be followed; its text says why."""


@dataclass(frozen=True)
class _Edge:
    """A connection by which an operation reads the result of another one.

    Attributes:
        source: The node that is read.
        axis: Axis of the neurons in the operation's result, if that is known.
        part: Beginning and end of the part that is read, if the source splits its values.
        table: For each place in the result, the place before the operation; None if they are the same.
        into: For each place before, the place in the result, for operations that make one place of several.
        exact: Whether the table is known.
        lost: The reason why neurons cannot be followed along it, or None.
        reduces: Whether the operation reduces all neurons to one value.
        aside: Whether the neurons are on another axis than those that are followed through the operation.
    """

    source: Any
    axis: int | None = None
    part: tuple[int, int] | None = None
    table: Table | None = None
    into: Table | None = None
    exact: bool = True
    lost: str | None = None
    reduces: bool = False
    aside: bool = False

    def along(self, guess: _Mapping | None) -> list[_Mapping | None]:
        """Return the changes of indices on the way from the source to the operation."""
        return [self._part(-1), self._step(guess, back=False)]

    def against(self, guess: _Mapping | None) -> list[_Mapping | None]:
        """Return the changes of indices on the way from the operation to the source."""
        if self.aside:
            return [_moved({})]
        return [self._step(guess, back=True), self._part(1)]

    def _part(self, sign: int) -> _Mapping | None:
        if self.part is None:
            return None
        start, end = self.part
        places = {i: (i - start,) for i in range(start, end)}
        return _moved(places if sign < 0 else {there: (i,) for i, (there,) in places.items()})

    def _step(self, guess: _Mapping | None, *, back: bool) -> _Mapping | None:
        if self.lost is not None:
            return _lost(self.lost)
        if self.table is None and self.into is None:
            return None if self.exact else guess
        pairs = enumerate(self.table) if self.table is not None else ((a, b) for b, a in enumerate(self.into or ()))
        places: dict[int, tuple[int, ...]] = {}
        for after, before in pairs:
            key, value = (after, before) if back else (before, after)
            places[key] = (*places.get(key, ()), value)
        return _moved(places)


def _moved(places: Mapping[int, tuple[int, ...]]) -> _Mapping:
    def move(pairs: Sequence[Any]) -> list[Any]:
        return [
            _helpers._HybridIndex(idx=place, root_idx=pair.root_idx)
            for pair in pairs
            for place in places.get(pair.idx, ())
        ]

    return move


def _lost(reason: str) -> _Mapping:
    def lose(pairs: Sequence[Any]) -> list[Any]:
        raise LostError(f"its neurons cannot be followed: {reason}")

    return lose


def lay_out(graph: Any) -> None:
    """Set, for each connection of the graph, the way in which indices change along it."""
    axes: dict[Any, int | None] = {}
    for node in _in_order(graph.module2node.values()):
        inputs = _inputs_of(graph, node)
        edges = [] if inputs is None else [_edge(graph, node, number, inputs, axes) for number in range(len(inputs))]
        axes[node] = _own_axis(node) if _is_layer(node) else _most([e.axis for e in edges if e.axis is not None])
        edges = edges if _is_layer(node) else [_beside(edge, node, axes[node]) for edge in edges]
        if name_of(node.grad_fn) in _PRODUCTS and not _is_layer(node):
            graph.products.update((edge.source, node) for edge in edges)
        graph.reductions.update((edge.source, node) for edge in edges if edge.reduces)
        failure = None if all(edge.exact for edge in edges) and inputs is not None else _guess(graph, node)
        _connect(node, edges, failure)


def _most(axes: Sequence[int]) -> int | None:
    """Return the most frequent axis, the first of several."""
    return max(dict.fromkeys(axes), key=axes.count, default=None)


def _beside(edge: _Edge, node: Any, axis: int | None) -> _Edge:
    if edge.axis is None or edge.axis == axis:
        return edge
    name = name_of(node.grad_fn)
    pairs = f"a function multiplies each with each ({name.lower()})"  # as in a Gram matrix
    lost = pairs if name in _PRODUCTS else "they are combined with neurons on another axis"
    return replace(edge, lost=lost, aside=True)


def _in_order(nodes: Iterable[Any]) -> list[Any]:
    """Return nodes after those that they read, except in loops."""
    order: dict[Any, None] = {}
    stack = [(node, False) for node in nodes]
    begun = set()
    while stack:
        node, ready = stack.pop()
        if ready:
            order[node] = None
        elif node not in begun:
            begun.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source in node.inputs if source not in begun)
    return list(order)


def _is_layer(node: Any) -> bool:
    """Return whether the type of a node's module tells the axis of its neurons."""
    return node.type == _TYPES.PARAMETER or axis_of(node.module) is not None


def _own_axis(node: Any) -> int | None:
    if node.type == _TYPES.PARAMETER:
        return int(node.pruning_dim)
    shape = shape_of(node.grad_fn)
    return None if shape is None else _neuron_axis(node, len(shape))


def _neuron_axis(node: Any, ndim: int) -> int:
    """Return the axis of the neurons in a layer's input and output."""
    axis = axis_of(node.module)
    assert axis is not None, "a layer says where"
    return axis if axis >= 0 else ndim + axis


def _inputs_of(graph: Any, node: Any) -> list[_Input] | None:
    """Return the inputs of a node.

    None for a module that has run several times, as they cannot be told apart.
    """
    own = {id(parameter) for parameter, _ in graph.unwrapped_parameters}
    functions = [
        (f, k, place)
        for place, (f, k) in enumerate(getattr(node.grad_fn, "next_functions", ()))
        if f is not None and (name_of(f) != "AccumulateGrad" or id(f.variable) in own)
    ]
    if len(functions) != len(node.inputs):
        return None
    return [(source, *found) for source, found in zip(node.inputs, functions, strict=True)]


def _edge(graph: Any, node: Any, number: int, inputs: Sequence[_Input], axes: Mapping[Any, int | None]) -> _Edge:
    source, function, k, place = inputs[number]
    before, axis = _shape(function, k), axes.get(source)
    if before is not None and math.prod(before) == 1:  # a number scales or shifts all alike
        return _Edge(source, table=())
    if before is None or axis is None or not 0 <= axis < len(before):
        return _Edge(source, exact=_is_layer(node))
    part = None
    if _splits(function):
        ends = parts_of(function, axis)
        part = None if ends is None else (ends[k], ends[k + 1])
    if _is_layer(node):  # a layer treats all places on other axes alike
        alike = axis != _neuron_axis(node, len(before))
        return _Edge(source, axis, part, table=() if alike else None)
    if _splits(node.grad_fn):
        return _Edge(source, axis, part)
    if name_of(node.grad_fn) == "Cat" and joined(node.grad_fn, len(before)) == axis:
        return _joined(node, source, place, axis, part)
    ending = _ending(graph, node, place, before, axis)
    if ending is not None:
        return replace(ending, source=source, part=part)
    if name_of(node.grad_fn) == "Glu" and joined(node.grad_fn, len(before)) == axis:
        return _Edge(source, axis, part, into=(*range(before[axis] // 2),) * 2)
    if name_of(node.grad_fn) == "Unbind":
        return _Edge(source, axis - (joined(node.grad_fn, len(before)) < axis), part)
    return _moved_edge(node, source, before, axis, part)


def _moved_edge(node: Any, source: Any, before: Sequence[int], axis: int, part: tuple[int, int] | None) -> _Edge:
    found = behind(node.grad_fn, before, axis)
    if found is None and before[axis] == 1:  # broadcast, it only scales or shifts
        return _Edge(source, None, part, table=())
    if found is None:
        return _Edge(source, None, part, exact=False)
    added = "something between them and their consumers adds channels" if -1 in (found[1] or ()) else None
    return _Edge(source, found[0], part, found[1], lost=added)


def _ending(graph: Any, node: Any, place: int, before: Sequence[int], axis: int) -> _Edge | None:
    """Return the edge after which neurons are no separate places any more, or None if they still are."""
    function = node.grad_fn
    name = name_of(function)
    if function not in graph.inside and contracts(function, place, before, axis):  # its result has no such neurons
        return _Edge(None, lost=f"a function reads them, not a layer ({name.lower()})", aside=True)
    if name in ("Unbind", "Select") and joined(function, len(before)) == axis:
        return _Edge(None, lost="single ones of them are picked out")
    if reduces(function, len(before), axis) and before[axis] > 1:
        return _Edge(None, lost=f"{name.lower()} makes one value of all of them", reduces=True)
    return None


def _joined(node: Any, source: Any, place: int, axis: int, part: tuple[int, int] | None) -> _Edge:
    sizes = [None if f is None else _shape(f, i) for f, i in node.grad_fn.next_functions]
    widths = [None if size is None else size[axis] for size in sizes]
    total = shape_of(node.grad_fn)
    if total is None or widths.count(None) > 1:
        return _Edge(source, None, part, lost="they are concatenated with more than one constant")
    rest = total[axis] - sum(width or 0 for width in widths)
    start = sum(rest if width is None else width for width in widths[:place])
    width = widths[place] or 0
    return _Edge(source, axis, part, into=tuple(range(start, start + width)))


def _shape(function: Any, number: int) -> tuple[int, ...] | None:
    if name_of(function) == "AccumulateGrad":
        return tuple(function.variable.shape)
    return shape_of(function, number)


def _splits(function: Any) -> bool:
    return name_of(function).startswith(("Split", "UnsafeSplit"))


def _guess(graph: Any, node: Any) -> str | None:
    """Let Torch-Pruning guess where neurons lie after an operation.

    Returns:
        Why that fails, or None if it does not or there is nothing to guess.
    """
    guess = _GUESSES.get(node.type)
    if guess is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guess(graph, node)
    except _PLAIN:  # sizes do not add up
        return f"it is not understood how {name_of(node.grad_fn).lower()} lays them out"
    return None


def _connect(node: Any, edges: Sequence[_Edge], failure: str | None) -> None:
    counts: dict[Any, int] = {}
    for edge in edges:
        number = counts.setdefault(edge.source, 0)
        counts[edge.source] += 1
        along = [d for d in edge.source.dependencies if d.target is node][number]
        against = [d for d in node.dependencies if d.target is edge.source][number]
        if not edge.exact and failure is not None:
            edge = replace(edge, lost=failure)
        along.index_mapping = edge.along(next(filter(None, along.index_mapping), None))
        against.index_mapping = edge.against(next(filter(None, against.index_mapping), None))
