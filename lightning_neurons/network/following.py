"""Follow neurons through Torch-Pruning's graph: one odd block spoils what passes through it, and nothing else.

Torch-Pruning guesses sizes from the modules nearby, gives up on a whole model where that fails, and collects lists of
indices path by path, of which there may be endlessly many. Here sizes are those of the forward, each operation is asked
for by itself, and single pairs of a place and a neuron are followed: there are finitely many of them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch_pruning
from torch import Tensor, nn
from torch_pruning import _helpers
from torch_pruning.dependency import index_mapping

from lightning_neurons.network.layer import public_name
from lightning_neurons.network.layout import Table, behind, joined, name_of, parts_of, reduces, shape_of

_TYPES = torch_pruning.ops.OPTYPE
_GUESSES: dict[Any, Callable[[Any, Any], None]] = {
    _TYPES.CONCAT: index_mapping.update_concat_index_mapping,
    _TYPES.RESHAPE: index_mapping.update_reshape_index_mapping,
    _TYPES.UNBIND: index_mapping.update_unbind_index_mapping,
    _TYPES.EXPAND: index_mapping.update_expand_index_mapping,
    _TYPES.SLICE: index_mapping.update_slice_index_mapping,
}
_CHANNELS = (_TYPES.CONV, _TYPES.DEPTHWISE_CONV, _TYPES.BN, _TYPES.IN, _TYPES.GN)
_FEATURES = (_TYPES.LINEAR, _TYPES.LN, _TYPES.EMBED, _TYPES.MHA, _TYPES.LSTM)
_PRODUCTS = {"Mm", "Bmm", "Addmm", "Baddbmm", "Addbmm", "Mv", "Dot", "Convolution", "Cdist", "EuclideanDist"}
_PLAIN = (ArithmeticError, AttributeError, AssertionError, LookupError, RecursionError, TypeError, ValueError)
_Mapping = Callable[[Sequence[Any]], list[Any]]


class LostError(Exception):
    """Neurons cannot be followed; says why."""


@dataclass
class Arrival:
    """A module that is narrower when neurons go.

    Attributes:
        module: The module, parameter or operation.
        makes: Whether it makes the neurons, as against reading them.
        axis: Of a parameter, the axis.
        places: The places in it, each with the neuron that takes it.
    """

    module: Any
    makes: bool
    axis: int
    places: dict[tuple[int, int], None] = field(default_factory=dict)


def build(model: nn.Module, run: Callable[[nn.Module], Any], outputs: Callable[[Any], Any]) -> Any:
    """Build the graph of a model.

    Args:
        model: A copy that nobody else needs.
        run: Runs it.
        outputs: Finds the tensors in what it returns.

    Returns:
        The graph. Modules that ran are in its ``ran``; in ``products`` and ``reductions`` the pairs of nodes between
        which neurons stop being themselves.
    """
    graph = torch_pruning.DependencyGraph()
    graph.model, graph.verbose, graph.ignored_params = model, False, []
    graph._module2name = {module: name for name, module in model.named_modules()}
    graph._param_to_name, graph.unwrapped_parameters = graph._detect_unwrapped_parameters(None)
    graph.ran, graph.products, graph.reductions = set(), set(), set()
    with _plain(model), _noted(model, graph.ran):
        graph.module2node = graph._trace(model, (), lambda copy, _: run(copy), output_transform=outputs)
    graph._build_dependency(graph.module2node)
    _lay_out(graph)
    return graph


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Let modules leave nodes by which the graph knows them."""
    # Inside, norms by instance lay samples and channels out as one axis.
    norms = [m for m in model.modules() if type(m).forward is nn.modules.instancenorm._InstanceNorm.forward]
    for norm in norms:
        norm.forward = lambda x: x * 1.0
    # A function that works in place on a view replaces the node that the view's module has left.
    handles = [m.register_forward_hook(_out_of_view) for m in model.modules() if not any(True for _ in m.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            del norm.forward


def _out_of_view(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


@contextmanager
def _noted(model: nn.Module, ran: set[nn.Module]) -> Iterator[None]:
    handles = [m.register_forward_hook(lambda module, i, out: ran.add(module)) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def follow(graph: Any, module: nn.Module, neurons: Iterable[int]) -> list[Arrival]:
    """Find what gets narrower with neurons of a module.

    Args:
        graph: What ``build`` has built.
        module: The module that makes the neurons.
        neurons: Some of its neurons.

    Raises:
        LostError: If an operation on the way is not understood.
    """
    handler = graph.get_pruner_of_module(module).prune_out_channels
    found: dict[tuple[Any, Any], Arrival] = {}
    stack: list[tuple[Any, Any, list[Any]]] = []
    limit = 8 * max((max(p.shape, default=1) for p in graph.model.parameters()), default=1)

    def arrive(node: Any, handler: Any, pairs: Iterable[Any]) -> None:
        if (node, handler) not in found:
            axis = int(node.pruning_dim) if node.type == _TYPES.PARAMETER else 0
            found[node, handler] = Arrival(node.module, graph.is_out_channel_pruning_fn(handler), axis)
        known = found[node, handler].places
        fresh = [pair for pair in pairs if pair not in known]
        known.update(dict.fromkeys(fresh))
        makes = handler == graph.get_pruner_of_module(node.module).prune_out_channels
        width = graph.get_out_channels(node) if makes else graph.get_in_channels(node)
        if any(pair.idx >= (width or limit) for pair in fresh):
            there = f" to {_name(graph, node)}" if width else ""
            raise LostError(f"its neurons cannot be followed{there}: something between them adds or moves channels")
        if fresh:
            stack.append((node, handler, fresh))

    arrive(graph.module2node[module], handler, [_helpers._HybridIndex(idx=i, root_idx=i) for i in neurons])
    while stack:
        node, handler, pairs = stack.pop()
        for dependency in node.dependencies:
            if dependency.is_triggered_by(handler):
                there: Sequence[Any] = pairs
                for mapping in dependency.index_mapping:
                    there = there if mapping is None or not there else mapping(there)
                if there:
                    arrive(dependency.target, dependency.handler, there)
    return list(found.values())


@dataclass(frozen=True)
class _Edge:
    """How an operation reads what another one has made.

    Attributes:
        source: What made it.
        axis: Where the neurons lie behind the operation, if that is known.
        part: Of what has been split, the beginning and end of the part that is read.
        table: The places before the operation, by place behind it; None if they are the same.
        exact: Whether the table is known.
        lost: Why nothing can be followed along it, if so.
        reduces: Whether the operation makes one value of all neurons.
    """

    source: Any
    axis: int | None = None
    part: tuple[int, int] | None = None
    table: Table | None = None
    exact: bool = True
    lost: str | None = None
    reduces: bool = False

    def along(self, guess: _Mapping | None) -> list[_Mapping | None]:
        """What happens to indices from the source to the operation."""
        return [self._part(-1), self._step(guess, back=False)]

    def against(self, guess: _Mapping | None) -> list[_Mapping | None]:
        """What happens to indices from the operation to the source."""
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
        if not self.exact or self.table is None:
            return None if self.exact else guess
        places: dict[int, tuple[int, ...]] = {}
        for after, before in enumerate(self.table):
            if before >= 0:
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


def _name(graph: Any, node: Any) -> str:
    names = graph._param_to_name if node.type == _TYPES.PARAMETER else graph._module2name
    return public_name(names.get(node.module) or "the output")


def _lay_out(graph: Any) -> None:
    """Give each connection of the graph the way in which indices change along it."""
    axes: dict[Any, int | None] = {}
    for node in _in_order(graph.module2node.values()):
        inputs = _inputs_of(graph, node)
        edges = [] if inputs is None else [_edge(node, number, inputs, axes) for number in range(len(inputs))]
        found = {edge.axis for edge in edges if edge.axis is not None}
        axes[node] = _own_axis(node) if _is_layer(node) else found.pop() if len(found) == 1 else None
        if name_of(node.grad_fn) in _PRODUCTS and not _is_layer(node):
            graph.products.update((edge.source, node) for edge in edges)
        graph.reductions.update((edge.source, node) for edge in edges if edge.reduces)
        failure = None if all(edge.exact for edge in edges) and inputs is not None else _guess(graph, node)
        _connect(node, edges, failure)


def _in_order(nodes: Iterable[Any]) -> list[Any]:
    """Nodes behind those that they read, but for loops."""
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
    """Whether a module says by itself where its neurons lie."""
    return node.type in _CHANNELS or node.type in _FEATURES or node.type == _TYPES.PARAMETER


def _own_axis(node: Any) -> int | None:
    if node.type == _TYPES.PARAMETER:
        return int(node.pruning_dim)
    shape = shape_of(node.grad_fn)
    if shape is None:
        return None
    if isinstance(node.module, nn.modules.conv._ConvNd):
        return len(shape) - 1 - len(node.module.kernel_size)
    return 1 if node.type in _CHANNELS else len(shape) - 1


def _inputs_of(graph: Any, node: Any) -> list[tuple[Any, Any, int]] | None:
    """The nodes that a node reads, each with its entry in the graph of autograd and the number of the output.

    None for a module that has run several times, where they are not known apart.
    """
    own = {id(parameter) for parameter, _ in graph.unwrapped_parameters}
    functions = [
        (f, k)
        for f, k in getattr(node.grad_fn, "next_functions", ())
        if f is not None and (name_of(f) != "AccumulateGrad" or id(f.variable) in own)
    ]
    if len(functions) != len(node.inputs):
        return None
    return [(source, f, k) for source, (f, k) in zip(node.inputs, functions, strict=True)]


def _edge(node: Any, number: int, inputs: Sequence[tuple[Any, Any, int]], axes: Mapping[Any, int | None]) -> _Edge:
    source, function, k = inputs[number]
    before, axis = _shape(function, k), axes.get(source)
    if before is None or axis is None or not 0 <= axis < len(before):
        return _Edge(source, exact=_is_layer(node))
    part = None
    if _splits(function):
        ends = parts_of(function, axis)
        part = None if ends is None else (ends[k], ends[k + 1])
    if _is_layer(node) or _splits(node.grad_fn):
        return _Edge(source, axis, part)
    if name_of(node.grad_fn) == "Unbind":
        dim = joined(node.grad_fn, len(before))
        lost = "single ones of them are picked out" if dim == axis else None
        return _Edge(source, axis - (dim < axis), part, lost=lost)
    if name_of(node.grad_fn) == "Cat" and joined(node.grad_fn, len(before)) == axis:
        return _joined(node, source, function, k, axis, part)
    if reduces(node.grad_fn, len(before), axis) and before[axis] > 1:
        lost = f"{name_of(node.grad_fn).lower()} makes one value of all of them"
        return _Edge(source, None, part, lost=lost, reduces=True)
    found = behind(node.grad_fn, before, axis)
    if found is None and before[axis] == 1:  # broadcast, it only scales or shifts
        return _Edge(source, None, part, table=())
    if found is None:
        return _Edge(source, None, part, exact=False)
    lost = "something between them and their readers adds channels" if -1 in (found[1] or ()) else None
    return _Edge(source, found[0], part, found[1], lost=lost)


def _joined(node: Any, source: Any, function: Any, k: int, axis: int, part: tuple[int, int] | None) -> _Edge:
    sizes = [None if f is None else _shape(f, i) for f, i in node.grad_fn.next_functions]
    widths = [None if size is None else size[axis] for size in sizes]
    total = shape_of(node.grad_fn)
    place = node.grad_fn.next_functions.index((function, k))
    if total is None or widths.count(None) > 1:
        return _Edge(source, None, part, lost="they are concatenated with more than one constant")
    rest = total[axis] - sum(width or 0 for width in widths)
    start = sum(rest if width is None else width for width in widths[:place])
    width = widths[place] or 0
    table = (*[-1] * start, *range(width), *[-1] * (total[axis] - start - width))
    return _Edge(source, axis, part, table)


def _shape(function: Any, number: int) -> tuple[int, ...] | None:
    if name_of(function) == "AccumulateGrad":
        return tuple(function.variable.shape)
    return shape_of(function, number)


def _splits(function: Any) -> bool:
    return name_of(function).startswith(("Split", "UnsafeSplit"))


def _guess(graph: Any, node: Any) -> str | None:
    """Let Torch-Pruning guess where neurons lie behind an operation; says why that fails."""
    guess = _GUESSES.get(node.type)
    if guess is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guess(graph, node)
    except _PLAIN as error:
        return f"it is not understood how {name_of(node.grad_fn).lower()} lays them out ({type(error).__name__})"
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
