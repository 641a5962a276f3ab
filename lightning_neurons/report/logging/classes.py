"""Class studies in loggers and on the console."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_neurons.report.figures.classes import CLASS_FIGURES
from lightning_neurons.report.figures.drawing import can_draw
from lightning_neurons.report.logging.images import can_show, show_figure
from lightning_neurons.results.class_report import ClassReport

_LOGGED = {
    "subnetwork": "classes/subnetwork/{}",
    "ablation": "classes/ablation/{}",
    "random subnetwork": "classes/random_subnetwork/{}",
}
_COLUMNS = {
    "whole": "whole",
    "subnetwork": "only its",
    "other subnetworks": "others'",
    "random subnetwork": "random",
    "ablation": "without its",
    "random ablation": "without random",
}


def write_classes(loggers: Sequence[Any], report: ClassReport, step: int, group: str = "classes") -> None:
    """Write a study to every logger: scalars to all, figures where they can be shown.

    Args:
        loggers: Lightning loggers.
        report: The study.
        step: The step to log at.
        group: The first part of the series' names.
    """
    values = {name.replace("classes", group, 1): value for name, value in class_scalars(report).items()}
    for logger in loggers:
        logger.log_metrics(values, step=step)
    if can_draw() and can_show(loggers):
        for name, draw in CLASS_FIGURES.items():
            show_figure(loggers, f"{group}/{name}", draw(report), step)


def class_scalars(report: ClassReport) -> dict[str, float]:
    """Return the scalar series: accuracies on each class's own samples, and neurons that all classes share."""
    series = {_LOGGED[row.model].format(row.klass): row.on_class for row in report.accuracies if row.model in _LOGGED}
    count = len(report.classes)
    excess = (report.jaccard - report.jaccard_chance).fill_diagonal_(0).sum() / max(count * (count - 1), 1)
    series["classes/reuse"] = float(excess)
    return {name: value for name, value in series.items() if not math.isnan(value)}


def print_classes(report: ClassReport, console: Console | None = None) -> None:
    """Print one line per class: accuracy on its own samples / on the others, of every kind of model."""
    console = console or Console()
    caption = "accuracy on the class's own samples / on the others, of networks of some neurons and without some"
    table = Table(title="Classes", caption=caption)
    table.add_column("class", justify="right")
    table.add_column("neurons", justify="right")
    kinds = [kind for kind in _COLUMNS if any(row.model == kind for row in report.accuracies)]
    for kind in kinds:
        table.add_column(_COLUMNS[kind], justify="right")
    for klass in report.classes:
        rows = [report.accuracy(kind, klass) for kind in kinds]
        neurons = sum(map(len, report.subnetwork(klass).values()))
        table.add_row(str(klass), str(neurons), *(f"{row.on_class:.2f}/{row.on_others:.2f}" for row in rows))
    console.print(table)
    for note in report.notes:
        console.print(note, highlight=False, markup=False)
