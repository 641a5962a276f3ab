"""Results of ablation and perturbation studies."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.errors import UnknownNameError
from lightning_neurons.results.typed import floats, plain, typed
from lightning_neurons.results.whole_file import reading_document, write_whole

FORMAT, VERSION = "lightning_neurons ablation", 1


class AblatedNeuron(NamedTuple):
    """One row of a ranking.

    Attributes:
        layer: The layer's path.
        neuron: The neuron's index.
        delta_loss: Mean loss without it, minus mean loss.
        standard_error: Of ``delta_loss``.
    """

    layer: str
    neuron: int
    delta_loss: float
    standard_error: float


@dataclass(frozen=True)
class AblationReport:
    """The measured effect of switching neurons off, one at a time. NaN where a neuron was not measured.

    Attributes:
        loss: Mean loss of the unchanged model over the samples.
        samples: Number of samples it was measured on.
        delta_loss: By layer, ``(neuron,)``: mean loss with the neuron off, minus mean loss.
        standard_error: By layer, ``(neuron,)``: of ``delta_loss`` over samples.
        per_class: By layer, ``(class, neuron)``: the same over the samples of a class; empty unless asked for.
        per_class_error: By layer, ``(class, neuron)``: its standard error.
        class_counts: How many samples of each class there were.
        metrics: By metric, its value of the unchanged model.
        delta_metrics: By metric and layer, ``(neuron,)``: the metric with the neuron off, minus the metric.
        per_class_metrics: By metric and layer, ``(class, neuron)``: the same on the samples of a class.
        undecided: By layer, the neurons of which a study with a budget could not say whether they are among the least
            important.
        runs: Forwards that the study took, in units of one forward over all samples; parts of forwards count in full.
        settings: The settings of the study.
        notes: Notes on the data and the limits of the numbers.

    Example:
        >>> import torch
        >>> report = AblationReport(1.0, 8, {"fc": torch.tensor([0.5, 0.0])}, {"fc": torch.tensor([0.1, 0.0])})
        >>> report.ranking()[0]
        AblatedNeuron(layer='fc', neuron=0, delta_loss=0.5, standard_error=0.1...)
    """

    loss: float
    samples: int
    delta_loss: Mapping[str, Float[Tensor, " neuron"]]
    standard_error: Mapping[str, Float[Tensor, " neuron"]]
    per_class: Mapping[str, Float[Tensor, "klass neuron"]] = field(default_factory=dict)
    per_class_error: Mapping[str, Float[Tensor, "klass neuron"]] = field(default_factory=dict)
    class_counts: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    delta_metrics: Mapping[str, Mapping[str, Float[Tensor, " neuron"]]] = field(default_factory=dict)
    per_class_metrics: Mapping[str, Mapping[str, Float[Tensor, "klass neuron"]]] = field(default_factory=dict)
    undecided: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    runs: float = math.nan
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def ranking(self, layer: str | None = None) -> list[AblatedNeuron]:
        """Rank neurons from the one whose removal raises the loss most to the one whose removal raises it least.

        Args:
            layer: Rank within this layer; None ranks all measured neurons together.

        Returns:
            One row per measured neuron: layer, index, change of the loss and its standard error.

        Raises:
            UnknownNameError: If there is no such layer.
        """
        if layer is not None and layer not in self.delta_loss:
            raise UnknownNameError.among("layer", str(layer), self.delta_loss)
        rows = [
            AblatedNeuron(name, i, float(d), float(self.standard_error[name][i]))
            for name, deltas in self.delta_loss.items()
            if layer in (None, name)
            for i, d in enumerate(deltas)
            if not d.isnan()
        ]
        return sorted(rows, key=lambda row: -row.delta_loss)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        document = {"format": FORMAT, "version": VERSION, **{f.name: getattr(self, f.name) for f in fields(self)}}
        write_whole(path, json.dumps(plain(document), allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> "AblationReport":
        """Read what ``save`` wrote.

        Returns:
            A report equal to the one that was saved, on the CPU.

        Raises:
            ArgumentError: If the file is no such report, or of a newer version.
        """
        with reading_document(path, FORMAT, VERSION, "AblationReport.save") as document:
            kinds = get_type_hints(cls)
            tensors = {name: dims for name, dims in _DIMENSIONS.items() if not name.endswith("metrics")}
            values: dict[str, Any] = {name: _by_layer(document[name], dims) for name, dims in tensors.items()}
            for name in _DIMENSIONS.keys() - tensors.keys():
                values[name] = {m: _by_layer(by, _DIMENSIONS[name]) for m, by in document[name].items()}
            plain_ones = [entry.name for entry in fields(cls) if entry.name not in values]
            values |= {name: typed(kinds[name], document[name], name) for name in plain_ones}
            _check_widths(values)
            return cls(**values)


_DIMENSIONS = {
    "delta_loss": 1,
    "standard_error": 1,
    "per_class": 2,
    "per_class_error": 2,
    "delta_metrics": 1,
    "per_class_metrics": 2,
}
"""Number of axes of the tensors in a report."""


def _by_layer(entries: Mapping[str, Any], dimensions: int) -> dict[str, Tensor]:
    tensors = {name: floats(values) for name, values in entries.items()}
    if any(values.ndim != dimensions for values in tensors.values()):
        raise ValueError(f"numbers have {dimensions} axes")
    return tensors


def _check_widths(values: Mapping[str, Any]) -> None:
    """Check that every number belongs to a neuron."""
    widths = {layer: len(deltas) for layer, deltas in values["delta_loss"].items()}
    groups = [values[name] for name in ("standard_error", "per_class", "per_class_error")]
    groups += [*values["delta_metrics"].values(), *values["per_class_metrics"].values()]
    if values["standard_error"].keys() != widths.keys():
        raise ValueError("not every layer has a standard error")
    for layer, numbers in ((layer, numbers) for group in groups for layer, numbers in group.items()):
        if numbers.shape[-1] != widths.get(layer):
            raise ValueError(f"{layer!r} does not have one number for each of its neurons")
    for layer, neurons in values["undecided"].items():
        if not all(0 <= neuron < widths.get(layer, 0) for neuron in neurons):
            raise ValueError(f"{layer!r} does not have all of these neurons")


@dataclass(frozen=True)
class JointAblation:
    """The measured effect of switching sets of neurons off.

    Attributes:
        loss: Mean loss of the unchanged model.
        samples: Number of samples it was measured on.
        delta_loss: For each set, the mean loss without it, minus the mean loss.
        standard_error: Of ``delta_loss`` over samples.
        neurons: The sets, by layer.
    """

    loss: float
    samples: int
    delta_loss: Float[Tensor, " set"]
    standard_error: Float[Tensor, " set"]
    neurons: tuple[Mapping[str, Sequence[int]], ...]


@dataclass(frozen=True)
class AblationCurves:
    """Mean loss by the share of neurons that are off.

    Attributes:
        shares: The shares, from 0 to 1.
        least_first: Losses when the least important go first.
        most_first: Losses when the most important go first.
        random: Losses in random orders.

    Example:
        >>> flat = torch.ones(3)
        >>> AblationCurves(torch.tensor([0.0, 0.5, 1.0]), flat, 2 * flat, flat[None]).areas["most_first"]
        2.0
    """

    shares: Float[Tensor, " point"]
    least_first: Float[Tensor, " point"]
    most_first: Float[Tensor, " point"]
    random: Float[Tensor, "order point"]

    @property
    def areas(self) -> dict[str, float]:
        """The area under each curve, by the trapezoidal rule; of the random orders, the mean."""
        curves = {"least_first": self.least_first, "most_first": self.most_first, "random": self.random.mean(0)}
        return {name: float(torch.trapezoid(curve, self.shares)) for name, curve in curves.items()}


class Perturbed(NamedTuple):
    """The loss with one parameter, or one neuron's part of it, shifted.

    Attributes:
        name: The parameter; of one neuron, with its index, such as ``"conv1.weight[3]"``.
        loss: Mean loss while its weights were shifted.
        delta_loss: The same minus the mean loss of the unchanged model.
        neuron: The neuron's index, or None for the whole parameter.
    """

    name: str
    loss: float
    delta_loss: float
    neuron: int | None = None


@dataclass(frozen=True)
class PerturbationReport:
    """The loss under each perturbation, in the order of the model.

    Attributes:
        loss: Mean loss of the unchanged model.
        samples: Number of samples it was measured on.
        rows: One for each perturbation.
        settings: The settings of the study.
        notes: Notes on the data and the limits of the numbers.

    Example:
        >>> rows = (Perturbed("a.weight", 1.5, 0.5), Perturbed("b.weight", math.nan, math.nan))
        >>> [row.name for row in PerturbationReport(1.0, 8, rows[::-1], {}, ()).ranking()]
        ['a.weight', 'b.weight']
    """

    loss: float
    samples: int
    rows: tuple[Perturbed, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def ranking(self) -> list[Perturbed]:
        """Rank rows from the highest to the lowest loss.

        Returns:
            All rows; ties keep the model's order, NaN and infinity come last.
        """
        return sorted(self.rows, key=lambda row: -row.loss if math.isfinite(row.loss) else math.inf)

    def save(self, path: str | Path) -> None:
        """Write the ranking as JSON, whole or not at all; NaN becomes null, infinity a word."""
        document = {
            "format": "lightning_neurons perturbation",
            "version": 1,
            "loss": self.loss,
            "samples": self.samples,
            "settings": self.settings,
            "notes": list(self.notes),
            "ranking": [row._asdict() for row in self.ranking()],
        }
        write_whole(path, json.dumps(plain(document), allow_nan=False, indent=1))
