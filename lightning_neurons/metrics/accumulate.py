"""Adding one call of one layer to sums, in place, classes apart or not. No device is waited for.

States have a leading axis of classes. ``index`` is the class of each sample, or None: then there is one class.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_neurons.metrics import histogram


def finite_rows(rows: Float[Tensor, "statistic batch neuron"]) -> Bool[Tensor, "batch neuron"] | None:
    """Where all statistics are finite; None for everywhere. To look would wait for a GPU, so there it is never None."""
    finite = rows.sum(0).isfinite()
    return None if finite.device.type == "cpu" and bool(finite.all()) else finite


def add_sums(
    totals: Float[Tensor, "class statistic neuron"],
    slots: Int[Tensor, " row"],
    rows: Float[Tensor, "row batch neuron"],
    index: Int[Tensor, " batch"] | None,
) -> None:
    """Add the sums of ``rows`` over samples to the statistics ``slots``."""
    if index is None:
        totals[0].index_add_(0, slots, rows.sum(1, dtype=torch.float64))
        return
    for slot, row in zip(slots.tolist(), rows, strict=True):
        totals[:, slot].index_add_(0, index, row.double())


def add_maximum(
    highest: Float[Tensor, "class neuron"],
    row: Float[Tensor, "batch neuron"],
    finite: Bool[Tensor, "batch neuron"] | None,
    index: Int[Tensor, " batch"] | None,
) -> None:
    """Raise ``highest`` to the largest finite value of ``row``."""
    row = (row if finite is None else torch.where(finite, row, -torch.inf)).double()
    if index is None:
        torch.maximum(highest[0], row.amax(0), out=highest[0])
    else:
        highest.scatter_reduce_(0, index[:, None].expand_as(row), row, "amax")


def add_counts(
    counts: Int[Tensor, "class neuron"],
    shape: tuple[int, int],
    finite: Bool[Tensor, "batch neuron"] | None,
    index: Int[Tensor, " batch"] | None,
    each: int = 1,
) -> None:
    """Add ``each`` per finite sample of a batch of ``shape``."""
    if index is None:
        counts[0] += shape[0] * each if finite is None else finite.sum(0) * each
    else:
        seen = torch.ones(shape, dtype=torch.int64, device=counts.device) if finite is None else finite.long()
        counts.index_add_(0, index, seen * each)


def add_magnitudes(
    counts: Int[Tensor, "class all_neurons bin"],
    first: int,
    values: Float[Tensor, "batch neuron space"],
    finite: Bool[Tensor, "batch neuron"] | None,
    index: Int[Tensor, " batch"] | None,
) -> None:
    """Count the magnitudes of finite samples, for the neurons from ``first`` on."""
    chosen = histogram.positions(values.shape[-1])
    if len(chosen) < values.shape[-1]:
        values = values.index_select(-1, chosen.to(values.device))
    bins = histogram.bin_index(values).to(counts.device)
    neurons = torch.arange(first, first + values.shape[1], device=bins.device)
    if index is not None:
        neurons = neurons + index[:, None] * counts.shape[1]
    start = (neurons * histogram.BINS).unsqueeze(-1)
    # int32 is enough for the bins of most models, and twice as fast as int64.
    flat = bins.add_(start.int()) if counts.numel() < 2**31 else bins + start
    one = flat.new_ones(1, dtype=torch.int64)
    weights = one.expand(flat.numel()) if finite is None else finite.long().unsqueeze(-1).expand_as(flat).flatten()
    counts.view(-1).index_add_(0, flat.flatten(), weights)
