"""Where a report goes at the end of a measurement: the Trainer's loggers and its log directory."""

from pathlib import Path
from typing import Any

from lightning_neurons.report.loggers import write_loggers
from lightning_neurons.results.history import HistoryEntry
from lightning_neurons.results.neuron_report import NeuronReport


def publish(trainer: Any, observer: Any, report: NeuronReport, entry: HistoryEntry) -> None:
    """Write a report from the first process; nothing without loggers or in a trial run. Call it in all processes."""
    directory = trainer.log_dir  # asks all processes
    if not trainer.is_global_zero or trainer.fast_dev_run or not trainer.loggers:
        return
    write_loggers(trainer.loggers, report, entry, trainer.global_step)
    if directory is not None:
        # Of several observers, the first with sensitivities writes neurons.json; the others are numbered.
        observers = [c for c in trainer.callbacks if getattr(c, "publishes", False)]
        place = sorted(observers, key=lambda c: not c.max_samples).index(observer)
        report.save(Path(directory) / (f"neurons_{place + 1}.json" if place else "neurons.json"))
