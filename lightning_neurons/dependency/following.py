"""Follow neurons through Torch-Pruning's graph; a block that is not understood only stops what passes through it.

Torch-Pruning collects lists of indices path by path, of which there may be endlessly many. Here single pairs of a place
and a neuron are followed: there are finitely many of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch_pruning
from torch import nn
from torch.overrides import TorchFunctionMode
from torch_pruning import _helpers

from lightning_neurons.dependency.connections import LostError, lay_out
from lightning_neurons.dependency.nodes import open_modules, plain, register
from lightning_neurons.isolation.tensors import in_transform, tensors_in
from lightning_neurons.layers.layer import public_name
from lightning_neurons.layers.width_handlers import handler_of


@dataclass
class Arrival:
    """A module that gets narrower when neurons are removed.

    Attributes:
        module: The module, parameter or operation.
        makes: Whether it makes the neurons; else it reads them.
        axis: The axis that is cut, for a parameter.
        places: The places in it, each with the removed neuron that takes it.
    """

    module: Any
    makes: bool
    axis: int
    places: dict[tuple[int, int], None] = field(default_factory=dict)


def build(model: nn.Module, run: Callable[[nn.Module], Any], outputs: Callable[[Any], Any]) -> Any:
    """Build the graph of a model.

    Args:
        model: A copy of the model, which is changed.
        run: Function that runs the model.
        outputs: Function that finds the tensors in the model's result.

    Returns:
        The graph. Modules that ran are in its ``ran``, those of them that a transform of ``torch.func`` has run in
        ``transformed``, operations of layers in ``inside``, and the ids of parameters that functions have read in
        ``used``; ``products`` and ``reductions`` hold pairs of nodes between which neurons are multiplied or summed.
    """
    graph = torch_pruning.DependencyGraph()
    graph.model, graph.verbose, graph.ignored_params = model, False, []
    graph._module2name = {module: name for name, module in model.named_modules()}
    register(graph)
    graph._param_to_name, graph.unwrapped_parameters = graph._detect_unwrapped_parameters(None)
    graph.ran, graph.inside, graph.products, graph.reductions = set(), set(), set(), set()
    graph.transformed, graph.used = set(), set()
    made: list[Any] = []  # up to torch 2.6, nodes of custom functions are empty once their graph is freed

    def forward(copy: nn.Module, _: Any) -> Any:
        made.append(run(copy))
        return made[0]

    with plain(model), _noted(graph), _Uses(model, graph.used):
        graph.module2node = graph._trace(model, (), forward, output_transform=outputs)
    graph._build_dependency(graph.module2node)
    lay_out(graph)
    return graph


class _Uses(TorchFunctionMode):
    """A mode that notes which parameters functions read, also where autograd does not see it."""

    def __init__(self, model: nn.Module, used: set[int]) -> None:
        super().__init__()
        self._own, self._used = {id(parameter) for parameter in model.parameters()}, used

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(True for _ in tensors_in(out)):  # else a size was asked for, say
            self._used |= self._own.intersection(map(id, tensors_in((args, kwargs))))
        return out


@contextmanager
def _noted(graph: Any) -> Iterator[None]:
    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        graph.ran.add(module)
        if in_transform():
            graph.transformed.add(module)
        if handler_of(module) is not None:
            before = {t.grad_fn for t in tensors_in((args, kwargs))}
            stack = [t.grad_fn for t in tensors_in(output)]
            while stack:
                function = stack.pop()
                if function is not None and function not in before and function not in graph.inside:
                    graph.inside.add(function)
                    stack.extend(f for f, _ in function.next_functions)

    handles = [m.register_forward_hook(end, with_kwargs=True) for m in open_modules(graph.model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def follow(graph: Any, module: nn.Module, neurons: Iterable[int]) -> list[Arrival]:
    """Find the modules that get narrower when neurons of one module are removed.

    Args:
        graph: The graph that ``build`` returned.
        module: The module that makes the neurons.
        neurons: Indices of its neurons.

    Returns:
        Each module, or parameter, once for every way in which it is cut, the first one included.

    Raises:
        LostError: If an operation on the way is not understood.
    """
    handler = graph.get_pruner_of_module(module).prune_out_channels
    found: dict[tuple[Any, Any], Arrival] = {}
    stack: list[tuple[Any, Any, list[Any]]] = []
    limit = 8 * max((max(p.shape, default=1) for p in graph.model.parameters()), default=1)

    def arrive(node: Any, handler: Any, pairs: Iterable[Any]) -> None:
        if (node, handler) not in found:
            axis = int(node.pruning_dim) if node.type == torch_pruning.ops.OPTYPE.PARAMETER else 0
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
                there = _mapped(dependency, pairs)
                if there:
                    arrive(dependency.target, dependency.handler, there)
    return list(found.values())


def _mapped(dependency: Any, pairs: Sequence[Any]) -> Sequence[Any]:
    """Return where pairs lie at the other end of a connection."""
    for mapping in dependency.index_mapping:
        pairs = pairs if mapping is None or not pairs else mapping(pairs)
    if any(pair.root_idx is None for pair in pairs):  # Torch-Pruning's guess for heads that serve several others
        raise LostError("its neurons cannot be followed: they are repeated, as heads are for several others")
    return pairs


def _name(graph: Any, node: Any) -> str:
    names = graph._param_to_name if node.type == torch_pruning.ops.OPTYPE.PARAMETER else graph._module2name
    return public_name(names.get(node.module) or "the output")
