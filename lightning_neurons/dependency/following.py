"""Follow neurons through Torch-Pruning's graph; a block that is not understood only stops what passes through it.

Torch-Pruning collects lists of indices path by path, of which there may be endlessly many. Here single pairs of a place
and a neuron are followed: there are finitely many of them.

Torch-Pruning knows a module by its node in autograd's graph, so each module is made to leave one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning import _helpers
from torch_pruning.ops import DummyPruner

from lightning_neurons.dependency.connections import LostError, lay_out
from lightning_neurons.isolation.tensors import in_transform, tensors_in
from lightning_neurons.layers.layer import public_name
from lightning_neurons.layers.width_handlers import handler_of, passes, width


def open_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that can be hooked: not those that are TorchScript."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


class _Registered(DummyPruner):  # type: ignore[misc]
    """A pruner that gives Torch-Pruning the widths of a type that was passed to ``register_prunable``."""

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        return layer  # only ever compared: nothing is cut in the graph

    def get_out_channels(self, layer: nn.Module) -> int | None:
        return width(layer, "makes")

    def get_in_channels(self, layer: nn.Module) -> int | None:
        return width(layer, "reads")


class _Passing(_Registered):
    """A pruner for a registered type that passes neurons on: its inputs and outputs are the same neurons."""

    prune_in_channels = DummyPruner.prune_out_channels


def register(graph: Any) -> None:
    """Add the registered types of a model to its graph."""
    for kind, module in {type(module): module for module in graph.model.modules() if _is_registered(module)}.items():
        graph.register_customized_layer(kind, _Passing() if passes(module) else _Registered())


def _is_registered(module: nn.Module) -> bool:
    handler = handler_of(module)
    return handler is not None and handler.registered


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Make modules leave one node by which the graph knows them, also if they reshape inside."""
    whole = {nn.Linear.forward: _linear, nn.modules.instancenorm._InstanceNorm.forward: _norm}
    modules = open_modules(model)
    changed = [m for m in modules if type(m).forward in whole and "forward" not in vars(m)]
    for module in changed:
        module.forward = partial(whole[type(module).forward], module)
    # A function that works in place on a view replaces the node that the view's module has left.
    single = [m for m in modules if not any(True for _ in m.children()) and not _is_registered(m)]
    handles = [m.register_forward_hook(_out_of_view) for m in single]
    handles += [m.register_forward_hook(_as_one, with_kwargs=True) for m in modules if _is_registered(m)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in changed:
            del module.forward


class _Linear(torch.autograd.Function):
    """A linear map in one node of the graph, twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (x, weight), gradient = ctx.saved_tensors, gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ weight, rows.T @ x.reshape(-1, x.shape[-1]), bias


def _linear(module: Any, input: Tensor) -> Any:
    if in_transform():
        return nn.functional.linear(input, module.weight, module.bias)
    return _Linear.apply(input, module.weight, module.bias)  # type: ignore[no-untyped-call]


def _norm(module: nn.Module, input: Tensor) -> Tensor:
    return input * 1.0


def _out_of_view(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


class _One(torch.autograd.Function):
    """One node, between inputs and result, for a module that runs several operations."""

    @staticmethod
    def forward(ctx: Any, made: list[Tensor], *read: Tensor) -> Tensor:  # from within a list, autograd does not see it
        ctx.made, ctx.read = made[0], read
        return made[0].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        found = torch.autograd.grad(
            ctx.made, ctx.read, gradients[0], retain_graph=True, create_graph=again, allow_unused=True
        )
        return None, *found


def _as_one(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or output.grad_fn is None or in_transform():
        return output
    read = [t for t in (*tensors_in((args, kwargs)), *module.parameters()) if t.requires_grad]
    return _One.apply([output], *read)  # type: ignore[no-untyped-call]


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
