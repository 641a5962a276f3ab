"""Neurons that can only be removed together, as plain values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning_neurons.layers.width_handlers import Role


@dataclass(frozen=True)
class Part:
    """What one module has of a group.

    Attributes:
        path: The module, or for the role ``"holds"`` the parameter.
        role: What it does with the neurons.
        indices: For each unit of the group, the places that it takes in this module.
        axis: Of a parameter that is no module's weight, the axis that is cut.
    """

    path: str
    role: Role
    indices: tuple[tuple[int, ...], ...]
    axis: int | None = None


@dataclass(frozen=True)
class Group:
    """Neurons of several layers that can only be removed together; a *unit* is the smallest set of them.

    Attributes:
        root: The first layer of the group, in the order of the model; it names the group.
        size: How many units there are.
        parts: All modules that are narrower when a unit goes.
        layers: For each layer that makes neurons of the group, the neurons of each unit.
        least: How many neurons of each of its layers must stay.
    """

    root: str
    size: int
    parts: tuple[Part, ...]
    layers: Mapping[str, tuple[tuple[int, ...], ...]]
    least: int = 1

    def neurons(self, units: Iterable[int]) -> dict[str, list[int]]:
        """The neurons, by layer, that go with some units."""
        units = list(units)
        return {name: sorted(i for u in units for i in of[u]) for name, of in self.layers.items()}


@dataclass(frozen=True)
class Coupling:
    """What a model's graph says.

    Attributes:
        groups: All groups, in the order of the model.
        reads: By layer, the layers whose values it reads.
        norm_behind: By layer, the norm layer that alone reads it.
        unseen: Layers that are not in the graph, each with the reason.
        idle: All modules with parameters that did not run, and whose parameters nothing else has used.
        ends: Layers whose neurons are the model's output.
        lost: By root, why a group could not be followed through the model.
    """

    groups: tuple[Group, ...]
    reads: Mapping[str, tuple[str, ...]]
    norm_behind: Mapping[str, str]
    unseen: Mapping[str, str]
    idle: tuple[str, ...]
    ends: frozenset[str]
    lost: Mapping[str, str] = field(default_factory=dict)
