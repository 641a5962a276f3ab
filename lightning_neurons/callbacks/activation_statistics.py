"""Callback that measures activity and deadness of every neuron in the forwards that validation makes anyway."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_neurons.callbacks.observing.observer import NeuronObserver
from lightning_neurons.callbacks.trainer.checks import lightning_errors
from lightning_neurons.criteria import ACTIVATION_CRITERIA, Criterion
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.errors import ArgumentError, check_count, check_flag
from lightning_neurons.layers.layer import Pattern
from lightning_neurons.measurement.settings import MeasurementSettings


class ActivationStatisticsCallback(NeuronObserver):
    """Measure activity and deadness of every neuron in the forwards that validation (or testing) makes anyway.

    Uses the module's own forward; only where a part of the module is compiled, each batch is run once more,
    uncompiled. Several dataloaders are measured together.

    Args:
        criteria: Names or ``Criterion`` objects that need activations or weights only.
        layers: None for all, or patterns of paths (``"net.layer1.*"``), names of classes or module types.
        every_n_epochs: Epochs between measurements during ``fit``.
        per_class: Keep classes apart: True finds the targets in the batch, a function gives them.
        threshold: Largest magnitude that counts as silent, in units of the layer's root mean square.
        relative_threshold: False takes ``threshold`` in activation units.
        normalize: How layers are made comparable in global rankings: ``"none"``, ``"sum"`` or ``"l2"``.
        max_figures: How many figures loggers that show figures or images get at each measurement, the most telling
            first; 0 for none. They need matplotlib, and about 0.13 s each.
        html: Write ``report.html`` into the log directory at the end: one file with everything, to send or to keep.
        log_metrics: Put the scalar series into ``trainer.callback_metrics`` as well, where other callbacks and the
            user find them. Those that early stopping, a checkpoint or a plateau scheduler monitors are always there.

    Raises:
        MisconfigurationException: If an argument is out of range (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import ActivationStatisticsCallback
        >>> callback = ActivationStatisticsCallback(layers=["net.*"], threshold=0.05)
        >>> # trainer = Trainer(callbacks=[callback]); trainer.fit(module); callback.report.deadness["net.conv1"]
    """

    def __init__(
        self,
        *,
        criteria: Sequence[str | Criterion] | None = None,
        layers: Sequence[Pattern] | None = None,
        every_n_epochs: int = 1,
        per_class: bool | Callable[[Any], Tensor] = False,
        threshold: float = SILENT,
        relative_threshold: bool = True,
        normalize: Normalization = "none",
        max_figures: int = 8,
        html: bool = False,
        log_metrics: bool = False,
    ) -> None:
        with lightning_errors():
            settings = MeasurementSettings.checked(
                criteria=ACTIVATION_CRITERIA if criteria is None else criteria, layers=layers, per_class=per_class,
                threshold=threshold, relative_threshold=relative_threshold, normalize=normalize, inputs="clean",
                eps=0.0, loss_reduction="mean",
            )  # fmt: skip
            gradients = [c.name for c in settings.criteria if c.needs - {"activation"}]
            if gradients:
                raise ArgumentError.of(
                    "criteria", gradients, "criteria without gradients here; use NeuronSensitivityCallback"
                )
            self.max_figures, self.html = check_count("max_figures", max_figures, least=0), check_flag("html", html)
            self.log_metrics = check_flag("log_metrics", log_metrics)
            super().__init__(settings, every_n_epochs)
