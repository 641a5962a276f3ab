"""The public pruning callback: its arguments, checked when it is made, and the hooks in which its parts act."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

from lightning_neurons.callbacks.observing.observer import NeuronObserver
from lightning_neurons.callbacks.pruning.checkpoint import restore_attributes
from lightning_neurons.callbacks.pruning.cutting import average_again, averages_of
from lightning_neurons.callbacks.pruning.guard import Keeping
from lightning_neurons.callbacks.pruning.part import Fit
from lightning_neurons.callbacks.pruning.pruner import Pruner
from lightning_neurons.callbacks.pruning.recovery_settings import Distillation, Guard, Mode, OnViolation
from lightning_neurons.callbacks.pruning.resume import adopted, state_of_other_settings
from lightning_neurons.callbacks.pruning.settings import Check, OnUnprunable, PruningSettings, settings_of
from lightning_neurons.callbacks.trainer.checks import is_unfinished, lightning_errors
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.runner import Runner
from lightning_neurons.callbacks.trainer.validated_weights import forget_weights, keep_weights, validated_weights
from lightning_neurons.criteria import CRITERIA, Criterion
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.errors import ArgumentError, check_count
from lightning_neurons.measurement.losses import LossReduction
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.pruning.budget import Aggregate, Agreement, PruningBudget, Scope
from lightning_neurons.pruning.compensation.compensate import CompensationName
from lightning_neurons.pruning.cut import PruningReport
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.rounds import Rounds
from lightning_neurons.pruning.schedule import PruningSchedule, Shape
from lightning_neurons.pruning.structure.norm_streams import NormStreams
from lightning_neurons.results.neuron_report import NeuronReport


@final
class NeuronPruningCallback(NeuronObserver):
    """Remove neurons during training: the layers become narrower, and the optimizer keeps its state.

    Neurons are scored on validation data when a round is due; the plan is made when that validation ends, goes into the
    checkpoint, and is carried out when the next training epoch begins. Coupled neurons (residual streams, depthwise
    convolutions) go together, and so do those of momentum and target networks in the module, which follow others. Every
    cut is tried on a copy first, and so are the first training steps of an epoch, as training may run more than
    validation does; layers that cannot be cut stay whole, with a warning.
    Checkpoints of any round can be resumed and validated; ``load_pruned`` loads them without a Trainer.

    Args:
        criterion: Scores the neurons: the name of any criterion, ``"deadness"``, ``"reconstruction"`` (the error that
            downstream layers cannot compensate), ``"random"``, or a ``Criterion``; None is ``"fisher"``.
        budget: A ``PruningBudget``, in the place of ``criterion`` and all other single arguments that it has.
        amount: The share of neurons to remove; give exactly one of this and the next three.
        target_params: The share of parameters that may stay.
        target_macs: The share of multiply-accumulate operations that may stay.
        threshold: Remove neurons of at least this deadness (1 = never fires); by other criteria, of at most this score.
        schedule: ``"one_shot"``, ``"linear"``, ``"cubic"`` (Zhu and Gupta 2017) or ``"geometric"``; or a
            ``PruningSchedule``, in the place of this and the next three arguments.
        start_epoch: The epoch at whose beginning the first cut is made.
        end_epoch: The last epoch at whose beginning a cut may be made, for several rounds.
        every_n_epochs: Epochs between rounds.
        scope: Whether neurons compete within a ``"layer"`` (each then loses the same share), within a ``"block"``, or
            over the whole model, ``"global"``. None is ``"layer"``; for ``"reconstruction"`` it is ``"layer"`` or
            ``"global"``, whichever has the lower validation loss.
        aggregate: How the scores of coupled layers become one: ``"mean"``, ``"sum"`` or ``"max"``.
        agreement: ``"all"`` removes a coupled neuron only where all layers of its group agree.
        patience: Number of measurements in a row that must choose a neuron before it is removed.
        normalize: How layers are made comparable; None divides by the L2 norm where that is needed.
        min_neurons: Least number of neurons that each layer keeps.
        max_amount: The largest share that a layer may lose in all.
        round_to: Widths become multiples of this.
        ignore: Patterns of layers that keep all their neurons. Layers that make the output always do.
        compensation: Change of weights before training goes on: ``"least_squares"`` refits the weights of the
            downstream layers, over channels (the default); ``"patch_least_squares"`` over whole receptive patches,
            which is better and slower; ``"mean"`` folds the mean of removed neurons into biases and norm statistics;
            ``"none"``.
        reestimate_norms: Estimate running statistics of norm layers anew, where that lowers the validation loss.
        lossless: Remove neurons that are dead or constant on validation samples, and nothing else; a cut that would
            change the outputs there by more than 1e-5 of the largest is not made.
        norm_streams: ``"renormalize"`` removes neurons that norm layers take their statistics over as well, as in
            ``prune``; such a cut is not exact, and its plan says so. ``"refuse"`` leaves them alone.
        guard: A ``Guard``, in the place of ``monitor``, ``mode``, ``max_drop``, ``relative_drop``, ``on_violation``.
        monitor: A logged metric, to be reported before and after each cut.
        mode: Whether more of it is better, ``"max"``, or less, ``"min"``; None goes by its name: less of a loss, error
            or perplexity, more of anything else.
        max_drop: How much worse the metric may be than before the first cut, when a cut has had ``recovery_epochs``,
            and when ``fit`` ends. If it is, the last good model, optimizers, schedulers and averages come back.
        relative_drop: Whether ``max_drop`` is a share of the metric before the first cut.
        recovery_epochs: How many epochs a cut has to recover, and distillation goes on.
        on_violation: ``"stop"`` pruning after a cut that was taken back, or try again with ``"halve"`` the step.
        check: ``"ablation"`` silences the neurons of a plan together on the kept samples before it is decided, without
            any compensation, and logs the metric; a cut by which it would fall by more than ``max_drop`` is not made.
        distillation: A ``Distillation``, in the place of ``recovery`` to ``teacher``.
        recovery: ``"distill"`` lets the model before the first cut teach the one after it: the Kullback-Leibler
            divergence of their logits is added to the gradient of whatever loss ``training_step`` has.
        output: The module whose output are the logits; None is the module's forward, or its one network if it has none.
        temperature: The divisor of the logits; the loss is multiplied by its square.
        distillation_weight: The factor of the distillation loss.
        class_axis: The axis of the logits on which the classes lie.
        teacher: A checkpoint of the module to learn from, also a larger one; None takes the model before the first cut,
            which then goes into checkpoints.
        reset_early_stopping: Reset the best score and the patience of ``EarlyStopping`` after a cut.
        on_unprunable: ``"raise"`` stops before training if a layer cannot be cut or the budget cannot be met.
        example_inputs: Inputs of the module's forward; None uses ``example_input_array`` or a validation batch.
        loss_fn: As in ``NeuronSensitivityCallback``.
        loss_reduction: As in ``NeuronSensitivityCallback``.
        max_samples: Number of validation samples for criteria that need gradients, and for compensations.
        activation_threshold: For ``"deadness"``: largest magnitude that counts as silent, in units of the layer's root
            mean square.
        relative_threshold: False takes ``activation_threshold`` in activation units.

    Attributes:
        report: All cuts so far as one ``PruningReport``; None before the model's structure is known.
        plan: Its plan: the neurons that have been removed.
        pending: The plan that will be carried out when the next training epoch begins, or None.
        rounds: The cuts one by one, with the metric before and after, also those that were taken back.

    Raises:
        MisconfigurationException: If an argument is out of range or contradicts another (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import Guard, NeuronPruningCallback, PruningBudget, PruningSchedule
        >>> half = NeuronPruningCallback("reconstruction", target_macs=0.5, monitor="val_acc", max_drop=0.01)
        >>> slow = NeuronPruningCallback("fisher", target_macs=0.5, schedule="cubic", start_epoch=2, end_epoch=8)
        >>> same = NeuronPruningCallback(
        ...     budget=PruningBudget("fisher", target_macs=0.5),
        ...     schedule=PruningSchedule("cubic", start_epoch=2, end_epoch=8),
        ...     guard=Guard("val_acc", tolerance=0.01),
        ... )
        >>> dead = NeuronPruningCallback(criterion="deadness", threshold=1.0, patience=3, agreement="all")
        >>> # trainer = Trainer(callbacks=[half]); trainer.fit(module); half.plan.save("plan.json")
    """

    publishes = False

    def __init__(
        self,
        criterion: str | Criterion | None = None,
        *,
        budget: PruningBudget | None = None,
        amount: float | None = None,
        target_params: float | None = None,
        target_macs: float | None = None,
        threshold: float | None = None,
        schedule: Shape | PruningSchedule = "one_shot",
        start_epoch: int = 1,
        end_epoch: int | None = None,
        every_n_epochs: int = 1,
        scope: Scope | None = None,
        aggregate: Aggregate = "mean",
        agreement: Agreement = "mean",
        patience: int = 1,
        normalize: Normalization | None = None,
        min_neurons: int = 1,
        max_amount: float = 1.0,
        round_to: int = 1,
        ignore: Sequence[str] = (),
        compensation: CompensationName | None = None,
        reestimate_norms: bool = False,
        lossless: bool = False,
        norm_streams: NormStreams = "refuse",
        guard: Guard | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
        max_drop: float | None = None,
        relative_drop: bool = False,
        recovery_epochs: int = 1,
        on_violation: OnViolation = "stop",
        check: Check | None = None,
        distillation: Distillation | None = None,
        recovery: Literal["distill"] | None = None,
        output: str | None = None,
        temperature: float = 2.0,
        distillation_weight: float = 1.0,
        class_axis: int = 1,
        teacher: str | Path | None = None,
        reset_early_stopping: bool = False,
        on_unprunable: OnUnprunable = "warn",
        example_inputs: Any = None,
        loss_fn: LossFunction | None = None,
        loss_reduction: LossReduction = "mean",
        max_samples: int = 512,
        activation_threshold: float = SILENT,
        relative_threshold: bool = True,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        with lightning_errors():
            pruning = settings_of(arguments)
            if loss_fn is not None and not callable(loss_fn):
                raise ArgumentError.of("loss_fn", loss_fn, "a function (module, batch) -> loss")
            settings = MeasurementSettings.checked(
                # Scores that are not measured neuron by neuron: some criterion has to stand here.
                criteria=[pruning.budget.measured or CRITERIA["weight_l2"]], layers=None, per_class=False,
                threshold=pruning.budget.activation_threshold, relative_threshold=pruning.budget.relative_threshold,
                normalize="none", inputs="clean", eps=0.0, loss_reduction=loss_reduction,
            )  # fmt: skip
            self.max_samples = check_count("max_samples", max_samples)
            self.loss_fn = loss_fn
            super().__init__(settings, every_n_epochs=1)
        self.pruning: PruningSettings = pruning
        self._pruner = Pruner(type(self).__name__, pruning)

    # -- results

    @property
    def report(self) -> PruningReport | None:  # type: ignore[override]  # the result of this callback are its cuts
        """All cuts so far as one; None before the model's structure is known."""
        return self.rounds.report()

    @property
    def measurement(self) -> NeuronReport | None:
        """The latest measurement of the criterion, or None if there is none."""
        return self._report

    @property
    def plan(self) -> PruningPlan:
        """The neurons that have been removed so far, in the indices of the original model."""
        return self.rounds.plan

    @property
    def pending(self) -> PruningPlan | None:
        """The neurons that will be removed when the next training epoch begins; None if there are none."""
        return None if self.rounds.pending is None else self.rounds.pending.plan

    @property
    def rounds(self) -> Rounds:
        """The cuts so far, and the one that is decided."""
        return self._pruner.rounds

    @property
    def keeping(self) -> Keeping:
        """The state of the guard."""
        return self._pruner.guard.keeping

    # -- checkpoints

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; differs where settings differ."""
        budget = self.pruning.budget
        plain = {name: value for name, value in vars(budget).items() if name != "criterion"}
        return self._generate_state_key(criterion=budget.label, **{**plain, "ignore": list(budget.ignore)})

    def state_dict(self) -> dict[str, Any]:
        """Return rounds, the pending plan, the state of the parts and the history, as plain values and tensors.

        While a validation goes on, the rounds are those before it: when the run is resumed, it is made again.
        """
        return {**super().state_dict(), **self._pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rounds of a checkpoint.

        Raises:
            ArgumentError: If they are broken; the callback is then as it was.
        """
        self._pruner.load_state_dict(type(self).__name__, state_dict)
        super().load_state_dict(state_dict)
        if self.pruning.guard is not None and self.rounds.done and self.keeping.baseline is None:
            self._warn("the checkpoint was written without max_drop=: what it has lost already is not known")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the rounds of a pruning callback with other settings, and warn: budgets are of the whole model."""
        restore_attributes((pl_module, *averages_of(trainer)), self.plan, checkpoint)
        other = state_of_other_settings(checkpoint, self.state_key) if trainer.state.fn == "fit" else None
        if other is not None:
            self.load_state_dict(other[0])
            adopted(self.rounds, self._pruner.parts)
            self._warn(
                f"the checkpoint was written with other settings ({other[1]}): the {len(self.plan)} neurons that have "
                "gone stay away and count towards what is to go now, which is a share of the model before any cut"
            )

    # -- hooks, in the order of a fit

    def _fit(self, trainer: Trainer, pl_module: LightningModule) -> Fit:
        return self._pruner.fit(self, trainer, pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let checkpoints of other widths be loaded, in every stage."""
        fit = self._fit(trainer, pl_module)
        if stage == "fit":
            self._pruner.refuse(fit)
        super().setup(trainer, pl_module, stage)
        self._pruner.prepare(fit, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that cannot go on, and rounds of another model."""
        super().on_fit_start(trainer, pl_module)
        self._pruner.on_fit_start(self._fit(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate again what a resume has left out, and log the sizes of the model before any cut."""
        self._pruner.on_train_start(self._fit(trainer, pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last cut, and make the one that is decided."""
        self._pruner.on_train_epoch_start(self._fit(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep the first batches of an epoch after which a round may be decided, to try training steps on."""
        if self._pruner.is_near(trainer):
            self._pruner.samples.add_training(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Let the parts look at a training step."""
        self._pruner.on_train_batch_end(self._fit(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the value of the metric that was logged before: validation need not log it."""
        if trainer.state.fn == "fit":
            self._pruner.look(self._fit(trainer, pl_module), trainer.current_epoch - 1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure, if a round is due or near."""
        self._pruner.begin_validation(trainer, self.max_samples)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Find out how to run the module, and copy samples before the step can change them."""
        is_kept = dataloader_idx == 0 and self._pruner.is_near(trainer) and not is_unfinished(pl_module)
        if is_kept:
            example = self.pruning.example_inputs
            self._pruner.samples.add(batch, lambda: Runner(trainer, pl_module, example, batch))
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if is_kept:
            keep_weights(trainer, pl_module, self, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide on the round that is due, with the weights that were validated; in a trial run, only try a plan."""
        with validated_weights(trainer):
            self._report = None
            super().on_validation_epoch_end(trainer, pl_module)
            self._pruner.end_measurement(self._fit(trainer, pl_module), self._report)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metric; warn in the sanity check if validation does not log it."""
        forget_weights(trainer)
        self._pruner.end_validation(self._fit(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the metric if training has logged it."""
        super().on_train_epoch_end(trainer, pl_module)
        self._pruner.on_train_epoch_end(self._fit(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo cuts whose metric is beyond its bound when training ends."""
        super().on_train_end(trainer, pl_module)
        fit = self._fit(trainer, pl_module)
        if self._pruner.end(fit):
            average_again(trainer, pl_module, self)
        self._pruner.leave_training(fit)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as ``on_train_end``, for a resumed run that had no epoch left; print the rounds."""
        fit = self._fit(trainer, pl_module)
        self._pruner.end(fit)
        self._pruner.show(fit)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: test data are not measured."""

    on_test_end = on_test_epoch_start

    def _due(self, trainer: Trainer) -> bool:
        return self.pruning.measures and self._pruner.is_near(trainer)

    def _drop(self, trainer: Trainer) -> None:
        self._pruner.drop(trainer)
        super()._drop(trainer)
