"""Where each neuron's values are behind a pooling or layout function, so that its readers can be told."""

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
    """How many neighbouring entries of the neuron axis of ``out`` belong to one neuron; 0 if it cannot be said.

    Args:
        function: A function that hands neurons on (``families.PASSING``).
        args: Its arguments, the tensor that it reads first.
        kwargs: Its keyword arguments.
        out: What it gave.
        axis: The neuron axis of what it read: 1 for channels, -1 for features.
        spread: How many entries belonged to one neuron in what it read.
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
