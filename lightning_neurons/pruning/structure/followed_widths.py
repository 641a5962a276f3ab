"""Numbers in attributes of a model that is loaded: the widths of its tensors are known, and not what was cut.

The attributes that follow are found on the whole model, each with a width by which it scales.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_neurons.dependency.groups import Attribute, Group
from lightning_neurons.dependency.sizes import key_of, size_at
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import Role, width


@dataclass(frozen=True)
class FollowedWidth:
    """A width that a number in an attribute follows.

    Attributes:
        attribute: The number.
        value: Its value in the whole model.
        path: A module with a width that scales as it does.
        role: The width of that module: what it makes, hands on or reads.
        width: That width in the whole model.
    """

    attribute: Attribute
    value: int
    path: str
    role: Role
    width: int


def followed_widths(groups: Iterable[Group], model: nn.Module) -> list[FollowedWidth]:
    """Find, for the attributes of groups, widths in the tensors of a model by which they scale.

    Args:
        groups: Of the model.
        model: Before any cut.

    Returns:
        One for each attribute; none for those that follow no whole width.
    """
    modules, found = modules_by_name(model), []
    for group in groups:
        for attribute in group.attributes:
            value = size_at(modules[attribute.path], key_of(attribute.name, attribute.place))
            places = _widths_like(attribute, group, modules)
            found += [FollowedWidth(attribute, value, *place) for place in places[:1] if value is not None]
    return found


def sizes_by_widths(model: nn.Module, rules: Iterable[FollowedWidth]) -> dict[str, tuple[int, int]]:
    """Compute the numbers in attributes of a model that has been given other widths.

    Args:
        model: With its new widths, and the numbers of the whole one.
        rules: What ``followed_widths`` has found on the whole model.

    Returns:
        By name in the model, the number before and the one that belongs to the widths; none that would not be whole.
    """
    modules, found = modules_by_name(model), {}
    for rule in rules:
        now, rest = divmod(rule.value * (width(modules[rule.path], rule.role) or 0), rule.width)
        if now and not rest:
            a = rule.attribute
            found[f"{a.path}.{key_of(a.name, a.place)}".lstrip(".")] = (rule.value, now)
    return found


def _widths_like(attribute: Attribute, group: Group, modules: Mapping[str, nn.Module]) -> list[tuple[str, Role, int]]:
    """Return modules whose whole width consists of the units that an attribute follows, in equal shares."""
    layer = width(modules[attribute.layer], "makes")
    if layer == len(attribute.neurons):
        return [(attribute.layer, "makes", layer)]
    follows = {u for u, neurons in enumerate(group.layers[attribute.layer]) if {*neurons} & {*attribute.neurons}}
    found: list[tuple[str, Role, int]] = []
    for part in group.parts:
        if part.role == "holds":
            continue
        places = [i for indices in part.indices for i in indices]
        whole = width(modules[part.path], part.role)
        sizes = {len(indices) for indices in part.indices if indices}
        if {u for u, there in enumerate(part.indices) if there} == follows and len(sizes) == 1:
            found += [(part.path, part.role, whole)] if whole == len({*places}) else []
    return found
