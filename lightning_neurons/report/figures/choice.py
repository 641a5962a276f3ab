"""Choice of the figures of a measurement for loggers, the most telling first."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning_neurons.report.figures.history import dead_history, magnitude_history
from lightning_neurons.report.figures.measurements import (
    activation_histogram,
    deadness_curve,
    deadness_grid,
    importance_bars,
    sensitivity_by_layer,
)
from lightning_neurons.results.history import NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport


def report_figures(report: NeuronReport, history: NeuronHistory, most: int) -> Iterator[tuple[str, Any]]:
    """Yield tags and figures, drawn one by one as they are asked for.

    Args:
        report: The measurement.
        history: All measurements so far.
        most: Largest number of figures. The whole network comes first, then its layers, those with the largest share of
            dead neurons first.
    """
    yield from islice(_figures(report, history), most)


def _figures(report: NeuronReport, history: NeuronHistory) -> Iterator[tuple[str, Any]]:
    if report.scores:
        yield "figures/importance", importance_bars(report).figure
        yield "figures/importance_by_layer", sensitivity_by_layer(report).figure
    if "near_zero" in report.deadness_by:
        yield "figures/deadness", deadness_curve(report).figure
    if len(history) > 1 and report.deadness:
        yield "figures/dead_history", dead_history(history).figure
    for layer in sorted(report.deadness, key=lambda name: -float(report.dead(name).double().mean())):
        yield f"figures/deadness_grid/{layer}", deadness_grid(report, layer).figure
        if len(history) and layer in history.entries[-1].magnitudes:
            yield f"figures/magnitudes/{layer}", magnitude_history(history, layer).figure
            yield f"figures/histogram/{layer}", activation_histogram(report, layer).figure
