"""Settings of a pruning callback, in addition to those of an observing one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lightning_neurons.callbacks.pruning.recovery_settings import Distillation, Guard
from lightning_neurons.errors import ArgumentError, check_choice, check_flag
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.compensate import (
    LEAST_SQUARES,
    NONE,
    Compensation,
    CompensationName,
    compensation_named,
)
from lightning_neurons.pruning.request import CONSTANT
from lightning_neurons.pruning.schedule import PruningSchedule

OnUnprunable = Literal["warn", "raise"]
Check = Literal["ablation"]


@dataclass(frozen=True)
class PruningSettings:
    """The settings of ``NeuronPruner``.

    Attributes:
        budget: How much to remove, and by which criterion.
        schedule: The epochs of the rounds.
        compensation: The compensation of removed neurons in the layers that read them.
        reestimate_norms: Whether running statistics are estimated anew, where that helps.
        lossless: Whether only constant neurons may go.
        patience: How many measurements in a row must agree.
        monitor: The metric that is reported before and after.
        recovery_epochs: How many epochs a cut has to recover.
        check: Whether the plan's neurons are silenced together before a cut is decided.
        guard: The bound that the metric must keep, if any.
        distillation: Settings of distillation from the model before the first cut, if any.
        reset_early_stopping: Whether early stopping begins anew after a cut, without the larger model's best score.
        on_unprunable: Warn or raise where layers cannot be cut, or the budget cannot be met.
        example_inputs: Inputs with which the module is traced; None takes the first validation batch.
    """

    budget: PruningBudget
    schedule: PruningSchedule
    compensation: Compensation
    reestimate_norms: bool
    lossless: bool
    patience: int
    monitor: str | None
    recovery_epochs: int
    check: Check | None
    guard: Guard | None
    distillation: Distillation | None
    reset_early_stopping: bool
    on_unprunable: OnUnprunable
    example_inputs: Any

    @property
    def measures(self) -> bool:
        """True if the budget's criterion is measured."""
        return self.budget.measured is not None

    @property
    def calibrates(self) -> bool:
        """True if validation samples have to be kept for the decision."""
        return self.compensation.needs_data or self.reestimate_norms or self.lossless or self.budget.by_reconstruction

    def is_near(self, number: int, epoch: int, every: int) -> bool:
        """Return True if a validation at the end of an epoch is needed for a round or its ``patience``.

        Args:
            number: The round.
            epoch: The epoch.
            every: How many epochs lie between validations.
        """
        lead = (self.patience - 1) * every
        return number <= self.schedule.rounds and epoch + 1 + lead >= self.schedule.epoch_of(number)

    def progress(self, number: int) -> float:
        """Return the share, in [0, 1], of all neurons to remove that are removed after a round of the schedule."""
        rule, value = self.budget.rule
        removed = value if rule == "amount" else 1 - value
        if rule == "threshold" or removed <= 0:
            return 1.0
        return self.schedule.progress(max(number, 1), removed)

    def trial(self) -> PruningBudget:
        """Return a budget with a random criterion, to try before any measurement whether it can be met."""
        given = {"amount": 1e-9, "threshold": None} if self.budget.threshold is not None else {}
        return replace(self.budget, criterion="random", **given)  # type: ignore[arg-type]


def budget_of(lossless: bool, given: Mapping[str, Any]) -> PruningBudget:
    """Return the budget that arguments of a callback ask for.

    Raises:
        ArgumentError: If they contradict one another or are out of range.
    """
    if not check_flag("lossless", lossless):
        criterion = "fisher" if given["criterion"] is None else given["criterion"]
        return PruningBudget(**{**given, "criterion": criterion})
    for name in ("criterion", "amount", "target_params", "target_macs", "threshold"):
        if given[name] is not None:
            raise ArgumentError.of(name, given[name], "None with lossless=True, which takes all constant neurons")
    return PruningBudget(**{**given, "criterion": CONSTANT.criterion, "threshold": CONSTANT.threshold})


def compensation_of(given: CompensationName | None, lossless: bool) -> Compensation:
    """Return the compensation that is asked for.

    Raises:
        ArgumentError: If there is none of that name, or it contradicts ``lossless``.
    """
    if given is None:
        return NONE if lossless else LEAST_SQUARES
    if lossless:
        raise ArgumentError.of("compensation", given, "None with lossless=True, which folds constants")
    return compensation_named(given)


def refuse_overlap(settings: PruningSettings) -> None:
    """Refuse a schedule in which a round begins before the one before it has recovered.

    Raises:
        ArgumentError: Saying how far apart rounds have to be.
    """
    schedule, epochs = settings.schedule, settings.recovery_epochs
    wanted = settings.guard is not None or settings.distillation is not None
    if wanted and schedule.rounds > 1 and schedule.every_n_epochs < epochs:
        allowed = f"at most every_n_epochs={schedule.every_n_epochs}, so that a cut has recovered before the next"
        raise ArgumentError.of("recovery_epochs", epochs, allowed)
    if not wanted and epochs != 1:
        allowed = 'max_drop= (with monitor=) or recovery="distill" beside it; nothing else looks at it'
        raise ArgumentError.of("recovery_epochs", epochs, allowed)


def check_of(given: Any, guard: Guard | None) -> Check | None:
    """Return the check before a cut that is asked for, if any.

    Raises:
        ArgumentError: If there is none of that name, or no guard with whose bound to compare.
    """
    if given is None:
        return None
    check_choice("check", given, get_args(Check))
    if guard is None:
        raise ArgumentError.of("check", given, "None without max_drop= and monitor=, which a cut is checked against")
    return given  # type: ignore[no-any-return]


def reestimation_of(given: bool, lossless: bool) -> bool:
    """Return True if running statistics are to be estimated anew.

    Raises:
        ArgumentError: If that contradicts ``lossless``.
    """
    if check_flag("reestimate_norms", given) and lossless:
        raise ArgumentError.of("reestimate_norms", given, "False with lossless=True, which changes nothing else")
    return given
