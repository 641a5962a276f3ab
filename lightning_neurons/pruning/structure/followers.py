"""Networks that follow others, such as momentum and target networks, and lose the same neurons."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lightning_neurons.dependency.groups import Group, Part
from lightning_neurons.pruning.structure.structure import Structure, some_units

Followers = Mapping[str, str]
"""By the path of a follower, that of the network that it follows."""


def mirrored(path: str, followers: Followers) -> list[str]:
    """Return the paths of what follows a module, parameter or layer.

    Example:
        >>> mirrored("net.0.weight", {"target": "net", "ema.module": "net"})
        ['target.0.weight', 'ema.module.0.weight']
    """
    return [f + path.removeprefix(leader) for f, leader in followers.items() if f"{path}.".startswith(f"{leader}.")]


def joined(structure: Structure, followers: Followers) -> Structure:
    """Join the groups of a network with those of its followers.

    Args:
        structure: Of a model, in which followers may have groups of their own, or none as they did not run.
        followers: Of the model.

    Returns:
        The same structure with joint groups; those that do not fit together are refused.
    """
    groups, refused = dict(structure.groups), dict(structure.refused)
    made: dict[str, Group] = {}
    for root, group in structure.groups.items():
        copies = {name for layer in group.layers for name in mirrored(layer, followers)}
        if not copies or root not in groups:
            continue
        own = [g for other, g in groups.items() if other != root and copies & g.layers.keys()]
        joint = _joint(group, own, followers, list(structure.widths))
        if joint is None:
            others = ", ".join(sorted(copies))
            refused[root] = f"it is followed by {others}, whose neurons are coupled with others than its own"
            refused |= {g.root: f"it follows {root}, whose neurons are coupled with others" for g in own}
            continue
        groups[root] = made[root] = joint
        for one in own:
            del groups[one.root]
            reason = refused.pop(one.root, None)
            if reason is not None:
                refused.setdefault(root, f"{one.root}, which follows it, cannot be cut: {reason}")
    there = {layer for group in groups.values() for layer in group.layers}
    unseen = {name: reason for name, reason in structure.coupling.unseen.items() if name not in there}
    for seed in range(2):
        tried = {root: group for root, group in made.items() if root not in refused}
        units = {root: some_units(group, seed) for root, group in tried.items()}
        refused |= structure.preflight.failing(list(tried.values()), units)
    return replace(structure, groups=groups, refused=refused, coupling=replace(structure.coupling, unseen=unseen))


def _joint(group: Group, own: list[Group], followers: Followers, order: list[str]) -> Group | None:
    """Return a group with what follows it, or None where units do not belong together one by one."""
    parts = {(part.path, part.role, part.axis): part for part in group.parts}
    layers = dict(group.layers)
    for part in group.parts:
        for path in mirrored(part.path, followers):
            parts[path, part.role, part.axis] = Part(path, part.role, part.indices, part.axis)
    attributes = {a: None for one in (group, *own) for a in one.attributes}
    attributes |= {replace(a, path=path): None for a in attributes for path in mirrored(a.path, followers)}
    for layer, units in group.layers.items():
        layers |= dict.fromkeys(mirrored(layer, followers), units)
    for one in own:
        if one.size != group.size or any(layers.get(name, units) != units for name, units in one.layers.items()):
            return None
        for part in one.parts:
            key = part.path, part.role, part.axis
            if parts.setdefault(key, part).indices != part.indices:
                return None
        layers |= one.layers
    ordered = {name: layers[name] for name in order if name in layers}
    least = max(g.least for g in (group, *own))
    return Group(group.root, group.size, tuple(parts.values()), ordered, least, tuple(attributes))


def shifts_with_followers(shifts: Mapping[str, Tensor], followers: Followers, ran: set[str]) -> dict[str, Tensor]:
    """Return the shifts of a cut with those of followers that did not run: as in the network that they follow.

    Args:
        shifts: By parameter or buffer, what is added to it.
        followers: Of the model.
        ran: Modules that have been run, and compensated by themselves.

    Returns:
        By parameter or buffer, what is added to it.
    """
    found = dict(shifts)
    for name, shift in shifts.items():
        for other in mirrored(name, followers):
            if other.rpartition(".")[0] not in ran:
                found.setdefault(other, shift)
    return found
