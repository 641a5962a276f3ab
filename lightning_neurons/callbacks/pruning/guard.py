"""Recovery after a cut: a metric must stay within a bound, else the cut is undone; the model before may teach.

Everything happens when an epoch begins, or when training has ended: checkpoints then hold scores that belong to their
weights. A checkpoint that is written during a recovery also holds the last good state, so a resumed run can go back.
"""

from typing import Any

from lightning_neurons.callbacks.pruning import suitability
from lightning_neurons.callbacks.pruning.ablation_check import ForesightedPruner
from lightning_neurons.callbacks.pruning.cutting import average_again, averages_of, reset_early_stopping
from lightning_neurons.callbacks.pruning.distiller import Distiller
from lightning_neurons.callbacks.pruning.guard_state import Keeping
from lightning_neurons.callbacks.pruning.recovery_settings import SMALLEST_STEP
from lightning_neurons.callbacks.pruning.settings import PruningSettings
from lightning_neurons.callbacks.pruning.snapshot import restore_models, restore_snapshot, take_snapshot
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.rounds import PruningRound
from lightning_neurons.pruning.surgery.surgery import Operation
from lightning_neurons.report.logging.pruning import taken_back_scalars


class NeuronKeeper(ForesightedPruner):
    """A pruner that undoes cuts after which the monitored metric does not recover.

    Attributes:
        keeping: The state of the guard.
    """

    def __init__(self, settings: MeasurementSettings, pruning: PruningSettings) -> None:
        super().__init__(settings, pruning)
        self.keeping = Keeping()
        how = pruning.distillation
        self._distiller = None if how is None else Distiller(type(self).__name__, how)

    def state_dict(self) -> dict[str, Any]:
        """Return the pruner's state, the last good state and the teacher, as plain values and tensors."""
        teacher = None if self._distiller is None else self._distiller.state_dict()
        return {**super().state_dict(), "keeping": self.keeping.state_dict(), "distillation": teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        with self._reading_state():
            keeping = Keeping.of(state_dict.get("keeping", {}))
        super().load_state_dict(state_dict)
        self.keeping = keeping
        if self._distiller is not None and state_dict.get("distillation") is not None:
            self._distiller.load_state_dict(state_dict["distillation"])
        if self.pruning.guard is not None and self.rounds.done and self.keeping.baseline is None:
            self._warn("the checkpoint was written without max_drop=: what it has lost already is not known")

    def _adopt(self, state: dict[str, Any]) -> None:
        super()._adopt(state)
        self.keeping.progress, self.keeping.step, self.keeping.stopped = 0.0, 1.0, False

    # -- before anything runs

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the logits, and a teacher that is given as a file."""
        was_restored = self._restored
        super().on_fit_start(trainer, pl_module)
        good = self.keeping.good
        if self.keeping.judge_after is not None and good is not None and not was_restored:  # a fit has failed
            models = (pl_module, *averages_of(trainer))  # an average has been copied before
            restore_models(models, good, self._book_undone)
            self._warn("the fit before ended in the middle of a recovery: the model before that cut comes back")
        if not was_restored:
            self.keeping.judge_after, self.keeping.good = None, None
        if self._distiller is not None:
            self._distiller.begin(pl_module)

    def _forget(self, is_fresh: bool) -> None:
        super()._forget(is_fresh)
        self.keeping = Keeping()
        if self._distiller is not None:
            self._distiller.forget()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Warn if training will end before a cut has recovered, or with weights that were not validated."""
        super().setup(trainer, pl_module, stage)
        pruning, epochs = self.pruning, trainer.max_epochs or -1
        if stage == "fit" and pruning.guard is not None:
            suitability.warn_of_unseen_weights(self._warn, trainer)
        open_ends = self.keeping.judge_after is not None or self.rounds.number < pruning.schedule.rounds
        if stage == "fit" and (pruning.guard or pruning.distillation) and open_ends and not self.keeping.stopped:
            end = pruning.schedule.epoch_of(pruning.schedule.rounds) + pruning.recovery_epochs
            if 0 < epochs < end:
                last = f"the {pruning.recovery_epochs} epochs of recovery after the last round"
                self._warn(f"training ends before {last} do: max_epochs is {epochs}, and it would take {end}")

    # -- deciding

    def _is_near(self, trainer: Any) -> bool:
        return not self.keeping.stopped and super()._is_near(trainer)

    def _decide(self, trainer: Any, pl_module: Any) -> None:
        if not self.keeping.stopped:
            super()._decide(trainer, pl_module)

    def _due_budget(self, number: int) -> PruningBudget:
        if self.pruning.guard is None:
            return super()._due_budget(number)
        way = self.pruning.progress(number)
        return self.pruning.budget.at(self._reach(way))

    def _reach(self, way: float) -> float:
        """Return the share of the budget to reach in a round; after a violation, only part of the step is made."""
        return self.keeping.progress + self.keeping.step * max(way - self.keeping.progress, 0.0)

    # -- epochs

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the distillation hooks before the first batch: an error about logits comes now, not after a cut."""
        if self._distiller is not None:
            self._distiller.listen(trainer, pl_module)
        if self.keeping.baseline is not None and self.rounds.done and self.keeping.good is None:
            self._remember(trainer, pl_module)  # what a fit before has left was good
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Compare the metric after a recovery with its bound; then make the next cut, if one is due."""
        if self._validated:
            suitability.require_monitor(type(self).__name__, trainer, self.pruning.monitor)
        if self.pruning.guard is not None:
            self._look(trainer, trainer.current_epoch - 1)
            self._judge(trainer, pl_module)
            self._prepare_to_cut(trainer, pl_module)
        pending = self.rounds.pending
        if self._distiller is not None and pending is not None and pending.tensor_cuts:
            self._distiller.learn(pl_module)
        super().on_train_epoch_start(trainer, pl_module)
        if self._distiller is not None:
            self._distiller.on_epoch(trainer.current_epoch, is_over=self._is_over())

    def _book(self, trainer: Any, made: PruningRound, operation: Operation) -> None:
        super()._book(trainer, made, operation)
        last = trainer.current_epoch + self.pruning.recovery_epochs - 1
        if made.plan and self.pruning.guard is not None:
            operation.keep(self.keeping)
            self.keeping.judge_after, self.keeping.measured = last, False
        if made.plan and self._distiller is not None:
            operation.keep(self._distiller)
            self._distiller.until = last

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check that the distillation hooks have seen the logits."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._distiller is not None:
            self._distiller.check(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Check that the distillation hooks have seen the logits in this epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._distiller is not None:
            self._distiller.check(pl_module, is_last=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Undo cuts whose metric is beyond its bound when training ends."""
        super().on_train_end(trainer, pl_module)
        if self._end(trainer, pl_module):
            average_again(trainer, pl_module, self)
        if self._distiller is not None:
            self._distiller.leave()
            self._distiller.on_epoch(trainer.current_epoch, is_over=self._is_over())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Do as ``on_train_end``, for a resumed run that had no epoch left."""
        self._end(trainer, pl_module)
        super().on_fit_end(trainer, pl_module)

    def _is_over(self) -> bool:
        over = self.rounds.number >= self.pruning.schedule.rounds or self.keeping.stopped
        return over and self.keeping.judge_after is None

    # -- the contract

    def _hear(self, trainer: Any, value: float, epoch: int) -> None:
        super()._hear(trainer, value, epoch)
        self.keeping.latest, self.keeping.validated, self.keeping.measured = value, epoch, True
        self.keeping.step_of_latest = trainer.global_step

    def _end(self, trainer: Any, pl_module: Any) -> bool:
        """Undo cuts whose metric is beyond its bound when training has ended; return True if there were any."""
        keeping, guard = self.keeping, self.pruning.guard
        if guard is None or keeping.good is None or keeping.baseline is None or not self.rounds.done:
            return False
        self._look(trainer, trainer.current_epoch)
        keeping.measured = keeping.measured and keeping.step_of_latest == trainer.global_step
        broken = not guard.holds(keeping.latest if keeping.measured else None, keeping.baseline)
        if broken:
            self._take_back(trainer, pl_module)
        elif self.rounds.number:
            keeping.progress = self._reach(self.pruning.progress(self.rounds.number))
        keeping.judge_after, keeping.good = None, None
        return broken

    def _judge(self, trainer: Any, pl_module: Any) -> None:
        """Undo a cut that is beyond the bound after its recovery; otherwise store this state as the last good one."""
        keeping, guard = self.keeping, self.pruning.guard
        if guard is None or keeping.baseline is None or not self.rounds.done or not keeping.measured:
            return
        is_judged = keeping.judge_after is None
        if not is_judged and keeping.validated < (keeping.judge_after or 0):
            return
        if guard.holds(keeping.latest, keeping.baseline):
            keeping.judge_after = None
            keeping.progress = (
                self._reach(self.pruning.progress(self.rounds.number)) if not is_judged else keeping.progress
            )
            self._remember(trainer, pl_module)
        elif not is_judged:
            self._take_back(trainer, pl_module)

    def _remember(self, trainer: Any, pl_module: Any) -> None:
        """Store the current state as the last good one."""
        self.keeping.good, self.keeping.good_rounds = take_snapshot(trainer, pl_module), len(self.rounds.done)

    def _prepare_to_cut(self, trainer: Any, pl_module: Any) -> None:
        keeping, guard, pending = self.keeping, self.pruning.guard, self.rounds.pending
        if guard is None or pending is None or not pending.tensor_cuts:
            return
        why = None
        if keeping.judge_after is not None:
            why = "the cut before it has not been judged: no validation since"
        elif keeping.baseline is None and not guard.holds(keeping.latest, keeping.latest or 0.0):
            why = f"{guard.monitor} is {keeping.latest}, so there is nothing to keep"
        elif keeping.baseline is not None and not guard.holds(keeping.latest, keeping.baseline):
            bound = guard.bound(keeping.baseline)
            why = f"{guard.monitor} is {keeping.latest} already, and {bound:.4g} is the worst that is allowed"
        if why is not None:
            self.rounds.pending = None
            self._warn(f"round {pending.number} is not made at epoch {trainer.current_epoch}: {why}")
            return
        keeping.baseline = keeping.latest if keeping.baseline is None else keeping.baseline
        self._remember(trainer, pl_module)

    def _take_back(self, trainer: Any, pl_module: Any) -> None:
        keeping, guard = self.keeping, self.pruning.guard
        assert guard is not None and keeping.good is not None and keeping.baseline is not None, "asked before"
        now = f"was {keeping.latest:.4g}" if keeping.measured and keeping.latest is not None else "was not measured"
        undone = len(self.rounds.done) - keeping.good_rounds
        what = f"{undone} round{'s' * (undone != 1)} taken back" if undone else "its last good state comes back"
        least = f"{guard.bound(keeping.baseline):.4g} is the worst that is allowed"
        restore_snapshot(trainer, pl_module, keeping.good, self._book_violation)
        if self.pruning.reset_early_stopping:
            reset_early_stopping(trainer)
        self._warn(f"{guard.monitor} {now} before epoch {trainer.current_epoch}, and {least}: {what}")
        self._write(trainer, taken_back_scalars(self.rounds))

    def _book_undone(self, operation: Operation) -> None:
        """Record that rounds were undone, as a part of restoring the state."""
        operation.keep(self.rounds)
        self.rounds.take_back(self.keeping.good_rounds)

    def _book_violation(self, operation: Operation) -> None:
        keeping, guard = self.keeping, self.pruning.guard
        assert guard is not None, "asked before"
        self._book_undone(operation)
        operation.keep(keeping)
        keeping.judge_after, keeping.latest = None, None  # it was that of the model that has gone
        keeping.good = keeping.good if self.rounds.done else None  # without a cut there is no contract
        if guard.on_violation == "stop" or keeping.step / 2 < SMALLEST_STEP:
            keeping.stopped = True
        else:
            keeping.step /= 2
        if self._distiller is not None:
            operation.keep(self._distiller)
            self._distiller.until = -1

    def _drop(self, trainer: Any) -> None:
        if self._distiller is not None:
            self._distiller.leave()
        super()._drop(trainer)
