"""One measurement: its layers, its criteria, the sums so far, and the report in the end."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.criteria import Criterion, LayerView, main_criterion
from lightning_neurons.criteria.activity import LARGEST_MAGNITUDE
from lightning_neurons.criteria.contract import NEEDS, Need
from lightning_neurons.criteria.deadness import layer_rms
from lightning_neurons.errors import MeasurementError
from lightning_neurons.hooks.weights import traits_of
from lightning_neurons.layers.layer import Layer, Pattern, candidates, modules_by_name, require_materialized
from lightning_neurons.layers.prunable import check_prunable
from lightning_neurons.layers.registry import widths_of
from lightning_neurons.layers.sample_axis import samples_of
from lightning_neurons.metrics.histogram import BINS, HIGHEST, LOWEST
from lightning_neurons.metrics.room import require_room
from lightning_neurons.metrics.streaming import StreamingCriteria
from lightning_neurons.results.neuron_report import LayerCounts, NeuronReport

_NAMED = 5


class Measurement:
    """The sums that one report is made of; a receiver of ``Passes``.

    Args:
        model: The model that is measured.
        criteria: The criteria to measure.
        layers: None for all, or patterns.
        per_class: Whether to keep classes apart.
        device: Device of the sums; None for the CPU.

    Raises:
        ArgumentError: If a pattern matches no layer, or a layer is lazy or not what ``register_prunable`` was told.
        MeasurementError: If the sums would not fit into memory.
    """

    def __init__(
        self,
        model: nn.Module,
        criteria: Sequence[Criterion],
        *,
        layers: Sequence[Pattern] | None = None,
        per_class: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.criteria, self.per_class = model, tuple(criteria), per_class
        self.chosen = layers
        self.modules, self._named = candidates(model, layers), modules_by_name(model)
        require_materialized(model)
        check_prunable(model)
        self.layers: dict[str, Layer] = {}
        self._forms: dict[str, tuple[Layer, bool, tuple[float, float] | None]] = {}
        widths = widths_of(self.modules)
        # float64 does not exist on Apple's GPUs.
        where = torch.device("cpu") if device is None or device.type == "mps" else device
        require_room(widths, criteria, where)
        with torch.inference_mode(False):  # inference tensors could not be added to later on
            self.metric = StreamingCriteria(widths, criteria, per_class=per_class, sync_on_compute=False)
            self.metric.to(where)
        self._batch_size: int | None = None
        self._targets: Tensor | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """The kinds of pass that the criteria take."""
        return frozenset(need for c in self.criteria for need in c.needs)

    @property
    def needs_gradients(self) -> bool:
        """True if any criterion takes more than a forward."""
        return bool(self.needs - {"activation"})

    def leave_out_gradients(self) -> None:
        """Leave out the criteria that need gradients."""
        self.criteria = tuple(c for c in self.criteria if not c.needs - {"activation"})

    def start_batch(self, batch_size: int | None, targets: Tensor | None) -> None:
        """Set the number of samples of the next batch and, if known, their targets."""
        self._batch_size, self._targets = batch_size, targets

    def finish_batch(self) -> None:
        """Add what is only complete at the end of a batch."""
        self.metric.finish_batch()

    def learn(self, layers: Mapping[str, Layer]) -> None:
        """Store the activation points of layers."""
        for name, layer in layers.items():
            if layer.calls and not (name in self.layers and self.layers[name].calls):
                self.metric.describe(traits_of(layer, self._named), calls=layer.calls)
            if layer.calls or name not in self.layers:
                self.layers[name] = layer
                self._forms[name] = layer, layer.rectified, layer.bounds

    def receive(
        self, layer: str, activation: Tensor, gradient: Tensor | None, need: Need, inner: Tensor | None = None
    ) -> None:
        """Add one call of one layer."""
        traced, rectified, bounds = self._forms[layer]
        view = LayerView(
            samples_of(activation, traced, self._batch_size),
            None if gradient is None else samples_of(gradient, traced, self._batch_size),
            None if inner is None else samples_of(inner, traced, self._batch_size),
            rectified=rectified,
            bounds=bounds,
        )
        place = self.metric.places[layer]
        if view.activation.shape[1] != place.stop - place.start:
            raise MeasurementError(
                f"layer {layer!r} gave {view.activation.shape[1]} neurons on axis {traced.axis} of its output and says "
                f"that it has {place.stop - place.start}; check its register_layer(neurons=..., axis=...)"
            )
        self.metric.hold(layer, view, need, self._targets if self.per_class else None, self._batch_size)

    def merge_processes(self, processes: int) -> None:
        """Give every process the sums of all; one that saw nothing learns the layers from the others."""
        if processes == 1:
            return
        everywhere: list[dict[str, Layer]] = [{} for _ in range(processes)]
        torch.distributed.all_gather_object(everywhere, self.layers)
        for layers in everywhere:
            self.learn(layers)
        self.metric.sync()

    def report(
        self,
        *,
        settings: Mapping[str, Any],
        notes: Sequence[str] = (),
        epoch: int | None = None,
        step: int | None = None,
    ) -> NeuronReport:
        """Turn the sums into results, on the CPU.

        Returns:
            A report that takes the sums over, so that nothing can be added to the measurement afterwards.
        """
        if not all(c.statistics for c in self.criteria):  # weights may have been exchanged since
            self.metric.traits |= {n: traits_of(self.layers[n], self._named) for n in self.metric.traits}
        self.metric.cpu()
        kinds = {c.name: c.kind for c in self.criteria}
        computed = {name: by_layer for name, by_layer in self.metric.scores().items() if name in kinds}
        for criterion, by_layer in computed.items():
            for layer, scores in by_layer.items():
                place = self.metric.places[layer]
                check_scores(criterion, layer, scores, place.stop - place.start)
        ran = [name for name in self.modules if name in self.metric.traits]
        classes = range(len(self.metric.totals)) if self.per_class else range(0)
        return NeuronReport(
            layers=tuple(self.layers[n] for n in self.modules if n in self.layers),
            scores={name: by_layer for name, by_layer in computed.items() if kinds[name] == "importance"},
            deadness_by={name: by_layer for name, by_layer in computed.items() if kinds[name] == "deadness"},
            per_class={
                c.name: {
                    n: torch.stack([c.judge(self.metric.summary(n, k)) for k in classes]) for n in computed[c.name]
                }
                for c in self.criteria
                if len(classes) and c.statistics
            },
            counts={name: self._counts(name) for name in ran},
            class_counts=tuple(self._class_count(k) for k in classes),
            refused={n: dict(reasons) for n, reasons in self.metric.refused.items() if reasons and n in kinds},
            settings={
                **settings,
                "main_criterion": main_criterion(self.criteria),
                "in_loss_units": [c.name for c in self.criteria if c.in_loss_units],
            },
            notes=(*notes, *self._unreached(), *self._unresolved(), *self._unfollowed()),
            epoch=epoch,
            step=step,
        )

    def _unreached(self) -> list[str]:
        """Return a note of the layers that ran and got no gradient, though others did."""
        wanted = [index for index, need in enumerate(NEEDS) if need in self.needs - {"activation"}]
        got = (self.metric.samples + self.metric.nonfinite)[:, wanted].sum((0, 1))
        reached = {name: bool(got[self.metric.places[name]].any()) for name in self.metric.traits}
        names = [name for name, is_reached in reached.items() if not is_reached]
        if not names or len(names) == len(reached):
            return []
        return [f"no gradient of the loss reaches {_listed(names)}: scores that rest on gradients are unknown there"]

    def _unresolved(self) -> list[str]:
        """Return notes of the layers where near_zero asks for magnitudes that the histogram does not tell apart."""
        notes = []
        for criterion in self.criteria:
            limit_of = criterion.score.keywords if isinstance(criterion.score, partial) else {}
            if not criterion.histogram or "threshold" not in limit_of:
                continue
            for name in self.metric.traits:
                rms = layer_rms(self.metric.summary(name)) if limit_of["relative"] else 1.0
                limit = limit_of["threshold"] * rms
                if limit > 0 and not LOWEST <= limit <= HIGHEST:
                    notes.append(
                        f"{criterion.name} of {name}: the threshold is {limit:.1e}, outside of {LOWEST:.0e} to "
                        f"{HIGHEST:.0e} that the histogram resolves; only whether a neuron is dead is exact"
                    )
        return notes

    def _unfollowed(self) -> list[str]:
        """Return notes of the layers whose values may not be what downstream layers get; those alike together."""
        same: dict[str, list[str]] = {}
        for name in self.modules:
            layer = self.layers.get(name)
            if layer is not None and layer.calls and layer.note:
                same.setdefault(layer.note, []).append(name)
        notes = [f"{_listed(names)}: measured before what follows, as {note}" for note, names in same.items()]
        return notes[:_NAMED] + [f"and {len(notes) - _NAMED} notes more, at their layers"] * (len(notes) > _NAMED)

    def _counts(self, name: str) -> LayerCounts:
        summary, place = self.metric.summary(name), self.metric.places[name]
        has_histogram = self.metric.histogram.shape[1] > 0
        empty = torch.zeros(0, BINS, dtype=torch.int64)
        assert summary.values is not None
        assert summary.left_out is not None
        largest = summary.totals.get(LARGEST_MAGNITUDE.name)
        return LayerCounts(
            samples=summary.samples["activation"],
            gradient_samples=summary.samples["gradient"],
            values=summary.values,
            # The same samples are bad in every pass.
            nonfinite=self.metric.nonfinite[:, :, place].sum(0).amax(0),
            left_out=summary.left_out,
            rms=layer_rms(summary) if "squares" in summary.totals else None,
            largest=largest,
            histogram=self.metric.magnitudes(name) if has_histogram else empty,
        )

    def _class_count(self, klass: int) -> int:
        """Count the samples of a class.

        Returns:
            The most that any neuron saw, as others may have been infinite there.
        """
        seen = self.metric.samples[klass, : len(NEEDS)]
        return int(seen.max()) if seen.numel() else 0


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more layers" if names[_NAMED:] else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def check_scores(criterion: str, layer: str, scores: Any, neurons: int) -> None:
    """Check that a criterion, which may be the user's own, gives a number for each neuron.

    Raises:
        MeasurementError: Naming the criterion and what it gave.
    """
    if not isinstance(scores, Tensor) or scores.shape != (neurons,):
        got = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise MeasurementError(
            f"criterion {criterion!r} gave {got} for layer {layer!r}; expected a tensor of shape ({neurons},), a score "
            "for each neuron"
        )
