"""Destination of a callback's results: the loggers and their step, the folder, and the suffix of names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from lightning_neurons.callbacks.trainer.folders import apart, folder_of
from lightning_neurons.callbacks.trainer.namespaces import (
    EitherCallback,
    LightningModule,
    Trainer,
    callbacks_of,
    is_fast_dev_run,
    running,
)
from lightning_neurons.results.whole_file import Place


class Notice:
    """A message that a callback shares with its copies: the place of the last report that one of them made."""

    def __init__(self) -> None:
        self.hint: str | None = None

    def __deepcopy__(self, memo: Any) -> "Notice":
        return self

    def leave(self, folder: Any) -> None:
        """Set the message to the place of the report.

        Args:
            folder: With its files; None if there are none.
        """
        where = "it wrote no files" if folder is None else f"its files are in {folder} (NeuronReport.load)"
        self.hint = (
            "this callback has measured nothing, but a copy of it has (some tools copy the callbacks that they are "
            f"given): {where}"
        )


class Outlet(NamedTuple):
    """The destination of results.

    Attributes:
        loggers: Lightning loggers.
        step: The step at which to log: that at which Lightning logs the validation.
        folder: For files, or None.
        apart: The suffix of series that are not those of the first fit in a log directory: ``"_fit_2"``, ``"_test"``,
            or nothing.
    """

    loggers: Sequence[Any]
    step: int
    folder: Place | None
    apart: str


def outlet_of(trainer: Trainer, *, epoch_is_over: bool = False) -> Outlet | None:
    """Return the destination; None in a trial run and in processes but the first. Call it in all processes.

    Args:
        trainer: The Trainer.
        epoch_is_over: Whether the results are those of a training epoch that has just ended.
    """
    (folder, fit), stage = folder_of(trainer), apart(trainer)
    if not trainer.is_global_zero or is_fast_dev_run(trainer) or not (trainer.loggers or folder):
        return None
    return Outlet(trainer.loggers, step_of(trainer, epoch_is_over=epoch_is_over), folder, fit + stage)


def step_of(trainer: Trainer, *, epoch_is_over: bool = False) -> int:
    """Return the step at which Lightning has logged the last validation (or test).

    That is not ``global_step``, which counts the steps of all optimizers; and a module may log a step of its own under
    the name ``step``. It is known from ``on_validation_end`` on.
    """
    training = trainer.fit_loop.epoch_loop
    loop = {"validate": trainer.validate_loop, "test": trainer.test_loop}.get(running(trainer), training.val_loop)
    logged = trainer._logger_connector._logged_metrics.get("step")  # its property would compute metrics too early
    if logged is not None and any(map(_is_step, (loop._results or training._results).values())):
        return int(logged)
    return int(training._batches_that_stepped) - epoch_is_over  # Lightning logs an epoch at its last batch


def _is_step(result: Any) -> bool:
    meta = result.meta
    several = meta.add_dataloader_idx and meta.dataloader_idx is not None  # then Lightning gives it another name
    return bool(meta.logger and meta.on_epoch and not several and meta.forked_name(on_step=False) == "step")


def numbered(trainer: Trainer, callback: EitherCallback, kind: type) -> str:
    """Return the suffix of a callback's files and series among those of its kind: none for the first, then ``"_2"``."""
    return _suffix([one for one in callbacks_of(trainer) if isinstance(one, kind)], callback)


def numbered_observer(trainer: Trainer, observer: EitherCallback) -> str:
    """Return the suffix, as ``numbered``, of an observer of neurons; those with sensitivities come first."""
    observers: list[Any] = [one for one in callbacks_of(trainer) if getattr(one, "publishes", False)]
    in_order = sorted(observers, key=lambda one: not one.max_samples)
    return _suffix(in_order, observer)


def _suffix(callbacks: Sequence[object], callback: object) -> str:
    place = next((i for i, one in enumerate(callbacks) if one is callback), len(callbacks))
    return f"_{place + 1}" if place else ""


def monitored(trainer: Trainer, group: str) -> set[str]:
    """Return the series of a group that early stopping, a checkpoint or a plateau scheduler monitors."""
    names = [getattr(one, "monitor", None) for one in (*callbacks_of(trainer), *trainer.lr_scheduler_configs)]
    return {name for name in names if isinstance(name, str) and name.startswith(f"{group}/")}


def offer(
    trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float], group: str, *, everything: bool = False
) -> None:
    """Put series into ``trainer.callback_metrics``: all, or those that are monitored. Call it in all processes.

    Nothing is logged by this. Where a monitored series is missing all are put there, for Lightning's message to list.
    """
    followed = monitored(trainer, group)
    everything = everything or bool(followed - values.keys())
    chosen = {name: value for name, value in values.items() if everything or name in followed}
    if chosen:
        pl_module.log_dict(chosen, logger=False, sync_dist=True, batch_size=1)


class Warner(Protocol):
    """A callback that warns of the same thing once."""

    def _warn(self, message: str, once: str | None = None) -> None: ...


@contextmanager
def keeping_training(callback: Warner, what: str, kind: str | None = None) -> Iterator[None]:
    """Turn errors, such as a full disk or a figure that cannot be drawn, into a warning, once for each ``kind``."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        callback._warn(f"{what}: {type(error).__name__}: {error}", once=f"{kind or what}: {type(error).__name__}")
