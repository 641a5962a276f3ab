"""Groups of coupled neurons, which can only be removed together, as plain values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning_neurons.layers.width_handlers import Role


@dataclass(frozen=True)
class Part:
    """A group's share of one module.

    Attributes:
        path: Path of the module, or for the role ``"holds"`` of the parameter.
        role: Its relation to the neurons.
        indices: For each unit of the group, the places that it takes in this module.
        axis: The axis that is cut, for a parameter that is no module's weight.
    """

    path: str
    role: Role
    indices: tuple[tuple[int, ...], ...]
    axis: int | None = None


@dataclass(frozen=True)
class Attribute:
    """A whole number in a module's own attributes that follows the width of a layer, such as a number of heads.

    Attributes:
        path: Path of the module.
        name: Name of the attribute; with a dot, that of an entry of an object that it holds: ``"config.num_heads"``.
        place: Place in a tuple or list, or None.
        layer: The layer that it follows.
        neurons: The neurons of that layer by which it scales: it keeps the share of them that stays.
    """

    path: str
    name: str
    place: int | None
    layer: str
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """A group of coupled neurons of several layers; a *unit* is the smallest set that can only be removed together.

    Attributes:
        root: The first layer of the group, in the order of the model; it names the group.
        size: Number of units.
        parts: All modules that get narrower when a unit is removed.
        layers: For each layer that makes neurons of the group, the neurons of each unit.
        least: Number of neurons that must stay in each of its layers.
        attributes: Whole numbers that have to follow when units are removed.
    """

    root: str
    size: int
    parts: tuple[Part, ...]
    layers: Mapping[str, tuple[tuple[int, ...], ...]]
    least: int = 1
    attributes: tuple[Attribute, ...] = ()

    def neurons(self, units: Iterable[int]) -> dict[str, list[int]]:
        """Return the neurons, by layer, that are removed with some units."""
        units = list(units)
        return {name: sorted(i for u in units for i in of[u]) for name, of in self.layers.items()}


@dataclass(frozen=True)
class Coupling:
    """The coupling of a model's neurons, as read from its graph.

    Attributes:
        groups: All groups, in the order of the model.
        reads: By layer, the layers whose values it reads.
        norm_behind: By layer, the norm layer that alone reads it.
        unseen: Layers that are not in the graph, each with the reason.
        idle: All modules with parameters that did not run, and whose parameters no function has used.
        ends: Layers whose neurons are the model's output.
        lost: By root, the reason why a group could not be followed through the model.
    """

    groups: tuple[Group, ...]
    reads: Mapping[str, tuple[str, ...]]
    norm_behind: Mapping[str, str]
    unseen: Mapping[str, str]
    idle: tuple[str, ...]
    ends: frozenset[str]
    lost: Mapping[str, str] = field(default_factory=dict)
