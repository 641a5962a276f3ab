"""Callback that measures which neurons serve which classes, during training."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from lightning_neurons.callbacks.observing.sampled_study import SampledStudy
from lightning_neurons.callbacks.trainer.checks import lightning_errors, name_of
from lightning_neurons.callbacks.trainer.folders import apart
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.outlet import Outlet, keeping_training, numbered, offer
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.callbacks.trainer.steps import forward_of
from lightning_neurons.class_study.choice import ClassRule
from lightning_neurons.class_study.class_study import StudyMethod, checked_settings
from lightning_neurons.class_study.steps import ClassStudy
from lightning_neurons.errors import ArgumentError
from lightning_neurons.layers.layer import Pattern
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.report.figures.drawing import MISSING_MATPLOTLIB, can_draw
from lightning_neurons.report.logging.classes import class_scalars, print_classes, write_classes
from lightning_neurons.report.logging.tags import with_suffix
from lightning_neurons.results.class_report import ClassReport
from lightning_neurons.results.whole_file import inside


class ClassNeuronsCallback(SampledStudy):
    """Make a class study of a bounded sample of the validation data: see ``class_study``.

    Logged are, for every class, the accuracy on its own samples of its sub-network, of the network without it, and of
    random sub-networks of the same size, and the figures of ``report/figures/classes.py`` where there is matplotlib.
    ``classes.json`` goes into the log directory. Works in ``fit`` and ``validate``.

    Args:
        classes: The classes to study; None takes all that the sample has.
        method: ``"thresholding"``: importance from the samples of the class; ``"masking"``: the measured change of the
            class's loss without each neuron, which takes a run for each.
        importance: For thresholding, the name of a criterion.
        share: The most important share of each layer belongs to the class; 0.5 if no rule is given.
        threshold: Neurons of at least this importance belong to the class.
        cumulative: The fewest neurons of a layer that hold this share of its importance belong to the class.
        layers: None for all but the one that makes the logits; or patterns.
        replacement: The activation of neurons that are off: ``"zero"`` or their ``"mean"``.
        controls: Number of random sub-networks to compare with; classes with as many neurons share them.
        max_samples: How many validation samples are used, spread over the data and over the classes.
        every_n_epochs: Epochs between studies during ``fit``.
        forward: From the module and a batch to logits; None takes the module's forward on the batch's inputs, or its
            one network if it has none.
        seed: Of the random draws.

    Attributes:
        report: The latest ``ClassReport``, or None before the first.

    Raises:
        MisconfigurationException: If an argument is out of range (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import ClassNeuronsCallback
        >>> callback = ClassNeuronsCallback(share=0.3, every_n_epochs=5)
        >>> # trainer = Trainer(callbacks=[callback]); trainer.fit(module)
        >>> # callback.report.accuracy("subnetwork", 3).on_class, callback.report.subnetwork([3, 5])
    """

    def __init__(
        self,
        *,
        classes: Sequence[int] | None = None,
        method: StudyMethod = "thresholding",
        importance: str = "mean",
        share: float | None = None,
        threshold: float | None = None,
        cumulative: float | None = None,
        layers: Sequence[Pattern] | None = None,
        replacement: Literal["zero", "mean"] = "zero",
        controls: int = 3,
        max_samples: int = 512,
        every_n_epochs: int = 1,
        forward: Forward | None = None,
        seed: int = 0,
    ) -> None:
        with lightning_errors():
            self.settings = checked_settings(classes, method, importance, replacement, controls, layers, seed)
            self.rule = ClassRule(share, threshold, cumulative)
            if forward is not None and (not callable(forward) or isinstance(forward, nn.Module | type)):
                raise ArgumentError.of("forward", type(forward).__name__, "a function (module, batch) -> logits")
            self.forward = forward
            super().__init__(layers, every_n_epochs, max_samples)
        self.report: ClassReport | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; differs where settings differ."""
        layers = [one if isinstance(one, str) else one.__name__ for one in self.layers or ()]
        plain = {**self.settings, **self.rule.plain(), "layers": layers, "every_n_epochs": self.every_n_epochs}
        return self._generate_state_key(**plain, max_samples=self.max_samples, forward=name_of(self.forward))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any time has been spent."""
        super().setup(trainer, pl_module, stage)
        if not can_draw():
            self._warn(MISSING_MATPLOTLIB)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the latest study."""
        if self.report is None:
            self._warn("nothing has been measured")
        elif trainer.is_global_zero:
            with keeping_training(self, "the study was not shown"):
                print_classes(self.report)

    @property
    def _may_fail(self) -> bool:
        return self.forward is not None

    def _try(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> ClassReport | None:
        ClassStudy(pl_module, self.forward or forward_of(pl_module), self.settings, self.rule).check(batches[0])
        return None

    def _study(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> ClassReport:
        return ClassStudy(pl_module, self.forward or forward_of(pl_module), self.settings, self.rule).run(batches)

    def _take(self, found: ClassReport) -> None:
        self.report = found

    def _offer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.report is not None, "just taken"
        suffix = numbered(trainer, self, ClassNeuronsCallback) + apart(trainer)
        values = {with_suffix(name, suffix): value for name, value in class_scalars(self.report).items()}
        offer(trainer, pl_module, values, f"classes{suffix}")

    def _publish(self, trainer: Trainer, outlet: Outlet, found: ClassReport) -> None:
        name = f"classes{numbered(trainer, self, ClassNeuronsCallback)}"
        if outlet.folder is not None:
            with keeping_training(self, "the study was not written to the log directory"):
                found.save(inside(outlet.folder, f"{name}.json"))
        for logger in outlet.loggers:
            with keeping_training(self, "the study was not written everywhere"):
                write_classes([logger], found, outlet.step, name + outlet.apart)
