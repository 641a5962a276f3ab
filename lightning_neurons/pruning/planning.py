"""Cuts that are right for a model, made of a budget or of a list of neurons, and tried on a copy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lightning_neurons.dependency.groups import Group
from lightning_neurons.errors import ArgumentError, PruningError
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.plan import PlanCost, PruningPlan
from lightning_neurons.pruning.selection.budget_fill import Dense
from lightning_neurons.pruning.selection.group_scores import GroupScores
from lightning_neurons.pruning.selection.select import Selection, select
from lightning_neurons.pruning.structure.norm_streams import NormStreams
from lightning_neurons.pruning.structure.structure import Structure
from lightning_neurons.pruning.structure.width_attributes import attributes_of, mended
from lightning_neurons.pruning.surgery.surgery import cuts_of, sizes_after

Units = dict[str, list[int]]


def allocations(
    structure: Structure, budget: PruningBudget, scores: Mapping[str, GroupScores], *, dense: Dense | None = None
) -> list[Selection]:
    """Choose the units to remove by a budget, in each of its scopes.

    A choice over all layers can overdo it with the one that looks cheapest: there, half of what a layer keeps when all
    lose the same share goes last.

    Args:
        structure: The model.
        budget: The budget.
        scores: By root.
        dense: The model before earlier cuts.

    Returns:
        One selection for each scope, in their order.
    """
    first, *others = budget.scopes
    even = select(structure, scores, replace(budget, scope=first), dense)
    if not others:
        return [even]
    floored = {}
    for root, given in scores.items():
        stays = given.value.numel() - len(even.units.get(root, ()))
        last = given.value.argsort(stable=True)[given.value.numel() - math.ceil(stays / 2) :]
        floored[root] = replace(given, value=given.value.index_fill(0, last, torch.inf))
    return [
        even,
        *(select(structure, floored, replace(budget, scope=scope), dense) for scope in others),
    ]


def decide(
    structure: Structure,
    budget: PruningBudget,
    selection: Selection,
    earlier: Sequence[Mapping[str, Sequence[int]]] = (),
    *,
    scope: str = "",
) -> Cut:
    """Make a cut of a selection, and try it on a copy.

    Groups whose cut turns out to be wrong stay whole, with a note.

    Args:
        structure: The model.
        budget: The budget.
        selection: The units that the latest measurement would remove.
        earlier: By layer, the neurons that each of some earlier measurements would have removed; a neuron goes only if
            all of them agree.
        scope: The scope that they were selected in.

    Returns:
        The cut, whose plan has reasons, costs and notes.
    """
    units, notes = dict(selection.units), selection.notes
    if earlier:
        agreed: Units = {
            root: [
                u for u in chosen if all(structure.groups[root].layers[root][u][0] in e.get(root, ()) for e in earlier)
            ]
            for root, chosen in units.items()
        }
        lost = sum(map(len, units.values())) - sum(map(len, agreed.values()))
        if lost:
            notes = (*notes, f"{lost} neurons stay: not each of the last {len(earlier) + 1} measurements chose them")
        units = {root: chosen for root, chosen in agreed.items() if chosen}
    failing = structure.preflight.failing([structure.groups[root] for root in units], units)
    notes = (*notes, *(f"{root} is not cut: {reason}" for root, reason in failing.items()))
    units = {root: chosen for root, chosen in units.items() if root not in failing}
    reasons = _reasons(structure, units, selection, budget)
    return Cut.of(structure, _plan(structure, units, reasons, notes), units, scope)


def complete(structure: Structure, plan: PruningPlan) -> Cut:
    """Add to a plan what is coupled with its neurons, and try it on a copy.

    Args:
        structure: The model that the plan's indices are for.
        plan: By layer, neurons to remove.

    Returns:
        The cut, whose plan has the coupled neurons, reasons and costs.

    Raises:
        ArgumentError: If the plan is for another model, or needs norms over fewer neurons and these are refused.
        PruningError: If a neuron cannot be removed, or a layer would have none left.
    """
    _check(plan, structure)
    units: Units = {}
    reasons: dict[str, dict[int, str]] = {}
    for layer, neurons in plan.neurons.items():
        for neuron in neurons:
            found = structure.group_of(layer, neuron)
            if found is None:
                raise PruningError(f"{layer} cannot be cut: {structure.unseen[layer]}")
            root, unit = found
            if root in structure.refused and root not in structure.failed:
                raise PruningError(f"{layer} cannot be cut: {structure.refused[root]}")
            units.setdefault(root, [])
            if unit not in units[root]:
                units[root].append(unit)
            why = plan.reasons.get(layer, {}).get(neuron, "asked for")
            for other, coupled in structure.groups[root].neurons([unit]).items():
                for i in coupled:
                    reasons.setdefault(other, {}).setdefault(
                        i, why if other == layer else f"goes with {layer} {neuron}"
                    )
    least = {layer: group.least for root in units for group in [structure.groups[root]] for layer in group.layers}
    for layer, gone in structure.neurons(units).items():
        if structure.widths[layer] - len(gone) < least[layer]:
            raise PruningError(
                f"{layer} cannot lose {len(gone)} of its {structure.widths[layer]} neurons: at least {least[layer]} "
                "must stay"
            )
    structure = verified(structure, units)
    notes = plan.notes if units else (*plan.notes, "nothing is cut: the plan is empty")
    return Cut.of(structure, _plan(structure, units, reasons, notes), units)


def _check(plan: PruningPlan, structure: Structure) -> None:
    plan.check(structure.widths)
    if plan.norm_streams != "refuse" and structure.norm_streams == "refuse":
        allowed = f"{plan.norm_streams!r}, as the plan removes neurons that norms take their statistics over"
        raise ArgumentError.of("norm_streams", "refuse", allowed)


def verified(structure: Structure, units: Mapping[str, list[int]]) -> Structure:
    """Try a cut, whole, on a copy; groups whose trial with other units failed are judged by these alone.

    Args:
        structure: The model.
        units: By root, the units to remove.

    Returns:
        The structure, with the attributes that have to follow this cut.

    Raises:
        PruningError: If the output is not that with the neurons silenced.
    """

    def failing() -> dict[str, str]:
        return structure.preflight.failing([structure.groups[root] for root in units], units)

    wrong = [structure.groups[root] for root in failing()]
    able = mended(structure.preflight, wrong, units, structure.widths)
    if len(able) < len(wrong) and len(wrong) > 1:  # an attribute may follow several of them
        together = attributes_of(structure.preflight, wrong, units, structure.widths) or []
        able |= {group.root: group for group in together}
    structure = replace(structure, groups={**structure.groups, **able})
    for root, reason in failing().items() if wrong else ():
        raise PruningError(f"{root} cannot be cut: {structure.refused.get(root, reason)}")
    return replace(structure, refused={root: why for root, why in structure.refused.items() if root not in units})


def _plan(
    structure: Structure, units: Units, reasons: Mapping[str, Mapping[int, str]], notes: tuple[str, ...]
) -> PruningPlan:
    neurons = {layer: tuple(chosen) for layer, chosen in structure.neurons(units).items()}
    sizes = sizes_after(structure.preflight.twin, cuts_of(structure.groups.values(), units))
    attributes = {f"{path}.{key}".lstrip("."): pair for path, by in sizes.items() for key, pair in by.items()}
    parameters, macs = structure.counted_without(units)
    cost = PlanCost(structure.costs.parameters(), structure.costs.macs(), parameters, macs)
    inexact = structure.inexact(units)
    norms: NormStreams = "renormalize" if inexact else "refuse"
    return PruningPlan(neurons, dict(structure.widths), reasons, cost, (*notes, *inexact), norms, attributes)


def _reasons(
    structure: Structure, units: Units, selection: Selection, budget: PruningBudget
) -> dict[str, dict[int, str]]:
    end = "of the most silent" if budget.by_deadness else "from below"
    found: dict[str, dict[int, str]] = {}
    for root, chosen in units.items():
        group: Group = structure.groups[root]
        name = selection.scores[root].label or ("random score" if budget.criterion == "random" else budget.label)
        for unit in chosen:
            value = float(selection.scores[root].value[unit]) * (-1 if budget.by_deadness else 1)
            why = f"{name} {value:.3g}: place {selection.places[root][unit] + 1} of {group.size} {end}"
            for layer, neurons in group.neurons([unit]).items():
                for neuron in neurons:
                    coupled = "" if layer == root else f" (goes with {root} {group.layers[root][unit][0]})"
                    found.setdefault(layer, {})[neuron] = why + coupled
    return found
