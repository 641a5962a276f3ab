"""Where results go: the Trainer's loggers and its log directory."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_neurons.report.console import print_report
from lightning_neurons.report.drawing import can_draw
from lightning_neurons.report.history_figures import pruning_progress
from lightning_neurons.report.html.page import write_html
from lightning_neurons.report.images import can_show, show_figure
from lightning_neurons.report.layout import write_layout
from lightning_neurons.report.loggers import write_loggers
from lightning_neurons.report.pruning import pruning_history, write_scalars
from lightning_neurons.report.report_figures import report_figures
from lightning_neurons.results.history import HistoryEntry
from lightning_neurons.results.neuron_report import NeuronReport

_PACKAGES = ("lightning_neurons", "lightning", "torch", "torchmetrics", "torch-pruning", "numpy")


def publish(trainer: Any, observer: Any, report: NeuronReport, entry: HistoryEntry) -> None:
    """Write a report from the first process; nothing without loggers or in a trial run. Call it in all processes."""
    directory = trainer.log_dir  # asks all processes
    if not trainer.is_global_zero or trainer.fast_dev_run or not trainer.loggers:
        return
    with _keeping_training(observer, "the report was not written everywhere"):
        write_layout(trainer.loggers)
        write_loggers(trainer.loggers, report, entry, trainer.global_step)
    with _keeping_training(observer, "the report was not written to the log directory"):
        if directory is not None:
            _write_files(trainer, observer, report, Path(directory))
    if observer.max_figures and can_draw() and can_show(trainer.loggers):
        with _keeping_training(observer, "not all figures were drawn"):
            for tag, figure in report_figures(report, observer.history, observer.max_figures):
                show_figure(trainer.loggers, tag, figure, trainer.global_step)


def _write_files(trainer: Any, observer: Any, report: NeuronReport, directory: Path) -> None:
    # Of several observers, the first with sensitivities writes neurons.json; the others are numbered.
    observers = [c for c in trainer.callbacks if getattr(c, "publishes", False)]
    place = sorted(observers, key=lambda c: not c.max_samples).index(observer)
    suffix = f"_{place + 1}" if place else ""
    report.save(directory / f"neurons{suffix}.json")
    if len(observer.history):
        observer.history.save(directory / f"history{suffix}.json", _versions())


@contextmanager
def _keeping_training(callback: Any, what: str) -> Iterator[None]:
    """A full disk, or a picture that cannot be drawn, must not stop training."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        rank_zero_warn(f"{type(callback).__name__}: {what}: {type(error).__name__}: {error}")


def show(trainer: Any, observer: Any) -> None:
    """Print the latest report at the end of a run, and write the page if that was asked for. Call it everywhere."""
    directory = trainer.log_dir  # asks all processes
    if not trainer.is_global_zero:
        return
    print_report(observer.report, observer.history)
    if observer.html and directory is not None and trainer.loggers and not trainer.fast_dev_run:
        again = f"no report.html (python -m lightning_neurons report {directory} writes it later)"
        with _keeping_training(observer, again):
            print(f"wrote {write_html(Path(directory))}")


def publish_rounds(trainer: Any, pruner: Any, values: dict[str, float]) -> None:
    """Write what pruning has done so far. Call it in all processes."""
    directory = trainer.log_dir if trainer.loggers else None  # asks all processes
    if not trainer.is_global_zero:
        return
    write_scalars(trainer.loggers, values, trainer.global_step)
    history = pruning_history(pruner.rounds, pruner.pruning.monitor)
    if history is None or trainer.fast_dev_run:
        return
    with _keeping_training(pruner, "pruning.json and its figure were not written"):
        if directory is not None:
            history.save(Path(directory) / "pruning.json")
        if history.points and can_draw() and can_show(trainer.loggers):
            show_figure(trainer.loggers, "pruning/progress", pruning_progress(history).figure, trainer.global_step)


def _versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
