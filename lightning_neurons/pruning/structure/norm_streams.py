"""Streams that norm layers normalise: which modules do so, and what they compute when neurons have been removed.

A LayerNorm takes its statistics over all neurons of a residual stream, so without some of them it is another function.
Where that is asked for, such a stream is cut all the same, and the reference of a trial is the model whose norms take
their statistics over the neurons that stay: each norm module is narrowed and runs on these alone. That needs no
formula, so modules are told by what they do, not by their type.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_neurons.dependency.conform import set_data
from lightning_neurons.dependency.groups import Attribute, Coupling, Group, Part
from lightning_neurons.dependency.sizes import key_of, numbers_of, refit, set_sizes
from lightning_neurons.isolation.tensors import map_tensors_in, tensors_in
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.registry import family_of
from lightning_neurons.layers.width_handlers import axes, axis_of, handler_of, weight_name, why_fixed
from lightning_neurons.pruning.structure.example import Example, scramble
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut

NormStreams = Literal["refuse", "renormalize"]
"""What happens to neurons that a norm layer takes its statistics over."""

_CLOSE = 1e-3  # the ``eps`` of a norm, and statistics in float32, change less
_MIXED = 1e-4


@dataclass(frozen=True)
class Norms:
    """The modules of a model that take statistics over neurons.

    Attributes:
        layers: By path of a norm layer, the shape of a scale for each of its neurons, as ``(neurons, 1, 1)`` for
            channels of images; so the neurons lie on the axis ``-len(shape)`` of its input and output.
        readers: By path of a layer whose weights are standardised over its inputs, the axis of these.
        numbers: By path of a norm layer, the numbers in its attributes that are the number of neurons: name and place.
    """

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    readers: Mapping[str, int] = field(default_factory=dict)
    numbers: Mapping[str, Sequence[tuple[str, int | None]]] = field(default_factory=dict)

    def narrows(self, one: TensorCut) -> bool:
        """Return whether a cut changes what statistics run over."""
        owner = one.path.rpartition(".")[0] if one.role == "holds" else one.path
        return owner in self.layers or (one.role == "reads" and owner in self.readers)

    def of(self, group: Group) -> list[str]:
        """Return the modules whose statistics change with a group, in the order of the model, norm layers first."""
        parts = {(part.path, part.role) for part in group.parts}
        passing = [path for path in self.layers if (path, "passes") in parts]
        return [*passing, *(path for path in self.readers if (path, "reads") in parts)]


def find_norms(model: nn.Module, example: Example) -> Norms:
    """Find the modules that take statistics over neurons, by what they do on random inputs.

    A norm layer is a module without others that have parameters. The values of some neurons reach the others; it treats
    all of them alike (permuted inputs and parameters give permuted outputs); and larger inputs change its output in
    proportion or not at all.

    Args:
        model: A copy in evaluation mode, which is run once and left as it was.
        example: The inputs to run it on.

    Returns:
        The modules with their axes.
    """
    named = {path: module for path, module in modules_by_name(model).items() if path}
    asked = {path: module for path, module in named.items() if _may_norm(module) or _may_standardise(module)}
    inputs = _inputs(model, example, asked)
    layers: dict[str, tuple[int, ...]] = {}
    readers: dict[str, int] = {}
    numbers: dict[str, Sequence[tuple[str, int | None]]] = {}
    for path, module in asked.items():
        calls = inputs.get(path, [None])
        first, inside = calls[0], any(path.startswith(f"{outer}.") for outer in layers)
        if first is None or inside or any(x is None or x.ndim != first.ndim for x in calls):
            continue
        if _may_norm(module):
            axis = _axis(module, first)
            if axis is not None:
                layers[path] = (first.shape[axis], *(1,) * (first.ndim - 1 - axis))
                numbers[path] = _numbers(module, first, axis)
        elif (axis := axis_of(module)) is not None and _standardises(module, first):
            readers[path] = axis
    return Norms(layers, readers, numbers)


def _inputs(model: nn.Module, example: Example, modules: Mapping[str, nn.Module]) -> dict[str, list[Tensor | None]]:
    """Return what modules read in each call; None where that is more than one tensor of floating-point numbers."""
    inputs: dict[str, list[Tensor | None]] = {}

    def watch(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = list(tensors_in((args, kwargs)))
        fits = len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].numel() > 0
        inputs.setdefault(path, []).append(tensors[0].detach() if fits else None)

    hooks = [m.register_forward_pre_hook(partial(watch, path), with_kwargs=True) for path, m in modules.items()]
    try:
        with torch.no_grad():
            example.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _may_norm(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or family_of(module) is not None or why_fixed(module) is not None:
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    handler = handler_of(module)
    return not type(module).__module__.startswith("torch.") or (handler is not None and handler.over_all)


def _may_standardise(module: nn.Module) -> bool:
    plain = isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.")
    return not plain and weight_name(module) in axes(module, "reads") and why_fixed(module) is None


def _axis(module: nn.Module, x: Tensor) -> int | None:
    """Return the axis of the neurons that a module normalises over, or None if it does not."""
    places = {axis: _places(module, size) for axis, size in enumerate(x.shape) if size > 1}
    fitting = [axis for axis, own in places.items() if own is not None and _normalises(module, x, axis, own)]
    # Some run over space as well, as a GroupNorm of one group: neurons are what there are parameters for.
    owning, told = [axis for axis in fitting if places[axis]], axis_of(module)
    fitting = owning or [axis for axis in fitting if told is not None and axis == told % x.ndim] or fitting
    return fitting[0] if len(fitting) == 1 else None


def _places(module: nn.Module, size: int) -> dict[str, int] | None:
    """Return by tensor the axis that has an entry for each neuron, or None if a tensor has another form."""
    places: dict[str, int] = {}
    for leaf, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is None or tensor.numel() == 1:
            continue
        if tensor.numel() != size or size not in tensor.shape:
            return None
        places[leaf] = tensor.shape.index(size)
    return places


def _random_like(x: Tensor) -> Tensor:
    return 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def _normalises(module: nn.Module, like: Tensor, axis: int, places: Mapping[str, int]) -> bool:
    x = _random_like(like)
    order = torch.randperm(like.shape[axis], generator=torch.Generator().manual_seed(0)).to(like.device)
    louder = x.index_copy(axis, order[:1], 3 * x.index_select(axis, order[:1]) + 1)
    try:
        with torch.no_grad():
            trial = copy.deepcopy(module)
            scramble(trial)
            once, twice, more = trial(x), trial(2 * x), trial(4 * x)
            mixed = (trial(louder) - once).index_select(axis, order[1:])
            for leaf, own in places.items():
                tensor = getattr(trial, leaf)
                tensor.copy_(tensor.index_select(own, order))
            alike = trial(x.index_select(axis, order)) - once.index_select(axis, order)
            proportional = (more - twice) - 2 * (twice - once)
            largest = float(more.abs().max()) if once.shape == x.shape else 0.0
    except Exception:  # noqa: BLE001 (whatever it raises on other inputs, it is no plain norm)
        return False
    shares = [float(t.abs().max()) / max(largest, 1e-30) for t in (mixed, alike, proportional)]
    return largest > 0 and shares[0] > _MIXED and shares[1] < _CLOSE and shares[2] < _CLOSE


def _numbers(module: nn.Module, x: Tensor, axis: int) -> Sequence[tuple[str, int | None]]:
    """Return the numbers of a norm that have to follow its width, so that each neuron twice is normalised as once."""
    size, x = x.shape[axis], _random_like(x)
    module = copy.deepcopy(module)
    scramble(module)
    trial = copy.deepcopy(module)
    for leaf, own in (_places(module, size) or {}).items():
        store = trial._parameters if leaf in trial._parameters else trial._buffers
        set_data(store, leaf, torch.cat([getattr(module, leaf).detach()] * 2, own))
    refit(trial)
    numbers = [(name, place) for name, place, value in numbers_of(trial) if value == size and "." not in name]
    running = []
    for chosen in ([], numbers):
        set_sizes(trial, {key_of(name, place): 2 * size for name, place in chosen})
        try:
            with torch.no_grad():
                once, twice = module(x), trial(torch.cat([x, x], axis))
            running.append(chosen)
            if float((twice - torch.cat([once, once], axis)).abs().max()) < _CLOSE * float(once.abs().max()):
                return chosen
        except Exception:  # noqa: BLE001 (it does not run without them, or with them)
            continue
    return running[0] if running else numbers


def _standardises(module: nn.Module, x: Tensor) -> bool:
    """Return whether twice the weights make the same output."""
    try:
        with torch.no_grad():
            trial = copy.deepcopy(module)
            scramble(trial)
            weight = trial.get_parameter(weight_name(trial))
            first = trial(x) if weight.mul_(16).numel() else x
            change = trial(x) - first if weight.mul_(2).numel() else x
    except Exception:  # noqa: BLE001 (as above)
        return False
    return float(first.abs().max()) > 0 and float(change.abs().max()) < _CLOSE * float(first.abs().max())


class _StandIn(nn.Module):
    """A module that passes each neuron on by itself, in the place of a norm, while neurons are followed."""

    def __init__(self, norm: nn.Module, shape: Sequence[int], like: Tensor, *, joins: bool) -> None:
        super().__init__()
        self.joins = joins
        object.__setattr__(self, "replaced", norm)  # no submodule, as it does not run
        self.passed_neurons = nn.Parameter(torch.ones(shape, dtype=like.dtype, device=like.device))
        self.train(norm.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = next(tensors_in((args, kwargs)))
        return x * (self.passed_neurons.to(x.dtype) if self.joins else 1.0)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the norm, which others may read, such as its ``eps``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["replaced"], name)


def follow_through(
    model: nn.Module, example: Example, norm_streams: NormStreams, find: Callable[[nn.Module], Coupling]
) -> tuple[Coupling, Norms]:
    """Follow neurons through norms as through scales of each of them.

    A norm inside of heads, as of queries, has one scale for all heads and so joins all of their neurons to one unit.
    Whole heads leave it as it is, so neurons are followed again, without its scale; that is exact.

    Args:
        model: A copy of the model; its norms are in place again afterwards.
        example: The inputs to run it on.
        norm_streams: ``"refuse"`` only follows through norms inside of heads.
        find: Reads a model's coupling.

    Returns:
        The coupling, and the norms that are parts of its groups.
    """
    refuses = norm_streams == "refuse"
    coupling = find(model) if refuses else None
    if coupling is not None and not coupling.lost and all(group.size > 1 for group in coupling.groups):
        return coupling, Norms()
    norms = find_norms(model, example)
    if coupling is not None and not norms.layers:
        return coupling, Norms()
    through = _followed(model, norms, find)
    inside = {path for group in through.groups if group.size == 1 for path in norms.of(group)}
    if coupling is not None:
        few = Norms({path: shape for path, shape in norms.layers.items() if path in inside})
        return (_followed(model, few, find, inside) if inside else coupling), Norms()
    return (_followed(model, norms, find, inside) if inside else through), norms


def _followed(
    model: nn.Module, norms: Norms, find: Callable[[nn.Module], Coupling], inside: Collection[str] = ()
) -> Coupling:
    modules, like = modules_by_name(model), next(model.parameters(), torch.empty(0))
    stand_ins = {
        modules[path]: _StandIn(modules[path], shape, like, joins=path not in inside)
        for path, shape in norms.layers.items()
    }
    replaced = [
        (parent, name, norm)
        for parent in model.modules()
        for name, norm in parent._modules.items()
        if norm is not None and norm in stand_ins
    ]
    for parent, name, norm in replaced:
        parent._modules[name] = stand_ins[norm]
    try:
        coupling = find(model)
    finally:
        for parent, name, norm in replaced:
            parent._modules[name] = norm
    return replace(coupling, groups=tuple(_with_norms(group, norms, modules) for group in coupling.groups))


def _with_norms(group: Group, norms: Norms, modules: Mapping[str, nn.Module]) -> Group:
    parts: list[Part] = []
    for part in group.parts:
        path = part.path.removesuffix(".passed_neurons")
        if part.role != "holds" or path not in norms.layers:
            parts.append(part)
            continue
        parts.append(Part(path, "passes", part.indices))
        own = _places(modules[path], norms.layers[path][0]) or {}
        recorded = axes(modules[path], "passes")
        parts += [Part(f"{path}.{leaf}", "holds", part.indices, a) for leaf, a in own.items() if leaf not in recorded]
    attributes = [
        Attribute(path, name, place, path, tuple(range(norms.layers[path][0])))
        for path in dict.fromkeys(part.path for part in parts if part.role == "passes")
        for name, place in norms.numbers.get(path, ())
    ]
    return replace(group, parts=tuple(parts), attributes=(*group.attributes, *attributes))


@contextmanager
def narrowed(model: nn.Module, cuts: Sequence[TensorCut], norms: Norms) -> Iterator[None]:
    """Let norms run on the neurons that stay, inside the context; their output is zero for removed ones.

    Args:
        model: The model, with all of its neurons.
        cuts: What the norms lose.
        norms: Modules with their axes.
    """
    modules, hooks = modules_by_name(model), []
    operation = cut(model, cuts)
    try:
        for one in cuts:
            if one.role == "holds":
                continue
            module = modules[one.path]
            axis = -len(norms.layers[one.path]) if one.role == "passes" else norms.readers[one.path]
            narrow = partial(_narrow, axis, one.places)
            hooks.append(module.register_forward_pre_hook(narrow, with_kwargs=True))
            if one.role == "passes":
                hooks.append(module.register_forward_hook(partial(_widen, axis, one.places)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        operation.roll_back()


def _narrow(axis: int, removed: Sequence[int], module: nn.Module, args: Any, kwargs: Any) -> Any:
    def kept(x: Tensor) -> Tensor:
        return x.index_select(axis, _rest(x.shape[axis], removed).to(x.device))

    return map_tensors_in((args, kwargs), kept)


def _widen(axis: int, removed: Sequence[int], module: nn.Module, args: Any, output: Tensor) -> Tensor:
    shape = list(output.shape)
    shape[axis] += len(removed)
    return output.new_zeros(shape).index_copy(axis, _rest(shape[axis], removed).to(output.device), output)


def _rest(size: int, removed: Sequence[int]) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[list(removed)] = False
    return stays.nonzero().flatten()
