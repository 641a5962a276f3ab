"""Guard of a metric: it must stay within a bound after a cut's recovery, else the cut is undone.

Everything happens when an epoch begins, or when training has ended: checkpoints then hold scores that belong to their
weights. A checkpoint that is written during a recovery also holds the last good state, so a resumed run can go back.
"""

from dataclasses import dataclass
from typing import Any, final

from lightning_neurons.callbacks.pruning import suitability
from lightning_neurons.callbacks.pruning.cutting import averages_of, reset_early_stopping
from lightning_neurons.callbacks.pruning.part import Fit, Part
from lightning_neurons.callbacks.pruning.recovery_settings import SMALLEST_STEP, Guard
from lightning_neurons.callbacks.pruning.snapshot import Snapshot, restore_models, restore_snapshot, take_snapshot
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.rounds import PruningRound
from lightning_neurons.pruning.surgery.surgery import Operation
from lightning_neurons.report.logging.pruning import taken_back_scalars
from lightning_neurons.results.typed import typed


@dataclass
class Keeping:
    """The state of a guard; goes into checkpoints as plain values and tensors.

    Attributes:
        baseline: The metric of the model before the first cut.
        good: The last state whose metric was within the bound, if one is kept.
        good_rounds: The number of rounds that had been made in it.
        progress: The share of the final budget that had been removed in it.
        judge_after: The last epoch of the recovery of the latest cut; None if it has been judged.
        latest: The metric as it was logged last.
        validated: The epoch of ``latest``.
        measured: Whether ``latest`` was logged after the latest cut.
        step_of_latest: The number of optimizer steps at ``latest``.
        step: The share of a round's step that is tried.
        stopped: Whether nothing is cut any more.
    """

    baseline: float | None = None
    good: Snapshot | None = None
    good_rounds: int = 0
    progress: float = 0.0
    judge_after: int | None = None
    latest: float | None = None
    validated: int = -1
    measured: bool = True
    step_of_latest: int = -1
    step: float = 1.0
    stopped: bool = False

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Keeping":
        """Return the state that ``state_dict`` has made plain values of.

        Raises:
            ValueError: If a value is not what it has to be.
        """
        found: Keeping = typed(cls, state, "keeping")
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        return dict(vars(self))


@final
class MetricGuard(Part):
    """A part that undoes cuts after which the monitored metric does not recover.

    Args:
        how: The bound; None keeps the state, and undoes nothing.

    Attributes:
        keeping: The state.
    """

    def __init__(self, how: Guard | None) -> None:
        self.how = how
        self.keeping = Keeping()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the last good one of the run."""
        return {"keeping": self.keeping.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.keeping = Keeping.of(state.get("keeping", {}))

    def forget(self) -> None:
        """Forget the metric and the good state of another module."""
        self.keeping = Keeping()

    def adopt(self) -> None:
        """Begin at the whole step of a new schedule."""
        self.keeping.progress, self.keeping.step, self.keeping.stopped = 0.0, 1.0, False

    def reach(self, way: float) -> float:
        """Return the share of the budget to reach in a round; after a violation, only part of the step is made.

        Args:
            way: The share that the schedule asks for.
        """
        if self.how is None:
            return way
        return self.keeping.progress + self.keeping.step * max(way - self.keeping.progress, 0.0)

    def is_over(self, fit: Fit) -> bool:
        """Return True if no cut will follow, and none is recovering."""
        over = fit.rounds.number >= fit.settings.schedule.rounds or self.keeping.stopped
        return over and self.keeping.judge_after is None

    # -- before the first epoch

    def on_setup(self, fit: Fit) -> None:
        """Warn if training will end before a cut has recovered, or with weights that were not validated."""
        settings, epochs = fit.settings, fit.trainer.max_epochs or -1
        if self.how is not None:
            suitability.warn_of_unseen_weights(fit.warn, fit.trainer)
        open_ends = self.keeping.judge_after is not None or fit.rounds.number < settings.schedule.rounds
        if (self.how or settings.distillation) and open_ends and not self.keeping.stopped:
            end = settings.schedule.epoch_of(settings.schedule.rounds) + settings.recovery_epochs
            if 0 < epochs < end:
                last = f"the {settings.recovery_epochs} epochs of recovery after the last round"
                fit.warn(f"training ends before {last} do: max_epochs is {epochs}, and it would take {end}")

    def on_fit_start(self, fit: Fit, *, is_resumed: bool) -> None:
        """Bring back the model before a cut in whose recovery a fit has failed."""
        keeping = self.keeping
        if is_resumed:
            return
        if keeping.judge_after is not None and keeping.good is not None:
            models = (fit.pl_module, *averages_of(fit.trainer))  # an average has been copied before
            restore_models(models, keeping.good, lambda operation: self._undo_rounds(fit, operation))
            fit.warn("the fit before ended in the middle of a recovery: the model before that cut comes back")
        keeping.judge_after, keeping.good = None, None

    def on_train_start(self, fit: Fit) -> None:
        """Take what a fit before has left for good."""
        if self.keeping.baseline is not None and fit.rounds.done and self.keeping.good is None:
            self._remember(fit)

    # -- epochs

    def on_epoch_start(self, fit: Fit) -> None:
        """Undo a cut that is beyond the bound after its recovery; otherwise store this state as the last good one."""
        keeping, guard = self.keeping, self.how
        if guard is None or keeping.baseline is None or not fit.rounds.done or not keeping.measured:
            return
        is_judged = keeping.judge_after is None
        if not is_judged and keeping.validated < (keeping.judge_after or 0):
            return
        if guard.holds(keeping.latest, keeping.baseline):
            keeping.judge_after = None
            if not is_judged:
                keeping.progress = self.reach(fit.settings.progress(fit.rounds.number))
            self._remember(fit)
        elif not is_judged:
            self._take_back(fit)

    def before_cut(self, fit: Fit, cut: Cut) -> str | None:
        """Store the metric and the state before the cut.

        Returns:
            The reason, if there is nothing that could be kept to.
        """
        keeping, guard = self.keeping, self.how
        if guard is None:
            return None
        if keeping.judge_after is not None:
            return "the cut before it has not been judged: no validation since"
        if keeping.baseline is None and not guard.holds(keeping.latest, keeping.latest or 0.0):
            return f"{guard.metric} is {keeping.latest}, so there is nothing to keep"
        if keeping.baseline is not None and not guard.holds(keeping.latest, keeping.baseline):
            bound = guard.bound(keeping.baseline)
            return f"{guard.metric} is {keeping.latest} already, and {bound:.4g} is the worst that is allowed"
        keeping.baseline = keeping.latest if keeping.baseline is None else keeping.baseline
        self._remember(fit)
        return None

    def during_cut(self, fit: Fit, made: PruningRound, operation: Operation) -> None:
        """Record until when the cut may recover."""
        if self.how is not None:
            operation.keep(self.keeping)
            self.keeping.judge_after = fit.trainer.current_epoch + fit.settings.recovery_epochs - 1
            self.keeping.measured = False

    def on_metric(self, fit: Fit, value: float, epoch: int) -> None:
        """Take the metric that the cut is judged by."""
        self.keeping.latest, self.keeping.validated, self.keeping.measured = value, epoch, True
        self.keeping.step_of_latest = fit.trainer.global_step

    def end(self, fit: Fit) -> bool:
        """Undo cuts whose metric is beyond its bound when training has ended.

        Returns:
            Whether there were any.
        """
        keeping, guard = self.keeping, self.how
        if guard is None or not self.is_waiting(fit):
            return False
        assert keeping.baseline is not None, "it waits"
        keeping.measured = keeping.measured and keeping.step_of_latest == fit.trainer.global_step
        broken = not guard.holds(keeping.latest if keeping.measured else None, keeping.baseline)
        if broken:
            self._take_back(fit)
        elif fit.rounds.number:
            keeping.progress = self.reach(fit.settings.progress(fit.rounds.number))
        keeping.judge_after, keeping.good = None, None
        return broken

    def is_waiting(self, fit: Fit) -> bool:
        """Return True if cuts have been made that could still be undone."""
        keeping = self.keeping
        has_good = keeping.good is not None and keeping.baseline is not None
        return self.how is not None and has_good and bool(fit.rounds.done)

    # -- the last good state

    def _remember(self, fit: Fit) -> None:
        """Store the current state as the last good one."""
        self.keeping.good, self.keeping.good_rounds = take_snapshot(fit.trainer, fit.pl_module), len(fit.rounds.done)

    def _take_back(self, fit: Fit) -> None:
        keeping, guard = self.keeping, self.how
        assert guard is not None and keeping.good is not None and keeping.baseline is not None, "asked before"
        now = f"was {keeping.latest:.4g}" if keeping.measured and keeping.latest is not None else "was not measured"
        undone = len(fit.rounds.done) - keeping.good_rounds
        what = f"{undone} round{'s' * (undone != 1)} taken back" if undone else "its last good state comes back"
        least = f"{guard.bound(keeping.baseline):.4g} is the worst that is allowed"

        def record(operation: Operation) -> None:
            self._undo_rounds(fit, operation)
            for part in fit.parts:
                part.during_undo(fit, operation)

        restore_snapshot(fit.trainer, fit.pl_module, keeping.good, record)
        if fit.settings.reset_early_stopping:
            reset_early_stopping(fit.trainer)
        fit.warn(f"{guard.metric} {now} before epoch {fit.trainer.current_epoch}, and {least}: {what}")
        fit.write(taken_back_scalars(fit.rounds))

    def _undo_rounds(self, fit: Fit, operation: Operation) -> None:
        operation.keep(fit.rounds)
        fit.rounds.take_back(self.keeping.good_rounds)

    def during_undo(self, fit: Fit, operation: Operation) -> None:
        """Record the violation: stop, or try half the step from now on."""
        keeping, guard = self.keeping, self.how
        assert guard is not None, "only a guard undoes cuts"
        operation.keep(keeping)
        keeping.judge_after, keeping.latest = None, None  # it was that of the model that has gone
        keeping.good = keeping.good if fit.rounds.done else None  # without a cut there is no contract
        if guard.on_violation == "stop" or keeping.step / 2 < SMALLEST_STEP:
            keeping.stopped = True
        else:
            keeping.step /= 2
