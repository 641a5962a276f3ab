"""A layer's output in the form ``(batch, neuron, space)``."""

from jaxtyping import Float
from torch import Tensor

from lightning_neurons.layers.layer import Layer

_CLOSE = 1e-3  # of the largest value: half precision, too, and what else runs in the batch may round otherwise


def samples_first(
    values: Float[Tensor, "..."],
    axis: int,
    batch_size: int | None = None,
    rows_per_sample: int | None = None,
    *,
    rows_apart: bool = False,
) -> Float[Tensor, "batch neuron space"]:
    """Bring a layer's output into the form that statistics read, as a view wherever possible.

    Samples are the first axis, unless its length is not ``batch_size``: then the second axis of features, if it has
    that length (models that put time first), or equal parts of the first axis (tokens or windows folded into the
    batch), make the samples. Where neither fits, such as images cut into uneven crops, every entry of the first axis
    counts as a sample.

    Args:
        values: A layer's output, or its gradient.
        axis: The neuron axis.
        batch_size: Number of samples in the batch, if known.
        rows_per_sample: Rows of a sample, which decides where both fit; see ``Layer``.
        rows_apart: Layout of equal parts of the first axis; see ``Layer``.

    Returns:
        The values as ``(batch, neuron, space)``; space is 1 for values without further axes.

    Example:
        >>> import torch
        >>> samples_first(torch.zeros(5, 2, 3), -1, batch_size=2).shape  # (time, batch, neuron)
        torch.Size([2, 3, 5])
    """
    neurons = axis % values.ndim
    if values.ndim == 1 or neurons == 0:
        return values.reshape(1, values.shape[neurons], -1)  # one sample without a batch axis
    if batch_size is not None and values.shape[0] != batch_size:
        folded = rows_per_sample is not None and values.shape[0] == batch_size * rows_per_sample
        if not folded and time_first(values, axis, batch_size):
            values = values.transpose(0, 1)
        elif batch_size and values.shape[0] % batch_size == 0:
            parts = split_rows(values.movedim(neurons, 1), batch_size, rows_apart=rows_apart)
            return parts.movedim(1, -1).flatten(2)
    values = values if neurons == 1 else values.movedim(neurons, 1)
    return values.flatten(2) if values.ndim > 2 else values.unsqueeze(-1)


def samples_of(
    values: Float[Tensor, "..."], layer: Layer, batch_size: int | None
) -> Float[Tensor, "batch neuron space"]:
    """Bring the output of a layer that is known, or its gradient, into that form.

    Returns:
        A view where the memory allows it; space has length 1 where a neuron has a single value.
    """
    return samples_first(values, layer.axis, batch_size, layer.rows_per_sample, rows_apart=layer.rows_apart)


def split_rows(
    values: Float[Tensor, "row ..."], batch_size: int, *, rows_apart: bool
) -> Float[Tensor, "batch part ..."]:
    """Split the rows of a batch by sample.

    Returns:
        A view in which the rows of each sample have an axis of their own, the second.

    Example:
        >>> import torch
        >>> split_rows(torch.arange(4.0), 2, rows_apart=True).tolist()  # two samples, and once more
        [[0.0, 2.0], [1.0, 3.0]]
    """
    parts: Tensor = values.unflatten(0, (-1, batch_size) if rows_apart else (batch_size, -1))
    return parts.transpose(0, 1) if rows_apart else parts


def join_rows(parts: Float[Tensor, "batch part ..."], *, rows_apart: bool) -> Float[Tensor, "row ..."]:
    """Undo ``split_rows``.

    Returns:
        The rows in their old order on one axis.
    """
    return parts.transpose(0, 1).flatten(0, 1) if rows_apart else parts.flatten(0, 1)


def lie_apart(values: Float[Tensor, "row ..."], turned: Float[Tensor, "row ..."], batch_size: int) -> bool:
    """Return whether the rows of a sample lie a whole batch apart.

    Args:
        values: Output of a layer, several rows for each sample.
        turned: The same from a forward with the samples in the opposite order.
        batch_size: Number of samples.
    """
    if values.shape != turned.shape:
        return False
    close = {}
    for apart in (False, True):
        expected = join_rows(split_rows(values, batch_size, rows_apart=apart).flip(0), rows_apart=apart)
        close[apart] = bool((expected - turned).abs().max() <= _CLOSE * values.abs().max())
    return close[True] and not close[False]


def time_first(values: Float[Tensor, "..."], axis: int, batch_size: int) -> bool:
    """Return whether the second axis may be the samples: only features can lie behind (time, batch)."""
    return axis % values.ndim > 1 and values.shape[0] != batch_size == values.shape[1]


def is_ambiguous(values: Float[Tensor, "..."], axis: int, batch_size: int) -> bool:
    """Return whether the shape may mean both (time, batch) and windows folded into the batch."""
    return bool(batch_size) and time_first(values, axis, batch_size) and values.shape[0] % batch_size == 0
