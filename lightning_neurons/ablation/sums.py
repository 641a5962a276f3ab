"""Sums over samples of an ablation study: effects with their standard errors, losses by neuron and class, and metrics.

Sums merge over batches and processes. A value is the loss of one sample, or, where single samples cannot be told apart,
the mean over a batch, weighted by its size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from lightning_neurons.data.batches import targets_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.measurement.outcomes import Outcome
from lightning_neurons.results.ablation_report import AblationReport


@dataclass
class Effects:
    """Sums of the effects of some interventions on a quantity, by class.

    Attributes:
        sums: For each intervention and class: the number of values, and the sums of w, wx, w^2, w^2 x and w^2 x^2 over
            values x with weights w.
    """

    sums: Float[Tensor, "intervention klass moment"]

    @classmethod
    def of(cls, interventions: int, classes: int = 1) -> "Effects":
        """Return sums without any value."""
        return cls(torch.zeros(interventions, classes, 6, dtype=torch.float64))

    def add(
        self,
        rows: Sequence[int],
        values: Float[Tensor, "row value"],
        weights: Float[Tensor, " value"],
        classes: Int[Tensor, " value"] | None = None,
    ) -> None:
        """Add values of some interventions.

        Args:
            rows: The interventions, each once.
            values: The values of each.
            weights: Number of samples that each value stands for.
            classes: The class of each value; None puts all into the first.
        """
        x, w = values.detach().double().cpu(), weights.double().cpu().expand(values.shape)
        moments = torch.stack([torch.ones_like(w), w, w * x, w * w, w * w * x, w * w * x * x], -1)
        if classes is None:
            self.sums[list(rows), 0] += moments.sum(1)
            return
        place = classes.cpu()
        self.sums = self.with_classes(int(place.max()) + 1 if len(place) else 0).sums
        by_class = moments.new_zeros(len(moments), self.sums.shape[1], 6).index_add_(1, place, moments)
        self.sums[list(rows)] += by_class

    def with_classes(self, classes: int) -> "Effects":
        """Return the sums with room for at least so many classes."""
        missing = max(classes - self.sums.shape[1], 0)
        return Effects(torch.cat([self.sums, self.sums.new_zeros(len(self.sums), missing, 6)], 1))

    def __add__(self, other: "Effects") -> "Effects":
        classes = max(self.sums.shape[1], other.sums.shape[1])
        return Effects(self.with_classes(classes).sums + other.with_classes(classes).sums)

    @property
    def samples(self) -> Float[Tensor, " intervention"]:
        """The number of samples that each intervention was measured on."""
        return self.sums[..., 1].sum(1)

    @property
    def mean(self) -> Float[Tensor, " intervention"]:
        """The mean over samples; NaN where there was none."""
        whole = self.sums.sum(1)
        return whole[:, 2] / whole[:, 1]

    @property
    def mean_by_class(self) -> Float[Tensor, "klass intervention"]:
        """The mean over the samples of each class; NaN where there was none."""
        return (self.sums[..., 2] / self.sums[..., 1]).t()

    @property
    def standard_error(self) -> Float[Tensor, " intervention"]:
        """The standard error of ``mean``; NaN with fewer than two values."""
        return _standard_error(self.sums.sum(1))

    @property
    def standard_error_by_class(self) -> Float[Tensor, "klass intervention"]:
        """The standard error of ``mean_by_class``."""
        return _standard_error(self.sums).t()


def _standard_error(sums: Tensor) -> Tensor:
    """Return that of a weighted mean: sum of w^2 (x - mean)^2 over (sum of w)^2, times n / (n - 1)."""
    n, w, wx, ww, wwx, wwxx = sums.unbind(-1)
    mean = wx / w
    spread = (wwxx - 2 * mean * wwx + mean * mean * ww).clamp_min(0)
    return torch.where(n > 1, (spread / (w * w) * n / (n - 1)).sqrt(), torch.nan)


class AblationSums:
    """Sums over batches; those of several processes merge.

    Args:
        neurons: The neurons, by layer.
        widths: Number of neurons of each layer.
        metrics: torchmetrics by name.
    """

    def __init__(
        self, neurons: Mapping[str, Sequence[int]], widths: Mapping[str, int], metrics: Mapping[str, Metric]
    ) -> None:
        self.neurons, self.widths = dict(neurons), dict(widths)
        self.rows = {(layer, i): row for row, (layer, i) in enumerate(_pairs(neurons))}
        self.deltas, self.base = Effects.of(len(self.rows)), Effects.of(1)
        self._metrics = {name: _Metrics(metric) for name, metric in metrics.items()}
        self._outcome: Outcome | None = None
        self._batch: Any = None
        self._classes: Tensor | None = None
        self.by_batch = False  # whether some losses could not be told apart by sample
        self.has_classes = False

    def start(self, outcome: Outcome, batch: Any, classes: Tensor | None) -> None:
        """Begin a batch with the outcome of the unchanged model.

        Raises:
            MeasurementError: If classes or metrics are asked for and samples, or outputs, cannot be told apart.
        """
        self._outcome, self._batch, self._classes = outcome, batch, classes
        self.by_batch |= bool((outcome.weights != 1).any())
        if classes is not None:
            self.has_classes = True
            self._require_samples(outcome.losses.shape[1] == len(classes))
        self.base.add([0], outcome.losses, outcome.weights, classes)
        self._update(None, outcome.outputs[0])

    def add(self, layer: str, neurons: Sequence[int], outcome: Outcome) -> None:
        """Add the outcome without each of some neurons.

        Raises:
            MeasurementError: If classes are kept apart and the losses of samples cannot be.
        """
        base, rows = self._outcome, [self.rows[layer, neuron] for neuron in neurons]
        assert base is not None, "a batch has begun"
        if not outcome.agrees(base):  # what samples lose is not what the batch loses
            self._require_samples(self._classes is None)
            base, outcome = base.averaged(), outcome.averaged()
            self.by_batch = True
        self.deltas.add(rows, outcome.losses - base.losses, base.weights, self._classes)
        for row, outputs in zip(rows, outcome.outputs, strict=True):
            self._update(row, outputs)

    def _update(self, row: int | None, outputs: Any) -> None:
        if not self._metrics:
            return
        targets = targets_of(self._batch)
        if outputs is None or targets is None:
            what = "the model's output (loss_fn has to call it once)" if outputs is None else "targets"
            raise MeasurementError(f"metrics: a batch of type {type(self._batch).__name__} did not show {what}")
        for name, metric in self._metrics.items():
            try:
                metric.update(row, outputs, targets, self._classes)
                if row is None:
                    metric.whole()
            except Exception as error:
                raise MeasurementError(
                    f"metrics[{name!r}] has to make one number of the model's output ({type(outputs).__name__}) and "
                    f"targets: {type(error).__name__}: {error}"
                ) from error

    def _require_samples(self, are_apart: bool) -> None:
        if not are_apart:
            raise MeasurementError(
                "per_class: the loss could not be taken apart into samples; return one loss per sample from loss_fn"
            )

    def merge_processes(self, processes: int) -> None:
        """Give every process the sums of all."""
        if processes == 1:
            return
        everywhere: list[tuple[Tensor, Tensor, bool, bool]] = [None] * processes  # type: ignore[list-item]
        mine = self.deltas.sums, self.base.sums, self.by_batch, self.has_classes
        torch.distributed.all_gather_object(everywhere, mine)
        self.deltas, self.base = Effects.of(len(self.rows)), Effects.of(1)
        for deltas, base, by_batch, has_classes in everywhere:
            self.deltas, self.base = self.deltas + Effects(deltas), self.base + Effects(base)
            self.by_batch |= by_batch
            self.has_classes |= has_classes

    def _remarks(self, loss: float) -> list[str]:
        notes = ["standard errors are over batches: losses could not be told apart by sample"] if self.by_batch else []
        if not math.isfinite(loss):
            return [*notes, f"the loss of the unchanged model is {loss}: no change can be told"]
        values = self.deltas.mean[self.deltas.samples > 0]
        if infinite := int((~values.isfinite()).sum()):
            notes.append(f"the loss was not finite without {infinite} of {len(values)} neurons")
        return notes

    def report(self, *, settings: Mapping[str, Any], notes: Sequence[str] = ()) -> AblationReport:
        """Turn the sums over all samples into means.

        Returns:
            Changes of the loss and of each metric by layer, ``(neuron,)``, in the unit of the loss or metric; by
            class too, ``(class, neuron)``, where targets were known.
        """
        base = self.base.with_classes(self.deltas.sums.shape[1])
        samples = int(base.samples[0])
        by_class = {}, {}  # type: tuple[dict[str, Tensor], dict[str, Tensor]]
        if self.has_classes:
            deltas = self.deltas.with_classes(base.sums.shape[1])
            by_class = self._by_layer(deltas.mean_by_class), self._by_layer(deltas.standard_error_by_class)
        return AblationReport(
            loss=float(self.base.mean[0]),
            samples=samples,
            delta_loss=self._by_layer(self.deltas.mean),
            standard_error=self._by_layer(self.deltas.standard_error),
            per_class=by_class[0],
            per_class_error=by_class[1],
            class_counts=tuple(int(n) for n in base.sums[0, :, 1]) if self.has_classes else (),
            metrics={name: metric.whole() for name, metric in self._metrics.items()},
            delta_metrics={n: self._by_layer(m.changes(len(self.rows))) for n, m in self._metrics.items()},
            per_class_metrics={
                n: self._by_layer(m.changes_by_class(len(self.rows), base.sums.shape[1]))
                for n, m in self._metrics.items()
                if self.has_classes
            },
            runs=float(self.deltas.samples.sum()) / max(samples, 1),
            settings=dict(settings),
            notes=(*notes, *self._remarks(float(self.base.mean[0]))),
        )

    def _by_layer(self, values: Tensor) -> dict[str, Tensor]:
        """Return one value per neuron of each layer, from one per chosen neuron (in the last axis); NaN elsewhere."""
        by_layer = {n: values.new_full((*values.shape[:-1], self.widths[n]), torch.nan) for n in self.neurons}
        for (layer, neuron), row in self.rows.items():
            by_layer[layer][..., neuron] = values[..., row]
        return by_layer


class _Metrics:
    """One metric, of the unchanged model and without each neuron, overall and by class."""

    def __init__(self, metric: Metric) -> None:
        self._fresh = metric.clone()
        self._fresh.reset()
        self._found: dict[tuple[int | None, int | None], Metric] = {}

    def update(self, row: int | None, outputs: Any, targets: Tensor, classes: Tensor | None) -> None:
        self._of(row, None, outputs).update(outputs, targets)
        for klass in [] if classes is None else classes.unique().tolist():
            chosen = classes == klass
            self._of(row, klass, outputs).update(outputs[chosen], targets[chosen])

    def _of(self, row: int | None, klass: int | None, outputs: Any) -> Metric:
        if (row, klass) not in self._found:
            metric = self._fresh.clone()
            self._found[row, klass] = metric.to(outputs.device) if isinstance(outputs, Tensor) else metric
        return self._found[row, klass]

    def whole(self) -> float:
        return self._value(None, None)

    def changes(self, rows: int) -> Tensor:
        whole = self.whole()
        return torch.tensor([self._value(row, None) - whole for row in range(rows)], dtype=torch.float64)

    def changes_by_class(self, rows: int, classes: int) -> Tensor:
        base = [self._value(None, klass) for klass in range(classes)]
        changes = [[self._value(row, klass) - base[klass] for row in range(rows)] for klass in range(classes)]
        return torch.tensor(changes, dtype=torch.float64)

    def _value(self, row: int | None, klass: int | None) -> float:
        metric = self._found.get((row, klass))
        return float("nan") if metric is None else float(metric.compute())


def _pairs(neurons: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    return [(layer, i) for layer, indices in neurons.items() for i in indices]
