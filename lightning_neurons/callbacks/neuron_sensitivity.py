"""Callback that measures which neurons are dead and which matter."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_neurons.callbacks.observing.observer import NeuronObserver
from lightning_neurons.callbacks.trainer.checks import Step, lightning_errors
from lightning_neurons.criteria import ACTIVATION_CRITERIA, GRADIENT_CRITERIA, Criterion
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.errors import ArgumentError, check_choice, check_count, check_flag
from lightning_neurons.layers.layer import Pattern
from lightning_neurons.measurement.losses import LossReduction
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.measurement.settings import Inputs, MeasurementSettings

Source = Literal["val", "train"]


class NeuronSensitivityCallback(NeuronObserver):
    """Measure activity, deadness and the loss's sensitivity to every neuron. No argument is needed.

    Activity and deadness come from the module's own validation forward. For sensitivity, a bounded sample of the
    validation data is run again with gradients with respect to activations, in isolation: what ``validation_step``
    logs, appends, draws or counts meanwhile is undone. Works in ``fit``, ``validate`` and ``test``.

    Args:
        loss_fn: Called with the module and a batch; what it returns is differentiated. None takes what
            ``validation_step`` (``test_step``) returns or logs as a loss, or else the only differentiable number that
            it returns or logs. Without any, activity and deadness are measured, and a warning says so.
        loss_reduction: How that loss is reduced over a batch: ``"mean"``, ``"sum"``, or ``"none"`` (one per sample).
        max_samples: The most samples that are run with gradients, spread over the data and over the classes. Where the
            loss of a batch is not that of its samples (contrastive losses, weights of classes, one bag or graph a
            batch), whole batches are taken as they come, at least one.
        every_n_epochs: Epochs between measurements during ``fit``.
        layers: None for all, or patterns of paths (``"net.layer1.*"``), names of classes or module types.
        criteria: Names or ``Criterion`` objects. Rankings, tables and figures go by the first of ``taylor``,
            ``fisher``, ``second_order_ggn``, ``second_order`` and ``taylor_fo`` among them, else by the first that
            looks at gradients or weights.
        per_class: Keep classes apart: True finds the targets in the batch, a function gives them.
        normalize: How layers are made comparable in global rankings: ``"none"``, ``"sum"`` or ``"l2"``.
        threshold: Largest magnitude that counts as silent, in units of the layer's root mean square.
        relative_threshold: False takes ``threshold`` in activation units.
        source: ``"train"`` measures training batches during ``fit``, in evaluation mode, with the weights of the step
            that used them; everything then comes from the sample.
        step: Where the loss comes from without ``loss_fn``: ``"training"`` takes that of ``training_step``, run in
            isolation and in evaluation mode on the batches of ``source``, for modules whose ``validation_step`` has
            none. Not for manual optimization.
        inputs: ``"fgsm"`` measures sensitivity on inputs shifted against the module.
        eps: Size of that shift, in units of the inputs.
        max_figures: How many figures loggers that show figures or images get at each measurement, the most telling
            first; 0 for none. They need matplotlib, and about 0.13 s each.
        html: Write ``report.html`` into the log directory at the end: one file with everything, to send or to keep.
        log_metrics: Put the scalar series into ``trainer.callback_metrics`` as well, where other callbacks and the
            user find them. Those that early stopping, a checkpoint or a plateau scheduler monitors are always there.

    Raises:
        MisconfigurationException: If an argument is out of range (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import NeuronSensitivityCallback
        >>> callback = NeuronSensitivityCallback()
        >>> # trainer = Trainer(callbacks=[callback]); trainer.fit(module)
        >>> # callback.report.scores["taylor"]["net.conv1"], callback.report.ranking()[:10]
    """

    def __init__(
        self,
        *,
        loss_fn: LossFunction | None = None,
        loss_reduction: LossReduction = "mean",
        max_samples: int = 512,
        every_n_epochs: int = 1,
        layers: Sequence[Pattern] | None = None,
        criteria: Sequence[str | Criterion] | None = None,
        per_class: bool | Callable[[Any], Tensor] = False,
        normalize: Normalization = "none",
        threshold: float = SILENT,
        relative_threshold: bool = True,
        source: Source = "val",
        step: Step = "validation",
        inputs: Inputs = "clean",
        eps: float = 0.0,
        max_figures: int = 8,
        html: bool = False,
        log_metrics: bool = False,
    ) -> None:
        with lightning_errors():
            settings = MeasurementSettings.checked(
                criteria=ACTIVATION_CRITERIA + GRADIENT_CRITERIA if criteria is None else criteria, layers=layers,
                per_class=per_class, threshold=threshold, relative_threshold=relative_threshold, normalize=normalize,
                inputs=inputs, eps=eps, loss_reduction=loss_reduction,
            )  # fmt: skip
            self.max_samples = check_count("max_samples", max_samples)
            self.source = check_choice("source", source, get_args(Source))
            self.step = check_choice("step", step, get_args(Step))
            if loss_fn is not None and not callable(loss_fn):
                raise ArgumentError.of("loss_fn", loss_fn, "a function (module, batch) -> loss")
            self.loss_fn = loss_fn
            self.max_figures, self.html = check_count("max_figures", max_figures, least=0), check_flag("html", html)
            self.log_metrics = check_flag("log_metrics", log_metrics)
            super().__init__(settings, every_n_epochs)
