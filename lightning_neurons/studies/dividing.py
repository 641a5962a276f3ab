"""Whether a batch may be run in parts: not where samples depend on one another."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.network.batches import batch_size_of
from lightning_neurons.network.trees import tensors_in
from lightning_neurons.studies.outcomes import Outcomes

_ALIKE = 1e-5

Result = tuple[Tensor, list[Any]]


def divides(outcomes: Outcomes, batch: Any, parts: Sequence[Any], results: Sequence[Result]) -> bool:
    """Whether a batch has the loss and the outputs of its parts.

    A loss with class weights, one that compares samples, and norm layers without running statistics have not.

    Args:
        outcomes: From results to losses.
        batch: The batch.
        parts: Its parts.
        results: What a run of the batch gave, and one of each part.
    """
    sizes = [batch_size_of(one) for one in parts]
    means = [
        float(outcomes.of([result], one, size).means[0])
        for result, one, size in zip(results[1:], parts, sizes, strict=True)
    ]
    mean = float(outcomes.of([results[0]], batch, sum(sizes)).means[0])
    together = sum(m * n for m, n in zip(means, sizes, strict=True)) / sum(sizes)
    alike = math.isclose(mean, together, rel_tol=_ALIKE, abs_tol=_ALIKE) or not math.isfinite(mean)
    return alike and _joined_alike(results[0][1], [heard for _, heard in results[1:]])


def _joined_alike(whole: list[Any], parts: Sequence[list[Any]]) -> bool:
    """Whether outputs of a batch are those of its parts, one after the other."""
    if len(whole) != 1 or any(len(heard) != 1 for heard in parts):
        return True  # then losses have to tell
    columns = [list(tensors_in(heard[0])) for heard in parts]
    for place, tensor in enumerate(tensors_in(whole[0])):
        pieces = [column[place] for column in columns]
        if tensor.is_floating_point() and tensor.ndim and sum(map(len, pieces)) == len(tensor):
            scale = float(tensor.abs().nan_to_num(posinf=0, neginf=0).max()) if tensor.numel() else 0.0
            if not torch.allclose(torch.cat(pieces), tensor, rtol=0, atol=_ALIKE * scale + 1e-30, equal_nan=True):
                return False
    return True
