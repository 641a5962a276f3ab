"""Base class of callbacks that make a study of validation samples at the end of validation.

Samples are kept while validation runs; then one process makes the study on those of all, in isolation, and tells the
others. A study that fails never takes the training with it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_neurons.callbacks.trainer import checks
from lightning_neurons.callbacks.trainer.namespaces import EitherCallback, LightningModule, Trainer, is_fast_dev_run
from lightning_neurons.callbacks.trainer.outlet import Outlet, keeping_training, outlet_of
from lightning_neurons.callbacks.trainer.processes import MisuseError, end_together, in_one_process
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.callbacks.trainer.steps import evaluation_loaders
from lightning_neurons.callbacks.trainer.validated_weights import forget_weights, keep_weights, validated_weights
from lightning_neurons.data.batches import map_tensors, targets_of
from lightning_neurons.data.stratified_sample import Picked, StratifiedSample, stream_length
from lightning_neurons.errors import ArgumentError, PruningError, check_count
from lightning_neurons.layers.layer import Pattern
from lightning_neurons.measurement.outcomes import LossFunction


class SampledStudy(EitherCallback):
    """Common base of the callbacks that make studies; add one of those to a Trainer."""

    loss_fn: LossFunction | None = None
    _least_batches = 1

    def __init__(self, layers: object, every_n_epochs: int, max_samples: int) -> None:
        super().__init__()
        self.layers = _patterns(layers)
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs)
        self.max_samples = check_count("max_samples", max_samples, least=2)
        self._sample: StratifiedSample | None = None
        self._kept: list[Any] = []
        self._dataloaders = 1
        self._last: int | None = None  # the epoch of the last study
        self._found: Any = None  # the last study, until it is published
        self._is_due = False
        self._failure: Exception | None = None  # why the samples of this process are not whole
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the last study."""
        return {"version": 1, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the epoch of the last study from a checkpoint."""
        self._last = state_dict.get("last")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any time has been spent."""
        if stage == "predict":
            return  # nothing is studied
        checks.refuse_sharded(type(self).__name__, trainer.strategy)
        if stage == "fit" and (why := checks.why_no_validation(trainer)) is not None:
            self._warn(f"the Trainer runs no validation ({why}), so nothing will be measured")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what does not fit the layers: a module may make them in its own setup, which comes after ours."""
        checks.check_layers(type(self).__name__, pl_module, self.layers)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do for ``trainer.validate`` what is done when ``fit`` starts."""
        if trainer.state.fn == "validate":
            self.on_fit_start(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep samples, if a study is due."""
        self._drop()
        self._is_due = self._due(trainer)
        if self._is_due:
            self._attempt(lambda: self._begin(trainer))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep samples (of the first dataloader), before the step can change them."""
        if self._sample is not None and self._failure is None and dataloader_idx == 0:
            self._attempt(lambda: self._add(trainer, pl_module, batch, batch_idx))
            self._attempt(lambda: keep_weights(trainer, pl_module, self, batch_idx))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the study."""
        if not self._is_due:
            return
        sample, self._sample, self._is_due = self._sample, None, False
        if sample is not None and self._failure is None:
            self._attempt(lambda: self._keep(sample.rest()))
        mine, self._kept = self._kept, []
        failure, self._failure = self._failure, None
        is_trial = trainer.sanity_checking or is_fast_dev_run(trainer)
        try:
            # Every process has to know of a failure in any: the rest of them would wait for its samples.
            if not trainer.strategy.reduce_boolean_decision(failure is None, all=True):
                raise PruningError("another process failed" if failure is None else checks.said_of(failure))
            batches = _of_all(trainer, mine)
            if not batches:
                self._warn("no sample was measured: the data was empty")
                return
            found = in_one_process(trainer, lambda: self._isolated(trainer, pl_module, batches, is_trial=is_trial))
        except PruningError as error:
            # Before training, or without it, nothing is lost by saying at once what was asked wrongly. What fails of
            # itself would run without us, and is to run with us.
            if (is_trial or trainer.state.fn != "fit") and (self._may_fail or isinstance(error, MisuseError)):
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
            if trainer.sanity_checking:  # a step may leave it out
                self._warn(f"the sanity check could not be measured, so epochs may not be either: {error}")
            else:
                self._warn(f"epoch {trainer.current_epoch} was not measured: {error}", once=str(error))
            return
        if trainer.sanity_checking or found is None:
            return
        self._last = trainer.current_epoch if trainer.state.fn == "fit" else self._last
        self._found = found
        self._take(found)
        with keeping_training(self, "the study was not offered to other callbacks"):
            self._offer(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the study at the step at which Lightning logs the validation."""
        forget_weights(trainer)
        found, self._found = self._found, None
        if found is None:
            return
        with keeping_training(self, f"epoch {trainer.current_epoch} was measured and not shown", "not shown"):
            if (outlet := outlet_of(trainer)) is not None:
                self._publish(trainer, outlet, found)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop the samples."""
        forget_weights(trainer)
        self._drop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the samples."""
        forget_weights(trainer)
        self._drop()
        end_together(trainer)

    @property
    def _may_fail(self) -> bool:
        """True if a study may fail because of the callback's arguments, rather than the model."""
        return False

    def _must_stay_whole(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> bool:
        """Return True if samples may not be taken out of their batch, nor joined with those of other batches."""
        return False

    def _sample_notes(self) -> list[str]:
        """Return the report's notes on the data that the samples come from."""
        several = self._dataloaders > 1
        return [f"on samples of the first of {self._dataloaders} validation dataloaders"] if several else []

    def _study(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> Any:
        """Make the study of some batches; the module is isolated and in evaluation mode."""
        raise NotImplementedError

    def _try(self, pl_module: LightningModule, replay: StepReplay, batches: list[Any]) -> Any:
        """Try the study on the few batches of a trial run, to find errors early.

        Returns:
            The result of the study; in studies that need more samples than a trial run has, None.
        """
        return self._study(pl_module, replay, batches)

    def _take(self, found: Any) -> None:
        """Store the study's result, in every process."""
        raise NotImplementedError

    def _offer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the study's result into ``callback_metrics`` for other callbacks, in every process."""

    def _publish(self, trainer: Trainer, outlet: Outlet, found: Any) -> None:
        """Write the study's result, in the first process."""
        raise NotImplementedError

    def _begin(self, trainer: Trainer) -> None:
        loaders, batches = evaluation_loaders(trainer)
        self._dataloaders, total = len(loaders), stream_length(loaders[:1], batches[:1])
        mine = math.ceil(self.max_samples / trainer.world_size)
        self._sample = StratifiedSample(mine, total, batches=self._least_batches)

    def _add(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        assert self._sample is not None, "begun"
        whole = self._must_stay_whole(trainer, pl_module, batch, batch_idx)
        self._keep(self._sample.add(batch, targets_of(batch), (batch_idx, 0), whole=whole))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Run a part of the study; an error ends the study, not the training."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
            self._failure = error

    def _drop(self) -> None:
        self._sample, self._kept, self._found, self._failure, self._is_due = None, [], None, None, False

    def _replay(self, trainer: Trainer, pl_module: LightningModule) -> StepReplay:
        return StepReplay(trainer, pl_module, "validation_step", self.loss_fn)

    def _isolated(self, trainer: Trainer, pl_module: LightningModule, kept: list[Any], *, is_trial: bool) -> Any:
        replay = self._replay(trainer, pl_module)
        on_device = [map_tensors(batch, lambda t: t.to(pl_module.device)) for batch, _ in kept]
        replay.places = [(batch, place) for batch, (_, place) in zip(on_device, kept, strict=True)]
        with validated_weights(trainer), torch.inference_mode(False), replay.isolated(), torch.no_grad():
            return (self._try if is_trial else self._study)(pl_module, replay, on_device)

    def _due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.every_n_epochs == 1:
            return True
        return checks.is_due(trainer.current_epoch, self.every_n_epochs, [self._last])

    def _keep(self, picked: list[Picked]) -> None:
        for one in picked:
            self._kept.append((map_tensors(one.batch, lambda t: t.detach().to("cpu", copy=True)), one.place))

    def _warn(self, message: str, once: str | None = None) -> None:
        """Warn, unless the same message (or the same ``once``) has been given before."""
        if (once or message) not in self._warned:
            self._warned.add(once or message)
            rank_zero_warn(f"{type(self).__name__}: {message}")


def _patterns(layers: object) -> tuple[Pattern, ...] | None:
    if layers is None:
        return None
    found = tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else ()
    if not found or not all(isinstance(one, str | type) for one in found):
        raise ArgumentError.of("layers", layers, "None for all layers, or a list of patterns or module types")
    return found


def _of_all(trainer: Trainer, mine: list[Any]) -> list[Any]:
    """Return the batches of all processes and their places in the data, in order."""
    with torch.inference_mode(False):
        mine = [(map_tensors(batch, Tensor.clone), place) for batch, place in mine]
    if trainer.world_size == 1:
        return mine
    everywhere: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(everywhere, mine)
    return [kept for one in everywhere for kept in one]
