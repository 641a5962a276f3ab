"""Number of entries that a neuron fills after a pooling or layout function, by which downstream layers read it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MEANS = {torch.mean, Tensor.mean}


def spread_behind(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Tensor,
    axis: int,
    spread: int,
) -> int:
    """Return the number of neighbouring entries on the neuron axis of ``out`` that belong to one neuron.

    Args:
        function: A function that hands neurons on (``registry.PASSING``).
        args: Its arguments, the tensor that it reads first.
        kwargs: Its keyword arguments.
        out: Its result.
        axis: Neuron axis of the tensor that it read: 1 for channels, -1 for features.
        spread: Number of entries per neuron in the tensor that it read.

    Returns:
        Entries per neuron; 0 if that is unknown.
    """
    source: Tensor = args[0] if args else kwargs["input"]
    if source.ndim < 2 or out.ndim < 2 or source.shape[0] != out.shape[0]:
        return 0
    if function in _MEANS:
        given = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = [given] if isinstance(given, int) else list(given or range(source.ndim))
        return 0 if {d % source.ndim for d in dims} & {0, axis % source.ndim} else spread
    if axis % source.ndim != 1:  # features behind tokens: only what leaves the shape alone is sure
        return spread if out.shape == source.shape else 0
    if out.shape[1] == source.shape[1]:
        return spread
    space = source[0, 0].numel()
    return spread * space if out.ndim == 2 and out.shape[1] == source.shape[1] * space else 0
