"""Writing results into the Trainer's loggers and its log directory."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lightning_neurons.callbacks.trainer.namespaces import Trainer
from lightning_neurons.callbacks.trainer.outlet import keeping_training, numbered_observer, outlet_of
from lightning_neurons.report.console.tables import print_report
from lightning_neurons.report.figures.choice import report_figures
from lightning_neurons.report.figures.drawing import can_draw
from lightning_neurons.report.html.page import write_html
from lightning_neurons.report.logging.images import can_show, show_figure
from lightning_neurons.report.logging.loggers import write_loggers
from lightning_neurons.report.logging.tags import with_suffix, write_layout
from lightning_neurons.results.history import HistoryEntry, NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.whole_file import Place, inside

if TYPE_CHECKING:
    from lightning_neurons.callbacks.observing.observer import NeuronObserver

_PACKAGES = ("lightning_neurons", "lightning", "torch", "torchmetrics", "torch-pruning", "numpy")


def publish(trainer: Trainer, observer: "NeuronObserver", report: NeuronReport, entry: HistoryEntry) -> Place | None:
    """Write a report from the first process; nothing in a trial run. Call it in all processes.

    Returns:
        The folder of its files, if there are any.
    """
    outlet = outlet_of(trainer, epoch_is_over=trainer.training)
    if outlet is None:
        return None
    number = numbered_observer(trainer, observer)
    suffix = number + outlet.apart
    for logger in outlet.loggers:
        with keeping_training(observer, "the report was not written everywhere"):
            write_loggers([logger], report, entry, outlet.step, suffix)
        with keeping_training(observer, "the page of custom scalars was not laid out"):
            write_layout([logger])
    if outlet.folder is not None:
        with keeping_training(observer, "the report was not written to the log directory"):
            report.save(inside(outlet.folder, f"neurons{number}.json"))
            if trainer.state.fn == "fit":
                observer.history.save(inside(outlet.folder, f"history{number}.json"), _versions())
    if observer.max_figures and can_draw() and can_show(outlet.loggers):
        with keeping_training(observer, "not all figures were drawn"):
            history = observer.history if trainer.state.fn == "fit" else NeuronHistory()
            for tag, figure in report_figures(report, history, observer.max_figures):
                show_figure(outlet.loggers, with_suffix(tag, suffix), figure, outlet.step)
    return outlet.folder


def show(trainer: Trainer, observer: "NeuronObserver") -> None:
    """Print the latest report at the end of a run, and write the page if that was asked for. Call it everywhere."""
    outlet = outlet_of(trainer)
    report = observer.report
    if not trainer.is_global_zero or report is None:
        return
    print_report(report, observer.history if trainer.state.fn == "fit" else NeuronHistory())
    if outlet is None:
        return
    for logger in outlet.loggers:  # someone may have laid out a page since
        with keeping_training(observer, "the page of custom scalars was not laid out"):
            write_layout([logger])
    if outlet.folder is None:
        return
    print(f"neurons{numbered_observer(trainer, observer)}.json is in {outlet.folder}")
    if observer.html:
        again = f"no report.html (python -m lightning_neurons report {outlet.folder} writes it later)"
        with keeping_training(observer, again):
            print(f"wrote {write_html(outlet.folder)}")


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that the numbers were made with."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
