"""The rounds of pruning in a fit: what the parts of the callback do, and in which order.

Neurons are measured when a round is due, a cut is decided when that validation ends, and made when the next training
epoch begins. Until then it is pending and goes into every checkpoint, so that the scores in a checkpoint belong to its
weights, and a resumed run goes on as the uninterrupted one would have.
"""

from dataclasses import replace
from functools import partial
from typing import Any, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_neurons.callbacks.pruning import resume, suitability
from lightning_neurons.callbacks.pruning.ablation_check import AblationCheck
from lightning_neurons.callbacks.pruning.checkpoint import follow_checkpoints, stop_following
from lightning_neurons.callbacks.pruning.cutting import averages_of, cut_in_fit, reset_early_stopping
from lightning_neurons.callbacks.pruning.decider import Decider
from lightning_neurons.callbacks.pruning.distiller import Distiller
from lightning_neurons.callbacks.pruning.guard import MetricGuard
from lightning_neurons.callbacks.pruning.monitored import MonitoredMetric
from lightning_neurons.callbacks.pruning.part import Fit, Host, Part
from lightning_neurons.callbacks.pruning.samples import Samples
from lightning_neurons.callbacks.pruning.settings import PruningSettings
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer, is_fast_dev_run
from lightning_neurons.callbacks.trainer.outlet import keeping_training
from lightning_neurons.callbacks.trainer.runner import check_cut
from lightning_neurons.errors import PruningError
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.rounds import PruningRound, Rounds
from lightning_neurons.pruning.structure.costs import latency
from lightning_neurons.pruning.surgery.surgery import Operation
from lightning_neurons.report.logging.pruning import print_rounds, round_scalars, start_scalars
from lightning_neurons.results.neuron_report import NeuronReport


@final
class Pruner:
    """The state of a pruning callback and its parts.

    Args:
        who: The callback's name, for messages.
        settings: Its settings.

    Attributes:
        rounds: The cuts so far, and the one that is decided.
        progress: Where the fit stands.
        samples: What the latest validation has left.
        metric: The monitored metric.
        decider: Makes plans.
        guard: Undoes cuts after which the metric does not recover.
        distiller: Lets the model before a cut teach the one after it; None if that is not asked for.
        parts: Those of these that follow the protocol ``Part``, in the order in which they are asked.
    """

    def __init__(self, who: str, settings: PruningSettings) -> None:
        self.settings = settings
        self.rounds, self.progress, self.samples = Rounds(), resume.Progress(), Samples()
        self.metric = MonitoredMetric(settings.monitor)
        self.decider, self.guard = Decider(), MetricGuard(settings.guard)
        check = None if settings.check is None else AblationCheck()
        self.distiller = None if settings.distillation is None else Distiller(who, settings.distillation)
        parts: tuple[Part | None, ...] = (self.decider, check, self.guard, self.distiller)
        self.parts = tuple(part for part in parts if part is not None)

    def fit(self, callback: Host, trainer: Trainer, pl_module: LightningModule) -> Fit:
        """Return what the parts see of a fit."""
        return Fit(callback, trainer, pl_module, self.samples, self.parts)

    # -- before anything runs

    def refuse(self, fit: Fit) -> None:
        """Refuse a fit that cannot work.

        Raises:
            MisconfigurationException: Saying why, and what would.
        """
        schedule, number, last = self.settings.schedule, self.rounds.number + 1, fit.trainer.max_epochs or -1
        start = schedule.epoch_of(number) if number <= schedule.rounds else None
        suitability.refuse_strategy(fit.who, fit.trainer)
        suitability.refuse_run(fit.who, fit.trainer, fit.pl_module, start, self.settings.patience)
        if start is not None and start < last <= schedule.epoch_of(schedule.rounds):
            fit.warn(f"training ends before the last round, of epoch {schedule.epoch_of(schedule.rounds)}")
        suitability.refuse_company(fit.who, fit.trainer, type(fit.callback))
        suitability.warn_of_stale_checkpoints(fit.warn, fit.trainer)

    def prepare(self, fit: Fit, stage: str) -> None:
        """Let checkpoints of other widths be loaded, in every stage; let the parts warn before a fit."""
        for module in (fit.pl_module, *averages_of(fit.trainer)):  # an average may have been copied before
            follow_checkpoints(module)
        for part in self.parts if stage == "fit" else ():
            part.on_setup(fit)

    def on_fit_start(self, fit: Fit) -> None:
        """Refuse optimizers that cannot go on, and rounds of another model."""
        suitability.refuse_patterns(fit.pl_module, self.settings.budget)
        suitability.refuse_optimizers(fit.who, fit.trainer)
        resume.begin(fit, self.progress)

    # -- measuring

    def is_near(self, trainer: Trainer) -> bool:
        """Return True if this validation is the sanity check, or is needed for a round or its ``patience``."""
        if self.guard.keeping.stopped:
            return False
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return trainer.sanity_checking
        every = trainer.check_val_every_n_epoch or 1
        is_near = self.settings.is_near(self.rounds.number + 1, trainer.current_epoch, every)
        return is_fast_dev_run(trainer) or is_near

    def begin_validation(self, trainer: Trainer, max_samples: int) -> None:
        """Begin to keep samples, if a round is due or near."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.progress.begin_validation(self.rounds)
        wanted = self.settings.calibrates or self.settings.monitor is not None
        self.samples.begin(max_samples if wanted and self.is_near(trainer) else 0)

    # -- deciding

    def end_measurement(self, fit: Fit, report: NeuronReport | None) -> None:
        """Decide on the round that is due; in a trial run, only try a plan.

        Args:
            fit: At the end of a validation epoch.
            report: Its measurement, if there is one.

        Raises:
            MisconfigurationException: If no plan can be made, before training has begun.
        """
        trainer = fit.trainer
        is_trial = trainer.sanity_checking or is_fast_dev_run(trainer)
        measured = not self.settings.measures or report is not None
        # The first process decides for all: another one may have had no data.
        if not trainer.strategy.broadcast(self.samples.runner is not None and (is_trial or measured), 0):
            return
        try:
            if is_trial:
                self.samples.drop_kept()  # a resumed run must not take these few for a validation
                self.decider.try_plan(fit)
            elif not self.guard.keeping.stopped:
                self._decide(fit, report)
        except PruningError as error:  # before training begins it is an error, later it costs a round
            if trainer.global_step == 0:
                raise MisconfigurationException(f"{fit.who}: {error}") from error
            fit.warn(f"no plan could be made after epoch {trainer.current_epoch}: {error}", once=str(error))

    def _decide(self, fit: Fit, report: NeuronReport | None) -> None:
        schedule, epoch = self.settings.schedule, fit.trainer.current_epoch
        is_due = (number := schedule.due(epoch + 1)) > self.rounds.number
        if is_due and suitability.is_over(fit.trainer):
            fit.warn(f"round {number} of {schedule.rounds} is not made: no epoch follows {epoch}")
            return
        cut = self.decider.decide(fit, report, self.due_budget(number), number, is_due=is_due)
        if cut is None:
            return
        self.rounds.pending = None  # until all have agreed
        for part in self.parts:
            if (reason := part.on_decide(fit, cut)) is not None:
                fit.warn(f"round {number} is not made at epoch {epoch + 1}: {reason}")
                return
        self.rounds.pending = cut

    def due_budget(self, number: int) -> PruningBudget:
        """Return the budget of a round of the schedule."""
        return self.settings.budget.at(self.guard.reach(self.settings.progress(number)))

    # -- training

    def on_train_start(self, fit: Fit) -> None:
        """Validate again what a resume has left out, and log the sizes of the model before any cut."""
        for part in self.parts:
            part.on_train_start(fit)
        resume.make_up(fit.trainer, self.progress.validated_at, partial(self._load_training, fit))
        self.progress.begin_training()
        if (dense := self.rounds.dense) is not None and not self.rounds.done:
            fit.write(start_scalars(dense))

    def _load_training(self, fit: Fit) -> None:
        if self.is_near(fit.trainer):
            with keeping_training(fit.callback, "no training step is tried before the next cut"):
                self.samples.load_training(fit.trainer, fit.pl_module)

    def on_train_epoch_start(self, fit: Fit) -> None:
        """Judge the last cut and make the pending one: after every checkpoint of the last epoch, before any batch."""
        if self.progress.stage is resume.Stage.VALIDATED:
            suitability.require_monitor(fit.who, fit.trainer, self.settings.monitor)
        self.look(fit, fit.trainer.current_epoch - 1)
        for part in self.parts:
            part.on_epoch_start(fit)
        cut = self.rounds.pending
        if cut is not None and (reason := self._refusal(fit, cut)) is not None:
            self.rounds.pending = None
            fit.warn(f"round {cut.number} is not made at epoch {fit.trainer.current_epoch}: {reason}")
        elif cut is not None:
            self._carry_out(fit, cut)
        self.samples.begin(0)
        self._go_on(fit)

    def _refusal(self, fit: Fit, cut: Cut) -> str | None:
        for part in self.parts if cut.tensor_cuts else ():
            if (reason := part.before_cut(fit, cut)) is not None:
                return reason
        return None

    def _carry_out(self, fit: Fit, cut: Cut) -> None:
        trainer, monitor = fit.trainer, self.settings.monitor
        before = trainer.callback_metrics.get(monitor) if monitor is not None else None
        made = PruningRound(
            cut.number,
            trainer.current_epoch,
            trainer.global_step,
            cut.plan,
            latency_before=self._latency(fit),
            before=None if before is None else float(before),
        )
        try:
            cut_in_fit(trainer, fit.pl_module, cut.tensor_cuts, cut.shifts, partial(self._record, fit, made))
        except PruningError as error:
            self.rounds.pending = None
            fit.warn(f"round {cut.number} is not made at epoch {trainer.current_epoch}: {error}")
            return
        if self.settings.reset_early_stopping and cut.tensor_cuts:
            reset_early_stopping(trainer)
        # From here on, whatever fails or is interrupted finds a whole cut that has been written down.
        now = None
        with keeping_training(fit.callback, f"{monitor} was not measured after the cut"):
            now = self.metric.now(trainer, fit.pl_module, self.samples.kept)
        self.rounds.done[-1] = made = replace(made, latency=self._latency(fit), cut=now)
        fit.write(round_scalars(made, self.rounds.widths()))
        rank_zero_info(f"{fit.who}: {made.summary}")

    def _record(self, fit: Fit, made: PruningRound, operation: Operation) -> None:
        """Record a round as a part of the cut itself, so that an interruption leaves both or neither."""
        if made.plan:
            check_cut(fit.trainer, self.samples.runner)
        operation.keep(self.rounds)
        self.rounds.finish(made)
        for part in self.parts if made.plan else ():
            part.during_cut(fit, made, operation)

    def _latency(self, fit: Fit) -> float | None:
        runner = self.samples.runner
        if runner is not None:
            with keeping_training(fit.callback, "the time of a forward was not measured"):
                return latency(fit.pl_module, runner.example)
        return None

    def _go_on(self, fit: Fit) -> None:
        is_over = self.guard.is_over(fit)
        for part in self.parts:
            part.after_epoch_start(fit, is_over=is_over)

    def on_train_batch_end(self, fit: Fit) -> None:
        """Let the parts look at a training step that has been made."""
        for part in self.parts:
            part.on_train_batch_end(fit)

    def on_train_epoch_end(self, fit: Fit) -> None:
        """Take the metric if training has logged it, and let the parts look at the epoch."""
        self.look(fit, fit.trainer.current_epoch)
        for part in self.parts:
            part.on_train_epoch_end(fit)

    def look(self, fit: Fit, epoch: int) -> None:
        """Take the monitored metric, if it was logged since the last look, for the end of an epoch."""
        value = self.metric.new_value(fit.trainer)
        if value is None:
            return
        if self.rounds.note_recovery(value):
            fit.write({"pruning/metric_after": value})
        for part in self.parts:
            part.on_metric(fit, value, epoch)

    # -- the end

    def end_validation(self, fit: Fit) -> None:
        """Take the metric; warn in the sanity check if validation does not log it."""
        trainer, monitor = fit.trainer, self.settings.monitor
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.look(fit, trainer.current_epoch)
        metrics = trainer.callback_metrics
        if monitor is not None and trainer.sanity_checking and metrics and monitor not in metrics:
            fit.warn(suitability.unknown_monitor(trainer, monitor))
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.progress.end_validation(trainer)

    def end(self, fit: Fit) -> bool:
        """Undo cuts whose metric is beyond its bound when training has ended.

        Returns:
            Whether there were any.
        """
        if not self.guard.is_waiting(fit):
            return False
        self.look(fit, fit.trainer.current_epoch)
        return self.guard.end(fit)

    def leave_training(self, fit: Fit) -> None:
        """Remove the hooks that parts have for training."""
        for part in self.parts:
            part.leave()
        self._go_on(fit)

    def show(self, fit: Fit) -> None:
        """Print the rounds; warn of cuts that were not made."""
        rounds, trainer = self.rounds, fit.trainer
        if rounds.pending is not None:
            fit.warn(
                f"training ended before a plan for {len(rounds.pending.plan)} neurons was carried out; it is in "
                "checkpoints, and is carried out when training is resumed"
            )
        plan = rounds.plan
        if not plan and not is_fast_dev_run(trainer):
            fit.warn("all cuts have been taken back" if rounds.undone else "nothing has been cut")
        elif plan and rounds.dense is not None and trainer.is_global_zero:
            print_rounds(rounds.done, rounds.dense, rounds.widths(), self.settings.monitor, undone=rounds.undone)

    def drop(self, trainer: Trainer) -> None:
        """Drop everything that belongs to a running fit, also after an error in the middle of it."""
        for part in self.parts:
            part.leave()
        for module in (trainer.lightning_module, *averages_of(trainer)):
            if module is not None:  # an exception may come before there is one
                stop_following(module)
        self.samples.leave()

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return rounds, the pending cut and the state of the parts, as plain values and tensors."""
        return resume.saved(self.rounds, self.progress, self.parts)

    def load_state_dict(self, who: str, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ArgumentError: If it is broken; everything is then as it was.
        """
        resume.restored(who, state, self.rounds, self.progress, self.parts)
