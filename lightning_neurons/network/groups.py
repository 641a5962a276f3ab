"""Which neurons can only be removed together: the one place that asks Torch-Pruning.

Its dependency graph (Fang et al. 2023, DepGraph) is right for all that it knows, but to build one it puts a model into
evaluation mode, loses frozen layers, leaves hooks behind after an error, keeps the activations of a forward alive, and
may take minutes. So it is only ever shown a copy, under a time limit, and is dropped after use.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, no_type_check

import torch_pruning
from torch import Tensor, nn

from lightning_neurons.errors import PruningError
from lightning_neurons.network.batches import tensors_of
from lightning_neurons.network.coupling import Coupling, Group, Part
from lightning_neurons.network.isolate import differentiable
from lightning_neurons.network.layer import candidates, modules_by_name, public_name
from lightning_neurons.network.widths import Role, is_depthwise, why_fixed

Forward = Callable[[nn.Module], Any]
"""Runs a model, or a copy of it, on some inputs."""


_PASSING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def find_coupling(copy: nn.Module, forward: Forward, *, time_limit: float = 60.0) -> Coupling:
    """Build the graph of a model and read it.

    Args:
        copy: A copy that nobody else needs: modes, gradients and flags are left changed.
        forward: Runs it on one small batch.
        time_limit: Seconds after which to give up; graphs of some models take longer than training.

    Raises:
        PruningError: If the model cannot be traced, or not in time.
    """
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    for module in copy.modules():
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:  # else its one slope passes for its width
            module.requires_grad_(False)
    try:
        with differentiable(), _limited(time_limit), _no_views(copy):
            graph = torch_pruning.DependencyGraph().build_dependency(
                copy, (), forward_fn=lambda model, _: forward(model), output_transform=_outputs, verbose=False
            )
            return _read(copy, graph)
    except PruningError as error:
        raise PruningError(f"{type(copy).__name__} cannot be traced: {error}") from error
    except Exception as error:
        raise PruningError(
            f"{type(copy).__name__} cannot be traced ({type(error).__name__}: {error}); expected a model whose forward "
            "runs on the example inputs and returns tensors that depend on its parameters"
        ) from error


def _outputs(out: Any) -> list[Tensor]:
    found = [t for t in tensors_of(out) if t.grad_fn is not None]
    if not found:
        raise PruningError("the model's output depends on none of its parameters, so its layers cannot be followed")
    return found


@contextmanager
def _no_views(copy: nn.Module) -> Iterator[None]:
    """A function that works in place on a view replaces the node by which the graph would know the view's module."""

    def out_of_view(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.clone() if output._is_view() else output

    norms = [m for m in copy.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    handles = [norm.register_forward_hook(out_of_view) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise from within, whatever runs: the graph's own code looks at no clock."""
    if sys.getprofile() is not None:
        yield  # a profiler is at work, and keeps its place
        return
    end = time.monotonic() + seconds

    @no_type_check  # runs at every call
    def check(frame, event, argument):  # noqa: ANN001, ANN202
        if time.monotonic() > end:
            sys.setprofile(None)
            raise PruningError(
                f"its graph was not complete after {seconds:g} s, which happens where values are sliced, concatenated "
                "and added over and over; prune a smaller part of it, such as prune(model.backbone, ...)"
            )

    sys.setprofile(check)
    try:
        yield
    finally:
        sys.setprofile(None)


def _read(model: nn.Module, graph: Any) -> Coupling:
    layers = candidates(model)
    paths: dict[Any, str] = {module: public_name(path) for path, module in model.named_modules()}
    paths |= {parameter: public_name(path) for path, parameter in model.named_parameters()}
    nodes = graph.module2node
    seen = {name: module for name, module in layers.items() if module in nodes}
    covered: dict[str, set[int]] = {name: set() for name in seen}
    groups, lost = [], {}
    for name, module in seen.items():
        pruner = graph.get_pruner_of_module(module)
        width = pruner.get_out_channels(module)
        fresh = [i for i in range(width or 0) if i not in covered[name]]
        if not fresh:
            continue
        try:
            found = graph.get_pruning_group(module, pruner.prune_out_channels, fresh)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            fixed = _fixed_readers(nodes[module], paths, modules_by_name(model))
            lost[name] = fixed or f"its neurons cannot be followed ({type(error).__name__}: {error})"
            found = []
        group = _group(name, fresh, found, graph, paths, layers)
        groups.append(group)
        for other, units in group.layers.items():
            covered[other] |= {i for unit in units for i in unit}
    names = {module: name for name, module in seen.items()}
    return Coupling(
        groups=tuple(groups),
        reads={name: _sources(nodes[module], names) for name, module in seen.items()},
        norm_behind={name: paths[norm] for name, module in seen.items() if (norm := _norm_behind(nodes[module]))},
        unseen=tuple(name for name in layers if name not in seen),
        ends=frozenset(name for name, module in seen.items() if _is_end(nodes[module])),
        lost=lost,
    )


def _norm_behind(node: Any) -> nn.Module | None:
    """The norm layer that reads a layer, if nothing else does, and if it reads nothing else."""
    readers = node.outputs
    if len(readers) != 1 or len(readers[0].inputs) != 1:
        return None
    return readers[0].module if isinstance(readers[0].module, nn.modules.batchnorm._NormBase) else None


def _fixed_readers(node: Any, paths: Mapping[Any, str], modules: Mapping[str, nn.Module]) -> str | None:
    """Which of the modules behind a layer cannot change its width, and why."""
    stack, visited = [node], set()
    while stack:
        for following in stack.pop().outputs:
            # What the graph does not know as a module shows itself by its parameters.
            near = [n.module for n in (following, *following.inputs) if n.module in paths]
            owners = [paths[m].rpartition(".")[0] if isinstance(m, nn.Parameter) else paths[m] for m in near]
            for path in owners:
                reason = why_fixed(modules[path])
                if reason is not None:
                    return f"{path}: {reason}"
            if id(following) not in visited and _role(following.module, makes=False) != "reads":
                visited.add(id(following))
                stack.append(following)
    return None


def _group(
    root: str, fresh: list[int], found: Any, graph: Any, paths: Mapping[Any, str], layers: Mapping[str, nn.Module]
) -> Group:
    place = {index: unit for unit, index in enumerate(fresh)}
    taken: dict[tuple[str, Role, int | None], list[set[int]]] = {}
    for item in found:
        target = item.dep.target
        if target.module not in paths:
            continue  # an operation without parameters
        makes = graph.is_out_channel_pruning_fn(item.dep.handler)
        role, axis = _role(target.module, makes), None
        if role == "holds":
            axis = int(target.pruning_dim) % target.module.ndim
        units = taken.setdefault((paths[target.module], role, axis), [set() for _ in fresh])
        for index, origin in zip(item.idxs, item.root_idxs, strict=True):
            units[place[origin]].add(index)
    parts = tuple(
        Part(path, role, tuple(tuple(sorted(unit)) for unit in units), axis)
        for (path, role, axis), units in taken.items()
    )
    makers = {p.path: p.indices for p in parts if p.path in layers and p.role in ("makes", "passes")}
    makers.setdefault(root, tuple((index,) for index in fresh))
    ordered = {name: makers[name] for name in layers if name in makers}
    # A depthwise convolution of one channel could not be told from a dense one any more.
    least = 2 if any(is_depthwise(layers[name]) for name in ordered) else 1
    return Group(root, len(fresh), parts, ordered, least)


def _role(module: Any, makes: bool) -> Role:
    if isinstance(module, nn.Parameter):
        return "holds"
    if isinstance(module, nn.Embedding):
        return "makes"
    if not any(True for _ in module.parameters(recurse=False)) or isinstance(module, _PASSING) or is_depthwise(module):
        return "passes"
    return "makes" if makes else "reads"


def _sources(node: Any, names: Mapping[Any, str]) -> tuple[str, ...]:
    """The nearest layers before a node, in the order in which they are met."""
    found: dict[str, None] = {}
    stack, visited = list(reversed(node.inputs)), set()
    while stack:
        current = stack.pop()
        if id(current) in visited:
            continue
        visited.add(id(current))
        if current.module in names:
            found[names[current.module]] = None
        else:
            stack.extend(reversed(current.inputs))
    return tuple(found)


def _is_end(node: Any) -> bool:
    """Whether nothing that makes new neurons lies between a layer and the model's output."""
    stack, visited = [node], set()
    while stack:
        current = stack.pop()
        if not current.outputs:
            return True
        fresh = [n for n in current.outputs if id(n) not in visited and _role(n.module, makes=False) != "reads"]
        visited |= {id(n) for n in fresh}
        stack.extend(fresh)
    return False
