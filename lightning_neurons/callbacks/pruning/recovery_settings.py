"""Settings of the recovery after a cut: the guard of a metric, and distillation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_neurons.errors import ArgumentError, check_choice, check_flag, check_share, is_number

Mode = Literal["max", "min"]
OnViolation = Literal["stop", "halve"]

DEFAULTS = {"output": None, "teacher": None, "temperature": 2.0, "distillation_weight": 1.0, "class_axis": 1}

_LESS_IS_BETTER = ("loss", "error", "err_", "_err", "perplexity", "ppl", "mse", "mae")

SMALLEST_STEP = 1 / 16
"""Smallest step of a round, as a share of the one asked for; cuts stop when it is violated too."""


@dataclass(frozen=True)
class Guard:
    """A bound that a metric must keep after cuts.

    Attributes:
        monitor: The metric.
        mode: Whether more of it is better, or less.
        max_drop: How much worse it may become than before the first cut.
        relative: Whether that is a share of what it was.
        on_violation: Whether to stop after a cut that was taken back, or to try half the step.
    """

    monitor: str
    mode: Mode
    max_drop: float
    relative: bool
    on_violation: OnViolation

    def bound(self, baseline: float) -> float:
        """Return the worst value that is allowed.

        Example:
            >>> Guard("val_acc", "max", 0.25, True, "stop").bound(0.5)
            0.375
        """
        drop = self.max_drop * abs(baseline) if self.relative else self.max_drop
        return baseline - drop if self.mode == "max" else baseline + drop

    def holds(self, value: float | None, baseline: float) -> bool:
        """Return True if a value is within the bound; None and NaN are not."""
        if value is None or math.isnan(value):
            return False
        return value >= self.bound(baseline) if self.mode == "max" else value <= self.bound(baseline)


@dataclass(frozen=True)
class Distillation:
    """The settings of distillation from the model before the first cut (Hinton et al. 2015).

    Attributes:
        output: The module whose output are the logits; None is the module's forward.
        temperature: The divisor of the logits.
        weight: The factor of the distillation loss in the sum with the model's loss.
        class_axis: The axis of the logits on which the classes lie.
        teacher: A checkpoint of the teacher; None takes the model before the first cut.
    """

    output: str | None
    temperature: float
    weight: float
    class_axis: int
    teacher: Path | None


def guard_of(
    monitor: Any, mode: Any, max_drop: Any, relative_drop: Any, on_violation: Any, *, can_halve: bool
) -> Guard | None:
    """Return the guard that arguments of a callback ask for, if any.

    Raises:
        ArgumentError: If they contradict one another or are out of range.
    """
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        raise ArgumentError.of("monitor", monitor, "the name of a logged metric")
    if mode is not None:
        check_choice("mode", mode, get_args(Mode))
    check_choice("on_violation", on_violation, get_args(OnViolation))
    check_flag("relative_drop", relative_drop)
    if max_drop is None:
        _refuse_given({"mode": (mode, None), "relative_drop": (relative_drop, False)}, "max_drop=")
        _refuse_given({"on_violation": (on_violation, "stop")}, "max_drop=")
        return None
    if monitor is None:
        raise ArgumentError.of("monitor", None, f"the metric that may fall by max_drop={max_drop}, such as 'val_acc'")
    if relative_drop:
        check_share("max_drop", max_drop)
    elif not is_number(max_drop) or not 0 <= max_drop < math.inf:
        raise ArgumentError.of("max_drop", max_drop, "a number of at least 0, in units of the metric")
    if on_violation == "halve" and not can_halve:
        raise ArgumentError.of(
            "on_violation", "halve", '"stop" with a threshold or lossless=True: there is no half step'
        )
    return Guard(monitor, mode or _mode_of(monitor), float(max_drop), relative_drop, on_violation)


def distillation_of(
    recovery: Any, output: Any, temperature: Any, weight: Any, class_axis: Any, teacher: Any
) -> Distillation | None:
    """Return the distillation that arguments of a callback ask for, if any.

    Raises:
        ArgumentError: If they contradict one another or are out of range.
    """
    if recovery is None:
        given = {"output": output, "teacher": teacher, "temperature": temperature, "distillation_weight": weight}
        given["class_axis"] = class_axis
        _refuse_given({name: (value, DEFAULTS[name]) for name, value in given.items()}, 'recovery="distill"')
        return None
    check_choice("recovery", recovery, ("distill",))
    if output is not None and not isinstance(output, str):
        raise ArgumentError.of("output", output, 'the path of the module whose output are the logits, such as "net"')
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ArgumentError.of("temperature", temperature, "a number above 0")
    if not is_number(weight) or not 0 <= weight < math.inf:
        raise ArgumentError.of("distillation_weight", weight, "a number of at least 0")
    if not isinstance(class_axis, int) or isinstance(class_axis, bool) or class_axis == 0:
        raise ArgumentError.of("class_axis", class_axis, "an axis of the logits behind the batch: 1, or -1")
    if teacher is not None and not isinstance(teacher, str | Path):
        raise ArgumentError.of("teacher", type(teacher).__name__, "the path of a checkpoint of the module")
    path = None if teacher is None else Path(teacher)
    if path is not None and not path.is_file():
        raise ArgumentError.of("teacher", str(path), "the path of a checkpoint of the module; there is no such file")
    return Distillation(output, float(temperature), float(weight), class_axis, path)


def _mode_of(monitor: str) -> Mode:
    """Return "min" if a metric's name is that of a loss or an error, else "max"."""
    return "min" if any(word in monitor.lower() for word in _LESS_IS_BETTER) else "max"


def _refuse_given(given: Mapping[str, tuple[Any, Any]], without: str) -> None:
    """Refuse values that are not the default, and would have no effect."""
    for name, (value, default) in given.items():
        if value != default:
            raise ArgumentError.of(name, value, f"{default!r} without {without}")
