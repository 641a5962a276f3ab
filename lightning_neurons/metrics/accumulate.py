"""Adding one batch of several layers to sums, in place, classes apart or not. No GPU is waited for.

Layers of the same form are added together: on small networks the number of calls is the cost.
States have a leading axis of classes. ``index`` is the class of each sample, or None: then there is one class.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_neurons.criteria.contract import Need, Statistic
from lightning_neurons.metrics import histogram


@dataclass(eq=False, slots=True)
class Batch:
    """The statistics of one layer in one batch.

    Attributes:
        rows: One number per sample and neuron for each statistic; one more may follow that shows what is not finite.
        positions: Number of values of each neuron behind a number.
        sampled: The values that the histogram counts; empty without one.
        targets: The class of each sample, if classes are kept apart.
    """

    rows: list[Float[Tensor, "batch neuron"]]
    positions: int
    sampled: list[Float[Tensor, "batch neuron _"]]
    targets: Int[Tensor, " _"] | None = None

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.rows[0].shape[0]

    @property
    def form(self) -> tuple[Any, ...]:
        """The key of layers that can be added together: samples, values for the histogram, and types."""
        return self.samples, sum(s.shape[-1] for s in self.sampled), self.rows[0].dtype


@dataclass(eq=False)
class Waiting:
    """Statistics that have been observed and not been added to the sums yet.

    Attributes:
        batches: By layer and need, the statistics of the current batch so far.
        numbers: Number of values that wait.
        pieces: By layer and need, the statistics of single calls on fewer samples than the batch has.
        samples: Number of samples in the batch.
    """

    batches: dict[tuple[str, Need], Batch] = field(default_factory=dict)
    numbers: int = 0
    pieces: dict[tuple[str, Need], list[Batch]] = field(default_factory=dict)
    samples: int = 0


Place = slice | Tensor
"""Index on an axis; a slice wherever possible, because indexing by a tensor takes ten times longer."""


@dataclass(frozen=True, eq=False)
class Group:
    """The indices, in the sums, of several layers of one form.

    Attributes:
        statistics: The statistics that are observed, sums first.
        sums: Rows of ``totals``, one for each sum.
        maxima: Rows of ``maxima``, one for each maximum.
        neurons: Places of the neurons of all layers on the neuron axis.
        positions: Number of values behind each neuron's numbers.
        bins: The first bin of each neuron's histogram, if all histograms lie one behind the other; ``(neuron, 1, 1)``.
    """

    statistics: Sequence[Statistic]
    sums: Place
    maxima: Place
    neurons: Place
    positions: Int[Tensor, " neuron"]
    bins: Int[Tensor, "neuron 1 1"]

    def at(self, rows: Place) -> tuple[Any, ...]:
        """Return the index of ``rows`` of these neurons in a state of ``(class, statistic, neuron)``."""
        if isinstance(rows, Tensor) and isinstance(self.neurons, Tensor):
            rows = rows[:, None]
        return slice(None), rows, self.neurons


def group_of(
    statistics: Sequence[Statistic],
    rows: tuple[Sequence[Statistic], Sequence[Statistic]],
    places: Sequence[slice],
    positions: Sequence[int],
    device: torch.device,
) -> Group:
    """Return the indices, in the sums, of several layers.

    Args:
        statistics: The statistics that are observed, sums first.
        rows: The statistics in the rows of ``totals`` and ``maxima``.
        places: The neurons of each layer on the neuron axis.
        positions: Number of values behind the numbers of each layer.
        device: The device of the sums.

    Returns:
        The indices as slices or tensors on ``device``.
    """
    with torch.inference_mode(False):
        sums, maxima = ([of.index(s) for s in statistics if s in of] for of in rows)
        neurons = [i for place in places for i in range(place.start, place.stop)]
        each = [n for n, place in zip(positions, places, strict=True) for _ in range(place.start, place.stop)]
        return Group(
            statistics,
            _place(sums, device),
            _place(maxima, device),
            _place(neurons, device),
            torch.tensor(each, device=device),
            torch.tensor(neurons, device=device)[:, None, None] * histogram.BINS,
        )


def _place(indices: Sequence[int], device: torch.device) -> Place:
    if not indices:
        return slice(0, 0)
    if [*indices] == [*range(indices[0], indices[-1] + 1)]:
        return slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices, device=device)


def joined(statistics: Sequence[Statistic], held: Batch, new: Batch) -> Batch:
    """Reduce each sample's numbers over several calls of a layer.

    Returns:
        A batch with one row of numbers for each sample and the positions of both calls.
    """
    reducers = [torch.maximum if s.reduce == "max" else torch.add for s in statistics]
    reducers += [torch.add] * (len(new.rows) - len(reducers))
    rows = [reduce(a, b) for reduce, a, b in zip(reducers, held.rows, new.rows, strict=True)]
    return Batch(rows, held.positions + new.positions, held.sampled + new.sampled, new.targets)


def together(statistics: Sequence[Statistic], pieces: Sequence[Batch], samples: int) -> list[Batch]:
    """Combine the calls of a layer that ran on fewer samples than the batch has.

    Where their samples are as many as the batch's, each call had its own: the batch was run in pieces. Else calls on
    as many samples as the one before are calls on the same samples.

    Returns:
        Batches of which each has its samples once; a single one where the calls ran on pieces of one form.
    """
    if sum(piece.samples for piece in pieces) != samples:
        joint = list(pieces[:1])
        for piece in pieces[1:]:
            if piece.samples == joint[-1].samples:
                joint[-1] = joined(statistics, joint[-1], piece)
            else:
                joint.append(piece)
        return joint
    alike: dict[tuple[Any, ...], list[Batch]] = {}
    for piece in pieces:
        alike.setdefault((piece.positions, *(s.shape[1:] for s in piece.sampled)), []).append(piece)
    return [
        Batch(_columns(p.rows for p in same), same[0].positions, _columns(p.sampled for p in same))
        for same in alike.values()
    ]


def _columns(tensors: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*tensors, strict=True)]


def transformed(
    statistics: Sequence[Statistic], batches: Sequence[Batch], device: torch.device
) -> Float[Tensor, "statistic batch neuron"]:
    """Join layers side by side and apply ``per_sample`` to each sample's numbers.

    Returns:
        Numbers on ``device``, in float64 if a statistic has ``per_sample``, as that may square them.
    """
    stack = torch.cat([torch.stack(b.rows).to(device) for b in batches], 2)
    if any(s.per_sample is not None for s in statistics):
        stack = stack.double()
    for number, statistic in enumerate(statistics):
        if statistic.per_sample is not None:
            stack[number] = statistic.per_sample(stack[number])
    return stack


def finite_rows(rows: Float[Tensor, "statistic batch neuron"]) -> Bool[Tensor, "batch neuron"] | None:
    """Return a mask of finite statistics, or None if all are; never None on a GPU, where the test would wait for it."""
    finite = rows.sum(0).isfinite()
    return None if finite.device.type == "cpu" and bool(finite.all()) else finite


def add_sums(
    totals: Float[Tensor, "class statistic all_neurons"],
    group: Group,
    rows: Float[Tensor, "sum batch neuron"],
    finite: Bool[Tensor, "batch neuron"] | None,
    index: Int[Tensor, " batch"] | None,
) -> None:
    """Add the sums of finite ``rows`` over samples."""
    clean = rows if finite is None else torch.where(finite, rows, 0)
    if index is None:
        totals[group.at(group.sums)] += clean.sum(1, dtype=torch.float64)
        return
    by_class = clean.new_zeros((len(totals), *clean.shape[::2]), dtype=torch.float64)
    totals[group.at(group.sums)] += by_class.index_add_(0, index, clean.transpose(0, 1).double())


def add_maxima(
    maxima: Float[Tensor, "class statistic all_neurons"],
    group: Group,
    rows: Float[Tensor, "maximum batch neuron"],
    finite: Bool[Tensor, "batch neuron"] | None,
    index: Int[Tensor, " batch"] | None,
) -> None:
    """Raise the maxima to the largest finite ``rows``."""
    rows = rows if finite is None else torch.where(finite, rows, -torch.inf)
    if index is None:
        highest = rows.amax(1)[None].double()
    else:
        highest = rows.new_full((len(maxima), *rows.shape[::2]), -torch.inf, dtype=torch.float64)
        every = rows.transpose(0, 1).double()
        highest.scatter_reduce_(0, index[:, None, None].expand_as(every), every, "amax")
    place = group.at(group.maxima)
    maxima[place] = torch.maximum(maxima[place], highest)


def finite_samples(
    counts: Int[Tensor, "class all_neurons"],
    shape: tuple[int, int],
    finite: Bool[Tensor, "batch neuron"] | None,
    index: Int[Tensor, " batch"] | None,
) -> int | Int[Tensor, "class neuron"]:
    """Count the finite samples of a batch of ``shape``, by class and neuron.

    Returns:
        The size of the batch where all samples are finite and classes are not told apart, else counts.
    """
    if index is None:
        return shape[0] if finite is None else finite.sum(0, keepdim=True)
    seen = counts.new_ones(shape) if finite is None else finite.long()
    return counts.new_zeros((len(counts), shape[1])).index_add_(0, index, seen)


def add_magnitudes(
    counts: Int[Tensor, "class all_neurons bin"],
    group: Group,
    batches: Sequence[Batch],
    finite: Bool[Tensor, "batch neuron"] | None,
    index: Int[Tensor, " batch"] | None,
) -> None:
    """Count the magnitudes of finite samples."""
    # Neurons first: a neuron's bins then stay in the fastest cache while its values are counted.
    sampled = [b.sampled[0] if len(b.sampled) == 1 else torch.cat(b.sampled, 2) for b in batches]
    values = torch.cat([s.transpose(0, 1) for s in sampled])
    bins = histogram.bin_index(values).to(counts.device)
    start = group.bins if index is None else group.bins + index[:, None] * (counts.shape[1] * histogram.BINS)
    # int32 is enough for the bins of most models, and twice as fast as int64.
    flat = bins.add_(start) if counts.numel() < 2**31 else bins + start
    unit = flat.new_ones(1, dtype=torch.int64)
    weights = unit.expand(flat.numel()) if finite is None else finite.t().long().unsqueeze(-1).expand_as(flat).flatten()
    counts.view(-1).index_add_(0, flat.flatten(), weights)
