"""The choice of the neurons that a study is about."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_neurons.errors import ArgumentError, UnknownNameError, is_number
from lightning_neurons.layers.layer import Pattern, candidates, widths_of

NeuronChoice = str | Sequence[Pattern] | Sequence[tuple[str, int]] | Mapping[str, Iterable[int]]
"""``"all"``, a pattern or list of patterns of layers, a list of ``(layer, neuron)``, or neurons by layer."""

_ALLOWED = '"all", patterns of layers, pairs (layer, neuron), or a mapping of layers to neurons'


def chosen_neurons(model: nn.Module, neurons: Any, *, name: str = "neurons") -> dict[str, list[int]]:
    """Return the chosen neurons by layer, in the order of the model.

    Args:
        model: The model.
        neurons: See ``NeuronChoice``.
        name: The argument's name in errors.

    Returns:
        By layer, the indices of neurons, ascending.

    Raises:
        ArgumentError: If nothing is chosen, a neuron is out of range or comes twice, or it is no choice at all.
        UnknownNameError: If a pattern or name matches no layer; names the nearest.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> chosen_neurons(net, "all"), chosen_neurons(net, [("0", 2), ("0", 0)])
        ({'0': [0, 1, 2], '2': [0]}, {'0': [0, 2]})
    """
    widths = widths_of(model)
    if not widths:
        got = type(model).__name__
        raise ArgumentError.of("model", got, "a model with convolutional or linear layers, or see register_layer")
    neurons = getattr(neurons, "neurons", neurons)  # of a plan
    if isinstance(neurons, str):
        neurons = list(widths) if neurons == "all" else [neurons]
    if isinstance(neurons, Mapping):
        pairs = [(layer, i) for layer, indices in neurons.items() for i in _indices(name, layer, indices)]
    elif not isinstance(neurons, Iterable) or isinstance(neurons, type):
        raise ArgumentError.of(name, neurons, _ALLOWED)
    else:
        entries = list(neurons)
        if entries and all(isinstance(entry, str | type) for entry in entries):
            return {layer: list(range(widths[layer])) for layer in layers_matching(name, model, entries)}
        pairs = [_pair(name, entry) for entry in entries]
    if not pairs:
        raise ArgumentError.of(name, neurons, f"at least one neuron: {_ALLOWED}")
    return _by_layer(name, pairs, widths)


def layers_matching(name: str, model: nn.Module, patterns: Sequence[Pattern] | None) -> dict[str, nn.Module]:
    """Return the layers that match patterns, as ``candidates`` does, with errors that name the argument.

    Raises:
        UnknownNameError: If a pattern matches no layer.
    """
    try:
        return candidates(model, patterns)
    except UnknownNameError as error:
        raise UnknownNameError(str(error).replace("layers:", f"{name}:", 1)) from None


def _by_layer(name: str, pairs: Sequence[tuple[str, int]], widths: Mapping[str, int]) -> dict[str, list[int]]:
    by_layer: dict[str, list[int]] = {}
    for layer, index in pairs:
        if layer not in widths:
            raise UnknownNameError.among(name, str(layer), widths)
        if not 0 <= index < widths[layer]:
            raise ArgumentError.of(name, (layer, index), f"neurons of 0 to {widths[layer] - 1} in {layer!r}")
        if index in by_layer.setdefault(layer, []):
            raise ArgumentError.of(name, (layer, index), "each neuron once")
        by_layer[layer].append(index)
    return {layer: sorted(by_layer[layer]) for layer in widths if layer in by_layer}


def _indices(name: str, layer: Any, indices: Any) -> list[int]:
    indices = indices.tolist() if hasattr(indices, "tolist") else indices
    indices = [indices] if is_number(indices) else indices
    if isinstance(indices, str) or not isinstance(indices, Iterable):
        raise ArgumentError.of(f"{name}[{layer!r}]", indices, "a list of whole numbers")
    return [_pair(name, (layer, i))[1] for i in indices]


def _pair(name: str, entry: Any) -> tuple[str, int]:
    is_pair = isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str)
    if not is_pair or not is_number(entry[1]) or not hasattr(entry[1], "__index__"):
        raise ArgumentError.of(name, entry, _ALLOWED)
    return entry[0], int(entry[1])
