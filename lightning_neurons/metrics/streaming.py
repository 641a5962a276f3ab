"""Any criteria, of all layers at once, over a stream and across processes.

The neurons of all layers lie side by side on one axis, so that there are six states however many layers and criteria
there are: memory is O(neurons), and merging processes takes six reductions. Sums are float64, counts int64.
A leading axis separates classes (one class if classes are not asked for).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_neurons.criteria.contract import NEEDS, Criterion, LayerTraits, Need, Statistic, Summary
from lightning_neurons.criteria.view import LayerView
from lightning_neurons.errors import MeasurementError
from lightning_neurons.metrics import histogram

PER_CLASS_LIMIT = 2 * 2**30
"""Bytes that the sums of a measurement per class may take."""

_BY_CLASS = ("totals", "maxima", "samples", "values", "histogram")


class StreamingCriteria(Metric):
    """Sums the statistics of ``criteria`` over everything that ``update`` is given.

    Samples with a NaN or infinite statistic are left out, neuron by neuron, and counted in ``nonfinite``.

    Args:
        widths: Number of neurons by layer.
        criteria: What will be asked for.
        per_class: Whether to keep classes apart; ``update`` then needs targets.

    Example:
        >>> from lightning_neurons.criteria import CRITERIA
        >>> metric = StreamingCriteria({"fc": 2}, [CRITERIA["mean"]])
        >>> metric.describe(LayerTraits("fc"))
        >>> metric.update("fc", LayerView(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])))
        >>> metric.compute()["mean"]["fc"].tolist()
        [2.0, 3.0]
    """

    full_state_update = False
    totals: Tensor
    maxima: Tensor
    samples: Tensor
    values: Tensor
    nonfinite: Tensor
    histogram: Tensor

    def __init__(
        self, widths: Mapping[str, int], criteria: Iterable[Criterion], *, per_class: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.criteria = tuple(criteria)
        self.per_class = per_class
        self.traits: dict[str, LayerTraits] = {}
        self.refused: dict[str, dict[str, str]] = {c.name: {} for c in self.criteria}
        ends = torch.tensor([0, *widths.values()]).cumsum(0).tolist()
        self.places = {name: slice(*ends[i : i + 2]) for i, name in enumerate(widths)}
        named = {s.name: s for c in self.criteria for s in c.statistics}
        self._sums = [s for s in named.values() if s.reduce == "sum"]
        self._maxima = [s for s in named.values() if s.reduce == "max"]
        self._plan: dict[tuple[str, Need], list[Statistic]] = {}
        self._several_calls: set[str] = set()
        self._pending: dict[tuple[str, Need], tuple[list[Tensor], int]] = {}
        neurons, classes = ends[-1], 0 if per_class else 1
        wide = neurons if any(c.histogram for c in self.criteria) else 0
        start = torch.zeros(classes, len(NEEDS), neurons, dtype=torch.int64)
        self.add_state("totals", torch.zeros(classes, len(self._sums), neurons, dtype=torch.float64), "sum")
        self.add_state(
            "maxima", torch.full((classes, len(self._maxima), neurons), -torch.inf, dtype=torch.float64), "max"
        )
        self.add_state("samples", start, "sum")
        self.add_state("values", start[:, 0], "sum")
        self.add_state("nonfinite", torch.zeros(len(NEEDS), neurons, dtype=torch.int64), "sum")
        self.add_state("histogram", torch.zeros(classes, wide, histogram.BINS, dtype=torch.int64), "sum")

    def describe(self, traits: LayerTraits, *, calls: int = 1) -> None:
        """Say what a layer is, before its first update: which criteria apply follows from it.

        Args:
            traits: What criteria may know of the layer.
            calls: How often the layer runs in one forward; the values of all calls belong to the same sample.
        """
        layer = traits.name
        self.traits[layer] = traits
        accepted = []
        for criterion in self.criteria:
            reason = criterion.refuse(traits)
            if reason is None:
                accepted.append(criterion)
                self.refused[criterion.name].pop(layer, None)
            else:
                self.refused[criterion.name][layer] = reason
        wanted = {s.name for c in accepted for s in c.statistics}
        for need in NEEDS:
            self._plan[layer, need] = [
                s for s in [*self._sums, *self._maxima] if s.name in wanted and s.needs == need
            ]
        (self._several_calls.add if calls > 1 else self._several_calls.discard)(layer)

    def update(
        self, layer: str, view: LayerView, need: Need = "activation", targets: Int[Tensor, " batch"] | None = None
    ) -> None:
        """Add one call of one layer. Nothing is synchronised with the device unless classes are kept apart."""
        statistics = self._plan[layer, need]
        wants_histogram = need == "activation" and self.histogram.shape[1] > 0
        if not statistics and not wants_histogram:
            return
        rows = [s.observe(view) for s in statistics] or [view.total]
        if layer in self._several_calls and self._hold(layer, need, rows, view):
            finite = torch.stack([r.isfinite() for r in rows]).all(0)
        else:
            finite = self._add(layer, need, rows, view.activation.shape[-1], targets)
        if wants_histogram:
            self._count(layer, view, finite, targets)

    def finish_batch(self, targets: Int[Tensor, " batch"] | None = None) -> None:
        """Add the layers that ran several times in this batch."""
        pending, self._pending = self._pending, {}
        for (layer, need), (rows, positions) in pending.items():
            self._add(layer, need, rows, positions, targets)

    def _hold(self, layer: str, need: Need, rows: list[Tensor], view: LayerView) -> bool:
        """Join this call to the sample's earlier ones; False where it has other samples than they."""
        held, positions = self._pending.get((layer, need), (rows, 0))
        if held[0].shape != rows[0].shape:
            return False
        if held is not rows:
            statistics = self._plan[layer, need]
            reducers = [torch.maximum if s.reduce == "max" else torch.add for s in statistics] or [torch.add]
            held = [reduce(old, new) for reduce, old, new in zip(reducers, held, rows, strict=True)]
        self._pending[layer, need] = held, positions + view.activation.shape[-1]
        return True

    def _add(
        self, layer: str, need: Need, rows: list[Tensor], positions: int, targets: Tensor | None
    ) -> Bool[Tensor, "batch neuron"]:
        statistics, place = self._plan[layer, need], self.places[layer]
        done = [r if s.per_sample is None else s.per_sample(r) for s, r in zip(statistics, rows, strict=False)] or rows
        stack = torch.stack(done).to(self.totals.device)
        finite = stack.isfinite().all(0)
        index = self._class_index(layer, targets, len(finite))
        at, sums = NEEDS.index(need), [i for i, s in enumerate(statistics) if s.reduce == "sum"]
        if sums:
            slots = [self._sums.index(statistics[i]) for i in sums]
            clean = torch.where(finite, stack[: len(sums)], 0)
            self._scatter(self.totals[:, slots[0] : slots[-1] + 1, place], clean, [s - slots[0] for s in slots], index)
        for i in range(len(sums), len(statistics)):
            slot = self._maxima.index(statistics[i])
            clean = torch.where(finite, stack[i], -torch.inf).double()
            here = self.maxima[:, slot, place]
            if index is None:
                torch.maximum(here[0], clean.amax(0), out=here[0])
            else:
                here.scatter_reduce_(0, index[:, None].expand_as(clean), clean, "amax")
        seen = finite.long()
        self._scatter(self.samples[:, at : at + 1, place], seen[None], [0], index)
        self.nonfinite[at, place] += (1 - seen).sum(0)
        if need == "activation":
            self._scatter(self.values[:, None, place], seen[None] * positions, [0], index)
        return finite

    @staticmethod
    def _scatter(state: Tensor, rows: Tensor, slots: list[int], index: Tensor | None) -> None:
        """Add ``(statistic, batch, neuron)`` rows to ``(class, statistic, neuron)`` sums, in place."""
        if index is None:
            state[0].index_add_(0, torch.tensor(slots, device=state.device), rows.sum(1, dtype=state.dtype))
            return
        for slot, row in zip(slots, rows, strict=True):
            state[:, slot].index_add_(0, index, row.to(state.dtype))

    def _count(self, layer: str, view: LayerView, finite: Tensor, targets: Tensor | None) -> None:
        values, place = view.activation, self.places[layer]
        chosen = histogram.positions(values.shape[-1])
        if len(chosen) < values.shape[-1]:
            values = values[:, :, list(chosen)]
        bins = histogram.bin_index(values).to(self.histogram.device)
        neurons = torch.arange(place.start, place.stop, device=bins.device)
        index = self._class_index(layer, targets, len(values))
        if index is not None:
            neurons = neurons + index[:, None] * self.histogram.shape[1]
        flat = bins.add_((neurons * histogram.BINS).unsqueeze(-1)).flatten()
        weights = finite.long().unsqueeze(-1).expand_as(bins).reshape(-1)
        self.histogram.view(-1).index_add_(0, flat, weights)

    def _class_index(self, layer: str, targets: Tensor | None, rows: int) -> Tensor | None:
        if not self.per_class:
            return None
        if targets is None or len(targets) != rows:
            got = "no targets" if targets is None else f"{len(targets)} targets"
            raise MeasurementError(f"per_class: layer {layer!r} has {rows} samples but {got}; leave it out by layers=")
        index = targets.to(self.totals.device)
        self.grow(int(index.max()) + 1 if len(index) else 0)
        return index

    def grow(self, classes: int) -> None:
        """Make room for ``classes`` classes."""
        missing = classes - len(self.totals)
        if missing > 0:
            size = classes * 8 * sum(math.prod(getattr(self, name).shape[1:]) for name in _BY_CLASS)
            if size > PER_CLASS_LIMIT:
                raise MeasurementError(
                    f"per_class: sums for {classes} classes would take {size / 2**30:.1f} GiB of at most "
                    f"{PER_CLASS_LIMIT / 2**30:g}; choose fewer layers=, or criteria= without 'near_zero'"
                )
            for name in _BY_CLASS:
                state: Tensor = getattr(self, name)
                room = state.new_full((missing, *state.shape[1:]), -torch.inf if name == "maxima" else 0)
                setattr(self, name, torch.cat([state, room]))

    def summary(self, layer: str, klass: int | None = None) -> Summary:
        """The sums of one layer, over all classes or of one."""
        place, chosen = self.places[layer], slice(None) if klass is None else slice(klass, klass + 1)
        totals = self.totals[chosen, :, place].sum(0)
        maxima = self.maxima[chosen, :, place]
        highest = maxima.amax(0) if len(maxima) else maxima.new_full(maxima.shape[1:], torch.nan)
        highest = torch.where(highest == -torch.inf, torch.nan, highest)
        counts = self.histogram[chosen, place].sum(0)
        samples = self.samples[chosen, :, place].sum(0)
        return Summary(
            traits=self.traits[layer],
            totals={s.name: totals[i] for i, s in enumerate(self._sums)}
            | {s.name: highest[i] for i, s in enumerate(self._maxima)},
            samples=dict(zip(NEEDS, samples, strict=True)),
            values=self.values[chosen, place].sum(0),
            near_zero=lambda limit: histogram.share_at_most(counts, limit),
        )

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Scores by criterion and layer; layers that a criterion refuses, or that never ran, are left out."""
        self.finish_batch()
        return {
            c.name: {n: c.score(self.summary(n)) for n in self.traits if n not in self.refused[c.name]}
            for c in self.criteria
        }

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics does it, after every process has made room for the classes of all."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.per_class and distributed and not self._is_synced:
            classes = torch.tensor(len(self.totals), device=self.totals.device)
            torch.distributed.all_reduce(classes, torch.distributed.ReduceOp.MAX)
            self.grow(int(classes))
        super().sync(*args, **kwargs)
