"""The cut itself: tensors become smaller, the objects stay.

Parameters keep their identity, so that optimizers, schedulers, gradient clipping and all others that hold them go on as
before; gradients and the state of optimizers are cut by the same indices. A cut happens whole or not at all: all new
tensors are computed before the first is put in place, and what has been put in place is taken back after an error.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.dependency.conform import set_data
from lightning_neurons.dependency.groups import Attribute, Group
from lightning_neurons.dependency.sizes import key_of, putting_back, putting_back_fit, refit, set_sizes, size_at
from lightning_neurons.errors import PruningError
from lightning_neurons.layers.layer import modules_by_name, public_name
from lightning_neurons.layers.width_handlers import Role, axes, handler_of
from lightning_neurons.pruning.surgery.optimizers import (
    fits,
    foreign_entries,
    is_large,
    refill,
    refuse_outside_state,
    with_held,
)


@dataclass(frozen=True)
class SizeCut:
    """A whole number in a module's own attributes, such as a number of heads, of which a share stays.

    Attributes:
        path: Path of the module.
        name: Name of the attribute.
        place: Place in a tuple or list, or None.
        left: The number of neurons that stay, of those that it follows.
        total: Their number before the cut.
    """

    path: str
    name: str
    place: int | None
    left: int
    total: int


@dataclass(frozen=True)
class TensorCut:
    """The neurons that one module (or, for the role ``"holds"``, one parameter) loses.

    Attributes:
        path: The module or parameter.
        role: The module's relation to the removed neurons, such as ``"makes"`` or ``"reads"``.
        places: Their indices, sorted.
        axis: Of a parameter that is no module's weight, the axis.
        sizes: Numbers in attributes, of this module or others, that follow its width.
    """

    path: str
    role: Role
    places: tuple[int, ...]
    axis: int | None = None
    sizes: tuple[SizeCut, ...] = ()


class Operation:
    """Changes that have been made so far, and can be taken back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def do(self, action: Callable[[], None], undo: Callable[[], None]) -> None:
        """Change something; ``undo`` must also be right after half of ``action``."""
        self._undo.append(undo)
        action()

    def keep(self, target: object) -> None:
        """Record an object's attributes, so that later changes of them are taken back as well."""
        self._undo.append(partial(vars(target).update, dict(vars(target))))

    def roll_back(self) -> None:
        """Put everything back, the latest first."""
        while self._undo:
            self._undo.pop()()


def cuts_of(groups: Iterable[Group], units: Mapping[str, Sequence[int]]) -> list[TensorCut]:
    """Return what each module loses when units are removed.

    Args:
        groups: The groups of a model.
        units: By a group's root, the units to remove.

    Returns:
        One cut for each module or parameter, role and axis.
    """
    places: dict[tuple[str, Role, int | None], set[int]] = {}
    attributes: dict[str, dict[Attribute, None]] = {}
    for group in groups:
        for part in group.parts:
            gone = {i for unit in units.get(group.root, ()) for i in part.indices[unit]}
            if gone:
                places.setdefault((part.path, part.role, part.axis), set()).update(gone)
        for attribute in group.attributes:
            attributes.setdefault(attribute.layer, {})[attribute] = None

    def sizes(path: str, role: Role, gone: set[int]) -> tuple[SizeCut, ...]:
        follow = attributes.get(path, {}) if role in ("makes", "passes") else {}
        shares = [(a, sum(neuron not in gone for neuron in a.neurons)) for a in follow]
        return tuple(SizeCut(a.path, a.name, a.place, n, len(a.neurons)) for a, n in shares if n < len(a.neurons))

    return [
        TensorCut(path, role, tuple(sorted(gone)), axis, sizes(path, role, gone))
        for (path, role, axis), gone in places.items()
    ]


def cut(
    model: nn.Module,
    cuts: Sequence[TensorCut],
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    shifts: Mapping[str, Tensor] | None = None,
    also: Callable[[Operation], None] | None = None,
) -> Operation:
    """Make a model smaller, in place.

    Args:
        model: The model.
        cuts: The cuts.
        optimizers: Their state is cut as well, and that of optimizers that they hold; element by element where it has
            the parameter's shape.
        copies: Averages of the model with the same names, such as those of EMA and SWA.
        shifts: By name of a parameter or buffer, what is added to it before the cut.
        also: Called at the end for further changes, which are taken back with the cut.

    Returns:
        The operation, which can be rolled back.

    Raises:
        Exception: Whatever went wrong; the model, the copies and the optimizers are then as they were.
    """
    operation, optimizers = Operation(), with_held(optimizers)
    try:
        with torch.inference_mode(False), torch.no_grad():
            # All that can fail by itself is computed first.
            smaller = [s for root in (model, *copies) for s in _smaller(root, cuts, shifts or {})]
            refuse_outside_state(optimizers, [one.owner for one in smaller if one.stays])
            states = [entry for optimizer in optimizers for entry in _states(optimizer, smaller)]
            owners = _owners((model, *copies), smaller)
            numbers = [entry for root in (model, *copies) for entry in _sizes(root, cuts)]
            for one in smaller:
                operation.do(one.put, one.put_back)
            for module in owners:
                operation.do(partial(refit, module), putting_back_fit(module))
            for module, size, width in _bare((model, *copies), cuts):
                operation.do(
                    partial(setattr, module, size, width), partial(setattr, module, size, getattr(module, size))
                )
            for module, new in numbers:
                operation.do(partial(set_sizes, module, new), putting_back(module, new))
            for state, entries in states:
                operation.do(partial(refill, state, entries), partial(refill, state, dict(state)))
            if also is not None:
                also(operation)
    except BaseException:
        operation.roll_back()
        raise
    finally:
        torch.clear_autocast_cache()  # it goes by the identity of parameters, which stays
    return operation


@dataclass(eq=False)
class _Smaller:
    """One tensor of a module, as it was and as it will be; for each axis that is cut, the places that stay."""

    module: nn.Module
    leaf: str
    stays: Mapping[int, Tensor]
    shift: Tensor | None

    def __post_init__(self) -> None:
        self.owner: Tensor = getattr(self.module, self.leaf)
        self.old, self.old_gradient = self.owner.data, self.owner.grad
        self.new = self.select(self.old if self.shift is None else self.old + self.shift.to(self.old))
        self.gradient = None if self.old_gradient is None else self.select(self.old_gradient)

    def select(self, tensor: Tensor) -> Tensor:
        """Return what stays of a tensor of the old shape, or of one that has size 1 where that has more."""
        found = tensor
        for axis, stays in self.stays.items():
            if tensor.shape[axis] != 1 or self.old.shape[axis] == 1:
                found = found.index_select(axis, stays.to(tensor.device))
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            found = found.contiguous(memory_format=torch.channels_last)
        return tensor.clone() if found is tensor else found  # memory of its own, also where nothing was cut

    def put(self) -> None:
        self._set(self.new, self.gradient)

    def put_back(self) -> None:
        self._set(self.old, self.old_gradient)

    def _set(self, data: Tensor, gradient: Tensor | None) -> None:
        if isinstance(self.owner, nn.Parameter):
            set_data(self.module._parameters, self.leaf, data)
            self.owner.grad = gradient
        else:
            self.module._buffers[self.leaf] = self.owner if data is self.old else data


def stays_of(model: nn.Module, cuts: Sequence[TensorCut]) -> dict[str, dict[int, Tensor]]:
    """Return the places that stay, by name of a tensor and by axis.

    Args:
        model: As it is before the cut.
        cuts: The cuts.

    Returns:
        Sorted indices. A parameter that several modules have is there once, by its first name.
    """
    modules = modules_by_name(model)
    names = {id(parameter): public_name(name) for name, parameter in model.named_parameters()}
    places: dict[str, tuple[Tensor, dict[int, set[int]]]] = {}
    for one in cuts:
        if one.role == "holds":
            owner, _, leaf = one.path.rpartition(".")
            assert one.axis is not None, "of a bare parameter, the axis is known"
            found = {leaf: one.axis}
        else:
            owner, found = one.path, axes(modules[one.path], one.role)
        for leaf, axis in found.items():
            tensor = getattr(modules[owner], leaf)
            name = names.get(id(tensor), f"{owner}.{leaf}" if owner else leaf)
            places.setdefault(name, (tensor, {}))[1].setdefault(axis % tensor.ndim, set()).update(one.places)
    return {
        name: {axis: _rest(tensor, axis, gone) for axis, gone in by_axis.items()}
        for name, (tensor, by_axis) in places.items()
    }


def _smaller(model: nn.Module, cuts: Sequence[TensorCut], shifts: Mapping[str, Tensor]) -> list[_Smaller]:
    modules, stays = modules_by_name(model), stays_of(model, cuts)
    found = []
    for name in dict.fromkeys((*shifts, *stays)):
        owner, _, leaf = name.rpartition(".")
        found.append(_Smaller(modules[owner], leaf, stays.get(name, {}), shifts.get(name)))
    return found


def _owners(models: Iterable[nn.Module], smaller: Sequence[_Smaller]) -> list[nn.Module]:
    """Return the modules whose tensors become smaller, also those that share them with others."""
    changed = {id(one.owner) for one in smaller}
    return [
        module
        for model in models
        for module in model.modules()
        if any(id(tensor) in changed for tensor in (*module._parameters.values(), *module._buffers.values()))
    ]


def _bare(models: Iterable[nn.Module], cuts: Sequence[TensorCut]) -> list[tuple[nn.Module, str, int]]:
    """Return modules without tensors, such as norm layers, the attribute that is their width, and its new value."""
    found = []
    for model in models:
        modules = modules_by_name(model)
        for one in cuts:
            module = modules.get(one.path)
            handler = handler_of(module)
            if module is not None and handler is not None and handler.role == "passes" and not axes(module, one.role):
                before = next((getattr(module, name) for name, size in handler.sizes.items() if size == "passes"), 0)
                left = before - len(one.places)  # blocks, such as the groups of a norm, go whole
                found += [(module, name, getattr(module, name) * left // before) for name in handler.sizes if before]
    return found


def sizes_after(model: nn.Module, cuts: Sequence[TensorCut]) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the numbers in attributes that a cut changes.

    Args:
        model: As it is before the cut.
        cuts: The cuts.

    Returns:
        By path of a module and by attribute, the number before the cut and after it.

    Raises:
        PruningError: If a number would not be whole, or follows layers that lose different shares.
    """
    modules = modules_by_name(model)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for one in [size for entry in cuts for size in entry.sizes]:
        key = key_of(one.name, one.place)
        before = size_at(modules[one.path], key)
        if before is None:
            raise PruningError(f"{one.path or 'the model'} has no whole number {key}, which has to follow")
        after, rest = divmod(before * one.left, one.total)
        what = f"{key} of {one.path or type(model).__name__}"
        if rest or not after:
            would = f"{before * one.left / one.total:.4g}"
            raise PruningError(f"{what} is {before} and would be {would}, which is no number of neurons")
        if found.setdefault(one.path, {}).setdefault(key, (before, after)) != (before, after):
            raise PruningError(f"{what} follows layers that lose different shares of their neurons")
    return found


def _sizes(model: nn.Module, cuts: Sequence[TensorCut]) -> list[tuple[nn.Module, dict[str, int]]]:
    modules = modules_by_name(model)
    changes = sizes_after(model, cuts)
    return [(modules[path], {key: after for key, (_, after) in by.items()}) for path, by in changes.items()]


def _rest(tensor: Tensor, axis: int, gone: Iterable[int]) -> Tensor:
    stays = torch.ones(tensor.shape[axis], dtype=torch.bool)
    stays[list(gone)] = False
    return stays.nonzero().flatten().to(tensor.device)


def _states(
    optimizer: torch.optim.Optimizer, smaller: Sequence[_Smaller]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Cut the state that an optimizer has for each parameter that is cut.

    Returns:
        Pairs of the state as it is and as it will be; the second is empty where the state starts afresh.
    """
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    foreign = foreign_entries(optimizer)
    for one in smaller:
        state = optimizer.state.get(one.owner)
        if not state or not one.stays:
            continue
        # A vector has the right form in any case.
        strange = [n for n, value in state.items() if not fits(value, one.old) or (n in foreign and one.old.ndim > 1)]
        if strange:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {strange[0]!r} in a form that does not follow the shape of a "
                "parameter; its state for this parameter starts afresh after the cut",
                stacklevel=4,
            )
            found.append((state, {}))
        else:
            found.append((state, {n: one.select(v) if is_large(v) else v for n, v in state.items()}))
    return found
