"""Metric of criteria, for all layers at once, over a stream and across processes.

The neurons of all layers lie side by side on one axis, so that six states are enough: memory is O(neurons), and merging
processes takes six reductions. Sums are float64, counts int64. A leading axis separates classes (or has one entry).

Sums by class grow as targets with new classes come.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_neurons.criteria.activity import TOTAL
from lightning_neurons.criteria.contract import NEEDS, Criterion, LayerTraits, Need, Statistic, Summary
from lightning_neurons.criteria.view import LayerView
from lightning_neurons.errors import MeasurementError
from lightning_neurons.metrics import accumulate, histogram
from lightning_neurons.metrics.accumulate import Batch, Group, Waiting

PER_CLASS_LIMIT = 2 * 2**30
"""Bytes that the sums of a measurement per class may take."""


def class_index(layers: Sequence[str], rows: int, targets: Tensor | None) -> Int[Tensor, " batch"]:
    """Return the class of each sample of some layers.

    Raises:
        MeasurementError: If there is not one for each.
    """
    if targets is None or len(targets) != rows:
        got = "no targets" if targets is None else f"{len(targets)} targets"
        raise MeasurementError(
            f"per_class: {', '.join(layers)} saw {rows} samples but {got}; leave such layers out by layers="
        )
    return targets


def with_room(states: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return states enlarged to ``classes`` classes on the first axis; new classes start without any samples.

    Raises:
        MeasurementError: If they would take too much memory.
    """
    size = classes * 8 * sum(math.prod(state.shape[1:]) for state in states.values())
    if size > PER_CLASS_LIMIT:
        raise MeasurementError(
            f"per_class: sums for {classes} classes would take {size / 2**30:.1f} GiB of at most "
            f"{PER_CLASS_LIMIT / 2**30:g}; choose fewer layers=, or criteria= without 'near_zero'"
        )
    room = {
        name: state.new_full((classes - len(state), *state.shape[1:]), -torch.inf if name == "maxima" else 0)
        for name, state in states.items()
    }
    return {name: torch.cat([state, room[name]]) for name, state in states.items()}


_HELD_NUMBERS = 2**22  # layers are added at the end of a batch, or when so many numbers wait (16 MiB)
_GROUPS = 64
_BY_CLASS = ("totals", "maxima", "samples", "values", "nonfinite", "histogram")


class StreamingCriteria(Metric):
    """A metric that sums the statistics of ``criteria`` over all updates, and computes scores from the sums.

    Samples with a NaN or infinite statistic are left out, neuron by neuron, and counted in ``nonfinite``.

    Args:
        widths: Number of neurons by layer.
        criteria: The criteria to compute.
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
        self._unwrap()
        self.criteria, self.per_class = tuple(criteria), per_class
        self.traits: dict[str, LayerTraits] = {}
        self.refused: dict[str, dict[str, str]] = {c.name: {} for c in self.criteria}
        ends = torch.tensor([0, *widths.values()]).cumsum(0).tolist()
        self.places = {name: slice(*ends[i : i + 2]) for i, name in enumerate(widths)}
        named = {s.name: s for c in self.criteria for s in c.statistics}
        self._sums = [s for s in named.values() if s.reduce == "sum"]
        self._maxima = [s for s in named.values() if s.reduce == "max"]
        self._statistics: dict[tuple[str, Need], tuple[Statistic, ...]] = {}
        self._several_calls: set[str] = set()
        self._waiting, self._groups = Waiting(), dict[tuple[Any, ...], Group]()
        neurons, classes = ends[-1], 0 if per_class else 1
        counted = neurons if any(c.histogram for c in self.criteria) else 0
        self._add("totals", (classes, len(self._sums), neurons), torch.zeros(1, dtype=torch.float64), "sum")
        self._add(
            "maxima", (classes, len(self._maxima), neurons), torch.tensor([-math.inf], dtype=torch.float64), "max"
        )
        counts = {"samples": (classes, len(NEEDS), neurons), "values": (classes, neurons)}
        counts |= {"nonfinite": (classes, len(NEEDS), neurons), "histogram": (classes, counted, histogram.BINS)}
        for name, shape in counts.items():
            self._add(name, shape, torch.zeros(1, dtype=torch.int64), "sum")

    def _add(self, name: str, shape: tuple[int, ...], value: Tensor, reduce: str) -> None:
        """Add a state that holds ``value`` everywhere; its default for ``reset`` takes no memory."""
        self.add_state(name, value, reduce)
        self._defaults[name] = value.expand(shape)
        # Zeros take no memory until they are written to: the operating system gives them page by page.
        setattr(
            self, name, torch.full(shape, value.item(), dtype=value.dtype) if value.any() else value.new_zeros(shape)
        )

    def _unwrap(self) -> None:
        """Remove the wrapped ``update`` and ``compute`` from the object, so that those of the class are used.

        torchmetrics keeps wrapped ones in the object, which then refers to itself: its sums would stay in memory until
        Python looks for circles.
        """
        for name in ("update", "compute"):
            vars(self).pop(name, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._unwrap()

    def describe(self, traits: LayerTraits, *, calls: int = 1) -> None:
        """Set the traits of a layer before its first update; values of all its ``calls`` belong to the same sample."""
        layer = traits.name
        self.traits[layer] = traits
        self._groups.clear()
        wanted: set[str] = set()
        for criterion in self.criteria:
            reason = criterion.refuse(traits)
            if reason is None:
                wanted |= {s.name for s in criterion.statistics}
                self.refused[criterion.name].pop(layer, None)
            else:
                self.refused[criterion.name][layer] = reason
        for need in NEEDS:
            every = (*self._sums, *self._maxima)
            plan = tuple(s for s in every if s.name in wanted and s.needs == need)
            # One object for equal plans: to compare them by value in each batch would take longer than the sums.
            self._statistics[layer, need] = next((p for p in self._statistics.values() if p == plan), plan)
        (self._several_calls.add if calls > 1 else self._several_calls.discard)(layer)

    def update(
        self, layer: str, view: LayerView, need: Need = "activation", targets: Int[Tensor, " batch"] | None = None
    ) -> None:
        """Observe one call of a layer; ``finish_batch`` adds it. No GPU is waited for unless classes are kept apart."""
        with torch.no_grad():
            self.hold(layer, view, need, targets)

    def hold(
        self,
        layer: str,
        view: LayerView,
        need: Need = "activation",
        targets: Int[Tensor, " batch"] | None = None,
        samples: int | None = None,
    ) -> None:
        """Do as ``update``, without the bookkeeping of torchmetrics, which would take longer than the work.

        ``samples`` is the number of samples in the whole batch, if known: each call may run on a part of them.
        """
        statistics, counted = self._statistics[layer, need], need == "activation" and self.histogram.shape[1] > 0
        if not statistics and not counted:
            return
        bookkeeping = vars(self)  # a torch.nn.Module sets attributes slowly
        bookkeeping["_computed"] = None
        bookkeeping["_update_count"] += 1
        rows = _observed(statistics, view, need)
        if view.went_out_of_range():
            rows = _observed(statistics, view.in_double(), need)
        new = Batch(
            rows=rows,
            positions=view.activation.shape[-1],
            sampled=[histogram.sampled(view.activation)] if counted else [],
            targets=targets,
        )
        waiting = self._waiting
        if samples is not None and new.samples < samples and layer in self._several_calls and not self.per_class:
            waiting.pieces.setdefault((layer, need), []).append(new)
            waiting.samples = samples
            return
        held = waiting.batches.pop((layer, need), None)
        if held is not None and (layer not in self._several_calls or held.samples != new.samples):
            self._add_all({(layer, need): held})  # of an earlier batch, or a call with other samples
            held = None
        waiting.batches[layer, need] = new if held is None else accumulate.joined(statistics, held, new)
        waiting.numbers += len(new.rows) * new.rows[0].numel()
        if waiting.numbers > _HELD_NUMBERS:
            once = [key for key in waiting.batches if key[0] not in self._several_calls]
            self._add_all({key: waiting.batches.pop(key) for key in once})
            waiting.numbers = 0

    def finish_batch(self) -> None:
        """Add the statistics of this batch to the sums, all layers together."""
        self._update_count += 1
        waiting, self._waiting = self._waiting, Waiting()
        self._add_all(waiting.batches)
        for (layer, need), pieces in waiting.pieces.items():
            for batch in accumulate.together(self._statistics[layer, need], pieces, waiting.samples):
                self._add_all({(layer, need): batch})

    def _add_all(self, pending: Mapping[tuple[str, Need], Batch]) -> None:
        forms: dict[tuple[Any, ...], list[tuple[str, Batch]]] = {}
        for (layer, need), batch in pending.items():
            form = need, id(self._statistics[layer, need]), batch.form, id(batch.targets)
            forms.setdefault(form, []).append((layer, batch))
        for (need, *_), members in forms.items():
            self._add_group(need, [layer for layer, _ in members], [batch for _, batch in members])

    def _add_group(self, need: Need, layers: Sequence[str], batches: Sequence[Batch]) -> None:
        group, at = self._group(need, tuple(layers), tuple(b.positions for b in batches)), NEEDS.index(need)
        rows = accumulate.transformed(group.statistics, batches, self.totals.device)
        if not rows.shape[1]:
            return  # an empty batch
        finite, index = accumulate.finite_rows(rows), self._class_index(layers, rows.shape[1], batches[0].targets)
        sums = sum(s.reduce == "sum" for s in group.statistics)
        if sums:
            accumulate.add_sums(self.totals, group, rows[:sums], finite, index)
        if len(group.statistics) > sums:
            accumulate.add_maxima(self.maxima, group, rows[sums : len(group.statistics)], finite, index)
        added = accumulate.finite_samples(self.values, (rows.shape[1], rows.shape[2]), finite, index)
        self.samples[:, at, group.neurons] += added
        if need == "activation":
            self.values[:, group.neurons] += added * group.positions
        if finite is not None:
            seen = accumulate.finite_samples(self.values, (rows.shape[1], rows.shape[2]), ~finite, index)
            self.nonfinite[:, at, group.neurons] += seen
        if batches[0].sampled:
            accumulate.add_magnitudes(self.histogram, group, batches, finite, index)

    def _group(self, need: Need, layers: tuple[str, ...], positions: tuple[int, ...]) -> Group:
        key = need, layers, positions, self.totals.device
        if key not in self._groups:
            places, rows = [self.places[name] for name in layers], (self._sums, self._maxima)
            if len(self._groups) >= _GROUPS:  # texts of ever new lengths
                self._groups.clear()
            self._groups[key] = accumulate.group_of(
                self._statistics[layers[0], need], rows, places, positions, self.totals.device
            )
        return self._groups[key]

    def _class_index(self, layers: Sequence[str], rows: int, targets: Tensor | None) -> Tensor | None:
        if not self.per_class:
            return None
        index = class_index(layers, rows, targets).to(self.totals.device)
        self.grow(int(index.max()) + 1)
        return index

    def grow(self, classes: int) -> None:
        """Enlarge the sums to ``classes`` classes; refuse if they would take too much memory."""
        if classes <= len(self.totals):
            return
        states = {name: getattr(self, name) for name in _BY_CLASS}
        for name, state in with_room(states, classes).items():
            setattr(self, name, state)

    def summary(self, layer: str, klass: int | None = None) -> Summary:
        """Return the sums of one layer, over all classes or of one."""
        place, chosen = self.places[layer], slice(None) if klass is None else slice(klass, klass + 1)
        totals = self.totals[chosen, :, place].sum(0)
        maxima = self.maxima[chosen, :, place]
        highest = maxima.amax(0) if len(maxima) else maxima.new_full(maxima.shape[1:], torch.nan)
        highest = torch.where(highest == -torch.inf, torch.nan, highest)
        by_name = {s.name: totals[i] for i, s in enumerate(self._sums)}
        return Summary(
            traits=self.traits[layer],
            totals=by_name | {s.name: highest[i] for i, s in enumerate(self._maxima)},
            samples=dict(zip(NEEDS, self.samples[chosen, :, place].sum(0), strict=True)),
            values=self.values[chosen, place].sum(0),
            left_out=self.nonfinite[chosen, NEEDS.index("activation"), place].sum(0),
            near_zero=partial(self._near_zero, self.histogram[chosen, place]),
        )

    @staticmethod
    def _near_zero(counts: Int[Tensor, "class neuron bin"], limit: float) -> Float[Tensor, " neuron"]:
        return histogram.share_at_most(counts[0] if len(counts) == 1 else counts.sum(0), limit)

    def magnitudes(self, layer: str) -> Int[Tensor, "neuron bin"]:
        """Return the histogram of each neuron of a layer over bins of magnitude; a view where there are no classes."""
        counts = self.histogram[:, self.places[layer]]
        return counts[0] if len(counts) == 1 else counts.sum(0)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return ``scores``, after merging processes if ``sync_on_compute`` asks for it."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self.scores()

    def scores(self) -> dict[str, dict[str, Tensor]]:
        """Compute the scores of all neurons.

        Returns:
            By criterion and layer, ``(neuron,)``; layers that a criterion refuses, or that never ran, are left out.
        """
        self.finish_batch()
        return {
            c.name: {n: c.judge(self.summary(n)) for n in self.traits if n not in self.refused[c.name]}
            for c in self.criteria
        }

    def reset(self) -> None:
        """Reset all sums, and drop statistics that wait to be added."""
        self._waiting = Waiting()
        super().reset()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of a metric of the same layers and criteria, and take over its traits of layers."""
        self.finish_batch()
        if isinstance(incoming_state, StreamingCriteria):
            incoming_state.finish_batch()
            for name in incoming_state.traits.keys() - self.traits.keys():
                self.describe(incoming_state.traits[name], calls=1 + (name in incoming_state._several_calls))
            incoming_state.grow(len(self.totals))
            self.grow(len(incoming_state.totals))
        super().merge_state(incoming_state)
        self._computed = None

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Synchronise as torchmetrics does, after every process has enlarged its sums to the classes of all."""
        self.finish_batch()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.per_class and distributed and not self._is_synced:
            classes = torch.tensor(len(self.totals), device=self.totals.device)
            torch.distributed.all_reduce(classes, torch.distributed.ReduceOp.MAX)
            self.grow(int(classes))
        super().sync(*args, **kwargs)


def _observed(statistics: Sequence[Statistic], view: LayerView, need: Need) -> list[Tensor]:
    rows = [s.observe(view) for s in statistics]
    if need == "activation" and TOTAL not in statistics:
        rows.append(view.total)  # the only one that no NaN or infinity passes by
    return rows
