"""Base class of the observing callbacks: hooks that begin a measurement, feed it batches and publish its report.

It decides *when*; all arithmetic lies below. It works with the Trainers of ``lightning`` and ``pytorch_lightning``, and
never changes what it observes: neither weights, optimizer, random state nor logged values.
"""

import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_neurons.callbacks.observing.member import Member
from lightning_neurons.callbacks.observing.publish import publish, show
from lightning_neurons.callbacks.observing.session import Session
from lightning_neurons.callbacks.trainer import checks
from lightning_neurons.callbacks.trainer.folders import apart
from lightning_neurons.callbacks.trainer.namespaces import EitherCallback, LightningModule, Trainer
from lightning_neurons.callbacks.trainer.outlet import Notice, keeping_training, monitored, numbered_observer, offer
from lightning_neurons.callbacks.trainer.processes import end_together
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.callbacks.trainer.steps import LoadersOf, evaluation_loaders, training_loaders
from lightning_neurons.callbacks.trainer.validated_weights import forget_weights, keep_weights, validated_weights
from lightning_neurons.data.stratified_sample import StratifiedSample, stream_length
from lightning_neurons.errors import ArgumentError, NoLossError, check_count
from lightning_neurons.layers.layer import candidates
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.report.logging.loggers import scalars
from lightning_neurons.report.logging.tags import with_suffix
from lightning_neurons.results.history import HistoryEntry, NeuronHistory
from lightning_neurons.results.neuron_report import NeuronReport


class NeuronObserver(EitherCallback):
    """Common base of the observing callbacks; add one of those to a Trainer.

    Attributes:
        history: All measurements of this run compared with one another; continues after a resume.
    """

    source: str = "val"
    step: str = "validation"
    loss_fn: LossFunction | None = None
    max_samples: int = 0
    publishes: bool = True  # whether reports go to the loggers
    max_figures: int = 0
    html: bool = False
    log_metrics: bool = False

    def __init__(self, settings: MeasurementSettings, every_n_epochs: int) -> None:
        super().__init__()
        self.settings = settings
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs)
        self.history = NeuronHistory()
        self._report: NeuronReport | None = None
        self._notice = Notice()
        self._member: Member | None = None
        self._active: str | None = None  # the source of the session that this callback is part of now
        self._failure: Exception | None = None  # why the measurement was given up, if it has no member to know it
        self._unpublished: tuple[NeuronReport, HistoryEntry] | None = None
        self._offered = False  # whether metrics have been there for others in this run
        self._warned: set[str] = set()

    @property
    def report(self) -> NeuronReport | None:
        """The latest measurement, or None before the first."""
        if self._report is None and self._notice.hint is not None:
            self._warn(self._notice.hint)
        return self._report

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; differs where settings differ."""
        plain = {**self.settings.plain(), "source": self.source, "max_samples": self.max_samples}
        plain |= {"step": self.step} if self.step != "validation" else {}
        return self._generate_state_key(**plain, loss_fn=checks.name_of(self.loss_fn))

    def state_dict(self) -> dict[str, Any]:
        """Return the history, as plain values and tensors."""
        history = NeuronHistory().state_dict()
        with keeping_training(self, "the history is not in the checkpoint"):
            history = self.history.state_dict()
        return {"version": 1, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint; one that cannot be read begins anew."""
        history = NeuronHistory()
        with keeping_training(self, "the history of the checkpoint cannot be read and begins anew"):
            history.load_state_dict(state_dict["history"])
            self.history = history

    # -- before anything runs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any time has been spent."""
        who = type(self).__name__
        self._offered = False
        if stage == "predict":
            return  # nothing is measured
        checks.refuse_sharded(who, trainer.strategy)
        if stage == "fit" and checks.is_another(self, pl_module):
            self.history = NeuronHistory()
        if self.step == "training":
            checks.require_training_step(who, pl_module)
        if stage == "fit" and self.source == "val" and (why := checks.why_no_validation(trainer)) is not None:
            self._warn(f"the Trainer runs no validation ({why}), so nothing will be measured. {checks.INSTEAD}")
        if stage == "fit" and self.source == "train" and self.loss_fn is None and self.step == "validation":
            checks.require_validation_step(who, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what does not fit the layers: a module may make them in its own setup, which comes after ours."""
        checks.check_layers(type(self).__name__, pl_module, self.settings.layers)
        checks.check_room(type(self).__name__, pl_module, self.settings, trainer.strategy.root_device)

    # -- the stretches of data

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure on validation data, if it is due; the sanity check finds out what cannot work."""
        waits = trainer.sanity_checking and checks.is_unfinished(pl_module)  # the check gives lazy layers their neurons
        if (self.source == "val" or trainer.state.fn != "fit") and self._due(trainer) and not waits:
            self._begin(trainer, pl_module, "validation_step", evaluation_loaders)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure on test data."""
        if not candidates(pl_module):
            self._warn(f"{type(pl_module).__name__} has no convolutional or linear layer, so nothing is measured")
            return
        self._begin(trainer, pl_module, "test_step", evaluation_loaders)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure on training data, if it is due."""
        self._publish(trainer)
        if self.source == "train" and self._due(trainer):
            self._begin(trainer, pl_module, "validation_step", training_loaders)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the module's own forward on this batch."""
        session = self._session(trainer, "val")
        if session is not None:
            self._attempt(lambda: session.open(batch, batch_idx, dataloader_idx))
            self._attempt(lambda: keep_weights(trainer, pl_module, self, batch_idx))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop watching; run the picked samples again with gradients."""
        session = self._session(trainer, "val")
        if session is not None:
            self._attempt(lambda: self._close(trainer, session, batch_idx, dataloader_idx))
            self._raise_failure(trainer)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Take samples before the step can change them."""
        session = self._session(trainer, "train")
        if session is not None:
            self._attempt(lambda: session.open(batch, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Run the picked samples in evaluation mode, with the weights that the step has left."""
        session = self._session(trainer, "train")
        if session is not None:
            self._attempt(lambda: session.close(batch_idx))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the report."""
        with validated_weights(trainer):
            self._finish(trainer, pl_module, "val")

    on_test_epoch_end = on_validation_epoch_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the report of training data."""
        self._finish(trainer, pl_module, "train")

    # -- the end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report at the step at which Lightning logs the validation; print that of ``trainer.validate``."""
        forget_weights(trainer)
        self._publish(trainer)
        if trainer.state.fn == "validate":
            self._show(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the report of ``trainer.test``."""
        forget_weights(trainer)
        self._publish(trainer)
        self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last report of training data."""
        self._publish(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the latest report."""
        self._show(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop the measurement and its hooks, also in the middle of a batch."""
        self._drop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the measurement and its hooks."""
        self._drop(trainer)
        end_together(trainer)

    def _due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.every_n_epochs == 1:
            return True
        if not self._offered and monitored(trainer, f"neurons{numbered_observer(trainer, self)}"):
            return True  # what follows a metric expects it from the first validation on
        return checks.is_due(trainer.current_epoch, self.every_n_epochs, [e.epoch for e in self.history.entries[-1:]])

    def _begin(self, trainer: Trainer, pl_module: LightningModule, step: str, loaders_of: LoadersOf) -> None:
        self._active, self._failure = "train" if trainer.training else "val", None
        self._attempt(lambda: self._join(trainer, pl_module, step, *loaders_of(trainer)))
        self._raise_failure(trainer)

    def _join(self, trainer: Trainer, pl_module: LightningModule, step: str, loaders: Any, batches: Any) -> None:
        settings = self.settings
        checks.require_layers(pl_module, settings.layers)
        measurement = Measurement(
            pl_module, settings.criteria, layers=settings.layers, per_class=settings.by_class, device=pl_module.device
        )
        assert self._active is not None, "set just before"
        member = Member(measurement, settings, dataloaders=len(loaders) if self._active == "val" else 1)
        if measurement.needs_gradients or self._active == "train":
            total = stream_length(loaders, batches)
            step = "training_step" if self.step == "training" else step
            by_sample = settings.loss_reduction == "none"
            member.replay = StepReplay(trainer, pl_module, step, self.loss_fn, by_sample=by_sample)
            member.sample = StratifiedSample(math.ceil(self.max_samples / trainer.world_size), total)
        self._member = member
        Session.join(trainer, pl_module, self._active, member)

    def _close(self, trainer: Trainer, session: Session, batch_idx: int, dataloader_idx: int) -> None:
        with validated_weights(trainer, in_batch=True):
            session.close(batch_idx, dataloader_idx)

    def _session(self, trainer: Trainer, source: str) -> Session | None:
        return Session.of(trainer, source) if source == self._active else None

    def _finish(self, trainer: Trainer, pl_module: LightningModule, source: str) -> None:
        """Make the report, if nothing has failed in any process: they wait for one another's sums."""
        if source != self._active:
            return
        member, session = self._member, self._session(trainer, source)
        if session is not None:
            self._attempt(session.finish)
        if self._all_well(trainer) and self._has_something(trainer) and not trainer.sanity_checking:
            made = self._attempt(lambda: self._made(trainer))
            if self._all_well(trainer):
                self._take(trainer, pl_module, *made)
        self._active = self._member = self._failure = None
        if session is not None and member is not None:
            with keeping_training(self, "a measurement was not ended"):
                session.leave(member)

    def _all_well(self, trainer: Trainer) -> bool:
        """Return True if no process has failed, else warn of the error. Call it in all processes."""
        failure = self._why
        if trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            return True
        self._raise_failure(trainer)
        reason = "another process failed" if failure is None else checks.said_of(failure)
        self._warn(f"epoch {trainer.current_epoch} was not measured: {reason}", once=reason)
        return False

    def _has_something(self, trainer: Trainer) -> bool:
        """Return True if any criterion was measured; warn of those that were not. Call it in all processes."""
        member = self._member
        assert member is not None, "nothing has failed"
        if member.sample is None or member.has_sensitivity(trainer.strategy.reduce_boolean_decision):
            return True
        self._raise_failure(trainer)
        reason = "another process failed" if member.lost is None else checks.said_of(member.lost)
        member.measurement.leave_out_gradients()
        if not member.measurement.criteria:
            self._warn(f"epoch {trainer.current_epoch} was not measured: {reason}", once=reason)
            return False
        member.notes.append(f"sensitivity was not measured: {reason}")
        self._warn(f"sensitivity was not measured in {checks.stretch_of(trainer)}: {reason}", once=reason)
        return True

    def _made(self, trainer: Trainer) -> tuple[NeuronReport, HistoryEntry]:
        """Return the report, and its comparison with the one before."""
        assert self._member is not None, "nothing has failed"
        measurement, sample = self._member.measurement, self._member.sample
        measurement.merge_processes(trainer.world_size)
        fitting = trainer.state.fn == "fit"
        notes = [] if sample is None or self._member.lost is not None else [sample.describe()]
        if trainer.world_size > 1:
            notes = [f"process {trainer.global_rank} of {trainer.world_size}: {note}" for note in notes]
        report = measurement.report(
            settings=self.settings.plain() | {n: getattr(self, n) for n in ("source", "step", "max_samples")},
            notes=[*notes, *self._member.described()],
            epoch=trainer.current_epoch if fitting else None,
            step=trainer.global_step if fitting else None,
        )
        looked = any(c.statistics for c in self.settings.criteria)
        if looked and not any(c.samples.any() or c.gradient_samples.any() for c in report.counts.values()):
            infinite = any(c.nonfinite.any() for c in report.counts.values())
            why = "all activations were NaN or infinite" if infinite else "the data was empty, or no layer ran"
            self._warn(f"no sample was measured: {why}")
        if not fitting:  # other data: what differs from the last epoch has not happened in between
            return report, NeuronHistory().compare(report)
        try:
            return report, self.history.compare(report)
        except Exception as error:  # noqa: BLE001
            self._warn(f"a report was not compared with the one before: {checks.said_of(error)}")
            return report, NeuronHistory().compare(report)

    def _take(self, trainer: Trainer, pl_module: LightningModule, report: NeuronReport, entry: HistoryEntry) -> None:
        self._report = report
        if trainer.state.fn == "fit":
            with keeping_training(self, "the report is not in the history"):
                self.history.keep(report, entry)
        if self.publishes:
            self._unpublished = report, entry
            self._notice.leave(None)
            with keeping_training(self, "the report was not offered to other callbacks"):
                suffix = numbered_observer(trainer, self) + apart(trainer)
                values = {with_suffix(name, suffix): value for name, value in scalars(report, entry).items()}
                offer(trainer, pl_module, values, f"neurons{suffix}", everything=self.log_metrics)
                self._offered = True

    def _publish(self, trainer: Trainer) -> None:
        if self._unpublished is not None:
            (report, entry), self._unpublished = self._unpublished, None
            with keeping_training(self, "the report was not written"):
                self._notice.leave(publish(trainer, self, report, entry))

    @property
    def _why(self) -> Exception | None:
        """The error that has ended the current measurement, if any."""
        return self._failure or (self._member.failure if self._member else None)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Run a part of the measurement; an error ends the measurement, not the training.

        Returns:
            What the action returns, or None after an error, which is kept for a warning.
        """
        try:
            return action()
        except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
            self._failure = error
            return None

    def _raise_failure(self, trainer: Trainer) -> None:
        """Raise the measurement's error in the sanity check or without training, where no training is lost by it."""
        if not (trainer.sanity_checking or trainer.state.fn != "fit"):
            return
        failure, lost = self._why, self._member.lost if self._member else None
        # A module without a loss is as it is; with a loss_fn, something was asked for that fails.
        if lost is not None and (self.loss_fn is not None or not isinstance(lost, NoLossError)):
            failure = failure or lost
        if isinstance(failure, MisconfigurationException):
            raise failure
        # An error that no argument of the callback causes must not end a run that would work without it.
        may_fail = isinstance(failure, ArgumentError) or self.loss_fn is not None or self.settings.may_fail
        if failure is not None and may_fail:
            raise MisconfigurationException(f"{type(self).__name__}: {failure}") from failure

    def _show(self, trainer: Trainer) -> None:
        if self._report is None:
            self._warn("nothing has been measured")
        else:
            with keeping_training(self, "the report was not shown"):
                show(trainer, self)

    def _drop(self, trainer: Trainer) -> None:
        forget_weights(trainer)
        if self._active is not None:
            Session.end(trainer, self._active)
        self._active = self._member = self._failure = self._unpublished = None

    def _warn(self, message: str, once: str | None = None) -> None:
        """Warn, unless the same message (or the same ``once``) has been given before."""
        if (once or message) not in self._warned:
            self._warned.add(once or message)
            rank_zero_warn(f"{type(self).__name__}: {message}")
