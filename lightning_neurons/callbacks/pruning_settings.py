"""What a pruning callback is told, beside what an observing one is."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation import Compensation
from lightning_neurons.pruning.schedule import PruningSchedule

OnUnprunable = Literal["warn", "raise"]


@dataclass(frozen=True)
class PruningSettings:
    """The settings of ``NeuronPruner``.

    Attributes:
        budget: What to remove.
        schedule: When.
        compensation: How to make up for it.
        patience: How many measurements in a row must agree.
        monitor: The metric that is reported before and after.
        reset_early_stopping: Whether early stopping forgets what the larger model could do.
        on_unprunable: What to do about layers that cannot be cut, and budgets that cannot be met.
        example_inputs: What the module is traced with; None takes the first validation batch.
    """

    budget: PruningBudget
    schedule: PruningSchedule
    compensation: Compensation
    patience: int
    monitor: str | None
    reset_early_stopping: bool
    on_unprunable: OnUnprunable
    example_inputs: Any

    def is_near(self, number: int, epoch: int, every: int) -> bool:
        """Whether a validation at the end of an epoch matters for a round, itself or for patience.

        Args:
            number: The round.
            epoch: The epoch.
            every: How many epochs lie between validations.
        """
        lead = (self.patience - 1) * every
        return number <= self.schedule.rounds and epoch + 1 + lead >= self.schedule.epoch_of(number)

    def due(self, number: int) -> PruningBudget:
        """The budget of a round of the schedule."""
        rule, value = self.budget.rule
        removed = value if rule == "amount" else 1 - value
        if rule == "threshold" or removed <= 0:
            return self.budget
        return self.budget.at(self.schedule.progress(max(number, 1), removed))

    def trial(self) -> PruningBudget:
        """The budget by which is tried, before anything has been measured, whether it can be met."""
        given = {"amount": 1e-9, "threshold": None} if self.budget.threshold is not None else {}
        return replace(self.budget, criterion="random", **given)  # type: ignore[arg-type]
