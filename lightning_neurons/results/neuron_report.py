"""Result of a measurement as one frozen value, with rankings and selections as methods."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_neurons.criteria.contract import known_deadness
from lightning_neurons.criteria.deadness import check_threshold, exact_at_the_end, never_fired_bound
from lightning_neurons.criteria.ranking import Normalization, normalize, select
from lightning_neurons.errors import ArgumentError, UnknownNameError, check_choice, check_flag
from lightning_neurons.layers.layer import Layer
from lightning_neurons.metrics.histogram import share_at_most
from lightning_neurons.results import rankings, report_json
from lightning_neurons.results.rankings import RankedNeuron

RankingScope = Literal["layer", "global"]


@dataclass(frozen=True, eq=False)
class LayerCounts:
    """Counts of the data behind the numbers of one layer.

    Attributes:
        samples: Samples that were finite and have been counted, by neuron.
        gradient_samples: The same in the sensitivity pass.
        values: Single values (samples x positions), by neuron.
        nonfinite: Samples that were NaN or infinite, in the forward or in the sensitivity pass, and were left out, by
            neuron.
        left_out: Of these, the samples whose activation was.
        rms: Root mean square of the whole layer's values, or None if it was not measured.
        largest: Largest magnitude by neuron, or None if it was not measured.
        histogram: Counts of magnitudes by neuron, in the bins of ``metrics/histogram.py``; empty if not measured.
    """

    samples: Int[Tensor, " neuron"]
    gradient_samples: Int[Tensor, " neuron"]
    values: Int[Tensor, " neuron"]
    nonfinite: Int[Tensor, " neuron"]
    left_out: Int[Tensor, " neuron"]
    rms: float | None
    largest: Float[Tensor, " neuron"] | None
    histogram: Int[Tensor, "neuron_or_none bin"]


@dataclass(frozen=True, eq=False, repr=False)
class NeuronReport:
    """Scores, deadness and counts of every neuron. All tensors lie on the CPU.

    Attributes:
        layers: The layers, also those that did not run.
        scores: By criterion and layer, ``(neuron,)``; higher is more important (or more active).
        deadness_by: By measure and layer, ``(neuron,)`` in [0, 1]; 1 is dead.
        per_class: By criterion and layer, ``(class, neuron)``; NaN where a class had no samples. Empty if not asked
            for.
        class_counts: Samples by class.
        counts: By layer, counts of the data behind the numbers.
        refused: By criterion and layer, the reason why a layer has no score and what to use instead.
        settings: The settings of the measurement; plain values.
        notes: Notes on the data and the limits of the numbers, such as which samples were used.
        epoch: Epoch of the measurement, or None outside training.
        step: Optimizer steps so far, or None outside training.
    """

    layers: tuple[Layer, ...]
    scores: Mapping[str, Mapping[str, Tensor]]
    deadness_by: Mapping[str, Mapping[str, Tensor]]
    per_class: Mapping[str, Mapping[str, Tensor]]
    class_counts: tuple[int, ...]
    counts: Mapping[str, LayerCounts]
    refused: Mapping[str, Mapping[str, str]]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    epoch: int | None = None
    step: int | None = None

    def __repr__(self) -> str:
        neurons = sum(len(c.samples) for c in self.counts.values())
        measures = ", ".join([*self.scores, *self.deadness_by])
        return f"NeuronReport(epoch={self.epoch}, {len(self.counts)} layers, {neurons} neurons: {measures})"

    @property
    def main_criterion(self) -> str:
        """The criterion behind rankings that name none: that of ``criteria.main_criterion`` when it was measured."""
        name = self.settings.get("main_criterion")
        name = name if name in self.scores else next(iter(self.scores), None)
        if name is None:
            raise ArgumentError.of("criterion", None, "a report with at least one importance criterion")
        return str(name)

    @property
    def deadness(self) -> Mapping[str, Tensor]:
        """By layer, the share of values that are silent, by the main measure; 1 = never fires, NaN = unknown."""
        measure = "near_zero" if "near_zero" in self.deadness_by else next(iter(self.deadness_by), None)
        return {} if measure is None else self.deadness_by[measure]

    def dead(self, layer: str) -> Bool[Tensor, " neuron"]:
        """Return a mask of the neurons of a layer that never fired; False where that is not known, see ``unknown``."""
        silent: Tensor = self._layer(self.deadness, layer)
        return silent == 1

    def unknown(self, layer: str) -> Bool[Tensor, " neuron"]:
        """Return a mask of the neurons of a layer that may be dead or alive.

        No finite sample made them fire, and others, NaN or infinite, were left out; or there was no sample at all.
        """
        silent: Tensor = self._layer(self.deadness, layer)
        return silent.isnan()

    def dormant(self, layer: str) -> Bool[Tensor, " neuron"]:
        """Return a mask of the tau-dormant neurons of a layer; all False where that was not measured."""
        measured = self.deadness_by.get("dormant", {}).get(layer)
        nobody = torch.zeros_like(self._layer(self.counts, layer).samples, dtype=torch.bool)
        return nobody if measured is None else measured == 1

    def never_fired_bound(self, layer: str) -> Float[Tensor, " neuron"]:
        """Return the 95 % upper bound on the share of samples in which a neuron fires that never did: 3 / samples."""
        return never_fired_bound(self._layer(self.counts, layer).samples)

    def deadness_at(self, threshold: float, *, relative: bool = True) -> dict[str, Tensor]:
        """Compute deadness at any threshold, from the histograms, after the run.

        Args:
            threshold: In units of each layer's root mean square if ``relative``, else in activation units.
            relative: See ``threshold``.

        Returns:
            By layer, the share of values with a magnitude of at most the threshold (within 1 % of it); exactly 1 if no
            value exceeds it, and NaN where none of the finite ones does and others were left out.

        Raises:
            ArgumentError: If the threshold is out of range, or ``near_zero`` was not measured.
        """
        check_threshold(threshold)
        if "near_zero" not in self.deadness_by:
            raise ArgumentError.of("threshold", threshold, "a report whose criteria include 'near_zero'")
        deadness = {}
        for name, c in self.counts.items():
            assert c.rms is not None, "near_zero needs it"
            assert c.largest is not None, "near_zero needs it"
            limit = threshold * c.rms if relative else threshold
            dead = exact_at_the_end(share_at_most(c.histogram, limit), c.largest, limit, c.values)
            deadness[name] = known_deadness(dead, c.left_out)
        return deadness

    def importance(self, criterion: str | None = None, normalize_by: Normalization | None = None) -> dict[str, Tensor]:
        """Return scores by layer, higher more important, normalised; deadness measures count as 1 - deadness.

        Args:
            criterion: Any measured criterion; the main one if None.
            normalize_by: As in the report's settings if None.

        Returns:
            By layer, ``(neuron,)``; NaN where a neuron was not measured.

        Raises:
            UnknownNameError: If the criterion was not measured.
        """
        name = self.main_criterion if criterion is None else criterion
        if name not in self.scores and name not in self.deadness_by:
            raise UnknownNameError.among("criterion", str(name), [*self.scores, *self.deadness_by])
        alive = self.scores if name in self.scores else {name: {n: 1 - d for n, d in self.deadness_by[name].items()}}
        by_layer, in_loss_units = alive[name], name in self.settings.get("in_loss_units", ())
        how = self.settings.get("normalize", "none") if normalize_by is None else normalize_by
        return normalize(by_layer, how, in_loss_units=in_loss_units)

    def ranking(
        self,
        criterion: str | None = None,
        *,
        layer: str | None = None,
        normalize: Normalization | None = None,
        include_outputs: bool = False,
    ) -> list[RankedNeuron]:
        """Rank neurons from the most to the least important; of equal ones, those that fire come first.

        Over all layers, neurons that are summed into one residual stream are one entry (see ``RankedNeuron.twins``),
        and the model's outputs are left out unless there is nothing else.

        Args:
            criterion: Any measured criterion; the main one if None.
            layer: Rank within this layer; None ranks all neurons together.
            normalize: How layers are made comparable; as in the report's settings if None.
            include_outputs: Rank the neurons that make the model's output, such as logits, among all others.

        Returns:
            One entry per neuron: layer, index, score, and layers that it is summed with.

        Raises:
            UnknownNameError: If the criterion or the layer was not measured.
        """
        scores = self.importance(criterion, normalize)
        if layer is not None:
            return rankings.ranked(rankings.each_alone({layer: self._layer(scores, layer)}), self.deadness)
        entries = rankings.merged(scores, self.layers, include_outputs=check_flag("include_outputs", include_outputs))
        return rankings.ranked(entries, self.deadness)

    def select(
        self,
        criterion: str | None = None,
        *,
        scope: RankingScope = "layer",
        normalize: Normalization | None = None,
        share: float | None = None,
        count: int | None = None,
        threshold: float | None = None,
        cumulative: float | None = None,
        include_outputs: bool = False,
    ) -> dict[str, list[int]]:
        """Select the important neurons by layer, by exactly one of ``share``, ``count``, ``threshold``, ``cumulative``.

        Args:
            criterion: Any measured criterion; the main one if None.
            scope: Whether the rule holds within each layer or over all layers together; then neurons that are summed
                into one residual stream count once and are selected in all of its layers.
            normalize: How layers are made comparable; as in the report's settings if None.
            share: The top share, in [0, 1].
            count: The top ``count``.
            threshold: Scores of at least this.
            cumulative: The smallest top set that holds this share of the importance.
            include_outputs: With ``scope="global"``, let the neurons that make the model's output compete too.

        Returns:
            By layer, the indices of the chosen neurons in ascending order.

        Raises:
            ArgumentError: If not exactly one rule is given, or one is out of range.
            UnknownNameError: If the criterion was not measured.
        """
        check_choice("scope", scope, ("layer", "global"))
        check_flag("include_outputs", include_outputs)
        scores = self.importance(criterion, normalize)
        groups = [rankings.each_alone({name: s}) for name, s in scores.items()]
        if scope == "global":
            groups = [rankings.merged(scores, self.layers, include_outputs=include_outputs)]
        selected: dict[str, list[int]] = {name: [] for name in scores}
        for entries in groups:
            everything = torch.cat([torch.zeros(0), *entries.values()])
            places = rankings.best_first(everything, rankings.dead_in(entries, self.deadness))
            mask = torch.zeros(len(places), dtype=torch.bool)
            mask[places] = select(
                everything[places], share=share, count=count, threshold=threshold, cumulative=cumulative
            )
            selected |= rankings.chosen(entries, mask)
        return selected

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, one row per neuron: layer, neuron, every score and deadness measure.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("NeuronReport.to_frame needs pandas: pip install pandas") from error
        return pd.DataFrame(report_json.rows(self))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, whole or not at all; ``neurons`` in it has one readable entry per neuron."""
        report_json.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "NeuronReport":
        """Read what ``save`` wrote.

        Returns:
            A report equal to the one that was saved, on the CPU.

        Raises:
            ArgumentError: If the file is no such report, or of a newer version.
        """
        return cls(**report_json.load(path, LayerCounts))

    @staticmethod
    def _layer(by_layer: Mapping[str, Any], layer: str) -> Any:
        if layer not in by_layer:
            raise UnknownNameError.among("layer", layer, by_layer)
        return by_layer[layer]
