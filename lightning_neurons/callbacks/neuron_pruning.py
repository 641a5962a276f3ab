"""The public pruning callback: its arguments, checked when it is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_neurons.callbacks.pruning.guard import NeuronKeeper
from lightning_neurons.callbacks.pruning.recovery_settings import Mode, OnViolation, distillation_of, guard_of
from lightning_neurons.callbacks.pruning.settings import (
    Check,
    OnUnprunable,
    PruningSettings,
    budget_of,
    check_of,
    compensation_of,
    reestimation_of,
    refuse_overlap,
)
from lightning_neurons.callbacks.trainer.checks import lightning_errors
from lightning_neurons.criteria import CRITERIA, Criterion
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.errors import ArgumentError, check_choice, check_count, check_flag
from lightning_neurons.measurement.losses import LossReduction
from lightning_neurons.measurement.measure import LossFunction
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.pruning.budget import Aggregate, Agreement, Scope
from lightning_neurons.pruning.compensation.compensate import CompensationName
from lightning_neurons.pruning.schedule import PruningSchedule, Shape


class NeuronPruningCallback(NeuronKeeper):
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
        amount: The share of neurons to remove; give exactly one of this and the next three.
        target_params: The share of parameters that may stay.
        target_macs: The share of multiply-accumulate operations that may stay.
        threshold: Remove neurons of at least this deadness (1 = never fires); by other criteria, of at most this score.
        schedule: ``"one_shot"``, ``"linear"``, ``"cubic"`` (Zhu and Gupta 2017) or ``"geometric"``.
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

    Raises:
        MisconfigurationException: If an argument is out of range or contradicts another (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import NeuronPruningCallback
        >>> half = NeuronPruningCallback("reconstruction", target_macs=0.5, monitor="val_acc", max_drop=0.01)
        >>> slow = NeuronPruningCallback("fisher", target_macs=0.5, schedule="cubic", start_epoch=2, end_epoch=8)
        >>> dead = NeuronPruningCallback(criterion="deadness", threshold=1.0, patience=3, agreement="all")
        >>> # trainer = Trainer(callbacks=[half]); trainer.fit(module); half.plan.save("plan.json")
    """

    def __init__(
        self,
        criterion: str | Criterion | None = None,
        *,
        amount: float | None = None,
        target_params: float | None = None,
        target_macs: float | None = None,
        threshold: float | None = None,
        schedule: Shape = "one_shot",
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
        monitor: str | None = None,
        mode: Mode | None = None,
        max_drop: float | None = None,
        relative_drop: bool = False,
        recovery_epochs: int = 1,
        on_violation: OnViolation = "stop",
        check: Check | None = None,
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
        with lightning_errors():
            rules = {
                "criterion": criterion, "amount": amount, "target_params": target_params, "target_macs": target_macs,
                "threshold": threshold, "scope": scope, "aggregate": aggregate, "agreement": agreement,
                "normalize": normalize, "min_neurons": min_neurons, "max_amount": max_amount, "round_to": round_to,
                "ignore": ignore, "activation_threshold": activation_threshold,
                "relative_threshold": relative_threshold,
            }  # fmt: skip
            budget = budget_of(lossless, rules)
            if schedule == "one_shot" and end_epoch is not None and budget.threshold is None:
                raise ArgumentError.of("end_epoch", end_epoch, 'None with schedule="one_shot", which has one round')
            if loss_fn is not None and not callable(loss_fn):
                raise ArgumentError.of("loss_fn", loss_fn, "a function (module, batch) -> loss")
            can_halve = budget.threshold is None
            guard = guard_of(monitor, mode, max_drop, relative_drop, on_violation, can_halve=can_halve)
            pruning = PruningSettings(
                budget=budget,
                schedule=PruningSchedule(schedule, start_epoch, end_epoch, every_n_epochs),
                compensation=compensation_of(compensation, lossless),
                reestimate_norms=reestimation_of(reestimate_norms, lossless),
                lossless=lossless,
                patience=check_count("patience", patience),
                monitor=monitor,
                recovery_epochs=check_count("recovery_epochs", recovery_epochs),
                check=check_of(check, guard),
                guard=guard,
                distillation=distillation_of(recovery, output, temperature, distillation_weight, class_axis, teacher),
                reset_early_stopping=check_flag("reset_early_stopping", reset_early_stopping),
                on_unprunable=check_choice("on_unprunable", on_unprunable, get_args(OnUnprunable)),  # type: ignore[arg-type]
                example_inputs=example_inputs,
            )
            refuse_overlap(pruning)
            settings = MeasurementSettings.checked(
                # Scores that are not measured neuron by neuron: some criterion has to stand here.
                criteria=[budget.measured or CRITERIA["weight_l2"]], layers=None, per_class=False,
                threshold=activation_threshold, relative_threshold=relative_threshold, normalize="none",
                inputs="clean", eps=0.0, loss_reduction=loss_reduction,
            )  # fmt: skip
            self.max_samples = check_count("max_samples", max_samples)
            self.loss_fn = loss_fn
            super().__init__(settings, pruning)

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; differs where settings differ."""
        budget = self.pruning.budget
        plain = {name: value for name, value in vars(budget).items() if name != "criterion"}
        return self._generate_state_key(criterion=budget.label, **{**plain, "ignore": list(budget.ignore)})
