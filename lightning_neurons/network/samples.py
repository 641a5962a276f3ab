"""From a layer's output to ``(batch, neuron, space)``."""

from jaxtyping import Float
from torch import Tensor


def samples_first(
    values: Float[Tensor, "..."], axis: int, batch_size: int | None = None
) -> Float[Tensor, "batch neuron space"]:
    """Bring a layer's output into the form that statistics read; views wherever possible.

    Samples are the first axis, unless its length is not ``batch_size``: then another axis of that length (models that
    put time first), or equal parts of the first axis (tokens folded into the batch), make the samples. Where neither
    fits, such as pictures cut into uneven crops, every entry of the first axis counts as a sample.

    Args:
        values: A layer's output, or its gradient.
        axis: The neuron axis.
        batch_size: Number of samples in the batch, if known.

    Example:
        >>> import torch
        >>> samples_first(torch.zeros(5, 2, 3), -1, batch_size=2).shape  # (time, batch, neuron)
        torch.Size([2, 3, 5])
    """
    neurons = axis % values.ndim
    if values.ndim == 1 or neurons == 0:
        return values.reshape(1, values.shape[neurons], -1)  # one sample without a batch axis
    values = values if neurons == 1 else values.movedim(neurons, 1)
    if batch_size is not None and values.shape[0] != batch_size:
        same = [d for d in range(2, values.ndim) if values.shape[d] == batch_size]
        if same:
            values = values.transpose(0, same[0])
        elif batch_size and values.shape[0] % batch_size == 0:
            values = values.unflatten(0, (batch_size, -1)).movedim(1, -1)
    return values.flatten(2) if values.ndim > 2 else values.unsqueeze(-1)
