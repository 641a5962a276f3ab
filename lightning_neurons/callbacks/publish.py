"""Where a report goes at the end of a measurement: the Trainer's loggers and its log directory."""

from pathlib import Path
from typing import Any

from lightning_neurons.report.loggers import write_loggers
from lightning_neurons.results.history import HistoryEntry
from lightning_neurons.results.neuron_report import NeuronReport


def publish(trainer: Any, report: NeuronReport, entry: HistoryEntry, file_name: str) -> None:
    """Write a report from the first process; nothing without loggers or in a trial run. Call it in all processes."""
    directory = trainer.log_dir  # asks all processes
    if not trainer.is_global_zero or trainer.fast_dev_run or not trainer.loggers:
        return
    write_loggers(trainer.loggers, report, entry, trainer.global_step)
    if directory is not None:
        report.save(Path(directory) / file_name)
