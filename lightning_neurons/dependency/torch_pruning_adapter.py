"""Groups of coupled neurons of a model, and which layers read which, from one forward.

Modules and their connections are those of Torch-Pruning's dependency graph (Fang et al. 2023, DepGraph). To build one,
it puts a model into evaluation mode, loses frozen layers, leaves hooks behind after an error, and keeps the activations
of a forward alive. So it only ever gets a copy, and is dropped after use. ``flow.py`` follows the neurons.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_neurons.data.batches import results_of
from lightning_neurons.dependency.flow import Flow
from lightning_neurons.dependency.graph import build
from lightning_neurons.dependency.groups import Coupling, Group, Part
from lightning_neurons.dependency.layout import PRODUCTS, name_of
from lightning_neurons.dependency.places import Places, Port
from lightning_neurons.errors import PruningError
from lightning_neurons.isolation.isolation import differentiable
from lightning_neurons.layers.layer import makers, modules_by_name, public_name
from lightning_neurons.layers.recognition import centres
from lightning_neurons.layers.recurrent import has_hidden_units, hidden_places, width_made
from lightning_neurons.layers.width_handlers import (
    Role,
    axes,
    axis_of,
    handler_of,
    is_depthwise,
    unknown_width,
    why_fixed,
    width,
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
    found = [t for t in results_of(out) if t.grad_fn is not None]
    if not found:
        raise PruningError("the model's output depends on none of its parameters, so its layers cannot be followed")
    return found


def _read(model: nn.Module, graph: Any) -> Coupling:
    layers = makers(model)
    paths: dict[Any, str] = {module: public_name(path) for path, module in model.named_modules()}
    paths |= {parameter: public_name(path) for path, parameter in model.named_parameters()}
    nodes = graph.module2node
    seen = {name: module for name, module in layers.items() if module in nodes}
    held = {parameter: axis for parameter, axis in graph.unwrapped_parameters if parameter in paths}
    tables: dict[Tensor, nn.Module] = {m.weight: m for m in model.modules() if isinstance(m, nn.Embedding)}
    held |= {call.bias: 0 for call in graph.calls.values() if call.bias is not None}
    held |= {weight: axes(module, "makes").get("weight", 1) for weight, module in tables.items()}
    flow = Flow(graph.calls, held, tables)
    flow.walk(graph.ends)
    units = _Units(flow.places, paths, held)
    covered: dict[str, set[int]] = {name: set() for name in seen}
    groups, lost = [], {}
    for name, module in seen.items():
        fresh = [i for i in range(_width(module, graph) or 0) if i not in covered[name]]
        if not fresh:
            continue
        reason = units.why_lost(module, fresh)
        if reason is not None:
            lost[name] = _fixed_consumers(nodes[module], paths, modules_by_name(model)) or reason
        parts = () if reason is not None else units.parts(module, fresh)
        groups.append(_group(name, fresh, parts, layers))
        for other, taken in groups[-1].layers.items():
            covered[other] |= {i for unit in taken for i in unit}
    names = {module: name for name, module in seen.items()}
    reductions = {(id(source), id(node)) for source, node in flow.reductions}
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
        ends=frozenset(name for name, module in seen.items() if _is_end(nodes[module], reductions)),
        lost=lost,
    )


class _Units:
    """What can only be removed together: sets of places in modules and parameters, each the lowest of its numbers.

    Args:
        places: All places, joined.
        paths: Paths of modules and parameters.
        axes: By parameter that is no known module's, the axis on which it holds neurons.
    """

    def __init__(self, places: Places, paths: Mapping[Any, str], axes: Mapping[Any, int]) -> None:
        self._unit_at = places.components().tolist()
        self._ports = {port: [self._unit_at[n] for n in own.tolist()] for port, own in places.ports.items()}
        self._members: dict[int, list[tuple[Port, int]]] = {}
        for port, units in self._ports.items():
            for index, unit in enumerate(units):
                self._members.setdefault(unit, []).append((port, index))
        self._lost: dict[int, str] = {}
        for numbers, reason in places.lost:
            for number in numbers.unique().tolist():
                self._lost.setdefault(self._unit_at[number], reason)
        self._order = {reason: place for place, (_, reason) in reversed([*enumerate(places.lost)])}
        self._paths, self._axes = paths, axes

    def _units_of(self, module: nn.Module, neurons: Sequence[int]) -> list[int]:
        own = self._ports.get((module, "out"), [])
        return list(dict.fromkeys(own[i] for i in neurons if i < len(own)))

    def why_lost(self, module: nn.Module, neurons: Sequence[int]) -> str | None:
        """Return the first reason why a module's neurons cannot be followed, or None."""
        units = self._units_of(module, neurons)
        if not units:
            return "its neurons cannot be followed: what it makes is no tensor that is known"
        reasons = [self._lost[unit] for unit in units if unit in self._lost]
        return min(reasons, key=self._order.__getitem__, default=None)

    def parts(self, module: nn.Module, neurons: Sequence[int]) -> tuple[Part, ...]:
        """Return what gets narrower with some neurons of a module, and where the units of it lie."""
        units = self._units_of(module, neurons)
        taken: dict[Port, list[list[int]]] = {}
        for number, unit in enumerate(units):
            for port, index in self._members[unit]:
                if port not in taken:
                    taken[port] = [[] for _ in units]
                taken[port][number].append(index)
        return tuple(
            part
            for thing, side in self._ports
            if (thing, side) in taken
            for part in self._parts_at(thing, side == "out", tuple(map(tuple, taken[thing, side])))
        )

    def _parts_at(self, thing: Any, makes: bool, indices: tuple[tuple[int, ...], ...]) -> Iterator[Part]:
        path = self._paths[thing]
        yield Part(path, _role(thing, makes), indices, self._axes.get(thing))
        if makes and has_hidden_units(thing):  # each lies at several places of its parameters
            for leaf, axis, places in hidden_places(thing, indices):
                yield Part(f"{path}.{leaf}" if path else leaf, "holds", places, axis)


def _norm_behind(node: Any) -> nn.Module | None:
    """Return the norm layer that reads a layer, if nothing else does, and if it reads nothing else."""
    consumers = node.outputs
    if len(consumers) != 1 or len(consumers[0].inputs) != 1:
        return None
    return consumers[0].module if centres(consumers[0].module) else None


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


def _group(root: str, fresh: list[int], parts: tuple[Part, ...], layers: Mapping[str, nn.Module]) -> Group:
    makers = {p.path: p.indices for p in parts if p.path in layers and p.role in ("makes", "passes")}
    makers.setdefault(root, tuple((index,) for index in fresh))
    ordered = {name: makers[name] for name in layers if name in makers}
    # With one channel left, a depthwise convolution could not be told from a dense one.
    least = 2 if any(is_depthwise(layers[name]) for name in ordered) else 1
    return Group(root, len(makers[root]), parts, ordered, least)


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


def _is_end(node: Any, reductions: set[tuple[int, int]]) -> bool:
    """Return whether a layer makes the model's output: its neurons, or only their sums, reach it."""
    stack, visited = [(node, False)], set()
    arrived, summed, read = False, False, False
    while stack:
        current, reduced = stack.pop()
        arrived |= not current.outputs and not reduced
        summed |= not current.outputs and reduced
        for following in current.outputs:
            if _role(following.module, makes=False) == "reads" or _is_product(following):
                read = True
            elif (following, reduced) not in visited:
                visited.add((following, reduced))
                stack.append((following, reduced or (id(current.grad_fn), id(following.grad_fn)) in reductions))
    return arrived or (summed and not read)


def _is_product(node: Any) -> bool:
    return axis_of(node.module) is None and name_of(node.grad_fn) in PRODUCTS


def _is_used(module: nn.Module, graph: Any) -> bool:
    return any(id(parameter) in graph.used for parameter in module.parameters())


def _width(module: nn.Module, graph: Any) -> int | None:
    if isinstance(module, nn.MultiheadAttention):
        return width(module, "makes")
    if has_hidden_units(module):
        return width_made(module)
    found: int | None = graph.get_pruner_of_module(module).get_out_channels(module)
    return found


def _why_unseen(module: nn.Module, graph: Any) -> str:
    if module not in graph.ran:
        return "its weights are used by a function" if _is_used(module, graph) else "it did not run"
    if module in graph.transformed:
        return "it runs inside of a transform of torch.func, such as vmap or grad, where it cannot be followed"
    if _width(module, graph) is not None:
        return "what it makes is cut off from the output, as by no_grad, detach, another library or a checkpoint"
    return unknown_width(module)
