"""The beginning of an order of candidates that a budget removes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_neurons.dependency.groups import Group
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.structure.structure import Structure

Chosen = dict[str, list[int]]
"""Units by root."""


@dataclass(frozen=True)
class Dense:
    """The model before anything was cut; budgets are shares of it.

    Attributes:
        widths: Neurons by layer.
        parameters: Number of parameters.
        macs: Multiply-accumulate operations per sample.
    """

    widths: Mapping[str, int]
    parameters: int
    macs: int

    @classmethod
    def of(cls, structure: Structure) -> "Dense":
        """Return the size of a model that has not been cut."""
        return cls(structure.widths, structure.costs.parameters(), structure.costs.macs())

    def size(self, group: Group, structure: Structure) -> int:
        """Return the number of units that a group had."""
        gone = self.widths.get(group.root, 0) - structure.widths[group.root]
        neurons = sum(map(len, group.layers[group.root]))
        return group.size + gone * group.size // neurons


def bucket_of(structure: Structure, budget: PruningBudget) -> dict[str, str]:
    """Name, for each group, the set whose neurons compete with one another.

    Returns:
        Names by root: one for the whole model, or that of the layer or the block.
    """
    if budget.scopes[0] == "global":
        return dict.fromkeys(structure.groups, "the model")
    if budget.scopes[0] == "layer":
        return {root: root for root in structure.groups}
    return {root: structure.blocks[root] for root in structure.groups}


def reach(
    structure: Structure,
    groups: Mapping[str, Group],
    order: list[tuple[str, int]],
    budget: PruningBudget,
    dense: Dense,
    units_of: Callable[[Sequence[tuple[str, int]]], dict[str, list[int]]],
    notes: list[str],
) -> list[tuple[str, int]]:
    """Return the beginning of the order that the budget asks for.

    Args:
        structure: The model.
        groups: The groups that may be cut, by root.
        order: All candidates, the first to go first.
        budget: The budget.
        dense: The model before any cut.
        units_of: Returns the units that are removed of some candidates, after rounding.
        notes: A list to which limits are added.

    Returns:
        Pairs of root and unit.
    """
    name, value = budget.rule
    if name == "threshold":
        return order
    if name == "amount":
        return _reach_amount(structure, groups, order, budget, dense, notes)
    total = dense.macs if name == "target_macs" else dense.parameters

    def share(count: int) -> float:
        parameters, macs = structure.costs_without(units_of(order[:count]))
        return (macs if name == "target_macs" else parameters) / total

    low, high = 0, len(order)
    if share(0) <= value:
        notes.append(f"nothing is cut: {name}={value:g} is met already")
        return []
    if share(high) > value:
        notes.append(f"{name}={value:g} is not reached: {share(high):.3f} remain when all goes that may")
        return order
    while low < high:  # the shortest beginning of the order that meets the target
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= value else (middle + 1, high)
    return order[:low]


def _reach_amount(
    structure: Structure,
    groups: Mapping[str, Group],
    order: list[tuple[str, int]],
    budget: PruningBudget,
    dense: Dense,
    notes: list[str],
) -> list[tuple[str, int]]:
    buckets, left = bucket_of(structure, budget), {}
    # Groups that have been cut to their least width count, although they are not offered any more.
    spent = [g for g in structure.groups.values() if g.root not in groups and dense.size(g, structure) > g.size]
    for bucket in dict.fromkeys(buckets[root] for root in groups):
        inside = [group for group in (*groups.values(), *spent) if buckets[group.root] == bucket]
        before, now = sum(dense.size(group, structure) for group in inside), sum(group.size for group in inside)
        left[bucket] = max(round(budget.rule[1] * before) - (before - now), 0)
    asked, chosen = any(left.values()), []
    for root, unit in order:
        if left[buckets[root]] > 0:
            left[buckets[root]] -= 1
            chosen.append((root, unit))
    if left and not asked:
        gone = any(dense.size(group, structure) > group.size for group in (*groups.values(), *spent))
        single = all(len(unit) <= 1 for group in groups.values() for units in group.layers.values() for unit in units)
        why = "is met already" if gone else f"is less than one {'neuron' if single else 'unit, such as a head'}"
        notes.append(f"nothing is cut: amount={budget.rule[1]:g} {why}")
    missing = ", ".join(f"{count} neurons of {bucket}" for bucket, count in left.items() if count)
    if missing:
        notes.append(f"amount={budget.rule[1]:g} is not reached: {missing} should go as well, and may not")
    return chosen


def by_root(units: Sequence[tuple[str, int]]) -> Chosen:
    """Sort candidates by the group that they belong to.

    Returns:
        Units by root, each list in the order of the candidates.
    """
    found: Chosen = {}
    for root, unit in units:
        found.setdefault(root, []).append(unit)
    return found


def rounded(units: Mapping[str, list[int]], groups: Mapping[str, Group], round_to: int) -> Chosen:
    """Keep units, the most important first, until each width is a multiple of ``round_to``.

    Returns:
        By root, the units that are still removed, in their order; roots without any are left out.
    """
    found = {}
    for root, chosen in units.items():
        back = -(groups[root].size - len(chosen)) % round_to
        if len(chosen) > back:
            found[root] = chosen[: len(chosen) - back]
    return found
