"""The choice of the units to remove: an order of all candidates, and how far along it the budget reaches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_neurons.dependency.groups import Group
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.selection.budget_fill import Dense, bucket_of, by_root, reach, rounded
from lightning_neurons.pruning.selection.group_scores import GroupScores
from lightning_neurons.pruning.structure.structure import Structure


@dataclass(frozen=True)
class Selection:
    """The units to remove, and why not more.

    Attributes:
        units: By root, the units to remove, sorted.
        places: By root and unit, its place in the order of its group, 0 being the least worth keeping.
        notes: The limits of the choice.
        scores: By root, the scores that they were chosen by.
    """

    units: Mapping[str, list[int]]
    places: Mapping[str, Mapping[int, int]]
    notes: tuple[str, ...]
    scores: Mapping[str, GroupScores] = field(compare=False)


def select(
    structure: Structure, scores: Mapping[str, GroupScores], budget: PruningBudget, dense: Dense | None = None
) -> Selection:
    """Choose the units to remove.

    Args:
        structure: The model.
        scores: By root; groups without scores stay.
        budget: The budget.
        dense: The model before earlier cuts; None if there were none.

    Returns:
        Units by root, their places in the order, notes and the scores.

    Raises:
        UnknownNameError: If a pattern of ``budget.ignore`` matches no layer.
    """
    dense = Dense.of(structure) if dense is None else dense
    notes = [f"{name} is not cut: {reason}" for name, reason in {**structure.refused, **structure.unseen}.items()]
    ignored = budget.ignores(list(structure.widths))
    groups = {}
    for root, group in structure.offered.items():
        kept = [layer for layer in group.layers if layer in ignored]
        if kept:
            notes.append(f"{root} is not cut: {kept[0]} is to be ignored")
        else:
            groups[root] = group
    candidates = {root: _candidates(root, scores, budget, notes) for root in groups}
    room = _room(structure, groups, budget, dense)
    order = _order(structure, candidates, scores, budget, room)

    def units_of(some: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
        return rounded(by_root(some), groups, budget.round_to)

    reached = reach(structure, groups, order, budget, dense, units_of, notes)
    taken, chosen = by_root(reached), units_of(reached)
    lost = sum(map(len, taken.values())) - sum(map(len, chosen.values()))
    if lost:
        notes.append(f"{lost} neurons stay, so that widths are multiples of round_to={budget.round_to}")
    held = sum(map(len, candidates.values())) - len(order)
    if held and budget.rule[0] == "threshold":
        notes.append(f"{held} neurons stay, as min_neurons and max_amount ask for")
    places = {root: _places(scores[root].value) for root in candidates if root in scores}
    gone = structure.neurons(chosen)
    full = [layer for layer, neurons in gone.items() if len(neurons) >= room[layer]]
    if full and budget.rule[0] != "threshold":
        notes.append(f"as narrow as min_neurons, max_amount and round_to allow: {', '.join(full)}")
    if not chosen and not any("not reached" in note or "nothing is cut" in note for note in notes):
        notes.append(f"nothing is cut: {_why_nothing(groups, scores, budget)}")
    if structure.costs.uncounted:
        notes.append(f"MACs are not counted in {', '.join(structure.costs.uncounted)}: no formula is known for them")
    if structure.routed:
        names = ", ".join(structure.routed)
        notes.append(f"MACs are those on the example, as values decide which samples run through {names}")
    return Selection({root: sorted(units) for root, units in chosen.items() if units}, places, tuple(notes), scores)


def _why_nothing(groups: Mapping[str, Group], scores: Mapping[str, GroupScores], budget: PruningBudget) -> str:
    known = [s.value[~s.value.isnan()] for root, s in scores.items() if root in groups]
    values = torch.cat(known) if known else torch.zeros(0)
    name, value = budget.rule
    if not groups:
        return "there is no layer that may be cut"
    if name != "threshold" or not len(values) or budget.criterion == "random":
        return "no neuron fits the budget"
    nearest = float(values.min())
    end = f"more (the highest is {0.0 - nearest:.3g})" if budget.by_deadness else f"less (the lowest is {nearest:.3g})"
    return f"no neuron has a {budget.label} of {value:g} or {end}"


def _candidates(root: str, scores: Mapping[str, GroupScores], budget: PruningBudget, notes: list[str]) -> list[int]:
    """Return the units of a group that may go at all, the least worth keeping first; ties in the model's order."""
    if root not in scores:
        return []
    given = scores[root]
    unknown = int(given.value.isnan().sum())
    if unknown:
        notes.append(f"{root}: {unknown} of {len(given.value)} neurons have no score (not measured) and stay")
    allowed = ~given.value.isnan()
    name, value = budget.rule
    if name == "threshold":
        allowed &= given.value <= (-value if budget.by_deadness else value)
    elif name == "amount" and budget.agreement == "all":
        present = given.by_layer > -torch.inf  # a layer may have no neuron in a unit
        ranks = given.by_layer.argsort(dim=1, stable=True).argsort(dim=1, stable=True) - (~present).sum(1, keepdim=True)
        lowest = torch.tensor([[round(value * int(count))] for count in (present | given.by_layer.isnan()).sum(1)])
        agreed = (~present | (ranks < lowest.reshape(-1, 1))).all(0) & ~given.by_layer.isnan().any(0)
        disputed = int((allowed & ~agreed & (present & (ranks < lowest.reshape(-1, 1))).any(0)).sum())
        if disputed:
            notes.append(f"{root}: {disputed} neurons stay, as not all of its layers agree")
        allowed &= agreed
    order = torch.sort(given.value, stable=True).indices.tolist()
    return [unit for unit in order if allowed[unit]]


def _room(structure: Structure, groups: Mapping[str, Group], budget: PruningBudget, dense: Dense) -> dict[str, int]:
    """Return the number of neurons of each layer that may be removed."""
    least: dict[str, int] = {}
    for group in groups.values():
        for layer in group.layers:
            least[layer] = max(group.least, least.get(layer, 1))
    room = {}
    for layer, floor in least.items():
        # Floating point must not cost a neuron: 0.3 of 10 are 3.
        ceiling = math.ceil(dense.widths.get(layer, 0) * (1 - budget.max_amount) - 1e-9)
        room[layer] = max(structure.widths[layer] - max(floor, budget.min_neurons, ceiling), 0)
    return room


def _order(
    structure: Structure,
    candidates: Mapping[str, list[int]],
    scores: Mapping[str, GroupScores],
    budget: PruningBudget,
    room: Mapping[str, int],
) -> list[tuple[str, int]]:
    """Return all candidates of all groups for which there is room, the first to go first.

    Ties between groups go by the place within the group, so that equal scores thin out all layers alike.
    """
    keyed = []
    buckets = bucket_of(structure, budget)
    in_bucket: dict[str, list[Tensor]] = {}
    for root in candidates:
        if root in scores:
            in_bucket.setdefault(buckets[root], []).append(scores[root].value)
    sorted_values = {name: torch.cat(values).nan_to_num(torch.inf).sort().values for name, values in in_bucket.items()}
    for position, (root, units) in enumerate(candidates.items()):
        for place, unit in enumerate(units):
            value = float(scores[root].value[unit])
            fraction = (place + 1) / len(scores[root].value)
            if budget.scopes[0] == "global":
                key = value
            elif budget.scopes[0] == "layer":
                key = fraction
            else:
                rivals = sorted_values[buckets[root]]
                key = float(torch.searchsorted(rivals, value, right=True)) / len(rivals)
            keyed.append((key, fraction, position, place, (root, unit)))
    left, found = dict(room), []
    for *_, (root, unit) in sorted(keyed):
        taken = {layer: len(of[unit]) for layer, of in structure.groups[root].layers.items()}
        if all(left[layer] >= count for layer, count in taken.items()):
            left.update({layer: left[layer] - count for layer, count in taken.items()})
            found.append((root, unit))
    return found


def _places(value: Tensor) -> dict[int, int]:
    """Return the place of each unit in the order of its group."""
    return {unit: place for place, unit in enumerate(torch.sort(value, stable=True).indices.tolist())}
