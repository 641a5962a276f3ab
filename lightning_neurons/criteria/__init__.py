"""Pure functions: tensors in, one score per neuron out. No state, no model, no Lightning.

Start with ``contract.py``. ``CRITERIA`` lists every rule by name.
"""

from collections.abc import Iterable

from lightning_neurons.criteria import activity, deadness, magnitude, sensitivity
from lightning_neurons.criteria.contract import Criterion, LayerTraits, Statistic, Summary
from lightning_neurons.criteria.ranking import (
    Agreement,
    agreement,
    effective_number,
    normalize,
    order,
    select,
    share_of_top,
)
from lightning_neurons.criteria.view import LayerView
from lightning_neurons.errors import ArgumentError, UnknownNameError

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        activity.MEAN,
        activity.RMS,
        activity.MAX,
        activity.ACTIVE_SHARE,
        activity.VARIANCE,
        activity.DORMANT_SCORE,
        deadness.near_zero(),
        deadness.APOZ,
        deadness.dormant(),
        deadness.constant(),
        deadness.SATURATED,
        sensitivity.GRADIENT,
        sensitivity.TAYLOR,
        sensitivity.TAYLOR_FO,
        sensitivity.FISHER,
        sensitivity.SECOND_ORDER,
        sensitivity.SECOND_ORDER_GGN,
        magnitude.WEIGHT_L1,
        magnitude.WEIGHT_L2,
        magnitude.OUTGOING_L1,
        magnitude.OUTGOING_L2,
        magnitude.NORM_SCALE,
    )
}
"""Every criterion of the package, by name."""

ACTIVATION_CRITERIA: tuple[str, ...] = (
    "mean",
    "rms",
    "max",
    "active_share",
    "variance",
    "dormant_score",
    "near_zero",
    "apoz",
    "dormant",
    "constant",
    "saturated",
)
"""Criteria of one forward: the default of the statistics callback."""

GRADIENT_CRITERIA: tuple[str, ...] = ("gradient", "taylor", "taylor_fo", "fisher", "second_order")
"""Criteria that need one backward to the activations: with the above, the default of the sensitivity callback."""

PREFERRED_CRITERIA: tuple[str, ...] = ("taylor", "fisher", "second_order_ggn", "second_order", "taylor_fo")
"""Criteria that rankings use by default, the first that was measured: all of them see deadness, and the first agree
best with the measured change of the loss when a neuron is switched off."""


def main_criterion(criteria: Iterable[Criterion]) -> str | None:
    """Return the name of the criterion that rankings go by; None if none of them judges importance.

    That is the first of ``PREFERRED_CRITERIA`` among them; else the first that looks at gradients or weights; else
    ``dormant_score``, which is zero for a neuron that never fires; else the first.

    Example:
        >>> main_criterion(resolve(["gradient", "rms", "fisher"])), main_criterion(resolve(["rms", "gradient"]))
        ('fisher', 'gradient')
    """
    important = [c for c in criteria if c.kind == "importance"]
    names = [c.name for c in important]
    deeper = [c.name for c in important if c.needs - {"activation"}]
    choices = (*(n for n in PREFERRED_CRITERIA if n in names), *deeper, *(n for n in names if n == "dormant_score"))
    return next(iter((*choices, *names)), None)


def resolve(criteria: Iterable[str | Criterion], *, name: str = "criteria") -> tuple[Criterion, ...]:
    """Return criteria by name or as they are, each once.

    Raises:
        ArgumentError: If nothing is given, a name is unknown (the nearest are named), something is neither a name nor a
            criterion, or two criteria or statistics share a name without being the same.

    Example:
        >>> [criterion.name for criterion in resolve(["rms", sensitivity.TAYLOR, "rms"])]
        ['rms', 'taylor']
    """
    if isinstance(criteria, str):
        raise ArgumentError.of(name, criteria, f"a list, such as [{criteria!r}]")
    resolved: dict[str, Criterion] = {}
    for entry in criteria:
        if isinstance(entry, str) and entry not in CRITERIA:
            raise UnknownNameError.among(name, entry, CRITERIA)
        if not isinstance(entry, str | Criterion):
            raise ArgumentError.of(name, entry, "names of criteria or Criterion objects")
        criterion = CRITERIA[entry] if isinstance(entry, str) else entry
        if resolved.setdefault(criterion.name, criterion) is not criterion:
            raise ArgumentError.of(name, criterion.name, "criteria of different names")
    if not resolved:
        raise ArgumentError.of(name, list(resolved), "at least one criterion")
    statistics: dict[str, Statistic] = {}
    for statistic in (s for c in resolved.values() for s in c.statistics):
        if statistics.setdefault(statistic.name, statistic) != statistic:
            raise ArgumentError.of(name, statistic.name, "statistics of different names")
    return tuple(resolved.values())


__all__ = [
    "ACTIVATION_CRITERIA",
    "CRITERIA",
    "GRADIENT_CRITERIA",
    "PREFERRED_CRITERIA",
    "Agreement",
    "Criterion",
    "LayerTraits",
    "LayerView",
    "Statistic",
    "Summary",
    "agreement",
    "effective_number",
    "main_criterion",
    "normalize",
    "order",
    "resolve",
    "select",
    "share_of_top",
]
