"""The pruning callback as people use it: its arguments, checked at once."""

from collections.abc import Sequence
from typing import Any, get_args

from lightning_neurons.callbacks.arguments import lightning_errors
from lightning_neurons.callbacks.pruner import NeuronPruner
from lightning_neurons.callbacks.pruning_settings import OnUnprunable, PruningSettings
from lightning_neurons.criteria import CRITERIA, Criterion
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.errors import ArgumentError, check_choice, check_count
from lightning_neurons.pruning.budget import Aggregate, Agreement, PruningBudget, Scope
from lightning_neurons.pruning.compensation import Compensation
from lightning_neurons.pruning.schedule import PruningSchedule, Shape
from lightning_neurons.studies.losses import LossReduction
from lightning_neurons.studies.measure import LossFunction
from lightning_neurons.studies.settings import MeasurementSettings


class NeuronPruningCallback(NeuronPruner):
    """Removes neurons while training goes on: the layers become narrower, and the optimizer keeps its state.

    Neurons are scored on validation data when a round is due; the plan is made when that validation ends, goes into the
    checkpoint, and is carried out when the next training epoch begins. Coupled neurons (residual streams, depthwise
    convolutions) go together. Every cut is tried on a copy first; layers that cannot be cut stay whole, with a warning.
    Checkpoints of any round can be resumed and validated; ``load_pruned`` loads them without a Trainer.

    Args:
        criterion: By what neurons are chosen: the name of any criterion, ``"deadness"``, ``"random"``, or a
            ``Criterion``.
        amount: The share of neurons to remove; give exactly one of this and the next three.
        target_params: The share of parameters that may stay.
        target_macs: The share of multiply-accumulate operations that may stay.
        threshold: Remove what is at least so dead (1 = never fires), or for other criteria at most so important.
        schedule: ``"one_shot"``, ``"linear"``, ``"cubic"`` (Zhu and Gupta 2017) or ``"geometric"``.
        start_epoch: The epoch at whose beginning the first cut is made.
        end_epoch: The last epoch at whose beginning a cut may be made, for several rounds.
        every_n_epochs: Epochs between rounds.
        scope: Whether neurons compete within a ``"layer"`` (each then loses the same share), within a ``"block"``, or
            over the whole model, ``"global"``.
        aggregate: How the scores of coupled layers become one: ``"mean"``, ``"sum"`` or ``"max"``.
        agreement: ``"all"`` removes a coupled neuron only where all layers of its group agree.
        patience: How many measurements in a row must choose a neuron before it goes.
        normalize: How layers are made comparable; None divides by the L2 norm where that is needed.
        min_neurons: How many neurons of each layer stay at least.
        max_amount: The largest share that a layer may lose in all.
        round_to: Widths become multiples of this.
        ignore: Patterns of layers that keep all their neurons. Layers that make the output always do.
        compensation: ``"mean"`` folds the mean of what goes into biases and norm statistics.
        monitor: A logged metric, to be reported before and after each cut.
        reset_early_stopping: Let ``EarlyStopping`` forget its best score after a cut.
        on_unprunable: ``"raise"`` stops before training if a layer cannot be cut or the budget cannot be met.
        example_inputs: What the module's forward takes; None uses ``example_input_array`` or a validation batch.
        loss_fn: As in ``NeuronSensitivityCallback``.
        loss_reduction: As in ``NeuronSensitivityCallback``.
        max_samples: How many validation samples criteria that need gradients, and compensations, are measured on.
        activation_threshold: For ``"deadness"``: what counts as silent, in units of the layer's root mean square.
        relative_threshold: False takes ``activation_threshold`` in activation units.

    Raises:
        MisconfigurationException: If an argument is out of range or contradicts another (also a ``ValueError``).

    Example:
        >>> from lightning_neurons import NeuronPruningCallback
        >>> half = NeuronPruningCallback("fisher", target_macs=0.5, schedule="cubic", start_epoch=2, end_epoch=8)
        >>> dead = NeuronPruningCallback(criterion="deadness", threshold=1.0, patience=3, agreement="all")
        >>> # trainer = Trainer(callbacks=[half]); trainer.fit(module); half.plan.save("plan.json")
    """

    def __init__(
        self,
        criterion: str | Criterion = "fisher",
        *,
        amount: float | None = None,
        target_params: float | None = None,
        target_macs: float | None = None,
        threshold: float | None = None,
        schedule: Shape = "one_shot",
        start_epoch: int = 1,
        end_epoch: int | None = None,
        every_n_epochs: int = 1,
        scope: Scope = "layer",
        aggregate: Aggregate = "mean",
        agreement: Agreement = "mean",
        patience: int = 1,
        normalize: Normalization | None = None,
        min_neurons: int = 1,
        max_amount: float = 1.0,
        round_to: int = 1,
        ignore: Sequence[str] = (),
        compensation: Compensation = "none",
        monitor: str | None = None,
        reset_early_stopping: bool = False,
        on_unprunable: OnUnprunable = "warn",
        example_inputs: Any = None,
        loss_fn: LossFunction | None = None,
        loss_reduction: LossReduction = "mean",
        max_samples: int = 512,
        activation_threshold: float = 0.01,
        relative_threshold: bool = True,
    ) -> None:
        with lightning_errors():
            budget = PruningBudget(
                criterion, amount=amount, target_params=target_params, target_macs=target_macs, threshold=threshold,
                scope=scope, aggregate=aggregate, agreement=agreement, normalize=normalize, min_neurons=min_neurons,
                max_amount=max_amount, round_to=round_to, ignore=ignore, activation_threshold=activation_threshold,
                relative_threshold=relative_threshold,
            )  # fmt: skip
            if schedule == "one_shot" and end_epoch is not None and threshold is None:
                raise ArgumentError.of("end_epoch", end_epoch, 'None with schedule="one_shot", which has one round')
            pruning = PruningSettings(
                budget=budget,
                schedule=PruningSchedule(schedule, start_epoch, end_epoch, every_n_epochs),
                compensation=check_choice("compensation", compensation, get_args(Compensation)),  # type: ignore[arg-type]
                patience=check_count("patience", patience),
                monitor=monitor,
                reset_early_stopping=reset_early_stopping,
                on_unprunable=check_choice("on_unprunable", on_unprunable, get_args(OnUnprunable)),  # type: ignore[arg-type]
                example_inputs=example_inputs,
            )
            if monitor is not None and not isinstance(monitor, str):
                raise ArgumentError.of("monitor", monitor, "the name of a logged metric")
            if not isinstance(reset_early_stopping, bool):
                raise ArgumentError.of("reset_early_stopping", reset_early_stopping, "True or False")
            if loss_fn is not None and not callable(loss_fn):
                raise ArgumentError.of("loss_fn", loss_fn, "a function (module, batch) -> loss")
            settings = MeasurementSettings.checked(
                # Random scores are not measured; some criterion has to stand here.
                criteria=[budget.measured or CRITERIA["weight_l2"]], layers=None, per_class=False,
                threshold=activation_threshold, relative_threshold=relative_threshold, normalize="none",
                inputs="clean", eps=0.0, loss_reduction=loss_reduction,
            )  # fmt: skip
            self.max_samples = check_count("max_samples", max_samples)
            self.loss_fn = loss_fn
            super().__init__(settings, pruning)

    @property
    def state_key(self) -> str:
        """Tells callbacks of different settings apart in a checkpoint."""
        budget = self.pruning.budget
        plain = {name: value for name, value in vars(budget).items() if name != "criterion"}
        name = "random" if budget.measured is None else budget.measured.name
        return self._generate_state_key(criterion=name, **{**plain, "ignore": list(budget.ignore)})
