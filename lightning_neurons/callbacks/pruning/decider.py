"""Decision on a round: which neurons are removed, judged by what a validation has left."""

from dataclasses import replace
from typing import Any, cast, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons.callbacks.pruning.deciding import Decision, Survey, Verdict
from lightning_neurons.callbacks.pruning.followers import Following
from lightning_neurons.callbacks.pruning.part import Fit, Part
from lightning_neurons.callbacks.pruning.training_trial import TrainingTrial
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.runner import KeptBatches, Runner
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.data.batches import map_tensors, results_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.typed import typed


@final
class Decider(Part):
    """A part that makes plans, and knows what has been found out about the module for them.

    Attributes:
        seed: Of random scores; that of the run.
        left_whole: By root, groups that training needs whole, with the reason.
        following: Networks in the module that follow others.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.left_whole: dict[str, str] = {}
        self.following = Following()

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and what has been found out about the module."""
        following = self.following
        found_out = {"left_whole": self.left_whole, "followers": following.known, "marks": following.marks}
        return {"seed": self.seed, **found_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.seed = typed(int | None, state["seed"], "seed")
        self.left_whole = typed(dict[str, str], state.get("left_whole", {}), "left_whole")
        self.following = Following()
        self.following.known = typed(dict[str, str], state.get("followers", {}), "followers")
        self.following.marks = typed(dict[str, Tensor], state.get("marks", {}), "marks")

    def forget(self) -> None:
        """Forget what was found out about another module."""
        self.left_whole, self.following = {}, Following()

    def on_setup(self, fit: Fit) -> None:
        """Take the seed of the run."""
        self.seed = torch.initial_seed() % 2**31 if self.seed is None else self.seed

    def on_fit_start(self, fit: Fit, *, is_resumed: bool) -> None:
        """Remember the parameters before training, to find networks that follow others."""
        self.following.begin(fit.pl_module)

    def on_train_start(self, fit: Fit) -> None:
        """Do so for lazy layers, which the sanity check has finished."""
        self.following.begin(fit.pl_module)

    def try_plan(self, fit: Fit) -> None:
        """Make a plan with a random criterion before any measurement, to find out what is in the way.

        Raises:
            MisconfigurationException: If the budget cannot be met.
        """
        decision = self._decision(fit)
        verdict = decision.judge([fit.settings.trial()], None, 0, is_due=False)
        self._note(fit, decision.survey, verdict, fatal=fit.settings.budget.amount is None)

    def decide(
        self, fit: Fit, report: NeuronReport | None, budget: PruningBudget, number: int, *, is_due: bool
    ) -> Cut | None:
        """Choose the neurons of a round; with ``patience``, several measurements do.

        Args:
            fit: At the end of a validation.
            report: Its measurement, if the criterion has one.
            budget: Of the round.
            number: The round.
            is_due: Whether it is due; else this measurement only counts for ``patience``.

        Returns:
            The cut, compensated; None if the round is not due, or measurements are missing.

        Raises:
            PruningError: If no plan could be made.
        """
        settings, rounds, known = fit.settings, fit.rounds, {*self.left_whole}
        trial = self._working_trial(fit)
        decision = self._decision(fit, frozenset() if trial is None else trial.moved)
        samples = fit.samples
        calibration = _calibration_of(fit.trainer, fit.pl_module, samples.runner, samples.kept, fit.callback.loss_fn)
        decision.gather(budget, calibration)
        seed = (self.seed or 0) + rounds.number
        verdict = decision.judge([budget, settings.budget], report, seed, is_due=is_due, trial=trial)
        new = [f"{root}: {why}" for root, why in self.left_whole.items() if root not in known]
        self._note(fit, replace(decision.survey, unprunable=(*decision.survey.unprunable, *new)), verdict)
        patience = settings.patience
        rounds.votes = [*rounds.votes, verdict.vote][1 - patience :] if patience > 1 else []
        if not verdict.candidates:
            return None
        cut = decision.prepare(verdict, calibration, number)
        if not cut.plan and not any("met already" in note for note in verdict.notes):
            fit.warn(f"nothing is cut in round {number}: {'; '.join(cut.plan.notes)}")
        return cut

    def _decision(self, fit: Fit, moving: frozenset[str] = frozenset()) -> Decision:
        moving = fit.trainer.strategy.broadcast(moving, 0)
        alike = self.following.look(fit.trainer, fit.pl_module, moving)
        return Decision(
            fit.trainer, fit.pl_module, fit.samples.runner, fit.settings, fit.rounds, self.left_whole, alike
        )

    def _working_trial(self, fit: Fit) -> TrainingTrial | None:
        """Return the trial of training steps; None if a process has none, or the step does not run on a copy."""
        trial, strategy = fit.samples.take_trial(), fit.trainer.strategy
        if not strategy.reduce_boolean_decision(trial is not None and trial.can_try(), all=True):
            return None
        assert trial is not None, "every process has it"
        reason = trial.failure()
        if strategy.reduce_boolean_decision(reason is None, all=True):
            return trial
        fit.warn(
            f"training_step does not run on a copy of the module ({reason or 'in another process'}), so it is not "
            "known what only training reads",
            once="training_step",
        )
        return None

    def _note(self, fit: Fit, survey: Survey, verdict: Verdict, fatal: bool = False) -> None:
        """Store the model's original sizes, and warn of layers and budgets that are in the way."""
        fit.rounds.dense = survey.dense
        problems = [*(f"cannot cut {reason}" for reason in survey.unprunable), *verdict.unmet]
        if (problems and fit.settings.on_unprunable == "raise") or (fatal and verdict.unmet):
            raise MisconfigurationException(f"{fit.who}: {'; '.join(problems)}")
        for problem in (*problems, *(note for note in verdict.notes if note.startswith("MACs are not counted"))):
            fit.warn(problem)


def _calibration_of(
    trainer: Trainer, pl_module: LightningModule, runner: Runner | None, kept: KeptBatches, loss_fn: LossFunction | None
) -> Calibration:
    """Return calibration data: the kept samples of every process.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        runner: Runs the module; None in a process that has had no batch.
        kept: Its samples.
        loss_fn: From module and batch to the loss; None takes what ``validation_step`` returns or logs.

    Returns:
        The samples of this process with functions that run the module on them and reduce over processes.
    """

    def run(module: nn.Module, batch: object) -> Any:
        assert runner is not None, "samples were kept, so there was a batch"
        return runner(module, map_tensors(batch, Tensor.clone))  # a forward may change it

    def loss(module: nn.Module, batch: object) -> Tensor:
        own = cast(LightningModule, module)  # itself, or a copy
        if own is not pl_module and own._trainer is None:
            own.trainer = trainer
        replay = StepReplay(trainer, own, "validation_step", loss_fn)
        try:
            with replay.isolated():
                return replay.loss(batch)
        except MeasurementError:  # there is none: then let outputs stay what they are
            pairs = zip(*(results_of(run(m, batch)) for m in (pl_module, module)), strict=True)
            return torch.stack([(a - b).square().mean() for a, b in pairs if a.is_floating_point()]).sum()

    return Calibration(
        list(kept.on(pl_module.device)),
        run,
        loss,
        reduce=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"),
        agree=lambda value: trainer.strategy.broadcast(value, 0),
    )
