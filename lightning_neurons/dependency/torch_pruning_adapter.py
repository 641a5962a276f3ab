"""Groups of coupled neurons, found by Torch-Pruning's dependency graph.

Its dependency graph (Fang et al. 2023, DepGraph) is right for all that it knows, but to build one it puts a model into
evaluation mode, loses frozen layers, leaves hooks behind after an error, and keeps the activations of a forward alive.
So it only ever gets a copy, and is dropped after use; ``following.py`` walks through it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_neurons.data.batches import tensors_of
from lightning_neurons.dependency.connections import LostError
from lightning_neurons.dependency.following import Arrival, build, follow
from lightning_neurons.dependency.groups import Coupling, Group, Part
from lightning_neurons.errors import PruningError
from lightning_neurons.isolation.isolation import differentiable
from lightning_neurons.layers.layer import candidates, modules_by_name, public_name
from lightning_neurons.layers.width_handlers import (
    Role,
    handler_of,
    is_depthwise,
    keeps_statistics,
    unknown_width,
    why_fixed,
)

ExampleForward = Callable[[nn.Module], Any]
"""A function that runs a model, or a copy of it, on some inputs."""


def find_coupling(copy: nn.Module, forward: ExampleForward) -> Coupling:
    """Build the graph of a model and read it.

    Args:
        copy: A copy of the model that is not used elsewhere: modes, gradients and flags are left changed.
        forward: Function that runs it on one small batch.

    Returns:
        The groups of coupled neurons and the layers that could not be followed, each with the reason.

    Raises:
        PruningError: If the model cannot be traced.
    """
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    try:
        with differentiable():
            return _read(copy, build(copy, forward, _outputs))
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


def _read(model: nn.Module, graph: Any) -> Coupling:
    layers = candidates(model)
    paths: dict[Any, str] = {module: public_name(path) for path, module in model.named_modules()}
    paths |= {parameter: public_name(path) for path, parameter in model.named_parameters()}
    nodes = graph.module2node
    seen = {name: module for name, module in layers.items() if module in nodes}
    covered: dict[str, set[int]] = {name: set() for name in seen}
    groups, lost = [], {}
    for name, module in seen.items():
        width = graph.get_pruner_of_module(module).get_out_channels(module)
        fresh = [i for i in range(width or 0) if i not in covered[name]]
        if not fresh:
            continue
        try:
            found = follow(graph, module, fresh)
        except LostError as error:
            fixed = _fixed_consumers(nodes[module], paths, modules_by_name(model))
            lost[name] = fixed or str(error)
            found = []
        group = _group(name, fresh, found, paths, layers)
        groups.append(group)
        for other, units in group.layers.items():
            covered[other] |= {i for unit in units for i in unit}
    names = {module: name for name, module in seen.items()}
    return Coupling(
        groups=tuple(groups),
        reads={name: _sources(nodes[module], names) for name, module in seen.items()},
        norm_behind={name: paths[norm] for name, module in seen.items() if (norm := _norm_behind(nodes[module]))},
        unseen={name: _why_unseen(module, graph) for name, module in layers.items() if name not in seen},
        idle=tuple(
            public_name(path)
            for path, module in model.named_modules()
            if module not in graph.ran
            and module._parameters
            and not any(id(p) in graph.used for p in module.parameters())
        ),
        ends=frozenset(name for name, module in seen.items() if _is_end(nodes[module], graph)),
        lost=lost,
    )


def _norm_behind(node: Any) -> nn.Module | None:
    """Return the norm layer that reads a layer, if nothing else does, and if it reads nothing else."""
    consumers = node.outputs
    if len(consumers) != 1 or len(consumers[0].inputs) != 1:
        return None
    return consumers[0].module if keeps_statistics(consumers[0].module) else None


def _fixed_consumers(node: Any, paths: Mapping[Any, str], modules: Mapping[str, nn.Module]) -> str | None:
    """Return the first downstream module that cannot change its width, with the reason, or None."""
    stack, visited = [node], set()
    while stack:
        for following in stack.pop().outputs:
            # A module that is no node of the graph is found by its parameters.
            near = [n.module for n in (following, *following.inputs) if n.module in paths]
            owners = [paths[m].rpartition(".")[0] if isinstance(m, Tensor) else paths[m] for m in near]
            for path in owners:
                reason = why_fixed(modules[path])
                if reason is not None:
                    return f"{path}: {reason}"
            if id(following) not in visited and _role(following.module, makes=False) != "reads":
                visited.add(id(following))
                stack.append(following)
    return None


def _group(
    root: str, fresh: list[int], found: list[Arrival], paths: Mapping[Any, str], layers: Mapping[str, nn.Module]
) -> Group:
    unit_of = _units(fresh, found)
    size = len(set(unit_of.values()))
    taken: dict[tuple[str, Role, int | None], list[set[int]]] = {}
    for arrival in found:
        if arrival.module not in paths:
            continue  # an operation without parameters
        role, axis = _role(arrival.module, arrival.makes), None
        if role == "holds":
            axis = arrival.axis % arrival.module.ndim
        units = taken.setdefault((paths[arrival.module], role, axis), [set() for _ in range(size)])
        for index, origin in arrival.places:
            units[unit_of[origin]].add(index)
    parts = tuple(
        Part(path, role, tuple(tuple(sorted(unit)) for unit in units), axis)
        for (path, role, axis), units in taken.items()
    )
    makers = {p.path: p.indices for p in parts if p.path in layers and p.role in ("makes", "passes")}
    makers.setdefault(root, tuple((index,) for index in fresh))
    ordered = {name: makers[name] for name in layers if name in makers}
    # With one channel left, a depthwise convolution could not be told from a dense one.
    least = 2 if any(is_depthwise(layers[name]) for name in ordered) else 1
    return Group(root, size, parts, ordered, least)


def _units(fresh: list[int], found: list[Arrival]) -> dict[int, int]:
    """Return the unit of each neuron of the root; neurons that share a place anywhere are in one unit."""
    first = {neuron: neuron for neuron in fresh}

    def find(neuron: int) -> int:
        while first[neuron] != neuron:
            neuron = first[neuron]
        return neuron

    for arrival in found:
        owners: dict[int, int] = {}
        for index, origin in arrival.places:
            a, b = sorted((find(owners.setdefault(index, origin)), find(origin)))
            first[b] = a
    numbers = {neuron: number for number, neuron in enumerate(n for n in fresh if find(n) == n)}
    return {neuron: numbers[find(neuron)] for neuron in fresh}


def _role(module: Any, makes: bool) -> Role:
    if isinstance(module, Tensor):  # a parameter; those of TorchScript have no type of their own
        return "holds"
    handler = handler_of(module)
    if handler is not None and handler.role is not None:
        return handler.role
    if not any(True for _ in module.parameters(recurse=False)):
        return "passes"
    return "makes" if makes else "reads"


def _sources(node: Any, names: Mapping[Any, str]) -> tuple[str, ...]:
    """Return the nearest layers upstream of a node, in the order in which they are met."""
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


def _is_end(node: Any, graph: Any) -> bool:
    """Return whether a layer makes the model's output: its neurons, or only their sums, reach it."""
    stack, visited = [(node, False)], set()
    arrived, summed, read = False, False, False
    while stack:
        current, reduced = stack.pop()
        arrived |= not current.outputs and not reduced
        summed |= not current.outputs and reduced
        for following in current.outputs:
            if _role(following.module, makes=False) == "reads" or (current, following) in graph.products:
                read = True
            elif (following, reduced) not in visited:
                visited.add((following, reduced))
                stack.append((following, reduced or (current, following) in graph.reductions))
    return arrived or (summed and not read)


def _is_used(module: nn.Module, graph: Any) -> bool:
    return any(id(parameter) in graph.used for parameter in module.parameters())


def _why_unseen(module: nn.Module, graph: Any) -> str:
    if module not in graph.ran:
        return "its weights are used by a function" if _is_used(module, graph) else "it did not run"
    if module in graph.transformed:
        return "it runs inside of a transform of torch.func, such as vmap or grad, where it cannot be followed"
    if graph.get_pruner_of_module(module).get_out_channels(module) is not None:
        return "what it makes is cut off from the output, as by no_grad, detach, another library or a checkpoint"
    return unknown_width(module)
