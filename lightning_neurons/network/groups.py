"""Which neurons can only be removed together: the one place that asks Torch-Pruning.

Its dependency graph (Fang et al. 2023, DepGraph) is right for all that it knows, but to build one it puts a model into
evaluation mode, loses frozen layers, leaves hooks behind after an error, keeps the activations of a forward alive, and
may take minutes. So it is only ever shown a copy, under a time limit, and is dropped after use.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch_pruning
from torch import Tensor, nn

from lightning_neurons.errors import PruningError
from lightning_neurons.network.batches import tensors_of
from lightning_neurons.network.isolate import differentiable
from lightning_neurons.network.layer import candidates, public_name
from lightning_neurons.network.widths import Role, is_depthwise

Forward = Callable[[nn.Module], Any]
"""Runs a model, or a copy of it, on some inputs."""


_PASSING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


@dataclass(frozen=True)
class Part:
    """What one module has of a group.

    Attributes:
        path: The module, or for the role ``"holds"`` the parameter.
        role: What it does with the neurons.
        indices: For each unit of the group, the places that it takes in this module.
        axis: Of a parameter that is no module's weight, the axis that is cut.
    """

    path: str
    role: Role
    indices: tuple[tuple[int, ...], ...]
    axis: int | None = None


@dataclass(frozen=True)
class Group:
    """Neurons of several layers that can only be removed together; a *unit* is the smallest set of them.

    Attributes:
        root: The first layer of the group, in the order of the model; it names the group.
        size: How many units there are.
        parts: All modules that are narrower when a unit goes.
        layers: For each layer that makes neurons of the group, the neurons of each unit.
        least: How many units must stay.
    """

    root: str
    size: int
    parts: tuple[Part, ...]
    layers: Mapping[str, tuple[tuple[int, ...], ...]]
    least: int = 1

    def neurons(self, units: Iterable[int]) -> dict[str, list[int]]:
        """The neurons, by layer, that go with some units."""
        units = list(units)
        return {name: sorted(i for u in units for i in of[u]) for name, of in self.layers.items()}


@dataclass(frozen=True)
class Coupling:
    """What a model's graph says.

    Attributes:
        groups: All groups, in the order of the model.
        reads: By layer, the layers whose values it reads.
        norm_behind: By layer, the norm layer that alone reads it.
        unseen: Layers that are not in the graph: they did not run, or ran as functions.
        ends: Layers whose neurons are the model's output.
    """

    groups: tuple[Group, ...]
    reads: Mapping[str, tuple[str, ...]]
    norm_behind: Mapping[str, str]
    unseen: tuple[str, ...]
    ends: frozenset[str]


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
    try:
        with differentiable(), _limited(time_limit):
            graph = torch_pruning.DependencyGraph().build_dependency(
                copy, (), forward_fn=lambda model, _: forward(model), output_transform=_outputs, verbose=False
            )
            return _read(copy, graph)
    except PruningError:
        raise
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
def _limited(seconds: float) -> Iterator[None]:
    """Raise from within, whatever runs: the graph's own code looks at no clock."""
    before, end = sys.getprofile(), time.monotonic() + seconds

    def check(frame: Any, event: str, argument: Any) -> None:
        if time.monotonic() > end:
            sys.setprofile(before)
            raise PruningError(
                f"the model's graph was not complete after {seconds:.0f} s; name the part to prune by a smaller module "
                "(prune(model.backbone, ...)), or pass a plan for layers that do not go through large concatenations"
            )

    sys.setprofile(check)
    try:
        yield
    finally:
        sys.setprofile(before)


def _read(model: nn.Module, graph: Any) -> Coupling:
    layers = candidates(model)
    paths: dict[Any, str] = {module: public_name(path) for path, module in model.named_modules()}
    paths |= {parameter: public_name(path) for path, parameter in model.named_parameters()}
    nodes = graph.module2node
    seen = {name: module for name, module in layers.items() if module in nodes}
    covered: dict[str, set[int]] = {name: set() for name in seen}
    groups = []
    for name, module in seen.items():
        pruner = graph.get_pruner_of_module(module)
        width = pruner.get_out_channels(module)
        fresh = [i for i in range(width or 0) if i not in covered[name]]
        if not fresh:
            continue
        found = graph.get_pruning_group(module, pruner.prune_out_channels, fresh)
        group = _group(name, fresh, found, graph, paths, layers)
        groups.append(group)
        for other, units in group.layers.items():
            covered[other] |= {i for unit in units for i in unit}
    names = {module: name for name, module in seen.items()}
    return Coupling(
        groups=tuple(groups),
        reads={name: _sources(nodes[module], names) for name, module in seen.items()},
        norm_behind={
            name: paths[nodes[module].outputs[0].module]
            for name, module in seen.items()
            if len(nodes[module].outputs) == 1
            and isinstance(nodes[module].outputs[0].module, nn.modules.batchnorm._NormBase)
        },
        unseen=tuple(name for name in layers if name not in seen),
        ends=frozenset(name for name, module in seen.items() if _is_end(nodes[module])),
    )


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
