"""The module types that have neurons, and the functions that may stand between a layer and the next.

``LAYER_FAMILIES`` can be extended by ``register_layer``. The function tables hold what ``torch`` dispatches when a
module or a functional call runs, so that ``nn.ReLU()``, ``F.relu`` and ``x.relu_()`` are all seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name that the field uses)
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_neurons.errors import ArgumentError
from lightning_neurons.layers.recognition import recognized

LinkKind = Literal["norm", "affine", "activation", "dropout"]


@dataclass(frozen=True)
class LayerFamily:
    """A way to count and find the neurons of a module type.

    Attributes:
        neurons: Function from a module to its number of neurons.
        axis: Axis of the neurons in its output: 1 for channels, -1 for features.
    """

    neurons: Callable[[Any], int]
    axis: int


_CHANNELS = LayerFamily(lambda module: int(module.out_channels), 1)
_FEATURES = LayerFamily(lambda module: int(module.out_features), -1)

LAYER_FAMILIES: dict[type[nn.Module], LayerFamily] = {
    nn.Conv1d: _CHANNELS,
    nn.Conv2d: _CHANNELS,
    nn.Conv3d: _CHANNELS,
    nn.ConvTranspose1d: _CHANNELS,
    nn.ConvTranspose2d: _CHANNELS,
    nn.ConvTranspose3d: _CHANNELS,
    nn.Linear: _FEATURES,
}


_BUILT_IN = frozenset(LAYER_FAMILIES)


def register_layer(module_type: type[nn.Module], *, neurons: Callable[[Any], int], axis: int) -> None:
    """Make a module type of your own count as a layer, everywhere.

    Args:
        module_type: A subclass of ``nn.Module`` whose forward returns one tensor.
        neurons: Function from a module of this type to its number of neurons.
        axis: The neuron axis of its output: 1 for channels, -1 for features.

    Raises:
        ArgumentError: If ``module_type`` is no module type, or ``axis`` is 0, the batch.

    Example:
        >>> class Maxout(nn.Module):
        ...     def __init__(self, inputs, units):
        ...         super().__init__()
        ...         self.units, self.linear = units, nn.Linear(inputs, 2 * units)
        ...     def forward(self, x):
        ...         return self.linear(x).view(-1, self.units, 2).amax(-1)
        >>> register_layer(Maxout, neurons=lambda module: module.units, axis=-1)
        >>> family_of(Maxout(4, 3)).neurons(Maxout(4, 3))
        3
        >>> del LAYER_FAMILIES[Maxout]
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ArgumentError.of("module_type", module_type, "a subclass of torch.nn.Module")
    if module_type in _BUILT_IN:
        raise ArgumentError.of("module_type", module_type.__name__, "a type of your own; this one is known")
    if isinstance(axis, bool) or not isinstance(axis, int) or axis == 0:
        raise ArgumentError.of("axis", axis, "1 for channels or -1 for features; axis 0 is the batch")
    LAYER_FAMILIES[module_type] = LayerFamily(neurons, axis)


def family_of(module: nn.Module) -> LayerFamily | None:
    """Look up the family of a module's own type or its nearest base.

    Returns:
        The family; that of linear layers for a type of a user's own that is recognised as one; None without neurons.
    """
    family = next((LAYER_FAMILIES[t] for t in type(module).__mro__ if t in LAYER_FAMILIES), None)
    place = recognized(module) if family is None else None
    if place is None or not place.reads:
        return family
    made = place.makes["weight"]
    return LayerFamily(lambda layer: int(layer.weight.shape[made]), place.axis)


def neuron_axis(module: nn.Module, output: Any) -> int | None:
    """Return the neuron axis of a module's output, counted from the end if a convolution ran on one unbatched sample.

    Example:
        >>> layer = nn.Conv1d(2, 3, 1)
        >>> neuron_axis(layer, layer(torch.zeros(4, 2, 5))), neuron_axis(layer, layer(torch.zeros(2, 5)))
        (1, -2)
    """
    family = family_of(module)
    if family is None:
        return None
    if isinstance(module, _ConvNd) and isinstance(output, Tensor) and output.ndim == len(module.kernel_size) + 1:
        return -output.ndim
    return family.axis


def widths_of(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the number of neurons of each layer."""
    return {name: family.neurons(module) for name, module in modules.items() if (family := family_of(module))}


_T = Tensor
_NORMS: set[Callable[..., Any]] = {
    F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm, F.local_response_norm
}  # fmt: skip
_RECTIFIERS: set[Callable[..., Any]] = {
    F.relu, F.relu_, torch.relu, torch.relu_, _T.relu, _T.relu_, F.relu6, F.threshold
}  # fmt: skip
_SIGMOIDS: set[Callable[..., Any]] = {
    F.sigmoid, torch.sigmoid, torch.sigmoid_, _T.sigmoid, _T.sigmoid_, F.hardsigmoid
}  # fmt: skip
_TANHS: set[Callable[..., Any]] = {F.tanh, torch.tanh, torch.tanh_, _T.tanh, _T.tanh_, F.hardtanh, F.hardtanh_}
_SMOOTH: set[Callable[..., Any]] = {
    F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.selu_, F.celu, F.celu_, F.prelu, F.rrelu, F.rrelu_, F.gelu,
    F.silu, F.mish, F.softplus, F.softsign, F.hardswish, F.hardshrink, F.softshrink, F.tanhshrink, F.logsigmoid,
    torch.selu, torch.selu_, torch.celu, torch.celu_, torch.prelu, torch.rrelu, torch.rrelu_, _T.prelu,
}  # fmt: skip
_DROPOUTS: set[Callable[..., Any]] = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.alpha_dropout, torch.feature_dropout,
}  # fmt: skip

LINKS: dict[Callable[..., Any], LinkKind] = {
    **dict.fromkeys(_NORMS, "norm"),
    **dict.fromkeys(_RECTIFIERS | _SIGMOIDS | _TANHS | _SMOOTH, "activation"),
    **dict.fromkeys(_DROPOUTS, "dropout"),
}
"""Kinds of the functions that may follow a layer; see ``hooks/chain_functions.py`` for those written out."""

RECTIFIERS = frozenset(f.__name__ for f in _RECTIFIERS) - {"threshold"}
"""Names of functions that make every value zero or positive. A threshold may set another value than zero."""

BOUNDS: dict[str, tuple[float, float]] = {
    **{f.__name__: (0.0, 1.0) for f in _SIGMOIDS},
    **{f.__name__: (-1.0, 1.0) for f in _TANHS - {F.hardtanh, F.hardtanh_}},
}
"""Bounds of the functions that saturate at two fixed values. (``hardtanh`` has bounds of the caller's choice.)"""


def function_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the name of a function by its effect: ``nn.ReLU6`` calls ``hardtanh`` with a lower bound of 0."""
    if function in (F.hardtanh, F.hardtanh_):
        low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
        return "relu6" if low == 0 else "hardtanh"
    return function.__name__.lstrip("_")


PASSING: frozenset[Callable[..., Any]] = frozenset({
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    torch.flatten, _T.flatten, _T.view, _T.reshape, torch.reshape, _T.squeeze, torch.squeeze,
    _T.mean, torch.mean, _T.contiguous, F.pad, torch.nn.functional.interpolate,
})  # fmt: skip
"""Functions after which each neuron is still on its own: they pool its values or change the layout."""
