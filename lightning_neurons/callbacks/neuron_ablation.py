"""Callback that measures the change of the loss without a neuron, during training, and compares it with a criterion."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_neurons.ablation.screening import OracleAgreement, Screening, screen
from lightning_neurons.callbacks.observing.independence import independence_of
from lightning_neurons.callbacks.observing.sampled_study import SampledStudy
from lightning_neurons.callbacks.trainer.checks import Step, lightning_errors, name_of, require_training_step
from lightning_neurons.callbacks.trainer.folders import apart
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.outlet import Outlet, keeping_training, numbered, offer
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.criteria import CRITERIA, Criterion, resolve
from lightning_neurons.data.batches import batch_size_of
from lightning_neurons.errors import ArgumentError, MeasurementError, check_choice, check_count
from lightning_neurons.hooks.intervention import Replacement
from lightning_neurons.layers.layer import Pattern
from lightning_neurons.measurement.losses import LOSS_REDUCTIONS, LossReduction
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.report.figures.drawing import can_draw
from lightning_neurons.report.figures.measurements import agreement_scatter
from lightning_neurons.report.logging.ablation import ablation_scalars, print_ablation, write_ablation
from lightning_neurons.report.logging.images import can_show, show_figure
from lightning_neurons.report.logging.tags import with_suffix
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.whole_file import inside


class NeuronAblationCallback(SampledStudy):
    """Switch neurons off on a bounded sample of the validation data and measure the change of the loss.

    A cheap criterion picks the most and the least important neurons; those are measured. Logged is how far the two
    agree: on the samples that the criterion has seen, on others, and, as the ceiling, how far the measurement on one
    half of the samples agrees with that on the other. A criterion that stays far below the ceiling should not decide
    what is pruned. Works in ``fit`` and ``validate``; ``ablation.json`` goes into the log directory.

    Args:
        criterion: The criterion that chooses the neurons to measure: the name of any, or a ``Criterion``.
        ends: How many neurons are measured at each end of its ranking; None measures all.
        replacement: Activation of a neuron that is off: ``"zero"``, its ``"mean"``, or, with ``"resample"``, its values
            on another sample.
        loss_fn: Called with the module and a batch; returns its loss. None takes what ``validation_step`` returns or
            logs as a loss.
        loss_reduction: How that loss is reduced over a batch: ``"mean"``, ``"sum"``, or ``"none"`` (one per sample).
        step: Where the loss comes from without ``loss_fn``: ``"training"`` takes that of ``training_step``, run in
            isolation and in evaluation mode, for modules whose ``validation_step`` has none.
        max_samples: How many validation samples (of the first dataloader) are used, spread over the data and over the
            classes; in whole batches where the loss of a batch is not that of its samples.
        every_n_epochs: Epochs between studies during ``fit``.
        layers: None for all but those that make the output; or patterns of paths, names of classes or module types.

    Attributes:
        report: The latest measurement, an ``AblationReport``, or None before the first.
        agreement: Its agreement with the criterion, or None.

    Raises:
        MisconfigurationException: If an argument is out of range (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import NeuronAblationCallback
        >>> callback = NeuronAblationCallback("fisher", every_n_epochs=5)
        >>> # trainer = Trainer(callbacks=[callback]); trainer.fit(module)
        >>> # callback.report.delta_loss["net.conv1"], callback.agreement.held_out, callback.agreement.reliability
    """

    _least_batches = 2  # one for each half, where they cannot be divided

    def __init__(
        self,
        criterion: str | Criterion = "fisher",
        *,
        ends: int | None = 16,
        replacement: Replacement = "zero",
        loss_fn: LossFunction | None = None,
        loss_reduction: LossReduction = "mean",
        step: Step = "validation",
        max_samples: int = 256,
        every_n_epochs: int = 1,
        layers: Sequence[Pattern] | None = None,
    ) -> None:
        with lightning_errors():
            self.criterion = resolve([criterion], name="criterion")[0]
            self.ends = None if ends is None else check_count("ends", ends)
            self.replacement: Replacement = check_choice("replacement", replacement, get_args(Replacement))  # type: ignore[assignment]
            self.loss_reduction: LossReduction = check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)  # type: ignore[assignment]
            self.step = check_choice("step", step, get_args(Step))
            if loss_fn is not None and not callable(loss_fn):
                raise ArgumentError.of("loss_fn", loss_fn, "a function (module, batch) -> loss")
            self.loss_fn = loss_fn
            super().__init__(layers, every_n_epochs, max_samples)
        self._stays_whole = self._is_stateful = False
        self.report: AblationReport | None = None
        self.agreement: OracleAgreement | None = None

    @property
    def ablation(self) -> AblationReport | None:
        """The report, under its former name."""
        return self.report

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; differs where settings differ."""
        plain = {name: getattr(self, name) for name in ("ends", "replacement", "loss_reduction", "every_n_epochs")}
        plain |= {"step": self.step} if self.step != "validation" else {}
        layers = [one if isinstance(one, str) else one.__name__ for one in self.layers or ()]
        return self._generate_state_key(
            **plain,
            criterion=self.criterion.name,
            layers=layers,
            max_samples=self.max_samples,
            loss_fn=name_of(self.loss_fn),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any time has been spent."""
        super().setup(trainer, pl_module, stage)
        if self.step == "training" and stage != "predict":
            require_training_step(type(self).__name__, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the latest measurement."""
        if self.report is None or self.agreement is None:
            self._warn("nothing has been measured")
        elif trainer.is_global_zero:
            with keeping_training(self, "the ablation was not shown"):
                print_ablation(self.report, self.agreement, self.criterion.name)

    def _try(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> Screening | None:
        too_few = len(batches) == 1 and (batch_size_of(batches[0]) < 2 or self._stays_whole)
        return None if too_few else self._study(pl_module, replay, batches)

    @property
    def _may_fail(self) -> bool:
        shaped = self.loss_reduction != "mean" or self.replacement == "resample"
        return self.loss_fn is not None or shaped or self.criterion.name not in CRITERIA

    def _sample_notes(self) -> list[str]:
        said = "the loss depends on what earlier batches left: batches were run in the state at the end of validation"
        return [*super()._sample_notes(), *([said] if self._is_stateful else [])]

    def _must_stay_whole(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> bool:
        replay = self._replay(trainer, pl_module)
        try:
            divisible, is_stateful = independence_of(replay, self.loss_reduction, batch, (batch_idx, 0))
            self._stays_whole, self._is_stateful = not divisible, self._is_stateful or is_stateful
        except Exception:  # noqa: BLE001 (the study will say what is wrong)
            self._stays_whole = True
        return self._stays_whole

    def _replay(self, trainer: Trainer, pl_module: LightningModule) -> StepReplay:
        by_sample = self.loss_reduction == "none"
        return StepReplay(trainer, pl_module, f"{self.step}_step", self.loss_fn, by_sample=by_sample)

    def _study(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> Screening:
        if self.loss_fn is None:
            with suppress(MeasurementError), torch.enable_grad():  # which of what the step gives is the loss
                replay.loss(batches[0])

        def loss(module: nn.Module, batch: object) -> Tensor:
            return replay.loss(batch)

        found = screen(
            pl_module,
            batches,
            loss if self.loss_fn is None else self.loss_fn,
            self.criterion,
            run=lambda module, batch: replay.run(batch),
            loss_reduction=self.loss_reduction,
            layers=self.layers,
            ends=self.ends,
            replacement=self.replacement,
            may_mix=not self._stays_whole,
        )
        ablation = replace(found.ablation, notes=(*found.ablation.notes, *self._sample_notes()))
        return replace(found, ablation=ablation)

    def _take(self, found: Screening) -> None:
        self.report, self.agreement = found.ablation, found.agreement

    def _offer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.report is not None, "just taken"
        assert self.agreement is not None, "just taken"
        suffix = numbered(trainer, self, NeuronAblationCallback) + apart(trainer)
        values = ablation_scalars(self.report, self.agreement)
        offer(trainer, pl_module, {with_suffix(n, suffix): v for n, v in values.items()}, f"ablation{suffix}")

    def _publish(self, trainer: Trainer, outlet: Outlet, found: Screening) -> None:
        name = f"ablation{numbered(trainer, self, NeuronAblationCallback)}"
        group = name + outlet.apart
        for logger in outlet.loggers:
            with keeping_training(self, "the ablation was not written everywhere"):
                write_ablation([logger], found.ablation, found.agreement, outlet.step, group)
        if outlet.folder is not None:
            with keeping_training(self, "the ablation was not written to the log directory"):
                found.ablation.save(inside(outlet.folder, f"{name}.json"))
        if can_draw() and can_show(outlet.loggers):
            figure = agreement_scatter(found.report, found.ablation, found.criterion).figure
            show_figure(outlet.loggers, f"{group}/scatter", figure, outlet.step)
