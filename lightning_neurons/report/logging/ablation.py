"""Ablations in loggers and on the console."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_neurons.ablation.screening import OracleAgreement
from lightning_neurons.report.logging.text_page import table
from lightning_neurons.results.ablation_report import AblatedNeuron, AblationReport

_SHOWN = 10


def write_ablation(
    loggers: Sequence[Any], report: AblationReport, agreement: OracleAgreement, step: int, group: str = "ablation"
) -> None:
    """Write a measurement to every logger: scalars to all, histograms and a table where they can be shown.

    Args:
        loggers: Lightning loggers.
        report: The measurement.
        agreement: Of the criterion with it.
        step: The step to log at.
        group: The first part of the series' names.
    """
    values = {name.replace("ablation", group, 1): value for name, value in ablation_scalars(report, agreement).items()}
    for logger in loggers:
        logger.log_metrics(values, step=step)
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            for layer, deltas in report.delta_loss.items():
                if len(finite := deltas[deltas.isfinite()]):
                    experiment.add_histogram(f"{group}/delta_loss/{layer}", finite, step)
        if hasattr(experiment, "add_text"):
            experiment.add_text(f"{group}/ranking", ranking_page(report), step)


def ablation_scalars(report: AblationReport, agreement: OracleAgreement) -> dict[str, float]:
    """Return the scalar series; those without a value (NaN) are left out."""
    series = {
        "ablation/loss": report.loss,
        "ablation/agreement": agreement.same_data,
        "ablation/agreement_held_out": agreement.held_out,
        "ablation/reliability": agreement.reliability,
    }
    return {name: value for name, value in series.items() if not math.isnan(value)}


def ranking_page(report: AblationReport) -> str:
    """Return both ends of the ranking, as Markdown."""
    rows = [
        (f"`{row.layer}`", row.neuron, f"{row.delta_loss:+.4g}", f"{row.standard_error:.2g}") for row in _ends(report)
    ]
    return f"### Change of the loss without a neuron (loss {report.loss:.4g})\n\n" + table(
        ("layer", "neuron", "change", "standard error"), rows
    )


def print_ablation(
    report: AblationReport, agreement: OracleAgreement, criterion: str, console: Console | None = None
) -> None:
    """Print both ends of the ranking, and the agreement of the criterion with it."""
    console = console or Console()
    ends = Table(title="Loss without a neuron", caption=f"loss with all of them: {report.loss:.4g}")
    ends.add_column("layer", overflow="fold")
    for heading in ("neuron", "change", "standard error"):
        ends.add_column(heading, justify="right")
    for row in _ends(report):
        ends.add_row(escape(row.layer), str(row.neuron), f"{row.delta_loss:+.4g}", f"{row.standard_error:.2g}")
    console.print(ends)
    console.print(
        f"{criterion} agrees with the measured change of {agreement.neurons} neurons: {_number(agreement.same_data)} "
        f"(Spearman) on the same samples, {_number(agreement.held_out)} on others; the measurement agrees with itself: "
        f"{_number(agreement.reliability)}",
        highlight=False,
    )
    for note in report.notes:
        console.print(note, highlight=False, markup=False)


def _ends(report: AblationReport) -> list[AblatedNeuron]:
    ranking = report.ranking()
    return ranking if len(ranking) <= 2 * _SHOWN else [*ranking[:_SHOWN], *ranking[-_SHOWN:]]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
