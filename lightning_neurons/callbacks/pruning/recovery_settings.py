"""Settings of the recovery after a cut: the guard of a metric, and distillation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_neurons.errors import ArgumentError, check_choice, check_flag, check_share, is_number

Mode = Literal["max", "min"]
OnViolation = Literal["stop", "halve"]

GUARD_KEYWORDS: dict[str, Any] = {
    "monitor": None, "mode": None, "max_drop": None, "relative_drop": False, "on_violation": "stop",
}  # fmt: skip
"""The single arguments that a ``Guard`` stands for, with their defaults."""

DISTILLATION_KEYWORDS: dict[str, Any] = {
    "recovery": None, "output": None, "teacher": None, "temperature": 2.0, "distillation_weight": 1.0, "class_axis": 1,
}  # fmt: skip
"""The single arguments that a ``Distillation`` stands for, with their defaults."""

_LESS_IS_BETTER = ("loss", "error", "err_", "_err", "perplexity", "ppl", "mse", "mae")

SMALLEST_STEP = 1 / 16
"""Smallest step of a round, as a share of the one asked for; cuts stop when it is violated too."""


@dataclass(frozen=True)
class Guard:
    """A bound that a logged metric must keep after cuts: the argument ``guard`` of ``NeuronPruningCallback``.

    Attributes:
        metric: The metric, as the module logs it.
        tolerance: How much worse it may be than before the first cut, when a cut has had its epochs of recovery and
            when ``fit`` ends.
        mode: Whether more of it is better, ``"max"``, or less, ``"min"``; None goes by its name: less of a loss, error
            or perplexity, more of anything else.
        relative: Whether ``tolerance`` is a share of the metric before the first cut.
        on_violation: ``"stop"`` pruning after a cut that was taken back, or try again with ``"halve"`` the step.

    Raises:
        ArgumentError: If a value is out of range.

    Example:
        >>> from lightning_neurons import Guard
        >>> Guard("val_acc", tolerance=0.25, relative=True).bound(0.5), Guard("val_loss", tolerance=0.5).mode
        (0.375, 'min')
    """

    metric: str
    tolerance: float
    mode: Mode | None = None
    relative: bool = False
    on_violation: OnViolation = "stop"

    def __post_init__(self) -> None:
        _check_metric("metric", self.metric)
        _check_ways(self.mode, self.on_violation)
        check_flag("relative", self.relative)
        _check_drop("tolerance", self.tolerance, self.relative)
        object.__setattr__(self, "tolerance", float(self.tolerance))
        object.__setattr__(self, "mode", self.mode or _mode_of(self.metric))

    def bound(self, baseline: float) -> float:
        """Return the worst value that is allowed, for a metric that was ``baseline`` before the first cut."""
        drop = self.tolerance * abs(baseline) if self.relative else self.tolerance
        return baseline - drop if self.mode == "max" else baseline + drop

    def holds(self, value: float | None, baseline: float) -> bool:
        """Return True if a value is within the bound; None and NaN are not."""
        if value is None or math.isnan(value):
            return False
        return value >= self.bound(baseline) if self.mode == "max" else value <= self.bound(baseline)


@dataclass(frozen=True)
class Distillation:
    """Distillation from the model before the first cut into the one after it (Hinton et al. 2015, section 2).

    The argument ``distillation`` of ``NeuronPruningCallback``: while a cut recovers, the Kullback-Leibler divergence of
    the logits is added to the gradient of whatever loss ``training_step`` has.

    Attributes:
        output: The module whose output are the logits; None is the module's forward, or its one network if it has none.
        temperature: The divisor of the logits; the loss is multiplied by its square.
        weight: The factor of the distillation loss.
        class_axis: The axis of the logits on which the classes lie.
        teacher: A checkpoint of the module to learn from, also a larger one; None takes the model before the first cut,
            which then goes into checkpoints.

    Raises:
        ArgumentError: If a value is out of range, or there is no such file.

    Example:
        >>> from lightning_neurons import Distillation
        >>> Distillation(temperature=4.0).weight
        1.0
    """

    output: str | None = None
    temperature: float = 2.0
    weight: float = 1.0
    class_axis: int = 1
    teacher: str | Path | None = None

    def __post_init__(self) -> None:
        _check_distillation(self.output, self.temperature, self.weight, self.class_axis, self.teacher, "weight")
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "weight", float(self.weight))
        object.__setattr__(self, "teacher", None if self.teacher is None else Path(self.teacher))


def guard_of(guard: Guard | None, keywords: Mapping[str, Any], *, can_halve: bool) -> Guard | None:
    """Return the guard that arguments of a callback ask for, if any.

    Args:
        guard: The argument of this name.
        keywords: Those of ``GUARD_KEYWORDS``.
        can_halve: Whether the budget has a half step.

    Raises:
        ArgumentError: If they contradict one another or are out of range.
    """
    if guard is not None:
        if not isinstance(guard, Guard):
            raise ArgumentError.of("guard", guard, 'a Guard, such as Guard("val_acc", tolerance=0.01)')
        refuse_beside("guard", keywords, GUARD_KEYWORDS)
    else:
        guard = _guard_of_keywords(**keywords)
    if guard is not None and guard.on_violation == "halve" and not can_halve:
        raise ArgumentError.of(
            "on_violation", "halve", '"stop" with a threshold or lossless=True: there is no half step'
        )
    return guard


def _guard_of_keywords(monitor: Any, mode: Any, max_drop: Any, relative_drop: Any, on_violation: Any) -> Guard | None:
    if monitor is not None:
        _check_metric("monitor", monitor)
    _check_ways(mode, on_violation)
    check_flag("relative_drop", relative_drop)
    if max_drop is None:
        _refuse_without(
            {"mode": mode, "relative_drop": relative_drop, "on_violation": on_violation}, GUARD_KEYWORDS, "max_drop="
        )
        return None
    if monitor is None:
        raise ArgumentError.of("monitor", None, f"the metric that may fall by max_drop={max_drop}, such as 'val_acc'")
    _check_drop("max_drop", max_drop, relative_drop)
    return Guard(monitor, max_drop, mode, relative_drop, on_violation)


def distillation_of(distillation: Distillation | None, keywords: Mapping[str, Any]) -> Distillation | None:
    """Return the distillation that arguments of a callback ask for, if any.

    Args:
        distillation: The argument of this name.
        keywords: Those of ``DISTILLATION_KEYWORDS``.

    Raises:
        ArgumentError: If they contradict one another or are out of range.
    """
    if distillation is not None:
        if not isinstance(distillation, Distillation):
            raise ArgumentError.of("distillation", distillation, "a Distillation, such as Distillation(temperature=2)")
        refuse_beside("distillation", keywords, DISTILLATION_KEYWORDS)
        return distillation
    settings = dict(keywords)
    recovery = settings.pop("recovery")
    if recovery is None:
        _refuse_without(settings, DISTILLATION_KEYWORDS, 'recovery="distill"')
        return None
    check_choice("recovery", recovery, ("distill",))
    settings["weight"] = settings.pop("distillation_weight")
    _check_distillation(**settings, weight_name="distillation_weight")
    return Distillation(**settings)


def refuse_beside(group: str, keywords: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse single arguments beside the value that stands for all of them.

    Args:
        group: The name of the argument with that value.
        keywords: The single arguments.
        defaults: Their defaults, which a configuration file may write out.

    Raises:
        ArgumentError: Naming the argument.
    """
    for name, value in keywords.items():
        plain = tuple(value) if isinstance(value, list) else value
        if plain is not defaults[name] and plain != defaults[name]:
            raise ArgumentError.of(name, value, f"{defaults[name]!r} beside {group}=, which has it")


def _check_metric(name: str, metric: object) -> None:
    if not isinstance(metric, str) or not metric:
        raise ArgumentError.of(name, metric, "the name of a logged metric")


def _check_ways(mode: str | None, on_violation: str) -> None:
    if mode is not None:
        check_choice("mode", mode, get_args(Mode))
    check_choice("on_violation", on_violation, get_args(OnViolation))


def _check_drop(name: str, drop: Any, relative: bool) -> None:
    if relative:
        check_share(name, drop)
    elif not is_number(drop) or not 0 <= drop < math.inf:
        raise ArgumentError.of(name, drop, "a number of at least 0, in units of the metric")


def _check_distillation(
    output: object, temperature: Any, weight: Any, class_axis: object, teacher: object, weight_name: str
) -> None:
    if output is not None and not isinstance(output, str):
        raise ArgumentError.of("output", output, 'the path of the module whose output are the logits, such as "net"')
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ArgumentError.of("temperature", temperature, "a number above 0")
    if not is_number(weight) or not 0 <= weight < math.inf:
        raise ArgumentError.of(weight_name, weight, "a number of at least 0")
    if not isinstance(class_axis, int) or isinstance(class_axis, bool) or class_axis == 0:
        raise ArgumentError.of("class_axis", class_axis, "an axis of the logits behind the batch: 1, or -1")
    if teacher is not None and not isinstance(teacher, str | Path):
        raise ArgumentError.of("teacher", type(teacher).__name__, "the path of a checkpoint of the module")
    if teacher is not None and not Path(teacher).is_file():
        raise ArgumentError.of("teacher", str(teacher), "the path of a checkpoint of the module; there is no such file")


def _mode_of(metric: str) -> Mode:
    """Return "min" if a metric's name is that of a loss or an error, else "max"."""
    return "min" if any(word in metric.lower() for word in _LESS_IS_BETTER) else "max"


def _refuse_without(values: Mapping[str, Any], defaults: Mapping[str, Any], without: str) -> None:
    """Refuse values that are not the default, and would have no effect."""
    for name, value in values.items():
        if value != defaults[name]:
            raise ArgumentError.of(name, value, f"{defaults[name]!r} without {without}")
