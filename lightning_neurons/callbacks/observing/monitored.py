"""Observer that follows a logged metric, whether training or validation logs it."""

from typing import Any

from lightning_neurons.callbacks.observing.observer import NeuronObserver
from lightning_neurons.callbacks.trainer.validated_weights import forget_weights


class MonitoredObserver(NeuronObserver):
    """Observer that receives each new value of a metric once: the first process's, as it may not be synchronised."""

    _monitored: str | None = None
    _last: Any = None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember the value logged before: validation need not log the metric."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._look(trainer, trainer.current_epoch - 1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the metric if validation has logged it."""
        forget_weights(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the metric if training has logged it."""
        super().on_train_epoch_end(trainer, pl_module)
        self._look(trainer, trainer.current_epoch)

    def _look(self, trainer: Any, epoch: int) -> None:
        if self._monitored is None:
            return
        # Lightning makes a new tensor of every value, and keeps it until the next.
        value = trainer.callback_metrics.get(self._monitored)
        is_new = value is not None and value is not self._last
        self._last = value
        is_new, found = trainer.strategy.broadcast((is_new, None if value is None else float(value)), 0)
        if is_new and not trainer.sanity_checking:
            self._hear(trainer, found, epoch)

    def _hear(self, trainer: Any, value: float, epoch: int) -> None:
        """Handle a value that was logged at the end of an epoch."""
