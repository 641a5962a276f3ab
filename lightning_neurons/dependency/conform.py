"""Give a model the widths of a checkpoint, so that it can be loaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_neurons.dependency.sizes import all_sizes, put_sizes, refit, sizes_in
from lightning_neurons.errors import ArgumentError
from lightning_neurons.layers.attention import rows_of_head
from lightning_neurons.layers.prunable import check_prunable
from lightning_neurons.layers.recurrent import has_hidden_units, hidden_places
from lightning_neurons.layers.width_handlers import axes, blocks_of_neurons, passes, why_fixed, width


def conform(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Give a model the widths of a state dict, so that it can be loaded; no forward needed.

    Only widths are changed, and with them the numbers in attributes that the metadata of ``state`` has. A module for
    which the state dict differs in anything else, has contradicting widths or lacks a key is left as it is, so that
    ``load_state_dict`` reports it.

    Args:
        model: The model that will load ``state``.
        state: Tensors by name.
        prefix: Prefix of the names in ``state``.

    Returns:
        The names of the tensors that were given another size. Their values are undefined until they are loaded.

    Raises:
        ArgumentError: If ``model`` is no module, or ``state`` no state dict, or if the arguments of
            ``register_prunable`` do not fit one of its modules.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).state_dict()
        >>> conform(net, small)
        ['0.weight', '0.bias', '2.weight']
        >>> net.load_state_dict(small), net[0].out_features
        (<All keys matched successfully>, 6)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError.of("model", type(model).__name__, "a module")
    if not isinstance(state, Mapping):
        raise ArgumentError.of("state", type(state).__name__, "a state dict, that is tensors by name")
    check_prunable(model)
    changed = list(_misfits(model, state, prefix))
    for _, module, leaf, shape in changed:
        tensor = getattr(module, leaf)
        _set(module, leaf, torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
    for module in model.modules() if changed else ():  # all of them: a tensor may be shared
        refit(module)
    put_sizes(model, sizes_in(model, state, prefix))
    return [name for name, *_ in changed]


@contextmanager
def conforming(model: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Give a model the widths of a state dict while that is loaded; after an error it gets its own back."""
    before = [(module, leaf, getattr(module, leaf).data) for _, module, leaf, _ in _misfits(model, state, "")]
    lazy = [module for module in model.modules() if isinstance(module, LazyModuleMixin)]
    sizes = all_sizes(model)
    conform(model, state)
    try:
        yield
        for one in lazy:  # torch gives them the tensors of the file, and leaves their attributes as they are
            refit(one)
    except BaseException:
        for module, leaf, data in before:
            _set(module, leaf, data)
        for module in model.modules() if before else ():
            refit(module)
        put_sizes(model, sizes)
        raise


def narrowed(model: nn.Module, state: Mapping[str, Any], role: Literal["makes", "reads"]) -> list[str]:
    """Return the layers that make, or read, fewer neurons in a state dict, and differ in nothing but widths.

    Example:
        >>> net, small = nn.Linear(4, 8), nn.Linear(4, 6)
        >>> narrowed(net, small.state_dict(), "makes"), narrowed(net, small.state_dict(), "reads")
        (['Linear'], [])
    """
    found: dict[str, None] = {}
    for name, module, leaf, shape in _misfits(model, state, ""):
        made = {"weight_hh_l0": 1} if role == "makes" and has_hidden_units(module) else axes(module, role)
        axis = None if passes(module) else made.get(leaf)
        if axis is not None and shape[axis] < getattr(module, leaf).shape[axis]:
            found[name.rpartition(".")[0] or type(module).__name__] = None
    return list(found)


def widened(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that are larger on some axis in a state dict, and differ in nothing but widths."""
    return [
        name
        for name, module, leaf, shape in _misfits(model, state, "")
        if any(there > here for there, here in zip(shape, getattr(module, leaf).shape, strict=True))
    ]


def _misfits(
    model: nn.Module, state: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, nn.Module, str, torch.Size]]:
    """Yield tensors that differ from a state dict in nothing but widths: name, module, leaf and the shape there."""
    for path, module in model.named_modules():
        if not axes(module, "makes") and not axes(module, "reads") and not _holds_parameters(module):
            continue
        before = f"{prefix}{path}." if path else prefix
        for leaf, shape in _new_shapes(module, state, before).items():
            yield f"{path}.{leaf}" if path else leaf, module, leaf, shape


def _set(module: nn.Module, leaf: str, new: Tensor) -> None:
    set_data(module._parameters if leaf in module._parameters else module._buffers, leaf, new)


def _new_shapes(module: nn.Module, state: Mapping[str, Any], before: str) -> dict[str, torch.Size]:
    """Return the shapes of a module's tensors that differ in nothing but widths; none if they contradict."""
    if why_fixed(module) is not None:
        return {}
    makes, reads = axes(module, "makes"), axes(module, "reads")
    found, widths = {}, set()
    for leaf, tensor in {**module._parameters, **module._buffers}.items():
        given = state.get(before + leaf)
        if not isinstance(given, Tensor) or tensor is None or is_lazy(tensor) or given.ndim != tensor.ndim:
            continue
        if leaf in makes:
            widths.add(given.shape[makes[leaf]])
        free = {axis % tensor.ndim for axis in (makes.get(leaf), reads.get(leaf)) if axis is not None}
        free = set(range(tensor.ndim)) if has_hidden_units(module) else free
        free = free or (set(range(tensor.ndim)) if _holds_parameters(module) else set())
        other = {axis for axis, (a, b) in enumerate(zip(tensor.shape, given.shape, strict=True)) if a != b}
        if not other <= free or not all(given.shape[axis] for axis in other):  # of nothing, something stays
            return {}
        if other:
            found[leaf] = given.shape
    if has_hidden_units(module) and not _fit_together(module, found):
        return {}
    whole = rows_of_head(module)
    if (blocks := blocks_of_neurons(module)) is not None:
        whole = (width(module, "makes") or blocks) // blocks
    fits = len(widths) <= 1 and not any(size % whole for size in widths)
    return found if fits else {}


def _fit_together(module: nn.RNNBase, shapes: Mapping[str, torch.Size]) -> bool:
    """Return whether all parameters of a recurrent layer would be those of one number of hidden units."""
    before = {name: shapes.get(name, tensor.shape) for name, tensor in module.named_parameters()}
    hidden = before["weight_hh_l0"][1]
    rows = {name: len(places[0]) for name, axis, places in hidden_places(module, [[0]]) if axis == 0}
    return all(before[name][0] == count * hidden for name, count in rows.items()) and all(
        size[1] == hidden for name, size in before.items() if name.startswith("weight_hh")
    )


def _holds_parameters(module: nn.Module) -> bool:
    """Return whether a module has parameters that are no layer's weights, such as a learned position."""
    known = isinstance(module, nn.ParameterList | nn.ParameterDict | nn.MultiheadAttention)
    return (known or not type(module).__module__.startswith("torch.")) and bool(module._parameters)


def set_data(store: Any, leaf: str, new: Tensor) -> None:
    """Give a parameter other data and keep the object, which optimizers hold as well; a buffer is replaced."""
    tensor = store[leaf]
    if not isinstance(tensor, nn.Parameter):
        store[leaf] = new
        return
    tensor.grad = None
    # The detour by another type makes autograd forget the node that accumulates gradients, which has the old shape.
    wide, narrow = (torch.complex128, torch.complex64) if new.is_complex() else (torch.float64, torch.float32)
    tensor.data = new.new_empty(0, dtype=narrow if new.dtype == wide else wide)
    tensor.data = new
