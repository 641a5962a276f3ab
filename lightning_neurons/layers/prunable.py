"""Records of layer types that the package does not know by itself: ``register_prunable`` and its checks."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_neurons.errors import ArgumentError, UnknownNameError, check_choice
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.registry import family_of
from lightning_neurons.layers.width_handlers import HANDLERS, Role, Size, WidthHandler, handler_of, size_of, why_fixed

_BUILT_IN = frozenset(HANDLERS)


def register_prunable(
    module_type: type[nn.Module],
    *,
    axis: int,
    makes: Mapping[str, int] | None = None,
    reads: Mapping[str, int] | None = None,
    passes: Mapping[str, int] | None = None,
    sizes: Mapping[str, Literal["makes", "reads", "passes"] | Callable[[Any], object]] | None = None,
) -> None:
    """Register how a module type of your own is made narrower, so that it, and layers before it, can be pruned.

    The record is tested on a copy of a module before that is cut. ``register_layer`` makes its neurons known.

    Args:
        module_type: A subclass of ``nn.Module`` whose forward takes and returns one tensor.
        axis: Axis of the neurons in these tensors: 1 for channels, -1 for features.
        makes: For each parameter or buffer, by name, the axis of the neurons that the module makes.
        reads: For each parameter or buffer, by name, the axis of the neurons that it reads.
        passes: The same instead of both, for a module that passes each neuron on by itself, such as a norm layer.
        sizes: For each attribute, by name, which of the three it counts, or a function of the module that computes it.

    Raises:
        ArgumentError: If an argument has a value that is not allowed. The names of tensors, which a module type does
            not show, are checked when a model with such a module is measured, pruned or loaded.

    Example:
        >>> import torch
        >>> from lightning_neurons import prune, register_layer
        >>> class Scaled(nn.Module):
        ...     def __init__(self, inputs, units):
        ...         super().__init__()
        ...         self.units, self.weight = units, nn.Parameter(torch.randn(inputs, units))
        ...         self.scale = nn.Parameter(torch.ones(units))
        ...     def forward(self, x):
        ...         return x @ self.weight * self.scale
        >>> register_layer(Scaled, neurons=lambda module: module.units, axis=-1)
        >>> register_prunable(
        ...     Scaled, axis=-1, makes={"weight": 1, "scale": 0}, reads={"weight": 0}, sizes={"units": "makes"}
        ... )
        >>> net = nn.Sequential(Scaled(4, 8), nn.ReLU(), Scaled(8, 2))
        >>> _ = prune(net, torch.randn(16, 4), {"0": [1, 3, 5, 7]})
        >>> net[0].units, net[0].weight.shape, net[2].weight.shape
        (4, torch.Size([4, 4]), torch.Size([4, 2]))
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ArgumentError.of("module_type", module_type, "a subclass of torch.nn.Module")
    if module_type in _BUILT_IN:
        raise ArgumentError.of("module_type", module_type.__name__, "a type of your own; this one is known")
    if isinstance(axis, bool) or not isinstance(axis, int) or axis == 0:
        raise ArgumentError.of("axis", axis, "1 for channels or -1 for features; axis 0 is the batch")
    roles = {"makes": makes, "reads": reads, "passes": passes}
    given = {role: _checked(role, tensors) for role, tensors in roles.items() if tensors is not None}
    if not given or ("passes" in given and len(given) > 1):
        raise ArgumentError.of("passes", passes, "makes, reads or both of them, or else passes alone")
    if sizes is not None and not isinstance(sizes, Mapping):
        raise ArgumentError.of("sizes", sizes, "what each attribute says, by its name, such as {'units': 'makes'}")
    for name, size in (sizes or {}).items():
        if not callable(size):
            check_choice(f"sizes[{name!r}]", size, tuple(given))
    HANDLERS[module_type] = WidthHandler(
        makes=given.get("passes", given.get("makes", {})),
        reads=given.get("reads", {}),
        sizes=dict(sizes or {}),
        axis=lambda module: axis,
        role="passes" if "passes" in given else None,
        registered=True,
    )


def _checked(role: str, tensors: object) -> dict[str, int]:
    allowed = f"axes by the names of tensors, such as {role}={{'weight': 0}}"
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(name, str) for name in tensors):
        raise ArgumentError.of(role, tensors, allowed)
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in tensors.values()):
        raise ArgumentError.of(role, dict(tensors), allowed)
    return dict(tensors)


def check_prunable(model: nn.Module) -> None:
    """Check the arguments of ``register_prunable`` against the modules of a model.

    Args:
        model: The model before it is cut or loaded.

    Raises:
        ArgumentError: If a module has no such tensor, axis or attribute, or if they contradict one another.
    """
    for module in modules_by_name(model).values():
        handler = handler_of(module)
        if handler is None or not handler.registered or why_fixed(module) is not None:
            continue
        roles: tuple[Role, ...] = ("passes",) if handler.role else ("makes", "reads")
        for role in roles:
            _check_axes(module, role, handler.axes(role))
        for name, size in handler.sizes.items():
            _check_size(module, name, size)


def _check_axes(module: nn.Module, role: Role, told: Mapping[str, int]) -> None:
    """Check that tensors have the neurons on axes of one length."""
    kind, tensors = type(module).__name__, {**module._parameters, **module._buffers}
    for name in told:
        if name not in tensors:
            raise UnknownNameError.among(f"{role} of {kind}, as register_prunable was told", name, tensors)
    shapes = {name: tuple(t.shape) for name in told if (t := tensors[name]) is not None and not is_lazy(t)}
    lengths = {shape[told[n]] if -len(shape) <= told[n] < len(shape) else None for n, shape in shapes.items()}
    family = family_of(module) if role == "makes" else None
    if shapes and family is not None:
        lengths.add(family.neurons(module))
    if len(lengths) > 1 or None in lengths:
        neurons = f" and {family.neurons(module)} neurons" if family else ""
        has = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ArgumentError.of(role, dict(told), f"axes of one length, one for each neuron; {kind} has {has}{neurons}")


def _check_size(module: nn.Module, name: str, size: Size) -> None:
    kind = type(module).__name__
    if not hasattr(module, name):
        known = [n for n in vars(module) if not n.startswith("_") and n != "training"]
        raise UnknownNameError.among(f"sizes of {kind}, as register_prunable was told", name, known)
    says, found = getattr(module, name), size_of(module, size)
    if found is not None and says != found:
        raise ArgumentError.of(f"sizes[{name!r}]", size, f"what {kind}.{name}={says!r} counts; this is {found!r}")
