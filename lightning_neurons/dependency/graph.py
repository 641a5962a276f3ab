"""Torch-Pruning's graph of a forward, and the runs of modules in autograd's graph of it.

Torch-Pruning knows a module by its node in autograd's graph, so each module is made to leave one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch_pruning.ops import DummyPruner

from lightning_neurons.dependency.flow import Call
from lightning_neurons.isolation.tensors import in_transform, tensors_in
from lightning_neurons.layers.attention import PrunedMultiheadAttention, has_weights_apart
from lightning_neurons.layers.width_handlers import axis_of, handler_of, passes, width


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
    """Add the types of a model that have a record, and that its graph does not know."""
    unknown = torch_pruning.ops.OPTYPE.ELEMENTWISE
    added = [
        module
        for module in graph.model.modules()
        if _is_registered(module) or (axis_of(module) is not None and torch_pruning.ops.module2type(module) == unknown)
    ]
    for kind, module in {type(module): module for module in added}.items():
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


def build(model: nn.Module, run: Callable[[nn.Module], Any], outputs: Callable[[Any], Any]) -> Any:
    """Build the graph of a model.

    Args:
        model: A copy of the model, which is changed.
        run: Function that runs the model.
        outputs: Function that finds the tensors in the model's result.

    Returns:
        The graph. Modules that ran are in its ``ran``, those of them that a transform of ``torch.func`` has run in
        ``transformed``, the ids of parameters that functions have read in ``used``; ``calls`` holds the runs of
        modules that make, read or hand on neurons, by the nodes of their results, and ``ends`` the model's results.
    """
    graph = torch_pruning.DependencyGraph()
    graph.model, graph.verbose, graph.ignored_params = model, False, []
    graph._module2name = {module: name for name, module in model.named_modules()}
    graph.IGNORED_LAYERS_IN_TRACING.extend(_attentions(model))  # known by their projections, not by their results
    register(graph)
    graph._param_to_name, graph.unwrapped_parameters = graph._detect_unwrapped_parameters(None)
    graph.ran, graph.calls, graph.transformed, graph.used = set(), {}, set(), set()

    def read(out: Any) -> Any:
        graph.ends = outputs(out)  # up to torch 2.6, nodes of custom functions are empty once their graph is freed
        return graph.ends

    with plain(model), _noted(graph), _Uses(model, graph.used):
        graph.module2node = graph._trace(model, (), lambda copy, _: run(copy), output_transform=read)
    _name_nodes(graph)
    return graph


def _attentions(model: nn.Module) -> list[PrunedMultiheadAttention]:
    return [module for module in open_modules(model) if isinstance(module, PrunedMultiheadAttention)]


class _Together(torch.autograd.Function):
    """One node for several results, each of which is as it was."""

    @staticmethod
    def forward(ctx: Any, *made: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _projected(graph: Any, module: PrunedMultiheadAttention, *read: Tensor) -> tuple[Tensor, ...]:
    """Let an attention project, and note that as a run of it.

    Returns:
        Queries, keys and values, as results of one node.
    """
    made = PrunedMultiheadAttention.project(module, *read)
    if in_transform() or not all(map(_differs, made)):
        return made
    results: tuple[Tensor, ...] = _Together.apply(*made)  # type: ignore[no-untyped-call]
    outputs = tuple(map(_edge, results))
    inputs = tuple(dict.fromkeys(map(_edge, filter(_differs, read))))
    apart = has_weights_apart(module)
    bias = module.in_proj_bias if apart else None
    graph.calls[outputs[0][0]] = Call(module, inputs, outputs, side_by_side=not apart, bias=bias)
    return results


def _name_nodes(graph: Any) -> None:
    """Make nodes known by their module: projections of attention, and last states where nothing else is used."""
    for node in [*graph.module2node.values()]:
        call = graph.calls.get(node.grad_fn)
        if call is None:
            continue
        if isinstance(call.module, PrunedMultiheadAttention) or call.module not in graph.module2node:
            graph.module2node.pop(node.module, None)
            node.module = call.module
            graph.module2node.setdefault(call.module, node)


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
        elif axis_of(module) is not None and not isinstance(module, PrunedMultiheadAttention):
            inputs, results = (tuple(map(_edge, filter(_differs, tensors_in(t)))) for t in ((args, kwargs), output))
            outputs = tuple(edge for edge in results if edge not in inputs)
            graph.calls.update(dict.fromkeys((node for node, _ in outputs), Call(module, inputs, outputs)))

    handles = [m.register_forward_hook(end, with_kwargs=True) for m in open_modules(graph.model)]
    attentions = _attentions(graph.model)
    for module in attentions:
        module.project = partial(_projected, graph, module)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for module in attentions:
            del module.project
        for handle in handles:
            handle.remove()


def _differs(tensor: Tensor) -> bool:
    return tensor.requires_grad


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Return the node of autograd's graph that has made a tensor, and the number of its result."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr
