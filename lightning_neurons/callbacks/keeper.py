"""The time after a cut: it is guarded by a contract about a metric, and the model before it may teach.

Everything happens when an epoch begins, or when training has ended: checkpoints then hold scores that belong to their
weights. A checkpoint that is written during a recovery also holds the last good state, so a resumed run can go back.
"""

from typing import Any

from lightning_neurons.callbacks.distiller import Distiller
from lightning_neurons.callbacks.keeping import Keeping
from lightning_neurons.callbacks.pruner import NeuronPruner
from lightning_neurons.callbacks.pruning_settings import PruningSettings
from lightning_neurons.callbacks.recovery_settings import SMALLEST_STEP
from lightning_neurons.callbacks.snapshot import restore_snapshot, take_snapshot
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.report.pruning import taken_back_scalars
from lightning_neurons.studies.settings import MeasurementSettings


class NeuronKeeper(NeuronPruner):
    """A pruner that keeps what its user must not lose.

    Attributes:
        keeping: The state of the guard.
    """

    def __init__(self, settings: MeasurementSettings, pruning: PruningSettings) -> None:
        super().__init__(settings, pruning)
        self.keeping = Keeping()
        how = pruning.distillation
        self._distiller = None if how is None or how.weight == 0 else Distiller(type(self).__name__, how)

    def state_dict(self) -> dict[str, Any]:
        """That of the pruner, the last good state and the teacher, as plain values and tensors."""
        teacher = None if self._distiller is None else self._distiller.state_dict()
        return {**super().state_dict(), "keeping": self.keeping.state_dict(), "distillation": teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint left off."""
        super().load_state_dict(state_dict)
        self.keeping = Keeping(**state_dict["keeping"])
        if self._distiller is not None and state_dict["distillation"] is not None:
            self._distiller.load_state_dict(state_dict["distillation"])

    # -- before anything runs

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the contract about another model; find the logits, and a teacher that is given as a file."""
        had = len(self.rounds.done)
        super().on_fit_start(trainer, pl_module)
        if had and not self.rounds.done:
            self.keeping = Keeping()
        if self._distiller is not None:
            self._distiller.begin(pl_module)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Say early if training will end before a cut has recovered."""
        super().setup(trainer, pl_module, stage)
        pruning = self.pruning
        if stage == "fit" and (pruning.guard or pruning.distillation) and (trainer.max_epochs or -1) > 0:
            end = pruning.schedule.epoch_of(pruning.schedule.rounds) + pruning.recovery_epochs
            if end > trainer.max_epochs:
                self._warn(
                    f"training ends before the {pruning.recovery_epochs} epochs of recovery after the last round do: "
                    f"max_epochs is {trainer.max_epochs}, and it would take {end}"
                )

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
        """How far to go of a way that is due; after a violation, only part of the step."""
        done = self.keeping.progress
        return done + self.keeping.step * max(way - done, 0.0)

    # -- epochs

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the teacher listen, from the first batch on: logits that cannot be found are an error now, not later."""
        if self._distiller is not None:
            self._distiller.listen(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Judge a cut that has recovered; then make the next, if there is one."""
        if self.pruning.guard is not None:
            self._read_metric(trainer)
            self._judge(trainer, pl_module)
            self._prepare_to_cut(trainer, pl_module)
        rounds = len(self.rounds.done)
        pending = self.rounds.pending
        if self._distiller is not None and pending is not None and pending.cuts:
            self._distiller.learn(pl_module)
        super().on_train_epoch_start(trainer, pl_module)
        made = self.rounds.done[-1] if len(self.rounds.done) > rounds else None
        last = trainer.current_epoch + self.pruning.recovery_epochs - 1
        if made is not None and made.plan and self.pruning.guard is not None:
            self.keeping.judge_after = last
        if self._distiller is not None:
            if made is not None and made.plan:
                self._distiller.until = last
            over = self.rounds.number >= self.pruning.schedule.rounds or self.keeping.stopped
            self._distiller.on_epoch(trainer.current_epoch, is_over=over and self.keeping.judge_after is None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See whether the teacher has heard anything."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._distiller is not None:
            self._distiller.check(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the metric."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.pruning.guard is not None:
            self.keeping.validated = trainer.current_epoch
            self._read_metric(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """A model that breaks the contract does not leave training."""
        if self._distiller is not None:
            self._distiller.leave()
        super().on_train_end(trainer, pl_module)
        self._end(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The same for a resumed run that had no epoch left; then show what has been done."""
        self._end(trainer, pl_module)
        super().on_fit_end(trainer, pl_module)

    def _end(self, trainer: Any, pl_module: Any) -> None:
        if self.pruning.guard is None or self.keeping.good is None or self.keeping.baseline is None:
            return
        self._read_metric(trainer)
        cut_at = self.rounds.done[-1].epoch if self.rounds.done else -1
        known = self.keeping.latest if self.keeping.validated >= cut_at else None
        if not self.pruning.guard.holds(known, self.keeping.baseline):
            self._take_back(trainer, pl_module)
        self.keeping.judge_after, self.keeping.good = None, None

    # -- the contract

    def _read_metric(self, trainer: Any) -> None:
        """The latest value of the metric; the first process has the say, as it may not have been synchronised."""
        assert self.pruning.guard is not None, "asked before"
        value = trainer.callback_metrics.get(self.pruning.guard.monitor)
        mine = self.keeping.latest if value is None else float(value)
        self.keeping.latest = trainer.strategy.broadcast(mine, 0)

    def _judge(self, trainer: Any, pl_module: Any) -> None:
        keeping, guard = self.keeping, self.pruning.guard
        if keeping.judge_after is None or keeping.validated < keeping.judge_after or guard is None:
            return
        assert keeping.baseline is not None, "there was a cut"
        if not guard.holds(keeping.latest, keeping.baseline):
            self._take_back(trainer, pl_module)
            return
        keeping.judge_after = None
        self._remember(trainer, pl_module)

    def _remember(self, trainer: Any, pl_module: Any) -> None:
        """What is now is good."""
        keeping, number = self.keeping, self.rounds.number
        keeping.progress = self._reach(self.pruning.progress(number)) if number else 0.0
        keeping.good, keeping.good_rounds = take_snapshot(trainer, pl_module), len(self.rounds.done)

    def _prepare_to_cut(self, trainer: Any, pl_module: Any) -> None:
        """Put aside what is there; or do not cut what cannot be guarded."""
        keeping, guard, pending = self.keeping, self.pruning.guard, self.rounds.pending
        if guard is None or pending is None or not pending.cuts:
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
        if keeping.baseline is None:
            keeping.baseline = keeping.latest
            keeping.good, keeping.good_rounds = take_snapshot(trainer, pl_module), len(self.rounds.done)
        elif keeping.good_rounds == len(self.rounds.done):
            keeping.good = take_snapshot(trainer, pl_module)

    def _take_back(self, trainer: Any, pl_module: Any) -> None:
        """Put the last good state back, and go on without the rounds since."""
        keeping, guard = self.keeping, self.pruning.guard
        assert guard is not None, "asked before"
        assert keeping.good is not None, "put aside before the first cut"
        assert keeping.baseline is not None, "noted before the first cut"
        restore_snapshot(trainer, pl_module, keeping.good)
        undone = self.rounds.take_back(keeping.good_rounds)
        keeping.judge_after, bound = None, guard.bound(keeping.baseline)
        self._warn(
            f"{guard.monitor} was {keeping.latest:.4g} after {self.pruning.recovery_epochs} epochs of recovery, and "
            f"{bound:.4g} is the worst that is allowed: {undone} round{'s' * (undone != 1)} taken back"
        )
        keeping.latest = None  # it was that of the model that has gone
        self._write(trainer, taken_back_scalars(self.rounds))
        if guard.on_violation == "stop" or keeping.step / 2 < SMALLEST_STEP:
            keeping.stopped = True
        else:
            keeping.step /= 2
        if self._distiller is not None:
            self._distiller.until = -1

    def _drop(self, trainer: Any) -> None:
        if self._distiller is not None:
            self._distiller.leave()
        super()._drop(trainer)
