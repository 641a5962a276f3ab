"""Settings of a pruning callback, in addition to those of an observing one."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from lightning_neurons.callbacks.pruning.recovery_settings import (
    DISTILLATION_KEYWORDS,
    GUARD_KEYWORDS,
    Distillation,
    Guard,
    distillation_of,
    guard_of,
    refuse_beside,
)
from lightning_neurons.errors import ArgumentError, check_choice, check_count, check_flag
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.compensate import (
    LEAST_SQUARES,
    NONE,
    Compensation,
    CompensationName,
    compensation_named,
)
from lightning_neurons.pruning.request import CONSTANT, checked_norm_streams
from lightning_neurons.pruning.schedule import PruningSchedule, Shape
from lightning_neurons.pruning.structure.norm_streams import NormStreams

OnUnprunable = Literal["warn", "raise"]
Check = Literal["ablation"]


@dataclass(frozen=True)
class PruningSettings:
    """The settings of ``NeuronPruningCallback``, checked.

    Attributes:
        budget: How much to remove, and by which criterion.
        schedule: The epochs of the rounds.
        compensation: The compensation of removed neurons in the layers that read them.
        reestimate_norms: Whether running statistics are estimated anew, where that helps.
        lossless: Whether only constant neurons may go.
        norm_streams: Whether norms may take their statistics over fewer neurons.
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
    norm_streams: NormStreams
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


BUDGET_KEYWORDS: dict[str, Any] = {
    **{one.name: one.default for one in fields(PruningBudget)}, "criterion": None,
}  # fmt: skip
"""The single arguments that a ``PruningBudget`` stands for, with the callback's defaults."""

SCHEDULE_KEYWORDS: dict[str, Any] = {"start_epoch": 1, "end_epoch": None, "every_n_epochs": 1}
"""The single arguments that a ``PruningSchedule`` stands for beside its shape, with their defaults."""


def settings_of(arguments: Mapping[str, Any]) -> PruningSettings:
    """Return the settings that the arguments of a callback ask for.

    Args:
        arguments: By name, those of ``NeuronPruningCallback``; ``budget``, ``schedule``, ``guard`` and
            ``distillation`` each stand for several others.

    Raises:
        ArgumentError: If an argument is out of range or contradicts another.
    """

    def part(names: Mapping[str, Any]) -> dict[str, Any]:
        return {name: arguments[name] for name in names}

    lossless = arguments["lossless"]
    budget = budget_of(arguments["budget"], lossless, part(BUDGET_KEYWORDS))
    schedule = schedule_of(arguments["schedule"], part(SCHEDULE_KEYWORDS), budget)
    guard = guard_of(arguments["guard"], part(GUARD_KEYWORDS), can_halve=budget.threshold is None)
    settings = PruningSettings(
        budget=budget,
        schedule=schedule,
        compensation=compensation_of(arguments["compensation"], lossless),
        reestimate_norms=reestimation_of(arguments["reestimate_norms"], lossless),
        lossless=lossless,
        norm_streams=checked_norm_streams(arguments["norm_streams"], lossless),
        patience=check_count("patience", arguments["patience"]),
        monitor=arguments["monitor"] if guard is None else guard.metric,
        recovery_epochs=check_count("recovery_epochs", arguments["recovery_epochs"]),
        check=check_of(arguments["check"], guard),
        guard=guard,
        distillation=distillation_of(arguments["distillation"], part(DISTILLATION_KEYWORDS)),
        reset_early_stopping=check_flag("reset_early_stopping", arguments["reset_early_stopping"]),
        on_unprunable=check_choice("on_unprunable", arguments["on_unprunable"], get_args(OnUnprunable)),  # type: ignore[arg-type]
        example_inputs=arguments["example_inputs"],
    )
    refuse_overlap(settings)
    return settings


def budget_of(budget: PruningBudget | None, lossless: bool, keywords: Mapping[str, Any]) -> PruningBudget:
    """Return the budget that arguments of a callback ask for.

    Args:
        budget: The argument of this name.
        lossless: Whether only constant neurons may go.
        keywords: Those of ``BUDGET_KEYWORDS``.

    Raises:
        ArgumentError: If they contradict one another or are out of range.
    """
    check_flag("lossless", lossless)
    if budget is not None:
        if not isinstance(budget, PruningBudget):
            raise ArgumentError.of("budget", budget, 'a PruningBudget, such as PruningBudget("fisher", amount=0.3)')
        if lossless:
            raise ArgumentError.of("budget", budget, "None with lossless=True, which takes all constant neurons")
        refuse_beside("budget", keywords, BUDGET_KEYWORDS)
        return budget
    if not lossless:
        criterion = "fisher" if keywords["criterion"] is None else keywords["criterion"]
        return PruningBudget(**{**keywords, "criterion": criterion})
    for name in ("criterion", "amount", "target_params", "target_macs", "threshold"):
        if keywords[name] is not None:
            raise ArgumentError.of(name, keywords[name], "None with lossless=True, which takes all constant neurons")
    return PruningBudget(**{**keywords, "criterion": CONSTANT.criterion, "threshold": CONSTANT.threshold})


def schedule_of(
    schedule: Shape | PruningSchedule, keywords: Mapping[str, Any], budget: PruningBudget
) -> PruningSchedule:
    """Return the schedule that arguments of a callback ask for.

    Args:
        schedule: The argument of this name: a shape, or a whole schedule.
        keywords: Those of ``SCHEDULE_KEYWORDS``.
        budget: What is scheduled.

    Raises:
        ArgumentError: If they contradict one another or are out of range.
    """
    if isinstance(schedule, PruningSchedule):
        refuse_beside("schedule", keywords, SCHEDULE_KEYWORDS)
        shape, end_epoch = schedule.shape, schedule.end_epoch
    else:
        shape, end_epoch = schedule, keywords["end_epoch"]
    if shape == "one_shot" and end_epoch is not None and budget.threshold is None:
        raise ArgumentError.of("end_epoch", end_epoch, 'None with schedule="one_shot", which has one round')
    return schedule if isinstance(schedule, PruningSchedule) else PruningSchedule(schedule, **keywords)


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


def check_of(given: Check | None, guard: Guard | None) -> Check | None:
    """Return the check before a cut that is asked for, if any.

    Raises:
        ArgumentError: If there is none of that name, or no guard with whose bound to compare.
    """
    if given is None:
        return None
    check_choice("check", given, get_args(Check))
    if guard is None:
        raise ArgumentError.of("check", given, "None without max_drop= and monitor=, which a cut is checked against")
    return given


def reestimation_of(given: bool, lossless: bool) -> bool:
    """Return True if running statistics are to be estimated anew.

    Raises:
        ArgumentError: If that contradicts ``lossless``.
    """
    if check_flag("reestimate_norms", given) and lossless:
        raise ArgumentError.of("reestimate_norms", given, "False with lossless=True, which changes nothing else")
    return given
