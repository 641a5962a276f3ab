"""The numbers that people look at, from a report: one row per layer. Every output shows the same."""

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_neurons.criteria import effective_number, share_of_top
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.rankings import best_first, dead_in

TOP_SHARE = 0.1
THRESHOLDS = (0.001, 0.01, 0.05, 0.1, 0.5)
"""Thresholds, in units of a layer's root mean square, for which deadness is shown."""


@dataclass(frozen=True)
class LayerRow:
    """What one line of a table says of a layer.

    Attributes:
        layer: Its path.
        neurons: How many it has.
        dead: How many never fired; None if deadness was not measured.
        dormant: How many are tau-dormant; None if not measured.
        constant: How many never change; None if not measured.
        most: The most important neurons, best first; empty if no importance was measured.
        least: The least important, worst first.
        top_share: The part of the layer's importance that its top 10 % of neurons hold; NaN if not measured.
        effective: The effective number of important neurons; NaN if not measured.
    """

    layer: str
    neurons: int
    dead: int | None
    dormant: int | None
    constant: int | None
    most: tuple[int, ...]
    least: tuple[int, ...]
    top_share: float
    effective: float


def layer_rows(report: NeuronReport, shown: int = 3) -> list[LayerRow]:
    """One row per layer that ran, in the order of the model; ``shown`` neurons at each end of the ranking."""
    scores = report.importance() if report.scores else {}
    rows = []
    for name, counts in report.counts.items():
        ranked = _ranked(report, scores[name], name) if name in scores else []
        rows.append(
            LayerRow(
                layer=name,
                neurons=len(counts.samples),
                dead=int(report.dead(name).sum()) if name in report.deadness else None,
                dormant=_count(report, "dormant", name),
                constant=_count(report, "constant", name),
                most=tuple(ranked[:shown]),
                least=tuple(ranked[::-1][:shown]),
                top_share=share_of_top(scores[name], TOP_SHARE) if name in scores else math.nan,
                effective=effective_number(scores[name]) if name in scores else math.nan,
            )
        )
    return rows


def _ranked(report: NeuronReport, scores: Tensor, layer: str) -> list[int]:
    """The neurons of a layer that were measured, best first."""
    places = best_first(scores, dead_in({(layer,): scores}, report.deadness))
    return places[~scores[places].isnan()].tolist()


def _count(report: NeuronReport, measure: str, layer: str) -> int | None:
    measured = report.deadness_by.get(measure, {}).get(layer)
    return None if measured is None else int((measured == 1).sum())


def what_is_ranked(report: NeuronReport) -> str:
    """What a ranking over all layers leaves out, and what counts as one in it; nothing if there is no such thing."""
    outputs = [layer.name for layer in report.layers if layer.output and layer.name in report.counts]
    words = (
        [f"the model's outputs ({', '.join(outputs)}) are left out"] if 0 < len(outputs) < len(report.counts) else []
    )
    if any(layer.twins for layer in report.layers):
        words.append("neurons that are summed into one residual stream are one entry, with the mean of their scores")
    return "; ".join(words)


def share(part: int, whole: int) -> float:
    """``part`` of ``whole``; NaN of nothing."""
    return part / whole if whole else math.nan
