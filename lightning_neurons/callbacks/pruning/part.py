"""The protocol of the parts of the pruning callback, and what they see of a fit.

``Pruner`` holds the parts (decider, ablation check, guard, distiller) and asks all of them at each point of a round, in
this order::

    on_fit_start -> on_train_start -> [on_epoch_start -> before_cut -> during_cut -> after_epoch_start]
                                   -> on_metric -> on_decide -> ... -> leave

``on_decide`` and ``before_cut`` may refuse the cut: they return a reason.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from lightning_neurons.callbacks.pruning.samples import Samples
from lightning_neurons.callbacks.pruning.settings import PruningSettings
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.outlet import Outlet, keeping_training, outlet_of
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.rounds import PruningRound, Rounds
from lightning_neurons.pruning.surgery.surgery import Operation
from lightning_neurons.report.figures.drawing import can_draw
from lightning_neurons.report.figures.history import pruning_progress
from lightning_neurons.report.logging.images import can_show, show_figure
from lightning_neurons.report.logging.pruning import pruning_history, write_scalars
from lightning_neurons.report.logging.tags import with_suffix
from lightning_neurons.results.whole_file import inside


class Host(Protocol):
    """The callback, as its parts see it."""

    loss_fn: LossFunction | None

    @property
    def pruning(self) -> PruningSettings:
        """The settings."""

    @property
    def rounds(self) -> Rounds:
        """The cuts so far, and the one that is decided."""

    def _warn(self, message: str, once: str | None = None) -> None: ...


@dataclass(frozen=True, eq=False)
class Fit:
    """What the parts see of a fit, at one point of it.

    Attributes:
        callback: The callback.
        trainer: The Trainer.
        pl_module: Its module.
        samples: What the latest validation has left to decide with.
        parts: All parts, for what one of them has to tell the others.
    """

    callback: Host
    trainer: Trainer
    pl_module: LightningModule
    samples: Samples
    parts: tuple["Part", ...]

    @property
    def who(self) -> str:
        """The callback's name, for messages."""
        return type(self.callback).__name__

    @property
    def settings(self) -> PruningSettings:
        """The callback's settings."""
        return self.callback.pruning

    @property
    def rounds(self) -> Rounds:
        """The rounds so far; parts change them in place."""
        return self.callback.rounds

    def warn(self, message: str, once: str | None = None) -> None:
        """Warn, unless the same message (or the same ``once``) has been given before."""
        self.callback._warn(message, once)

    def write(self, values: dict[str, float]) -> None:
        """Write series of pruning to the loggers, and the rounds to the log directory. Call it in all processes."""
        with keeping_training(self.callback, "not all of pruning was written"):
            if (outlet := outlet_of(self.trainer)) is not None:
                _write_rounds(outlet, self.callback, values)


class Part:
    """One concern of the pruning callback; what it does not override does nothing.

    Parts are final, hold no reference to a Trainer between two fits, and know each other only through ``Fit.parts``.
    Their state in checkpoints lies under keys of their own in that of the callback.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into checkpoints, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; keys that are missing are those of an older one.

        Args:
            state: The state of the whole callback.

        Raises:
            ValueError: If a value is not what it has to be.
        """

    def forget(self) -> None:
        """Drop what belongs to another module than the one that is trained now."""

    def adopt(self) -> None:
        """Keep what belongs to rounds of other settings, and begin a schedule of one's own."""

    def on_setup(self, fit: Fit) -> None:
        """Warn of what will not work as asked, before anything runs."""

    def on_fit_start(self, fit: Fit, *, is_resumed: bool) -> None:
        """Prepare for a fit, of a checkpoint that has been restored or not."""

    def on_train_start(self, fit: Fit) -> None:
        """Prepare for the first batch."""

    def on_epoch_start(self, fit: Fit) -> None:
        """Judge what the last epoch has shown, before a cut is made."""

    def on_decide(self, fit: Fit, cut: Cut) -> str | None:
        """Look at a cut that is decided, at the end of a validation.

        Returns:
            The reason if it must not be made, else None.
        """
        return None

    def before_cut(self, fit: Fit, cut: Cut) -> str | None:
        """Prepare for a cut that is made now.

        Returns:
            The reason if it must not be made, else None.
        """
        return None

    def during_cut(self, fit: Fit, made: PruningRound, operation: Operation) -> None:
        """Record a cut as a part of the cut itself: what is kept in ``operation`` is taken back with it."""

    def during_undo(self, fit: Fit, operation: Operation) -> None:
        """Record that cuts were taken back, as a part of that; rounds are those that are left."""

    def after_epoch_start(self, fit: Fit, *, is_over: bool) -> None:
        """Go on after the cut, if there was one, with the epoch that begins.

        Args:
            fit: In an epoch that begins, or after the last.
            is_over: Whether no cut will follow, and none is recovering.
        """

    def on_metric(self, fit: Fit, value: float, epoch: int) -> None:
        """Take a new value of the monitored metric, logged at the end of an epoch."""

    def on_train_batch_end(self, fit: Fit) -> None:
        """Look at a training step that has been made."""

    def on_train_epoch_end(self, fit: Fit) -> None:
        """Look at a training epoch that has ended."""

    def leave(self) -> None:
        """Remove all hooks: the fit ends, or has failed."""


def _write_rounds(outlet: Outlet, callback: Host, values: dict[str, float]) -> None:
    for logger in outlet.loggers:
        with keeping_training(callback, "not all series of pruning were written"):
            named = {with_suffix(name, outlet.apart): value for name, value in values.items()}
            write_scalars([logger], named, outlet.step)
    history = pruning_history(callback.rounds, callback.pruning.monitor)
    if history is None:
        return
    with keeping_training(callback, "pruning.json and its figure were not written"):
        if outlet.folder is not None:
            history.save(inside(outlet.folder, "pruning.json"))
        if history.points and can_draw() and can_show(outlet.loggers):
            name = with_suffix("pruning/progress", outlet.apart)
            show_figure(outlet.loggers, name, pruning_progress(history).figure, outlet.step)
