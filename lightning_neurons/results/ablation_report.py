"""Result of an ablation study: the change of the loss without each neuron."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from jaxtyping import Float
from torch import Tensor

from lightning_neurons.errors import UnknownNameError
from lightning_neurons.results.plain import floats, plain
from lightning_neurons.results.typed import typed
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

        Raises:
            ArgumentError: If the file is no such report, or of a newer version.
        """
        with reading_document(path, FORMAT, VERSION, "AblationReport.save") as found:
            kinds = get_type_hints(cls)
            tensors = {name: dims for name, dims in _DIMENSIONS.items() if not name.endswith("metrics")}
            values: dict[str, Any] = {name: _by_layer(found[name], dims) for name, dims in tensors.items()}
            for name in _DIMENSIONS.keys() - tensors.keys():
                values[name] = {m: _by_layer(by, _DIMENSIONS[name]) for m, by in found[name].items()}
            plain_ones = [one.name for one in fields(cls) if one.name not in values]
            values |= {name: typed(kinds[name], found[name], name) for name in plain_ones}
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
    found = {name: floats(values) for name, values in entries.items()}
    if any(values.ndim != dimensions for values in found.values()):
        raise ValueError(f"numbers have {dimensions} axes")
    return found


def _check_widths(values: Mapping[str, Any]) -> None:
    """Check that every number belongs to a neuron."""
    widths = {layer: len(deltas) for layer, deltas in values["delta_loss"].items()}
    groups = [values[name] for name in ("standard_error", "per_class", "per_class_error")]
    groups += [*values["delta_metrics"].values(), *values["per_class_metrics"].values()]
    if values["standard_error"].keys() != widths.keys():
        raise ValueError("not every layer has a standard error")
    for layer, found in ((layer, found) for group in groups for layer, found in group.items()):
        if found.shape[-1] != widths.get(layer):
            raise ValueError(f"{layer!r} does not have one number for each of its neurons")
    for layer, neurons in values["undecided"].items():
        if not all(0 <= neuron < widths.get(layer, 0) for neuron in neurons):
            raise ValueError(f"{layer!r} does not have all of these neurons")
