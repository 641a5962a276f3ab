"""The section on deadness, and on sensitivity by layer."""

import math

import torch

from lightning_neurons.report.figures.measurements import SELDOM
from lightning_neurons.report.html.parts import Cell, Column, Part, Section, Side, Table
from lightning_neurons.report.html.run_figures import layer_comparisons, threshold_figure
from lightning_neurons.report.html.run_folder import RunFolder
from lightning_neurons.report.html.wording import percent, whole
from lightning_neurons.report.numbers import THRESHOLDS, share
from lightning_neurons.results.neuron_report import NeuronReport


def deadness(run: RunFolder, *, drawing: bool) -> Section:
    """Return the section: dead neurons at other thresholds, and layers compared."""
    parts: list[Part] = []
    if any(len(silent) for silent in run.report.deadness_by.get("near_zero", {}).values()):
        figures = (threshold_figure(run.report),) if drawing else ()
        parts.append(Side((*figures, _thresholds(run.report))))
    compared = layer_comparisons(run.report, run.history) if drawing else []
    parts += [Side(tuple(compared))] if compared else []
    return Section("deadness", "Deadness and sensitivity", "", tuple(parts))


def _thresholds(report: NeuronReport) -> Table:
    columns = (
        Column("threshold", True, "magnitudes up to it count as silent, in units of each layer's root mean square"),
        Column("dead", numeric=True),
        Column("share", numeric=True),
        Column("silent in 99 %", True, f"neurons of which {SELDOM:.0%} of values or more are silent"),
    )
    rows = []
    for threshold in THRESHOLDS:
        silent = torch.cat(list(report.deadness_at(threshold).values()))
        dead, seldom = int((silent == 1).sum()), int((silent >= SELDOM).sum())
        part = share(dead, int((~silent.isnan()).sum()))
        rows.append((
            Cell(f"{threshold:g}", threshold),
            Cell(whole(dead), dead),
            Cell(percent(part), None if math.isnan(part) else part, share=part if part > 0 else None),
            Cell(whole(seldom), seldom),
        ))
    return Table("Dead neurons by threshold", columns, tuple(rows))
