"""The place of neurons in the tensors and attributes of each layer type: one record a type.

Everything that makes a model narrower, counts what that saves, or fits a model to a checkpoint asks the record of a
module's type. ``register_prunable`` adds the records of other types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lightning_neurons.layers.attention import WEIGHTS_APART, has_weights_apart, heads_of, why_inseparable
from lightning_neurons.layers.recognition import own_axes, recognized
from lightning_neurons.layers.recurrent import directions, why_units_inseparable

Role = Literal["makes", "passes", "reads", "holds"]
"""What a module does with a neuron: it makes it, hands it on one by one (a norm layer, a depthwise convolution), reads
it, or is itself a parameter that holds one entry for it."""

Size = Literal["makes", "passes", "reads"] | Callable[[Any], object]
"""What an attribute says: how many neurons a module makes, hands on or reads, or what a function finds in it."""

# Of torch.nn.utils.prune, weight_norm and spectral_norm.
_MASKED = ("weight_orig", "bias_orig", "weight_g", "weight_v", "weight_bar")


def _nothing(module: Any) -> None:
    return None


@dataclass(frozen=True, eq=False)
class WidthHandler:
    """A record that says where neurons lie in the modules of a type.

    Attributes:
        makes: By tensor, the axis of the neurons that a module makes or hands on.
        reads: By tensor, the axis of the neurons of other layers that it reads, if it makes others of them.
        sizes: By attribute, which width it says.
        axis: Finds where neurons lie in the inputs and outputs of a module; None if it treats every value alike.
        role: What it does with all neurons; None if it makes some and reads others.
        linear: Whether its outputs are linear in what it reads, by its ``weight``.
        unfolds: Whether that weight is multiplied by receptive patches, as in a plain convolution.
        over_all: Whether it normalises over all neurons together.
        blocks: Finds how many blocks of neurons can only be removed whole, such as the groups of a grouped convolution
            or norm; None if neurons are single.
        directions: Finds how many times each neuron is among what it makes, such as once for each direction of a
            recurrent layer; None if once.
        registered: Whether it is the record of a type that the package does not know by itself.
        fixed: Says why the width of a module cannot be changed, or None.
    """

    makes: Mapping[str, int] = field(default_factory=dict)
    reads: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, Size] = field(default_factory=dict)
    axis: Callable[[Any], int] | None = None
    role: Literal["makes", "passes"] | None = None
    linear: bool = False
    unfolds: bool = False
    over_all: bool = False
    blocks: Callable[[Any], int] | None = None
    directions: Callable[[Any], int] | None = None
    registered: bool = False
    fixed: Callable[[Any], str | None] = _nothing

    def axes(self, role: Role) -> Mapping[str, int]:
        """Look up the axes on which neurons lie in a role.

        Returns:
            By the name of each tensor, its axis.
        """
        return self.reads if role == "reads" and self.role is None else self.makes


def _channels(module: Any) -> int:
    return 1


def _features(module: Any) -> int:
    return -1


def _before_taps(module: Any) -> int:
    return -1 - len(module.kernel_size)  # there may be no batch


def _groups_made(module: Any) -> int:
    """Return how many groups a convolution has left, by the size of its weight; groups keep their sizes."""
    return int(module.weight.shape[0] // (module.out_channels // module.groups))


def _groups_read(module: Any) -> int:
    return int(module.weight.shape[0] // (module.in_channels // module.groups))


def _groups_normalized(module: Any) -> int:
    return int(module.weight.shape[0] // (module.num_channels // module.num_groups))


def _over_more(module: Any) -> str | None:
    shape = tuple(module.normalized_shape)
    return None if len(shape) == 1 else f"{type(module).__name__} normalises over {shape}, more than the neurons"


def _always(reason: str) -> Callable[[Any], str]:
    return lambda module: f"{type(module).__name__} {reason}"


_FIRST = {"weight": 0, "bias": 0}
_CONVOLUTION = WidthHandler(
    makes=_FIRST,
    reads={"weight": 1},
    sizes={"out_channels": "makes", "in_channels": lambda module: module.weight.shape[1] * module.groups},
    axis=_before_taps,
    linear=True,
    unfolds=True,
)
_GROUPED = WidthHandler(
    makes=_FIRST,
    sizes={
        "out_channels": "makes",
        "in_channels": lambda module: module.weight.shape[1] * _groups_made(module),
        "groups": _groups_made,
    },
    axis=_before_taps,
    blocks=lambda module: module.groups,
)
_DEPTHWISE = WidthHandler(
    makes=_FIRST,
    sizes={"out_channels": "passes", "in_channels": "passes", "groups": "passes"},
    axis=_before_taps,
    role="passes",
    linear=True,
    unfolds=True,
)
_TRANSPOSED = WidthHandler(
    makes={"weight": 1, "bias": 0},
    reads={"weight": 0},
    sizes={"in_channels": "reads", "out_channels": lambda module: module.weight.shape[1] * module.groups},
    axis=_before_taps,
    linear=True,
)
_GROUPED_TRANSPOSED = WidthHandler(
    makes={"bias": 0},
    reads={"weight": 0},
    sizes={
        "in_channels": "reads",
        "out_channels": lambda module: module.weight.shape[1] * _groups_read(module),
        "groups": _groups_read,
    },
    axis=_before_taps,
    blocks=lambda module: module.groups,
)
_LINEAR = WidthHandler(
    makes=_FIRST,
    reads={"weight": 1},
    sizes={"out_features": "makes", "in_features": "reads"},
    axis=_features,
    linear=True,
)
_RECURRENT = WidthHandler(
    reads={"weight_ih_l0": 1, "weight_ih_l0_reverse": 1},
    sizes={"input_size": "reads", "hidden_size": lambda module: module.weight_hh_l0.shape[1]},
    axis=_features,
    fixed=why_units_inseparable,
    directions=directions,
)
_RECURRENT_CELL = WidthHandler(axis=_features, fixed=_always("stacks its gates in one tensor"))
_GROUP_NORM = WidthHandler(
    makes=_FIRST,
    sizes={"num_channels": "passes", "num_groups": _groups_normalized},
    axis=_channels,
    role="passes",
    blocks=lambda module: module.num_groups,
)
_ONE_GROUP_NORM = WidthHandler(
    makes=_FIRST, sizes={"num_channels": "passes"}, axis=_channels, role="passes", over_all=True
)
_SLOPES = WidthHandler(makes={"weight": 0}, sizes={"num_parameters": "passes"}, axis=_channels, role="passes")
_ONE_SLOPE = WidthHandler(role="passes")

_ATTENTION = WidthHandler(
    makes={"in_proj_weight": 0, "in_proj_bias": 0},
    reads={"in_proj_weight": 1},
    sizes={"num_heads": heads_of, "embed_dim": "reads", "kdim": "reads", "vdim": "reads"},
    axis=_features,
    fixed=why_inseparable,
)
# The rows of its bias are those of three tensors, so it is followed by itself.
_ATTENTION_APART = WidthHandler(
    makes=dict.fromkeys(WEIGHTS_APART, 0), sizes={"num_heads": heads_of}, axis=_features, fixed=why_inseparable
)

HANDLERS: dict[type[nn.Module], WidthHandler] = {
    _ConvNd: _CONVOLUTION,
    _ConvTransposeNd: _TRANSPOSED,
    nn.Linear: _LINEAR,
    nn.Embedding: WidthHandler(
        makes={"weight": 1},
        sizes={"embedding_dim": "makes", "num_embeddings": lambda module: module.weight.shape[0]},
        axis=_features,
        role="makes",
    ),
    _NormBase: WidthHandler(
        makes={**_FIRST, "running_mean": 0, "running_var": 0},
        sizes={"num_features": "passes"},
        axis=_channels,
        role="passes",
    ),
    nn.LayerNorm: WidthHandler(
        makes={"weight": -1, "bias": -1},
        sizes={"normalized_shape": lambda module: tuple(module.weight.shape)},
        axis=_features,
        role="passes",
        over_all=True,
        fixed=_over_more,
    ),
    nn.RMSNorm: WidthHandler(
        makes={"weight": -1},
        sizes={"normalized_shape": lambda module: tuple(module.weight.shape)},
        axis=_features,
        role="passes",
        over_all=True,
        fixed=_over_more,
    ),
    nn.GroupNorm: _GROUP_NORM,
    nn.PReLU: _SLOPES,
    nn.MultiheadAttention: _ATTENTION,
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT_CELL,
}
"""The record of each type; subclasses have that of their nearest base."""


def handler_of(module: object) -> WidthHandler | None:
    """Look up the record of a module: that of its type or nearest base, with the tensors that its own type adds.

    Returns:
        The record, or None if nobody has said how the module's width is changed, and it could not be recognised.
    """
    handler = _of_type(module)
    if not isinstance(module, nn.Module) or (handler is not None and handler.registered):
        return handler
    if handler is None:
        return _recognized(module)
    makes, reads = own_axes(module, handler.makes, {} if handler.role or handler.blocks else handler.reads)
    if not makes and not reads:
        return handler
    # What its own forward does with them may be another map than that of the weight.
    plain = handler.linear and type(module).forward.__module__.startswith("torch.")
    return replace(handler, makes={**handler.makes, **makes}, reads={**handler.reads, **reads}, linear=plain)


def _recognized(module: nn.Module) -> WidthHandler | None:
    place = recognized(module)
    if place is None:
        return None
    return WidthHandler(
        makes=place.makes,
        reads=place.reads,
        sizes=place.sizes,
        axis=lambda module: place.axis,
        role=None if place.reads else "passes",
        linear=bool(place.reads),
        registered=True,
    )


def _of_type(module: object) -> WidthHandler | None:
    """Return the record of a module's type or of its nearest base, or None."""
    found = next((HANDLERS[t] for t in type(module).__mro__ if t in HANDLERS), None)
    if found is _CONVOLUTION and _is_by_channel(module):
        return _DEPTHWISE
    if found in (_CONVOLUTION, _TRANSPOSED) and getattr(module, "groups", 1) > 1:
        return _GROUPED if found is _CONVOLUTION else _GROUPED_TRANSPOSED
    if found is _GROUP_NORM and getattr(module, "num_groups", 0) == 1:
        return _ONE_GROUP_NORM
    if found is _ATTENTION and has_weights_apart(module):
        return _ATTENTION_APART
    if found is _SLOPES and getattr(module, "num_parameters", 1) == 1:  # one slope for all neurons
        return _ONE_SLOPE
    return found


def _is_by_channel(module: Any) -> bool:
    return bool(module.groups > 1 and module.groups == module.in_channels == module.out_channels)


def blocks_of_neurons(module: object) -> int | None:
    """Return how many blocks of neurons of a module can only be removed whole; None if neurons are single.

    Example:
        >>> blocks_of_neurons(nn.GroupNorm(4, 12)), blocks_of_neurons(nn.Conv2d(8, 8, 3))
        (4, None)
    """
    handler = handler_of(module)
    return None if handler is None or handler.blocks is None else handler.blocks(module)


def is_depthwise(module: object) -> bool:
    """Return True if a convolution has one filter for each channel."""
    return _of_type(module) is _DEPTHWISE


def passes(module: object) -> bool:
    """Return True if a module hands neurons on one by one."""
    handler = handler_of(module)
    return handler is not None and handler.role == "passes"


def is_linear(module: object) -> bool:
    """Return True if the output of a module is linear in its input, by its ``weight``."""
    handler = handler_of(module)
    return handler is not None and handler.linear


def keeps_statistics(module: object) -> TypeGuard[_NormBase]:
    """Return True for a norm layer with a running mean and variance for each neuron."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def axis_of(module: object) -> int | None:
    """Return the neuron axis of a module's input and output; None if it is not known, or all axes are treated alike.

    Example:
        >>> axis_of(nn.Linear(2, 3)), axis_of(nn.Conv2d(2, 3, 1)), axis_of(nn.ReLU())
        (-1, -3, None)
    """
    handler = handler_of(module)
    return None if handler is None or handler.axis is None else handler.axis(module)


def axes(module: nn.Module, role: Role) -> dict[str, int]:
    """Look up the axes on which a module's neurons lie in a role.

    Returns:
        By the name of each tensor that the module has, its axis; empty for a type without a record.

    Example:
        >>> axes(nn.Conv2d(3, 8, 3), "makes"), axes(nn.Linear(4, 2), "reads")
        ({'weight': 0, 'bias': 0}, {'weight': 1})
    """
    handler = handler_of(module)
    tensors = {**module._parameters, **module._buffers}
    found = {} if handler is None else handler.axes(role)
    return {name: axis for name, axis in found.items() if tensors.get(name) is not None}


def weight_name(module: object) -> str:
    """Look up the tensor that joins the neurons that a module makes to those that it reads.

    Returns:
        Its name: ``"weight"`` where no record says otherwise.
    """
    handler = handler_of(module)
    both = [] if handler is None else [name for name in handler.reads if name in handler.makes]
    return both[0] if both else "weight"


def width(module: nn.Module, role: Role) -> int | None:
    """Return the number of neurons that a module makes, hands on or reads, by its tensors; None if none of them says.

    Example:
        >>> width(nn.Linear(4, 2), "makes"), width(nn.Linear(4, 2), "reads"), width(nn.ReLU(), "makes")
        (2, 4, None)
    """
    return next((getattr(module, name).shape[axis] for name, axis in axes(module, role).items()), None)


def size_of(module: nn.Module, size: Size) -> object:
    """Return the value that an attribute should have; None if no tensor of the module tells."""
    return size(module) if callable(size) else width(module, size)


def unknown_width(module: object) -> str:
    """Say why the width of a module without a record cannot be changed.

    Returns:
        A sentence without a full stop that names the type and the remedy.
    """
    return f"nobody has said how the width of {type(module).__name__} is changed; register_prunable can"


def why_fixed(module: nn.Module) -> str | None:
    """Return the reason why a module's width cannot be changed, or None if it can."""
    kind, handler = type(module).__name__, handler_of(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, which nobody can look into"
    reason = None if handler is None else handler.fixed(module)
    if reason is not None:
        return reason
    if parametrize.is_parametrized(module):
        return f"its {kind} is parametrized: make it permanent first (parametrize.remove_parametrizations)"
    if any(hasattr(module, name) for name in _MASKED):
        return f"its {kind} has a mask or a reparametrized weight: make it permanent first (prune.remove, remove_...)"
    return None
