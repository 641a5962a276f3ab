"""The logits in a model's output, whatever its form."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_neurons.data.batches import tensors_of


def logits_in(output: Any) -> Tensor | None:
    """Find the logits in an output: itself, its entry ``logits``, or its only floating-point tensor.

    Args:
        output: A tensor, mapping, dataclass or any object with tensors as attributes.

    Returns:
        The tensor, or None if there is none, or more than one that could be meant.

    Example:
        >>> import torch
        >>> logits_in({"logits": torch.ones(1, 2), "hidden": torch.zeros(1, 8)})
        tensor([[1., 1.]])
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = [t for t in tensors_of(output) if t.is_floating_point()]
    return found[0] if len(found) == 1 else None
