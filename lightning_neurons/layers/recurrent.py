"""Hidden units of recurrent layers: where they lie in the stacked weights of gates, layers and directions."""

from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

Units = tuple[tuple[int, ...], ...]
"""For each unit, its places in a tensor."""


def has_hidden_units(module: object) -> TypeGuard[nn.RNNBase]:
    """Return whether hidden units of a module can be removed.

    They cannot where an LSTM projects them to fewer values, or where a weight is masked or computed from others.

    Example:
        >>> has_hidden_units(nn.GRU(3, 4)), has_hidden_units(nn.LSTM(3, 4, proj_size=2))
        (True, False)
    """
    return isinstance(module, nn.RNNBase) and why_units_inseparable(module) is None


def why_units_inseparable(module: nn.RNNBase) -> str | None:
    """Return the reason why single hidden units cannot be removed, or None if they can."""
    if module.proj_size:
        return f"{type(module).__name__} projects its hidden units (proj_size)"
    names = [f"weight_hh_l{layer}{suffix}" for layer in range(module.num_layers) for suffix in _suffixes(module)]
    masked = next((name for name in names if name not in module._parameters), None)
    return masked and f"{masked} of its {type(module).__name__} is masked or computed from others"


def directions(module: nn.RNNBase) -> int:
    """Return how many times a hidden unit is in each output: once for each direction."""
    return 2 if module.bidirectional else 1


def _suffixes(module: nn.RNNBase) -> tuple[str, ...]:
    return ("", "_reverse") if module.bidirectional else ("",)


def width_made(module: nn.RNNBase) -> int:
    """Return the number of values in an output of the last layer: hidden units of all directions."""
    return directions(module) * module.hidden_size


def hidden_places(module: nn.RNNBase, units: Sequence[Sequence[int]]) -> Iterator[tuple[str, int, Units]]:
    """Find the places of hidden units in the parameters of a recurrent layer.

    All layers and directions have the same number of hidden units, so one is removed from all of them.

    Args:
        module: The layer.
        units: For each unit, its places in the module's output.

    Yields:
        Name of a parameter, an axis of it, and the places of each unit on that axis.

    Example:
        >>> lstm = nn.LSTM(3, 5)
        >>> {(name, axis): places for name, axis, places in hidden_places(lstm, [[1]])}["weight_hh_l0", 0]
        ((1, 6, 11, 16),)
    """
    hidden, both = module.hidden_size, directions(module)
    own = [sorted({place % hidden for place in unit}) for unit in units]
    gates = module.get_parameter("weight_hh_l0").shape[0] // hidden
    rows = tuple(tuple(sorted(gate * hidden + i for gate in range(gates) for i in unit)) for unit in own)
    read = tuple(tuple(sorted(side * hidden + i for side in range(both) for i in unit)) for unit in own)
    for layer in range(module.num_layers):
        for suffix in _suffixes(module):
            yield f"weight_ih_l{layer}{suffix}", 0, rows
            yield f"weight_hh_l{layer}{suffix}", 0, rows
            yield f"weight_hh_l{layer}{suffix}", 1, tuple(map(tuple, own))
            if layer:
                yield f"weight_ih_l{layer}{suffix}", 1, read
            if module.bias:
                yield f"bias_ih_l{layer}{suffix}", 0, rows
                yield f"bias_hh_l{layer}{suffix}", 0, rows


def incoming_weights(module: nn.RNNBase) -> Tensor:
    """Return the weights by which the gates of each hidden unit of the last layer read its inputs and hidden units.

    Args:
        module: The layer.

    Returns:
        Weights (unit, weight), the units of one direction after those of the other.
    """
    last, rows = module.num_layers - 1, []
    for suffix in _suffixes(module):
        names = (f"weight_ih_l{last}{suffix}", f"weight_hh_l{last}{suffix}")
        weight = torch.cat([module.get_parameter(name).detach() for name in names], 1)
        rows.append(weight.view(-1, module.hidden_size, weight.shape[1]).transpose(0, 1).flatten(1))
    return torch.cat(rows)
