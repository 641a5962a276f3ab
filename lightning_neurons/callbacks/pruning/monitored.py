"""The monitored metric of a pruning callback: as it is logged, and on kept samples."""

from typing import Any

from torch import Tensor

from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer, callbacks_of
from lightning_neurons.callbacks.trainer.runner import KeptBatches, metric_on


class MonitoredMetric:
    """A logged metric, each new value of which is received once, whether training or validation logs it.

    Values are those of the first process, as the metric may not be synchronised.

    Args:
        name: Its name; None for no metric.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._last: Tensor | None = None

    def new_value(self, trainer: Trainer) -> float | None:
        """Return the value if it was logged since the last call, else None. Call it in all processes."""
        if self.name is None:
            return None
        # Lightning makes a new tensor of every value, and keeps it until the next.
        value = trainer.callback_metrics.get(self.name)
        is_new = value is not None and value is not self._last
        self._last = value
        is_new, value_of_first = trainer.strategy.broadcast((is_new, None if value is None else float(value)), 0)
        return value_of_first if is_new and not trainer.sanity_checking else None

    def now(self, trainer: Trainer, pl_module: LightningModule, kept: KeptBatches) -> float | None:
        """Compute the metric of the network that validation uses: with averaged weights, that of the average.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            kept: Validation samples.

        Returns:
            The metric on the kept samples of all processes, or None if it cannot be known.

        Raises:
            PruningError: If it could not be measured in some process; in every process.
        """
        # What all processes do together must not depend on what one of them has seen.
        if self.name is None or not trainer.strategy.broadcast(kept.samples > 0, 0):
            return None
        averaging = [c for c in _averaging(trainer) if c._average_model is not None]
        for callback in averaging:
            callback._swap_models(pl_module)
        try:
            return metric_on(trainer, pl_module, kept, self.name)
        finally:
            for callback in reversed(averaging):
                callback._swap_models(pl_module)


def _averaging(trainer: Trainer) -> list[Any]:
    """Return the callbacks that keep an average of the weights, and validate it in the place of the model."""
    return [callback for callback in callbacks_of(trainer) if hasattr(callback, "_swap_models")]
