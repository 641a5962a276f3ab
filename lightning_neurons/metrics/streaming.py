"""Any criteria, of all layers at once, over a stream and across processes.

The neurons of all layers lie side by side on one axis, so that there are six states however many layers and criteria
there are: memory is O(neurons), and merging processes takes six reductions. Sums are float64, counts int64.
A leading axis separates classes (one class if classes are not asked for).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_neurons.criteria.contract import NEEDS, Criterion, LayerTraits, Need, Statistic, Summary
from lightning_neurons.criteria.view import LayerView
from lightning_neurons.errors import MeasurementError
from lightning_neurons.metrics import histogram
from lightning_neurons.metrics.accumulate import add_counts, add_magnitudes, add_maximum, add_sums, finite_rows

PER_CLASS_LIMIT = 2 * 2**30
"""Bytes that the sums of a measurement per class may take."""

_BY_CLASS = ("totals", "maxima", "samples", "values", "histogram")


@dataclass(frozen=True)
class _Plan:
    """What to observe of a layer, sums first, and in which rows of the states it goes."""

    statistics: tuple[Statistic, ...]
    sums: tuple[int, ...]
    maxima: tuple[int, ...]


@lru_cache(maxsize=256)
def row_index(rows: tuple[int, ...], device: torch.device) -> Int[Tensor, " row"]:
    """``rows`` as a tensor, made once."""
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


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
        self._plans: dict[tuple[str, Need], _Plan] = {}
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
        self.add_state("values", start[:, 0].clone(), "sum")
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
            sums, maxima = (
                [s for s in of if s.name in wanted and s.needs == need] for of in (self._sums, self._maxima)
            )
            self._plans[layer, need] = _Plan(
                (*sums, *maxima), tuple(map(self._sums.index, sums)), tuple(map(self._maxima.index, maxima))
            )
        (self._several_calls.add if calls > 1 else self._several_calls.discard)(layer)

    def update(
        self, layer: str, view: LayerView, need: Need = "activation", targets: Int[Tensor, " batch"] | None = None
    ) -> None:
        """Add one call of one layer. Nothing is synchronised with a GPU unless classes are kept apart."""
        plan = self._plans[layer, need]
        wants_histogram = need == "activation" and self.histogram.shape[1] > 0
        if not plan.statistics and not wants_histogram:
            return
        rows = [s.observe(view) for s in plan.statistics] or [view.total]
        positions = view.activation.shape[-1]
        index = self._class_index(layer, targets, len(rows[0]))
        if layer in self._several_calls and self._hold(layer, need, rows, positions):
            finite = finite_rows(torch.stack(rows))
        else:
            finite = self._add(layer, need, rows, positions, index)
        if wants_histogram:
            add_magnitudes(self.histogram, self.places[layer].start, view.activation, finite, index)

    def finish_batch(self, targets: Int[Tensor, " batch"] | None = None) -> None:
        """Add the layers that ran several times in this batch."""
        pending, self._pending = self._pending, {}
        for (layer, need), (rows, positions) in pending.items():
            self._add(layer, need, rows, positions, self._class_index(layer, targets, len(rows[0])))

    def _hold(self, layer: str, need: Need, rows: list[Tensor], positions: int) -> bool:
        """Join this call to the sample's earlier ones; False where it has other samples than they."""
        held, before = self._pending.get((layer, need), (rows, 0))
        if held[0].shape != rows[0].shape:
            return False
        if held is not rows:
            statistics = self._plans[layer, need].statistics
            reducers = [torch.maximum if s.reduce == "max" else torch.add for s in statistics] or [torch.add]
            held = [reduce(old, new) for reduce, old, new in zip(reducers, held, rows, strict=True)]
        self._pending[layer, need] = held, before + positions
        return True

    def _add(
        self, layer: str, need: Need, rows: list[Tensor], positions: int, index: Tensor | None
    ) -> Bool[Tensor, "batch neuron"] | None:
        plan, place, at = self._plans[layer, need], self.places[layer], NEEDS.index(need)
        each = [r if s.per_sample is None else s.per_sample(r) for s, r in zip(plan.statistics, rows, strict=False)]
        stack = torch.stack(each or rows).to(self.totals.device)
        finite = finite_rows(stack)
        if plan.sums:
            summands = stack[: len(plan.sums)]
            clean = summands if finite is None else torch.where(finite, summands, 0)
            add_sums(self.totals[:, :, place], row_index(plan.sums, clean.device), clean, index)
        for slot, row in zip(plan.maxima, stack[len(plan.sums) :], strict=False):
            add_maximum(self.maxima[:, slot, place], row, finite, index)
        shape = (stack.shape[1], stack.shape[2])
        add_counts(self.samples[:, at, place], shape, finite, index)
        if need == "activation":
            add_counts(self.values[:, place], shape, finite, index, positions)
        if finite is not None:
            self.nonfinite[at, place] += (~finite).sum(0)
        return finite

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
