"""The class of each sample of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_neurons.data.batches import TARGET_KEYS, batch_size_of, targets_of
from lightning_neurons.errors import MeasurementError

PerClass = bool | Callable[[Any], Tensor]
"""False, True (the targets are taken from the batch), or a function from a batch to its targets."""


def targets_in(batch: Any, per_class: PerClass) -> Int[Tensor, " batch"]:
    """Return the class of each sample.

    Raises:
        MeasurementError: If no targets are found in the batch, or they are no class numbers.
    """
    found = per_class(batch) if callable(per_class) else targets_of(batch)
    if found is None:
        raise MeasurementError(
            f"per_class=True: found no targets in a batch of type {type(batch).__name__}; expected a pair (inputs, "
            f"targets) or one of the keys {', '.join(TARGET_KEYS)} with one whole number per sample, or pass a "
            "function per_class=lambda batch: ..."
        )
    if not isinstance(found, Tensor) or found.ndim != 1 or found.is_floating_point() or (found < 0).any():
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MeasurementError(f"per_class: targets must be one whole number of at least 0 per sample, got {got}")
    if len(found) != batch_size_of(batch):
        raise MeasurementError(f"per_class: {len(found)} targets for a batch of {batch_size_of(batch)} samples")
    return found.to(torch.int64)
