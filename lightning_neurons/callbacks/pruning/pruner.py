"""Base class of the pruning callbacks: measures as observers do, decides after validation, cuts before the next epoch.

Until then the plan is pending and goes into every checkpoint, so that a resumed run goes on as the uninterrupted one.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_neurons.callbacks.observing.monitored import MonitoredObserver
from lightning_neurons.callbacks.observing.publish import publish_rounds
from lightning_neurons.callbacks.pruning import suitability
from lightning_neurons.callbacks.pruning.calibration import calibration_of
from lightning_neurons.callbacks.pruning.checkpoint import follow_checkpoints, restore_attributes, stop_following
from lightning_neurons.callbacks.pruning.cutting import averages_of, cut_in_fit, metric_now, reset_early_stopping
from lightning_neurons.callbacks.pruning.deciding import Decision, Survey, Verdict
from lightning_neurons.callbacks.pruning.followers import Following
from lightning_neurons.callbacks.pruning.other_settings import state_of_other_settings
from lightning_neurons.callbacks.pruning.resume import batches_trained, first_batches, make_up
from lightning_neurons.callbacks.pruning.settings import PruningSettings
from lightning_neurons.callbacks.pruning.training_trial import BATCHES, TrainingTrial
from lightning_neurons.callbacks.trainer.checks import is_unfinished
from lightning_neurons.callbacks.trainer.outlet import keeping_training
from lightning_neurons.callbacks.trainer.runner import KeptBatches, Runner, check_cut
from lightning_neurons.callbacks.trainer.validated_weights import keep_weights, validated_weights
from lightning_neurons.errors import ArgumentError, PruningError
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.rounds import PruningRound, Rounds
from lightning_neurons.pruning.structure.costs import latency
from lightning_neurons.pruning.surgery.surgery import Operation
from lightning_neurons.report.logging.pruning import print_rounds, round_scalars, start_scalars
from lightning_neurons.results.typed import typed


class NeuronPruner(MonitoredObserver):
    """Common base of the pruning callbacks: ``pruning`` has the settings, ``rounds`` the cuts so far."""

    publishes = False

    def __init__(self, settings: MeasurementSettings, pruning: PruningSettings) -> None:
        super().__init__(settings, 1)
        self.pruning, self._monitored = pruning, pruning.monitor
        self.rounds = Rounds()
        self._seed: int | None = None
        self._runner: Runner | None = None
        self._kept = KeptBatches(0)
        self._trial: TrainingTrial | None = None
        self._left_whole: dict[str, str] = {}
        self._following = Following()
        self._fitted: Any = None  # a weak reference to the module of the last fit
        self._restored = self._validated = False
        self._validated_at: int | None = None  # after how many batches
        self._open: Rounds | None = None  # as they were when the validation began that is going on

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fitted": None, "_runner": None, "_trial": None}  # they belong to a running fit

    @property
    def plan(self) -> PruningPlan:
        """The neurons that have been removed so far, in the indices of the original model."""
        return self.rounds.plan

    @property
    def pending(self) -> PruningPlan | None:
        """The neurons that will be removed when the next training epoch begins; None if there are none."""
        return None if self.rounds.pending is None else self.rounds.pending.plan

    def state_dict(self) -> dict[str, Any]:
        """Return rounds, the pending plan and the history, as plain values and tensors.

        While a validation goes on, the rounds are those before it: when the run is resumed, it is made again.
        """
        return {
            **super().state_dict(),
            "rounds": (self._open or self.rounds).state_dict(),
            "seed": self._seed,
            "validated": self._validated_at,
            "left_whole": self._left_whole,
            "followers": self._following.known,
            "marks": self._following.marks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rounds of a checkpoint.

        Raises:
            ArgumentError: If they are broken; the callback is then as it was.
        """
        with self._reading_state():
            super().load_state_dict(state_dict)
            self.rounds, self._seed = Rounds.from_state(state_dict["rounds"]), state_dict["seed"]
            self._left_whole = typed(dict[str, str], state_dict.get("left_whole", {}), "left_whole")
            self._following = Following()
            self._following.known = typed(dict[str, str], state_dict.get("followers", {}), "followers")
            self._following.marks = typed(dict[str, torch.Tensor], state_dict.get("marks", {}), "marks")
            self._restored, self._validated_at = True, typed(int | None, state_dict.get("validated"), "validated")

    @contextmanager
    def _reading_state(self) -> Iterator[None]:
        before = dict(vars(self))
        try:
            yield
        except Exception as error:
            vars(self).update(before)
            got = f"the state of {type(self).__name__} in a checkpoint ({type(error).__name__}: {error})"
            raise ArgumentError.of("ckpt_path", got, "one that it has written, whole") from error

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take over the rounds of a pruning callback with other settings, and warn: budgets are of the whole model."""
        restore_attributes((pl_module, *averages_of(trainer)), self.plan, checkpoint)
        other = state_of_other_settings(checkpoint, self.state_key) if trainer.state.fn == "fit" else None
        if other is not None:
            self._adopt(other[0])
            self._warn(
                f"the checkpoint was written with other settings ({other[1]}): the {len(self.plan)} neurons that have "
                "gone stay away and count towards what is to go now, which is a share of the model before any cut"
            )

    def _adopt(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)
        self.rounds = replace(self.rounds, pending=None, votes=[], earlier=len(self.rounds.done))

    # -- before anything runs

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, and let checkpoints of other widths be loaded, in every stage."""
        if stage == "fit":
            schedule, following = self.pruning.schedule, self.rounds.number + 1
            start = schedule.epoch_of(following) if following <= schedule.rounds else None
            suitability.refuse_strategy(type(self).__name__, trainer)
            suitability.refuse_run(type(self).__name__, trainer, pl_module, start, self.pruning.patience)
            if start is not None and start < (trainer.max_epochs or -1) <= schedule.epoch_of(schedule.rounds):
                self._warn(f"training ends before the last round, of epoch {schedule.epoch_of(schedule.rounds)}")
            suitability.refuse_company(type(self).__name__, trainer, NeuronPruner)
            suitability.warn_of_stale_checkpoints(self._warn, trainer)
            self._seed = torch.initial_seed() % 2**31 if self._seed is None else self._seed
            self._validated, self._open = False, None
        super().setup(trainer, pl_module, stage)
        for module in (pl_module, *averages_of(trainer)):  # an average may have been copied before
            follow_checkpoints(module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse optimizers that cannot go on, and rounds of another model."""
        super().on_fit_start(trainer, pl_module)
        suitability.refuse_patterns(pl_module, self.pruning.budget)
        suitability.refuse_optimizers(type(self).__name__, trainer)
        known = self._restored or (self._fitted is not None and self._fitted() is pl_module)
        self._fitted, self._restored = weakref.ref(pl_module), False
        if (is_fresh := suitability.is_fresh(type(self).__name__, pl_module, self.rounds)) or not known:
            self._forget(is_fresh)  # what was decided was decided for another module
        self._following.begin(pl_module)

    def _forget(self, is_fresh: bool) -> None:
        self.rounds, self._left_whole = Rounds() if is_fresh else self.rounds, {}
        self._following = Following()
        self.rounds.pending, self.rounds.votes, self.rounds.undone = None, [], []

    # -- measuring

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the first batches of an epoch after which a round may be decided, to try training steps on."""
        if batch_idx < BATCHES and self._is_near(trainer):
            if batch_idx == 0 or self._trial is None:
                self._trial = TrainingTrial(trainer, pl_module)
            self._trial.add(batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _keep_training_batches(self, trainer: Any, pl_module: Any) -> None:
        """Keep the first training batches after a resume, where the epoch of the validation was over already."""
        if self._is_near(trainer):
            self._trial = TrainingTrial(trainer, pl_module)
            with keeping_training(self, "no training step is tried before the next cut"):
                for batch, batch_idx in first_batches(trainer, BATCHES):
                    self._trial.add(batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to measure, if a round is due or near."""
        self._open = None if trainer.sanity_checking else replace(self.rounds)
        self._runner, near = None, self._is_near(trainer)
        wanted = self.pruning.calibrates or self.pruning.monitor is not None
        self._kept = KeptBatches(self.max_samples if wanted and near else 0)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Find out how to run the module, and copy samples before the step can change them."""
        is_kept = dataloader_idx == 0 and self._is_near(trainer) and not is_unfinished(pl_module)
        if is_kept:
            if self._runner is None:
                self._runner = Runner(trainer, pl_module, self.pruning.example_inputs, batch)
            self._kept.add(batch)
            if self._trial is not None:
                self._trial.add_validation(batch)
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if is_kept:
            keep_weights(trainer, pl_module, self, batch_idx)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Do nothing: test data are not measured."""

    on_test_end = on_test_epoch_start

    def _due(self, trainer: Any) -> bool:
        return self._is_near(trainer) and self.pruning.measures

    def _is_near(self, trainer: Any) -> bool:
        """Return True if this validation is the sanity check, or is needed for a round or its ``patience``."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return bool(trainer.sanity_checking)
        every = trainer.check_val_every_n_epoch or 1
        return bool(trainer.fast_dev_run) or self.pruning.is_near(self.rounds.number + 1, trainer.current_epoch, every)

    # -- deciding

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide on the round that is due, with the weights that were validated; in a trial run, only try a plan."""
        with validated_weights(trainer):
            self._measure_and_decide(trainer, pl_module)

    def _measure_and_decide(self, trainer: Any, pl_module: Any) -> None:
        self.report = None
        super().on_validation_epoch_end(trainer, pl_module)
        trial = trainer.sanity_checking or trainer.fast_dev_run
        measured = not self.pruning.measures or self.report is not None
        # The first process decides for all: another one may have had no data.
        if not trainer.strategy.broadcast(self._runner is not None and (trial or measured), 0):
            return
        try:
            (self._try if trial else self._decide)(trainer, pl_module)
        except PruningError as error:  # before training begins it is an error, later it costs a round
            if trainer.global_step == 0:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
            self._warn(f"no plan could be made after epoch {trainer.current_epoch}: {error}", once=str(error))

    def _try(self, trainer: Any, pl_module: Any) -> None:
        self._kept = KeptBatches(0)  # a resumed run must not take these few for a validation
        decision = self._decision(trainer, pl_module)
        verdict = decision.judge([self.pruning.trial()], None, 0, is_due=False)
        self._note(decision.survey, verdict, fatal=self.pruning.budget.amount is None)

    def _decide(self, trainer: Any, pl_module: Any) -> None:
        schedule, patience = self.pruning.schedule, self.pruning.patience
        is_due = (number := schedule.due(trainer.current_epoch + 1)) > self.rounds.number
        if is_due and suitability.is_over(trainer):
            self._warn(f"round {number} of {schedule.rounds} is not made: no epoch follows {trainer.current_epoch}")
            return
        trial, known = self._working_trial(trainer), {*self._left_whole}
        decision = self._decision(trainer, pl_module, frozenset() if trial is None else trial.moved)
        calibration = calibration_of(trainer, pl_module, self._runner, self._kept, self.loss_fn)
        budgets = [self._due_budget(number), self.pruning.budget]
        decision.gather(budgets[0], calibration)
        seed = (self._seed or 0) + self.rounds.number
        verdict = decision.judge(budgets, self.report, seed, is_due=is_due, trial=trial)
        new = [f"{root}: {why}" for root, why in self._left_whole.items() if root not in known]
        self._note(replace(decision.survey, unprunable=(*decision.survey.unprunable, *new)), verdict)
        self.rounds.votes = [*self.rounds.votes, verdict.vote][1 - patience :] if patience > 1 else []
        if not verdict.candidates:
            return
        pending = self.rounds.pending = decision.prepare(verdict, calibration, number)
        if not pending.plan and not any("met already" in note for note in verdict.notes):
            self._warn(f"nothing is cut in round {number}: {'; '.join(pending.plan.notes)}")

    def _decision(self, trainer: Any, pl_module: Any, moving: frozenset[str] = frozenset()) -> Decision:
        alike = self._following.look(trainer, pl_module, trainer.strategy.broadcast(moving, 0))
        return Decision(trainer, pl_module, self._runner, self.pruning, self.rounds, self._left_whole, alike)

    def _working_trial(self, trainer: Any) -> TrainingTrial | None:
        """Return the trial of training steps; None if a process has none, or the step does not run on a copy."""
        trial, self._trial = self._trial, None
        if not trainer.strategy.reduce_boolean_decision(trial is not None and trial.can_try(), all=True):
            return None
        assert trial is not None, "every process has it"
        reason = trial.failure()
        if trainer.strategy.reduce_boolean_decision(reason is None, all=True):
            return trial
        self._warn(
            f"training_step does not run on a copy of the module ({reason or 'in another process'}), so it is not "
            "known what only training reads",
            once="training_step",
        )
        return None

    def _due_budget(self, number: int) -> PruningBudget:
        """Return the budget of a round of the schedule."""
        return self.pruning.budget.at(self.pruning.progress(number))

    def _note(self, survey: Survey, verdict: Verdict, fatal: bool = False) -> None:
        """Store the model's original sizes, and warn of layers and budgets that are in the way."""
        self.rounds.dense = survey.dense
        problems = [*(f"cannot cut {reason}" for reason in survey.unprunable), *verdict.unmet]
        if (problems and self.pruning.on_unprunable == "raise") or (fatal and verdict.unmet):
            raise MisconfigurationException(f"{type(self).__name__}: {'; '.join(problems)}")
        for problem in (*problems, *(note for note in verdict.notes if note.startswith("MACs are not counted"))):
            self._warn(problem)

    # -- cutting

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate again what a resume has left out, and log the sizes of the model before any cut."""
        self._following.begin(pl_module)
        make_up(trainer, self._validated_at, partial(self._keep_training_batches, trainer, pl_module))
        self._validated = False  # what training logs in an epoch is not there, if it was resumed at its end
        if (dense := self.rounds.dense) is not None and not self.rounds.done:
            self._write(trainer, start_scalars(dense))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the pending cut: after every checkpoint of the last epoch, and before the first batch of this one."""
        self._look(trainer, trainer.current_epoch - 1)
        if self.rounds.pending is not None:
            self._carry_out(trainer, pl_module, self.rounds.pending)
        self._kept, self._runner = KeptBatches(0), None

    def _carry_out(self, trainer: Any, pl_module: Any, pending: Cut) -> None:
        monitor = self.pruning.monitor
        before = trainer.callback_metrics.get(monitor) if monitor is not None else None
        made = PruningRound(
            pending.number,
            trainer.current_epoch,
            trainer.global_step,
            pending.plan,
            latency_before=self._latency(pl_module),
            before=None if before is None else float(before),
        )
        try:
            cut_in_fit(trainer, pl_module, pending.tensor_cuts, pending.shifts, partial(self._book, trainer, made))
        except PruningError as error:
            self.rounds.pending = None
            self._warn(f"round {pending.number} is not made at epoch {trainer.current_epoch}: {error}")
            return
        if self.pruning.reset_early_stopping and pending.tensor_cuts:
            reset_early_stopping(trainer)
        # From here on, whatever fails or is interrupted finds a whole cut that has been written down.
        now = None
        with keeping_training(self, f"{monitor} was not measured after the cut"):
            now = metric_now(trainer, pl_module, self._kept, monitor)
        self.rounds.done[-1] = made = replace(made, latency=self._latency(pl_module), cut=now)
        self._write(trainer, round_scalars(made, self.rounds.widths()))
        rank_zero_info(f"{type(self).__name__}: {made.summary}")

    def _book(self, trainer: Any, made: PruningRound, operation: Operation) -> None:
        """Record a round as a part of the cut itself, so that an interruption leaves both or neither."""
        if made.plan:
            check_cut(trainer, self._runner)
        operation.keep(self.rounds)
        self.rounds.finish(made)

    def _latency(self, pl_module: Any) -> float | None:
        if self._runner is not None:
            with keeping_training(self, "the time of a forward was not measured"):
                return latency(pl_module, self._runner.example)
        return None

    def _write(self, trainer: Any, values: dict[str, float]) -> None:
        publish_rounds(trainer, self, values)

    # -- the end

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the metric; warn in the sanity check if validation does not log it."""
        super().on_validation_end(trainer, pl_module)
        monitor, metrics = self.pruning.monitor, trainer.callback_metrics
        if monitor is not None and trainer.sanity_checking and metrics and monitor not in metrics:
            self._warn(suitability.unknown_monitor(trainer, monitor))
        self._open = None
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validated, self._validated_at = True, batches_trained(trainer)

    def _hear(self, trainer: Any, value: float, epoch: int) -> None:
        if self.rounds.note_recovery(value):
            self._write(trainer, {"pruning/metric_after": value})

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the rounds; warn of cuts that were not made."""
        if self.pending is not None:
            self._warn(
                f"training ended before a plan for {len(self.pending)} neurons was carried out; it is in checkpoints, "
                "and is carried out when training is resumed"
            )
        if not self.plan and not trainer.fast_dev_run:
            self._warn("all cuts have been taken back" if self.rounds.undone else "nothing has been cut")
        elif self.plan and (rounds := self.rounds).dense is not None and trainer.is_global_zero:
            print_rounds(rounds.done, rounds.dense, rounds.widths(), self.pruning.monitor, undone=rounds.undone)

    def _drop(self, trainer: Any) -> None:
        for module in (trainer.lightning_module, *averages_of(trainer)):
            if module is not None:  # an exception may come before there is one
                stop_following(module)
        self._runner, self._trial, self._kept = None, None, KeptBatches(0)
        super()._drop(trainer)
