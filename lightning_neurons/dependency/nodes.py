"""Make each module leave one node in autograd's graph, by which Torch-Pruning knows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.ops import DummyPruner

from lightning_neurons.isolation.tensors import in_transform, tensors_in
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
