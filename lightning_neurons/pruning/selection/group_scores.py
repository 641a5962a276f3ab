"""Scores of groups, from scores of neurons: coupled layers have one score together."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_neurons.dependency.groups import Group
from lightning_neurons.pruning.budget import Aggregate, PruningBudget
from lightning_neurons.results.neuron_report import NeuronReport


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores of the units of one group: how much each is worth keeping.

    Attributes:
        value: ``(unit,)``; the lowest go first, NaN was not measured. For deadness it is minus the deadness.
        by_layer: ``(layer, unit)``, the scores by each layer; without rows if no layer was measured.
        label: Name of what they were scored by, if it is not the budget's criterion.
    """

    value: Float[Tensor, " unit"]
    by_layer: Float[Tensor, "layer unit"]
    label: str = ""


def neuron_scores(report: NeuronReport, budget: PruningBudget) -> dict[str, Tensor]:
    """Return the score of each neuron, by the budget's criterion.

    Args:
        report: A measurement that has the budget's criterion.
        budget: The budget.

    Returns:
        By layer, ``(neuron,)``; the lowest go first.
    """
    assert budget.measured is not None, "random scores are not measured"
    name = budget.measured.name
    if budget.by_deadness:
        return {layer: -deadness.double() for layer, deadness in report.deadness_by[name].items()}
    return {layer: s.double() for layer, s in report.importance(name, budget.normalization).items()}


def group_scores(
    groups: Mapping[str, Group], scores: Mapping[str, Tensor], budget: PruningBudget
) -> dict[str, GroupScores]:
    """Return the scores of the units of each group.

    A layer's unit of several neurons counts as their sum, mean or maximum, as ``aggregate`` says; a layer without
    scores has no say, and neither has a NaN, unless all must agree or deadness decides: what is not known to be dead
    stays.

    Args:
        groups: By root.
        scores: By layer, ``(neuron,)``.
        budget: Says how to aggregate.

    Returns:
        By root; the lowest go first.
    """
    strict = budget.agreement == "all"
    how: Aggregate = "max" if strict else budget.aggregate
    found = {}
    for root, group in groups.items():
        rows = [_of_units(scores[n], units, how, strict) for n, units in group.layers.items() if n in scores]
        by_layer = torch.stack(rows) if rows else torch.zeros(0, group.size, dtype=torch.float64)
        value = _reduced(by_layer, how)
        if strict:
            value = torch.where(by_layer.isnan().any(0), torch.nan, value)
        elif budget.by_deadness:
            layers = {n: units for n, units in group.layers.items() if n in scores}
            for place in range(group.size):
                if any(bool(scores[n][list(units[place])].isnan().any()) for n, units in layers.items()):
                    value[place] = torch.nan
        found[root] = GroupScores(value, by_layer)
    return found


def random_scores(groups: Mapping[str, Group], seed: int) -> dict[str, GroupScores]:
    """Return random scores: the control that every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for root, group in groups.items():
        value = torch.rand(group.size, generator=generator, dtype=torch.float64)
        found[root] = GroupScores(value, value[None])
    return found


def _of_units(scores: Tensor, units: tuple[tuple[int, ...], ...], how: Aggregate, strict: bool) -> Tensor:
    """Return a layer's score of each unit; where it has no neuron in one, it agrees to everything."""
    if all(len(unit) == 1 for unit in units):
        return scores[[unit[0] for unit in units]]
    nothing = scores.new_full((), -torch.inf if strict else torch.nan)
    found = []
    for unit in units:
        own = scores[list(unit)]
        unknown = strict and bool(own.isnan().any())
        found.append(
            nothing if not unit else own.new_full((), torch.nan) if unknown else _reduced(own[:, None], how)[0]
        )
    return torch.stack(found)


def _reduced(rows: Tensor, how: Aggregate) -> Tensor:
    """Reduce scores over the first axis; NaN has no say, except where there is nothing else.

    Returns:
        The maximum, sum or mean without the first axis; NaN where all scores are.
    """
    known = ~rows.isnan()
    if how == "max":
        value = torch.where(known, rows, -torch.inf).amax(0) if len(rows) else rows.new_zeros(rows.shape[1:])
    else:
        value = torch.where(known, rows, 0).sum(0)
        value = value / known.sum(0) if how == "mean" else value
    return torch.where(known.any(0), value, torch.nan)
